"""CNN Filter DB: layers that degenerate where data are few, drift within and between networks, and its files.

A four-layer CNN of 41 k parameters on CIFAR-10 at 16 x 16 pixels, trained for equally many steps on 250 and on 5,000
images. On one CPU core, three seeds take about four minutes.
"""

from __future__ import annotations

import pickle
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from evidence.runner import ClaimResult, Context, stats
from trimtab.compress.analyze.cnn_filter_db import Basis, Filters, by_depth, collect, drifts, quality, read_h5
from trimtab.learn import evaluate, fit
from trimtab.models import create_model

LEVEL = 4
LAST = "9"  # the last convolution of `_net`
DECAY = 0.1


def run(context: Context) -> list[ClaimResult]:
    return [*_trained(context), _dataset()]


def _trained(context: Context) -> list[ClaimResult]:
    few, many = context.choose(full=(250, 5000), smoke=(64, 128))
    epochs = context.choose(full={few: 500, many: 20}, smoke={few: 1, many: 1})
    entropy: dict[str, list[float]] = {}
    zeros: dict[str, list[float]] = {}
    fitted: dict[str, list[float]] = {}
    distance: dict[str, list[float]] = {}
    random: list[float] = []
    data: Any = None
    for seed in context.each_seed("few and many images"):
        data = context.load_data(limit=many + 1000, image_size=16, seed=seed)
        fresh = collect(_net(data.in_chans, data.num_classes, seed), name="untrained")
        random += [q.entropy_share for q in quality(fresh)]
        for images in (few, many):
            part = data.subset({"train": min(images, len(data.splits["train"]))}, seed=seed)
            model = _net(data.in_chans, data.num_classes, seed)
            options: dict[str, Any] = {"augment": "none", "val": None, "progress": False, "device": context.device}
            fit(model, part, epochs=epochs[images], batch_size=64, lr=0.1, weight_decay=DECAY, seed=seed, **options)
            found = collect(model.cpu())
            last = next(q for q in quality(found) if q.layer == LAST)
            what = f"{images} images"
            entropy.setdefault(what, []).append(last.entropy_share)
            zeros.setdefault(what, []).append(last.sparsity)
            fitted.setdefault(what, []).append(evaluate(model, part, "train")["accuracy"])
        for what, value in _distances(found, fresh, seed).items():
            distance.setdefault(what, []).append(value)
    little, much = f"{few} images", f"{many} images"
    mean = {k: statistics.fmean(v) for k, v in distance.items()}
    where = f"{data.name} at 16 x 16, weight decay {DECAY}"
    reached = " and ".join(f"{statistics.fmean(fitted[k]):.2f}" for k in (little, much))
    lower = all(a < b for a, b in zip(entropy[little], entropy[much], strict=True))
    sparser = statistics.fmean(zeros[little]) > statistics.fmean(zeros[much])
    return [
        ClaimResult(
            "degeneration",
            lower and sparser and min(random) >= 1,
            {
                f"last layer, {little}": {"entropy share": stats(entropy[little]), "sparsity": stats(zeros[little])},
                "untrained layers, least entropy share": round(min(random), 4),
            },
            {f"last layer, {much}": {"entropy share": stats(entropy[much]), "sparsity": stats(zeros[much])}},
            context.seeds,
            where,
            f"Equal steps; training accuracy {reached}. With few images entropy is lower in every seed: {lower}; "
            f"sparsity is higher: {sparser}; all untrained layers are above the threshold: {min(random) >= 1}.",
        ),
        ClaimResult(
            "shift",
            mean["halves"] < mean["depth"] < mean["random"],
            {k: stats(v) for k, v in distance.items() if k != "random"},
            {"random": stats(distance["random"])},
            context.seeds,
            where,
            "Drift between halves of the kernels of one net, between deciles of depth (mean over pairs), and from the "
            "same net untrained; all on samples of the same size.",
        ),
    ]


def _distances(found: Filters, fresh: Filters, seed: int) -> dict[str, float]:
    basis = Basis.fit(found.kernels)
    order = np.random.default_rng(seed).permutation(len(found.kernels))
    own, other = basis.project(found.kernels), basis.project(fresh.kernels)
    depth = by_depth(found, basis, least=256)
    size = min(len(c) for c in depth.values())
    among = drifts(depth, basis.ratio, sample=size, seed=seed)
    pair = drifts(
        {"a": own[order[::2]], "b": own[order[1::2]], "random": other}, basis.ratio, sample=size, repeats=10, seed=seed
    )
    return {
        "halves": float(pair[0, 1]),
        "depth": float(among[np.triu_indices(len(among), 1)].mean()),
        "random": float(pair[:2, 2].mean()),
    }


def _dataset() -> ClaimResult:
    """A local database of several models, kept and read again; a file in the published layout, read."""
    names = ("resnet8_mlperf_tiny", "resnet20_cifar", "simplenet_cifar_310k")
    every = [collect(create_model(n, num_classes=10, img_size=32, seed=0), name=n, task="classify") for n in names]
    whole = every[0] + every[1] + every[2]
    with tempfile.TemporaryDirectory() as folder:
        again = Filters.load(whole.save(Path(folder) / "filters.safetensors"))
        kernels = write_published(Path(folder) / "dataset.h5")
        read = read_h5(Path(folder) / "dataset.h5")
    have = {n: sum(x.stop - x.start for x in again.layers if x.model == n) for n in names}
    want = {n: len(f.kernels) for n, f in zip(names, every, strict=True)} | {"published layout": len(kernels)}
    have["published layout"] = sum(x.stop - x.start for x in read.layers)
    same = (
        bool((again.kernels == whole.kernels).all() and (read.kernels == kernels).all())
        and again.layers == whole.layers
    )
    return ClaimResult(
        "dataset",
        same and have == want,
        {"kernels read": have},
        {"kernels written": want},
        note="A local database of three models, and a small file in the layout of the published one, which itself "
        "(several GB) was not at hand.",
    )


def write_published(path: Path, words: bytes | None = None, last: str = "28:40") -> np.ndarray:
    """Write 41 filters of three layers with their table, laid out as pandas and PyTables do; gives the filters.

    Args:
        words: what stands in place of the pickled words. last: the filters of the last layer, first and last.
    """
    import h5py

    kernels = np.random.default_rng(0).normal(size=(41, 9)).astype(np.float32)
    table = np.array([["0:11", "Classification"], ["12:27", "Classification"], [last, "Segmentation"]], object)
    with h5py.File(path, "w") as f:
        f["filters"] = kernels
        meta = f.create_group("meta")
        meta.attrs["nblocks"] = 2
        for k, (level, code) in enumerate([([0, 1], [0, 0, 1]), ([0, 1], [0, 1, 0]), ([0.0, 1.0], [0, 1, 0])]):
            meta[f"axis1_level{k}"], meta[f"axis1_label{k}"] = np.array(level), np.array(code, np.int8)
        meta["block0_items"] = np.array([b"filter_ids", b"Task"])
        node = meta.create_dataset("block0_values", (1,), h5py.vlen_dtype(np.uint8))
        node[0] = np.frombuffer(words or pickle.dumps(table, 4), np.uint8)
        meta["block1_items"] = np.array([b"total_filters"])
        meta["block1_values"] = np.array([[28], [28], [13]])
        for k in (0, 1):
            meta[f"block{k}_values"].attrs["transposed"] = np.uint8(1)
    return kernels


def _net(in_chans: int, num_classes: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after, stride in ((in_chans, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
