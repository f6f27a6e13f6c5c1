"""The numba kernels of `nn.scan`: the selective scan and its gradient, each in one pass over the sequence.

What makes the scan slow elsewhere is that decays and states of all steps, (L, N, E), go through memory. Here the state
(N, E) of one sequence stays in the first-level cache, the channels are the lanes of the vector unit, and exp is a
polynomial that the compiler can put there. The backward pass starts from states kept every `CHECKPOINT` steps.

Functions here are plain Python until `compiled` translates them; nothing is imported from numba before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from trimtab.core.errors import need

EXTRA = "edge"  # the extra that brings numba
CHECKPOINT = 64  # steps between states that are kept
_FASTMATH = {"reassoc", "contract", "arcp", "nsz"}  # infinities and NaN keep their meaning


def exp(x: Any) -> Any:
    """e^x of a float32 x <= 0, to 2 units in the last place; 0 below -87. Cody-Waite reduction, Taylor to degree 7."""
    x = max(x, np.float32(-87.0))
    k = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - k * np.float32(0.693359375) - k * np.float32(-2.12194440e-4)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    return p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)


def forward(x: Any, dt: Any, a: Any, b: Any, c: Any, y: Any, states: Any) -> None:
    """x, dt, y: (B, G, L, E). a: (G, N, E), not above 0. b, c: (B, G, L, N). y is written.

    states: (B, G, number of checkpoints, N, E), written; without checkpoints, nothing is.
    """
    images, groups, length, width = x.shape
    size = a.shape[1]
    for i in range(images):
        for g in range(groups):
            h = np.zeros((size, width), np.float32)
            u = np.empty(width, np.float32)
            for t in range(length):
                if t % CHECKPOINT == 0 and states.shape[2] > 0:
                    states[i, g, t // CHECKPOINT] = h
                step, out = dt[i, g, t], y[i, g, t]
                for e in range(width):
                    u[e] = step[e] * x[i, g, t, e]
                    out[e] = np.float32(0.0)
                for n in range(size):
                    bn, cn, an, hn = b[i, g, t, n], c[i, g, t, n], a[g, n], h[n]
                    for e in range(width):
                        new = exp(step[e] * an[e]) * hn[e] + u[e] * bn
                        hn[e] = new
                        out[e] += cn * new


def backward(
    x: Any, dt: Any, a: Any, b: Any, c: Any, states: Any, gy: Any, gx: Any, gdt: Any, ga: Any, gb: Any, gc: Any
) -> None:
    """The gradients gx, gdt, gb, gc are written, ga is added to; shapes as in `forward`."""
    images, groups, length, width = x.shape
    size = a.shape[1]
    h = np.empty((CHECKPOINT + 1, size, width), np.float32)  # h[j]: the state before step `first` + j
    for i in range(images):
        for g in range(groups):
            gh = np.zeros((size, width), np.float32)
            u = np.empty(width, np.float32)
            gu = np.empty(width, np.float32)
            for block in range(states.shape[2] - 1, -1, -1):
                first = block * CHECKPOINT
                last = min(length, first + CHECKPOINT)
                h[0] = states[i, g, block]
                for t in range(first, last):
                    step, value = dt[i, g, t], x[i, g, t]
                    for n in range(size):
                        bn, an, old, new = b[i, g, t, n], a[g, n], h[t - first, n], h[t - first + 1, n]
                        for e in range(width):
                            new[e] = exp(step[e] * an[e]) * old[e] + step[e] * value[e] * bn
                for t in range(last - 1, first - 1, -1):
                    step, value, grad, to_dt = dt[i, g, t], x[i, g, t], gy[i, g, t], gdt[i, g, t]
                    for e in range(width):
                        u[e] = step[e] * value[e]
                        gu[e] = np.float32(0.0)
                        to_dt[e] = np.float32(0.0)
                    for n in range(size):
                        bn, cn, an = b[i, g, t, n], c[i, g, t, n], a[g, n]
                        old, new, back, to_a = h[t - first, n], h[t - first + 1, n], gh[n], ga[g, n]
                        to_b = np.float32(0.0)
                        to_c = np.float32(0.0)
                        for e in range(width):
                            now = back[e] + grad[e] * cn
                            decay = exp(step[e] * an[e])
                            to_c += grad[e] * new[e]
                            to_b += now * u[e]
                            gu[e] += now * bn
                            inner = now * decay * old[e]
                            to_dt[e] += inner * an[e]
                            to_a[e] += inner * step[e]
                            back[e] = now * decay
                        gb[i, g, t, n] = to_b
                        gc[i, g, t, n] = to_c
                    for e in range(width):
                        gx[i, g, t, e] = gu[e] * step[e]
                        to_dt[e] += gu[e] * value[e]


@functools.cache
def compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    """`forward` and `backward` in machine code; translated at their first call, then kept on disk where possible.

    Raises:
        MissingExtra: numba is not installed.
    """
    numba = need("numba", EXTRA)
    options = {"nogil": True, "fastmath": _FASTMATH, "error_model": "numpy"}
    need("numba.extending", EXTRA).register_jitable(inline="always", **options)(exp)

    def translate(function: Callable[..., None]) -> Callable[..., None]:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # there is no folder that may be written to
            return numba.njit(**options)(function)

    return translate(forward), translate(backward)
