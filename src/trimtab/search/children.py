"""A child: an ordinary network whose tensors are slices of the parent's. There are no elastic layers.

`Child.skeleton` is a network without data. Its forward runs through `torch.func.functional_call` on slices of the
parent's parameters, so gradients land in the parent; the same slices, copied, make the network that is delivered.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

# What a child takes of a parent's tensor: for each dimension a length (the first so many), a slice, or indices.
Part = int | slice | Tensor
Cut = tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Child:
    """One network of a supernet.

    Attributes:
        skeleton: the network, its parameters without data (on the meta device).
        cuts: for each tensor of the skeleton that comes from the parent, by name: what it takes of it.
    """

    skeleton: nn.Module
    cuts: Mapping[str, Cut]

    def tensors(self, parent: nn.Module, *, apart: bool = False) -> dict[str, Tensor]:
        """The child's parameters and buffers: views of the parent's where possible.

        Args:
            apart: buffers are copies, so that batch norms do not write into the parent's.
        """
        state: dict[str, Tensor] = {**dict(parent.named_parameters()), **dict(parent.named_buffers())}
        params = {name for name, _ in self.skeleton.named_parameters()}
        device = next(iter(state.values())).device
        found = {}
        for name, own in (*self.skeleton.named_parameters(), *self.skeleton.named_buffers()):
            if name in self.cuts:
                value = cut(state[name], self.cuts[name])
                found[name] = value if name in params or not apart else value.clone()
            else:
                found[name] = own.to(device)
        return found

    def run(self, parent: nn.Module, x: Tensor, *, regularise: bool = False) -> Tensor:
        """The child's output, in the mode the parent is in.

        In training, batch norms use the batch's own statistics and nothing is written into the parent; dropout and the
        like work only with `regularise`.
        """
        set_mode(self.skeleton, parent.training, regularise=regularise)
        return functional_call(self.skeleton, self.tensors(parent, apart=True), (x,))

    def use(self, parent: nn.Module) -> dict[str, Tensor]:
        """How often the child uses each entry of the parent's parameters: 1 where it takes it, 0 elsewhere."""
        zeros = {name: torch.zeros_like(p, requires_grad=True) for name, p in parent.named_parameters()}
        with torch.enable_grad():
            taken = [cut(zeros[name], parts).sum() for name, parts in self.cuts.items() if name in zeros]
            torch.stack(taken).sum().backward()
        return {name: torch.zeros_like(z) if z.grad is None else z.grad for name, z in zeros.items()}

    @torch.no_grad()
    def copy(self, parent: nn.Module) -> nn.Module:
        """The child as a network of its own, in eval mode."""
        model = copy.deepcopy(self.skeleton)
        tensors = self.tensors(parent)
        fill(model, lambda name, _: tensors[name].detach().clone())
        return model.eval()


def cut(tensor: Tensor, parts: Cut) -> Tensor:
    """The slice of a tensor.

    >>> cut(torch.arange(6.0).view(2, 3), (1, slice(1, 3)))
    tensor([[1., 2.]])
    """
    for dim, part in enumerate(parts):
        if isinstance(part, Tensor):
            tensor = tensor.index_select(dim, part.to(tensor.device))
        else:
            start, stop = (0, part) if isinstance(part, int) else (part.start, part.stop)
            if stop - start != tensor.shape[dim]:
                tensor = tensor.narrow(dim, start, stop - start)
    return tensor


def set_mode(skeleton: nn.Module, training: bool, *, regularise: bool) -> None:
    """Evaluation mode; in training only the batch norms train, or everything if it is to be regularised."""
    skeleton.train(training and regularise)
    if training and not regularise:
        for m in skeleton.modules():
            if isinstance(m, _BatchNorm):
                m.train()


def fill(model: nn.Module, value: Callable[[str, Tensor], Tensor]) -> None:
    """Put new tensors in place of a model's; tied ones stay tied."""
    for named, stores in (
        (model.named_parameters, [m._parameters for m in model.modules()]),
        (model.named_buffers, [m._buffers for m in model.modules()]),
    ):
        for name, old in list(named()):
            new: Any = value(name, old)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            for store in stores:
                for key, held in store.items():
                    if held is old:
                        store[key] = new
