"""From a path to a listening process."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from trimtab.core.artifact import read_manifest
from trimtab.core.errors import ArtifactError
from trimtab.core.spec import InputSpec
from trimtab.deploy.runtime import OnnxModel, read_notes
from trimtab.deploy.serve.answers import Classifier, Looker, Served
from trimtab.deploy.serve.app import create_app
from trimtab.deploy.serve.uploads import Limits
from trimtab.deploy.sockets import listen, name_of
from trimtab.deploy.vision import OnnxVision

MAX_CONNECTIONS = 512  # open at once, idle ones too; what comes on top is closed at once


def serve(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    threads: int = 1,
    limits: Limits | None = None,
    started: Callable[[str], Any] = lambda address: None,
) -> None:
    """Serve a model until SIGINT (Ctrl-C) or SIGTERM; requests that are being worked on are finished.

    Args:
        path: an ``.onnx`` file that trimtab exported, or an artifact folder, which is exported first.
        host: the address to listen on; other machines can only reach it when it is not a loopback one.
        port: 0 = any free one.
        threads: of one call of the model.
        started: called with the address, such as ``http://127.0.0.1:8000``, once connections are taken.

    Raises:
        ArtifactError: nothing that can be served.
        OSError: the address cannot be listened on.
    """
    limits = limits or Limits()
    run(create_app(opened(path, threads=threads), limits), limits, host=host, port=port, started=started)


def run(app: FastAPI, limits: Limits, *, host: str, port: int, started: Callable[[str], Any]) -> None:
    """Listen, and let an application answer until SIGINT or SIGTERM; the arguments are those of `serve`.

    Raises:
        OSError: the address cannot be listened on.
    """
    listening = listen(host, port)
    config = uvicorn.Config(
        app,
        http=_patient(limits.seconds),
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(limits.seconds) + 1,
    )
    started(f"http://{name_of(host, listening)}")
    _Server(config).run(sockets=[listening])


def opened(path: str | Path, *, threads: int = 1) -> Served:
    """The model in a file, or in an artifact; nothing is left on disk.

    Raises:
        ArtifactError: it is neither, or says nothing about its input.
    """
    if not os.path.isdir(path):
        spec = read_notes(path)[0]
        _check_pictures(path, spec)
        if spec.task == "classify":
            return Classifier(OnnxModel(path, threads=threads), Path(path).name)
        return Looker(OnnxVision(path, threads=threads), Path(path).name)
    from trimtab.deploy.to_onnx import export
    from trimtab.models import load

    manifest = read_manifest(path)
    if manifest.input_spec is None:
        raise ArtifactError(f"{path} does not say what input it takes, so pictures cannot be prepared for it")
    _check_pictures(path, manifest.input_spec)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{Path(path).resolve().name}.onnx"
        export(load(path), file, spec=manifest.input_spec, labels=manifest.labels)
        return opened(file, threads=threads)


def _check_pictures(path: str | Path, spec: InputSpec) -> None:
    if len(spec.size) != 3:
        raise ArtifactError(
            f"{path} is for volumes {spec.size}, and the service takes pictures; use trimtab predict {path} volume.npz"
        )


class _Server(uvicorn.Server):
    """uvicorn's, but a signal is how it is meant to end: nothing is raised, nothing is logged, a second one hurries."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        logging.getLogger("uvicorn.error").disabled = self.should_exit
        super().handle_exit(sig, frame)


def _patient(seconds: float) -> type[H11Protocol]:
    """A protocol that waits so long for the head of a request, and no longer."""
    return type("Patient", (_Patient,), {"seconds": seconds})


class _Patient(H11Protocol):
    """uvicorn's HTTP/1.1 without patience for clients that owe it bytes: a head, or a body that was refused."""

    seconds: float
    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(429, "too many connections")
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _watch(self) -> None:
        """The clock runs while a client owes us bytes and no request is being worked on."""
        if self.transport.is_closing() or (self.cycle is not None and not self.cycle.response_complete):
            self._stop()
        elif self._clock is None:
            self._clock = self.loop.call_later(self.seconds, self._give_up)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _give_up(self) -> None:
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(408, f"no complete request within {self.seconds:g} seconds")
        self.transport.close()

    def _refuse(self, status: int, reason: str) -> None:
        """Answer without the application, and hang up."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps({"error": reason}).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
