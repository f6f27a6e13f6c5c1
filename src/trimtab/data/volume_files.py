"""Volumes in files: numpy's .npz and .npy without pickle, and NIfTI (`trimtab[volumes]`).

A case is a volume with its label. A folder holds cases as ``NAME.npz`` with arrays ``image`` and ``label``, or as
files of the same names in ``images/`` and ``labels/`` (or ``masks/``); or train/, val/ and test/ folders of those.
Headers are read before arrays, and what is too large, or is no volume, is refused. NIfTI files are turned as their
headers say: depth goes from feet to head, height from back to front, width from left to right (RAS).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from trimtab.core.errors import DataError, MissingExtra, need
from trimtab.core.files import write_bytes
from trimtab.data.folders import split_folders
from trimtab.data.images import Unreadable
from trimtab.data.sources import Items, Source, printable

ENDINGS = (".npz", ".npy", ".nii.gz", ".nii")
ACCEPTED = (
    "a folder of .npz files with arrays image (C, D, H, W) and label, or with folders images/ and labels/ of .npz, "
    ".npy or NIfTI files of the same names (or train/val/test folders of those)"
)
MAX_BYTES = 2 * 2**30  # of one array, unpacked
MAX_SIDE = 4096
_LABELS = ("labels", "masks", "annotations")
Form = tuple[tuple[int, ...], tuple[int, ...]]  # (C, D, H, W) of the image; (D, H, W) or (K, D, H, W) of the label


class Cases:
    """Cases in files: a `Reader` whose `read` gives a digest, which tells a case from others."""

    random_access = True

    def __init__(self, files: list[tuple[Path, Path]]) -> None:
        self.files = files

    def form(self, i: int) -> Form:
        """The shapes of a case, from the headers of its files. Raises Unreadable."""
        image, label = self.files[i]
        return _form(shape_of(image, "image"), shape_of(label, "label"))

    def case(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """A volume float32 (C, D, H, W) and its label uint8 (D, H, W) or (K, D, H, W). Raises Unreadable."""
        image, label = self.files[i]
        return read_volume(image), _as_label(_read(label, "label"))

    def read(self, i: int) -> bytes:
        digest = hashlib.blake2b()
        for path in dict.fromkeys(self.files[i]):
            with open(path, "rb") as f:
                digest.update(hashlib.file_digest(f, "blake2b").digest())
        return digest.digest()

    def nbytes(self, i: int) -> int:
        return sum(path.stat().st_size for path in self.files[i])

    def stamp(self) -> str:
        return ""


def holds_volumes(root: Path) -> bool:
    """Whether a folder has volumes where pictures could be."""
    places = [place for here in split_folders(root).values() for place in (here, here / "images")]
    return any(_ending(path.name) for place in places if place.is_dir() for path in place.iterdir())


def find_cases(root: Path) -> Source:
    """The cases of every split.

    Raises:
        DataError: there are none. MissingExtra: they are NIfTI files, and nibabel is not installed.
    """
    splits, skipped, warnings = {}, [], []
    for split, here in split_folders(root).items():
        labels = next((here / name for name in _LABELS if (here / name).is_dir()), None)
        apart = labels is not None and (here / "images").is_dir()
        images = _files(here / "images" if apart else here)
        answers = _files(labels) if apart and labels is not None else {k: p for k, p in images.items() if _packed(p)}
        files = [(path, answers[stem]) for stem, path in images.items() if stem in answers]
        skipped += [(_name(split, p), "has no label") for stem, p in images.items() if stem not in answers]
        if not files:
            raise DataError(f"{here} holds no volume with a label; volumes are {ACCEPTED}")
        if len(answers) > len(files):
            warnings.append(f"{len(answers) - len(files)} labels of {split} belong to no volume")
        if any(_ending(path.name).startswith(".nii") for pair in files for path in pair):
            _nibabel()
        rows = np.arange(len(files))
        splits[split] = Items(Cases(files), rows, np.zeros(len(files), np.int64), [_name(split, p) for p, _ in files])
    return Source(root.resolve().name, splits, [], warnings, skipped)


def read_volume(path: Path) -> np.ndarray:
    """The volume in a file, float32 (C, D, H, W); the array ``image`` of an .npz file.

    Raises:
        Unreadable: or MissingExtra.
    """
    array = _read(path, "image")
    if array.ndim not in (3, 4) or array.dtype.kind not in "biuf":
        raise Unreadable(f"a volume must be numbers (C, D, H, W) or (D, H, W), got {array.dtype} {array.shape}")
    with np.errstate(over="ignore"):
        volume = np.ascontiguousarray(array, np.float32).reshape(-1, *array.shape[-3:])
    if not np.isfinite(volume).all():
        raise Unreadable("the volume has values that are not finite")
    return volume


def write_mask(folder: Path, name: str, mask: np.ndarray, like: Path) -> Path:
    """A mask (D, H, W) or (K, D, H, W) of the volume in the file `like`, lying as that volume does.

    Of a NIfTI file it is ``NAME-mask.nii.gz``, turned back, with its affine; otherwise ``NAME-mask.npz``, an array
    ``mask``.
    """
    if not _ending(like.name).startswith(".nii"):
        packed = io.BytesIO()
        np.savez_compressed(packed, mask=mask)
        return write_bytes(folder / f"{name}-mask.npz", packed.getvalue())
    nibabel = _nibabel()
    image: Any = nibabel.load(like)
    ras = nibabel.orientations.axcodes2ornt("RAS")
    back = nibabel.apply_orientation(mask.T, nibabel.orientations.ornt_transform(ras, _turn(image)))
    made = nibabel.Nifti1Image(back, image.affine).to_bytes()
    return write_bytes(folder / f"{name}-mask.nii.gz", gzip.compress(made, mtime=0))


def shape_of(path: Path, key: str) -> tuple[int, ...]:
    """The shape of an array by its header. Raises Unreadable: no such array, or larger than `MAX_BYTES`."""
    with _told(path):
        if _ending(path.name).startswith(".nii"):
            image: Any = _nibabel().load(path)
            turned = dict(zip(_turn(image)[:, 0], image.shape, strict=False))
            shape = (*reversed(image.shape[3:]), *(turned[axis] for axis in (2, 1, 0)))
            size = 8  # what is scaled becomes float64
        else:
            with _opened(path, key) as f:
                shape, size = _header(f)
        if math.prod(shape) * size > MAX_BYTES:
            raise Unreadable(f"{key} has {math.prod(shape) * size:,} bytes when unpacked (limit {MAX_BYTES >> 20} MiB)")
        if len(shape) not in (3, 4) or not all(1 <= side <= MAX_SIDE for side in shape):
            raise Unreadable(f"{key} must be (D, H, W) or (C, D, H, W) with sides up to {MAX_SIDE}, got {shape}")
    return shape


def _read(path: Path, key: str) -> np.ndarray:
    shape_of(path, key)
    with _told(path):
        if _ending(path.name).startswith(".nii"):
            image: Any = _nibabel().load(path)
            return _nibabel().apply_orientation(image.dataobj, _turn(image)).T  # (W, H, D[, C])
        with _opened(path, key) as f:
            return np.asarray(np.lib.format.read_array(f, allow_pickle=False))


@contextmanager
def _opened(path: Path, key: str) -> Iterator[IO[bytes]]:
    """The bytes of an array as .npy."""
    if not _packed(path):
        with open(path, "rb") as f:
            yield f
        return
    with zipfile.ZipFile(path) as archive:
        if f"{key}.npy" not in archive.namelist():
            held = ", ".join(printable(name.removesuffix(".npy")) for name in archive.namelist()[:6])
            raise Unreadable(f"has no array {key!r} (it has {held or 'none'})")
        with archive.open(f"{key}.npy") as f:
            yield f


def _header(f: IO[bytes]) -> tuple[tuple[int, ...], int]:
    """Shape, and bytes of a value."""
    version = np.lib.format.read_magic(f)
    if version not in ((1, 0), (2, 0)):
        raise Unreadable("its array is no plain one")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(f)
    if dtype.hasobject:
        raise Unreadable("its array holds Python objects, which are not read")
    return shape, dtype.itemsize


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever goes wrong in here, in a line."""
    try:
        yield
    except (Unreadable, MissingExtra):
        raise
    except Exception as e:  # each format, and each way of packing, has its own errors
        why = e.strerror if isinstance(e, OSError) and e.strerror else (str(e).splitlines() or [""])[0]
        raise Unreadable(f"damaged, or no {_ending(path.name)} file: {why or type(e).__name__}") from e


