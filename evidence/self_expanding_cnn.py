"""SECNN: a network that grows, against its start, its end from scratch and random growth; its score; its identity.

Images of 16 pixels, a start of 8 channels. On a CPU core, three seeds take about four minutes.
"""

from __future__ import annotations

import random
import statistics
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from evidence.runner import ClaimResult, Context, stats
from trimtab.learn import evaluate, fit
from trimtab.models import create_model
from trimtab.search.grow.self_expanding_cnn import expand, expansions_of, score, scored, self_expanding_cnn

LEVEL = 4
SIZE, WIDTH, CHANNELS, TAU = 16, 8, 4, 1.02
POINT = 0.01


def run(context: Context) -> list[ClaimResult]:
    epochs, images = context.choose(full=20, smoke=3), context.choose(full=2000, smoke=128)
    how: dict[str, Any] = {"batch_size": 64, "opt": "adamw", "lr": 4e-3, "progress": False, "device": context.device}
    growth: dict[str, Any] = {
        "epochs": epochs,
        "cooldown": context.choose(full=3, smoke=1),
        "channels": CHANNELS,
        "tau": TAU,
    }
    accuracy: dict[str, list[float]] = {}
    families: list[list[dict[str, float]]] = []
    criteria: list[dict[str, float]] = []
    moves: list[dict[str, float]] = []
    data: Any = None
    for seed in context.each_seed():
        data = context.load_data(image_size=SIZE, limit=5000, val=0.2, seed=seed)
        data = data.subset({"train": min(images, len(data.splits["train"]))}, seed=seed)
        start = _net(data, seed)
        context.say(f"seed {seed}: growing")
        grown = self_expanding_cnn(start, data, seed=seed, **growth, **how)
        families.append([{"params": t.cost["params"], "val_accuracy": t.accuracy} for t in grown.tried])
        nets = {"grown": grown.model}
        arch = grown.tried[-1].arch
        for name, kind in (("start, never grown", {}), ("the same network from scratch", _kwargs(arch))):
            context.say(f"seed {seed}: {name}")
            nets[name] = fit(_net(data, seed, **kind), data, epochs=epochs, seed=seed, val=None, **how).model
        for name, net in nets.items():
            accuracy.setdefault(name, []).append(evaluate(net, data, "test", device=context.device)["accuracy"])
        context.say(f"seed {seed}: all expansions of one network")
        criteria.append(_criterion(grown.family[0], data, seed, context, how))
        moves.append(_moves(grown.family[0], data))
    where = f"{data.name} at {SIZE} pixels, {len(data.splits['train'])} training images, {epochs} epochs"
    mean = {k: statistics.fmean(v) for k, v in accuracy.items()}
    table = {k: stats(v) for k, v in accuracy.items()}
    sizes = [round(f[-1]["params"]) for f in families]
    rising = [f[-1]["val_accuracy"] > f[0]["val_accuracy"] for f in families]
    won = sum(c["highest score"] < min(c["lowest score"], c["random"]) for c in criteria)
    return [
        ClaimResult(
            "grow_on_demand",
            mean["grown"] > mean["start, never grown"]
            and mean["grown"] >= mean["the same network from scratch"] - 1.5 * POINT,
            {"grown": table["grown"] | {"params": sizes}},
            {k: v for k, v in table.items() if k != "grown"} | {"params of the start": round(families[0][0]["params"])},
            context.seeds,
            where,
            f"tau {TAU}: on so few images scores rise by a few percent, not twofold.",
        ),
        ClaimResult(
            "size_family",
            all(len(f) > 2 for f in families) and all(rising),
            {f"seed {s}": f for s, f in zip(context.seeds, families)},
            {},
            context.seeds,
            where,
            "Validation accuracy of the network before each expansion, and at the end.",
        ),
        ClaimResult(
            "criterion",
            won > len(criteria) / 2,
            {f"seed {s}": c for s, c in zip(context.seeds, criteria)},
            {},
            context.seeds,
            where,
            f"Validation loss two epochs after the expansion; the highest score was the best of the three {won} of "
            f"{len(criteria)} times.",
        ),
        ClaimResult(
            "near_preserving",
            all(m["exact: logits"] < 1e-4 and m["noise 1e-4: share of the loss"] < 0.01 for m in moves),
            {f"seed {s}": m for s, m in zip(context.seeds, moves)},
            note="The largest change over all six expansions of a trained network.",
        ),
    ]


def _net(data: Any, seed: int, **kwargs: Any) -> nn.Module:
    kind = {"widths": (WIDTH,) * 3, "num_classes": data.num_classes, "in_chans": data.in_chans, "img_size": data.size}
    return create_model("secnn", **{**kind, **kwargs}, seed=seed)


def _kwargs(arch: Any) -> dict[str, Any]:
    return {f"{name}s": [arch[f"{name}.{i}"] for i in range(3)] for name in ("width", "depth")}


def _images(data: Any, split: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch = next(iter(data.loader(split, batch_size=min(n, len(data.splits[split])), augment="none")))
    return batch["image"], batch["label"]


def _criterion(net: nn.Module, data: Any, seed: int, context: Context, how: dict[str, Any]) -> dict[str, float]:
    """Validation loss after two epochs of every expansion, by its score."""
    net = net.cpu()
    x, y = _images(data, "train", 128)
    options = expansions_of(net, channels=CHANNELS)
    scores = scored(net, options, x, y, seed=seed)
    losses = []
    for e in options:
        grown = expand(net, e, x, seed=seed)
        fit(grown, data, epochs=context.choose(full=2, smoke=1), sched="constant", seed=seed, val=None, **how)
        losses.append(evaluate(grown, data, "val", device=context.device)["loss"])
    ranked = [loss for _, loss in sorted(zip(scores, losses))]
    return {
        "highest score": ranked[-1],
        "lowest score": ranked[0],
        "random": ranked[random.Random(seed).randrange(len(ranked))],
        "score before": score(net, x, y),
        "highest score of an expansion": max(scores),
    }


@torch.no_grad()
def _moves(net: nn.Module, data: Any) -> dict[str, float]:
    net = net.cpu().eval()
    x, y = _images(data, "train", 128)
    before = net(x)
    loss = F.cross_entropy(before, y)
    logits, share = 0.0, 0.0
    for e in expansions_of(net, channels=CHANNELS):
        logits = max(logits, float((expand(net, e, x).eval()(x) - before).abs().max()))
        noisy = F.cross_entropy(expand(net, e, x, noise=1e-4).eval()(x), y)
        share = max(share, float((noisy - loss).abs() / loss))
    return {"exact: logits": logits, "noise 1e-4: share of the loss": share}
