"""What each section of the report says, as plain values; how it looks is the template's business."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from markupsafe import Markup

from .confusion import heatmap, read_confusion
from .layers import METRICS, LayerPair, layer_bars, layer_tips, pair_layers
from .pareto import legend, pareto, tried_tips
from .plots import Plot, Tip, legend_mark
from .svg import short
from .training import curves
from .words import (
    TITLES,
    budget_rows,
    clean,
    count,
    duration,
    excess,
    get,
    interval,
    items,
    noun,
    number,
    pair,
    percent,
    quantity,
    row_ok,
    rows,
    slack,
)

Section = dict[str, Any]

_PICTURE = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+={0,2}")
_LARGE_PICTURE = 24_000  # characters of base64; larger ones are redrawn at thumbnail size


class Charts:
    """Numbers the charts and collects what the script needs to read them."""

    def __init__(self) -> None:
        self.tips: dict[str, Sequence[Tip]] = {}
        self.hover: dict[str, dict[str, Any]] = {}

    def add(self, plot: Plot, **more: Any) -> dict[str, Any]:
        name = f"c{len(self.hover)}"
        self.hover[name] = plot.hover
        return {"id": name, "plot": plot, **more}

    def json(self) -> Markup:
        """JSON that no text inside can turn into markup: <, > and & are written as escapes."""
        used = {hover.get("tips") for hover in self.hover.values()}
        tips = {name: tip for name, tip in self.tips.items() if name in used}
        text = json.dumps({"tips": tips, "charts": self.hover}, separators=(",", ":"), allow_nan=False)
        for letter in "<>&":
            text = text.replace(letter, f"\\u{ord(letter):04x}")
        return Markup(text)


def _cell(name: str, value: Any) -> dict[str, Any]:
    """A number in a table: as shown, exact, and for sorting."""
    known = number(value)
    if known is None:
        return {"text": "–", "exact": "", "sort": ""}
    text = quantity(name, known)
    exact = "" if name == "accuracy" or known != int(known) or f"{known:.0f}" == text else f"{known:,.0f}"
    return {"text": text, "exact": exact, "sort": f"{known:.10g}"}


def tiles(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The result's main numbers, each with its limit, its uncertainty, or what it was before."""
    cost, limits = get(run, "result", "cost"), {row["name"]: row for row in budget_rows(run)}
    shown: list[dict[str, Any]] = []
    accuracy = get(run, "result", "accuracy")
    for split, title in (("test", "Test accuracy"), ("val", "Validation accuracy")):
        share = number(get(accuracy, split))
        if share is None or (shown and split == "val"):
            continue
        notes = []
        trials = number(get(run, "data", "counts", split))
        if trials and trials > 0 and 0 <= share <= 1:
            low, high = interval(share, trials)
            notes += [f"95% interval {100 * low:.1f}–\u2060{percent(high)}", count(trials, "image")]
        shown.append({"name": title, "value": percent(share), "notes": notes, "exact": ""})
    for name in ("size", "params", "macs", "latency", "memory", "energy"):
        value = number(get(cost, name))
        if value is None:
            continue
        cell, notes = _cell(name, value), []
        row = limits.get(name)
        if row is not None and number(row.get("limit")) is not None:
            notes.append(f"limit {pair(name, value, row['limit'])[1]}")
        before = [number(layer.get(name)) for layer in rows(get(run, "layers", "before"))]
        if name in ("params", "macs") and before and rows(get(run, "layers", "after")):
            notes.append(f"was {quantity(name, sum(v or 0 for v in before))}")
        spread = number(get(cost, "latency_iqr"))
        if name == "latency" and spread is not None:
            notes.append(f"interquartile range {quantity('latency', spread, 2)}")
        if name == "latency" and get(cost, "runtime"):
            notes.append(short(get(cost, "runtime"), 40))
        shown.append({"name": TITLES[name], "value": cell["text"], "notes": notes, "exact": cell["exact"]})
    return shown


