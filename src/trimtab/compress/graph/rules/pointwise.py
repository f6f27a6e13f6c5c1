"""Operators that keep every dimension where it is."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from trimtab.compress.graph import reshape as rs
from trimtab.compress.graph.labels import Dim, Value, constant, labelled
from trimtab.compress.graph.rules.registry import is_value, rule

if TYPE_CHECKING:
    from trimtab.compress.graph.walk import Walk


@rule("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided")
def made(w: Walk, *args: Any, **kwargs: Any) -> Value:
    """arange, full, zeros: made of nothing."""
    return constant(w.shape)


@rule("clone", "alias", "contiguous", "detach", "_to_copy", "to", "lift_fresh_copy", "dropout", "native_dropout",
      "feature_dropout", "alpha_dropout", "lift", "_conj", "type_as", "_assert_tensor_metadata")  # fmt: skip
def same(w: Walk, x: Value, *args: Any, **kwargs: Any) -> Value:
    return x


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "fill", "zero", "bernoulli")
def like(w: Walk, x: Value, *args: Any, **kwargs: Any) -> Value:
    return tuple(tuple(f.with_zero(False) for f in d) for d in x)


@rule("hardswish", "copy", "_prelu_kernel", "rrelu_with_noise", "logit", "nan_to_num")  # torch does not tag these
def pointwise(w: Walk, *args: Any, **kwargs: Any) -> Value:
    """Broadcasting: dimensions are equal where both have them."""
    tensors = [a for a in itertools.chain(args, kwargs.values()) if is_value(a)]
    rank = len(w.shape)
    padded = [((),) * (rank - len(t)) + t for t in tensors]
    out = []
    for position in zip(*padded, strict=True):
        dim: Dim = ()
        for d in position:
            dim = rs.unify(w.ledger, dim, d)
        if labelled(dim):
            zero = w.keeps_zero([labelled(d) and all(f.zero for f in d if f.labels is not None) for d in position])
            dim = tuple(f.with_zero(zero) for f in dim)
        out.append(dim)
    return tuple(out)


@rule("prelu")
def prelu(w: Walk, x: Value, slope: Value) -> Value:
    channels = rs.unify(w.ledger, x[1], slope[0]) if len(x) > 1 else x[0]
    return (x[0], channels, *x[2:])
