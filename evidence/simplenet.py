"""SimpleNet: exact counts, the plain net against a residual net of equal size, and its rules against their opposites.

The 310K layout at a quarter of its width (about 21 k parameters), everything trained alike on a small subset. On a CPU
with two cores, three seeds take about four minutes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from evidence.runner import ClaimResult, Context, stats
from trimtab.core.cost import measure
from trimtab.learn import evaluate, fit
from trimtab.models import create_model
from trimtab.models.classify.resnet_cifar import ResNetCifar
from trimtab.models.classify.simplenet import LAYOUTS, SimpleNet

LEVEL = 4
CIFAR = {"cifar_5m": (5_498_378, 652.151), "cifar_310k": (312_362, 55.788), "cifar_460k": (456_446, 75.242)}
IMAGENET = {
    "small_m2_05": (1_506_792, 427.628),
    "small_m2_075": (3_287_272, 953.937),
    "5m_m2": (5_752_808, 1688.578),
    "9m_m2": (9_508_968, 3554.587),
}
SCALE = 0.25
# The rules turned around; widths are scaled until the parameters match.
ABLATIONS = {
    "pooled early": "64 P 32 32 P 32 32 P 32 64 64 64 128 256@1 64@1 P 64",
    "1x1 in the middle": "64 32 32 32 P 32@1 32@1 64@1 P 64@1 64@1 P 128 256@1 64@1 P 64",
    "width at the end": "24 24 24 24 P 24 24 24 P 24 24 P 192 256@1 96@1 P 96",
}


def run(context: Context) -> list[ClaimResult]:
    return [_counts("params", CIFAR, 32), _counts("imagenet_family", IMAGENET, 224), *_trained(context)]


def _counts(claim: str, table: dict[str, tuple[int, float]], size: int) -> ClaimResult:
    measured = {}
    for name in table:
        cost = measure(create_model(f"simplenet_{name}"), (3, size, size), what=("params", "macs"))
        assert cost.macs is not None
        measured[name] = {"params": cost.params, "macs_millions": round(cost.macs / 1e6, 3)}
    want = {name: {"params": p, "macs_millions": m} for name, (p, m) in table.items()}
    return ClaimResult(
        claim, measured == want, measured, want, note="Counts only; the accuracies need the full training."
    )


def _trained(context: Context) -> list[ClaimResult]:
    epochs, images = context.choose(full=9, smoke=1), context.choose(full=2000, smoke=128)
    accuracy: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    nets: dict[str, dict[str, Any]] = {}
    data: Any = None
    for seed in context.each_seed("nets of equal size"):
        data = context.load_data(limit=5000, seed=seed)
        data = data.subset({"train": min(images, len(data.splits["train"]))}, seed=seed)
        nets = nets or _nets(data.num_classes, data.in_chans)
        for what, arguments in nets.items():
            context.say(f"seed {seed}: {what}")
            model = create_model(
                num_classes=data.num_classes, in_chans=data.in_chans, img_size=data.size, seed=seed, **arguments
            )
            sizes[what] = sum(p.numel() for p in model.parameters())
            fit(model, data, epochs=epochs, batch_size=64, seed=seed, val=None, progress=False, device=context.device)
            accuracy.setdefault(what, []).append(evaluate(model, data, "test", device=context.device)["accuracy"])
    where = f"{data.name}, {len(data.splits['train'])} training images, {epochs} epochs"
    mean = {k: sum(v) / len(v) for k, v in accuracy.items()}
    table = {k: stats(v) | {"params": sizes[k]} for k, v in accuracy.items()}
    lost = [k for k in ABLATIONS if mean[k] < mean["SimpleNet"]]
    return [
        ClaimResult(
            "beats_deeper",
            mean["SimpleNet"] >= mean["ResNet-20"],
            {"SimpleNet": table["SimpleNet"]},
            {"ResNet-20": table["ResNet-20"]},
            context.seeds,
            where,
            "Equal parameters and schedule, both at about 21 k parameters instead of 310 k.",
        ),
        ClaimResult(
            "principles",
            len(lost) == len(ABLATIONS),
            {"SimpleNet": table["SimpleNet"]},
            {k: table[k] for k in ABLATIONS},
            context.seeds,
            where,
            f"Rules whose opposite lost: {', '.join(lost) or 'none'}. Parameters are equal, MACs are not.",
        ),
    ]


def _nets(num_classes: int, in_chans: int) -> dict[str, dict[str, Any]]:
    """Name and arguments for `create_model` of every net, all with as many parameters as the first."""
    common = {"num_classes": num_classes, "in_chans": in_chans}
    goal = _params(SimpleNet, layout="cifar_310k", scale=SCALE, **common)
    nets = {"SimpleNet": {"name": "simplenet_cifar_310k", "layout": LAYOUTS["cifar_310k"], "scale": SCALE}}
    for what, layout in ABLATIONS.items():
        scales = [s / 200 for s in range(20, 120)]
        scale = min(scales, key=lambda s: abs(_params(SimpleNet, layout=layout, scale=s, **common) - goal))
        nets[what] = {"name": "simplenet_cifar_310k", "layout": layout, "scale": scale}
    widths = [(w, 2 * w, last) for w in range(3, 6) for last in range(3 * w, 5 * w + 1)]
    best = min(widths, key=lambda w: abs(_params(ResNetCifar, widths=w, **common) - goal))
    nets["ResNet-20"] = {"name": "resnet20_cifar", "widths": best}
    return nets


def _params(cls: type[nn.Module], **arguments: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in cls(**arguments).parameters())
