"""Folders of class folders, and zips of them. Nothing is ever extracted: zip members are read into memory, bounded."""

from __future__ import annotations

import hashlib
import os
import threading
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from trimtab.core.errors import DataError
from trimtab.data.images import ENDINGS, MAX_FILE_BYTES, Unreadable
from trimtab.data.sources import SPLITS, Items, Reader, Source, printable

MAX_MEMBERS = 5_000_000
_LAYOUT = "expected one folder of images per class (root/cat/1.jpg), or train/, val/ and test/ folders of those"


class Files:
    """Images in files."""

    random_access = True

    def __init__(self, root: Path, names: list[str], sizes: list[int], times: list[int]) -> None:
        self.root, self.names, self.sizes, self.times = root, names, sizes, times

    def read(self, i: int) -> bytes:
        if self.sizes[i] > MAX_FILE_BYTES:
            raise Unreadable(f"file larger than {MAX_FILE_BYTES >> 20} MiB")
        with open(self.root / self.names[i], "rb") as f:
            return f.read(MAX_FILE_BYTES)

    def nbytes(self, i: int) -> int:
        return self.sizes[i]

    def stamp(self) -> str:
        h = hashlib.blake2b(str(self.root.resolve()).encode(errors="replace"))
        for entry in zip(self.names, self.sizes, self.times, strict=True):
            h.update(repr(entry).encode(errors="replace"))
        return h.hexdigest()


class Members:
    """Images in a zip file; one handle per thread."""

    random_access = True

    def __init__(self, path: Path, infos: list[zipfile.ZipInfo]) -> None:
        self.path, self.infos = path, infos
        self._local = threading.local()

    def read(self, i: int) -> bytes:
        info = self.infos[i]
        if info.file_size > MAX_FILE_BYTES:
            raise Unreadable(f"{info.file_size} bytes when unpacked (limit {MAX_FILE_BYTES >> 20} MiB)")
        if info.flag_bits & 1:
            raise Unreadable("encrypted")
        archive = getattr(self._local, "archive", None)
        if archive is None:
            archive = self._local.archive = zipfile.ZipFile(self.path)
        try:
            with archive.open(info) as f:
                data = f.read(info.file_size + 1)  # bounded: the size in the directory may be a lie
        except Exception as e:  # each way of packing has its own errors
            raise Unreadable(f"damaged in the zip: {e}") from e
        if len(data) != info.file_size:
            raise Unreadable("damaged in the zip: size differs from what its directory says")
        return data

    def nbytes(self, i: int) -> int:
        return self.infos[i].file_size

    def stamp(self) -> str:
        stat = self.path.stat()
        return f"{self.path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def files(root: Path) -> Files:
    """The images below `root`."""
    names, _, sizes, times = _walk(root)
    keep = [i for i, name in enumerate(names) if _is_image(name)]
    return Files(root, [names[i] for i in keep], [sizes[i] for i in keep], [times[i] for i in keep])


def split_folders(root: Path, *, need_train: bool = True) -> dict[str, Path]:
    """The folder of each split: train/, val/ and test/ where there is a train/, otherwise `root` for train.

    need_train: False takes val/ and test/ without a train/ for splits, too.

    Raises:
        DataError: two folders for one split.
    """
    found: dict[str, Path] = {}
    for path in sorted(p for p in root.iterdir() if p.is_dir() and p.name.lower() in SPLITS):
        split = SPLITS[path.name.lower()]
        if split in found:
            raise DataError(f"{root} has two folders for {split}: {found[split].name}/ and {path.name}/")
        found[split] = path
    return found if "train" in found or (found and not need_train) else {"train": root}


def from_folder(root: Path) -> Source:
    """Raises DataError when `root` is not laid out in class folders."""
    names, folders, _, _ = _walk(root)
    reader = files(root)
    return _source(root.resolve().name or str(root), str(root), reader, reader.names, folders, names)


