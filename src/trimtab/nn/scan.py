"""Scans: linear recurrences without a step-by-step loop, and the orders in which an image becomes a sequence.

`linear_scan` computes h_t = a_t h_{t-1} + b_t in plain PyTorch operators, in two levels: the sequence is cut into short
chunks, all chunks walk their steps at once, then the states at the ends of chunks are a shorter recurrence of the same
kind. Work grows linearly with the length, the number of operators with its logarithm. No division by cumulative
products, which would overflow.

`selective_scan` is the recurrence of S6 (Mamba, arXiv 2312.00752, Section 3.2), whose decays depend on the input. On a
CPU in float32 it runs as one numba kernel (`scan_kernels`), forward and backward; everywhere else (accelerators,
float64, export, compilation, without numba) as `linear_scan`. Both equal `step_by_step`, which is the definition.

`orders` are permutations of pixels; `unroll` and `merge` apply and undo them.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.nn import scan_kernels

CHUNK = 8  # steps that are walked one by one; 8 * log8(L) in all
_forced: list[str] = []  # what `scan_by` asks for, innermost last
_counts: list[list[int]] = []  # where `count_scans` wants to be told
WAYS = ("auto", "kernel", "chunks", "steps")


# ------------------------------------------------------------------------------------------------------- the recurrence


def linear_scan(a: Tensor, b: Tensor, *, complex_pairs: bool = False, chunk: int = CHUNK) -> Tensor:
    """h_t = a_t h_{t-1} + b_t from h_{-1} = 0 along dimension 1 of `a` and `b` (B, L, ...): h, of the same shape.

    Args:
        complex_pairs: the last dimension holds real and imaginary part; for exporters that know no complex numbers.
        chunk: steps of one chunk.

    >>> linear_scan(torch.full((1, 4), 0.5), torch.ones(1, 4))
    tensor([[1.0000, 1.5000, 1.7500, 1.8750]])
    """
    if chunk < 2:
        raise ValueError(f"chunk must be at least 2, got {chunk}")
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    length = int(b.shape[1])  # a number also for a tracer, which cannot unroll without it
    times = _times_pairs if complex_pairs else torch.mul
    chunks = -(-length // chunk)
    if chunks == 1:
        return _walk(a.unsqueeze(1), b.unsqueeze(1), times, products=False)[0].squeeze(1)
    a, b = (_pad_steps(v, chunks * chunk - length).unflatten(1, (chunks, chunk)) for v in (a, b))  # (B, K, T, ...)
    h, decay = _walk(a, b, times, products=True)
    ends = linear_scan(decay[:, :-1, -1], h[:, :-1, -1], complex_pairs=complex_pairs, chunk=chunk)
    rest = h[:, 1:] + times(decay[:, 1:], ends.unsqueeze(2))
    return torch.cat([h[:, :1], rest], 1).flatten(1, 2)[:, :length]


def _walk(a: Tensor, b: Tensor, times: Callable[[Tensor, Tensor], Tensor], *, products: bool) -> tuple[Tensor, Tensor]:
    """States and products of decays within each chunk: (B, K, T, ...) both."""
    decays, drives = a.unbind(2), b.unbind(2)
    h, decay = [drives[0]], [decays[0]]
    for at, bt in zip(decays[1:], drives[1:]):
        h.append(times(at, h[-1]) + bt)
        if products:
            decay.append(times(at, decay[-1]))
    return torch.stack(h, 2), torch.stack(decay, 2) if products else a


def _times_pairs(x: Tensor, y: Tensor) -> Tensor:
    (a, b), (c, d) = x.unbind(-1), y.unbind(-1)
    return torch.stack([a * c - b * d, a * d + b * c], -1)


def _pad_steps(x: Tensor, steps: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, steps)) if steps else x


# ----------------------------------------------------------------------------------------------------------- S6


def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t, y_t = <c_t, h_t>, for each of E channels with a state of size N.

    The state is float32 (or float64), whatever the input.

    Args:
        x, dt: (B, G, L, E): G independent groups, such as directions; dt is positive.
        a: (G, N, E), negative.
        b, c: (B, G, L, N).

    Returns:
        y: (B, G, L, E), of the type of `x`.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.ndim != 4 or dt.shape != x.shape or b.shape != c.shape or b.shape[:3] != x.shape[:3]:
        raise ValueError(
            "x and dt must be (B, G, L, E), b and c (B, G, L, N), got "
            f"{tuple(x.shape)}, {tuple(dt.shape)}, {tuple(b.shape)}, {tuple(c.shape)}"
        )
    if a.shape != (x.shape[1], b.shape[3], x.shape[3]):
        raise ValueError(f"a must be (G, N, E) = {(x.shape[1], b.shape[3], x.shape[3])}, got {tuple(a.shape)}")
    state = full(x).dtype
    parts = [v.to(state) for v in (x, dt, a, b, c)]
    for counted in _counts:
        counted.append(a.numel() * x.shape[2])
    way = _forced[-1] if _forced else "auto"
    if way == "auto":
        way = "kernel" if _kernel_can(parts) else "chunks"
    run: Callable[..., Tensor] = {"kernel": _Kernel.apply, "chunks": _in_chunks, "steps": step_by_step}[way]
    return run(*parts).to(x.dtype)


def full(x: Tensor) -> Tensor:
    """In float32 at least, as states and decays must be."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def step_by_step(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The definition of `selective_scan`: one step after the other."""
    h = x.new_zeros(x.shape[0], *a.shape)  # (B, G, N, E)
    y = []
    for t in range(x.shape[2]):
        step = dt[:, :, t, None]  # (B, G, 1, E)
        h = torch.exp(step * a) * h + (step * x[:, :, t, None]) * b[:, :, t, :, None]
        y.append((c[:, :, t, :, None] * h).sum(2))
    return torch.stack(y, 2)


