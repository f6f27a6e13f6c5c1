"""The main job: give data and a budget, get the best compact model inside it.

>>> import trimtab as tt
>>> tt.compact("digits", budget="size<=32KB", time="60s", out="out/")  # doctest: +SKIP

The package is callable, so that `tt.compact(...)` works although `trimtab.compact` is also a package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimtab.core.lazy import callable_package

if TYPE_CHECKING:
    from trimtab.compact.job import compact

__all__ = ["compact"]


def __getattr__(name: str) -> Any:
    if name == "compact":
        from trimtab.compact import job

        return job.compact
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


callable_package(__name__, "compact")
