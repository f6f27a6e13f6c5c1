"""The device's end of the way: one request at a time over HTTP, which has its answer by its deadline, or none.

What fails on the way is tried again while there is time; a server that has failed is left alone for a while: 50 ms,
twice as long each time, 5 s at most.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import threading
import time
from contextlib import suppress
from functools import cache
from typing import NamedTuple

from trimtab.core.errors import TrimtabError, need
from trimtab.deploy.split.codec import checksum

need("httpx", "edge")

import httpx  # noqa: E402

AGAIN = (400, 429, 502, 503, 504)  # damaged on the way, or busy
BACKOFF = (0.05, 5.0)  # seconds after the first failure, and at most


class Unanswered(TrimtabError, ConnectionError):
    """No answer within the deadline; the message says why."""


class Reply(NamedTuple):
    """What a server answered, and the milliseconds that it says it took."""

    content: bytes
    ms: float


class Link:
    """Asks a server; for one thread.

    Args:
        url: of the server, such as ``http://127.0.0.1:9000``.
        parts: which parts payloads are made with.
        max_bytes: of an answer.

    Attributes:
        sent, received: bytes of the last `ask`: requests and answers with their heads, every attempt included.
    """

    def __init__(self, url: str, parts: str, max_bytes: int) -> None:
        if not re.fullmatch(r"https?://[^/\s]+/?", url):
            raise ValueError(f"url must be like http://127.0.0.1:9000, got {url!r}")
        self.url, self.parts, self.max_bytes = url.rstrip("/"), parts, max_bytes
        self.sent = self.received = 0
        # Not a client, which would keep cookies, unpack what it gets, and follow where it is sent.
        self._transport = httpx.AsyncHTTPTransport(
            verify=url.startswith("https"), limits=httpx.Limits(max_connections=1)
        )
        self._session, self._number = secrets.token_hex(8), 0
        self._failures = 0
        self._not_before = 0.0

    def ask(self, path: str, payload: bytes, until: float) -> Reply:
        """The answer to a request, before the moment `until` of the monotonic clock.

        Raises:
            Unanswered: there is none.
        """
        self._number += 1
        self.sent = self.received = tries = 0
        problem = "it failed a moment ago" if self._failures else "the deadline has passed"
        while True:
            wait = max(0.0, self._not_before - time.monotonic())
            if time.monotonic() + wait >= until:
                raise Unanswered(f"no answer from {self.url} in time: {problem} (attempts: {tries})")
            time.sleep(wait)
            tries += 1
            try:
                answer, content = self._once(path, payload, until)
            except (OSError, httpx.TransportError) as e:
                self.close()
                if not isinstance(e, TimeoutError):
                    problem = str(e) or type(e).__name__
                elif tries == 1:  # later it says no more than that the time is up
                    problem = "too slow"
            else:
                self._failures = 0
                if answer.status_code == 200:
                    return Reply(content, _milliseconds(answer.headers.get("server-timing", "")))
                problem = f"HTTP {answer.status_code}{_reason(content)}"
                if answer.status_code not in AGAIN:  # it would say the same again
                    raise Unanswered(f"no answer from {self.url}: {problem}")
            first, most = BACKOFF
            self._not_before = time.monotonic() + min(most, first * 2**self._failures)
            self._failures = min(self._failures + 1, 16)

    def close(self) -> None:
        """Hang up; the next request connects again."""
        asyncio.run_coroutine_threadsafe(self._transport.aclose(), _loop()).result()

    def _once(self, path: str, payload: bytes, until: float) -> tuple[httpx.Response, bytes]:
        left = until - time.monotonic()
        headers = {
            "split-parts": self.parts,
            "checksum": checksum(payload),
            "deadline-ms": f"{1e3 * left:.1f}",
            "idempotency-key": f"{self._session}-{self._number}",
            "content-type": "application/octet-stream",
        }
        request = httpx.Request("POST", self.url + path, headers=headers, content=payload)
        asked = asyncio.run_coroutine_threadsafe(self._exchange(request), _loop())
        try:
            return asked.result(left)
        finally:
            asked.cancel()  # which hangs up: an answer that comes late meets nobody

    async def _exchange(self, request: httpx.Request) -> tuple[httpx.Response, bytes]:
        self.sent += _size(f"POST {request.url.raw_path.decode()} HTTP/1.1", request.headers) + len(request.content)
        answer = await self._transport.handle_async_request(request)
        self.received += _size(f"HTTP/1.1 {answer.status_code} {answer.reason_phrase}", answer.headers)
        content = bytearray()
        try:
            async for piece in answer.aiter_raw():
                content += piece
                if len(content) > self.max_bytes:
                    raise httpx.RemoteProtocolError(f"the answer is larger than {self.max_bytes:,} bytes")
        finally:
            self.received += len(content)
            await answer.aclose()
        if answer.status_code == 200 and answer.headers.get("checksum") != checksum(content):
            raise httpx.RemoteProtocolError("the answer was damaged on the way: its checksum is wrong")
        return answer, bytes(content)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """An event loop in a thread of its own: what is awaited there can be given up at any moment."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="links", daemon=True).start()
    return loop


def _size(first: str, headers: httpx.Headers) -> int:
    """Bytes of a head."""
    return len(first) + 4 + sum(len(name) + len(value) + 4 for name, value in headers.raw)


def _milliseconds(timing: str) -> float:
    found = re.fullmatch(r"tail;dur=(\d{1,9}(?:\.\d{1,9})?)", timing)
    return float(found[1]) if found else 0.0


def _reason(content: bytes) -> str:
    """What the server says, fit for a terminal; nothing if that is nothing."""
    said = ""
    with suppress(ValueError, RecursionError):
        value = json.loads(content)
        said = str(value.get("error", "")) if isinstance(value, dict) else ""
    return "".join(c if c.isprintable() else " " for c in f": {said[:200]}") if said else ""
