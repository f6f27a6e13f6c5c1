"""Systems of supernets by name: what the command line and recipes use to call one that is chosen at run time.

A system is a function `system(network, data, *, space, ...)` of `trimtab.search` that gives a `Trained` supernet. From
there on, all are alike: a network is searched for inside a budget, taken out, and calibrated.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from trimtab.core import options as options_of
from trimtab.core.budget import Budget
from trimtab.learn import options as training
from trimtab.search import methods
from trimtab.search.from_graph import check_words
from trimtab.search.supernet import Found

SPACE = {"width": (0.25, 0.5, 0.75, 1), "depth": "blocks"}


def names() -> list[str]:
    """All systems.

    >>> names()
    ['bignas', 'deps', 'sortednet']
    """
    from trimtab import search

    return sorted(name for name, where in search._WHERE.items() if where.startswith("supernets."))


def parameters(system: str) -> dict[str, Any]:
    """Keyword parameters of a system and their defaults, those of `fit` included.

    Raises:
        ValueError: there is no such system; those there are are named.

    >>> parameters("sortednet")["accum"]
    4
    """
    from trimtab import search

    if system not in names():
        raise ValueError(f"method must be one of {', '.join(names())}, got {system!r}")
    return training.parameters(getattr(search, system)) | {"space": SPACE}


def check(system: str, options: dict[str, Any]) -> None:
    """Raises ValueError for what `run` would refuse; nothing is made or trained.

    >>> check("deps", {"space": {"width": (0, 1)}})
    Traceback (most recent call last):
        ...
    ValueError: width must be rising shares that end with 1, such as (0.5, 0.75, 1), got (0, 1)
    """
    options = dict(options)
    if options.pop("evaluations", 1) < 1:
        raise ValueError("evaluations must be at least 1")
    strategy = options.pop("strategy", None)
    if strategy is not None:
        methods.check(strategy)
    options_of.check(system, options, parameters(system))
    check_words(options.get("space", SPACE))


def run(
    system: str,
    network: nn.Module,
    data: Any,
    *,
    budget: str | Budget = "macs<=50%",
    strategy: str | None = None,
    evaluations: int = 100,
    **options: Any,
) -> tuple[nn.Module, Found]:
    """Train a supernet of a network, and give the best network inside the budget, with all that were looked at.

    Args:
        system: one of `names`. strategy: how to search ("tpe", ...); by default the system's own way.
        evaluations: how many networks may be looked at.
        **options: of the system; `space` is `SPACE` unless given.

    Raises:
        ValueError, BudgetError: before anything is trained, if what is asked for cannot be.
        KeyboardInterrupt: interrupted; what `out` has is resumed by the same call.
    """
    from trimtab import search

    said = {"evaluations": evaluations, **({} if strategy is None else {"strategy": strategy})}
    check(system, {**options, **said})
    options = {"space": SPACE, **options}
    trained = getattr(search, system)(network, data, budget=budget, **options)
    how = {"evaluations": evaluations, "seed": options.get("seed", 0)}
    found = trained.search(budget, **how, **({} if strategy is None else {"method": strategy}))
    return trained.net.take(found, data), found
