"""The benchmark of the main job: who is compared with what, and what is written down."""

from __future__ import annotations

import json

import pytest

import trimtab as tt
from benchmarks import main_job


@pytest.fixture
def jobs(monkeypatch):
    """The calls of `compact`, which is not run: accuracy is the number of options."""
    calls = []

    def fake(data, **options):
        calls.append({"data": data, **options})
        chosen = {k: v for k, v in options.items() if k in ("model", "methods", "parts")}
        result = {
            "accuracy": {"test": 0.1 * len(chosen.get("parts", chosen.get("methods", [0, 0, 0])))},
            "model": "net", "cost": {"size": 9, "macs": 8, "params": 7},
        }  # fmt: skip
        tried = [{"name": "a/b by otov2", "stage": "method", "val_accuracy": 0.5}, {"name": "x", "stage": "round 1"}]
        return {"seconds": 2.0, "budget": {"met": True}, "result": result, "tried": tried}

    monkeypatch.setattr(tt, "compact", fake)
    return calls


def test_parts_are_compared_with_the_plain_job_seed_by_seed(jobs, tmp_path, capsys):
    main_job.main(["--parts", "--time", "2s", "--seeds", "2", "--out", str(tmp_path / "r.json")])
    assert [(j["parts"], j["seed"]) for j in jobs] == [
        (parts, seed) for seed in (0, 1) for parts in ([], ["distillation"], ["elastic"])
    ]
    assert len({j["out"] for j in jobs}) == 6 and all(j["budget"] == main_job.BUDGET for j in jobs)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["baseline"] == "plain" and result["rounds"] == 2
    assert result["facts"]["elastic: gain"] == "+10.00 points of test accuracy over plain"
    assert "elastic: gain" in capsys.readouterr().out


def test_a_given_model_is_compressed_by_one_method_and_by_the_chosen_one(jobs, tmp_path):
    main_job.main(["--model", "net/", "--time", "2s", "--out", str(tmp_path / "r.json")])
    before, after = jobs
    assert before["methods"] == ["magnitude"] and "methods" not in after
    assert str(before["model"]) == str(after["model"]) == "net"
    assert before["budget"] == after["budget"] == "macs<=50%" and before["time"] == after["time"] == 2
    rows = json.loads((tmp_path / "r.json").read_text())["results"]
    assert rows["chosen"]["returned"][0]["tried"] == {"b by otov2": 0.5}


def test_a_name_with_weights_becomes_an_artifact_that_the_job_can_open(jobs, tmp_path):
    net = tt.create_model("resnet20_cifar", num_classes=10, in_chans=1, img_size=8, seed=3)
    from safetensors.torch import save_file

    save_file(net.state_dict(), tmp_path / "w.safetensors")
    options = ["--model", "resnet20_cifar", "--weights", str(tmp_path / "w.safetensors"), "--limit", "200"]
    main_job.main([*options, "--time", "2s", "--keep", str(tmp_path / "k"), "--out", str(tmp_path / "r.json")])
    kept = tt.load(jobs[0]["model"])
    assert all((a == b).all() for a, b in zip(net.state_dict().values(), kept.state_dict().values(), strict=True))
    assert {k: len(v) for k, v in jobs[0]["data"].splits.items()} == {"train": 128, "val": 32, "test": 40}
