"""The command line as its users meet it: output, exit codes, errors in one line, speed."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import trimtab as tt
from trimtab import cli
from trimtab.core.artifact import InputSpec

COMMANDS = [
    "compact",
    "train",
    "compress",
    "run",
    "search",
    "curate",
    "adapt",
    "measure",
    "predict",
    "export",
    "report",
    "serve",
    "systems",
    "show",
    "models",
]
SPEC = InputSpec(size=(1, 8, 8), mean=(0.3,), std=(0.4,))
LABELS = [str(n) for n in range(10)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """A tiny classifier of digits, untrained."""
    model = tt.create_model("trim_net", num_classes=10, in_chans=1, img_size=8, width=4, depths=(1, 1), seed=0).eval()
    return tt.save(model, tmp_path_factory.mktemp("artifact") / "tiny", spec=SPEC, labels=LABELS)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Twelve images of three classes, as files in class folders."""
    from PIL import Image

    root = tmp_path_factory.mktemp("digits")
    gen = torch.Generator().manual_seed(0)
    for label in "abc":
        (root / label).mkdir()
        for n in range(12):
            pixels = torch.randint(0, 80, (8, 8), generator=gen, dtype=torch.uint8)
            pixels["abc".index(label) * 2 :][:2] += 170
            Image.fromarray(pixels.numpy()).save(root / label / f"{n}.png")
    return root


def fastest(*args: str) -> tuple[float, str]:
    """Seconds of the fastest of some runs, and the output. On a busy machine its own CPU time is what counts."""
    best, out = float("inf"), ""
    for _ in range(5):
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "trimtab", *args]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        best = min(best, time.perf_counter() - start, worked)
        if best < 0.5:
            break
    return best, out


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_answer_in_half_a_second(flag):
    seconds, out = fastest(flag)
    assert seconds < 0.5
    assert "trimtab" in out


@pytest.mark.parametrize("args", [["--help"], ["systems"], ["show", "cct"], ["compact", "--help"]], ids=" ".join)
def test_light_commands_do_not_import_torch(args):
    code = f"import sys; from trimtab.cli import main; main({args!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_version_is_that_of_the_package(trimtab):
    assert trimtab("--version") == (0, f"trimtab {tt.__version__}\n", "")
    assert json.loads(trimtab("--version", "--json")[1]) == {"version": tt.__version__}


def test_bare_command_shows_the_help(trimtab):
    code, out, _ = trimtab()
    assert code == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_examples(trimtab, command):
    code, out, _ = trimtab(command, "--help")
    assert code == 0
    examples = re.findall(rf"^ *trimtab {command}\b.*$", out.split("Examples:")[1], re.MULTILINE)
    assert len(examples) >= 2


