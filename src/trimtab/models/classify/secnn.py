"""The network that `trimtab.search.self_expanding_cnn` grows: blocks of 3x3 convolutions, and a skip over all of them.

Each block is a chain of convolution, batch norm, LeakyReLU, and ends with a 2x2 max pooling. What the first block gave,
pooled to the same size, is concatenated to what the last one gives; a 1x1 convolution fuses them to a few channels,
whose map is flattened for a linear classifier without bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from trimtab.nn.classifier import Classifier, check_image_input, check_sizes


class ConvLayer(nn.Module):
    """Convolution without bias, batch norm, LeakyReLU: (B, in_chs, H, W) -> (B, out_chs, H, W)."""

    def __init__(self, in_chs: int, out_chs: int, *, kernel: int = 3, slope: float = 0.01):
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, kernel, 1, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_chs)
        self.act = nn.LeakyReLU(slope)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Block(nn.Module):
    """Layers, then pooling: (B, in_chs, H, W) -> (B, width, H/2, W/2)."""

    def __init__(self, in_chs: int, width: int, depth: int, slope: float):
        super().__init__()
        self.layers = nn.Sequential(*(ConvLayer(width if j else in_chs, width, slope=slope) for j in range(depth)))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.layers(x))


class SECNN(Classifier):
    """(B, in_chans, H, W) -> (B, num_classes).

    Args:
        widths: channels of the layers of each block, two blocks at least. depths: their layers.
        fused: channels after the fusion. grid: side of the map that is flattened.
        slope: of LeakyReLU for negative values; 0 is ReLU.

    >>> net = SECNN()
    >>> net(torch.zeros(2, 3, 32, 32)).shape, sum(p.numel() for p in net.parameters())
    (torch.Size([2, 10]), 6688)
    """

    head_bias = False

    def __init__(
        self,
        *,
        widths: Sequence[int] = (16, 16, 16),
        depths: Sequence[int] = (1, 1, 1),
        fused: int = 8,
        grid: int = 4,
        slope: float = 0.01,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        check_sizes(fused=fused, grid=grid, num_classes=num_classes, in_chans=in_chans)
        if len(widths) != len(depths) or len(widths) < 2 or min(*widths, *depths) < 1:
            raise ValueError(
                f"widths and depths must be positive, one of each for two blocks at least, got {list(widths)} and "
                f"{list(depths)}"
            )
        if not 0 <= slope < 1:
            raise ValueError(f"slope must be in [0, 1), got {slope}")
        blocks, chs = [], in_chans
        for width, depth in zip(widths, depths):
            blocks.append(Block(chs, width, depth, slope))
            chs = width
        self.blocks = nn.Sequential(*blocks)
        self.fuse = ConvLayer(widths[0] + widths[-1], fused, kernel=1, slope=slope)
        self.feature_info = [
            {"num_chs": w, "reduction": 2 ** (i + 1), "module": f"blocks.{i}"} for i, w in enumerate(widths)
        ]
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, a=slope)
        self.grid = grid
        self._make_head(fused * grid**2, num_classes, in_chans, global_pool, drop_rate)

    def _make_pool(self, global_pool: str) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(self.grid), nn.Flatten()) if global_pool else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        check_image_input(x, self.in_chans)
        first = x = self.blocks[0](x)
        for block in list(self.blocks)[1:]:
            x, first = block(x), block.get_submodule("pool")(first)
        return self.fuse(torch.cat([first, x], 1))  # (B, fused, H/r, W/r)


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (4, 4),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "blocks.0.layers.0.conv",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({"secnn": _cfg()})


@register_model
def secnn(pretrained: bool = False, **kwargs: Any) -> SECNN:
    """Where growth starts: three blocks of one layer of 16 channels, 6,688 parameters."""
    blocks = len(kwargs.get("widths", (0, 0, 0)))
    feature_cfg = {"out_indices": tuple(range(blocks)), "flatten_sequential": True}
    return build_model_with_cfg(SECNN, "secnn", pretrained, feature_cfg=feature_cfg, **kwargs)
