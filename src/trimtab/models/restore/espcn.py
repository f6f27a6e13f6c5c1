"""ESPCN: super-resolution whose convolutions all run at low resolution.

Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural
Network", arXiv 1609.05158. Three convolutions look at the small picture; the last one makes r^2 channels for each of
the image, and the pixel shuffle lays them out as pixels: every one of the r x r places has a learned filter of its own,
and the cost falls by about r^2 against networks that upscale first, such as `SRCNN` (Dong et al., arXiv 1501.00092),
which is here as the baseline.

What differs from the paper:

- Zero padding keeps the size, as in every re-implementation; the paper trains on aligned valid regions.
- For training: batches and one learning rate are those of `tt.fit`, low resolution is made by the anti-aliased cubic
  (`nn.resize`) instead of a Gaussian. Train and test must use the same.
- `icnr` (Aitken et al., arXiv 1707.02937) is an extension: a fresh network upscales by nearest neighbours.

Networks of luma (one channel) get colour pictures through `nn.restorer.restore_rgb`. `deconvolution` writes every
sub-pixel convolution of a model as the transposed convolution that it is, for runtimes without DepthToSpace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from trimtab.core.card import Card, Claim
from trimtab.core.edit import Edit
from trimtab.core.errors import SurgeryError
from trimtab.nn.classifier import check_sizes
from trimtab.nn.merge import Plain, edits_of, put
from trimtab.nn.resize import upscale
from trimtab.nn.restorer import Restorer, restorer_cfg, sub_pixel_conv

CARD = Card(
    slug="espcn",
    title="Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network",
    arxiv="1609.05158",
    year=2016,
    kind="architecture",
    tasks=("super-resolution", "video-super-resolution"),
    claims=(
        Claim(
            "lr_space_cost",
            "Doing all convolutions at LR size makes the network an order of magnitude cheaper than SRCNN, which works "
            "at HR size",
        ),
        Claim("params", "Three layers (5,64)-(3,32)-(3,r^2) on the luminance channel"),
        Claim(
            "beats_bicubic",
            "A learned set of upscaling filters beats bicubic on Set5 x3 by more than 2 dB, and SRCNN trained on the "
            "same data",
        ),
        Claim(
            "deconv_identity",
            "A sub-pixel convolution is a strided transposed convolution with a larger kernel, rearranged",
        ),
    ),
)

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class ESPCN(Restorer):
    """A 5x5 convolution, 3x3 ones, and a sub-pixel convolution: (B, C, H, W) -> (B, C, scale H, scale W).

    Args:
        in_chans: 1 is the studio luma of BT.601, 3 is RGB.
        widths: channels of the layers before the last.
        act: "tanh", which the paper found better in so shallow a net, or "relu".
        icnr: begin as an upscaling by nearest neighbours.

    >>> net = ESPCN(scale=3)
    >>> sum(p.numel() for p in net.parameters()), net(torch.zeros(1, 1, 5, 7)).shape
    (22729, torch.Size([1, 1, 15, 21]))
    """

    def __init__(
        self,
        *,
        scale: int = 3,
        in_chans: int = 1,
        widths: Sequence[int] = (64, 32),
        act: str = "tanh",
        icnr: bool = False,
    ):
        super().__init__(scale=scale, in_chans=in_chans)
        self.body = _body([in_chans, *widths], (5,) + (3,) * (len(widths) - 1), act)
        self.upsample = sub_pixel_conv(widths[-1], in_chans, scale)
        _init_weights(self)
        if icnr:
            icnr_(self.upsample[0], scale)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.upsample(x)


class SRCNN(Restorer):
    """The picture upscaled by the cubic, then three convolutions: (B, C, H, W) -> (B, C, scale H, scale W).

    Args:
        in_chans: as in `ESPCN`.
        widths: channels of the layers before the last. kernels: of all layers, odd.

    >>> sum(p.numel() for p in SRCNN().parameters()), sum(p.numel() for p in SRCNN(kernels=(9, 1, 5)).parameters())
    (57281, 8129)
    """

    def __init__(
        self,
        *,
        scale: int = 3,
        in_chans: int = 1,
        widths: Sequence[int] = (64, 32),
        kernels: Sequence[int] = (9, 5, 5),
    ):
        super().__init__(scale=scale, in_chans=in_chans)
        if len(kernels) != len(widths) + 1 or any(k % 2 == 0 for k in kernels):
            raise ValueError(f"kernels must be {len(widths) + 1} odd numbers, got {tuple(kernels)}")
        self.body = _body([in_chans, *widths], kernels[:-1], "relu")
        self.last = nn.Conv2d(widths[-1], in_chans, kernels[-1], padding=kernels[-1] // 2)
        _init_weights(self)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(upscale(x, self.scale))

    def forward_head(self, x: Tensor) -> Tensor:
        return self.last(x)


def icnr_(conv: nn.Module, scale: int) -> None:
    """Make the scale^2 filters and biases of each output channel alike, those of its first: then the pixel shuffle
    after `conv` gives what nearest neighbours give.
    """
    with torch.no_grad():
        for t in conv.parameters():
            t.copy_(t[:: scale**2].repeat_interleave(scale**2, 0))


def deconvolution(model: nn.Module, data: Any = None) -> nn.Module:
    """A copy of `model` with a transposed convolution for every sub-pixel convolution; it computes the same.

    Changed is every convolution (odd kernel k, stride 1, zero padding k // 2) with an `nn.PixelShuffle` of r after it
    in an `nn.Sequential`. It becomes a transposed convolution of kernel k r and stride r with the same multiply-adds.
    One that has another bias for each of the r x r places gets it through a channel of ones, as a transposed
    convolution has one bias only.

    Args:
        data: not looked at; all methods take it.

    Raises:
        SurgeryError: there is no sub-pixel convolution.

    >>> deconvolution(ESPCN(scale=2, icnr=True)).upsample[1]
    ConvTranspose2d(32, 1, kernel_size=(6, 6), stride=(2, 2), padding=(2, 2))
    """
    return put(model, _transposed(model))


def plan(model: nn.Module, data: Any = None) -> list[Edit]:
    """The edits that `deconvolution` applies; arguments as there."""
    return edits_of(_transposed(model))


def _transposed(model: nn.Module) -> dict[str, Plain | None]:
    parts: dict[str, Plain | None] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        for (first, conv), (second, shuffle) in pairwise(module.named_children()):
            if isinstance(shuffle, nn.PixelShuffle) and _keeps_size(conv):
                before, after = _pair(conv, shuffle.upscale_factor)
                parts |= {".".join(filter(None, (name, leaf))): p for leaf, p in ((first, before), (second, after))}
    if not parts:
        raise SurgeryError(f"{type(model).__name__} has no sub-pixel convolution in an nn.Sequential")
    return parts


def _pair(conv: Any, r: int) -> tuple[Plain | None, Plain]:
    """What stands for the convolution (a channel of ones, or nothing), and for the pixel shuffle."""
    weight, bias, k = conv.weight.detach(), conv.bias, conv.kernel_size[0]  # (C r^2, C_in, k, k)
    ones = None
    if bias is not None:
        bias = bias.detach().view(-1, r * r)
        if (bias == bias[:, :1]).all():
            bias = bias[:, 0]
        else:
            tap = torch.zeros_like(weight[:, :1])
            tap[:, 0, k // 2, k // 2] = bias.flatten()
            weight, bias = torch.cat([weight, tap], 1), None
            ones = Plain("torch.nn.ConstantPad3d", {"padding": [0, 0, 0, 0, 0, 1], "value": 1.0}, {})
    # weight[c r^2 + i r + j, m, k-1-u, k-1-v] becomes [m, c, r u + i, r v + j]
    turned = weight.flip(-2, -1).unflatten(0, (-1, r, r)).permute(3, 0, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)
    kwargs = {
        "in_channels": turned.shape[0], "out_channels": turned.shape[1], "kernel_size": k * r, "stride": r,
        "padding": r * (k // 2), "bias": bias is not None,
    }  # fmt: skip
    tensors = {"weight": turned.contiguous()} | ({} if bias is None else {"bias": bias.clone()})
    return ones, Plain("torch.nn.ConvTranspose2d", kwargs, tensors)


def _keeps_size(conv: nn.Module) -> bool:
    if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros":
        return False
    k = conv.kernel_size[0]
    plain = conv.kernel_size == (k, k) and conv.stride == conv.dilation == (1, 1) and conv.groups == 1
    return plain and k % 2 == 1 and conv.padding in ("same", (k // 2, k // 2))


def _body(channels: Sequence[int], kernels: Sequence[int], act: str) -> nn.Sequential:
    check_sizes(**{f"widths[{i}]": width for i, width in enumerate(channels[1:])})
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    layers: list[nn.Module] = []
    for (into, out), k in zip(pairwise(channels), kernels, strict=True):
        layers += [nn.Conv2d(into, out, k, padding=k // 2), ACTIVATIONS[act]()]
    return nn.Sequential(*layers)


def _init_weights(net: nn.Module) -> None:
    """Normal, sqrt(2 / (C_out k^2)) and 1e-3 for the last layer; biases 0."""
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    for conv in convs:
        std = 1e-3 if conv is convs[-1] else math.sqrt(2 / (conv.out_channels * math.prod(conv.kernel_size)))
        nn.init.normal_(conv.weight, std=std)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)


# ------------------------------------------------------------------------------------------------------------- networks


_NETS: dict[str, tuple[type[Restorer], str, dict[str, Any]]] = {  # class, last layer, arguments
    "espcn": (ESPCN, "upsample.0", {}),
    "espcn_x2": (ESPCN, "upsample.0", {"scale": 2}),
    "espcn_x3": (ESPCN, "upsample.0", {"scale": 3}),
    "espcn_x4": (ESPCN, "upsample.0", {"scale": 4}),
    "srcnn_955": (SRCNN, "last", {}),
    "srcnn_915": (SRCNN, "last", {"kernels": (9, 1, 5)}),
}
default_cfgs = generate_default_cfgs(
    {name: restorer_cfg(1, "body.0", last) for name, (_, last, _) in _NETS.items()}  # type: ignore[misc]
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    cls, _, arguments = _NETS[name]
    return build_model_with_cfg(cls, name, pretrained, **{**arguments, **kwargs})


@register_model
def espcn(pretrained: bool = False, **kwargs: Any) -> ESPCN:
    """For any `scale` (3 by default)."""
    return _create("espcn", pretrained, kwargs)


@register_model
def espcn_x2(pretrained: bool = False, **kwargs: Any) -> ESPCN:
    """21,284 parameters, 10.98 G MACs for 1920 x 1080 pixels."""
    return _create("espcn_x2", pretrained, kwargs)


@register_model
def espcn_x3(pretrained: bool = False, **kwargs: Any) -> ESPCN:
    """22,729 parameters, 5.21 G MACs for 1920 x 1080 pixels."""
    return _create("espcn_x3", pretrained, kwargs)


@register_model
def espcn_x4(pretrained: bool = False, **kwargs: Any) -> ESPCN:
    """24,752 parameters, 3.19 G MACs for 1920 x 1080 pixels."""
    return _create("espcn_x4", pretrained, kwargs)


@register_model
def srcnn_955(pretrained: bool = False, **kwargs: Any) -> SRCNN:
    """57,281 parameters, 118.58 G MACs for 1920 x 1080 pixels at any `scale` (3 by default)."""
    return _create("srcnn_955", pretrained, kwargs)


@register_model
def srcnn_915(pretrained: bool = False, **kwargs: Any) -> SRCNN:
    """8,129 parameters, 16.65 G MACs for 1920 x 1080 pixels at any `scale` (3 by default)."""
    return _create("srcnn_915", pretrained, kwargs)
