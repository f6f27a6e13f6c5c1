"""The charts, as pictures that must be true."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from importlib.resources import files
from itertools import pairwise
from typing import Any

import pytest

from tests.report import sample
from trimtab import report
from trimtab.report.confusion import heatmap, read_confusion
from trimtab.report.layers import layer_bars, pair_layers
from trimtab.report.pareto import front, pareto
from trimtab.report.svg import Scale, fit_scale, tag
from trimtab.report.training import curves

SVG = "{http://www.w3.org/2000/svg}"


def test_tag_escapes_text_and_attributes() -> None:
    assert tag("text", "<b>", title='"&') == '<text title="&#34;&amp;">&lt;b&gt;</text>'


@pytest.mark.parametrize(
    ("lo", "hi"), [(4e3, 3e6), (0.1, 0.11), (1, 7.9), (95e3, 97e3), (3.0, 25.0), (1e-5, 1e9), (0, 0)]
)
def test_axes_have_a_readable_number_of_rising_ticks(lo: float, hi: float) -> None:
    scale = fit_scale([lo, hi], 0, 400)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 8
    assert all(a < b for a, b in pairwise(ticks))
    assert all(scale.lo * 0.999 <= t <= scale.hi * 1.001 for t in ticks)


def test_scale_holds_outsiders_at_its_edges() -> None:
    scale = Scale(1, 100, 0, 10, log=True)
    assert [scale(v) for v in (0.0, 1, 10, 100, 1e9)] == [0, 0, 5, 10, 10]


def test_front_equals_the_definition(run: dict[str, Any]) -> None:
    points = [(row["size"], row["val_accuracy"]) for row in run["tried"]]
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] >= p[1]}
    assert front(points) == sorted(set(points) - beaten)


def test_pareto_draws_every_model_once_in_the_right_place(run: dict[str, Any]) -> None:
    size, macs = pareto(run)
    for plot, cost in ((size, "size"), (macs, "macs")):
        assert plot.hover["i"] == list(range(43))
        assert len(re.findall('class="point (?:fits|over|chosen|unknown)"', plot.svg)) == 43 + 1
        order = sorted(range(43), key=lambda k: run["tried"][k][cost])
        xs = [plot.hover["x"][k] for k in order]
        assert xs == sorted(xs)
        assert plot.svg.count('class="point chosen"') == plot.svg.count('class="halo"') == 1
        assert plot.svg.count('class="limit"') == 2  # the cost's and the accuracy's


def test_pareto_adds_a_panel_for_a_bounded_latency(run: dict[str, Any]) -> None:
    run["budget"]["rows"].append({"name": "latency", "op": "<=", "limit": 1e-3, "value": 3e-4, "ok": True})
    assert [plot.title for plot in pareto(run)][-1] == "Accuracy against latency"


def test_very_bad_models_do_not_squash_the_good_ones(run: dict[str, Any]) -> None:
    run["budget"] = None
    run["tried"][0]["val_accuracy"] = 0.1
    plot = pareto(run)[0]
    good = [y for y, row in zip(plot.hover["y"], run["tried"], strict=True) if row["val_accuracy"] > 0.85]
    assert max(good) - min(good) > 100  # of some 250 units
    assert "drawn as ▼" in plot.note


def test_pareto_svg_is_a_complete_picture_on_its_own(run: dict[str, Any]) -> None:
    root = ElementTree.fromstring(report.pareto_svg(run))
    assert root.tag == SVG + "svg"
    assert root.get("role") == "img" and "chosen" in (root.get("aria-label") or "")
    assert root.find(f"{SVG}style") is not None
    text = report.pareto_svg(run)
    assert not re.search(r"(?:href|src)=|url\(|@import|<script", text)


@pytest.mark.parametrize(
    "tried", [None, [], "x", [{}], [{"val_accuracy": 0.5}], [{"size": 3, "val_accuracy": None}], [1, 2]]
)
def test_nothing_to_plot_is_an_empty_picture(tried: Any) -> None:
    assert report.pareto_svg({"tried": tried}) == ""


def test_a_single_candidate_can_be_plotted() -> None:
    svg = report.pareto_svg({"tried": [{"name": "one", "size": 9e4, "val_accuracy": 0.5, "chosen": True}]})
    assert svg.count('class="point chosen"') == 2  # in the plot and in the legend
    ElementTree.fromstring(svg)


def test_a_hostile_run_still_gives_well_formed_svg() -> None:
    root = ElementTree.fromstring(report.pareto_svg(sample.hostile()))
    assert not list(root.iter(f"{SVG}script")) and not list(root.iter(f"{SVG}svg"))[1:]


def test_layers_are_paired_by_name_in_network_order() -> None:
    before = [{"name": n, "macs": 8} for n in ("a", "b", "c", "d")]
    after = [{"name": n, "macs": 2} for n in ("a", "b.0", "b.1", "c")]
    pairs = pair_layers(before, after)
    assert [p.name for p in pairs] == ["a", "b.0", "b.1", "b", "c", "d"]
    assert [p.name for p in pairs if p.after is None] == ["b", "d"]


def test_layer_bars_say_the_totals(run: dict[str, Any]) -> None:
    plot = layer_bars(pair_layers(run["layers"]["before"], run["layers"]["after"]), "macs")
    assert plot is not None
    total = sum(row["macs"] for row in run["layers"]["before"])
    assert f"in all {total / 1e6:.0f} M before" in plot.said
    assert len(plot.hover["x"]) == len(run["layers"]["before"])
    assert layer_bars([], "macs") is None


def test_training_phases_follow_each_other_and_gaps_stay_open() -> None:
    rows = [
        {"epoch": e, "loss": v, "val_accuracy": 0.5}
        for e, v in ((1, 2.0), (2, float("nan")), (3, 1.0), (1, 0.9), (2, 0.8))
    ]
    (loss, _), tips = curves({"result": {"history": rows}})
    assert loss.svg.count('class="break"') == 1
    line = re.search(r'class="curve" d="([^"]*)"', loss.svg)
    assert line and line[1].count("M") == 3  # broken at the NaN and between the phases
    assert loss.hover["y"][1] is None
    assert [title for title, _ in tips] == ["Epoch 1", "Epoch 2", "Epoch 3", "Epoch 1", "Epoch 2"]


@pytest.mark.parametrize("size", [2, 3, 10, 20, 21, 36, 37, 100])
def test_heatmap_of_any_number_of_classes_fits_and_is_small(size: int) -> None:
    matrix = [[9 if t == p else (t * p) % 3 for p in range(size)] for t in range(size)]
    confusion = read_confusion({"confusion": {"labels": [f"class {k}" for k in range(size)], "matrix": matrix}})
    assert confusion is not None
    svg = heatmap(confusion).svg
    ElementTree.fromstring(svg)
    assert len(svg) < 320_000
    assert ('class="cell' in svg) == (size <= 20)


def test_confusion_numbers() -> None:
    confusion = read_confusion({"confusion": {"labels": ["cat", "dog"], "matrix": [[8, 2], [0, 0]]}})
    assert confusion is not None
    assert (confusion.recall(0), confusion.precision(0), confusion.recall(1), confusion.precision(1)) == (
        0.8,
        1.0,
        None,
        0.0,
    )
    assert confusion.mistakes() == [(0, 1, 2.0)]


@pytest.mark.parametrize(
    "matrix", [None, [], [[1]], [[1, 2]], [[1, 2], [3]], [[1, -1], [0, 1]], [[0, 0], [0, 0]], [[1, "x"], [0, 1]]]
)
def test_a_matrix_that_makes_no_sense_is_left_out(matrix: Any) -> None:
    assert read_confusion({"confusion": {"labels": ["a", "b"], "matrix": matrix}}) is None


def test_labels_of_another_length_fall_back_to_numbers() -> None:
    confusion = read_confusion({"confusion": {"labels": ["a"], "matrix": [[1, 0], [0, 1]]}})
    assert confusion is not None and confusion.labels == ["0", "1"]


# ---------------------------------------------------------------- colours: WCAG 2 contrast, computed


def _themes() -> tuple[dict[str, str], dict[str, str]]:
    css = files("trimtab.report").joinpath("chart.css").read_text("utf-8")
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in css.split("@media", 1))
    return light, light | dark


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))


def _contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    light = [
        sum(
            w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
            for w, c in zip((0.2126, 0.7152, 0.0722), x)
        )
        for x in (a, b)
    ]
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_enough_contrast(dark: bool) -> None:
    theme = _themes()[dark]
    grounds = {"paper": ("ink", "soft", "blue", "orange", "green"), "card": ("ink", "soft", "blue")}
    grounds |= {"good-wash": ("green",), "bad-wash": ("orange",), "note-wash": ("ink",)}
    for ground, texts in grounds.items():
        for text in texts:
            assert _contrast(_rgb(theme[ground]), _rgb(theme[text])) >= 4.5, (ground, text)
    assert _contrast(_rgb(theme["paper"]), _rgb(theme["ink"])) >= 7


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("hue", ["blue", "orange"])
def test_numbers_in_the_heatmap_can_be_read_on_every_shade(dark: bool, hue: str) -> None:
    theme = _themes()[dark]
    css = files("trimtab.report").joinpath("chart.css").read_text("utf-8")
    shades = {int(k): float(a) for k, a in re.findall(r"\.s(\d) { fill-opacity: ([\d.]+)", css)}
    assert list(shades) == list(range(1, 9)) and list(shades.values()) == sorted(shades.values())
    for level, opacity in shades.items():
        ground = tuple(opacity * a + (1 - opacity) * b for a, b in zip(_rgb(theme[hue]), _rgb(theme["card"])))
        text = theme["on-full"] if level >= 7 else theme["on-mid"] if level == 6 else theme["ink"]
        assert _contrast(ground, _rgb(text)) >= 4.5, level
