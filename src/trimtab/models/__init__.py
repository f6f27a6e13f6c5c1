"""Models by name: `create_model` gives any architecture of timm and ours, `load` and `save` keep them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.models.factory import create_model, list_models, load, save

__all__ = ["create_model", "list_models", "load", "save"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from trimtab.models import factory  # brings torch and timm, hence only now

        return getattr(factory, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
