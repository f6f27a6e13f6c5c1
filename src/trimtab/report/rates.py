"""How accurate an answer is, over the bytes that were sent for it, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .output import save
from .plots import Plot, standalone
from .svg import Frame, Scale, fit_scale, path, short, tag
from .words import percent

LOOKS = ("curve", "curve second", "curve third", "curve fourth")
Points = Sequence[tuple[float, float]]


def rates_svg(curves: Mapping[str, Points], to: str | Path | None = None, *, title: str = "") -> str:
    """A self-contained SVG of accuracy over bytes, also written to the file `to` if given.

    Args:
        curves: (bytes, accuracy from 0 to 1) by name: a line through several, a dot for one. The first is the one that
            the others are compared with; at most four are lines.

    Raises:
        ValueError: there is nothing to draw, or too much.
    """
    kept = {name: sorted(points) for name, points in curves.items()}
    if not kept or not all(kept.values()) or any(size <= 0 for points in kept.values() for size, _ in points):
        raise ValueError("curves must have points, of more than 0 bytes")
    if sum(len(points) > 1 for points in kept.values()) > len(LOOKS):
        raise ValueError(f"at most {len(LOOKS)} curves can be told apart")
    drawn = standalone([_plot(kept)], title or "Accuracy over bytes")
    if to is not None:
        save(drawn, to, inside="rates.svg")
    return drawn


def _plot(curves: Mapping[str, Points]) -> Plot:
    frame = Frame(600, 300, right=190, top=30)
    x = fit_scale([size for points in curves.values() for size, _ in points], frame.x0, frame.x1)
    shares = [share for points in curves.values() for _, share in points]
    room = 0.08 * (max(shares) - min(shares)) or 0.05
    y = Scale(max(0.0, min(shares) - room), min(1.0, max(shares) + room), frame.y0, frame.y1)
    frame.y_axis(y, lambda v: f"{100 * v:g}%")
    frame.x_axis(x, lambda v: f"{v:,g}", "bytes for an image")
    frame.add(tag("text", "accuracy", class_="name", x=2, y=14))
    looks = dict(zip([name for name, points in curves.items() if len(points) > 1], LOOKS))
    below = frame.y1 - 8.0
    for name, points in sorted(curves.items(), key=lambda item: -item[1][-1][1]):
        at = [(x(size), y(share)) for size, share in points]
        below = max(below + 16, at[-1][1])  # names stand beside the ends, as far as they have room
        mark = frame.x1 + 8
        if name in looks:
            frame.add(path([f"{'L' if i else 'M'}{a} {b}" for i, (a, b) in enumerate(at)], looks[name]))
            frame.add(path([f"M{mark} {below}h18"], looks[name]))
        else:
            frame.add(tag("circle", class_="point unknown", cx=mark + 9, cy=below, r=4))
        frame.add(*(tag("circle", class_="point unknown", cx=a, cy=b, r=3) for a, b in at))
        frame.add(tag("text", short(name, 26), class_="tick", x=mark + 24, y=below + 4))
    said = (f"{name}: {percent(points[-1][1])} with {points[-1][0]:,.0f} bytes" for name, points in curves.items())
    return Plot(frame, "; ".join(said), {"kind": "none"})
