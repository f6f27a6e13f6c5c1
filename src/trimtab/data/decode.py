"""Decoding many images with all cores: into memory, into a memory-mapped cache file, or as they are needed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from trimtab.core.errors import DataError
from trimtab.core.files import replacing, write_text
from trimtab.core.log import progress_wanted
from trimtab.data.images import GREY_MODES, Unreadable, open_image, to_mask, to_pixels, upright_size
from trimtab.data.sources import Items

_VERSION = 1  # of the pixels: raise it when `to_pixels` changes what it gives
_SHOW_AFTER = 1.0  # seconds before a progress bar appears

T = TypeVar("T")
Skipped = list[tuple[int, str]]  # (position, reason)


class Lazy:
    """Images of one split, decoded by a pool of threads when they are asked for."""

    def __init__(self, items: Items, size: tuple[int, int], in_chans: int) -> None:
        self.items, self.size, self.in_chans = items, size, in_chans
        self._pool: ThreadPoolExecutor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.items), self.in_chans, *self.size)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """uint8 (len(rows), C, H, W)."""
        out = np.empty((len(rows), self.in_chans, *self.size), np.uint8)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(workers(), thread_name_prefix="trimtab-decode")

        def one(job: tuple[int, int]) -> None:
            place, i = job
            try:
                out[place] = read_pixels(self.items, i, self.size, self.in_chans)
            except (Unreadable, OSError) as e:  # it could be read when the data was loaded
                raise DataError(f"{self.items.names[i]} can no longer be read: {e}") from e

        list(self._pool.map(one, enumerate(rows.tolist())))
        return torch.from_numpy(out)


class View:
    """Some rows of images that are not copied: what `Tensor.__getitem__` would give, made when it is asked for."""

    def __init__(self, images: Tensor | Lazy | View, rows: Tensor) -> None:
        self.images, self.rows = images, rows

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return pick(self.images, self.rows[rows])


Images = Tensor | Lazy | View


def pick(images: Images, rows: Tensor) -> Tensor:
    """uint8 (len(rows), C, H, W). numpy's take is one copy per image; indexing a tensor costs 20 times as much."""
    if isinstance(images, Tensor):
        return torch.from_numpy(images.numpy().take(rows.numpy(), axis=0))
    return images[rows]


def workers() -> int:
    """Threads for decoding: one per usable core."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, usable))


def memory_cap() -> int:
    """Bytes that decoded images may take in memory: a quarter of what is free, or $TRIMTAB_DATA_MEMORY."""
    text = os.environ.get("TRIMTAB_DATA_MEMORY")
    if text:
        try:
            return int(float(text))
        except ValueError:
            raise ValueError(f"TRIMTAB_DATA_MEMORY must be a number of bytes, got {text!r}") from None
    free = 4 * 2**30
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit.isdigit():
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(64 * 2**20, free // 4)


def cache_folder() -> Path:
    """Where decoded images are kept when they do not fit in memory: $TRIMTAB_CACHE, or the user's cache folder."""
    if os.environ.get("TRIMTAB_CACHE"):
        return Path(os.environ["TRIMTAB_CACHE"]) / "data"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab" / "data"


def look(splits: dict[str, Items], *, sample: int = 1000) -> tuple[list[tuple[int, int]], bool]:
    """Upright (H, W) of readable images among evenly spaced ones, and whether all of those are grey."""
    sizes, grey = [], True
    for items in splits.values():
        for k in np.unique(np.linspace(0, len(items) - 1, min(sample, len(items))).astype(int)):
            try:
                image = open_image(items.read(int(k)))
            except (Unreadable, OSError):
                continue
            sizes.append(upright_size(image))
            grey = grey and image.mode in GREY_MODES
    return sizes, grey and bool(sizes)


def read_pixels(items: Items, i: int, size: tuple[int, int], in_chans: int) -> np.ndarray:
    """Item i as uint8 (C, H, W); the targets of masks are their pictures.

    Raises:
        Unreadable: or OSError.
    """
    image = open_image(items.read(i))
    if items.fit == "mask":
        return to_mask(image, size, upright_size(open_image(items.targets.read(i))))
    return to_pixels(image, size, in_chans, stretch=items.fit == "stretch")


def decode(
    items: Items, size: tuple[int, int], in_chans: int, out: np.ndarray | None, step: Callable[[int], None]
) -> Skipped:
    """Decode all items into `out` uint8 (N, C, H, W), or only look whether they can be; what could not be read.

    step: told how many more are done.
    """
    pixels = getattr(items.reader, "pixels", None)
    if pixels is not None and pixels.shape[1:] == (in_chans, *size):
        if out is not None:
            out[:] = pixels[items.rows]
        step(len(items))
        return []

    def one(i: int) -> str | None:
        try:
            got = read_pixels(items, i, size, in_chans)
            if out is not None:
                out[i] = got
        except Unreadable as e:
            return str(e)
        except OSError as e:
            return e.strerror or str(e)
        return None

    return [(i, reason) for i, reason in enumerate(for_each(one, len(items), step)) if reason is not None]


