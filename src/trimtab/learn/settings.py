"""The settings of one training run, checked at the door."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trimtab.learn.mix import Mixer
from trimtab.learn.schedule import SHAPES, Schedule, timm_schedule

# What may differ between a run and its continuation without making another run of it.
FREE = frozenset({"time_limit", "patience", "out", "resume", "tracker", "progress", "device", "checkpoint_every"})
# What may be changed on purpose, to rescue a run that diverged.
RESCUE = frozenset({"lr", "min_lr", "clip_grad"})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything `fit` takes besides model, data and objective; see there for what the fields mean."""

    epochs: int | None = None
    time_limit: float | None = None
    batch_size: int = 128
    lr: float | None = None
    opt: str | Callable[..., Any] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    layer_decay: float | None = None
    sched: str | Callable[[float], float] = "onecycle"
    warmup: float | None = None
    min_lr: float | None = None
    clip_grad: float | None = None
    accum: int = 1
    precision: str = "fp32"
    channels_last: bool = False
    ema: float | None = None
    augment: str | Callable[..., Any] | None = "auto"
    mixup: float = 0.0
    cutmix: float = 0.0
    mixer: Mixer | None = None
    seed: int = 0
    val: str | None = "val"
    patience: int | None = None
    keep: str = "best"
    out: Path | None = None
    resume: bool = True
    checkpoint_every: float = 30.0
    tracker: Any = None
    progress: bool = True
    device: Any = None

    def __post_init__(self) -> None:
        for name in ("epochs", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer or None, got {value!r}")
        for name in ("batch_size", "accum"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("lr", "clip_grad", "time_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive, got {value!r}")
        for name in ("weight_decay", "momentum", "mixup", "cutmix", "checkpoint_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")
        if self.min_lr is not None and self.min_lr < 0:
            raise ValueError(f"min_lr must not be negative, got {self.min_lr}")
        if self.warmup is not None and not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the run and must be in [0, 1), got {self.warmup}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be a decay in (0, 1), e.g. 0.999, got {self.ema}")
        for name, allowed in (("precision", ("fp32", "bf16")), ("keep", ("best", "last"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.mixer is not None and (self.mixup or self.cutmix):
            raise ValueError("mixer and mixup/cutmix exclude each other; let the mixer do it")
        if self.patience is not None and self.val is None:
            raise ValueError("patience needs a validation split, got val=None")
        if self.tracker == "tensorboard" and self.out is None:
            raise ValueError("tracker='tensorboard' needs a folder, got out=None")
        if isinstance(self.tracker, str) and self.tracker != "tensorboard":
            raise ValueError(f"tracker must be None, 'tensorboard' or an accelerate tracker, got {self.tracker!r}")
        self.schedule()

    @property
    def by_clock(self) -> bool:
        """Progress is the share of the time that has passed, because no number of epochs was given."""
        return self.epochs is None and self.time_limit is not None

    @property
    def all_epochs(self) -> int | None:
        """The number of epochs; None when the clock decides."""
        return None if self.by_clock else self.epochs or 10

    @property
    def base_lr(self) -> float:
        """The learning rate, or a default for the batch of a step: linear in it for SGD, its square root for others."""
        if self.lr is not None:
            return self.lr
        batch = self.batch_size * self.accum / 128
        return 0.1 * batch if self.opt in ("sgd", "momentum", "nesterov") else 1e-3 * batch**0.5

    def schedule(self) -> Callable[[float], float]:
        """Progress -> factor on every learning rate."""
        if callable(self.sched):
            return self.sched
        if self.sched not in SHAPES:
            return timm_schedule(self.sched, warmup=self.warmup or 0.0, end=(self.min_lr or 0.0) / self.base_lr)
        usual = {"onecycle": 0.2, "cosine": 0.05}.get(self.sched, 0.0)
        end = 0.0 if self.min_lr is None else self.min_lr / self.base_lr
        return Schedule(self.sched, 1.0, end, usual if self.warmup is None else self.warmup, 0.05)

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued, as plain values."""
        plain: dict[str, Any] = {"by_clock": self.by_clock}
        for f in fields(self):
            if f.name not in FREE:
                plain[f.name] = plain_value(getattr(self, f.name))
        return plain | {"epochs": self.all_epochs, "lr": self.base_lr}

    def asdict(self) -> dict[str, Any]:
        """All settings as numbers and words, for a tracker."""
        plain = {f.name: plain_value(getattr(self, f.name)) for f in fields(self)}
        return plain | {"lr": self.base_lr, "epochs": self.all_epochs}


def plain_value(value: Any) -> Any:
    """A number, word or None as it is; anything else by the name of what it is."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain_value(v) for v in value]
    if isinstance(value, Schedule):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)
