"""The face that every restoration network shows, written once: images in, images out, `scale` times as large."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.nn.classifier import check_image_input, check_sizes
from trimtab.nn.resize import rgb_to_ycbcr, upscale, ycbcr_to_rgb


class Restorer(nn.Module):
    """Base of our restoration networks: (B, C, H, W) in [0, 1] -> (B, C, scale H, scale W), C = `in_chans`.

    The result is not clamped: a loss must see by how much it leaves [0, 1]. A subclass writes `forward_features` and
    `forward_head`, and gives the first and the last layer by name in its configuration (`restorer_cfg`).
    """

    any_size = True  # of images: nothing to adapt

    def __init__(self, *, scale: int, in_chans: int):
        super().__init__()
        check_sizes(scale=scale, in_chans=in_chans)
        self.scale, self.in_chans = scale, in_chans

    def forward_features(self, x: Tensor) -> Tensor:
        """What the last layer sees."""
        raise NotImplementedError

    def forward_head(self, x: Tensor) -> Tensor:
        """The image."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        check_image_input(x, self.in_chans)
        return self.forward_head(self.forward_features(x))


def sub_pixel_conv(channels: int, out_chans: int, scale: int, kernel_size: int = 3) -> nn.Sequential:
    """A convolution to `out_chans` scale^2 channels and the pixel shuffle: (B, C, H, W) -> (B, out, sH, sW)."""
    conv = nn.Conv2d(channels, out_chans * scale**2, kernel_size, padding=kernel_size // 2)
    return nn.Sequential(conv, nn.PixelShuffle(scale))


def restorer_cfg(in_chans: int, first_conv: str, last_conv: str, side: int = 32) -> dict[str, Any]:
    """timm's configuration of a restoration network: images in [0, 1], and no classes.

    The last layer stands where a classifier would: weights of a network for another scale load without it.
    """
    return {
        "url": "", "num_classes": None, "input_size": (in_chans, side, side), "mean": (0.0,) * in_chans,
        "std": (1.0,) * in_chans, "first_conv": first_conv, "classifier": last_conv,
    }  # fmt: skip


@torch.no_grad()
def restore_rgb(model: nn.Module, image: Tensor) -> Tensor:
    """An RGB image (B, 3, H, W) in [0, 1], restored and clamped: (B, 3, scale H, scale W).

    Args:
        model: for three channels; or for one, then it gets the luma, and the colour is upscaled by the cubic.
    """
    check_image_input(image, 3)
    net: Any = model
    if net.in_chans == 3:
        return net(image).clamp(0, 1)
    if net.in_chans != 1:
        raise ValueError(f"model must take 1 or 3 channels, got {net.in_chans}")
    y = rgb_to_ycbcr(image)
    return ycbcr_to_rgb(torch.cat([net(y[:, :1]), upscale(y[:, 1:], net.scale)], 1)).clamp(0, 1)
