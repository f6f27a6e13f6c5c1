"""Dual CNN: published CIFAR-10 ResNets as a pool, the cascade against the large network, and a stream with repeats.

Weights are found in a folder `weights` beside the data's parent folder; without them small networks are trained for a
few epochs. Nothing else is trained: seeds are divisions of the test images into those that choose and those that
judge. On a CPU core it takes about three minutes.

The first claim says "small" and "similar or better". A first run had the large network in the pool, and asked for its
accuracy in full: the cascade had 83.2 % against 83.5 % with 42 % of its work, and the large network was one of the two
in one of three divisions. Since then the pool is of small networks, the surer of two answers counts (the post-check of
the paper's own runs), and similar is half a point, about one standard error of a difference on 5000 images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evidence.runner import ClaimResult, Context, stats
from trimtab.core.cost import Cost, measure
from trimtab.data import Data
from trimtab.deploy import CascadeModel, OnnxModel, ResultCache, export
from trimtab.deploy.cascade import Gate, dhash
from trimtab.deploy.dual_cnn import compare, complementarity, curve, dual_cnn
from trimtab.learn import fit
from trimtab.learn.evaluate import logits
from trimtab.models import create_model

LEVEL = 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the published weights expect
TOLERANCE = 0.002
LARGE = "ResNet-56"
SIMILAR = 0.005  # of accuracy


class Seen(nn.Module):
    """A network that sees images another way, mirrored or two pixels aside: about as good, and wrong elsewhere."""

    def __init__(self, net: nn.Module, how: str) -> None:
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flip(-1) if self.how == "mirrored" else F.pad(x, (2, 0, 0, 0), "replicate")[..., :-2])


def run(context: Context) -> list[ClaimResult]:
    data, pool, how = _pool(context)
    context.say("networks of the pool")
    said = {name: logits(net, data, "test")[0].numpy() for name, net in pool.items()}
    labels = data.splits["test"].labels.numpy()
    costs = {name: measure(net, data.spec.size, what=("macs", "energy")) for name, net in pool.items()}
    return [
        _pair(context, data, said, labels, costs, how),
        _memory(context, data, pool, how),
        _threshold(context, data, said, labels, how),
    ]


def _pool(context: Context) -> tuple[Data, dict[str, nn.Module], str]:
    found = context.load_data("shapes:classes=4,size=32,n=120", image_size=32, limit=10_000, val=0.05)
    data = Data(found.name, found.splits, found.class_names, mean=MEAN[: found.in_chans], std=STD[: found.in_chans])
    folder = Path(context.data).resolve().parents[1] / "weights" if context.data and not context.smoke else None
    nets = {}
    for depth in (20, 56):
        file = folder / f"cifar10_resnet{depth}.safetensors" if folder else None
        weights = file if file is not None and file.exists() else None
        shape: dict[str, Any] = {"num_classes": data.num_classes, "in_chans": data.in_chans}
        if weights is None:
            shape["widths"] = (8, 16, 32) if depth == 20 else (16, 32, 64)
            shape["depths"] = (1, 1, 1)
        name = f"ResNet-{depth}"
        nets[name] = create_model(f"resnet{depth}_cifar", **shape, weights=weights, seed=0).eval()
        if weights is None:
            learn: dict[str, Any] = {"batch_size": 64, "progress": False, "val": None, "device": context.device}
            fit(nets[name], data, epochs=context.choose(full=4, smoke=1), **learn)
    how = "published weights" if weights is not None else "small networks trained here"
    views = {how: Seen(nets["ResNet-20"], how) for how in ("mirrored", "aside")}
    return data, {"ResNet-20": nets["ResNet-20"], **views, LARGE: nets[LARGE]}, how


def _halves(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(n)
    return order[: n // 2], order[n // 2 :]


def _judge(
    first: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray,
    rows: tuple[np.ndarray, np.ndarray],
    gate: Gate,
    tolerance: float,
) -> tuple[float, float, float]:
    """(threshold, accuracy, share of calls of the second): chosen on the first rows, judged on the others."""
    choose, judge = rows
    seen = curve(first[choose], second[choose], labels[choose], gate)
    gate = Gate(gate.score, float(seen.thresholds[seen.best(tolerance)]), gate.post_check)
    unsure = gate.unsure(first[judge])
    wins = unsure & gate.second_wins(first[judge], second[judge])
    answers = np.where(wins, second[judge].argmax(-1), first[judge].argmax(-1))
    return gate.threshold, float((answers == labels[judge]).mean()), float(unsure.mean())


def _pair(
    context: Context,
    data: Data,
    said: Mapping[str, np.ndarray],
    labels: np.ndarray,
    costs: Mapping[str, Cost],
    how: str,
) -> ClaimResult:
    rows: dict[str, list[float]] = {}
    chosen = []
    small = [name for name in said if name != LARGE]
    for seed in context.each_seed("pair"):
        choose, judge = _halves(len(labels), seed)
        right = {name: x[choose].argmax(-1) == labels[choose] for name, x in said.items()}
        ranked = {pair: complementarity(right[pair[0]], right[pair[1]]) for pair in combinations(small, 2)}
        first, second = max(ranked, key=ranked.__getitem__)
        chosen.append(f"{first} and {second}")
        for name, post_check in (("cascade", True), ("without the post-check", False)):
            gate = Gate("difference", 0.0, post_check)
            _, accuracy, asked = _judge(said[first], said[second], labels, (choose, judge), gate, TOLERANCE)
            rows.setdefault(name, []).append(accuracy)
            rows.setdefault(f"{name}, asked", []).append(asked)
            for key, cost, unit in ((", MMACs", "macs", 1e6), (", mJ", "energy", 1e-3)):
                a, b = (getattr(costs[net], cost) or 0.0 for net in (first, second))
                rows.setdefault(name + key, []).append((a + asked * b) / unit)
        for name in ("ResNet-20", LARGE):
            rows.setdefault(name, []).append(float((said[name][judge].argmax(-1) == labels[judge]).mean()))
        rows.setdefault("complementarity", []).append(ranked[first, second])
    mean = {name: float(np.mean(values)) for name, values in rows.items()}
    large = {"MMACs": (costs[LARGE].macs or 1) / 1e6, "mJ": 1e3 * (costs[LARGE].energy or 1.0)}
    work, energy = (mean[f"cascade, {unit}"] / large[unit] for unit in ("MMACs", "mJ"))
    behind = mean[LARGE] - mean["cascade"]
    return ClaimResult(
        "pair",
        behind <= SIMILAR and work <= 0.65 and energy < 1,
        {name: stats(rows[name]) for name in rows if name.startswith(("cascade", "complementarity"))}
        | {"chosen": sorted(set(chosen))},
        {name: stats(rows[name]) for name in rows if name in (LARGE, "ResNet-20") or name.startswith("without")}
        | {f"{LARGE}, {unit}": round(value, 4) for unit, value in large.items()},
        context.seeds,
        f"{data.name}, {len(labels)} test images halved by chance, {how}",
        f"The cascade has {work:.0%} of the large network's MACs, {energy:.0%} of its energy (by a published table), "
        f"and {-100 * behind:+.2f} points of accuracy; similar is {100 * SIMILAR:g}. Its networks are ResNet-20 and "
        "the same on mirrored images, or on images two pixels aside: weights of other small networks are not at hand.",
    )


def _memory(context: Context, data: Data, pool: Mapping[str, nn.Module], how: str) -> ClaimResult:
    """A stream in which every image comes twice, through the files."""
    context.say("a stream with repeats")
    test = data.splits["test"]
    count = min(context.choose(full=300, smoke=40), len(test))
    images = np.concatenate([b["image"].numpy() for b in data.loader("test", shuffle=False)])[:count]
    order = np.random.default_rng(42).permutation(2 * count) % count
    pixels = test.pixels(torch.arange(len(test))).numpy().transpose(0, 2, 3, 1)
    keys = {(dhash(x), dhash(x, down=True)) for x in pixels}
    different = len({x.tobytes() for x in pixels})
    with tempfile.TemporaryDirectory() as folder:
        small = {name: pool[name] for name in ("ResNet-20", LARGE)}
        path = dual_cnn(small, data, tolerance=TOLERANCE).save(Path(folder) / "pair")
        file = export(pool[LARGE], Path(folder) / "large.onnx", data=data, exporter="classic", limit=64).path
        joules = measure(pool[LARGE], data.spec.size, what="energy").energy or 0.0
        rows = {}
        for name, cache in (("none", None), ("exact", ResultCache()), ("perceptual", ResultCache(perceptual=True))):
            rows[name] = compare(CascadeModel(path, cache=cache), OnnxModel(file), joules, images[order])
    plain = rows["none"]["cascade"]
    exact = all(
        r["cascade"]["hits"] == count
        and 2 * r["cascade"]["calls"][0] == plain["calls"][0]
        and (r["cascade"]["labels"] == plain["labels"]).all()
        for r in (rows["exact"], rows["perceptual"])
    )
    saved = 1 - rows["perceptual"]["cascade"]["joules"] / rows["perceptual"]["large"]["joules"]
    table = {name: _said(r["cascade"]) for name, r in rows.items()}
    return ClaimResult(
        "memory",
        exact and len(keys) == different and saved > 0.5,
        {f"memory {name}": row for name, row in table.items()}
        | {"energy saved": round(saved, 3), "images": different, "different keys": len(keys)},
        {f"{LARGE} alone": _said(rows["none"]["large"])},
        (),
        f"{data.name}, {count} test images twice each, in any order, {how}",
        "Energy is estimated from a published table (arithmetic, weights, activations), the memory's own left out. "
        "Time is that of one image in ONNX Runtime on one thread, the first 25 left out.",
    )


def _said(row: Mapping[str, Any]) -> dict[str, Any]:
    out = {"mJ": round(1e3 * row["joules"], 2), "ms": round(1e3 * row["seconds"]["mean"], 2)}
    out["ms, 95 %"] = round(1e3 * row["seconds"]["p95"], 2)
    return out | {name: row[name] for name in ("hits", "calls") if name in row}


def _threshold(
    context: Context, data: Data, said: Mapping[str, np.ndarray], labels: np.ndarray, how: str
) -> ClaimResult:
    first, second = said["ResNet-20"], said[LARGE]
    rows: dict[str, list[float]] = {}
    same = True
    for seed in context.each_seed("threshold"):
        halves = _halves(len(labels), seed)
        for post_check in (False, True):
            gate = Gate("maxp" if post_check else "difference", 0.0, post_check)
            same = same and _argmax_by_hand(first, second, labels, halves[0], gate)
            for rule, tolerance in (("argmax", 0.0), ("smallest within 0.2 points", TOLERANCE)):
                name = f"{rule}, post-check" if post_check else rule
                found = _judge(first, second, labels, halves, gate, tolerance)
                for key, value in zip((", threshold", ", accuracy", ", asked"), found):
                    rows.setdefault(name + key, []).append(value)
    mean = {name: float(np.mean(values)) for name, values in rows.items()}
    a, b = "argmax, post-check", "smallest within 0.2 points, post-check"
    return ClaimResult(
        "threshold",
        same
        and mean[f"{b}, asked"] <= mean[f"{a}, asked"]
        and mean[f"{b}, accuracy"] >= mean[f"{a}, accuracy"] - 0.004,
        {name: stats(v) for name, v in rows.items() if name.startswith("smallest")} | {"argmax found by hand": same},
        {name: stats(v) for name, v in rows.items() if name.startswith("argmax")},
        context.seeds,
        f"{data.name}, {len(labels)} test images halved by chance, {how}",
        "With the post-check the accuracy hardly falls towards a threshold of 1, so that its argmax may ask the second "
        "network about most images; the smallest threshold within 0.2 points does not.",
    )


def _argmax_by_hand(first: np.ndarray, second: np.ndarray, labels: np.ndarray, rows: np.ndarray, gate: Gate) -> bool:
    """Whether the first maximum of the curve is that of accuracies counted anew, at every fortieth threshold."""
    a, b, y = first[rows], second[rows], labels[rows]
    seen = curve(a, b, y, gate, count=50)
    by_hand = []
    for threshold in seen.thresholds:
        now = Gate(gate.score, float(threshold), gate.post_check)
        answers = np.where(now.unsure(a) & now.second_wins(a, b), b.argmax(-1), a.argmax(-1))
        by_hand.append(float((answers == y).mean()))
    return int(np.argmax(by_hand)) == seen.best()
