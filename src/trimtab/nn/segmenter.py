"""The face of networks with logits per pixel (or voxel), and the losses that several of them learn with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.nn.classifier import Classifier, check_image_input, check_sizes

VOID = 255  # as in `data.images`: a label that is none


class Segmenter(Classifier):
    """Base of our segmenters: timm's face of a classifier, for every pixel. The classifier is a 1 x 1 convolution.

    A segmenter whose loss is not plain cross-entropy has a method `criterion(outputs, batch)`, which gives named
    scalars from what `forward` returns in training mode.
    """

    per_pixel = True  # for what must know that labels are maps
    dims = 2  # of space: 3 for volumes
    multiple: int  # of which every side must be

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier on; 0 classes leaves the features (B, C, H, W). There is nothing to pool."""
        check_sizes(num_classes=num_classes)
        like = next(self.parameters())
        self.num_classes = num_classes
        conv = nn.Conv3d if self.dims == 3 else nn.Conv2d
        head = conv(self.head_hidden_size, num_classes, 1) if num_classes else nn.Identity()
        self.head = head.to(device=like.device, dtype=like.dtype).train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, num_classes, H, W)."""
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def _check(self, x: Tensor) -> None:
        check_image_input(x, self.in_chans, self.dims)
        if any(side % self.multiple for side in x.shape[2:]):
            sides = "height and width" if self.dims == 2 else "depth, height and width"
            raise ValueError(f"{sides} must be multiples of {self.multiple}, got {tuple(x.shape[2:])}")


def pixel_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of logits (B, K, ...) with classes (B, ...), the mean over places that are not void; 0 of none."""
    total = F.cross_entropy(logits, label, ignore_index=VOID, reduction="sum")
    return total / (label != VOID).sum().clamp_min(1)


def dice_loss(probability: Tensor, target: Tensor, *, smooth: float = 1.0) -> Tensor:
    """Soft Dice loss of masks: 1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth), for each mask.

    Args:
        probability: (..., *places) in [0, 1], with two dimensions of places or more; the sums run over all but the
            first two dimensions.
        target: of the same shape, 0 or 1.

    Returns:
        (B, K), the shape of the first two dimensions.

    >>> import torch
    >>> mask = torch.eye(4)[None, None]
    >>> dice_loss(mask, mask).item(), round(dice_loss(mask, 1 - mask).item(), 4)
    (0.0, 0.9412)
    """
    p, t = probability.flatten(2), target.flatten(2).to(probability.dtype)
    return 1 - (2 * (p * t).sum(2) + smooth) / (p.sum(2) + t.sum(2) + smooth)
