"""The progress bar: drawn by hand a few times a second, so that it costs a training step nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from trimtab.core.log import progress_wanted

_EVERY = 0.25  # seconds


class Bar:
    """A rich progress bar on a terminal, nothing elsewhere."""

    def __init__(self, wanted: bool) -> None:
        self._rich: Any = None
        self._next = 0.0
        if wanted and progress_wanted():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("<"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[words]}"),
                console=Console(stderr=True),
                auto_refresh=False,
                transient=True,
            )
            self._task = self._rich.add_task("training", total=1.0, words="")

    def __enter__(self) -> Bar:
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._rich is not None:
            self._rich.stop()

    def update(self, done: Callable[[], tuple[float, str]]) -> None:
        """Draw, if it is time to; only then `done` is asked for (share done, words)."""
        if self._rich is None:
            return
        now = time.perf_counter()
        if now >= self._next:
            share, words = done()
            self._rich.update(self._task, completed=share, words=words, refresh=True)
            self._next = now + _EVERY
