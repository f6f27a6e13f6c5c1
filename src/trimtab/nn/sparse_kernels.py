"""The numba kernel of `nn.sparse`: a sparse 1x1 convolution with bias and clamp in one pass over the pixels.

Pixels are contiguous (CHW), so one weight multiplies a whole run of them. The kernel walks over tiles of `TILE` pixels;
of a row it takes four non-zero weights at a time, so that the running sum is loaded and stored once for four products.
In the form with blocks, four output channels share their input channels: a pixel that was loaded is used four times.

Functions here are plain Python until `compiled` translates them; nothing is imported from numba before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from trimtab.core.errors import need

EXTRA = "edge"  # the extra that brings numba
TILE = 512  # pixels; with up to 256 channels the tile of all input channels stays in a 512 KB second-level cache
# Sums may be reordered and fused; infinities and NaN keep their meaning, -inf and inf are "no clamp".
_FASTMATH = {"reassoc", "contract", "arcp", "nsz"}


def rows(
    x: Any, starts: Any, columns: Any, values: Any, bias: Any, out: Any, first: int, shift: int, low: float, high: float
) -> None:
    """Rows of single weights: row r of them is output channel `first` + r.

    Args:
        x: (B, C_in, P) float32. out: (B, C_out, P), written.
        starts: (rows + 1,) int32, where the weights of each row begin in `columns`.
        columns: input channel of each weight. values: weight j of `columns` is values[j + shift].
        bias: (C_out,). low, high: bounds of the output.
    """
    pixels = x.shape[2]
    for image in range(x.shape[0]):
        for begin in range(0, pixels, TILE):
            end = min(pixels, begin + TILE)
            for r in range(len(starts) - 1):
                y = out[image, first + r, begin:end]
                y[:] = bias[first + r]
                j, last = starts[r], starts[r + 1]
                while j + 4 <= last:
                    x0, x1 = x[image, columns[j], begin:end], x[image, columns[j + 1], begin:end]
                    x2, x3 = x[image, columns[j + 2], begin:end], x[image, columns[j + 3], begin:end]
                    w0, w1 = values[j + shift], values[j + 1 + shift]
                    w2, w3 = values[j + 2 + shift], values[j + 3 + shift]
                    for p in range(len(y)):
                        y[p] += w0 * x0[p] + w1 * x1[p] + w2 * x2[p] + w3 * x3[p]
                    j += 4
                while j < last:
                    x0, w0 = x[image, columns[j], begin:end], values[j + shift]
                    for p in range(len(y)):
                        y[p] += w0 * x0[p]
                    j += 1
                for p in range(len(y)):
                    y[p] = low if y[p] < low else (high if y[p] > high else y[p])


def rows_of_four(x: Any, starts: Any, columns: Any, values: Any, bias: Any, out: Any, low: float, high: float) -> None:
    """Blocks of four output channels: row r of them is output channels 4r to 4r + 3.

    Arguments as for `rows`; block j of `columns` has the weights values[4j] to values[4j + 3].
    """
    pixels = x.shape[2]
    for image in range(x.shape[0]):
        for begin in range(0, pixels, TILE):
            end = min(pixels, begin + TILE)
            for r in range(len(starts) - 1):
                y0, y1 = out[image, 4 * r, begin:end], out[image, 4 * r + 1, begin:end]
                y2, y3 = out[image, 4 * r + 2, begin:end], out[image, 4 * r + 3, begin:end]
                y0[:], y1[:], y2[:], y3[:] = bias[4 * r], bias[4 * r + 1], bias[4 * r + 2], bias[4 * r + 3]
                j, last = starts[r], starts[r + 1]
                while j + 2 <= last:
                    xa, xb = x[image, columns[j], begin:end], x[image, columns[j + 1], begin:end]
                    a0, a1, a2, a3 = values[4 * j], values[4 * j + 1], values[4 * j + 2], values[4 * j + 3]
                    b0, b1, b2, b3 = values[4 * j + 4], values[4 * j + 5], values[4 * j + 6], values[4 * j + 7]
                    for p in range(len(y0)):
                        a, b = xa[p], xb[p]
                        y0[p] += a0 * a + b0 * b
                        y1[p] += a1 * a + b1 * b
                        y2[p] += a2 * a + b2 * b
                        y3[p] += a3 * a + b3 * b
                    j += 2
                while j < last:
                    xa = x[image, columns[j], begin:end]
                    a0, a1, a2, a3 = values[4 * j], values[4 * j + 1], values[4 * j + 2], values[4 * j + 3]
                    for p in range(len(y0)):
                        a = xa[p]
                        y0[p] += a0 * a
                        y1[p] += a1 * a
                        y2[p] += a2 * a
                        y3[p] += a3 * a
                    j += 1
                for p in range(len(y0)):
                    y0[p] = low if y0[p] < low else (high if y0[p] > high else y0[p])
                    y1[p] = low if y1[p] < low else (high if y1[p] > high else y1[p])
                    y2[p] = low if y2[p] < low else (high if y2[p] > high else y2[p])
                    y3[p] = low if y3[p] < low else (high if y3[p] > high else y3[p])


@functools.cache
def compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    """`rows` and `rows_of_four` in machine code; translated at their first call, then kept on disk where possible.

    Raises:
        MissingExtra: numba is not installed.
    """
    numba = need("numba", EXTRA)

    def translate(function: Callable[..., None]) -> Callable[..., None]:
        options = {"nogil": True, "fastmath": _FASTMATH, "error_model": "numpy"}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # there is no folder that may be written to
            return numba.njit(**options)(function)

    return translate(rows), translate(rows_of_four)
