"""DCLS: exact sizes and folding, hidden positions that are found, and a small ConvNeXt with learned spacings.

The hidden kernel has three weights at real-valued places in a window of 15 x 15. It is looked for by DCLS with the
paper's rules, without its larger learning rate, with weight decay on positions, and by kernels of fixed places. The
ConvNeXt has 16 to 64 channels and images of 32 x 32; the 7x7 convolutions of its first two stages, three blocks each,
are trained as they are, with dilation 2 (a window of 13), and as DCLS in a window of 13, all with as many parameters.
Three seeds take about six minutes of one CPU core.
"""

from __future__ import annotations

import statistics
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evidence.runner import ClaimResult, Context, stats
from trimtab.compress import merge
from trimtab.core.cost import measure
from trimtab.core.edit import SetAttr, apply
from trimtab.learn import Repulsion, evaluate, fit, param_groups
from trimtab.models import create_model
from trimtab.models.classify.dcls import VERSIONS, DCLS2d, construct, dcls
from trimtab.nn.merge import depthwise

LEVEL = 4
PAPER = {"tiny": (28_587_688, 4.970337), "small": (50_217_064, 9.523658), "base": (88_582_632, 16.474658)}
WINDOW = 15
HIDDEN = ((3.3, -2.6, 0.4), (-1.7, 2.2, 4.4))  # rows, columns
STRENGTH = (1.0, 0.8, -0.9)
NET: dict[str, Any] = {"name": "convnext_atto", "dims": (16, 32, 48, 64), "depths": (3, 3, 1, 1), "patch_size": 2}
LARGE = ("stages.0.", "stages.1.")  # with maps of 16 x 16 and 8 x 8; a 7x7 kernel covers those of the others


def run(context: Context) -> list[ClaimResult]:
    iso, fixed = _trained(context)
    return [iso, _found(context), fixed, _folded(context)]


# -- hidden positions -------------------------------------------------------------------------------------------------


