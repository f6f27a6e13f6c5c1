"""3x3 kernels in pictures: the page that `trimtab analyze filters` writes.

It takes what `compress.analyze.filters` found as a plain dictionary (`FilterReport.asdict`). Static SVG, no script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template
from markupsafe import Markup

from trimtab.core.files import write_text

from .output import resource
from .svg import Frame, Scale, line, path, short, tag

SHADES = 8


def filters_page(found: Mapping[str, Any], file: str | Path, *, title: str = "3x3 filters") -> Path:
    """Write the statistics of filters as one self-contained HTML file (``filters.html`` inside a directory).

    Args:
        found: what `trimtab.compress.analyze.filters` gives, as a dictionary.
    """
    for key in ("models", "quality", "components", "ratio", "histograms", "edges", "drift", "depth", "depth_drift"):
        if key not in found:
            raise ValueError(f"found must have {key!r}: give FilterReport.asdict()")
    names = [m["name"] for m in found["models"]]
    pictures = [
        ("components", "Principal components", _SAYS["components"], components(found)),
        ("coefficients", "How much of each component", _SAYS["coefficients"], coefficients(found)),
        ("quality", "Variety of every layer", _SAYS["quality"], variety(found)),
    ]
    if len(names) > 1:
        pictures.append(("drift", "Drift between models", _SAYS["drift"], drift_matrix(names, found["drift"])))
    if len(found["depth"]) > 1:
        pictures.append(
            ("depth", "Drift across depth", _SAYS["depth"], drift_matrix(found["depth"], found["depth_drift"]))
        )
    bad = [q for q in found["quality"] if q["degenerated"]]
    html = _template().render(
        title=title,
        models=found["models"],
        pictures=pictures,
        verdict=f"{len(bad)} of {len(found['quality'])} layers degenerated",
        layers=[q | {"says": ", ".join(q["degenerated"])} for q in found["quality"]],
        style=Markup(resource("chart.css") + resource("page.css")),
        number=_number,
    )
    file = Path(file)
    return write_text(file / "filters.html" if file.is_dir() else file, html)


_SAYS = {
    "components": "Kernels scaled to a largest entry of 1. Blue is positive, orange negative; the share is that of the "
    "variance it explains.",
    "coefficients": "One row for each model, one column for each component: how often kernels have how much of it. "
    "Narrow peaks beside zero are patterns that repeat.",
    "quality": "Entropy of the variance of each layer's kernels, in the order of depth. The dashed line is a random "
    "layer: a layer on it has learned nothing yet, a layer far below repeats few patterns.",
    "drift": "Symmetric Kullback-Leibler divergence of the coefficients, weighted by explained variance, on samples of "
    "equal size. 0 is equal.",
    "depth": "The same between layers of different depth, all models together.",
}


def components(found: Mapping[str, Any]) -> Markup:
    """The nine principal components as 3x3 pictures."""
    cell, gap = 27.0, 20.0
    frame = Frame(9 * (3 * cell + gap), 3 * cell + 30)
    for k, (values, ratio) in enumerate(zip(found["components"], found["ratio"], strict=True)):
        left, top = k * (3 * cell + gap), max(map(abs, values)) or 1.0
        frame.add(tag("rect", class_="field", x=left, y=0, width=3 * cell, height=3 * cell))
        for i, value in enumerate(values):
            x, y = left + i % 3 * cell, i // 3 * cell
            frame.add(path([f"M{x:.1f} {y:.1f}h{cell}v{cell}h-{cell}z"], f"heat {_shade(value / top)}"))
        frame.add(tag("rect", class_="border", x=left, y=0, width=3 * cell, height=3 * cell))
        words = f"{100 * ratio:.1f} %"
        frame.add(tag("text", words, class_="tick", x=left + 1.5 * cell, y=3 * cell + 19, text_anchor="middle"))
    return frame.svg("Nine principal components of the kernels, with the share of variance each explains")


def coefficients(found: Mapping[str, Any]) -> Markup:
    """Histograms of the coefficients: models down, components across."""
    wide, high, left = 86.0, 46.0, 108.0
    names = list(found["histograms"])
    frame = Frame(left + 9 * (wide + 8), 24 + len(names) * (high + 12))
    for k in range(9):
        x = left + k * (wide + 8) + wide / 2
        frame.add(tag("text", f"c{k + 1}", class_="name", x=x, y=14, text_anchor="middle"))
    for row, name in enumerate(names):
        base = 24 + (row + 1) * (high + 12) - 10
        frame.add(tag("text", short(name, 15), class_="tick", x=left - 8, y=base - 4, text_anchor="end"))
        for k, density in enumerate(found["histograms"][name]):
            x0, top = left + k * (wide + 8), max(density) or 1.0
            step = wide / len(density)
            steps = [f"V{base - high * d / top:.1f}h{step:.2f}" for d in density]
            frame.add(path([f"M{x0:.1f} {base:.1f}", *steps, f"V{base:.1f}z"], "bar after"))
            frame.add(line(x0, base, x0 + wide, base, "axis"))
    return frame.svg(f"Distributions of nine coefficients for {', '.join(names)}")


def variety(found: Mapping[str, Any]) -> Markup:
    """Entropy of every layer as a share of that of a random layer, by depth; degenerated layers stand out."""
    frame = Frame(920, 250, left=50, right=20)
    x = Scale(0.0, 1.0, frame.x0 + 8, frame.x1 - 8)
    y = Scale(0.0, 1.15, frame.y0, frame.y1)
    frame.y_axis(y, lambda v: f"{100 * v:.0f} %")
    frame.x_axis(x, lambda v: f"{v:g}", "depth, from the first convolution to the last")
    frame.add(line(frame.x0, y(1.0), frame.x1, y(1.0), "limit"))
    for q in found["quality"]:
        share = q["entropy_share"]
        if share is None or not math.isfinite(share):
            continue
        said = f"{q['model']}, {q['layer']}: entropy {q['entropy']:.3f}, sparsity {q['sparsity']:.3f}"
        look = "over" if q["degenerated"] else "fits"
        mark = tag("title", said + (f" ({', '.join(q['degenerated'])})" if q["degenerated"] else ""))
        frame.add(tag("circle", mark, class_=f"point {look}", cx=x(q["depth_norm"]), cy=y(share), r=5))
    return frame.svg("Variance entropy of every layer as a share of that of a random layer, by depth")


def drift_matrix(names: Sequence[str], drift: Sequence[Sequence[float]]) -> Markup:
    """Drift between all pairs, with the numbers in the cells."""
    cell, left, top = max(38.0, min(58.0, 480 / len(names))), 130.0, 24.0
    frame = Frame(left + cell * len(names) + 8, top + cell * len(names) + 8)
    most = max((v for row in drift for v in row), default=0.0) or 1.0
    for i, name in enumerate(names):
        at = top + i * cell + cell / 2 + 4
        frame.add(tag("text", short(name, 18), class_="tick", x=left - 8, y=at, text_anchor="end"))
        words = short(name, max(3, int(cell / 6.5)))
        frame.add(tag("text", words, class_="tick", x=left + (i + 0.5) * cell, y=top - 8, text_anchor="middle"))
        for j, value in enumerate(drift[i]):
            x, y = left + j * cell, top + i * cell
            level = math.ceil(SHADES * math.sqrt(max(0.0, value) / most))
            look = f"heat hit s{level}" if level else "field"
            frame.add(path([f"M{x:.1f} {y:.1f}h{cell:.1f}v{cell:.1f}h-{cell:.1f}z"], look))
            said = tag(
                "text", _number(value), class_=f"cell t{level}", x=x + cell / 2, y=y + cell / 2 + 4, font_size=11
            )
            frame.add(said)
    return frame.svg(f"Drift between {', '.join(names)}; the largest is {_number(most)}")


@cache
def _template() -> Template:
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(resource("filters.html"))


def _shade(share: float) -> str:
    level = max(1, math.ceil(SHADES * abs(share) - 1e-9))
    return f"{'hit' if share >= 0 else 'miss'} s{level}"


def _number(value: float | None) -> str:
    """Three digits; a dash for what is not known.

    >>> _number(0.12345), _number(None), _number(0)
    ('0.123', '–', '0')
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"
