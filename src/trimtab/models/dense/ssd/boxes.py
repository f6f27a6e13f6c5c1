"""Default boxes, which of them answer for which object, and how a box is written as four offsets.

Everything is in pixels of the image that the network is fed. Objects are corners (x1, y1, x2, y2), default boxes are
(centre x, centre y, width, height).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert, box_iou

VARIANCES = (0.1, 0.2)  # of centres and of log sizes
Shapes = list[list[tuple[float, float]]]  # for each map (width, height) of the boxes of a cell


def paper_shapes(
    maps: int,
    side: float,
    *,
    scales: Sequence[int] = (10, 20, 90),
    ratios: Sequence[float] | None = None,
) -> Shapes:
    """Shapes of the default boxes of a cell of each map, by the rule of the official script (Section 2.2).

    Map k has a smallest size m, and the smallest of the next map is M: a square of side m, one of side sqrt(m M), and
    for each ratio r two boxes of area m^2. Sizes are whole percents: `scales[0]` for the first map, then from
    `scales[1]` on towards `scales[2]` in equal steps, rounded down.

    Args:
        side: of the image in pixels, the shorter one.
        scales: (10, 20, 90) for VOC at 300; (7, 15, 90) for COCO at 300 and VOC at 512; (4, 10, 90) for COCO at 512.
        ratios: of width to height, each with its inverse, on every map; None: 2 on the first and the last two maps, 2
            and 3 on those between.

    Raises:
        ValueError: scales that do not grow.

    >>> [[round(w) for w, _ in shapes[:2]] for shapes in paper_shapes(6, 300)]
    [[30, 42], [60, 82], [111, 134], [162, 186], [213, 237], [264, 288]]
    """
    first, low, high = scales
    if not 0 < first < low < high:
        raise ValueError(f"scales must grow, got {tuple(scales)}")
    step = (high - low) // max(1, maps - 2)
    sizes = [side * percent / 100 for percent in (first, *(low + k * step for k in range(maps)))]
    shapes = []
    for k in range(maps):
        small, large = sizes[k : k + 2]
        cell = [(small, small), (math.sqrt(small * large),) * 2]
        for ratio in ((2, 3) if 0 < k < maps - 2 else (2,)) if ratios is None else ratios:
            long, short = small * math.sqrt(ratio), small / math.sqrt(ratio)
            cell += [(long, short), (short, long)]
        shapes.append(cell)
    return shapes


def default_boxes(
    grids: Sequence[tuple[int, int]],
    shapes: Sequence[Sequence[tuple[float, float]]],
    size: tuple[int, int],
    steps: Sequence[float] | None = None,
) -> Tensor:
    """All default boxes (N, 4), ordered by map, row, column, shape. They are not clipped to the image.

    Args:
        grids: rows and columns of each map.
        size: (H, W) of the image.
        steps: pixels between the centres of each map; None: those that divide the image evenly.
    """
    found = []
    for k, ((rows, columns), cell) in enumerate(zip(grids, shapes, strict=True)):
        down, right = (steps[k],) * 2 if steps is not None else (size[0] / rows, size[1] / columns)
        y, x = (torch.arange(n, dtype=torch.float32).add(0.5).mul(s) for n, s in ((rows, down), (columns, right)))
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (rows, columns, 2)
        wide = torch.tensor(cell).expand(rows, columns, -1, -1)
        found.append(torch.cat([centres[:, :, None].expand_as(wide), wide], -1).reshape(-1, 4))
    return torch.cat(found)


def encode(corners: Tensor, boxes: Tensor) -> Tensor:
    """Offsets (..., 4) of objects (..., 4) from default boxes (..., 4): what the network is to say."""
    centre, size = box_convert(corners, "xyxy", "cxcywh").split(2, -1)
    at, scale = boxes.split(2, -1)
    return torch.cat([(centre - at) / scale / VARIANCES[0], (size / scale).log() / VARIANCES[1]], -1)


def decode(offsets: Tensor, boxes: Tensor) -> Tensor:
    """The inverse of `encode`: corners (..., 4).

    >>> box = torch.tensor([[50.0, 40.0, 20.0, 10.0]])
    >>> decode(torch.zeros(1, 4), box).tolist()
    [[40.0, 35.0, 60.0, 45.0]]
    """
    at, scale = boxes.split(2, -1)
    centre = at + offsets[..., :2] * VARIANCES[0] * scale
    half = (offsets[..., 2:] * VARIANCES[1]).exp() * scale / 2
    return torch.cat([centre - half, centre + half], -1)


@torch.no_grad()
def match(objects: Tensor, present: Tensor, boxes: Tensor, *, overlap: float = 0.5) -> Tensor:
    """Which object each default box answers for: (B, N) rows of `objects`, -1 for none.

    First the bipartite step: of all pairs of an object and a box the one that overlaps most is matched, then of those
    that are left, until every object that overlaps a box at all has one. Then any other box takes the object that it
    overlaps most, if by `overlap` or more.

    Args:
        objects: corners (B, M, 4). present: (B, M), which of them are objects and not padding.
        boxes: default boxes (N, 4).
    """
    many = min(objects.shape[1], len(boxes))
    if not many:
        return present.new_full((len(objects), len(boxes)), -1, dtype=torch.int64)
    iou = box_iou(objects.flatten(0, 1), box_convert(boxes, "cxcywh", "xyxy")).unflatten(0, present.shape)
    iou = iou.masked_fill(~present[..., None], 0.0)  # (B, M, N)
    most, matched = iou.max(1)
    matched = matched.masked_fill(most < overlap, -1)
    value, box = (t.flatten(1) for t in iou.topk(many, 2))  # others take less than `many` boxes from an object
    row = torch.arange(iou.shape[1], device=iou.device).repeat_interleave(many)
    for _ in range(iou.shape[1]):
        top, pair = value.max(1, keepdim=True)  # (B, 1)
        here, taken = row[pair], box.gather(1, pair)
        matched.scatter_(1, taken, torch.where(top > 1e-6, here, matched.gather(1, taken)))
        value = value.masked_fill((row == here) | (box == taken), 0.0)
    return matched


def detections(
    boxes: Tensor, scores: Tensor, *, least: float = 0.01, per_class: int = 400, overlap: float = 0.45, keep: int = 200
) -> dict[str, Tensor]:
    """What is seen in one image: class by class the best boxes, without those that overlap a better one.

    Args:
        boxes: corners (N, 4). scores: (N, K).
        least: scores up to this are nothing. per_class: boxes of a class that are looked at.
        overlap: the most that two boxes of a class may. keep: boxes of all classes together.

    Returns:
        "boxes" (n, 4), "scores" (n,) and "labels" (n,), best first.
    """
    score, row = scores.topk(min(per_class, len(scores)), 0)
    label = torch.arange(scores.shape[1], device=scores.device).expand_as(row)
    good = score > least
    score, row, label = score[good], row[good], label[good]
    kept = batched_nms(boxes[row], score, label, overlap)[:keep]
    return {"boxes": boxes[row[kept]], "scores": score[kept], "labels": label[kept]}