@contextmanager
def scan_by(way: str) -> Iterator[None]:
    """Inside, every `selective_scan` runs by "kernel", "chunks" or "steps"; "auto" chooses, as it does outside.

    Raises:
        ValueError: there is no such way.
    """
    if way not in WAYS:
        raise ValueError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
    _forced.append(way)
    try:
        yield
    finally:
        _forced.pop()


@contextmanager
def count_scans() -> Iterator[list[int]]:
    """Inside, every `selective_scan` notes its length x channels x states (of one image), which MACs leave out.

    The usual convention adds 9 FLOPs for each.

    >>> with count_scans() as counted:
    ...     y = selective_scan(*torch.rand(2, 1, 1, 10, 4), -torch.rand(1, 2, 4), *torch.rand(2, 1, 1, 10, 2))
    >>> counted
    [80]
    """
    _counts.append([])
    try:
        yield _counts[-1]
    finally:
        _counts.pop()


def _in_chunks(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    decay = torch.exp(dt.unsqueeze(-2) * a.unsqueeze(1))  # (B, G, L, N, E)
    drive = (dt * x).unsqueeze(-2) * b.unsqueeze(-1)
    h = linear_scan(decay.flatten(0, 1), drive.flatten(0, 1)).view_as(drive)
    return (h * c.unsqueeze(-1)).sum(-2)


@functools.cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def _kernel_can(parts: list[Tensor]) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and all(v.device.type == "cpu" and v.dtype == torch.float32 for v in parts)
        and all(type(v) in (Tensor, torch.nn.Parameter) for v in parts)  # no stand-in of a tracer
        and _has_numba()
    )


