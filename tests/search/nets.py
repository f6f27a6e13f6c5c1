"""A user's own residual network, a builder, and data for both."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab as tt


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3, self.bn3 = nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(x + self.bn3(self.conv3(y)))


class Own(nn.Module):
    """What a user brings: no builder, no names that anybody knows."""

    def __init__(self, dropout: float = 0.0, classes: int = 10) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first = nn.Sequential(Block(8), Block(8), Block(8))
        self.down = nn.Conv2d(8, 16, 2, 2)
        self.second = nn.Sequential(Block(16), Block(16))
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(F.relu(self.bn(self.stem(x))))
        x = self.second(F.relu(self.down(x)))
        return self.head(self.drop(x.mean((2, 3))))


def own(seed: int = 0, **kwargs: Any) -> nn.Module:
    """An `Own` whose batch norms have seen something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Own(**kwargs)
        with torch.no_grad():
            for _ in range(3):
                net.train()(torch.randn(16, 1, 8, 8))
        return net


def build(*, width: int = 16, kernel: int = 5, depth: int = 3, expand: float = 2.0) -> nn.Module:
    """A builder: stem, blocks, head."""
    hidden = int(width * expand)
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(depth):
        layers += [
            nn.Conv2d(width, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU(),
            nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden), nn.BatchNorm2d(hidden), nn.ReLU(),
            nn.Conv2d(hidden, width, 1), nn.BatchNorm2d(width),
        ]  # fmt: skip
    body = nn.Sequential(*layers)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return _Net(body, head)


class _Net(nn.Module):
    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


GENES = {"width": (8, 12, 16), "kernel": (3, 5), "depth": (1, 2, 3), "expand": (1.0, 2.0)}
WORDS = {"width": (0.25, 0.5, 1), "depth": "blocks"}
SIZE = (1, 8, 8)


def vit(*, embed_dim: int, depth: int, mlp_ratio: float) -> nn.Module:
    return tt.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=5, num_heads=4,
        embed_dim=embed_dim, depth=depth, mlp_ratio=mlp_ratio, adapt=False,
    )  # fmt: skip


VIT = {"embed_dim": (32, 48, 64), "depth": (2, 3), "mlp_ratio": (2.0, 4.0)}


def images(net: Any, n: int = 4, seed: int = 0) -> Tensor:
    """Images for a supernet."""
    return torch.randn(n, *net._size, generator=torch.Generator().manual_seed(seed))
