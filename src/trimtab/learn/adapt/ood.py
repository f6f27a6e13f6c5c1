"""Images of no known class: scores that tell them apart, and how well. Larger scores mean stranger, in all of them.

The usual scores after training: maximum softmax probability (Hendrycks and Gimpel 2017), energy (Liu et al. 2020),
distance to the k-th nearest training feature (Sun et al. 2022) and Mahalanobis distance to class Gaussians (Lee et al.
2018).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.errors import DataError
from trimtab.data import Data, Split
from trimtab.learn.adapt.statistics import ClassStatistics, mahalanobis
from trimtab.learn.adapt.streams import select
from trimtab.learn.evaluate import logits as logits_of
from trimtab.nn.features import FeatureExtractor

SCORES = ("msp", "energy", "knn", "mahalanobis", "mahalanobis_shared")


def msp(logits: Tensor) -> Tensor:
    """One minus the largest probability (B,) of logits (B, K)."""
    return 1 - logits.softmax(1).amax(1)


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Free energy (B,) of logits (B, K): -T log sum exp(logits / T).

    >>> round(float(energy(torch.zeros(1, 2))), 4)
    -0.6931
    """
    return -temperature * (logits / temperature).logsumexp(1)


def knn(features: Tensor, bank: Tensor, k: int = 50, *, chunk: int = 1024) -> Tensor:
    """Distance (B,) from normalised features (B, D) to the k-th nearest of a bank (N, D), normalised too."""
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be 1 to the {len(bank)} features of the bank, got {k}")
    bank = F.normalize(bank, dim=1)
    parts = [torch.cdist(F.normalize(x, dim=1), bank).kthvalue(k, dim=1).values for x in features.split(chunk)]
    return torch.cat(parts)


def class_distance(
    features: Tensor, statistics: ClassStatistics, *, relative: float = 1e-6, shared: bool = False
) -> Tensor:
    """Smallest squared Mahalanobis distance (B,) of features (B, D) to a class that was seen.

    Args:
        statistics: of training features, ``kind="full"``, one group.
        relative: ridge, as a share of the mean variance. shared: one covariance for all classes.
    """
    whitening = (statistics.pooled() if shared else statistics).whitening(relative=relative)
    known = statistics.known
    return mahalanobis(features, statistics.mean()[known], whitening if shared else whitening[known])[..., 0].amin(1)


