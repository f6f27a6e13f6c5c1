"""Losses that most objectives share, with their reductions spelled out."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from trimtab.data.images import VOID


def soft_ce(logits: Tensor, target: Tensor, *, smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """Cross-entropy with hard or soft targets.

    Args:
        logits: (B, K), or (B, K, H, W).
        target: class indices (B,), or probabilities (B, K), e.g. after mixup; or class indices of pixels (B, H, W),
            where 255 does not count.
        smoothing: share of the target that is spread evenly over all classes.
        reduction: "mean" over the batch, "sum", or "none" (B,).

    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> hard, soft = soft_ce(logits, torch.tensor([0])), soft_ce(logits, torch.tensor([[1.0, 0.0]]))
    >>> bool(torch.isclose(hard, soft))
    True
    """
    per_pixel = logits.ndim > 3 and target.shape == logits[:, 0].shape
    if not per_pixel and (target.ndim not in (1, 2) or target.shape[0] != logits.shape[0]):
        raise ValueError(f"target must be (B,) or (B, K) for logits {tuple(logits.shape)}, got {tuple(target.shape)}")
    if target.ndim == 2:
        if target.shape != logits.shape:
            raise ValueError(f"soft target must have {logits.shape[1]} classes, got {target.shape[1]}")
        target = target.to(logits.dtype)
    # -100 is torch's own default, which no class index is
    ignored = VOID if per_pixel else -100
    return F.cross_entropy(logits, target, ignore_index=ignored, label_smoothing=smoothing, reduction=reduction)


def kl(student: Tensor, teacher: Tensor, T: float = 1.0, *, reduction: str = "batchmean") -> Tensor:
    """KL(teacher || student) between the softmaxes of two logits, both softened by the temperature `T`.

    There is no factor T^2 in here: a method that wants it (Hinton et al. 2015, Section 2) multiplies itself.

    Args:
        student, teacher: logits (..., K); the teacher gets no gradient.
        reduction: "batchmean" divides the sum by the first dimension, "mean" by the number of elements (as DeiT
            does), "sum", or "none" (the divergence of each row, summed over classes).

    >>> import torch
    >>> a = torch.tensor([[1.0, 2.0]])
    >>> float(kl(a, a))
    0.0
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher must have the same shape, got {student.shape} and {teacher.shape}")
    if T <= 0:
        raise ValueError(f"T must be positive, got {T}")
    log_p = F.log_softmax(student.float() / T, dim=-1)
    log_q = F.log_softmax(teacher.detach().float() / T, dim=-1)
    if reduction == "none":
        return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    if reduction not in ("batchmean", "mean", "sum"):
        raise ValueError(f"reduction must be batchmean, mean, sum or none, got {reduction!r}")
    total = F.kl_div(log_p, log_q, log_target=True, reduction="sum")
    return total / {"batchmean": len(student), "mean": student.numel(), "sum": 1}[reduction]
