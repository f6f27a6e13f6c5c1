"""Knowledge distillation with softened logits (Hinton, Vinyals, Dean 2015, arXiv 1503.02531).

The student learns the labels and, at temperature T, the teacher's distribution over all classes, which says how
classes resemble each other. The T^2 keeps both gradients on the same scale whatever T is (Section 2 there).
"""

from __future__ import annotations

from torch import nn

from trimtab.learn.frozen import Frozen
from trimtab.learn.losses import kl, soft_ce
from trimtab.learn.objective import Batch, Context, Losses, Objective, check_logits, probe


class KD(Objective):
    """(1 - alpha) * cross-entropy + alpha * T^2 * KL(teacher || student), both softened by T.

    Args:
        teacher: a network for the same classes and the same input, or a `Frozen` one. It is put in eval mode and on
            the training device, and otherwise left alone.
        T: temperature.
        alpha: share of the teacher, in [0, 1].
        smoothing: label smoothing of the cross-entropy.

    Raises:
        ValueError: at the start of training, if teacher and student do not have the same number of classes.
    """

    def __init__(
        self, teacher: nn.Module | Frozen, *, T: float = 4.0, alpha: float = 0.9, smoothing: float = 0.0
    ) -> None:
        if not isinstance(teacher, (nn.Module, Frozen)):
            raise ValueError(f"teacher must be an nn.Module or Frozen, got {type(teacher).__name__}")
        if T <= 0:
            raise ValueError(f"T must be positive, got {T}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        self.teacher = teacher if isinstance(teacher, Frozen) else Frozen(teacher)
        self.T = T
        self.alpha = alpha
        self.smoothing = smoothing

    def setup(self, model: nn.Module, batch: Batch) -> None:
        self.teacher.to(batch["image"].device)
        mine = check_logits(probe(self, model, batch), batch, who="the student")
        theirs = check_logits(self.teacher(batch["image"][:2]), batch, who="the teacher")
        if mine != theirs:
            raise ValueError(f"teacher and student must have the same classes, got {theirs} and {mine}")

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        wanted = self.teacher(batch["image"])
        logits = self.predict(model, batch)
        label = soft_ce(logits, batch["label"], smoothing=self.smoothing)
        taught = kl(logits, wanted, self.T, reduction="batchmean")
        return {"ce": (1 - self.alpha) * label, "kd": self.alpha * self.T**2 * taught}
