"""What every chart here is: a static SVG, and what a few lines of script need to read it point by point.

A chart is complete without a script. It is drawn small (about 460 units wide) so that its letters stay legible on a
phone, and takes its colours from chart.css, so that it follows the reader's light or dark mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .output import resource
from .svg import Frame, short, tag

Tip = tuple[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class Plot:
    """A drawn frame, what it shows in words, and what the script needs to read it point by point."""

    frame: Frame
    said: str
    hover: dict[str, Any]
    title: str = ""
    note: str = ""

    @property
    def svg(self) -> Markup:
        return self.frame.svg(self.said)


def standalone(plots: Sequence[Plot], title: str, legend: Sequence[tuple[str, str]] = ()) -> str:
    """Plots side by side as one SVG document with its own style, title and legend."""
    width = 20 + sum(round(plot.frame.width) + 20 for plot in plots)
    top = 66 if legend else 44
    height = top + round(max(plot.frame.height for plot in plots)) + 12
    parts = [
        tag("title", title),
        tag("style", Markup(resource("chart.css"))),
        tag("rect", class_="paper", width="100%", height="100%", rx=6),
        tag("text", short(title, width // 9), class_="heading", x=20, y=28),
    ]
    x = 20
    for look, words in legend:
        parts.append(tag("g", legend_mark(look), transform=f"translate({x} 38)"))
        parts.append(tag("text", words, class_="tick", x=x + 22, y=50))
        x += 40 + round(6.6 * len(words))
    x = 20
    for plot in plots:
        parts.append(tag("g", *plot.frame.parts, transform=f"translate({x} {top})"))
        x += round(plot.frame.width) + 20
    return str(
        tag(
            "svg",
            *parts,
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {width} {height}",
            width=width,
            height=height,
            role="img",
            aria_label="; ".join(plot.said for plot in plots),
            class_="chart alone",
        )
    )


def legend_mark(look: str) -> Markup:
    """A 16-unit picture of one kind of point, for legends."""
    if look == "over":
        mark = tag("path", class_="point over", d="M8 3l5 5l-5 5l-5 -5z")
    elif look == "front":
        mark = tag("path", class_="front", d="M0 12H7V5H16")
    elif look == "limit":
        mark = tag("path", class_="limit", d="M8 0V16")
    elif look == "chosen":
        mark = tag("circle", class_="halo", cx=8, cy=8, r=7) + tag("circle", class_="point chosen", cx=8, cy=8, r=4.5)
    else:
        mark = tag("circle", class_=f"point {look}", cx=8, cy=8, r=4.5)
    return mark
