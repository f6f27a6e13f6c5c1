"""Volumes from the command line: trained, measured, compressed, exported and looked at."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from trimtab.data.synthetic import nested_ellipsoids
from trimtab.deploy import to_onnx

MADE = "volumes:n=10,size=8,seed=1"
NET = "reversible_unet_tiny_1"


def answered(result: tuple[int, str, str]) -> dict:
    code, text, err = result
    assert code == 0, err
    return json.loads(text)


def test_from_volumes_to_a_smaller_file_and_drawn_slices(trimtab, monkeypatch):
    monkeypatch.setitem(to_onnx._EXPORTERS, "dynamo", to_onnx._classic)  # which takes its time
    trained = answered(trimtab("train", "--data", MADE, "--task", "segment", "--epochs", "1", "--out", "big", "--json"))
    assert {"dice", "dice_whole", "dice_core", "dice_enhancing", "miou"} <= set(trained)
    assert trained["cost"]["params"] == 613_123  # no model was named
    cost = answered(trimtab("measure", "big", "--json"))
    assert cost["macs"] == answered(trimtab("measure", NET, "--input", "4,8,8,8", "--json"))["macs"]
    small = answered(trimtab("compress", "big", "--data", MADE, "--epochs", "1", "--out", "small", "--json"))
    assert small["cost"]["macs"] <= 0.5 * cost["macs"] and 0 <= small["dice"] <= 1
    made = answered(trimtab("export", "small", "small.onnx", "--data", MADE, "--json"))
    assert made["scores"]["dice"] >= 0 and made["dynamic_batch"]
    assert answered(trimtab("measure", "small.onnx", "--json"))["macs"] == small["cost"]["macs"]
    eight = answered(trimtab("export", "small", "small8.onnx", "--data", MADE, "--int8", "--json"))
    assert eight["int8"] and eight["agreement"] > 0.9 and eight["size"] < 0.6 * made["size"]

    (volume,), (masks,), _ = nested_ellipsoids(1, size=(12, 8, 16), seed=5)  # larger than the network's window
    Path("scans").mkdir()
    np.savez("scans/a.npz", image=volume, label=masks)
    np.save("scans/b.npy", volume)
    nibabel.save(nibabel.Nifti1Image(volume.T[::-1], np.diag([-1, 1, 2, 1])), "scans/c.nii.gz")  # from right to left
    for model in ("small", "small.onnx"):
        answers = answered(trimtab("predict", model, "scans", "--out", f"seen-{model}", "--json"))
        assert [Path(a["image"]).name for a in answers] == ["a.npz", "b.npy", "c.nii.gz"]
        assert {c["label"] for a in answers for c in a["classes"]} <= {"whole", "core", "enhancing"}
    first, second = (np.load(f"seen-{model}/a-mask.npz")["mask"] for model in ("small", "small.onnx"))
    assert first.shape == masks.shape and (first == second).mean() > 0.999 and first.max() <= 1
    turned = nibabel.load("seen-small/c-mask.nii.gz")
    assert np.array_equal(np.asarray(turned.dataobj)[::-1].T, first) and turned.affine[0, 0] == -1
    assert Image.open("seen-small/a.png").size[0] > 3 * 96
    code, _, err = trimtab("serve", "small.onnx", "--port", "0")
    assert code == 1 and "small.onnx is for volumes (4, 8, 8, 8), and the service takes pictures" in err
    code, _, err = trimtab("predict", "small", "scans/a.npz", "big/trimtab.json")
    assert code == 1 and "trimtab.json cannot be read" in err


RECIPE = f"""
data: {{spec: "{MADE}", task: segment}}
model: {{name: {NET}, widths: [8, 16], expansion: 2}}
out: made
phases:
  - train: {{epochs: 1, lr: 0.01}}
  - compress: {{budget: "macs<=60%"}}
  - export: {{exporter: classic}}
budget: "size<=1MB"
"""


def test_a_recipe_for_volumes(trimtab):
    Path("recipe.yaml").write_text(RECIPE)
    told = answered(trimtab("run", "recipe.yaml", "--json"))
    assert all(0 <= p["val_dice"] <= 1 for p in told["phases"]) and 0 <= told["dice"] <= 1 and told["budget"]["met"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compact", "--data", MADE], "'volumes' are made for segmentation"),
        (["compact", MADE, "--task", "segment"], "compact is for classification; for --task segment use trimtab train"),
        (["train", MADE, "--task", "detect"], "got 'volumes:n=10,size=8,seed=1'"),
        (["train", "volumes:sides=8", "--task", "segment"], "volumes takes classes, n, channels, seed, noise, size,"),
        (["train", "volumes:size=8x8", "--task", "segment"], "volumes: size must be a number"),
        (["train", MADE, "--task", "segment", "--model", "lite_fpn"], "takes pictures: img_size must be (height,"),
        (["train", MADE, "--task", "segment", "--load", "box_format=xyxy"], "--load takes void, class_names, regions"),
        (["measure", NET, "--input", "4,8"], "--input must be C,H,W, such as 3,224,224, or C,D,H,W for volumes"),
        (["measure", NET, "--input", "4,8,8"], "takes volumes: img_size must be (depth, height, width), got (8, 8)"),
    ],
)
def test_wrong_use_is_told(trimtab, words, said):
    code, _, err = trimtab(*words)
    assert code in (1, 2) and said in err, err
    assert not any(Path().iterdir())  # before any work
