"""`Data`: decoded, labelled images in splits, which makes loaders, subsets and summaries.

>>> from trimtab.data import load_data

>>> data = load_data("digits")
>>> data.num_classes, data.size, data.in_chans, {k: len(v) for k, v in data.splits.items()}
(10, (8, 8), 1, {'train': 1294, 'val': 144, 'test': 359})
>>> batch = next(iter(data.loader("train", batch_size=32, augment="auto")))
>>> batch["image"].shape, batch["label"].dtype
(torch.Size([32, 1, 8, 8]), torch.int64)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trimtab.data import splits as dividing
from trimtab.data.augment import Augment, Custom, parse_augment
from trimtab.data.decode import Images, View, pick
from trimtab.data.loader import Loader
from trimtab.data.sources import arrays

if TYPE_CHECKING:
    from trimtab.core.artifact import InputSpec


class Split:
    """Images and labels of one split.

    Attributes:
        images: uint8 (N, C, H, W): a tensor (in memory or memory-mapped), or something indexed like one by a tensor
            of rows (decoding as it goes).
        labels: int64 (N,).
        names: what each image is called in its source.
        mapped: the tensor is a file mapped into memory.
        targets: what else belongs to each image (masks, boxes); has `take`.
    """

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        names: Sequence[str] | None = None,
        *,
        mapped: bool = False,
        targets: Any = None,
    ) -> None:
        if len(images) != len(labels):
            raise ValueError(f"images and labels must be equally many, got {len(images)} and {len(labels)}")
        self.images, self.labels, self.mapped, self.targets = images, labels, mapped, targets
        self.names = names if names is not None else [str(i) for i in range(len(labels))]

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, rows: Tensor) -> Tensor:
        """uint8 (len(rows), C, H, W)."""
        return pick(self.images, rows)

    def image(self, i: int) -> Image.Image:
        """Image i as the model sees it, before normalisation."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"index must be below {len(self)}, got {i}")
        x = self.pixels(torch.tensor([i % len(self)]))[0].numpy()
        return Image.fromarray(x[0] if len(x) == 1 else np.ascontiguousarray(x.transpose(1, 2, 0)))

    def at(self, epoch: int) -> Split:
        """The split in an epoch; only made images are others each time."""
        return self

    def take(self, rows: Tensor) -> Split:
        """Only these rows; images in memory are copied, others are not."""
        in_memory = isinstance(self.images, Tensor) and not self.mapped
        images = self.images[rows] if in_memory else View(self.images, rows)
        targets = None if self.targets is None else self.targets.take(rows)
        return Split(images, self.labels[rows], [self.names[i] for i in rows.tolist()], targets=targets)

    def counts(self, num_classes: int) -> list[int]:
        return torch.bincount(self.labels, minlength=num_classes).tolist()


