"""Networks of MBConv blocks, from a description: stem, stages, a 1x1 convolution, pooling, classifier.

What MobileNetV3, EfficientNet and the supernets made of them (BigNAS, AttentiveNAS, once-for-all) share. Every block
may have a shortcut: where its shape changes, average pooling and a plain 1x1 convolution (BigNAS, Section 3.1). Blocks
of smaller networks have the names of those of larger ones, so a supernet is made of it as of any builder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import create_act_layer, make_divisible
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from trimtab.nn.classifier import Classifier, check_image_input, check_sizes

STAGE = {"width": 16, "depth": 1, "kernel": 3, "expand": 6, "stride": 1, "act": "silu", "se": False}
SHORTCUTS = ("all", "same")
SE_OF = ("input", "expanded")


def conv_bn(in_chs: int, out_chs: int, kernel: int = 1, *, stride: int = 1, groups: int = 1, act: str) -> nn.Sequential:
    """Convolution, batch norm, activation ("identity" for none)."""
    return nn.Sequential(
        nn.Conv2d(in_chs, out_chs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_chs),
        create_act_layer(act, inplace=True) if act != "identity" else nn.Identity(),
    )


class SqueezeExcite(nn.Module):
    """Channels weighted by what the whole image says: (B, C, H, W) -> the same."""

    def __init__(self, channels: int, reduced: int, act: str, gate: str) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, reduced, 1), nn.Conv2d(reduced, channels, 1)
        self.act, self.gate = create_act_layer(act), create_act_layer(gate)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


class MBConv(nn.Module):
    """Expand, depthwise convolution, squeeze-and-excitation, project; the result has no activation.

    Args:
        mid: channels in between; with as many as the input has and `expand` 1 there is no first convolution.
        reduced: channels of squeeze-and-excitation; 0 for none.
        shortcut: add the input, pooled and projected where the shape changes.
    """

    def __init__(
        self, in_chs: int, mid: int, out_chs: int, *, kernel: int, stride: int, expand: bool, act: str, reduced: int,
        gate: str, shortcut: bool,
    ):  # fmt: skip
        super().__init__()
        self.expand = conv_bn(in_chs, mid, act=act) if expand else nn.Identity()
        self.depthwise = conv_bn(mid, mid, kernel, stride=stride, groups=mid, act=act)
        self.se = SqueezeExcite(mid, reduced, "relu", gate) if reduced else nn.Identity()
        self.project = conv_bn(mid, out_chs, act="identity")
        self.has_shortcut = shortcut
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if shortcut and stride == 2 else nn.Identity()
        self.match = nn.Conv2d(in_chs, out_chs, 1, bias=False) if shortcut and in_chs != out_chs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.se(self.depthwise(self.expand(x))))
        return y + self.match(self.pool(x)) if self.has_shortcut else y


class MBConvNet(Classifier):
    """(B, in_chans, H, W) -> (B, num_classes).

    Args:
        stem: channels of the first convolution (3x3). stem_stride: 2, or 1 for small images.
        stages: one mapping each, with keys of `STAGE`: width, depth, kernel, expand, stride, act, se. kernel and expand
            may be lists, one value per block.
        neck: channels of the 1x1 convolution after the stages. mix: of another one after the pooling, without norm
            (MobileNetV3); 0 for none.
        act: activation of stem, neck and mix, by timm's name. gate: that of squeeze-and-excitation.
        se_of: squeeze to a quarter of the "expanded" channels (MobileNetV3; a multiple of 8), or of the block's "input"
            (EfficientNet).
        shortcut: "all" blocks have one, or only those of the "same" shape in and out.
        zero_gamma: residual branches start at zero.

    >>> import torch
    >>> net = MBConvNet(stem=8, stages=[{"width": 8}, {"width": 16, "depth": 2, "stride": 2}], neck=32)
    >>> net(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 10])
    """

    any_size = True  # create_model leaves the strides as they are

    def __init__(
        self,
        *,
        stem: int = 16,
        stages: Sequence[Mapping[str, Any]] = ({"width": 16, "expand": 1}, {"width": 24, "depth": 2, "stride": 2}),
        neck: int = 96,
        mix: int = 0,
        act: str = "silu",
        gate: str = "sigmoid",
        se_of: str = "expanded",
        shortcut: str = "all",
        stem_stride: int = 2,
        zero_gamma: bool = True,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        check_sizes(stem=stem, neck=neck, stem_stride=stem_stride, num_classes=num_classes, in_chans=in_chans)
        for name, value, known in (("se_of", se_of, SE_OF), ("shortcut", shortcut, SHORTCUTS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not stages:
            raise ValueError("stages must be at least one mapping, got none")
        self.stem = conv_bn(in_chans, stem, 3, stride=stem_stride, act=act)
        self.feature_info = []
        in_chs, reduction, made = stem, stem_stride, []
        for i, given in enumerate(stages):
            blocks = []
            for block in _blocks(given, i):
                mid = in_chs if block["expand"] == 1 else make_divisible(round(in_chs * block["expand"]), 8)
                same = block["stride"] == 1 and in_chs == block["width"]
                squeezed = make_divisible(mid // 4, 8) if se_of == "expanded" else max(1, in_chs // 4)
                blocks.append(
                    MBConv(
                        in_chs, mid, block["width"], kernel=block["kernel"], stride=block["stride"],
                        expand=block["expand"] != 1, act=block["act"], reduced=squeezed if block["se"] else 0,
                        gate=gate, shortcut=same or shortcut == "all",
                    )
                )  # fmt: skip
                in_chs, reduction = block["width"], reduction * block["stride"]
            made.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": in_chs, "reduction": reduction, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*made)
        self.neck = conv_bn(in_chs, neck, act=act)
        self.mix = nn.Conv2d(neck, mix, 1, bias=False) if mix else nn.Identity()
        self.mix_act = create_act_layer(act) if mix else nn.Identity()
        self._start(zero_gamma)
        self._make_head(mix or neck, num_classes, in_chans, global_pool, drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        check_image_input(x, self.in_chans)
        return self.neck(self.stages(self.stem(x)))  # (B, neck, H/r, W/r)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        if isinstance(self.mix, nn.Conv2d):
            pooled = x[..., None, None] if x.ndim == 2 else x
            mixed = self.mix_act(self.mix(pooled))
            x = mixed.flatten(1) if x.ndim == 2 else mixed
        if self.drop_rate > 0.0:
            x = F.dropout(x, self.drop_rate, training=self.training)
        return x if pre_logits else self.get_classifier()(x)

    def _start(self, zero_gamma: bool) -> None:
        """He, fan-out; the last norm of every block with a shortcut is zero."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
                nn.init.normal_(m.weight, 0.0, math.sqrt(2.0 / fan_out))
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, MBConv) and m.has_shortcut and zero_gamma:
                nn.init.zeros_(m.project.get_parameter("1.weight"))

    def _init_classifier(self, head: nn.Linear) -> None:
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)


