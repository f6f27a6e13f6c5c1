"""Restoration: pictures, and what is left of them. Here: small pictures that are to become large (super-resolution).

The pictures of the source are the truth; the small ones are made from them as the field does it (`nn.resize`): cut to
a multiple of the scale, anti-aliased cubic, rounded to 8 bits. Pictures keep their sizes: training sees random patches
of them, evaluation sees them whole, one at a time.

>>> from trimtab.data import load_data
>>> data = load_data("scenes:size=48,n=20", task="restore", scale=2, patch=12)
>>> batch = next(iter(data.loader("train", batch_size=8, augment="auto")))
>>> batch["image"].shape, batch["high"].shape
(torch.Size([8, 3, 12, 12]), torch.Size([8, 3, 24, 24]))
>>> next(iter(data.loader("test")))["high"].shape
torch.Size([1, 3, 48, 48])
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trimtab.core.errors import DataError
from trimtab.data import folders, parquet
from trimtab.data.augment import read_words
from trimtab.data.dataset import Data, Split
from trimtab.data.decode import Progress, for_each, memory_cap
from trimtab.data.images import Unreadable, open_image, picture_pixels, upright_size
from trimtab.data.loader import Batch
from trimtab.data.sources import Arrays, Items, Source, made_scenes, printable
from trimtab.data.views import SampleLoader, Views, seeded
from trimtab.nn.resize import crop_to_multiple, downscale

ACCEPTED = (
    "'scenes:size=48,n=300', a folder of pictures (or train/val/test folders of them), or parquet with a column image, "
    "here or on the Hugging Face hub ('owner/name')"
)
WORDS = ("none", "flip", "turn")
Pair = tuple[np.ndarray, np.ndarray]  # uint8 (C, H, W) and (C, sH, sW)


class Pictures:
    """Pairs of low and high pictures, kept in memory, or made again whenever they are used."""

    def __init__(self, items: Items, scale: int, in_chans: int, keep: bool) -> None:
        self.items, self.scale, self.in_chans = items, scale, in_chans
        self._kept: dict[int, Pair] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self.items)

    def pair(self, i: int) -> Pair:
        """Raises Unreadable or OSError."""
        if self._kept is not None and i in self._kept:
            return self._kept[i]
        pair = _pair(picture_pixels(open_image(self.items.read(i)), self.in_chans), self.scale)
        if self._kept is not None:
            self._kept[i] = pair
        return pair


class RestoreSplit(Split):
    """Pictures of one split; in train, a row is a patch somewhere in a picture.

    Args:
        patch: side of the low-resolution patches, None for whole pictures. An epoch has as many patches of a picture
            as fit into it side by side.
        sizes: (h, w) of the low-resolution pictures.
    """

    def __init__(self, pictures: Pictures, which: Tensor, sizes: Sequence[tuple[int, int]], patch: int | None) -> None:
        self.pictures, self.which, self.sizes, self.patch = (
            pictures,
            which,
            list(sizes),
            patch,
        )  # which: rows in pictures
        counts = [max(1, (h // patch) * (w // patch)) if patch else 1 for h, w in self.sizes]
        self.picture_of = torch.repeat_interleave(torch.arange(len(which)), torch.tensor(counts, dtype=torch.int64))
        self.labels, self.mapped, self.targets = torch.zeros(len(self.picture_of), dtype=torch.int64), False, None
        self.names = [pictures.items.names[i] for i in which.tolist()]

    def pair(self, i: int) -> Pair:
        """Picture i, low and high: uint8 (C, h, w) and (C, s h, s w)."""
        place = int(self.which[i])
        try:
            return self.pictures.pair(place)
        except (Unreadable, OSError) as e:  # it could be read when the data was loaded
            raise DataError(f"{self.names[i]} can no longer be read: {e}") from e

    def image(self, i: int) -> Image.Image:
        """The low-resolution picture i."""
        return _picture(self.pair(range(len(self.which))[i])[0])

    def high(self, i: int) -> Image.Image:
        """The high-resolution picture i."""
        return _picture(self.pair(range(len(self.which))[i])[1])

    def take(self, rows: Tensor) -> RestoreSplit:
        """The pictures of these rows."""
        keep = torch.unique(self.picture_of[rows])
        return RestoreSplit(self.pictures, self.which[keep], [self.sizes[i] for i in keep.tolist()], self.patch)


class RestoreData(Data):
    """Pictures in low and high resolution.

    Attributes:
        scale: how much larger the high-resolution picture is on a side.
        patch: side of the low-resolution patches that training sees; ``size`` is (patch, patch).
        in_chans: 3 for RGB, 1 for the studio luma Y of BT.601. mean, std: 0 and 1, for pictures are fed in [0, 1].
    """

    task = "restore"

    def __init__(
        self, name: str, splits: dict[str, RestoreSplit], *, scale: int, patch: int, in_chans: int,
        warnings: list[str], skipped: list[tuple[str, str]],
    ) -> None:  # fmt: skip
        self.name, self.splits, self.class_names = name, dict(splits), []  # type: ignore[assignment]
        self.scale, self.patch, self.size, self.in_chans = scale, patch, (patch, patch), in_chans
        self.mean, self.std = (0.0,) * in_chans, (1.0,) * in_chans
        self.warnings, self.skipped = warnings, skipped

    def auto_augment(self) -> str:
        """What augment="auto" means here."""
        return "flip+turn"

    def subset(self, sizes: Any, seed: int = 0) -> RestoreData:
        """At most so many pictures in every split, or in the splits named."""
        wanted = dict.fromkeys(self.splits, sizes) if isinstance(sizes, int) else dict(sizes)
        parts = dict(self.splits)
        for split, n in wanted.items():
            if split not in self.splits or n < 1:
                raise ValueError(f"sizes must be 1 or more, of {', '.join(self.splits)}, got {split!r}: {n}")
            whole: Any = self.splits[split]
            rows = np.random.default_rng([seed, 1618]).permutation(len(whole.which))[:n]
            parts[split] = whole.take(torch.isin(whole.picture_of, torch.from_numpy(rows)).nonzero()[:, 0])
        return self.like(splits=parts)

    def summary(self) -> dict[str, Any]:
        return {**super().summary(), "scale": self.scale}

    def _augment(self, augment: Any) -> Views:
        if isinstance(augment, Views):
            return augment
        if augment is not None and not isinstance(augment, str):
            raise ValueError(f"augment must be made of {', '.join(WORDS)} joined by '+', or 'auto', got {augment!r}")
        words = (self.auto_augment() if augment == "auto" else augment or "none").lower().split("+")
        names = [name for name, _ in read_words([w.strip() for w in words], WORDS)]
        return Views([step for name in names for step in _STEPS[name]], "+".join(names))

    def _loader(self, split: Split, **options: Any) -> SampleLoader:
        if not split.patch:  # type: ignore[attr-defined]
            options["batch_size"] = options["world"]  # pictures differ in size: one at a time for each process
        return RestoreLoader(split, **options)


class RestoreLoader(SampleLoader):
    """``{"image": (B, C, H, W), "high": (B, C, sH, sW), "index": (B,)}``, in [0, 1]; whole pictures one at a time."""

    split: RestoreSplit

    def made(self, rows: Tensor) -> Batch:
        low: list[Tensor] = []
        high: list[Tensor] = []
        for row in rows.tolist():
            pair = self.split.pair(int(self.split.picture_of[row]))
            seed = (self.seed, self.epoch, row)
            if self.split.patch:
                with seeded(seed):
                    pair = _patch(pair, self.split.patch, self.split.pictures.scale)
            sample = self.augment({"low": pair[0], "high": pair[1]}, (*seed, 1))
            low.append(torch.from_numpy(np.ascontiguousarray(sample["low"])))
            high.append(torch.from_numpy(np.ascontiguousarray(sample["high"])))
        c, s = self.split.pictures.in_chans, self.split.pictures.scale
        x = torch.stack(low) if low else torch.zeros(0, c, 1, 1, dtype=torch.uint8)
        y = torch.stack(high) if high else torch.zeros(0, c, s, s, dtype=torch.uint8)
        return {"image": x, "high": y} if self.raw else {"image": x.float() / 255, "high": y.float() / 255}


def _patch(pair: Pair, side: int, scale: int) -> Pair:
    """A window of the low picture, and the same one of the high."""
    low, high = pair
    top, left = (int(torch.randint(n - side + 1, (1,))) for n in low.shape[1:])
    y, x = top * scale, left * scale
    return low[:, top : top + side, left : left + side], high[:, y : y + side * scale, x : x + side * scale]


def _flip(sample: dict[str, Any]) -> dict[str, Any]:
    """Every second one mirrored."""
    return {k: v[:, :, ::-1] for k, v in sample.items()} if float(torch.rand(1)) < 0.5 else sample


def _turn(sample: dict[str, Any]) -> dict[str, Any]:
    """By a random multiple of 90 degrees."""
    quarter = int(torch.randint(4, (1,)))
    return {k: np.rot90(v, quarter, (1, 2)) for k, v in sample.items()}


_STEPS: dict[str, list[Any]] = {"none": [], "flip": [_flip], "turn": [_turn]}


def _pair(pixels: np.ndarray, scale: int) -> Pair:
    high = crop_to_multiple(torch.tensor(pixels), scale)
    low = downscale(high[None].float() / 255, scale, round_to_8_bits=True)[0] * 255
    return low.round().to(torch.uint8).numpy(), high.contiguous().numpy()


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


# ---------------------------------------------------------------------------------------------------- source and build


def find(spec: str | os.PathLike[str]) -> Source:
    """Pictures; there need not be a train split, for data sets of this field are often for tests only.

    Raises:
        DataError: saying what would be accepted, or what is wrong with what was found.
    """
    text, path = os.fspath(spec), Path(os.fspath(spec)).expanduser()
    if text == "scenes" or text.startswith("scenes:"):
        pixels = made_scenes(text).images
        names = [f"scenes/{i}" for i in range(len(pixels))]
        return Source("scenes", {"train": _items(Arrays(pixels), names)}, [])
    tables = parquet.find_tables(text, need_train=False)
    if tables is not None:
        name, found, warnings = tables
        return Source(name, {split: table.pictures() for split, table in found.items()}, [], warnings)
    if not path.is_dir():
        raise DataError(f"data for task 'restore' must be {ACCEPTED}; got {text!r}")
    splits = {}
    for split, here in folders.split_folders(path, need_train=False).items():
        reader = folders.files(here)
        if not reader.names:
            raise DataError(f"{here} holds no pictures; data for task 'restore' must be {ACCEPTED}")
        splits[split] = _items(reader, [f"{split}/{printable(n)}" for n in reader.names])
    return Source(path.resolve().name, splits, [])


def _items(reader: Any, names: list[str]) -> Items:
    return Items(reader, np.arange(len(names)), np.zeros(len(names), np.int64), names)


def build(
    source: Source, *, scale: int = 2, patch: int | None = None, image_size: Any = None, in_chans: int | None = None,
    val: float, test: float, seed: int, limit: int | None, cache: str | os.PathLike[str],
) -> RestoreData:  # fmt: skip
    """Check and divide a source; the arguments are those of `load_data`.

    patch: None for 24, or less if pictures are small.
    """
    from trimtab.data import load

    for name, value, low in (("scale", scale, 1), ("patch", 8 if patch is None else patch, 8)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} must be a whole number, {low} or more, got {value!r}")
    if image_size is not None:
        raise ValueError(
            f"pictures that are restored keep their sizes; choose patch instead, got image_size={image_size}"
        )
    warnings = list(source.warnings)
    items = load.limited(source.splits, limit, seed)
    if "train" in items:
        items = load.divide(items, val, test, seed, warnings)
    sizes, bad = _sizes(items, scale, patch)
    load.too_many(bad, items, source)
    side = patch or min(24, *(min(size) for found in sizes.values() for size in found.values()))
    channels = in_chans or 3
    pixels = sum(h * w for found in sizes.values() for h, w in found.values())
    keep = cache == "memory" or (cache == "auto" and pixels * channels * (scale**2 + 1) <= memory_cap())
    splits, skipped = {}, list(source.skipped)
    for s, its in items.items():
        good = sorted(sizes[s])
        skipped += [(its.names[i], reason) for i, reason in bad[s]]
        pictures = Pictures(its, scale, channels, keep)
        which = torch.tensor(good, dtype=torch.int64)
        splits[s] = RestoreSplit(pictures, which, [sizes[s][i] for i in good], side if s == "train" else None)
    load.warn_of(skipped, warnings)
    return RestoreData(
        source.name, splits, scale=scale, patch=side, in_chans=channels, warnings=warnings, skipped=skipped
    )


def _sizes(
    items: dict[str, Items], scale: int, patch: int | None
) -> tuple[dict[str, dict[int, tuple[int, int]]], dict[str, list[tuple[int, str]]]]:
    """The size in low resolution of every picture that decodes and is large enough, and why others cannot be used."""
    sizes: dict[str, dict[int, tuple[int, int]]] = {}
    bad: dict[str, list[tuple[int, str]]] = {}
    with Progress("reading pictures", sum(map(len, items.values()))) as progress:
        for s, its in items.items():

            def look(i: int, its: Items = its) -> tuple[int, int] | str:
                try:
                    image = open_image(its.read(i))
                    h, w = upright_size(image)
                    image.load()
                except Exception as e:  # decoders raise nearly anything on hostile bytes
                    return str(e) or type(e).__name__
                return h // scale, w // scale

            sizes[s], bad[s] = {}, []
            for i, found in enumerate(for_each(look, len(its), progress.step)):
                least = patch if patch and s == "train" else 16
                if isinstance(found, str):
                    bad[s].append((i, found))
                elif min(found) < least:
                    words = f"{found[1]}x{found[0]} pixels in low resolution, at least {least} are needed"
                    bad[s].append((i, words))
                else:
                    sizes[s][i] = found
    return sizes, bad
