"""PSNR and SSIM of the super-resolution field, against references of their own in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from trimtab.learn.image_quality import luma_8_bits, psnr, ssim


def pictures(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A smooth picture with some noise, and the same with more; both leave [0, 1] in places."""
    g = torch.Generator().manual_seed(seed)
    up, across = (torch.linspace(0, 7, n).sin().mul(0.5).add(0.5) for n in shape[2:])
    clean = up[:, None] * across + 0.1 * torch.randn(*shape, generator=g)
    return clean + 0.08 * torch.randn(*shape, generator=g), clean


def luma(x: Tensor) -> np.ndarray:
    """(B, 1 or 3, H, W) as the luma (B, H, W) in 0..255 of pictures of 8 bits."""
    bits = np.round(np.clip(x.numpy().astype(np.float64), 0, 1) * 255)
    if x.shape[1] == 1:
        return bits[:, 0]
    return 16 + np.einsum("c,bchw->bhw", [65.481, 128.553, 24.966], bits / 255)


def windowed(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM from its definition: weighted moments in every 11 x 11 window."""
    g = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g) / g.sum() ** 2
    a, b = (sliding_window_view(x, (11, 11)) for x in (a, b))
    ma, mb = ((x * w).sum((-1, -2))[..., None, None] for x in (a, b))
    va, vb, c = (((x - mx) * (y - my) * w).sum((-1, -2)) for x, mx, y, my in
                 ((a, ma, a, ma), (b, mb, b, mb), (a, ma, b, mb)))  # fmt: skip
    ma, mb, c1, c2 = ma[..., 0, 0], mb[..., 0, 0], (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(((2 * ma * mb + c1) * (2 * c + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("border", [0, 3])
def test_both_are_the_reference_for_each_image(channels, border):
    got, want = pictures(2, channels, 31, 26)
    inner = np.s_[:, border : 31 - border, border : 26 - border]
    a, b = luma(got)[inner], luma(want)[inner]
    np.testing.assert_allclose(luma_8_bits(got).numpy()[:, 0][inner], a, atol=1e-10)
    noise = 10 * np.log10(255**2 / ((a - b) ** 2).mean((1, 2)))
    np.testing.assert_allclose(psnr(got, want, border=border).numpy(), noise, rtol=1e-12)
    alike = [windowed(x, y) for x, y in zip(a, b)]
    np.testing.assert_allclose(ssim(got, want, border=border).numpy(), alike, rtol=1e-10)
    assert psnr(got, want).dtype == ssim(got, want).dtype == torch.float64


def test_psnr_is_that_of_torchmetrics_and_ssim_is_not():
    """Theirs reflects the picture at its edge and counts the windows there."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    got, want = pictures(1, 1, 40, 40)
    a, b = luma_8_bits(got), luma_8_bits(want)
    torch.testing.assert_close(psnr(got, want)[0], peak_signal_noise_ratio(a, b, data_range=255.0))
    theirs = structural_similarity_index_measure(a, b, data_range=255.0)
    assert 1e-5 < (ssim(got, want)[0] - theirs).abs() < 0.02


def test_full_range_luma_would_lower_psnr_by_more_than_a_decibel():
    got, want = pictures(1, 3, 64, 64)
    full = [
        (torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1) * x.clamp(0, 1)).sum(1, keepdim=True) for x in (got, want)
    ]
    assert psnr(got, want).item() - psnr(*full).item() == pytest.approx(20 * math.log10(255 / 219), abs=0.05)


def test_equal_pictures_are_perfect_also_beyond_white():
    x = pictures(2, 3, 16, 16)[0]
    assert psnr(x, x.clamp(0, 1)).tolist() == [math.inf] * 2
    assert ssim(x, x.clamp(0, 1)).tolist() == pytest.approx([1.0] * 2)


def test_what_cannot_be_compared_is_refused():
    x = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="both images must have one shape"):
        psnr(x, x[:, :1])
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\) or \(B, 3, H, W\), got shape \(1, 2, 16, 16\)"):
        psnr(x[:, :2], x[:, :2])
    with pytest.raises(ValueError, match=r"must be 17 pixels a side or more, got \(16, 16\)"):
        ssim(x, x, border=3)
    with pytest.raises(ValueError, match="border must be a number of pixels, got -1"):
        psnr(x, x, border=-1)
