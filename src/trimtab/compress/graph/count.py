"""What a choice of units costs, in closed form: a few array operations, no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trimtab.compress.graph.labels import Dim, Labels

if TYPE_CHECKING:
    from trimtab.compress.graph.walk import Walk


_Products = tuple[NDArray[np.int64], NDArray[np.int64]]  # see Counter._products


class Counter:
    """Multiply-accumulates and parameters as sums of products of kept sizes."""

    def __init__(self, walk: Walk, unit_of: Labels) -> None:
        self._arrays: dict[int, int] = {}  # id of a label array -> its number
        self._units: list[Labels] = []
        self._unit_of = unit_of
        parameters = {a.tensor for a in walk.axes if a.parameter}
        self._macs = self._products([dims for _, dims in walk.products])
        self._names = [name for name in walk.shapes if name in parameters]
        self._params = self._products([list(walk.shapes[name]) for name in self._names])
        lengths = [len(u) for u in self._units]
        self._flat = np.concatenate([*self._units, np.empty(0, np.int64)]).astype(np.int64)
        self._starts = np.cumsum([0, *lengths[:-1]]) if lengths else np.empty(0, np.int64)

    def macs(self, mask: NDArray[np.bool_]) -> int:
        return self._sum(self._macs, mask)

    def params(self, mask: NDArray[np.bool_]) -> int:
        return self._sum(self._params, mask)

    def each_macs(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Of every product, in the order of the walk."""
        return self._each(self._macs, mask)

    def each_params(self, mask: NDArray[np.bool_]) -> dict[str, int]:
        """Of every parameter that the network uses and that has a dimension, by name."""
        return dict(zip(self._names, self._each(self._params, mask).tolist(), strict=True))

    def _products(self, products: list[list[Dim]]) -> _Products:
        """Constant parts, and numbers of the label arrays of each product, padded with -1."""
        constants, rows = [], []
        for dims in products:
            c, row = 1, []
            for f in (f for d in dims for f in d):
                if f.labels is None or not (self._unit_of[f.labels] >= 0).any():
                    c *= f.size
                else:
                    if id(f.labels) not in self._arrays:
                        self._arrays[id(f.labels)] = len(self._units)
                        self._units.append(self._unit_of[f.labels])
                    row.append(self._arrays[id(f.labels)])
            constants.append(c)
            rows.append(row)
        width = max(map(len, rows), default=0)
        table = np.array([r + [-1] * (width - len(r)) for r in rows], np.int64).reshape(len(rows), width)
        return np.array(constants, np.int64), table

    def _each(self, products: _Products, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        constants, table = products
        if not len(self._units):
            return constants
        stays = np.append(mask, True)[self._flat]
        sizes = np.append(np.add.reduceat(stays.astype(np.int64), self._starts), 1)
        return constants * sizes[table].prod(axis=1)

    def _sum(self, products: _Products, mask: NDArray[np.bool_]) -> int:
        return int(self._each(products, mask).sum())
