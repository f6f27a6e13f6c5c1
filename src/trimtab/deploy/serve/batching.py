"""Requests that arrive together run together: one thread feeds the model, in batches that form by themselves.

While a batch runs, the next one gathers. An idle model waits for company only when somebody is on the way (has been
let in, but is still being read or decoded), and never longer than `max_wait`: a lone client pays nothing.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np


class Busy(Exception):
    """All places are taken."""


class Batcher:
    """Runs single inputs in batches, in a thread of its own.

    Args:
        run: inputs (B, ...) to outputs whose first dimension is B; called from one thread only.
        max_batch: inputs per call.
        max_wait: seconds that an idle model waits for requests that are on the way.
        places: requests that may be inside at once.
        seen: called after each batch with its size and the seconds it took.

    >>> batcher = Batcher(lambda x: 2 * x)
    >>> async def double(value):
    ...     with batcher.place():
    ...         return await batcher(np.array([value]))
    >>> asyncio.run(double(4))
    array([8])
    >>> batcher.close()
    """

    def __init__(
        self,
        run: Callable[[np.ndarray], np.ndarray],
        *,
        max_batch: int = 32,
        max_wait: float = 0.002,
        places: int = 64,
        seen: Callable[[int, float], Any] = lambda size, seconds: None,
    ) -> None:
        if max_batch < 1 or places < 1:
            raise ValueError(f"max_batch and places must be at least 1, got {max_batch} and {places}")
        if max_wait < 0:
            raise ValueError(f"max_wait must not be negative, got {max_wait}")
        self._run, self._seen = run, seen
        self.max_batch, self.max_wait, self.places = max_batch, max_wait, places
        self.inside = 0
        self._queue: queue.SimpleQueue[tuple[np.ndarray, Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place inside, for as long as the block lasts; taken before anything of the request is read.

        Raises:
            Busy: there is none.
        """
        if self.inside >= self.places:
            raise Busy(f"{self.inside} requests are being worked on")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def __call__(self, x: np.ndarray) -> Any:
        """The output of one input; whatever `run` raised is raised here."""
        result: Future[Any] = Future()
        self._queue.put((x, result))
        return await asyncio.wrap_future(result)

    def close(self) -> None:
        """Run what is waiting, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        last = False
        while not last:
            batch, last = self._gather()
            batch = [job for job in batch if job[1].set_running_or_notify_cancel()]  # nobody waits for the others
            if not batch:
                continue
            start = time.perf_counter()
            try:
                outputs = self._run(np.stack([x for x, _ in batch]))
            except BaseException as e:
                for _, result in batch:
                    result.set_exception(e)
                continue
            self._seen(len(batch), time.perf_counter() - start)
            for (_, result), output in zip(batch, outputs, strict=True):
                result.set_result(output)

    def _gather(self) -> tuple[list[tuple[np.ndarray, Future[Any]]], bool]:
        """The next batch, and whether it is the last one."""
        batch: list[tuple[np.ndarray, Future[Any]]] = []
        until = None
        while len(batch) < self.max_batch:
            now = time.monotonic()
            until = now + self.max_wait if batch and until is None else until
            try:
                if not batch:
                    job = self._queue.get()
                elif len(batch) < self.inside and until is not None and now < until:
                    job = self._queue.get(timeout=until - now)
                else:
                    job = self._queue.get_nowait()
            except queue.Empty:
                break
            if job is None:
                return batch, True
            batch.append(job)
        return batch, False
