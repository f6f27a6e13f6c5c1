"""ULSAM: exact costs, and blocks of a small MobileNetV2 replaced by it against the same blocks left out.

The network has inverted residuals of 12 to 40 channels (62 k parameters) on images of 16 x 16 pixels. As in the paper's
largest replacement, "96x2+160x2", all blocks of the last two widths go that can go, four of them; everything is trained
from the same weights, on the same batches. Three seeds take about five minutes of one CPU core when nothing else runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers import NonLocalAttn, SEModule
from timm.layers.cbam import CbamModule
from torch import nn

from evidence.runner import ClaimResult, Context, stats
from trimtab.core.cost import measure
from trimtab.core.edit import Remove, apply
from trimtab.learn import evaluate, fit
from trimtab.models import create_model
from trimtab.models.classify.ulsam import ULSAM, plan, ulsam

LEVEL = 4
GROUPS = (1, 2, 4, 8)
BLOCKS = "24x2+40x2"
NET: dict[str, Any] = {
    "name": "trim_net", "kind": "bottleneck", "expand": 4, "group_width": 1,
    "widths": (12, 16, 24, 40), "depths": (1, 2, 3, 3), "strides": (1, 2, 2, 1),
}  # fmt: skip
# MobileNetV2 at 224 with g = 4: parameters, MACs in M
PAPER = {
    "whole": (3_504_872, 300.774),
    "96": (3_387_092, 278.120),
    "160": (3_185_684, 285.314),
    "64+96": (3_333_152, 267.834),
    "160x2": (2_866_496, 269.853),
    "96+160": (3_067_904, 262.659),
    "96x2+160x2": (2_630_936, 224.544),
}


def run(context: Context) -> list[ClaimResult]:
    return [_cost(), *_trained(context)]


def _cost() -> ClaimResult:
    """The modules at 512 x 14 x 14; those of timm with the paper's reductions, without biases and norms."""
    modules: dict[str, Callable[[], nn.Module]] = {
        "ULSAM": lambda: ULSAM(512),
        "SE": lambda: SEModule(512, rd_ratio=1 / 16),
        "CBAM": lambda: CbamModule(512, rd_ratio=1 / 16),
        "non-local": lambda: NonLocalAttn(512, rd_ratio=1 / 2),
    }
    measured: dict[str, Any] = {}
    for name, build in modules.items():
        with torch.device("meta"):
            module = build()
        macs = measure(module, (512, 14, 14), what=("macs",)).macs
        measured[name] = {"weights": sum(p.numel() for p in module.parameters() if p.ndim > 1), "macs": macs}
    ours, others = measured.pop("ULSAM"), measured
    near = {"SE": 33e3, "CBAM": 33e3, "non-local": 524e3}
    holds = ours == {"weights": 1024, "macs": 200_704} and all(
        abs(others[name]["weights"] / weights - 1) < 0.01 for name, weights in near.items()
    )
    return ClaimResult(
        "cost", holds, {"ULSAM": ours}, others,
        note="Weights of convolutions, as the paper counts; BAM was not measured. With biases and norms ULSAM has "
        "5m + 3g parameters, here 2572. The products of the non-local attention itself are counted too.",
    )  # fmt: skip


def _on_mobilenet() -> dict[str, dict[str, Any]]:
    with torch.device("meta"):
        host = timm.create_model("mobilenetv2_100")
    costs = {}
    for blocks in PAPER:
        net = host if blocks == "whole" else ulsam(host, (3, 224, 224), blocks=blocks)
        cost = measure(net, (3, 224, 224), what=("params", "macs"))
        assert cost.macs is not None
        costs[blocks] = {"params": cost.params, "macs_millions": round(cost.macs / 1e6, 3)}
    return costs


def _trained(context: Context) -> list[ClaimResult]:
    epochs, images = context.choose(full=8, smoke=1), context.choose(full=2000, smoke=128)
    accuracy: dict[str, list[float]] = {}
    costs: dict[str, dict[str, Any]] = {}
    data: Any = None
    for seed in context.each_seed("replaced and deleted blocks"):
        data = context.load_data(default="digits", limit=5000, image_size=16, seed=seed)
        data = data.subset({"train": min(images, len(data.splits["train"]))}, seed=seed)
        for what, net in _nets(data, seed).items():
            context.say(f"seed {seed}: {what}")
            cost = measure(net, data.spec.size, what=("params", "macs"))
            costs[what] = {"params": cost.params, "macs": cost.macs}
            fit(net, data, epochs=epochs, batch_size=64, seed=seed, val=None, progress=False, device=context.device)
            accuracy.setdefault(what, []).append(evaluate(net, data, "test", device=context.device)["accuracy"])
    table = {k: stats(v) | costs[k] for k, v in accuracy.items()}
    mean = {k: statistics.fmean(v) for k, v in accuracy.items()}
    where = f"{data.name} at 16 x 16, {len(data.splits['train'])} training images, {epochs} epochs"
    exact = _on_mobilenet()
    as_said = exact == {k: {"params": p, "macs_millions": m} for k, (p, m) in PAPER.items()}
    several = statistics.fmean(mean[f"g={g}"] for g in GROUPS if g > 1)
    grown = [costs[f"g={g}"]["params"] - costs["g=1"]["params"] for g in GROUPS]
    free = grown == [4 * 3 * (g - 1) for g in GROUPS] and len({costs[f"g={g}"]["macs"] for g in GROUPS}) == 1
    return [
        ClaimResult(
            "replace",
            as_said and mean["g=4"] > mean["deleted"],
            {"replaced, g=4": table["g=4"], "MobileNetV2 at 224": exact},
            {"whole": table["whole"], "deleted": table["deleted"]},
            context.seeds,
            where,
            f"Four modules for four blocks. Against deleting them: {_points(accuracy, 'g=4', 'deleted')}; against "
            f"the whole network: {_points(accuracy, 'g=4', 'whole')}. The costs on MobileNetV2 "
            f"{'are' if as_said else 'are not'} the paper's. ImageNet was not trained.",
        ),
        ClaimResult(
            "subspace",
            free and several >= mean["g=1"],
            {f"g={g}": table[f"g={g}"] for g in GROUPS if g > 1},
            {"g=1": table["g=1"]},
            context.seeds,
            where,
            f"Mean of g = 2, 4, 8 against g = 1: {100 * (several - mean['g=1']):+.2f} points. A group more is 3 "
            "parameters more in each module, and no multiply-add.",
        ),
    ]


def _nets(data: Any, seed: int) -> dict[str, nn.Module]:
    """All from the same weights, which those that replace and delete keep elsewhere."""

    def whole() -> nn.Module:
        return create_model(**NET, num_classes=data.num_classes, in_chans=data.in_chans, seed=seed)

    gone = [Remove(e.module) for e in plan(whole(), data, blocks=BLOCKS)]
    nets = {"whole": whole(), "deleted": apply(whole(), gone)}
    return nets | {f"g={g}": ulsam(whole(), data, blocks=BLOCKS, groups=g, seed=seed) for g in GROUPS}


def _points(accuracy: dict[str, list[float]], one: str, other: str) -> str:
    """Differences in points, seed by seed."""
    pairs = zip(accuracy[one], accuracy[other], strict=True)
    return ", ".join(f"{100 * (a - b):+.1f}" for a, b in pairs) + " points"
