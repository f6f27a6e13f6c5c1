"""Which layers bear truncation: the profile of `compress.factorize.compactifai.sensitivity` as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .confusion import LEVELS
from .output import save
from .plots import Plot, standalone
from .svg import Frame, path, short, tag
from .words import clean, get, number, rows


def sensitivity_svg(profile: Mapping[str, Any], to: str | Path | None = None, *, title: str = "") -> str:
    """A self-contained SVG of a sensitivity profile (`Profile.asdict()`), also written to the file `to` if given.

    One row per layer in the order of the network, one column per bond dimension; a cell says by how much the metric
    rises when that layer alone is truncated to it. Orange is worse (square-root scale), blue is not.

    Raises:
        ValueError: the profile has no rows.
    """
    drawn = standalone([_cells(profile)], title or "Metric added by truncating one layer")
    if to is not None:
        save(drawn, to, inside="sensitivity.svg")
    return drawn


def _cells(profile: Mapping[str, Any]) -> Plot:
    drops: dict[tuple[str, int], float] = {}
    for row in rows(get(profile, "rows")):
        chi, drop = number(row.get("chi")), number(row.get("drop"))
        if chi is not None and drop is not None:
            drops[clean(row.get("layer")), int(chi)] = drop
    if not drops:
        raise ValueError("profile must have rows with layer, chi and drop, got none")
    layers = list(dict.fromkeys(layer for layer, _ in drops))
    chis = sorted({chi for _, chi in drops})
    most = max(*drops.values(), 1e-9)
    left = 14 + 7.0 * min(max(map(len, layers)), 30)
    wide, high = 52.0, 22.0
    frame = Frame(left + wide * len(chis) + 6, 30 + high * len(layers) + 6, left=left, top=30.0)
    frame.add(
        tag("rect", class_="field", x=left, y=frame.y1, width=wide * len(chis), height=high * len(layers)),
    )
    shades: dict[str, list[str]] = {}
    texts = []
    for (layer, chi), drop in drops.items():
        x, y = left + chis.index(chi) * wide, frame.y1 + layers.index(layer) * high
        level = min(LEVELS, max(1, math.ceil(LEVELS * math.sqrt(abs(drop) / most) - 1e-9)))
        look = f"{'miss' if drop > 0 else 'hit'} s{level}"
        shades.setdefault(look, []).append(f"M{x:.1f} {y:.1f}h{wide:.1f}v{high:.1f}h-{wide:.1f}z")
        said = f"{drop:+.2g}".replace("-", "−")
        texts.append(tag("text", said, class_=f"cell t{level}", x=x + wide / 2, y=y + 15.0, font_size=11))
    frame.add(*(path(d, f"heat {look}") for look, d in sorted(shades.items())), *texts)
    for k, layer in enumerate(layers):
        frame.add(
            tag("text", short(layer, 30), class_="tick", x=left - 6, y=frame.y1 + k * high + 15, text_anchor="end")
        )
    for k, chi in enumerate(chis):
        frame.add(tag("text", chi, class_="tick", x=left + (k + 0.5) * wide, y=frame.y1 - 7, text_anchor="middle"))
    frame.add(tag("text", "bond dimension →", class_="name", x=left - 6, y=12, text_anchor="end"))
    worst = max(drops, key=lambda cell: drops[cell])
    said = f"Sensitivity of {len(layers)} layers; worst: {worst[0]} at bond dimension {worst[1]}, {drops[worst]:+.3g}"
    return Plot(frame, said, {"kind": "none"}, "Sensitivity")
