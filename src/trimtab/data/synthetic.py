"""Made images, for tests, examples and machines without data. Deterministic: the same arguments give the same bytes."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star", "bar", "crescent", "arrow", "hourglass")
_SCALE = 4  # drawn this much larger, then reduced: smooth edges


def shapes(
    n: int = 500,
    *,
    classes: int = 4,
    size: int | tuple[int, int] = 32,
    channels: int = 3,
    noise: float = 0.05,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Coloured shapes on a coloured ground; the class is the shape, everything else is chance.

    Args:
        n: images; classes take turns, so they are balanced.
        classes: 2 to 10, the first of `SHAPES`.
        size: pixels, or (H, W), at least 8.
        noise: standard deviation of pixel noise, in 0..1 units.

    Returns:
        images uint8 (n, channels, H, W), labels int64 (n,), class names.

    >>> images, labels, names = shapes(6, classes=3, size=16)
    >>> images.shape, labels.tolist(), names
    ((6, 3, 16, 16), [0, 1, 2, 0, 1, 2], ['circle', 'square', 'triangle'])
    """
    height, width = (size, size) if isinstance(size, int) else size
    if not 2 <= classes <= len(SHAPES):
        raise ValueError(f"classes must be 2 to {len(SHAPES)}, got {classes}")
    if n < classes:
        raise ValueError(f"n must be at least the number of classes ({classes}), got {n}")
    if min(height, width) < 8 or max(height, width) > 4096:
        raise ValueError(f"size must be 8 to 4096 pixels, got {size}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise must be 0 to 1, got {noise}")
    labels = np.arange(n, dtype=np.int64) % classes
    images = np.empty((n, channels, height, width), np.uint8)
    for i in range(n):
        rng = np.random.default_rng([seed, i, 71])
        picture = _draw(SHAPES[labels[i]], height, width, rng)
        if channels == 1:
            picture = picture.convert("L")
        pixels = np.asarray(picture, np.float32).reshape(height, width, channels).transpose(2, 0, 1)
        pixels = pixels + rng.standard_normal(pixels.shape, np.float32) * (255 * noise)
        images[i] = np.clip(np.rint(pixels), 0, 255)
    return images, labels, list(SHAPES[:classes])


def _draw(shape: str, height: int, width: int, rng: np.random.Generator) -> Image.Image:
    ground = rng.integers(0, 256, 3)
    ink = rng.integers(0, 256, 3)
    while abs(int(_luma(ink)) - int(_luma(ground))) < 60:  # visible in grey too
        ink = rng.integers(0, 256, 3)
    mask = Image.new("L", (width * _SCALE, height * _SCALE), 0)
    radius = min(height, width) * _SCALE * rng.uniform(0.25, 0.42)
    cx = width * _SCALE / 2 + rng.uniform(-0.12, 0.12) * width * _SCALE
    cy = height * _SCALE / 2 + rng.uniform(-0.12, 0.12) * height * _SCALE
    turn = math.radians(rng.uniform(-20, 20))
    cos, sin = math.cos(turn) * radius, math.sin(turn) * radius

    def place(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(cx + x * cos - y * sin, cy + x * sin + y * cos) for x, y in points]

    pen = ImageDraw.Draw(mask)
    if shape in ("circle", "ring", "crescent"):
        _disc(pen, cx, cy, radius, 255)
        if shape == "ring":
            _disc(pen, cx, cy, radius * 0.55, 0)
        if shape == "crescent":
            ((x, y),) = place([(0.55, 0.0)])
            _disc(pen, x, y, radius * 0.85, 0)
    else:
        for polygon in _polygons(shape):
            pen.polygon(place(polygon), fill=255)
    mask = mask.resize((width, height), Image.Resampling.BOX)
    picture = Image.new("RGB", (width, height), tuple(int(v) for v in ground))
    picture.paste(tuple(int(v) for v in ink), mask=mask)
    return picture


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, value: int) -> None:
    pen.ellipse((x - r, y - r, x + r, y + r), fill=value)


def _polygons(shape: str) -> list[list[tuple[float, float]]]:
    """Outlines in the unit circle; y points down."""

    def box(w: float, h: float, dy: float = 0.0) -> list[tuple[float, float]]:
        return [(-w, dy - h), (w, dy - h), (w, dy + h), (-w, dy + h)]

    def ray(degrees: float, r: float) -> tuple[float, float]:
        return r * math.sin(math.radians(degrees)), -r * math.cos(math.radians(degrees))

    return {
        "square": [box(0.8, 0.8)],
        "triangle": [[ray(a, 1.0) for a in (0, 120, 240)]],
        "cross": [box(0.28, 0.95), box(0.95, 0.28)],
        "star": [[ray(36 * k, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]],
        "bar": [box(0.3, 1.0)],
        "arrow": [[ray(0, 1.0), (0.75, 0.05), (-0.75, 0.05)], box(0.25, 0.5, 0.45)],
        "hourglass": [[(-0.75, -0.9), (0.75, -0.9), (0, 0)], [(-0.75, 0.9), (0.75, 0.9), (0, 0)]],
    }[shape]


def _luma(colour: np.ndarray) -> float:
    return float(colour @ np.array([0.299, 0.587, 0.114]))
