"""Ways to search: each spends the evaluations of some `Candidates`, which never let a network outside the budget in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from trimtab.core.errors import need
from trimtab.search.candidates import Candidates, Spent, Tried

_LEVELS = 5  # of each network-wise knob in the coarse stage
_MUTATION = 0.1  # probability that a gene is drawn anew
_STALE = 10  # generations without a new network before a search gives up


def exhaustive(candidates: Candidates, rng: np.random.Generator) -> None:
    """Every network inside the budget."""
    for arch in candidates.all():
        candidates.evaluate(arch)


def coarse_to_fine(candidates: Candidates, rng: np.random.Generator) -> None:
    """BigNAS (arXiv 2003.11142, Section 3.3): a grid of network-wise settings, then mutations of the best.

    Genes of one kind (the first word of their name) move together in the grid. At most half of the evaluations go
    there, to the largest networks that fit; the rest to mutations of the best so far, each gene with probability 0.1.
    """
    space = candidates.space
    grid = [arch for arch in space.grid(_LEVELS) if candidates.fits(arch)]
    first = sorted(grid, key=lambda a: -candidates.cost(a)["macs"])[: max(1, candidates.limit // 2)]
    for arch in first or [candidates.draw(rng)]:
        candidates.evaluate(arch)
    for _ in range(10 * candidates.limit):
        candidates.evaluate(candidates.shrink(space.mutate(candidates.best.arch, _MUTATION, rng), rng))


def evolution(candidates: Candidates, rng: np.random.Generator) -> None:
    """NSGA-II with pymoo's survival: keeps the Pareto front of accuracy and MACs alive, not only the best.

    Parents win tournaments of two; half of the children are crossed over, then each gene is drawn anew with
    probability 0.1, and the child is made to fit the budget.
    """
    need("pymoo", "search")
    population_class = need("pymoo.core.population", "search").Population
    problem_class = need("pymoo.core.problem", "search").Problem
    survival = need("pymoo.operators.survival.rank_and_crowding", "search").RankAndCrowding()
    space = candidates.space
    problem = problem_class(n_var=len(space.genes), n_obj=2)
    size = max(4, min(64, candidates.limit // 4))
    archs = [candidates.draw(rng) for _ in range(size)]
    parents: list[Any] = []
    stale = 0
    while stale < _STALE:
        known = len(candidates.tried)
        rows = [candidates.evaluate(a) for a in archs]
        born = population_class.new(
            X=np.array([space.encode(a) for a in archs]), F=np.array([[-t.accuracy, t.cost["macs"]] for t in rows])
        )
        both = population_class.merge(population_class.create(*parents), born) if parents else born
        parents = list(survival.do(problem, both, n_survive=size, random_state=rng))
        stale = 0 if len(candidates.tried) > known else stale + 1
        archs = [_offspring(candidates, parents, rng) for _ in range(size)]


def _offspring(candidates: Candidates, parents: Sequence[Any], rng: np.random.Generator) -> dict[str, Any]:
    def winner() -> dict[str, Any]:
        a, b = (parents[int(i)] for i in rng.integers(len(parents), size=2))
        better = (a.get("rank"), -a.get("crowding")) <= (b.get("rank"), -b.get("crowding"))
        return space.decode((a if better else b).get("X"))

    space = candidates.space
    child = space.crossover(winner(), winner(), rng) if rng.random() < 0.5 else winner()
    return candidates.shrink(space.mutate(child, _MUTATION, rng), rng)


def tpe(candidates: Candidates, rng: np.random.Generator) -> None:
    """Optuna's tree of Parzen estimators; what it asks for is made to fit the budget before it is evaluated."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = candidates.space
    ranges: dict[str, optuna.distributions.BaseDistribution] = {
        g.name: optuna.distributions.IntDistribution(0, len(g.choices) - 1)
        if g.ordered
        else optuna.distributions.CategoricalDistribution(range(len(g.choices)))
        for g in space.genes
    }
    sampler = optuna.samplers.TPESampler(
        seed=int(rng.integers(2**31)), multivariate=True, warn_independent_sampling=False
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for _ in range(3 * candidates.limit):
        trial = study.ask(ranges)
        asked = space.decode([trial.params[g.name] for g in space.genes])
        arch = candidates.shrink(asked if space.valid(asked) else space.sample(rng), rng)
        accuracy = candidates.evaluate(arch).accuracy
        if arch == asked:
            study.tell(trial, accuracy)
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            places = {g.name: g.index(arch[g.name]) for g in space.genes}
            study.add_trial(optuna.trial.create_trial(params=places, distributions=ranges, value=accuracy))


Method = Callable[[Candidates, np.random.Generator], Tried | None]  # what it chose; None: the most accurate
METHODS: dict[str, Method] = {
    "coarse_to_fine": coarse_to_fine,
    "evolution": evolution,
    "tpe": tpe,
    "exhaustive": exhaustive,
}


def check(method: str | Method) -> Method:
    """The method of this name.

    Raises:
        ValueError: there is none.
    """
    if callable(method):
        return method
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]


def run(method: str | Method, candidates: Candidates, seed: int) -> Tried:
    """Search until the evaluations are spent or nothing new turns up; gives the network that was chosen.

    Raises:
        ValueError: for an unknown method.
        BudgetError: no network is inside the budget.
    """
    search, chosen = check(method), None
    with suppress(Spent):
        chosen = search(candidates, np.random.default_rng(seed))
    if not candidates.tried:
        raise candidates.unreachable()
    return chosen or candidates.best
