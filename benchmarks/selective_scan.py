"""The selective scan next to the step-by-step recurrence, at growing lengths.

    python -m benchmarks.selective_scan [--lengths 512 1024 2048 4096 8192]

One thread, one sequence, float32; ways take turns in one process (`benchmarks.runner`), times are medians, of inference
and of a forward with backward pass. "steps" is the definition, "chunks" what accelerators and exported files run,
"kernel" what a CPU runs. Two shapes: a direction of Vim-tiny (192 x 2 channels, 16 states), and the first stage of
VMamba (4 directions of 96 channels, 1 state). `slope` is that of log time over log length between the last two lengths:
1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.runner import compare, seconds
from trimtab.core import host
from trimtab.core.files import write_text
from trimtab.core.timing import torch_threads
from trimtab.nn.scan import scan_by, selective_scan, step_by_step

WAYS = ("kernel", "chunks", "steps")
SHAPES = {"vim_tiny": (1, 384, 16), "vmamba_stage1": (4, 96, 1)}  # groups, channels, states
LENGTHS = (512, 1024, 2048, 4096, 8192)
LIMIT = 4096  # the length of the summary
KINDS = ("inference", "training")


def inputs(groups: int, width: int, state: int, length: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    x, dt = torch.randn(2, 1, groups, length, width, generator=g)
    b, c = torch.randn(2, 1, groups, length, state, generator=g)
    a = -torch.arange(1, state + 1.0)[None, :, None].expand(groups, state, width).contiguous()
    return [x, dt.abs() * 0.1, a, b, c]


def infer(way: str, parts: list[Tensor]) -> None:
    with scan_by(way), torch.inference_mode():
        selective_scan(*parts)


def learn(way: str, parts: list[Tensor]) -> None:
    with scan_by(way):
        torch.autograd.grad(selective_scan(*parts).sum(), parts)


def measure(shape: str, length: int, rounds: int) -> dict[str, Any]:
    """Seconds and ratios to "steps" of one length, and the errors against float64."""
    parts = inputs(*SHAPES[shape], length)
    exact = step_by_step(*(v.double() for v in parts))
    row: dict[str, Any] = {"error": {}}
    for way in WAYS:
        with scan_by(way), torch.inference_mode():
            row["error"][way] = ((selective_scan(*parts) - exact).abs().max() / exact.abs().max()).item()
    for what, function in (("inference", infer), ("training", learn)):
        given = [v.clone().requires_grad_(what == "training") for v in parts]
        calls: dict[str, Callable[[], Any]] = {way: partial(function, way, given) for way in WAYS}
        result = compare(calls, rounds=rounds, baseline="steps")
        row[what] = {w: {"seconds": s.median, "iqr": s.iqr, "times faster": round(1 / result.ratio(w), 2)}
                     for w, s in result.series.items()}  # fmt: skip
    return row


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "selective_scan.json")
    args = parser.parse_args(argv)
    lengths = sorted(set(args.lengths))
    if len(lengths) < 2 or lengths[0] < 1:
        parser.error("--lengths must be two or more, of at least 1")
    found: dict[str, dict[int, dict[str, Any]]] = {}
    slopes: dict[str, dict[str, float]] = {}
    with torch_threads(1):
        for shape in SHAPES:
            found[shape] = {}
            for length in lengths:
                row = found[shape][length] = measure(shape, length, args.rounds)
                for what in KINDS:
                    told = ", ".join(
                        f"{w} {seconds(r['seconds'])} (x {r['times faster']})" for w, r in row[what].items()
                    )
                    print(f"{shape} {length:>6} {what:<9} {told}", flush=True)
            a, b = lengths[-2:]
            slopes[shape] = {
                f"{way}, {what}": round(
                    math.log(found[shape][b][what][way]["seconds"] / found[shape][a][what][way]["seconds"])
                    / math.log(b / a), 3)
                for way in WAYS for what in KINDS
            }  # fmt: skip
    at = LIMIT if LIMIT in lengths else lengths[-1]
    least = min(found[shape][at][what]["kernel"]["times faster"] for shape in SHAPES for what in KINDS)
    steepest = max(slopes[shape][f"kernel, {what}"] for shape in SHAPES for what in KINDS)
    report = {
        "summary": {
            "length": at,
            "kernel": {
                "least times faster": least, "at least 10": least >= 10,
                "steepest slope": steepest, "linear (at most 1.2)": steepest <= 1.2,
            },
            "times faster than steps": {
                f"{shape}, {what}": {w: found[shape][at][what][w]["times faster"] for w in WAYS[:2]}
                for shape in SHAPES for what in KINDS
            },
            "slope": slopes,
            "largest error against float64": max(
                e for rows in found.values() for row in rows.values() for e in row["error"].values()
            ),
        },
        "results": found,
        "rounds": args.rounds,
        "threads": 1,
        "load average of the machine": [round(v, 1) for v in os.getloadavg()],
        **host.provenance(Path(__file__).parent, "numba"),
    }  # fmt: skip
    print(json.dumps(report["summary"], indent=1))
    write_text(args.out, json.dumps(report, indent=1) + "\n")
    print(f"wrote {args.out}")
    return report


if __name__ == "__main__":
    main()
