"""Files that are written whole or not at all: under a temporary name beside the target, then renamed."""

from __future__ import annotations

import glob
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STALE = 3600.0  # seconds after which nobody is still writing a temporary file


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file to write to; it becomes `path` when the block ends well, and is gone when it does not.

    Folders on the way are made. The content is on the disk before the name is: a crash leaves the old file or the new.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with replacing(folder / "a" / "note.txt") as new:
    ...     _ = new.write_text("whole")
    >>> (folder / "a" / "note.txt").read_text(), len(list((folder / "a").iterdir()))
    ('whole', 1)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
    os.close(handle)
    new = Path(name)
    try:
        yield new
        with open(new, "rb+") as f:
            os.fsync(f.fileno())
        new.chmod(0o666 & ~_umask())  # mkstemp's files are for their owner alone
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` in UTF-8, whole or not at all; returns the path."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, raw: bytes) -> Path:
    """Write `raw`, whole or not at all; returns the path."""
    with replacing(path) as new:
        new.write_bytes(raw)
    return Path(path)


def _sweep(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` have left."""
    for left in path.parent.glob(f".{glob.escape(path.name[:40])}.*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()


def _umask() -> int:
    """The process's umask; there is no way to read it without setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
