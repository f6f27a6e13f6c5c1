"""HTTP on bare sockets, for tests in which one side misbehaves."""

from __future__ import annotations

import socket


def heard(raw: socket.socket) -> bytes:
    """A whole request, or answer, which may come in several parts."""
    said = b""
    while b"\r\n\r\n" not in said:
        if not (part := raw.recv(65536)):
            raise ValueError("nobody there")
        said += part
    head, _, rest = said.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(rest) < length:
        rest += raw.recv(65536)
    return head + b"\r\n\r\n" + rest
