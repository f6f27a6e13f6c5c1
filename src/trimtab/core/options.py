"""Options of what is chosen by its name at run time: read from its signature, checked before any work."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

REQUIRED = inspect.Parameter.empty  # stands for the default of an option that has none


def parameters(function: Callable[..., Any], *, keyword_only: bool = False) -> dict[str, Any]:
    """Names and defaults of what a function, or a class, can be given by name.

    >>> parameters(lambda data, *, budget="macs<=50%": None, keyword_only=True)
    {'budget': 'macs<=50%'}
    """
    kinds = {inspect.Parameter.KEYWORD_ONLY, *([] if keyword_only else [inspect.Parameter.POSITIONAL_OR_KEYWORD])}
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind in kinds}


def check(name: str, given: Iterable[str], known: Mapping[str, Any]) -> None:
    """Raises ValueError when something has no such option, or needs one that is missing.

    >>> check("kd", ["temperature"], {"teacher": REQUIRED, "T": 4.0})
    Traceback (most recent call last):
        ...
    ValueError: kd has no option 'temperature'; it has teacher, T
    """
    given = list(given)
    for option in given:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}; it has {', '.join(known) or 'none'}")
    missing = [option for option, default in known.items() if default is REQUIRED and option not in given]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}")
