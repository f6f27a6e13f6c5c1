"""Compression by name: what the command line, recipes and the main job use to call a method that is chosen at run time.

A method is a function of `trimtab.compress` with the slug of its system: `method(model, data, *, ...)` gives a changed
copy. One that has a parameter `epochs` trains by itself; one that has `budget` can be asked for a bound.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from trimtab.core import options as options_of
from trimtab.learn import options as training

SAME_FUNCTION = ("merge", "deconvolution")  # what they give computes the same: there is nothing to train afterwards


def names() -> list[str]:
    """All methods.

    >>> "magnitude" in names()
    True
    """
    from trimtab import compress

    return sorted(name for name in compress.__all__ if name.islower())


def parameters(method: str) -> dict[str, Any]:
    """Keyword parameters of a method and their defaults; those of `fit` where the method hands them on.

    Raises:
        ValueError: there is no such method; those there are are named.

    >>> parameters("magnitude")["budget"]
    'macs<=50%'
    """
    from trimtab import compress

    if method not in names():
        raise ValueError(f"method must be one of {', '.join(names())}, got {method!r}")
    return training.parameters(getattr(compress, method))


def check(method: str, options: dict[str, Any]) -> None:
    """Raises ValueError when the method has no such option, or needs one that is missing."""
    options_of.check(method, options, parameters(method))


def run(method: str, model: nn.Module, data: Any, **options: Any) -> nn.Module:
    """Apply a method by its name; a copy comes back, the model stays as it is."""
    from trimtab import compress

    check(method, options)
    return getattr(compress, method)(model, data, **options)
