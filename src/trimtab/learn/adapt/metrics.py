"""What the field measures on a stream: the table of accuracies R, and the numbers made of it; and of clusters.

``R[i][j]`` is the accuracy on the test images of task j after task i was learned. Lopez-Paz and Ranzato (2017) define
average accuracy, backward and forward transfer, Chaudhry et al. (2018) forgetting.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Row = list[float | None]  # accuracy by task; None: the task is not measured yet


@dataclass
class StreamResult:
    """What a method made of a stream.

    Attributes:
        method, kind: of the method, of the stream.
        model: the model after the last task: a plain module with a logit for every class of the data.
        accuracy: R, one row for each time that the method was measured (after every task; once, for joint training).
        learned: tasks learned at each row.
        images: test images of each task.
        before: accuracy on each task before anything was learned, where the stream allows to ask.
        seconds: time spent, over all lives of the run.
        details: what else the method noted.
    """

    method: str
    kind: str
    model: nn.Module
    accuracy: list[Row]
    learned: list[int]
    images: list[int]
    before: Row | None = None
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def average_accuracy(self) -> float:
        """Mean over tasks of the accuracy at the end."""
        return statistics.fmean(_known(self.accuracy[-1]))

    @property
    def last_accuracy(self) -> float:
        """A_last: share of all test images that are right at the end."""
        return self.so_far[-1]

    @property
    def incremental_accuracy(self) -> float | None:
        """A_inc: mean over the rows of `so_far`; None where there was one measurement. It is not the final accuracy."""
        return statistics.fmean(self.so_far) if self._by_task else None

    @property
    def so_far(self) -> list[float]:
        """At each row, the share of the test images of all tasks learned so far that are right."""
        shares = []
        for row, learned in zip(self.accuracy, self.learned, strict=True):
            n = self.images[:learned]
            shares.append(sum(a * m for a, m in zip(_known(row[:learned]), n, strict=True)) / sum(n))
        return shares

    @property
    def forgetting(self) -> float | None:
        """Mean over the earlier tasks of the best accuracy that they ever had minus the one at the end."""
        if not self._by_task or len(self.accuracy) < 2:
            return None
        end = len(self.accuracy) - 1
        return statistics.fmean(
            max(_known([self.accuracy[i][j] for i in range(j, end)])) - _number(self.accuracy[end][j])
            for j in range(end)
        )

    @property
    def backward_transfer(self) -> float | None:
        """Mean over the earlier tasks of the accuracy at the end minus that right after the task."""
        if not self._by_task or len(self.accuracy) < 2:
            return None
        last = self.accuracy[-1]
        return statistics.fmean(_number(last[j]) - _number(self.accuracy[j][j]) for j in range(len(self.accuracy) - 1))

    @property
    def forward_transfer(self) -> float | None:
        """Mean over the later tasks of the accuracy before they were learned minus that of the untouched model.

        None in class-incremental streams, where classes that did not come yet cannot be named.
        """
        if self.before is None or not self._by_task or len(self.accuracy) < 2:
            return None
        return statistics.fmean(
            _number(self.accuracy[j - 1][j]) - _number(self.before[j]) for j in range(1, len(self.accuracy))
        )

    @property
    def _by_task(self) -> bool:
        return self.learned == list(range(1, len(self.images) + 1))

    def asdict(self) -> dict[str, Any]:
        """Everything but the model, as JSON values."""
        numbers = ("average_accuracy", "last_accuracy", "incremental_accuracy", "forgetting", "backward_transfer",
                   "forward_transfer")  # fmt: skip
        return {
            "method": self.method, "kind": self.kind, "accuracy": self.accuracy, "learned": self.learned,
            "images": self.images, "before": self.before, "so_far": self.so_far, "seconds": self.seconds,
            **{name: getattr(self, name) for name in numbers}, **self.details,
        }  # fmt: skip


def match_clusters(found: Tensor, labels: Tensor, *, size: int | None = None) -> Tensor:
    """For each cluster the class that it stands for, one to one, such that most samples agree (Hungarian method).

    Args:
        found, labels: int64 (N,). size: how many of both there are, if more than are seen.

    >>> match_clusters(torch.tensor([0, 0, 1, 2]), torch.tensor([1, 1, 0, 2])).tolist()
    [1, 0, 2]
    """
    from scipy.optimize import linear_sum_assignment

    k = max(int(found.max()) + 1, int(labels.max()) + 1, size or 0)
    table = torch.bincount(found * k + labels, minlength=k * k).view(k, k)
    return torch.from_numpy(linear_sum_assignment(table.numpy(), maximize=True)[1])


def cluster_metrics(found: Tensor, labels: Tensor) -> dict[str, float]:
    """How well clusters (N,) agree with classes (N,), whatever their numbers.

    Returns:
        ``acc``, the share of samples that are right if each cluster is the class of `match_clusters`; ``nmi``,
        normalized mutual information (arithmetic mean); ``ari``, adjusted Rand index.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    return {
        "acc": float((match_clusters(found, labels)[found] == labels).double().mean()),
        "nmi": float(normalized_mutual_info_score(labels, found)),
        "ari": float(adjusted_rand_score(labels, found)),
    }


def _known(values: Sequence[float | None]) -> list[float]:
    return [_number(v) for v in values]


def _number(value: float | None) -> float:
    if value is None:
        raise ValueError("this accuracy was not measured")
    return value
