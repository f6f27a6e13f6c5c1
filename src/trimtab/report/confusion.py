"""Which class is taken for which: the confusion matrix as numbers and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .plots import Plot
from .svg import Frame, path, short, tag
from .words import clean, get, items, number, percent, quantity


@dataclass(frozen=True)
class Confusion:
    """Counts by true class (rows) and predicted class (columns), cleaned and square."""

    labels: list[str]
    matrix: list[list[float]]

    @property
    def total(self) -> float:
        return math.fsum(v for row in self.matrix for v in row)

    def recall(self, k: int) -> float | None:
        seen = math.fsum(self.matrix[k])
        return self.matrix[k][k] / seen if seen else None

    def precision(self, k: int) -> float | None:
        said = math.fsum(row[k] for row in self.matrix)
        return self.matrix[k][k] / said if said else None

    def mistakes(self) -> list[tuple[int, int, float]]:
        """(true, predicted, count), most frequent first."""
        cells = [(t, p, v) for t, row in enumerate(self.matrix) for p, v in enumerate(row) if v and t != p]
        return sorted(cells, key=lambda cell: (-cell[2], cell[0], cell[1]))

    @property
    def counts(self) -> bool:
        return all(v == int(v) for row in self.matrix for v in row)


def read_confusion(run: Mapping[str, Any]) -> Confusion | None:
    """None when there is no square matrix of non-negative numbers."""
    matrix = [[number(v) for v in items(row)] for row in items(get(run, "confusion", "matrix"))]
    size = len(matrix)
    if size < 2 or any(len(row) != size for row in matrix):
        return None
    full = [[v for v in row if v is not None and v >= 0] for row in matrix]
    if any(len(row) != size for row in full) or not any(any(row) for row in full):
        return None
    named = [clean(label) for label in items(get(run, "confusion", "labels"))]
    if len(named) != size:
        named = [clean(label) for label in items(get(run, "data", "class_names"))]
    return Confusion(named if len(named) == size else [str(k) for k in range(size)], full)


LEVELS = 8


def heatmap(confusion: Confusion) -> Plot:
    """Blue on the diagonal (recall), orange off it (share of the true class, square-root scale so that few show).

    One path per shade, so a hundred classes stay small; numbers in the cells up to 20 classes.
    """
    labels, size, counts = confusion.labels, len(confusion.labels), confusion.counts
    room = 7.2 * min(max(map(len, labels)), 14) + 14
    named = size <= 36
    left = max(28.0, room) + 18 if named else 28.0
    cell = max(min(400.0 / size, 46.0), 6.0) if size <= 20 else max(620.0 / size, 6.0)
    upright = size <= 20 and max(map(len, labels)) * 7.2 < cell
    top = 42.0 if upright else 24.0 + room if named else 22.0
    side = cell * size
    frame = Frame(left + side + 6, top + side + 6, left=left, top=top)
    shades: dict[str, list[str]] = {}
    texts = []
    for t, row in enumerate(confusion.matrix):
        seen = math.fsum(row)
        for p, value in enumerate(row):
            if not value:
                continue
            share = value / seen
            level = max(1, math.ceil(LEVELS * (share if t == p else math.sqrt(share)) - 1e-9))
            x, y = left + p * cell, top + t * cell
            square = f"M{x:.1f} {y:.1f}h{cell:.1f}v{cell:.1f}h-{cell:.1f}z"
            shades.setdefault(f"{'hit' if t == p else 'miss'} s{level}", []).append(square)
            if size <= 20:
                said = (
                    f"{100 * share:.0f}" if not counts else f"{value:.0f}" if value < 1e4 else quantity("params", value)
                )
                font = round(min(13.0, cell * 0.42, 1.5 * cell / len(said)), 1)
                look = f"cell t{level}"
                texts.append(
                    tag("text", said, class_=look, x=x + cell / 2, y=y + cell / 2 + font * 0.36, font_size=font)
                )
    frame.add(tag("rect", class_="field", x=left, y=top, width=side, height=side))
    frame.add(*(path(d, f"heat {look}") for look, d in sorted(shades.items())))
    if size <= 40:
        steps = [k * cell for k in range(1, size)]
        mesh = [f"M{left:.1f} {top + s:.1f}h{side:.1f}M{left + s:.1f} {top:.1f}v{side:.1f}" for s in steps]
        frame.add(path(mesh, "mesh"))
    frame.add(tag("rect", class_="border", x=left, y=top, width=side, height=side))
    frame.add(*texts)
    if named:
        _name(frame, labels, cell, upright)
    frame.add(tag("text", "predicted →", class_="name", x=left, y=13))
    frame.add(tag("text", "true →", class_="name", transform=f"translate(12 {top + side:.1f}) rotate(-90)", x=0, y=0))
    right = math.fsum(confusion.matrix[k][k] for k in range(size))
    said = f"Confusion matrix of {size} classes: {percent(right / confusion.total)} on the diagonal"
    exact = [[int(v) if v == int(v) else round(v, 4) for v in row] for row in confusion.matrix]
    place = {"x": round(left, 2), "y": round(top, 2), "cell": round(cell, 4)}
    return Plot(frame, said, {"kind": "grid", **place, "labels": labels, "matrix": exact}, "Confusion matrix")


def _name(frame: Frame, labels: list[str], cell: float, upright: bool) -> None:
    """The classes along the left and the upper edge."""
    for k, label in enumerate(labels):
        said, x, y = short(label, 14), frame.x0 + (k + 0.5) * cell, frame.y1 + (k + 0.5) * cell
        frame.add(tag("text", said, class_="tick", x=frame.x0 - 6, y=y + 4.3, text_anchor="end"))
        if upright:
            frame.add(tag("text", said, class_="tick", x=x, y=frame.y1 - 7, text_anchor="middle"))
        else:
            turn = f"rotate(-90 {x + 4.3:.1f} {frame.y1 - 6:.1f})"
            frame.add(tag("text", said, class_="tick", x=x + 4.3, y=frame.y1 - 6, transform=turn))