def _form(image: tuple[int, ...], label: tuple[int, ...]) -> Form:
    if image[-3:] != label[-3:]:
        raise Unreadable(f"the label is {label[-3:]}, its volume {image[-3:]} (D, H, W)")
    return (1, *image) if len(image) == 3 else image, label


def _as_label(array: np.ndarray) -> np.ndarray:
    """uint8: classes (D, H, W), or masks (K, D, H, W) of 0 and 1."""
    whole = array.astype(np.uint8) if array.dtype.kind in "biuf" else np.empty(0, np.uint8)
    if whole.shape != array.shape or not np.array_equal(whole, array):
        raise Unreadable("its label must be whole numbers from 0 to 255")
    if whole.ndim == 4 and whole.max(initial=0) > 1:
        raise Unreadable("its label (K, D, H, W) must be masks of 0 and 1")
    return whole


def _files(folder: Path) -> dict[str, Path]:
    """The volumes in a folder by their names without ending."""
    paths = (p for p in sorted(folder.iterdir()) if not p.name.startswith(".") and _ending(p.name) and p.is_file())
    return {path.name.removesuffix(_ending(path.name)): path for path in paths}


def _ending(name: str) -> str:
    return next((ending for ending in ENDINGS if name.endswith(ending)), "")


def _packed(path: Path) -> bool:
    return path.name.endswith(".npz")


def _name(split: str, path: Path) -> str:
    return printable(f"{split}/{path.name}")


def _turn(image: Any) -> np.ndarray:
    """(3, 2): which axis of right, front and head each of an image's is, and its sign."""
    turn = _nibabel().io_orientation(image.affine)
    if np.isnan(turn).any():
        raise Unreadable("its header does not say how its axes lie")
    return turn.astype(int)


def _nibabel() -> Any:
    return need("nibabel", "volumes")
