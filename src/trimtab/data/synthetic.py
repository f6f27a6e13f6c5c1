"""Made images, for tests, examples and machines without data. Deterministic: the same arguments give the same bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from trimtab.data.augment import LUMA

REGIONS = ("whole", "core", "enhancing")
# How bright ground, whole, core and enhancing are in each modality: no one of them tells all regions apart.
CONTRAST = np.array(
    [[0.0, 1.0, 0.3, 0.3], [0.0, 0.2, 1.0, 0.2], [0.0, 0.2, 0.2, 1.0], [0.0, 1.0, 1.0, 0.5]], np.float32
)
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


@dataclass(frozen=True)
class Scenes:
    """What `scenes` makes.

    Attributes:
        images: uint8 (n, C, H, W).
        masks: uint8 (n, H, W): 0 for the ground, k + 1 for shape k.
        boxes: of every image, float32 (m, 4): x1, y1, x2, y2 in pixels, around what is seen of each shape.
        labels: of every image, int64 (m,): positions in `names`.
        names: of the shapes.
    """

    images: np.ndarray
    masks: np.ndarray
    boxes: list[np.ndarray]
    labels: list[np.ndarray]
    names: list[str]


def scenes(
    n: int = 300,
    *,
    classes: int = 5,
    size: int | tuple[int, int] = 48,
    channels: int = 3,
    noise: float = 0.03,
    seed: int = 0,
) -> Scenes:
    """One to four coloured shapes on a shaded ground, with masks and boxes; nearer ones hide others in part.

    Args:
        n: images.
        classes: kinds of shapes, 1 to 10, the first of `SHAPES`.
        size: pixels, or (H, W), at least 16.
        noise: standard deviation of pixel noise, in 0..1 units.

    >>> made = scenes(4, classes=2, size=32)
    >>> made.images.shape, made.masks.shape, made.boxes[0].shape[1], made.names
    ((4, 3, 32, 32), (4, 32, 32), 4, ['circle', 'square'])
    """
    height, width = (size, size) if isinstance(size, int) else size
    if not 1 <= classes <= len(SHAPES):
        raise ValueError(f"classes must be 1 to {len(SHAPES)}, got {classes}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if min(height, width) < 16 or max(height, width) > 4096:
        raise ValueError(f"size must be 16 to 4096 pixels, got {size}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise must be 0 to 1, got {noise}")
    made = Scenes(
        np.empty((n, channels, height, width), np.uint8), np.zeros((n, height, width), np.uint8), [], [],
        list(SHAPES[:classes]),
    )  # fmt: skip
    for i in range(n):
        rng = np.random.default_rng([seed, i, 72])
        picture, owner, kinds = _scene(made.names, height, width, rng)
        if channels == 1:
            picture = picture.convert("L")
        pixels = np.asarray(picture, np.float32).reshape(height, width, channels).transpose(2, 0, 1)
        pixels = pixels + rng.standard_normal(pixels.shape, np.float32) * (255 * noise)
        made.images[i] = np.clip(np.rint(pixels), 0, 255)
        seen = [k for k in range(len(kinds)) if (owner == k + 1).any()]
        for k in seen:
            made.masks[i][owner == k + 1] = kinds[k] + 1
        made.boxes.append(np.array([_around(owner == k + 1) for k in seen], np.float32).reshape(-1, 4))
        made.labels.append(np.array([kinds[k] for k in seen], np.int64))
    return made


def nested_ellipsoids(
    n: int = 40,
    *,
    classes: int = 3,
    size: int | tuple[int, int, int] = 32,
    channels: int = 4,
    noise: float = 0.3,
    overlap: bool = True,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Volumes of noisy modalities, each with one tumour: an ellipsoid in an ellipsoid in an ellipsoid.

    Args:
        n: volumes.
        classes: 1 to 3, the first of `REGIONS`.
        size: voxels, or (D, H, W), at least 8.
        channels: 1 to 4, the first modalities of `CONTRAST`.
        noise: standard deviation, where contrasts are up to 1.
        overlap: masks of regions, each inside the one before; otherwise the innermost region of every voxel.

    Returns:
        volumes float32 (n, channels, D, H, W), every modality with mean 0 and deviation 1; with overlap masks uint8
        (n, classes, D, H, W), 0 or 1, otherwise classes uint8 (n, D, H, W); names of the masks or of the classes.

    >>> volumes, masks, names = nested_ellipsoids(2, size=16)
    >>> volumes.shape, names, bool((masks[:, 1] <= masks[:, 0]).all())
    ((2, 4, 16, 16, 16), ['whole', 'core', 'enhancing'], True)
    >>> _, label, names = nested_ellipsoids(2, size=16, overlap=False)
    >>> label.shape, names, bool((label == masks.sum(1)).all())
    ((2, 16, 16, 16), ['background', 'whole', 'core', 'enhancing'], True)
    """
    sides = (size, size, size) if isinstance(size, int) else size
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 1 <= classes <= len(REGIONS):
        raise ValueError(f"classes must be 1 to {len(REGIONS)}, got {classes}")
    if min(sides) < 8 or max(sides) > 512:
        raise ValueError(f"size must be 8 to 512 voxels, got {size}")
    if not 1 <= channels <= len(CONTRAST):
        raise ValueError(f"channels must be 1 to {len(CONTRAST)}, got {channels}")
    if noise < 0:
        raise ValueError(f"noise must not be negative, got {noise}")
    axes = [np.linspace(-1, 1, side, dtype=np.float32) for side in sides]
    places = np.stack(np.meshgrid(*axes, indexing="ij"))  # (3, D, H, W)
    volumes = np.empty((n, channels, *sides), np.float32)
    masks = np.empty((n, classes, *sides), np.uint8)
    for i in range(n):
        rng = np.random.default_rng([seed, i, 73])
        centre, radii = rng.uniform(-0.35, 0.35, 3), rng.uniform(0.4, 0.65, 3)
        shrinks = (1.0, rng.uniform(0.6, 0.8), rng.uniform(0.35, 0.5))
        for k, shrink in enumerate(shrinks[:classes]):
            away = (places - centre[:, None, None, None]) / (radii * shrink)[:, None, None, None]
            masks[i, k] = (away**2).sum(0) < 1
        volume = CONTRAST[:channels, masks[i].sum(0)]
        volume = volume + noise * rng.standard_normal((channels, *sides), np.float32)
        volumes[i] = (volume - volume.mean((1, 2, 3), keepdims=True)) / volume.std((1, 2, 3), keepdims=True)
    names = list(REGIONS[:classes])
    return (volumes, masks, names) if overlap else (volumes, masks.sum(1, dtype=np.uint8), ["background", *names])


