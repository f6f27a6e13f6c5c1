"""`Frozen`: a network that only looks on: teachers, annotators, snapshots, the neighbours of a part in training."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class Frozen:
    """A module in eval mode that gets no gradient and belongs to nobody.

    It is not an `nn.Module`: put on a model or an objective, it is neither trained, saved, moved nor switched to
    training mode with it. The module itself is not changed, except that it is put in `mode` when it is called.

    Args:
        module: the network.
        mode: "eval", or "train" where a method leaves drop-path on in frozen parts.
        through: let gradients flow through to the input (the module's own parameters still get none).
        cache: keep outputs by sample index; only for inputs that are the same each time they come.

    >>> teacher = Frozen(nn.Linear(2, 2))
    >>> teacher(torch.ones(1, 2)).requires_grad
    False
    """

    def __init__(self, module: nn.Module, *, mode: str = "eval", through: bool = False, cache: bool = False) -> None:
        if mode not in ("eval", "train"):
            raise ValueError(f"mode must be eval or train, got {mode!r}")
        if cache and through:
            raise ValueError("cache=True keeps outputs without a graph, so it must not be used with through=True")
        self.module = module
        self.mode = mode
        self.through = through
        self._cache: dict[int, Tensor] | None = {} if cache else None

    def to(self, *args: Any, **kwargs: Any) -> Frozen:
        """Move the module, as `nn.Module.to` does."""
        self.module.to(*args, **kwargs)
        return self

    def __call__(self, *args: Any, index: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the module. index (B,): the samples' numbers, for the cache."""
        if self._cache is None or index is None:
            return self._run(self.module, *args, **kwargs)
        keys = index.tolist()
        if not all(k in self._cache for k in keys):
            out = self._run(self.module, *args, **kwargs)
            self._cache.update(zip(keys, out.detach().cpu().clone().unbind(0)))
            return out
        return torch.stack([self._cache[k] for k in keys]).to(args[0].device)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run another method of the module, e.g. ``forward_features``."""
        return self._run(getattr(self.module, method), *args, **kwargs)

    def _run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.module.training != (self.mode == "train"):
            self.module.train(self.mode == "train")
        if not self.through:
            with torch.no_grad():
                return function(*args, **kwargs)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        try:
            return function(*args, **kwargs)
        finally:
            for p in trained:
                p.requires_grad_(True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        """A copy of the holder still looks at the same network."""
        twin = Frozen(self.module, mode=self.mode, through=self.through)
        twin._cache = None if self._cache is None else dict(self._cache)
        return twin


def snapshot(model: nn.Module, **kwargs: Any) -> Frozen:
    """A frozen copy of a model as it is now, e.g. the last epoch's model as its own teacher."""
    twin = deepcopy(model)
    twin.zero_grad(set_to_none=True)
    return Frozen(twin, **kwargs)