def _budget(run: Mapping[str, Any], charts: Charts) -> Section | None:
    shown = []
    for row in budget_rows(run):
        ok, off = row_ok(row), excess(row)
        value, limit = pair(row["name"], row.get("value"), row.get("limit"))
        upper = str(row.get("op", "<=")).startswith("<")
        # The bar is the value, the mark is the limit; both fit, however far the value overshoots.
        seen, bound = number(row.get("value")), number(row.get("limit"))
        top = max(seen or 0.0, bound or 0.0) * (1.0 if ok is False and upper else 1.02)
        drawn = off is not None and top > 0 and (seen or 0.0) >= 0
        shown.append(
            {
                "name": TITLES.get(str(row["name"]), clean(row["name"])),
                "limit": f"{'≤' if upper else '≥'} {limit}",
                "value": value,
                "slack": slack(row),
                "share": round(100 * (seen or 0.0) / top, 1) if drawn else None,
                "mark": round(100 * (bound or 0.0) / top, 1) if drawn else None,
                "look": {True: "yes", False: "no"}.get(ok, "open") if ok is not None else "open",
                "state": {True: "✓ met", False: "✗ not met"}[ok] if ok is not None else "not measured",
            }
        )
    text = clean(get(run, "budget", "text"))
    return {"id": "budget", "title": "Budget", "text": text, "rows": shown} if shown or text else None


def _tried(run: Mapping[str, Any], charts: Charts) -> Section | None:
    tried = rows(run.get("tried"))
    if not tried:
        return None
    names = ("val_accuracy", "size", "macs", "params", "latency", "memory", "seconds")
    columns = [name for name in names if any(number(row.get(name)) is not None for row in tried)]
    titles = {"val_accuracy": "Validation accuracy", "seconds": "Took"} | TITLES
    shown = []
    for index, row in enumerate(tried):
        cells = [_cell({"val_accuracy": "accuracy"}.get(name, name), row.get(name)) for name in columns]
        for name, cell in zip(columns, cells, strict=True):
            if name == "seconds":
                cell["text"], cell["exact"] = duration(row.get(name)), ""
        shown.append(
            {
                "index": index,
                "name": clean(row.get("name")) or f"candidate {index + 1}",
                "stage": clean(row.get("stage")),
                "chosen": row.get("chosen") is True,
                "fits": row["fits"] if isinstance(row.get("fits"), bool) else None,
                "cells": cells,
            }
        )
    inside = sum(row["fits"] is True for row in shown)
    intro = f"{count(len(tried), 'model was', 'models were')} tried"
    if any(row["fits"] is not None for row in shown):
        said = "all" if inside == len(shown) else inside if inside else "none"
        intro += f"; {said} of them {'lies' if inside in (0, 1) else 'lie'} inside the budget"
    drawn = pareto(run)
    charts.tips["tried"] = tried_tips(run)
    return {
        "id": "tried",
        "title": "Everything tried",
        "intro": intro + ("." if not drawn else ". Up and to the left is better."),
        "charts": [charts.add(plot) for plot in drawn],
        "legend": [(legend_mark(look), words) for look, words in legend(run)],
        "columns": [titles[name] for name in columns],
        "stages": any(row["stage"] for row in shown),
        "fits": any(row["fits"] is not None for row in shown),
        "rows": shown,
    }


def _model(run: Mapping[str, Any], charts: Charts) -> Section | None:
    result = get(run, "result")
    name, summary = clean(get(result, "model")), clean(get(result, "summary"))
    edits = [clean(edit) for edit in items(get(result, "edits")) if clean(edit)]
    made = [
        {
            "name": clean(file.get("name")),
            "bytes": quantity("size", size) if (size := number(file.get("bytes"))) else "",
        }
        for file in rows(get(result, "files"))
        if clean(file.get("name"))
    ]
    per_layer = layers(pair_layers(get(run, "layers", "before"), get(run, "layers", "after")), charts)
    if not (name or summary or edits or made or per_layer["layers"]):
        return None
    return {
        "id": "model",
        "title": "The model",
        "name": name,
        "summary": summary,
        "edits": edits,
        "edits_title": f"What was changed, in {count(len(edits), 'edit')}",
        "files": made,
        "alone": False,
        **per_layer,
    }


