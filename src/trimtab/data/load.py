"""`load_data`: find the source that words name, check it, divide it, decode it, and say what is odd about it."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from trimtab.core.errors import DataError
from trimtab.data import splits as dividing
from trimtab.data.dataset import Data, Split
from trimtab.data.decode import Skipped, decode_splits, look
from trimtab.data.images import Unreadable, open_image
from trimtab.data.sources import Items, Source, find_source

TEST_SHARE = 0.2  # of train, when the source has no test split
MAX_UNREADABLE = 0.05
LARGEST_DEFAULT = 224  # pixels; larger only when asked for with image_size
TASKS = ("classify", "segment", "detect", "restore")
# What `load_data` takes besides, by task.
LOADING: dict[str, tuple[str, ...]] = {
    "classify": (), "segment": ("void", "class_names"), "detect": ("box_format",), "restore": ("scale", "patch"),
}  # fmt: skip
VOLUMES = ("void", "class_names", "regions")  # what it takes besides for volumes
_IMBALANCE = 4.0  # largest class over smallest from which on it is worth a word


def load_data(
    spec: str | os.PathLike[str] = "digits",
    *,
    image_size: int | tuple[int, ...] | None = None,
    in_chans: int | None = None,
    val: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    cache: str | os.PathLike[str] = "auto",
    task: str | None = None,
    test: float = TEST_SHARE,
    **options: Any,
) -> Data:
    """Load labelled images; or, for another task than classification, pictures with masks, boxes, or nothing.

    Args:
        spec: "digits" (built in), "shapes:classes=4,size=32,n=500" (made), "fractals:classes=1000,size=32" (made
            without end, see `trimtab.data.fractal_images`), a folder with one folder of images per class or with
            train/val/test folders of those, a .zip of one, a parquet file or folder in Hugging Face layout, or the name
            of a dataset of the Hugging Face hub ("owner/name", "hub:name"). "volumes:n=40,size=32" (made), and folders
            that `trimtab.data.volume_files` describes, hold volumes, to be segmented.
        image_size: pixels, or (H, W). None: the size that all images have; if they differ, a square of the median of
            their shorter sides, at most 224. Volumes: voxels, or (D, H, W), cut from their middle; None: the median
            of each side, rounded up to a multiple of 8, at most 128.
        in_chans: 1 or 3. None: 1 if all images are grey. Volumes have the channels that they have.
        val: share of train that becomes "val" if the source has none; 0 for no validation.
        seed: of the division into splits. Test images (a fifth) are taken from train if the source has none.
        limit: use at most so many images of each split of the source.
        cache: how decoded images are kept: "memory", "disk" (memory-mapped file in the cache folder, or in the folder
            given here), "lazy" (decoded again whenever used), or "auto": memory if they fit in a quarter of what is
            free, else disk if there is space, else lazy.
        task: "classify" (the default), "segment", "detect" or "restore"; `trimtab.data.segment`, `detect` and
            `restore` say which sources these take.
        test: share of train that becomes "test" if the source has none; 0 for no test.
        **options: segment: ``void`` (index, or several, that count as no class, like 255), ``class_names``; of volumes
            also ``regions``, masks that may overlap, by name: the classes in each, as {"core": [1, 4], ...}. detect:
            ``box_format`` ("xyxy", "xywh", "auto"). restore: ``scale``, ``patch`` (pixels of the low-resolution
            patches for training).

    Images that cannot be read, or do not fit their mask or boxes, are left out and listed in ``skipped``.

    Raises:
        DataError: when there is nothing to learn from: unknown spec, no labels, a single class, a class in test that
            train does not have, more than 5 % of the images unreadable.
    """
    if not 0 <= val < 1:
        raise ValueError(f"val must be a share from 0 to below 1, got {val}")
    if not 0 <= test < 1:
        raise ValueError(f"test must be a share from 0 to below 1, got {test}")
    if task not in (None, *TASKS):
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    known = options_of(spec, task)
    for name in options:
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no more options"
            raise ValueError(f"task {task or 'classify'!r} {takes}, got {name!r}")
    if limit is not None and limit < 2:
        raise ValueError(f"limit must be at least 2, got {limit}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    common: dict[str, Any] = {
        "image_size": image_size, "in_chans": in_chans, "val": val, "test": test, "seed": seed, "limit": limit,
        "cache": cache,
    }  # fmt: skip
    if known is VOLUMES:
        from trimtab.data import volumes

        return volumes.build(volumes.find(spec), **common, **options)
    common["image_size"] = _picture_size(image_size)
    if in_chans not in (None, 1, 3):
        raise ValueError(f"in_chans must be 1 or 3, got {in_chans}")
    if task == "segment":
        from trimtab.data import segment

        builder = segment.Builder(**{"void": None, "class_names": None, **options})
        return build(segment.find(spec), builder, **common)
    if task == "detect":
        from trimtab.data import detect

        return build(detect.find(spec), detect.Builder(**options), **common)
    if task == "restore":
        from trimtab.data import restore

        return restore.build(restore.find(spec), **common, **options)
    return build(find_source(spec), **common)


def options_of(spec: str | os.PathLike[str], task: str | None) -> tuple[str, ...]:
    """What `load_data` takes besides for some data."""
    if task in (None, "segment"):
        from trimtab.data import volumes

        if volumes.meant(spec, task):
            return VOLUMES
    return LOADING[task or "classify"]


class Builder:
    """What `build` asks of a task; this is classification, whose images have labels and nothing else."""

    def targets(
        self, source: Source, items: dict[str, Items], size: tuple[int, int], cache: str | os.PathLike[str]
    ) -> tuple[dict[str, Any], dict[str, Skipped]]:
        """What else belongs to the images of each split, and the rows where that cannot be used."""
        return dict.fromkeys(items), {s: [] for s in items}

    def finish(self, source: Source, splits: dict[str, Split], *, warnings: list[str], skipped: list[Any]) -> Data:
        _check_classes(splits, source, warnings)
        return Data(source.name, splits, source.class_names, warnings=warnings, skipped=skipped)


def build(
    source: Source,
    builder: Any = None,
    *,
    image_size: tuple[int, int] | None = None,
    in_chans: int | None = None,
    val: float = 0.1,
    test: float = TEST_SHARE,
    seed: int = 0,
    limit: int | None = None,
    cache: str | os.PathLike[str] = "auto",
) -> Data:
    """Check, divide and decode a source; the arguments are those of `load_data`."""
    if builder is None and len(source.class_names) < 2:
        raise DataError(f"{source.name} has a single class ({', '.join(source.class_names)}); at least two are needed")
    if source.make is not None:
        return source.make(image_size=image_size, in_chans=in_chans, val=val, limit=limit)
    builder = builder or Builder()
    warnings = list(source.warnings)
    items = limited(source.splits, limit, seed)
    sizes, grey = look(items)
    if not sizes:
        too_many({s: [(0, _first_reason(i))] for s, i in items.items()}, items, source, always=True)
    items = divide(items, val, test, seed, warnings)
    size = image_size or _common_size(sizes, warnings)
    channels = in_chans or (1 if grey else 3)
    images, bad, how = decode_splits(items, size, channels, cache)
    targets, more = builder.targets(source, items, size, cache)
    for s in bad:
        found = {i for i, _ in bad[s]}
        bad[s] = sorted(bad[s] + [(i, reason) for i, reason in more[s] if i not in found])
    too_many(bad, items, source)
    splits, skipped = {}, list(source.skipped)
    for s, its in items.items():
        split = Split(images[s], torch.from_numpy(its.labels), its.names, mapped=how == "disk", targets=targets[s])
        if bad[s]:
            skipped += [(its.names[i], reason) for i, reason in bad[s]]
            good = np.ones(len(its), bool)
            good[[i for i, _ in bad[s]]] = False
            split = split.take(torch.from_numpy(np.flatnonzero(good)))
        splits[s] = split
    warn_of(skipped, warnings)
    return builder.finish(source, splits, warnings=warnings, skipped=skipped)


def limited(items: dict[str, Items], limit: int | None, seed: int) -> dict[str, Items]:
    """At most `limit` items of each split."""
    if limit is None:
        return items
    return {s: v.take(dividing.choose(v.labels, limit, seed)) if len(v) > limit else v for s, v in items.items()}


def warn_of(skipped: list[tuple[str, str]], warnings: list[str]) -> None:
    if skipped:
        shown = "; ".join(f"{n}: {r}" for n, r in skipped[:3]) + ("; ..." if len(skipped) > 3 else "")
        warnings.append(f"{len(skipped)} images cannot be used and were left out ({shown})")


def divide(items: dict[str, Items], val: float, test: float, seed: int, warnings: list[str]) -> dict[str, Items]:
    """Make the splits that are missing from train; copies of an image stay together."""
    found = dividing.digests(items)
    warnings += dividing.twin_warnings(items, found)
    train, groups = items["train"], dividing.groups_of(found["train"])
    out = {k: v for k, v in items.items() if k != "train"}
    left = np.arange(len(train))
    for split, share in (("test", test), ("val", val)):
        if split in out or share == 0:
            continue
        n = max(1, round(share * len(left)))
        picked = left[dividing.choose(train.labels[left], n, seed + len(split), spare=1, groups=groups[left])]
        if not len(picked) or len(picked) == len(left):
            raise DataError(
                f"{len(train)} training images ({len(np.unique(groups))} different ones) are too few to take {split} "
                "images from; give at least 3 per class"
            )
        out[split] = train.take(picked)
        left = np.setdiff1d(left, picked)
        if split == "test":
            taken = f"{len(picked)} of {len(train)} training images were set aside for test (seed {seed})"
            warnings.append(f"no test split: {taken}")
    out["train"] = train.take(left)
    return {k: out[k] for k in ("train", "val", "test") if k in out}


def _picture_size(size: int | tuple[int, ...] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(1 <= s <= 8192 for s in sides):
        raise ValueError(f"image_size must be 1 to 8192 pixels, or (H, W), got {size}")
    return sides[0], sides[1]


def _common_size(sizes: list[tuple[int, int]], warnings: list[str]) -> tuple[int, int]:
    first = sizes[0]
    if all(s == first for s in sizes) and max(first) <= LARGEST_DEFAULT:
        return first
    side = int(min(LARGEST_DEFAULT, np.median([min(s) for s in sizes])))
    low, high = min(sizes, key=lambda s: s[0] * s[1]), max(sizes, key=lambda s: s[0] * s[1])
    extent = f"{low[1]}x{low[0]}" if low == high else f"{low[1]}x{low[0]} to {high[1]}x{high[0]}"
    warnings.append(f"images are {extent} pixels; they are used at {side}x{side} (choose with image_size)")
    return side, side


def too_many(bad: dict[str, Skipped], items: dict[str, Items], source: Source, always: bool = False) -> None:
    """Raises DataError when more images than `MAX_UNREADABLE` cannot be used (always: whatever their number)."""
    total = sum(map(len, items.values())) + len(source.skipped)
    named = source.skipped + [(items[s].names[i], r) for s, rows in bad.items() for i, r in rows]
    if always or len(named) > MAX_UNREADABLE * total:
        shown = "; ".join(f"{n}: {r}" for n, r in named[:5])
        count = f"{len(named)} of {total}" if not always else f"all of {total}"
        raise DataError(
            f"{source.name}: {count} images cannot be used (up to {MAX_UNREADABLE:.0%} would be left out); {shown}"
        )


def _first_reason(items: Items) -> str:
    try:
        open_image(items.read(0))
    except (Unreadable, OSError) as e:
        return str(e)
    return "unreadable"


def _check_classes(splits: dict[str, Split], source: Source, warnings: list[str]) -> None:
    names = source.class_names
    counts = splits["train"].counts(len(names))
    empty = [n for n, c in zip(names, counts, strict=True) if not c]
    if len(names) - len(empty) < 2:
        raise DataError(f"{source.name}: train has readable images of fewer than two classes")
    if empty:
        warnings.append(f"classes without training images: {', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}")
    some = [(c, n) for n, c in zip(names, counts, strict=True) if c]
    (low, rare), (high, common) = min(some), max(some)
    if high >= _IMBALANCE * low:
        warnings.append(f"classes are unbalanced: {common!r} has {high} training images, {rare!r} has {low}")
    if low < 10:
        warnings.append(f"class {rare!r} has only {low} training images")
    for s in ("val", "test"):
        if s in splits:
            missing = [n for n, c, t in zip(names, splits[s].counts(len(names)), counts, strict=True) if t and not c]
            if missing:
                warnings.append(f"{s} has no images of {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}")
