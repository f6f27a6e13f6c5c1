"""Labels: which indices of which dimensions must be cut together.

Every index of every dimension of every parameter is an integer, its label. Operators state that labels are equal
(`tie`), that they must stay (`freeze`), or that a flat dimension is the product of several factors (`product`); `solve`
turns the statements into components, the sets of indices that live or go as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Factor:
    """A dimension, or a part of one that was merged from several.

    Attributes:
        labels: one label per index; None where nothing can ever be cut (batch, space, constants).
        zero: the value is zero at an index whose own weights are zero. What batch norm, ReLU and products keep and
            a sigmoid or an added constant loses.
    """

    size: int
    labels: Labels | None = None
    zero: bool = True

    def with_zero(self, zero: bool) -> Factor:
        return self if zero == self.zero else replace(self, zero=zero)


Dim = tuple[Factor, ...]  # a product of factors, outermost first; () is a dimension of size 1
Value = tuple[Dim, ...]  # one for each dimension of a tensor


def size_of(dim: Dim) -> int:
    return math.prod(f.size for f in dim)


def constant(shape: Sequence[int]) -> Value:
    """A value in which nothing can be cut."""
    return tuple((Factor(int(n), None, zero=False),) if n != 1 else () for n in shape)


def labelled(dim: Dim) -> bool:
    return any(f.labels is not None for f in dim)


def arrays(*dims: Dim) -> Iterator[Labels]:
    """The labels of every factor that has some."""
    return (f.labels for dim in dims for f in dim if f.labels is not None)


@dataclass(frozen=True, eq=False)
class _Product:
    flat: Labels
    factors: tuple[Factor, ...]

    def coordinates(self) -> list[Labels]:
        sizes = [f.size for f in self.factors]
        return list(np.unravel_index(np.arange(len(self.flat)), sizes))


@dataclass(frozen=True)
class Solution:
    """Component of every label, and what is known of each component."""

    component: Labels
    frozen: NDArray[np.bool_]


class Ledger:
    """Collects statements about labels."""

    def __init__(self) -> None:
        self.count = 0
        self._ties: list[tuple[Labels, Labels]] = []
        self._products: list[_Product] = []
        self._marks: dict[str, list[Labels]] = {k: [] for k in ("frozen", "block", "spans", "leaks", "consumed")}

    def new(self, n: int) -> Labels:
        self.count += n
        return np.arange(self.count - n, self.count)

    def tie(self, a: Labels, b: Labels) -> None:
        """Each label of `a` equals its partner in `b`."""
        if a is not b:
            self._ties.append((a, b))

    def freeze(self, labels: Labels) -> None:
        """Never cut these."""
        self._marks["frozen"].append(labels)

    def block(self, labels: Labels) -> None:
        """Prefer cutting whole indices of this factor: attention heads, normalisation groups."""
        self._marks["block"].append(labels)

    def spans(self, labels: Labels) -> None:
        """Something without weights looks across these indices (a layer norm, a softmax): a cut changes its result."""
        self._marks["spans"].append(labels)

    def leaks(self, labels: Labels) -> None:
        """The value may be other than zero although the weights that make it are zero."""
        self._marks["leaks"].append(labels)

    def consumed(self, labels: Labels) -> None:
        """These index the inputs of a weight, which sums over them."""
        self._marks["consumed"].append(labels)

    def product(self, flat: Labels, factors: Sequence[Factor]) -> None:
        """`flat` indexes the product of `factors`, outermost first."""
        self._products.append(_Product(flat, tuple(f for f in factors if f.size > 1)))

    def marked(self, mark: str) -> Labels:
        return np.concatenate([np.empty(0, np.int64), *self._marks[mark]])

    def solve(self, also_frozen: Labels | None = None) -> Solution:
        """Components of all labels, each product cut along one of its factors."""
        n = self.count
        a = np.concatenate([np.empty(0, np.int64), *(t[0] for t in self._ties)])
        b = np.concatenate([np.empty(0, np.int64), *(t[1] for t in self._ties)])
        edges = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(n, n))
        m, component = connected_components(edges, directed=False)
        component = component.astype(np.int64)
        frozen, block = np.zeros(m, bool), np.zeros(m, bool)
        frozen[component[self.marked("frozen")]] = True
        block[component[self.marked("block")]] = True
        if also_frozen is not None:
            frozen[component[also_frozen]] = True

        def has_block(p: _Product) -> bool:
            return any(f.labels is not None and block[component[f.labels]].any() for f in p.factors)

        order = sorted(range(len(self._products)), key=lambda i: not has_block(self._products[i]))
        banned: set[tuple[int, int]] = set()
        for _ in range(20):
            forest = _Forest(frozen, block)
            drivers: dict[int, int | None] = {}
            for i in order:
                drivers[i] = self._drive(forest, component, self._products[i], i, banned)
            # A driver may freeze later, through another product: then let the next factor drive instead.
            stuck = set()
            for i, driver in drivers.items():
                p = self._products[i]
                if driver is not None and forest.frozen[forest.find(component[p.factors[driver].labels])].all():
                    others = [f for j, f in enumerate(p.factors) if j != driver and f.labels is not None]
                    if any(not frozen[component[f.labels]].all() for f in others):
                        stuck.add((i, driver))
            if not stuck - banned:
                break
            banned |= stuck
        root = forest.find(component)
        return Solution(root, forest.frozen)

    @staticmethod
    def _drive(
        forest: _Forest, component: Labels, p: _Product, number: int, banned: set[tuple[int, int]]
    ) -> int | None:
        """Choose the factor along which a product is cut, tie the flat dimension to it and freeze the others."""
        flat = forest.find(component[p.flat])
        at = p.coordinates()
        best, best_rank = None, (0, 0)
        for j, f in enumerate(p.factors):
            if f.labels is None or (number, j) in banned:
                continue
            own = forest.find(component[f.labels])
            free = ~forest.frozen[own]
            if not free.any():
                continue
            units = _count_units(flat, own[at[j]], forest.frozen)
            rank = (int(units > 1 and forest.block[own[free]].any()), units)
            if rank > best_rank:
                best, best_rank = j, rank
        for j, f in enumerate(p.factors):
            if f.labels is not None and j != best:
                forest.freeze(component[f.labels])
        if best is None:
            forest.freeze(flat)
        else:
            labels = p.factors[best].labels
            assert labels is not None
            forest.union(flat, component[labels][at[best]])
        return best


def _count_units(flat: Labels, driver: Labels, frozen: NDArray[np.bool_]) -> int:
    """How many separate units a flat dimension would have if it were tied to `driver`."""
    ids, inverse = np.unique(np.concatenate([flat, driver]), return_inverse=True)
    n = len(flat)
    graph = coo_array((np.ones(n, np.int8), (inverse[:n], inverse[n:])), shape=(len(ids), len(ids)))
    count, part = connected_components(graph, directed=False)
    return int(count - len(np.unique(part[frozen[ids]])))


class _Forest:
    """Union-find over arrays. A root is the smallest member; flags of merged components are or-ed."""

    def __init__(self, frozen: NDArray[np.bool_], block: NDArray[np.bool_]) -> None:
        self.parent = np.arange(len(frozen))
        self.frozen, self.block = frozen.copy(), block.copy()

    def find(self, ids: Labels) -> Labels:
        while True:
            up = self.parent[ids]
            upper = self.parent[up]
            if np.array_equal(up, upper):
                return up
            self.parent[ids] = upper
            ids = upper

    def freeze(self, ids: Labels) -> None:
        self.frozen[self.find(ids)] = True

    def union(self, a: Labels, b: Labels) -> None:
        a, b = self.find(a), self.find(b)
        frozen, block = self.frozen[a] | self.frozen[b], self.block[a] | self.block[b]
        while True:
            ra, rb = self.find(a), self.find(b)
            if np.array_equal(ra, rb):
                break
            np.minimum.at(self.parent, np.maximum(ra, rb), np.minimum(ra, rb))
        roots = self.find(a)
        np.logical_or.at(self.frozen, roots, frozen)
        np.logical_or.at(self.block, roots, block)
