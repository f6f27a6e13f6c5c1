"""The picture of accuracy over bytes."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest

from evidence import pictures, tables
from trimtab.report import rates_svg

SVG = "{http://www.w3.org/2000/svg}"


def test_curves_are_lines_points_are_dots_and_names_do_not_overlap(tmp_path: Path) -> None:
    curves = {
        "ours": [(100.0, 0.8), (50.0, 0.7)],
        "JPEG": [(60, 0.3), (90, 0.5), (400, 0.8)],
        "a<b": [(8192, 0.81)],
    }
    text = rates_svg(curves, tmp_path / "r.svg", title="Rates")
    assert (tmp_path / "r.svg").read_text() == text
    tree = ET.fromstring(text)
    paths = {c: [p.get("d") for p in tree.iter(f"{SVG}path") if p.get("class") == c] for c in ("curve", "curve second")}
    assert [d.count("L") for d in paths["curve"]] == [1, 0] and [d.count("L") for d in paths["curve second"]] == [2, 0]
    assert len(list(tree.iter(f"{SVG}circle"))) == 2 + 3 + 1 + 1
    heights = [float(t.get("y")) for t in tree.iter(f"{SVG}text") if t.text in curves]
    assert len(heights) == 3 and all(b - a > 15 for a, b in pairwise(sorted(heights)))
    assert "ours: 80.0% with 100 bytes" in tree.get("aria-label", "")


@pytest.mark.parametrize("curves", [{}, {"a": []}, {"a": [(0.0, 0.5)]}, {c: [(1, 0.1), (2, 0.2)] for c in "abcde"}])
def test_what_cannot_be_drawn_is_refused(curves: dict[str, list[tuple[float, float]]]) -> None:
    with pytest.raises(ValueError, match="curves"):
        rates_svg(curves)


def test_the_picture_of_the_documentation_is_drawn_from_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(size: float, share: float) -> dict[str, dict[str, float]]:
        return {"bytes": {"mean": size}, "accuracy": {"mean": share}}

    def points(*found: tuple[float, float]) -> list[dict[str, float]]:
        return [{"bytes": b, "accuracy": a, "file bytes": b + 20} for b, a in found]

    claim = {
        "id": "rate_distortion",
        "data": "cifar10 at 16 x 16, 4000 training images",
        "measured": {"beta 0.1": row(90, 0.7), "beta 0.4": row(50, 0.6)},
        "baseline": {
            "JPEG": points((60, 0.3), (200, 0.7)),
            "WEBP": points((50, 0.3), (150, 0.7)),
            "uniform 8 bits, same bottleneck": row(120, 0.7),
            "uniform 4 bits, same bottleneck": row(60, 0.65),
            "float32 features": {"bytes": 8192.0, "accuracy": 0.75},
        },
    }
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    assert pictures.update(tmp_path) == [] and tables.picture("rates") == "*Not measured yet.*"
    (tmp_path / "entropic_student.json").write_text(json.dumps({"claims": [claim]}))
    (drawn,) = pictures.update(tmp_path)
    words = [t.text for t in ET.fromstring(drawn.read_text()).iter(f"{SVG}text")]
    assert {"entropic student", "JPEG", "WEBP", "equal steps, zlib", "features in float32"} <= set(words)
    assert pictures.update(tmp_path) == []  # it is what it was
    assert tables.picture("rates").endswith(f"(../images/{drawn.name})")
