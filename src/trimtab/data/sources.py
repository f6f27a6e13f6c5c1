"""Where images come from: a spec in words becomes `Source`, named and labelled images that are not decoded yet."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from trimtab.core.errors import DataError

SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
ACCEPTED = (
    "'digits', 'shapes:classes=4,size=32,n=500', 'fractals:classes=1000,size=32', a folder with one folder of images "
    "per class (or train/val/test folders of those), a .zip of one, a parquet file or folder in Hugging Face layout, "
    "or a name on the Hugging Face hub ('owner/name' or 'hub:name')"
)


if TYPE_CHECKING:
    from trimtab.data.synthetic import Scenes


class Reader(Protocol):
    """Random access to encoded images, safe to use from several threads."""

    random_access: bool  # False: reading out of order is very slow

    def read(self, i: int) -> bytes | Image.Image:
        """Encoded bytes, or an image. Raises Unreadable or OSError."""

    def nbytes(self, i: int) -> int | None:
        """Encoded size in bytes if it is known without reading."""

    def stamp(self) -> str:
        """Changes when the files behind it change; "" when there is no such thing."""


@dataclass
class Items:
    """Images of one split: rows of a reader, with a name for reports and a label."""

    reader: Reader
    rows: np.ndarray  # int64 (N,), positions in the reader, ascending
    labels: np.ndarray  # int64 (N,); zeros where images have no single label
    names: Sequence[str]
    fit: str = "cover"  # how images are brought to one size: "cover", "stretch", or "mask" (class indices, stretched)
    targets: Any = None  # what else belongs to each image: has `take`

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, keep: np.ndarray) -> Items:
        keep = np.sort(np.asarray(keep, np.int64))
        return Items(
            self.reader, self.rows[keep], self.labels[keep], [self.names[i] for i in keep.tolist()], self.fit,
            None if self.targets is None else self.targets.take(keep),
        )  # fmt: skip

    def read(self, i: int) -> bytes | Image.Image:
        return self.reader.read(int(self.rows[i]))


@dataclass
class Source:
    name: str
    splits: dict[str, Items]
    class_names: list[str]
    warnings: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name, reason), found before decoding
    make: Callable[..., Any] | None = None  # makes the whole `Data`, where images are made as they are needed


class Arrays:
    """Images that are in memory already: uint8 (N, C, H, W)."""

    random_access = True

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def read(self, i: int) -> Image.Image:
        x = self.pixels[i]
        return Image.fromarray(x[0] if len(x) == 1 else np.ascontiguousarray(x.transpose(1, 2, 0)))

    def nbytes(self, i: int) -> int | None:
        return None

    def stamp(self) -> str:
        return ""


def find_source(spec: str | os.PathLike[str]) -> Source:
    """The source that `spec` names.

    Raises:
        DataError: saying what would be accepted, or what is wrong with what was found.
    """
    text = os.fspath(spec) if isinstance(spec, (str, os.PathLike)) else ""
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"data must be {ACCEPTED}; got {spec!r}")
    path = Path(text).expanduser()
    if text == "digits":
        return digits()
    if text == "shapes" or text.startswith("shapes:"):
        return made_shapes(text)
    if text == "fractals" or text.startswith("fractals:"):
        return made_fractals(text)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        from trimtab.data import folders, parquet

        if path.suffix.lower() == ".zip":
            return folders.from_zip(path)
        if path.suffix.lower() == ".parquet":
            return parquet.from_parquet(path)
        raise DataError(f"{text} is a file that is neither .zip nor .parquet; data must be {ACCEPTED}")
    online = hub_name(text)
    if online is not None:
        from trimtab.data.parquet import hub

        return hub(online)
    if text.split(":")[0] == "scenes":
        raise DataError("'scenes' are made for other tasks than classification; give task: segment, detect or restore")
    if text.split(":")[0] == "volumes":
        raise DataError("'volumes' are made for segmentation; give task: segment")
    close = difflib.get_close_matches(text.split(":")[0], ["digits", "shapes", "fractals"], 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    looks_like_path = os.sep in text or text.startswith(".") or path.suffix in (".zip", ".parquet")
    problem = f"there is no file or folder {text}" if looks_like_path else f"unknown data {text!r}{hint}"
    raise DataError(f"{problem}; data must be {ACCEPTED}")


def hub_name(text: str) -> str | None:
    """What a spec names on the Hugging Face hub, ``owner/name`` or ``owner/name:config``; None if that is not meant.

    >>> hub_name("hub:mnist"), hub_name("owner/name:all"), hub_name("digits")
    ('mnist', 'owner/name:all', None)
    """
    if text.startswith("hub:"):
        return text[4:]
    # not where the first half is a folder here: then it is a path with a typing error
    bare = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", text) and not text.startswith(".")
    return text if bare and not Path(text).expanduser().parent.exists() else None


def _folder(path: Path) -> Source:
    from trimtab.data import folders, parquet

    if parquet.parquet_files(path):
        return parquet.from_parquet(path)
    if parquet.is_saved(path):
        return parquet.from_disk(path)
    return folders.from_folder(path)


def digits() -> Source:
    """scikit-learn's 1797 handwritten digits, 8x8 grey: always there, no download."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]  # values are 0..16
    return arrays("digits", {"train": (pixels, bunch.target)}, [str(k) for k in range(10)])


