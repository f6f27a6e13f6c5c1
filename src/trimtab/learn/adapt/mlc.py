"""MLC, manifold linearizing and clustering (Ding et al., arXiv 2301.01805): clusters without labels.

Features Z and membership codes C are two linear heads on one body. The codes say, through a doubly stochastic matrix,
which samples belong together; features are trained so that they fill as much space as they can, but samples that belong
together as little as they can: clusters become subspaces, orthogonal to each other. No number of clusters is needed in
training, and nothing is kept per sample, so it runs on mini-batches, and new samples are placed by a forward pass.

    Gamma = Sinkhorn(|C C^T| / eta): rows and columns sum to 1, every column is a soft cluster
    R(Z)  = 1/2 logdet(I + d / (n eps2) Z^T Z)
    Rc(Z, Gamma) = sum_j tr_j / (2 n) logdet(I + d / (tr_j eps2) Z^T diag(g_j) Z),  tr_j = sum_i g_ij
    minimise  -R + Rc + weight / 2 ||Gamma||_F^2;  first only -R (and the invariance of two views), then C starts at Z

At the end the membership of a part of the samples is clustered by its leading eigenvectors; each cluster gets the
principal directions of its features, and all others, and new ones, belong to the nearest of these subspaces.

The authors' code is not public; formulas are those of the code that its authors wrote afterwards for frozen features,
whose settings are the defaults here but for the learning rate (see `mlc`). Sinkhorn is differentiated through its five
half-steps. Features and codes have one optimizer and one weight decay. Of ten k-means restarts the best is taken, not
the mean of all.
"""

from __future__ import annotations

import logging
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.card import Card, Claim
from trimtab.core.edit import Edit, Replace, SetAttr, apply
from trimtab.data import Data, Split
from trimtab.learn.adapt.frame import TRAINING
from trimtab.learn.adapt.metrics import match_clusters
from trimtab.learn.fit import fit
from trimtab.learn.objective import Batch, Context, Objective
from trimtab.learn.settings import Settings
from trimtab.nn.features import FeatureExtractor, classifier_of, pooled_features
from trimtab.nn.modes import eval_mode

log = logging.getLogger(__name__)

CARD = Card(
    slug="mlc",
    title="Unsupervised Manifold Linearizing and Clustering",
    arxiv="2301.01805",
    year=2023,
    kind="method",
    tasks=("clustering", "representation-learning", "self-supervised"),
    claims=(
        Claim(
            "objective",
            "maximise coding-rate reduction jointly over the representation and a doubly stochastic n x n membership; "
            "the learned features of one cluster lie near one linear subspace, subspaces of different clusters near "
            "orthogonal",
        ),
        Claim(
            "init",
            "self-supervised initialisation of the features, then a one-shot copy of the feature head into the "
            "membership head, makes the non-convex problem trainable",
        ),
        Claim(
            "scale",
            "mini-batching works because the membership of a batch is computed from network outputs; no variable per "
            "data point",
        ),
    ),
)

INITS = ("copy", "random")
SHARPEST = 0.01  # the smallest eta: exp(1 / eta) still fits, so a membership is positive and its graph connected
_MOST = 10_000  # steps to a tolerance
_NUMBERS = 2**24  # of second moments that are computed at once


