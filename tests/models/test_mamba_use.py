"""Vim, of every core, and VMamba are trained, exported and pruned like any other classifier."""

from __future__ import annotations

import json

import pytest

import trimtab as tt
from tests.models.pruned import prune
from trimtab import cli
from trimtab.core.artifact import InputSpec

SIDE = 16
VIM = {"embed_dim": 8, "depth": 1, "patch_size": 8}
NETS = {
    "Vim": ("vim_nano_32", VIM),
    "Vim of S4D": ("vim_nano_32", VIM | {"core": "s4d"}),
    "Vim of S5": ("vim_nano_32", VIM | {"core": "s5"}),
    "VMamba": ("vmamba_nano_32", {"dims": (16,), "depths": (1,)}),
}


@pytest.fixture(params=NETS)
def net(request):
    name, arguments = NETS[request.param]
    return tt.create_model(name, **arguments, img_size=SIDE, seed=0).eval()


def test_the_exported_file_computes_what_the_model_computes(net, tmp_path):
    spec = InputSpec((3, SIDE, SIDE), (0.5,) * 3, (0.25,) * 3)
    done = tt.export(net, tmp_path / "m.onnx", spec=spec, exporter="classic")
    assert done.dynamic_batch and done.max_abs_diff < 1e-4


def test_pruning_meets_a_budget_of_macs(net, tmp_path):
    prune(net, (3, SIDE, SIDE), tmp_path, params=0.9)


def test_a_classifier_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "train shapes:classes=2,size=16,n=40 --model vmamba_nano_32 --epochs 1 --opt adamw --out made --json"
    assert cli.main(words.split()) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["accuracy"] <= 1
    assert cli.main(["measure", "made", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"] > 0
