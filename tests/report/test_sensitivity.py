"""The picture of a sensitivity profile shows every number, and nothing that the profile does not say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from trimtab import report

DROPS = {("blocks.0.mlp", 1): 2.0, ("blocks.0.mlp", 4): 0.5, ("blocks.1.mlp", 1): 0.125, ("blocks.1.mlp", 8): -0.02}


def profile() -> dict:
    rows = [{"layer": layer, "chi": chi, "drop": drop, "metric": 1 + drop} for (layer, chi), drop in DROPS.items()]
    return {"base": 1.0, "rows": rows, "spectra": {}, "sites": 2}


def test_every_cell_is_drawn_and_said(tmp_path):
    drawn = report.sensitivity_svg(profile(), tmp_path / "s.svg")
    assert (tmp_path / "s.svg").read_text(encoding="utf-8") == drawn
    texts = [e.text for e in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    for said in ("blocks.0.mlp", "blocks.1.mlp", "1", "4", "8", "+2", "+0.5", "+0.12", "−0.02"):
        assert said in texts
    assert "worst: blocks.0.mlp at bond dimension 1, +2" in drawn


def test_worse_is_orange_and_stronger_and_better_is_blue():
    drawn = report.sensitivity_svg(profile())
    shades = re.findall(r'class="heat (hit|miss) s(\d)"', drawn)
    assert sorted(shades) == [("hit", "1"), ("miss", "2"), ("miss", "4"), ("miss", "8")]


def test_names_are_escaped():
    rows = [{"layer": "<script>", "chi": 1, "drop": 1.0}]
    drawn = report.sensitivity_svg({"rows": rows})
    assert "<script>" not in drawn and "&lt;script&gt;" in drawn


def test_an_empty_profile_is_refused():
    with pytest.raises(ValueError, match="profile must have rows with layer, chi and drop, got none"):
        report.sensitivity_svg({"rows": []})
