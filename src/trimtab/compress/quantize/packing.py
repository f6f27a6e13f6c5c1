"""Packing: small codes in as few bytes as they need, and out again without loss.

Two forms. A bit stream of any width from 1 to 8, little-endian: the first code in the lowest bits of the first byte,
codes of 3, 5, 6 and 7 bits across bytes. And base 3: five codes of 0, 1, 2 in a byte (3^5 = 243), 1.6 bits each.
Tensors are packed flat; only the last byte is padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

BASE_3 = "base-3"
Packing = int | str  # bits per code, or BASE_3


def packed_bytes(count: int, packing: Packing) -> int:
    """Bytes that `count` codes take.

    >>> packed_bytes(512 * 512, 2), packed_bytes(512 * 512, "base-3")
    (65536, 52429)
    """
    return -(-count // 5) if _checked(packing) == BASE_3 else -(-count * int(packing) // 8)


def pack(codes: Tensor, packing: Packing) -> Tensor:
    """Codes (any shape, integers from 0) as a flat uint8 tensor.

    Raises:
        ValueError: codes that the packing does not hold.

    >>> pack(torch.tensor([1, 2, 0, 3, 1]), 2).tolist()
    [201, 1]
    """
    top = 2 if _checked(packing) == BASE_3 else 2 ** int(packing) - 1
    flat = codes.detach().reshape(-1).to(torch.int64)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) > top):
        raise ValueError(f"codes must be 0 to {top}, got {int(flat.min())} to {int(flat.max())}")
    if packing == BASE_3:
        digits, base = flat, 3
    else:
        digits, base = _digits(flat, 2, int(packing)).reshape(-1), 2
    each = 5 if base == 3 else 8
    digits = nn.functional.pad(digits, (0, -len(digits) % each)).reshape(-1, each)
    return (digits * _powers(base, each, digits.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, packing: Packing, shape: Sequence[int]) -> Tensor:
    """The codes again, int64 of `shape`. Made of plain arithmetic, so that exporters and constant folding follow it.

    >>> unpack(torch.tensor([201, 1], dtype=torch.uint8), 2, (5,)).tolist()
    [1, 2, 0, 3, 1]
    """
    count = math.prod(shape)
    if _checked(packing) == BASE_3:
        return _digits(packed.to(torch.int64), 3, 5).reshape(-1)[:count].reshape(tuple(shape))
    bits = int(packing)
    digits = _digits(packed.to(torch.int64), 2, 8).reshape(-1)[: count * bits].reshape(count, bits)
    return (digits * _powers(2, bits, packed.device)).sum(1).reshape(tuple(shape))


class PackedWeight(nn.Module):
    """The codes of a weight, in a buffer of bytes and nothing else: (shape) integers from 0.

    Args:
        shape: of the weight. packing: bits per code, or "base-3".

    >>> held = PackedWeight((2, 3), packing=2)
    >>> held().shape, held.stored_bytes(), held.stored_params()
    (torch.Size([2, 3]), 2, 6)
    """

    def __init__(self, shape: Sequence[int], packing: Packing) -> None:
        super().__init__()
        self.shape, self.packing = tuple(shape), packing
        self.register_buffer("packed", torch.zeros(packed_bytes(math.prod(shape), packing), dtype=torch.uint8))
        self.packed: Tensor

    def forward(self) -> Tensor:
        return unpack(self.packed, self.packing, self.shape)

    def stored_bytes(self) -> int:
        return self.packed.numel()

    def stored_params(self) -> int:
        return math.prod(self.shape)

    def extra_repr(self) -> str:
        return f"{self.shape}, packing={self.packing!r}"


def _checked(packing: Packing) -> Packing:
    if packing == BASE_3 or (isinstance(packing, int) and 1 <= packing <= 8):
        return packing
    raise ValueError(f"packing must be 1 to 8 bits or {BASE_3!r}, got {packing!r}")


def _powers(base: int, count: int, device: torch.device) -> Tensor:
    return torch.tensor([base**i for i in range(count)], device=device)


def _digits(values: Tensor, base: int, count: int) -> Tensor:
    """(n,) -> (n, count), lowest digit first."""
    return values.unsqueeze(1) // _powers(base, count, values.device) % base
