"""Dimensions that are split and merged: the crux of the channel graph.

A merged dimension is kept as the list of its factors, so that what is merged and split again the same way (windows,
patches, heads in the batch) costs nothing. Only where a labelled dimension is split, or a product of labelled factors
must be one flat dimension (the input of a weight), a product constraint is stated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from trimtab.compress.graph.labels import Dim, Factor, Labels, Ledger, Value, labelled, size_of


def flatten(ledger: Ledger, dim: Dim) -> Dim:
    """The same dimension with at most one factor."""
    if len(dim) < 2:
        return dim
    size = size_of(dim)
    if not labelled(dim):
        return (Factor(size, None, zero=False),)
    flat = ledger.new(size)
    ledger.product(flat, dim)
    return (Factor(size, flat, zero=all(f.zero for f in dim if f.labels is not None)),)


def labels_of(ledger: Ledger, dim: Dim) -> Labels | None:
    """One label per index of a dimension, or None."""
    flat = flatten(ledger, dim)
    return flat[0].labels if flat else None


def split(ledger: Ledger, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Split a dimension into several of the given sizes, outermost first."""
    rest = list(reversed(dim))
    out: list[Dim] = []
    for i, size in enumerate(sizes):
        part: list[Factor] = []
        while size > 1:
            f = rest.pop()
            if size % f.size == 0:
                part.append(f)
                size //= f.size
            elif f.size % size == 0:
                rest.extend(reversed(_cut(ledger, f, [size, *sizes[i + 1 :]])))
            else:  # the boundaries do not nest
                return split(ledger, flatten(ledger, dim), sizes)
        out.append(tuple(part))
    return out


def _cut(ledger: Ledger, f: Factor, sizes: Sequence[int]) -> list[Factor]:
    """Cut one factor into as many of `sizes` as fit, and the remainder."""
    pieces, left = [], f.size
    for n in sizes:
        if left % n:
            break
        if n > 1:
            pieces.append(n)
        left //= n
        if left == 1:
            break
    pieces += [left] if left > 1 else []
    factors = [Factor(n, None if f.labels is None else ledger.new(n), f.zero) for n in pieces]
    if f.labels is not None:
        ledger.product(f.labels, factors)
    return factors


def reshape(ledger: Ledger, value: Value, shape: Sequence[int]) -> Value:
    """Dimensions after a view: input and output are matched by cumulative products."""
    out: list[Dim] = []
    i = 0
    todo = list(shape)
    while todo:
        sizes = [todo.pop(0)]
        dims: list[Dim] = []
        while (have := math.prod(map(size_of, dims))) != (want := math.prod(sizes)) or not dims:
            if i < len(value) and have <= want:
                dims.append(value[i])
                i += 1
            elif todo:
                sizes.append(todo.pop(0))
            else:  # only sizes of 1 are left on one side
                break
        out.extend(split(ledger, tuple(itertools.chain.from_iterable(dims)), sizes))
    return tuple(out)


def unify(ledger: Ledger, a: Dim, b: Dim) -> Dim:
    """State that two dimensions of one size have equal indices; a dimension of size 1 broadcasts."""
    if not a or not b:
        return a or b
    if not labelled(a) and not labelled(b):
        return a if len(a) >= len(b) else b
    sizes = _common([f.size for f in a], [f.size for f in b])
    if sizes is None:
        a, b = flatten(ledger, a), flatten(ledger, b)
    else:
        a = tuple(itertools.chain.from_iterable(split(ledger, a, sizes)))
        b = tuple(itertools.chain.from_iterable(split(ledger, b, sizes)))
    return tuple(_tie(ledger, f, g) for f, g in zip(a, b, strict=True))


def _tie(ledger: Ledger, f: Factor, g: Factor) -> Factor:
    if f.labels is not None and g.labels is not None:
        ledger.tie(f.labels, g.labels)
    elif f.labels is not None:
        ledger.freeze(f.labels)  # meets a constant, or the input
    elif g.labels is not None:
        ledger.freeze(g.labels)
        return g
    return f


def _common(a: list[int], b: list[int]) -> list[int] | None:
    """The coarsest factorisation that refines both, or None when their boundaries do not nest."""
    bounds = sorted({*itertools.accumulate(a, int.__mul__), *itertools.accumulate(b, int.__mul__)})
    sizes = []
    last = 1
    for bound in bounds:
        if bound % last:
            return None
        if bound > last:
            sizes.append(bound // last)
        last = bound
    return sizes


def freeze(ledger: Ledger, dim: Dim) -> Dim:
    """Never cut this dimension; it has no labels from here on."""
    for f in dim:
        if f.labels is not None:
            ledger.freeze(f.labels)
    return (Factor(size_of(dim), None, zero=False),) if dim else ()


def pick(ledger: Ledger, dim: Dim, index: slice | Labels, size: int) -> Dim:
    """Some indices of a dimension."""
    flat = flatten(ledger, dim)
    if not flat or flat[0].labels is None or size == 1:
        if flat and flat[0].labels is not None:
            ledger.freeze(flat[0].labels[index])
        return (Factor(size, None, zero=False),) if size != 1 else ()
    return (Factor(size, flat[0].labels[index], flat[0].zero),)


def concatenate(ledger: Ledger, dims: Sequence[Dim], sizes: Sequence[int]) -> Dim:
    """Dimensions one after the other; indices without labels among labelled ones are frozen."""
    flats = [labels_of(ledger, d) for d in dims]
    total = sum(sizes)
    if all(f is None for f in flats) or total == 1:
        return (Factor(total, None, zero=False),) if total != 1 else ()
    parts = []
    for flat, n in zip(flats, sizes, strict=True):
        if flat is None:
            flat = ledger.new(n)
            ledger.freeze(flat)
        parts.append(flat)
    zero = all(f.zero for d in dims for f in d if f.labels is not None)
    return (Factor(total, np.concatenate(parts), zero),)
