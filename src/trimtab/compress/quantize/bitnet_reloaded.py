"""BitNet b1.58 Reloaded: ternary weights and 8-bit activations, trained from scratch, in small networks.

Nielsen and Schneider-Kamp, "BitNet b1.58 Reloaded: State-of-the-art Performance Also on Smaller Networks",
arXiv 2407.09527. A layer keeps float weights while it learns, and computes with their signs: every weight is divided by
the mean or the median magnitude of its tensor, rounded and clipped to -1, 0, 1; every input is scaled to 8 bits; the
gradient passes as if nothing had been rounded. What is delivered are the codes, four or five to a byte.

What differs from the paper and its code:

- The bias is added after the product is scaled back. The official layer adds it before, which divides it by the scale
  of the activations.
- Convolutions are quantized by the same rule on their kernels, with one activation scale per image. They have no
  normalisation in front (`norm`): a convolutional net brings its own.
- The first and the last layer stay float by default (`skip=()` quantizes all), and so does whatever is no plain linear
  layer or convolution.
- The frozen form is ours: codes in a buffer, 2 bits or base 3. It computes in float with integer values, which gives
  the sums of an int8 kernel exactly as long as 2^(act_bits - 1) x inputs < 2^24.

The median is the default because it is the official code's. It is not the better quantizer (for Gaussian weights its
squared error is 0.319, that of the mean 0.264), it is the one that outliers do not move.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.compress.quantize.around import Around
from trimtab.compress.quantize.fake import EPS, code_range, straight_through
from trimtab.compress.quantize.packing import BASE_3, PackedWeight, pack
from trimtab.compress.quantize.swap import add_bias, arguments, layers, plain_conv, product, replace, weights_of
from trimtab.core.card import Card, Claim
from trimtab.core.edit import Edit, Replace
from trimtab.learn.fit import fit
from trimtab.learn.objective import Batch, Context, Losses, Objective

log = logging.getLogger(__name__)

CARD = Card(
    slug="bitnet_reloaded",
    title="BitNet b1.58 Reloaded: State-of-the-art Performance Also on Smaller Networks",
    kind="method",
    tasks=("classify",),
    claims=(
        Claim("vision_parity", "small vision models with ternary weights match their float twins of the same size"),
        Claim("language_width", "small language models reach the float quality when hidden sizes are doubled"),
        Claim("median", "mean and median scales train alike; the median is insensitive to outlier weights"),
        Claim("storage", "2 or 1.6 stored bits per weight, 8-bit activations, integer accumulation"),
    ),
    arxiv="2407.09527",
    year=2024,
)

MEASURES = ("median", "mean", "max")
STORAGE: dict[str, int | str] = {"2-bit": 2, BASE_3: BASE_3}


def bitnet_reloaded(
    model: nn.Module,
    data: Any,
    *,
    measure: str = "median",
    kinds: Sequence[str] = ("linear", "conv"),
    skip: Sequence[str] | None = None,
    norm: bool | None = None,
    act_bits: int = 8,
    stochastic: bool = False,
    ramp: float = 0.0,
    storage: str | None = "2-bit",
    epochs: int = 10,
    objective: Objective | None = None,
    opt: str = "adamw",
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> nn.Module:
    """A copy of `model` with ternary layers, trained, then packed; the edits are remembered.

    The weights of `model` are where training starts. Quantizing a trained model without training (``epochs=0``) gives
    what rounding leaves of it.

    Args:
        data: a `Data`; not read when ``epochs=0``.
        measure: what weights are divided by: "median", "mean" or "max" of the magnitudes in the tensor.
        kinds: which layers: "linear", "conv", or both.
        skip: patterns of layer names that stay float; None: the first and the last layer.
        norm: normalise the inputs of the layer (without parameters); None: yes for linear layers, no for convolutions.
        act_bits: bits of the activations, 2 to 8.
        stochastic: in training, draw the sign with probability min(|w / scale|, 1) instead of rounding.
        ramp: share of the training in which quantization is faded in.
        storage: "2-bit" or "base-3" (1.6 bits); None keeps the float weights, to train on.
        epochs, objective, opt, seed, out, progress, **settings: for `tt.fit`.

    Raises:
        ValueError: a setting that makes no sense, or no layer to quantize.

    >>> net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> small = bitnet_reloaded(net, None, epochs=0)
    >>> small[2].weight.packed.shape  # 32 x 32 weights, four to a byte
    torch.Size([256])
    """
    if storage is not None and storage not in STORAGE:
        raise ValueError(f"storage must be one of {', '.join(STORAGE)} or None, got {storage!r}")
    if not 0 <= ramp < 1:
        raise ValueError(f"ramp must be in [0, 1), got {ramp}")
    if not isinstance(epochs, int) or epochs < 0:
        raise ValueError(f"epochs must be a non-negative integer, got {epochs!r}")
    edits = plan(
        model, measure=measure, kinds=kinds, skip=skip, norm=norm, act_bits=act_bits, stochastic=stochastic
    )  # fmt: skip
    ternary = replace(copy.deepcopy(model), edits, weights_of(model, edits))
    kept = [n for n in layers(model, skip=()) if n not in {e.module for e in edits if isinstance(e, Replace)}]
    log.info("%d ternary layers; float: %s", len(edits), ", ".join(kept) or "none")
    if epochs:
        fit(
            ternary, data, Ramp(objective, ramp), epochs=epochs, opt=opt, seed=seed, out=out, progress=progress,
            **settings,
        )  # fmt: skip
    return ternary if storage is None else packed(ternary, storage=storage)


def plan(
    model: nn.Module,
    *,
    measure: str = "median",
    kinds: Sequence[str] = ("linear", "conv"),
    skip: Sequence[str] | None = None,
    norm: bool | None = None,
    act_bits: int = 8,
    stochastic: bool = False,
) -> list[Edit]:
    """The edits that put ternary layers in place; arguments as for `bitnet_reloaded`."""
    given = {"measure": measure, "act_bits": act_bits, "stochastic": stochastic}
    with torch.device("meta"):
        BitLayer((1, 1), **given)  # type: ignore[arg-type]  # refuses wrong settings before any work
    edits: list[Edit] = []
    for name, layer in layers(model, kinds=kinds, skip=skip).items():
        normed = isinstance(layer, nn.Linear) if norm is None else norm
        edits.append(Replace(name, f"{__name__}.BitLayer", arguments(layer) | given | {"norm": normed}))
    return edits


def packed(model: nn.Module, *, storage: str = "2-bit") -> nn.Module:
    """A copy of a model in which every `BitLayer` holds codes only; it computes the same in eval mode.

    Raises:
        ValueError: the model has no such layer.
    """
    if storage not in STORAGE:
        raise ValueError(f"storage must be one of {', '.join(STORAGE)}, got {storage!r}")
    edits: list[Edit] = []
    weights: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BitLayer):
            continue
        given = {
            "shape": list(layer.weight.shape), "bias": layer.bias is not None, "conv": plain_conv(layer.conv),
            "norm": layer.norm, "act_bits": layer.act_bits, "storage": storage,
        }  # fmt: skip
        edits.append(Replace(name, f"{__name__}.PackedBitLayer", given))
        codes, scale = layer.codes()
        weights[f"{name}.weight.packed"] = pack(codes + 1, STORAGE[storage])
        weights[f"{name}.scale"] = scale
        if layer.bias is not None:
            weights[f"{name}.bias"] = layer.bias.detach()
    if not edits:
        raise ValueError("the model has no ternary layers to pack")
    return replace(copy.deepcopy(model), edits, weights)


class _Ternary(nn.Module):
    """y = product(x codes, w codes) / (w scale x x scale) + bias, steps 1 to 4 of the paper's layer."""

    weight_bits: float = 2

    def __init__(
        self,
        shape: Sequence[int],
        *,
        bias: bool = True,
        conv: Mapping[str, Any] | None = None,
        norm: bool = True,
        act_bits: int = 8,
    ) -> None:
        super().__init__()
        if not isinstance(act_bits, int) or not 2 <= act_bits <= 8:
            raise ValueError(f"act_bits must be an integer from 2 to 8, got {act_bits!r}")
        self.shape, self.conv, self.norm, self.act_bits = tuple(shape), conv, norm, act_bits
        self.strength = 1.0  # 0: full precision, 1: quantized
        self.bias = nn.Parameter(torch.zeros(self.shape[0])) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        of = (-1,) if self.conv is None else (-3, -2, -1)  # a token, or an image: what is scaled as one
        if self.norm:
            x = F.layer_norm(x, self.shape[1:]) if self.conv is None else F.group_norm(x, 1)
        low, high = code_range(self.act_bits)
        scale = -low / x.detach().abs().amax(of, keepdim=True).clamp(min=EPS)
        x = x * scale
        x = straight_through(x, x.round().clamp(low, high), self.strength)
        w, w_scale = self.operand()
        return add_bias(product(x, w, self.conv) / (w_scale * scale), self.bias, self.conv)

    def operand(self) -> tuple[Tensor, Tensor]:
        """The weight as it is multiplied with (scaled, so codes at full strength), and its scale."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        conv = "" if self.conv is None else f", conv={dict(self.conv)}"
        return f"{self.shape}{conv}, norm={self.norm}, act_bits={self.act_bits}, bias={self.bias is not None}"


class BitLayer(_Ternary):
    """A ternary linear layer or convolution that is trained: float weights outside, -1, 0, 1 inside.

    Args:
        shape: of the weight: (out, in), or (out, in, kernel, kernel) for a convolution.
        conv: stride, padding, dilation and groups of a convolution.
        measure, norm, act_bits, stochastic: as for `bitnet_reloaded`.

    >>> layer = BitLayer((4, 16))
    >>> layer(torch.randn(2, 16)).shape, sorted(set(layer.codes()[0].flatten().tolist())) == [-1, 0, 1]
    (torch.Size([2, 4]), True)
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        bias: bool = True,
        conv: Mapping[str, Any] | None = None,
        measure: str = "median",
        norm: bool = True,
        act_bits: int = 8,
        stochastic: bool = False,
    ) -> None:
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
        super().__init__(shape, bias=bias, conv=conv, norm=norm, act_bits=act_bits)
        self.measure, self.stochastic = measure, stochastic
        self.weight = nn.Parameter(torch.empty(self.shape))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self._known: tuple[tuple[int, int], Tensor] | None = None  # the scale, and of which state of the weights

    def operand(self) -> tuple[Tensor, Tensor]:
        scale = self.scale()
        u = self.weight * scale
        if self.training and self.stochastic:
            signs = u.detach().sign()
            q = torch.where(torch.rand_like(u) < u.detach().abs(), signs, torch.zeros_like(u))
        else:
            q = u.round().clamp(-1, 1)
        return straight_through(u, q, self.strength), scale

    @torch.no_grad()
    def scale(self) -> Tensor:
        """1 / max(measure(|W|), 1e-5), a scalar; no gradient flows through it.

        The median is a selection over all weights, so it is kept until they change: steps of an optimizer are noticed,
        writing through ``weight.data`` is not.
        """
        if torch.compiler.is_compiling() or self.weight.is_meta:
            return scale_of(self.weight, self.measure)
        state = (self.weight._version, self.weight.data_ptr())
        if self._known is None or self._known[0] != state:
            self._known = (state, scale_of(self.weight, self.measure))
        return self._known[1]

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """(W in -1, 0, 1 as int8, the scale) as they are in eval mode."""
        scale = self.scale()
        return (self.weight * scale).round().clamp(-1, 1).to(torch.int8), scale