def layers(pairs: list[LayerPair], charts: Charts) -> Section:
    both = any(p.before for p in pairs) and any(p.after for p in pairs)
    charts.tips["layers"] = layer_tips(pairs)
    drawn = [(metric, plot) for metric in METRICS if (plot := layer_bars(pairs, metric))]
    metrics = [metric for metric, _ in drawn][:2] if both else [metric for metric, _ in drawn]
    sides = ("before", "after") if both else ("after" if any(p.after for p in pairs) else "before",)
    bar_of = metrics[0] if metrics else "macs"

    def values(side: str, metric: str) -> list[float | None]:
        return [number(get(getattr(p, side), metric)) for p in pairs]

    columns = {(metric, side): values(side, metric) for metric in metrics for side in sides}
    peak = max((v for (metric, _), vs in columns.items() if metric == bar_of for v in vs if v), default=0.0)
    shown = []
    for k, p in enumerate(pairs):
        bars = [round(100 * (columns[bar_of, side][k] or 0.0) / peak, 1) if peak else 0 for side in sides]
        note = "" if not both else "removed" if p.after is None else "new" if p.before is None else ""
        cells = [_cell(metric, column[k]) for (metric, _), column in columns.items()]
        shown.append(
            {
                "name": p.name,
                "kind": clean(get(p.after or p.before, "kind")),
                "note": note,
                "cells": cells,
                "bars": bars,
            }
        )
    return {
        "charts": [charts.add(plot, metric=metric) for metric, plot in drawn],
        "both": both,
        "layers": shown if columns else [],
        "kinds": any(row["kind"] for row in shown),
        "columns": [TITLES[metric] + (f" {side}" if both else "") for metric, side in columns],
        "totals": [_cell(metric, sum(v or 0.0 for v in column)) for (metric, _), column in columns.items()],
        "bar_of": noun(bar_of),
    }


def _training(run: Mapping[str, Any], charts: Charts) -> Section | None:
    drawn, tips = curves(run)
    if not drawn:
        return None
    charts.tips["epochs"] = tips
    steps = count(len(rows(get(run, "result", "history"))), "epoch")
    return {"id": "training", "title": "Training", "intro": f"{steps}.", "charts": [charts.add(plot) for plot in drawn]}


def _classes(run: Mapping[str, Any], charts: Charts) -> Section | None:
    confusion = read_confusion(run)
    if confusion is None:
        return None
    labels = confusion.labels
    seen = [sum(row) for row in confusion.matrix]
    order = sorted(range(len(labels)), key=lambda k: (confusion.recall(k) is None, confusion.recall(k) or 0.0))
    wrong = confusion.mistakes()
    right = sum(confusion.matrix[k][k] for k in range(len(labels))) / confusion.total
    of = f" of {count(confusion.total, 'image')}" if confusion.counts else ""
    intro = f"{percent(right)}{of} right."
    weakest = confusion.recall(order[0])
    if wrong and weakest is not None:
        intro += f" The weakest class is {short(labels[order[0]], 40)}, found {percent(weakest)} of the time."

    def said(value: float) -> str:
        return f"{value:,.0f}" if confusion.counts else f"{value:.3g}"

    return {
        "id": "classes",
        "title": "Class by class",
        "intro": intro,
        "chart": charts.add(heatmap(confusion)),
        "many": len(labels) > 20,
        "unit": "Images" if confusion.counts else "Weight",
        "mistakes": [
            {"true": labels[t], "predicted": labels[p], "count": said(v), "share": percent(v / seen[t])}
            for t, p, v in wrong[:10]
        ],
        "rows": [
            {
                "name": labels[k],
                "cells": [
                    {"text": said(seen[k]), "exact": "", "sort": f"{seen[k]:.10g}"},
                    _cell("accuracy", confusion.recall(k)),
                    _cell("accuracy", confusion.precision(k)),
                ],
            }
            for k in order
        ],
    }  # fmt: skip


def picture(source: Any, edge: int = 160) -> str:
    """A data URI that is safe to show, large ones redrawn to `edge` pixels; '' for anything else."""
    if not isinstance(source, str) or not _PICTURE.fullmatch(source):
        return ""
    if len(source) <= _LARGE_PICTURE:
        return source
    try:
        from PIL import Image  # only for pictures too large to mail

        image: Image.Image = Image.open(BytesIO(base64.b64decode(source.split(",", 1)[1])))
        image.draft("RGB", (2 * edge, 2 * edge))
        image = image.convert("RGB")
        image.thumbnail((edge, edge))
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=80)
    except Exception:  # truncated, hostile or of an unknown kind: the report is worth more than one picture
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _confidence(value: Any) -> str:
    share = number(value)
    if share is None or not 0 <= share <= 1:
        return ""
    return f"{100 * share:.0f}%" if 0.005 < share < 0.995 else "over 99%" if share > 0.5 else "under 1%"


