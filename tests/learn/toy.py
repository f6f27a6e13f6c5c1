"""A tiny learnable data set with the loader contract of `trimtab.data`, and networks to go with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Rows:
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)


class Toy:
    """Three classes of noisy 1 x 8 x 8 patterns; batches depend on (seed, epoch, batch index) only."""

    task = "classify"
    num_classes = 3

    def __init__(self, train: int = 96, val: int = 48, noise: float = 0.7) -> None:
        g = torch.Generator().manual_seed(7)
        patterns = torch.randn(3, 1, 8, 8, generator=g)

        def rows(n: int) -> Rows:
            labels = torch.randint(3, (n,), generator=g)
            return Rows(patterns[labels] + noise * torch.randn(n, 1, 8, 8, generator=g), labels)

        self.splits = {"train": rows(train), "val": rows(val), "test": rows(val)}

    def loader(self, split: str, **options: Any) -> ToyLoader:
        return ToyLoader(self.splits[split], **options)


class ToyLoader:
    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        shuffle: bool = False,
        augment: Any = None,
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        device: Any = "cpu",
        skip: int = 0,
    ) -> None:
        n = len(rows)
        g = torch.Generator().manual_seed(1000 * seed + epoch)
        self.order = torch.randperm(n, generator=g) if shuffle else torch.arange(n)
        self.total = n // batch_size if drop_last else -(-n // batch_size)
        self.rows, self.batch_size, self.rank, self.world, self.skip = rows, batch_size, rank, world, skip

    def __len__(self) -> int:
        return max(0, self.total - self.skip)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for k in range(self.skip, self.total):
            rows = self.order[k * self.batch_size : (k + 1) * self.batch_size]
            b = len(rows)
            rows = rows[b * self.rank // self.world : b * (self.rank + 1) // self.world]
            yield {"image": self.rows.images[rows].clone(), "label": self.rows.labels[rows], "index": rows}


def net(seed: int = 0, *, norm: str = "batch", dropout: float = 0.0) -> nn.Sequential:
    """A four-layer CNN for `Toy`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norms = {"batch": nn.BatchNorm2d, "group": lambda c: nn.GroupNorm(2, c), "none": lambda c: nn.Identity()}[norm]
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), norms(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), norms(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(64, 3),
        )  # fmt: skip


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)
