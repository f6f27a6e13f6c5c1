"""Images of fractals, made as they are asked for: each is a function of seed, split, epoch and number, nothing else.

``load_data("fractals:classes=1000,size=32,n=20000")``: the class is the system. An epoch has `n` images, the next one
has `n` others; val and test stay the same. For the pictures with several fractals that `learn.fractal_pretraining`
learns from, see `FractalImages.together`.

A picture is composed in hue, saturation and value: a cloudy background, then fractals, whose hue is the number of
points in a pixel. The colour statistics are those of `MEAN` and `STD` at any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.core.errors import DataError
from trimtab.data import fractals
from trimtab.data.augment import LUMA
from trimtab.data.dataset import Data, Split
from trimtab.data.sources import Source

MEAN, STD = (0.505, 0.505, 0.505), (0.22, 0.22, 0.22)
PER_CLASS = 100  # images of an epoch
FIXED = 5  # images per class in val, and in test
SIDES = (0.15, 0.6)  # of a fractal among others, as shares of the picture's
_POINTS = 100_000 / 224  # per pixel of a side: as many as in the paper at its size
_TOGETHER = 16  # pictures that are made at once
_SPLITS = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Placed:
    """A fractal in a picture: `box` (top, left, height, width) in pixels may stick out; the rest is how it looks."""

    system: np.ndarray
    box: tuple[int, int, int, int]
    draws: np.ndarray  # uint32 (steps, chains)
    looks: np.ndarray  # 19 numbers in 0..1: window (4), turn (3), colour (3), patch (9)
    whole: bool  # all of it fills the box; otherwise what is in a window that is moved and scaled at random

    def paint(self, hsv: np.ndarray, xy: np.ndarray) -> None:
        """Lay the fractal with these points (2, P) over a picture (3, H, W)."""
        top, left, height, width = self.box
        transpose, *mirrors = (self.looks[4:7] < 0.5).tolist()
        size = (width, height) if transpose else (height, width)
        patch = (self.looks[10:] < 0.5).reshape(3, 3)
        patch[1, 1] = True  # so that there is one
        value = fractals.grey(xy, size, window=None if self.whole else self._window(xy), patch=patch)
        value = value.T if transpose else value
        value = value[:: -1 if mirrors[0] else 1, :: -1 if mirrors[1] else 1]
        rows, columns = (slice(max(0, a), max(0, a + n)) for a, n in ((top, height), (left, width)))
        place = hsv[:, rows, columns]  # what of the box is in the picture
        value = value[rows.start - top :, columns.start - left :][: place.shape[1], : place.shape[2]]
        drawn, (shift, saturation, brightness) = value > 0, self.looks[7:10]
        np.copyto(place[0], value + np.float32(shift), where=drawn)
        np.copyto(place[1], np.float32(0.3 + 0.7 * saturation), where=drawn)
        np.copyto(place[2], np.float32(0.5 + 0.5 * brightness), where=drawn)

    def _window(self, xy: np.ndarray) -> fractals.Window:
        """The bounding box, its centre moved by up to 0.2 of its sides, which are scaled by U(0.5, 2)."""
        left, top, right, bottom = fractals.extent(xy)
        wide, tall = right - left, bottom - top
        x = (left + right) / 2 + (self.looks[0] - 0.5) * 0.4 * wide
        y = (top + bottom) / 2 + (self.looks[1] - 0.5) * 0.4 * tall
        wide, tall = wide * (0.5 + 1.5 * self.looks[2]), tall * (0.5 + 1.5 * self.looks[3])
        return x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2


@dataclass(frozen=True)
class FractalImages:
    """Pictures, indexed by a tensor of numbers like a uint8 tensor (n, C, H, W).

    Attributes:
        systems: one per class. n: pictures of an epoch. seed, split, epoch: which ones.
        points: of each fractal; None: as many per pixel of a side as in the paper.
        objects: None: one fractal that fills the picture, its class is the number modulo the number of systems.
            Otherwise 1 to so many small ones of any class.
        sides: of a small one, from the smallest to the largest, as shares of the picture's shorter side.
    """

    systems: Sequence[np.ndarray]
    n: int
    size: tuple[int, int] = (32, 32)
    in_chans: int = 3
    points: int | None = None
    seed: int = 0
    split: str = "train"
    epoch: int = 0
    objects: int | None = None
    sides: tuple[float, float] = SIDES

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.n, self.in_chans, *self.size)

    def __len__(self) -> int:
        return self.n

    def at(self, epoch: int) -> FractalImages:
        """The pictures of another epoch; val and test have the same ones in all."""
        return replace(self, epoch=epoch) if self.split == "train" else self

    def together(self, objects: int, sides: tuple[float, float] = SIDES) -> FractalImages:
        """Pictures of 1 to `objects` fractals each, with such sides, and of the same systems."""
        if objects < 1:
            raise ValueError(f"objects must be at least 1, got {objects}")
        if not 0 < sides[0] <= sides[1] <= 1:
            raise ValueError(f"sides must be (smallest, largest), above 0 and at most 1, got {sides}")
        return replace(self, objects=objects, sides=sides)

    def classes(self, row: int, rng: np.random.Generator | None = None) -> list[int]:
        """The systems that a picture is to show; one may be there twice. They are the first that its `rng` decides."""
        if self.objects is None:
            return [row % len(self.systems)]
        rng = rng or self._rng(row)
        return rng.integers(len(self.systems), size=rng.integers(1, self.objects + 1)).tolist()

    def __getitem__(self, rows: Tensor) -> Tensor:
        """uint8 (len(rows), C, H, W)."""
        parts = [self._pictures(part) for part in rows.split(_TOGETHER) if len(part)]
        return (
            torch.from_numpy(np.concatenate(parts)) if parts else torch.empty((0, *self.shape[1:]), dtype=torch.uint8)
        )

    def _pictures(self, rows: Tensor) -> np.ndarray:
        rngs = [self._rng(row) for row in rows.tolist()]
        placed = [
            (k, self._place(c, rng))
            for k, (row, rng) in enumerate(zip(rows.tolist(), rngs))
            for c in self.classes(row, rng)
        ]
        hsv = self._grounds(rngs)
        burn = fractals.chains_of(self._points)[2]
        orbits = fractals.orbits([p.system for _, p in placed], [p.draws for _, p in placed], burn)
        for i, (k, p) in enumerate(placed):
            p.paint(hsv[k], orbits[:, i])
        sigma = np.array([rng.uniform(0.5, 1) if rng.random() < 0.5 else 0.0 for rng in rngs])
        rgb = fractals.blur(fractals.to_rgb(hsv), sigma)
        if self.in_chans == 1:
            rgb = np.einsum("bchw,c->bhw", rgb, np.array(LUMA, np.float32))[:, None]
        return (rgb * 255 + 0.5).astype(np.uint8)

    @property
    def _points(self) -> int:
        side = max(self.size) if self.objects is None else max(self.size) / 2
        return self.points or round(_POINTS * side)

    def _place(self, k: int, rng: np.random.Generator) -> Placed:
        """System k, where it is to be in the picture, and how it is to look; among others it is whole, and as it is."""
        box = (0, 0, *self.size)
        if self.objects is not None:  # the centre is in the picture
            side = max(2, round(rng.uniform(*self.sides) * min(self.size)))
            top, left = (round(rng.random() * n - side / 2) for n in self.size)
            box = (top, left, side, side)
        chains, length, burn = fractals.chains_of(self._points)
        draws = rng.integers(0, 2**32, (burn + length, chains), np.uint32)
        alone = self.objects is None
        system = fractals.jitter(self.systems[k], rng) if alone else self.systems[k]
        return Placed(system, box, draws, rng.random(19), whole=not alone)

    def _grounds(self, rngs: list[np.random.Generator]) -> np.ndarray:
        """Coloured clouds in hue, saturation and value, (B, 3, H, W)."""
        levels = max(1, math.ceil(math.log2(max(self.size))))
        side = 2**levels + 1
        noise = np.stack([rng.random((side, side), np.float32) for rng in rngs])
        u = np.stack([rng.random(7) for rng in rngs]).astype(np.float32)[:, :, None, None]  # (B, 7, 1, 1)
        clouds = fractals.diamond_square(levels, 0.4 + 0.4 * u[:, 0, 0, 0], noise)[:, : self.size[0], : self.size[1]]
        hue = clouds * (0.25 + 0.75 * u[:, 1]) + u[:, 2]
        saturation = clouds * (0.1 + 0.2 * u[:, 3]) + 0.4 + 0.2 * u[:, 4]
        value = clouds * (0.3 + 0.3 * u[:, 5]) + 0.4 + 0.2 * u[:, 6]
        return np.stack([hue, saturation, value], 1)

    def _rng(self, row: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, _SPLITS[self.split], self.epoch, row])


class LabelSets:
    """Which systems are in pictures, indexed by a tensor of numbers like a float32 tensor (n, classes) of 0 and 1."""

    def __init__(self, images: FractalImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor) -> Tensor:
        out = torch.zeros(len(rows), len(self.images.systems))
        for sets, row in zip(out, rows.tolist()):
            sets[self.images.classes(row)] = 1.0
        return out


class FractalSplit(Split):
    """A split without end: every epoch has other images. A part of it (`take`) has those of the first, for good."""

    images: Any

    def __init__(self, images: FractalImages) -> None:
        labels: Any = LabelSets(images) if images.objects else torch.arange(images.n) % len(images.systems)
        super().__init__(images, labels, Names(images.split, images.n))  # type: ignore[arg-type]

    def at(self, epoch: int) -> FractalSplit:
        return FractalSplit(self.images.at(epoch))

    def together(self, objects: int, sides: tuple[float, float] = SIDES) -> FractalSplit:
        """Several fractals in a picture, and labels that are sets: float32 (B, classes) in batches."""
        return FractalSplit(self.images.together(objects, sides))


class Names(Sequence[str]):
    """What the images of a split are called."""

    def __init__(self, split: str, n: int) -> None:
        self.split, self.n = split, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: Any) -> Any:
        return f"fractals/{self.split}/{i}"


def source(
    *,
    classes: int = 1000,
    size: int | tuple[int, int] = 32,
    n: int | None = None,
    channels: int = 3,
    points: int | None = None,
    maps: int = 4,
    seed: int = 0,
) -> Source:
    """What ``"fractals:classes=1000,..."`` means.

    Args:
        classes: systems. n: images of an epoch; None: 100 per class.
        points: of each fractal; None: 446 per pixel of the longer side, 100,000 at the paper's 224.
        maps: systems have 2 to so many maps.
        seed: of the systems and the pictures.
    """
    n = classes * PER_CLASS if n is None else n
    height, width = (size, size) if isinstance(size, int) else size
    checks = {"classes": (classes, 2, 10**7), "size": (min(height, width), 8, 4096), "maps": (maps, 2, 64)}
    checks |= {"n": (n, classes, 2**31), "points": (points or 1, 1, 10**8), "seed": (seed, 0, 2**63)}
    for name, (value, low, high) in checks.items():
        if not low <= value <= high:
            raise ValueError(f"{name} must be {low} to {high}, got {value}")
    if channels not in (1, 3) or max(height, width) > 4096:
        raise ValueError(f"channels must be 1 or 3 and size at most 4096, got {channels} and {size}")
    systems = [fractals.sample_system(np.random.default_rng([seed, k]), maps=(2, maps)) for k in range(classes)]
    digits = len(str(classes - 1))
    names = [f"system_{k:0{digits}}" for k in range(classes)]
    whole = FractalImages(systems, n, (height, width), channels, points, seed)

    def make(*, image_size: tuple[int, int] | None, in_chans: int | None, val: float, limit: int | None) -> Data:
        images = replace(whole, size=image_size or whole.size, in_chans=in_chans or channels, n=min(n, limit or n))
        if images.n < classes:
            raise DataError(f"fractals: {images.n} images cannot show {classes} classes; raise limit, or lower classes")
        fixed = [s for s in ("val", "test") if s == "test" or val > 0]
        splits = {"train": images} | {s: replace(images, split=s, n=min(FIXED * classes, images.n)) for s in fixed}
        mean, std = (MEAN, STD) if images.in_chans == 3 else (MEAN[:1], STD[:1])
        return Data("fractals", {k: FractalSplit(v) for k, v in splits.items()}, names, mean=mean, std=std)

    return Source("fractals", {}, names, make=make)
