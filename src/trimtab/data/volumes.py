"""Volumes: images in three dimensions, with a class for every voxel, or with masks of regions that may overlap.

>>> from trimtab.data import load_data
>>> data = load_data("volumes:n=20,size=16")  # made: nested ellipsoids in four noisy modalities
>>> data.task, data.class_names, data.size, {k: len(v) for k, v in data.splits.items()}
('segment', ['whole', 'core', 'enhancing'], (16, 16, 16), {'train': 14, 'val': 2, 'test': 4})
>>> batch = next(iter(data.loader("train", batch_size=2, augment="auto")))
>>> batch["image"].shape, batch["label"].shape
(torch.Size([2, 4, 16, 16, 16]), torch.Size([2, 3, 16, 16, 16]))
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trimtab.core.errors import DataError
from trimtab.data.augment import read_words
from trimtab.data.dataset import Data, Split
from trimtab.data.decode import Progress, Skipped, for_each, memory_cap
from trimtab.data.images import VOID, Unreadable
from trimtab.data.loader import Batch
from trimtab.data.segment import class_table, void_of
from trimtab.data.sources import Items, Source, made_volumes
from trimtab.data.views import SampleLoader, Views
from trimtab.data.volume_files import Form, find_cases, holds_volumes

if TYPE_CHECKING:
    from trimtab.core.artifact import InputSpec

WORDS = ("none", "crop", "flip", "shift", "whole")
LARGEST_DEFAULT = 128  # voxels on a side; more only when asked for with image_size
MULTIPLE = 8  # of which sides are where nobody chose them: networks halve them a few times
ON_A_LABEL = 1 / 3  # of the crops, as in nnU-Net, so that small regions are seen
Sides = tuple[int, int, int]
Whole = list[tuple[Tensor, Tensor]]  # volumes float32 (C, D, H, W), labels uint8 (D, H, W) or (K, D, H, W)


def meant(spec: str | os.PathLike[str], task: str | None) -> bool:
    """Whether a spec names volumes: made ones, or a folder of them to segment."""
    text = os.fspath(spec) if isinstance(spec, str | os.PathLike) else ""
    if task not in (None, "segment") or not isinstance(text, str):
        return False
    if text == "volumes" or text.startswith("volumes:"):
        return True
    path = Path(text).expanduser()
    return task == "segment" and bool(text) and path.is_dir() and holds_volumes(path)


class VolumeSplit(Split):
    """Volumes of one split, in memory or read again whenever they are used."""

    def __init__(self, cases: Cases, which: Tensor, kept: Whole | None) -> None:
        self.cases, self.which, self.kept = cases, which, kept  # which: rows of the cases
        self.labels, self.mapped, self.targets = torch.zeros(len(which), dtype=torch.int64), False, None
        self.names = [cases.items.names[i] for i in which.tolist()]

    def whole(self, rows: Tensor) -> Whole:
        """Volumes and labels, each of its own size."""
        if self.kept is not None:
            return [self.kept[i] for i in rows.tolist()]
        try:
            cases = [self.cases.case(int(self.which[i])) for i in rows.tolist()]
        except (Unreadable, OSError) as e:  # they could be read when the data was loaded
            raise DataError(f"volumes can no longer be read: {e}") from e
        return [(torch.from_numpy(image), torch.from_numpy(label)) for image, label in cases]

    def pairs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Their middles: float32 (B, C, D, H, W); labels uint8, classes (B, D, H, W) or masks (B, K, D, H, W)."""
        return _stacked([_middle(self.cases.size, {"image": x, "mask": y}) for x, y in self.whole(rows)])

    def pixels(self, rows: Tensor) -> Tensor:
        """The middles of volumes, float32 (len(rows), C, D, H, W)."""
        return self.pairs(rows)[0]

    def image(self, i: int) -> Any:
        """Raises TypeError: a volume is no picture; `trimtab.report.draw_volume` makes one of it."""
        raise TypeError("a volume is no picture; trimtab.report.draw_volume makes one of it")

    def take(self, rows: Tensor) -> VolumeSplit:
        """Only these rows."""
        kept = None if self.kept is None else [self.kept[i] for i in rows.tolist()]
        return VolumeSplit(self.cases, self.which[rows], kept)


