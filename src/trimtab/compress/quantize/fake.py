"""Fake quantization: computing with quantized values while the gradient sees the unquantized ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

EPS = 1e-5


def straight_through(value: Tensor, quantized: Tensor, strength: float = 1.0) -> Tensor:
    """`quantized` in the forward pass, the gradient of `value` in the backward pass, unchanged and nowhere masked.

    Args:
        strength: 0 gives `value`, 1 gives `quantized`, what is between gives the mixture.

    >>> x = torch.tensor([0.3, 1.7], requires_grad=True)
    >>> y = straight_through(x, x.round())
    >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
    ([0.0, 2.0], [1.0, 1.0])
    """
    if strength == 1.0 and not (torch.is_grad_enabled() and value.requires_grad):
        return quantized
    return value + strength * (quantized - value).detach()


def code_range(bits: float) -> tuple[int, int]:
    """Lowest and highest code of so many bits: [ceil(-2^(b-1)), ceil(2^(b-1) - 1)]; 1.58 bits are three codes.

    >>> [code_range(b) for b in (1.58, 2, 8)]
    [(-1, 1), (-2, 1), (-128, 127)]
    """
    half = 2 ** (bits - 1)
    return math.ceil(-half), math.ceil(half - 1)


class MaxObserver(nn.Module):
    """Remembers the largest magnitude that passes by in training: a moving average over batches, in the buffer `peak`.

    In training mode it gives the maximum of the batch at hand; in eval mode what it has seen, so that the scale of an
    image does not depend on its neighbours in the batch.

    >>> seen = MaxObserver()
    >>> float(seen(torch.tensor([1.0, -3.0]))), float(seen.eval()(torch.tensor([9.0])))
    (3.0, 3.0)
    """

    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("peak", torch.zeros(()))
        self.peak: Tensor

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.peak.clamp(min=EPS)
        now = x.detach().abs().amax().to(self.peak.dtype)
        self.peak.copy_(torch.where(self.peak > 0, self.peak.lerp(now, self.momentum), now))
        return now.clamp(min=EPS)
