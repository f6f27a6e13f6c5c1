"""Density-based pruning on features with planted redundancy, and its quotas against a general solver.

Features of a network trained on half of the classes (so that it has not learned the others apart); ten classes then get
four near copies of every sample. A linear probe on what each method keeps, with the same number of steps for all,
says what it was worth. Three seeds take about two minutes of one CPU core.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evidence.runner import ClaimResult, Context, stats
from trimtab.data import concept_pruning
from trimtab.data.curate.concept_pruning import allocate, amount_of, project, select, softmax
from trimtab.data.curate.vectors import Vectors, spherical_kmeans
from trimtab.learn import fit
from trimtab.models import create_model
from trimtab.nn.features import FeatureExtractor

LEVEL = 4
SPLIT = "test"
COPIES = 4
DBP = {"random in cluster": "random", "hard": "hard", "easy": "easy"}


def run(context: Context) -> list[ClaimResult]:
    return [allocation(context), efficiency(context)]


def allocation(context: Context) -> ClaimResult:
    """Random instances: bounds, sum, optimality; and how far a general solver is from it."""
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    worst = {"sum_error": 0, "bound_violation": 0, "kkt_spread": 0.0, "gap_to_solver": 0.0}
    monotone = True
    for _ in range(context.choose(full=20, smoke=2)):
        sizes = rng.integers(1, 400, 100)
        complexity = rng.random(100) * 0.2
        shares, low, n = softmax(complexity / 0.1), np.ones(100, int), int(0.3 * sizes.sum())
        target = n * shares
        x, quotas = project(target, low, sizes, n), allocate(shares, sizes, n, low)
        worst["sum_error"] = max(worst["sum_error"], abs(int(quotas.sum()) - n))
        worst["bound_violation"] = max(worst["bound_violation"], int(max((low - quotas).max(), (quotas - sizes).max())))
        free = (x > low + 1e-9) & (x < sizes - 1e-9)
        worst["kkt_spread"] = max(worst["kkt_spread"], float(np.ptp((x - target)[free])))
        monotone &= bool((np.diff(x[free][np.argsort(complexity[free])]) >= 0).all())
        solved = minimize(
            lambda v: ((v - target) ** 2).sum() / n, x.mean() * np.ones(100), jac=lambda v: 2 * (v - target) / n,  # noqa: B023
            bounds=list(zip(low, sizes)), constraints={"type": "eq", "fun": lambda v: v.sum() - n, "jac": np.ones_like},  # noqa: B023
            method="SLSQP", options={"ftol": 1e-15, "maxiter": 1000},
        )  # fmt: skip
        worst["gap_to_solver"] = max(worst["gap_to_solver"], float(np.abs(solved.x - x).max()))
    exact = worst["sum_error"] == 0 and worst["bound_violation"] <= 0 and worst["kkt_spread"] < 1e-6
    return ClaimResult(
        "allocation",
        exact and monotone and worst["gap_to_solver"] < 1e-6,
        worst | {"monotone": monotone},
        {},
        (),
        "random instances of 100 clusters",
        "kkt_spread: how much clusters that are at no bound differ in x - N P, which is what optimality forbids. The "
        "solver is SciPy's SLSQP; quotas are of the order of 100.",
    )


def efficiency(context: Context) -> ClaimResult:
    clusters, steps = context.choose(full=(60, 800), smoke=(6, 5))
    shares = ("10%", "30%")
    accuracy: dict[str, dict[str, list[float]]] = {s: {} for s in shares}
    for seed in context.each_seed():
        data = context.load_data(limit=context.choose(full=10_000, smoke=256), image_size=32, seed=seed)
        train, test = features(context, data, seed)
        x, y = with_copies(*train, seed)
        for share in shares:
            n = amount_of(share, len(x))
            for name, rows in choices(x, n, clusters, seed).items():
                accuracy[share].setdefault(name, []).append(
                    probe(x[rows], y[rows], test, steps, data.num_classes, seed)
                )
    means = {s: {k: sum(v) / len(v) for k, v in found.items()} for s, found in accuracy.items()}
    small = means["10%"]
    best = small["DBP, random in cluster"] - small["random"]
    return ClaimResult(
        "efficiency",
        best >= 0 and small["DBP, hard"] > small["SSP, hard"],
        {f"{k} {s}": stats(v) for s in shares for k, v in accuracy[s].items() if k.startswith("DBP")},
        {f"{k} {s}": stats(v) for s in shares for k, v in accuracy[s].items() if not k.startswith("DBP")},
        context.seeds,
        f"{data.name}, features of {len(x)} samples, {COPIES} near copies of every sample of a quarter of the classes",
        "Accuracy of a linear probe, equal numbers of samples and steps. Holds: at 10% the quota rule (chance inside a "
        "cluster) is no worse than chance alone, and keeping what is far from the centroid is better with the rule "
        "than with the same rate in every cluster (SSP). The zero-shot accuracy of CLIP is out of reach here.",
    )


def features(context: Context, data: Any, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of train and test, by a small network that saw other images of some of the classes for a few epochs."""
    rows = torch.arange(len(data.splits["train"]))
    half = data.splits["train"].labels < (data.num_classes + 1) // 2
    known = data.like(splits={**data.splits, "train": data.splits["train"].take(rows[half])})
    shape = {"num_classes": data.num_classes, "in_chans": data.in_chans, "img_size": data.size, "seed": seed}
    net = create_model("resnet8_mlperf_tiny", **shape)
    fit(net, known, epochs=context.choose(full=4, smoke=1), val=None, progress=False, seed=seed, device=context.device)
    extract = FeatureExtractor(net, normalize=True)
    return tuple(tuple(extract.of(data, split)) for split in ("train", SPLIT))  # type: ignore[return-value]


