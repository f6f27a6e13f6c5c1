"""A narrow place in a network whose values are whole numbers with learned probabilities.

Encoder and decoder are few convolutions with divisive normalisation; the prior is the factorised non-parametric density
of Balle et al. (arXiv 1802.01436, appendix 6.1), one per channel: what it says of a value is what a range coder pays.
"""

from __future__ import annotations

import math
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PEDESTAL = 2.0**-36  # keeps the gradient of the squares in GDN from vanishing at zero
LEAST = 1e-9  # probability of a value, and of what lies beyond the tables on each side
_WIDTHS = (1, 3, 3, 3, 3, 1)


class GDN(nn.Module):
    """y_i = x_i / (beta_i + sum_j gamma_ij |x_j|), the form called GDN1; `inverse` multiplies. (B, C, H, W) as it is.

    beta >= 1e-6 and gamma >= 0 are kept as squares, whose roots are bounded with gradients that still lead back.
    """

    def __init__(self, channels: int, *, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.beta = nn.Parameter((torch.ones(channels) + PEDESTAL).sqrt())
        self.gamma = nn.Parameter((0.1 * torch.eye(channels) + PEDESTAL).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        beta, gamma = self._square(self.beta, 1e-6), self._square(self.gamma, 0.0)
        norm = F.conv2d(x.abs(), gamma[:, :, None, None], beta)
        return x * norm if self.inverse else x / norm

    def _square(self, root: Tensor, least: float) -> Tensor:
        return at_least(root, math.sqrt(least + PEDESTAL), self.training) ** 2 - PEDESTAL


class _AtLeast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x >= bound)
        return x.clamp_min(bound)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (above,) = ctx.saved_tensors
        return grad * (above | (grad < 0)), None


def at_least(x: Tensor, bound: float, training: bool = True) -> Tensor:
    """max(x, bound), whose gradient below the bound passes when it would bring x back.

    >>> x = torch.tensor([-1.0], requires_grad=True)
    >>> (-at_least(x, 0.0)).sum().backward()
    >>> x.grad
    tensor([-1.])
    """
    return _AtLeast.apply(x, bound) if training else x.clamp_min(bound)


class Prior(nn.Module):
    """A cumulative distribution per channel, and three quantiles of it: 61 numbers per channel.

    The cumulative c is the sigmoid of five layers x <- softplus(H) x + b, the first four with x <- x + tanh(a) tanh(x);
    the probability of a whole number v is c(v + 1/2) - c(v - 1/2).
    """

    def __init__(self, channels: int, *, spread: float = 10.0) -> None:
        super().__init__()
        self.channels = channels
        scale = spread ** (1 / (len(_WIDTHS) - 1))
        for i, (a, b) in enumerate(pairwise(_WIDTHS)):
            start = math.log(math.expm1(1 / scale / b))
            self.register_parameter(f"matrix{i}", nn.Parameter(torch.full((channels, b, a), start)))
            self.register_parameter(f"bias{i}", nn.Parameter(torch.empty(channels, b, 1).uniform_(-0.5, 0.5)))
            if i < len(_WIDTHS) - 2:
                self.register_parameter(f"factor{i}", nn.Parameter(torch.zeros(channels, b, 1)))
        self.quantiles = nn.Parameter(torch.tensor([-spread, 0.0, spread]).repeat(channels, 1))  # (C, 3)

    @property
    def medians(self) -> Tensor:
        """(C, 1, 1), without a gradient: values are rounded on a grid through them."""
        return self.quantiles[:, 1].detach()[:, None, None]

    def logits(self, v: Tensor, *, fixed: bool = False) -> Tensor:
        """Log odds of the cumulative at v, (C, N) to (C, N). fixed: only v gets a gradient."""
        x = v[:, None]  # (C, 1, N)
        for i in range(len(_WIDTHS) - 1):
            layer = [p for n in ("matrix", "bias", "factor") if (p := getattr(self, f"{n}{i}", None)) is not None]
            matrix, bias, *factor = [p.detach() for p in layer] if fixed else layer
            x = F.softplus(matrix) @ x + bias
            for a in factor:  # not in the last layer
                x = x + torch.tanh(a) * torch.tanh(x)
        return x[:, 0]

    def likelihood(self, z: Tensor) -> Tensor:
        """Probabilities of values (B, C, H, W), at least 1e-9."""
        v = z.transpose(0, 1).reshape(self.channels, -1)
        p = self.between(v).view(self.channels, z.shape[0], *z.shape[2:]).transpose(0, 1)
        return at_least(p, LEAST, self.training)

    def between(self, v: Tensor) -> Tensor:
        """c(v + 1/2) - c(v - 1/2), (C, N) to (C, N), taken on the side where the sigmoid is not close to 1."""
        low, high = self.logits(v - 0.5), self.logits(v + 0.5)
        sign = torch.where(low + high > 0, -1.0, 1.0)  # never 0, as torch.sign gives at the median
        return (torch.sigmoid(sign * high) - torch.sigmoid(sign * low)).abs()

    def bits(self, z: Tensor) -> Tensor:
        """What a perfect coder pays for all of z."""
        return -self.likelihood(z).log2().sum()

    def auxiliary_loss(self) -> Tensor:
        """How far the quantiles are from where the cumulative says they are: 1e-9, a half, 1 - 1e-9."""
        return (self.logits(self.quantiles, fixed=True) - self._targets(self.quantiles)).abs().sum()

    @torch.no_grad()
    def settle(self) -> None:
        """Put the quantiles where the auxiliary loss is zero, by bisection."""
        exact = deepcopy(self).double()
        targets = self._targets(exact.quantiles).expand(self.channels, 3)
        low, high = torch.full_like(targets, -1.0), torch.full_like(targets, 1.0)
        for _ in range(24):  # to a range of 2^24, far more than values ever have
            low = torch.where(exact.logits(low) < targets, low, 2 * low)
            high = torch.where(exact.logits(high) > targets, high, 2 * high)
        for _ in range(60):
            middle = (low + high) / 2
            below = exact.logits(middle) < targets
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        self.quantiles.copy_((low + high) / 2)

    @staticmethod
    def _targets(like: Tensor) -> Tensor:
        tail = math.log(2 / LEAST - 1)
        return torch.tensor([-tail, 0.0, tail], dtype=like.dtype, device=like.device)


class Encoder(nn.Module):
    """What runs on the device: (B, in_chans, H, W) to (B, channels, ceil(H/r) - 1, ceil(W/r) - 1), without biases.

    Args:
        channels: of the latent; 4x and 2x as many on the way (96 and 48 for the paper's 24).
        reduction: r, 1, 2 or 4, by the strides of the two 5x5 convolutions.
    """

    def __init__(self, in_chans: int = 3, channels: int = 24, reduction: int = 4) -> None:
        super().__init__()
        if reduction not in _STRIDES:
            raise ValueError(f"reduction must be one of {', '.join(map(str, _STRIDES))}, got {reduction}")
        self.sizes = {"in_chans": in_chans, "channels": channels, "reduction": reduction}
        first, second = _STRIDES[reduction]
        self.conv1 = nn.Conv2d(in_chans, 4 * channels, 5, first, 2, bias=False)
        self.norm1 = GDN(4 * channels)
        self.conv2 = nn.Conv2d(4 * channels, 2 * channels, 5, second, 2, bias=False)
        self.norm2 = GDN(2 * channels)
        self.conv3 = nn.Conv2d(2 * channels, channels, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.norm2(self.conv2(self.norm1(self.conv1(x)))))


_STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}


