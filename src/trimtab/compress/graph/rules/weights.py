"""Convolutions and linear layers: what a weight does to labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimtab.compress.graph import reshape as rs
from trimtab.compress.graph.labels import Dim, Value, arrays, constant, size_of
from trimtab.compress.graph.rules.registry import rule
from trimtab.compress.graph.rules.space import stencil

if TYPE_CHECKING:
    from trimtab.compress.graph.walk import Walk


@rule("conv1d", "conv2d", "conv3d")
def conv(w: Walk, x: Value, weight: Value, bias: Value | None = None, *args: Any, **kwargs: Any) -> Value:
    groups = w.argument("groups", 1)
    return _conv(w, x, weight, bias, groups, transposed=False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(w: Walk, x: Value, weight: Value, bias: Value | None = None, *args: Any, **kwargs: Any) -> Value:
    return _conv(w, x, weight, bias, w.argument("groups", 1), transposed=True)


@rule("convolution", "_convolution")
def convolution(w: Walk, x: Value, weight: Value, bias: Value | None = None, *args: Any, **kwargs: Any) -> Value:
    return _conv(w, x, weight, bias, w.argument("groups", 1), transposed=w.argument("transposed", False))


def _conv(w: Walk, x: Value, weight: Value, bias: Value | None, groups: int, transposed: bool) -> Value:
    space = len(weight) - 2
    if len(x) != space + 2:
        return w.unknown(x, weight, bias)
    ledger = w.ledger
    weight = (*weight[:2], *(rs.freeze(ledger, d) for d in weight[2:]))  # the kernel itself
    wout, win = (weight[1], weight[0]) if transposed else (weight[0], weight[1])
    channels, spatial = x[-1 - space], x[-space:]
    mixed = tuple(stencil(w, d, n) for d, n in zip(spatial, w.shape[-space:], strict=True))
    if groups == 1:
        out = wout
        _contract_weight(w, channels, win)
    elif transposed:  # rare: nothing is cut
        for d in channels, wout, win:
            rs.freeze(ledger, d)
        out = constant([w.shape[-1 - space]])[0]
    elif size_of(win) == 1:  # depthwise, perhaps with several outputs for each input
        channels = rs.flatten(ledger, channels)
        copies = rs.split(ledger, wout, [groups, size_of(wout) // groups])
        w.follow("groups", rs.unify(ledger, copies[0], channels))
        out = wout
    else:
        parts = rs.split(ledger, channels, [groups, size_of(win)])
        outs = rs.split(ledger, wout, [groups, size_of(wout) // groups])
        for p in parts, outs:  # every group loses the same of its own indices
            rs.freeze(ledger, p[0])
        _contract_weight(w, parts[1], win)
        out = wout
    if bias is not None:
        out = rs.unify(ledger, out, bias[0])
    out = tuple(f.with_zero(True) for f in out)
    w.macs([*weight, x[0], *(spatial if transposed else mixed)])  # every weight meets every position
    return (x[0], out, *mixed)


def _contract_weight(w: Walk, x: Dim, weight: Dim) -> None:
    if not x or not weight:
        return
    together = rs.unify(w.ledger, rs.flatten(w.ledger, x), weight)
    for labels in arrays(weight):
        w.ledger.consumed(labels)
    if not all(f.zero for f in x if f.labels is not None):  # flattened space does not count
        for labels in arrays(together):
            w.ledger.leaks(labels)


@rule("linear")
def linear(w: Walk, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if len(weight) == 1:
        weight = ((), weight[0])
        out: tuple[Dim, ...] = ()
    else:
        out = (weight[0],)
    _contract_weight(w, x[-1], weight[1])
    w.macs([*weight, *x[:-1]])
    if bias is not None and out:
        out = (rs.unify(w.ledger, out[0], bias[0]),)
    return (*x[:-1], *(tuple(f.with_zero(True) for f in d) for d in out))


@rule("bilinear", "_trilinear")
def bilinear(w: Walk, *args: Any) -> Value:
    return w.unknown(*args)


@rule("embedding")
def embedding(w: Walk, table: Value, index: Value, *args: Any) -> Value:
    rs.freeze(w.ledger, table[0])
    return (*index, table[1])
