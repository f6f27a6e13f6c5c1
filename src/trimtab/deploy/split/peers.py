"""The two ends of a connection: `Link` on the device asks, `Tail` on the server answers.

A request says how many milliseconds its answer is good for. The server answers "late" without working when they have
passed, gives the answer it gave before when the same request comes again, and hangs up on whoever sends no frames.
The device has one request under way, waits no longer than its deadline, tries again while there is time, and leaves a
server alone for a while after it has failed: 50 ms, twice as long each time, 5 s at most.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from trimtab.core.errors import TrimtabError
from trimtab.deploy.split import frame
from trimtab.deploy.split.codec import CodecError
from trimtab.deploy.split.frame import Frame, FrameError

log = logging.getLogger(__name__)

VERSION = 1
PATIENCE = 5.0  # seconds for a frame that has begun, a greeting, or a reader that does not read
IDLE = 120.0  # seconds without a frame after which a connection is closed
CONNECTIONS = 64
REMEMBERED = 256  # answers kept for requests that come again
BACKOFF = (0.05, 5.0)  # seconds after the first failure, and at most


class Unanswered(TrimtabError, ConnectionError):
    """No answer within the deadline; the message says why."""


class Tail:
    """Answers requests, one at a time.

    Args:
        work: header and payload to the answer's payload; a `CodecError` or `FrameError` is the sender's fault.
        hello: what both sides must agree on, such as the codec's id.
    """

    def __init__(self, work: Callable[[dict[str, Any], bytes], bytes], hello: dict[str, str]) -> None:
        self.work, self.hello = work, {"v": VERSION, **hello}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tail")
        self._given: OrderedDict[tuple[str, int], Frame] = OrderedDict()
        self._open: set[asyncio.Task[None]] = set()
        self._busy = 0

    async def start(self, listening: socket.socket) -> asyncio.Server:
        """Take connections."""
        return await asyncio.start_server(self._connected, sock=listening)

    async def stop(self) -> None:
        """Finish what has begun, then hang up on everybody."""
        while self._busy:
            await asyncio.sleep(0.01)
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        self._worker.shutdown()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            if len(self._open) <= CONNECTIONS:
                await self._converse(reader, writer)
        except FrameError as e:
            with suppress(OSError, TimeoutError):
                await _say(writer, Frame({"status": "corrupt", "reason": str(e)}))
        except (EOFError, OSError, TimeoutError, asyncio.CancelledError):
            pass  # gone, or too slow
        finally:
            self._open.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(PATIENCE):
            theirs = (await frame.read(reader)).header
        differ = [k for k, v in self.hello.items() if theirs.get(k) != v]
        status = {"status": "mismatch", "reason": f"another {', '.join(differ)}"} if differ else {"status": "ok"}
        await _say(writer, Frame({**self.hello, **status}))
        if differ:
            return
        session = str(theirs.get("session"))[:64]
        while True:
            async with asyncio.timeout(IDLE):
                first = await reader.readexactly(8)
            begun, since = frame.start(first), time.monotonic()
            async with asyncio.timeout(PATIENCE):
                request = frame.parse(begun, await reader.readexactly(frame.length_of(begun)))
            self._busy += 1
            try:
                await _say(writer, await self._answer(session, request, since))
            finally:
                self._busy -= 1

    async def _answer(self, session: str, request: Frame, since: float) -> Frame:
        number, budget = request.header.get("id"), request.header.get("ms")
        if not isinstance(number, int) or not isinstance(budget, int | float):
            raise FrameError("a request needs a number (id) and a time (ms)")
        key = (session, number)
        if key in self._given:
            return self._given[key]

        def run() -> Frame:
            start = time.monotonic()
            if 1e3 * (start - since) >= budget:
                return Frame({"id": number, "status": "late"})
            try:
                payload = self.work(request.header, request.payload)
            except (CodecError, FrameError) as e:
                return Frame({"id": number, "status": "corrupt", "reason": str(e)})
            except Exception as e:
                log.exception("a request failed")
                return Frame({"id": number, "status": "error", "reason": f"{type(e).__name__}: {e}"[:500]})
            return Frame({"id": number, "status": "ok", "ms": 1e3 * (time.monotonic() - start)}, payload)

        answer = await asyncio.get_running_loop().run_in_executor(self._worker, run)
        if answer.header["status"] == "ok":
            self._given[key] = answer
            if len(self._given) > REMEMBERED:
                self._given.popitem(last=False)
        return answer


async def _say(writer: asyncio.StreamWriter, said: Frame) -> None:
    writer.write(frame.pack(said))
    async with asyncio.timeout(PATIENCE):
        await writer.drain()


class Link:
    """A connection to a `Tail` that is made, lost and made again; for one thread.

    Attributes:
        sent, received: bytes of the last `ask`, frames and all, every attempt included.
    """

    def __init__(self, address: tuple[str, int], hello: dict[str, str], session: str) -> None:
        self.address, self.hello, self.session = address, {"v": VERSION, **hello}, session
        self.sent = self.received = 0
        self._socket: socket.socket | None = None
        self._number = 0
        self._failures = 0
        self._not_before = 0.0

    def ask(self, header: dict[str, Any], payload: bytes, until: float) -> Frame:
        """The answer to a request, before the moment `until` of the monotonic clock.

        Raises:
            Unanswered: there is none.
        """
        self._number += 1
        self.sent = self.received = 0
        where, tries = f"{self.address[0]}:{self.address[1]}", 0
        problem = "it failed a moment ago" if self._failures else "the deadline has passed"
        while True:
            wait = self._not_before - time.monotonic()
            if time.monotonic() + max(0.0, wait) >= until:
                raise Unanswered(f"no answer from {where} in time: {problem} (attempts: {tries})")
            time.sleep(max(0.0, wait))
            tries += 1
            try:
                answer = self._once(header, payload, until)
            except (OSError, FrameError) as e:
                if not isinstance(e, TimeoutError):
                    problem = str(e) or type(e).__name__
                elif tries == 1:  # later it says no more than that the time is up
                    problem = "too slow"
                self._failed()
                continue
            self._failures = 0
            status = answer.header.get("status")
            if status == "ok":
                return answer
            problem = f"the server says {status!r:.40}: {str(answer.header.get('reason', ''))[:200]}"
            if status != "corrupt":  # then it was the way there; all else stays as it is
                raise Unanswered(f"no answer from {where}: {problem}")
            self._failed()

    def close(self) -> None:
        """Hang up; the next request connects again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _once(self, header: dict[str, Any], payload: bytes, until: float) -> Frame:
        if self._socket is None:
            greeted = self._connect(until)
            if greeted.header.get("status") != "ok":
                self.close()
                return greeted
        assert self._socket is not None
        left = round(1e3 * (until - time.monotonic()), 1)
        self.sent += frame.send(self._socket, Frame({"id": self._number, "ms": left, **header}, payload), until)
        answer = self._receive(until)
        if answer.header.get("status") != "corrupt" and answer.header.get("id") != self._number:
            raise FrameError("the peer answers what was not asked")
        return answer

    def _connect(self, until: float) -> Frame:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time is left")
        self._socket = socket.create_connection(self.address, timeout=left)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent += frame.send(self._socket, Frame({**self.hello, "session": self.session}), until)
        return self._receive(until)

    def _receive(self, until: float) -> Frame:
        assert self._socket is not None
        answer = frame.receive(self._socket, until)
        self.received += len(frame.pack(answer))
        return answer

    def _failed(self) -> None:
        self.close()  # an answer that comes late meets nobody
        first, most = BACKOFF
        self._not_before = time.monotonic() + min(most, first * 2**self._failures)
        self._failures = min(self._failures + 1, 16)