class Data:
    """A data set ready to learn from.

    Attributes:
        num_classes, class_names: labels are positions in class_names.
        size: (H, W) of every image after decoding. in_chans: 1 or 3.
        mean, std: per channel, of the train split, in 0..1 units.
        splits: "train", "val" (unless val=0) and "test".
        warnings: what a user should know about the data, one sentence each.
        skipped: (name, reason) of every image that could not be read.
    """

    task = "classify"

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Split],
        class_names: Sequence[str],
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        warnings: Sequence[str] = (),
        skipped: Sequence[tuple[str, str]] = (),
    ) -> None:
        if "train" not in splits:
            raise ValueError(f"splits must have 'train', got {sorted(splits)}")
        self.name, self.splits, self.class_names = name, dict(splits), list(class_names)
        self.warnings, self.skipped = list(warnings), list(skipped)
        _, self.in_chans, h, w = splits["train"].images.shape
        self.size: tuple[int, int] = (int(h), int(w))
        if mean is None or std is None:
            mean, std = _moments(splits["train"])
        self.mean, self.std = mean, std

    @classmethod
    def from_arrays(
        cls,
        train: tuple[Any, Any],
        *,
        val: tuple[Any, Any] | None = None,
        test: tuple[Any, Any] | None = None,
        class_names: Sequence[str] | None = None,
        name: str = "arrays",
    ) -> Data:
        """From (images, labels) in memory; images uint8 (N, C, H, W) or (N, H, W), arrays or tensors.

        Splits that are not given are made as in `load_data`.
        """
        given = {k: v for k, v in (("train", train), ("val", val), ("test", test)) if v is not None}
        ready = {k: (_pixels(x), np.asarray(y, np.int64)) for k, (x, y) in given.items()}
        top = max(int(y.max(initial=0)) for _, y in ready.values())
        names = list(class_names) if class_names is not None else [str(k) for k in range(top + 1)]
        for split, (x, y) in ready.items():
            if len(x) != len(y) or y.ndim != 1:
                raise ValueError(f"{split} needs a label per image, got {len(x)} images, labels of shape {y.shape}")
            if y.min(initial=0) < 0 or y.max(initial=0) >= len(names):
                raise ValueError(f"{split} labels must be 0 to {len(names) - 1}, got {y.min()} to {y.max()}")
        from trimtab.data.load import build

        return build(arrays(name, ready, names), cache="memory")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def spec(self) -> InputSpec:
        """What a model of this data is fed."""
        from trimtab.core.artifact import InputSpec

        return InputSpec((self.in_chans, *self.size), self.mean, self.std, self.task)

    def loader(
        self,
        split: str = "train",
        *,
        batch_size: int = 128,
        shuffle: bool | None = None,
        augment: str | Callable[[Tensor, torch.Generator], Tensor] | Augment | None = None,
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool | None = None,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
        skip: int = 0,
        raw: bool = False,
    ) -> Loader:
        """Batches ``{"image": (B, C, H, W), "label": (B,), "index": (B,)}`` of one epoch.

        Batch k depends on nothing but seed, epoch and k: resume with `skip`, and the batches are the same bits.

        Args:
            batch_size: of all processes together.
            shuffle: None: only "train".
            augment: words of `parse_augment`, "auto", a function of (uint8 images (B, C, H, W), generator), or None.
            drop_last: leave out the last, smaller batch; None: when shuffling and there is a full one.
            rank, world: this process gets its slice of every batch; the slices together are the whole batch. The
                slices of a last, smaller batch may be empty.
            skip: start at this batch.
            raw: uint8 images, not normalised.

        >>> from trimtab.data import load_data
        >>> data = load_data("digits")
        >>> a, b = (list(data.loader("train", batch_size=64, augment="auto", skip=k)) for k in (0, 5))
        >>> bool((a[5]["image"] == b[0]["image"]).all())
        True
        """
        if split not in self.splits:
            raise ValueError(f"split must be one of {', '.join(self.splits)}, got {split!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"rank must be 0 to world - 1, got rank {rank} of world {world}")
        if batch_size % world:
            raise ValueError(f"batch_size must be a multiple of world ({world}), got {batch_size}")
        for name, value in (("skip", skip), ("seed", seed), ("epoch", epoch)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        shuffle = split == "train" if shuffle is None else shuffle
        if drop_last is None:
            drop_last = shuffle and len(self.splits[split]) >= batch_size
        return self._loader(
            self.splits[split], batch_size=batch_size, mean=self.mean, std=self.std, shuffle=shuffle,
            augment=self._augment(augment), seed=seed, epoch=epoch, drop_last=drop_last, rank=rank, world=world,
            device=device, skip=skip, raw=raw,
        )  # fmt: skip

    def auto_augment(self) -> str:
        """What augment="auto" means here: no mirroring of grey pictures, digits and letters; boxes cut when large."""
        signs = all(len(n) == 1 for n in self.class_names)
        if self.in_chans == 1 or signs:
            return "crop"
        return "rrc=0.35+flip" if min(self.size) >= 96 else "crop_flip"

    def subset(self, sizes: int | Mapping[str, int], seed: int = 0) -> Data:
        """A stratified part: at most so many images in every split, or in the splits named. mean and std stay.

        >>> from trimtab.data import load_data
        >>> {k: len(v) for k, v in load_data("digits").subset({"train": 100, "test": 50}).splits.items()}
        {'train': 100, 'val': 144, 'test': 50}
        """
        wanted = dict.fromkeys(self.splits, sizes) if isinstance(sizes, int) else dict(sizes)
        for split, n in wanted.items():
            if split not in self.splits:
                raise ValueError(f"sizes must name splits among {', '.join(self.splits)}, got {split!r}")
            if n < 1:
                raise ValueError(f"a subset must have at least 1 image, got {n} for {split}")
        parts = dict(self.splits)
        for split, n in wanted.items():
            whole = parts[split]
            if n < len(whole):
                parts[split] = whole.take(torch.from_numpy(dividing.choose(whole.labels.numpy(), n, seed)))
        return self.like(splits=parts)

    def like(
        self,
        *,
        splits: Mapping[str, Split] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> Self:
        """The same data with other splits, or normalised in another way."""
        other = copy.copy(self)
        other.splits = dict(self.splits if splits is None else splits)
        other.mean, other.std = mean or self.mean, std or self.std
        return other

    def summary(self) -> dict[str, Any]:
        """Plain values, as in the report and in run.json."""
        return {
            "name": self.name, "task": self.task, "num_classes": self.num_classes, "class_names": self.class_names,
            "size": list(self.size), "in_chans": self.in_chans,
            "mean": [round(m, 4) for m in self.mean], "std": [round(s, 4) for s in self.std],
            "counts": {k: len(v) for k, v in self.splits.items()},
            "skipped": [list(s) for s in self.skipped], "warnings": self.warnings,
        }  # fmt: skip

    def __repr__(self) -> str:
        counts = ", ".join(f"{k} {len(v)}" for k, v in self.splits.items())
        kind = "grey" if self.in_chans == 1 else "colour"
        classes = f"{self.num_classes} classes, " if self.num_classes else ""
        return f"{type(self).__name__}({self.name}: {classes}{self.size[1]}x{self.size[0]} {kind}, {counts})"

    def _loader(self, split: Split, **options: Any) -> Loader:
        return Loader(split, **options)

    def _augment(self, augment: Any) -> Any:
        if isinstance(augment, Augment):
            return augment
        if augment is None:
            return Augment([])
        if isinstance(augment, str):
            return parse_augment(self.auto_augment() if augment == "auto" else augment)
        if callable(augment):
            return Augment([Custom(augment)], "custom")
        raise ValueError(f"augment must be words, a function or None, got {augment!r}")


def class_weights(split: Split, num_classes: int) -> Tensor:
    """float32 (num_classes,): inversely proportional to class size, so that the mean over the split's images is 1.

    >>> class_weights(Split(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 0, 0, 1])), 2).tolist()
    [0.6666666865348816, 2.0]
    """
    counts = torch.bincount(split.labels, minlength=num_classes).float()
    return len(split) / (counts.clamp(min=1) * (counts > 0).sum())


def _moments(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel in 0..1 units, of at most 10,000 evenly spaced images."""
    rows = torch.from_numpy(np.unique(np.linspace(0, len(split) - 1, min(len(split), 10_000)).astype(np.int64)))
    c = split.images.shape[1]
    total, square, count = torch.zeros(c, dtype=torch.float64), torch.zeros(c, dtype=torch.float64), 0
    for part in rows.split(256):
        x = split.pixels(part).transpose(0, 1).reshape(c, -1).float() / 255
        total += x.sum(1).double()
        square += (x * x).sum(1).double()
        count += x.shape[1]
    mean = total / count
    std = (square / count - mean * mean).clamp(min=0).sqrt().clamp(min=1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())


def _pixels(x: Any) -> np.ndarray:
    x = x.numpy() if isinstance(x, Tensor) else np.asarray(x)
    x = x[:, None] if x.ndim == 3 else x
    if x.ndim != 4 or x.dtype != np.uint8 or x.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 (N, C, H, W) with 1 or 3 channels, got {x.dtype} {x.shape}")
    return x
