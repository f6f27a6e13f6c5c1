"""Which layers of a model are quantized, and the edit that puts a low-bit layer in the place of each.

A low-bit layer is a linear layer or a convolution by its `shape`: (out, in), or (out, in, kernel, kernel) with `conv`,
the arguments of the convolution. So one class serves both.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.edit import Edit, Replace, apply

KINDS: dict[str, type[nn.Module]] = {"linear": nn.Linear, "conv": nn.Conv2d}


def layers(
    model: nn.Module, *, kinds: Sequence[str] = ("linear", "conv"), skip: Sequence[str] | None = None
) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers to quantize, by name, in the order of the modules.

    Plain `nn.Linear` and `nn.Conv2d` with zero padding; subclasses may do more than their weights say, and layers or
    weights that are used in several places would be quantized in one of them only: these stay.

    Args:
        kinds: of "linear", "conv".
        skip: patterns of names (with * and ?) that stay as they are; None: the first and the last of these layers.

    Raises:
        ValueError: an unknown kind, a pattern that matches no layer, or nothing is left.
    """
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {list(kinds)}")
    modules = list(model.named_modules(remove_duplicate=False))
    uses = Counter(id(m) for _, m in modules)
    shared = Counter(id(p) for m in dict.fromkeys(m for _, m in modules) for p in m._parameters.values())
    found = {
        name: m
        for name, m in modules
        if name and type(m) in (nn.Linear, nn.Conv2d) and uses[id(m)] == 1 and shared[id(m.weight)] == 1
        and getattr(m, "padding_mode", "zeros") == "zeros"
    }  # fmt: skip
    if skip is None:
        skip = [next(iter(found)), next(reversed(found))] if found else []
    unused = [p for p in skip if not fnmatch.filter(found, p)]
    if unused:
        raise ValueError(f"skip must name layers of the model, got {unused[0]!r}; there are {', '.join(found)}")
    wanted = tuple(KINDS[k] for k in kinds)
    chosen = {n: m for n, m in found.items() if type(m) in wanted and not any(fnmatch.fnmatchcase(n, p) for p in skip)}
    if not chosen:
        raise ValueError(f"there is nothing to quantize: {len(found)} layers, kinds {list(kinds)}, skip {list(skip)}")
    return chosen


def arguments(layer: nn.Linear | nn.Conv2d) -> dict[str, Any]:
    """What a low-bit layer must know of the layer whose place it takes, as JSON values."""
    given: dict[str, Any] = {"shape": list(layer.weight.shape), "bias": layer.bias is not None}
    if isinstance(layer, nn.Conv2d):
        padding = layer.padding if isinstance(layer.padding, str) else list(layer.padding)
        given["conv"] = {
            "stride": list(layer.stride), "padding": padding, "dilation": list(layer.dilation), "groups": layer.groups,
        }  # fmt: skip
    return given


def plain_conv(conv: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The arguments of a convolution as JSON values again."""
    return None if conv is None else {k: list(v) if isinstance(v, tuple) else v for k, v in conv.items()}


def weights_of(model: nn.Module, edits: Sequence[Edit]) -> dict[str, Tensor]:
    """The weights and biases that the new layers of `edits` take over, by name."""
    places = {e.module for e in edits if isinstance(e, Replace)}
    return {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] in places}


def product(x: Tensor, weight: Tensor, conv: Mapping[str, Any] | None) -> Tensor:
    """`F.linear` or `F.conv2d` without bias."""
    return F.linear(x, weight) if conv is None else F.conv2d(x, weight, **conv)


def add_bias(y: Tensor, bias: Tensor | None, conv: Mapping[str, Any] | None) -> Tensor:
    if bias is None:
        return y
    return y + (bias if conv is None else bias.view(-1, 1, 1))


def replace(model: nn.Module, edits: Sequence[Edit], weights: Mapping[str, Tensor]) -> nn.Module:
    """`apply` for new layers whose initial values do not matter: no random number of the caller's is drawn."""
    with torch.random.fork_rng(devices=[]):
        return apply(model, edits, weights=weights)
