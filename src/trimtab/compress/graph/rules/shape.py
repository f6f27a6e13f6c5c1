"""Views, permutations, concatenation, splitting, indexing, padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from trimtab.compress.graph import reshape as rs
from trimtab.compress.graph.labels import Dim, Factor, Value, arrays, constant, labelled, size_of
from trimtab.compress.graph.rules.registry import rule

if TYPE_CHECKING:
    from trimtab.compress.graph.walk import Walk

aten = torch.ops.aten


@rule("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "view_copy", "reshape_copy")
def view(w: Walk, x: Value, *args: Any, **kwargs: Any) -> Value:
    out = rs.reshape(w.ledger, x, w.shape)
    if w.name in ("view", "_unsafe_view", "reshape", "view_copy"):
        w.follow(1, list(out))
    return out


@rule("expand")
def expand(w: Walk, x: Value, sizes: Sequence[int], **kwargs: Any) -> Value:
    x = ((),) * (len(w.shape) - len(x)) + x
    # A repeated dimension may be cut with whatever it meets.
    out = tuple(
        (Factor(n, w.ledger.new(n), zero=False),) if d == () and n != 1 else d for d, n in zip(x, w.shape, strict=True)
    )
    w.follow(1, list(out))
    return out


@rule("repeat")
def repeat(w: Walk, x: Value, times: Sequence[int]) -> Value:
    x = ((),) * (len(times) - len(x)) + x
    return tuple(((Factor(n, None, zero=False),) if n != 1 else ()) + d for d, n in zip(x, times, strict=True))


@rule("permute", "permute_copy")
def permute(w: Walk, x: Value, order: Sequence[int]) -> Value:
    return tuple(x[i] for i in order)


@rule("transpose", "transpose_copy", "swapaxes")
def transpose(w: Walk, x: Value, a: int = 0, b: int = 1) -> Value:
    out = list(x)
    if out:
        out[a], out[b] = out[b], out[a]
    return tuple(out)


@rule("t", "numpy_T")
def t(w: Walk, x: Value) -> Value:
    return tuple(reversed(x))


@rule("mT", "adjoint", "mH")
def m_t(w: Walk, x: Value) -> Value:
    return (*x[:-2], x[-1], x[-2])


@rule("cat", "concat", "concatenate")
def cat(w: Walk, xs: Sequence[Value], dim: int = 0) -> Value:
    xs = [x for x, s in zip(xs, w.shapes_of(0), strict=True) if s != (0,)]  # torch.cat skips empty tensors
    rank = len(w.shape)
    dim %= rank
    out: list[Dim] = []
    for i in range(rank):
        if i == dim:
            out.append(rs.concatenate(w.ledger, [x[i] for x in xs], [size_of(x[i]) for x in xs]))
        else:
            d: Dim = ()
            for x in xs:
                d = rs.unify(w.ledger, d, x[i])
            zero = all(f.zero for x in xs for f in x[i] if f.labels is not None)
            out.append(tuple(f.with_zero(zero) for f in d))
    return tuple(out)


@rule("stack")
def stack(w: Walk, xs: Sequence[Value], dim: int = 0) -> Value:
    dim %= len(w.shape)
    rest = []
    for position in zip(*xs, strict=True):
        d: Dim = ()
        for p in position:
            d = rs.unify(w.ledger, d, p)
        rest.append(d)
    return (*rest[:dim], (Factor(len(xs), None, zero=False),) if len(xs) > 1 else (), *rest[dim:])


@rule("split", "chunk", "tensor_split")
def split(w: Walk, x: Value, size: Any, dim: int = 0) -> list[Value]:
    dim %= len(x)
    sizes = [s[dim] for s in w.out_shapes]
    parts = _pieces(w, x, sizes, dim)
    if isinstance(size, int) and len(parts) > 1 and len(set(sizes)) == 1:
        # Equal pieces stay equal: Python says chunk(2), not where the boundary lies.
        for p in parts[1:]:
            rs.unify(w.ledger, parts[0][dim], p[dim])
    if w.name == "split":
        w.follow(1, [p[dim] for p in parts], target=aten.split_with_sizes.default)
    return parts


@rule("split_with_sizes", "split_with_sizes_copy")
def split_with_sizes(w: Walk, x: Value, sizes: Sequence[int], dim: int = 0) -> list[Value]:
    parts = _pieces(w, x, sizes, dim % len(x))
    w.follow(1, [p[dim] for p in parts])
    return parts


def _pieces(w: Walk, x: Value, sizes: Sequence[int], dim: int) -> list[Value]:
    flat = rs.flatten(w.ledger, x[dim])
    starts = [0, *itertools.accumulate(sizes)]
    pick = [rs.pick(w.ledger, flat, slice(a, b), b - a) for a, b in itertools.pairwise(starts)]
    return [(*x[:dim], p, *x[dim + 1 :]) for p in pick]


@rule("slice", "slice_copy")
def slice_(w: Walk, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Value:
    dim %= len(x)
    n = size_of(x[dim])
    start, end, step = slice(start, end, step).indices(n)
    if (start, end, step) == (0, n, 1):
        return x
    flat = rs.flatten(w.ledger, x[dim])
    if labelled(flat) and step != 1:
        rs.freeze(w.ledger, flat)
    if labelled(flat) and start and _is_equal_split(w, dim, n, end - start):
        first = rs.pick(w.ledger, flat, slice(0, end - start), end - start)
        rs.unify(w.ledger, first, rs.pick(w.ledger, flat, slice(start, end), end - start))
    w.follow("start", _before(flat, start))
    w.follow("end", _before(flat, end))
    return (*x[:dim], rs.pick(w.ledger, flat, slice(start, end, step), w.shape[dim]), *x[dim + 1 :])


def _is_equal_split(w: Walk, dim: int, n: int, size: int) -> bool:
    """Whether the slices of this tensor are the pieces of an equal split, which export sometimes writes as slices."""
    source = w.node.args[0]
    users = [u for u in source.users if u.target == w.node.target and u.args[1] % len(w.shape) == dim]  # type: ignore
    ranges = {slice(*u.args[2:4]).indices(n)[:2] for u in users}
    return ranges >= {(a, a + size) for a in range(0, n, size)}


def _before(dim: Dim, n: int) -> Dim | int:
    """How many indices of a flat dimension lie before `n`."""
    return (Factor(n, dim[0].labels[:n]),) if dim and dim[0].labels is not None else n


@rule("slice_scatter")
def slice_scatter(w: Walk, x: Value, source: Value, dim: int = 0, start: int | None = None, end: int | None = None,
                  step: int = 1) -> Value:  # fmt: skip
    dim %= len(x)
    start, end, step = slice(start, end, step).indices(size_of(x[dim]))
    flat = rs.flatten(w.ledger, x[dim])
    for i, (a, b) in enumerate(zip(x, source, strict=True)):
        if i == dim:
            rs.unify(w.ledger, rs.pick(w.ledger, flat, slice(start, end, step), size_of(b)), rs.flatten(w.ledger, b))
        else:
            rs.unify(w.ledger, a, b)
    w.follow("start", _before(flat, start))
    w.follow("end", _before(flat, end))
    out = list(x)
    out[dim] = tuple(f.with_zero(f.zero and all(g.zero for g in source[dim])) for f in flat)
    return tuple(out)


@rule("select", "select_copy")
def select(w: Walk, x: Value, dim: int, index: int) -> Value:
    rs.freeze(w.ledger, x[dim])  # structural: the 3 of qkv
    dim %= len(x)
    return (*x[:dim], *x[dim + 1 :])


@rule("unbind")
def unbind(w: Walk, x: Value, dim: int = 0) -> list[Value]:
    return [select(w, x, dim, 0)] * w.shape_in(0)[dim]


@rule("getitem")
def getitem(w: Walk, xs: Sequence[Value], i: int) -> Value:
    return xs[i]


@rule("index")
def index(w: Walk, x: Value, indices: Sequence[Value | None]) -> Value:
    """Fancy indexing: indexed dimensions stay, others travel."""
    used = [i for i, j in enumerate(indices) if j is not None]
    for i in used:
        rs.freeze(w.ledger, x[i])
    for j in indices:
        for d in j or ():
            rs.freeze(w.ledger, d)
    rest = [d for i, d in enumerate(x) if i not in used]
    k = len(w.shape) - len(rest)
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    shape = w.shape[at : at + k]
    return (*rest[:at], *constant(shape), *rest[at:])


@rule("index_select")
def index_select(w: Walk, x: Value, dim: int, indices: Value) -> Value:
    dim %= len(x)
    rs.freeze(w.ledger, x[dim])
    return (*x[:dim], *constant([w.shape[dim]]), *x[dim + 1 :])


@rule("flip", "roll")
def flip(w: Walk, x: Value, *args: Any) -> Value:
    dims = args[-1]
    dims = range(len(x)) if isinstance(dims, int) or not dims else [d % len(x) for d in dims]
    return tuple(rs.freeze(w.ledger, d) if i in dims and labelled(d) else d for i, d in enumerate(x))


@rule("constant_pad_nd", "pad", "reflection_pad2d", "replication_pad2d", "reflection_pad1d", "replication_pad1d")
def pad(w: Walk, x: Value, amounts: Sequence[int], mode: Any = "constant", value: Any = None) -> Value:
    zeros = w.name in ("constant_pad_nd", "pad") and w.argument("mode", "constant") == "constant"
    zeros = zeros and not w.argument("value", 0)
    out: list[Dim] = list(x)
    template: list[Any] = list(amounts)
    for k in range(len(amounts) // 2):
        i, (left, right) = len(x) - 1 - k, amounts[2 * k : 2 * k + 2]
        if (left, right) == (0, 0):
            continue
        flat = rs.flatten(w.ledger, x[i])
        if not labelled(flat) or not zeros or left < 0 or right < 0:
            rs.freeze(w.ledger, flat)
            out[i] = constant([w.shape[i]])[0]
            continue
        # Zeros on both sides may be cut with whatever they meet.
        sides = [Factor(n, w.ledger.new(n)) for n in (left, right)]
        if left == right:  # one number in Python, as a rule
            w.ledger.tie(*arrays(tuple(sides)))
        template[2 * k : 2 * k + 2] = [(f,) if f.size else 0 for f in sides]
        dims = [(sides[0],), flat, (sides[1],)]
        dims = [d for d in dims if size_of(d)]
        out[i] = rs.concatenate(w.ledger, dims, [size_of(d) for d in dims])
    w.follow(1, template)
    return tuple(out)


@rule("glu")
def glu(w: Walk, x: Value, dim: int = -1) -> Value:
    dim %= len(x)
    n = w.shape[dim]
    first, gate = _pieces(w, x, [n, n], dim)
    return (*x[:dim], rs.unify(w.ledger, first[dim], gate[dim]), *x[dim + 1 :])
