"""Networks of super-blocks, which `trimtab.search.deepmad` designs: stem, chains of equal blocks, pooling, classifier.

A super-block is (width, mid, kernel, depth, stride): `depth` bottlenecks with `mid` inner channels. Its first block has
the stride and the change of width. Two kinds of block:

- `bottleneck`: 1x1, kxk, 1x1 with a shortcut; the first of a super-block has a 1x1 convolution in it, after average
  pooling where it strides.
- `depthwise`: 1x1, depthwise kxk, squeeze-and-excitation, 1x1, with SiLU. There is no shortcut where the width changes.

The structures in `PUBLISHED` are those of the paper's releases (Shen et al., arXiv 2303.02165).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from trimtab.models.classify.mbconv import conv_bn
from trimtab.nn.classifier import Classifier, check_image_input, check_sizes

Stage = tuple[int, int, int, int, int]  # width, mid, kernel, depth, stride
KINDS = ("bottleneck", "depthwise")
PUBLISHED: dict[str, dict[str, Any]] = {
    "r18": {
        "stem": 32,
        "stages": [(96, 40, 5, 1, 2), (384, 40, 5, 6, 2), (384, 64, 5, 9, 2), (1024, 104, 3, 10, 1),
                   (672, 104, 5, 12, 2)],
    },
    "r34": {
        "stem": 24,
        "stages": [(128, 24, 5, 1, 2), (512, 48, 5, 10, 2), (896, 88, 5, 13, 2), (1024, 104, 5, 11, 1),
                   (616, 128, 5, 14, 2)],
    },
    "r50": {
        "stem": 32,
        "stages": [(128, 40, 5, 1, 2), (512, 48, 5, 11, 2), (872, 88, 5, 12, 2), (1024, 104, 5, 13, 1),
                   (1232, 120, 5, 15, 2)],
    },
    "29m_224": {
        "stem": 40, "kind": "depthwise", "neck": 1792,
        "stages": [(40, 240, 5, 2, 1), (85, 512, 5, 4, 2), (134, 800, 5, 6, 2), (201, 1208, 5, 6, 2),
                   (312, 1872, 5, 5, 2)],
    },
    "29m_288": {
        "stem": 40, "kind": "depthwise", "neck": 1792,
        "stages": [(61, 368, 5, 4, 2), (96, 576, 5, 4, 2), (145, 872, 5, 5, 2), (217, 1304, 5, 6, 1),
                   (328, 1968, 5, 4, 2)],
    },
    "50m": {
        "stem": 48, "kind": "depthwise", "neck": 2048,
        "stages": [(112, 672, 5, 7, 2), (168, 1008, 5, 9, 2), (252, 1512, 5, 7, 2), (378, 2272, 5, 3, 2),
                   (576, 3456, 3, 1, 1)],
    },
    "89m": {
        "stem": 56, "kind": "depthwise", "neck": 2560,
        "stages": [(136, 816, 5, 10, 2), (204, 1224, 5, 9, 2), (326, 1952, 5, 7, 2), (490, 2944, 5, 4, 2),
                   (744, 4464, 3, 1, 1)],
    },
}  # fmt: skip


def se_width(mid: Any) -> Any:
    """Hidden channels of squeeze-and-excitation over `mid` channels; for an array, of each."""
    return np.maximum(1, np.round(mid / 4) // 8) * 8


class _Excite(nn.Module):
    """Channels weighted by what the whole map says; both convolutions have a batch norm: (B, C, H, W) -> the same."""

    def __init__(self, chs: int) -> None:
        super().__init__()
        hidden = int(se_width(chs))
        self.gate = nn.Sequential(conv_bn(chs, hidden, act="silu"), conv_bn(hidden, chs, act="sigmoid"))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3), keepdim=True))


class SuperBlockUnit(nn.Module):
    """One block (module docstring): (B, in_chs, H, W) -> (B, out_chs, H/stride, W/stride).

    Args:
        first: it begins a super-block.
    """

    def __init__(self, in_chs: int, out_chs: int, mid: int, *, kernel: int, stride: int, kind: str, first: bool):
        super().__init__()
        act = "relu" if kind == "bottleneck" else "silu"
        groups = 1 if kind == "bottleneck" else mid
        self.reduce = conv_bn(in_chs, mid, act=act)
        self.space = conv_bn(mid, mid, kernel, stride=stride, groups=groups, act=act)
        self.excite = _Excite(mid) if kind == "depthwise" else nn.Identity()
        self.expand = conv_bn(mid, out_chs, act="identity")
        self.act: nn.Module = nn.ReLU(inplace=True) if act == "relu" else nn.SiLU(inplace=True)
        self.has_shortcut = kind == "bottleneck" or in_chs == out_chs
        pool = self.has_shortcut and stride == 2
        project = first and kind == "bottleneck"
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if pool else nn.Identity()
        self.project = conv_bn(in_chs, out_chs, act="identity") if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.excite(self.space(self.reduce(x))))
        return self.act(y + self.project(self.pool(x)) if self.has_shortcut else y)


class DeepMADNet(Classifier):
    """(B, in_chans, H, W) -> (B, num_classes).

    Args:
        stem: channels of the first convolution (3x3). stem_stride: 2, or 1 for small images.
        stages: super-blocks, (width, mid, kernel, depth, stride) each.
        kind: of block, one of `KINDS`.
        neck: channels of a 1x1 convolution before the pooling; 0 for none.

    >>> import torch
    >>> net = DeepMADNet(stem=8, stages=[(16, 8, 3, 1, 1), (32, 8, 3, 2, 2)])
    >>> net(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 10])
    """

    any_size = True  # create_model leaves the strides as they are

    def __init__(
        self,
        *,
        stem: int = 16,
        stages: Sequence[Sequence[int]] = ((24, 8, 3, 1, 1), (48, 16, 5, 2, 2), (96, 32, 3, 2, 2)),
        kind: str = "bottleneck",
        neck: int = 0,
        stem_stride: int = 1,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        check_sizes(stem=stem, num_classes=num_classes, in_chans=in_chans)
        check_structure(stages, kind, stem_stride)
        if neck < 0:
            raise ValueError(f"neck must not be negative, got {neck}")
        act = "relu" if kind == "bottleneck" else "silu"
        self.stem = conv_bn(in_chans, stem, 3, stride=stem_stride, act=act)
        self.feature_info = []
        in_chs, reduction, made = stem, stem_stride, []
        for i, (width, mid, kernel, depth, stride) in enumerate(stages):
            reduction *= stride
            blocks = []
            for j in range(depth):
                blocks.append(
                    SuperBlockUnit(
                        in_chs, width, mid, kernel=kernel, stride=stride if j == 0 else 1, kind=kind, first=j == 0
                    )
                )
                in_chs = width
            made.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*made)
        self.neck = conv_bn(in_chs, neck, act=act) if neck else nn.Identity()
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        self._make_head(neck or in_chs, num_classes, in_chans, global_pool, drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        check_image_input(x, self.in_chans)
        return self.neck(self.stages(self.stem(x)))  # (B, neck, H/r, W/r)


def check_structure(stages: Sequence[Sequence[int]], kind: str, stem_stride: int) -> None:
    """Raises ValueError for a structure that cannot be built.

    >>> check_structure([(16, 8, 4, 1, 1)], "bottleneck", 1)
    Traceback (most recent call last):
        ...
    ValueError: stages[0] must be (width, mid, odd kernel, depth, stride 1 or 2), got (16, 8, 4, 1, 1)
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if stem_stride not in (1, 2):
        raise ValueError(f"stem_stride must be 1 or 2, got {stem_stride!r}")
    if not stages:
        raise ValueError("stages must be at least one super-block, got none")
    for i, stage in enumerate(stages):
        whole = len(stage) == 5 and all(isinstance(n, int) and n > 0 for n in stage)
        if not whole or stage[2] % 2 == 0 or stage[4] > 2:
            raise ValueError(f"stages[{i}] must be (width, mid, odd kernel, depth, stride 1 or 2), got {tuple(stage)}")


