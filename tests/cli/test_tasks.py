"""Segmentation, detection and restoration from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trimtab.data import load_data
from trimtab.deploy import to_onnx


@pytest.fixture
def pictures(tmp_path):
    data = load_data("scenes:size=40,n=8", task="restore", scale=2)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(2):
        data.splits["train"].high(i).save(folder / f"{i}.png")
    return folder


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: Image.open(p).size for p in sorted(folder.iterdir())}


@pytest.fixture
def shrink(trimtab, monkeypatch):
    """Compress an artifact and quantize what comes out, which must be nearly as good; the file is shrunk.onnx."""
    monkeypatch.setitem(to_onnx._EXPORTERS, "dynamo", to_onnx._classic)  # which takes its time

    def call(model: str, data: str, score: str) -> None:
        how = ("--budget", "macs<=80%", "--epochs", "1", "--out", "shrunk", "--json")
        code, text, err = trimtab("compress", model, "--data", data, *how)
        assert code == 0, err
        small = json.loads(text)
        assert small["cost"]["macs"] <= 0.8 * small["before"]["cost"]["macs"] and small[score] >= 0
        code, text, err = trimtab("export", "shrunk", "shrunk.onnx", "--data", data, "--int8", "--json")
        assert code == 0, err
        made = json.loads(text)
        assert made["int8"] and made["size"] < 2 * small["cost"]["params"] + 40_000
        assert made["scores"][score] >= 0.7 * small[score] and made["scores"]["n"] > 0

    return call


def test_a_segmenter_from_data_to_drawn_pictures(trimtab, pictures, shrink):
    code, text, err = trimtab(
        "train", "scenes:classes=2,size=32,n=50", "--task", "segment", "--model", "u_net_nano_32", "--epochs", "1",
        "--out", "seg", "--json",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads(text)
    assert 0 <= told["miou"] <= 1 and 0 <= told["accuracy"] <= 1 and "psnr" not in told
    code, text, err = trimtab("predict", "seg", pictures, "--out", "drawn", "--json")
    assert code == 0, err
    answers = json.loads(text)
    assert [sum(c["share"] for c in a["classes"]) for a in answers] == pytest.approx([1.0, 1.0])
    assert {c["label"] for a in answers for c in a["classes"]} <= {"background", "circle", "square"}
    assert sizes(Path("drawn")) == dict.fromkeys(("0-mask.png", "0.png", "1-mask.png", "1.png"), (40, 40))
    assert np.asarray(Image.open("drawn/0-mask.png")).max() <= 2
    code, _, err = trimtab("train", "scenes:classes=2,size=32,n=50", "--model", "seg", "--epochs", "1", "--out", "more")
    assert code == 0, err  # the task is the artifact's
    code, _, err = trimtab("train", "scenes", "--model", "seg", "--task", "detect")
    assert code == 2 and "seg was trained for task 'segment', got --task detect" in err
    shrink("seg", "scenes:classes=2,size=32,n=50", "miou")


def test_a_detector_from_data_to_drawn_pictures(trimtab, pictures, shrink):
    code, text, err = trimtab(
        "train", "scenes:classes=2,size=64,n=40", "--task", "detect", "--epochs", "1", "--out", "det", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert {"map", "ap50"} <= set(json.loads(text))
    code, text, err = trimtab("predict", "det", pictures, "--out", "drawn", "--least", "0", "--json")
    assert code == 0, err
    for answer in json.loads(text):
        assert answer["objects"] and all(0 <= v <= 40 for o in answer["objects"] for v in o["box"])
        scores = [o["confidence"] for o in answer["objects"]]
        assert scores == sorted(scores, reverse=True)
    assert sizes(Path("drawn")) == {"0.png": (40, 40), "1.png": (40, 40)}
    shrink("det", "scenes:classes=2,size=64,n=40", "ap50")
    code, _, err = trimtab("predict", "shrunk.onnx", pictures, "--least", "0", "--json")
    assert code == 0, err


def test_a_restorer_from_data_to_a_file_and_larger_pictures(trimtab, pictures, shrink):
    code, text, err = trimtab(
        "train", pictures, "--task", "restore", "--load", "scale=3", "--load", "in_chans=1", "--load", "patch=8",
        "--load", "val=0", "--load", "test=0.5", "--epochs", "1", "--out", "res", "--json",
    )  # fmt: skip
    assert code == 1 and "13x13 pixels in low resolution, at least 16 are needed" in err
    code, text, err = trimtab(
        "train", "scenes:size=48,n=20", "--task", "restore", "--load", "scale=3", "--load", "in_chans=1",
        "--epochs", "1", "--out", "res", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert {"psnr", "ssim"} <= set(json.loads(text))
    code, _, err = trimtab("export", "res", "res.onnx", "--data", "scenes:size=48,n=20")
    assert code == 0, err
    for model, out in (("res", "a"), ("res.onnx", "b")):
        code, text, err = trimtab("predict", model, pictures, "--out", out)
        assert code == 0 and "120x120" in text, err
    first, second = (np.asarray(Image.open(f"{out}/0.png")).astype(int) for out in "ab")
    assert first.shape == (120, 120, 3) and np.abs(first - second).max() <= 1
    code, text, err = trimtab(
        "compress", "res", "--data", "scenes:size=48,n=20", "--method", "deconvolution", "--out", "same", "--json",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads(text)  # the same function, so nothing was trained
    assert told["psnr"] == pytest.approx(told["before"]["psnr"], abs=1e-3)
    shrink("res", "scenes:size=48,n=20", "psnr")
    code, _, err = trimtab("predict", "res", pictures)
    assert code == 2 and "give --out, a folder for the restored pictures" in err


RECIPE = """
data: {spec: "scenes:classes=2,size=32,n=50", task: segment}
model: {name: u_net_nano_32}
out: made
phases:
  - train: {epochs: 1}
  - compress: {budget: "macs<=85%"}
  - train: {epochs: 1}
  - export: {exporter: classic}
budget: "size<=4MB"
"""


def test_a_recipe_for_another_task(trimtab):
    Path("recipe.yaml").write_text(RECIPE)
    code, text, err = trimtab("run", "recipe.yaml", "--json")
    assert code == 0, err
    told = json.loads(text)
    assert [p["phase"] for p in told["phases"]] == ["train", "compress", "train", "export"]
    assert all(0 <= p["val_miou"] <= 1 for p in told["phases"]) and 0 <= told["miou"] <= 1 and told["budget"]["met"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["compact", "scenes", "--task", "segment"],
            "compact is for classification; for --task segment use trimtab train",
        ),
        (["train", "--task", "colour"], "--task must be one of classify, segment, detect, restore, got 'colour'"),
        (["train", "--task", "restore", "--load", "void=1"], "--load takes scale, patch, in_chans"),
        (["train", "--task", "restore", "--load", "scale"], "--load must be NAME=VALUE"),
    ],
)
def test_wrong_use_is_told(trimtab, words, said):
    code, _, err = trimtab(*words)
    assert code == 2 and said in err, err
