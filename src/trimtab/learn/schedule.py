"""`Schedule`: a value as a function of training progress, for learning rates and whatever else changes over a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

SHAPES = ("onecycle", "cosine", "linear", "exponential", "constant")


@dataclass(frozen=True)
class Schedule:
    """progress in [0, 1] -> value: a linear warm-up from `first` to `start`, then the shape from `start` to `end`.

    Args:
        shape: "cosine", "linear", "exponential", "constant" (stays at `start`), or "onecycle" (warm-up, then a straight
            line down).
        start: the value after the warm-up.
        end: the value at progress 1.
        warmup: share of the run spent warming up.
        first: the value at progress 0 if there is a warm-up.
        least: the value never falls below this once the warm-up is over.

    >>> s = Schedule("cosine", start=1.0, end=0.0, warmup=0.5)
    >>> [round(s(p), 3) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    shape: str = "cosine"
    start: float = 1.0
    end: float = 0.0
    warmup: float = 0.0
    first: float = 0.0
    least: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")
        if self.shape == "exponential" and not (self.start > 0 and self.end > 0):
            raise ValueError(f"an exponential needs a start and an end above 0, got {self.start} and {self.end}")

    def __call__(self, progress: float) -> float:
        p = min(max(progress, 0.0), 1.0)
        if p < self.warmup:
            return self.first + (self.start - self.first) * p / self.warmup
        return max(self.least, self._fall((p - self.warmup) / (1.0 - self.warmup)))

    def _fall(self, q: float) -> float:
        """The shape, without warm-up."""
        if self.shape == "constant":
            return self.start
        if self.shape == "cosine":
            return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * q))
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** q
        return self.start + (self.end - self.start) * q


def timm_schedule(name: str, *, warmup: float = 0.0, end: float = 0.0, ticks: int = 10_000) -> Callable[[float], float]:
    """One of timm's schedules (``"step"``, ``"poly"``, ``"tanh"``, ``"multistep"``, ...) as a function of progress.

    Args:
        name: as timm's `create_scheduler_v2` takes it.
        warmup: share of the run; end: last value, as a share of the first.
        ticks: resolution: progress is cut into this many updates.
    """
    import torch
    from timm.scheduler import create_scheduler_v2

    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        scheduler, _ = create_scheduler_v2(
            dummy,
            sched=name,
            num_epochs=ticks // 100,
            warmup_epochs=round(warmup * ticks / 100),
            decay_epochs=ticks / 300,
            decay_milestones=[ticks // 200, ticks * 3 // 400],
            min_lr=end,
            warmup_lr=0.0,
            step_on_epochs=False,
            updates_per_epoch=100,
        )
    except (AssertionError, KeyError, ValueError) as e:
        raise ValueError(f"sched must be one of {', '.join(SHAPES)} or a timm schedule, got {name!r}") from e
    if scheduler is None or name == "plateau":
        raise ValueError(f"sched must be one of {', '.join(SHAPES)} or a timm schedule, got {name!r}")

    def value(progress: float) -> float:
        scheduler.step_update(round(min(max(progress, 0.0), 1.0) * ticks))
        return float(dummy.param_groups[0]["lr"])

    return value
