"""Detection: boxes around objects, and what each object is.

>>> from trimtab.data import load_data
>>> data = load_data("scenes:classes=3,size=32,n=60", task="detect")
>>> data.class_names, data.most
(['circle', 'square', 'triangle'], 4)
>>> batch = next(iter(data.loader("train", batch_size=8, augment="auto")))
>>> batch["image"].shape, batch["boxes"].shape, batch["box_label"].shape
(torch.Size([8, 3, 32, 32]), torch.Size([8, 4, 4]), torch.Size([8, 4]))
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
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
from trimtab.data.decode import Progress, Skipped, for_each
from trimtab.data.images import Unreadable, open_image, upright_size
from trimtab.data.loader import Batch, normalise
from trimtab.data.sources import Arrays, Items, Source, made_scenes, printable
from trimtab.data.views import SampleLoader, Views, color, flip, none, parse_views

ACCEPTED = (
    "'scenes:classes=5,size=48,n=300', a folder with images and annotations.json in COCO's format (or train/val/test "
    "folders of those), or parquet in Hugging Face layout with the columns image and objects, here or on the hub "
    "('owner/name')"
)
FORMATS = ("auto", "xyxy", "xywh")
_COCO = ("annotations.json", "_annotations.coco.json", "instances.json")


@dataclass
class Boxes:
    """The objects in each picture.

    Attributes:
        boxes: of every picture, float32 (m, 4): x1, y1, x2, y2 in pixels.
        labels: of every picture, int64 (m,).
        form: "xyxy", or "xywh" for x, y, width, height; None where the source does not say.
    """

    boxes: list[np.ndarray]
    labels: list[np.ndarray]
    form: str | None = "xyxy"

    def __len__(self) -> int:
        return len(self.boxes)

    def take(self, rows: Any) -> Boxes:
        return Boxes([self.boxes[i] for i in rows.tolist()], [self.labels[i] for i in rows.tolist()], self.form)


class DetectData(Data):
    """Pictures with boxes; the boxes of a split are its ``targets``, in pixels of the pictures as they are fed.

    Attributes:
        most: objects in one picture, so the M of a batch's ``boxes (B, M, 4)``.
    """

    task = "detect"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.most = max(1, *(len(b) for split in self.splits.values() for b in split.targets.boxes))

    def auto_augment(self) -> str:
        """What augment="auto" means here: the views of SSD, with less zooming out, for pictures are small already."""
        return "color+zoom=2+crop+flip"

    def _augment(self, augment: Any) -> Views:
        views = parse_views(self.auto_augment() if augment == "auto" else augment, _WORDS, self.size, self.mean)
        if not views.steps:
            return views
        clean = [v2.Resize(self.size, antialias=True), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)]
        return Views([*views.steps, *clean], views.text)

    def _loader(self, split: Split, **options: Any) -> SampleLoader:
        return DetectLoader(split, most=self.most, **options)


class DetectLoader(SampleLoader):
    """``{"image": (B, C, H, W), "boxes": (B, M, 4), "box_label": (B, M), "index": (B,)}``.

    Boxes are float32 x1, y1, x2, y2 in pixels of the image, padded with zeros; their labels with -1.
    """

    def __init__(self, split: Split, *, most: int, **options: Any) -> None:
        super().__init__(split, **options)
        self.most = most

    def made(self, rows: Tensor) -> Batch:
        images = self.split.pixels(rows)
        size = (images.shape[2], images.shape[3])
        boxes, box_label = torch.zeros(len(rows), self.most, 4), torch.full((len(rows), self.most), -1)
        for k, row in enumerate(rows.tolist()):
            here = torch.from_numpy(self.split.targets.boxes[row])
            labels = torch.from_numpy(self.split.targets.labels[row])
            if self.augment.steps:
                sample = {
                    "image": tv_tensors.Image(images[k]),
                    "boxes": tv_tensors.BoundingBoxes(here, format="XYXY", canvas_size=size),  # type: ignore[call-arg]
                    "labels": labels,
                }
                sample = self.view(sample, row)
                images[k], here = sample["image"].as_subclass(Tensor), sample["boxes"].as_subclass(Tensor)
                labels = sample["labels"]
            boxes[k, : len(here)], box_label[k, : len(labels)] = here, labels
        image = images if self.raw else normalise(images, self.mean, self.std)
        return {"image": image, "boxes": boxes, "box_label": box_label}


def _crop(value: float | None, size: tuple[int, int], fill: Any) -> list[Any]:
    """A window that overlaps with an object by a random share or more; objects stay whose centre is inside."""
    crop = v2.RandomIoUCrop()

    def where_there_are_objects(sample: dict[str, Any]) -> Any:
        return crop(sample) if len(sample["boxes"]) else sample

    return [where_there_are_objects, v2.SanitizeBoundingBoxes(min_size=1)]


def _zoom(value: float | None, size: tuple[int, int], fill: Any) -> list[Any]:
    """Every second picture becomes smaller, by up to `value` (4 in SSD), on a ground of the mean colour."""
    most = 4.0 if value is None else value
    if most < 1:
        raise ValueError(f"zoom takes the largest factor, at least 1, got {value}")
    return [v2.RandomZoomOut(fill=fill, side_range=(1.0, most))]


_WORDS = {"none": none, "flip": flip, "crop": _crop, "zoom": _zoom, "color": color}


# --------------------------------------------------------------------------------------------------------------- source


def find(spec: str | os.PathLike[str]) -> Source:
    """Pictures whose `targets` are boxes in pixels of the picture.

    Raises:
        DataError: saying what would be accepted, or what is wrong with what was found.
    """
    text, path = os.fspath(spec), Path(os.fspath(spec)).expanduser()
    if text == "scenes" or text.startswith("scenes:"):
        got = made_scenes(text)
        count = len(got.images)
        names = [f"scenes/{i}" for i in range(count)]
        pictures = Items(Arrays(got.images), np.arange(count), np.zeros(count, np.int64), names, "stretch")
        pictures.targets = Boxes(got.boxes, got.labels)
        return Source("scenes", {"train": pictures}, got.names)
    tables = parquet.find_tables(text)
    if tables is not None:
        return _tables(*tables)
    if path.is_dir():
        return _coco(path)
    raise DataError(f"data for task 'detect' must be {ACCEPTED}; got {text!r}")


def _tables(name: str, found: dict[str, Any], warnings: list[str]) -> Source:
    splits: dict[str, Items] = {}
    class_names: list[str] = []
    for split, table in found.items():
        column = table.column("objects (boxes)", ("objects", "annotations", "labels"))
        pictures = splits[split] = table.pictures()
        rows = [_objects(cell, table.where) for cell in table.values(column)]
        pictures.targets = Boxes([boxes for boxes, _ in rows], [labels for _, labels in rows], None)
        class_names = class_names or table.class_names(column)
    if not class_names:
        top = max((int(v.max(initial=-1)) for i in splits.values() for v in i.targets.labels), default=-1)
        class_names = [str(k) for k in range(top + 1)]
    return Source(name, splits, class_names, warnings)


def _objects(cell: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (m, 4) and labels (m,) of a row: a dict of lists, or a list of dicts."""
    if isinstance(cell, list):
        cell = {k: [c.get(k) for c in cell] for k in ("bbox", "category")}
    try:
        boxes = np.asarray((cell or {}).get("bbox") or np.zeros((0, 4)), np.float32).reshape(-1, 4)
        said: Any = next((v for k in ("category", "label", "labels", "category_id") if (v := (cell or {}).get(k))), [])
        labels = np.asarray(said, np.int64)
        if len(labels) != len(boxes):
            raise ValueError(f"{len(boxes)} boxes but {len(labels)} categories")
    except (ValueError, TypeError) as e:
        raise DataError(f"{where}: objects must have bbox (four numbers each) and category (whole numbers): {e}") from e
    return boxes, labels


