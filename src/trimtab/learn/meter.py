"""`Meter`: what a run of training measures about itself, looked at seldom, because looking waits for the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

COLUMNS = ("epoch", "step", "loss", "lr", "val_accuracy", "val_loss", "seconds")


class Meter:
    """Means over an epoch, looked at a few times only."""

    def __init__(self) -> None:
        self.last = float("nan")
        self.lr = 0.0
        self.reset()

    def reset(self) -> None:
        self.pending: list[tuple[Any, float]] = []
        self.total, self.count = 0.0, 0
        self.sums: dict[str, list[float]] = {}

    def add(self, loss: Any, lr: float) -> None:
        self.pending.append((loss, lr))

    def flush(self, logged: list[tuple[str, Any]]) -> tuple[int, float, float] | None:
        """Take in what is pending; (index, loss, lr) of the first loss that is not finite."""
        if self.pending:
            losses, rates = zip(*self.pending)
            values = torch.stack(losses).float().tolist()
            self.pending.clear()
            for i, value in enumerate(values):
                if not math.isfinite(value):
                    return i, value, rates[i]
                self.total += value
                self.count += 1
            self.last, self.lr = values[-1], rates[-1]
        for name, value in logged:
            if name in COLUMNS or name.startswith("val_"):
                raise ValueError(f"a logged name must not be one of {', '.join(COLUMNS)}, or val_..., got {name!r}")
            entry = self.sums.setdefault(name, [0.0, 0.0])
            entry[0] += float(value.mean() if isinstance(value, Tensor) else value)
            entry[1] += 1
        logged.clear()
        return None

    def mean(self) -> float:
        return self.total / self.count if self.count else float("nan")

    def logged(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last, "lr": self.lr, "total": self.total, "count": self.count, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        for name, value in state.items():
            setattr(self, name, value)
