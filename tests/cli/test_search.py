"""`trimtab search`, and the phase of a recipe that does the same."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import torch

import trimtab as tt
from trimtab.compact.recipe import run
from trimtab.deploy import OnnxModel

CALL = ("search", "trim_10k", "--data", "digits", "--epochs", "1", "--evaluations", "4", "--budget", "macs<=60%")


@pytest.mark.parametrize("method", ["bignas", "deps", "sortednet"])
def test_a_network_inside_the_budget_comes_out_with_file_and_report(trimtab, tmp_path, method):
    code, out, err = trimtab(*CALL, "--method", method, "--space", "width=[0.5,0.75,1]", "--out", "found", "--json")
    assert code == 0, err
    said = json.loads(out)
    model = tt.load(tmp_path / "found")
    whole = tt.create_model("trim_10k", num_classes=10, in_chans=1, img_size=8)
    assert said["cost"]["macs"] == tt.measure(model, (1, 8, 8)).macs <= 0.6 * tt.measure(whole, (1, 8, 8)).macs
    assert said["budget"]["met"] and 1 <= said["tried"] <= 4
    macs = [row["macs"] for row in said["front"]]
    assert macs == sorted(macs) and max(row["accuracy"] for row in said["front"]) <= 1
    by_file = OnnxModel(tmp_path / "found/model.onnx").evaluate(tt.load_data("digits"), "test")
    assert by_file["accuracy"] == pytest.approx(said["accuracy"], abs=0.005)
    report = (tmp_path / "found/report.html").read_text()
    assert "Everything tried" in report and "best at that cost" in report
    again = trimtab("report", "found", "--out", "again.html")
    assert again[0] == 0 and (tmp_path / "again.html").is_file()


@pytest.mark.parametrize(
    ("method", "network", "options"),
    [
        ("deepmad", "trim_10k", ("--budget", "macs<=300k", "--set", "rounds=40")),
        ("deepmad", "trim_30k", ("--budget", "macs<=60%", "--set", "rounds=40")),
        ("self_expanding_cnn", "secnn", ("--budget", "params<=150%", "--set", "cooldown=1", "--set", "tau=0")),
    ],
)
def test_a_network_is_designed_or_grown_inside_the_budget(trimtab, tmp_path, method, network, options):
    call = ("search", network, "--method", method, "--data", "digits", "--epochs", "2", "--lr", "0.02", *options)
    code, out, err = trimtab(*call, "--out", "found", "--json")
    assert code == 0, err
    said = json.loads(out)
    model, whole = tt.load(tmp_path / "found"), tt.create_model(network, num_classes=10, in_chans=1, img_size=8)
    cost, was = (tt.measure(m, (1, 8, 8)) for m in (model, whole))
    assert said["budget"]["met"] and cost.macs == said["cost"]["macs"]
    if method == "deepmad":
        assert cost.macs <= (300e3 if network == "trim_10k" else 0.6 * was.macs) and said["tried"] == 1
    else:
        assert cost.params <= 1.5 * was.params and said["tried"] == 2
    by_file = OnnxModel(tmp_path / "found/model.onnx").evaluate(tt.load_data("digits"), "test")
    assert by_file["accuracy"] == pytest.approx(said["accuracy"], abs=0.005)
    assert "best at that cost" in (tmp_path / "found/report.html").read_text()


def test_another_budget_does_not_train_again(trimtab, tmp_path, monkeypatch):
    assert trimtab(*CALL, "--out", "found", "--quiet")[0] == 0
    monkeypatch.setattr("trimtab.search.passes.Passes.losses", lambda *a: pytest.fail("trained again"))
    code, out, err = trimtab(*CALL[:-1], "macs<=40%", "--out", "found")
    assert code == 0, err
    assert "best at their cost" in out and "ok   macs<=" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--method", "wish"),
            "method must be one of bignas, deepmad, deps, self_expanding_cnn, sortednet, got 'wish'",
        ),
        (("--set", "pasess=3"), "bignas has no option 'pasess'"),
        (("--set", "start=0.5", "--method", "sortednet"), "sortednet has no option 'start'"),
        (("--method", "deepmad", "--space", "depth=blocks"), "deepmad has no option 'space'"),
        (("--method", "self_expanding_cnn", "--strategy", "tpe"), "self_expanding_cnn has no strategies"),
        (("--space", "width=[0.5,1.5]"), "width must be rising shares that end with 1"),
        (("--space", "width=[0,1]"), "width must be rising shares that end with 1"),
        (("--space", "depht=blocks"), "the space of a network must be of width, depth, resolution, got ['depht']"),
        (("--space", "width"), "--space must be NAME=VALUE"),
        (("--strategy", "luck"), "method must be one of coarse_to_fine"),
        (("--budget", "macs<50%"), "expected <= or >= after macs"),
    ],
)
def test_wrong_use_is_told_before_any_work(trimtab, tmp_path, monkeypatch, args, message):
    monkeypatch.setattr("trimtab.cli.arguments.model_and_data", lambda *a, **k: pytest.fail("worked"))
    code, _, err = trimtab("search", "trim_10k", *args)
    assert code == 2 and message in err
    assert list(tmp_path.iterdir()) == []


def test_a_budget_that_nothing_meets_is_refused_before_training(trimtab, monkeypatch):
    monkeypatch.setattr("trimtab.search.trained.fit", lambda *a, **k: pytest.fail("trained"))
    code, _, err = trimtab("search", "trim_10k", "--budget", "params<=10")
    assert code == 1 and "params<=10 cannot be met: the smallest network has" in err


RECIPE = """
data: digits
model: {{name: trim_10k}}
out: {out}
phases:
  - search:
      {{method: {method}, space: {{width: [0.5, 1]}}, budget: "macs<=60%", epochs: 1, evaluations: 3, progress: false}}
    as: found
  - train: {{epochs: 1, lr: 0.01, progress: false}}
  - export: {{}}
