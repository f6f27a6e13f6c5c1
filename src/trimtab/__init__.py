"""trimtab makes vision models small.

The few names below are the public face; they are imported when first used, so that `import trimtab` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module that defines it
_FACE = {
    "create_model": "trimtab.models",
    "list_models": "trimtab.models",
    "load": "trimtab.models",
    "save": "trimtab.core.artifact",
    "load_data": "trimtab.data",
    "fit": "trimtab.learn",
    "evaluate": "trimtab.learn",
    "measure": "trimtab.core.cost",
    "Cost": "trimtab.core.cost",
    "Budget": "trimtab.core.budget",
    "apply": "trimtab.core.edit",
    "export": "trimtab.deploy",
    "compact": "trimtab.compact",
    "catalogue": "trimtab.core.card",
    "design": "trimtab.search",
}
_ROOMS = ("compact", "compress", "core", "data", "deploy", "learn", "models", "nn", "report", "search", "testing")
__all__ = [
    "Budget",
    "Cost",
    "__version__",
    "apply",
    "catalogue",
    "compact",
    "create_model",
    "evaluate",
    "export",
    "fit",
    "list_models",
    "load",
    "load_data",
    "measure",
    "save",
]

if TYPE_CHECKING:  # for editors and type checkers; at run time __getattr__ does it
    from trimtab.compact import compact
    from trimtab.core.artifact import save
    from trimtab.core.budget import Budget
    from trimtab.core.card import catalogue
    from trimtab.core.cost import Cost, measure
    from trimtab.core.edit import apply
    from trimtab.data import load_data
    from trimtab.deploy import export
    from trimtab.learn import evaluate, fit
    from trimtab.models import create_model, list_models, load


def __getattr__(name: str) -> Any:
    if name in _FACE:
        value = getattr(importlib.import_module(_FACE[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"trimtab.{name}")
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
