"""`ClassStatistics`: counts, means and covariances of features, class by class, in one pass over any parts of the data.

Only sums are kept, in float64: the order of samples does not matter, parts that were seen apart are added, and a class
is forgotten by dropping its sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KINDS = ("mean", "diag", "full")


class ClassStatistics:
    """Sums of features by class.

    Args:
        num_classes, dim: K and D.
        kind: "mean" keeps no second moments, "diag" those of every feature alone, "full" all of them.
        groups: features are cut into G groups of D / G; there are no moments between groups.
        dtype: of the sums. device: where they are.

    Attributes:
        count (K,), sum (K, G, d), second (K, G, d, d) or (K, G, d) or None.

    >>> a = ClassStatistics(2, 3)
    >>> a.update(torch.ones(4, 3), torch.tensor([0, 0, 0, 1]))
    >>> a.count.tolist(), a.mean()[1].tolist()
    ([3.0, 1.0], [[1.0, 1.0, 1.0]])
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        kind: str = "full",
        groups: int = 1,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if groups < 1 or dim % groups:
            raise ValueError(f"groups must divide the {dim} features, got {groups}")
        self.num_classes, self.dim, self.kind, self.groups = num_classes, dim, kind, groups
        d = dim // groups
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        self.count = torch.zeros(num_classes, **made)
        self.sum = torch.zeros(num_classes, groups, d, **made)
        shape = {"mean": None, "diag": (d,), "full": (d, d)}[kind]
        self.second = torch.zeros(num_classes, groups, *shape, **made) if shape is not None else None

    def update(self, features: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """Add features (B, D) with labels (B,), each counted as often as its weight (B,) says.

        Raises:
            ValueError: the shapes do not fit, or a label is none of the classes.
        """
        if features.ndim != 2 or features.shape[1] != self.dim or len(labels) != len(features):
            raise ValueError(f"features must be (B, {self.dim}) with a label each, got {tuple(features.shape)}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(f"labels must be 0 to {self.num_classes - 1}, got {labels.min()} to {labels.max()}")
        x = features.detach().to(self.sum).view(len(features), self.groups, -1)
        w = torch.ones_like(x[:, 0, 0]) if weight is None else weight.detach().to(self.sum)
        labels = labels.to(self.count.device)
        self.count.index_add_(0, labels, w)
        self.sum.index_add_(0, labels, x * w[:, None, None])
        if self.kind == "diag":
            self.second.index_add_(0, labels, x * x * w[:, None, None])  # type: ignore[union-attr]
        elif self.kind == "full":
            for c in labels.unique().tolist():
                mine = x[labels == c].transpose(0, 1)  # (G, n, d)
                self.second[c] += mine.mT @ (mine * w[labels == c, None])  # type: ignore[index]

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """The statistics of both parts together, as if they had been seen as one.

        Raises:
            ValueError: they do not describe the same features and classes.
        """
        if [self.num_classes, self.dim, self.kind, self.groups] != [
            other.num_classes,
            other.dim,
            other.kind,
            other.groups,
        ]:
            raise ValueError("only statistics of the same classes, features, kind and groups can be merged")
        both = ClassStatistics(
            self.num_classes, self.dim, kind=self.kind, groups=self.groups, dtype=self.sum.dtype, device=self.sum.device
        )
        for name, value in self.state_dict().items():
            getattr(both, name).copy_(value + other.state_dict()[name])
        return both

    def forget(self, label: int) -> None:
        """Drop a class, exactly as if it had never been seen."""
        for value in self.state_dict().values():
            value[label] = 0

    @property
    def known(self) -> list[int]:
        """The classes that were seen."""
        return self.count.nonzero().flatten().tolist()

    def mean(self) -> Tensor:
        """(K, G, d); zeros for a class that was not seen."""
        return self.sum / self.count.clamp(min=torch.finfo(self.count.dtype).tiny)[:, None, None]

    def covariance(self, label: int, *, ridge: float = 0.0, relative: float = 0.0) -> Tensor:
        """Unbiased covariance (G, d, d) of a class.

        Args:
            ridge: added to the diagonal. relative: the same, as a share of the mean variance of the group.

        Raises:
            ValueError: fewer than two samples were seen, or only means were kept.
        """
        if self.second is None:
            raise ValueError("kind='mean' keeps no covariance; use 'diag' or 'full'")
        n = float(self.count[label])
        if n < 2:
            raise ValueError(f"class {label} has {n:g} training images; a covariance needs at least 2")
        mean = self.sum[label] / n
        if self.kind == "diag":
            cov = torch.diag_embed((self.second[label] - n * mean * mean).clamp(min=0) / (n - 1))
        else:
            cov = (self.second[label] - n * mean[:, :, None] * mean[:, None, :]) / (n - 1)
        d = cov.shape[-1]
        level = ridge + relative * cov.diagonal(dim1=1, dim2=2).mean(1)  # (G,) or a number
        return cov + torch.as_tensor(level).to(cov).reshape(-1, 1, 1) * torch.eye(d).to(cov)

    def cholesky(self, label: int, *, ridge: float = 0.0, relative: float = 0.0) -> Tensor:
        """Lower triangular factor (G, d, d) of a covariance.

        Raises:
            ValueError: the covariance is singular; there are too few samples, or the ridge is too small.
        """
        factor, info = torch.linalg.cholesky_ex(self.covariance(label, ridge=ridge, relative=relative))
        if int(info.max()):
            raise ValueError(
                f"the covariance of class {label} is singular ({self.count[label]:g} training images, "
                f"{factor.shape[-1]} features); use a larger ridge"
            )
        return factor

    def whitening(self, *, ridge: float = 0.0, relative: float = 0.0) -> Tensor:
        """(K, G, d, d): W with W (x - mean) of unit covariance; zeros for classes that were not seen."""
        d = self.sum.shape[-1]
        out = self.sum.new_zeros(self.num_classes, self.groups, d, d)
        unit = torch.eye(d).to(out).expand(self.groups, d, d)
        for c in self.known:
            out[c] = torch.linalg.solve_triangular(self.cholesky(c, ridge=ridge, relative=relative), unit, upper=False)
        return out

    def pooled(self) -> ClassStatistics:
        """One class of all, with each class's own mean taken off: the statistics of a shared covariance."""
        if self.kind != "full" or self.second is None:
            raise ValueError(f"a shared covariance needs kind='full', got {self.kind!r}")
        shared = ClassStatistics(1, self.dim, kind="full", groups=self.groups, device=self.sum.device)
        mean = self.mean()
        inner = self.second - self.count[:, None, None, None] * mean[..., :, None] * mean[..., None, :]
        shared.count[0] = self.count.sum()
        shared.second[0] = inner.sum(0)  # type: ignore[index]
        return shared

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, by name."""
        kept = {"count": self.count, "sum": self.sum, "second": self.second}
        return {k: v for k, v in kept.items() if v is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])


def mahalanobis(features: Tensor, mean: Tensor, whitening: Tensor, *, chunk: int = 1024) -> Tensor:
    """Squared Mahalanobis distances (B, K, G) of features (B, D) to every class in every group.

    Args:
        mean: (K, G, d). whitening: (K, G, d, d), as `ClassStatistics.whitening` gives it, or (1, G, d, d), shared.
        chunk: samples that are looked at together.
    """
    k, g, d = mean.shape
    bias = torch.einsum("kgij,kgj->kgi", whitening.expand(k, -1, -1, -1), mean)
    rows = []
    for x in features.to(mean).view(len(features), g, d).split(chunk):
        white = torch.einsum("kgij,bgj->bkgi", whitening, x) - bias  # (B, K, G, d)
        rows.append(white.square().sum(-1))
    return torch.cat(rows)
