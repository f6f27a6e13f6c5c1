import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
import torch

import trimtab as tt
from trimtab.compact import finish
from trimtab.compact.job import Job, compact
from trimtab.core.edit import history
from trimtab.core.errors import BudgetError, TrimtabError
from trimtab.data import Data

by = Job._by
FILES = {"model.onnx", "report.html", "README.md", "run.json", "model.safetensors", "trimtab.json"}


@pytest.fixture(scope="module")
def small_job(tmp_path_factory):
    """One small job, shared by the tests that look at its results."""
    out = tmp_path_factory.mktemp("job") / "out"
    used = []
    loader = Data.loader
    patch = pytest.MonkeyPatch()
    patch.setattr(Data, "loader", lambda self, split="train", **kw: used.append(split) or loader(self, split, **kw))
    run = compact("digits", budget="size<=9KB, macs<=150k", time="12s", out=out)
    patch.undo()
    return run, out, used


def test_the_delivered_file_keeps_every_bound(small_job):
    run, out, _ = small_job
    assert run["budget"]["met"]
    assert (out / "model.onnx").stat().st_size <= 9000
    assert {r["name"] for r in run["budget"]["rows"]} == {"size", "macs"}
    for row in run["budget"]["rows"]:
        assert row["ok"]
        assert row["value"] <= row["limit"]
    assert run["result"]["cost"]["size"] == (out / "model.onnx").stat().st_size
    onnx.checker.check_model(onnx.load(out / "model.onnx"))


def test_everything_is_written_and_says_the_same(small_job):
    run, out, _ = small_job
    written = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and ".work" not in p.parts}
    assert written >= FILES
    assert json.loads((out / "run.json").read_text()) == run
    assert sum(map(sum, run["confusion"]["matrix"])) == run["data"]["counts"]["test"]
    right = sum(row[i] for i, row in enumerate(run["confusion"]["matrix"]))
    assert right / run["data"]["counts"]["test"] == pytest.approx(run["result"]["accuracy"]["test"])
    assert [t["chosen"] for t in run["tried"]].count(True) == 1
    net = tt.load(out)
    accuracy = tt.evaluate(net, tt.load_data("digits"), "test")["accuracy"]
    assert abs(accuracy - run["result"]["accuracy"]["test"]) < 0.05  # float artifact, maybe 8-bit file
    assert run["budget"]["text"] in (out / "report.html").read_text().replace("&lt;", "<")


def test_the_test_split_is_touched_once_at_the_end(small_job):
    _, _, used = small_job
    assert used.count("test") == 1
    assert used[-1] == "test"


def test_it_learns_something(small_job):
    run, _, _ = small_job
    assert run["result"]["accuracy"]["test"] > 0.2  # twice chance, after a few seconds on a machine that may be busy


def test_the_same_call_again_is_done_at_once_and_another_job_is_refused(small_job):
    run, out, _ = small_job
    start = time.monotonic()
    assert compact("digits", budget="size<=9KB, macs<=150k", time="12s", out=out) == run
    assert time.monotonic() - start < 5
    with pytest.raises(TrimtabError, match="another budget"):
        compact("digits", budget="size<=8KB", time="12s", out=out)


def test_an_accuracy_that_is_out_of_reach_is_said_plainly(tmp_path):
    run = compact("shapes:classes=4,size=16,n=120", budget="accuracy>=1, macs<=30k", time="4s", out=tmp_path / "o")
    if not run["budget"]["met"]:
        assert "could NOT be met: accuracy is" in run["result"]["summary"]
    accuracy = next(r for r in run["budget"]["rows"] if r["name"] == "accuracy")
    assert accuracy["value"] == run["result"]["accuracy"]["test"]
    assert accuracy["ok"] == (accuracy["value"] >= 1)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"budget": "params<=10"}, BudgetError, "no network fits"),
        ({"budget": "macs<=50%"}, BudgetError, "relative"),
        ({"budget": "size<96KB"}, BudgetError, "expected <= or >="),
        ({"time": "soon"}, ValueError, "time must be"),
        ({"data": "no/such/folder"}, ValueError, "no/such/folder"),
        ({"model": "resnet_nope"}, ValueError, "resnet_nope"),
    ],
)
def test_wrong_use_is_answered_before_any_work(tmp_path, arguments, error, says):
    with pytest.raises(error, match=says):
        compact(**{"time": "5s", "out": tmp_path / "o", **arguments})
    assert not (tmp_path / "o" / "model.onnx").exists()


