"""The device's side: encode, ask, and have an answer in time whatever the other side does."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.core.spec import InputSpec
from trimtab.deploy.split.link import Link, Unanswered
from trimtab.deploy.split.parts import read_encoder, read_parts

Fallback = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Answer:
    """What is in an image, and where that was found out.

    Attributes:
        label, index, confidence: the best class. logits (K,): of all classes.
        origin: "server", "fallback" (computed here), or "last" (the server's last answer, `age` seconds old).
        reason: why it is not the server's; empty when it is.
        payload: bytes of the code; sent, received: bytes of requests and answers, heads and repeats included.
        encode_ms, server_ms, total_ms: on the device, in the server, and from the call to the answer.
    """

    label: str
    index: int
    confidence: float
    logits: np.ndarray
    origin: str
    reason: str = ""
    age: float = 0.0
    payload: int = 0
    sent: int = 0
    received: int = 0
    encode_ms: float = 0.0
    server_ms: float = 0.0
    total_ms: float = 0.0


class Device:
    """Asks a server what is in images: ``device(image)``. For one thread; see `Newest` for a stream.

    Args:
        folder: what `export` wrote; ``server/`` may be missing.
        url: of the server, such as ``http://127.0.0.1:9000``.
        deadline: seconds for an answer, encoding included.
        fallback: what to do without one: None = raise; "last" = give the last answer again, with its age; or a function
            from the prepared image (C, H, W) to logits (K,).

    Raises:
        ArtifactError: the folder is damaged, or none.
    """

    def __init__(
        self,
        folder: str | Path,
        url: str,
        *,
        deadline: float = 0.5,
        fallback: str | Fallback | None = None,
    ) -> None:
        if not deadline > 0:
            raise ValueError(f"deadline must be positive seconds, got {deadline}")
        if not (fallback is None or fallback == "last" or callable(fallback)):
            raise ValueError(f"fallback must be None, 'last' or a function, got {fallback!r}")
        self.parts, self.codec = read_parts(folder)
        self.encoder = read_encoder(folder, self.parts)
        self.spec = InputSpec.from_json(self.parts.spec)
        self.deadline, self.fallback = deadline, fallback
        self._medians = torch.tensor(self.codec.medians)[:, None, None]
        most = 4 * max(math.prod(self.parts.latent), len(self.parts.labels))
        self._link = Link(url, self.parts.id, max(most, 2**16))
        self._last: tuple[float, np.ndarray] | None = None

    def __call__(self, image: Any) -> Answer:
        """The answer for an image: a path, a PIL image, or a uint8 array (H, W) or (H, W, C).

        Raises:
            DataError: the image cannot be read.
            Unanswered: no answer in time, and nothing to fall back on.
        """
        from trimtab.data import preprocess

        return self.ask(preprocess(image, self.spec))

    def ask(self, x: np.ndarray) -> Answer:
        """The answer for a prepared image, float32 (C, H, W)."""
        start = time.monotonic()
        payload = self.codec.encode(self.symbols(x))
        encoded = 1e3 * (time.monotonic() - start)
        reason, server_ms = "", 0.0
        try:
            answer = self._link.ask("/logits", payload, start + self.deadline)
            logits = np.frombuffer(answer.content, "<f4") if len(answer.content) % 4 == 0 else np.empty(0)
            if logits.shape != (len(self.parts.labels),) or not np.isfinite(logits).all():
                self.close()
                raise Unanswered("the server's answer is no list of finite logits")
            origin, server_ms, age = "server", answer.ms, 0.0
            self._last = (time.monotonic(), logits)
        except Unanswered as e:
            origin, logits, age = self._instead(x, e)
            reason = str(e)
        return replace(
            self._told(logits, origin),
            reason=reason,
            age=age,
            payload=len(payload),
            sent=self._link.sent,
            received=self._link.received,
            encode_ms=encoded,
            server_ms=server_ms,
            total_ms=1e3 * (time.monotonic() - start),
        )

    @torch.inference_mode()
    def symbols(self, x: np.ndarray) -> np.ndarray:
        """The whole numbers (C, h, w) that stand for a prepared image."""
        z = self.encoder(torch.from_numpy(np.ascontiguousarray(x, np.float32))[None])[0]
        return torch.round(z - self._medians).numpy()

    def echo(self, x: np.ndarray) -> np.ndarray:
        """The numbers (C, h, w) that the server decodes of a prepared image: to see that they are those of `symbols`.

        Raises:
            Unanswered: it does not say.
        """
        payload = self.codec.encode(self.symbols(x))
        answer = self._link.ask("/logits?echo=true", payload, time.monotonic() + self.deadline)
        return np.frombuffer(answer.content, "<i4").reshape(self.parts.latent)

    def close(self) -> None:
        """Hang up; the next image connects again."""
        self._link.close()

    def _instead(self, x: np.ndarray, problem: Unanswered) -> tuple[str, np.ndarray, float]:
        if callable(self.fallback):
            return "fallback", np.asarray(self.fallback(x), np.float32).reshape(-1), 0.0
        if self.fallback == "last" and self._last is not None:
            then, logits = self._last
            return "last", logits, time.monotonic() - then
        raise problem

    def _told(self, logits: np.ndarray, origin: str) -> Answer:
        e = np.exp(logits.astype(np.float64) - logits.max())
        best = int(e.argmax())
        labels = self.parts.labels
        name = labels[best] if best < len(labels) else str(best)
        return Answer(name, best, float(e[best] / e.sum()), logits, origin)


class Superseded(Exception):
    """A newer image came before this one was begun."""


class Newest:
    """A stream of images through one device: one is under way, the newest waits, the others are told so.

    ``offer(image)`` never waits; the future it gives ends with an `Answer`, or with what `Device` raised, or with
    `Superseded`.
    """

    def __init__(self, device: Callable[[Any], Answer]) -> None:
        self._device = device
        self._waiting: tuple[Any, Future[Answer]] | None = None
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="newest", daemon=True)
        self._thread.start()

    def offer(self, image: Any) -> Future[Answer]:
        """Take an image in the place of the one that waits."""
        result: Future[Answer] = Future()
        with self._change:
            if self._closed:
                raise ValueError("the stream is closed")
            old, self._waiting = self._waiting, (image, result)
            self._change.notify()
        if old is not None:
            old[1].set_exception(Superseded("a newer image came"))
        return result

    def close(self) -> None:
        """Finish what was offered."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting is not None or self._closed)
                if self._waiting is None:
                    return
                (image, result), self._waiting = self._waiting, None
            try:
                result.set_result(self._device(image))
            except BaseException as e:
                result.set_exception(e)
