"""Sums, means and softmax over dimensions, and what orders or accumulates along them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimtab.compress.graph import reshape as rs
from trimtab.compress.graph.labels import Value, arrays, constant
from trimtab.compress.graph.rules.pointwise import pointwise
from trimtab.compress.graph.rules.registry import is_value, rule

if TYPE_CHECKING:
    from trimtab.compress.graph.walk import Walk


@rule("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod", "any", "all", "logsumexp", "argmax",
      "argmin", "max", "min", "norm", "linalg_vector_norm", "median", "nansum")  # fmt: skip
def reduce(w: Walk, x: Value, *args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and is_value(args[0]) and w.name in ("max", "min"):  # of two tensors
        return pointwise(w, x, args[0])
    dims, keep = w.argument("dim", None), w.argument("keepdim", False)
    rank = len(x)
    dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = {d % rank for d in dims} if rank else set()
    exact = w.name in ("sum", "norm", "linalg_vector_norm", "nansum")  # zeros do not count
    for d in dims:
        for f in x[d]:
            if f.labels is not None and not (exact and f.zero):
                w.ledger.spans(f.labels)
            if f.labels is not None and not f.zero:
                w.ledger.leaks(f.labels)
    zero = w.name in ("sum", "mean", "amax", "amin", "var", "norm", "linalg_vector_norm", "max", "min")
    out = [() if i in dims else tuple(f.with_zero(f.zero and zero) for f in d) for i, d in enumerate(x)]
    return w.outputs(tuple(d for i, d in enumerate(out) if keep or i not in dims))


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "safe_softmax", "_safe_softmax")
def softmax(w: Walk, x: Value, dim: int, *args: Any, **kwargs: Any) -> Value:
    dim %= len(x)
    for labels in arrays(x[dim]):
        w.ledger.spans(labels)
    return tuple(tuple(f.with_zero(False) for f in d) for d in x)


@rule("cumsum", "cumprod", "logcumsumexp")
def cumulate(w: Walk, x: Value, dim: int, *args: Any, **kwargs: Any) -> Value:
    rs.freeze(w.ledger, x[dim])
    return x


@rule("topk", "sort")
def sort(w: Walk, x: Value, *args: Any, **kwargs: Any) -> Any:
    dim = w.argument("dim", -1) % len(x)
    rs.freeze(w.ledger, x[dim])
    out = tuple(constant([n])[0] if i == dim else d for i, (d, n) in enumerate(zip(x, w.out_shapes[0], strict=True)))
    return [out, out]
