"""Classifiers over features: one that grows task by task, one that looks at directions; and how a model gets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.edit import Edit, Replace, SetAttr, apply


class GrowingHead(nn.Module):
    """A linear layer for every task: features (B, D) -> logits (B, num_classes), -inf for classes that did not come.

    Weights start as a truncated normal of standard deviation 0.02, biases at zero.

    >>> head = GrowingHead(4, num_classes=5)
    >>> head.add((3, 1), seed=0)
    >>> head(torch.zeros(1, 4))
    tensor([[-inf, 0., -inf, 0., -inf]], grad_fn=...)
    """

    def __init__(self, dim: int, *, num_classes: int) -> None:
        super().__init__()
        self.dim, self.num_classes = dim, num_classes
        self.parts = nn.ModuleList()
        self.classes: list[tuple[int, ...]] = []

    def add(self, classes: Sequence[int], *, seed: int = 0) -> None:
        """A fresh layer for new classes."""
        known = {c for part in self.classes for c in part}
        if known & set(classes) or not classes:
            raise ValueError(f"classes must be new ones, got {list(classes)}; known are {sorted(known)}")
        part = nn.Linear(self.dim, len(classes))
        generator = torch.Generator().manual_seed(seed)
        nn.init.trunc_normal_(part.weight, std=0.02, generator=generator)
        nn.init.zeros_(part.bias)
        old = next(self.parameters(), None)
        self.parts.append(part.to(old.device) if old is not None else part)
        self.classes.append(tuple(classes))

    @property
    def order(self) -> list[int]:
        """The classes in the order in which they came."""
        return [c for part in self.classes for c in part]

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        out = x.new_full((x.shape[0], self.num_classes), -torch.inf)
        return out.index_copy(1, torch.tensor(self.order, device=x.device), torch.cat([p(x) for p in self.parts], 1))

    def as_single(self) -> tuple[Tensor, Tensor]:
        """Weight (num_classes, D) and bias (num_classes,) of one layer that gives the same logits."""
        weight = torch.zeros(self.num_classes, self.dim)
        bias = torch.full((self.num_classes,), -torch.inf)
        part: Any
        for part, classes in zip(self.parts, self.classes):
            weight[list(classes)] = part.weight.detach().cpu()
            bias[list(classes)] = part.bias.detach().cpu()
        return weight, bias


class DirectionLinear(nn.Linear):
    """A linear layer over features of unit length: (B, D) or (B, D, 1, 1) -> (B, out_features)."""

    def __init__(self, in_features: int, out_features: int, normalize: bool = True) -> None:
        super().__init__(in_features, out_features)
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return super().forward(F.normalize(x, dim=1) if self.normalize else x)


def put_head(model: nn.Module, at: str, head: nn.Module) -> None:
    """Put a module in the classifier's place, for training; the model does not remember it."""
    parent, _, leaf = at.rpartition(".")
    setattr(model.get_submodule(parent), leaf, head)


def put_linear(model: nn.Module, at: str, weight: Tensor, bias: Tensor, *, normalize: bool = False) -> nn.Module:
    """Put a linear classifier in the place of the one at `at`, in place; the edits are remembered.

    Args:
        weight: (K, D). bias: (K,). normalize: features are divided by their length before.
    """
    k, d = weight.shape
    kwargs = {"in_features": d, "out_features": k}
    edits: list[Edit] = [Replace(at, "torch.nn.Linear", kwargs)]
    if normalize or isinstance(model.get_submodule(at), nn.Conv2d):
        edits = [Replace(at, f"{__name__}.DirectionLinear", {**kwargs, "normalize": normalize})]
    if getattr(model, "num_classes", k) != k:
        edits.append(SetAttr("", "num_classes", k))
    with torch.random.fork_rng(devices=[]):  # the new layer's first weights are drawn, then filled in
        return apply(model, edits, weights={f"{at}.weight": weight, f"{at}.bias": bias})
