"""One image: opened safely, brought to uint8 (C, H, W), normalised.

Training, evaluation and `predict` all go through `to_pixels`, so that a deployed model sees the geometry it was
trained on: turn as EXIF says, cut the largest centred box of the target's aspect, resize it with an antialiased
bilinear filter. What cannot be decoded raises `Unreadable` with a reason in words, whatever the decoder raised.
"""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from trimtab.core.artifact import InputSpec

# Only plain raster decoders. Never EPS or other formats that start another program.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "MPO", "PPM", "ICO", "TGA", "JPEG2000", "AVIF")
ENDINGS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".mpo", ".ppm", ".pgm", ".pbm")
    + (".pnm", ".ico", ".tga", ".jp2", ".avif")
)
GREY_MODES = frozenset(("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"))
VOID = 255  # in masks and labels: the class of pixels that neither a loss nor a metric counts
MAX_PIXELS = 80_000_000  # per image, looked up in the header before any pixel is decoded
MAX_FILE_BYTES = 256 * 2**20


class Unreadable(Exception):
    """This one image cannot be used; the message says why."""


class TooManyPixels(Unreadable):
    """More than `MAX_PIXELS`, by its header."""


def open_image(source: str | os.PathLike[str] | bytes | Image.Image) -> Image.Image:
    """The image behind a path, encoded bytes or a PIL image; the header is read, the pixels are not yet decoded.

    Raises:
        Unreadable: when it is missing, empty, of an unknown format, or too large (`MAX_PIXELS`).
    """
    if isinstance(source, Image.Image):
        return source
    try:
        if isinstance(source, bytes):
            data = source
        else:
            if os.path.getsize(source) > MAX_FILE_BYTES:
                raise Unreadable(f"file larger than {MAX_FILE_BYTES >> 20} MiB")
            data = Path(source).read_bytes()
        if not data:
            raise Unreadable("empty file")
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Unreadable:
        raise
    except Image.DecompressionBombError as e:
        raise TooManyPixels(f"too many pixels (limit {MAX_PIXELS / 1e6:.0f} million)") from e
    except Exception as e:  # decoders raise nearly anything on hostile bytes
        raise Unreadable(_reason(e)) from e
    if image.width * image.height > MAX_PIXELS:
        raise TooManyPixels(f"{image.width}x{image.height} has too many pixels (limit {MAX_PIXELS / 1e6:.0f} million)")
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(H, W) once the EXIF orientation is applied; reads the header only (but a TIFF whole)."""
    turned = False
    if _has_exif(image):
        try:
            if image.format == "TIFF":  # Pillow turns it when it loads it, in some versions its size already before
                image.load()
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
        except Exception:  # damaged EXIF: take the pixels as they lie
            pass
    w, h = image.size
    return (w, h) if turned else (h, w)


def to_pixels(
    image: Image.Image, size: tuple[int, int], in_chans: int, *, draft: bool = True, stretch: bool = False
) -> np.ndarray:
    """Bring an open image to uint8 (C, H, W). draft: a JPEG may be opened smaller, which changes `image` itself.

    stretch: to the size as a whole, where nothing may be cut off.

    Transparent pixels are laid over white; 16-bit values are scaled by their full range; colours become grey by
    luma when in_chans is 1, grey is repeated when it is 3.

    Raises:
        Unreadable: when the pixels cannot be decoded.
    """
    height, width = size
    try:
        if draft and image.format in ("JPEG", "MPO"):
            # libjpeg itself can give a half, a quarter, an eighth: several times faster, as sharp when twice the need
            image.draft(None, _cover(image.width, image.height, 2 * max(height, width)))
        if _has_exif(image):
            image = _upright(image)
        image = _to_mode(image, "L" if in_chans == 1 else "RGB")
        w, h = image.size
        if (h, w) != (height, width):
            scale = min(w / width, h / height)
            cw, ch = (w, h) if stretch else (width * scale, height * scale)
            left, top = (w - cw) / 2, (h - ch) / 2
            image = image.resize(
                (width, height), Image.Resampling.BILINEAR, box=(left, top, left + cw, top + ch), reducing_gap=3.0
            )
        pixels = np.asarray(image, dtype=np.uint8)
    except Exception as e:  # decoders raise nearly anything on hostile bytes
        raise Unreadable(_reason(e)) from e
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def to_mask(image: Image.Image, size: tuple[int, int], of: tuple[int, int]) -> np.ndarray:
    """Bring an open mask to uint8 (1, H, W): class indices, the nearest one for each pixel.

    of: (H, W) of the picture that it belongs to, which it must have too.

    Raises:
        Unreadable: when it has another size, or colours instead of indices.
    """
    try:
        turned = _upright(image) if _has_exif(image) else image
        turned.load()
    except Exception as e:  # decoders raise nearly anything on hostile bytes
        raise Unreadable(_reason(e)) from e
    values = np.asarray(turned)
    if values.shape[:2] != tuple(of):
        raise Unreadable(f"the mask is {values.shape[1]}x{values.shape[0]}, its picture {of[1]}x{of[0]} pixels")
    if values.ndim == 3:
        if (values[..., :3] != values[..., :1]).any():
            raise Unreadable(f"a mask must hold class indices (grey or palette), got colours ({turned.mode})")
        values = values[..., 0]
    if values.dtype != np.uint8 and values.size and (values.min() < 0 or values.max() > 255):
        raise Unreadable(f"class indices must be 0 to 255, got {values.min()} to {values.max()}")
    small = Image.fromarray(values.astype(np.uint8)).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(small)[None]


def preprocess(image: Any, spec: InputSpec) -> np.ndarray:
    """What a model made for `spec` is fed: float32 (C, H, W), the same geometry and numbers as in training.

    Classifiers see the largest centred box; pictures that are segmented or searched for objects are stretched, so that
    nothing is cut off; pictures that are restored keep their size, and one channel of them is luma.

    Args:
        image: a path, encoded bytes, a PIL image, or a uint8 array (H, W) or (H, W, C).

    Raises:
        DataError: when the image cannot be read.

    >>> from trimtab.core.artifact import InputSpec
    >>> from PIL import Image
    >>> preprocess(Image.new("RGB", (640, 480), "white"), InputSpec((1, 8, 8), (0.5,), (0.5,))).max()
    np.float32(1.0)
    """
    from trimtab.core.errors import DataError

    channels, height, width = spec.size
    if channels not in (1, 3):
        raise ValueError(f"spec.size must have 1 or 3 channels, got {channels}")
    try:
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
        theirs = isinstance(image, Image.Image)
        opened = open_image(image)
        if spec.task == "restore":
            pixels = picture_pixels(opened, channels)
        else:
            stretch = spec.task in ("segment", "detect")
            pixels = to_pixels(opened, (height, width), channels, draft=not theirs, stretch=stretch)
    except Unreadable as e:
        name = "the image" if isinstance(image, (bytes, Image.Image)) else str(image)
        raise DataError(f"{name} cannot be read: {e}") from e
    scale, shift = affine(spec.mean, spec.std)
    return pixels.astype(np.float32) * scale[:, None, None] + shift[:, None, None]


def picture_pixels(image: Image.Image, in_chans: int) -> np.ndarray:
    """An open image at its own size, uint8 (C, H, W): RGB, or for one channel the studio luma Y of BT.601."""
    rgb = to_pixels(image, upright_size(image), 3, draft=False)
    if in_chans == 3:
        return rgb
    import torch

    from trimtab.nn.resize import rgb_to_y

    y = rgb_to_y(torch.from_numpy(rgb.copy())[None].float() / 255)
    return (y[0] * 255).round().to(torch.uint8).numpy()


def affine(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """`scale` and `shift` (C,) with (x / 255 - mean) / std == x * scale + shift."""
    m, s = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    return (1 / (255 * s)).astype(np.float32), (-m / s).astype(np.float32)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those that this build of Pillow knows."""
    Image.init()
    return tuple(f for f in _FORMATS if f in Image.OPEN)


def _cover(w: int, h: int, need: int) -> tuple[int, int]:
    scale = need / min(w, h)
    return max(1, round(w * scale)), max(1, round(h * scale))


def _has_exif(image: Image.Image) -> bool:
    info = image.info
    return image.format in ("TIFF", "MPO") or any(
        key in info for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
    )


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # a decoding error must not be taken for damaged EXIF
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF: take the pixels as they lie
        return image


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """8-bit grey or RGB from any mode."""
    image.load()
    if image.mode == mode:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float32)
        top = 1.0 if image.mode == "F" and values.size and values.max() <= 1 else 255.0
        if (values.size and values.max() > 255) or image.mode.startswith("I;16"):
            top = 65535.0
        values = np.nan_to_num(values) * (255.0 / top)
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image of a known format"
    text = str(error).strip().split("\n")[0][:120]
    return text or type(error).__name__