def ood_metrics(known: Tensor, strange: Tensor) -> dict[str, float]:
    """How well scores tell strange images from known ones.

    Args:
        known, strange: scores (N,) and (M,) of images; larger means stranger.

    Returns:
        auroc: chance that a strange image has the larger score.
        aupr: average precision with strange as the positive class.
        fpr95: share of strange images that pass when 95 % of the known ones do; what most libraries report.
        fpr95_strange: share of known images that are stopped when 95 % of the strange ones are; what some codes, HVCM's
            among them, report under the same name.

    >>> m = ood_metrics(torch.tensor([0.1, 0.2, 0.3, 0.7]), torch.tensor([0.6, 0.8, 0.9, 1.0]))
    >>> m["auroc"], m["fpr95"], m["fpr95_strange"]
    (0.9375, 0.25, 0.25)
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    a, b = (np.asarray(v.detach().cpu(), np.float64) for v in (known, strange))
    if not len(a) or not len(b) or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(
            f"scores must be finite, and of at least one image each, got {len(a)} known and {len(b)} strange"
        )
    truth = np.r_[np.zeros(len(a)), np.ones(len(b))]
    both = np.r_[a, b]
    passes = np.sort(a)[max(0, int(np.ceil(0.95 * len(a))) - 1)]  # 95 % of the known images score at most this
    stops = np.sort(b)[::-1][max(0, int(np.ceil(0.95 * len(b))) - 1)]  # 95 % of the strange ones at least this
    return {
        "auroc": float(roc_auc_score(truth, both)),
        "aupr": float(average_precision_score(truth, both)),
        "fpr95": float((b <= passes).mean()),
        "fpr95_strange": float((a >= stops).mean()),
    }


def post_hoc(model: nn.Module, data: Data, *, k: int = 50, relative: float = 1e-6) -> dict[str, Callable[..., Tensor]]:
    """The usual scores of a trained classifier, each a function of (data, split) that gives scores (N,).

    Args:
        data: what it was trained on. k: neighbours. relative: ridge of the covariances.

    Raises:
        ValueError: by "mahalanobis": a class has a single training image, so that it has no covariance.
    """
    extractor = FeatureExtractor(model)
    bank, labels = extractor.of(data, "train")
    statistics = ClassStatistics(data.num_classes, bank.shape[1])
    statistics.update(bank, labels)

    def features(other: Data, split: str) -> Tensor:
        return extractor.of(other, split).values

    def logits(other: Data, split: str) -> Tensor:
        return logits_of(model, other, split)[0]

    near = min(k, len(bank))
    return {
        "msp": lambda other, split: msp(logits(other, split)),
        "energy": lambda other, split: energy(logits(other, split)),
        "knn": lambda other, split: knn(features(other, split), bank, near),
        "mahalanobis": lambda other, split: class_distance(features(other, split), statistics, relative=relative),
        "mahalanobis_shared": lambda other, split: class_distance(
            features(other, split), statistics, relative=relative, shared=True
        ),
    }


def compare(
    scores: Mapping[str, Callable[[Data, str], Tensor]], data: Data, strange: Mapping[str, Data], split: str = "test"
) -> dict[str, dict[str, dict[str, float]]]:
    """`ood_metrics` of every score on every set of strange images: ``table[score][set]``.

    Args:
        scores: functions of (data, split), as `post_hoc` gives them; add others by name.
        data: the known classes. strange: sets of images of other classes.
    """
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, score in scores.items():
        known = score(data, split)
        table[name] = {other: ood_metrics(known, score(d, split)) for other, d in strange.items()}
    return table


def hold_out(data: Data, classes: int | Sequence[int | str], *, seed: int = 0) -> tuple[Data, Data]:
    """The data without some classes, labels renumbered, and the images of those classes.

    Args:
        classes: which, by number or name, or how many of them, drawn by `seed`.

    Raises:
        ValueError: fewer than two classes would be left, or none taken; a name that no class has.

    >>> import trimtab as tt
    >>> known, unknown = hold_out(tt.load_data("digits"), [8, 9])
    >>> known.num_classes, unknown.class_names
    (8, ['8', '9'])
    """
    k = data.num_classes
    if isinstance(classes, int):
        if not 1 <= classes <= k - 2:
            raise ValueError(f"classes to hold out must be 1 to {k - 2} of the {k}, got {classes}")
        classes = sorted(np.random.RandomState(seed).permutation(k)[:classes].tolist())
    if isinstance(classes, str):
        classes = [classes]
    strange = [c for c in classes if isinstance(c, str) and c not in data.class_names]
    if strange:
        raise ValueError(f"no class is called {strange[0]!r}; the classes are {', '.join(data.class_names)}")
    taken = sorted({data.class_names.index(c) if isinstance(c, str) else c for c in classes})
    if not taken or len(taken) > k - 2 or not set(taken) <= set(range(k)):
        raise ValueError(f"classes to hold out must be 1 to {k - 2} of 0 to {k - 1}, got {list(classes)}")
    return select(data, [c for c in range(k) if c not in taken], relabel=True), select(data, taken, relabel=True)


def noise(data: Data, n: int = 500, *, seed: int = 0) -> Data:
    """Images of nothing, in the data's shape: uniform noise; a set that every score should tell apart."""
    g = np.random.default_rng([seed, 83])
    pixels = g.integers(0, 256, (n, data.in_chans, *data.size), dtype=np.uint8)
    images, labels = torch.from_numpy(pixels), torch.zeros(n, dtype=torch.long)
    return data.like(splits={"test": Split(images, labels)})


def strangers(data: Data, others: Mapping[str, Data]) -> dict[str, Data]:
    """Other data sets, prepared for a model as `data` are.

    Raises:
        DataError: their images have another shape.
    """
    made: dict[str, Any] = {}
    for name, other in others.items():
        if (other.in_chans, *other.size) != (data.in_chans, *data.size):
            raise DataError(
                f"{name} has images {(other.in_chans, *other.size)}, {data.name} {(data.in_chans, *data.size)}"
            )
        made[name] = other.like(mean=data.mean, std=data.std)
    return made