def _samples(run: Mapping[str, Any], charts: Charts) -> Section | None:
    shown = []
    for k, row in enumerate(rows(run.get("samples")), 1):
        label, predicted = (None if row.get(key) is None else clean(row[key]) for key in ("label", "predicted"))
        look = "open" if label is None or predicted is None else "right" if label == predicted else "wrong"
        alt = f"Sample {k}" + (f", true class {label}" if label is not None else "")
        shown.append(
            {
                "image": picture(row.get("image")),
                "alt": alt + (f", predicted {predicted}" if predicted is not None else ""),
                "label": short(label or "", 40),
                "predicted": short(predicted or "", 40),
                "confidence": _confidence(row.get("confidence")),
                "look": look,
            }
        )
    if not shown:
        return None
    wrong, right = (sum(row["look"] == look for row in shown) for look in ("wrong", "right"))
    sides = [number(side) for side in items(get(run, "data", "size"))]
    intro = f"{count(len(shown), 'picture')}" + (f", {right} right and {wrong} wrong" if right + wrong else "")
    intro += ", with the model's own confidence." if any(row["confidence"] for row in shown) else "."
    tiny = bool(sides) and max(side or 0 for side in sides) <= 64
    return {
        "id": "samples",
        "title": "Predictions",
        "intro": intro,
        "rows": shown,
        "wrong": wrong,
        "right": right,
        "tiny": tiny,
    }


def data_facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known about the data, as (name, value)."""
    data = get(run, "data")
    facts = [("Name", clean(get(data, "name"))), ("Task", clean(get(data, "task")))]
    sides = [number(side) for side in items(get(data, "size"))]
    chans = number(get(data, "in_chans"))
    if len(sides) == 2 and all(sides):
        colour = {1: "grey", 3: "colour"}.get(int(chans), count(chans, "channel")) if chans else ""
        facts.append(("Pictures", f"{sides[0]:.0f} × {sides[1]:.0f} pixels" + (f", {colour}" if colour else "")))
    counts = get(data, "counts")
    if isinstance(counts, Mapping):
        words = {"train": "to train", "val": "to validate", "test": "to test"}
        said = [
            f"{value:,.0f} {words.get(key, clean(key))}"
            for key, n in counts.items()
            if (value := number(n)) is not None
        ]
        facts.append(("Images", ", ".join(said)))
    return [(name, value) for name, value in facts if value]


def _data(run: Mapping[str, Any], charts: Charts) -> Section | None:
    warnings = [clean(warning) for warning in items(get(run, "data", "warnings")) if clean(warning)]
    classes = [clean(name) for name in items(get(run, "data", "class_names"))]
    facts = data_facts(run)
    known = number(get(run, "data", "num_classes"))
    if known and not classes:
        facts.append(("Classes", f"{known:.0f}"))
    if not (facts or warnings or classes):
        return None
    return {
        "id": "data",
        "title": "Data",
        "nav": f"Data ({count(len(warnings), 'warning')})" if warnings else "Data",
        "facts": facts,
        "classes": classes,
        "classes_title": count(len(classes), "class", "classes"),
        "warnings": warnings,
        "warnings_title": "Look at this before you trust the numbers",
    }


def machine_facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The machine as (name, value)."""
    words = {"cpu": "Processor", "cores": "Cores", "memory_gb": "Memory", "gpu": "GPU", "os": "System"}
    found = get(run, "machine")
    if not isinstance(found, Mapping):
        return []
    known = {key: value for key, value in found.items() if clean(value)}
    return [
        (words.get(key, clean(key)), f"{clean(v)} GB" if key == "memory_gb" else clean(v)) for key, v in known.items()
    ]


def _made(run: Mapping[str, Any], charts: Charts) -> Section | None:
    versions = get(run, "versions")
    pairs = [(clean(k), clean(v)) for k, v in versions.items() if clean(v)] if isinstance(versions, Mapping) else []
    groups = [(title, facts) for title, facts in (("Machine", machine_facts(run)), ("Versions", pairs)) if facts]
    return {"id": "made", "title": "How it was made", "groups": groups} if groups else None


SECTIONS = (_budget, _tried, _model, _training, _classes, _samples, _data, _made)
