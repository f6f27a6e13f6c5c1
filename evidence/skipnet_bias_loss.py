"""Bias loss against cross-entropy and against the same weights turned round or shuffled; SkipNet with and without its
skip blocks; exact counts.

The losses train a ResNet-8 (78 k parameters) on CIFAR-10 at 16 x 16 pixels, each seed from the same weights on the same
batches. SkipNet is a quarter as wide, with a first convolution of stride 1, at 24 x 24, trained by AdamW. Three seeds
take about five minutes of one CPU core.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from evidence.runner import ClaimResult, Context, stats
from evidence.step_cost import step_cost
from trimtab.core.cost import measure
from trimtab.core.edit import SetAttr, apply
from trimtab.learn import BiasLoss, Classify, Objective, evaluate, fit, taps
from trimtab.learn import Context as Training
from trimtab.learn.calls import last_map
from trimtab.learn.regularize.bias_loss import feature_variance
from trimtab.models import create_model

LEVEL = 4
# Parameters and MACs in M at 224, 1000 classes; those of MobileNetV3-Large are the baseline.
COUNTS = {
    "skipblocknet_m": (5_532_352, 236.622),
    "skipblocknet_xs": (2_332_584, 78.537),
    "skipblocknet_s": (3_587_416, 170.236),
    "skipblocknet_l": (7_014_472, 361.272),
}
SKIPS = [8_240, 4_520]


class Reversed(BiasLoss):
    """The most varied sample has the least weight."""

    def weigh(self, variance: Tensor, ctx: Training) -> Tensor:
        return super().weigh(-variance, ctx)


class Shuffled(BiasLoss):
    """The same weights, dealt to the samples at random."""

    def weigh(self, variance: Tensor, ctx: Training) -> Tensor:
        return super().weigh(variance, ctx)[torch.randperm(len(variance), generator=ctx.generator, device=ctx.device)]


LOSSES: dict[str, type[Objective]] = {
    "cross-entropy": Classify, "bias loss": BiasLoss, "reversed": Reversed, "shuffled": Shuffled,
}  # fmt: skip


def run(context: Context) -> list[ClaimResult]:
    return [_losses(context), _counts(), _skip_blocks(context)]


def _losses(context: Context) -> ClaimResult:
    epochs, images = context.choose(full=10, smoke=1), context.choose(full=2000, smoke=128)
    accuracy: dict[str, list[float]] = {}
    poor, rich = [], []
    data: Any = None
    for seed in context.each_seed("losses"):
        data = load(context, seed, 16, images)
        for what, loss in LOSSES.items():
            context.say(f"seed {seed}: {what}")
            net = small_net(data, seed)
            accuracy.setdefault(what, []).append(trained(context, net, data, loss(), seed, epochs))
            if what == "cross-entropy":
                right, variance = _by_variance(context, net, data)
                order, fifth = variance.argsort(), len(variance) // 5
                poor.append(right[order[:fifth]].mean().item())
                rich.append(right[order[-fifth:]].mean().item())
    table = {k: stats(v) for k, v in accuracy.items()}
    mean = {k: statistics.fmean(v) for k, v in accuracy.items()}
    batch = next(iter(data.loader("train", batch_size=64, device=context.device)))
    cost = step_cost(BiasLoss(), small_net(data, 0).to(context.device), batch)
    won = sum(a > b for a, b in zip(accuracy["bias loss"], accuracy["cross-entropy"]))
    others = [k for k in LOSSES if k != "bias loss"]
    return ClaimResult(
        "bias_loss",
        all(mean["bias loss"] > mean[k] for k in others),
        {"bias loss": table["bias loss"], "cost of a step": cost,
         "premise": {"accuracy, least varied fifth": stats(poor), "most varied fifth": stats(rich)}},
        {k: table[k] for k in others},
        context.seeds,
        f"{data.name} at 16 x 16, {len(data.splits['train'])} training images, {epochs} epochs",
        f"Better than cross-entropy in {won} of {len(context.seeds)} seeds; against each: "
        + "; ".join(f"{k} {_points(accuracy['bias loss'], accuracy[k])}" for k in others)
        + ". Weights are below 1 on average, which is a lower learning rate; the shuffled ones show what that does. "
        "The premise: images with the least varied maps are classified "
        f"{'worse' if statistics.fmean(poor) < statistics.fmean(rich) else 'no worse'} by plain training.",
    )  # fmt: skip


def _counts() -> ClaimResult:
    measured = {}
    for name in (*COUNTS, "mobilenetv3_large_100"):
        with torch.device("meta"):
            net = create_model(name, num_classes=1000)
        cost = measure(net, (3, 224, 224), what=("params", "macs"))
        assert cost.macs is not None
        measured[name] = {"params": cost.params, "macs_millions": round(cost.macs / 1e6, 3)}
    rival = {"mobilenetv3_large_100": measured.pop("mobilenetv3_large_100")}
    want = {name: {"params": p, "macs_millions": m} for name, (p, m) in COUNTS.items()}
    note = "Counts only, of convolutions and linear layers; the paper's 246 M has more in it. ImageNet was not trained."
    return ClaimResult("skipnet", measured == want, measured, rival, note=note)


def _skip_blocks(context: Context) -> ClaimResult:
    epochs, images = context.choose(full=8, smoke=1), context.choose(full=1000, smoke=64)
    accuracy: dict[str, list[float]] = {}
    variance: dict[str, list[float]] = {}
    params: dict[str, int] = {}
    data: Any = None
    for seed in context.each_seed("skip blocks"):
        data = load(context, seed, 24, images)
        for what, net in skip_nets(data, seed).items():
            context.say(f"seed {seed}: {what}")
            params[what] = _params(net)
            reached = trained(context, net, data, Classify(), seed, epochs, opt="adamw", lr=2e-3, batch_size=32)
            accuracy.setdefault(what, []).append(reached)
            variance.setdefault(what, []).append(_by_variance(context, net, data)[1].mean().item())
    with torch.device("meta"):
        skips = [_params(s) for s in create_model("skipblocknet_m").get_submodule("skips").children()]
    rises = {
        name: statistics.fmean(values["with"]) > statistics.fmean(values["without"])
        for name, values in (("variance", variance), ("accuracy", accuracy))
    }
    table = {k: {"variance": stats(variance[k]), "accuracy": stats(accuracy[k]), "params": params[k]} for k in accuracy}
    return ClaimResult(
        "skip_blocks",
        skips == SKIPS and all(rises.values()),
        {"with": table["with"], "parameters of skip blocks at width 1": skips},
        {"without": table["without"]},
        context.seeds,
        f"{data.name} at 24 x 24, {len(data.splits['train'])} training images, {epochs} epochs, width 0.25",
        f"With skip blocks the variance of the last map (mean over test images) {_rises(rises['variance'])} and the "
        f"accuracy {_rises(rises['accuracy'])}. Accuracy with against without, whose hidden layer is wider "
        f"by as many parameters: {_points(accuracy['with'], accuracy['without'])}.",
    )


def load(context: Context, seed: int, side: int, images: int) -> Any:
    data = context.load_data(limit=6000, image_size=side, in_chans=3, seed=seed)
    return data.subset({"train": min(images, len(data.splits["train"]))}, seed=seed)


def small_net(data: Any, seed: int) -> nn.Module:
    return create_model("resnet8_mlperf_tiny", num_classes=data.num_classes, img_size=data.size, seed=seed)


def skip_nets(data: Any, seed: int) -> dict[str, nn.Module]:
    """A quarter as wide, with and without skip blocks, of equal numbers of parameters."""

    def net(**how: Any) -> nn.Module:
        made = create_model("skipblocknet_m", num_classes=data.num_classes, width=0.25, seed=seed, **how)
        return apply(made, [SetAttr("conv_stem.conv", "stride", [1, 1])])

    whole: Any = net(head_width=256)
    more = _params(whole.skips) / (whole.num_features + 1 + data.num_classes)
    return {"with": whole, "without": net(head_width=256 + round(more), skips=False)}


def _params(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def trained(
    context: Context, net: nn.Module, data: Any, objective: Objective, seed: int, epochs: int, **how: Any
) -> float:
    how = {"batch_size": 64, "seed": seed, "val": None, "progress": False, "device": context.device, **how}
    fit(net, data, objective, epochs=epochs, **how)
    return evaluate(net, data, "test", device=context.device)["accuracy"]


@torch.no_grad()
def _by_variance(context: Context, net: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
    """Of each test image: is it classified correctly, and how varied is its last map?"""
    right, variance = [], []
    for batch in data.loader("test", batch_size=256, device=context.device):
        place = last_map(net, batch["image"][:2])
        assert place is not None
        with taps(net.eval(), [place[0]], inputs=place[1]) as seen:
            right.append(net(batch["image"]).argmax(1) == batch["label"])
        variance.append(feature_variance(seen[place[0]]))
    return torch.cat(right).float(), torch.cat(variance)


def _rises(it: bool) -> str:
    return "rises" if it else "does not rise"


def _points(one: list[float], other: list[float]) -> str:
    """Differences in points, seed by seed."""
    return ", ".join(f"{100 * (a - b):+.1f}" for a, b in zip(one, other, strict=True)) + " points"