def with_copies(x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The first quarter of the classes gets near copies."""
    generator = torch.Generator().manual_seed(seed)
    many = (y < max(1, int(y.max() + 1) // 4)).nonzero()[:, 0].repeat(COPIES)
    near = x[many] + 0.005 * torch.randn(len(many), x.shape[1], generator=generator)
    return torch.cat([x, near]), torch.cat([y, y[many]])


def choices(x: Tensor, n: int, clusters: int, seed: int) -> dict[str, np.ndarray]:
    """Rows that each method keeps, at the same number; SSP and DBP use the same clusters."""
    rng = np.random.default_rng([seed, 7])
    found = {"random": np.sort(rng.choice(len(x), n, replace=False))}
    for name, mode in DBP.items():
        options: dict[str, Any] = {"keep": int(n), "clusters": clusters, "mode": mode, "seed": seed}
        found[f"DBP, {name}"] = concept_pruning(x, **options).rows
    vectors = Vectors(x)
    labels, distance = vectors.nearest(spherical_kmeans(vectors, clusters, seed=seed))
    sizes = np.bincount(labels, minlength=clusters)
    rate = allocate(sizes / sizes.sum(), sizes, n, np.zeros(clusters, int))
    level = allocate(np.full(clusters, 1 / clusters), sizes, n, np.zeros(clusters, int))
    found |= {f"SSP, {mode}": select(distance, labels, rate, mode, seed=seed) for mode in ("hard", "easy")}
    return found | {"balanced, random in cluster": select(distance, labels, level, "random", seed=seed)}


def probe(x: Tensor, y: Tensor, test: tuple[Tensor, Tensor], steps: int, classes: int, seed: int) -> float:
    """Test accuracy of a linear classifier, trained with so many steps of 256 samples."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for step in range(steps):
        rows = torch.randint(len(x), (256,), generator=generator)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        loss = nn.functional.cross_entropy(layer(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((layer(test[0]).argmax(1) == test[1]).double().mean())