def _blocks(given: Mapping[str, Any], i: int) -> list[dict[str, Any]]:
    """The blocks of a stage: keys of `STAGE` except depth, one value each."""
    unknown = set(given) - set(STAGE)
    if unknown:
        raise ValueError(f"stages[{i}] may have {', '.join(STAGE)}, got {', '.join(sorted(unknown))}")
    stage = {**STAGE, **given}
    depth = stage.pop("depth")
    check_sizes(**{f"stages[{i}].depth": depth, f"stages[{i}].width": stage["width"]})
    for name in ("kernel", "expand"):
        values = stage[name] if isinstance(stage[name], list | tuple) else [stage[name]] * depth
        if len(values) < depth:
            raise ValueError(f"stages[{i}].{name} must have a value for each of {depth} blocks, got {len(values)}")
        stage[name] = values
    if stage["stride"] not in (1, 2):
        raise ValueError(f"stages[{i}].stride must be 1 or 2, got {stage['stride']!r}")
    for k in stage["kernel"]:
        if not isinstance(k, int) or k < 1 or k % 2 == 0:
            raise ValueError(f"stages[{i}].kernel must be odd, got {k!r}")
    blocks = []
    for j in range(depth):
        own = {"kernel": stage["kernel"][j], "expand": stage["expand"][j], "stride": stage["stride"] if j == 0 else 1}
        blocks.append({**stage, **own})
    return blocks


def _cfg(size: int = 224) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, size, size),
        "pool_size": (size // 4, size // 4),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.0",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({"mbconv_net": _cfg()})


@register_model
def mbconv_net(pretrained: bool = False, **kwargs: Any) -> MBConvNet:
    """The builder: `MBConvNet` with any of its keyword arguments."""
    stages = len(kwargs.get("stages", (0, 0)))
    feature_cfg = {"out_indices": tuple(range(stages)), "flatten_sequential": True}
    return build_model_with_cfg(MBConvNet, "mbconv_net", pretrained, feature_cfg=feature_cfg, **kwargs)
