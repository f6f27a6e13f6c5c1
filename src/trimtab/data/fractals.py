"""Fractals: random iterated function systems, their points, and pictures of them (Anderson & Farrell 2021).

A system is an array (n, 2, 3) of n affine maps [A | b] of the plane. It is sampled through the singular values of its
maps, so that every system contracts and fills enough of the picture, without any rejection.

Points come from many chains that run side by side: start at the fixed point of the first map, which lies on the
attractor, apply maps drawn with probabilities proportional to |det A|, forget the first `BURN` steps. Stamping a 3x3
patch at every point is a convolution of the counts, which is what is done.

>>> rng = np.random.default_rng(0)
>>> system = sample_system(rng)
>>> picture = grey(points(system, 10_000, rng), (32, 32))
>>> picture.shape, float(picture.max()), bool((picture > 0).mean() > 0.02)
((32, 32), 1.0, True)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from trimtab.core.errors import MissingExtra
from trimtab.data import fractal_kernels

BURN = 100  # steps of a chain that are forgotten
PER_CHAIN = 500  # points of a chain that are kept
Window = tuple[float, float, float, float]  # left, top, right, bottom in the plane


# -- systems ----------------------------------------------------------------------------------------------------------


def singular_values(n: int, rng: np.random.Generator, alpha: float | None = None) -> np.ndarray:
    """Pairs s1 >= s2 in [0, 1], (n, 2), with ``sum(s1 + 2 s2) = alpha``.

    alpha: the sigma factor; None draws it from U((5 + n) / 2, (6 + n) / 2), where systems look good.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    if alpha is None:
        alpha = rng.uniform((5 + n) / 2, (6 + n) / 2)
    if not 0 <= alpha <= 3 * n:
        raise ValueError(f"alpha must be 0 to 3 n = {3 * n}, got {alpha}")
    s = np.empty((n, 2))
    left, spare = alpha, alpha - 3 * n + 3  # what pairs still to come must sum to; less what the others can take
    for i in range(n - 1):
        s[i, 0] = first = rng.uniform(max(0.0, spare / 3), min(1.0, left))
        left, spare = left - first, spare - first
        s[i, 1] = second = rng.uniform(max(0.0, spare / 2), min(first, left / 2))
        left, spare = left - 2 * second, spare - 2 * second + 3
    s[-1, 1] = rng.uniform(max(0.0, (left - 1) / 2), left / 3)
    s[-1, 0] = left - 2 * s[-1, 1]
    return s


def sample_system(
    rng: np.random.Generator, *, maps: tuple[int, int] = (2, 4), alpha: float | None = None
) -> np.ndarray:
    """A random system (n, 2, 3) of maps[0] to maps[1] maps; A = U diag(s1, s2) V with reflections, b ~ U(-1, 1)."""
    if not 2 <= maps[0] <= maps[1]:
        raise ValueError(f"maps must be (fewest, most), at least 2, got {maps}")
    n = int(rng.integers(maps[0], maps[1] + 1))
    s = singular_values(n, rng, alpha)
    left, right = (_orthogonal(n, rng) for _ in range(2))
    return np.concatenate([left @ (s[:, :, None] * right), rng.uniform(-1, 1, (n, 2, 1))], 2)


