"""An example input for a model, from what callers have at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def size_of(data: Any) -> tuple[int, ...] | None:
    """The input size (C, H, W), or (C, D, H, W), that a Data or a size says, None for anything else (tensors, ...).

    Raises:
        ValueError: a size that is none.
    """
    if isinstance(data, Sequence) and data and all(isinstance(n, int) for n in data):
        size = tuple(data)
    elif hasattr(data, "in_chans") and hasattr(data, "size"):
        size = (data.in_chans, *data.size)
    else:
        return None
    if len(size) not in (3, 4) or min(size) < 1:
        raise ValueError(f"an input size must be (channels, height, width), or with a depth before them, got {size}")
    return size


def example_of(data: Any, model: nn.Module) -> Any:
    """An example input for `model`: from a Data, a size (C, [D,] H, W), or what is one already."""
    size = size_of(data)
    if size is None:
        return data
    p: Tensor | None = next(model.parameters(), None)
    return torch.zeros((2, *size), device=None if p is None else p.device)
