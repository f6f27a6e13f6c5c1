"""The training curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from .plots import Plot, Tip
from .svg import Frame, Scale, fit_scale, path, short, tag
from .words import clean, get, number, percent, rows

_SAID = {"loss": "loss", "val_loss": "validation loss", "val_accuracy": "validation accuracy", "lr": "learning rate"}


def curves(run: Mapping[str, Any]) -> tuple[list[Plot], list[Tip]]:
    """Loss and validation accuracy by epoch; several phases one after the other when the epoch count starts again."""
    history = rows(get(run, "result", "history"))
    epochs = [number(row.get("epoch")) for row in history]
    rising = all(e is not None for e in epochs) and all(a < b for a, b in pairwise([e or 0.0 for e in epochs]))
    xs = [e or 0.0 for e in epochs] if rising else [float(k) for k in range(1, len(history) + 1)]
    breaks = [] if rising else [k for k in range(1, len(history)) if (epochs[k] or 0) <= (epochs[k - 1] or 0)]
    plots = [
        plot
        for keys, title, say in (
            ({"loss": "training", "val_loss": "validation"}, "Loss", lambda v: f"{v:g}"),
            ({"val_accuracy": "validation", "accuracy": "training"}, "Accuracy", lambda v: f"{round(100 * v, 4):g}%"),
        )
        if (plot := _curve(history, xs, breaks, keys, title, say))
    ]
    tips: list[Tip] = []
    for row, x in zip(history, xs, strict=True):
        facts = []
        for key, words in _SAID.items():
            if (value := number(row.get(key))) is not None:
                facts.append((words, percent(value) if "accuracy" in key else f"{value:.4g}"))
        phase = clean(row.get("phase")) or clean(row.get("stage"))
        epoch = number(row.get("epoch"))
        tips.append((f"Epoch {x if epoch is None else epoch:g}" + (f", {short(phase, 30)}" if phase else ""), facts))
    return plots, tips


def _curve(
    history: list[Mapping[str, Any]],
    xs: list[float],
    breaks: list[int],
    keys: dict[str, str],
    title: str,
    say: Callable[[float], str],
) -> Plot | None:
    series = {key: [number(row.get(key)) for row in history] for key in keys}
    series = {key: values for key, values in series.items() if sum(v is not None for v in values) > 1}
    if not series:
        return None
    flat = [v for values in series.values() for v in values if v is not None]
    frame = Frame(460, 250, top=30)
    x_scale = Scale(xs[0], max(xs[-1], xs[0] + 1), frame.x0, frame.x1)
    if title == "Loss" and min(flat) > 0 and max(flat) / min(flat) > 60:
        y_scale = fit_scale(flat, frame.y0, frame.y1)
    else:
        room = (max(flat) - min(flat)) * 0.06 or 0.02
        top = max(flat) + room
        if title == "Accuracy" and max(flat) <= 1:
            top = min(1.0, top)
        y_scale = Scale(max(0.0, min(flat) - room) if min(flat) >= 0 else min(flat) - room, top, frame.y0, frame.y1)
    frame.y_axis(y_scale, say, about=4)
    frame.x_axis(x_scale, lambda v: f"{v:g}", "step" if breaks else "epoch", about=6)
    frame.add(tag("text", title, class_="name", x=2, y=14))
    for k in breaks:
        frame.add(path([f"M{x_scale((xs[k] + xs[k - 1]) / 2)} {frame.y1}V{frame.y0}"], "break"))
    cuts = [0, *breaks, len(xs)]
    for order, values in enumerate(series.values()):
        steps = []
        for a, b in pairwise(cuts):
            pen = False
            for x, value in zip(xs[a:b], values[a:b], strict=True):
                if value is not None:
                    steps.append(f"{'L' if pen else 'M'}{x_scale(x)} {y_scale(value)}")
                pen = value is not None
        frame.add(path(steps, "curve second" if order else "curve"))
    if len(series) > 1:
        x = frame.x1
        for order, key in reversed(list(enumerate(series))):
            x -= 7.0 * len(keys[key]) + 4
            frame.add(tag("text", keys[key], class_="tick", x=x, y=14))
            frame.add(path([f"M{x - 24:.1f} 10h18"], "curve second" if order else "curve"))
            x -= 38
    first = next(iter(series))
    known = [(x, v) for x, v in zip(xs, series[first], strict=True) if v is not None]
    if title == "Accuracy":
        x, best = max(known, key=lambda p: p[1])
        frame.add(tag("circle", class_="point chosen", cx=x_scale(x), cy=y_scale(best), r=4.5))
        label = f"best {percent(best)}"
        right = x_scale(x) > frame.x1 - 80
        near_top = y_scale(best) < frame.y1 + 24
        anchor = "end" if right else "start"
        y = y_scale(best) + (22 if near_top else -12)
        frame.add(tag("text", label, class_="label", x=x_scale(x) + (2 if right else -2), y=y, text_anchor=anchor))
        said = f"{keys[first].capitalize()} accuracy over {len(xs)} epochs, best {percent(best)}"
    else:
        said = f"{keys[first].capitalize()} loss over {len(xs)} epochs, from {known[0][1]:.3g} to {known[-1][1]:.3g}"
    hover = {
        "kind": "column",
        "tips": "epochs",
        "x": [x_scale(x) for x in xs],
        "y": [y_scale(v) if v is not None else None for v in series[first]],
        "span": [frame.y1, frame.y0],
    }
    return Plot(frame, said, hover, title)
