"""Making a model smaller: the channel graph, pruning, quantization, factorization.

>>> from trimtab.compress import ChannelGraph, magnitude
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.compress.graph import ChannelGraph, Group
    from trimtab.compress.prune.magnitude import magnitude

_WHERE = {
    "ChannelGraph": "trimtab.compress.graph",
    "Group": "trimtab.compress.graph",
    "magnitude": "trimtab.compress.prune.magnitude",
}
__all__ = ["ChannelGraph", "Group", "magnitude"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
