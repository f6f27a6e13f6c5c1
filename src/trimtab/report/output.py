"""Where finished text goes, and where the page's own parts come from."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

from trimtab.core.files import write_text


@cache
def resource(name: str) -> str:
    """The text of a file that lies beside this module."""
    return files(__package__ or "trimtab.report").joinpath(name).read_text("utf-8")


def save(text: str, path: str | Path, *, inside: str) -> Path:
    """Write `text` so that a reader never sees half of it; a directory gets the file named `inside`."""
    path = Path(path)
    return write_text(path / inside if path.is_dir() else path, text)
