"""Exported graphs made functional without a second trace.

`torch.export` leaves operators that write in place, and `run_decompositions({})` traces the whole graph once more to be
rid of them: two thirds of the time that tracing a network takes. Graphs of convolutional networks hold few kinds of
operators, and for these the functional form is known beforehand.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_aten: Any = torch.ops.aten
_IN_PLACE = {
    _aten.add_.Tensor: _aten.add.Tensor,
    _aten.hardsigmoid_.default: _aten.hardsigmoid.default,
    _aten.hardswish_.default: _aten.hardswish.default,
    _aten.hardtanh_.default: _aten.hardtanh.default,
    _aten.mul_.Tensor: _aten.mul.Tensor,
    _aten.relu_.default: _aten.relu.default,
    _aten.sigmoid_.default: _aten.sigmoid.default,
    _aten.silu_.default: _aten.silu.default,
}
_FRESH = {  # their results share memory with nothing
    *_IN_PLACE.values(),
    _aten.adaptive_avg_pool2d.default,
    _aten.avg_pool2d.default,
    _aten.cat.default,
    _aten.conv2d.default,
    _aten.exp.default,
    _aten.gelu.default,
    _aten.group_norm.default,
    _aten.layer_norm.default,
    _aten.linear.default,
    _aten.max_pool2d.default,
    _aten.mean.dim,
    _aten.pad.default,
}
_VIEWS = {_aten.permute.default, _aten.slice.Tensor, _aten.transpose.int, _aten.view.default}
_BATCH_NORM, _TRAINING = _aten.batch_norm.default, 5
_FLATTEN = _aten.flatten.using_ints


def make_functional(graph: fx.Graph) -> bool:
    """Give `graph` the operators that `run_decompositions({})` would; False, and no change, where that is uncertain."""
    if not all(n.op in ("placeholder", "output") or (n.op == "call_function" and _known(n)) for n in graph.nodes):
        return False
    for node in list(graph.nodes):
        if node.target in _IN_PLACE:
            node.target = _IN_PLACE[node.target]
        elif node.target is _FLATTEN:
            node.target, node.args = _aten.view.default, (node.args[0], list(node.meta["val"].shape))
        elif node.target is _BATCH_NORM:
            _inference(node)
    return True


def _known(node: fx.Node) -> bool:
    x: Any = node.args[0] if node.args else None
    if node.target in _IN_PLACE:  # nobody else sees what is overwritten
        owned = x.op == "call_function" and x.target in {*_FRESH, *_IN_PLACE, _BATCH_NORM}
        return owned and len(x.users) == 1 and x.meta["val"].dtype == node.meta["val"].dtype
    if node.target is _BATCH_NORM:
        return len(node.args) > _TRAINING and not node.args[_TRAINING] and node.args[3] is not None
    if node.target is _FLATTEN:
        return x.meta["val"].is_contiguous()
    return node.target in _FRESH or node.target in _VIEWS


def _inference(node: fx.Node) -> None:
    x, weight, bias, mean, variance, _, momentum, eps, *_ = node.args
    val = node.meta["val"]
    with node.graph.inserting_before(node):
        norm = node.graph.call_function(
            _aten._native_batch_norm_legit_no_training.default, (x, weight, bias, mean, variance, momentum, eps)
        )
        out = node.graph.call_function(operator.getitem, (norm, 0))
    norm.meta = {**node.meta, "val": (val, val.new_empty(0), val.new_empty(0))}
    out.meta = dict(node.meta)
    node.replace_all_uses_with(out)
    node.graph.erase_node(node)
