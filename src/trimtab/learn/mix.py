"""Mixers change a whole batch after it is collated, on the device: mixup, CutMix, and what methods bring."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trimtab.learn.objective import Batch, Context


class Mixer:
    """`mix(batch, model, ctx) -> batch`. A mixer may run the model (in eval mode), and may add fields to the batch."""

    def __call__(self, batch: Batch, model: nn.Module, ctx: Context) -> Batch:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(batch, model, ctx)")


class Mixup(Mixer):
    """Mixup and CutMix per batch; labels become probabilities (B, K).

    The partner of a sample is its mirror image in the batch (as in timm), and the share is drawn once per batch; the
    difference to timm's `Mixup` is that all randomness comes from ``ctx.rng``, so that it is private and resumable.

    Args:
        num_classes: K.
        mixup: alpha of the Beta distribution of mixup; 0 switches it off.
        cutmix: the same for CutMix. With both, each batch takes one of them with equal chances.
        prob: share of batches that are mixed.
    """

    def __init__(self, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, prob: float = 1.0) -> None:
        if mixup < 0 or cutmix < 0:
            raise ValueError(f"mixup and cutmix must not be negative, got {mixup} and {cutmix}")
        if not 0 <= prob <= 1:
            raise ValueError(f"prob must be in [0, 1], got {prob}")
        self.num_classes = num_classes
        self.mixup = mixup
        self.cutmix = cutmix
        self.prob = prob

    def __call__(self, batch: Batch, model: nn.Module, ctx: Context) -> Batch:
        use_cut = self.cutmix > 0 and (self.mixup == 0 or ctx.rng.random() < 0.5)
        alpha = self.cutmix if use_cut else self.mixup
        lam = float(ctx.rng.beta(alpha, alpha)) if alpha > 0 and ctx.rng.random() < self.prob else 1.0
        image: Tensor = batch["image"]  # (B, C, H, W)
        if lam < 1.0 and use_cut:
            image, lam = self._cut(image, lam, ctx)
        elif lam < 1.0:
            image = torch.lerp(image.flip(0), image, lam)
        return batch.replace(image=image, label=self._targets(batch["label"], lam))

    def _cut(self, image: Tensor, lam: float, ctx: Context) -> tuple[Tensor, float]:
        height, width = image.shape[-2:]
        side = math.sqrt(1.0 - lam)
        half_h, half_w = int(height * side) / 2, int(width * side) / 2
        y, x = int(ctx.rng.integers(height)), int(ctx.rng.integers(width))
        top, bottom = max(y - math.floor(half_h), 0), min(y + math.ceil(half_h), height)
        left, right = max(x - math.floor(half_w), 0), min(x + math.ceil(half_w), width)
        mixed = image.clone()
        mixed[..., top:bottom, left:right] = image.flip(0)[..., top:bottom, left:right]
        return mixed, 1.0 - (bottom - top) * (right - left) / (height * width)  # the share that really remained

    def _targets(self, label: Tensor, lam: float) -> Tensor:
        from timm.data.mixup import mixup_target

        if label.ndim == 1:
            return mixup_target(label, self.num_classes, lam)
        return torch.lerp(label.flip(0), label, lam)
