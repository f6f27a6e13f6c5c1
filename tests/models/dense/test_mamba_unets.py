"""VM-UNet and U-Mamba are trained, exported, pruned and put into recipes like any other segmenter."""

from __future__ import annotations

import json

import pytest

import trimtab as tt
from tests.models.pruned import prune
from trimtab import cli
from trimtab.core.artifact import InputSpec

SIDE = 16
NETS = {
    "VM-UNet": ("vm_unet_nano_32", {"dim": 8, "depths": (1, 1), "depths_decoder": (1, 1), "state": 2}),
    "U-Mamba Bot": ("u_mamba_bot_nano_32", {"dims": (8, 8, 8)}),
    "U-Mamba Enc": ("u_mamba_enc_nano_32", {"dims": (8, 8, 32)}),
}


def made(which):
    name, arguments = NETS[which]
    return tt.create_model(name, **arguments, img_size=SIDE, seed=0).eval()


@pytest.mark.parametrize("which", NETS)
def test_the_exported_file_computes_what_the_model_computes(which, tmp_path):
    spec = InputSpec((3, SIDE, SIDE), (0.5,) * 3, (0.25,) * 3)
    done = tt.export(made(which), tmp_path / "m.onnx", spec=spec, exporter="classic")
    assert done.dynamic_batch and done.max_abs_diff < 1e-4


@pytest.mark.parametrize("which", ["U-Mamba Bot", "U-Mamba Enc"])
def test_pruning_meets_a_budget_of_macs(which, tmp_path):
    prune(made(which), (3, SIDE, SIDE), tmp_path, params=0.8)


RECIPE = """
data: {spec: "scenes:classes=2,size=16,n=40", task: segment}
model: {name: vm_unet_nano_32, dim: 8, depths: [1, 1], depths_decoder: [1, 1], state: 1}
out: made
phases:
  - train: {epochs: 1}
  - compress: {method: magnitude, budget: "macs<=70%"}
  - train: {epochs: 1}
  - export: {exporter: classic}
"""


def test_a_recipe_trains_prunes_and_exports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert cli.main(["run", "recipe.yaml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [p["phase"] for p in told["phases"]] == ["train", "compress", "train", "export"]
    assert (tmp_path / "made" / "model.onnx").stat().st_size > 1000


def test_a_segmenter_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "train scenes:classes=2,size=32,n=30 --task segment --model u_mamba_bot_nano_32 --epochs 1 --out seg --json"
    assert cli.main(words.split()) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["miou"] <= 1
    assert cli.main(["measure", "seg", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"] > 0