def jitter(system: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A system that looks a little different: one map, of those that stay contracting, scaled by U(0.8, 1.1)."""
    for _ in range(4):
        i, factor = int(rng.integers(len(system))), rng.uniform(0.8, 1.1)
        if factor * _stretch(system[i]) <= 1:
            changed = system.copy()
            changed[i] *= factor
            return changed
    return system


def probabilities(system: np.ndarray) -> np.ndarray:
    """Of choosing each map: proportional to |det A|; all the same where all are 0."""
    det = np.abs(system[:, 0, 0] * system[:, 1, 1] - system[:, 0, 1] * system[:, 1, 0])
    total = det.sum()
    return det / total if total > 0 else np.full(len(system), 1 / len(system))


def fixed_point(system: np.ndarray) -> np.ndarray:
    """Where the first map stays, (2,); it lies on the attractor."""
    (a, b, e), (c, d, f) = system[0].tolist()
    det = (1 - a) * (1 - d) - b * c
    return np.array([((1 - d) * e + b * f) / det, ((1 - a) * f + c * e) / det])


def _stretch(affine: np.ndarray) -> float:
    """The larger singular value of A in [A | b] (2, 3)."""
    (a, b, _), (c, d, _) = affine.tolist()
    return (math.hypot(a + d, c - b) + math.hypot(a - d, b + c)) / 2


def _orthogonal(n: int, rng: np.random.Generator) -> np.ndarray:
    """Rotations by U(-pi, pi), with every second one a reflection, (n, 2, 2)."""
    angle = rng.uniform(-np.pi, np.pi, n)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.stack([cos, -sin, sin, cos], 1).reshape(n, 2, 2)
    return turn * rng.choice([-1.0, 1.0], (n, 1, 2))


# -- points -----------------------------------------------------------------------------------------------------------


def chains_of(number: int) -> tuple[int, int, int]:
    """(chains, points of each, burn-in) for so many points; one chain needs no burn-in."""
    chains = max(1, number // PER_CHAIN)
    return chains, -(-number // chains), BURN if chains > 1 else 0


def points(system: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """About so many points of the attractor, (2, P) float64 (P is rounded up to whole chains)."""
    chains, length, burn = chains_of(number)
    return orbits([system], [rng.integers(0, 2**32, (burn + length, chains), np.uint32)], burn)[:, 0]


def orbits(systems: Sequence[np.ndarray], draws: Sequence[np.ndarray], burn: int) -> np.ndarray:
    """Points of many systems at once, (2, G, P) float64.

    Args:
        draws: uint32 (T, chains) of every system, uniform: they choose the maps.
        burn: steps that are forgotten; P = (T - burn) chains.
    """
    most = max(len(s) for s in systems)
    maps = np.zeros((len(systems), most, 6))
    limits = np.full((len(systems), most - 1), 2**32 - 1, np.uint32)
    for g, system in enumerate(systems):
        maps[g, : len(system)] = system.reshape(-1, 6)
        edges = np.cumsum(probabilities(system))[:-1] * 2.0**32
        limits[g, : len(edges)] = np.minimum(edges, 2**32 - 1)
    starts = np.stack([fixed_point(s) for s in systems])
    stacked = np.stack(draws)
    steps, chains = stacked.shape[1:]
    out = np.empty((2, len(systems), steps - burn, chains))
    _engine()[0](maps, limits, starts, stacked, burn, out[0], out[1])
    return out.reshape(2, len(systems), -1)


def iterate(
    maps: np.ndarray,
    limits: np.ndarray,
    starts: np.ndarray,
    draws: np.ndarray,
    burn: int,
    xs: np.ndarray,
    ys: np.ndarray,
) -> None:
    """The random iteration.

    Args:
        maps: (G, n, 6). limits: uint32 (G, n - 1), a draw chooses the map whose number is how many it reaches.
        starts: (G, 2). draws: uint32 (G, T, chains).
        xs, ys: (G, T - burn, chains), written.
    """
    groups, steps, chains = draws.shape
    choice = np.zeros(draws.shape, np.intp)
    for j in range(limits.shape[1]):
        choice += draws >= limits[:, j, None, None]
    choice += (np.arange(groups) * maps.shape[1])[:, None, None]
    flat = np.ascontiguousarray(maps.reshape(-1, 6).T)  # (6, G n)
    x, y = (np.repeat(starts[:, i, None], chains, 1) for i in range(2))
    for t in range(steps):
        a, b, e, c, d, f = (row.take(choice[:, t]) for row in flat)
        x, y = a * x + b * y + e, c * x + d * y + f
        if t >= burn:
            xs[:, t - burn], ys[:, t - burn] = x, y


def count(xs: np.ndarray, ys: np.ndarray, left: float, top: float, across: float, down: float, out: np.ndarray) -> None:
    """Add points (P,) to a picture (H, W); across, down: pixels per unit of the plane."""
    height, width = out.shape
    column, row = np.floor((xs - left) * across), np.floor((ys - top) * down)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    place = (row[inside] * width + column[inside]).astype(np.int64)
    out += np.bincount(place, minlength=height * width).reshape(height, width).astype(out.dtype)


@functools.cache
def _engine() -> tuple[Callable[..., None], Callable[..., None]]:
    """numba where it is installed: as many bits, in a fraction of the time (benchmarks/fractals.py)."""
    try:
        return fractal_kernels.compiled()
    except MissingExtra:
        return iterate, count


# -- pictures ---------------------------------------------------------------------------------------------------------


def extent(xy: np.ndarray) -> Window:
    """The bounding box of points (2, P)."""
    (left, top), (right, bottom) = xy.min(1), xy.max(1)
    return float(left), float(top), float(right), float(bottom)


def grey(
    xy: np.ndarray, size: tuple[int, int], *, window: Window | None = None, patch: np.ndarray | None = None
) -> np.ndarray:
    """How many points (2, P) fall in each pixel, over the largest number: float32 (H, W) in 0..1.

    Args:
        window: what part of the plane is shown; None: all of it, the bounding box.
        patch: bool (3, 3), stamped at every point.
    """
    left, top, right, bottom = window or extent(xy)
    # a hair more than the window, so that its last points are in the last pixel
    across, down = (
        pixels * (1 - 1e-9) / side if side > 0 else 0.0
        for pixels, side in ((size[1], right - left), (size[0], bottom - top))
    )
    found = np.zeros(size, np.float32)
    _engine()[1](xy[0], xy[1], left, top, across, down, found)
    if patch is not None:
        found = _stamped(found, patch)
    return found / max(1.0, float(found.max()))


def _stamped(found: np.ndarray, patch: np.ndarray) -> np.ndarray:
    height, width = found.shape
    wide = np.zeros((height + 2, width + 2), np.float32)
    for i, j in zip(*np.nonzero(patch), strict=True):
        wide[i : i + height, j : j + width] += found
    return wide[1:-1, 1:-1]


def diamond_square(levels: int, decay: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Cloudy textures, float32 (B, N, N) with N = 2^levels + 1.

    Args:
        decay: (B,); level k adds noise from U(-m, m), m = exp(decay (1 - k)) / 2.
        noise: float32 (B, N, N) in 0..1: the four corners as they are, otherwise the noise of each cell.
    """
    side = 2**levels
    if noise.shape[1:] != (side + 1, side + 1) or len(noise) != len(decay):
        raise ValueError(f"noise must be ({len(decay)}, {side + 1}, {side + 1}), got {noise.shape}")
    out = noise.astype(np.float32)
    for k in range(1, levels + 1):
        step, half = side >> (k - 1), side >> k
        m = (0.5 * np.exp(decay * (1 - k))).astype(np.float32)[:, None, None]

        def put(rows: slice, columns: slice, mean: np.ndarray, m: np.ndarray = m) -> None:
            out[:, rows, columns] = mean + (2 * out[:, rows, columns] - 1) * m

        corner, middle = slice(None, None, step), slice(half, None, step)
        g = out[:, corner, corner]
        put(middle, middle, (g[:, :-1, :-1] + g[:, :-1, 1:] + g[:, 1:, :-1] + g[:, 1:, 1:]) / 4)
        c = out[:, middle, middle]
        before, after = np.arange(-1, 2 ** (k - 1)), np.arange(2 ** (k - 1) + 1) % 2 ** (k - 1)  # round the edges
        put(corner, middle, (g[:, :, :-1] + g[:, :, 1:] + c[:, before] + c[:, after]) / 4)
        put(middle, corner, (g[:, :-1] + g[:, 1:] + c[:, :, before] + c[:, :, after]) / 4)
    return out


def to_rgb(hsv: np.ndarray) -> np.ndarray:
    """(B, 3, H, W) in 0..1 from hue (modulo 1), saturation and value (both clipped to 0..1).

    >>> to_rgb(np.array([0.0, 1, 1]).reshape(1, 3, 1, 1)).ravel().tolist()
    [1.0, 0.0, 0.0]
    """
    hue, saturation, value = hsv[:, 0] % 1 * 6, hsv[:, 1].clip(0, 1), hsv[:, 2].clip(0, 1)
    drop = value * saturation
    turns = ((hue + n) % 6 for n in (5, 3, 1))
    return np.stack([value - drop * np.minimum(t, 4 - t).clip(0, 1) for t in turns], 1)


def blur(images: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Gaussian 3x3 blur of (B, C, H, W) with sigma (B,) in pixels; 0 for none. The border is repeated."""
    side = np.exp(-0.5 / np.maximum(sigma, 1e-3) ** 2)
    side = (side / (1 + 2 * side)).astype(images.dtype)[:, None, None, None]
    x = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    x = x[:, :, 1:-1] * (1 - 2 * side) + (x[:, :, :-2] + x[:, :, 2:]) * side
    return x[..., 1:-1] * (1 - 2 * side) + (x[..., :-2] + x[..., 2:]) * side
