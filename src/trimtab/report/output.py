"""Where finished text goes, and where the page's own parts come from."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path


@cache
def resource(name: str) -> str:
    """The text of a file that lies beside this module."""
    return files(__package__ or "trimtab.report").joinpath(name).read_text("utf-8")


def save(text: str, path: str | Path, *, inside: str) -> Path:
    """Write `text` so that a reader never sees half of it; a directory gets the file named `inside`."""
    path = Path(path)
    if path.is_dir():
        path = path / inside
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
