"""Systems of search by name: what the command line and recipes use to call one that is chosen at run time.

Most are functions `system(network, data, *, space, ...)` of `trimtab.search` that give a `Trained` supernet, in which a
network is searched for inside a budget, taken out, and calibrated. Systems of growth give a `Grown` family, of which
the best network inside the budget is taken. A system of design, `system(data, *, budget, ...)`, gives a network that is
still to be trained; the network that is named is what percent in the budget refer to.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from trimtab.core import options as options_of
from trimtab.core.budget import Budget
from trimtab.core.cost import measure
from trimtab.core.edit import history
from trimtab.learn import options as training
from trimtab.learn.evaluate import evaluate
from trimtab.learn.fit import fit
from trimtab.search import methods
from trimtab.search.candidates import CLOSED, Tried
from trimtab.search.from_graph import check_words
from trimtab.search.supernet import Found

ROOMS = ("supernets", "grow", "design")
SPACE = {"width": (0.25, 0.5, 0.75, 1), "depth": "blocks"}


def names() -> list[str]:
    """All systems.

    >>> names()
    ['bignas', 'deepmad', 'deps', 'self_expanding_cnn', 'sortednet']
    """
    return sorted(_rooms())


def _rooms() -> dict[str, str]:
    """The room of each system."""
    from trimtab import search

    rooms = {name: where.partition(".")[0] for name, where in search._WHERE.items() if where}
    return {name: room for name, room in rooms.items() if room in ROOMS}


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
    own = training.parameters(getattr(search, system))
    room = _rooms()[system]
    if room == "design":  # what it gives is trained by `fit`
        return options_of.parameters(fit, keyword_only=True) | own
    return own | {"space": SPACE} if room == "supernets" else own


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
    known = parameters(system)
    if strategy is not None:
        methods.check(strategy)
        if "space" not in known:
            raise ValueError(f"{system} has no strategies: it does not choose from a space")
    options_of.check(system, {**options, "budget": ""}, known)
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
    """Search from a network, and give the best network inside the budget, with all that were looked at.

    Args:
        system: one of `names`. strategy: how to search ("tpe", ...); by default the system's own way.
        evaluations: how many networks of a supernet may be looked at.
        **options: of the system; the `space` of a supernet is `SPACE` unless given.

    Raises:
        ValueError, BudgetError: before anything is trained, if what is asked for cannot be.
        KeyboardInterrupt: interrupted; what `out` has is resumed by the same call.
    """
    from trimtab import search

    said = {"evaluations": evaluations, **({} if strategy is None else {"strategy": strategy})}
    check(system, {**options, **said})
    room = _rooms()[system]
    if room == "design":
        return _designed(system, network, data, Budget(budget), options)
    if room == "grow":
        grown = getattr(search, system)(network, data, budget=budget, **options)
        found = grown.search(grown.budget)
        return grown.best(grown.budget), found
    options = {"space": SPACE, **options}
    trained = getattr(search, system)(network, data, budget=budget, **options)
    how = {"evaluations": evaluations, "seed": options.get("seed", 0)}
    found = trained.search(budget, **how, **({} if strategy is None else {"method": strategy}))
    return trained.net.take(found, data), found


def _designed(
    system: str, network: nn.Module, data: Any, budget: Budget, options: dict[str, Any]
) -> tuple[nn.Module, Found]:
    """A network by formula, trained."""
    from trimtab import search

    size = (data.in_chans, *data.size)
    bounds = budget.resolve(measure(network, size)) if budget.relative else budget
    own = options_of.parameters(getattr(search, system), keyword_only=True)
    model = getattr(search, system)(data, budget=bounds, **{k: v for k, v in options.items() if k in own})
    learning = options_of.parameters(fit, keyword_only=True)
    if fit(model, data, **{k: v for k, v in options.items() if k in learning}).stopped == "interrupted":
        raise KeyboardInterrupt
    cost = {k: v for k, v in measure(model, size, what=CLOSED).asdict().items() if k in CLOSED}
    accuracy = evaluate(model, data, "val" if "val" in data.splits else "train", device=options.get("device"))
    only = Tried(history(model).kwargs, accuracy["accuracy"], cost)
    return model, Found(only, (only,), bounds)
