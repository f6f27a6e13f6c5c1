"""The end of the job: the test split, once, on the delivered file; then the report, the model card and run.json."""

from __future__ import annotations

import base64
import datetime
import io
import json
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from trimtab import report
from trimtab.compact.deliver import Delivery, measured
from trimtab.core import host
from trimtab.core.budget import Verdict
from trimtab.core.cost import Cost, measure, measure_onnx
from trimtab.core.edit import describe, history
from trimtab.core.files import write_text
from trimtab.core.log import logger
from trimtab.data import Data
from trimtab.deploy import OnnxModel

if TYPE_CHECKING:
    from trimtab.compact.job import Job

log = logger(__name__)

SAMPLES = 12
MOST_LAYERS = 300  # rows of the per-layer table
KINDS = {"float": "float", "int8": "8-bit", "low-bit": "low-bit"}  # of files, in words


def write(job: Job, model: nn.Module, delivery: Delivery, name: str) -> dict[str, Any]:
    """Test, describe and write everything; the folder's earlier results are replaced file by file."""
    job.publish(model, delivery)
    tested = job.journal.once("test", lambda: test(job.out / "model.onnx", job.data))
    cost = measured(job.out / "model.onnx", job.budget)
    if "latency" not in cost:
        timed = measure_onnx(job.out / "model.onnx", what=("latency",))
        cost |= {"latency": timed.latency, "latency_iqr": timed.latency_iqr, "runtime": timed.runtime}
    verdict = job.budget.check({**cost, "accuracy": tested["accuracy"]})
    whole = measure(model, (job.data.in_chans, *job.data.size), per_layer=True)
    accuracy = {"val": delivery.accuracy, "test": tested["accuracy"]}
    row = {
        "name": name, "stage": f"delivered, {KINDS[delivery.kind]}", "params": whole.params,
        "macs": whole.macs, "size": cost["size"], "latency": cost.get("latency"), "val_accuracy": delivery.accuracy,
        "seconds": job.journal.used, "fits": verdict.ok, "chosen": True,
    }  # fmt: skip
    run = {
        "title": f"{job.data.name} within {job.budget}",
        "command": command(job.command, job.out),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(job.journal.used, 1),
        "limit": job.journal.limit,
        "seed": job.seed,
        "machine": host.machine(),
        "versions": host.versions(),
        "data": job.data.summary(),
        "budget": {"text": str(job.budget), "met": verdict.ok, "explain": verdict.explain(),
                   "rows": [asdict(r) for r in verdict.rows]},
        "tried": [*job.journal.steps.get("tried", []), row],
        "result": {
            "model": name, "summary": _summary(job.data, delivery, cost, tested["accuracy"], verdict),
            "cost": cost, "accuracy": accuracy, "edits": describe(history(model).edits),
            "files": [], "history": _history(job.journal.steps),
        },
        "layers": {"before": job.before, "after": layers(whole)},
        "confusion": tested["confusion"],
        "samples": tested["samples"],
    }  # fmt: skip
    job.keep_artifact(
        model, cost=cost, metrics=accuracy, provenance={k: run[k] for k in ("command", "created", "versions")}
    )
    run["result"]["files"] = _files(job.out)
    write_text(job.out / "run.json", json.dumps(run, indent=1))
    report.write(run, job.out / "report.html")
    report.model_card(run, job.out / "README.md")
    log.info("%.0f s  %s", job.journal.used, run["result"]["summary"])
    log.info("written to %s: model.onnx, the artifact, report.html, README.md, run.json", job.out)
    return run


def read(out: Path) -> dict[str, Any]:
    """The run of a finished job."""
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


