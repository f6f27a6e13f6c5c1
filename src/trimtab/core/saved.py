"""What training keeps in memory between the forward and the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, *inputs: Any) -> int:
    """Bytes that a forward pass, in the mode the model is in, keeps for the backward pass.

    These are the activations that training has to hold at once, the larger part of its memory. What autograd saves is
    counted by memory: views of one tensor count once, with all of it. Parameters and buffers are not counted, an input
    that is kept is. The transient memory of single operators, gradients and the optimizer's state come on top.

    On the meta device nothing is computed and no memory taken, so that networks and inputs of any size can be asked.

    Args:
        inputs: what the model is called with.

    >>> saved_bytes(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 8))
    48
    """
    own = {_memory(t) for t in (*model.parameters(), *model.buffers())}
    held: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        held.setdefault(_memory(t), t)  # alive until we are done: identities must not be given away twice
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(*inputs)
    del out
    return sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in own)


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata
