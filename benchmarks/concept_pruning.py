"""What density-based pruning costs: from ten thousand to two million vectors, in a memory-mapped file.

    python -m benchmarks.concept_pruning

Each size runs in a process of its own (half-precision vectors of 128 numbers, 500 clusters), so that its peak memory is
its own. The vectors are made before, chunk by chunk, and are not part of the time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.runner import compare_processes
from trimtab.core.files import write_text

RESULT = Path(__file__).parent / "results" / "concept_pruning.json"
SIZES = (10_000, 100_000, 500_000, 2_000_000)
DIM, CLUSTERS = 128, 500


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the smallest size only")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--prune", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.prune:
        print(json.dumps(pruned(args.prune)))
        return
    with tempfile.TemporaryDirectory() as folder:
        contenders = {}
        for n in SIZES[:1] if args.quick else SIZES:
            file = synthetic(Path(folder) / f"{n}.npy", n)
            contenders[f"{n:,} vectors"] = ["python", "-m", "benchmarks.concept_pruning", "--prune", str(file)]
        result = compare_processes(contenders, rounds=args.rounds, baseline=next(iter(contenders)))
    result.facts = {"dim": DIM, "clusters": CLUSTERS, "kept": "50%"}
    result.facts |= {name: s.returned for name, s in result.series.items()}
    result.show("density-based pruning")
    write_text(args.out, json.dumps(result.asdict(), indent=1) + "\n")


def synthetic(path: Path, n: int, chunk: int = 100_000) -> Path:
    """Directions around 2000 centres of different spread, float16, written chunk by chunk."""
    rng = np.random.default_rng(0)
    centres, spread = rng.normal(size=(2000, DIM)), rng.uniform(0.2, 1.5, 2000)
    out = np.lib.format.open_memmap(path, "w+", np.float16, (n, DIM))
    for start in range(0, n, chunk):
        k = rng.integers(2000, size=min(chunk, n - start))
        out[start : start + len(k)] = centres[k] + spread[k, None] * rng.normal(size=(len(k), DIM))
    out.flush()
    return path


def pruned(path: Path) -> dict[str, float]:
    """Prune a file; seconds without start-up, and what came out."""
    from trimtab.data import concept_pruning

    start = time.perf_counter()
    found = concept_pruning(path, keep="50%", clusters=CLUSTERS)
    taken = time.perf_counter() - start
    return {"seconds": round(taken, 2), "kept": len(found.rows), "vectors_per_second": round(found.total / taken)}


if __name__ == "__main__":
    main()
