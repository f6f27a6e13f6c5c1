"""An objective around another one: what a quantizer does at every batch, whatever is being minimised."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trimtab.learn.objective import Batch, Classify, Context, Losses, Objective


class Around(Objective):
    """Passes everything on to `inner` (by default `Classify`); subclasses add to it."""

    def __init__(self, inner: Objective | None = None) -> None:
        if inner is not None and not isinstance(inner, Objective):
            raise ValueError(f"objective must be an Objective, got {type(inner).__name__}")
        self.inner = inner or Classify()

    def setup(self, model: nn.Module, batch: Batch) -> None:
        self.inner.setup(model, batch)
        self.extra = self.inner.extra

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        return self.inner.losses(model, batch, ctx)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.inner.predict(model, batch)

    def finish(self, model: nn.Module) -> nn.Module:
        return self.inner.finish(model)

    def on_epoch_start(self, ctx: Context) -> None:
        self.inner.on_epoch_start(ctx)

    def on_epoch_end(self, ctx: Context) -> None:
        self.inner.on_epoch_end(ctx)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
