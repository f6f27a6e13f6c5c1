"""Normalisation: affine parameters follow the channels; statistics span them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trimtab.compress.graph import reshape as rs
from trimtab.compress.graph.labels import Value, arrays, labelled, size_of
from trimtab.compress.graph.rules.registry import is_value, rule

if TYPE_CHECKING:
    from trimtab.compress.graph.walk import Walk


@rule("_native_batch_norm_legit_no_training", "batch_norm", "native_batch_norm", "_native_batch_norm_legit",
      "cudnn_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update", "instance_norm")  # fmt: skip
def batch_norm(w: Walk, x: Value, *args: Any, **kwargs: Any) -> Any:
    dim = x[1]
    affine = [a for a in args[:4] if is_value(a) and len(a) == 1]
    for p in affine:
        dim = rs.unify(w.ledger, dim, p[0])
    if w.argument("training", w.name in ("_native_batch_norm_legit", "_batch_norm_with_update")):
        for labels in arrays(x[0], *x[2:]):  # statistics of the batch: weight standardisation
            w.ledger.spans(labels)
    if w.name == "instance_norm":  # of every image alone
        for labels in arrays(*x[2:]):
            w.ledger.spans(labels)
    zero = bool(affine) and affine[0][0] != () and labelled(affine[0][0])
    out = (x[0], tuple(f.with_zero(zero or f.zero) for f in dim), *x[2:])
    return w.outputs(out)


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(w: Walk, x: Value, shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    k = len(shape)
    last = list(x[-k:])
    affine = False
    for p in args[:2]:
        if is_value(p):
            last = [rs.unify(w.ledger, rs.flatten(w.ledger, d), q) for d, q in zip(last, p, strict=True)]
            affine = True
    for labels in arrays(*last):
        w.ledger.spans(labels)
    w.follow("normalized_shape", last)
    return w.outputs((*x[:-k], *(tuple(f.with_zero(affine) for f in d) for d in last)))


@rule("group_norm")
def group_norm(
    w: Walk, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, *_: Any
) -> Value:
    return _group_norm(w, x, weight, bias, groups, "num_groups")


@rule("native_group_norm")
def native_group_norm(w: Walk, x: Value, weight: Value | None, bias: Value | None, n: int, c: int, hw: int, groups: int,
                      eps: float) -> Any:  # fmt: skip
    w.follow("C", x[1])
    return w.outputs(_group_norm(w, x, weight, bias, groups, "group"))


def _group_norm(w: Walk, x: Value, weight: Value | None, bias: Value | None, groups: int, name: str) -> Value:
    """Whole groups are cut where they can be; within a group, cutting changes its statistics."""
    ledger, channels = w.ledger, rs.flatten(w.ledger, x[1])
    for p in weight, bias:
        if p is not None:
            channels = rs.unify(ledger, channels, p[0])
    if groups == 1:
        inner = channels
    else:
        outer, inner = rs.split(ledger, channels, [groups, size_of(channels) // groups])
        for labels in arrays(outer):
            ledger.block(labels)
        w.follow(name, outer)
    for f in inner:
        if f.labels is not None and size_of(inner) > 1:
            ledger.spans(f.labels)
    return (x[0], tuple(f.with_zero(weight is not None) for f in channels), *x[2:])
