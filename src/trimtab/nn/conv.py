"""Convolution followed by batch norm: the unit that most small networks are made of."""

from __future__ import annotations

import torch.nn as nn


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
