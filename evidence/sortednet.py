"""SortedNet: what 32 nested networks are worth after one run, against other ways to spend the same passes.

The trainings are those of `evidence._supernets`, which `bignas` and `deps` read too; one command runs them once:
``python -m evidence bignas sortednet deps``.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch
from scipy.stats import spearmanr

from evidence._supernets import BUDGETS, LOOK, Bench, row, side_by_side, where
from evidence.runner import ClaimResult, Context, stats
from trimtab.search.children import cut
from trimtab.search.supernets.sortednet import family, look_up

LEVEL = 4
SLICED = "largest alone, sliced"


def run(context: Context) -> list[ClaimResult]:
    benches = side_by_side(context)
    return [_many(context, benches), _accumulated(context, benches), _free(benches[0])]


def _kept(b: Bench, name: str) -> dict[str, float]:
    """What networks along the family keep of the largest's accuracy."""
    along, largest = b.grid[name], b.rows[name]["largest"]
    order = spearmanr(range(len(along)), along).statistic if len(set(along)) > 1 else 0.0
    return {"worst": min(along) / largest, "mean": statistics.fmean(along) / largest, "order": float(order)}


def _many(context: Context, benches: list[Bench]) -> ClaimResult:
    table: dict[str, dict[str, Any]] = {}
    for name in ("sortednet", SLICED):
        kept = [_kept(b, name) for b in benches]
        table[name] = {k: stats(each[k] for each in kept) for k in kept[0]}
    ours, sliced = table["sortednet"], table[SLICED]
    return ClaimResult(
        "many",
        ours["mean"]["mean"] >= 0.85 and ours["worst"]["mean"] >= sliced["worst"]["mean"] + 0.2,
        {"sortednet": row(benches, "sortednet"), "share of the largest kept": ours},
        {SLICED: row(benches, SLICED), "share of the largest kept, sliced": sliced},
        context.seeds,
        where(benches[0]) + f"; {len(family(benches[0].net))} networks, {len(benches[0].chain)} of them looked at",
        "Order is Spearman's between cost and accuracy. The smallest networks here have a thirteenth of the largest's "
        "parameters and would lose accuracy alone, too; the paper's 96 % is of wide networks.",
    )


def _accumulated(context: Context, benches: list[Bench]) -> ClaimResult:
    names = ("sortednet", "sum over all", "sandwich on labels")
    means = {name: [statistics.fmean(b.grid[name]) for b in benches] for name in names}
    table = {name: {"mean accuracy of the family": stats(values)} for name, values in means.items()}
    mean = {name: statistics.fmean(values) for name, values in means.items()}
    return ClaimResult(
        "random_accum",
        mean["sortednet"] > max(mean["sum over all"], mean["sandwich on labels"]),
        {"sortednet": table["sortednet"]},
        {name: table[name] for name in names[1:]},
        context.seeds,
        where(benches[0]),
        "As many passes each: SortedNet four batches a step with a network each, the sandwich four networks on one "
        f"batch, the sum all {len(family(benches[0].net))} networks in one of every {len(family(benches[0].net)) // 4} "
        f"steps. SortedNet against the sandwich: {100 * (mean['sortednet'] - mean['sandwich on labels']):+.1f} points.",
    )


def _free(b: Bench) -> ClaimResult:
    """Counting only: the weights do not matter."""
    net, members = b.net, family(b.net)
    macs = [net.cost(a)["macs"] for a in members]
    chain = [net.space.scale(f) for f in (0, 0.5, 1)]
    states = [dict(net.extract(a).named_parameters()) for a in chain]
    nested = all(
        torch.equal(t, cut(large[name], tuple(t.shape)))
        for small, large in itertools.pairwise(states)
        for name, t in small.items()
    )
    largest = {}
    for column, budget in BUDGETS.items():
        found = net.search(b.data, budget, method=look_up(members), evaluations=1, **LOOK)
        inside = [m for m in macs if m <= float(budget[6:-1]) / 100 * macs[-1]]
        largest[column] = found.cost["macs"] == max(inside)
    stored = sum(p.numel() for p in net.model.parameters())
    measured = {
        "each a prefix of the next": nested,
        "the largest inside is found": largest,
        "looks for it": 1,
        "parameters of one checkpoint": stored,
        "sorted": macs == sorted(macs),
    }
    whole = net.cost(net.space.max())["params"]
    holds = nested and all(largest.values()) and stored == whole and macs == sorted(macs)
    return ClaimResult(
        "search_free", holds, measured, {"parameters of the largest": whole}, data=f"{len(members)} networks"
    )
