"""The smallest detector: one object for each cell of 8 x 8 pixels, if its centre is there."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms

CELL = 8


class Cells(nn.Module):
    """Pictures (B, 3, S, S) -> moves (B, N, 4) and logits (B, N, K), N = (S / 8)^2 cells in rows."""

    def __init__(self, num_classes: int, size: int, seed: int = 0) -> None:
        super().__init__()
        self.size, self.num_classes = size, num_classes
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.GroupNorm(2, 16), nn.ReLU(),
                nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.GroupNorm(2, 24), nn.ReLU(),
                nn.Conv2d(24, 32, 3, stride=2, padding=1), nn.GroupNorm(2, 32), nn.ReLU(),
                nn.Conv2d(32, 4 + num_classes, 3, padding=1),
            )  # fmt: skip
        side = size // CELL
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        self.register_buffer("centres", (torch.stack([x, y], -1).reshape(-1, 2) + 0.5) * CELL)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.body(x).flatten(2).transpose(1, 2)
        return out[..., :4], out[..., 4:]

    def criterion(self, outputs: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        moves, logits = outputs
        boxes, labels = batch["boxes"], batch["box_label"]
        centre, side = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
        cell = (centre / CELL).long().clamp(0, self.size // CELL - 1)
        cell = cell[..., 1] * (self.size // CELL) + cell[..., 0]  # (B, M)
        image, which = (labels >= 0).nonzero(as_tuple=True)
        cell = cell[image, which]
        truth = torch.zeros_like(logits)
        truth[image, cell, labels[image, which]] = 1.0
        want = torch.cat([centre[image, which] - self.centres[cell], side[image, which]], -1) / CELL
        box = F.l1_loss(moves[image, cell], want, reduction="sum") / len(moves)
        return {"class": F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / len(moves), "box": box}

    def boxes_and_scores(self, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        moves, logits = outputs
        centre, half = self.centres + CELL * moves[..., :2], CELL * moves[..., 2:] / 2
        return torch.cat([centre - half, centre + half], -1).clamp(0, self.size), logits.sigmoid()

    def decode(self, outputs: tuple[Tensor, Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for boxes, scores in zip(*self.boxes_and_scores(outputs)):
            score, label = scores.max(-1)
            keep = batched_nms(boxes, score, label, 0.45)
            found.append({"boxes": boxes[keep], "scores": score[keep], "labels": label[keep]})
        return found