def sinkhorn(affinity: Tensor, *, eta: float = 0.175, steps: int = 5) -> Tensor:
    """An affinity (n, n) to membership by a few half-steps of Sinkhorn; differentiable.

    Args:
        eta: temperature. steps: half-steps, odd: the first and the last are on rows, so rows sum to 1.

    Returns:
        Tensor (n, n) of total mass n. `doubly_stochastic` goes on until the columns sum to 1 as well.
    """
    _check_eta(eta)
    if steps < 1 or steps % 2 == 0:
        raise ValueError(f"steps must be odd, got {steps}")
    kernel = affinity / eta  # its logarithm
    u, v = -kernel.logsumexp(1), kernel.new_zeros(())
    for _ in range(steps // 2):
        v = -(kernel + u[:, None]).logsumexp(0)
        u = -(kernel + v).logsumexp(1)
    return (kernel + u[:, None] + v).exp()


def doubly_stochastic(affinity: Tensor, *, eta: float = 0.175, tolerance: float = 1e-6) -> Tensor:
    """The doubly stochastic matrix (n, n) nearest to a symmetric affinity (n, n), with entropy, to a tolerance.

    Where Sinkhorn's half-steps need the longer the clearer the clusters are, this one step for rows and columns at
    once, x <- sqrt(x / K x), does not: what it leaves of an error shrinks by (1 - lambda) / 2 for each eigenvalue
    lambda of the result, and clusters have those near 1.

    Args:
        tolerance: how much a row or column may sum to more or less than 1.

    Returns:
        float64 (n, n), symmetric.

    Raises:
        ValueError: the affinity is not symmetric; the tolerance is not reached.

    >>> a = torch.rand(5, 5)
    >>> gamma = doubly_stochastic(a + a.T, tolerance=1e-12)
    >>> float((gamma.sum(0) - 1).abs().max()) <= 1e-12, torch.equal(gamma, gamma.T)
    (True, True)
    """
    _check_eta(eta)
    a = affinity.double()
    if a.ndim != 2 or not torch.equal(a, a.T):
        raise ValueError("affinity must be a symmetric matrix")
    kernel = ((a - a.max()) / eta).exp()
    x = torch.ones_like(kernel[0]) / kernel.sum() ** 0.5
    for _ in range(_MOST):
        rows = kernel @ x
        if float((x * rows - 1).abs().max()) <= tolerance:
            return kernel * (x[:, None] * x)
        x = (x / rows).sqrt()
    raise ValueError(f"rows do not sum to 1 within {tolerance} after {_MOST} steps; give a larger eta or tolerance")


def similarity(codes: Tensor) -> Tensor:
    """Affinity (n, n) of codes (n, d) of unit length, 0 to 1; a code and its opposite are the same."""
    return (codes @ codes.T).abs()


def coding_rate(z: Tensor, *, eps2: float = 0.1) -> Tensor:
    """R: nats per sample that code features (n, d) of unit length up to a squared error of eps2.

    >>> round(float(coding_rate(torch.eye(16, dtype=torch.float64))), 5)  # 16 / 2 log(1 + 1 / 0.1)
    19.18316
    """
    n, d = z.shape
    return _half_logdet(z.T @ z * (d / (n * eps2)))


def cluster_rate(z: Tensor, membership: Tensor, *, eps2: float = 0.1) -> Tensor:
    """Rc: the rate of features (n, d) when each soft cluster, a column of membership (n, m), is coded by itself."""
    n, d = z.shape
    products = (z[:, :, None] * z[:, None]).flatten(1)  # (n, d^2)
    total = z.new_zeros(())
    for columns in membership.T.split(max(1, _NUMBERS // d**2)):  # (c, n)
        mass = columns.sum(1)
        moments = (columns @ products).view(-1, d, d) * (d / (mass * eps2))[:, None, None]
        total = total + mass @ _half_logdet(moments)
    return total / n


def _half_logdet(a: Tensor) -> Tensor:
    """1/2 logdet(I + A) of positive semidefinite (..., d, d)."""
    factor = torch.linalg.cholesky(a + torch.eye(a.shape[-1], dtype=a.dtype, device=a.device))
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class MLCHead(nn.Module):
    """Features (B, F) of a network -> how much of each lies in the subspace of each cluster (B, K), 0 to 1.

    Args:
        in_features: F. clusters: K. dim: d, of features and codes.
        hidden, layers: width and number of layers of the body; a batch norm follows the first.
        rank: dimensions of a cluster's subspace.

    Attributes:
        basis (K, d, rank): orthonormal directions of each cluster, filled when training is over.

    >>> sum(p.numel() for p in MLCHead(768, 10).parameters())
    20988160
    """

    basis: Tensor

    def __init__(
        self, in_features: int, clusters: int, dim: int = 128, hidden: int = 4096, layers: int = 2, rank: int = 1
    ) -> None:
        super().__init__()
        body: list[nn.Module] = [nn.Linear(in_features, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        for _ in range(layers - 1):
            body += [nn.Linear(hidden, hidden), nn.ReLU()]
        self.body = nn.Sequential(*body)
        self.feature, self.code = nn.Linear(hidden, dim), nn.Linear(hidden, dim)
        self.register_buffer("basis", torch.zeros(clusters, dim, rank))

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features Z (B, d) and membership codes C (B, d), of unit length."""
        h = self.body(x.flatten(1))
        return F.normalize(self.feature(h), dim=1), F.normalize(self.code(h), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bd,kdr->bkr", self.codes(x)[0], self.basis).square().sum(-1)


class RateReduction(Objective):
    """The loss of MLC, for a network with an `MLCHead`.

    Args:
        at: name of the head in the model; "" where the model is the head.
        eps2: squared error of the codes. eta: temperature of Sinkhorn.
        weight: of ||Gamma||_F^2 / 2. m clusters that share all d dimensions evenly cost
            d / (2 m) log(1 + m / eps2) + weight m / 2: a small weight makes many of few dimensions best, a large one
            few, and from a membership that is not clear yet it leads to the uniform one.
        spread: share of the run, at its start, in which features only spread out (-R).
        invariance: weight of the cosine between two views of an image meanwhile; without views it has no effect.
        init: "copy" (codes start as the features are then) or "random" (they start where they are).
        views: whether images are shown in two augmented views.
    """

    def __init__(
        self, at: str = "", *, eps2: float = 0.1, eta: float = 0.175, weight: float = 0.05, spread: float = 0.2,
        invariance: float = 30.0, init: str = "copy", views: bool = False,
    ) -> None:  # fmt: skip
        if eps2 <= 0:
            raise ValueError(f"eps2 must be positive, got {eps2}")
        _check_eta(eta)
        for name, value in (("weight", weight), ("invariance", invariance)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not 0 <= spread < 1:
            raise ValueError(f"spread must be a share from 0 to below 1, got {spread}")
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        self.at, self.eps2, self.eta, self.weight = at, eps2, eta, weight
        self.spread, self.invariance, self.init, self.views = spread, invariance, init, views
        self._copied = False

    def prepare(self, data: Any, settings: Settings, device: torch.device) -> Any:
        return _Pairs(data) if self.views else data

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        head: Any = model.get_submodule(self.at)
        spreading = ctx.progress < self.spread
        if not spreading and not self._copied:
            self._copied = True
            if self.init == "copy":
                head.code.load_state_dict(head.feature.state_dict())
        with torch.autocast(batch["image"].device.type, enabled=False):  # determinants need float32
            seen = [self._codes(model, head, batch[k]) for k in ("image", "view") if k in batch]
            z, c = (F.normalize(torch.stack(views).sum(0), dim=1) for views in zip(*seen, strict=True))
            losses = {"rate": -coding_rate(z, eps2=self.eps2)}
            if not spreading:
                gamma = sinkhorn(similarity(c), eta=self.eta)
                losses["clusters"] = cluster_rate(z, gamma, eps2=self.eps2)
                losses["membership"] = self.weight / 2 * gamma.square().sum()
            elif len(seen) == 2:
                losses["views"] = -self.invariance * (seen[0][0] * seen[1][0]).sum(1).mean()
        return losses

    def _codes(self, model: nn.Module, head: MLCHead, images: Tensor) -> tuple[Tensor, Tensor]:
        return head.codes(pooled_features(model, images, before=self.at) if self.at else images)

    def state_dict(self) -> dict[str, Any]:
        return {"copied": self._copied}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._copied = state["copied"]


class _Pairs:
    """Data whose training batches have a second view of every image, "view"."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["data"], name)

    def loader(self, split: str = "train", *, seed: int = 0, **how: Any) -> Any:
        first = self.data.loader(split, seed=seed, **how)
        return first if split != "train" else _Paired(first, self.data.loader(split, seed=seed + 1, **how))


class _Paired:
    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, copy(second)
        self.second.order = first.order  # the same images, augmented with another seed

    def __len__(self) -> int:
        return len(self.first)

    def __iter__(self) -> Any:
        for one, other in zip(self.first, self.second, strict=True):
            yield one | {"view": other["image"]}


@dataclass(frozen=True)
class Clusters:
    """What was found.

    Attributes:
        labels: int64 (N,), the cluster of each sample, in their order.
        model: places new samples: scores (B, K) of images, or of features where features were given.
        features: float32 (N, F), what was clustered.
        rows: int64 (n,), the samples whose membership was clustered. membership: float32 (n, n), doubly stochastic.
        history: of training, a row per epoch.
    """

    labels: Tensor
    model: nn.Module
    features: Tensor
    rows: Tensor
    membership: Tensor
    history: list[dict[str, Any]]

    def named(self, labels: Tensor) -> Clusters:
        """The same clusters in another order, that of the classes which they match best one to one.

        Args:
            labels: int64 (N,), the classes of the samples.
        """
        model = deepcopy(self.model)
        head: Any = next(m for m in model.modules() if isinstance(m, MLCHead))
        order = match_clusters(self.labels, labels, size=len(head.basis))
        if len(order) > len(head.basis):
            raise ValueError(f"clusters must be as many as classes ({len(order)}) to have names, got {len(head.basis)}")
        head.basis = head.basis[order.argsort()]
        return replace(self, model=model, labels=order[self.labels])


def mlc(
    model: nn.Module | Tensor | np.ndarray,
    data: Data | None = None,
    *,
    clusters: int,
    dim: int = 128,
    hidden: int = 4096,
    layers: int = 2,
    rank: int | None = None,
    eps2: float = 0.1,
    eta: float = 0.175,
    weight: float = 0.05,
    spread: float = 0.2,
    invariance: float = 30.0,
    init: str = "copy",
    backbone: bool = False,
    graph: int = 2000,
    epochs: int = 20,
    batch_size: int = 1024,
    lr: float = 0.01,
    opt: str = "momentum",
    weight_decay: float = 1e-4,
    sched: Any = "cosine",
    cache: str | Path | None = None,
    seed: int = 0,
    **training: Any,
) -> Clusters:
    """Cluster the training images of some data by the features of a network, or features as they are.

    Args:
        model: any network, which is not changed; or features (N, F), and no data.
        data: images; their labels are not looked at.
        clusters: K.
        dim, hidden, layers: of the head, see `MLCHead`. rank: dimensions per cluster for new samples; dim // K.
        eps2, eta, weight, spread, invariance, init: see `RateReduction`.
        backbone: train the network too, on two augmented views of every image.
        graph: at most so many samples, drawn at random, are clustered by their n x n membership; the others are placed
            as new samples are.
        epochs, ..., **training: for `fit`. The code for frozen features has lr 1e-4 and 50,000 samples; small data
            needs larger steps.
        cache: folder in which features of a frozen network are kept.

    Raises:
        ValueError: fewer samples than clusters, fewer dimensions than clusters, features that are not finite, ...

    >>> x = torch.randn(90, 3, generator=torch.Generator().manual_seed(0)) * 0.1 + torch.eye(3).repeat(30, 1)
    >>> found = mlc(x, clusters=3, dim=6, hidden=16, epochs=20, batch_size=90, progress=False)
    >>> len(set(found.labels[:3].tolist())), found.model(x[:5]).shape
    (3, torch.Size([5, 3]))
    """
    objective = {"eps2": eps2, "eta": eta, "weight": weight, "spread": spread, "invariance": invariance, "init": init}
    RateReduction(**objective)  # type: ignore[arg-type]  # refused at the door
    for name, value in (("hidden", hidden), ("layers", layers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    network = model if isinstance(model, nn.Module) else None
    n = _samples(model, data)
    _check_numbers(n, clusters, dim, rank, graph, min(batch_size, n))
    if backbone and network is None:
        raise ValueError("backbone=True needs a network and images, got features")
    values = _values(model, data, cache)
    kwargs = {"in_features": values.shape[1], "clusters": clusters, "dim": dim, "hidden": hidden, "layers": layers,
              "rank": rank or dim // clusters}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = MLCHead(**kwargs)
    how = {**TRAINING, "epochs": epochs, "batch_size": batch_size, "lr": lr, "opt": opt, "sched": sched,
           "weight_decay": weight_decay, "seed": seed, **training}  # fmt: skip
    placed: nn.Module = head
    at = ""
    if network is not None:
        at = classifier_of(network)
        placed = _with_head(network, at, head, kwargs)
        head = placed.get_submodule(at)  # type: ignore[assignment]
    if backbone:
        done = fit(placed, data, RateReduction(at, views=True, **objective), **how)  # type: ignore[arg-type]
        values = FeatureExtractor(placed, before=at).of(data, "train").values
    else:
        done = fit(head, feature_data(values), RateReduction(**objective), **{**how, "augment": None})  # type: ignore[arg-type]
    if done.stopped == "interrupted":
        raise KeyboardInterrupt
    z, c = head_codes(head, values)
    rows = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(n)[:graph]))
    gamma = doubly_stochastic(_symmetric(similarity(c[rows])), eta=eta)
    found = spectral_labels(gamma, clusters, seed=seed)
    head.basis.copy_(subspaces(z[rows], found, clusters, kwargs["rank"]))
    labels = torch.einsum("bd,kdr->bkr", z, head.basis.cpu()).square().sum(-1).argmax(1)
    labels[rows] = found
    return Clusters(labels, placed.eval(), values, rows, gamma.float(), done.history)


def feature_data(values: Tensor) -> Data:
    """Features (N, F) as a data set that `fit` takes: images of one pixel with a channel for each feature."""
    n, d = values.shape
    split = Split(values[:, :, None, None], torch.zeros(n, dtype=torch.int64))
    return Data("features", {"train": split}, ["unknown"], mean=(0.0,) * d, std=(1 / 255,) * d)


@torch.no_grad()
def head_codes(head: MLCHead, values: Tensor, *, batch_size: int = 4096) -> tuple[Tensor, Tensor]:
    """Features Z and codes C (N, d) of all samples, in eval mode, on the CPU."""
    device = head.basis.device
    with eval_mode(head):
        parts = [head.codes(x.to(device)) for x in values.split(batch_size)]
    z, c = (torch.cat(p).cpu() for p in zip(*parts, strict=True))
    return z, c


def spectral_labels(affinity: Tensor, clusters: int, *, seed: int = 0) -> Tensor:
    """Spectral clustering of a symmetric affinity (n, n): k-means on rows, at unit length, of its leading eigenvectors.

    They are those of the normalised Laplacian. Of ten restarts of k-means the best is taken.
    """
    from scipy.sparse.linalg import eigsh
    from sklearn.cluster import KMeans

    w = affinity.double().numpy()
    scale = w.sum(1) ** -0.5
    w = w * (scale[:, None] * scale)
    n = len(w)
    if n > 8 * clusters:
        start = np.random.default_rng(seed).random(n)
        vectors = eigsh(w, k=clusters, which="LA", v0=start)[1]
    else:  # few samples: the iterative solver has no room
        vectors = np.linalg.eigh(w)[1][:, n - clusters :]
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    found = KMeans(clusters, n_init=10, random_state=seed).fit_predict(vectors)
    return torch.from_numpy(found).long()


def subspaces(z: Tensor, labels: Tensor, clusters: int, rank: int) -> Tensor:
    """Leading principal directions (K, d, rank) of the features (n, d) of each cluster; zeros where it has fewer."""
    basis = z.new_zeros(clusters, z.shape[1], rank)
    for k in range(clusters):
        directions = torch.linalg.svd(z[labels == k], full_matrices=False)[2][:rank]  # (r, d)
        basis[k, :, : len(directions)] = directions.T
    return basis


def rivals(features: Tensor, clusters: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Clusters (N,) of the same features by scikit-learn: k-means, and spectral clustering on ten neighbours."""
    from sklearn.cluster import KMeans, SpectralClustering

    x = features.numpy()
    near = {"affinity": "nearest_neighbors", "n_neighbors": min(10, len(x)), "assign_labels": "kmeans"}
    found = {
        "k-means": KMeans(clusters, n_init=10, random_state=seed).fit_predict(x),
        "spectral": SpectralClustering(clusters, random_state=seed, **near).fit_predict(x),
    }
    return {name: torch.from_numpy(labels).long() for name, labels in found.items()}


def _with_head(network: nn.Module, at: str, head: MLCHead, kwargs: dict[str, int]) -> nn.Module:
    """A copy of a network with the head in the place of its classifier, by edits."""
    edits: list[Edit] = [Replace(at, f"{__name__}.MLCHead", kwargs)]
    if getattr(network, "num_classes", kwargs["clusters"]) != kwargs["clusters"]:
        edits.append(SetAttr("", "num_classes", kwargs["clusters"]))
    with torch.random.fork_rng(devices=[]):  # the new layer's first weights are drawn, then filled in
        return apply(deepcopy(network), edits, weights={f"{at}.{k}": v for k, v in head.state_dict().items()})


def _symmetric(a: Tensor) -> Tensor:
    return (a + a.T) / 2  # a product of matrices is symmetric only up to rounding


def _check_eta(eta: float) -> None:
    if eta < SHARPEST:
        raise ValueError(f"eta must be at least {SHARPEST}, got {eta}")


def _samples(model: Any, data: Data | None) -> int:
    if isinstance(model, nn.Module):
        if data is None:
            raise ValueError("data must be given to turn images into features")
        return len(data.splits["train"])
    if data is not None:
        raise ValueError("data must be None where features are given")
    if np.ndim(model) != 2:
        raise ValueError(f"features must be (N, F), got {tuple(np.shape(model))}")
    return len(model)


def _values(model: Any, data: Data | None, cache: str | Path | None) -> Tensor:
    """Features float32 (N, F), on the CPU."""
    if isinstance(model, nn.Module):
        values = FeatureExtractor(model, cache=cache).of(data, "train").values
    else:
        values = torch.as_tensor(model).detach().float().cpu()
    bad = (~values.isfinite().all(1)).nonzero().flatten()
    if len(bad):
        raise ValueError(f"features must be finite; those of sample {int(bad[0])} are not")
    return values


def _check_numbers(n: int, clusters: int, dim: int, rank: int | None, graph: int, batch: int) -> None:
    if not 2 <= clusters <= n:
        raise ValueError(f"clusters must be 2 to the number of samples ({n}), got {clusters}")
    if dim < clusters:
        raise ValueError(f"dim must be at least clusters ({clusters}): each needs a direction of its own, got {dim}")
    if rank is not None and not 1 <= rank <= dim:
        raise ValueError(f"rank must be 1 to dim ({dim}), got {rank}")
    if graph < clusters:
        raise ValueError(f"graph must be at least clusters ({clusters}), got {graph}")
    if batch < 4 * clusters:
        log.warning(
            "a batch of %d samples has few of each of %d clusters; larger ones separate better", batch, clusters
        )