class _Kernel(torch.autograd.Function):
    """`scan_kernels` with its gradient."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        forward, _ = scan_kernels.compiled()
        parts = tuple(v.detach().contiguous() for v in parts)
        x, a = parts[0], parts[2]
        kept = -(-x.shape[2] // scan_kernels.CHECKPOINT) if any(ctx.needs_input_grad) else 0
        states = x.new_empty(x.shape[0], x.shape[1], kept, *a.shape[1:])
        y = torch.empty_like(x)
        forward(*(v.numpy() for v in (*parts, y, states)))
        ctx.save_for_backward(*parts, states)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gy: Tensor) -> Any:
        _, backward = scan_kernels.compiled()
        x, dt, a, b, c, states = ctx.saved_tensors
        grads = [torch.zeros_like(v) for v in (x, dt, a, b, c)]
        backward(*(v.numpy() for v in (x, dt, a, b, c, states, gy.contiguous(), *grads)))
        return tuple(grads)


# ------------------------------------------------------------------------------------------------ images as sequences


SCANS = ("unidi", "bidi", "cross2d", "zigzag", "local", "es2d", "spiral", "diagonal")


@functools.lru_cache(maxsize=256)
def orders(scan: str, height: int, width: int, window: int = 4) -> np.ndarray:
    """The sequences of a scan: (K, M) places of pixels in a row-major image. Each pixel is in equally many of them.

    "unidi": row by row. "bidi": and backward. "cross2d": rows, columns, and both backward (VMamba). "zigzag": the same
    with every second row or column turned round, so that neighbours stay neighbours. "local": windows of `window` x
    `window` pixels one after the other, and backward. "es2d": the four grids of every second row and column, each a
    sequence of a quarter of the pixels (even sizes). "spiral": from outside in, and back. "diagonal": diagonals,
    anti-diagonals, and both backward.

    Raises:
        ValueError: no such scan, or a size that it cannot do.

    >>> orders("cross2d", 2, 2).tolist()
    [[0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0], [3, 1, 2, 0]]
    """
    if scan not in SCANS:
        raise ValueError(f"scan must be one of {', '.join(SCANS)}, got {scan!r}")
    if height < 1 or width < 1 or window < 1:
        raise ValueError(f"height, width and window must be positive, got {height}, {width}, {window}")
    grid = np.arange(height * width).reshape(height, width)
    row, column = np.indices((height, width))
    if scan == "es2d":
        if height % 2 or width % 2:
            raise ValueError(f"es2d needs even sizes, got {height} x {width}")
        return np.stack([grid[i::2, j::2].ravel() for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))])
    if scan in ("unidi", "bidi"):
        forward = [grid.ravel()]
    elif scan == "cross2d":
        forward = [grid.ravel(), grid.T.ravel()]
    elif scan == "zigzag":
        forward = [_snake(grid), _snake(grid.T)]
    elif scan == "local":
        forward = [np.lexsort([v.ravel() for v in (column, row, column // window, row // window)])]
    elif scan == "spiral":
        forward = [_spiral(grid)]
    else:
        forward = [np.lexsort([row.ravel(), d.ravel()]) for d in (row + column, row - column)]
    return np.stack(forward if scan == "unidi" else forward + [path[::-1] for path in forward])


def unroll(x: Tensor, scan: str, height: int, width: int) -> Tensor:
    """Pixels (B, HW, C) in the K orders of a scan: (B, K, M, C)."""
    return x[:, _places(scan, height, width).to(x.device)].unflatten(1, (count_of(scan), -1))


def merge(y: Tensor, scan: str, height: int, width: int) -> Tensor:
    """Each pixel's values in all sequences (B, K, M, C), summed at its place: (B, HW, C)."""
    found = y.flatten(1, 2)[:, _places(scan, height, width, back=True).to(y.device)]
    times = found.shape[1] // (height * width)
    return found.unflatten(1, (height * width, times)).sum(2) if times > 1 else found


@torch.compiler.assume_constant_result  # a compiler need not look into numpy
def _places(scan: str, height: int, width: int, back: bool = False) -> Tensor:
    """Pixels in the order of all sequences; `back`: for each pixel, its places there, which stand together."""
    flat = orders(scan, height, width).ravel()
    return torch.tensor((np.argsort(flat, kind="stable") if back else flat).tolist())


@torch.compiler.assume_constant_result
def count_of(scan: str) -> int:
    """K, how many sequences a scan has."""
    return len(orders(scan, 2, 2))


def _snake(grid: np.ndarray) -> np.ndarray:
    turned = grid.copy()
    turned[1::2] = turned[1::2, ::-1]
    return turned.ravel()


def _spiral(grid: np.ndarray) -> np.ndarray:
    path = []
    while grid.size:
        path.append(grid[0])
        grid = grid[1:].T[::-1]
    return np.concatenate(path)
