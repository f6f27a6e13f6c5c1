"""Residual blocks, found in the traced graph: modules whose output is their input plus something."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor, fx

from trimtab.compress.graph.trace import Trace, module_of

_ADDS = ("add", "add_")
_VIEWS = ("view", "_unsafe_view", "reshape")  # the same numbers in the same order


def residual_blocks(trace: Trace, parameters: Sequence[str]) -> list[str]:
    """Names of the modules that one tensor enters and one of the same shape leaves, with a shortcut between them.

    Args:
        parameters: names of the model's parameters; a module without any is no block.
    """
    inside: dict[str, list[fx.Node]] = defaultdict(list)
    for node in trace.graph.nodes:
        if node.op == "call_function":
            for path in dict.fromkeys(module_of(node)):
                inside[path].append(node)
    found = [
        path
        for path, nodes in inside.items()
        if path and any(p.startswith(path + ".") for p in parameters) and _is_residual(trace, nodes)
    ]
    return [path for path in found if not any(other.startswith(path + ".") for other in found)]


def _is_residual(trace: Trace, nodes: Sequence[fx.Node]) -> bool:
    own = set(nodes)
    entering = {
        i
        for n in nodes
        for i in n.all_input_nodes
        if i not in own and i.name not in trace.tensors and i.name not in trace.constants
    }
    leaving = [n for n in nodes if any(u not in own for u in n.users)]
    if len(entering) != 1 or len(leaving) != 1:
        return False
    (x,), (y,) = entering, leaving
    return _shape(x) is not None and _shape(x) == _shape(y) and _shortcut(y, x, own)


def _shortcut(y: fx.Node, x: fx.Node, own: set[fx.Node]) -> bool:
    """Whether additions, and pointwise functions of one tensor, lead from x to y."""
    todo, seen = [(y, False)], set()
    while todo:
        node, added = todo.pop()
        if node is x and added:
            return True
        if node not in own or (node, added) in seen:
            continue
        seen.add((node, added))
        inputs = node.all_input_nodes
        is_add = _name(node) in _ADDS
        if is_add or (len(inputs) == 1 and (_shape(inputs[0]) == _shape(node) or _name(node) in _VIEWS)):
            todo += [(i, added or is_add) for i in inputs if not is_add or _shape(i) == _shape(node)]
    return False


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else ""


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None
