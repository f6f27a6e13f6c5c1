"""Moving receptive field out of the patches (Section 3.1): small kernels where patches run, more blocks after them."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from trimtab.compress.graph.trace import innermost
from trimtab.core.edit import Edit, Insert, Replace, apply
from trimtab.core.errors import SurgeryError
from trimtab.core.example import size_of
from trimtab.deploy.mcunetv2.local import Program, is_depthwise, value

BLOCK = "trimtab.models.classify.mbconv.MBConv"


def redistribute(model: nn.Module, data: Any, *, split: str, expand: int = 3, act: str = "relu6") -> nn.Module:
    """A changed copy whose patches, up to `split`, read smaller windows, at no more MACs.

    Depthwise convolutions of stride 1 before the split look at one pixel; their weights are the sums of the kernels',
    so that even areas are treated alike. What this saves pays for inverted residual blocks after the split, from the
    front, which start as identities. The network must be trained on.

    Args:
        model: a network with depthwise convolutions.
        data: a `Data`, or the size (C, H, W) of the images.
        split: name of the module after which patches end.
        expand: how much wider than its input a new block is inside.
        act: its activation, by timm's name.

    Raises:
        ValueError: there is no such split.
        SurgeryError: nothing can be made smaller before it.
    """
    size = size_of(data)
    if size is None:
        raise ValueError(f"data must be a Data or a size (C, H, W), got {type(data).__name__}")
    if expand < 1:
        raise ValueError(f"expand must be at least 1, got {expand}")
    changed = copy.deepcopy(model)
    program = Program(changed, size)
    cuts = {program.name(cut): cut for cut in program.cuts}
    if split not in cuts:
        raise ValueError(f"split must be one of {', '.join(cuts) or '(no place)'}, got {split!r}")
    edits, weights, saved = _shrink(changed, program, cuts[split])
    more, zeros = _blocks(program, cuts[split], saved, expand, act)
    return apply(changed, [*edits, *more], weights={**weights, **zeros})


def _shrink(model: nn.Module, program: Program, cut: fx.Node) -> tuple[list[Edit], dict[str, Tensor], int]:
    """1x1 instead of larger depthwise kernels of stride 1, and the MACs that this saves."""
    edits: list[Edit] = []
    weights: dict[str, Tensor] = {}
    saved = 0
    for node in program.head(cut):
        reach = program.local[node].reach
        if not is_depthwise(node) or any(r.stride > 1 for r in reach) or all(r.kernel == 1 for r in reach):
            continue
        name = innermost(node)
        conv = model.get_submodule(name)
        if not isinstance(conv, nn.Conv2d) or value(node).shape[2:] != value(program.local[node].reads[0]).shape[2:]:
            continue  # made of something else, or it cuts the border off
        kwargs = {
            "in_channels": conv.in_channels, "out_channels": conv.out_channels, "kernel_size": 1,
            "groups": conv.groups, "bias": conv.bias is not None,
        }  # fmt: skip
        edits.append(Replace(name, "torch.nn.Conv2d", kwargs))
        weights[f"{name}.weight"] = conv.weight.detach().sum((2, 3), keepdim=True)
        if conv.bias is not None:
            weights[f"{name}.bias"] = conv.bias.detach()
        saved += value(node).numel() * (math.prod(conv.kernel_size) - 1)
    if not edits:
        raise SurgeryError(f"no depthwise convolution of stride 1 before {program.name(cut)} sees more than a pixel")
    return edits, weights, saved


def _blocks(program: Program, cut: fx.Node, saved: int, expand: int, act: str) -> tuple[list[Edit], dict[str, Tensor]]:
    """New blocks after the split that cost no more than what was saved."""
    edits: list[Edit] = []
    zeros: dict[str, Tensor] = {}
    for place in program.cuts[program.cuts.index(cut) + 1 :]:
        channels, height, width = value(place).shape[1:]
        cost = height * width * channels * expand * (2 * channels + 9)
        name = innermost(place)
        if cost > saved or any(isinstance(e, Insert) and e.module == name for e in edits):
            continue
        kwargs = {
            "in_chs": channels, "mid": channels * expand, "out_chs": channels, "kernel": 3, "stride": 1,
            "expand": expand > 1, "act": act, "reduced": 0, "gate": "sigmoid", "shortcut": True,
        }  # fmt: skip
        edits.append(Insert(name, "extra", BLOCK, kwargs))
        zeros[f"{name}.extra.project.1.weight"] = torch.zeros(channels)
        saved -= cost
    return edits, zeros