"""


def test_a_recipe_searches_and_a_second_run_repeats_nothing(tmp_path, monkeypatch):
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE.format(out=tmp_path / "o", method="deps"))
    result = run(file)
    assert [p["phase"] for p in result["phases"]] == ["search", "train", "export"]
    folder = tmp_path / "o/phases/1-found"
    assert {"model.onnx", "report.html", "run.json", "trimtab.json"} <= {p.name for p in folder.iterdir()}
    found = tt.load(folder)
    session = onnxruntime.InferenceSession(str(tmp_path / "o/model.onnx"))
    x = torch.rand(2, 1, 8, 8)
    assert session.run(None, {session.get_inputs()[0].name: x.numpy()})[0].shape == (2, 10)
    assert np.isfinite(found(x).detach().numpy()).all()
    monkeypatch.setattr("trimtab.search.systems.run", lambda *a, **k: pytest.fail("searched again"))
    assert run(file)["accuracy"] == result["accuracy"]


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("trim_10k", '{method: deepmad, budget: "macs<=300k", rounds: 40, epochs: 1, progress: false}'),
        (
            "secnn",
            '{method: self_expanding_cnn, budget: "params<=150%", cooldown: 1, tau: 0, epochs: 2, progress: false}',
        ),
    ],
)
def test_a_recipe_designs_or_grows_then_trains_on_and_exports(tmp_path, network, said):
    phases = f"  - search: {said}\n  - train: {{epochs: 5, lr: 0.05, progress: false}}\n  - export: {{}}\n"
    file = tmp_path / "r.yaml"
    file.write_text(f"data: digits\nmodel: {{name: {network}}}\nout: {tmp_path / 'o'}\nphases:\n{phases}")
    result = run(file)
    assert [p["phase"] for p in result["phases"]] == ["search", "train", "export"]
    assert (tmp_path / "o/model.onnx").is_file() and result["accuracy"] > 0.2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            ("method: deps", "method: wish"),
            "phases.0: method must be one of bignas, deepmad, deps, self_expanding_cnn, sortednet",
        ),
        (("epochs: 1, evaluations", "epohcs: 1, evaluations"), "phases.0: deps has no option 'epohcs'"),
        (("width: [0.5, 1]", "width: [0.5, 2]"), "phases.0: width must be rising shares"),
        (("evaluations: 3", "evaluations: 0"), "phases.0: evaluations must be at least 1"),
        (("macs<=60%", "macs<60%"), "phases.0: .*expected <= or >="),
    ],
)
def test_a_wrong_search_in_a_recipe_is_refused_before_anything_runs(tmp_path, change, says):
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE.format(out=tmp_path / "o", method="deps").replace(*change))
    with pytest.raises(ValueError, match=says):
        run(file)
    assert not (tmp_path / "o").exists()
