"""Residual networks for 32x32 images: the CIFAR ResNets of He et al. and the ResNet-8 of MLPerf Tiny.

The CIFAR nets (He et al. 2016, section 4.2) have a 3x3 stem, three stages of widths 16/32/64, and shortcuts without
parameters ("option A": take every second pixel, pad the missing channels with zeros). Module names follow the layout
that the published CIFAR-10 weights of this family use, so those load as they are.

ResNet-8 is the image classification network of MLPerf Tiny: one block per stage, 1x1 convolutions as shortcuts. The
reference gives a bias to every convolution; the ones whose batch norm removes them again inside the residual branches
are left out here (77,962 instead of 78,186 trainable parameters). With the batch norms folded, as a microcontroller
runs it, the network is the reference's: 77,706 numbers and 12.50 M multiply-adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from trimtab.nn.classifier import Classifier, check_image_input, check_sizes


class PadShortcut(nn.Module):
    """Option A: every `stride`-th pixel, then zero channels on both sides; no parameters."""

    def __init__(self, in_chs: int, out_chs: int, stride: int):
        super().__init__()
        self.stride = stride
        self.before = (out_chs - in_chs) // 2
        self.after = out_chs - in_chs - self.before

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: relu(x' + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_chs != out_chs:
            if shortcut == "pad":
                self.shortcut = PadShortcut(in_chs, out_chs, stride)
            else:
                self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride)
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.act2(y + self.shortcut(x))


class ResNetCifar(Classifier):
    """Stem and three residual stages: (B, in_chans, H, W) -> (B, num_classes).

    Args:
        depths: blocks per stage; a CIFAR ResNet of depth 6n + 2 has n in each.
        widths: channels per stage.
        shortcut: `pad` (option A, no parameters) or `conv` (1x1 convolution with bias).
        stem_bias: whether the first convolution has a bias.

    >>> import torch
    >>> ResNetCifar(depths=(1, 1, 1))(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    head_name = "linear"

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 3, 3),
        widths: Sequence[int] = (16, 32, 64),
        shortcut: str = "pad",
        stem_bias: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        check_sizes(num_classes=num_classes, in_chans=in_chans)
        if len(depths) != len(widths) or not depths:
            raise ValueError(f"depths and widths must have the same length, got {list(depths)} and {list(widths)}")
        if shortcut not in ("pad", "conv"):
            raise ValueError(f"shortcut must be 'pad' or 'conv', got {shortcut!r}")
        if shortcut == "pad" and list(widths) != sorted(widths):
            raise ValueError(f"widths must not shrink with shortcut='pad', got {list(widths)}")
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=stem_bias)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = [{"num_chs": widths[0], "reduction": 1, "module": "act1"}]
        self.stage_names = [f"layer{i + 1}" for i in range(len(depths))]
        in_chs = widths[0]
        for i, (name, depth, width) in enumerate(zip(self.stage_names, depths, widths, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(BasicBlock(in_chs, width, 2 if i > 0 and j == 0 else 1, shortcut))
                in_chs = width
            self.add_module(name, nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": width, "reduction": 2**i, "module": name})
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
        self._make_head(in_chs, num_classes, in_chans, global_pool, drop_rate)

    def _init_classifier(self, head: nn.Linear) -> None:
        nn.init.kaiming_normal_(head.weight)
        nn.init.zeros_(head.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        check_image_input(x, self.in_chans)
        x = self.act1(self.bn1(self.conv1(x)))  # (B, 16, H, W)
        for name in self.stage_names:
            x = getattr(self, name)(x)
        return x  # (B, 64, H/4, W/4)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Drop the wrappers (`state_dict`, `module.`) that published checkpoints of this family come in."""
    state = state_dict.get("state_dict", state_dict)
    return {k.removeprefix("module."): v for k, v in state.items()}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "conv1",
        "classifier": "linear",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {"resnet8_mlperf_tiny": _cfg(), "resnet20_cifar": _cfg(), "resnet56_cifar": _cfg()},
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> ResNetCifar:
    return build_model_with_cfg(
        ResNetCifar,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3)},
        **{**defaults, **kwargs},
    )


@register_model
def resnet8_mlperf_tiny(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-8 of MLPerf Tiny: 77,962 parameters, 12.50 M MACs at 32x32, 10 classes."""
    return _create("resnet8_mlperf_tiny", pretrained, kwargs, depths=(1, 1, 1), shortcut="conv", stem_bias=True)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-20 for CIFAR, option A: 269,722 parameters."""
    return _create("resnet20_cifar", pretrained, kwargs, depths=(3, 3, 3))


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-56 for CIFAR, option A: 853,018 parameters."""
    return _create("resnet56_cifar", pretrained, kwargs, depths=(9, 9, 9))