def _cfg(size: int = 224, num_classes: int = 1000) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (3, size, size),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.0",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs(
    {"deepmad_net": _cfg(32, 10), **{f"deepmad_{n}": _cfg(288 if n.endswith("288") else 224) for n in PUBLISHED}}
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> DeepMADNet:
    given = {**defaults, **kwargs}
    feature_cfg = {"out_indices": tuple(range(len(given.get("stages", (0, 0, 0))))), "flatten_sequential": True}
    return build_model_with_cfg(DeepMADNet, variant, pretrained, feature_cfg=feature_cfg, **given)


@register_model
def deepmad_net(pretrained: bool = False, **kwargs: Any) -> DeepMADNet:
    """The builder: `DeepMADNet` with any of its keyword arguments."""
    return _create("deepmad_net", pretrained, kwargs)


@register_model
def deepmad_r18(pretrained: bool = False, **kwargs: Any) -> DeepMADNet:
    """As costly as ResNet-18: 11,826,088 parameters, 1.811 G MACs."""
    return _create("deepmad_r18", pretrained, kwargs, stem_stride=2, **PUBLISHED["r18"])


@register_model
def deepmad_r34(pretrained: bool = False, **kwargs: Any) -> DeepMADNet:
    """As costly as ResNet-34: 21,690,160 parameters, 3.634 G MACs."""
    return _create("deepmad_r34", pretrained, kwargs, stem_stride=2, **PUBLISHED["r34"])


@register_model
def deepmad_r50(pretrained: bool = False, **kwargs: Any) -> DeepMADNet:
    """As costly as ResNet-50: 25,441,144 parameters, 4.042 G MACs."""
    return _create("deepmad_r50", pretrained, kwargs, stem_stride=2, **PUBLISHED["r50"])


@register_model
def deepmad_29m_224(pretrained: bool = False, **kwargs: Any) -> DeepMADNet:
    """28,669,956 parameters, 4.322 G MACs."""
    return _create("deepmad_29m_224", pretrained, kwargs, stem_stride=2, **PUBLISHED["29m_224"])


@register_model
def deepmad_29m_288(pretrained: bool = False, **kwargs: Any) -> DeepMADNet:
    """28,703,630 parameters, 4.321 G MACs at 288 pixels."""
    return _create("deepmad_29m_288", pretrained, kwargs, stem_stride=2, **PUBLISHED["29m_288"])


@register_model
def deepmad_50m(pretrained: bool = False, **kwargs: Any) -> DeepMADNet:
    """49,408,964 parameters, 8.448 G MACs."""
    return _create("deepmad_50m", pretrained, kwargs, stem_stride=2, **PUBLISHED["50m"])


@register_model
def deepmad_89m(pretrained: bool = False, **kwargs: Any) -> DeepMADNet:
    """88,325,780 parameters, 15.024 G MACs."""
    return _create("deepmad_89m", pretrained, kwargs, stem_stride=2, **PUBLISHED["89m"])
