"""Several processes without a wrapper around the model: one explicit exchange of gradients before each step.

The gradients of all parameters travel in one flat tensor, weighted by the size of each process's share of the batch,
together with the loss and the few things on which all processes must agree (stop, save, elapsed time). A parameter
without a gradient on every process keeps none, as in a run with one process.

BatchNorm computes its statistics from the local share of the batch, so networks with BatchNorm train a little
differently on several processes than on one; running statistics are averaged before they are used or kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn


@dataclass
class Agreed:
    """What all processes know after an exchange: the loss of the whole batch, and the wishes of any of them."""

    loss: Tensor
    stop: bool
    save: bool
    elapsed: float


class Exchange:
    """Sums gradients over processes; the buffer is made once."""

    def __init__(self, accelerator: Accelerator, parameters: list[nn.Parameter]) -> None:
        self.accelerator = accelerator
        self.parameters = parameters
        self.sizes = [p.numel() for p in parameters]
        self.buffer = torch.empty(sum(self.sizes) + len(parameters) + 5, device=parameters[0].device)

    @torch.no_grad()
    def __call__(self, loss: Tensor, weight: float, *, stop: bool, save: bool, elapsed: float) -> Agreed:
        """Replace every gradient by the weighted mean over processes.

        loss, weight: this process's sum of weighted losses, and the sum of the weights. The gradients must have been
        weighted in the same way.
        """
        count, world = len(self.parameters), self.accelerator.num_processes
        # NaN must not hide in 0 * NaN, nor a large loss overflow: everything travels as float32 as it is
        self.buffer.zero_()
        pieces = self.buffer[: sum(self.sizes)].split(self.sizes)
        present = torch.zeros(count, device=self.buffer.device)
        for i, (p, piece) in enumerate(zip(self.parameters, pieces)):
            if p.grad is not None:
                piece.view_as(p).copy_(p.grad)
                present[i] = 1.0
        self.buffer[-count - 5 : -5] = present
        tail = torch.tensor([weight, float(stop), float(save), elapsed / world], device=self.buffer.device)
        self.buffer[-5] = loss
        self.buffer[-4:] = tail
        summed = self.accelerator.reduce(self.buffer, reduction="sum")
        *known, total, stopping, saving, passed = summed[-count - 5 :].tolist()
        pieces = summed[: sum(self.sizes)].div_(total).split(self.sizes)
        for p, piece, seen in zip(self.parameters, pieces, known[:count]):
            if seen:
                if p.grad is None:
                    p.grad = torch.empty_like(p)
                p.grad.copy_(piece.view_as(p))
        return Agreed(summed[-5] / total, stopping > 0, saving > 0, passed)


@torch.no_grad()
def same_start(accelerator: Accelerator, modules: list[nn.Module]) -> None:
    """Give every process the parameters and buffers of the first."""
    from accelerate.utils import broadcast

    for module in modules:
        for tensor in module.state_dict(keep_vars=True).values():
            if isinstance(tensor, Tensor):
                tensor.data.copy_(broadcast(tensor.data.contiguous().clone()))


@torch.no_grad()
def average_buffers(accelerator: Accelerator, modules: list[nn.Module]) -> None:
    """Average the running statistics over processes. They are linear in the batches, so when does not matter."""
    for module in modules:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(accelerator.reduce(buffer.contiguous().clone(), reduction="mean"))
