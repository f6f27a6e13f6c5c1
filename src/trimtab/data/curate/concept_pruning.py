"""Density-based pruning: keep more of complex concepts (Abbas et al. 2024, arXiv 2401.04578).

Samples are clustered by the direction of their features; a cluster is a concept. One that is spread out and far from
others is complex, and its share of what is kept grows with that. Inside a cluster, what is far from its centroid stays.

    d_intra = mean of 1 - z.c over members;  d_inter = mean of 1 - c.c' over the 20 nearest other centroids
    P = softmax(d_intra d_inter / tau);  minimise sum (x - N P)^2  with  sum x = N,  low <= x <= size

The quadratic program is a projection on a simplex with bounds, so ``x = clip(N P + mu, low, size)`` with one number mu,
which is found exactly: bisection says which clusters are at a bound, and the others give mu in closed form.

What differs from the authors' code: a cluster of a single sample may keep it (theirs lets it drop to 0), quotas are
rounded so that their sum is exact, and ties are broken by position, so that a run can be repeated. Their first stage,
removing near copies, is the option `dedup`; the filter by image-text score needs captions and is not in here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trimtab.core.card import Card, Claim
from trimtab.core.errors import DataError
from trimtab.data.curate.vectors import RayVectors, Vectors, spherical_kmeans, vectors_of
from trimtab.data.dataset import Data
from trimtab.nn.features import FeatureExtractor

if TYPE_CHECKING:
    from torch import nn

CARD = Card(
    slug="concept_pruning",
    title="Effective pruning of web-scale datasets based on complexity of concept clusters",
    arxiv="2401.04578",
    year=2024,
    kind="method",
    tasks=("classify", "curate"),
    claims=(
        Claim(
            "allocation",
            "keep more samples from complex concepts: quota per cluster is the box-constrained projection of "
            "N*softmax(d_intra*d_inter/tau)",
        ),
        Claim(
            "efficiency",
            "CLIP ViT-B/32 trained on 27.7% of LAION (112M) reaches 64.1% ImageNet zero-shot, 1.1 points above "
            "OpenCLIP on LAION-400M",
        ),
    ),
)

MODES = ("hard", "easy", "random")
_BLOCK = 4096  # members of a cluster whose similarities are computed at once


@dataclass(frozen=True)
class Complexity:
    """Of each cluster (k,): mean distance of members to the centroid, of the centroid to others, and the product."""

    intra: np.ndarray
    inter: np.ndarray
    product: np.ndarray


@dataclass(frozen=True)
class Pruned:
    """What was kept, and why.

    Attributes:
        rows: positions of what is kept, int64, ascending.
        total: samples there were; copies: how many of them were near copies of others.
        sizes, quotas, shares: of each cluster (k,): members, how many are kept, and the share P aimed at.
    """

    rows: np.ndarray
    total: int
    copies: int
    sizes: np.ndarray
    quotas: np.ndarray
    shares: np.ndarray
    complexity: Complexity

    def of(self, data: Data) -> Data:
        """The data with only these images in train."""
        return only(data, self.rows)

    def summary(self) -> dict[str, Any]:
        """Plain values, for reports."""
        spread = float(self.shares.max() / self.shares.min())
        table = (self.sizes, self.quotas, self.complexity.intra, self.complexity.inter)
        return {
            "total": self.total, "copies": self.copies, "kept": len(self.rows), "clusters": len(self.sizes),
            "largest_over_smallest_share": spread,
            "table": [dict(zip(("size", "kept", "intra", "inter"), (c.item() for c in row))) for row in zip(*table)],
        }  # fmt: skip


def concept_pruning(
    vectors: Any,
    model: nn.Module | None = None,
    *,
    keep: str | float = 0.5,
    clusters: int | None = None,
    neighbours: int = 20,
    tau: float = 0.1,
    mode: str = "hard",
    balance: float | None = None,
    dedup: float | None = None,
    iterations: int = 100,
    seed: int = 0,
) -> Pruned:
    """Choose the samples to keep.

    Args:
        vectors: features (N, D): an array, the path of an .npy file, or a `ray.data.Dataset` with columns "id" and
            "vector". Or data, whose training images `model` then turns into features.
        keep: a share such as "50%" or 0.5, or a number of samples.
        clusters: k; None: the root of the number of samples, at most 500.
        neighbours: other centroids that d_inter is a mean over (k - 1 if there are fewer).
        tau: temperature; large values make all shares equal.
        mode: what stays in a cluster: what is far from the centroid ("hard"), near it ("easy"), or chance ("random").
        balance: every cluster keeps at least this share of what it would keep if all kept the same; None: one sample.
        dedup: first remove near copies, whose cosine to another is above 1 - dedup; None: do not look for them.
        iterations: of k-means, at most.

    Raises:
        ValueError: an argument is out of range, or there are fewer samples than clusters.
        DataError: a class has a single image; a vector is zero or NaN.

    >>> rng = np.random.default_rng(0)
    >>> tight, loose = rng.normal(8, 0.1, (300, 4)), rng.normal(0, 1, (300, 4))
    >>> found = concept_pruning(np.concatenate([tight, loose]), keep="20%", clusters=8)
    >>> len(found.rows), bool((found.rows >= 300).sum() > (found.rows < 300).sum())
    (120, True)
    """
    if isinstance(vectors, Data):
        vectors = features_of(vectors, model)
    every = vectors_of(vectors)
    n = len(every)
    k = max(2, min(500, round(n**0.5))) if clusters is None else clusters
    _check(n, k, neighbours, tau, mode, balance, dedup)
    wanted = amount_of(keep, n)
    places = np.arange(n)
    if dedup is not None:
        if isinstance(every, RayVectors):
            raise ValueError("dedup needs vectors in memory or in an .npy file, got a Ray data set")
        places = distinct(every, k, dedup, iterations=iterations, seed=seed)
        every = every.take(places)
        wanted = min(wanted, len(places))
    centroids = spherical_kmeans(every, k, iterations=iterations, seed=seed)
    labels, distance = every.nearest(centroids)
    found = complexity(distance, labels, centroids, neighbours)
    sizes = np.bincount(labels, minlength=k)
    shares = softmax(found.product / tau)
    least = np.minimum(1 if balance is None else int(balance * wanted / k), sizes)
    if wanted < least.sum():
        raise ValueError(
            f"keep must be at least one sample of each of the {k} clusters, got {wanted}; use fewer clusters"
        )
    quotas = allocate(shares, sizes, wanted, least)
    chosen = select(distance, labels, quotas, mode, seed=seed)
    return Pruned(places[chosen], n, n - len(places), sizes, quotas, shares, found)


def only(data: Data, rows: np.ndarray) -> Data:
    """The data with only these images in train; a class that has none left is told in its warnings."""
    kept = data.like(splits={**data.splits, "train": data.splits["train"].take(torch.from_numpy(rows))})
    had, has = (d.splits["train"].counts(data.num_classes) for d in (data, kept))
    lost = [name for name, before, after in zip(data.class_names, had, has) if before and not after]
    if lost:
        kept.warnings = [*data.warnings, f"pruning left no training images of {', '.join(lost[:5])}"]
    return kept


def features_of(data: Data, model: nn.Module | None) -> np.ndarray:
    """Features (N, D) of the training images."""
    if model is None:
        raise ValueError("model must be given to turn images into features")
    counts = data.splits["train"].counts(data.num_classes)
    single = [name for name, n in zip(data.class_names, counts) if n == 1]
    if single:
        raise DataError(
            f"class {single[0]!r} has a single training image, so there is nothing to choose; add some, or drop it"
        )
    return FeatureExtractor(model).of(data, "train").values.numpy()


def amount_of(keep: str | float, n: int) -> int:
    """How many of `n` a share or number means, at least 1.

    >>> amount_of("50%", 11), amount_of(0.25, 8), amount_of(3, 8)
    (6, 2, 3)
    """
    try:
        text = str(keep).strip()
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        whole = not text.endswith("%") and (isinstance(keep, int) or (text.isdigit() and value > 1))
    except ValueError:
        value, whole = -1.0, False
    if not (1 <= value <= n if whole else 0 < value <= 1):
        raise ValueError(f"keep must be a share such as 50% or 0.5, or a number up to {n}, got {keep!r}")
    return int(value) if whole else max(1, round(value * n))


def complexity(distance: np.ndarray, labels: np.ndarray, centroids: np.ndarray, neighbours: int = 20) -> Complexity:
    """How complex clusters are.

    Args:
        distance, labels: (N,), as `Vectors.nearest` gives them.
        centroids: (k, D) of unit length. neighbours: nearest other centroids that count.
    """
    k = len(centroids)
    sizes = np.bincount(labels, minlength=k)
    with np.errstate(invalid="ignore"):
        intra = np.bincount(labels, distance.astype(np.float64), k) / sizes
    apart = (1 - centroids.astype(np.float64) @ centroids.T.astype(np.float64)).clip(0, 2)
    np.fill_diagonal(apart, np.inf)
    inter = np.sort(apart, 1)[:, : min(neighbours, k - 1)].mean(1)
    product = intra * inter
    return Complexity(intra, inter, np.where(np.isnan(product), np.nanmean(product), product))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def allocate(shares: np.ndarray, sizes: np.ndarray, n: int, lower: np.ndarray) -> np.ndarray:
    """How many to keep of each cluster, int64 (k,): the projection of n shares, rounded so that the sum is n.

    Raises:
        ValueError: the bounds lower <= x <= sizes leave no room for a sum of n.
    """
    x = project(n * shares, lower, sizes, n)
    whole = np.floor(x + 1e-9).astype(np.int64)
    order = np.argsort(whole - x, kind="stable")  # the largest fractions first
    order = order[whole[order] < sizes[order]]
    whole[order[: n - int(whole.sum())]] += 1
    return whole


def project(target: np.ndarray, low: np.ndarray, high: np.ndarray, total: float) -> np.ndarray:
    """The point nearest to `target` (k,) with low <= x <= high and sum `total`.

    >>> project(np.array([6.0, 3.0, 1.0]), np.zeros(3), np.array([4.0, 9.0, 9.0]), 10).tolist()
    [4.0, 4.0, 2.0]
    """
    if not low.sum() - 1e-9 <= total <= high.sum() + 1e-9:
        raise ValueError(f"the sum must be {low.sum()} (all lower bounds) to {high.sum()} (all samples), got {total}")
    below, above = float((low - target).min()), float((high - target).max())
    while (mu := (below + above) / 2) not in (below, above):  # to the last bit
        below, above = (mu, above) if np.clip(target + mu, low, high).sum() < total else (below, mu)
    x = np.clip(target + mu, low, high)
    free = (x > low) & (x < high)
    if free.any():
        x[free] += (total - x.sum()) / free.sum()
    return np.clip(x, low, high)


def select(
    distance: np.ndarray, labels: np.ndarray, quotas: np.ndarray, mode: str = "hard", *, seed: int = 0
) -> np.ndarray:
    """Positions of what stays, ascending: of cluster j the quotas[j] farthest ("hard"), nearest ("easy") or random."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    key = {"hard": lambda: -distance, "easy": lambda: distance,
           "random": lambda: np.random.default_rng([seed, 1]).random(len(distance))}[mode]()  # fmt: skip
    order = np.lexsort((np.arange(len(labels)), key, labels))
    sizes = np.bincount(labels, minlength=len(quotas))
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[rank < quotas[labels[order]]])


def distinct(vectors: Vectors, k: int, eps: float, *, iterations: int = 100, seed: int = 0) -> np.ndarray:
    """Positions of what is no near copy, ascending (SemDeDup, Abbas et al. 2023).

    Inside a cluster, from the farthest from the centroid to the nearest, a sample goes if its cosine to an earlier one
    is above 1 - eps.
    """
    centroids = spherical_kmeans(vectors, k, iterations=iterations, seed=seed)
    labels, distance = vectors.nearest(centroids)
    stays = np.ones(len(vectors), bool)
    order = np.lexsort((np.arange(len(labels)), -distance, labels))
    for members in np.split(order, np.cumsum(np.bincount(labels, minlength=k))[:-1]):
        by_place = np.argsort(members)
        x = np.empty((len(members), vectors.dim), np.float32)
        x[by_place] = vectors.at(members[by_place])
        for start in range(0, len(x), _BLOCK):
            part = x[start : start + _BLOCK]
            cosines = np.tril(part @ x[: start + len(part)].T, start - 1)  # to earlier ones only
            stays[members[start : start + len(part)]] = cosines.max(1, initial=-2) <= 1 - eps
    return np.flatnonzero(stays)


def _check(
    n: int, k: int, neighbours: int, tau: float, mode: str, balance: float | None, dedup: float | None
) -> None:  # fmt: skip
    if not 2 <= k <= n:
        raise ValueError(f"clusters must be 2 to the number of samples ({n}), got {k}")
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}")
    if tau <= 0:
        raise ValueError(f"tau must be positive, got {tau}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if balance is not None and not 0 <= balance <= 1:
        raise ValueError(f"balance must be 0 to 1, got {balance}")
    if dedup is not None and not 0 < dedup < 1:
        raise ValueError(f"dedup must be between 0 and 1, got {dedup}")
