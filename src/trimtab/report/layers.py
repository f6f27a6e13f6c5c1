"""Cost per layer, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .plots import Plot, Tip
from .svg import Frame, Scale, line, path, short, tag
from .words import TITLES, clean, get, noun, number, quantity, rows

METRICS = ("macs", "params", "activations")


@dataclass(frozen=True)
class LayerPair:
    """One layer before and after; None on the side where it does not exist."""

    name: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None


def pair_layers(before: Any, after: Any) -> list[LayerPair]:
    """Match by name, in the order of the network; layers new in `after` follow the one they follow there."""
    old, new = _by_name(before), _by_name(after)
    order = list(old)
    at = 0
    for name in new:
        if name in old:
            at = order.index(name) + 1
        else:
            order.insert(at, name)
            at += 1
    return [LayerPair(name, old.get(name), new.get(name)) for name in order]


def _by_name(side: Any) -> dict[str, Mapping[str, Any]]:
    """Rows by name; a name that is missing or taken gets a number, so that no row is lost."""
    found: dict[str, Mapping[str, Any]] = {}
    for k, row in enumerate(rows(side), 1):
        name = clean(row.get("name")) or f"layer {k}"
        found[f"{name} ({k})" if name in found else name] = row
    return found


def layer_tips(pairs: Sequence[LayerPair]) -> list[Tip]:
    both = any(p.before for p in pairs) and any(p.after for p in pairs)
    tips = []
    for p in pairs:
        facts = [("kind", clean(kind))] if (kind := get(p.after or p.before, "kind")) else []
        for metric in METRICS:
            sides = [quantity(metric, get(side, metric)) for side in (p.before, p.after)]
            if sides != ["–", "–"]:
                said = " → ".join(sides) if both else next(s for s in sides if s != "–")
                facts.append((noun(metric), said))
        tips.append((short(p.name, 60) + (" (removed)" if both and p.after is None else ""), facts))
    return tips


def layer_bars(pairs: Sequence[LayerPair], metric: str) -> Plot | None:
    """One column per layer: pale before, strong after. With one side only, that side is strong."""
    values = [(number(get(p.before, metric)), number(get(p.after, metric))) for p in pairs]
    peak = max((v for two in values for v in two if v is not None), default=0.0)
    if peak <= 0:
        return None
    frame = Frame(920, 270, left=56, top=14, bottom=40)
    y_scale = Scale(0.0, peak * 1.05, frame.y0, frame.y1)
    frame.y_axis(y_scale, lambda v: quantity(metric, v), about=4)
    band = (frame.x1 - frame.x0) / len(values)
    has_before, has_after = (any(two[side] is not None for two in values) for side in (0, 1))
    for side, look in ((0, "before" if has_after else "after"), (1, "after")):
        width = min(band * 0.86, 46.0) * (0.62 if side and has_before else 1.0)
        bars = [
            f"M{frame.x0 + (k + 0.5) * band - width / 2:.1f} {frame.y0}V{y_scale(value)}h{width:.1f}V{frame.y0}z"
            for k, two in enumerate(values)
            if (value := two[side])
        ]
        if bars:
            frame.add(path(bars, f"bar {look}"))
    frame.add(line(frame.x0, frame.y0, frame.x1, frame.y0, "axis"))
    for name, first, last in _stages([p.name for p in pairs]):
        left, right = frame.x0 + first * band, frame.x0 + (last + 1) * band
        if first:
            frame.add(path([f"M{left:.1f} {frame.y0}v9"]))
        if len(name) * 7.0 < right - left:
            frame.add(tag("text", name, class_="tick", x=(left + right) / 2, y=frame.y0 + 20, text_anchor="middle"))
    words = "layers in the order of the network"
    frame.add(tag("text", words, class_="name", x=frame.x1, y=frame.height - 3, text_anchor="end"))
    totals = [sum(two[side] or 0.0 for two in values) for side in (0, 1)]
    said = f"{TITLES[metric]} of {len(values)} layers"
    if has_before and has_after:
        said += f", in all {quantity(metric, totals[0])} before and {quantity(metric, totals[1])} after"
    else:
        said += f", in all {quantity(metric, sum(totals))}"
    tops = [y_scale(max((v for v in two if v is not None), default=0.0)) for two in values]
    hover = {
        "kind": "column",
        "tips": "layers",
        "x": [round(frame.x0 + (k + 0.5) * band, 1) for k in range(len(values))],
        "y": tops,
        "span": [frame.y1, frame.y0],
    }
    return Plot(frame, said, hover, TITLES[metric], said)


def _stages(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Runs of layers that share the first part of their dotted name ('stages.0'), as (name, first, last)."""
    for depth in (2, 1):
        heads = []
        for name in names:
            parts = name.split(".")
            deep = depth == 2 and len(parts) > 2 and parts[1].isdigit()
            heads.append(".".join(parts[: 2 if deep else 1]))
        cuts = [0, *(k for k, (a, b) in enumerate(pairwise(heads), 1) if a != b), len(heads)]
        if len(cuts) <= 14:
            break
    return [(heads[a], a, b - 1) for a, b in pairwise(cuts)]
