"""Resizing and colour as the super-resolution field does them.

Low-resolution pictures are made by the anti-aliased cubic (Keys, a = -0.5) that MATLAB's ``imresize`` uses, and
quality is measured on the studio luma of BT.601. Another cubic (a = -0.75, or without anti-aliasing) or the full-range
luma gives other numbers, by decibels. All images are (B, C, H, W) in [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows: Y, Cb, Cr of (R, G, B) in [0, 1], and what is added, in steps of 8 bits (BT.601, studio range).
_YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))
_OFFSET = (16.0, 128.0, 128.0)


def downscale(image: Tensor, scale: int, *, round_to_8_bits: bool = False) -> Tensor:
    """(B, C, H, W) -> (B, C, H / scale, W / scale) by the anti-aliased cubic; the result may leave [0, 1] a little.

    Args:
        round_to_8_bits: clamp to [0, 1] and round to multiples of 1/255, as a picture read from a file is.

    Raises:
        ValueError: sides that are not multiples of `scale` (crop first, see `crop_to_multiple`).

    >>> downscale(torch.full((1, 1, 6, 9), 0.5), 3)
    tensor([[[[0.5000, 0.5000, 0.5000],
              [0.5000, 0.5000, 0.5000]]]])
    """
    _check(image, scale)
    h, w = image.shape[2:]
    if h % scale or w % scale:
        raise ValueError(f"height and width must be multiples of scale = {scale}, got ({h}, {w}); crop first")
    return _cubic(image, h // scale, w // scale, round_to_8_bits)


def upscale(image: Tensor, scale: int, *, round_to_8_bits: bool = False) -> Tensor:
    """(B, C, H, W) -> (B, C, scale H, scale W) by the cubic with a = -0.5: the "bicubic" of the field's tables."""
    _check(image, scale)
    return _cubic(image, image.shape[2] * scale, image.shape[3] * scale, round_to_8_bits)


def crop_to_multiple(image: Tensor, scale: int) -> Tensor:
    """The upper left part of an image (..., H, W) whose sides are multiples of `scale`."""
    h, w = image.shape[-2:]
    return image[..., : h - h % scale, : w - w % scale]


def to_8_bits(image: Tensor) -> Tensor:
    """Clamped to [0, 1] and rounded to multiples of 1/255."""
    return image.clamp(0, 1).mul(255).round().div(255)


def rgb_to_ycbcr(image: Tensor) -> Tensor:
    """RGB (B, 3, H, W) in [0, 1] -> Y, Cb, Cr (B, 3, H, W); Y in [16, 235] / 255, Cb and Cr in [16, 240] / 255."""
    _check_channels(image, 3)
    matrix, offset = _constants(image)
    return torch.einsum("ij,bjhw->bihw", matrix, image) + offset.view(3, 1, 1)


def ycbcr_to_rgb(image: Tensor) -> Tensor:
    """The inverse of `rgb_to_ycbcr`; what leaves [0, 1] is not clamped."""
    _check_channels(image, 3)
    matrix, offset = _constants(image)
    inverse = torch.linalg.inv(matrix.double()).to(image.dtype)
    return torch.einsum("ij,bjhw->bihw", inverse, image - offset.view(3, 1, 1))


def rgb_to_y(image: Tensor) -> Tensor:
    """The luma (B, 1, H, W) of RGB (B, 3, H, W): Y = (16 + 65.481 R + 128.553 G + 24.966 B) / 255.

    >>> [round(255 * rgb_to_y(torch.full((1, 3, 1, 1), v)).item()) for v in (0.0, 1.0)]
    [16, 235]
    """
    return rgb_to_ycbcr(image)[:, :1]


def _cubic(image: Tensor, height: int, width: int, rounded: bool) -> Tensor:
    # Without antialias torch's cubic has a = -0.75; with it, a = -0.5 both down and up. 16 bits are not made for all.
    wide = image if image.dtype in (torch.float32, torch.float64) else image.float()
    out = F.interpolate(wide, (height, width), mode="bicubic", antialias=True).to(image.dtype)
    return to_8_bits(out) if rounded else out


def _constants(like: Tensor) -> tuple[Tensor, Tensor]:
    matrix = torch.tensor(_YCBCR, dtype=torch.float64) / 255
    offset = torch.tensor(_OFFSET, dtype=torch.float64) / 255
    return matrix.to(like), offset.to(like)


def _check(image: Tensor, scale: int) -> None:
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"scale must be a positive integer, got {scale!r}")
    if image.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), got shape {tuple(image.shape)}")


def _check_channels(image: Tensor, channels: int) -> None:
    if image.ndim != 4 or image.shape[1] != channels:
        raise ValueError(f"images must be (B, {channels}, H, W), got shape {tuple(image.shape)}")
