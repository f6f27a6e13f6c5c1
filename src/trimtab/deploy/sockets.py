"""A socket to listen on."""

from __future__ import annotations

import os
import socket


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes any free one.

    Raises:
        OSError: with the address in the message.

    >>> with listen("127.0.0.1", 0) as one:
    ...     one.getsockname()[1] > 0
    True
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # else asyncio leaves Nagle's delay on
    try:
        if os.name == "posix":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
    except (OSError, OverflowError) as e:
        listening.close()
        raise OSError(f"cannot listen on {host}:{port}: {getattr(e, 'strerror', None) or e}") from e
    return listening


def name_of(host: str, listening: socket.socket) -> str:
    """The address as it stands in a URL."""
    return f"{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
