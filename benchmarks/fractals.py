"""Pictures of fractals per second, on one core, against a chaos game that goes point by point.

    python -m benchmarks.fractals

First the grey picture of a system, stamped with a 3x3 patch, in three ways: the chaos game in plain Python (maps drawn
all at once, points and counts one by one), NumPy chains, and the numba kernels with which the library draws. Ratios
are times over that of the chaos game. Kept with them: the correlation of the pictures, beside that of two runs of the
chaos game. Then whole training images, with background and colour, per second.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.runner import Comparison, compare
from trimtab.core.files import write_text
from trimtab.data import fractal_kernels, fractals, load_data

RESULT = Path(__file__).parent / "results" / "fractals.json"
SIZES = ((32, 10_000), (224, 100_000))  # pixels of a side, points
BASELINE = "point by point"
PATCH = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)
SYSTEMS = 16


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the smallest size only")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cells, images = [], []
    for side, number in SIZES[:1] if args.quick else SIZES:
        cells.append(grey_pictures(side, number, args.rounds))
        cells[-1].show(f"{SYSTEMS} grey pictures of {side} x {side}, {number} points each")
        for objects in (None, 5):
            row = {"side": side, "objects": objects or 1, **images_per_second(side, objects, 32 if args.quick else 512)}
            images.append(row)
            print(row)
    about = cells[0].asdict()
    kept = {"grey": [c.asdict() for c in cells], "images": images} | {
        k: about[k] for k in ("machine", "versions", "date")
    }
    write_text(args.out, json.dumps(kept, indent=1) + "\n")


def grey_pictures(side: int, number: int, rounds: int) -> Comparison:
    """The same systems in three ways; pictures per second are among the facts."""
    systems = [fractals.sample_system(np.random.default_rng(k)) for k in range(SYSTEMS)]
    numba = fractal_kernels.compiled()
    contenders: dict[str, Callable[[], Any]] = {
        BASELINE: lambda: [chaos_game(s, number, side, k) for k, s in enumerate(systems)],
        "NumPy chains": lambda: drawn(systems, number, side, (fractals.iterate, fractals.count)),
        "numba chains": lambda: drawn(systems, number, side, numba),
    }
    pictures = {name: call() for name, call in contenders.items()}
    again = [chaos_game(s, number, side, k + 1000) for k, s in enumerate(systems)]
    same = {"two runs point by point": _alike(pictures[BASELINE], again)}
    same |= {name: _alike(pictures[BASELINE], p) for name, p in pictures.items() if name != BASELINE}
    result = compare(contenders, rounds=rounds, baseline=BASELINE)
    for s in result.series.values():
        s.returned = None
    result.facts = {
        "side": side, "points": number, "threads": 1, "median correlation of pictures": same,
        "pictures per second": {n: round(SYSTEMS / s.median, 1) for n, s in result.series.items()},
        "times as fast": {n: round(1 / result.ratio(n), 1) for n in result.series},
    }  # fmt: skip
    return result


def chaos_game(system: np.ndarray, number: int, side: int, seed: int) -> np.ndarray:
    """What one writes first: a loop over points, a loop over the cells of the patch."""
    chance = random.Random(seed)
    chosen = chance.choices(
        [tuple(m.ravel().tolist()) for m in system], fractals.probabilities(system).tolist(), k=number
    )
    x, y = fractals.fixed_point(system).tolist()
    xs, ys = [], []
    for a, b, e, c, d, f in chosen:
        x, y = a * x + b * y + e, c * x + d * y + f
        xs.append(x)
        ys.append(y)
    left, top = min(xs), min(ys)
    across, down = ((side - 1e-6) / (max(v) - min(v) or 1.0) for v in (xs, ys))
    counts = [[0] * (side + 2) for _ in range(side + 2)]
    cells = [(i, j) for i in range(3) for j in range(3) if PATCH[i, j]]
    for x, y in zip(xs, ys):
        row, column = int((y - top) * down), int((x - left) * across)
        for i, j in cells:
            counts[row + i][column + j] += 1
    picture = np.array(counts, np.float32)[1:-1, 1:-1]
    return picture / picture.max()


def drawn(systems: list[np.ndarray], number: int, side: int, engine: Any) -> list[np.ndarray]:
    """As the library draws pictures: many systems at once."""
    fractals._engine.cache_clear()
    held, fractals._engine = fractals._engine, lambda: engine  # type: ignore[assignment]
    try:
        chains, length, burn = fractals.chains_of(number)
        rng = np.random.default_rng(0)
        draws = [rng.integers(0, 2**32, (burn + length, chains), np.uint32) for _ in systems]
        orbits = fractals.orbits(systems, draws, burn)
        return [fractals.grey(orbits[:, g], (side, side), patch=PATCH) for g in range(len(systems))]
    finally:
        fractals._engine = held


def images_per_second(side: int, objects: int | None, number: int) -> dict[str, float]:
    """Whole training images, on this one thread."""
    train = load_data(f"fractals:classes=100,n=100000,size={side}").splits["train"]
    images = train.images if objects is None else train.images.together(objects)  # type: ignore[union-attr]
    images[torch.arange(16)]
    number = max(16, number * 32 // side)
    start = time.perf_counter()
    images[torch.arange(number)]
    return {"images per second": round(number / (time.perf_counter() - start), 1)}


def _alike(some: list[np.ndarray], others: list[np.ndarray]) -> float:
    """Median correlation of pictures, reduced to 32 x 32 counts."""

    def small(p: np.ndarray) -> np.ndarray:
        k = len(p) // 32
        return p.reshape(32, k, 32, k).sum((1, 3)).ravel()

    return round(float(np.median([np.corrcoef(small(a), small(b))[0, 1] for a, b in zip(some, others)])), 4)


if __name__ == "__main__":
    main()
