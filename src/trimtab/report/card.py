"""The model card: a README.md with the front matter that model hubs read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .output import save
from .pareto import pareto_svg
from .sections import data_facts, machine_facts
from .words import (
    TITLES,
    budget_rows,
    clean,
    count,
    duration,
    get,
    guessing,
    interval,
    items,
    moment,
    number,
    pair,
    percent,
    quantity,
    row_ok,
    rows,
    slack,
    verdict,
)

_TASKS = {
    "classify": "image-classification",
    "segment": "image-segmentation",
    "detect": "object-detection",
    "restore": "image-to-image",
    "generate": "unconditional-image-generation",
    "answer": "visual-question-answering",
}

_RUNTIME = """import json
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession({file})
notes = session.get_modelmeta().custom_metadata_map
spec, labels = json.loads(notes["trimtab.spec"]), json.loads(notes["trimtab.labels"])

channels, height, width = spec["size"]
image = ImageOps.exif_transpose(Image.open("picture.png")).convert("L" if channels == 1 else "RGB")
image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
pixels = np.asarray(image, np.float32).reshape(height, width, channels) / 255
batch = ((pixels - np.float32(spec["mean"])) / np.float32(spec["std"])).transpose(2, 0, 1)[None]
scores = session.run(None, {{session.get_inputs()[0].name: batch}})[0][0]
print(labels[int(scores.argmax())])"""


def model_card(run: Mapping[str, Any], path: str | Path) -> Path:
    """Write a model card (``README.md`` inside, when `path` is a directory) and, beside it, ``pareto.svg``.

    The picture is left out when nothing that was tried can be plotted. Any key of the run may be missing or
    null; what depends on it is left out.
    """
    if not isinstance(run, Mapping):
        raise ValueError(f"run must be a mapping, got {type(run).__name__}")
    path = Path(path)
    card = path / "README.md" if path.is_dir() else path
    plot = pareto_svg(run)
    if plot:
        save(plot, card.parent / "pareto.svg", inside="pareto.svg")
    makers = (_about, _use, _budget, _results, _data, _made, _limits)
    parts = [_front_matter(run), f"# {text(run.get('title')) or 'A compact model'}"]
    parts += [part for make in makers if (part := make(run))]
    if plot:
        where = next((k for k, part in enumerate(parts) if part.startswith("## Results")), len(parts) - 1)
        words = f"![Accuracy against cost of {count(len(rows(run.get('tried'))), 'model')} that were tried](pareto.svg)"
        parts.insert(where + 1, words)
    return save("\n\n".join(parts) + "\n", card, inside="README.md")


# ---------------------------------------------------------------- Markdown and YAML that foreign text cannot break


def text(value: Any) -> str:
    """`value` as one line of Markdown that shows itself and means nothing."""
    line = " ".join(clean(value).split())
    line = re.sub(r"([\\`*_{}\[\]<>|~$#!])", r"\\\1", line).replace("&", "&amp;")
    line = re.sub(r"^([-+=])", r"\\\1", re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line))
    return re.sub(r"(?i)\b(https?|ftp|www)(?=[:.])", "\\1\u200b", line)  # no automatic links either


def code(value: Any) -> str:
    """`value` as inline code, whatever backticks it holds."""
    line = " ".join(clean(value).split()).replace("|", "¦")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def block(value: Any, language: str) -> str:
    """`value` as a fenced block whose fence it cannot close."""
    body = clean(value)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", body)), default=0))
    return f"{fence}{language}\n{body}\n{fence}"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Rows of finished Markdown as a table; the first column to the left, the others to the right."""
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def _quoted(value: Any) -> str:
    """A YAML string; JSON's quoting is YAML's."""
    return json.dumps(" ".join(clean(value).split()), ensure_ascii=False)


