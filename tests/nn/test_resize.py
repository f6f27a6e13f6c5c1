"""The field's resize and colour, against references of their own in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.nn.resize import (
    crop_to_multiple,
    downscale,
    rgb_to_y,
    rgb_to_ycbcr,
    to_8_bits,
    upscale,
    ycbcr_to_rgb,
)


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def keys(x: float, a: float) -> float:
    """The cubic kernel of Keys (1981)."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def matrix(into: int, out: int, a: float = -0.5) -> Tensor:
    """Rows of weights of one axis: the kernel, stretched where the axis shrinks; inside the picture, summing to 1."""
    stretch = max(1.0, into / out)
    rows = torch.zeros(out, into, dtype=torch.float64)
    for i in range(out):
        centre = (i + 0.5) * into / out - 0.5
        for j in range(into):
            rows[i, j] = keys((j - centre) / stretch, a)
    return rows / rows.sum(1, keepdim=True)


def resized(image: Tensor, height: int, width: int, a: float = -0.5) -> Tensor:
    return matrix(image.shape[2], height, a) @ image @ matrix(image.shape[3], width, a).T


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_down_is_the_stretched_cubic_of_a_half(scale):
    x = picture(2, 3, 12 * scale, 7 * scale)
    torch.testing.assert_close(downscale(x, scale), resized(x, 12, 7), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_up_is_the_cubic_of_a_half(scale):
    x = picture(2, 1, 9, 11)
    torch.testing.assert_close(upscale(x, scale), resized(x, 9 * scale, 11 * scale), rtol=0, atol=1e-6)


def test_other_cubics_are_another_degradation():
    x = picture(1, 1, 32, 32)
    plain = F.interpolate(x, (8, 8), mode="bicubic")  # no anti-aliasing, a = -0.75
    assert (plain - downscale(x, 4)).abs().max() > 0.2
    assert (resized(x, 64, 64, a=-0.75) - upscale(x, 2)).abs().max() > 0.02


def test_rounding_gives_what_a_file_holds():
    x = picture(1, 3, 8, 8).float()
    low = downscale(x, 2, round_to_8_bits=True)
    steps = low * 255
    assert torch.equal(low, to_8_bits(downscale(x, 2))) and (steps - steps.round()).abs().max() < 1e-4
    assert to_8_bits(torch.tensor([-0.2, 0.4999, 1.3])).tolist() == pytest.approx([0.0, 127 / 255, 1.0])


def test_half_precision_is_resized_in_single():
    x = picture(1, 1, 8, 8).bfloat16()
    assert torch.equal(downscale(x, 2), downscale(x.float(), 2).bfloat16())


def test_luma_is_of_studio_range():
    corners = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).view(5, 3, 1, 1)
    want = torch.tensor([16, 235, 81.481, 144.553, 40.966])
    torch.testing.assert_close(255 * rgb_to_y(corners).flatten(), want)
    gray = rgb_to_ycbcr(picture(1, 1, 4, 4).expand(1, 3, 4, 4))
    torch.testing.assert_close(255 * gray[:, 1:], torch.full((1, 2, 4, 4), 128.0, dtype=torch.float64))


def test_colours_come_back():
    x = picture(2, 3, 5, 6)
    y = rgb_to_ycbcr(x)
    torch.testing.assert_close(ycbcr_to_rgb(y), x, rtol=0, atol=1e-12)
    assert (255 * y).min() >= 16 and (255 * y[:, 0]).max() <= 235 and (255 * y[:, 1:]).max() <= 240
    assert math.isclose(ycbcr_to_rgb(rgb_to_ycbcr(x.float())).sub(x).abs().max(), 0, abs_tol=1e-5)


def test_the_lower_right_is_cropped():
    x = picture(1, 1, 11, 9)
    assert torch.equal(crop_to_multiple(x, 4), x[..., :8, :8])


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match=r"multiples of scale = 3, got \(8, 9\)"):
        downscale(torch.zeros(1, 1, 8, 9), 3)
    with pytest.raises(ValueError, match=r"\(B, C, H, W\), got shape \(1, 8, 9\)"):
        upscale(torch.zeros(1, 8, 9), 3)
    with pytest.raises(ValueError, match=r"scale must be a positive integer, got 1\.5"):
        upscale(torch.zeros(1, 1, 8, 9), 1.5)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got shape \(1, 1, 8, 9\)"):
        rgb_to_y(torch.zeros(1, 1, 8, 9))
