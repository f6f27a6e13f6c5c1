"""Children of a builder: any function that makes an ordinary network from the genes, such as timm's or ours."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from trimtab.core.cost import measure
from trimtab.core.errors import SurgeryError
from trimtab.search.children import Child, Cut, Part, cut, fill
from trimtab.search.costs import CostTable
from trimtab.search.resolution import RESOLUTION
from trimtab.search.space import Arch, Space

Rule = Callable[[torch.Size, torch.Size], Cut]  # (parent's shape, child's shape) -> what the child takes
_TRIALS = 6  # random children that are checked when the supernet is made


def prefix(parent: torch.Size, child: torch.Size) -> Cut:
    """The first entries along every dimension."""
    return tuple(child)


def centre(parent: torch.Size, child: torch.Size) -> Cut:
    """The first channels, and the centre of the kernel (dimensions 2 and on).

    >>> centre(torch.Size([8, 4, 5, 5]), torch.Size([6, 4, 3, 3]))
    (6, 4, slice(1, 4, None), slice(1, 4, None))
    """
    kernel = [slice((a - b) // 2, (a - b) // 2 + b) for a, b in zip(parent[2:], child[2:])]
    return (*child[:2], *kernel)


def blocks(n: int) -> Rule:
    """Dimension 0 holds `n` equal parts (q, k and v); the first entries of each.

    >>> blocks(3)(torch.Size([12, 4]), torch.Size([6, 2]))
    (tensor([0, 1, 4, 5, 8, 9]), 2)
    """

    def rule(parent: torch.Size, child: torch.Size) -> Cut:
        if parent[0] % n or child[0] % n:
            raise ValueError(f"{parent[0]} and {child[0]} rows are not {n} equal parts")
        rows: Part = child[0]
        if parent[0] != child[0]:
            rows = (torch.arange(n)[:, None] * (parent[0] // n) + torch.arange(child[0] // n)).flatten()
        return (rows, *child[1:])

    return rule


RULES: dict[str, Rule] = {"*qkv.weight": blocks(3), "*qkv.bias": blocks(3)}


class FromBuilder:
    """A supernet whose parent is `build(**space.max())`.

    Args:
        build: makes a network; takes each gene by its name, except "resolution", the side that images are resized to.
        rules: for tensors whose name matches a pattern, what a child takes of the parent's. Otherwise the first entries
            of every dimension, the centre of convolution kernels, and of qkv layers the first rows of each part.
        size: (C, H, W) of the input, for the costs.

    Raises:
        SurgeryError: a child has a tensor that the parent lacks, or a larger one; names it.
    """

    def __init__(
        self,
        build: Callable[..., nn.Module],
        space: Space,
        size: tuple[int, ...],
        *,
        rules: Mapping[str, Rule] | None = None,
        seed: int = 0,
    ) -> None:
        self._build, self.space, self.size = build, space, size
        self._rules = {**RULES, **(rules or {})}
        self._seed = seed
        self.model = self._make(space.max())
        rng = np.random.default_rng(seed)
        for arch in (space.max(), space.min(), *(space.sample(rng) for _ in range(_TRIALS))):
            self.child(arch)
        self._costs = CostTable(space, self._measure, seed=seed)

    def child(self, arch: Arch) -> Child:
        skeleton = self._make(arch)
        cuts = self._cuts(skeleton, arch)
        fill(skeleton, lambda name, t: t.detach().to("meta") if isinstance(t, nn.Parameter) else t)
        return Child(skeleton, cuts)

    def cost(self, arch: Arch) -> dict[str, int]:
        return self._costs(arch)

    @torch.no_grad()
    def extract(self, arch: Arch) -> nn.Module:
        """What the builder makes, with the parent's weights in it."""
        model = self._make(arch)
        state = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        cuts = self._cuts(model, arch)
        for name, own in (*model.named_parameters(), *model.named_buffers()):
            if name in cuts:
                own.copy_(cut(state[name], cuts[name]))
        return model.to(next(iter(state.values())).device).eval()

    def _make(self, arch: Arch) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            return self._build(**{name: value for name, value in arch.items() if name != RESOLUTION})

    def _measure(self, arch: Arch) -> dict[str, int]:
        side = arch.get(RESOLUTION)
        size = self.size if side is None else (self.size[0], side, side)
        cost = measure(self.child(arch).skeleton, size, what=("params", "macs"))
        return {"params": int(cost.params or 0), "macs": int(cost.macs or 0)}

    def _cuts(self, model: nn.Module, arch: Arch) -> dict[str, Cut]:
        """Parameters and the statistics of norms come from the parent; other buffers are constants of the builder."""
        parent: dict[str, Tensor] = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        own_names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # tied ones by the first
        found = {}
        for path, module in model.named_modules():
            tensors: dict[str, Tensor | None] = {**module._parameters}
            if isinstance(module, _NormBase):
                tensors |= module._buffers
            for leaf, own in tensors.items():
                name = f"{path}.{leaf}" if path else leaf
                if own is not None and name in own_names:
                    found[name] = self._cut(name, own, parent.get(name), module, arch)
        return found

    def _cut(self, name: str, own: Tensor, parent: Tensor | None, module: nn.Module, arch: Arch) -> Cut:
        where = f"{name} of the network with {dict(arch)}"
        if parent is None:
            raise SurgeryError(
                f"{where} does not exist in the largest network, so it cannot be a slice of it; let the builder make "
                "it always (a shortcut, for instance, in every size)"
            )
        if own.dim() != parent.dim() or any(a > b for a, b in zip(own.shape, parent.shape)):
            raise SurgeryError(f"{where} has shape {tuple(own.shape)}, not inside the largest's {tuple(parent.shape)}")
        default = centre if isinstance(module, nn.modules.conv._ConvNd) and own.dim() > 2 else prefix
        rule = next((r for pattern, r in reversed(self._rules.items()) if fnmatch.fnmatch(name, pattern)), default)
        parts = rule(parent.shape, own.shape)
        took = tuple(cut(parent.detach(), parts).shape)
        if took != tuple(own.shape):
            raise SurgeryError(f"the rule for {where} takes {took} of {tuple(parent.shape)}, needed {tuple(own.shape)}")
        return parts
