"""PSNR and SSIM as the super-resolution field computes them.

On the studio luma (`nn.resize.rgb_to_y`), both pictures clamped and rounded to 8 bits, without a border as wide as the
scale; a table's value is the mean over pictures of each picture's own. Results are float64, (B,).

torchmetrics' SSIM is another one: it also counts windows that reach over the edge, into a reflection.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.nn.resize import rgb_to_y, to_8_bits

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels; places where the window does not fit into the picture are left out


def psnr(image: Tensor, target: Tensor, *, border: int = 0) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, (B,) in float64; infinite for equal images.

    Args:
        image, target: (B, 1, H, W) luma or (B, 3, H, W) RGB, in [0, 1]; what leaves that range is clamped.
        border: pixels left out on every side; the scale, in the field's tables.

    >>> psnr(torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 16 / 255)).item()
    24.04...
    """
    a, b = _comparable(image, target, border, smallest=1)
    return -10 * (a - b).div(255).square().mean((1, 2, 3)).log10()


def ssim(image: Tensor, target: Tensor, *, border: int = 0) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004), (B,) in float64; 1 for equal images.

    Args:
        image, target, border: as in `psnr`; at least 11 pixels a side must be left.

    >>> round(ssim(torch.ones(1, 3, 16, 16), torch.ones(1, 3, 16, 16)).item(), 6)
    1.0
    """
    a, b = _comparable(image, target, border, smallest=SSIM_WINDOW)
    at = torch.arange(SSIM_WINDOW, dtype=a.dtype, device=a.device) - SSIM_WINDOW // 2
    window = torch.softmax(-at.square() / (2 * SSIM_SIGMA**2), 0)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_a, mean_b = mean(a), mean(b)
    spread = mean(a * a) - mean_a.square() + mean(b * b) - mean_b.square()
    shared = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    light = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    return (light * (2 * shared + c2) / (spread + c2)).mean((1, 2, 3))


def luma_8_bits(image: Tensor) -> Tensor:
    """What is compared: the luma (B, 1, H, W) in 0..255, float64, of images clamped and rounded to 8 bits.

    The luma of RGB is not rounded again, as in the field's own scripts.
    """
    if image.ndim != 4 or image.shape[1] not in (1, 3):
        raise ValueError(f"images must be (B, 1, H, W) or (B, 3, H, W), got shape {tuple(image.shape)}")
    image = to_8_bits(image.detach().double())
    return 255 * (rgb_to_y(image) if image.shape[1] == 3 else image)


def _comparable(image: Tensor, target: Tensor, border: int, smallest: int) -> tuple[Tensor, Tensor]:
    if image.shape != target.shape:
        raise ValueError(f"both images must have one shape, got {tuple(image.shape)} and {tuple(target.shape)}")
    if not isinstance(border, int) or border < 0:
        raise ValueError(f"border must be a number of pixels, got {border!r}")
    h, w = image.shape[2:]
    if min(h, w) - 2 * border < smallest:
        raise ValueError(f"images must be {smallest + 2 * border} pixels a side or more, got ({h}, {w})")
    a, b = (luma_8_bits(x)[:, :, border : h - border, border : w - border] for x in (image, target))
    return a, b