def _coco(root: Path) -> Source:
    """COCO's format: images, annotations with bbox x, y, width, height, and categories."""
    parts = {s: (here, _coco_file(here)) for s, here in folders.split_folders(root).items()}
    missing = next((here for here, file in parts.values() if file is None), None)
    if missing is not None:
        raise DataError(f"{missing} has no {_COCO[0]}; data for task 'detect' must be {ACCEPTED}")
    splits: dict[str, Items] = {}
    skipped: list[tuple[str, str]] = []
    categories: dict[int, str] = {}
    for split, (here, file) in parts.items():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))  # type: ignore[union-attr]
            categories = categories or {int(c["id"]): printable(str(c["name"])) for c in content["categories"]}
            number = {k: i for i, k in enumerate(sorted(categories))}
            objects: dict[Any, list[tuple[list[float], int]]] = defaultdict(list)
            for a in content["annotations"]:
                if not a.get("iscrowd"):
                    objects[a["image_id"]].append((a["bbox"], number.get(int(a["category_id"]), -1)))
            images = [(str(i["file_name"]), objects[i["id"]]) for i in content["images"]]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(f"{file} is not in COCO's format ({type(e).__name__}: {e})") from e
        reader = folders.files(here)
        where = {name: k for k, name in enumerate(reader.names)}
        pairs = [(where.get(n, where.get(f"images/{n}", -1)), n, there) for n, there in images]
        skipped += [(f"{split}/{printable(n)}", f"no such file in {here.name}/") for k, n, _ in pairs if k < 0]
        pairs = sorted((p for p in pairs if p[0] >= 0), key=lambda p: p[0])
        if not pairs:
            raise DataError(f"{file}: none of its {len(images)} images is in {here}")
        splits[split] = Items(
            reader, np.asarray([p[0] for p in pairs], np.int64), np.zeros(len(pairs), np.int64),
            [f"{split}/{printable(p[1])}" for p in pairs], "stretch",
            Boxes(
                [np.asarray([b for b, _ in p[2]], np.float32).reshape(-1, 4) for p in pairs],
                [np.asarray([k for _, k in p[2]], np.int64) for p in pairs],
                "xywh",
            ),
        )  # fmt: skip
    names = [categories[k] for k in sorted(categories)]
    return Source(root.resolve().name, splits, names, [], skipped)


