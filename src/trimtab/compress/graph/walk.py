"""One walk over a traced graph: every value gets its labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from trimtab.compress.graph import reshape as rs
from trimtab.compress.graph import rules
from trimtab.compress.graph.labels import Dim, Factor, Labels, Ledger, Value, arrays, constant
from trimtab.compress.graph.trace import Trace

Template = Any  # an int, a Dim (its size), or a list of these


@dataclass(frozen=True, eq=False)
class Follow:
    """A constant of a node that follows from labels: the sizes of a view, the number of groups."""

    node: fx.Node
    argument: int | str
    template: Template
    target: Any = None  # another operator that takes the constant in this form

    def arrays(self) -> list[Labels]:
        """The labels that the constant depends on."""
        return list(_arrays(self.template))


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension of one parameter or buffer."""

    tensor: str
    dim: int
    labels: Labels
    parameter: bool


@dataclass
class Walk:
    """Propagates labels through a trace; what the rules see of the graph."""

    trace: Trace
    ledger: Ledger = field(default_factory=Ledger)
    axes: list[Axis] = field(default_factory=list)
    shapes: dict[str, tuple[Dim, ...]] = field(default_factory=dict)  # of every tensor of the model
    follows: list[Follow] = field(default_factory=list)
    products: list[tuple[fx.Node, list[Dim]]] = field(default_factory=list)  # multiply-accumulates of a node
    values: dict[fx.Node, Any] = field(default_factory=dict)
    fed: set[fx.Node] = field(default_factory=set)  # what depends on the inputs
    batch: int = 1  # samples that were traced
    unknown_ops: Counter[str] = field(default_factory=Counter)
    node: fx.Node = field(init=False)
    name: str = ""
    _zero_cache: dict[Any, bool] = field(default_factory=dict)

    def run(self, model: nn.Module) -> Walk:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        owners = {id(t): name for name, t in tensors.items()}  # one name for tied tensors
        every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        names = {name: owners[id(t)] for name, t in every}
        for node in self.trace.graph.nodes:
            if node.name in self.trace.inputs or not self.fed.isdisjoint(node.all_input_nodes):
                self.fed.add(node)
            if node.op == "placeholder":
                if node.name == self.trace.inputs[0]:
                    self.batch = node.meta["val"].shape[0]
                name = self.trace.tensors.get(node.name)
                if name is not None and name in names and node.users:  # what nothing reads is left alone
                    self.values[node] = self._tensor(names[name], tensors[names[name]])
                elif isinstance(node.meta.get("val"), Tensor):
                    self.values[node] = constant(node.meta["val"].shape)
            elif node.op == "output":
                for n in node.all_input_nodes:
                    self._freeze(self.values[n])
            else:
                self.values[node] = self._call(node)
        return self

    def _tensor(self, name: str, tensor: Tensor) -> Value:
        if name in self.shapes:
            return self.shapes[name]
        parameter = isinstance(tensor, nn.Parameter)
        if not tensor.is_floating_point():
            value = constant(tensor.shape)
        else:
            dims: list[Dim] = []
            for i, n in enumerate(tensor.shape):
                if n == 1:
                    dims.append(())
                    continue
                axis = Axis(name, i, self.ledger.new(n), parameter)
                self.axes.append(axis)
                dims.append((Factor(n, axis.labels, zero=parameter),))
            value = tuple(dims)
        self.shapes[name] = value
        return value

    def _call(self, node: fx.Node) -> Any:
        self.node = node
        target: Any = node.target
        self.name = target._schema.name.split("::")[-1] if hasattr(target, "_schema") else target.__name__
        args = fx.node.map_arg(node.args, lambda n: self.values.get(n))
        kwargs = fx.node.map_arg(node.kwargs, lambda n: self.values.get(n))
        rule = rules.find(node)
        if rule is None:
            return self.unknown(*[self.values.get(n) for n in node.all_input_nodes])
        return rule(self, *args, **kwargs)

    def _freeze(self, value: Any) -> None:
        if isinstance(value, list):
            for v in value:
                self._freeze(v)
        elif isinstance(value, tuple):
            for dim in value:
                rs.freeze(self.ledger, dim)

    # -- what rules use ------------------------------------------------------------------------------------------------

    @property
    def out_shapes(self) -> list[tuple[int, ...]]:
        val = self.node.meta["val"]
        values = val if isinstance(val, list | tuple) else [val]
        return [tuple(v.shape) if isinstance(v, Tensor) else () for v in values]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.out_shapes[0]

    def shapes_of(self, argument: int) -> list[tuple[int, ...]]:
        """Shapes of the tensors in a list argument."""
        nodes: Any = self.node.args[argument]
        return [tuple(n.meta["val"].shape) for n in nodes]

    def shape_in(self, argument: int) -> tuple[int, ...]:
        node: Any = self.node.args[argument]
        return tuple(node.meta["val"].shape)

    def argument(self, name: str, default: Any) -> Any:
        """A constant argument by its name in the operator's schema."""
        if name in self.node.kwargs:
            return self.node.kwargs[name]
        for i, a in enumerate(self._schema_names()):
            if a == name:
                return self.node.args[i] if i < len(self.node.args) else default
        return default

    def _schema_names(self) -> list[str]:
        target: Any = self.node.target
        return [a.name for a in target._schema.arguments]

    def follow(self, argument: int | str, template: Template, target: Any = None) -> None:
        """Say that a constant argument of this node follows from labels."""
        if isinstance(argument, str):
            names = self._schema_names()
            if argument not in names:
                return
            position = names.index(argument)
            argument = position if position < len(self.node.args) else argument
        self.follows.append(Follow(self.node, argument, template, target))

    def macs(self, dims: Sequence[Dim]) -> None:
        """This node does as many multiply-accumulates for the batch as the product of these sizes.

        What does not depend on the inputs, such as an encoding of places, is done once, however small the batch.
        """
        once = self.node not in self.fed and self.shape[:1] != (self.batch,)
        self.products.append((self.node, [*dims, (Factor(self.batch),)] if once else list(dims)))

    def outputs(self, value: Value) -> Any:
        """`value` for each output of the node."""
        val = self.node.meta["val"]
        return [value] * len(val) if isinstance(val, list | tuple) else value

    def unknown(self, *values: Any) -> Any:
        """No rule: what enters is frozen, what leaves is constant. Safe, and counted."""
        self.unknown_ops[str(self.node.target)] += 1
        for v in values:
            self._freeze(v)
        val = self.node.meta.get("val")
        if isinstance(val, list | tuple):
            return [constant(v.shape) if isinstance(v, Tensor) else None for v in val]
        return constant(val.shape) if isinstance(val, Tensor) else None

    def keeps_zero(self, zeros: Sequence[bool]) -> bool:
        """Whether this pointwise operator gives zero when these of its operands are zero: it is tried."""
        key = (self.node.target, str(_plain(self.node.args)), str(_plain(self.node.kwargs)), tuple(zeros))
        if key not in self._zero_cache:
            flags = iter(zeros)

            def stand_in(node: fx.Node) -> Any:
                if not isinstance(node.meta.get("val"), Tensor):
                    return node
                return torch.tensor([0.0 if next(flags) else 0.7], dtype=node.meta["val"].dtype, device="cpu")

            try:
                args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), stand_in)
                self._zero_cache[key] = not bool(self.node.target(*args, **kwargs).any())  # type: ignore[operator]
            except Exception:
                self._zero_cache[key] = False
        return self._zero_cache[key]


def _arrays(template: Template) -> Iterator[Labels]:
    if isinstance(template, list):
        for t in template:
            yield from _arrays(t)
    elif isinstance(template, tuple):
        yield from arrays(template)


def _plain(args: Any) -> Any:
    return fx.node.map_arg(args, lambda n: "t")


def evaluate(template: Template, size: Callable[[Factor], int]) -> Any:
    """A template's value, `size` giving the number of labels kept in a factor."""
    if isinstance(template, int):
        return template
    if isinstance(template, list):
        return [evaluate(t, size) for t in template]
    n = 1
    for f in template:
        n *= size(f)
    return n
