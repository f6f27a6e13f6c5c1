"""`trimtab adapt`, and the phase of a recipe that does the same."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

import trimtab as tt
from trimtab.compact.recipe import run
from trimtab.learn.adapt import methods

CALL = ("adapt", "trim_1k", "--data", "digits", "--json")
QUICK = ("--epochs", "1", "--batch-size", "64")


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("nmc", ("--tasks", "3")),
        ("slca", (*QUICK, "--tasks", "2", "--set", "align=1", "--set", "kind=task")),
        ("adab2n", (*QUICK, "--tasks", "2", "--set", "buffer=50")),
        ("replay", (*QUICK, "--kind", "domain", "--tasks", "2", "--set", "shift=permute")),
        ("joint", (*QUICK, "--lr", "0.05")),
    ],
)
def test_a_stream_is_learned_and_kept(trimtab, tmp_path, method, args):
    code, out, err = trimtab(*CALL, "--method", method, *args, "--out", "o")
    assert code == 0, err
    said = json.loads(out)
    report = said["report"]
    assert report["method"] == method and len(report["images"]) == int(dict(pairwise(args)).get("--tasks", 5))
    model = tt.load(tmp_path / "o")
    data = tt.load_data("digits")
    if report["kind"] == "class":
        assert tt.evaluate(model, data)["accuracy"] == pytest.approx(report["last_accuracy"])
    assert json.loads((tmp_path / "o/result.json").read_text()) == report
    assert (tmp_path / "o/stream.svg").read_text().startswith("<svg")


def test_strange_images_are_found_beside_the_usual_scores(trimtab, tmp_path):
    small = ("--set", "groups=2", "--set", "dim=4", "--set", "embedding=16", "--set", "hold_out=3")
    code, out, err = trimtab(*CALL, "--method", "hvcm", *QUICK, *small, "--out", "o")
    assert code == 0, err
    said = json.loads(out)
    table = said["report"]["ood"]
    assert {"hvcm", "msp", "energy", "knn", "mahalanobis"} <= set(table)
    assert all(set(sets) == {"held out", "noise"} for sets in table.values())
    assert all(0 <= m["auroc"] <= 1 for sets in table.values() for m in sets.values())
    assert tt.load(tmp_path / "o")(torch.zeros(1, 1, 8, 8)).shape == (1, 7)
    code, out, _ = trimtab("adapt", "trim_1k", "--method", "hvcm", *QUICK, *small, "--out", "o")
    assert code == 0 and "AUROC" in out and "held out" in out


def test_adapters_are_trained_and_kept_beside_the_network(trimtab, tmp_path):
    call = ("adapt", "cct_2_3x2_32", "--data", "digits", "--json", "--method", "compacter", *QUICK, "--set", "n=2")
    code, out, err = trimtab(*call, "--out", "o")
    assert code == 0, err
    report = json.loads(out)["report"]
    file = tmp_path / report["file"]
    assert report["trained"] < 0.1 * report["base"] and file.stat().st_size == report["bytes"]
    whole = tt.load(tmp_path / "o")
    base = tt.create_model("cct_2_3x2_32", num_classes=10, in_chans=1, img_size=8, seed=0)
    apart, x = tt.learn.adapt.load_adapters(base, file), torch.randn(2, 1, 8, 8)
    assert torch.equal(apart(x), whole(x))


def test_started_again_nothing_is_learned_twice(trimtab, monkeypatch):
    call = ("adapt", "trim_1k", "--method", "finetune", *QUICK, "--tasks", "2", "--out", "o")
    code, first, err = trimtab(*call)
    assert code == 0 and "forgetting" in first, err
    monkeypatch.setattr("trimtab.learn.adapt.frame.fit", lambda *a, **k: pytest.fail("trained again"))
    assert trimtab(*call)[:2] == (0, first)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--method", "wish"), "method must be one of adab2n, adapters, compacter, finetune, hvcm"),
        (("--set", "metrik=cosine"), "nmc has no option 'metrik'"),
        (("--method", "nmc", "--epochs", "3"), "nmc has no option 'epochs'"),
        (("--method", "hvcm", "--tasks", "3"), "hvcm has no option 'tasks'"),
        (("--set", "metric"), "--set must be NAME=VALUE"),
    ],
)
def test_wrong_use_is_told_before_any_work(trimtab, tmp_path, monkeypatch, args, message):
    monkeypatch.setattr("trimtab.cli.arguments.model_and_data", lambda *a, **k: pytest.fail("worked"))
    code, _, err = trimtab("adapt", "trim_1k", *args)
    assert code == 2 and message in err
    assert list(tmp_path.iterdir()) == []


def test_a_stream_longer_than_the_classes_is_refused(trimtab):
    code, _, err = trimtab("adapt", "trim_1k", "--tasks", "11")
    assert code == 1 and "tasks must be 1 to the number of classes (10), got 11" in err


def test_every_method_has_a_door():
    for name in methods.names():
        assert "seed" in methods.parameters(name)
        with pytest.raises(ValueError, match=f"{name} has no option 'wish'"):
            methods.check(name, {"wish": 1})


RECIPE = """
data: digits
model: {{name: trim_1k}}
out: {out}
phases:
  - train: {{epochs: 2, lr: 0.2, progress: false}}
  - adapt: {said}
    as: adapted
  - export: {{}}
