"""Pictures from strangers: bytes are counted while they arrive, pixels before they are decoded.

Whatever is wrong with a request is `Refused` with a status of the 4xx kind and a reason in words.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect, Request

from trimtab.core.errors import DataError
from trimtab.data.images import TooManyPixels, Unreadable, open_image
from trimtab.deploy.serve.answers import Prepared, Served

RAW = ("image/", "application/octet-stream")
FORM = "multipart/form-data"


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        max_bytes: of a request's body.
        max_pixels: width times height of a picture, looked up before it is decoded.
        seconds: for a request, from its head to its answer; as long again for its head.
        places: requests worked on at once; more are sent away with 429.
        max_batch, max_wait: see `Batcher`.
    """

    max_bytes: int = 10 * 2**20
    max_pixels: int = 50_000_000
    seconds: float = 10.0
    places: int = 64
    max_batch: int = 32
    max_wait: float = 0.002

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "seconds", "places", "max_batch"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_wait < 0:
            raise ValueError(f"max_wait must not be negative, got {self.max_wait}")


class Refused(Exception):
    """A request that is turned down: the status and the reason of the answer."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, dict(headers or {})


async def read(request: Request, max_bytes: int) -> bytes:
    """The picture in a request: its body, or the first file of its form.

    Raises:
        Refused: nothing there (400), too many bytes (413), or not a picture's content type (415).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == FORM:
        data = await _from_form(request, max_bytes)
    elif kind.startswith(RAW):
        data = await body(request, max_bytes)
    else:
        raise Refused(415, f"send a form with a file ({FORM}) or the bytes of a picture (image/...), not {kind or '?'}")
    if not data:
        raise Refused(400, "the picture is empty")
    return data


async def body(request: Request, max_bytes: int) -> bytes:
    """All of a request's body.

    Raises:
        Refused: too many bytes (413).
    """
    return b"".join([chunk async for chunk in _counted(request, max_bytes)])


def prepare(data: bytes, served: Served, max_pixels: int) -> Prepared:
    """What the model is fed.

    Raises:
        Refused: too many pixels (413), no picture (415), or one that cannot be decoded (422).
    """
    try:
        image = open_image(data)
        if image.width * image.height > max_pixels:
            raise TooManyPixels(
                f"{image.width}x{image.height} has too many pixels (limit {max_pixels / 1e6:g} million)"
            )
    except TooManyPixels as e:
        raise Refused(413, str(e)) from e
    except Unreadable as e:
        raise Refused(415, str(e)) from e
    try:
        return served.prepare(data)
    except DataError as e:
        raise Refused(422, str(e)) from e


async def _counted(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body, until it is too long: by what its head says, or by what came."""
    reason = f"the body is larger than {max_bytes:,} bytes"
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said[:20]) > max_bytes:
        raise Refused(413, reason)
    came = 0
    async for chunk in request.stream():
        came += len(chunk)
        if came > max_bytes:
            raise Refused(413, reason)
        yield chunk


async def _from_form(request: Request, max_bytes: int) -> bytes:
    async with aclosing(_counted(request, max_bytes)) as stream:
        parser = MultiPartParser(request.headers, stream, max_files=1, max_fields=16)
        try:
            form = await parser.parse()
        except (Refused, ClientDisconnect):
            raise
        except Exception as e:  # parsers differ in what they raise on hostile forms
            raise Refused(400, f"the form cannot be read: {str(e) or type(e).__name__}") from e
    try:
        file = next((value for _, value in form.multi_items() if isinstance(value, UploadFile)), None)
        if file is None:
            raise Refused(400, "the form has no file")
        return await file.read()
    finally:
        await form.close()
