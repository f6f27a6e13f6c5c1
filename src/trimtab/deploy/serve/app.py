"""The service: a page to drop a picture on, ``/predict``, ``/health`` and ``/metrics``."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client import generate_latest as as_text
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab import __version__
from trimtab.deploy.serve.answers import Served
from trimtab.deploy.serve.batching import Batcher, Busy
from trimtab.deploy.serve.uploads import FORM, Limits, Refused, prepare, read

DECODERS = min(4, os.cpu_count() or 1)
PATHS = ("/", "/predict", "/health", "/metrics", "/openapi.json")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class Guess(BaseModel):
    """A class and the model's confidence in it, 0 to 1."""

    label: str
    confidence: float


class Classified(BaseModel):
    """What the model sees: the best class, and the best few."""

    task: str
    label: str
    confidence: float
    top: list[Guess]


class Share(BaseModel):
    """A class and its share of the picture, 0 to 1."""

    label: str
    share: float


class Segmented(BaseModel):
    """The class of every pixel: `mask` is a PNG in base64 whose pixels are positions in the labels."""

    task: str
    classes: list[Share]
    mask: str


class Thing(BaseModel):
    """An object: its class, the confidence, and x1, y1, x2, y2 in pixels of the picture."""

    label: str
    confidence: float
    box: list[float]


class Detected(BaseModel):
    """The objects in the picture, the surest first."""

    task: str
    objects: list[Thing]


class Restored(BaseModel):
    """The restored picture, a PNG in base64, and its width and height."""

    task: str
    size: list[int]
    picture: str


_ANSWERS: dict[str, type[BaseModel]] = {
    "classify": Classified, "segment": Segmented, "detect": Detected, "restore": Restored,
}  # fmt: skip


class Health(BaseModel):
    """What is being served."""

    status: str
    model: str
    task: str
    input: list[int]
    labels: int
    max_bytes: int
    max_pixels: int
    version: str


class Problem(BaseModel):
    """Why a request was refused."""

    error: str


_REFUSALS = {
    400: "no picture in the request",
    408: "the request was not complete, or not answered, in time",
    413: "too many bytes or pixels",
    415: "not a picture",
    422: "a picture that cannot be decoded, or a parameter out of range",
    429: "too many requests at once",
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FILE = {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}, "required": ["file"]}
_BODY = {"required": True, "content": {FORM: {"schema": _FILE}, "application/octet-stream": _BINARY}}


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        times = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
        common: dict[str, Any] = {"registry": self.registry, "namespace": "trimtab"}
        self.requests = Counter("requests", "Requests answered.", ["path", "status"], **common)
        self.seconds = Histogram("request_seconds", "From head to answer.", ["path"], buckets=times, **common)
        self.batches = Histogram("batch_size", "Pictures per batch.", buckets=(1, 2, 4, 8, 16, 32, 64), **common)
        self.model = Histogram("model_seconds", "Time of one batch in the model.", buckets=times, **common)
        self.inside = Gauge("requests_inside", "Pictures being worked on.", **common)

    def batch(self, size: int, seconds: float) -> None:
        self.batches.observe(size)
        self.model.observe(seconds)

    def request(self, path: str, status: int, seconds: float) -> None:
        known = path if path in PATHS else "other"
        self.requests.labels(known, str(status)).inc()
        self.seconds.labels(known).observe(seconds)


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

        try:
            await self.app(scope, receive, noted)
        finally:
            self.metrics.request(scope["path"], status, time.perf_counter() - start)


def create_app(model: Served, limits: Limits | None = None) -> FastAPI:
    """The service for one model, as an ASGI application."""
    limits, metrics = limits or Limits(), Metrics()
    max_pixels, max_batch = min(limits.max_pixels, model.max_pixels), limits.max_batch if model.together else 1
    page = files(__package__).joinpath("page.html").read_text("utf-8")
    model.run(np.zeros((max_batch, *model.size), np.float32))  # memory is taken now, not at the first

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.batcher = Batcher(
            model.run,
            max_batch=max_batch,
            max_wait=limits.max_wait,
            places=limits.places,
            seen=metrics.batch,
        )
        metrics.inside.set_function(lambda: app.state.batcher.inside)
        with ThreadPoolExecutor(DECODERS, thread_name_prefix="decoder") as app.state.decoders:
            yield
        app.state.batcher.close()

    app = FastAPI(title="trimtab serve", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Counted, metrics=metrics)
    _explain_errors(app)

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        """The page to drop a picture on."""
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @app.get("/health")
    async def health() -> Health:
        """That the service answers, and what it serves."""
        return Health(
            status="ok",
            model=model.name,
            task=model.task,
            input=list(model.size),
            labels=len(model.labels),
            max_bytes=limits.max_bytes,
            max_pixels=max_pixels,
            version=__version__,
        )

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def measured() -> Response:
        """Counts and times in the text format of Prometheus."""
        return Response(as_text(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post(
        "/predict",
        response_model=_ANSWERS[model.task],
        responses={status: {"model": Problem, "description": text} for status, text in _REFUSALS.items()},
        openapi_extra={"requestBody": _BODY},
    )
    async def predict(request: Request, top: Annotated[int, Query(ge=1, le=1000)] = 5) -> Response:
        """What is in a picture: send it as the file of a form, or its bytes as the body. `top` is for classifiers."""
        batcher: Batcher = app.state.batcher
        try:
            with batcher.place():
                async with asyncio.timeout(limits.seconds):
                    data = await read(request, limits.max_bytes)
                    threads = partial(asyncio.get_running_loop().run_in_executor, app.state.decoders)
                    prepared = await threads(prepare, data, model, max_pixels)
                    output = await batcher(prepared.x)
                    value = await threads(model.answer, prepared, output, top)
        except Busy as e:
            raise Refused(429, f"{e}; try again", {"Retry-After": "1"}) from e
        except TimeoutError as e:
            raise Refused(408, f"not complete within {limits.seconds:g} seconds") from e
        return JSONResponse({"task": model.task} | value)

    return app


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
