"""What each ATen operator says about labels. An operator is a few lines; the registry is `RULES`.

A rule gets the walk (`w`) and the node's arguments, tensors replaced by their values (one `Dim` per dimension), and
returns the value of the result, or a list of values. It states equalities through `w.ledger`, says which of the node's
constants follow from labels with `w.follow(argument, template)`, and which products are multiply-accumulates with
`w.macs(...)`. Operators tagged pointwise share one rule. An operator without a rule freezes what enters it.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from trimtab.compress.graph.rules import norms, pointwise, products, reductions, shape, space, weights
from trimtab.compress.graph.rules.registry import RULES, Rule, rule

__all__ = ["RULES", "find", "norms", "pointwise", "products", "reductions", "rule", "shape", "space", "weights"]


def find(node: fx.Node) -> Rule | None:
    """The rule for a node, or None."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return RULES.get(getattr(target, "__name__", str(target)))
    name = target._schema.name.split("::")[-1]
    if name in RULES:
        return RULES[name]
    packet = target.overloadpacket
    if any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads()):
        return pointwise.pointwise
    tensors = any(isinstance(n.meta.get("val"), Tensor | list | tuple) for n in node.all_input_nodes)
    return None if tensors else pointwise.made