def _coco_file(here: Path) -> Path | None:
    return next((here / name for name in _COCO if (here / name).is_file()), None)


# ---------------------------------------------------------------------------------------------------------------- build


class Builder:
    """What `load.build` asks of a task: boxes in pixels of the decoded pictures, and the data in the end."""

    def __init__(self, *, box_format: str = "auto") -> None:
        if box_format not in FORMATS:
            raise ValueError(f"box_format must be one of {', '.join(FORMATS)}, got {box_format!r}")
        self.format = box_format
        self.warnings: list[str] = []

    def targets(
        self, source: Source, items: dict[str, Items], size: tuple[int, int], cache: str | os.PathLike[str]
    ) -> tuple[dict[str, Boxes], dict[str, Skipped]]:
        """The boxes of every split, and the rows whose boxes make no sense."""
        form = next(its.targets.form for its in items.values())
        if form is None and self.format == "auto":
            form = self._guess([b for its in items.values() for b in its.targets.boxes])
        form = form or self.format
        out: dict[str, Boxes] = {}
        bad: dict[str, Skipped] = {}
        with Progress("reading sizes", sum(map(len, items.values()))) as progress:
            for s, its in items.items():
                sizes = for_each(lambda i, its=its: _size_of(its, i), len(its), progress.step)  # type: ignore[misc]
                found = its.targets
                boxes = [_corners(b) if form == "xywh" else b for b in found.boxes]
                bad[s], scaled = [], []
                for i, (box, label, there) in enumerate(zip(boxes, found.labels, sizes, strict=True)):
                    reason = _wrong(box, label, there, len(source.class_names)) if there else None
                    if reason:
                        bad[s].append((i, reason))
                    (h, w), (high, wide) = there or size, size
                    inside = box.clip(0, [w, h, w, h])
                    scaled.append((inside * [wide / w, high / h, wide / w, high / h]).astype(np.float32))
                out[s] = Boxes(scaled, [np.ascontiguousarray(label) for label in found.labels])
        return out, bad

    def finish(self, source: Source, splits: dict[str, Split], **more: Any) -> DetectData:
        labels = splits["train"].targets.labels
        counts = np.bincount(np.concatenate([np.empty(0, np.int64), *labels]), minlength=len(source.class_names))
        if not counts.sum():
            raise DataError(f"{source.name}: there are no objects in the {len(labels)} training pictures")
        more["warnings"] += self.warnings
        absent = [n for n, c in zip(source.class_names, counts, strict=True) if not c]
        if absent:
            shown = f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}"
            more["warnings"].append(f"classes without training objects: {shown}")
        empty = sum(not len(v) for v in labels)
        if empty:
            more["warnings"].append(f"{empty} of {len(labels)} training pictures have no objects")
        return DetectData(source.name, splits, source.class_names, **more)

    def _guess(self, boxes: Sequence[np.ndarray]) -> str:
        """Corners, unless the second pair of numbers is too often not beyond the first."""
        every = np.concatenate([np.zeros((0, 4), np.float32), *boxes])
        if not len(every) or ((every[:, 2:] > every[:, :2]).all(1)).mean() >= 0.95:
            return "xyxy"
        self.warnings.append("boxes were read as x, y, width, height (choose with box_format)")
        return "xywh"


def _corners(boxes: np.ndarray) -> np.ndarray:
    """x, y, width, height -> x1, y1, x2, y2."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _size_of(items: Items, i: int) -> tuple[int, int] | None:
    """(H, W); None for what cannot be read, which decoding has found out already."""
    try:
        return upright_size(open_image(items.read(i)))
    except (Unreadable, OSError):
        return None


def _wrong(boxes: np.ndarray, labels: np.ndarray, size: tuple[int, int], classes: int) -> str | None:
    """Why some boxes cannot be used. Those that reach over the edge can: they are cut."""
    h, w = size
    for box, label in zip(boxes, labels.tolist(), strict=True):
        x1, y1, x2, y2 = box.tolist()
        words = f"box ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
        if not np.isfinite(box).all() or x2 <= x1 or y2 <= y1:
            return f"{words} has no area"
        if not (0 <= (x1 + x2) / 2 <= w and 0 <= (y1 + y2) / 2 <= h):
            return f"{words} lies outside the picture of {w}x{h} pixels"
        if not 0 <= label < classes:
            return f"class {label} of a box is none of the {classes} classes"
    return None
