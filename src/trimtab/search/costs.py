"""What every network of a space costs, in closed form, from few measurements.

A network's cost is a sum of terms, each of which depends on few genes: those of a layer, its input's width, the depth
that lets it run. The table finds out which genes meet in a term, and writes the cost as its value for the largest
network plus one increment for each set of genes that meet (the anchored decomposition, exact when the sets are
complete). Increments are measured once, when first needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trimtab.core.errors import TrimtabError
from trimtab.search.space import Arch, Key, Space

Counts = dict[str, int]
_CHECKED = 4  # random networks whose cost is compared with a measurement


class CostTable:
    """Costs by architecture, equal to those measured.

    Args:
        exact: measures a network; its costs are integers.

    Raises:
        TrimtabError: the closed form is not equal to a measurement.

    >>> space = Space({"width": (2, 4), "kernel": (1, 3), "depth": (1, 2)})
    >>> table = CostTable(space, lambda a: {"macs": a["width"] * a["kernel"] ** 2 * a["depth"] + a["width"]})
    >>> table({"width": 2, "kernel": 1, "depth": 2})
    {'macs': 6}
    """

    def __init__(self, space: Space, exact: Callable[[Arch], Mapping[str, int]], *, seed: int = 0) -> None:
        self._space, self._exact = space, exact
        self._largest = space.max()
        self._known: dict[Key, Counts] = {}
        self._increments: dict[tuple[tuple[str, Any], ...], Counts] = {}
        self._base = self._measured({})
        self._sets = self._meeting()
        rng = np.random.default_rng(seed)
        for arch in (space.min(), *(space.sample(rng) for _ in range(_CHECKED))):
            if (table := self(arch)) != (counted := dict(exact(arch))):
                raise TrimtabError(f"the cost of {arch} is {counted}, but its parts add up to {table}")

    @property
    def measurements(self) -> int:
        """How many networks have been measured."""
        return len(self._known)

    def __call__(self, arch: Arch) -> Counts:
        total = dict(self._base)
        arch = self._space.check(arch)
        moved = {name for name, value in arch.items() if value != self._largest[name]}
        for genes in self._subsets(moved):
            for name, value in self._increment(tuple((g, arch[g]) for g in genes)).items():
                total[name] += value
        return total

    def _measured(self, changes: Mapping[str, Any]) -> Counts:
        """The cost of the largest network with a few genes changed."""
        arch = {**self._largest, **changes}
        key = tuple(arch[g.name] for g in self._space.genes)
        if key not in self._known:
            self._known[key] = {name: int(value) for name, value in self._exact(arch).items()}
        return self._known[key]

    def _increment(self, values: tuple[tuple[str, Any], ...]) -> Counts:
        """What these genes add together beyond what fewer of them add."""
        if values not in self._increments:
            total = dict.fromkeys(self._base, 0)
            for n in range(len(values) + 1):
                sign = (-1) ** (len(values) - n)
                for some in itertools.combinations(values, n):
                    for name, value in self._measured(dict(some)).items():
                        total[name] += sign * value
            self._increments[values] = total
        return self._increments[values]

    def _meeting(self) -> dict[str, set[str]]:
        """Which genes meet in a term: together, at their smallest, they change the cost by more than each alone."""
        names = [g.name for g in self._space.genes if len(g.choices) > 1]
        small = self._space.min()
        met: dict[str, set[str]] = {name: set() for name in names}
        for a, b in itertools.combinations(names, 2):
            if any(self._increment(((a, small[a]), (b, small[b]))).values()):
                met[a].add(b)
                met[b].add(a)
        return met

    def _subsets(self, moved: set[str]) -> list[tuple[str, ...]]:
        """All sets of changed genes that meet pairwise, in the order of the space."""
        order = [g.name for g in self._space.genes if g.name in moved]
        found: list[tuple[str, ...]] = []
        grown: list[tuple[str, ...]] = [(name,) for name in order]
        while grown:
            found += grown
            grown = [
                (*genes, name)
                for genes in grown
                for name in order[order.index(genes[-1]) + 1 :]
                if all(name in self._sets[g] for g in genes)
            ]
        return found
