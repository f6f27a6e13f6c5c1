"""The `trim_*` family: plain residual nets for very small images and budgets.

Conv, batch norm, ReLU and addition, nothing else: they train fast on a CPU, every channel can be pruned, batch norms
fold, and 8-bit runtimes fuse all of it. `trim_net` is the builder that `trimtab compact` searches over; the presets
cover 1 k to 300 k parameters and are only starting points (every keyword can be overridden).

Two block kinds span the useful range: `basic` (two dense 3x3, the fastest per MAC on a CPU) and `bottleneck` (1x1, 3x3,
1x1: with `expand > 1` and `group_width=1` it is the inverted residual of MobileNetV2, the cheapest in MACs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from trimtab.nn.classifier import Classifier, check_image_input, check_sizes


def conv_bn(
    in_chs: int,
    out_chs: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    groups: int = 1,
    act: bool = True,
    bias: bool = False,
) -> nn.Sequential:
    """Conv -> BatchNorm (-> ReLU), `same` padding for odd kernels: (B, in_chs, H, W) -> (B, out_chs, H/s, W/s)."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_chs, out_chs, kernel, stride, kernel // 2, groups=groups, bias=bias),
        nn.BatchNorm2d(out_chs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if act else []))


class Block(nn.Module):
    """Residual block: act(body(x) + shortcut(x)); the shortcut is a 1x1 convolution where the shape changes.

    `bottleneck` blocks end linearly (no activation after the sum), as inverted residuals do.
    """

    def __init__(
        self, in_chs: int, out_chs: int, *, stride: int, kind: str, expand: float, group_width: int, kernel: int
    ):
        super().__init__()
        hidden = max(1, round((out_chs if kind == "basic" else in_chs) * expand))
        if kind == "basic":
            self.body = nn.Sequential(
                conv_bn(in_chs, hidden, kernel, stride=stride),
                conv_bn(hidden, out_chs, kernel, act=False),
            )
            self.act: nn.Module = nn.ReLU(inplace=True)
        else:
            groups = 1
            if group_width:
                hidden = max(group_width, hidden - hidden % group_width)
                groups = hidden // group_width
            self.body = nn.Sequential(
                conv_bn(in_chs, hidden, 1),
                conv_bn(hidden, hidden, kernel, stride=stride, groups=groups),
                conv_bn(hidden, out_chs, 1, act=False),
            )
            self.act = nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_chs != out_chs:
            self.shortcut = conv_bn(in_chs, out_chs, 1, stride=stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


class TrimNet(Classifier):
    """Stem, residual stages, global pooling, linear: (B, in_chans, H, W) -> (B, num_classes).

    Args:
        width: channels of the first stage; later stages have `growth` times more each.
        depths: blocks per stage.
        growth: how channels grow from stage to stage.
        widths: channels of each stage, instead of `width` and `growth`.
        strides: stride of the first block of each stage; default 1, 2, 2, ...
        kind: `basic` or `bottleneck` (module docstring).
        expand: hidden channels, relative to the output (`basic`) or input (`bottleneck`) of the block.
        group_width: channels per group of the bottleneck's 3x3; 0 = dense, 1 = depthwise.
        kernel: kernel size of the spatial convolutions (odd).
        stem_width: channels of the stem; default the first stage's.
        stem_stride: 1, or 2 for larger images.
        head_width: adds a 1x1 convolution to this width before the pooling; 0 = none.

    >>> import torch
    >>> TrimNet(width=8, depths=(1, 1), in_chans=1)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    any_size = True  # create_model leaves the strides as they are

    def __init__(
        self,
        *,
        width: int = 16,
        depths: Sequence[int] = (1, 1, 1),
        growth: float = 2.0,
        widths: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        kind: str = "basic",
        expand: float = 1.0,
        group_width: int = 0,
        kernel: int = 3,
        stem_width: int | None = None,
        stem_stride: int = 1,
        head_width: int = 0,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        if widths is None:
            check_sizes(width=width)
            widths = [max(1, round(width * growth**i)) for i in range(len(depths))]
        strides = [1, *([2] * (len(depths) - 1))] if strides is None else list(strides)
        stem_width = widths[0] if stem_width is None and widths else stem_width
        check_sizes(num_classes=num_classes, in_chans=in_chans, stem_width=stem_width or 0, stem_stride=stem_stride)
        for name, values in (("depths", depths), ("widths", widths), ("strides", strides)):
            if len(values) != len(depths) or not values:
                raise ValueError(f"{name} must have one value per stage ({len(depths)}), got {list(values)}")
            check_sizes(**{f"{name}[{i}]": v for i, v in enumerate(values)})
        if kind not in ("basic", "bottleneck"):
            raise ValueError(f"kind must be 'basic' or 'bottleneck', got {kind!r}")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        if expand <= 0 or growth <= 0:
            raise ValueError(f"expand and growth must be positive, got {expand} and {growth}")
        if group_width < 0 or (group_width and kind == "basic"):
            raise ValueError(f"group_width must be 0 for kind='basic' and not negative, got {group_width}")
        assert stem_width is not None
        self.stem = conv_bn(in_chans, stem_width, kernel, stride=stem_stride)
        self.feature_info = []
        in_chs, reduction, stages = stem_width, stem_stride, []
        for i, (depth, out_chs, stride) in enumerate(zip(depths, widths, strides, strict=True)):
            reduction *= stride
            blocks = []
            for j in range(depth):
                blocks.append(
                    Block(
                        in_chs,
                        out_chs,
                        stride=stride if j == 0 else 1,
                        kind=kind,
                        expand=expand,
                        group_width=group_width,
                        kernel=kernel,
                    )
                )
                in_chs = out_chs
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": out_chs, "reduction": reduction, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.neck = conv_bn(in_chs, head_width, 1) if head_width else nn.Identity()
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        self._make_head(head_width or in_chs, num_classes, in_chans, global_pool, drop_rate)

    def _init_classifier(self, head: nn.Linear) -> None:
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        check_image_input(x, self.in_chans)
        return self.neck(self.stages(self.stem(x)))  # (B, C, H/r, W/r)


def _cfg(size: int = 32, in_chans: int = 3) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (in_chans, size, size),
        "pool_size": (size // 4, size // 4),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5,) * in_chans,
        "std": (0.25,) * in_chans,
        "first_conv": "stem.0",
        "classifier": "head",
    }


# name -> keyword arguments. Parameter counts at 10 classes, 3 channels are asserted in tests/models/test_tiny.py.
PRESETS: dict[str, dict[str, Any]] = {
    "trim_net": {"width": 16, "depths": (1, 1, 1)},
    "trim_1k": {"widths": (4, 6), "depths": (1, 1)},
    "trim_3k": {"widths": (4, 7, 11), "depths": (1, 1, 1)},
    "trim_10k": {"widths": (8, 13, 19), "depths": (1, 1, 1)},
    "trim_30k": {"widths": (10, 20, 40), "depths": (1, 1, 1)},
    "trim_80k": {"widths": (16, 32, 64), "depths": (1, 1, 1)},
    "trim_300k": {"widths": (24, 40, 86), "depths": (1, 2, 2)},
    "trim_mobile_10k": {
        "widths": (8, 12, 24),
        "depths": (1, 2, 2),
        "kind": "bottleneck",
        "expand": 3,
        "group_width": 1,
    },
    "trim_mobile_80k": {
        "widths": (16, 24, 44),
        "depths": (1, 3, 4),
        "kind": "bottleneck",
        "expand": 4,
        "group_width": 1,
    },
}
default_cfgs = generate_default_cfgs({name: _cfg() for name in PRESETS})


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> TrimNet:
    defaults = dict(PRESETS[variant])
    if "width" in kwargs or "growth" in kwargs:
        defaults.pop("widths", None)  # the caller's rule replaces the preset's list
    if "depths" in kwargs and "widths" in defaults and len(kwargs["depths"]) != len(defaults["widths"]):
        raise ValueError(f"depths must have {len(defaults['widths'])} values for {variant}, or give widths too")
    kwargs = {**defaults, **kwargs}
    stages = len(kwargs["depths"])
    return build_model_with_cfg(
        TrimNet,
        variant,
        pretrained,
        feature_cfg={"out_indices": tuple(range(stages)), "flatten_sequential": True},
        **kwargs,
    )


@register_model
def trim_net(pretrained: bool = False, **kwargs: Any) -> TrimNet:
    """The builder: `TrimNet` with any of its keyword arguments."""
    return _create("trim_net", pretrained, kwargs)


@register_model
def trim_1k(pretrained: bool = False, **kwargs: Any) -> TrimNet:
    return _create("trim_1k", pretrained, kwargs)


@register_model
def trim_3k(pretrained: bool = False, **kwargs: Any) -> TrimNet:
    return _create("trim_3k", pretrained, kwargs)


@register_model
def trim_10k(pretrained: bool = False, **kwargs: Any) -> TrimNet:
    return _create("trim_10k", pretrained, kwargs)


@register_model
def trim_30k(pretrained: bool = False, **kwargs: Any) -> TrimNet:
    return _create("trim_30k", pretrained, kwargs)


@register_model
def trim_80k(pretrained: bool = False, **kwargs: Any) -> TrimNet:
    return _create("trim_80k", pretrained, kwargs)


@register_model
def trim_300k(pretrained: bool = False, **kwargs: Any) -> TrimNet:
    return _create("trim_300k", pretrained, kwargs)


@register_model
def trim_mobile_10k(pretrained: bool = False, **kwargs: Any) -> TrimNet:
    return _create("trim_mobile_10k", pretrained, kwargs)


@register_model
def trim_mobile_80k(pretrained: bool = False, **kwargs: Any) -> TrimNet:
    return _create("trim_mobile_80k", pretrained, kwargs)
