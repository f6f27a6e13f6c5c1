"""What makes a long job resumable: a clock that survives the process, and the results of finished steps."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from trimtab.core.errors import TrimtabError
from trimtab.core.files import write_text

T = TypeVar("T")
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def seconds(text: str | float) -> float:
    """A time limit: `90`, `"90s"`, `"25m"`, `"1.5h"`.

    >>> seconds("25m")
    1500.0
    """
    if isinstance(text, int | float):
        value = float(text)
    else:
        m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text)
        if m is None or m[2] not in _UNITS:
            raise ValueError(f"time must be a number of seconds or like 90s, 25m, 1.5h, got {text!r}")
        value = float(m[1]) * _UNITS[m[2]]
    if not 0 < value < float("inf"):
        raise ValueError(f"time must be positive, got {text!r}")
    return value


class Journal:
    """Steps of a job, remembered in one JSON file, and the time that it has used in all its lives.

    Args:
        path: the file; made at the first note.
        job: what the job is. A journal of another job is refused.
        fresh: forget what is there.

    Raises:
        TrimtabError: when the file belongs to another job.
    """

    def __init__(self, path: Path, job: dict[str, Any], limit: float, *, fresh: bool = False):
        self.path, self.limit = path, limit
        self._job = json.loads(json.dumps(job))
        self._started = time.monotonic()
        self.steps: dict[str, Any] = {}
        self._before = 0.0
        if path.is_file() and not fresh:
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["job"] != self._job:
                other = [k for k in self._job if known["job"].get(k) != self._job[k]]
                raise TrimtabError(
                    f"{path.parent.parent} holds another job (another {', '.join(other)}); "
                    "choose another --out, or start over with --fresh"
                )
            self.steps, self._before = known["steps"], known["used"]

    @property
    def resumed(self) -> bool:
        return bool(self.steps)

    @property
    def used(self) -> float:
        """Seconds that the job has run, over all its lives."""
        return self._before + time.monotonic() - self._started

    @property
    def left(self) -> float:
        return max(self.limit - self.used, 0.0)

    def once(self, name: str, step: Callable[[], T]) -> T:
        """The result of a step: remembered when it was done in an earlier life, else made now. JSON values only."""
        if name not in self.steps:
            result = step()
            self.steps[name] = json.loads(json.dumps(result))
            self.note()
        return self.steps[name]

    def note(self) -> None:
        """Write down the time used so far; called at every step and now and then during the long ones."""
        write_text(self.path, json.dumps({"job": self._job, "used": self.used, "steps": self.steps}, indent=1))
