"""Evaluation with label sets: is what looks wrong only another valid label? (Anzaku et al. 2024, arXiv 2412.18409).

Images often have several valid labels, and test sets differ in how often. For an image with g valid labels, look at the
g best predictions: how many are valid? Averaged over the images with exactly g labels, then over g, this says whether a
network that was trained on single labels ranks all valid ones high, however few crowded images there are.

    A_g = mean over images with |Y| = g of |top_g & Y| / g;   ASMA = mean of A_g over g = 1..5 (with enough images)

What is inferred, because the text that could be read does not say it: the groups that ASMA averages (here those up to
`most` labels with at least `min_size` images; sizes are always told). A_g is recall, not exact agreement, which is told
too. Images without any valid label are left out, they are not wrong. Label sets of different sets of images often come
from different protocols; the name of the protocol stays with the result.

>>> metric = MultiLabelAccuracy(num_classes=4, min_size=1)
>>> metric.update(torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3]]), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]))
>>> found = metric.compute()
>>> found["real"], found["asma"], found["groups"]
(0.5, 0.5, {1: {'n': 1, 'accuracy': 0.0, 'top1': 0.0}, 2: {'n': 1, 'accuracy': 1.0, 'top1': 1.0}})
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from trimtab.core.card import Card, Claim
from trimtab.core.errors import DataError

CARD = Card(
    slug="imagenet_multilabel",
    title="Re-assessing ImageNet: How aligned is its single-label assumption with its multi-label nature?",
    arxiv="2412.18409",
    year=2024,
    kind="analysis",
    tasks=("classify", "evaluate"),
    claims=(
        Claim(
            "v2_drop",
            "the 11-14% top-1 drop from ImageNet to ImageNetV2 is largely a label artefact: about 16% of V1 images but "
            "over 48% of V2 images carry several valid labels; under multi-label evaluation the degradation nearly "
            "vanishes",
        ),
        Claim(
            "mlpc",
            "single-label models rank several valid labels near the top: variable top-k (k = number of valid labels) "
            "and its mean over label-count subgroups (ASMA) measure this",
        ),
    ),
)


class MultiLabelAccuracy(Metric):
    """Everything about scores and label sets, as one torchmetrics metric.

    ``update(scores, sets, label)``: scores (B, C), sets (B, C) of 0 and 1, and, for the usual accuracy, the original
    labels (B,). ``compute()`` gives, as plain values:

    - top1: accuracy on the original labels, of all images (where labels were given);
    - real: images whose best prediction is valid, of those that have a valid label;
    - asma, micro: mean of A_g over groups, and over images (which are mostly of one label);
    - exact: images whose g best predictions are the valid labels;
    - groups: for each g, how many images, A_g ("accuracy") and how often the best prediction is valid ("top1");
    - n, unlabelled: images, and those of them without a valid label.

    Equal scores are ranked by class number.

    Args:
        num_classes: C. most, min_size: groups that ASMA averages have up to `most` labels and `min_size` images.
        protocol: where the label sets came from, kept in the result.
    """

    full_state_update = False
    counts: Tensor  # (C + 1,) images by number of labels
    recall: Tensor  # sums of |top_g & Y| / g
    best: Tensor  # images whose best prediction is valid
    whole: Tensor  # images whose g best are the valid ones
    top1: Tensor  # (2,) right, and all, on original labels

    def __init__(
        self, num_classes: int, *, most: int = 5, min_size: int = 100, protocol: str = "", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if most < 1 or min_size < 1:
            raise ValueError(f"most and min_size must be at least 1, got {most} and {min_size}")
        self.num_classes, self.most, self.min_size, self.protocol = num_classes, most, min_size, protocol
        for name in ("counts", "recall", "best", "whole"):
            self.add_state(name, torch.zeros(num_classes + 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("top1", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, sets: Tensor, label: Tensor | None = None) -> None:
        """Add a batch.

        Raises:
            ValueError: shapes differ, or sets have other values than 0 and 1.
        """
        if scores.ndim != 2 or scores.shape[1] != self.num_classes or sets.shape != scores.shape:
            want = f"(B, {self.num_classes})"
            raise ValueError(f"scores and sets must be {want}, got {tuple(scores.shape)} and {tuple(sets.shape)}")
        if ((sets != 0) & (sets != 1)).any():
            raise ValueError("sets must have 1 for valid labels and 0 elsewhere")
        ranked = scores.argsort(dim=1, descending=True, stable=True)
        valid = sets.bool()
        hits = valid.gather(1, ranked).double().cumsum(1)  # valid ones among the k + 1 best
        g = valid.sum(1)
        found = hits.gather(1, (g - 1).clamp(min=0)[:, None])[:, 0]
        self.counts += torch.bincount(g, minlength=self.num_classes + 1)
        has = g > 0
        for state, value in ((self.recall, found / g), (self.best, hits[:, 0]), (self.whole, (found == g).double())):
            state.index_add_(0, g[has], value[has].to(state.dtype))
        if label is not None:
            self.top1 += torch.stack([(ranked[:, 0] == label).sum(), torch.tensor(len(label), device=label.device)])

    def compute(self) -> dict[str, Any]:
        counts, labelled = self.counts, float(self.counts[1:].sum())
        if not labelled:
            raise ValueError("no image has a valid label")
        sizes = {g: int(counts[g]) for g in range(1, self.num_classes + 1) if counts[g] > 0}
        groups = {
            g: {"n": n, "accuracy": float(self.recall[g]) / n, "top1": float(self.best[g]) / n}
            for g, n in sizes.items()
        }
        counted = [g for g, n in sizes.items() if g <= self.most and n >= self.min_size]
        return {
            "top1": float(self.top1[0] / self.top1[1]) if self.top1[1] > 0 else None,
            "real": float(self.best.sum()) / labelled,
            "asma": float(np.mean([groups[g]["accuracy"] for g in counted])) if counted else None,
            "micro": float(self.recall.sum()) / labelled,
            "exact": float(self.whole.sum()) / labelled,
            "asma_groups": counted,
            "groups": groups,
            "n": int(counts.sum()),
            "unlabelled": int(counts[0]),
            "protocol": self.protocol,
        }


def shift(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, float | None]:
    """What is lost from one set of images to another, by several measures of `MultiLabelAccuracy`.

    "standardised" is how often the best prediction would be valid on the second, if it had the first's shares of images
    with g labels (direct standardisation, over groups that both have).
    """
    lost = {
        f"drop_{name}": None if first[name] is None or second[name] is None else first[name] - second[name]
        for name in ("top1", "real", "asma")
    }
    both = [g for g in first["groups"] if g in second["groups"]]
    total = sum(first["groups"][g]["n"] for g in both)
    weighted = sum(first["groups"][g]["n"] * second["groups"][g]["top1"] for g in both)
    return {**lost, "standardised": weighted / total if total else None}


def multi_hot(sets: Sequence[Sequence[int]], num_classes: int) -> Tensor:
    """Label sets as uint8 (N, C).

    >>> multi_hot([[0, 2], []], 3).tolist()
    [[1, 0, 1], [0, 0, 0]]
    """
    out = torch.zeros(len(sets), num_classes, dtype=torch.uint8)
    for i, labels in enumerate(sets):
        for k in labels:
            if not 0 <= k < num_classes:
                raise DataError(f"labels must be 0 to {num_classes - 1}, got {k} for image {i}")
            out[i, k] = 1
    return out


def read_label_sets(path: str | os.PathLike[str], names: Sequence[str]) -> list[list[int]]:
    """The label sets of the images of these names, in their order.

    Args:
        path: JSON, an object of lists by name, or a list of lists, which then belong to the names in alphabetical
            order; or CSV with a line ``name,label,label,...`` per image.
        names: of all images (for a JSON list), or of some. The last parts of paths count where whole ones are unknown.

    Raises:
        DataError: an image has no entry, or the file cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            found: Any = {
                row[0]: [int(v) for v in row[1:] if v.strip()] for row in csv.reader(text.splitlines()) if row
            }
        else:
            found = json.loads(text)
    except (OSError, ValueError) as e:
        raise DataError(f"{path} is no file of label sets: {e}") from e
    if isinstance(found, list):
        if len(found) != len(names):
            raise DataError(f"{path} has {len(found)} label sets for {len(names)} images; of a part, give sets by name")
        found = dict(zip(sorted(names), found, strict=True))
    if not isinstance(found, dict):
        raise DataError(f"{path} must hold an object of lists by name, or a list of lists, got {type(found).__name__}")
    keys = [name if name in found else Path(name).name for name in names]
    missing = [name for name, key in zip(names, keys) if key not in found]
    if missing:
        raise DataError(f"{path} has no labels of {missing[0]} ({len(missing)} of {len(names)} are missing)")
    return [list(map(int, found[key])) for key in keys]


