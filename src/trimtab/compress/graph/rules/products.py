"""Matrix products of values, and attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trimtab.compress.graph import reshape as rs
from trimtab.compress.graph.labels import Dim, Value, arrays
from trimtab.compress.graph.rules.pointwise import pointwise
from trimtab.compress.graph.rules.registry import aligned, product_zero, rule

if TYPE_CHECKING:
    from trimtab.compress.graph.walk import Walk


@rule("matmul", "bmm", "mm", "mv", "dot")
def matmul(w: Walk, a: Value, b: Value) -> Value:
    ledger = w.ledger
    a_rows, a_last = (a[-2:-1], a[-1]) if len(a) > 1 else ((), a[-1])
    b_first, b_cols = (b[-2], b[-1:]) if len(b) > 1 else (b[-1], ())
    _contract(w, a_last, b_first)
    batch: list[Dim] = []
    for x, y in aligned(a[:-2], b[:-2]):
        d = rs.unify(ledger, x, y)
        for f in d:
            if f.labels is not None and x and y:
                ledger.block(f.labels)
        batch.append(product_zero(d, x, y))
    w.macs([*batch, *a_rows, a_last, *b_cols])
    return (*batch, *a_rows, *b_cols)


def _contract(w: Walk, a: Dim, b: Dim) -> None:
    d = rs.unify(w.ledger, a, b)
    if not (all(f.zero for f in a) or all(f.zero for f in b)):
        for labels in arrays(d):
            w.ledger.leaks(labels)


@rule("addmm", "addmv")
def addmm(w: Walk, c: Value, a: Value, b: Value, **kwargs: Any) -> Value:
    return pointwise(w, matmul(w, a, b), c)


@rule("baddbmm")
def baddbmm(w: Walk, c: Value, a: Value, b: Value, **kwargs: Any) -> Value:
    return pointwise(w, matmul(w, a, b), c)


@rule("scaled_dot_product_attention")
def attention(w: Walk, q: Value, k: Value, v: Value, mask: Value | None = None, *args: Any, **kwargs: Any) -> Value:
    if w.argument("enable_gqa", False):
        return w.unknown(q, k, v, mask)
    ledger = w.ledger
    scores = (*_batch(w, q[:-2], k[:-2]), q[-2], k[-2])  # (..., L, S)
    _contract(w, q[-1], k[-1])
    if w.argument("scale", None) is None:  # 1 / sqrt(head_dim): cutting head_dim changes it
        for labels in arrays(q[-1] + k[-1]):
            ledger.spans(labels)
    w.macs([*scores, q[-1]])
    if mask is not None:
        for x, y in aligned(scores, mask):
            rs.unify(ledger, x, y)
    weights = [tuple(f.with_zero(False) for f in d) for d in scores[:-2]]
    batch = _batch(w, weights, v[:-2])
    rs.unify(ledger, k[-2], v[-2])
    w.macs([*batch, q[-2], v[-2], v[-1]])
    return (*batch, q[-2], v[-1])


def _batch(w: Walk, a: Sequence[Dim], b: Sequence[Dim]) -> list[Dim]:
    out = [product_zero(rs.unify(w.ledger, x, y), x, y) for x, y in aligned(a, b)]
    for labels in arrays(*out):
        w.ledger.block(labels)
    return out


@rule("einsum")
def einsum(w: Walk, equation: str, operands: Sequence[Value], **kwargs: Any) -> Value:
    """A letter is a dimension: equal wherever it stands, contracted where the output lacks it."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or any(len(t) != len(set(t)) for t in terms):
        return w.unknown(*operands)
    dims: dict[str, Dim] = {}
    for term, x in zip(terms, operands, strict=True):
        for letter, d in zip(term, x, strict=True):
            dims[letter] = rs.unify(w.ledger, dims.get(letter, ()), d)
    for letter, d in dims.items():
        met = [x[t.index(letter)] for t, x in zip(terms, operands, strict=True) if letter in t]
        zero = any(all(f.zero for f in m) for m in met)
        for labels in arrays(d):
            if letter not in output and not zero:
                w.ledger.leaks(labels)
            if letter in output and len(met) > 1:
                w.ledger.block(labels)
    left = set(terms[0])
    for i, term in enumerate(terms[1:], 1):  # pairwise, from left to right
        w.macs([dims[c] for c in dims if c in left | set(term)])
        left = {c for c in left | set(term) if c in output or any(c in t for t in terms[i + 1 :])}
    return tuple(product_zero(dims[c], *[x[t.index(c)] for t, x in zip(terms, operands) if c in t]) for c in output)
