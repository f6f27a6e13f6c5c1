"""The server's part of a split model at work, over HTTP: payloads of the range coder in, logits out.

A request says which parts its payload was made with, its checksum, for how many milliseconds the answer is good, and a
key: when the same key comes again, so does the answer that was given before. The rest is what every service has
(`deploy.serve.service`).
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import FastAPI, Header, Request, Response
from pydantic import BaseModel

from trimtab import __version__
from trimtab.core.artifact import read_manifest
from trimtab.core.errors import ArtifactError
from trimtab.core.spec import InputSpec
from trimtab.deploy.serve.answers import Prepared
from trimtab.deploy.serve.server import run
from trimtab.deploy.serve.service import Service, refusals
from trimtab.deploy.serve.uploads import Limits, Refused, body
from trimtab.deploy.split.codec import LONGEST, Codec, CodecError, checksum
from trimtab.deploy.split.parts import MANIFEST, SERVER, Parts, Rest, bottleneck_of, read_parts
from trimtab.models import load

REMEMBERED = 256  # answers kept for requests that come again
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_REFUSALS = {
    400: "the payload was damaged on the way: send it again",
    409: "the payload is for other parts",
    422: "a payload that cannot be decoded, or a header out of range",
}


class Health(BaseModel):
    """What is being served."""

    status: str
    parts: str
    input: list[int]
    latent: list[int]
    labels: int
    max_bytes: int
    version: str


def create_app(folder: str | Path, limits: Limits | None = None) -> FastAPI:
    """The service for the parts in a folder that `export` wrote, as an ASGI application.

    Raises:
        ArtifactError: the folder is damaged.
    """
    limits = limits or Limits()
    parts, codec, rest = _opened(Path(folder))
    medians = np.asarray(codec.medians, np.float32)[:, None, None]
    max_bytes = min(limits.max_bytes, LONGEST * (math.prod(parts.latent) + 1))
    given: OrderedDict[str, bytes] = OrderedDict()

    @torch.inference_mode()
    def logits_of(symbols: np.ndarray) -> np.ndarray:
        return rest(torch.from_numpy(symbols.astype(np.float32) + medians)).float().numpy()

    zeros = np.zeros(parts.latent, np.int32)  # what is made at first use is made now
    logits_of(codec.decode(codec.encode(zeros), parts.latent[1:])[None])
    service = Service(logits_of, limits, title="trimtab serve")

    @service.app.get("/health")
    async def health() -> Health:
        """That the service answers, and what it serves."""
        return Health(
            status="ok",
            parts=parts.id,
            input=parts.spec["size"],
            latent=list(parts.latent),
            labels=len(parts.labels),
            max_bytes=max_bytes,
            version=__version__,
        )

    @service.app.post(
        "/logits",
        response_class=Response,
        responses={200: {"content": {"application/octet-stream": _BYTES}}, **refusals(_REFUSALS)},
        openapi_extra={"requestBody": {"required": True, "content": {"application/octet-stream": _BYTES}}},
    )
    async def logits(
        request: Request,
        split_parts: Annotated[str, Header()],
        checksum_: Annotated[str, Header(alias="checksum")],
        deadline_ms: Annotated[float, Header(ge=0, allow_inf_nan=False)],
        idempotency_key: Annotated[str, Header(min_length=1, max_length=64)],
        echo: bool = False,
    ) -> Response:
        """Logits (K,) as little-endian float32; with `echo` the whole numbers that were decoded, as int32."""
        start = time.perf_counter()
        if split_parts != parts.id:
            raise Refused(409, f"the payload is for other parts than {parts.id}, which are served here")
        if echo or idempotency_key not in given:
            answer = await service.work(
                partial(body, request, max_bytes),
                partial(_decoded, codec=codec, shape=parts.latent, checksum_=checksum_),
                lambda prepared, out: prepared.x.astype("<i4").tobytes() if echo else out.astype("<f4").tobytes(),
                seconds=deadline_ms / 1e3,
            )
            if not echo:
                given[idempotency_key] = answer
                if len(given) > REMEMBERED:
                    given.popitem(last=False)
        else:
            answer = given[idempotency_key]
        took = f"tail;dur={1e3 * (time.perf_counter() - start):.1f}"
        headers = {"checksum": checksum(answer), "server-timing": took}
        return Response(answer, media_type="application/octet-stream", headers=headers)

    return service.app


def _opened(folder: Path) -> tuple[Parts, Codec, Rest]:
    parts, codec = read_parts(folder)
    if read_manifest(folder / SERVER).sha256 != parts.model:
        raise ArtifactError(f"{folder / SERVER} is not the model that {MANIFEST} was written with")
    net = load(folder / SERVER)
    name, bottleneck = bottleneck_of(net)
    return parts, codec, Rest(net, name, InputSpec.from_json(parts.spec).size, bottleneck.decoder).eval()


def _decoded(payload: bytes, *, codec: Codec, shape: tuple[int, int, int], checksum_: str) -> Prepared:
    if checksum(payload) != checksum_:
        raise Refused(400, "the payload was damaged on the way: its checksum is wrong")
    try:
        return Prepared(codec.decode(payload, shape[1:]))
    except CodecError as e:
        raise Refused(422, str(e)) from e


def serve_tail(
    folder: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 9000,
    limits: Limits | None = None,
    started: Callable[[str], Any] = lambda address: None,
) -> None:
    """Answer devices until SIGINT (Ctrl-C) or SIGTERM; requests that are being worked on are finished.

    Args:
        folder: what `export` wrote.
        port: 0 = any free one.
        started: called with the address, such as ``http://127.0.0.1:9000``, once connections are taken.

    Raises:
        ArtifactError: nothing that can be served.
        OSError: the address cannot be listened on.
    """
    limits = limits or Limits()
    run(create_app(folder, limits), limits, host=host, port=port, started=started)
