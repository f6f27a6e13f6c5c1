"""`Records`: a large table of small records on disk: few files, written in order, safe against a crash at any moment.

The table is cut into shards, contiguous ranges that different processes or machines may write at the same time. A shard
is one file that only grows, and a note beside it that says how many records are surely on the disk, with their
checksum. After a kill, whatever lies beyond the note is cut off, and the writer goes on from there.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trimtab.core.errors import ArtifactError
from trimtab.core.files import write_text

_EVERY = 10.0  # seconds between two notes
_CHUNK = 2**24  # bytes read at once for the checksum


class Records:
    """A table of `total` records in `shards` files.

    Args:
        folder: where the files are, or will be.
        dtype: of one record; its fields are little-endian whatever the machine.
        total: number of records. unit: shards begin at multiples of it.

    >>> import tempfile
    >>> table = Records(Path(tempfile.mkdtemp()), np.dtype([("seed", "<i4"), ("p", "<f2", (2,))]), total=5, shards=2)
    >>> for shard in range(table.shards):
    ...     with table.append(shard) as out:
    ...         start, stop = table.bounds(shard)
    ...         out.write(np.array([(i, (0.5, 0.25)) for i in range(start, stop)], table.dtype))
    >>> table.read(np.array([4, 0]))["seed"].tolist(), table.nbytes
    ([4, 0], 40)
    """

    def __init__(self, folder: Path, dtype: np.dtype, total: int, *, shards: int = 1, unit: int = 1) -> None:
        if not 1 <= shards <= max(1, total // unit):
            raise ValueError(f"shards must be 1 to {max(1, total // unit)} for {total} records, got {shards}")
        self.folder, self.dtype, self.total, self.shards = folder, dtype, total, shards
        self._cuts = [total // unit * s // shards * unit for s in range(shards)] + [total]
        self._maps: dict[int, np.ndarray] = {}

    @property
    def nbytes(self) -> int:
        return self.total * self.dtype.itemsize

    def bounds(self, shard: int) -> tuple[int, int]:
        """The records start <= i < stop of a shard."""
        return self._cuts[shard], self._cuts[shard + 1]

    def file(self, shard: int) -> Path:
        return self.folder / f"records-{shard:05d}-of-{self.shards:05d}.bin"

    def done(self, shard: int) -> int:
        """How many records of a shard are surely there."""
        return self._note(shard)[0]

    @property
    def complete(self) -> bool:
        return all(self.done(s) == self._cuts[s + 1] - self._cuts[s] for s in range(self.shards))

    @contextmanager
    def append(self, shard: int) -> Iterator[Appender]:
        """Go on writing a shard where it stands. What was written is kept also when the block ends in an exception."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.file(shard)
        done, checksum = self._note(shard)
        self._maps.pop(shard, None)
        with open(file, "r+b" if file.exists() else "w+b") as f:
            out = Appender(f, self.dtype, done, checksum, _note_of(file))
            try:
                yield out
            finally:
                out.keep()

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The records of these rows (B,), a copy.

        Raises:
            ArtifactError: the table is not complete.
        """
        out = np.empty(len(rows), self.dtype)
        where = np.searchsorted(self._cuts, rows, side="right") - 1
        for shard in np.unique(where).tolist():
            mine = where == shard
            out[mine] = self._map(shard)[rows[mine] - self._cuts[shard]]
        return out

    def verify(self) -> None:
        """Read everything and compare checksums.

        Raises:
            ArtifactError: something is missing or damaged.
        """
        for shard in range(self.shards):
            data: Any = self._map(shard).view(np.uint8)
            checksum = 0
            for at in range(0, len(data), _CHUNK):
                checksum = zlib.crc32(data[at : at + _CHUNK], checksum)
            if checksum != self._note(shard)[1]:
                raise ArtifactError(f"{self.file(shard)} is damaged (wrong checksum); delete it, and it is made again")

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            n, have = self._cuts[shard + 1] - self._cuts[shard], self.done(shard)
            if have < n:
                raise ArtifactError(f"{self.file(shard)} has {have} of {n} records; finish making it")
            self._maps[shard] = np.memmap(self.file(shard), self.dtype, "r", shape=(n,))
        return self._maps[shard]

    def _note(self, shard: int) -> tuple[int, int]:
        """(records, checksum) that the note says; nothing, when the file does not have them."""
        file = self.file(shard)
        try:
            note = json.loads(_note_of(file).read_text(encoding="utf-8"))
            done, checksum = int(note["records"]), int(note["crc32"])
            if file.stat().st_size < done * self.dtype.itemsize:
                return 0, 0
        except FileNotFoundError:
            return 0, 0
        except (ValueError, KeyError, TypeError) as e:
            raise ArtifactError(f"{_note_of(file)} cannot be read ({e}); delete it, and the shard is made again") from e
        return done, checksum


class Appender:
    """Writes records at the end of a shard.

    Attributes: `done`, the number of records in the shard so far.
    """

    def __init__(self, file: BinaryIO, dtype: np.dtype, done: int, checksum: int, note: Path) -> None:
        self._file = file
        self._dtype, self.done, self._checksum, self._note = dtype, done, checksum, note
        self._kept = time.monotonic()
        file.truncate(done * dtype.itemsize)
        file.seek(0, os.SEEK_END)

    def write(self, rows: np.ndarray) -> None:
        raw = np.ascontiguousarray(rows, self._dtype).tobytes()
        self._file.write(raw)
        self._checksum = zlib.crc32(raw, self._checksum)
        self.done += len(rows)
        if time.monotonic() - self._kept > _EVERY:
            self.keep()

    def keep(self) -> None:
        """Bring what was written to the disk, then note it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        write_text(self._note, json.dumps({"records": self.done, "crc32": self._checksum}))
        self._kept = time.monotonic()


def _note_of(file: Path) -> Path:
    return file.with_suffix(".json")
