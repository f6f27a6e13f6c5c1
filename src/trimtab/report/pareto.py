"""Everything tried: accuracy against cost, with the budget's lines and the best at every cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .plots import Plot, Tip, standalone
from .svg import Frame, Scale, fit_scale, line, path, short, tag
from .words import TITLES, budget_rows, clean, duration, get, noun, number, percent, quantity, rows


def pareto(run: Mapping[str, Any]) -> list[Plot]:
    """Accuracy against size and MACs, and against latency, memory or parameters where the budget bounds them."""
    tried = rows(run.get("tried"))
    bounded = {row["name"] for row in budget_rows(run)}
    costs = [c for c in ("size", "macs", "latency", "memory", "params") if c in ("size", "macs") or c in bounded]
    plots = [_pareto_panel(run, tried, cost) for cost in costs]
    if not any(plots):
        plots = [_pareto_panel(run, tried, "params")]
    return [plot for plot in plots if plot]


def tried_tips(run: Mapping[str, Any]) -> list[Tip]:
    tips = []
    for index, row in enumerate(rows(run.get("tried"))):
        facts = [("validation", quantity("accuracy", row.get("val_accuracy")))]
        facts += [
            (TITLES[c].lower() if c != "macs" else "MACs", quantity(c, row[c]))
            for c in ("size", "macs", "params", "latency", "memory")
            if number(row.get(c)) is not None
        ]
        if clean(row.get("stage")):
            facts.append(("stage", short(row["stage"], 40)))
        if number(row.get("seconds")) is not None:
            facts.append(("took", duration(row["seconds"])))
        if isinstance(row.get("fits"), bool):
            facts.append(("budget", "inside" if row["fits"] else "outside"))
        name = short(clean(row.get("name")) or f"candidate {index + 1}", 60)
        tips.append((name + (" (chosen)" if row.get("chosen") is True else ""), facts))
    return tips


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, accuracy) that no other point beats in both, by rising cost.

    >>> front([(3, 0.8), (1, 0.5), (2, 0.9), (2, 0.7)])
    [(1, 0.5), (2, 0.9)]
    """
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or accuracy > best[-1][1]:
            best.append((cost, accuracy))
    return best


def _accuracy_scale(values: Sequence[float], keep: Sequence[float], a: float, b: float) -> Scale:
    """The range worth looking at: what lies far below the good ones is held at the lower edge, not let squash them."""
    top, middle = max(values), statistics.median(values)
    fence = top - max(3 * (top - middle), 0.05)
    lo = min([v for v in values if v >= fence] + list(keep))
    hi = max([*values, *keep])
    room = max((hi - lo) * 0.08, 0.004)
    return Scale(max(0.0, lo - room), min(1.0, hi + room) if hi <= 1 else hi + room, a, b)


