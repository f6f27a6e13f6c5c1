"""Whole numbers to bytes and back, by integer tables that both sides hold.

The tables are made once from a prior and then define the code: no probability is ever computed again, because two
machines would round it differently and could then not read each other. Values beyond a table are sent as its last
symbol, followed by 32 plain bits. The range coder is constriction's.
"""

from __future__ import annotations

import hashlib
import zlib
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from trimtab.core.errors import ArtifactError, TrimtabError, need
from trimtab.deploy.split.bottleneck import Prior

TOTAL = 2**16  # what the counts of a table add up to
MAX_TABLE = 2**12  # symbols
LARGEST = 2**30  # values are clipped to this
LONGEST = 8  # bytes for a value that is not in its table: 16 bits for that, 32 plain ones, and some for the rounding


class CodecError(TrimtabError, ValueError):
    """Bytes that cannot be decoded."""


def checksum(raw: bytes | bytearray) -> str:
    """CRC-32, which every payload needs: a flipped bit changes most of what is decoded, and nobody notices.

    >>> checksum(b"abc")
    '352441c2'
    """
    return f"{zlib.crc32(raw):08x}"


@dataclass(frozen=True)
class Codec:
    """An entropy coder for arrays (C, h, w) of whole numbers.

    Attributes:
        low: the smallest number in the table of each channel.
        counts: per channel, how often of 65,536 each number comes from `low` on; the last count is that of all others.
        medians: what is added to the numbers of each channel before they are decoded further.
    """

    low: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    medians: tuple[float, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, prior: Prior) -> Codec:
        """The tables of a prior, from the first to the last of its quantiles."""
        prior = deepcopy(prior).cpu()
        first, median, last = prior.quantiles.double().unbind(1)
        below, above = (
            (side).ceil().clamp(1, MAX_TABLE // 2 - 1).int().tolist() for side in (median - first, last - median)
        )
        grid = prior.quantiles[:, 1, None] + torch.arange(-max(below), max(above) + 1)  # (C, N)
        counts = []
        for p, b, a in zip(prior.between(grid).double().numpy(), below, above):
            inside = p[max(below) - b : max(below) + a + 1]
            counts.append(_counts(np.append(inside, max(0.0, 1.0 - inside.sum()))))
        return cls(tuple(-b for b in below), tuple(counts), tuple(prior.quantiles[:, 1].tolist()))

    @property
    def channels(self) -> int:
        return len(self.low)

    @cached_property
    def raw(self) -> bytes:
        """The tables as msgpack."""
        return need("msgpack", "edge").packb({"low": self.low, "counts": self.counts, "medians": self.medians})

    @cached_property
    def id(self) -> str:
        """SHA-256 of the tables: who has another one speaks another language."""
        return hashlib.sha256(self.raw).hexdigest()

    @classmethod
    def read(cls, raw: bytes) -> Codec:
        """The codec kept as `raw`.

        Raises:
            ArtifactError: it is none.
        """
        try:
            kept = need("msgpack", "edge").unpackb(raw)
            codec = cls(tuple(kept["low"]), tuple(tuple(c) for c in kept["counts"]), tuple(kept["medians"]))
            whole = all(isinstance(n, int) for row in (codec.low, *codec.counts) for n in row)
            sizes = len(codec.low) == len(codec.counts) == len(codec.medians) > 0
            sums = all(2 <= len(c) <= MAX_TABLE and min(c) > 0 and sum(c) == TOTAL for c in codec.counts)
            if not (whole and sizes and sums and np.isfinite(codec.medians).all() and abs(max(codec.low)) < LARGEST):
                raise ValueError("its numbers are not those of tables")
        except Exception as e:  # whatever hostile bytes lead to
            raise ArtifactError(f"the codec is damaged: {e}") from e
        return codec

    def encode(self, symbols: np.ndarray) -> bytes:
        """The bytes of whole numbers (C, h, w); floats are taken as such, NaN as 0."""
        values = np.clip(np.nan_to_num(symbols), -LARGEST, LARGEST).astype(np.int32).reshape(self.channels, -1)
        coder = self._constriction.stream.queue.RangeEncoder()
        for row, low, model, escape in zip(values, self.low, self._models, self._escapes):
            index = row - low
            beyond = (index < 0) | (index >= escape)
            coder.encode(np.where(beyond, escape, index).astype(np.int32), model)
            if beyond.any():
                coder.encode(row[beyond].astype("<i4").view("<u2").astype(np.int32), self._plain)
        return coder.get_compressed().astype("<u4").tobytes()

    def decode(self, payload: bytes, size: tuple[int, int]) -> np.ndarray:
        """The whole numbers int32 (C, h, w) of what `encode` gave.

        Raises:
            CodecError: the bytes are no such thing. Most damaged bytes decode to something, though; see `checksum`.
        """
        if len(payload) % 4:
            raise CodecError(f"a payload has a multiple of 4 bytes, got {len(payload)}")
        coder = self._constriction.stream.queue.RangeDecoder(np.frombuffer(payload, "<u4").astype(np.uint32))
        values = np.empty((self.channels, size[0] * size[1]), np.int32)
        try:
            for row, low, model, escape in zip(values, self.low, self._models, self._escapes):
                index = coder.decode(model, row.size)
                row[:] = index + low
                beyond = index == escape
                if beyond.any():
                    halves = coder.decode(self._plain, 2 * int(beyond.sum()))
                    row[beyond] = np.asarray(halves).astype("<u2").view("<i4")
        except Exception as e:  # constriction asserts what it decodes
            raise CodecError(f"the payload cannot be decoded: {str(e).splitlines()[0]}") from e
        return values.reshape(self.channels, *size)

    def bits(self, symbols: np.ndarray) -> float:
        """What a perfect coder pays for whole numbers (C, h, w) by these tables."""
        total = 0.0
        for row, low, counts in zip(symbols.reshape(self.channels, -1).astype(np.int64), self.low, self.counts):
            index = np.where((row < low) | (row - low >= len(counts) - 1), len(counts) - 1, row - low)
            total += float(-np.log2(np.asarray(counts)[index] / TOTAL).sum()) + 32 * int(
                (index == len(counts) - 1).sum()
            )
        return total

    @property
    def _constriction(self) -> Any:
        need("constriction", "edge")
        import constriction

        return constriction

    @cached_property
    def _models(self) -> list[Any]:
        categorical = self._constriction.stream.model.Categorical
        return [categorical(np.asarray(c, np.float64) / TOTAL, perfect=False) for c in self.counts]

    @cached_property
    def _escapes(self) -> list[int]:
        return [len(c) - 1 for c in self.counts]

    @cached_property
    def _plain(self) -> Any:
        return self._constriction.stream.model.Uniform(2**16)


def _counts(p: np.ndarray) -> tuple[int, ...]:
    """Whole numbers of at least 1 that add up to 65,536, in about the proportions of p.

    >>> _counts(np.array([0.5, 0.5, 0.0]))
    (32768, 32767, 1)
    """
    share = p / p.sum() * (TOTAL - len(p))
    counts = 1 + np.floor(share).astype(np.int64)
    rest = np.argsort(np.floor(share) - share, kind="stable")[: TOTAL - int(counts.sum())]
    counts[rest] += 1
    return tuple(counts.tolist())