def label_statistics(sets: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How many labels images have.

    >>> label_statistics([[1], [2, 3], [], [4]])["share_of_several"]  # of those that have any
    0.3333333333333333
    """
    sizes = np.array([len(set(s)) for s in sets])
    histogram = {int(g): int((sizes == g).sum()) for g in np.unique(sizes)}
    labelled = int((sizes > 0).sum())
    if not labelled:
        raise ValueError("no image has a valid label")
    return {
        "images": len(sizes), "labelled": labelled, "labels": int(sizes.sum()), "histogram": histogram,
        "share_of_several": float((sizes > 1).sum() / labelled), "mean": float(sizes.sum() / labelled),
    }  # fmt: skip


def dawid_skene(votes: np.ndarray, *, iterations: int = 50, prior: float = 0.5) -> np.ndarray:
    """P(valid) of each pair of image and label from the answers of raters (Dawid & Skene 1979), float64 (P,).

    Expectation maximisation over the confusion matrix of every rater; labels above 0.8 are kept in the ReaL set.

    Args:
        votes: int (P, R): the answer of each rater, from 0 for the surest no to K - 1 for the surest yes; -1 for none.
        prior: what is believed at the beginning where answers are exactly in the middle.
    """
    if votes.ndim != 2 or votes.max() < 1:
        raise ValueError(f"votes must be (pairs, raters) with at least two kinds of answers, got {votes.shape}")
    kinds = int(votes.max()) + 1
    given = np.stack([votes == k for k in range(kinds)]).astype(np.float64)  # (K, P, R)
    answered = given.sum((0, 2))
    if (answered == 0).any():
        raise ValueError(f"each pair must have an answer, pair {int(np.argmin(answered))} has none")
    yes = np.tensordot(np.arange(kinds), given.sum(2), 1) / (answered * (kinds - 1)) + (prior - 0.5)
    p = yes.clip(0.01, 0.99)
    for _ in range(iterations):
        # how often each rater gives each answer to valid and to invalid pairs, with one of each in advance
        tables = [(np.einsum("kpr,p->kr", given, w) + 1) for w in (p, 1 - p)]
        logs = [np.log(t / t.sum(0)) for t in tables]
        evidence = np.einsum("kpr,kr->p", given, logs[0] - logs[1]) + np.log(p.mean() / (1 - p.mean()))
        new = 1 / (1 + np.exp(-evidence.clip(-500, 500)))
        if np.abs(new - p).max() < 1e-8:
            break
        p = new.clip(1e-12, 1 - 1e-12)
    return p


def mosaic(
    images: Tensor, labels: Tensor, *, number: int, grid: int | tuple[int, int] = 2, n: int, seed: int = 0
) -> tuple[Tensor, list[list[int]]]:
    """Pictures of `number` objects each: patches of different classes on a grid, other places neutral (PatchML).

    Args:
        images: uint8 (N, C, H, W) of single objects. labels: (N,).
        number: objects of a picture, at most the places of the grid and the number of classes. n: pictures.
        grid: places, down and across; one number for a square. (1, number) leaves no place neutral.

    Returns:
        uint8 (n, C, down H, across W), and the classes in each.
    """
    down, across = (grid, grid) if isinstance(grid, int) else grid
    classes = labels.unique().tolist()
    if not 1 <= number <= min(down * across, len(classes)):
        raise ValueError(f"number must be 1 to {min(down * across, len(classes))}, got {number}")
    rng = np.random.default_rng([seed, number])
    rows = {c: np.flatnonzero(labels.numpy() == c) for c in classes}
    _, c, h, w = images.shape
    out = torch.full((n, c, down * h, across * w), 128, dtype=torch.uint8)
    sets = []
    for picture in out:
        chosen = rng.choice(classes, number, replace=False).tolist()
        for k, place in zip(chosen, rng.permutation(down * across).tolist()):
            top, left = place // across * h, place % across * w
            picture[:, top : top + h, left : left + w] = images[int(rng.choice(rows[k]))]
        sets.append(chosen)
    return out, sets
