"""Pooling, resampling and what moves between space and channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trimtab.compress.graph import reshape as rs
from trimtab.compress.graph.labels import Dim, Factor, Value, arrays, constant, labelled, size_of
from trimtab.compress.graph.rules.registry import rule

if TYPE_CHECKING:
    from trimtab.compress.graph.walk import Walk


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
    spatial = x[-k:] if ones else [stencil(w, d, n) for d, n in zip(x[-k:], shape, strict=True)]
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


def stencil(w: Walk, dim: Dim, size: int) -> Dim:
    """A kernel slides along a dimension. Where that holds labels and keeps its size, they may go on (ECA)."""
    if labelled(dim) and size == size_of(dim):
        dim = rs.flatten(w.ledger, dim)
        for labels in arrays(dim):
            w.ledger.spans(labels)
        return tuple(f.with_zero(False) for f in dim)
    rs.freeze(w.ledger, dim)
    return (Factor(size, None, zero=False),) if size != 1 else ()
