"""`trimtab analyze filters`: what it opens, says and writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab as tt


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with two untrained models, one of them where a finished run leaves it."""
    root = tmp_path_factory.mktemp("runs")
    for name, seed in (("a", 0), ("b/model", 1)):
        model = tt.create_model("resnet8_mlperf_tiny", num_classes=10, in_chans=3, img_size=32, seed=seed)
        tt.save(model, root / name)
    return root


def test_layers_and_drift_are_printed_and_the_page_is_complete(trimtab, runs, tmp_path) -> None:
    code, out, err = trimtab("analyze", "filters", runs / "a", runs / "b", "--out", "found.html")
    assert (code, err) == (0, "")
    assert out.count("random") > 10  # untrained layers are named, and so is the column
    assert re.search(rf"drift between {runs}/a and {runs}/b: 0\.\d+", out)
    assert f"{runs}/a: 7 of 7 layers degenerated" in out and "page: found.html" in out
    page = (tmp_path / "found.html").read_text()
    assert page.count("<svg") == 5 and "<script" not in page and not re.search(r"(src|href)=\"http", page)
    layers = [n for n, m in tt.load(runs / "a").named_modules() if getattr(m, "kernel_size", None) == (3, 3)]
    assert len(layers) == 7 and all(f">{name}</th>" in page for name in layers)


def test_a_folder_stands_for_all_artifacts_in_it(trimtab, runs) -> None:
    value = json.loads(trimtab("analyze", "filters", runs, "--json")[1])
    assert [m["name"] for m in value["models"]] == [str(runs / "a"), str(runs / "b/model")]
    assert value["drift"][0][1] == value["drift"][1][0] > 0
    assert Path(value["page"]).is_file()


def test_json_says_the_same_as_the_function(trimtab, runs) -> None:
    value = json.loads(trimtab("--json", "analyze", "filters", runs / "a", "--low-entropy", "0.9")[1])
    want = tt.compress.analyze.filters({str(runs / "a"): tt.load(runs / "a")}, low_entropy=0.9).asdict()
    assert value["quality"] == json.loads(json.dumps(want["quality"]))
    assert value["ratio"] == want["ratio"]


def test_a_registry_name_is_analyzed(trimtab) -> None:
    value = json.loads(trimtab("analyze", "filters", "simplenet_cifar_310k", "--json")[1])
    assert value["models"][0]["layers"] == 11


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["analyze", "filters"], 2, "Missing argument"),
        (["analyze", "filters", "resnet8_mlperf_tin"], 2, "did you mean resnet8_mlperf_tiny"),
        (["analyze", "filters", "."], 2, "is a folder without artifacts"),
        (["analyze", "filters", "no/such"], 2, "neither an artifact folder"),
        (["analyze", "filters", "resnet8_mlperf_tiny", "--out", "x.pdf"], 2, "--out must end in .html"),
        (["analyze", "filters", "resnet8_mlperf_tiny", "--sparse", "2"], 2, "--sparse"),
        (["analyze", "filters", "mixer_s32_224"], 1, "has no 3x3 convolution"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_use_is_one_line(trimtab, args, code, says) -> None:
    got, out, err = trimtab(*args)
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert err.startswith("error: ") and says in err


def test_help_has_examples_and_needs_no_torch(trimtab) -> None:
    code, out, _ = trimtab("analyze", "filters", "--help")
    assert code == 0
    assert len(re.findall(r"^ *trimtab analyze filters\b", out.split("Examples:")[1], re.MULTILINE)) >= 2
    check = (
        "import sys; from trimtab.cli import main; main(['analyze', 'filters', '-h']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0