def _front_matter(run: Mapping[str, Any]) -> str:
    task = _TASKS.get(clean(get(run, "data", "task")))
    onnx = _file(run, ".onnx")
    lines = ["---", "library_name: trimtab"]
    if task:
        lines.append(f"pipeline_tag: {task}")
    lines += ["tags:", "- trimtab", "- compact"] + (["- onnx"] if onnx else [])
    metrics = [
        (split, share)
        for split in ("test", "val")
        if (share := number(get(run, "result", "accuracy", split))) is not None
    ]
    name, data = clean(get(run, "result", "model")) or clean(run.get("title")), clean(get(run, "data", "name"))
    if metrics and name and data and task:
        lines += ["metrics:", "- accuracy", "model-index:", f"- name: {_quoted(name)}", "  results:"]
        for split, share in metrics:
            said = "test" if split == "test" else "validation"
            lines += [
                "  - task:",
                f"      type: {task}",
                "    dataset:",
                f"      name: {_quoted(data)}",
                f"      type: {_quoted(data)}",
                f"      split: {said}",
                "    metrics:",
                "    - type: accuracy",
                f"      value: {share:.6g}",
                f"      name: {said.capitalize()} accuracy",
            ]
    return "\n".join([*lines, "---"])


# ---------------------------------------------------------------- the sections


def _file(run: Mapping[str, Any], ending: str) -> str:
    """The first written file whose name ends so, or ''."""
    names = [clean(file.get("name")) for file in rows(get(run, "result", "files"))]
    return next((name for name in names if name.endswith(ending)), "")


def _about(run: Mapping[str, Any]) -> str:
    said = [text(get(run, "result", "summary"))]
    if clean(get(run, "result", "model")):
        said.insert(0, f"Model: {code(run['result']['model'])}.")
    if get(run, "result") or get(run, "budget"):
        said.append(f"**{text(verdict(run).sentence)}**")
    return "\n\n".join(part for part in said if part)


def _use(run: Mapping[str, Any]) -> str:
    onnx, manifest = _file(run, ".onnx"), _file(run, "trimtab.json")
    parts = []
    if onnx:
        parts += ["With trimtab, on pictures or folders:", block(f"trimtab predict {_shell(onnx)} picture.png", "bash")]
    if manifest or not onnx:
        folder = manifest.rpartition("/")[0] or "."
        lines = f"import trimtab as tt\n\nmodel = tt.load({json.dumps(folder)})  # a plain torch.nn.Module"
        parts += ["In PyTorch:", block(lines, "python")]
    if onnx:
        parts += [
            "With ONNX Runtime alone; the file says how pictures must be prepared and what the classes are called:",
            block(_RUNTIME.format(file=json.dumps(onnx)), "python"),
        ]
    return "## How to use it\n\n" + "\n\n".join(parts) if get(run, "result") else ""


def _shell(name: str) -> str:
    return name if re.fullmatch(r"[\w./-]+", name) else "'" + name.replace("'", "'\"'\"'") + "'"


def _budget(run: Mapping[str, Any]) -> str:
    body = []
    for row in budget_rows(run):
        value, limit = pair(row["name"], row.get("value"), row.get("limit"))
        ok = row_ok(row)
        state = "not measured" if ok is None else "✓ met" if ok else "✗ not met"
        sign = "≤" if str(row.get("op", "<=")).startswith("<") else "≥"
        name = TITLES.get(str(row["name"])) or text(row["name"])
        body.append([name, f"{sign} {limit}", value, slack(row) if ok is not None else "–", state])
    return "## Budget\n\n" + table(["Limit on", "Limit", "Reached", "Room", "State"], body) if body else ""