def _found(context: Context) -> ClaimResult:
    steps = context.choose(full=1000, smoke=20)
    results: dict[str, list[float]] = {}
    error: list[float] = []
    for seed in context.each_seed("hidden positions"):
        x, y = _task(seed)
        torch.manual_seed(seed)
        spaced = {name: DCLS2d(1, 1, 3, WINDOW, version="gauss", bias=False) for name in ("DCLS", "same rate", "decay")}
        for other in ("same rate", "decay"):
            spaced[other].load_state_dict(spaced["DCLS"].state_dict())
        vars(spaced["same rate"])["lr_scales"] = {}
        nets: dict[str, nn.Module] = {
            **spaced,
            "dense 3x3": nn.Conv2d(1, 1, 3, padding=1, bias=False),
            "3x3, dilation 7": nn.Conv2d(1, 1, 3, padding=7, dilation=7, bias=False),
            "dense 15x15": nn.Conv2d(1, 1, WINDOW, padding=WINDOW // 2, bias=False),
        }
        for name, net in nets.items():
            decay = {"weight_decay": 0.5, "no_decay": lambda name, p: False} if name == "decay" else {}
            results.setdefault(name, []).append(_search(net, x, y, steps, **decay))
        there = torch.tensor(HIDDEN)
        found = spaced["DCLS"].positions.detach().view(2, 3)
        error.append(torch.cdist(there.T, found.T).min(1).values.max().item())
    table = {name: stats(v) for name, v in results.items()}
    worst = max(error)
    return ClaimResult(
        "learns_positions",
        worst < 0.1 and max(results["DCLS"]) < min(min(results[n]) for n in ("dense 3x3", "3x3, dilation 7")),
        {"DCLS": table["DCLS"], "largest error of a position in cells": stats(error)},
        {k: v for k, v in table.items() if k != "DCLS"},
        context.seeds,
        f"random images, {steps} steps",
        "Numbers are the share of the target's variance that is left. 'Same rate' is without the five times larger "
        "learning rate of positions, 'decay' with weight decay on them; 15x15 has 75 times the weights.",
    )


def _task(seed: int) -> tuple[Tensor, Tensor]:
    """Smooth random images, and what the hidden kernel makes of them."""
    g = torch.Generator().manual_seed(seed)
    x = F.avg_pool2d(torch.randn(16, 1, 38, 38, generator=g), 7, 1)
    hidden = construct(
        torch.tensor(STRENGTH).view(1, 1, 3), torch.tensor(HIDDEN).view(2, 1, 1, 3), (WINDOW, WINDOW), version="gauss",
        sigma=torch.full((2, 1, 1, 3), 0.23),
    )  # fmt: skip
    return x, F.conv2d(x, hidden, padding=WINDOW // 2)


def _search(net: nn.Module, x: Tensor, y: Tensor, steps: int, **groups: Any) -> float:
    optimizer = torch.optim.AdamW(param_groups(net, lr=0.02, **groups))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = (net(x) - y).square().mean() / y.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return ((net.eval()(x) - y).square().mean() / y.square().mean()).item()


# -- small networks ---------------------------------------------------------------------------------------------------


def _trained(context: Context) -> tuple[ClaimResult, ClaimResult]:
    epochs, images = context.choose(full=6, smoke=1), context.choose(full=3000, smoke=128)
    accuracy: dict[str, list[float]] = {}
    costs: dict[str, dict[str, Any]] = {}
    data: Any = None
    for seed in context.each_seed("dense, dilated and learned"):
        data = context.load_data(default="digits", limit=5000, image_size=32, seed=seed)
        data = data.subset({"train": min(images, len(data.splits["train"]))}, seed=seed)
        for what, net in _nets(data, seed).items():
            context.say(f"seed {seed}: {what}")
            objective = Repulsion(after=epochs // 4) if what == "DCLS" else None
            params = sum(p.numel() for p in net.parameters())
            fit(net, data, objective, epochs=epochs, batch_size=32, opt="adamw", lr=2e-3, weight_decay=0.05, seed=seed,
                val=None, progress=False, device=context.device)  # fmt: skip
            accuracy.setdefault(what, []).append(evaluate(net, data, "test", device=context.device)["accuracy"])
            if what == "DCLS":
                net = merge(net)
            macs = measure(net, (data.in_chans, 32, 32), what=("macs",)).macs
            costs[what] = {"params": params, "macs": macs}
    where = f"{data.name} at 32 x 32, {len(data.splits['train'])} training images, {epochs} epochs"
    mean = {k: statistics.fmean(v) for k, v in accuracy.items()}
    table = {k: stats(v) | costs[k] for k, v in accuracy.items()}
    dense, dilated, learned = "dense 7x7", "7x7, dilation 2", "DCLS"
    exact = _sizes(context)
    equal = costs[learned]["params"] <= costs[dense]["params"]
    gain = 100 * (mean[learned] - mean[dense])
    return (
        ClaimResult(
            "iso_params",
            exact == {k: v for k, v in PAPER.items() if k in exact} and equal and gain > 0,
            {learned: table[learned], "ConvNeXt-dcls at 224": exact},
            {dense: table[dense]},
            context.seeds, where,
            f"DCLS against 7x7 with as many parameters: {gain:+.2f} points. Positions start with a spread of 2 cells, "
            "as training is too short to carry them there. In a first run stages had one block or two, and widths were "
            "learned (gauss): sharing positions saved so little that 10 weights were left of 49, where the paper has "
            "34 to 40; it saw -0.45 points. Parameters and GMACs (merged) of the paper's networks are exact; ImageNet "
            "was not trained.",
        ),
        ClaimResult(
            "beats_fixed_dilation",
            mean[dilated] < min(mean[dense], mean[learned]),
            {learned: table[learned]},
            {dense: table[dense], dilated: table[dilated]},
            context.seeds, where,
            f"The order found: {' > '.join(sorted((dense, dilated, learned), key=lambda k: -mean[k]))}. The criterion "
            "is in the claim's words since a first run, which also asked that DCLS be better than 7x7, another claim; "
            "it saw 7x7 > DCLS > dilated.",
        ),
    )  # fmt: skip


def _nets(data: Any, seed: int) -> dict[str, nn.Module]:
    shape = {"num_classes": data.num_classes, "in_chans": data.in_chans, "ls_init_value": 1.0, "seed": seed}
    dense = create_model(**NET, **shape)
    wider = [
        SetAttr(name, attribute, (value, value))
        for name in depthwise(dense)
        if name.startswith(LARGE)
        for attribute, value in (("dilation", 2), ("padding", 6))
    ]
    return {
        "dense 7x7": dense,
        "7x7, dilation 2": apply(create_model(**NET, **shape), wider),
        "DCLS": dcls(dense, dilated_size=13, layers=[f"{stage}*" for stage in LARGE], spread=2.0, seed=seed),
    }


def _sizes(context: Context) -> dict[str, tuple[int, float]]:
    found = {}
    for name in context.choose(full=list(PAPER), smoke=["tiny"]):
        with torch.device("meta"):
            net = dcls(timm.create_model(f"convnext_{name}"))
        macs = measure(merge(net), (3, 224, 224), what=("macs",)).macs
        assert macs is not None
        found[name] = (sum(p.numel() for p in net.parameters()), round(macs / 1e9, 6))
    return found


# -- folding ----------------------------------------------------------------------------------------------------------


def _folded(context: Context) -> ClaimResult:
    off: dict[str, float] = {}
    times: dict[str, float] = {}
    for version in VERSIONS:
        net = create_model("convnext_atto", img_size=32, num_classes=10, ls_init_value=1.0, seed=0)
        net = dcls(net, version=version, kernel_count=26, dilated_size=11).eval()
        folded, x = merge(net), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            off[version] = (folded(x) - net(x)).abs().max().item()
        if version == "v0":
            for name, model in (("DCLS", net), ("folded", folded)):
                latency = measure(model, (3, 32, 32), what=("latency",)).latency
                assert latency is not None
                times[name] = round(1000 * latency, 1)
    return ClaimResult(
        "foldable",
        not any(off.values()),
        {"largest difference of logits": off, "latency of one image in ms": times},
        note="ConvNeXt-Atto with 26 weights in 11 x 11, one CPU thread.",
    )
