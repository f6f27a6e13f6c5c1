"""What a network saw, drawn on the picture: masks, boxes, before and after. Pillow and NumPy only."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GOLDEN = 0.618034  # of the circle of hues from one class to the next: neighbours differ, and no two are the same
_GAP = 4


def colour(index: int) -> tuple[int, int, int]:
    """The colour of a class; every class has its own.

    >>> len({colour(k) for k in range(50)})
    50
    """
    hue = (0.58 + index * _GOLDEN) % 1.0
    r, g, b = colorsys.hsv_to_rgb(hue, 0.75 if index % 2 else 0.9, 1.0 if index % 3 else 0.8)
    return round(255 * r), round(255 * g), round(255 * b)


def draw_mask(picture: Image.Image, mask: np.ndarray, *, opacity: float = 0.55, void: int = 255) -> Image.Image:
    """The picture with its classes laid over it.

    Args:
        mask: class indices (H, W), of the picture's size. void: is left as it is.
    """
    if mask.shape != (picture.height, picture.width):
        raise ValueError(f"the mask must be of the picture's size {picture.size[::-1]}, got {mask.shape}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be 0 to 1, got {opacity}")
    table = np.array([colour(k) for k in range(256)], np.float32)
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    laid = (1 - opacity) * pixels + opacity * table[mask]
    return Image.fromarray(np.where((mask == void)[..., None], pixels, laid).round().astype(np.uint8))


def draw_volume(volume: np.ndarray, mask: np.ndarray | None = None, *, least: int = 192) -> Image.Image:
    """The three middle slices of a volume, with its classes or regions laid over them.

    Args:
        volume: (C, D, H, W), of which the first channel is shown, or (D, H, W).
        mask: classes (D, H, W), of which 0 is the ground, or masks (K, D, H, W) of regions; later ones lie above.
        least: small slices are enlarged to about so many pixels.

    >>> draw_volume(np.zeros((4, 16, 16, 8)), np.zeros((3, 16, 16, 8), np.uint8), least=16).size
    (40, 30)
    """
    grey = volume[0] if volume.ndim == 4 else volume
    index = np.zeros(grey.shape, np.uint8) if mask is None else mask
    if index.ndim == 4:
        index = (np.arange(1, len(index) + 1, dtype=np.uint8)[:, None, None, None] * index).max(0)
    if index.shape != grey.shape:
        raise ValueError(f"the mask must be of the volume's size {grey.shape}, got {index.shape}")
    dark, light = np.percentile(grey, (1, 99))
    grey = np.rint(255 * ((grey - dark) / max(light - dark, 1e-6)).clip(0, 1)).astype(np.uint8)
    index = np.where(index == 0, 255, index)
    times = max(1, round(least / max(grey.shape)))
    slices, titles = [], []
    for axis, (name, side) in enumerate(zip(("depth", "height", "width"), grey.shape)):
        flat = (np.take(x, side // 2, axis).repeat(times, 0).repeat(times, 1) for x in (grey, index))
        slices.append(draw_mask(Image.fromarray(next(flat)), next(flat)))
        titles.append(f"{name} {side // 2}")
    return side_by_side(slices, titles)


def draw_boxes(
    picture: Image.Image, boxes: np.ndarray, index: Sequence[int], words: Sequence[str] | None = None
) -> Image.Image:
    """The picture with a box around every object.

    Args:
        boxes: (N, 4): x1, y1, x2, y2 in pixels. index: the class of each. words: what is written on each.
    """
    if len(boxes) != len(index) or (words is not None and len(words) != len(index)):
        raise ValueError(f"boxes, index and words must be equally many, got {len(boxes)}, {len(index)} and {words}")
    out = picture.convert("RGB")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default()
    width = max(1, round(min(out.size) / 200))
    for n, (box, k) in enumerate(zip(np.asarray(boxes).tolist(), index)):
        x1, y1, x2, y2 = box
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour(int(k)), width=width)
        if words is not None:
            place = pen.textbbox((x1 + 1, max(0, y1 - 11)), words[n], font=font)
            pen.rectangle(place, fill=colour(int(k)))
            pen.text(
                place[:2], words[n], fill="black" if sum(colour(int(k))) > 380 else "white", font=font, anchor="lt"
            )
    return out


def side_by_side(pictures: Sequence[Image.Image], titles: Sequence[str] | None = None) -> Image.Image:
    """Pictures in a row, all as high as the highest; smaller ones are enlarged pixel by pixel.

    >>> side_by_side([Image.new("RGB", (8, 8)), Image.new("RGB", (24, 24))]).size
    (52, 24)
    """
    if not pictures or (titles is not None and len(titles) != len(pictures)):
        raise ValueError(f"there must be pictures, with a title each, got {len(pictures)} and {titles}")
    height = max(p.height for p in pictures)
    row = [
        p.convert("RGB").resize((round(p.width * height / p.height), height), Image.Resampling.NEAREST)
        for p in pictures
    ]
    head = 14 if titles else 0
    out = Image.new("RGB", (sum(p.width for p in row) + _GAP * (len(row) - 1), height + head), "white")
    pen, x = ImageDraw.Draw(out), 0
    for k, p in enumerate(row):
        out.paste(p, (x, head))
        if titles:
            pen.text((x + 1, 1), titles[k], fill="black", font=ImageFont.load_default())
        x += p.width + _GAP
    return out
