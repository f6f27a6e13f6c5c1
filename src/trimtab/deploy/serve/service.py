"""What every service here has: places, time limits, batches, reasons for what is refused, and ``/metrics``."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client import generate_latest as as_text
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab import __version__
from trimtab.deploy.serve.answers import Prepared
from trimtab.deploy.serve.batching import Batcher, Busy
from trimtab.deploy.serve.uploads import Limits, Refused

DECODERS = min(4, os.cpu_count() or 1)
T = TypeVar("T")


class Problem(BaseModel):
    """Why a request was refused."""

    error: str


def refusals(more: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """What a path that calls `Service.work` may answer besides, for the OpenAPI document."""
    common = {
        408: "the request was not complete, or not answered, in time",
        413: "too many bytes or pixels",
        429: "too many requests at once",
    }
    return {status: {"model": Problem, "description": text} for status, text in sorted({**common, **more}.items())}


class Service:
    """A model behind HTTP: an application with ``/metrics``, and `work`, which handlers of other paths call.

    Args:
        run: inputs (B, ...) to outputs whose first dimension is B, see `Batcher`.
        title: of the OpenAPI document.
        max_batch: fewer than `Limits.max_batch`.
    """

    def __init__(
        self, run: Callable[[np.ndarray], np.ndarray], limits: Limits, *, title: str, max_batch: int | None = None
    ) -> None:
        self.run, self.limits, self.metrics = run, limits, Metrics()
        self.max_batch = max_batch or limits.max_batch
        self.app = FastAPI(title=title, version=__version__, lifespan=self._lifespan, docs_url=None, redoc_url=None)
        self.app.add_middleware(Counted, metrics=self.metrics)
        _explain_errors(self.app)

        @self.app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
        async def measured() -> Response:
            """Counts and times in the text format of Prometheus."""
            return Response(as_text(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self._batcher = Batcher(
            self.run,
            max_batch=self.max_batch,
            max_wait=self.limits.max_wait,
            places=self.limits.places,
            seen=self.metrics.batch,
        )
        self.metrics.inside.set_function(lambda: self._batcher.inside)
        with ThreadPoolExecutor(DECODERS, thread_name_prefix="decoder") as self._decoders:
            yield
        self._batcher.close()

    async def work(
        self,
        read: Callable[[], Awaitable[bytes]],
        prepare: Callable[[bytes], Prepared],
        finish: Callable[[Prepared, Any], T],
        *,
        seconds: float = float("inf"),
    ) -> T:
        """From the bytes of a request to its answer, inside the limits.

        Args:
            read: gets the bytes; called when there is a place.
            prepare: the bytes to what the model is fed, in a thread.
            finish: that and the model's output to the answer, in a thread.
            seconds: after which nobody waits for the answer. The model does not begin what comes too late.

        Raises:
            Refused: there is no place (429), or no time (408).
        """
        seconds = min(seconds, self.limits.seconds)
        try:
            with self._batcher.place():
                async with asyncio.timeout(seconds):
                    data = await read()
                    threads = partial(asyncio.get_running_loop().run_in_executor, self._decoders)
                    prepared = await threads(prepare, data)
                    output = await self._batcher(prepared.x)
                    return await threads(finish, prepared, output)
        except Busy as e:
            raise Refused(429, f"{e}; try again", {"Retry-After": "1"}) from e
        except TimeoutError as e:
            raise Refused(408, f"not complete within {seconds:g} seconds") from e


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        times = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
        common: dict[str, Any] = {"registry": self.registry, "namespace": "trimtab"}
        self.requests = Counter("requests", "Requests answered.", ["path", "status"], **common)
        self.seconds = Histogram("request_seconds", "From head to answer.", ["path"], buckets=times, **common)
        self.batches = Histogram("batch_size", "Inputs per batch.", buckets=(1, 2, 4, 8, 16, 32, 64), **common)
        self.model = Histogram("model_seconds", "Time of one batch in the model.", buckets=times, **common)
        self.inside = Gauge("requests_inside", "Requests being worked on.", **common)

    def batch(self, size: int, seconds: float) -> None:
        self.batches.observe(size)
        self.model.observe(seconds)

    def request(self, path: str, status: int, seconds: float) -> None:
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)


class Counted:
    """Notes the status and the time of every answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        known = any(scope["path"] == getattr(route, "path", None) for route in scope["app"].routes)
        try:
            await self.app(scope, receive, noted)
        finally:
            self.metrics.request(scope["path"] if known else "other", status, time.perf_counter() - start)


def _explain_errors(app: FastAPI) -> None:
    """Every refusal has the same form: {"error": reason}."""

    @app.exception_handler(Refused)
    async def refused(request: Request, e: Refused) -> JSONResponse:
        return JSONResponse({"error": e.reason}, e.status, e.headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, e: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(e.detail)}, e.status_code, e.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, e: RequestValidationError) -> JSONResponse:
        words = "; ".join(f"{error['loc'][-1]}: {error['msg']}" for error in e.errors())
        return JSONResponse({"error": words}, 422)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, e: ClientDisconnect) -> JSONResponse:
        return JSONResponse({"error": "the client went away"}, 400)  # for the counters; nobody reads it
