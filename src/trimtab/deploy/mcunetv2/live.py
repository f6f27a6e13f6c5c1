"""Bytes of activations alive at once in PyTorch: expected from the lifetimes of a piece's tensors, and measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trimtab.core.lifetime import Step, peak
from trimtab.deploy.mcunetv2.local import is_view


def expected(piece: fx.GraphModule, x: Tensor) -> int:
    """The most bytes that a piece makes alive at once, its input not counted: no operator writes in place here."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        FakeTensorProp(piece, mode).propagate(x)
    sizes: dict[fx.Node, int] = {}
    home: dict[fx.Node, fx.Node] = {}  # a view -> what holds its bytes
    steps = []
    kept: list[fx.Node] = []
    for node in piece.graph.nodes:
        reads = tuple(dict.fromkeys(home.get(n, n) for n in node.all_input_nodes))
        if node.op == "output":
            kept = list(reads)
        elif node.op == "call_function" and is_view(node):
            home[node] = reads[0]
        elif node.op == "call_function":
            made = [t for t in tree_leaves(node.meta["val"]) if isinstance(t, Tensor)]
            sizes[node] = sum(t.numel() * t.element_size() for t in made)
            steps.append(Step(reads, (node,)))
    return peak(steps, sizes, inputs=[], outputs=kept)


class _Watch(TorchDispatchMode):
    """Sees every operator, and adds up the memory under the tensors that are alive after it."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._live = {k: (ref, n) for k, (ref, n) in self._live.items() if not ref.expired()}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (key := t.untyped_storage()._cdata) not in self._known:
                self._live.setdefault(key, (StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()))
        self.most = max(self.most, sum(n for _, n in self._live.values()))
        return out


def measured(call: Callable[[], object], known: list[Tensor]) -> int:
    """The most bytes of tensors that are alive at once while `call` runs, those in `known` not counted."""
    with torch.no_grad(), _Watch(known) as watch:
        call()
    return watch.most