def made_shapes(text: str) -> Source:
    """``shapes:classes=4,size=32,n=500,channels=3,noise=0.05,seed=0``; size may be HxW."""
    from trimtab.data.synthetic import shapes

    pixels, labels, names = _made(shapes, text, _SHAPES)
    return arrays("shapes", {"train": (pixels, labels)}, names)


def made_scenes(text: str) -> Scenes:
    """``scenes:classes=5,size=48,n=300,channels=3,noise=0.03,seed=0``; size may be HxW."""
    from trimtab.data.synthetic import scenes

    return _made(scenes, text, _SHAPES)


def made_fractals(text: str) -> Source:
    """``fractals:classes=1000,size=32,n=100000,channels=3,points=10000,maps=4,seed=0``; size may be HxW."""
    from trimtab.data.fractal_images import source

    kinds = dict.fromkeys(("classes", "n", "channels", "points", "maps", "seed"), int)
    return _made(source, text, {**kinds, "size": _size})


def made_volumes(text: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """``volumes:classes=3,size=32,n=40,channels=4,noise=0.3,overlap=1,seed=0``; size may be DxHxW."""
    from trimtab.data.synthetic import nested_ellipsoids

    return _made(nested_ellipsoids, text, {**_SHAPES, "size": _sides, "overlap": lambda text: bool(int(text))})


def _made(make: Callable[..., Any], text: str, kinds: Mapping[str, Callable[[str], Any]]) -> Any:
    """What `make` gives for the options in words such as ``shapes:classes=4,size=32``."""
    word, _, said = text.partition(":")
    options = {}
    for part in filter(None, said.split(",")):
        key, _, value = part.strip().partition("=")
        if key not in kinds:
            raise DataError(f"{word} takes {', '.join(kinds)}, got {part!r} in {text!r}")
        try:
            options[key] = kinds[key](value)
        except ValueError:
            raise DataError(f"{word}: {key} must be a number, got {value!r}") from None
    try:
        return make(**options)
    except ValueError as e:
        raise DataError(f"{word}: {e}") from e


def arrays(name: str, splits: dict[str, tuple[np.ndarray, np.ndarray]], class_names: list[str]) -> Source:
    """A source from uint8 images (N, C, H, W) and labels (N,)."""
    out = {}
    for split, (pixels, labels) in splits.items():
        names = [f"{name}/{split}/{i}" for i in range(len(pixels))]
        out[split] = Items(Arrays(pixels), np.arange(len(pixels)), np.asarray(labels, np.int64), names)
    return Source(name, out, class_names)


_SHAPES: dict[str, Callable[[str], Any]] = {
    "classes": int, "n": int, "channels": int, "seed": int, "noise": float, "size": lambda text: _size(text),
}  # fmt: skip


def printable(name: str) -> str:
    r"""A file's name as it can be shown and stored: no control characters, no broken encoding.

    >>> printable("cat"), printable("\x1b[31mred")
    ('cat', '\\x1b[31mred')
    """
    return name if name.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _size(text: str) -> int | tuple[int, int]:
    if "x" in text:
        h, _, w = text.partition("x")
        return int(h), int(w)
    return int(text)


def _sides(text: str) -> int | tuple[int, int, int]:
    if "x" in text:
        d, h, w = map(int, text.split("x"))
        return d, h, w
    return int(text)