def test_no_command_is_untested_here():
    assert {c.name or c.callback.__name__ for c in cli.app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["systems", "--bogus"], "No such option"),
        (["measure"], "Missing argument"),
        (["measure", "mobilenetv3_smal_100"], "did you mean mobilenetv3_small_100"),
        (["measure", "nothing.onnx"], "there is no file nothing.onnx"),
        (["measure", "no/such/folder"], "neither an artifact folder"),
        (["measure", "."], "without trimtab.json"),
        (["measure", "resnet8_mlperf_tiny", "--input", "3,x"], "--input must be C,H,W"),
        (["measure", "resnet8_mlperf_tiny", "--plot", "x.pdf"], "--plot must end in .html or .svg"),
        (["measure", "resnet8_mlperf_tiny", "--budget", "parms<=1"], "parms"),
        (["measure", "resnet8_mlperf_tiny", "--budget", "macs<=50%"], "nothing to compare with"),
        (["compact", "--budget", "params"], "params"),
        (["compact", "--time", "soon"], "a time must be like 90s"),
        (["compact", "photos", "--data", "photos"], "give the data once"),
        (["train", "--epochs", "1", "--time", "1m"], "not both"),
        (["train", "--objective", "magic"], "objective must be one of bias_loss, classify"),
        (["train", "--objective", "kd"], "kd needs teacher"),
        (["train", "--objective", "lsskd", "--set", "branch=2"], "lsskd has no option 'branch'; it has teacher"),
        (["train", "--objective", "lsskd", "--set", "extractor=big"], "extractor must be one of auto, stages, blocks"),
        (["train", "--set", "smoothing=2"], "smoothing must be in [0, 1), got 2"),
        (["predict", "resnet8_mlperf_tiny", "."], "no images in"),
        (["show", "ctt"], "did you mean cct"),
        (["compress", "no_such_net"], "no model is called"),
        (["compress", "x", "--method", "wish"], "method must be one of"),
        (["compress", "x", "--set", "norm"], "--set must be NAME=VALUE"),
        (["compress", "x", "--set", "norm=[1"], "'[1' is not a value"),
        (["compress", "x", "--set", "nrm=1"], "magnitude has no option 'nrm'; it has budget, norm"),
        (["export", "x/", "y.onnx", "--int8"], "--int8 needs --data"),
        (["run", "missing.yaml"], "does not exist"),
        (["report", "."], "has no run.json"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_use_is_one_line_and_exit_code_2(trimtab, args, says):
    code, out, err = trimtab(*args)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert "--help)" in err


def test_failure_is_one_line_and_exit_code_1(trimtab, artifact, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "trimtab.json").write_text("{")
    code, out, err = trimtab("measure", broken)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ")


def test_verbose_adds_the_traceback(trimtab, tmp_path):
    (tmp_path / "trimtab.json").write_text("{")
    assert "Traceback" in trimtab("measure", tmp_path, "--verbose")[2]
    assert "Traceback" not in trimtab("measure", tmp_path)[2]


def test_error_is_json_too_when_asked_for(trimtab):
    code, out, err = trimtab("--json", "measure", "nothing.onnx")
    assert json.loads(out)["exit_code"] == code == 2
    assert err.startswith("error: ")


def test_a_bug_is_reported_as_one(trimtab, monkeypatch):
    monkeypatch.setattr("trimtab.core.card.catalogue", lambda: {}["surprise"])
    code, _, err = trimtab("systems")
    assert code == 1
    assert "KeyError" in err and "--verbose" in err


def test_interrupted_is_130(trimtab, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.core.card.catalogue", stop)
    code, _, err = trimtab("systems")
    assert code == 130
    assert "interrupted" in err


def test_a_recipe_that_cannot_be_read_is_wrong_use(trimtab, tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {name: trim_net}\nphases: [{dance: {}}]\n")
    code, _, err = trimtab("run", "recipe.yaml")
    assert code == 2
    assert "phases.0" in err and err.count("\n") == 1


def test_run_carries_out_a_recipe(trimtab, tmp_path, digits):
    lines = [
        f"data: {digits}",
        "model: {name: trim_net, width: 4}",
        "out: made",
        "budget: size<=1KB",
        "phases:",
        "  - train: {epochs: 1}",
        "  - export: {}",
    ]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    code, out, err = trimtab("run", "recipe.yaml")
    assert code == 1, err
    assert "MISS size<=1KB" in out and "the budget could not be met: size<=1KB" in err
    assert (tmp_path / "made/model.onnx").is_file()


def test_compact_says_what_came_out(trimtab, monkeypatch, tmp_path):
    """The command hands over its arguments and reports the run; the job itself is tested with the job."""
    seen = {}

    def fake(data, **kwargs):
        seen.update(kwargs, data=data)
        row = {"name": "size", "op": "<=", "limit": 1e3, "value": 2e3, "ok": seen["model"] is None, "text": "size<=1KB"}
        Path("small").mkdir(exist_ok=True)
        Path("small/model.onnx").write_bytes(b"x" * 2000)
        budget = {"text": "size<=1KB", "met": row["ok"], "rows": [row]}
        return {"title": "t", "budget": budget, "result": {"summary": "It works.", "files": []}}

    monkeypatch.setattr("trimtab.compact.job.compact", fake)
    code, out, err = trimtab("compact", "photos", "--budget", "size<=1KB", "--time", "5m", "--out", "small", "--fresh")
    assert (code, err) == (0, "")
    assert out.splitlines()[:2] == ["It works.", "  ok   size<=1KB: 2 KB"] and "small/model.onnx" in out
    given = {"data": "photos", "model": None, "budget": "size<=1KB", "time": "5m", "seed": 0, "fresh": True}
    assert seen == given | {"out": Path("small")}
    code, out, err = trimtab("compact", "--data", "photos", "--model", "net", "--json")
    assert code == 1
    assert json.loads(out)["budget"]["met"] is False
    assert "the budget could not be met: size<=1KB" in err


def test_an_artifact_sees_data_as_it_was_trained_to(artifact, digits, tmp_path):
    from trimtab.cli.arguments import artifact as opened

    model = tt.create_model("trim_net", num_classes=3, in_chans=1, img_size=6, width=4, depths=(1,), seed=0)
    spec = InputSpec(size=(1, 6, 6), mean=(0.9,), std=(0.1,))
    kept = opened(str(tt.save(model, tmp_path / "abc", spec=spec, labels=list("abc"))))
    assert kept.load_data(str(digits), seed=0).spec == spec
    with pytest.raises(ValueError, match="knows the classes 0, 1, 2"):
        opened(str(artifact)).load_data(str(digits), seed=0)


def test_train_goes_on_with_an_artifact_and_a_teacher(trimtab, artifact, tmp_path):
    small = ["--epochs", "1", "--out", "more", "--batch-size", "256", "--json"]
    code, out, err = trimtab("train", "digits", "--model", artifact, "--teacher", artifact, *small)
    assert code == 0, err
    trained = json.loads(out)
    assert trained["cost"]["params"] == tt.measure(tt.load(artifact), SPEC.size).params
    assert trained["images"] > 100 and trained["stopped"] == "done"
    code, _, err = trimtab("train", "digits", "--model", artifact, "--size", "16")
    assert code == 2
    assert "an artifact has its own size" in err


@pytest.mark.parametrize(
    ("objective", "options"), [("bias_loss", ["--set", "alpha=0.5"]), ("lsskd", ["--set", "branches=2"]), ("hsakd", [])]
)
def test_train_with_an_objective_by_name(trimtab, artifact, digits, objective, options, tmp_path):
    teacher = ["--teacher", "big"] if objective == "hsakd" else []
    if teacher:
        assert trimtab("train", digits, "--model", "trim_net", "--epochs", 1, "--out", "big")[0] == 0
    args = ["--model", "trim_net", "--epochs", 1, "--out", "small", "--json", "--objective", objective]
    code, out, err = trimtab("train", digits, *args, *options, *teacher)
    assert code == 0, err
    plain = tt.create_model("trim_net", num_classes=3, in_chans=1, img_size=8)
    assert json.loads(out)["cost"]["params"] == sum(p.numel() for p in plain.parameters())
    assert tt.load(tmp_path / "small").state_dict().keys() == plain.state_dict().keys()
    manifest = json.loads((tmp_path / "small/trimtab.json").read_text())
    assert manifest["provenance"]["objective"] == objective


def test_an_objective_that_does_not_fit_the_model_says_so_in_one_line(trimtab, artifact):
    args = ["--model", artifact, "--epochs", "1", "--objective", "lsskd", "--set", "branches=9"]
    code, out, err = trimtab("train", "digits", *args)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "branches must be at most 2 for TrimNet, got 9" in err


def test_folder_of_a_finished_run_stands_for_its_model(trimtab, artifact, tmp_path):
    shutil.copytree(artifact, tmp_path / "out/model")
    direct, by_run = (trimtab("measure", m, "--json")[1] for m in (artifact, "out"))
    assert json.loads(direct)["macs"] == json.loads(by_run)["macs"]


@pytest.mark.parametrize("args", [["--json", "systems"], ["systems", "--json"]], ids=" ".join)
def test_json_may_stand_anywhere(trimtab, args):
    rows = json.loads(trimtab(*args)[1])
    assert {"slug", "title", "kind", "tasks", "family", "level", "arxiv", "year"} <= set(rows[0])


def test_systems_are_filtered(trimtab):
    every = json.loads(trimtab("systems", "--json")[1])
    assert {r["slug"] for r in every} == set(tt.catalogue())
    some = json.loads(trimtab("systems", "--json", "--family", "classify", "--kind", "architecture")[1])
    assert "cct" in {r["slug"] for r in some}
    assert all(r["family"] == "models/classify" for r in some)
    assert json.loads(trimtab("systems", "--json", "--task", "no-such-task")[1]) == []


def test_show_gives_card_use_and_evidence(trimtab):
    code, out, _ = trimtab("show", "cct")
    assert code == 0
    assert "2104.05704" in out and "tt.create_model(" in out and "Claims" in out
    value = json.loads(trimtab("show", "cct", "--json")[1])
    assert value["module"] == "trimtab.models.classify.cct"
    assert [c["id"] for c in value["claims"]] == [c.id for c in tt.catalogue()["cct"].card.claims]


def test_models_are_filtered(trimtab):
    names = json.loads(trimtab("models", "cct", "--json")[1])
    assert "cct_7_3x1_32" in names and all("cct" in n for n in names)
    assert set(json.loads(trimtab("models", "--ours", "--json")[1])) == set(tt.list_models(ours=True))
    assert trimtab("models", "mobilenetv3_small_10?")[1].split() == ["mobilenetv3_small_100"]


def test_measure_counts_a_registry_model(trimtab):
    value = json.loads(trimtab("measure", "resnet8_mlperf_tiny", "--input", "3,32,32", "--json")[1])
    model = tt.create_model("resnet8_mlperf_tiny", in_chans=3, img_size=32)
    cost = tt.measure(model, (3, 32, 32))
    assert (value["params"], value["macs"], value["memory"]) == (cost.params, cost.macs, cost.memory)
    assert "layers" not in value


def test_measure_per_layer_adds_up(trimtab, artifact):
    value = json.loads(trimtab("measure", artifact, "--per-layer", "--json")[1])
    assert sum(layer["macs"] for layer in value["layers"]) == value["macs"]
    out = trimtab("measure", artifact, "--per-layer")[1]
    assert all(layer["name"] in out for layer in value["layers"])


def test_measure_plots_every_layer(trimtab, artifact, tmp_path):
    code, out, err = trimtab("measure", artifact, "--plot", "layers.html")
    assert code == 0, err
    page = (tmp_path / "layers.html").read_text()
    names = [row.name for row in tt.measure(tt.load(artifact), SPEC.size, per_layer=True).layers if row.macs]
    assert all(name in page for name in names)
    assert "layers.html" in out


def test_measure_checks_a_budget(trimtab, artifact):
    code, out, _ = trimtab("measure", artifact, "--budget", "params<=1G")
    assert code == 0
    code, out, _ = trimtab("measure", artifact, "--budget", "params<=1, size<=1GB", "--json")
    verdict = json.loads(out)["budget"]
    assert code == 1
    assert [row["ok"] for row in verdict["rows"]] == [False, True]


def test_quiet_prints_nothing(trimtab, artifact):
    assert trimtab("measure", artifact, "--quiet") == (0, "", "")


def test_report_is_made_again_from_its_json(trimtab, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"title": "A run with an odd name", "command": "trimtab compact"}))
    code, out, err = trimtab("report", tmp_path)
    assert code == 0, err
    assert Path(out.strip()) == tmp_path / "report.html"
    assert "A run with an odd name" in (tmp_path / "report.html").read_text()
    assert json.loads(trimtab("report", tmp_path / "run.json", "-o", "other.html", "--json")[1]) == {
        "report": "other.html"
    }


def test_report_of_something_else_fails(trimtab, tmp_path):
    (tmp_path / "run.json").write_text("not json")
    code, _, err = trimtab("report", tmp_path)
    assert code == 1
    assert "not JSON" in err


def test_options_reach_the_method(trimtab, artifact, monkeypatch, tmp_path):
    seen = {}

    def fake(model, data, *, budget="macs<=50%", strength=1.0, epochs=3, seed=9):
        seen.update(budget=budget, strength=strength, epochs=epochs, seed=seed)
        return model

    monkeypatch.setattr("trimtab.compress.magnitude", fake, raising=False)
    monkeypatch.setattr("trimtab.fit", lambda *a, **k: pytest.fail("the method trains by itself"), raising=False)
    code, _, err = trimtab("compress", artifact, "--set", "strength=0.5", "--epochs", 2, "--seed", 4, "--out", "small")
    assert (code, err) == (0, "")
    assert seen == {"budget": "macs<=50%", "strength": 0.5, "epochs": 2, "seed": 4}


def test_train_compress_export_predict_and_measure(trimtab, digits, tmp_path):
    """The way from images to a file, one command after the other."""
    code, out, err = trimtab("train", digits, "--model", "trim_net", "--epochs", 2, "--out", "big", "--json")
    assert code == 0, err
    big = json.loads(out)
    assert 0 <= big["accuracy"] <= 1 and big["cost"]["params"] > 0

    code, out, err = trimtab(
        "compress", "big", "--data", digits, "--budget", "macs<=60%", "--epochs", 1, "--out", "small", "--json"
    )
    assert code == 0, err
    small = json.loads(out)
    assert small["cost"]["macs"] <= 0.6 * big["cost"]["macs"]
    assert small["before"]["cost"]["macs"] == big["cost"]["macs"]

    code, out, err = trimtab("export", "small", "small/model.onnx", "--data", digits, "--json")
    assert code == 0, err
    assert json.loads(out)["size"] == (tmp_path / "small/model.onnx").stat().st_size

    code, out, err = trimtab("measure", "small/model.onnx", "--per-layer", "--plot", "layers.svg", "--json")
    assert code == 0, err
    measured = json.loads(out)
    assert measured["macs"] == small["cost"]["macs"] == sum(layer["macs"] for layer in measured["layers"])
    assert (tmp_path / "layers.svg").read_text().lstrip().startswith(("<svg", "<?xml"))

    images = sorted((digits / "a").glob("*.png"))[:3]
    answers = [
        json.loads(trimtab("predict", m, *images, "--top", 2, "--json")[1]) for m in ("small", "small/model.onnx")
    ]
    for torch_says, onnx_says in zip(*answers, strict=True):
        assert torch_says["label"] == onnx_says["label"]
        assert torch_says["confidence"] == pytest.approx(onnx_says["confidence"], abs=1e-3)
        assert len(torch_says["top"]) == 2
    assert trimtab("predict", "small", digits / "b")[1].count("\n") == 12
