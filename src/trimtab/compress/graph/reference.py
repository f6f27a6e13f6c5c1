"""The traced graph with narrowed parameters: what a cut model must compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from trimtab.compress.graph.labels import Labels
from trimtab.compress.graph.trace import Trace, copy_graph
from trimtab.compress.graph.walk import evaluate

if TYPE_CHECKING:
    from trimtab.compress.graph.walk import Follow


def constants(follows: Sequence[Follow], kept: Callable[[Labels], int]) -> Iterator[tuple[Follow, Any]]:
    """Each constant that follows from labels, and its value after the cut."""
    for f in follows:
        yield f, evaluate(f.template, lambda factor: factor.size if factor.labels is None else kept(factor.labels))


def narrowed_graph(
    trace: Trace, follows: Sequence[Follow], tensors: Mapping[str, Tensor], kept: Callable[[Labels], int]
) -> fx.GraphModule:
    """A module that runs the graph with these tensors, its constants replaced by what the labels say."""
    graph, where = copy_graph(trace.graph)
    for follow, value in constants(follows, kept):
        node = where[follow.node]
        if follow.target is not None:
            node.target = follow.target
        if isinstance(follow.argument, int):
            node.update_arg(follow.argument, value)
        else:
            node.update_kwarg(follow.argument, value)
    root = nn.Module()
    for original in trace.graph.nodes:
        if original.op == "placeholder" and original.name not in trace.inputs:
            node = where[original]
            name = trace.tensors.get(original.name, f"_constant_{original.name}")
            _put(root, name, tensors[name] if original.name in trace.tensors else trace.constants[original.name])
            with graph.inserting_before(node):
                attribute = graph.get_attr(name)
            attribute.meta = dict(node.meta)
            node.replace_all_uses_with(attribute)
            graph.erase_node(node)
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    if isinstance(output.args[0], list | tuple) and len(output.args[0]) == 1:
        output.args = (output.args[0][0],)
    graph._codegen = torch.fx.graph.CodeGen()
    module = fx.GraphModule(root, graph)
    return module.eval()


def _put(root: nn.Module, name: str, tensor: Tensor) -> None:
    *parents, leaf = name.split(".")
    owner = root
    for p in parents:
        if p not in owner._modules:
            owner.add_module(p, nn.Module())
        owner = owner._modules[p]  # type: ignore[assignment]
    if leaf in owner._parameters or leaf in owner._buffers:
        return
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)