"""


@pytest.mark.parametrize(
    "said",
    [
        "{method: nmc, tasks: 5, seed: 2}",
        "{method: slca, tasks: 2, epochs: 1, progress: false}",
        "{method: adab2n, tasks: 2, batch_size: 64, buffer: 50, progress: false}",
    ],
)
def test_a_recipe_adapts_and_a_second_run_repeats_nothing(tmp_path, monkeypatch, said):
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE.format(out=tmp_path / "o", said=said))
    result = run(file)
    assert [p["phase"] for p in result["phases"]] == ["train", "adapt", "export"]
    report = json.loads((tmp_path / "o/phases/2-adapted/result.json").read_text())
    assert report["last_accuracy"] == pytest.approx(result["accuracy"])
    assert (tmp_path / "o/model.onnx").is_file()
    monkeypatch.setattr("trimtab.learn.adapt.methods.run", lambda *a, **k: pytest.fail("adapted again"))
    assert run(file)["accuracy"] == result["accuracy"]


def test_a_recipe_holds_classes_out_and_keeps_the_scores(tmp_path, monkeypatch):
    said = "{method: hvcm, hold_out: 3, groups: 2, dim: 4, embedding: 16, epochs: 1, progress: false}"
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE.format(out=tmp_path / "o", said=said))
    result = run(file)
    report = json.loads((tmp_path / "o/phases/2-adapted/result.json").read_text())
    assert set(report["ood"]["hvcm"]) == {"held out", "noise"}
    assert report["accuracy"]["hvcm"] == pytest.approx(result["accuracy"])
    assert tt.load(tmp_path / "o")(torch.zeros(1, 1, 8, 8)).shape == (1, 7)
    known, _ = tt.learn.adapt.hold_out(tt.load_data("digits"), 3, seed=0)
    kept = json.loads((tmp_path / "o/trimtab.json").read_text())
    assert kept["labels"] == known.class_names
    monkeypatch.setattr("trimtab.learn.adapt.methods.run", lambda *a, **k: pytest.fail("adapted again"))
    assert run(file)["accuracy"] == result["accuracy"]  # on the seven classes, as before


@pytest.mark.parametrize(
    ("model", "said", "classes"),
    [
        ("trim_1k", "{method: mlc, clusters: 12, dim: 16, hidden: 16, layers: 1, epochs: 1, progress: false}", 12),
        ("cct_2_3x2_32", "{method: compacter, n: 2, epochs: 1, batch_size: 64, progress: false}", 10),
    ],
)
def test_a_recipe_clusters_and_inserts_adapters(tmp_path, model, said, classes):
    file = tmp_path / "r.yaml"
    file.write_text(f"""
data: {{spec: digits, limit: 250}}
model: {{name: {model}}}
out: {tmp_path / "o"}
phases:
  - adapt: {said}
""")
    assert run(file)["accuracy"] == run(file)["accuracy"]
    assert tt.load(tmp_path / "o")(torch.zeros(1, 1, 8, 8)).shape == (1, classes)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ("{method: wish}", "phases.1: method must be one of adab2n, adapters, compacter"),
        ("{method: nmc, epochs: 3}", "phases.1: nmc has no option 'epochs'"),
    ],
)
def test_a_wrong_adaptation_in_a_recipe_is_refused_before_anything_runs(tmp_path, said, says):
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE.format(out=tmp_path / "o", said=said))
    with pytest.raises(ValueError, match=says):
        run(file)
    assert not (tmp_path / "o").exists()