def _results(run: Mapping[str, Any]) -> str:
    body = []
    for split, name in (("test", "Test accuracy"), ("val", "Validation accuracy")):
        share = number(get(run, "result", "accuracy", split))
        if share is None:
            continue
        trials = number(get(run, "data", "counts", split))
        note = ""
        if trials and trials > 0 and 0 <= share <= 1:
            low, high = interval(share, trials)
            note = f"95% interval {100 * low:.1f}–{percent(high)}, {count(trials, 'image')}"
        body.append([name, percent(share), note])
    for name in ("params", "macs", "size", "latency", "memory", "energy"):
        value = number(get(run, "result", "cost", name))
        if value is not None:
            exact = f"{value:,.0f}" + (" bytes" if name in ("size", "memory") else "")
            note = exact if name in ("params", "macs", "size", "memory") else ""
            if name == "latency" and get(run, "result", "cost", "runtime"):
                note = text(run["result"]["cost"]["runtime"])
            body.append([TITLES[name], quantity(name, value), note])
    return "## Results\n\n" + table(["", "Value", "Note"], body) if body else ""


def _data(run: Mapping[str, Any]) -> str:
    facts = [f"- {name}: {text(value)}" for name, value in data_facts(run)]
    classes = [text(name) for name in items(get(run, "data", "class_names"))]
    if classes:
        more = f" and {len(classes) - 30} more" if len(classes) > 30 else ""
        facts.append(f"- {count(len(classes), 'class', 'classes')}: {', '.join(classes[:30])}{more}")
    warnings = [f"- {text(warning)}" for warning in items(get(run, "data", "warnings")) if clean(warning)]
    parts = ["\n".join(facts)] if facts else []
    if warnings:
        parts += ["Warnings about the data:", "\n".join(warnings)]
    return "## Data\n\n" + "\n\n".join(parts) if parts else ""


def _made(run: Mapping[str, Any]) -> str:
    parts = []
    if clean(run.get("command")):
        parts += ["Made, and to be made again, with", block(run["command"], "bash")]
    tried, took = len(rows(run.get("tried"))), number(run.get("seconds"))
    said = [count(tried, "model was", "models were") + " tried"] if tried else []
    said += [f"it took {duration(took)}"] if took is not None else []
    said += [f"made on {text(moment(run['created']))}"] if clean(run.get("created")) else []
    if said:
        parts.append(("; ".join(said) + ".").capitalize() if not said[0][0].isdigit() else "; ".join(said) + ".")
    edits = [f"1. {text(edit)}" for edit in items(get(run, "result", "edits")) if clean(edit)]
    if edits:
        more = [f"\nand {len(edits) - 12} more, listed in the report."] if len(edits) > 12 else []
        parts += ["What was changed in the starting network:", "\n".join([*edits[:12], *more])]
    machine = ", ".join(f"{name.lower()} {text(value)}" for name, value in machine_facts(run))
    versions = get(run, "versions")
    said_versions = (
        ", ".join(f"{text(k)} {text(v)}" for k, v in versions.items() if clean(v))
        if isinstance(versions, Mapping)
        else ""
    )
    parts += [f"Machine: {machine}."] if machine else []
    parts += [f"Versions: {said_versions}."] if said_versions else []
    return "## How it was made\n\n" + "\n\n".join(parts) if parts else ""


def _limits(run: Mapping[str, Any]) -> str:
    name = clean(get(run, "data", "name"))
    said = [
        f"- Trained and measured on {code(name)} only; on other pictures the accuracy is not known."
        if name
        else "- The accuracy on pictures unlike those it was trained on is not known."
    ]
    if get(run, "data", "class_names"):
        said.append("- It always answers with one of its classes, also for a picture that shows none of them.")
    if number(get(run, "result", "cost", "latency")) is not None:
        said.append("- Latency was measured on the machine named above; elsewhere, measure again: `trimtab measure`.")
    trials = number(get(run, "data", "counts", "test"))
    if trials is not None and trials < 1000:
        said.append(f"- The test split is small ({count(trials, 'image')}): mind the interval beside the accuracy.")
    if guessing(run):
        said.append(f"- {guessing(run)}")
    if verdict(run).state == "missed":
        said.append("- It does not meet the budget that was asked for.")
    return "## Limits\n\n" + "\n".join(said)
