"""From a module to a flat graph of ATen operators, whatever its Python looks like."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from trimtab.compress.graph.functional import make_functional
from trimtab.core.errors import SurgeryError
from trimtab.nn.modes import eval_mode


@dataclass(frozen=True)
class Trace:
    """An exported model.

    Attributes:
        graph: nodes in order of execution; placeholders for tensors and inputs, functional ATen calls, one output.
        tensors: placeholder name -> name of the parameter or buffer in the model.
        constants: placeholder name -> a tensor that is neither.
        inputs: names of the placeholders of the user's inputs.
    """

    graph: fx.Graph
    tensors: Mapping[str, str]
    constants: Mapping[str, Tensor]
    inputs: tuple[str, ...]


def trace(model: nn.Module, example: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Trace:
    """Export `model` in evaluation mode, with the shapes of `example` baked in.

    Raises:
        SurgeryError: when torch.export cannot follow the model.
    """
    try:
        with eval_mode(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, example, dict(kwargs), strict=False)
            if not make_functional(program.graph):
                program = program.run_decompositions({})
    except Exception as e:
        why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise SurgeryError(f"{type(model).__name__} cannot be traced by torch.export: {why}") from e
    # A module that is reachable by several names goes by the first.
    first = {id(m): name for name, m in model.named_modules()}
    alias = {name: first[id(m)] for name, m in model.named_modules(remove_duplicate=False)}
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["modules"] = tuple(alias[str(path)] for path, _ in stack.values() if str(path) in alias)
    signature = program.graph_signature
    names, constants, inputs = {}, {}, []
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            names[node.name] = str(spec.target)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants[node.name] = program.constants[str(spec.target)]
        else:
            inputs.append(node.name)
    if signature.buffers_to_mutate:
        _drop_mutations(program.graph, len(signature.buffers_to_mutate))
    return Trace(program.graph, names, constants, tuple(inputs))


def module_of(node: fx.Node) -> tuple[str, ...]:
    """Names of the modules whose forward was running when the node was made, outermost first; "" is the model."""
    return node.meta.get("modules", ())


def innermost(node: fx.Node) -> str:
    """Name of the module in whose code the node was made."""
    return (module_of(node) or ("",))[-1]


def inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a module or tensor of this name is one of the modules, or in one of them."""
    return any(name == m or name.startswith(m + ".") for m in modules)


def input_shapes(example: Any) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and keyword inputs of at least two samples each, so that no dimension is the batch by accident."""
    if isinstance(example, Tensor):
        example = (example,)
    args = () if isinstance(example, Mapping) else tuple(example)
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    if not all(isinstance(t, Tensor) for t in (*args, *kwargs.values())):
        raise ValueError("example must be a tensor, or a tuple or dict of tensors")

    def two(t: Tensor) -> Tensor:
        return torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t

    return tuple(map(two, args)), {k: two(v) for k, v in kwargs.items()}


def _drop_mutations(graph: fx.Graph, count: int) -> None:
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    output.args = (output.args[0][count:],)


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A graph that may be changed, and where each node went."""
    new = fx.Graph()
    where: dict[fx.Node, fx.Node] = {}
    output = new.graph_copy(graph, where)
    new.output(copy.copy(output))
    return new, where
