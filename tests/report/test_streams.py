"""The picture of a stream."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from trimtab.report import stream_svg

SVG = "{http://www.w3.org/2000/svg}"
RESULT = {
    "method": "a<b",
    "accuracy": [[0.9, None, None], [0.5, 0.8, None], [0.25, 0.4, 0.7]],
    "so_far": [0.9, 0.65, 0.45],
    "learned": [1, 2, 3],
    "images": [10, 10, 10],
}
JOINT = {"method": "joint", "accuracy": [[0.9, 0.8, 0.7]], "so_far": [0.8], "learned": [3], "images": [10, 10, 10]}


def test_a_line_for_each_task_and_one_for_all(tmp_path):
    text = stream_svg([RESULT, JOINT], tmp_path / "s.svg", title="Two")
    tree = ET.fromstring(text)
    assert (tmp_path / "s.svg").read_text() == text
    lines = [p.get("d") for p in tree.iter(f"{SVG}path") if p.get("class") == "front"]
    assert [d.count("L") for d in lines] == [2, 1]  # the third task was seen once: a dot, as all of joint training
    assert [p.get("d").count("L") for p in tree.iter(f"{SVG}path") if p.get("class") == "curve second"] == [2]
    assert len(list(tree.iter(f"{SVG}circle"))) == 1 + 3 + 1
    assert "a<b: accuracy on all tasks so far from 90.0% to 45.0%" in tree.get("aria-label")


def test_nothing_to_draw_is_refused():
    for nothing in ([], {}, {"accuracy": []}):
        with pytest.raises(ValueError, match="results must be dicts of stream results"):
            stream_svg(nothing)
