"""What each ATen operator says about labels. An operator is a few lines; the registry is `RULES`.

A rule gets the walk (`w`) and the node's arguments, tensors replaced by their values (one `Dim` per dimension), and
returns the value of the result, or a list of values. It states equalities through `w.ledger`, says which of the node's
constants follow from labels with `w.follow(argument, template)`, and which products are multiply-accumulates with
`w.macs(...)`. Operators tagged pointwise share one rule. An operator without a rule freezes what enters it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from trimtab.compress.graph import reshape as rs
from trimtab.compress.graph.labels import Dim, Factor, Value, constant, labelled, size_of

if TYPE_CHECKING:
    from trimtab.compress.graph.walk import Walk

aten = torch.ops.aten
Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators by name; "conv2d" stands for all its overloads."""

    def register(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, f))
        return f

    return register


def find(node: fx.Node) -> Rule | None:
    """The rule for a node, or None."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return RULES.get(getattr(target, "__name__", str(target)))
    name = target._schema.name.split("::")[-1]
    if name in RULES:
        return RULES[name]
    if torch.Tag.pointwise in target.tags:
        return pointwise
    tensors = any(isinstance(n.meta.get("val"), Tensor | list | tuple) for n in node.all_input_nodes)
    return None if tensors else made


# ---------------------------------------------------------------------------------------------------------------------
# one value in, the same value out


def made(w: Walk, *args: Any, **kwargs: Any) -> Value:
    """arange, full, zeros: made of nothing."""
    return constant(w.shape)


@rule("clone", "alias", "contiguous", "detach", "_to_copy", "to", "lift_fresh_copy", "dropout", "native_dropout",
      "feature_dropout", "alpha_dropout", "lift", "_conj", "bernoulli", "type_as", "_assert_tensor_metadata")  # fmt: skip
def same(w: Walk, x: Value, *args: Any, **kwargs: Any) -> Value:
    return x


@rule("copy")
def copy(w: Walk, x: Value, source: Value, *args: Any) -> Value:
    return pointwise(w, x, source)


def pointwise(w: Walk, *args: Any, **kwargs: Any) -> Value:
    """Broadcasting: dimensions are equal where both have them."""
    tensors = [a for a in itertools.chain(args, kwargs.values()) if _is_value(a)]
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


# ---------------------------------------------------------------------------------------------------------------------
# weights


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
    mixed = tuple(_stencil(w, d, n) for d, n in zip(spatial, w.shape[-space:], strict=True))
    if groups == 1:
        out = wout
        _contract_weight(w, channels, win)
    elif transposed:
        out = _grouped(w, channels, groups, wout, win, w.shape[-1 - space])
    elif size_of(win) == 1:  # depthwise, perhaps with several outputs for each input
        channels = rs.flatten(ledger, channels)
        copies = rs.split(ledger, wout, [groups, size_of(wout) // groups])
        w.follow("groups", rs.unify(ledger, copies[0], channels))
        out = wout
    else:
        parts = rs.split(ledger, channels, [groups, size_of(win)])
        outs = rs.split(ledger, wout, [groups, size_of(wout) // groups])
        same = len(parts[1]) == 1 and len(outs[1]) <= 1
        for p in parts, outs:  # every group loses the same of its own indices
            rs.freeze(ledger, p[0])
        if same:
            _contract_weight(w, parts[1], win)
        else:
            _contract_weight(w, rs.flatten(ledger, parts[1]), win)
        out = wout
    if bias is not None:
        out = rs.unify(ledger, out, bias[0])
    out = tuple(f.with_zero(True) for f in out)
    w.macs([*weight, x[0], *(spatial if transposed else mixed)])  # every weight meets every position
    return (x[0], out, *mixed)


def _grouped(w: Walk, channels: Dim, groups: int, wout: Dim, win: Dim, total: int) -> Dim:
    """A transposed convolution with groups: nothing is cut."""
    for d in channels, wout, win:
        rs.freeze(w.ledger, d)
    return (Factor(total, None, zero=False),)


def _stencil(w: Walk, dim: Dim, size: int) -> Dim:
    """A kernel slides along a dimension. Where that holds labels and keeps its size, they may go on (ECA)."""
    if labelled(dim) and size == size_of(dim):
        dim = rs.flatten(w.ledger, dim)
        for f in dim:
            if f.labels is not None:
                w.ledger.spans(f.labels)
        return tuple(f.with_zero(False) for f in dim)
    rs.freeze(w.ledger, dim)
    return (Factor(size, None, zero=False),) if size != 1 else ()


def _contract_weight(w: Walk, x: Dim, weight: Dim) -> None:
    if not x or not weight:
        return
    together = rs.unify(w.ledger, rs.flatten(w.ledger, x), weight)
    for f in weight:
        if f.labels is not None:
            w.ledger.consumed(f.labels)
    if not all(f.zero for f in x):
        for f in together:
            if f.labels is not None:
                w.ledger.leaks(f.labels)


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


# ---------------------------------------------------------------------------------------------------------------------
# products of values


@rule("matmul", "bmm", "mm", "mv", "dot")
def matmul(w: Walk, a: Value, b: Value) -> Value:
    ledger = w.ledger
    a_rows, a_last = (a[-2:-1], a[-1]) if len(a) > 1 else ((), a[-1])
    b_first, b_cols = (b[-2], b[-1:]) if len(b) > 1 else (b[-1], ())
    _contract(w, a_last, b_first)
    batch: list[Dim] = []
    for x, y in _aligned(a[:-2], b[:-2]):
        d = rs.unify(ledger, x, y)
        for f in d:
            if f.labels is not None and x and y:
                ledger.block(f.labels)
        batch.append(_product_zero(d, x, y))
    w.macs([*batch, *a_rows, a_last, *b_cols])
    return (*batch, *a_rows, *b_cols)


def _product_zero(d: Dim, *operands: Dim) -> Dim:
    """A product is zero where one of its operands is."""
    zero = any(x and all(f.zero for f in x) for x in operands)
    return tuple(f.with_zero(zero) for f in d)


def _contract(w: Walk, a: Dim, b: Dim) -> None:
    d = rs.unify(w.ledger, a, b)
    if not (all(f.zero for f in a) or all(f.zero for f in b)):
        for f in d:
            if f.labels is not None:
                w.ledger.leaks(f.labels)


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
        for f in q[-1] + k[-1]:
            if f.labels is not None:
                ledger.spans(f.labels)
    w.macs([*scores, q[-1]])
    if mask is not None:
        for x, y in _aligned(scores, mask):
            rs.unify(ledger, x, y)
    weights = [tuple(f.with_zero(False) for f in d) for d in scores[:-2]]
    batch = _batch(w, weights, v[:-2])
    rs.unify(ledger, k[-2], v[-2])
    w.macs([*batch, q[-2], v[-2], v[-1]])
    return (*batch, q[-2], v[-1])


def _batch(w: Walk, a: Sequence[Dim], b: Sequence[Dim]) -> list[Dim]:
    out = [_product_zero(rs.unify(w.ledger, x, y), x, y) for x, y in _aligned(a, b)]
    for f in itertools.chain.from_iterable(out):
        if f.labels is not None:
            w.ledger.block(f.labels)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# norms


@rule("_native_batch_norm_legit_no_training", "batch_norm", "native_batch_norm", "_native_batch_norm_legit",
      "cudnn_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update")  # fmt: skip
def batch_norm(w: Walk, x: Value, *args: Any, **kwargs: Any) -> Any:
    dim = x[1]
    affine = [a for a in args[:4] if _is_value(a) and len(a) == 1]
    for p in affine:
        dim = rs.unify(w.ledger, dim, p[0])
    if w.argument("training", w.name in ("_native_batch_norm_legit", "_batch_norm_with_update")):
        for f in itertools.chain(x[0], *x[2:]):  # statistics of the batch: weight standardisation
            if f.labels is not None:
                w.ledger.spans(f.labels)
    zero = bool(affine) and affine[0][0] != () and labelled(affine[0][0])
    out = (x[0], tuple(f.with_zero(zero or f.zero) for f in dim), *x[2:])
    return w.outputs(out)


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(w: Walk, x: Value, shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    k = len(shape)
    last = list(x[-k:])
    affine = False
    for p in args[:2]:
        if _is_value(p):
            last = [rs.unify(w.ledger, rs.flatten(w.ledger, d), q) for d, q in zip(last, p, strict=True)]
            affine = True
    for f in itertools.chain.from_iterable(last):
        if f.labels is not None:
            w.ledger.spans(f.labels)
    w.follow("normalized_shape", last)
    return w.outputs((*x[:-k], *(tuple(f.with_zero(affine) for f in d) for d in last)))


@rule("group_norm")
def group_norm(w: Walk, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, *_: Any) -> Value:
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
        for f in outer:
            if f.labels is not None:
                ledger.block(f.labels)
        w.follow(name, outer)
    for f in inner:
        if f.labels is not None and size_of(inner) > 1:
            ledger.spans(f.labels)
    return (x[0], tuple(f.with_zero(weight is not None) for f in channels), *x[2:])


# ---------------------------------------------------------------------------------------------------------------------
# shape


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
    w.follow("start", _before(flat, start))
    w.follow("end", _before(flat, end))
    return (*x[:dim], rs.pick(w.ledger, flat, slice(start, end, step), w.shape[dim]), *x[dim + 1 :])


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
    out, template = list(x), list(amounts)
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
        template[2 * k : 2 * k + 2] = [(f,) if f.size else 0 for f in sides]
        dims = [(sides[0],), flat, (sides[1],)]
        dims = [d for d in dims if size_of(d)]
        out[i] = rs.concatenate(w.ledger, dims, [size_of(d) for d in dims])
    w.follow(1, template)
    return tuple(out)


# ---------------------------------------------------------------------------------------------------------------------
# space


@rule(*(f"{kind}_pool{n}d" for n in (1, 2, 3) for kind in ("avg", "max", "adaptive_avg", "adaptive_max", "lp")),
      *(f"_adaptive_avg_pool{n}d" for n in (2, 3)), *(f"max_pool{n}d_with_indices" for n in (2, 3)),
      *(f"upsample_{kind}{n}d" for n in (1, 2, 3) for kind in ("nearest", "_nearest_exact")),
      "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
      "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")  # fmt: skip
def pool(w: Walk, x: Value, *args: Any, **kwargs: Any) -> Any:
    k = next(int(c) for c in reversed(w.name.split("_with")[0].removesuffix("_aa")[:-1]) if c.isdigit())
    shape = w.out_shapes[0][-k:]
    kernel = args[0] if args else None
    ones = "pool" in w.name and "adaptive" not in w.name and kernel in ([1, 1], 1, [1])
    spatial = x[-k:] if ones else [_stencil(w, d, n) for d, n in zip(x[-k:], shape, strict=True)]
    return w.outputs((*x[:-k], *spatial))


@rule("grid_sampler_2d", "grid_sampler")
def grid_sample(w: Walk, x: Value, grid: Value, *args: Any) -> Value:
    for d in (*x[2:], *grid):
        rs.freeze(w.ledger, d)
    return (x[0], x[1], *constant(w.shape[2:]))


@rule("im2col")
def im2col(w: Walk, x: Value, kernel: Sequence[int], *args: Any) -> Value:
    n = kernel[0] * kernel[1]
    return (*x[:-3], x[-3] + constant([n])[0], *constant(w.shape[-1:]))


@rule("col2im")
def col2im(w: Walk, x: Value, size: Any, kernel: Sequence[int], *args: Any) -> Value:
    n = kernel[0] * kernel[1]
    channels, taps = rs.split(w.ledger, x[-2], [size_of(x[-2]) // n, n])
    rs.freeze(w.ledger, taps)
    return (*x[:-2], channels, *constant(w.shape[-2:]))


@rule("pixel_shuffle")
def pixel_shuffle(w: Walk, x: Value, r: int) -> Value:
    channels, inner = rs.split(w.ledger, x[-3], [w.shape[-3], r * r])
    rs.freeze(w.ledger, inner)
    return (*x[:-3], channels, *constant(w.shape[-2:]))


@rule("pixel_unshuffle")
def pixel_unshuffle(w: Walk, x: Value, r: int) -> Value:
    return (*x[:-3], x[-3] + constant([r * r])[0], *constant(w.shape[-2:]))


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(w: Walk, x: Value, groups: int) -> Value:
    outer, inner = rs.split(w.ledger, x[1], [groups, size_of(x[1]) // groups])
    w.follow("groups", outer)
    return (x[0], inner + outer, *x[2:])


@rule("unfold")
def unfold(w: Walk, x: Value, dim: int, size: int, step: int) -> Value:
    dim %= len(x)
    rs.freeze(w.ledger, x[dim])
    return (*x[:dim], *constant([w.shape[dim]]), *x[dim + 1 :], *constant([size]))


@rule("view_as_complex")
def view_as_complex(w: Walk, x: Value) -> Value:
    rs.freeze(w.ledger, x[-1])
    return x[:-1]


@rule("view_as_real")
def view_as_real(w: Walk, x: Value) -> Value:
    return (*x, *constant([2]))


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def fft(w: Walk, x: Value, dims: Sequence[int], *args: Any) -> Value:
    dims = [d % len(x) for d in dims]
    for d in dims:
        rs.freeze(w.ledger, x[d])
    return tuple(constant([w.shape[i]])[0] if i in dims else d for i, d in enumerate(x))


# ---------------------------------------------------------------------------------------------------------------------
# reductions


@rule("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod", "any", "all", "logsumexp", "argmax",
      "argmin", "max", "min", "norm", "linalg_vector_norm", "median", "nansum")  # fmt: skip
def reduce(w: Walk, x: Value, *args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and _is_value(args[0]) and w.name in ("max", "min"):  # of two tensors
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
    for f in x[dim]:
        if f.labels is not None:
            w.ledger.spans(f.labels)
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


# ---------------------------------------------------------------------------------------------------------------------


def _is_value(a: Any) -> bool:
    return isinstance(a, tuple) and all(isinstance(d, tuple) for d in a)


def _aligned(a: Sequence[Dim], b: Sequence[Dim]) -> list[tuple[Dim, Dim]]:
    """Dimensions side by side, right-aligned."""
    rank = max(len(a), len(b))
    left = [()] * (rank - len(a)) + list(a)
    right = [()] * (rank - len(b)) + list(b)
    return list(zip(left, right, strict=True))