def test(path: Path, data: Data) -> dict[str, Any]:
    """Accuracy, confusion matrix and some samples of the test split, by the delivered file."""
    model = OnnxModel(path, threads=os.cpu_count() or 1)
    split = data.splits["test"]
    scores = np.concatenate(
        [model.logits(b["image"].numpy()) for b in data.loader("test", batch_size=256, shuffle=False)]
    )
    labels, guessed = split.labels.numpy(), scores.argmax(1)
    matrix = np.zeros((data.num_classes, data.num_classes), int)
    np.add.at(matrix, (labels, guessed), 1)
    scores = scores - scores.max(1, keepdims=True)
    sure = (np.exp(scores) / np.exp(scores).sum(1, keepdims=True))[np.arange(len(scores)), guessed]
    right, wrong = (np.flatnonzero((labels == guessed) == t) for t in (True, False))
    shown = np.sort(np.concatenate([wrong[: SAMPLES // 2], right[: SAMPLES - len(wrong[: SAMPLES // 2])]]))
    return {
        "accuracy": float((labels == guessed).mean()),
        "n": len(labels),
        "confusion": {"labels": data.class_names, "matrix": matrix.tolist()},
        "samples": [
            {"image": _png(split.image(int(i))), "label": data.class_names[labels[i]],
             "predicted": data.class_names[guessed[i]], "confidence": float(sure[i])}
            for i in shown
        ],
    }  # fmt: skip


def brief(cost: Cost, accuracy: float | None) -> dict[str, Any]:
    """One row of "tried"."""
    return {"params": cost.params, "macs": cost.macs, "size": cost.size, "val_accuracy": accuracy, "latency": None}


def layers(cost: Cost) -> list[dict[str, Any]]:
    """Rows for the per-layer table of the report."""
    return [
        {"name": r.name, "kind": r.kind, "params": r.params, "macs": r.macs, "activations": r.activations}
        for r in cost.layers
    ][:MOST_LAYERS]


def one_line(data: Data) -> str:
    """`digits: 10 classes, 8x8 grey, 1294 train, 144 val, 359 test`."""
    counts = ", ".join(f"{len(v)} {k}" for k, v in data.splits.items())
    kind = "grey" if data.in_chans == 1 else "colour"
    return f"{data.name}: {data.num_classes} classes, {data.size[1]}x{data.size[0]} {kind}, {counts}"


def command(what: dict[str, Any], out: Path) -> str:
    """The command line that does the same again; a call of Python where the command has no words for it."""
    if what["methods"] is not None or what["parts"] is not None:
        return f"tt.compact({', '.join(f'{k}={v!r}' for k, v in what.items() if v is not None)}, out={str(out)!r})"
    words = ["trimtab", "compact", "--data", what["data"]]
    for key in ("model", "budget"):
        if what[key] is not None:
            words += [f"--{key}", what[key]]
    words += ["--time", f"{what['time']:g}s", "--seed", str(what["seed"]), "--out", str(out)]
    return shlex.join(words)


def _summary(data: Data, d: Delivery, cost: dict[str, Any], accuracy: float, verdict: Verdict) -> str:
    what = f"{accuracy:.2%} test accuracy on {data.name} in {cost['size'] / 1e3:.1f} KB ({KINDS[d.kind]} ONNX)"
    return f"{what}, inside the budget" if verdict.ok else f"{what}; the budget could NOT be met: {verdict.explain()}"


def _history(steps: dict[str, Any]) -> list[dict[str, Any]]:
    """The long trainings, one after the other; `epoch` starts again with each."""
    return [
        {"stage": key.removeprefix("history "), **{k: r.get(k) for k in ("epoch", "loss", "val_accuracy", "lr")}}
        for key in steps
        if key.startswith("history ")
        for r in steps[key]
    ]


def _files(out: Path) -> list[dict[str, Any]]:
    names = [p.relative_to(out) for p in sorted(out.rglob("*")) if p.is_file()]
    return [{"name": str(n), "bytes": (out / n).stat().st_size} for n in names if not str(n).startswith(".")]


def _png(image: Any) -> str:
    buffer = io.BytesIO()
    if max(image.size) > 96:
        image.thumbnail((96, 96))
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