def test_a_given_model_is_cut_with_its_weights(tmp_path):
    data = tt.load_data("digits")
    big = tt.create_model("trim_10k", num_classes=10, in_chans=1, img_size=8)
    tt.fit(big, data, epochs=8, lr=0.2, progress=False)
    before = tt.evaluate(big, data, "val")["accuracy"]
    tt.save(big, tmp_path / "big", spec=data.spec, labels=data.class_names)
    run = compact("digits", model=tmp_path / "big", budget="macs<=50%", time="10s", out=tmp_path / "o")
    assert run["budget"]["met"]
    assert run["tried"][0]["val_accuracy"] == pytest.approx(before)
    small = tt.load(tmp_path / "o")
    assert history(small).edits
    assert run["result"]["edits"]
    assert run["layers"]["before"]
    macs = [sum(r["macs"] for r in run["layers"][k]) for k in ("before", "after")]
    assert macs[1] <= 0.5 * macs[0]
    assert run["result"]["accuracy"]["val"] > 0.5


def test_a_given_model_is_compressed_by_what_learns_best(tmp_path, monkeypatch):
    from trimtab.compact import job

    monkeypatch.setattr(job, "METHODS_FROM", 1.0)
    monkeypatch.setattr(job.Job, "_by", lambda self, method, *a: by(self, method, *a) - (method != "tucker"))
    data = tt.load_data("digits")
    big = tt.create_model("trim_10k", num_classes=10, in_chans=1, img_size=8)
    tt.fit(big, data, epochs=8, lr=0.2, progress=False)
    tt.save(big, tmp_path / "big", spec=data.spec, labels=data.class_names)
    run = compact("digits", model=tmp_path / "big", budget="macs<=60%", time="20s", out=tmp_path / "o")
    tried = {t["name"].rpartition(" ")[2]: t for t in run["tried"] if t["stage"] == "method"}
    assert {"magnitude", "tucker"} <= set(tried) and all(t["fits"] for t in tried.values())
    assert run["result"]["model"].endswith("by tucker") and run["budget"]["met"]
    assert any("Tucker" in e or "tucker" in e for e in run["result"]["edits"])


def test_a_model_of_other_classes_is_refused(tmp_path):
    net = tt.create_model("trim_1k", num_classes=3, in_chans=1, img_size=8)
    tt.save(net, tmp_path / "m", labels=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"made for 3 classes \(a, b, c\)"):
        compact("digits", model=tmp_path / "m", time="5s", out=tmp_path / "o")


SCRIPT = """
import sys, warnings
from trimtab.compact.job import compact
run = compact("digits", budget="size<=9KB, macs<=150k", time="8s", out=sys.argv[1])
print(run["budget"]["met"], run["seconds"])
"""


def test_killed_anywhere_the_same_command_goes_on(tmp_path):
    """Kill -9 twice, the second time after more progress; the third life finishes the job."""
    out = tmp_path / "o"
    journal = out / ".work" / "journal.json"
    steps: list[set[str]] = []
    for wanted in (2, 6):  # noted steps to wait for before the kill
        child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)], stdout=subprocess.DEVNULL)
        for _ in range(1200):
            known = set(json.loads(journal.read_text())["steps"]) if journal.exists() else set()
            if len(known) >= wanted or child.poll() is not None:
                break
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        steps.append(set(json.loads(journal.read_text())["steps"]))
    assert steps[0] <= steps[1]
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(out)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True")
    run = finish.read(out)
    rounds = [(t["name"], t["stage"]) for t in run["tried"]]
    assert len(rounds) == len(set(rounds)), "a step was done twice"
    assert Path(out / "model.onnx").stat().st_size <= 9000


def test_the_best_so_far_is_renewed_on_disk_during_the_long_training(tmp_path, monkeypatch):
    from trimtab.compact import job

    out, seen = tmp_path / "o", []
    publish = job.Job.publish

    def watch(self, model, delivery):
        publish(self, model, delivery)
        x = torch.zeros(1, 1, 8, 8)
        seen.append(((out / "model.onnx").read_bytes(), tt.load(out)(x).detach(), delivery.verdict.ok))

    monkeypatch.setattr(job, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(job, "SAVE_SHARE", 10.0)
    monkeypatch.setattr(job.Job, "publish", watch)
    compact("digits", budget="size<=9KB, macs<=150k", time="12s", out=out)
    assert len(seen) >= 3  # after the search, during the training, and at the end
    assert len({raw for raw, _, _ in seen}) >= 2 and all(ok for *_, ok in seen)
    assert not torch.equal(seen[0][1], seen[1][1]), "the artifact was not renewed with the file"


def test_the_package_is_callable_and_importing_it_keeps_it_so():
    from trimtab.compact import journal

    assert callable(tt.compact)
    assert journal is not None
    with pytest.raises(ValueError, match="time must be"):
        tt.compact(time="never")


def test_the_callers_random_numbers_are_left_alone(small_job, tmp_path):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    compact("shapes:classes=2,size=16,n=60", budget="macs<=20k", time="2s", out=tmp_path / "o")
    assert torch.equal(torch.rand(3), want)