class Decoder(nn.Module):
    """What makes features of a latent: (B, channels, h, w) to (B, out_chans, h + 1, w + 1), without biases."""

    def __init__(self, channels: int = 24, out_chans: int = 256) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * out_chans, 2, padding=1, bias=False)
        self.norm1 = GDN(2 * out_chans, inverse=True)
        self.conv2 = nn.Conv2d(2 * out_chans, out_chans, 2, bias=False)
        self.norm2 = GDN(out_chans, inverse=True)
        self.conv3 = nn.Conv2d(out_chans, out_chans, 2, padding=1, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv3(self.norm2(self.conv2(self.norm1(self.conv1(z)))))


class Bottleneck(nn.Module):
    """Encoder, whole numbers, decoder: in the place of a network's first layers.

    In eval mode values are rounded. In training noise of [-1/2, 1/2) stands for the rounding, unless the bottleneck is
    `frozen`: then values are rounded, and encoder and prior get no gradient.
    """

    def __init__(
        self, in_chans: int = 3, channels: int = 24, out_chans: int = 256, reduction: int = 4, frozen: bool = False
    ) -> None:
        super().__init__()
        self.frozen = frozen
        self.encoder = Encoder(in_chans, channels, reduction)
        self.prior = Prior(channels)
        self.decoder = Decoder(channels, out_chans)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.frozen:
            return self.decoder(self.noisy(x))
        if self.training:
            with torch.no_grad():
                symbols = self.symbols(x)
        else:
            symbols = self.symbols(x)
        return self.decoder(symbols + self.prior.medians)

    def noisy(self, x: Tensor) -> Tensor:
        """The latent with noise in place of rounding."""
        z = self.encoder(x)
        return z + torch.empty_like(z).uniform_(-0.5, 0.5)

    def symbols(self, x: Tensor) -> Tensor:
        """The whole numbers that are sent, as floats (B, channels, h, w): distances from the medians."""
        return torch.round(self.encoder(x) - self.prior.medians)
