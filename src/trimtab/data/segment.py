"""Segmentation: a class for every pixel.

>>> from trimtab.data import load_data
>>> data = load_data("scenes:classes=3,size=32,n=60", task="segment")
>>> data.class_names, {k: len(v) for k, v in data.splits.items()}
(['background', 'circle', 'square', 'triangle'], {'train': 43, 'val': 5, 'test': 12})
>>> batch = next(iter(data.loader("train", batch_size=8, augment="auto")))
>>> batch["image"].shape, batch["label"].shape, batch["label"].dtype
(torch.Size([8, 3, 32, 32]), torch.Size([8, 32, 32]), torch.int64)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from trimtab.core.errors import DataError
from trimtab.data import folders, parquet
from trimtab.data.dataset import Data, Split
from trimtab.data.decode import Skipped, decode_splits
from trimtab.data.images import VOID
from trimtab.data.loader import Batch, normalise
from trimtab.data.sources import Arrays, Items, Reader, Source, made_scenes, printable
from trimtab.data.views import SampleLoader, Views, color, flip, none, parse_views

ACCEPTED = (
    "'scenes:classes=5,size=48,n=300', a folder with images/ and masks/ (same names; or train/val/test folders of "
    "those), or parquet in Hugging Face layout with the columns image and annotation, here or on the hub "
    "('owner/name'); for volumes 'volumes:n=40,size=32', or a folder of .npz or NIfTI files"
)
_MASKS = ("masks", "annotations", "labels")
_COLUMNS = ("annotation", "mask", "label", "segmentation")


class SegmentData(Data):
    """Pictures with a mask each. ``labels`` of its splits are zeros; the masks are their ``targets``.

    Attributes:
        void: indices in the masks that count as no class, besides 255.
    """

    task = "segment"

    def __init__(self, *args: Any, table: Tensor, void: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table, self.void = table, void  # table: int64 (256,), from what masks hold to labels

    def auto_augment(self) -> str:
        """What augment="auto" means here."""
        return "crop+flip"

    def labels(self, split: str, rows: Tensor) -> Tensor:
        """int64 (len(rows), H, W): positions in class_names, `VOID` where there is none."""
        return self.table[self.splits[split].targets.pixels(rows)[:, 0].long()]

    def _augment(self, augment: Any) -> Views:
        return parse_views(self.auto_augment() if augment == "auto" else augment, _WORDS, self.size, self.mean)

    def _loader(self, split: Split, **options: Any) -> SampleLoader:
        return SegmentLoader(split, table=self.table, **options)


class SegmentLoader(SampleLoader):
    """``{"image": (B, C, H, W), "label": (B, H, W) int64, "index": (B,)}``; 255 where no class counts."""

    def __init__(self, split: Split, *, table: Tensor, **options: Any) -> None:
        super().__init__(split, **options)
        self.table = table

    def made(self, rows: Tensor) -> Batch:
        images, masks = self.split.pixels(rows), self.split.targets.pixels(rows)
        if self.augment.steps:
            size = images.shape[2:]
            for k, row in enumerate(rows.tolist()):
                sample = {"image": tv_tensors.Image(images[k]), "mask": tv_tensors.Mask(masks[k])}
                sample = self.view(sample, row)
                image, mask = (sample[name].as_subclass(Tensor) for name in ("image", "mask"))
                if image.shape[1:] != size or mask.shape[1:] != size:
                    got = f"{tuple(image.shape[1:])} and {tuple(mask.shape[1:])}"
                    raise ValueError(f"augment must give pictures and masks of size {tuple(size)}, got {got}")
                images[k], masks[k] = image, mask
        label = self.table[masks[:, 0].long()]
        return {"image": images if self.raw else normalise(images, self.mean, self.std), "label": label}


def _crop(value: float | None, size: tuple[int, int], fill: Any) -> list[Any]:
    """Larger or smaller by a random factor, then a window of the size of the pictures."""
    low = 0.7 if value is None else value
    if not 0 < low <= 1:
        raise ValueError(f"crop takes the smallest scale, above 0 and at most 1, got {value}")
    jitter = v2.ScaleJitter(size, scale_range=(low, 1 / low), antialias=True)
    return [jitter, v2.RandomCrop(size, pad_if_needed=True, fill=fill)]


_WORDS = {"none": none, "flip": flip, "crop": _crop, "color": color}


# --------------------------------------------------------------------------------------------------------------- source


def find(spec: str | os.PathLike[str]) -> Source:
    """Pictures whose `targets` are masks. Class names are empty where the source has none.

    Raises:
        DataError: saying what would be accepted, or what is wrong with what was found.
    """
    text, path = os.fspath(spec), Path(os.fspath(spec)).expanduser()
    if text == "scenes" or text.startswith("scenes:"):
        return _scenes(text)
    tables = parquet.find_tables(text)
    if tables is not None:
        return _tables(*tables)
    if path.is_dir():
        return _folder(path)
    raise DataError(f"data for task 'segment' must be {ACCEPTED}; got {text!r}")


def _scenes(text: str) -> Source:
    got = made_scenes(text)
    count = len(got.images)
    names = [f"scenes/{i}" for i in range(count)]
    pictures = Items(Arrays(got.images), np.arange(count), np.zeros(count, np.int64), names, "stretch")
    pictures.targets = _masks(pictures, Arrays(got.masks[:, None]), pictures.rows)
    return Source("scenes", {"train": pictures}, ["background", *got.names])


def _tables(name: str, found: dict[str, Any], warnings: list[str]) -> Source:
    splits: dict[str, Items] = {}
    class_names: list[str] = []
    for split, table in found.items():
        column = table.column("annotation (masks)", _COLUMNS)
        pictures = splits[split] = table.pictures(taken=_COLUMNS)
        pictures.targets = _masks(pictures, table.reader(column), pictures.rows)
        if sum(pictures.targets.reader.lengths) != len(pictures):
            raise DataError(f"{name}: {split} has {len(pictures)} pictures but another number of masks")
        class_names = class_names or table.class_names(column)
    return Source(name, splits, class_names, warnings)


def _folder(root: Path) -> Source:
    """root/images and root/masks, or train/, val/ and test/ folders of those; classes.txt names the classes."""
    splits, warnings, skipped = {}, [], []
    for split, here in folders.split_folders(root).items():
        masks = next((here / m for m in _MASKS if (here / m).is_dir()), None)
        if masks is None or not (here / "images").is_dir():
            raise DataError(f"{here} has no folders images/ and masks/; data for task 'segment' must be {ACCEPTED}")
        pictures, answers = folders.files(here / "images"), folders.files(masks)
        where = {_stem(name): k for k, name in enumerate(answers.names)}
        pairs = [(i, where.get(_stem(name), -1)) for i, name in enumerate(pictures.names)]
        names = [f"{split}/{printable(name)}" for name in pictures.names]
        skipped += [(names[i], f"no mask of its name in {masks.name}/") for i, k in pairs if k < 0]
        rows, partners = (np.asarray([p[j] for p in pairs if p[1] >= 0], np.int64) for j in (0, 1))
        if not len(rows):
            raise DataError(f"{here}: no picture in images/ has a mask of the same name in {masks.name}/")
        if len(answers.names) > len(rows):
            warnings.append(f"{len(answers.names) - len(rows)} masks of {split} belong to no picture")
        items = splits[split] = Items(
            pictures, rows, np.zeros(len(rows), np.int64), [names[i] for i in rows.tolist()], "stretch"
        )
        items.targets = _masks(items, answers, partners)
    return Source(root.resolve().name, splits, _listed(root / "classes.txt"), warnings, skipped)


def _masks(pictures: Items, reader: Reader, rows: np.ndarray) -> Items:
    """The masks of some pictures; each has its picture for a target, whose size it must have."""
    bare = Items(pictures.reader, pictures.rows, pictures.labels, pictures.names)
    return Items(reader, rows, pictures.labels, pictures.names, "mask", bare)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _listed(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [printable(line.strip()) for line in lines if line.strip()]


# ---------------------------------------------------------------------------------------------------------------- build


class Builder:
    """What `load.build` asks of a task: the targets of decoded pictures, and the data in the end."""

    def __init__(self, *, void: int | Sequence[int] | None, class_names: Sequence[str] | None) -> None:
        self.void, self.class_names = void_of(void), class_names
        self.top = -1  # the largest index in any mask

    def targets(
        self, source: Source, items: dict[str, Items], size: tuple[int, int], cache: str | os.PathLike[str]
    ) -> tuple[dict[str, Split], dict[str, Skipped]]:
        """The masks of every split, and the rows whose masks cannot be used."""
        if self.class_names is not None:
            source.class_names = list(self.class_names)
        names = source.class_names
        masks, bad, how = decode_splits({s: i.targets for s, i in items.items()}, size, 1, cache)
        out = {}
        for s, its in items.items():
            out[s] = Split(masks[s], torch.from_numpy(its.labels), its.names, mapped=how == "disk")
            unusable = {i for i, _ in bad[s]}
            for i, seen in enumerate(_present(out[s])):
                if i in unusable:
                    continue
                real = [c for c in seen if c != VOID and c not in self.void]
                self.top = max([self.top, *(c for c in real if not names or c < len(names))])
                if names and any(c >= len(names) for c in real):
                    bad[s].append((i, f"class {max(real)} in its mask is none of the {len(names)} classes"))
                elif not real:
                    bad[s].append((i, "every pixel of its mask is void"))
        return out, bad

    def finish(self, source: Source, splits: dict[str, Split], **more: Any) -> SegmentData:
        names = source.class_names or [str(i) for i in range(self.top + 1)]
        seen = {c for classes in _present(splits["train"].targets) for c in classes}
        table, names = class_table(source.name, names, self.void, seen, more["warnings"])
        return SegmentData(source.name, splits, names, table=table, void=self.void, **more)


def void_of(void: int | Sequence[int] | None) -> tuple[int, ...]:
    """The indices that count as no class. Raises ValueError."""
    given = () if void is None else (void,) if isinstance(void, int) else tuple(void)
    if not all(isinstance(v, int) and 0 <= v <= 255 for v in given):
        raise ValueError(f"void must be class indices from 0 to 255, got {void}")
    return given


def class_table(
    source: str, names: Sequence[str], void: tuple[int, ...], seen: set[int], warnings: list[str]
) -> tuple[Tensor, list[str]]:
    """From what masks hold to labels, int64 (256,), and the names of the classes that are left.

    Args:
        names: by what masks hold. seen: what masks for training hold.

    Raises:
        DataError: fewer than two are left.
    """
    kept = [i for i in range(len(names)) if i not in void]
    if len(kept) < 2:
        raise DataError(f"{source}: masks have a single class besides void; at least two are needed")
    table = torch.full((256,), VOID, dtype=torch.int64)
    table[kept] = torch.arange(len(kept))
    absent = sorted(set(kept) - seen)
    if absent:
        shown = ", ".join(names[i] for i in absent[:5])
        warnings.append(f"classes without training pixels: {shown}{', ...' if len(absent) > 5 else ''}")
    return table, [names[i] for i in kept]


def _present(masks: Split) -> list[list[int]]:
    """The class indices in each mask."""
    out: list[list[int]] = []
    for rows in torch.arange(len(masks)).split(256):
        for mask in masks.pixels(rows).numpy():
            out.append(np.flatnonzero(np.bincount(mask.reshape(-1), minlength=256)).tolist())
    return out
