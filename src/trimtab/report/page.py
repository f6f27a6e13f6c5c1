"""The report: one HTML file that opens offline, needs nothing from anywhere and can be mailed.

The charts are SVG drawn here (`plots` and its neighbours), not plotly: the one bundle that comes with plotly puts
4.8 MB into every file, while a whole report of ours is some tens of KB, prints as drawn, follows dark mode and can be
read without a script.
Whatever comes from a run is untrusted: the template escapes it, pictures are only taken as base64 data, the data for
the script cannot end its element, and the page's own policy allows no other script and no request.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, Template
from markupsafe import Markup

from .layers import METRICS, layer_bars, pair_layers
from .output import resource, save
from .plots import standalone
from .sections import SECTIONS, Charts, layers, tiles
from .words import budget_rows, clean, duration, get, guessing, items, moment, number, verdict

_UNITS = re.compile(r"(?<=\d) (?=(?:[kMGT]|[KMG]?B|bytes|[mµ]?[sJ])\b)|(?<=\d [kMGT]) (?=parameters|MACs)")
_FAVICON = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>"
    "<path fill='#0a5ea8' d='M1 12L15 3v3.5L8 12z'/><path fill='#c2460a' d='M10 12l5-4v4z'/></svg>"
)


def write(run: Mapping[str, Any], path: str | Path) -> Path:
    """Write the report of `run` as one self-contained HTML file (``report.html`` inside, when `path` is a directory).

    Any key of the run may be missing or null; what depends on it is left out.
    """
    if not isinstance(run, Mapping):
        raise ValueError(f"run must be a mapping, got {type(run).__name__}")
    charts = Charts()
    sections = [section for make in SECTIONS if (section := make(run, charts))]
    created = moment(run.get("created"))
    took = number(run.get("seconds"))
    over = ["trimtab report", created, f"made in {duration(took)}" if took is not None else ""]
    html = _render(
        title=clean(run.get("title")) or "trimtab report",
        over_title=" · ".join(part for part in over if part),
        verdict=verdict(run) if _has_result(run) else None,
        notice=guessing(run),
        command=clean(run.get("command")),
        tiles=tiles(run),
        sections=sections,
        charts=charts,
        footer=_footer(run),
    )
    return save(html, path, inside="report.html")


def layers_plot(cost_rows: Any, path: str | Path, *, title: str = "Cost per layer") -> Path:
    """Write the per-layer costs as a page (``.html``) or as one picture of the MACs (``.svg``).

    `cost_rows`: dictionaries or `LayerCost`s with name, kind, params, macs, activations; or a `Cost` with layers.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm", ".svg"):
        raise ValueError(f"path must end in .html or .svg, got {path.name!r}")
    found = [_mapping(row) for row in getattr(cost_rows, "layers", None) or items(cost_rows)]
    pairs = pair_layers([], found)
    if not pairs:
        raise ValueError("cost_rows must have at least one layer, got none; measure with per_layer=True")
    if path.suffix.lower() == ".svg":
        drawn = [plot for metric in METRICS if (plot := layer_bars(pairs, metric))]
        if not drawn:
            raise ValueError("cost_rows must have a cost above zero in some layer, got none")
        return save(standalone(drawn[:1], f"{drawn[0].title} per layer"), path, inside="layers.svg")
    charts = Charts()
    blank = {"id": "model", "title": "Layer by layer", "summary": "", "edits": [], "files": [], "alone": True}
    html = _render(
        title=clean(title),
        over_title="trimtab measure",
        verdict=None,
        notice="",
        command="",
        tiles=[],
        sections=[blank | layers(pairs, charts)],
        charts=charts,
        footer=_footer({}),
    )
    return save(html, path, inside="layers.html")


# ---------------------------------------------------------------- the frame


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["glue"] = lambda text: _UNITS.sub("\u00a0", text)
    return environment.from_string(resource("page.html"))


def _render(*, charts: Charts, **said: Any) -> str:
    script = resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template().render(
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        style=Markup(resource("chart.css") + resource("page.css")),
        favicon="data:image/svg+xml," + quote(_FAVICON),
        chart_data=charts.json(),
        **said,
    )


def _mapping(row: Any) -> Any:
    if is_dataclass(row) and not isinstance(row, type):
        return {field.name: getattr(row, field.name) for field in fields(row)}
    return row


def _has_result(run: Mapping[str, Any]) -> bool:
    return bool(get(run, "result")) or bool(budget_rows(run)) or isinstance(get(run, "budget", "met"), bool)


def _footer(run: Mapping[str, Any]) -> str:
    version = clean(get(run, "versions", "trimtab"))
    return f"Made with trimtab{' ' + version if version else ''}. This file is complete: it loads nothing."