def _pareto_panel(run: Mapping[str, Any], tried: list[Mapping[str, Any]], cost: str) -> Plot | None:
    points = [
        (i, x, y, row)
        for i, row in enumerate(tried)
        if (x := number(row.get(cost))) is not None and (y := number(row.get("val_accuracy"))) is not None
    ]
    if not points:
        return None
    clauses = {row["name"]: row for row in budget_rows(run) if number(row.get("limit")) is not None}
    x_limit, y_limit = (number(get(clauses.get(name), "limit")) for name in (cost, "accuracy"))
    frame = Frame(460, 330, top=34)
    x_scale = fit_scale([p[1] for p in points] + ([x_limit] if x_limit is not None else []), frame.x0, frame.x1)
    keep = [p[2] for p in points if p[3].get("chosen") is True] + ([y_limit] if y_limit is not None else [])
    y_scale = _accuracy_scale([p[2] for p in points], keep, frame.y0, frame.y1)

    if x_limit is not None:
        edge = x_scale(x_limit)
        left, width = (edge, frame.x1 - edge) if _is_upper(clauses[cost]) else (frame.x0, edge - frame.x0)
        frame.add(tag("rect", class_="out", x=left, y=frame.y1, width=max(0.0, width), height=frame.y0 - frame.y1))
    if y_limit is not None:
        edge = y_scale(y_limit)
        frame.add(tag("rect", class_="out", x=frame.x0, y=edge, width=frame.x1 - frame.x0, height=frame.y0 - edge))
    frame.y_axis(y_scale, lambda v: f"{100 * v:g}%" if abs(100 * v - round(100 * v)) < 1e-6 else percent(v))
    frame.x_axis(x_scale, lambda v: quantity(cost, v), TITLES[cost])
    frame.add(tag("text", "Validation accuracy", class_="name", x=2, y=14))

    stairs = front([(p[1], p[2]) for p in points])
    steps = [f"M{x_scale(stairs[0][0])} {y_scale(stairs[0][1])}"]
    steps += [f"H{x_scale(x)}V{y_scale(y)}" for x, y in stairs[1:]]
    frame.add(path([*steps, f"H{frame.x1}"], "front"))

    if x_limit is not None:
        x = x_scale(x_limit)
        frame.add(line(x, frame.y1 - 6, x, frame.y0, "limit"))
        end = x > 150
        said = f"{_op(clauses[cost])} {quantity(cost, x_limit)}"
        frame.add(tag("text", said, class_="limit-name", x=x, y=frame.y1 - 10, text_anchor="end" if end else "start"))
    if y_limit is not None:
        y = y_scale(y_limit)
        frame.add(line(frame.x0, y, frame.x1, y, "limit"))
        said = f"{_op(clauses['accuracy'])} {percent(y_limit)}"
        frame.add(tag("text", said, class_="limit-name", x=frame.x1 - 3, y=y - 5, text_anchor="end"))

    radius = 4.5 if len(points) <= 60 else 3.5 if len(points) <= 200 else 2.8
    below = 0
    chosen = None
    for _, x, y, row in sorted(points, key=lambda p: p[3].get("fits") is True):
        cx, cy = x_scale(x), y_scale(y)
        look = _look(row)
        if row.get("chosen") is True:
            chosen = (cx, cy, row)
        if y < y_scale.lo:
            below += 1
            frame.add(tag("path", class_=f"point {look}", d=f"M{cx - 4:.1f} {cy - 8:.1f}h8l-4 7z"))
        elif look == "over":  # a shape of its own, not only a colour
            r = round(radius + 0.8, 1)
            frame.add(tag("path", class_="point over", d=f"M{cx} {cy - r:.1f}l{r} {r}l{-r} {r}l{-r} {-r}z"))
        else:
            frame.add(tag("circle", class_=f"point {look}", cx=cx, cy=cy, r=radius))
    if chosen:
        cx, cy, row = chosen
        frame.add(tag("circle", class_="halo", cx=cx, cy=cy, r=radius + 5))
        frame.add(tag("circle", class_="point chosen", cx=cx, cy=cy, r=radius + 1))
        name = short(clean(row.get("name")) or "chosen", 30)
        dots = [(x_scale(p[1]), y_scale(p[2])) for p in points]
        x, y, anchor = _free_place(frame, cx, cy, 7.4 * len(name), dots, None if x_limit is None else x_scale(x_limit))
        frame.add(tag("text", name, class_="label", x=x, y=y, text_anchor=anchor))
    note = f"{below} below {percent(y_scale.lo, 0)} drawn as ▼ at the lower edge." if below else ""
    said = f"Validation accuracy against {noun(cost)} of {len(points)} tried models"
    if chosen:
        row = chosen[2]
        said += f"; chosen: {quantity('accuracy', row['val_accuracy'])} at {quantity(cost, row[cost])}"
    hover = {
        "kind": "near",
        "tips": "tried",
        "i": [p[0] for p in points],
        "x": [x_scale(p[1]) for p in points],
        "y": [y_scale(p[2]) for p in points],
    }
    return Plot(frame, said, hover, f"Accuracy against {noun(cost)}", note)


def _free_place(
    frame: Frame, cx: float, cy: float, width: float, dots: Sequence[tuple[float, float]], wall: float | None
) -> tuple[float, float, str]:
    """Where a label of that width beside (cx, cy) covers the fewest points, stays inside and crosses no limit line."""
    best, least = (cx, cy, "start"), float("inf")
    for rise in (-14.0, 24.0, -34.0, 44.0):
        for anchor, left in (("start", cx - 4), ("end", cx + 4 - width), ("middle", cx - width / 2)):
            y = cy + rise
            bad = sum(left - 6 < x < left + width + 6 and y - 16 < v < y + 8 for x, v in dots if (x, v) != (cx, cy))
            bad += 50 * (left < frame.x0 or left + width > frame.x1 or y < frame.y1 + 10 or y > frame.y0 - 6)
            bad += 2 * (wall is not None and left < wall < left + width) + (abs(rise) > 30)
            if bad < least:
                best, least = ({"start": left, "end": left + width, "middle": cx}[anchor], y, anchor), bad
    return best


def _look(row: Mapping[str, Any]) -> str:
    fits = row.get("fits")
    return "unknown" if not isinstance(fits, bool) else "fits" if fits else "over"


def _is_upper(row: Mapping[str, Any]) -> bool:
    return str(row.get("op", "<=")).startswith("<")


def _op(row: Mapping[str, Any]) -> str:
    return "≤" if _is_upper(row) else "≥"


LEGEND = (("chosen", "chosen"), ("fits", "inside the budget"), ("over", "outside"), ("unknown", "tried"))


def legend(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(look, words) of what the Pareto plots of this run contain."""
    tried = rows(run.get("tried"))
    looks = {_look(row) for row in tried}
    if any(row.get("chosen") is True for row in tried):
        looks.add("chosen")
    shown = [(look, words) for look, words in LEGEND if look in looks]
    limits = [("limit", "limit")] if any(number(row.get("limit")) is not None for row in budget_rows(run)) else []
    return [*shown, ("front", "best at that cost"), *limits]


def pareto_svg(run: Mapping[str, Any]) -> str:
    """A self-contained SVG of everything tried, for a README or model card; '' when nothing can be plotted.

    Accuracy against size and against MACs, side by side; follows the reader's light or dark mode.
    """
    if not isinstance(run, Mapping):
        raise ValueError(f"run must be a mapping, got {type(run).__name__}")
    plots = pareto(run)[:2]
    if not plots:
        return ""
    return standalone(plots, clean(run.get("title")) or "Everything tried", legend(run))
