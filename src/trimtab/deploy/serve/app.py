"""The service of pictures: a page to drop one on, ``/predict``, ``/health`` and ``/metrics``."""

from __future__ import annotations

from functools import partial
from importlib.resources import files
from typing import Annotated

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel

from trimtab import __version__
from trimtab.deploy.serve.answers import Served
from trimtab.deploy.serve.service import Service, refusals
from trimtab.deploy.serve.uploads import FORM, Limits, prepare, read

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


_REFUSALS = {
    400: "no picture in the request",
    415: "not a picture",
    422: "a picture that cannot be decoded, or a parameter out of range",
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FILE = {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}, "required": ["file"]}
_BODY = {"required": True, "content": {FORM: {"schema": _FILE}, "application/octet-stream": _BINARY}}


def create_app(model: Served, limits: Limits | None = None) -> FastAPI:
    """The service for one model, as an ASGI application."""
    limits = limits or Limits()
    max_pixels, max_batch = min(limits.max_pixels, model.max_pixels), limits.max_batch if model.together else 1
    page = files(__package__).joinpath("page.html").read_text("utf-8")
    model.run(np.zeros((max_batch, *model.size), np.float32))  # memory is taken now, not at the first
    service = Service(model.run, limits, title="trimtab serve", max_batch=max_batch)

    @service.app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        """The page to drop a picture on."""
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @service.app.get("/health")
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

    @service.app.post(
        "/predict",
        response_model=_ANSWERS[model.task],
        responses=refusals(_REFUSALS),
        openapi_extra={"requestBody": _BODY},
    )
    async def predict(request: Request, top: Annotated[int, Query(ge=1, le=1000)] = 5) -> Response:
        """What is in a picture: send it as the file of a form, or its bytes as the body. `top` is for classifiers."""
        value = await service.work(
            partial(read, request, limits.max_bytes),
            partial(prepare, served=model, max_pixels=max_pixels),
            partial(model.answer, top=top),
        )
        return JSONResponse({"task": model.task} | value)

    return service.app
