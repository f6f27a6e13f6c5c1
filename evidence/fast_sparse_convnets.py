"""Fast Sparse ConvNets: time against PyTorch's dense convolution, and wide-and-sparse against narrow-and-dense.

The speed is measured at full size (MobileNet layers and MobileNetV1 at 224 pixels, one thread); the accuracies on a
small inverted-residual network, everything trained alike from scratch on a small subset. On a CPU with two cores, three
seeds take about eight minutes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.sparse_conv import layer_times, network_times
from evidence.runner import ClaimResult, Context, stats
from trimtab.compress import fast_sparse_convnets
from trimtab.core.timing import torch_threads
from trimtab.learn import Classify, evaluate, fit
from trimtab.models import create_model
from trimtab.nn.sparse import SparseConv1x1

LEVEL = 4
# C_out, C_in, pixels on a side
LAYERS = [(64, 32, 112), (128, 128, 56), (256, 256, 28), (512, 512, 14), (1024, 1024, 7), (960, 160, 7)]
LATE = LAYERS[3:]
SPARSITY = 0.9
BOUND = 0.6  # of the dense time
SMALL_DROP = 0.02  # accuracy


def run(context: Context) -> list[ClaimResult]:
    speed, late = _speed(context)
    return [speed, *_accuracy(context, late)]


def _speed(context: Context) -> tuple[ClaimResult, dict[str, Any]]:
    """The claim about speed, and the times of blocks next to those of single weights in late layers."""
    ratios: dict[str, list[dict[str, float]]] = {}
    nets: list[dict[str, Any]] = []
    rounds = context.choose(full=9, smoke=1)
    with torch_threads(1):
        for seed in context.each_seed("speed"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for layer in context.choose(full=LAYERS, smoke=LAYERS[-1:]):
                    ratio = layer_times(*layer, [SPARSITY], rounds)["ratio"]
                    ratios.setdefault("{}x{}x{}^2".format(*layer), []).append(ratio)
                if not context.smoke:
                    nets.append(network_times("mobilenetv1_100", [SPARSITY], rounds)["ratio"])
    at = f" {SPARSITY:g}"
    single = {k: stats(min(v for n, v in r.items() if "block" not in n) for r in rows) for k, rows in ratios.items()}
    fast = [k for k, v in single.items() if v["mean"] < BOUND]
    network = stats([n[f"sparse{at}"] for n in nets] or [1.0])
    measured = {"layers_sparse_over_dense": single, "mobilenetv1_sparse_over_dense": network}
    if nets:
        measured["mobilenetv1_sparse_over_dense_onnxruntime"] = stats(
            n[f"sparse{at}"] / n["dense, ONNX Runtime"] for n in nets
        )
    blocks = {
        k: {
            "single": stats(r[f"numba{at}"] for r in rows),
            "blocks of 4": stats(r[f"numba blocks of 4{at}"] for r in rows),
        }
        for k, rows in ratios.items()
        if k in {"{}x{}x{}^2".format(*layer) for layer in LATE} and all(f"numba{at}" in r for r in rows)
    }
    result = ClaimResult(
        "real_speed",
        len(fast) >= 4 and network["max"] < 1,
        measured,
        {"dense": 1.0},
        context.seeds,
        "random weights at 90 % sparsity, batch 1, one thread",
        f"{len(fast)} of {len(single)} layers below {BOUND} of torch's dense convolution (the faster of CSR and numba, "
        "single weights); MobileNetV1 at 224 against itself with the zeros filled in. This CPU, not a "
        "Snapdragon 835; not against dense models of equal accuracy.",
    )
    return result, blocks


def _accuracy(context: Context, late: dict[str, Any]) -> list[ClaimResult]:
    epochs, images = context.choose(full=20, smoke=1), context.choose(full=3000, smoke=128)
    accuracy: dict[str, list[float]] = {"wide, sparse": [], "wide, sparse, blocks of 4": [], "narrow, dense": []}
    params: dict[str, int] = {}
    exact = True
    data: Any = None
    for seed in context.each_seed("training"):
        data = context.load_data(limit=5000, seed=seed, image_size=16)
        data = data.subset({"train": min(images, len(data.splits["train"]))}, seed=seed)
        kind: dict[str, Any] = {"num_classes": data.num_classes, "in_chans": data.in_chans}
        training: dict[str, Any] = {
            "epochs": epochs,
            "batch_size": 64,
            "seed": seed,
            "progress": False,
            "device": context.device,
        }
        wide = _net(2.0, **kind)
        goal = _params(_sparse(wide, data, 1, epochs=0))
        narrow = min((s / 50 for s in range(20, 100)), key=lambda s: abs(_params(_net(s, **kind)) - goal))
        for what in accuracy:
            context.say(f"seed {seed}: {what}")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = _net(narrow if what == "narrow, dense" else 2.0, **kind)
            if what == "narrow, dense":
                fit(model, data, Classify(smoothing=0.1), val=None, **training)
            else:
                block = 4 if "blocks" in what else 1
                model = _sparse(model, data, block, val=None, **training)
                exact &= all(_in_blocks(m) for m in model.modules() if isinstance(m, SparseConv1x1))
            params[what] = _params(model)
            accuracy[what].append(evaluate(model, data, "test", device=context.device)["accuracy"])
    where = f"{data.name} at 16 x 16, {len(data.splits['train'])} training images, {epochs} epochs"
    table = {k: stats(v) | {"params": params[k]} for k, v in accuracy.items()}
    mean = {k: v["mean"] for k, v in table.items()}
    faster = all(v["blocks of 4"]["mean"] < v["single"]["mean"] for v in late.values()) and bool(late)
    drop = mean["wide, sparse"] - mean["wide, sparse, blocks of 4"]
    return [
        ClaimResult(
            "accuracy_at_size",
            mean["wide, sparse"] > mean["narrow, dense"],
            {"wide, sparse": table["wide, sparse"]},
            {"narrow, dense": table["narrow, dense"]},
            context.seeds,
            where,
            "Twice as wide with 90 % zeros in the 1x1 convolutions against a dense net of as many stored weights, same "
            "schedule. The sparse one costs the wide net's time while it trains.",
        ),
        ClaimResult(
            "blocks",
            exact and faster and drop < SMALL_DROP,
            {"numba_over_dense_conv": late, "accuracy": table["wide, sparse, blocks of 4"], "blocks_are_exact": exact},
            {"accuracy": table["wide, sparse"]},
            context.seeds,
            where,
            f"Blocks of 4 in the later half of the layers: accuracy changes by {-drop:+.3f} (small: a loss below "
            f"{SMALL_DROP}); faster in all {len(late)} late layers: {faster}.",
        ),
    ]


def _net(width: float, *, num_classes: int, in_chans: int) -> nn.Module:
    """An inverted-residual network whose stages are `width` times 12, 24 and 48 wide."""
    widths = [max(4, round(width * w)) for w in (12, 24, 48)]
    return create_model(
        "trim_net", widths=widths, depths=(1, 2, 2), kind="bottleneck", expand=4, group_width=1, stem_stride=2,
        num_classes=num_classes, in_chans=in_chans,
    )  # fmt: skip


def _sparse(model: nn.Module, data: Any, block: int, **training: Any) -> nn.Module:
    return fast_sparse_convnets(model, data, sparsity=SPARSITY, block=block, late=0.5, **training)


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _in_blocks(layer: SparseConv1x1) -> bool:
    body = layer.out_channels // layer.block * layer.block
    blocks = layer.keep[:body].unflatten(0, (-1, layer.block))
    return bool((blocks.all(1) == blocks.any(1)).all())
