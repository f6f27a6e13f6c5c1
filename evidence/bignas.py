"""BigNAS: sandwich and distillation against uniform sampling and training alone, its rules at the start, its search.

The trainings are those of `evidence._supernets`, which `sortednet` and `deps` read too; one command runs them once:
``python -m evidence bignas sortednet deps``.

Of `sandwich_kd` a first run asked for more than the claim says: that the sandwich on labels, too, is better than
uniform sampling. It saw it 0.4 points worse than one network in a step, and BigNAS 0.3 to 2.8 points better at every
size.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from evidence._supernets import CHOSEN, ENDS, Bench, row, side_by_side, where
from evidence.runner import ClaimResult, Context, stats
from trimtab.models import create_model
from trimtab.search import elastic
from trimtab.search.supernets.bignas import schedule, silence

LEVEL = 4
POINT = 0.01  # of accuracy


def run(context: Context) -> list[ClaimResult]:
    benches = side_by_side(context)
    return [_no_retrain(context, benches), _sandwich(context, benches), _rules(), _choice(context, benches)]


def _no_retrain(context: Context, benches: list[Bench]) -> ClaimResult:
    ours, alone, sliced = (
        statistics.fmean(b.mean(name) for b in benches) for name in ("bignas", "alone", "largest alone, sliced")
    )
    return ClaimResult(
        "no_retrain",
        ours >= alone - 2 * POINT and ours >= sliced + 5 * POINT,
        {"bignas": row(benches, "bignas")},
        {name: row(benches, name) for name in ("alone", "largest alone, sliced")},
        context.seeds,
        where(benches[0]),
        "Mean of smallest, median and largest against the same networks trained alone as long: "
        f"{100 * (ours - alone):+.1f} points; against slices of the largest, which was trained alone: "
        f"{100 * (ours - sliced):+.1f} points.",
    )


def _sandwich(context: Context, benches: list[Bench]) -> ClaimResult:
    """Better than uniform sampling at every size, by most at the smallest; there it is the best of all."""
    names = ("bignas", "sandwich on labels", "uniform, four in a step", "uniform")
    mean = {name: {end: statistics.fmean(b.rows[name][end] for b in benches) for end in ENDS} for name in names}
    least = {name: mean[name]["smallest"] for name in names}
    gains = {name: [mean["bignas"][end] - mean[name][end] for end in ENDS] for name in names[2:]}
    return ClaimResult(
        "sandwich_kd",
        all(min(g) > 0 and max(g) == g[0] for g in gains.values()) and max(least, key=least.__getitem__) == "bignas",
        {"bignas": row(benches, "bignas")},
        {name: row(benches, name) for name in names[1:]},
        context.seeds,
        where(benches[0]),
        "Points gained at the smallest, median and largest network: "
        + "; ".join(f"on {name} " + ", ".join(f"{100 * v:+.1f}" for v in g) for name, g in gains.items())
        + ". All start at zero and have the same learning rate; one network in a step costs a fourth of four.",
    )


def _rules() -> ClaimResult:
    """What holds exactly, whatever is learned."""

    def build(depth: int) -> Any:
        return create_model("trim_net", widths=(8, 16), depths=(depth, depth), drop_rate=0.5, num_classes=10, seed=0)

    net = elastic(build, (3, 16, 16), {"depth": (1, 2, 3)})
    silence(net.model, (3, 16, 16))
    net.model.train()
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    depths = [{"depth": d} for d in (1, 2, 3)]
    apart = max(float((net(x, a).detach() - net(x, depths[0]).detach()).abs().max()) for a in depths)
    noise = {
        size: float((net(x, a, regularise=on).detach() - net(x, a, regularise=on).detach()).abs().max())
        for size, a, on in (("smallest", depths[0], False), ("largest", depths[-1], True))
    }
    epochs = 360
    lr = schedule(warmup=0.0, every=2.4 / epochs)
    floor = next(t / 100 for t in range(100 * epochs) if lr(t / 100 / epochs) == 0.05)
    measured = {
        "logits apart at the start, depths 1 to 3": apart,
        "dropout's effect": noise,
        "epoch at the floor": floor,
        "floor": lr(1.0),
    }
    return ClaimResult(
        "init_lr_reg",
        apart == 0.0 and noise["smallest"] == 0.0 < noise["largest"] and abs(floor - 236.05) < 0.02,
        measured,
        note="The rules themselves, exactly. What each is worth needs ImageNet's 360 epochs.",
    )


def _choice(context: Context, benches: list[Bench]) -> ClaimResult:
    table: dict[str, dict[str, Any]] = {
        how: {split: stats(b.chosen[how][split] for b in benches) for split in ("val", "test")}
        | {"networks looked at": [b.chosen[how]["looks"] for b in benches]}
        for how in ("coarse to fine", "exhaustive")
    }
    gap = table["exhaustive"]["test"]["mean"] - table["coarse to fine"]["test"]["mean"]
    return ClaimResult(
        "coarse_to_fine",
        gap <= POINT
        and all(20 * b.chosen["coarse to fine"]["looks"] <= b.chosen["exhaustive"]["looks"] for b in benches),
        {"coarse to fine": table["coarse to fine"]},
        {"exhaustive": table["exhaustive"]},
        context.seeds,
        where(benches[0]) + f", chosen on 500 validation images inside {CHOSEN}",
        f"The network that looking at all of them finds is {100 * gap:+.2f} points better on test images.",
    )