def from_zip(path: Path) -> Source:
    """Raises DataError when `path` is not a zip, or is not laid out in class folders."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
        raise DataError(f"{path} is not a readable zip file: {e}") from e
    if len(infos) > MAX_MEMBERS:
        raise DataError(f"{path} has {len(infos)} members (limit {MAX_MEMBERS})")
    skipped, names, folders, kept = [], [], set(), []
    for info in infos:
        name = info.filename
        if not _safe(name):
            skipped.append((printable(name), "unsafe path in the zip"))
        elif _hidden(name.strip("/")):
            continue
        elif info.is_dir():
            folders.add(name.strip("/"))
        else:
            names.append(name)
            if _is_image(name):
                kept.append(info)
    reader = Members(path, kept)
    source = _source(path.stem, str(path), reader, [i.filename for i in kept], folders, names)
    source.skipped = skipped
    return source


def _source(name: str, where: str, reader: Reader, images: list[str], folders: set[str], files: list[str]) -> Source:
    """Sort `images` (paths below the root, in the reader's order) into splits and classes."""
    if not images:
        raise DataError(f"{where} holds no images; {_LAYOUT}")
    warnings = []
    if len(images) < len(files):
        endings = Counter(PurePosixPath(f).suffix.lower() or "no ending" for f in files if not _is_image(f))
        kinds = ", ".join(k for k, _ in endings.most_common(4))
        warnings.append(f"{len(files) - len(images)} files that are not images were ignored ({kinds})")
    parts = [tuple(n.split("/")) for n in images]
    dirs = {tuple(f.split("/")) for f in folders} | {p[:k] for p in parts for k in range(1, len(p))}
    roots = _roots(where, dirs, {p[:-1] for p in parts})
    found: dict[str, list[tuple[int, str]]] = {split: [] for split in roots}  # image, class
    for i, p in enumerate(parts):
        for split, root in roots.items():
            if p[: len(root)] == root and len(p) > len(root) + 1:
                found[split].append((i, p[len(root)]))
    used = sum(map(len, found.values()))
    if not found["train"]:
        raise DataError(f"{where} holds {len(images)} images but none in a class folder; {_LAYOUT}")
    if used < len(images):
        warnings.append(f"{len(images) - used} images outside of the class folders were ignored")
    classes = sorted({c for _, c in found["train"]})
    label = {c: k for k, c in enumerate(classes)}
    for split, pairs in found.items():
        for _, c in pairs:
            if c not in label:
                raise DataError(f"{where}: class {printable(c)!r} is in {split} but has no images in train")
    root = roots["train"]
    empty = {d[-1] for d in dirs if len(d) == len(root) + 1 and d[: len(root)] == root} - set(classes)
    if empty:
        warnings.append(
            f"class folders without images were left out: {', '.join(printable(c) for c in sorted(empty)[:5])}"
        )
    items, shown = {}, [printable(n) for n in images]
    for split, pairs in found.items():
        if pairs:
            rows = np.asarray([i for i, _ in pairs], np.int64)
            items[split] = Items(reader, rows, np.asarray([label[c] for _, c in pairs]), [shown[i] for i, _ in pairs])
    return Source(name, items, [printable(c) for c in classes], warnings)


def _roots(where: str, dirs: set[tuple[str, ...]], direct: set[tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Where the class folders of each split lie. direct: the folders that hold images themselves."""
    base: tuple[str, ...] = ()
    while True:
        below = sorted(d for d in dirs if len(d) == len(base) + 1 and d[: len(base)] == base)
        named = {d: SPLITS[d[-1].lower()] for d in below if d[-1].lower() in SPLITS}
        # a folder "train" with pictures in it is the class of trains
        splits = {d: s for d, s in named.items() if d not in direct and any(x[:-1] == d for x in dirs)}
        if "train" in splits.values():
            roots: dict[str, tuple[str, ...]] = {}
            for d, s in splits.items():
                if s in roots:
                    raise DataError(f"{where} has two folders for {s}: {roots[s][-1]}/ and {d[-1]}/")
                roots[s] = d
            return roots
        if splits and len(splits) == len(below):
            raise DataError(f"{where} has {' and '.join(d[-1] + '/' for d in below)} but no train/; {_LAYOUT}")
        # a single folder around everything, as zips often have
        if len(below) != 1 or base in direct or below[0] in direct or not any(d[:-1] == below[0] for d in dirs):
            return {"train": base}
        base = below[0]


def _walk(root: Path) -> tuple[list[str], set[str], list[int], list[int]]:
    """Files (relative, sorted, with size and time) and folders below `root`; follows links, but never in a circle."""
    found, folders, seen = [], set(), set()
    stack = [""]
    while stack:
        here = stack.pop()
        real = os.path.realpath(root / here)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(root / here))
        except OSError as e:
            raise DataError(f"{root / here} cannot be listed: {e.strerror}") from e
        for entry in entries:
            name = f"{here}/{entry.name}" if here else entry.name
            if _hidden(entry.name):
                continue
            try:
                if entry.is_dir():
                    folders.add(name)
                    stack.append(name)
                elif entry.is_file():  # no pipes, no devices
                    stat = entry.stat()
                    found.append((name, stat.st_size, stat.st_mtime_ns))
                elif entry.is_symlink():
                    found.append((name, 0, 0))  # dangling: reported when it is read
            except OSError:
                found.append((name, 0, 0))
    found.sort()
    return [f[0] for f in found], folders, [f[1] for f in found], [f[2] for f in found]


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in ENDINGS


def _hidden(name: str) -> bool:
    return any(p.startswith(".") or p in ("__MACOSX", "Thumbs.db", "desktop.ini") for p in name.split("/"))


def _safe(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return not (name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name)
