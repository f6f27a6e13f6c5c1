"""Networks inside a budget, and how good they are: what every search looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.core.budget import Budget, format_value
from trimtab.core.errors import BudgetError
from trimtab.search.space import Arch, Key, Space

CLOSED = ("params", "macs")
_TRIES = 200


class Spent(Exception):
    """All the evaluations that were allowed have been made."""


@dataclass(frozen=True)
class Tried:
    """A network that was evaluated: its accuracy on held-out images, and what it costs."""

    arch: Arch
    accuracy: float
    cost: Mapping[str, Any]


@dataclass
class Candidates:
    """Evaluates networks of a space, each once, and only such as are inside the budget.

    Args:
        cost: params and macs of a network, in closed form.
        measured: the costs in the budget that must be measured on the network itself.
        score: accuracy of a network.
        budget: absolute bounds; one on accuracy is not looked at here.
        limit: how many networks may be evaluated.
    """

    space: Space
    cost: Callable[[Arch], Mapping[str, int]]
    measured: Callable[[Arch], Mapping[str, Any]]
    score: Callable[[Arch], float]
    budget: Budget
    limit: int
    tried: dict[Key, Tried] = field(default_factory=dict)
    _costs: dict[Key, tuple[dict[str, Any], bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._closed = self.budget.only(*CLOSED)
        self._others = Budget(c for c in self.budget.clauses if c.name not in (*CLOSED, "accuracy"))

        self._only_upper = all(c.op == "<=" for c in self.budget.clauses)

    def fits(self, arch: Arch) -> bool:
        """Whether a network is inside the budget."""
        return self._weigh(arch)[1]

    def evaluate(self, arch: Arch) -> Tried:
        """The network's accuracy, looked up if it is known.

        Raises:
            Spent: no more evaluations are allowed.
        """
        key = self.space.key(arch)
        if key not in self.tried:
            costs, fits = self._weigh(arch)
            if not fits:
                raise BudgetError(f"{dict(arch)} is outside the budget {self.budget}")
            if len(self.tried) >= self.limit:
                raise Spent
            self.tried[key] = Tried(dict(self.space.check(arch)), self.score(arch), costs)
        return self.tried[key]

    def all(self) -> Iterator[dict[str, Any]]:
        """Every network inside the budget."""
        return (arch for arch in self.space.enumerate() if self.fits(arch))

    def draw(self, rng: np.random.Generator) -> dict[str, Any]:
        """A random network inside the budget."""
        return self.shrink(self.space.sample(rng), rng)

    def shrink(self, arch: Arch, rng: np.random.Generator) -> dict[str, Any]:
        """A network inside the budget near `arch`: random genes go one choice down until it fits.

        Raises:
            BudgetError: none is found.
        """
        start = dict(arch)
        for _ in range(_TRIES):
            arch = start
            while not self.fits(arch):
                lower = [a for a in self._one_down(arch) if self.space.valid(a)]
                if not lower:
                    break
                arch = lower[int(rng.integers(len(lower)))]
            else:
                return dict(arch)
            if self._only_upper and all(g.ordered for g in self.space.genes):
                break  # the smallest network itself is too large
            start = self.space.sample(rng)
        raise self.unreachable()

    def _one_down(self, arch: Arch) -> Iterator[dict[str, Any]]:
        for g in self.space.genes:
            if g.ordered and arch[g.name] != g.choices[0]:
                yield {**arch, g.name: g.choices[g.index(arch[g.name]) - 1]}

    def unreachable(self) -> BudgetError:
        """What to say when no network is inside the budget."""
        costs, fits = self._weigh(self.space.min())
        rows = [r for r in self.budget.check(costs, partial=True).rows if not r.ok]
        if fits or not rows:
            return BudgetError(f"no network of the space was found inside {self.budget}")
        least = "; ".join(
            f"{r.name}{r.op}{format_value(r.name, r.limit)} cannot be met: the smallest network has "
            f"{format_value(r.name, float(r.value or 0))}"
            for r in rows
        )
        return BudgetError(f"{least}; give the space smaller choices, or choose a smaller model")

    @property
    def best(self) -> Tried:
        """The most accurate; of equals, the cheapest in MACs."""
        return max(self.tried.values(), key=lambda t: (t.accuracy, -t.cost["macs"]))

    def _weigh(self, arch: Arch) -> tuple[dict[str, Any], bool]:
        key = self.space.key(arch)
        if key not in self._costs:
            costs: dict[str, Any] = dict(self.cost(arch))
            fits = self._closed.check(costs).ok
            if fits and self._others.clauses:
                costs |= self.measured(arch)
                fits = self._others.check(costs).ok
            self._costs[key] = costs, fits
        return self._costs[key]
