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
from trimtab.compact import finish, found, given, job
from trimtab.compact.deliver import as_stored
from trimtab.compact.job import Job, compact
from trimtab.compact.speed import Settings
from trimtab.core.edit import history
from trimtab.core.errors import BudgetError, TrimtabError
from trimtab.data import Data

FILES = {"model.onnx", "report.html", "README.md", "run.json", "model.safetensors", "trimtab.json"}
SMALL = {"budget": "size<=9KB, macs<=150k", "time": "5s"}


@pytest.fixture(scope="module", autouse=True)
def processor_time():
    """Time limits count processor time here: what a job gets done does not depend on what else the machine does."""
    patch = pytest.MonkeyPatch()
    for clock in ("monotonic", "perf_counter"):
        patch.setattr(time, clock, time.process_time)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def small_job(tmp_path_factory, processor_time):
    """One small job, shared by the tests that look at its results: (run, folder, splits used, what was on disk)."""
    out = tmp_path_factory.mktemp("job") / "out"
    used, seen = [], []
    loader, publish = Data.loader, Job.publish

    def watch(self, model, delivery, *accuracy):
        publish(self, model, delivery, *accuracy)
        seen.append(((out / "model.onnx").read_bytes(), tt.load(out)(torch.zeros(1, 1, 8, 8)).detach(), delivery))

    patch = pytest.MonkeyPatch()
    patch.setattr(Data, "loader", lambda self, split="train", **kw: used.append(split) or loader(self, split, **kw))
    patch.setattr(job, "SAVE_EVERY", 0.0)
    patch.setattr(job, "SAVE_SHARE", 10.0)
    patch.setattr(Job, "publish", watch)
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    run = compact("digits", **SMALL, out=out)
    assert torch.equal(torch.rand(3), want), "the caller's random numbers were touched"
    patch.undo()
    return run, out, used, seen


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A model that has learned the digits, as an artifact."""
    data = tt.load_data("digits")
    net = tt.create_model("trim_10k", num_classes=10, in_chans=1, img_size=8)
    tt.fit(net, data, epochs=6, lr=0.2, progress=False)
    tt.save(net, tmp_path_factory.mktemp("given") / "big", spec=data.spec, labels=data.class_names)
    return tmp_path_factory.getbasetemp() / "given0" / "big"


def test_the_delivered_file_keeps_every_bound(small_job):
    run, out, *_ = small_job
    assert run["budget"]["met"]
    assert (out / "model.onnx").stat().st_size <= 9000
    assert {r["name"] for r in run["budget"]["rows"]} == {"size", "macs"}
    for row in run["budget"]["rows"]:
        assert row["ok"]
        assert row["value"] <= row["limit"]
    assert run["result"]["cost"]["size"] == (out / "model.onnx").stat().st_size
    onnx.checker.check_model(onnx.load(out / "model.onnx"))


def test_everything_is_written_and_says_the_same(small_job):
    run, out, *_ = small_job
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
    assert run["command"].startswith("trimtab compact --data digits --budget ")


def test_the_test_split_is_touched_once_at_the_end(small_job):
    _, _, used, _ = small_job
    assert used.count("test") == 1
    assert used[-1] == "test"


def test_it_learns_something(small_job):
    run, *_ = small_job
    assert run["result"]["accuracy"]["test"] > 0.5


def test_the_best_so_far_is_renewed_on_disk_during_the_long_training(small_job):
    *_, seen = small_job
    assert len(seen) >= 3  # after the search, during the training, and at the end
    assert len({raw for raw, *_ in seen}) >= 2 and all(d.verdict.ok for *_, d in seen)
    assert not torch.equal(seen[0][1], seen[1][1]), "the artifact was not renewed with the file"


def test_the_same_call_again_is_done_at_once_and_another_job_is_refused(small_job):
    run, out, *_ = small_job
    start = time.monotonic()
    assert compact("digits", **SMALL, out=out) == run
    assert time.monotonic() - start < 5
    with pytest.raises(TrimtabError, match="another budget"):
        compact("digits", budget="size<=8KB", time="5s", out=out)
    with pytest.raises(TrimtabError, match="another parts"):
        compact("digits", **SMALL, out=out, parts=())


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"budget": "params<=10"}, BudgetError, "no network fits"),
        ({"budget": "macs<=50%"}, BudgetError, "relative"),
        ({"budget": "size<96KB"}, BudgetError, "expected <= or >="),
        ({"time": "soon"}, ValueError, "time must be"),
        ({"data": "no/such/folder"}, ValueError, "no/such/folder"),
        ({"model": "resnet_nope"}, ValueError, "resnet_nope"),
        ({"model": "trim_1k", "methods": ["magic"]}, ValueError, "methods must be some of magnitude, otov2, .*'magic'"),
        ({"methods": ["magnitude"]}, ValueError, "methods are for a model that is given"),
        ({"parts": "elastic"}, ValueError, "parts must be some of distillation, elastic, got 'elastic'"),
    ],
)
def test_wrong_use_is_answered_before_any_work(tmp_path, arguments, error, says):
    with pytest.raises(error, match=says):
        compact(**{"time": "5s", "out": tmp_path / "o", **arguments})
    assert not (tmp_path / "o" / "model.onnx").exists()


# ------------------------------------------------------------------------------------------------------ without a model


def test_parts_are_used_where_they_are_asked_for(tmp_path, monkeypatch):
    """A supernet around the winner, and a teacher: both are made, and the better of winner and child goes on.

    An accuracy that is out of reach is said plainly.
    """
    monkeypatch.setattr(found, "LOOK", {"images": 64, "batches": 1})
    budget = "macs<=60k, accuracy>=1"
    run = compact("digits", budget=budget, time="3s", out=tmp_path / "o", parts=["elastic", "distillation"])
    (row,) = [t for t in run["tried"] if t["stage"] == "elastic"]
    first = max(t["val_accuracy"] for t in run["tried"] if t["stage"].startswith("round"))
    macs, accuracy = run["budget"]["rows"]
    assert row["macs"] <= 60_000 and macs["ok"]
    assert accuracy["value"] == run["result"]["accuracy"]["test"] and accuracy["ok"] == (accuracy["value"] == 1)
    assert accuracy["ok"] or "could NOT be met: accuracy is" in run["result"]["summary"]
    assert (run["result"]["model"] == row["name"]) == (row["val_accuracy"] > first)
    steps = json.loads((tmp_path / "o" / ".work" / "journal.json").read_text())["steps"]
    assert steps["teacher?"] and "teacher accuracy" in steps
    assert run["command"].startswith("tt.compact(data='digits', ") and "parts=['elastic'" in run["command"]


def test_a_winner_without_a_free_width_has_no_supernet_around_it():
    from trimtab.compact.plan import Candidate

    winner = Candidate("resnet20_cifar", {}, {"macs": 4e7})
    assert found._larger(None, winner, 2.0) is None


SCRIPT = """
import sys
from trimtab.compact.job import compact
compact("digits", budget="size<=9KB, macs<=150k", time="3s", out=sys.argv[1])
"""


def test_killed_anywhere_the_same_command_goes_on(tmp_path):
    """Kill -9 twice, the second time after more progress; the third life finishes the job."""
    out = tmp_path / "o"
    journal = out / ".work" / "journal.json"
    steps: list[set[str]] = []
    for wanted in (2, 6):  # noted steps to wait for before the kill
        child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)], stdout=subprocess.DEVNULL)
        for _ in range(2400):
            known = set(json.loads(journal.read_text())["steps"]) if journal.exists() else set()
            if len(known) >= wanted or child.poll() is not None:
                break
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        steps.append(set(json.loads(journal.read_text())["steps"]))
    assert steps[0] <= steps[1]
    run = compact("digits", budget="size<=9KB, macs<=150k", time="3s", out=out)
    assert run["budget"]["met"] and run == finish.read(out)
    rounds = [(t["name"], t["stage"]) for t in run["tried"]]
    assert len(rounds) == len(set(rounds)), "a step was done twice"
    assert Path(out / "model.onnx").stat().st_size <= 9000


# --------------------------------------------------------------------------------------------------------- with a model


def test_a_given_model_is_cut_with_its_weights(big, tmp_path):
    before = tt.evaluate(tt.load(big), tt.load_data("digits"), "val")["accuracy"]
    run = compact("digits", model=big, budget="macs<=50%", time="3s", out=tmp_path / "o")
    assert run["budget"]["met"]
    assert run["tried"][0]["val_accuracy"] == pytest.approx(before)
    small = tt.load(tmp_path / "o")
    assert history(small).edits
    assert run["result"]["edits"]
    assert run["layers"]["before"]
    macs = [sum(r["macs"] for r in run["layers"][k]) for k in ("before", "after")]
    assert macs[1] <= 0.5 * macs[0]
    assert run["result"]["accuracy"]["val"] > 0.5


def test_methods_are_measured_on_their_files_and_the_best_one_goes_on(big, tmp_path, monkeypatch):
    """Few bits against pruning where bytes are short. The job dies before the first result is noted: what was found is
    on disk, and no method is counted twice."""
    monkeypatch.setattr(given, "METHODS_FROM", 0.0)
    monkeypatch.setattr(given, "METHODS_SHARE", 0.5)
    ask = {"model": big, "budget": "size<=9.5KB", "time": "4s", "out": tmp_path / "o"}
    ask["methods"] = ["magnitude", "bitnet_reloaded", "compactifai"]
    by = given._by

    def dies(*args):
        by(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(given, "_by", dies)
    with pytest.raises(KeyboardInterrupt):
        compact("digits", **ask)
    first = (tmp_path / "o" / "model.onnx").read_bytes()
    assert len(first) <= 9500 and tt.load(tmp_path / "o")
    monkeypatch.setattr(given, "_by", by)
    run = compact("digits", **ask)
    tried = {t["name"].rpartition(" ")[2]: t for t in run["tried"] if t["stage"] == "method"}
    assert set(tried) == {"magnitude", "bitnet_reloaded"}  # a network without large matrices is not for compactifai
    assert len(run["tried"]) == len({(t["name"], t["stage"]) for t in run["tried"]})
    assert all(t["fits"] and t["size"] <= 9500 for t in tried.values())
    best = max(tried, key=lambda m: tried[m]["val_accuracy"])
    assert run["budget"]["met"] and run["result"]["model"].endswith(best if best != "magnitude" else "big")


@pytest.mark.parametrize("method", ["otov2", "fliqs"])
def test_methods_that_train_by_themselves_are_given_their_share(big, tmp_path, method):
    data = tt.load_data("digits", limit=160)
    one = Job(data, str(big), "size<=12KB, macs<=80%", 60.0, tmp_path / "o", 0, False)
    one.exporter, net = "classic", tt.load(big)
    one.budget = one.asked.resolve(tt.measure(net, data.spec.size))
    one.settings = Settings(batch_size=32, speed=4 * len(data.splits["train"]))
    small = given._inside(one, method, net, share=1.0)
    assert tt.measure(small, data.spec.size).macs <= one.budget.limit("macs")
    assert one.delivered(as_stored(small), "export", evaluate=False, only="int8").excess == 0
    with pytest.raises(BudgetError, match="no time for one epoch"):
        given._inside(one, method, net, share=0.1)


def test_norms_are_measured_anew_and_a_training_that_does_harm_is_dropped(big, tmp_path, monkeypatch):
    data = tt.load_data("digits")
    one = Job(data, str(big), "macs<=60%", 60.0, tmp_path / "o", 0, False)
    one.exporter, net = "classic", tt.load(big)
    one.budget = one.asked.resolve(tt.measure(net, data.spec.size))
    cut = tt.evaluate(given._inside(one, "magnitude", net, share=1.0), data, "val")["accuracy"]

    def forgets(self, model, *_, **__):
        torch.nn.init.zeros_(model.get_classifier().weight)
        return model

    monkeypatch.setattr(Job, "train", forgets)
    small = given._learned(one, "magnitude", net, 0.0, share=1.0)
    assert tt.evaluate(small, data, "val")["accuracy"] > cut + 0.05
    assert all(m.momentum for m in small.modules() if isinstance(m, torch.nn.BatchNorm2d))  # as it was

    monkeypatch.undo()
    trained = given._learned(one, "magnitude", net, 0.0, share=2.0)
    assert tt.evaluate(trained, data, "val")["accuracy"] > tt.evaluate(small, data, "val")["accuracy"]


def test_a_model_that_ends_outside_is_replaced_by_the_one_on_disk(big, tmp_path, monkeypatch):
    """The guarantee: what cannot be cut further is not delivered when something that fits is there."""
    monkeypatch.setattr(Job, "cut", lambda self, model, bounds: (_ for _ in ()).throw(BudgetError("no")))
    one = Job("digits", str(big), "macs<=60%", 5.0, tmp_path / "o", 0, False)
    one.exporter, fat = "classic", tt.load(big)
    one.budget = one.asked.resolve(tt.measure(fat, one.data.spec.size))
    assert one._last(fat)[1].excess > 0.5  # nothing is there yet
    small = tt.compress.magnitude(fat, one.data, budget=one.budget)
    one.publish(small, one.delivered(small, "export", evaluate=False), 0.3)
    delivered, file = one._last(fat)
    assert file.excess == 0 and file.accuracy is not None
    assert tt.measure(delivered, one.data.spec.size) == tt.measure(small, one.data.spec.size)


def test_a_model_of_other_classes_is_refused(tmp_path):
    net = tt.create_model("trim_1k", num_classes=3, in_chans=1, img_size=8)
    tt.save(net, tmp_path / "m", labels=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"made for 3 classes \(a, b, c\)"):
        compact("digits", model=tmp_path / "m", time="5s", out=tmp_path / "o")


# ---------------------------------------------------------------------------------------------------------------- calls


def test_the_package_is_callable_and_importing_it_keeps_it_so():
    from trimtab.compact import journal

    assert callable(tt.compact)
    assert journal is not None
    with pytest.raises(ValueError, match="time must be"):
        tt.compact(time="never")
