"""Label sets: the published labels of ImageNet counted again, and strips of objects on which networks are ranked.

The counts need no images: timm ships the ReaL labels. What a shift in the number of labels does to accuracy is shown on
CIFAR-10, by a published ResNet-20 (its weights are found in a folder `weights` beside the data's parent folder; without
them by the longest trained network below): pictures show one to four objects side by side, each as large as in
training, and one of them, by chance, is the original label. Two sets differ in nothing but their shares: one has as
many pictures of several objects as ImageNet's validation set (16%), one as many as ImageNetV2 (48%). Small networks
trained for one to six epochs are then ranked by ASMA and by mean average precision. Three seeds take about five minutes
of one CPU core.

In a first run those small networks saw objects on a grid of two by two, grey where there was none, which they did not
know from training: they were right on a third of the pictures of one object, so that there was nothing to lose. What
holds is decided as it was then. One pilot, with 300 strips a set of train images, was made before the full run.
"""

from __future__ import annotations

import json
import pkgutil
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evidence._adapt import MEAN, STD, weights_of
from evidence.runner import ClaimResult, Context, stats
from trimtab.data import MultiLabelAccuracy, normalise
from trimtab.data.curate.imagenet_multilabel import label_statistics, mosaic, multi_hot, shift
from trimtab.learn import fit
from trimtab.models import create_model

LEVEL = 4
SPLIT = "test"
SHARES = {"V1": (0.84, 0.10, 0.04, 0.02), "V2": (0.52, 0.30, 0.12, 0.06)}  # of pictures with 1 to 4 objects


def run(context: Context) -> list[ClaimResult]:
    pictures, rounds = context.choose(full=(4000, (1, 3, 6)), smoke=(100, (1, 1)))
    drops: dict[str, list[float]] = {"top1": [], "real": [], "standardised": []}
    order: list[float] = []
    asma: dict[str, list[float]] = {str(e): [] for e in rounds}
    for seed in context.each_seed():
        data = context.load_data(image_size=32, limit=context.choose(full=4000, smoke=256), seed=seed)
        shape = {"num_classes": data.num_classes, "in_chans": data.in_chans, "img_size": data.size, "seed": seed}
        sets = {name: made(data, shares, pictures, seed) for name, shares in SHARES.items()}
        crowd = made(data, (0.25, 0.25, 0.25, 0.25), pictures // 2, seed + 100)
        scores, precision = [], []
        for epochs in rounds:
            context.say(f"seed {seed}: {epochs} epochs")
            net = create_model("resnet8_mlperf_tiny", **shape)
            fit(net, data, epochs=epochs, val=None, progress=False, seed=seed, device=context.device)
            found, ap = judged(net, data, crowd)
            scores.append(found["asma"])
            precision.append(ap)
            asma[str(epochs)].append(found["asma"])
        order.append(float(np.corrcoef(np.argsort(np.argsort(scores)), np.argsort(np.argsort(precision)))[0, 1]))
        if weights := weights_of(context, 20):
            data = data.like(mean=MEAN, std=STD)
            net = create_model("resnet20_cifar", num_classes=10, in_chans=3, weights=weights).eval().to(context.device)
        first, second = (judged(net, data, sets[name])[0] for name in SHARES)
        lost = shift(first, second)
        drops["top1"].append(float(lost["drop_top1"] or 0))
        drops["real"].append(float(lost["drop_real"] or 0))
        drops["standardised"].append(first["real"] - float(lost["standardised"] or 0))
    raw = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
    assert raw is not None
    published = label_statistics(json.loads(raw))
    where = f"{data.name}, {pictures} strips of 1 to 4 objects"
    judge = "a published ResNet-20" if weights else f"a ResNet-8 trained for {rounds[-1]} epochs"
    mean = {name: float(np.mean(v)) for name, v in drops.items()}
    return [
        ClaimResult(
            "v2_drop",
            round(published["share_of_several"], 4) == 0.1589
            and mean["top1"] > 0.05
            and abs(mean["real"]) < mean["top1"] / 2
            and abs(mean["standardised"]) < mean["top1"] / 2,
            {
                "share_of_several_in_V1": published["share_of_several"],
                "histogram": published["histogram"],
                "drop_of_any_valid": stats(drops["real"]),
                "drop_standardised": stats(drops["standardised"]),
            },
            {"drop_of_top1": stats(drops["top1"])},
            context.seeds,
            f"ReaL labels of ImageNet's validation set; {where}; {judge}",
            "Two sets of strips that differ in nothing but how many objects they show (16% and 48% of several, as V1 "
            "and V2): accuracy on the one original label drops, accuracy on any valid label less than half as much, as "
            "does what is left when the second is given the first's shares. The labels of V2 itself are not public in "
            "a form that could be counted here.",
        ),
        ClaimResult(
            "mlpc",
            min(order) > 0 and all(np.diff([float(np.mean(asma[str(e)])) for e in rounds]) > 0),
            {"rank_correlation": stats(order)} | {f"asma_after_{e}_epochs": stats(v) for e, v in asma.items()},
            {},
            context.seeds,
            where,
            "Networks trained on single objects for more and more epochs. Holds: ASMA grows with training and ranks "
            "the networks as mean average precision does.",
        ),
    ]


Strips = tuple[Tensor, list[list[int]], Tensor]  # pictures, their labels, and the one of these that is the original


def made(data: Any, shares: tuple[float, ...], n: int, seed: int) -> list[Strips]:
    """Pictures by these shares, those of one object first; the original label is drawn from those that are there."""
    split = data.splits[SPLIT]
    images, labels = split.pixels(torch.arange(len(split))), split.labels
    rng = np.random.default_rng([seed, 5])
    strips = []
    for k, share in enumerate(shares, start=1):
        found = mosaic(images, labels, number=k, grid=(1, k), n=max(5, round(share * n)), seed=seed)
        strips.append((*found, torch.tensor([int(rng.choice(s)) for s in found[1]])))
    return strips


@torch.no_grad()
def judged(net: nn.Module, data: Any, strips: list[Strips]) -> tuple[dict[str, Any], float]:
    """All measures, and the mean average precision over classes."""
    from torchmetrics.classification import MultilabelAveragePrecision

    metric = MultiLabelAccuracy(data.num_classes, most=4, min_size=5)
    precision = MultilabelAveragePrecision(data.num_classes)
    device = next(net.parameters()).device
    for pictures, sets, label in strips:
        hot = multi_hot(sets, data.num_classes)
        for rows in torch.arange(len(pictures)).split(250):
            scores = net(normalise(pictures[rows], data.mean, data.std).to(device)).cpu()
            metric.update(scores, hot[rows], label[rows])
            precision.update(scores, hot[rows].long())
    return metric.compute(), float(precision.compute())
