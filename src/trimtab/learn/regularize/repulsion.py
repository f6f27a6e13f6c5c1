"""The loss that keeps learned positions apart, for networks with DCLS layers (`trimtab.models.classify.dcls`)."""

from __future__ import annotations

from torch import nn

from trimtab.learn.losses import soft_ce
from trimtab.learn.objective import Batch, Classify, Context, Losses
from trimtab.models.classify.dcls import repulsion


class Repulsion(Classify):
    """Cross-entropy, and from some epoch on the square of how crowded the positions of the model's DCLS layers are.

    Args:
        after: epochs without the repulsion.
        smoothing: label smoothing of the cross-entropy.

    Raises:
        ValueError: at the start of training, if the model has no DCLS layer.
    """

    def __init__(self, *, after: int = 20, smoothing: float = 0.0) -> None:
        super().__init__(smoothing=smoothing)
        if after < 0:
            raise ValueError(f"after must not be negative, got {after}")
        self.after = after

    def setup(self, model: nn.Module, batch: Batch) -> None:
        super().setup(model, batch)
        repulsion(model)

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        ce = soft_ce(self.predict(model, batch), batch["label"], smoothing=self.smoothing)
        if ctx.epoch < self.after:
            return {"ce": ce}
        return {"ce": ce, "repulsion": repulsion(model) ** 2}
