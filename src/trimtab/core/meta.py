"""Shapes without numbers: models on the meta device, built and run as fast as shapes can be known.

On that device PyTorch runs batch norm, activations and normal initialisation as long decompositions in Python, which
check much and compute nothing: most of the time of counting a small network went there. What they give is known from
their input, and said at once here. Everything else goes its usual way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_LIKE_INPUT = {
    getattr(_aten, name).default
    for name in ("relu", "silu", "gelu", "sigmoid", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu")
}
_IN_PLACE = {
    getattr(_aten, name).default
    for name in ("normal_", "relu_", "silu_", "sigmoid_", "hardsigmoid_", "hardswish_", "hardtanh_", "leaky_relu_")
}
_TRAINING = 5  # its place among the arguments of batch norm


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func(*args, **kwargs)` gives; without detours where its input has no numbers."""
    x = args[0] if args else None
    if isinstance(x, Tensor) and x.is_meta and x.is_floating_point():
        if func in _IN_PLACE:
            return x
        if func in _LIKE_INPUT:
            return torch.empty_like(x)
        if func is _aten.native_batch_norm.default and not args[_TRAINING]:
            return torch.empty_like(x), x.new_empty(0), x.new_empty(0)
    return func(*args, **kwargs)


class Shortcuts(TorchDispatchMode):
    """Inside, what is on the meta device is run by `call`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return call(func, args, kwargs or {})


@contextmanager
def shapes_only() -> Iterator[None]:
    """Tensors made inside are on the meta device.

    >>> with shapes_only():
    ...     torch.nn.Conv2d(3, 8, 3).weight.device
    device(type='meta')
    """
    with torch.device("meta"), Shortcuts():
        yield
