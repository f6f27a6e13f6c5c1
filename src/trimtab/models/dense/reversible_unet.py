"""A 3-D U-Net whose stages keep one tensor for the backward pass, however deep they are.

Pendse, Thangarasa et al., "Memory Efficient 3D U-Net with Reversible Mobile Inverted Bottlenecks for Brain Tumor
Segmentation", arXiv 2104.09648, on the partially reversible U-Net of Brügger et al. (1906.06148). Mobile inverted
bottlenecks are cheap in arithmetic and wide inside; as the two halves of a reversible block (`nn.reversible`) their
wide activations are computed again instead of being kept, so that the memory of training is set by the few layers that
change the resolution. Depth and expansion are then nearly free of memory, for about a third more work.

There is no released code. What the paper leaves open is as follows: group norm with gcd(8, channels) groups, SiLU, an
expansion of 4, and resampling as in the predecessor (max-pooling or trilinear interpolation beside a 1 x 1 x 1
convolution; the skip is added). `resample="mbconv"` puts an inverted bottleneck in the place of those convolutions,
strided on the way down. `dims=2` makes the same network for images.

`reversible=False` is the same network with the same state dict and ordinary backpropagation; `core.saved.saved_bytes`
tells what either keeps. Activation checkpointing of every block keeps one tensor per block, this one per stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.card import Card, Claim
from trimtab.nn.classifier import check_sizes
from trimtab.nn.reversible import ReversibleSequence
from trimtab.nn.segmenter import Segmenter, dice_loss, pixel_loss

CARD = Card(
    slug="reversible_unet",
    title="Memory Efficient 3D U-Net with Reversible Mobile Inverted Bottlenecks for Brain Tumor Segmentation",
    arxiv="2104.09648",
    year=2021,
    kind="architecture",
    tasks=("segment",),
    claims=(
        Claim(
            "memory_vs_depth",
            "Reversible MBConv stages make activation memory independent of their depth: volumes up to 3x larger, or "
            "25 % more depth, or up to 2x the channels in the same memory",
        ),
        Claim("exact_gradients", "Recomputation from outputs gives the same gradients as ordinary backpropagation"),
        Claim("budget_trade", "With a fixed memory budget one can trade the savings for volume, depth or width"),
    ),
)
RESAMPLE = ("pool", "mbconv")


class MBConv(nn.Sequential):
    """Expand, filter each channel, project: (B, C, ...) -> (B, C', ...), no shortcut, no activation at the end.

    With C = C' = c and expansion e it has 2 e c^2 + 4 e c + 2 c + 3^dims e c parameters.
    """

    def __init__(self, into: int, out: int, expansion: int, dims: int, stride: int = 1):
        conv = _conv(dims)
        mid = expansion * into
        super().__init__(
            conv(into, mid, 1, bias=False), _norm(mid), nn.SiLU(),
            conv(mid, mid, 3, stride, padding=1, groups=mid, bias=False), _norm(mid), nn.SiLU(),
            conv(mid, out, 1, bias=False), _norm(out),
        )  # fmt: skip


class ReversibleUNet(Segmenter):
    """A U-Net of reversible stages: (B, in_chans, D, H, W) -> (B, num_classes, D, H, W).

    Args:
        widths: channels of the levels, from full resolution down; even numbers. Every level halves the sides.
        blocks: reversible blocks of a stage. There is a stage per level on the way down, and one per level but the
            deepest on the way up.
        expansion: of the inverted bottlenecks.
        resample: "pool" or "mbconv", see above.
        dims: 3 for volumes, 2 for images (B, in_chans, H, W).
        reversible: False keeps all activations; the state dict is the same.

    Raises:
        ValueError: odd widths; sides that are not multiples of 2^(levels - 1).

    >>> import torch
    >>> ReversibleUNet(widths=(8, 16), blocks=1)(torch.zeros(1, 4, 8, 8, 8)).shape
    torch.Size([1, 3, 8, 8, 8])
    """

    any_size = True  # for `models.small_images`: full resolution throughout, nothing to adapt

    def __init__(
        self,
        *,
        widths: Sequence[int] = (32, 64, 128, 256),
        blocks: int = 2,
        expansion: int = 4,
        resample: str = "pool",
        dims: int = 3,
        reversible: bool = True,
        num_classes: int = 3,
        in_chans: int = 4,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        check_sizes(num_classes=num_classes, in_chans=in_chans, blocks=blocks, expansion=expansion)
        if dims not in (2, 3):
            raise ValueError(f"dims must be 2 (images) or 3 (volumes), got {dims!r}")
        if resample not in RESAMPLE:
            raise ValueError(f"resample must be one of {', '.join(RESAMPLE)}, got {resample!r}")
        if not widths or any(width < 2 or width % 2 for width in widths):
            raise ValueError(f"widths must be even: the channels are cut in two halves, got {tuple(widths)}")
        self.dims, self.multiple = dims, 2 ** (len(widths) - 1)

        def stage(width: int) -> ReversibleSequence:
            pairs = ([MBConv(width // 2, width // 2, expansion, dims) for _ in "fg"] for _ in range(blocks))
            return ReversibleSequence(((f, g) for f, g in pairs), reversible=reversible)

        def change(into: int, out: int, stride: int = 1) -> nn.Module:
            if resample == "mbconv":
                return MBConv(into, out, expansion, dims, stride)
            pool = [_pool(dims)(2)] if stride == 2 else []
            return nn.Sequential(*pool, _conv(dims)(into, out, 1))

        self.stem = _conv(dims)(in_chans, widths[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(change(a, b, 2) for a, b in pairwise(widths))
        self.encoder = nn.ModuleList(stage(width) for width in widths)
        self.up = nn.ModuleList(change(b, a) for a, b in pairwise(widths))
        self.decoder = nn.ModuleList(stage(width) for width in widths[:-1])
        self.feature_info = [
            {"num_chs": width, "reduction": 2**i, "module": f"encoder.{i}"} for i, width in enumerate(widths)
        ]
        self._make_head(widths[0], num_classes, in_chans, "", drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, ...) -> (B, widths[0], ...) at full resolution."""
        self._check(x)
        skips = [self.encoder[0](self.stem(x))]
        for down, stage in zip(self.down, list(self.encoder)[1:]):
            skips.append(stage(down(skips[-1])))
        x = skips[-1]
        mode = "trilinear" if self.dims == 3 else "bilinear"
        for up, stage, skip in reversed(list(zip(self.up, self.decoder, skips))):
            x = stage(F.interpolate(up(x), scale_factor=2, mode=mode, align_corners=False) + skip)
        return x

    def criterion(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Soft Dice loss and binary cross-entropy of regions, or cross-entropy of classes.

        Args:
            outputs: logits (B, K, ...).
            batch: "label" (B, K, ...) holds K masks that may overlap, 0 or 1, each with its own sigmoid; "label"
                (B, ...) int64 holds classes, 255 for void.
        """
        label = batch["label"]
        if label.ndim < outputs.ndim:
            return {"cross_entropy": pixel_loss(outputs, label)}
        return {
            "dice": dice_loss(outputs.sigmoid(), label).mean(),
            "cross_entropy": F.binary_cross_entropy_with_logits(outputs, label.to(outputs.dtype)),
        }


def _conv(dims: int) -> Any:
    return nn.Conv3d if dims == 3 else nn.Conv2d


def _pool(dims: int) -> Any:
    return nn.MaxPool3d if dims == 3 else nn.MaxPool2d


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


# ------------------------------------------------------------------------------------------------------------- networks


def _cfg(size: tuple[int, ...], num_classes: int) -> dict[str, Any]:
    channels = size[0]
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": size[:3],  # timm knows images only; `_create` says the rest
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5 if channels == 3 else 0.0,) * channels,  # volumes are standardised one by one
        "std": (0.25 if channels == 3 else 1.0,) * channels,
        "first_conv": "stem",
        "classifier": "head",
    }


_VOLUME = (4, 32, 32, 32)
_NETS: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {  # input, classes, arguments
    "reversible_unet_tiny_1": (_VOLUME, 3, {"blocks": 1}),
    "reversible_unet_tiny_2": (_VOLUME, 3, {"blocks": 2}),
    "reversible_unet_tiny_4": (_VOLUME, 3, {"blocks": 4}),
    "reversible_unet_wide": (_VOLUME, 3, {"blocks": 1, "widths": (60, 120, 240, 360, 480)}),
    "reversible_unet_2d": ((3, 64, 64), 2, {"dims": 2, "widths": (16, 32, 64, 128)}),
}
default_cfgs = generate_default_cfgs({name: _cfg(size, classes) for name, (size, classes, _) in _NETS.items()})  # type: ignore[arg-type]


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    size, _, arguments = _NETS[name]
    model: Any = build_model_with_cfg(ReversibleUNet, name, pretrained, **{**arguments, **kwargs})
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "input_size": size}
    return model


@register_model
def reversible_unet_tiny_1(pretrained: bool = False, **kwargs: Any) -> ReversibleUNet:
    """613,123 parameters; one block per stage."""
    return _create("reversible_unet_tiny_1", pretrained, kwargs)


@register_model
def reversible_unet_tiny_2(pretrained: bool = False, **kwargs: Any) -> ReversibleUNet:
    """1,136,003 parameters, 109.9 G MACs for 128^3 voxels; two blocks per stage."""
    return _create("reversible_unet_tiny_2", pretrained, kwargs)


@register_model
def reversible_unet_tiny_4(pretrained: bool = False, **kwargs: Any) -> ReversibleUNet:
    """2,181,763 parameters; four blocks per stage."""
    return _create("reversible_unet_tiny_4", pretrained, kwargs)


@register_model
def reversible_unet_wide(pretrained: bool = False, **kwargs: Any) -> ReversibleUNet:
    """3,419,283 parameters; the widths of the predecessor, five levels."""
    return _create("reversible_unet_wide", pretrained, kwargs)


@register_model
def reversible_unet_2d(pretrained: bool = False, **kwargs: Any) -> ReversibleUNet:
    """For images: four levels of 16 to 128 channels, two blocks per stage."""
    return _create("reversible_unet_2d", pretrained, kwargs)
