"""The quick way to a functional graph gives what PyTorch's own, slow way gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import trimtab as tt
from tests.compress import nets
from trimtab.compress.graph import trace as tracing
from trimtab.compress.graph.functional import make_functional
from trimtab.compress.graph.trace import Trace, trace


def described(found: Trace) -> list[tuple[Any, ...]]:
    """Each node with its operator, arguments, shape and modules; nodes go by their place."""
    place = {node: i for i, node in enumerate(found.graph.nodes)}

    def node_of(node: fx.Node) -> tuple[Any, ...]:
        args, kwargs = (fx.node.map_arg(a, lambda n: f"%{place[n]}") for a in (node.args, node.kwargs))
        val = node.meta.get("val")
        shapes = [tuple(v.shape) for v in (val if isinstance(val, tuple) else (val,)) if isinstance(v, Tensor)]
        target = found.tensors.get(node.name) if node.op == "placeholder" else node.target
        return node.op, target, repr(args), repr(kwargs), shapes, node.meta["modules"]

    return [node_of(node) for node in found.graph.nodes]


class Pooled(nn.Module):
    """Pools, a flatten, and work in place on what only the next operator sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.silu(self.norm(self.conv(x)), inplace=True), 2)
        x = F.avg_pool2d(F.hardtanh(x, 0.0, 6.0), 2)
        return self.head(F.gelu(x).flatten(1))


QUICK: dict[str, Callable[[], nn.Module]] = {
    "residual": nets.Residual,
    "gated": nets.Gated,
    "grouped": nets.Grouped,
    "dense": nets.Dense,
    "group norm": nets.Normed,
    "views": nets.Reshaper,
    "pooled": Pooled,
    "padded shortcut": lambda: tt.create_model("resnet20_cifar", num_classes=5),
    "mobile": lambda: tt.create_model("trim_mobile_10k", num_classes=5),
}


@pytest.mark.parametrize("net", QUICK.values(), ids=QUICK)
def test_the_quick_graph_is_the_decomposed_one(net, monkeypatch):
    model, x = net().eval(), nets.image()
    assert make_functional(torch.export.export(model, (x,), strict=False).graph)
    quick = trace(model, (x,), {})
    monkeypatch.setattr(tracing, "make_functional", lambda graph: False)
    slow = trace(model, (x,), {})
    assert described(quick) == described(slow)
    assert (list(quick.tensors.items()), quick.inputs) == (list(slow.tensors.items()), slow.inputs)


class Overwrites(nn.Module):
    """Writes in place into what others read too, or into the input itself."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 3, 1), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "input":
            return self.conv(x.relu_())
        y = self.conv(x)
        if self.how == "view":
            y.view(2, -1).relu_()
            return y
        return y.exp() + y.relu_()


@pytest.mark.parametrize("how", ["input", "read before", "view"])
def test_where_others_see_what_is_overwritten_the_slow_way_is_taken(how):
    model, x = Overwrites(how).eval(), nets.image()
    graph = torch.export.export(model, (x,), strict=False).graph
    before = str(graph)
    assert not make_functional(graph) and str(graph) == before
    assert not any(str(n.target).endswith("_.default") for n in trace(model, (x,), {}).graph.nodes)


def test_batch_norm_that_looks_at_the_batch_takes_the_slow_way():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert not make_functional(torch.export.export(model, (nets.image(),), strict=False).graph)
