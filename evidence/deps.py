"""DepS: shrinking from the start, from 25, 50 and 75 % of the run; the ramp; the teacher.

The trainings are those of `evidence._supernets`, which `bignas` and `sortednet` read too; one command runs them once:
``python -m evidence bignas sortednet deps``.
"""

from __future__ import annotations

import statistics
from typing import Any

from evidence._supernets import RAMP, STARTS, Bench, row, side_by_side, where
from evidence.runner import ClaimResult, Context, stats

LEVEL = 4
POINT = 0.01  # of accuracy


def run(context: Context) -> list[ClaimResult]:
    benches = side_by_side(context)
    return [_delayed(context, benches), _ramp(context, benches), _teacher(context, benches)]


def _delayed(context: Context, benches: list[Bench]) -> ClaimResult:
    mean = {name: statistics.fmean(b.mean(name) for b in benches) for name in STARTS.values()}
    cost = {name: benches[0].per_step(name) for name in STARTS.values()}
    once = STARTS[0.0]
    saved = 1 - cost["deps"] / cost[once]
    return ClaimResult(
        "delayed",
        mean["deps"] >= mean[once] and saved > 0.2,
        {"deps": row(benches, "deps")},
        {name: row(benches, name) for name in STARTS.values() if name != "deps"},
        context.seeds,
        where(benches[0]),
        f"{100 * saved:.0f} % less computed than from the start. Mean of smallest, median and largest: "
        + ", ".join(f"{name} {100 * mean[name]:.1f} %" for name in STARTS.values())
        + f". The ramp is {100 * RAMP:.1f} % of the run.",
    )


def _ramp(context: Context, benches: list[Bench]) -> ClaimResult:
    """The largest network's loss in the epochs after its neighbours begin to learn, against the epoch before."""
    table: dict[str, Any] = {}
    for name, ramp in (("deps", RAMP), ("deps without ramp", 0.0)):
        jumps = []
        for b in benches:
            before = max(1, round(b.epochs * (0.5 - ramp)))  # epochs of the full network alone
            after = b.loss[name][before : before + 3] or b.loss[name][-1:]
            jumps.append(max(after) - b.loss[name][before - 1])
        table[name] = {"largest loss minus that before": stats(jumps), **row(benches, name)}
    with_, without = (table[n]["largest loss minus that before"]["mean"] for n in ("deps", "deps without ramp"))
    return ClaimResult(
        "eps_ramp",
        with_ < without,
        {"deps": table["deps"]},
        {"deps without ramp": table["deps without ramp"]},
        context.seeds,
        where(benches[0]),
        "Validation loss of the largest network in the three epochs after it stops to learn alone. That the others' "
        "gradients count nothing at the ramp's start is tested bit by bit.",
    )


def _teacher(context: Context, benches: list[Bench]) -> ClaimResult:
    least = {name: statistics.fmean(b.rows[name]["smallest"] for b in benches) for name in ("deps", STARTS[0.0])}
    return ClaimResult(
        "ikd",
        least["deps"] >= least[STARTS[0.0]],
        {"deps": row(benches, "deps")},
        {STARTS[0.0]: row(benches, STARTS[0.0])},
        context.seeds,
        where(benches[0]),
        f"The smallest network learned from a teacher trained for half of the run: "
        f"{100 * (least['deps'] - least[STARTS[0.0]]):+.1f} points against one that started with it.",
    )