class PackedBitLayer(_Ternary):
    """A ternary layer for inference: the codes in bytes, the scale, the bias, and no float weight.

    Gradients flow through it, so that layers in front of it can be trained on.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        bias: bool = True,
        conv: Mapping[str, Any] | None = None,
        norm: bool = True,
        act_bits: int = 8,
        storage: str = "2-bit",
    ) -> None:
        super().__init__(shape, bias=bias, conv=conv, norm=norm, act_bits=act_bits)
        self.weight = PackedWeight(self.shape, STORAGE[storage])
        self.register_buffer("scale", torch.ones(()))
        self.scale: Tensor

    def operand(self) -> tuple[Tensor, Tensor]:
        return (self.weight() - 1).to(self.scale.dtype), self.scale


def scale_of(weight: Tensor, measure: str) -> Tensor:
    """1 / max(measure(|w|), 1e-5). The median of an even number of weights is the lower of the two in the middle."""
    size = weight.detach().abs()
    value = size.median() if measure == "median" else size.mean() if measure == "mean" else size.amax()
    return 1 / value.clamp(min=EPS)


class Ramp(Around):
    """Fades quantization in over the first `share` of the training; validation always sees it whole."""

    def __init__(self, inner: Objective | None, share: float) -> None:
        super().__init__(inner)
        self.share = share
        self._layers: list[_Ternary] = []

    def setup(self, model: nn.Module, batch: Batch) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, _Ternary)]
        super().setup(model, batch)

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        self._set(min(1.0, ctx.progress / self.share) if self.share else 1.0)
        return super().losses(model, batch, ctx)

    def on_epoch_end(self, ctx: Context) -> None:
        self._set(1.0)
        super().on_epoch_end(ctx)

    def finish(self, model: nn.Module) -> nn.Module:
        self._set(1.0)
        return super().finish(model)

    def _set(self, strength: float) -> None:
        for layer in self._layers:
            layer.strength = strength
