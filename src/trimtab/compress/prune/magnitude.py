"""Magnitude pruning: channels whose weights are small go first. The baseline for every other pruner.

The importance of a unit is the L1 or L2 norm of everything that goes with it: rows, biases, norm scales, and the
columns of the layers that read it (Li et al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710, on coupled
groups as in DepGraph, arXiv 2301.12900). No training is done here; fine-tune the result.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from trimtab.compress.graph import ChannelGraph
from trimtab.compress.prune.to_budget import prune_to
from trimtab.core.budget import Budget
from trimtab.core.edit import Edit, apply
from trimtab.core.example import example_of


def magnitude(
    model: nn.Module,
    data: Any,
    *,
    budget: str | Budget = "macs<=50%",
    norm: int = 2,
    scope: str = "raw",
    round_to: int = 1,
    min_keep: float = 0.1,
) -> nn.Module:
    """A narrowed copy of `model`, of the same class, that meets the budget; its edits are remembered.

    Args:
        data: a `Data`, an input size (C, H, W), an example input (B, C, H, W), or a tuple or dict of example inputs.
        budget: bounds on macs, params, latency, size or memory; a percentage is of the model's own cost.
        norm: 1 or 2.
        scope: "raw" compares the scores of all units as they are; "global" divides each by its group's mean; "local"
            takes the same share of every group.
        round_to: keep multiples of this many channels where a group has as many.
        min_keep: share of each group that always stays.

    Raises:
        BudgetError: when the budget cannot be met; says how near it came.
        SurgeryError: when the model cannot be traced or cut.

    >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 10, 3))
    >>> magnitude(net, (3, 8, 8), budget="macs<=50%")
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): ReLU()
      (2): Conv2d(8, 10, kernel_size=(3, 3), stride=(1, 1))
    )
    """
    edits = plan(model, data, budget=budget, norm=norm, scope=scope, round_to=round_to, min_keep=min_keep)
    return apply(copy.deepcopy(model), edits)


def plan(
    model: nn.Module,
    data: Any,
    *,
    budget: str | Budget = "macs<=50%",
    norm: int = 2,
    scope: str = "raw",
    round_to: int = 1,
    min_keep: float = 0.1,
) -> list[Edit]:
    """The edits that `magnitude` applies; arguments as there."""
    if norm not in (1, 2):
        raise ValueError(f"norm must be 1 or 2, got {norm!r}")
    graph = ChannelGraph(model, example_of(data, model))
    return prune_to(
        graph, lambda g: g.norms(p=norm), budget, scope=scope, round_to=round_to, min_keep=min_keep
    )[0]  # fmt: skip
