"""Peak activation memory of a straight-line program, from the lifetimes of its tensors.

A tensor lives from the operator that makes it to the last operator that reads it. The peak is the largest sum of bytes
alive at one operator (inputs, output and everything kept for later). The rules are those of an inference runtime:

- weights and constants are not activations, and do not count;
- an elementwise operator or a folded batch norm overwrites an input that dies there, as runtimes do; the input of the
  model is the caller's and is never overwritten;
- an extra output that nobody reads (the indices of a max pool, the statistics of a norm) does not exist at inference.

Used for PyTorch traces (`core.cost`) and for ONNX graphs (`core.onnx_cost`) alike, so both numbers mean the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """One operator: the buffers it reads and writes, and whether it may write over an input that dies here."""

    reads: tuple[Hashable, ...]
    writes: tuple[Hashable, ...]
    in_place: bool = False


def peak(
    steps: Sequence[Step], sizes: Mapping[Any, int], *, inputs: Iterable[Hashable], outputs: Iterable[Hashable]
) -> int:
    """Largest number of bytes alive at once.

    Args:
        steps: the operators in the order in which they run.
        sizes: bytes of every buffer; a buffer without a size is a constant and is ignored.
        inputs: buffers that exist before the first step.
        outputs: buffers that must survive the last step.

    Example:
        >>> peak([Step(("x",), ("y",)), Step(("y",), ("z",), in_place=True)],
        ...      {"x": 10, "y": 40, "z": 40}, inputs=["x"], outputs=["z"])
        50
    """
    end = len(steps)
    given, kept = set(inputs), set(outputs)
    last: dict[Hashable, int] = {}
    for i, step in enumerate(steps):
        for b in step.reads:
            last[b] = i
    last.update(dict.fromkeys(kept, end))

    home: dict[Hashable, Hashable] = {}  # buffer -> the buffer whose bytes it really occupies

    def root(b: Hashable) -> Hashable:
        while b in home:
            b = home[b]
        return b

    birth: dict[Hashable, int] = {b: 0 for b in given if b in sizes}
    death: dict[Hashable, int] = {b: max(last.get(b, 0), 0) for b in birth}
    for i, step in enumerate(steps):
        for b in step.writes:
            r = root(b)
            if b not in sizes:
                continue
            if r in birth:  # written again: an in-place operator
                death[r] = max(death[r], last.get(b, i))
                continue
            if step.in_place:
                for a in step.reads:
                    ra = root(a)
                    if ra in birth and ra not in given and death[ra] == i and sizes[ra] >= sizes[b]:
                        home[b] = ra
                        death[ra] = max(i, last.get(b, i))
                        break
                if b in home:
                    continue
            birth[b], death[b] = i, max(i, last.get(b, i))
    change = [0] * (end + 2)
    for b, i in birth.items():
        change[i] += sizes[b]
        change[min(death[b], end) + 1] -= sizes[b]
    most = now = 0
    for delta in change:
        now += delta
        most = max(most, now)
    return most
