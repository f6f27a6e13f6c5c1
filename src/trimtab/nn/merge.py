"""Layers that train in one shape and run in another: how a module says what it amounts to at inference.

It says so with a method ``merged_parts()``: the names of the submodules that can be simpler ("" is the module itself),
and what takes the place of each: a `Plain` layer, or None for nothing. `trimtab.compress.merge` carries that out on any
model, by `put`. The arithmetic that such layers share is here; it runs in float64, whatever the type of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from trimtab.core.edit import Edit, Remove, Replace, apply
from trimtab.core.errors import SurgeryError

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Plain:
    """A layer by its class (dotted path), the arguments it is built from (JSON values), and its tensors by name."""

    path: str
    kwargs: dict[str, Any]
    tensors: dict[str, Tensor]


@runtime_checkable
class Mergeable(Protocol):
    """A module that knows its plain equivalent."""

    def merged_parts(self) -> Mapping[str, Plain | None]: ...


def put(model: nn.Module, parts: Mapping[str, Plain | None]) -> nn.Module:
    """A copy of `model` with these layers, or nothing, in the places named; its edits are remembered."""
    with torch.random.fork_rng(devices=[]):  # the weights of new layers are drawn, then filled in
        new = apply(copy.deepcopy(model), edits_of(parts))
    state = new.state_dict(keep_vars=True)
    for name, plain in parts.items():
        for leaf, value in (plain.tensors if plain else {}).items():
            state[f"{name}.{leaf}"].data = value  # of the type it had: `apply` makes float32 layers
    return new


def edits_of(parts: Mapping[str, Plain | None]) -> list[Edit]:
    """What `put` does to the structure."""
    return [Remove(name) if p is None else Replace(name, p.path, p.kwargs) for name, p in parts.items()]


def plain_conv(
    weight: Tensor, bias: Tensor | None, *, stride: Any, padding: Any, dilation: Any = 1, groups: int = 1
) -> Plain:
    """A convolution over as many axes as `weight` (C_out, C_in / groups, *kernel) has."""
    kwargs = {
        "in_channels": weight.shape[1] * groups, "out_channels": weight.shape[0], "kernel_size": list(weight.shape[2:]),
        "stride": _json(stride), "padding": _json(padding), "dilation": _json(dilation), "groups": groups,
        "bias": bias is not None,
    }  # fmt: skip
    return Plain(f"torch.nn.Conv{weight.ndim - 2}d", kwargs, _tensors(weight, bias))


def plain_linear(weight: Tensor, bias: Tensor | None) -> Plain:
    """A linear layer."""
    kwargs = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": bias is not None}
    return Plain("torch.nn.Linear", kwargs, _tensors(weight, bias))


def gain_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode is y = gain x + shift, per channel; both in float64.

    Raises:
        SurgeryError: it keeps no running statistics, so it is no such function.

    >>> gain_and_shift(nn.BatchNorm2d(1, eps=3.0))
    (tensor([0.5000], dtype=torch.float64), tensor([0.], dtype=torch.float64))
    """
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise SurgeryError(f"{norm} keeps no running statistics, and cannot be folded")
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.detach().double()
    shift = -norm.running_mean.double() * gain
    return gain, shift if norm.bias is None else shift + norm.bias.detach().double()


def fold_norm(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of a layer (C_out first) that does what it did and its batch norm after it."""
    gain, shift = gain_and_shift(norm)
    weight = weight.detach().double() * gain.view(-1, *[1] * (weight.ndim - 1))
    return weight, shift if bias is None else shift + gain * bias.detach().double()


def dilate(kernel: Tensor, rate: int) -> Tensor:
    """A kernel (..., k, k) with its dilation written out as zeros: (..., r, r), r = rate (k - 1) + 1.

    >>> import torch
    >>> dilate(torch.ones(1, 1, 2, 2), 2)[0, 0].tolist()
    [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]
    """
    h, w = (rate * (n - 1) + 1 for n in kernel.shape[-2:])
    wide = kernel.new_zeros(*kernel.shape[:-2], h, w)
    wide[..., ::rate, ::rate] = kernel
    return wide


def pad_to(kernel: Tensor, size: int) -> Tensor:
    """A kernel (..., k, k) of odd k in the middle of one of odd `size`."""
    margin = size // 2 - kernel.shape[-1] // 2
    return F.pad(kernel, [margin] * 4)


def depthwise(model: nn.Module) -> dict[str, Any]:
    """The depthwise convolutions whose window is centred on its output, by name, in the order of the modules.

    Plain `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` with as many groups as channels, odd kernels of the same length along
    all axes, zero padding. Left out are layers or weights that are used in several places, and what is still to be
    merged.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    uses: dict[int, int] = {}
    for _, m in modules:
        for held in (m, getattr(m, "weight", None)):
            uses[id(held)] = uses.get(id(held), 0) + 1
    unmerged = tuple(f"{name}." if name else "" for name, m in modules if isinstance(m, Mergeable) and m.merged_parts())
    return {
        name: m
        for name, m in modules
        if name and not name.startswith(unmerged) and type(m) in CONVS
        and uses[id(m)] == uses[id(m.weight)] == 1 and _centred_depthwise(m)
    }  # fmt: skip


def _centred_depthwise(conv: Any) -> bool:
    k = conv.kernel_size[0]
    if not (conv.groups == conv.in_channels == conv.out_channels and conv.padding_mode == "zeros"):
        return False
    if k < 3 or k % 2 == 0 or len(set(conv.kernel_size)) > 1:
        return False
    centred = tuple(d * (k - 1) // 2 for d in conv.dilation)
    return conv.padding in ("same", centred)


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tensors(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    return {"weight": weight.detach()} | ({} if bias is None else {"bias": bias.detach()})
