"""The numba kernels of `data.fractals`: the random iteration and the counting of its points.

Both do what their NumPy twins there do, operation by operation, so a picture is the same bits with and without numba.
Functions here are plain Python until `compiled` translates them; nothing is imported from numba before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from trimtab.core.errors import need

EXTRA = "edge"  # the extra that brings numba


def iterate(maps: Any, limits: Any, starts: Any, draws: Any, burn: int, xs: Any, ys: Any) -> None:
    """Arguments as for `fractals.iterate`. The chains take turns, so that they hide each other's latency."""
    groups, steps, chains = draws.shape
    for g in range(groups):
        x, y = np.full(chains, starts[g, 0]), np.full(chains, starts[g, 1])
        for t in range(steps):
            for c in range(chains):
                k = 0
                for j in range(limits.shape[1]):
                    k += draws[g, t, c] >= limits[g, j]
                old_x, old_y = x[c], y[c]
                x[c] = maps[g, k, 0] * old_x + maps[g, k, 1] * old_y + maps[g, k, 2]
                y[c] = maps[g, k, 3] * old_x + maps[g, k, 4] * old_y + maps[g, k, 5]
            if t >= burn:
                xs[g, t - burn] = x
                ys[g, t - burn] = y


def count(xs: Any, ys: Any, left: float, top: float, across: float, down: float, out: Any) -> None:
    """Arguments as for `fractals.count`."""
    height, width = out.shape
    for i in range(len(xs)):
        column, row = np.floor((xs[i] - left) * across), np.floor((ys[i] - top) * down)
        if 0 <= column < width and 0 <= row < height:
            out[int(row), int(column)] += 1


@functools.cache
def compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    """`iterate` and `count` in machine code; translated at their first call, then kept on disk where possible.

    Raises:
        MissingExtra: numba is not installed.
    """
    numba = need("numba", EXTRA)

    def translate(function: Callable[..., None]) -> Callable[..., None]:
        try:
            return numba.njit(cache=True, nogil=True)(function)
        except RuntimeError:  # there is no folder that may be written to
            return numba.njit(nogil=True)(function)

    return translate(iterate), translate(count)
