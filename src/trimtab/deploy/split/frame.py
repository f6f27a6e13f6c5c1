"""The wire format: magic (4 bytes), length (4), header's length (2), header in msgpack, payload, CRC-32 (4).

Every number is big-endian; the length counts what follows it, and the checksum covers all before it. It is not
optional: one flipped bit of a range coder's payload changes most of what is decoded, and nobody notices.
"""

from __future__ import annotations

import socket
import struct
import time
import zlib
from asyncio import StreamReader
from dataclasses import dataclass
from typing import Any

from trimtab.core.errors import TrimtabError, need

MAGIC = b"TTS1"
MAX_FRAME = 2**20  # bytes after the length
_START, _HEADER, _CHECK = struct.Struct(">4sI"), struct.Struct(">H"), struct.Struct(">I")


class FrameError(TrimtabError, ValueError):
    """Bytes that are no frame."""


@dataclass(frozen=True)
class Frame:
    """A message: a few words in `header`, and bytes."""

    header: dict[str, Any]
    payload: bytes = b""


def pack(frame: Frame, limit: int = MAX_FRAME) -> bytes:
    """The bytes of a frame.

    Raises:
        FrameError: it is larger than `limit`.

    >>> raw = pack(Frame({"id": 7}, b"abc"))
    >>> parse(start(raw[:8]), raw[8:])
    Frame(header={'id': 7}, payload=b'abc')
    """
    header = need("msgpack", "edge").packb(frame.header)
    length = _HEADER.size + len(header) + len(frame.payload) + _CHECK.size
    if length > limit or len(header) >= 2**16:
        raise FrameError(f"a frame must have at most {limit} bytes, got {length}")
    raw = _START.pack(MAGIC, length) + _HEADER.pack(len(header)) + header + frame.payload
    return raw + _CHECK.pack(zlib.crc32(raw))


def start(raw: bytes, limit: int = MAX_FRAME) -> bytes:
    """The first eight bytes, if they may start a frame.

    Raises:
        FrameError: they may not, or the frame is larger than `limit`.
    """
    magic, length = _START.unpack(raw)
    if magic != MAGIC:
        raise FrameError(f"not a frame: it starts with {magic!r}")
    if not _HEADER.size + _CHECK.size <= length <= limit:
        raise FrameError(f"a frame must have at most {limit} bytes, got {length}")
    return raw


def length_of(begun: bytes) -> int:
    """How many bytes follow the first eight."""
    return _START.unpack(begun)[1]


def parse(begun: bytes, rest: bytes) -> Frame:
    """The frame whose first eight bytes are `begun`.

    Raises:
        FrameError: it is damaged.
    """
    if zlib.crc32(rest[: -_CHECK.size], zlib.crc32(begun)) != _CHECK.unpack(rest[-_CHECK.size :])[0]:
        raise FrameError("a frame was damaged on the way: its checksum is wrong")
    (size,) = _HEADER.unpack_from(rest)
    body = rest[_HEADER.size : -_CHECK.size]
    try:
        header = need("msgpack", "edge").unpackb(body[:size])
    except Exception as e:  # msgpack raises many kinds
        raise FrameError(f"a frame's header cannot be read: {e}") from e
    if size > len(body) or not isinstance(header, dict) or not all(isinstance(k, str) for k in header):
        raise FrameError("a frame's header is not one")
    return Frame(header, body[size:])


async def read(reader: StreamReader, limit: int = MAX_FRAME) -> Frame:
    """The next frame of a stream; time limits are the caller's.

    Raises:
        FrameError: what comes is none.
        EOFError: the stream ends (asyncio's IncompleteReadError).
    """
    begun = start(await reader.readexactly(_START.size), limit)
    return parse(begun, await reader.readexactly(length_of(begun)))


def receive(connection: socket.socket, until: float, limit: int = MAX_FRAME) -> Frame:
    """The next frame of a socket, complete before the moment `until` of the monotonic clock.

    Raises:
        FrameError: what comes is none.
        TimeoutError, OSError: it did not come.
    """
    begun = start(_exactly(connection, _START.size, until), limit)
    return parse(begun, _exactly(connection, length_of(begun), until))


def send(connection: socket.socket, frame: Frame, until: float) -> int:
    """Send a frame whole before the moment `until`; gives its bytes."""
    raw = pack(frame)
    connection.settimeout(_left(until))
    connection.sendall(raw)
    return len(raw)


def _exactly(connection: socket.socket, n: int, until: float) -> bytes:
    parts = bytearray()
    while len(parts) < n:
        connection.settimeout(_left(until))
        part = connection.recv(n - len(parts))
        if not part:
            raise ConnectionError("the peer hung up")
        parts += part
    return bytes(parts)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("no time is left")
    return left