def for_each(work: Callable[[int], T], n: int, step: Callable[[int], None]) -> list[T]:
    """[work(0), ..., work(n - 1)], by a pool of threads in small chunks; stops soon when interrupted."""
    stop = threading.Event()
    results: dict[int, list[T]] = {}

    def some(rows: range) -> list[T]:
        return [work(i) for i in rows if not stop.is_set()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of image decoders, about this or that image
        with ThreadPoolExecutor(workers(), thread_name_prefix="trimtab-decode") as pool:
            waiting: dict[Future[list[T]], range] = {}
            chunks = (range(k, min(n, k + 32)) for k in range(0, n, 32))
            try:
                while True:
                    for rows in chunks:
                        waiting[pool.submit(some, rows)] = rows
                        if len(waiting) >= 4 * workers():
                            break
                    if not waiting:
                        break
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        rows = waiting.pop(future)
                        results[rows.start] = future.result()
                        step(len(rows))
            except BaseException:  # Ctrl-C: let the threads finish their image, no more
                stop.set()
                raise
    return [r for start in sorted(results) for r in results[start]]


def decode_splits(
    splits: dict[str, Items], size: tuple[int, int], in_chans: int, cache: str | os.PathLike[str]
) -> tuple[dict[str, Images], dict[str, Skipped], str]:
    """Images of every split, what was skipped, and how they are kept: "memory", "disk" or "lazy".

    The images hold all positions; those of skipped ones are undefined.
    """
    each = in_chans * size[0] * size[1]
    need = each * sum(map(len, splits.values()))
    how, folder = _how(os.fspath(cache), need)
    if how == "lazy":
        slow = [s for s, items in splits.items() if not items.reader.random_access]
        if slow:
            raise DataError(
                f"parquet is too slow to be decoded lazily, in random order; free {need / 1e9:.1f} GB in {folder} for "
                "decoded images (or set TRIMTAB_CACHE to another folder), or make them smaller with image_size"
            )
    images: dict[str, Images] = {}
    skipped: dict[str, Skipped] = {}
    with Progress("reading images", sum(map(len, splits.values()))) as progress:
        for split, items in splits.items():
            if how == "disk":
                images[split], skipped[split] = _on_disk(items, size, in_chans, folder, progress.step)
            elif how == "lazy":
                images[split] = Lazy(items, size, in_chans)
                skipped[split] = decode(items, size, in_chans, None, progress.step)
            else:
                out = np.empty((len(items), in_chans, *size), np.uint8)
                skipped[split] = decode(items, size, in_chans, out, progress.step)
                images[split] = torch.from_numpy(out)
    return images, skipped, how


def _how(cache: str, need: int) -> tuple[str, Path]:
    folder = cache_folder()
    if cache not in ("auto", "memory", "disk", "lazy"):
        return "disk", Path(cache)
    if cache != "auto":
        return cache, folder
    if need <= memory_cap():
        return "memory", folder
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    return ("disk" if shutil.disk_usage(existing).free > 1.2 * need else "lazy"), folder


def _on_disk(
    items: Items, size: tuple[int, int], in_chans: int, folder: Path, step: Callable[[int], None]
) -> tuple[Tensor, Skipped]:
    """Decode into ``KEY.u8`` in `folder`, or use what is there; ``KEY.json``, written last, says it is complete."""
    shape = (len(items), in_chans, *size)
    h = hashlib.blake2b(repr((_VERSION, shape)).encode(), digest_size=16)
    h.update(items.reader.stamp().encode(errors="replace"))
    if items.fit != "cover":
        h.update(items.fit.encode())
    h.update(np.ascontiguousarray(items.rows).tobytes())
    data, note = folder / f"{h.hexdigest()}.u8", folder / f"{h.hexdigest()}.json"
    skipped = _read_note(note, data, int(np.prod(shape))) if items.reader.stamp() else None
    if skipped is None:
        try:
            with replacing(data) as new:
                if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash while writing
                    with open(new, "r+b") as f:
                        os.posix_fallocate(f.fileno(), 0, int(np.prod(shape)))
                out = np.memmap(new, np.uint8, "w+", shape=shape)
                skipped = decode(items, size, in_chans, out, step)
                out.flush()
                del out
            write_text(note, json.dumps({"skipped": skipped}))
        except OSError as e:
            raise DataError(f"the cache of decoded images in {folder} cannot be written: {e.strerror or e}") from e
    else:
        step(len(items))
    flat = torch.from_file(str(data), shared=False, size=int(np.prod(shape)), dtype=torch.uint8)
    return flat.view(shape), skipped


def _read_note(note: Path, data: Path, size: int) -> Skipped | None:
    try:
        if data.stat().st_size != size:
            return None
        return [(int(i), str(reason)) for i, reason in json.loads(note.read_text(encoding="utf-8"))["skipped"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Progress:
    """A bar on the terminal, once the work has taken a while."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done, self.start = title, total, 0, time.monotonic()
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        return self

    def step(self, n: int) -> None:
        self.done += n
        if self.bar is None and time.monotonic() - self.start > _SHOW_AFTER and progress_wanted():
            from rich import progress as rich
            from rich.console import Console

            shown = (
                rich.TextColumn(self.title),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TimeRemainingColumn(),
            )
            self.bar = rich.Progress(*shown, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
