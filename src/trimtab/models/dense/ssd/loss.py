"""The multibox loss: offsets of matched boxes, classes of matched boxes and of the negatives that are hardest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.models.dense.ssd.boxes import encode, match


def multibox_loss(
    offsets: Tensor,
    logits: Tensor,
    boxes: Tensor,
    objects: Tensor,
    label: Tensor,
    *,
    overlap: float = 0.5,
    negatives: float = 3.0,
) -> dict[str, Tensor]:
    """Smooth L1 and cross-entropy, both divided by the number of matched boxes of the batch (equations 1 to 3).

    Args:
        offsets: (B, N, 4). logits: (B, N, 1 + K), background first.
        boxes: default boxes (N, 4).
        objects: corners (B, M, 4). label: (B, M), 0..K-1, -1 where there is no object.
        overlap: IoU from which a box is matched. negatives: for each matched box of the same image; an image
            without objects gives none.

    Returns:
        "class" and "box"; both 0 where nothing is matched.
    """
    matched = match(objects, label >= 0, boxes, overlap=overlap)
    image, box = (matched >= 0).nonzero(as_tuple=True)
    row = matched[image, box]
    target = torch.zeros_like(matched)  # background
    target[image, box] = label[image, row] + 1
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    counted = (target > 0) | hardest(loss.detach(), target > 0, negatives)
    number = max(1, len(row))
    return {
        "class": loss[counted].sum() / number,
        "box": F.smooth_l1_loss(offsets[image, box], encode(objects[image, row], boxes[box]), reduction="sum") / number,
    }


def hardest(loss: Tensor, positive: Tensor, ratio: float) -> Tensor:
    """Of each image the negatives (B, N) with the largest loss, `ratio` times as many as it has positives.

    >>> loss, positive = torch.tensor([[5.0, 1.0, 2.0, 3.0]]), torch.tensor([[True, False, False, False]])
    >>> hardest(loss, positive, 2).tolist()
    [[False, False, True, True]]
    """
    order = loss.masked_fill(positive, -1.0).argsort(1, descending=True)
    count = (ratio * positive.sum(1)).long().minimum((~positive).sum(1))
    first = torch.arange(loss.shape[1], device=loss.device) < count[:, None]
    return torch.zeros_like(positive).scatter(1, order, first)
