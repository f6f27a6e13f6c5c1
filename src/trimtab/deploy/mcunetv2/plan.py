"""What every schedule of a network would cost: peak memory from the lifetimes of its tensors, and MACs done twice.

The rules are those of an inference engine for microcontrollers. Norms and activation functions belong to the operator
before them; a depthwise convolution overwrites its input, an addition one of its summands, and the convolution before
it adds to the other at once. What is alive at an operator are its input, its output, and what later operators read.
Weights lie in flash and do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx

from trimtab.deploy.mcunetv2.local import (
    NORMS,
    Program,
    Window,
    cells,
    is_depthwise,
    is_pointwise,
    is_view,
    macs,
    value,
)


@dataclass(frozen=True)
class Option:
    """A schedule: the network up to `split` is run patch by patch, `grid` x `grid` of them; the rest runs as always.

    Attributes:
        split: the module at whose output patches end, "" for no patches.
        cell: peak bytes of one patch, the largest. buffer: bytes of the map that patches fill.
        tail: peak bytes of the rest.
        peak: the larger of cell + buffer and tail.
        macs: of the patches together, beyond what the head costs when it is run at once.
        overhead: those MACs as a share of the whole network's.
        window: the largest side of a patch's window in the image, in pixels.
        receptive_field: pixels of the image, along a side, that a position at the split depends on.
    """

    split: str
    grid: int
    cell: int
    buffer: int
    tail: int
    peak: int
    macs: int
    overhead: float
    window: int
    receptive_field: int


@dataclass
class Step:
    """An operator with what belongs to it: the buffer it makes, those it reads, and the one it may write over."""

    makes: fx.Node
    reads: tuple[fx.Node, ...]
    over: fx.Node | None = None


def steps(nodes: Sequence[fx.Node], source: fx.Node, kept: fx.Node | None = None) -> list[Step]:
    """Operators in order as an engine would fuse them. A buffer goes by the name of the node that made it first.

    Args:
        nodes: operators in order.
        source: what they start from; the image itself is never overwritten.
        kept: one of them whose buffer must still be there at the end.
    """
    inside = {*nodes}
    root = {source: source}
    pending: dict[fx.Node, int] = {}  # readers of a buffer that are still to come

    def readers(node: fx.Node) -> int:
        return sum(u in inside or u.op == "output" for u in node.users) + (node is kept)

    pending[source] = readers(source)
    made: list[Step] = []
    for node in nodes:
        read = [n for n in node.all_input_nodes if n in root]
        for n in read:
            pending[root[n]] -= 1
        operands = tuple(dict.fromkeys(root[n] for n in read))
        dead = [b for b in operands if pending[b] == 0 and b.op != "placeholder"]
        free = [b for b in dead if _numel(b) == _numel(node)]
        fused = is_pointwise(node) or node.target in NORMS or "layer_norm" in str(node.target)
        target = None
        if is_view(node) or (fused and len(operands) == 1 and free):
            target = operands[0]
        elif fused and len(free) > 1 and made[-1].makes in free and made[-1].over is None:
            other = next(b for b in free if b is not made[-1].makes)
            if other not in made[-1].reads:  # the last convolution adds to what the other summand holds
                target = made[-1].makes
                made[-1] = Step(target, (*made[-1].reads, other), other)
        if target is not None:
            root[node] = target
            pending[target] += readers(node)
            continue
        over = free[0] if fused and free else None
        if is_depthwise(node) and dead:
            over = dead[0]
        made.append(Step(node, operands, over))
        root[node], pending[node] = node, readers(node)
    if kept is not None and made and root[kept] is not made[-1].makes:
        made[-1] = Step(made[-1].makes, (*made[-1].reads, root[kept]), made[-1].over)
    return made


def peak(steps: Sequence[Step], bytes_of: Mapping[fx.Node, np.ndarray]) -> np.ndarray:
    """The most bytes alive at any step; a buffer has a number of bytes for every case that is looked at.

    >>> peak([], {}).tolist()
    0
    """
    last = {b: i for i, s in enumerate(steps) for b in (*s.reads, s.makes)}
    born = {s.makes: i for i, s in enumerate(steps)}
    most = np.zeros((), np.int64)
    for i, step in enumerate(steps):
        alive = [b for b, end in last.items() if born.get(b, -1) <= i <= end]
        now = sum((bytes_of[b] for b in alive), np.zeros((), np.int64))
        if step.over is not None:
            now = now - np.minimum(bytes_of[step.over], bytes_of[step.makes])
        most = np.maximum(most, now)
    return most


def whole(program: Program, act_bits: int = 8) -> Option:
    """The network as it is run without patches."""
    most = _peak_of(steps(program.nodes, program.image), act_bits)
    return Option("", 1, 0, 0, most, most, 0, 0.0, max(program.size[1:]), 0)


def options(
    program: Program,
    total_macs: int,
    *,
    grids: Iterable[int] = range(2, 9),
    split: str | None = None,
    act_bits: int = 8,
) -> list[tuple[Option, fx.Node]]:
    """Every schedule, with the node at its split; or those of one split."""
    found = []
    grids = sorted({*grids})
    for cut in program.cuts:
        if split is not None and program.name(cut) != split:
            continue
        head = program.head(cut)
        order = steps(head, program.image, cut)
        after = program.tail(cut)
        tail = _peak_of(steps(after, cut), act_bits) if after else 0
        buffer = _bytes(_numel(cut), act_bits)
        name, field = program.name(cut), program.receptive_field(cut)
        for grid in grids:
            if grid > min(program.side(cut, 0), program.side(cut, 1)):
                break
            rows, columns = (_windows(program, cut, grid, axis) for axis in (0, 1))
            if rows is None or columns is None:
                continue
            cell = int(peak(order, _cell_bytes(program, order, rows, columns, act_bits)).max())
            extra = sum(_extra_macs(program, n, rows, columns) for n in head)
            side = max(b - a for axis in (rows, columns) for w in axis for a, b in [w[program.image]])
            most = max(cell + buffer, tail)
            option = Option(name, grid, cell, buffer, tail, most, extra, extra / total_macs, side, field)
            found.append((option, cut))
    return found


def _windows(program: Program, cut: fx.Node, grid: int, axis: int) -> list[dict[fx.Node, Window]] | None:
    found = []
    for out in cells(program.side(cut, axis), grid):
        need = program.windows(cut, out, axis)
        if need is None:
            return None
        found.append(need)
    return found


def _cell_bytes(
    program: Program,
    order: Sequence[Step],
    rows: list[dict[fx.Node, Window]],
    columns: list[dict[fx.Node, Window]],
    act_bits: int,
) -> dict[fx.Node, np.ndarray]:
    """Bytes (grid, grid) of every buffer of the head in every cell."""
    found = {}
    for buffer in {b for s in order for b in (*s.makes.all_input_nodes, *s.reads, s.makes)}:
        if buffer not in rows[0]:
            continue
        area = program.side(buffer, 0) * program.side(buffer, 1)
        heights, widths = (np.array([w[buffer][1] - w[buffer][0] for w in axis]) for axis in (rows, columns))
        found[buffer] = -(-_numel(buffer) // area * np.outer(heights, widths) * act_bits // 8)
    return found


def _extra_macs(
    program: Program, node: fx.Node, rows: list[dict[fx.Node, Window]], columns: list[dict[fx.Node, Window]]
) -> int:
    """MACs of a product in all cells together, less those of the whole map."""
    cost = macs(node)
    if not cost:
        return 0
    height, width = (sum(b - a for w in axis for a, b in [w[node]]) for axis in (rows, columns))
    area = program.side(node, 0) * program.side(node, 1)
    return cost // area * (height * width - area)


def _peak_of(order: Sequence[Step], act_bits: int) -> int:
    buffers = {b for s in order for b in (*s.reads, s.makes)}
    return int(peak(order, {b: np.array(_bytes(_numel(b), act_bits)) for b in buffers}))


def _numel(node: fx.Node) -> int:
    made = node.meta["val"]
    return sum(t.numel() for t in made) if isinstance(made, list) else value(node).numel()


def _bytes(numbers: int, bits: int) -> int:
    return -(-numbers * bits // 8)
