"""What a stream did to a model: `StreamResult.asdict()` as a picture, one result or several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .output import save
from .plots import Plot, standalone
from .svg import Frame, Scale, path, short, tag
from .words import clean, get, number, percent


def stream_svg(
    results: Mapping[str, Any] | Sequence[Mapping[str, Any]], to: str | Path | None = None, *, title: str = ""
) -> str:
    """A self-contained SVG of one stream result or of several, also written to the file `to` if given.

    One panel for each: a thin line for every task, from when it was learned on, and a thick dashed one for all test
    images of the tasks so far.

    Raises:
        ValueError: there is no result, or one without accuracies.
    """
    found = [results] if isinstance(results, Mapping) else list(results)
    if not found or not all(get(r, "accuracy") for r in found):
        raise ValueError("results must be dicts of stream results, with accuracies")
    drawn = standalone([_panel(r) for r in found], title or "Accuracy after each task")
    if to is not None:
        save(drawn, to, inside="stream.svg")
    return drawn


def _panel(result: Mapping[str, Any]) -> Plot:
    table = result["accuracy"]
    so_far = [number(v) or 0.0 for v in result["so_far"]]
    tasks = len(result["images"])
    frame = Frame(360, 250, top=30)
    x = Scale(1, max(tasks, 2), frame.x0, frame.x1)
    y = Scale(0.0, 1.0, frame.y0, frame.y1)
    frame.y_axis(y, lambda v: f"{100 * v:g}%", about=4)
    frame.x_axis(x, lambda v: f"{v:g}", "tasks learned", about=min(tasks - 1, 10) or 1)
    name = short(clean(result["method"]), 20)
    frame.add(tag("text", f"{name}: {percent(so_far[-1])} at the end", class_="name", x=2, y=14))
    for j in range(tasks):
        line = [(n, number(row[j])) for n, row in zip(result["learned"], table, strict=True) if n > j]
        frame.add(*_line([(n, v) for n, v in line if v is not None], x, y, "front"))
    frame.add(*_line(list(zip(result["learned"], so_far, strict=True)), x, y, "curve second"))
    said = f"{name}: accuracy on all tasks so far from {percent(so_far[0])} to {percent(so_far[-1])}"
    return Plot(frame, said, {"kind": "none"}, name)


def _line(points: Sequence[tuple[int, float]], x: Scale, y: Scale, look: str) -> list[Any]:
    """A line through the points; one point alone is a dot."""
    if len(points) == 1:
        (n, v) = points[0]
        return [tag("circle", class_="point chosen" if "second" in look else "point unknown", cx=x(n), cy=y(v), r=3)]
    return [path([f"{'L' if i else 'M'}{x(n)} {y(v)}" for i, (n, v) in enumerate(points)], look)] if points else []
