"""CNN Filter DB: what trained 3x3 convolution kernels look like (Gavrikov and Keuper, "CNN Filter DB: An Empirical
Investigation of Trained Convolutional Filters", arXiv 2203.15331).

All 3x3 kernels of a set of networks are rows of R^9. Scaled to a largest entry of 1, they are compared as
distributions: the histograms of their coefficients on a common principal basis, by a symmetric Kullback-Leibler
divergence weighted with the variance that each component explains. Three measures of the plain weights of one layer
(sparsity, variance entropy, orthogonality) name layers that have degenerated, without data or labels.

What differs from the paper, or is ours:

- Kernels are collected from modules, not from ONNX files. ``fold_bn=True`` scales them by the batch norm that follows
  (the next layer in order of definition, where the widths agree), as an exporter that folds constants does.
- Depth is the position among all convolutions in order of definition.
- Sets are compared on samples of equal size, because the divergence of histograms grows as sets get smaller.
- The paper leaves the thresholds of "degenerated" to the reader; ours are `SPARSE` and `LOW_ENTROPY`. The threshold of
  randomness, a fit, is only believed for layers of at least `ENOUGH_KERNELS` kernels.
- Of the published file, words are read by an unpickler that knows arrays of words and numbers and nothing else.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from trimtab.core.card import Card, Claim
from trimtab.core.errors import TrimtabError, need
from trimtab.core.files import replacing

CARD = Card(
    slug="cnn_filter_db",
    title="CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters",
    arxiv="2203.15331",
    year=2022,
    kind="analysis",
    tasks=("classify",),
    claims=(
        Claim(
            "degeneration",
            "Many public models contain degenerated 3x3 layers - sparse, low-diversity (low variance entropy), or "
            "random-like - and three label-free weight metrics expose them",
        ),
        Claim(
            "shift",
            "Distribution shift between sets of filters is small across tasks/visual categories and larger across "
            "depth and for special sets; measured by a weighted symmetric KL over PCA coefficients",
        ),
        Claim("dataset", "1.4 billion 3x3 filters from hundreds of trained CNNs, with metadata"),
    ),
)

Array = NDArray[np.float64]
BINS = 70
EMPTY = float(np.finfo(np.float32).eps)  # density of an empty bin
NEAR_ZERO = 0.01  # of the layer's largest weight: kernels below it count as zero
SPARSE = 0.5  # share of zero kernels from which a layer is called sparse
LOW_ENTROPY = 0.5  # share of the entropy of a random layer below which a layer is called low in variety
ENOUGH_KERNELS = 48
ENOUGH_TO_COMPARE = 1000  # kernels below which a group is left out of comparisons by depth


# ---------------------------------------------------------------------------------------------------------------------
# collecting


@dataclass(frozen=True)
class Layer:
    """Where some kernels come from.

    Attributes:
        model, name: of the network and, in it, of the convolution.
        depth: number of convolutions below it; depth_norm: the same from 0 (first) to 1 (last).
        shape: (out, in of a group) of the convolution; None where it is not known.
        start, stop: its rows in `Filters.kernels`.
        about: what else is known: task, category, training data ...
    """

    model: str
    name: str
    depth: int
    depth_norm: float
    shape: tuple[int, int] | None
    start: int
    stop: int
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Filters:
    """3x3 kernels with their origin. kernels: (N, 9) float32, plain; the rows of one layer are together."""

    kernels: NDArray[np.float32]
    layers: tuple[Layer, ...]

    def of(self, layer: Layer) -> NDArray[np.float32]:
        """(n, 9): the kernels of one layer."""
        return self.kernels[layer.start : layer.stop]

    def where(self, keep: Callable[[Layer], bool]) -> Filters:
        """Only the layers for which `keep` is true."""
        return _joined([(layer, self.of(layer)) for layer in self.layers if keep(layer)])

    def __add__(self, other: Filters) -> Filters:
        return _joined([(layer, f.of(layer)) for f in (self, other) for layer in f.layers])

    def save(self, path: str | Path) -> Path:
        """Keep as one safetensors file, whole or not at all."""
        with replacing(path) as new:
            save_file({"filters": self.kernels}, new, {"layers": json.dumps([asdict(layer) for layer in self.layers])})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Filters:
        """What `save` has kept.

        Raises:
            TrimtabError: when the file is not one.
        """
        try:
            with safe_open(path, "numpy") as f:
                kernels = f.get_tensor("filters")
                rows = json.loads(f.metadata()["layers"])
            layers = tuple(Layer(**row | {"shape": row["shape"] and tuple(row["shape"])}) for row in rows)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
            raise TrimtabError(f"{path} is not a file of filters: {e}") from e
        return cls(_checked(kernels, layers, path), layers)


def collect(model: nn.Module, *, name: str = "model", fold_bn: bool = False, **about: Any) -> Filters:
    """The kernels of all 3x3 convolutions of `model` (two-dimensional, not transposed); maybe none.

    Args:
        name: what the model is called in comparisons.
        fold_bn: scale each output channel as the batch norm after it does.
        **about: anything to remember of it, such as ``task="classify"``; JSON values.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8))
    >>> [(layer.name, layer.depth, layer.shape) for layer in collect(net).layers]
    [('0', 0, (8, 3)), ('2', 2, (8, 1))]
    """
    leaves = [
        (n, m) for n, m in model.named_modules() if not any(m.children()) and next(m.parameters(), None) is not None
    ]
    convs = [(i, n, m) for i, (n, m) in enumerate(leaves) if isinstance(m, nn.Conv2d)]
    total = sum(m.weight.numel() // math.prod(m.weight.shape[2:]) for _, _, m in convs)
    found: list[tuple[Layer, NDArray[np.float32]]] = []
    for depth, (i, conv, m) in enumerate(convs):
        w = m.weight.detach().float().cpu()
        if w.shape[2:] != (3, 3):
            continue
        after = leaves[i + 1][1] if i + 1 < len(leaves) else None
        if fold_bn and isinstance(after, nn.BatchNorm2d) and after.num_features == len(w):
            w = w * _scale(after)[:, None, None, None]
        layer = Layer(name, conv, depth, depth / max(1, len(convs) - 1), (w.shape[0], w.shape[1]), 0, 0, about)
        found.append((layer, w.reshape(-1, 9).numpy()))
    share = sum(len(rows) for _, rows in found) / max(1, total)
    return _joined([(Layer(**vars(layer) | {"about": {**about, "3x3_filter_share": share}}), w) for layer, w in found])


def read_h5(path: str | Path) -> Filters:
    """The published database, or a part of it: filters (N, 9), and pandas' table "meta".

    Columns of the table are in each layer's `about`. Needs the extra "analyze".

    Raises:
        MissingExtra: h5py is not installed.
        TrimtabError: when the file does not have this layout.
    """
    h5py = need("h5py", extra="analyze")
    try:
        with h5py.File(path, "r") as f:
            kernels = np.asarray(f["filters" if "filters" in f else "filter"], np.float32).reshape(-1, 9)
            index, columns = _fixed_table(f["meta"])
    except (OSError, KeyError, ValueError, pickle.UnpicklingError) as e:
        raise TrimtabError(f"{path} is not laid out as the filter database is: {e}") from e
    if "filter_ids" not in columns:
        raise TrimtabError(f"{path} has no column filter_ids, only {', '.join(columns)}")
    layers = []
    for row, ids in enumerate(columns["filter_ids"]):
        first, last = (int(part) for part in str(ids).split(":"))  # both belong to the layer
        about = {name: _plain(values[row]) for name, values in columns.items() if name != "filter_ids"}
        number, depth, norm = index[row]
        model = str(about.get("model") or about.get("Name") or number)
        layers.append(Layer(model, f"conv {int(depth)}", int(depth), float(norm), None, first, last + 1, about))
    return Filters(_checked(kernels, layers, path), tuple(layers))


# ---------------------------------------------------------------------------------------------------------------------
# distributions


def normalized(kernels: NDArray[Any]) -> Array:
    """Each kernel divided by its largest absolute entry; zeros stay zeros. (N, 9) -> (N, 9) in [-1, 1].

    >>> normalized(np.array([[0.0] * 9, [-2.0] + [1.0] * 8]))[:, :2].tolist()
    [[0.0, 0.0], [-1.0, 0.5]]
    """
    kernels = _rows(kernels)
    top = np.abs(kernels).max(axis=1, keepdims=True)
    return np.divide(kernels, top, out=np.zeros_like(kernels), where=top > 0)


@dataclass(frozen=True, eq=False)
class Basis:
    """Principal components of normalized kernels. mean (9,), components (9, 9) as rows, ratio (9,): explained variance.

    The ratios sum to one. The entry of largest size of each component is positive.
    """

    mean: Array
    components: Array
    ratio: Array

    @classmethod
    def fit(cls, kernels: NDArray[Any]) -> Basis:
        """From plain kernels (N, 9).

        >>> basis = Basis.fit(np.random.default_rng(0).normal(size=(1000, 9)))
        >>> round(float(basis.ratio.sum()), 6), basis.project(np.ones((1, 9))).shape
        (1.0, (1, 9))
        """
        x = normalized(kernels)
        mean = x.mean(axis=0)
        values, vectors = np.linalg.eigh((x - mean).T @ (x - mean) / max(1, len(x) - 1))
        values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1].T
        signs = np.sign(vectors[np.arange(9), np.abs(vectors).argmax(axis=1)])
        ratio = values / values.sum() if values.sum() > 0 else np.full(9, 1 / 9)
        return cls(mean, vectors * signs[:, None], ratio)

    def project(self, kernels: NDArray[Any]) -> Array:
        """Coefficients (N, 9) of plain kernels (N, 9)."""
        return (normalized(kernels) - self.mean) @ self.components.T


def drift(p: Array, q: Array, ratio: Array, *, span: tuple[float, float] | None = None, bins: int = BINS) -> float:
    """How far two sets of coefficients (N, K) and (M, K) are apart: the sum over components of ratio x symmetric KL.

    Natural logarithm; zero for equal sets, symmetric, no upper bound. It grows as sets get smaller: compare sets of
    equal size (`drifts`).

    Args:
        ratio: (K,) weights, the explained variance.
        span: range of the histograms, shared by all sets that are to be compared; by default that of the two.

    >>> x = np.random.default_rng(0).normal(size=(1000, 1))
    >>> drift(x, x, np.ones(1)), drift(x, x + 1, np.ones(1)) > 0.5
    (0.0, True)
    """
    p, q = np.atleast_2d(p), np.atleast_2d(q)
    low, high = span or (min(p.min(), q.min()), max(p.max(), q.max()))
    a, b = (_densities(x, low, high, bins) for x in (p, q))
    return float(np.asarray(ratio) @ ((a - b) * np.log(a / b)).sum(axis=1))


def drifts(
    groups: Mapping[str, Array],
    ratio: Array,
    *,
    bins: int = BINS,
    sample: int = 100_000,
    repeats: int = 3,
    seed: int = 0,
) -> Array:
    """Drift between all pairs of groups of coefficients (N_i, K): (G, G), symmetric, zero on the diagonal.

    All groups are compared on random samples of the same size, that of the smallest (at most `sample`); the mean over
    `repeats` of them is given.
    """
    for name, value in (("bins", bins), ("sample", sample), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")
    if any(len(x) == 0 for x in groups.values()):
        raise ValueError("groups must have at least one kernel each")
    sets = list(groups.values())
    out = np.zeros((len(sets), len(sets)))
    if len(sets) < 2:
        return out
    size = min(sample, *(len(x) for x in sets))
    low, high = min(x.min() for x in sets), max(x.max() for x in sets)
    rng = np.random.default_rng(seed)
    for _ in range(repeats):
        chosen = (x if len(x) == size else x[rng.choice(len(x), size, replace=False)] for x in sets)
        d = [_densities(x, low, high, bins) for x in chosen]
        for i in range(len(sets)):
            for j in range(i):
                out[i, j] += ratio @ ((d[i] - d[j]) * np.log(d[i] / d[j])).sum(axis=1) / repeats
    return out + out.T


# ---------------------------------------------------------------------------------------------------------------------
# the quality of one layer


def sparsity(weight: Any, *, eps: float = NEAR_ZERO) -> float:
    """Share of kernels all of whose entries are below `eps` times the layer's largest weight.

    One outlier makes everything else small: look at the histogram before you believe it.

    >>> sparsity(np.array([[1.0] * 9, [1e-3] * 9]))
    0.5
    """
    size = np.abs(_rows(weight))
    top = size.max(initial=0.0)
    return float((size < eps * top).all(axis=1).mean()) if top > 0 else 1.0


def variance_entropy(weight: Any, *, clean: bool = False, eps: float = NEAR_ZERO) -> float:
    """Entropy, to base 10, of the shares of variance along the principal axes of a layer's kernels: 0 to log10(9).

    Near zero where a few patterns repeat, near its maximum (0.954) where kernels are random.

    Args:
        weight: (out, in, 3, 3) or (n, 9). clean: leave out kernels that `sparsity` counts.

    >>> round(variance_entropy(np.random.default_rng(0).normal(size=(4096, 9))), 3)
    0.954
    """
    x = _rows(weight)
    if clean:
        size = np.abs(x)
        x = x[~(size < eps * size.max(initial=0.0)).all(axis=1)]
    if len(x) < 2:
        return 0.0
    centred = x - x.mean(axis=0)
    variance = np.linalg.svd(centred, compute_uv=False) ** 2
    if variance.sum() <= 1e-20 * (x * x).sum():
        return 0.0
    p = variance / variance.sum()
    p = p[p > 0]
    return float(max(0.0, -(p * np.log10(p)).sum()))


def random_entropy(kernels: int) -> float:
    """The least variance entropy of a layer of so many random kernels: a fit, good from about 48 kernels on.

    >>> [round(random_entropy(n), 4) for n in (9, 64, 256, 1024, 65536)]
    [0.5515, 0.9056, 0.9433, 0.9499, 0.9513]
    """
    if kernels < 1:
        raise ValueError(f"kernels must be a positive integer, got {kernels}")
    return 1.2618047 / (1 + math.exp(-0.88767525 * (math.log2(kernels) - 2.30436435))) - 0.31050834


def orthogonality(weight: Any) -> float:
    """1 - the mean absolute cosine between the weights of different output channels: 0 (all parallel) to 1.

    Args:
        weight: (out, in, 3, 3). NaN for one output channel.

    >>> orthogonality(np.eye(8).reshape(8, 8, 1, 1)), orthogonality(np.ones((8, 4, 3, 3))) < 1e-12
    (1.0, True)
    """
    w = np.asarray(weight.detach().cpu() if isinstance(weight, Tensor) else weight, float)
    w = w.reshape(len(w), -1)
    n = len(w)
    if n < 2:
        return math.nan
    length = np.linalg.norm(w, axis=1, keepdims=True)
    w = np.divide(w, length, out=np.zeros_like(w), where=length > 0)
    cosines = np.abs(w @ w.T)
    np.fill_diagonal(cosines, 0.0)
    return float(1 - cosines.sum() / (n * (n - 1)))


@dataclass(frozen=True)
class Quality:
    """The measures of one layer. degenerated: which of "sparse", "low entropy", "random" it is called.

    entropy_share is the entropy as a share of that of a random layer of as many kernels.
    """

    model: str
    layer: str
    depth_norm: float
    kernels: int
    sparsity: float
    entropy: float
    clean_entropy: float
    entropy_share: float
    orthogonality: float
    degenerated: tuple[str, ...]


def quality(filters: Filters, *, sparse: float = SPARSE, low_entropy: float = LOW_ENTROPY) -> list[Quality]:
    """The quality of every layer.

    Args:
        sparse: share of zero kernels from which a layer is called sparse.
        low_entropy: entropy share below which it is called low in entropy.
    """
    for name, value in (("sparse", sparse), ("low_entropy", low_entropy)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    found = []
    for layer in filters.layers:
        w = filters.of(layer)
        zeros, entropy, random = sparsity(w), variance_entropy(w), random_entropy(len(w))
        share = entropy / random if random > 0 else math.nan
        known = len(w) >= ENOUGH_KERNELS
        says = {"sparse": zeros >= sparse, "low entropy": known and share < low_entropy, "random": known and share >= 1}
        found.append(
            Quality(
                layer.model, layer.name, layer.depth_norm, len(w), zeros, entropy, variance_entropy(w, clean=True),
                share, orthogonality(w.reshape(*layer.shape, 3, 3)) if layer.shape else math.nan,
                tuple(what for what, true in says.items() if true),
            )
        )  # fmt: skip
    return found


# ---------------------------------------------------------------------------------------------------------------------
# everything at once


@dataclass(frozen=True, eq=False)
class FilterReport:
    """What `filters` found; plain JSON values by `asdict`.

    Attributes:
        models: name, kernels, layers, share of 3x3 among all kernels, and names of degenerated layers, of each model.
        quality: the measures of every layer.
        mean, components, ratio: the common principal basis, see `Basis`.
        edges: (bins + 1,) of the histograms; histograms: by model, (9, bins) densities of the coefficients.
        drift: (models, models) between models; depth, depth_drift: labels of deciles of depth, and drift among them.
    """

    models: list[dict[str, Any]]
    quality: list[Quality]
    mean: list[float]
    components: list[list[float]]
    ratio: list[float]
    edges: list[float]
    histograms: dict[str, list[list[float]]]
    drift: list[list[float]]
    depth: list[str]
    depth_drift: list[list[float]]

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def filters(
    *models: nn.Module | Filters | Mapping[str, nn.Module],
    fold_bn: bool = False,
    bins: int = BINS,
    sparse: float = SPARSE,
    low_entropy: float = LOW_ENTROPY,
    seed: int = 0,
) -> FilterReport:
    """Statistics of the 3x3 kernels of some models: common basis, coefficients, drift, and the quality of every layer.

    Args:
        *models: modules, mappings from names to modules, or `Filters`; several are compared.
        fold_bn: as in `collect`. bins: of the histograms. sparse, low_entropy: as in `quality`.
        seed: of the samples of equal size that are compared.

    Raises:
        ValueError: a model has no 3x3 convolution.

    >>> report = filters(nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)))
    >>> [(q.layer, q.degenerated) for q in report.quality]
    [('0', ('random',)), ('1', ('random',))]
    """
    if not models:
        raise ValueError("models must be at least one, got none")
    named: dict[str, Filters] = {}
    for model in models:
        for name, part in _named(model, len(named), len(models), fold_bn):
            if name in named:
                raise ValueError(f"models must have different names, got {name!r} twice")
            if not len(part.kernels):
                raise ValueError(f"{name} has no 3x3 convolution")
            named[name] = part
    everything = _joined([(layer, f.of(layer)) for f in named.values() for layer in f.layers])
    basis = Basis.fit(everything.kernels)
    coefficients = {name: basis.project(f.kernels) for name, f in named.items()}
    low, high = min(c.min() for c in coefficients.values()), max(c.max() for c in coefficients.values())
    edges = np.linspace(low, high, bins + 1)
    histograms = {n: [np.histogram(c, edges, density=True)[0].tolist() for c in x.T] for n, x in coefficients.items()}
    rows = quality(everything, sparse=sparse, low_entropy=low_entropy)
    depth = by_depth(everything, basis)
    return FilterReport(
        models=[
            {
                "name": name,
                "kernels": len(f.kernels),
                "layers": len(f.layers),
                "share_3x3": f.layers[0].about.get("3x3_filter_share"),
                "degenerated": [q.layer for q in rows if q.model in {x.model for x in f.layers} and q.degenerated],
            }
            for name, f in named.items()
        ],
        quality=rows,
        mean=basis.mean.tolist(),
        components=basis.components.tolist(),
        ratio=basis.ratio.tolist(),
        edges=edges.tolist(),
        histograms=histograms,
        drift=drifts(coefficients, basis.ratio, bins=bins, seed=seed).tolist(),
        depth=list(depth),
        depth_drift=drifts(depth, basis.ratio, bins=bins, seed=seed).tolist(),
    )


def by_depth(filters: Filters, basis: Basis, *, least: int = ENOUGH_TO_COMPARE) -> dict[str, Array]:
    """Coefficients by decile of depth; deciles with fewer than `least` kernels are left out."""
    groups: dict[int, list[Array]] = {}
    for layer in filters.layers:
        groups.setdefault(min(9, max(0, math.ceil(layer.depth_norm * 10 - 1e-9) - 1)), []).append(
            basis.project(filters.of(layer))
        )
    joined = {f"{k / 10:.1f}-{(k + 1) / 10:.1f}": np.concatenate(groups[k]) for k in sorted(groups)}
    return {name: c for name, c in joined.items() if len(c) >= least}


# ---------------------------------------------------------------------------------------------------------------------
# small parts


def _named(model: Any, before: int, count: int, fold_bn: bool) -> Iterable[tuple[str, Filters]]:
    if isinstance(model, nn.Module):
        name = "model" if count == 1 else f"model {before + 1}"
        return [(name, collect(model, name=name, fold_bn=fold_bn))]
    if isinstance(model, Filters):
        names = dict.fromkeys(layer.model for layer in model.layers)
        return [(n, model.where(partial(_is_of, n))) for n in names]
    if isinstance(model, Mapping):
        return [(str(n), collect(m, name=str(n), fold_bn=fold_bn)) for n, m in model.items()]
    raise ValueError(f"models must be modules, mappings from names to modules, or Filters, got {type(model).__name__}")


def _is_of(model: str, layer: Layer) -> bool:
    return layer.model == model


def _joined(parts: Sequence[tuple[Layer, NDArray[np.float32]]]) -> Filters:
    layers, start = [], 0
    for layer, rows in parts:
        layers.append(Layer(**vars(layer) | {"start": start, "stop": start + len(rows)}))
        start += len(rows)
    return Filters(np.concatenate([np.empty((0, 9), np.float32), *(rows for _, rows in parts)]), tuple(layers))


def _checked(kernels: NDArray[Any], layers: Sequence[Layer], path: str | Path) -> NDArray[np.float32]:
    if kernels.ndim != 2 or kernels.shape[1] != 9 or kernels.dtype.kind != "f":
        raise TrimtabError(f"{path}: filters must be floats (N, 9), got {kernels.dtype} {kernels.shape}")
    for layer in layers:
        if not 0 <= layer.start < layer.stop <= len(kernels):
            raise TrimtabError(
                f"{path}: rows {layer.start} to {layer.stop} of {layer.name} are not among {len(kernels)}"
            )
    return np.asarray(kernels, np.float32)


def _rows(weight: Any) -> Array:
    """Kernels as rows (n, 9), in double precision."""
    w = weight.detach().cpu().double().numpy() if isinstance(weight, Tensor) else np.asarray(weight, float)
    if w.shape[-2:] != (3, 3) and w.shape[-1] != 9:
        raise ValueError(f"kernels must be (..., 3, 3) or (n, 9), got shape {tuple(w.shape)}")
    return w.reshape(-1, 9)


def _densities(x: Array, low: float, high: float, bins: int) -> Array:
    """(K, bins): shares of each bin, where empty bins have a small density."""
    width = max(high - low, 1e-12) / bins
    edges = low + width * np.arange(bins + 1)
    edges[-1] = max(edges[-1], high)
    counts = np.stack([np.histogram(column, edges)[0] for column in x.T])
    density = counts / (len(x) * width)
    density[counts == 0] = EMPTY
    return density / density.sum(axis=1, keepdims=True)


def _scale(norm: nn.BatchNorm2d) -> Tensor:
    """What a batch norm multiplies each channel by at inference."""
    with torch.no_grad():
        scale = torch.ones(norm.num_features) if norm.weight is None else norm.weight.detach().float().cpu()
        return scale if norm.running_var is None else scale / (norm.running_var.float().cpu() + norm.eps).sqrt()


def _fixed_table(group: Any) -> tuple[list[tuple[Any, ...]], dict[str, list[Any]]]:
    """A data frame as pandas keeps it in HDF5 ("fixed" format): its index with three levels, and columns of values."""
    if "axis1_level2" not in group:
        raise KeyError(
            "meta must be a data frame in pandas' fixed format, with the index (model_id, depth, depth_norm)"
        )
    levels = [np.asarray(group[f"axis1_level{k}"]) for k in range(3)]
    codes = [np.asarray(group[f"axis1_label{k}"]) for k in range(3)]
    index = list(zip(*(level[code] for level, code in zip(levels, codes, strict=True)), strict=True))
    columns: dict[str, list[Any]] = {}
    for k in range(int(group.attrs["nblocks"])):
        node = group[f"block{k}_values"]
        words = node.dtype.kind == "O"
        block = _Words(io.BytesIO(np.asarray(node[0], np.uint8).tobytes())).load() if words else node[()]
        block = block if node.attrs.get("transposed") else block.T  # (rows, columns)
        for name, values in zip(group[f"block{k}_items"][()], block.T, strict=True):
            columns[name.decode()] = list(values)
    return index, columns


class _Words(pickle.Unpickler):
    """Knows arrays of words and numbers; a file that asks for anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        known = {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("multiarray", "scalar")}
        if module.split(".")[0] == "numpy" and (module.rsplit(".", 1)[-1], name) in known:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a table of words")


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
