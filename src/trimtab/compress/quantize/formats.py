"""Number formats of at most 8 bits: integers and small floats, with exact rounding.

`int2` ... `int8` are symmetric integers. `e4m3` has a sign, 4 bits of exponent and 3 of mantissa; subnormal numbers
count, rounding is to nearest, ties to even, and what is too large becomes the largest. Where the 8-bit formats of OCP
reserve codes, so do ours: e4m3 ends at 448 and e5m2 at 57344, as `torch.float8_e4m3fn` and `torch.float8_e5m2`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-8  # the least scale
_RESERVED = {(4, 3): 448.0, (5, 2): 57344.0}


@dataclass(frozen=True)
class Format:
    """A format by its name: `Format("int4")`, `Format("e2m1")`.

    >>> Format("e2m1").levels()[:8].tolist()
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    >>> Format("int4").bits, Format("int4").largest, Format("e4m3").largest
    (4, 7.0, 448.0)
    """

    name: str

    def __post_init__(self) -> None:
        self._fields()

    @property
    def integer(self) -> bool:
        return self._fields()[0] == 0

    @property
    def bits(self) -> int:
        e, m = self._fields()
        return m + 1 if e == 0 else 1 + e + m

    @property
    def largest(self) -> float:
        """The largest value; an integer format reaches one step further on the negative side."""
        e, m = self._fields()
        if e == 0:
            return float(2**m - 1)
        return _RESERVED.get((e, m), largest_float(e, m))

    def round(self, x: Tensor) -> Tensor:
        """The nearest values of the format. `x` float32, in units of the format."""
        e, m = self._fields()
        if e == 0:
            return x.round().clamp(-self.largest - 1, self.largest)
        size = x.abs().clamp(max=self.largest)
        step = _step_exported(size, e, m) if _exporting() else _step(size, e, m)
        return x.sign() * ((size / step).round() * step)

    def levels(self) -> Tensor:
        """(2^bits,) the value of every code; codes that the format reserves give 0."""
        return torch.tensor(_levels(self.name))

    def encode(self, values: Tensor) -> Tensor:
        """The codes, int64, of values that `round` gave."""
        e, m = self._fields()
        if e == 0:
            return values.to(torch.int64) + 2**m
        half = 2 ** (e + m)
        positive = self.levels()[:half]
        positive = positive[: int(positive.argmax()) + 1].to(values.device)
        return torch.searchsorted(positive, values.abs().contiguous()) + half * (values < 0)

    def _fields(self) -> tuple[int, int]:
        """(bits of exponent, bits of mantissa); an integer has no exponent and all bits but the sign."""
        return _fields(self.name)


def largest_float(exponent: int, mantissa: int) -> float:
    """The largest number of a float format that reserves no code.

    >>> [largest_float(e, m) for e, m in ((2, 1), (2, 3), (3, 2), (4, 3), (5, 2))]
    [6.0, 7.5, 28.0, 480.0, 114688.0]
    """
    bias = 2 ** (exponent - 1) - 1
    return 2.0 ** (2**exponent - 1 - bias) * (2 - 2.0**-mantissa)


@functools.cache
def _fields(name: str) -> tuple[int, int]:
    if found := re.fullmatch(r"int([2-8])", name):
        return 0, int(found[1]) - 1
    found = re.fullmatch(r"e([1-5])m([0-6])", name)
    if not found or 1 + int(found[1]) + int(found[2]) > 8:
        raise ValueError(f"a format must be int2 to int8, or a float such as e2m1 of at most 8 bits, got {name!r}")
    return int(found[1]), int(found[2])


def _step(size: Tensor, e: int, m: int) -> Tensor:
    """2^(floor(log2 size) - m), at least that of the subnormals; from the bits of the float32, so without error."""
    exponent = ((size.to(torch.float32).view(torch.int32) >> 23) - 127).clamp(min=2 - 2 ** (e - 1))
    return ((exponent - m + 127) << 23).view(torch.float32)


def _step_exported(size: Tensor, e: int, m: int) -> Tensor:
    """The same by comparing with every power of two, for runtimes that do not let one look at bits."""
    low = 2 - 2 ** (e - 1)
    step = torch.full_like(size, 2.0 ** (low - m))
    for k in range(low + 1, low + 2**e):
        step = torch.where(size >= 2.0**k, torch.full_like(size, 2.0 ** (k - m)), step)
    return step


def _exporting() -> bool:
    return torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting() or torch.compiler.is_compiling()


@functools.cache
def _levels(name: str) -> tuple[float, ...]:
    form = Format(name)
    e, m = form._fields()
    if e == 0:
        return tuple(float(v) for v in range(-(2**m), 2**m))
    bias, positive = 2 ** (e - 1) - 1, []
    for code in range(2 ** (e + m)):
        exponent, fraction = code >> m, code % 2**m
        value = 2.0 ** (max(exponent, 1) - bias) * ((exponent > 0) + fraction / 2**m)
        positive.append(value if value <= form.largest else 0.0)
    return (*positive, *(-v for v in positive))
