"""`Clock`: how long a run has taken and how much must be left, for runs that end at a time."""

from __future__ import annotations

import time


class Clock:
    """Seconds of a run, those of its interrupted beginnings included.

    Attributes:
        limit: seconds that the run may take, or None.
        spent: seconds of earlier beginnings.
        step, validation, save: what one more of these takes.
        agreed: with several processes, the time on which they agreed at the last step; None with one.
    """

    def __init__(self, limit: float | None, *, shared: bool) -> None:
        self.limit = limit
        self.started = self._last = self.saved_at = time.perf_counter()
        self.spent = self.step = self.validation = self.save = 0.0
        self.agreed: float | None = 0.0 if shared else None
        self.validated_at = 0.0

    def here(self) -> float:
        """Seconds on this process's own clock."""
        return self.spent + time.perf_counter() - self.started

    def elapsed(self) -> float:
        """Seconds so far, the same on every process."""
        return self.here() if self.agreed is None else max(self.agreed, self.spent)

    def tick(self, *, count: bool = True) -> None:
        """A step is over; with `count` false, what took the time since the last tick was no step."""
        now = time.perf_counter()
        if count and self.agreed is None:  # several processes could not agree on it
            took = now - self._last
            self.step = took if self.step == 0.0 else 0.9 * self.step + 0.1 * took
        self._last = now

    def is_up(self, validated: bool) -> bool:
        """No time for one more step and what must follow it; validated: the weights as they are have a score."""
        if self.limit is None:
            return False
        return self.elapsed() + self.step + self.save + (0.0 if validated else self.validation) >= self.limit

    def progress(self) -> float:
        """Share of the time for training that has passed."""
        assert self.limit is not None
        return min(1.0, self.elapsed() / max(self.limit - self.validation - self.save - self.step, 1e-9))

    def worth_validating(self) -> bool:
        """At most a tenth of the time goes into validation."""
        return self.elapsed() - self.validated_at >= 9 * self.validation

    def save_due(self, every: float) -> bool:
        """After `every` seconds (0: always), but at most a fiftieth of the time goes into saving."""
        return not every or time.perf_counter() - self.saved_at >= max(every, 50 * self.save)

    def saved(self, since: float) -> None:
        """A checkpoint was written; `since`: when that began, by `time.perf_counter`."""
        self.saved_at = time.perf_counter()
        if self.agreed is None:
            self.save = self.saved_at - since
