"""Logging: quiet plain lines in files and pipes, rich on a terminal.

Modules ask for ``logger(__name__)`` and never print. Nothing is configured on import, so a program that embeds
trimtab keeps its own logging; only the command line (and the evidence and benchmark runners) call `setup`.
All of it goes to stderr: stdout belongs to results.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

ROOT = "trimtab"

_progress = True


def logger(name: str = ROOT) -> logging.Logger:
    """The logger of a module, always below ``trimtab``.

    >>> logger("trimtab.learn.fit").name
    'trimtab.learn.fit'
    >>> logger("my_recipe").name
    'trimtab.my_recipe'
    """
    return logging.getLogger(name if name == ROOT or name.startswith(ROOT + ".") else f"{ROOT}.{name}")


def setup(verbosity: int = 0, stream: TextIO | None = None) -> logging.Logger:
    """Send trimtab's log to `stream` (default: stderr). Calling it again replaces the former setting.

    verbosity: -1 warnings only and no progress bars, 0 what a user wants to know, 1 everything.
    """
    global _progress
    stream = sys.stderr if stream is None else stream
    root = logger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(_handler(stream, verbosity))
    root.setLevel({-1: logging.WARNING, 0: logging.INFO}.get(max(verbosity, -1), logging.DEBUG))
    root.propagate = False
    _progress = verbosity >= 0 and stream.isatty()
    return root


def progress_wanted() -> bool:
    """Whether a progress bar may be drawn: on a terminal, and the user did not ask for quiet."""
    return _progress and sys.stderr.isatty()


def _handler(stream: TextIO, verbosity: int) -> logging.Handler:
    if stream.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        console = Console(file=stream)
        handler: logging.Handler = RichHandler(console=console, show_path=verbosity > 0, show_time=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
        return handler
    handler = logging.StreamHandler(stream)
    form = "%(levelname)s %(name)s: %(message)s" if verbosity > 0 else "%(message)s"
    handler.setFormatter(_Plain(form))
    return handler


class _Plain(logging.Formatter):
    """Information is a bare line; a warning says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING and not text.startswith(record.levelname):
            return f"{record.levelname.lower()}: {text}"
        return text
