"""The options of functions that train: their own, and those of `fit` where they hand them on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from trimtab.core import options
from trimtab.learn.fit import fit


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword parameters and their defaults.

    >>> def method(model, data, *, share=0.5): ...
    >>> parameters(method)
    {'share': 0.5}
    """
    own = options.parameters(function, keyword_only=True)
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        return own
    return options.parameters(fit, keyword_only=True) | own