class VolumeData(Data):
    """Volumes with a label each.

    Attributes:
        overlap: labels are masks of regions, which may overlap; otherwise every voxel has one class.
        size: (D, H, W) of what a network is fed. in_chans: modalities.
        larger: volumes have parts outside of their middles, so crops of them are trained on.
        mean, std: 0 and 1, for volumes are standardised one by one (`standardise`).
        void: indices in the labels that count as no class, besides 255.
    """

    task = "segment"

    def __init__(
        self, name: str, splits: Mapping[str, VolumeSplit], class_names: Sequence[str], *, size: Sides, in_chans: int,
        larger: bool, table: Tensor | None, void: tuple[int, ...], warnings: Sequence[str],
        skipped: Sequence[tuple[str, str]],
    ) -> None:  # fmt: skip
        self.name, self.splits, self.class_names = name, dict(splits), list(class_names)
        self.size: Sides = size  # type: ignore[assignment]  # a side more than pictures have
        self.in_chans, self.larger, self.table, self.void = in_chans, larger, table, void
        self.mean, self.std = (0.0,) * in_chans, (1.0,) * in_chans
        self.warnings, self.skipped = list(warnings), list(skipped)

    @property
    def overlap(self) -> bool:
        return self.table is None

    @property
    def spec(self) -> InputSpec:
        """What a model of this data is fed, and whether its answers may overlap."""
        from trimtab.core.artifact import InputSpec

        return InputSpec((self.in_chans, *self.size), self.mean, self.std, self.task, self.overlap)

    def auto_augment(self) -> str:
        """What augment="auto" means here."""
        return "crop+flip+shift" if self.larger else "flip+shift"

    def __repr__(self) -> str:
        counts = ", ".join(f"{k} {len(v)}" for k, v in self.splits.items())
        kind = "regions" if self.overlap else "classes"
        sides = _words(self.size)
        return f"VolumeData({self.name}: {self.num_classes} {kind}, {sides} voxels, {self.in_chans} channels, {counts})"

    def _augment(self, augment: Any) -> Views:
        """A first step that gives every volume the size, then those that are asked for."""
        middle = partial(_middle, self.size)
        if isinstance(augment, Views):
            return Views([middle, *augment.steps], augment.text)
        if callable(augment):
            return Views([middle, augment], "custom")
        if augment is not None and not isinstance(augment, str):
            raise ValueError(f"augment must be words, a transform or None, got {augment!r}")
        words = (self.auto_augment() if augment == "auto" else augment or "none").lower().split("+")
        names = [name for name, _ in read_words([w.strip() for w in words], WORDS)]
        places = {"crop": partial(_crop, self.size, self.void), "whole": partial(_padded, self.size)}
        if places.keys() <= set(names):
            raise ValueError(f"augment must have crop or whole, not both, got {augment!r}")
        place = next((places[name] for name in names if name in places), middle)
        return Views([place, *(_STEPS[name] for name in names if name in _STEPS)], "+".join(names))

    def _loader(self, split: Split, **options: Any) -> SampleLoader:
        if not options["shuffle"] or "whole" in options["augment"].text:  # memory is for the volume, not for the batch
            options["batch_size"] = options["world"]
        return VolumeLoader(split, table=self.table, **options)


class VolumeLoader(SampleLoader):
    """``{"image": (B, C, D, H, W), "label", "index": (B,)}``; in order, volumes come one at a time.

    Labels are masks float32 (B, K, D, H, W), 0 or 1, or classes int64 (B, D, H, W), 255 where none counts.
    """

    split: VolumeSplit

    def __init__(self, split: Split, *, table: Tensor | None, **options: Any) -> None:
        super().__init__(split, **options)
        self.table = table

    def made(self, rows: Tensor) -> Batch:
        pairs = zip(self.split.whole(rows), rows.tolist(), strict=True)
        images, labels = _stacked([self.view({"image": x, "mask": y}, row) for (x, y), row in pairs])
        return {"image": images, "label": labels.float() if self.table is None else self.table[labels.long()]}


