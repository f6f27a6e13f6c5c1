"""Objectives by name: what the command line and recipes use to make one that is chosen at run time.

The name of an objective is a word in lower case, its class is `OBJECTIVES[name]` of `trimtab.learn`. `tt.learn.lsskd`
is that class, too, so the same word stands in Python, in a recipe and after ``--objective``.
"""

from __future__ import annotations

from typing import Any

from trimtab.core import options as options_of
from trimtab.learn.objective import Objective


def names() -> list[str]:
    """All objectives.

    >>> "kd" in names()
    True
    """
    from trimtab import learn

    return sorted(learn.OBJECTIVES)


def find(name: str) -> type[Objective]:
    """The class of an objective.

    Raises:
        ValueError: there is none of this name; those there are are named.
    """
    from trimtab import learn

    if name not in learn.OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(names())}, got {name!r}")
    return getattr(learn, learn.OBJECTIVES[name])


def parameters(name: str) -> dict[str, Any]:
    """What an objective can be given, with defaults.

    >>> parameters("classify")
    {'smoothing': 0.0}
    """
    return options_of.parameters(find(name))


def check(name: str, options: dict[str, Any]) -> None:
    """Raises ValueError when the objective has no such option, or needs one that is missing."""
    options_of.check(name, options, parameters(name))


def make(name: str, **options: Any) -> Objective:
    """An objective by its name.

    Raises:
        ValueError: an option is unknown, missing, or has a wrong value.
    """
    check(name, options)
    try:
        return find(name)(**options)
    except TypeError as e:  # a word where a number belongs
        raise ValueError(f"{name}: {e}") from e