def _scene(
    names: list[str], height: int, width: int, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray, list[int]]:
    """The picture, which shape (from 1) each pixel shows, and the kind of each shape."""
    ground = rng.integers(0, 256, 3)
    shade = rng.integers(-40, 41, (2, 2, 3))  # the ground differs from corner to corner
    corners = Image.fromarray(np.clip(ground + shade, 0, 255).astype(np.uint8))
    picture = corners.resize((width, height), Image.Resampling.BILINEAR)
    owner = np.zeros((height, width), np.int64)
    kinds: list[int] = []
    for _ in range(int(rng.integers(1, 5))):
        kind = int(rng.integers(len(names)))
        ink = rng.integers(0, 256, 3)
        while abs(int(_luma(ink)) - int(_luma(ground))) < 60:
            ink = rng.integers(0, 256, 3)
        radius = min(height, width) * _SCALE * rng.uniform(0.12, 0.25)
        cx, cy = (rng.uniform(radius, side * _SCALE - radius) for side in (width, height))
        cover = _cover(names[kind], height, width, cx, cy, radius, math.radians(rng.uniform(-20, 20)))
        mine = np.asarray(cover) >= 128
        left = [k for k in range(len(kinds)) if (owner == k + 1).any()]
        if any(((owner == k + 1) & ~mine).sum() < 0.4 * (owner == k + 1).sum() for k in left):
            continue  # it would hide another nearly whole
        picture.paste(tuple(int(v) for v in ink), mask=cover)
        kinds.append(kind)
        owner[mine] = len(kinds)
    return picture, owner, kinds


def _around(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of the pixels that are true; x2 and y2 are the first outside."""
    y, x = np.nonzero(pixels)
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


def _draw(shape: str, height: int, width: int, rng: np.random.Generator) -> Image.Image:
    ground = rng.integers(0, 256, 3)
    ink = rng.integers(0, 256, 3)
    while abs(int(_luma(ink)) - int(_luma(ground))) < 60:  # visible in grey too
        ink = rng.integers(0, 256, 3)
    radius = min(height, width) * _SCALE * rng.uniform(0.25, 0.42)
    cx = width * _SCALE / 2 + rng.uniform(-0.12, 0.12) * width * _SCALE
    cy = height * _SCALE / 2 + rng.uniform(-0.12, 0.12) * height * _SCALE
    mask = _cover(shape, height, width, cx, cy, radius, math.radians(rng.uniform(-20, 20)))
    picture = Image.new("RGB", (width, height), tuple(int(v) for v in ground))
    picture.paste(tuple(int(v) for v in ink), mask=mask)
    return picture


def _cover(shape: str, height: int, width: int, cx: float, cy: float, radius: float, turn: float) -> Image.Image:
    """How much of each pixel a shape covers; centre, radius in units of 1 / _SCALE pixels, turn in radians."""
    mask = Image.new("L", (width * _SCALE, height * _SCALE), 0)
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
    return mask.resize((width, height), Image.Resampling.BOX)


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
    return float(colour @ np.array(LUMA))