def _stacked(samples: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Volumes and labels of samples of one size."""
    return torch.stack([s["image"] for s in samples]), torch.stack([s["mask"] for s in samples])


def _middle(size: Sides, sample: dict[str, Any]) -> dict[str, Any]:
    """The middle of a volume and of its label; outside of both are zeros, and voxels that are void."""
    fill = {"image": 0, "mask": VOID if sample["mask"].ndim == 3 else 0}
    return {name: torch.from_numpy(at_size(x.numpy(), size, fill[name])) for name, x in sample.items()}


def _padded(size: Sides, sample: dict[str, Any]) -> dict[str, Any]:
    """All of a volume, of at least this size."""
    sides = sample["image"].shape[1:]
    d, h, w = (max(pair) for pair in zip(size, sides, strict=True))
    return sample if (d, h, w) == sides else _middle((d, h, w), sample)


def _crop(size: Sides, void: Sequence[int], sample: dict[str, Any]) -> dict[str, Any]:
    """A part anywhere in a volume; a third of them around a voxel of a class that is there, each class as often."""
    sample = _padded(size, sample)
    label = sample["mask"]
    room = [have - want for have, want in zip(label.shape[-3:], size, strict=True)]
    corner = [int(torch.randint(r + 1, ())) for r in room]
    if float(torch.rand(())) < ON_A_LABEL:
        voxel = _labelled(label, void)
        corner = [min(max(0, v - n // 2), r) for v, n, r in zip(voxel, size, room, strict=True)] if voxel else corner
    place = (..., *(slice(at, at + n) for at, n in zip(corner, size, strict=True)))
    return {name: x[place] for name, x in sample.items()}


def _labelled(label: Tensor, void: Sequence[int]) -> list[int]:
    """A voxel of a class or region that is there; nothing where there is only ground, class 0."""
    if label.ndim == 4:
        there = [k for k in range(len(label)) if label[k].any()]
    else:
        counts = torch.bincount(label.reshape(-1).long(), minlength=256)
        there = [c for c in range(1, VOID) if counts[c] and c not in void]
    if not there:
        return []
    one = there[int(torch.randint(len(there), ()))]
    places = (label[one] > 0 if label.ndim == 4 else label == one).nonzero()
    return [int(v) for v in places[int(torch.randint(len(places), ()))]]


def _flip(sample: dict[str, Any]) -> dict[str, Any]:
    """Mirrored in depth, in height, in width, each every second time."""
    axes = [axis for axis in (-3, -2, -1) if float(torch.rand(1)) < 0.5]
    return {name: x.flip(axes) for name, x in sample.items()}


def _shift(sample: dict[str, Any]) -> dict[str, Any]:
    """Every modality brighter or darker by up to 0.1, and its contrast by up to a tenth."""
    scale, shift = (0.1 * (2 * torch.rand(2, len(sample["image"]), 1, 1, 1) - 1)).unbind()
    return {**sample, "image": sample["image"] * (1 + scale) + shift}


_STEPS = {"flip": _flip, "shift": _shift}


# ---------------------------------------------------------------------------------------------------------------- cases


def standardise(volume: np.ndarray) -> np.ndarray:
    """Every channel with mean 0 and deviation 1, float32 (C, D, H, W).

    Where a tenth of the voxels or more is exactly 0 in all channels, these are the outside (of a head, say): they do
    not count, and stay 0.
    """
    outside = (volume == 0).all(0)
    inside = ~outside if 0.1 <= outside.mean() < 1 else np.ones_like(outside)
    values = volume[:, inside].astype(np.float64)
    mean, std = (x[:, None, None, None] for x in (values.mean(1), values.std(1).clip(1e-6)))
    return np.where(inside, (volume - mean) / std, 0).astype(np.float32)


def at_size(array: np.ndarray, size: Sequence[int], fill: float = 0) -> np.ndarray:
    """The middle of an array (..., D, H, W), or the array in the middle of `fill`.

    >>> at_size(np.arange(5).reshape(1, 1, 5), (1, 2, 3), 9).tolist()
    [[[1, 2, 3], [9, 9, 9]]]
    """
    out = np.full((*array.shape[:-3], *size), fill, array.dtype)
    into: list[Any] = [...]
    of: list[Any] = [...]
    for have, want in zip(array.shape[-3:], size, strict=True):
        n = min(have, want)
        into.append(slice((want - n) // 2, (want - n) // 2 + n))
        of.append(slice((have - n) // 2, (have - n) // 2 + n))
    out[tuple(into)] = array[tuple(of)]
    return out


def in_windows(run: Callable[[np.ndarray], np.ndarray], volume: np.ndarray, window: Sequence[int]) -> np.ndarray:
    """What a network for volumes of one size says of a volume of any size: (K, D, H, W).

    Windows overlap by half or more, and what is said of a voxel is averaged; a smaller volume lies amid zeros.

    Args:
        run: the network, float32 (1, C, *window) -> (1, K, *window). volume: (C, D, H, W), standardised.
    """
    sides = volume.shape[1:]
    volume = at_size(volume, [max(pair) for pair in zip(window, sides, strict=True)])
    total: Any = 0.0
    times = np.zeros(volume.shape[1:], np.float32)
    for place in _windows(volume.shape[1:], window):
        said = run(np.ascontiguousarray(volume[(slice(None), *place)])[None])[0]
        if times.max() == 0:
            total = np.zeros((len(said), *volume.shape[1:]), np.float32)
        total[(slice(None), *place)] += said
        times[place] += 1
    return at_size(total / times, sides)


def _windows(sides: Sequence[int], window: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Windows that cover everything, from edge to edge, and overlap by half or more.

    >>> [place for (place,) in _windows((10,), (4,))]
    [slice(0, 4, None), slice(2, 6, None), slice(4, 8, None), slice(6, 10, None)]
    """
    starts = []
    for side, part in zip(sides, window, strict=True):
        count = 1 + -(-(side - part) // max(1, part // 2))
        starts.append(np.linspace(0, side - part, count).round().astype(int).tolist())
    for corner in itertools.product(*starts):
        yield tuple(slice(at, at + part) for at, part in zip(corner, window, strict=True))


class Cases:
    """Volumes of one split as they are used: standardised.

    Args:
        size: of what a network is fed.
        regions: masks to make of classes: which belong to each. None: labels as they are.
    """

    def __init__(self, items: Items, size: Sides, regions: Mapping[str, Sequence[int]] | None) -> None:
        self.items, self.size, self.regions = items, size, regions

    def case(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """float32 (C, D, H, W) and uint8 (D, H, W) or (K, D, H, W), of its own size. Raises Unreadable or OSError."""
        reader: Any = self.items.reader
        image, label = reader.case(int(self.items.rows[i]))
        if self.regions is not None:
            label = np.stack([np.isin(label, list(inside)) for inside in self.regions.values()]).astype(np.uint8)
        return standardise(image), label


class Made:
    """Cases in memory, a `Reader` as those in files."""

    random_access = True

    def __init__(self, volumes: np.ndarray, labels: np.ndarray) -> None:
        self.volumes, self.labels = volumes, labels

    def form(self, i: int) -> Form:
        return self.volumes[i].shape, self.labels[i].shape

    def case(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.volumes[i], self.labels[i]

    def read(self, i: int) -> bytes:
        return self.volumes[i].tobytes()

    def nbytes(self, i: int) -> int | None:
        return self.volumes[i].nbytes

    def stamp(self) -> str:
        return ""


def find(spec: str | os.PathLike[str]) -> Source:
    """Made volumes, or those in a folder.

    Raises:
        DataError: or MissingExtra.
    """
    text = os.fspath(spec)
    if text != "volumes" and not text.startswith("volumes:"):
        return find_cases(Path(text).expanduser())
    volumes, labels, names = made_volumes(text)
    rows = np.arange(len(volumes))
    items = Items(Made(volumes, labels), rows, np.zeros(len(rows), np.int64), [f"volumes/{i}" for i in rows])
    return Source("volumes", {"train": items}, names)


# ---------------------------------------------------------------------------------------------------------------- build


def build(
    source: Source, *, image_size: int | Sequence[int] | None = None, in_chans: int | None = None, val: float,
    test: float, seed: int, limit: int | None, cache: str | os.PathLike[str], void: int | Sequence[int] | None = None,
    class_names: Sequence[str] | None = None, regions: Mapping[str, Sequence[int]] | None = None,
) -> VolumeData:  # fmt: skip
    """Check, divide and read a source; the arguments are those of `load_data`."""
    from trimtab.data import load

    regions, skip = _regions(regions), void_of(void)
    warnings = list(source.warnings)
    items = load.divide(load.limited(source.splits, limit, seed), val, test, seed, warnings)
    forms, bad = _forms(items)
    if not any(forms.values()):
        load.too_many(bad, items, source, always=True)
    kinds = Counter(_kind(form) for found in forms.values() for form in found.values())
    usual = max(kinds, key=lambda kind: kinds[kind])
    for s, found in forms.items():
        bad[s] += [(i, _unlike(_kind(form), usual)) for i, form in found.items() if _kind(form) != usual]
    channels, masks = usual
    if in_chans not in (None, channels):
        raise DataError(f"{source.name}: volumes have {channels} channels, got in_chans={in_chans}")
    if regions is not None and masks:
        raise DataError(f"{source.name}: regions are made of classes, but labels are {masks} masks already")
    masks = len(regions) if regions is not None else masks
    names = list(class_names or (regions if regions is not None else source.class_names))
    if masks and names and len(names) != masks:
        raise DataError(f"{source.name}: labels are {masks} masks, but there are {len(names)} class names")
    good = [form for found in forms.values() for form in found.values() if _kind(form) == usual]
    size = _asked(image_size) or _common_size([form[0][1:] for form in good], warnings)
    bytes_of_all = (4 * channels + max(1, masks)) * sum(int(np.prod(form[0][1:])) for form in good)
    keep = cache == "memory" or (cache == "auto" and bytes_of_all <= memory_cap())
    splits, skipped, seen = {}, list(source.skipped), dict[str, set[int]]()
    with Progress("reading volumes", sum(map(len, items.values()))) as progress:
        for s, its in items.items():
            cases = Cases(its, size, regions)
            known = len(names) if names and not masks else 256
            read, unusable, seen[s] = _read(cases, masks > 0, dict(bad[s]), known, skip, keep, progress)
            bad[s] = sorted(unusable.items())
            which = [i for i in range(len(its)) if i not in unusable]
            kept = [read[i] for i in which] if keep else None
            splits[s] = VolumeSplit(cases, torch.tensor(which, dtype=torch.int64), kept)
            skipped += [(its.names[i], reason) for i, reason in bad[s]]
    load.too_many(bad, items, source)
    load.warn_of(skipped, warnings)
    names = names or [str(i) for i in range(masks or max(set().union(*seen.values()), default=-1) + 1)]
    table = None
    if not masks:
        table, names = class_table(source.name, names, skip, seen["train"], warnings)
    return VolumeData(
        source.name, splits, names, size=size, in_chans=channels, table=table, void=skip, warnings=warnings,
        skipped=skipped, larger=any(have > want for form in good for have, want in zip(form[0][1:], size)),
    )  # fmt: skip


def _forms(items: dict[str, Items]) -> tuple[dict[str, dict[int, Form]], dict[str, Skipped]]:
    """The shapes of every case whose header can be read, and why others cannot be used."""
    forms: dict[str, dict[int, Form]] = {s: {} for s in items}
    bad: dict[str, Skipped] = {s: [] for s in items}
    for s, its in items.items():
        reader: Any = its.reader
        for i, row in enumerate(its.rows.tolist()):
            try:
                forms[s][i] = reader.form(row)
            except (Unreadable, OSError) as e:
                bad[s].append((i, str(e)))
    return forms, bad


def _read(
    cases: Cases, masks: bool, bad: dict[int, str], known: int, void: tuple[int, ...], keep: bool, progress: Progress
) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[int, str], set[int]]:
    """All cases of a split, unless they are not to be kept; those that cannot be used, and the classes that are there.

    masks: labels are masks, not classes. bad: what is known not to be usable. known: so many classes.
    """
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    seen = set[int]()

    def one(i: int) -> str | set[int]:
        if i in bad:
            return bad[i]
        try:
            image, label = cases.case(i)
        except (Unreadable, OSError) as e:
            return str(e)
        if keep:
            kept[i] = torch.from_numpy(image), torch.from_numpy(label)
        if masks:
            return set()
        there = {int(c) for c in np.flatnonzero(np.bincount(label.reshape(-1), minlength=256))} - {VOID, *void}
        if not there:
            return "every voxel of its label is void"
        return f"class {max(there)} in its label is none of the {known} classes" if max(there) >= known else there

    unusable = {}
    for i, found in enumerate(for_each(one, len(cases.items), progress.step)):
        if isinstance(found, str):
            unusable[i] = found
        else:
            seen |= found
    return kept, unusable, seen


def _kind(form: Form) -> tuple[int, int]:
    """Channels, and masks (0 where labels are classes)."""
    image, label = form
    return image[0], label[0] if len(label) == 4 else 0


def _unlike(kind: tuple[int, int], usual: tuple[int, int]) -> str:
    def words(kind: tuple[int, int]) -> str:
        return f"{kind[0]} channels and {f'{kind[1]} masks' if kind[1] else 'classes'}"

    return f"has {words(kind)}, most others {words(usual)}"


def _regions(given: Any) -> dict[str, tuple[int, ...]] | None:
    if given is None:
        return None
    wanted = 'name the classes of each region, such as {"whole": [1, 2, 4], "core": [1, 4]}'
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"regions must {wanted}, got {given!r}")
    regions = {str(name): (inside,) if isinstance(inside, int) else tuple(inside) for name, inside in given.items()}
    if not all(inside and all(isinstance(c, int) and 0 <= c <= 255 for c in inside) for inside in regions.values()):
        raise ValueError(f"regions must {wanted}, got {given!r}")
    return regions


def _asked(image_size: int | Sequence[int] | None) -> Sides | None:
    if image_size is None:
        return None
    sides = (image_size,) * 3 if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 3 or not all(8 <= side <= 1024 for side in sides):
        raise ValueError(f"image_size of volumes must be 8 to 1024 voxels, or (D, H, W), got {image_size}")
    return sides[0], sides[1], sides[2]


def _common_size(sizes: list[tuple[int, ...]], warnings: list[str]) -> Sides:
    """The median sides, rounded up to a multiple of 8 and not too large."""
    least, most, middle = (f(np.asarray(sizes), axis=0) for f in (np.min, np.max, np.median))
    d, h, w = (min(LARGEST_DEFAULT, MULTIPLE * -(-int(side) // MULTIPLE)) for side in middle)
    size = (d, h, w)
    if tuple(least) != size or tuple(most) != size:
        extent = _words(least) if (least == most).all() else f"{_words(least)} to {_words(most)}"
        warnings.append(
            f"volumes are {extent} voxels; networks are fed parts of {_words(size)} (choose with image_size)"
        )
    return size


def _words(sides: Sequence[Any]) -> str:
    return "x".join(str(int(side)) for side in sides)
