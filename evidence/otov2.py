"""OTOv2: groups found, equality after cutting, and one run against prune-then-train and group lasso.

ResNet-8 at 16/32/64 channels on 10,000 of the images at 16 x 16 pixels, 8 epochs, from scratch. ResNet-20 and
ResNet-56 start from published weights where a folder `weights` lies beside the data's parent folder; they, a ViT and a
ConvNeXt are trained for a few steps only, to compare the masked with the constructed model. On one core of a CPU, three
seeds take about eight minutes.

In a first run, at 32 pixels, OTOv2 was 1.5 points behind magnitude pruning: it compared scores across layers as they
are, which inside a budget on MACs all but empties the last stage (7 and 14 of 64 channels in the pilot). Now they are
divided by their layer's mean, like those of magnitude pruning. The pilot, on validation images (seed 0, 4,000 images to
train on): 36.7 % before, 43.7 % now with groups chosen after a quarter of the run, 45.2 % with the default start and
finish, which are used here; magnitude pruning 42.2 %.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torchvision.models import vgg

from evidence.runner import ClaimResult, Context, stats
from trimtab.compress import ChannelGraph, magnitude, otov2
from trimtab.compress.graph.patch import scrambled
from trimtab.compress.prune.otov2 import ZeroInvariantGroups, construct
from trimtab.compress.prune.to_budget import prune_to
from trimtab.core.cost import measure
from trimtab.core.edit import apply
from trimtab.learn import checkpoint, evaluate, fit
from trimtab.learn.optim import make_optimizer
from trimtab.models import create_model

LEVEL = 4
# Node groups and zero-invariant groups that the official code finds.
GROUPS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, int]]] = {
    "ResNet-18": (lambda: timm.create_model("resnet18"), 64, (12, 2_880)),
    "ResNet-50": (torchvision.models.resnet50, 64, (37, 11_456)),
    "VGG16-BN": (torchvision.models.vgg16_bn, 224, (15, 12_416)),
    "DenseNet-121": (torchvision.models.densenet121, 64, (120, 10_240)),
    "MobileNetV2": (torchvision.models.mobilenet_v2, 64, (25, 9_128)),
}
RANDOM: dict[str, Callable[[], nn.Module]] = {
    "VGG-11": lambda: nn.Sequential(vgg.make_layers(vgg.cfgs["A"], batch_norm=True), nn.Flatten(), nn.Linear(2048, 10)),
    "ResNet-18": lambda: timm.create_model("resnet18", num_classes=10),
    "DenseNet-121": lambda: torchvision.models.densenet121(num_classes=10),
    "MobileNetV2": lambda: torchvision.models.mobilenet_v2(num_classes=10),
}
TRAINED: dict[str, dict[str, Any]] = {
    "ResNet-20": {"name": "resnet20_cifar"},
    "ResNet-56": {"name": "resnet56_cifar"},
    "ViT": {"name": "vit_tiny_patch16_224", "patch_size": 4, "embed_dim": 96, "depth": 4},
    "ConvNeXt": {"name": "convnext_atto"},
}
TOLERANCE = 1e-5  # of the largest output
BUDGET = "macs<=30%"
LASSO = 2e-3


def run(context: Context) -> list[ClaimResult]:
    return [_exact(context), _one_shot(context), _groups(context)]


def _groups(context: Context) -> ClaimResult:
    names = context.choose(full=list(GROUPS), smoke=["ResNet-18"])
    found, want = {}, {}
    for name in names:
        context.say(f"groups of {name}")
        make, size, counts = GROUPS[name]
        with torch.device("meta"):
            model = make().eval()
            graph = ChannelGraph(model, torch.zeros(1, 3, size, size))
            count = ZeroInvariantGroups(graph, model).count
        found[name] = {"components": len(graph.groups), "groups": count}
        want[name] = dict(zip(("components", "groups"), counts, strict=True))
    return ClaimResult(
        "automatic_groups", found == want, found, want, note="Counted without memory; the official code's counts."
    )


@torch.no_grad()
def _difference(a: nn.Module, b: nn.Module, x: torch.Tensor) -> float:
    """Largest difference as a share of the largest output."""
    ya, yb = a.eval()(x), b.eval()(x)
    return float((ya - yb).abs().max() / ya.abs().max())


def _macs(model: nn.Module, example: Any) -> int:
    return measure(model, example, what=("macs",)).macs or 0


def _exact(context: Context) -> ClaimResult:
    seen: dict[str, Any] = {}
    for name in context.choose(full=list(RANDOM), smoke=["ResNet-18"]):
        context.say(f"random zero groups in {name}")
        model = scrambled(RANDOM[name]().eval(), seed=0)
        x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        groups = ZeroInvariantGroups(ChannelGraph(model, x[:2]), model)
        groups.zero_(torch.rand(groups.count, generator=torch.Generator().manual_seed(2)) < 0.5)
        seen[f"{name}, random groups"] = _difference(model, construct(model, x[:2]), x)
    data = context.load_data("shapes:classes=4,size=32,n=256", limit=context.choose(full=320, smoke=64))
    for name in context.choose(full=list(TRAINED), smoke=["ViT"]):
        context.say(f"masked and constructed {name}")
        given = dict(TRAINED[name])
        weights = _weights(context, given["name"])
        model = create_model(
            num_classes=data.num_classes, in_chans=data.in_chans, img_size=data.size, seed=0, weights=weights, **given
        )
        with tempfile.TemporaryDirectory() as folder:
            small = otov2(
                model, data, budget="macs<=50%", epochs=2, batch_size=64, lr=0.01, val=None, progress=False, out=folder,
                device="cpu",
            )  # fmt: skip
            masked = copy.deepcopy(model)
            masked.load_state_dict(checkpoint.read(Path(folder) / checkpoint.FILE)["model"])
        x = next(iter(data.loader("test", batch_size=64)))["image"]
        share = _macs(small, x[:1]) / _macs(model, x[:1])
        label = f"{name}, trained" + (" from published weights" if weights else "")
        seen[label] = _difference(masked, small, x)
        seen[f"{label}: share of MACs"] = round(share, 4)
    differences = [v for k, v in seen.items() if not k.endswith("MACs")]
    return ClaimResult(
        "exact_removal",
        max(differences) < TOLERANCE,
        {k: float(f"{v:.3g}") for k, v in seen.items()},
        {"largest difference allowed, as a share of the largest output": TOLERANCE},
        data=data.name,
        note="Channels under layer norms are not zero-invariant and are never cut, so ViT and ConvNeXt are exact too.",
    )


def _weights(context: Context, name: str) -> Path | None:
    """Published CIFAR-10 weights, where they are at hand."""
    if context.data is None or context.smoke:
        return None
    path = Path(context.data).resolve().parents[1] / "weights" / f"cifar10_{name.removesuffix('_cifar')}.safetensors"
    return path if path.exists() else None


def _one_shot(context: Context) -> ClaimResult:
    epochs, images = context.choose(full=8, smoke=2), context.choose(full=10_000, smoke=128)
    accuracy: dict[str, list[float]] = {}
    macs: dict[str, list[int]] = {}
    data: Any = None
    for seed in context.each_seed("one run"):
        data = context.load_data(limit=12_000, image_size=16, seed=seed)
        data = data.subset({"train": min(images, len(data.splits["train"]))}, seed=seed)
        new = create_model(
            "resnet8_mlperf_tiny", num_classes=data.num_classes, in_chans=data.in_chans, img_size=data.size, seed=seed
        )
        common = {
            "batch_size": 64, "seed": seed, "val": None, "progress": False, "device": context.device,
            "precision": "bf16", "channels_last": True,
        }  # fmt: skip
        for what, method in METHODS.items():
            context.say(f"seed {seed}: {what}")
            model = method(copy.deepcopy(new), data, epochs, common)
            accuracy.setdefault(what, []).append(evaluate(model, data, "test", device=context.device)["accuracy"])
            macs.setdefault(what, []).append(_macs(model.cpu(), data.spec.size))
    mean = {k: sum(v) / len(v) for k, v in accuracy.items()}
    table = {k: stats(v) | {"macs": macs[k]} for k, v in accuracy.items()}
    limit = 0.3 * macs["dense"][0]
    met = all(m <= limit for m in macs["otov2"])
    others = ("magnitude, then trained", "group lasso, cut, trained")
    beaten = [k for k in others if mean["otov2"] >= mean[k]]
    return ClaimResult(
        "one_shot",
        met and len(beaten) == len(others),
        {"otov2": table["otov2"]},
        {k: table[k] for k in ("dense", *others)},
        context.seeds,
        f"{data.name}, {len(data.splits['train'])} training images, {epochs} epochs in all for each",
        f"ResNet-8 at {BUDGET} instead of ResNet-18 at 70 % of groups. The budget is {'met' if met else 'NOT met'} in "
        f"each run; not behind in mean accuracy: {', '.join(beaten) or 'none'}.",
    )


def _dense(model: nn.Module, data: Any, epochs: int, common: dict[str, Any]) -> nn.Module:
    return fit(model, data, epochs=epochs, **common).model


def _otov2(model: nn.Module, data: Any, epochs: int, common: dict[str, Any]) -> nn.Module:
    return otov2(model, data, budget=BUDGET, epochs=epochs, **common)


def _magnitude(model: nn.Module, data: Any, epochs: int, common: dict[str, Any]) -> nn.Module:
    """Half of the epochs before the cut, half after it."""
    fit(model, data, epochs=epochs // 2, **common)
    small = magnitude(model.cpu(), data, budget=BUDGET, scope="global")  # as OTOv2 compares scores
    return fit(small, data, epochs=epochs - epochs // 2, **common).model


def _group_lasso(model: nn.Module, data: Any, epochs: int, common: dict[str, Any]) -> nn.Module:
    """Proximal group lasso on all groups for half of the epochs, a cut of the smallest, the rest of the epochs."""
    graph = ChannelGraph(copy.deepcopy(model), torch.zeros(2, *data.spec.size))
    groups = ZeroInvariantGroups(graph, model)

    def make(param_groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        base = make_optimizer(param_groups, "sgd")

        def proximal(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            x = [p.detach().clone() for p in groups.params]
            rate = optimizer.param_groups[0]["lr"]
            share = (rate * LASSO * groups.sizes.sqrt().to(x[0].device) / (groups.dot(x, x).sqrt() + 1e-8)).clamp_max(1)
            groups.shrink(share, x, [1.0] * len(x))

        base.register_step_post_hook(proximal)
        return base

    fit(model, data, epochs=epochs // 2, opt=make, lr=0.05, **common)
    model = model.cpu()
    x = [p.detach() for p in groups.params]
    norms = groups.dot(x, x).sqrt()
    unit = torch.from_numpy(groups.units(graph))
    by_unit = torch.zeros(graph.units, dtype=torch.float64)
    by_unit[unit] = norms
    edits, _ = prune_to(graph, lambda g: [by_unit[torch.from_numpy(n.units)] for n in g.groups], BUDGET, scope="raw")
    return fit(apply(model, edits), data, epochs=epochs - epochs // 2, **common).model


METHODS = {
    "dense": _dense,
    "otov2": _otov2,
    "magnitude, then trained": _magnitude,
    "group lasso, cut, trained": _group_lasso,
}
