"""Reversible sequences: blocks whose inputs are computed again from their outputs, so that none need be kept.

The stream (B, C, ...) is cut into two halves of C/2 channels. A block couples them (RevNet, Gomez et al. 2017):

    y1 = x1 + f(x2)        x2 = y2 - g(y1)
    y2 = x2 + g(y1)        x1 = y1 - f(x2)

For the backward pass a whole sequence keeps one tensor, its output, however many blocks it has and however wide they
are inside. The price is a second forward pass of `f` and `g`, about a third more work.

The sums are made in float32 at least, also under autocast and with half-precision weights: what is lost in a sum cannot
be subtracted again. Where no gradient is needed, nothing special happens, so such models are measured, exported and
served like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

LOW = (torch.float16, torch.bfloat16)
# What gives something else the second time: it draws random numbers, or counts how often it was called.
FORBIDDEN = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU, DropPath)


class Coupling(nn.Module):
    """One reversible block, made of two modules `f` and `g` that keep the shape of half of the channels."""

    def __init__(self, f: nn.Module, g: nn.Module):
        super().__init__()
        self.f, self.g = f, g
        for name, module in self.named_modules():
            if _changes(module):
                raise ValueError(
                    f"a reversible block runs twice and must do the same both times, which {name} "
                    f"({type(module).__name__}) does not; use group or layer norms, and no dropout"
                )

    def forward(self, x1: Tensor, x2: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Halves in, halves out; `f` and `g` are fed in `dtype` (by default that of the halves)."""
        y1 = x1 + self.f(x2.to(dtype))
        return y1, x2 + self.g(y1.to(dtype))

    def inverse(self, y1: Tensor, y2: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The halves that `forward` was given, up to rounding."""
        x2 = y2 - self.g(y1.to(dtype))
        return y1 - self.f(x2.to(dtype)), x2


class ReversibleSequence(nn.Module):
    """Reversible blocks in a row, which keep one tensor for the backward pass: (B, C, ...) -> (B, C, ...), C even.

    Parameters get their gradients through autograd, so hooks on them, `torch.autograd.grad` and data-parallel wrappers
    work; second derivatives are refused by autograd.

    Args:
        blocks: pairs (f, g) of modules (B, C/2, ...) -> (B, C/2, ...).
        reversible: False keeps every activation instead, as autograd does: the twin to compare with. The attribute may
            be changed at any time; the state dict is the same.

    Raises:
        ValueError: blocks with a norm that counts batches, or with dropout; channels that cannot be halved.

    >>> chain = ReversibleSequence((nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))
    >>> x = torch.randn(2, 8)
    >>> torch.allclose(chain.inverse(chain(x)), x, atol=1e-5)
    True
    """

    def __init__(self, blocks: Iterable[tuple[nn.Module, nn.Module]], *, reversible: bool = True):
        super().__init__()
        self.blocks = nn.ModuleList(Coupling(f, g) for f, g in blocks)
        self.reversible = reversible

    def forward(self, x: Tensor) -> Tensor:
        stream = self._widen(x)
        if self.reversible and torch.is_grad_enabled() and len(self.blocks):
            parameters = [p for m in self._parts() for p in m.parameters()]
            return _Chain.apply(stream, self, x.dtype, *parameters).to(x.dtype)  # type: ignore[no-untyped-call]
        return self._run(stream, x.dtype).to(x.dtype)

    @torch.no_grad()
    def inverse(self, y: Tensor) -> Tensor:
        """The input that gives `y`, up to rounding; without gradients."""
        halves = self._widen(y).chunk(2, 1)
        for block in reversed(self._couplings()):
            halves = block.inverse(*halves, y.dtype)
        return torch.cat(halves, 1).to(y.dtype)

    def _widen(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] % 2:
            raise ValueError(f"the channels of a reversible sequence are cut in two halves, got shape {tuple(x.shape)}")
        return x.float() if x.dtype in LOW else x

    def _run(self, stream: Tensor, dtype: torch.dtype) -> Tensor:
        halves = stream.chunk(2, 1)
        for block in self._couplings():
            halves = block(*halves, dtype)
        return torch.cat(halves, 1)

    def _couplings(self) -> list[Any]:
        return list(self.blocks)

    def _parts(self) -> list[nn.Module]:
        """f and g of all blocks, in the order in which they run."""
        return [part for block in self._couplings() for part in (block.f, block.g)]


class _Chain(torch.autograd.Function):
    """A sequence as one operation of autograd: stream and parameters in, the last stream out, which alone is kept."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, chain: ReversibleSequence, dtype: torch.dtype, *parameters: Tensor) -> Tensor:
        ctx.chain, ctx.dtype, ctx.autocast = chain, dtype, _autocast_as_now(stream.device.type)
        with ctx.autocast():
            y = chain._run(stream, dtype)
        ctx.save_for_backward(y, *parameters)  # parameters for autograd's check that nobody changed them meanwhile
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        y = ctx.saved_tensors[0]
        y1, y2 = y.chunk(2, 1)
        d1, d2 = dy.chunk(2, 1)
        gradients: list[Tensor | None] = []
        for block in reversed(ctx.chain._couplings()):
            out, into, of_g = _again(ctx, block.g, y1, d2)
            x2, d1 = y2 - out, d1 + into
            out, into, of_f = _again(ctx, block.f, x2, d1)
            x1, d2 = y1 - out, d2 + into
            gradients[:0] = [*of_f, *of_g]
            y1, y2 = x1, x2
        return torch.cat([d1, d2], 1), None, None, *gradients


def _again(ctx: Any, module: nn.Module, x: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Run `module` once more: its output, and the gradients of its input and its parameters for that of its output.

    The parameters are stood in for by detached ones: hooks on the real ones must see a gradient once, from autograd.
    """
    weights = {name: p.detach().requires_grad_(p.requires_grad) for name, p in module.named_parameters()}
    with torch.enable_grad(), ctx.autocast():
        x = x.detach().requires_grad_()
        out = functional_call(module, weights, (x.to(ctx.dtype),))
        wanted = [x, *(w for w in weights.values() if w.requires_grad)]
    found = torch.autograd.grad(out, wanted, d_out.to(out.dtype), allow_unused=True, materialize_grads=True)
    of_weights = iter(found[1:])
    return out.detach(), found[0], [next(of_weights) if w.requires_grad else None for w in weights.values()]


def _autocast_as_now(kind: str) -> Callable[[], AbstractContextManager[Any]]:
    """What makes a context with the autocast of this moment. Recomputing in another precision would be of no use."""
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    # No cache: weights cast here, without gradients, must not be found again by the backward pass.
    return partial(torch.autocast, kind, dtype, enabled, cache_enabled=False)


def _changes(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.track_running_stats
    return isinstance(module, FORBIDDEN)
