"""`stages`: a network as a row of modules that partition its parameters.

Training parts apart, module-local losses, skipping depth: all ask for the same thing, a cut of the network into
pieces that run one after the other. A model may say so itself with a method ``stages()`` that returns the modules in
order; an `nn.Sequential` is its own answer; for everything else the graph of the network is traced, and cut wherever
a single tensor connects what came before with what comes after.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from operator import add, attrgetter, iadd
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F


class Stages:
    """Modules that, run in a row, are the model: its own parameters and buffers, each in exactly one stage.

    The first stage has the stem, the last the final norm and the head.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.modules)

    def __getitem__(self, i: int) -> nn.Module:
        return self.modules[i]

    def run(self, x: Tensor, start: int = 0, end: int | None = None) -> Tensor:
        """Stages `start` up to, but not including, `end`."""
        for module in self.modules[start:end]:
            x = module(x)
        return x


def stages(model: nn.Module, n: int | None = None) -> Stages:
    """Cut a model into stages that share its parameters: training a stage trains the model.

    Stages of a traced network see the training mode it had when it was cut; cut it in the mode it will run in (the
    loop's is training mode), and switch modes on the stages.

    Args:
        n: merge them into this many, of about equal numbers of parameters; None keeps every one.

    Raises:
        ValueError: the model cannot be cut (into so many).

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> parts, x = stages(net, 2), torch.ones(1, 4)
    >>> len(parts), torch.equal(parts.run(x), net(x))
    (2, True)
    """
    own = getattr(model, "stages", None)
    if callable(own) and not isinstance(own, nn.Module):  # many models have a submodule of that name
        pieces = list(own())
    elif isinstance(model, nn.Sequential):
        pieces = list(model)
    else:
        pieces = _traced(model)
    pieces = _merge(pieces, len([p for p in pieces if _size(p)]) if n is None else n)
    _check(model, pieces)
    return Stages(pieces)


def _merge(pieces: list[nn.Module], n: int) -> list[nn.Module]:
    """Join neighbours into `n`: what has no parameters goes to its left, the rest is shared out evenly."""
    joined: list[list[nn.Module]] = []
    lead: list[nn.Module] = []  # without parameters and before all others
    for piece in pieces:
        if _size(piece):
            joined.append([*lead, piece])
            lead = []
        elif joined:
            joined[-1].append(piece)
        else:
            lead.append(piece)
    if not 1 <= n <= len(joined):
        raise ValueError(f"n must be between 1 and {len(joined)}, the number of stages of this model, got {n}")
    total = sum(_size(p) for group in joined for p in group)
    groups: list[list[nn.Module]] = [[]]
    passed = 0.0
    for i, group in enumerate(joined):
        left, open_ = len(joined) - i, n - len(groups)
        middle = passed + sum(_size(p) for p in group) / 2
        if groups[-1] and open_ and (middle >= len(groups) * total / n or left <= open_):
            groups.append([])
        groups[-1].extend(group)
        passed += sum(_size(p) for p in group)
    return [g[0] if len(g) == 1 else nn.Sequential(*g) for g in groups]


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _check(model: nn.Module, pieces: list[nn.Module]) -> None:
    whole = {id(p) for p in model.parameters()}
    parts = [id(p) for piece in pieces for p in {id(p): p for p in piece.parameters()}.values()]
    if len(parts) != len(set(parts)) or set(parts) != whole:
        raise ValueError(f"{type(model).__name__} cannot be cut: its stages do not partition its parameters")


_TENSORS = (add, iadd, torch.add, torch.flatten, F.relu)  # functions that are known to give a tensor


class _Tracer(fx.Tracer):
    """Goes into containers and blocks, not into layers: those of torch and timm stay whole."""

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        if isinstance(m, nn.Sequential):
            return False
        return super().is_leaf_module(m, qualified_name) or type(m).__module__.startswith("timm.layers")


def _traced(model: nn.Module) -> list[nn.Module]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = _of_one_input(model)
            graph = _Tracer().trace(twin)
    except Exception as e:
        raise ValueError(
            f"{type(model).__name__} cannot be cut: give it a method stages() that returns its parts in order ({e})"
        ) from e
    nodes = [x for x in graph.nodes if x.op not in ("placeholder", "output")]
    entry = next(x for x in graph.nodes if x.op == "placeholder")
    result = next(x for x in graph.nodes if x.op == "output").args[0]
    pieces, first = [], 0
    for last in _cuts(nodes, entry, result):
        out = nodes[last]
        pieces.append(_piece(model, twin, nodes[first : last + 1], entry, out))
        entry, first = out, last + 1
    return pieces


def _of_one_input(model: nn.Module) -> nn.Module:
    """A copy (models cache things that they saw while they were traced) whose forward takes the image only."""
    twin, kind = deepcopy(model), type(model)
    twin.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, x: kind.forward(self, x)})
    return twin


def _cuts(nodes: list[fx.Node], entry: fx.Node, result: Any) -> list[int]:
    """Positions after which only the tensor made there is still needed.

    Reading a parameter is not a connection: the read moves to where the parameter is used.
    """
    place = {x: i for i, x in enumerate(nodes)}
    end = len(nodes) - 1
    if result is not nodes[-1]:
        raise ValueError("the model cannot be cut: it does not return the last tensor it makes")
    cuts, reach = [], max((place[u] for u in entry.users if u in place), default=-1)
    for i, x in enumerate(nodes):
        alive = max((place[u] for u in x.users if u in place), default=i) if x.op != "get_attr" else i
        if reach <= i and i < end and (x.op == "call_module" or x.target in _TENSORS):
            cuts.append(i)
        reach = max(reach, alive)
    return [*cuts, end]


def _piece(model: nn.Module, twin: nn.Module, nodes: list[fx.Node], entry: fx.Node, out: fx.Node) -> nn.Module:
    graph = fx.Graph()
    seen: dict[fx.Node, fx.Node] = {entry: graph.placeholder("x")}

    def moved(node: fx.Node) -> fx.Node:
        if node not in seen and node.op == "get_attr":
            seen[node] = graph.node_copy(node, moved)
        return seen[node]

    for node in nodes:
        if node.op != "get_attr":  # parameters are read where they are used
            seen[node] = graph.node_copy(node, moved)
    graph.output(seen[out])
    used = {str(x.target) for x in graph.nodes if x.op in ("call_module", "get_attr")}
    piece = fx.GraphModule({name: _find(model, twin, name) for name in used}, graph)
    piece.training = model.training
    return piece


def _find(model: nn.Module, twin: nn.Module, name: str) -> Any:
    """The model's own module, parameter or buffer; tensors that tracing made (constants) are on the twin only."""
    try:
        return attrgetter(name)(model)
    except AttributeError:
        return attrgetter(name)(twin)
