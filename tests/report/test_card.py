"""The model card: what hubs read, what people read, and code that runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.report import sample
from trimtab import report
from trimtab.report.card import block, code, text
from trimtab.report.words import clean


def parts(run: Any, folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and body of the card of `run`."""
    card = report.model_card(run, folder / "README.md").read_text("utf-8")
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter_is_what_hubs_expect(run: dict[str, Any], tmp_path: Path) -> None:
    front, _ = parts(run, tmp_path)
    assert front["pipeline_tag"] == "image-classification" and front["library_name"] == "trimtab"
    assert front["tags"] == ["trimtab", "compact", "onnx"]
    (entry,) = front["model-index"]
    assert entry["name"] == "trim_resnet_w24"
    assert [(r["dataset"]["split"], r["metrics"][0]["value"]) for r in entry["results"]] == [
        ("test", 0.85),
        ("validation", 0.951),
    ]


def test_front_matter_is_read_by_hugging_face(run: dict[str, Any], tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard.load(report.model_card(run, tmp_path / "README.md")).data
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("accuracy", 0.85), ("accuracy", 0.951)]


def test_card_has_every_part_and_the_picture_beside_it(run: dict[str, Any], tmp_path: Path) -> None:
    _, body = parts(run, tmp_path)
    assert re.findall("^## (.*)$", body, re.M) == [
        "How to use it", "Budget", "Results", "Data", "How it was made", "Limits",
    ]  # fmt: skip
    assert "(pareto.svg)" in body and (tmp_path / "pareto.svg").read_text("utf-8") == report.pareto_svg(run)
    assert "| Size | ≤ 96 KB | 83.6 KB | 13% to spare | ✓ met |" in body
    assert "Budget met" in body and run["command"] in body


def test_a_missed_budget_is_said_plainly(tmp_path: Path) -> None:
    _, body = parts(sample.missed(), tmp_path)
    assert "**Budget not met" in body and "It does not meet the budget" in body


def test_card_of_an_empty_run(tmp_path: Path) -> None:
    front, body = parts({}, tmp_path)
    assert front == {"library_name": "trimtab", "tags": ["trimtab", "compact"]}
    assert not (tmp_path / "pareto.svg").exists() and "pareto.svg" not in body


def test_foreign_text_cannot_shape_the_card(tmp_path: Path) -> None:
    run = sample.hostile()
    run["data"]["task"] = "classify"
    front, body = parts(run, tmp_path)
    assert front["model-index"][0]["name"] in [" ".join(clean(a).split()) for a in sample.ATTACKS]
    outside = re.sub(r"^(`{3,}).*?^\1$", "", body, flags=re.M | re.S)  # fenced blocks show everything as it is
    prose = re.sub(r"(?<!\\)(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)
    assert not re.search(r"(?<!\\)<", prose)
    assert not re.search(r"(?<![\\!])\[(?!Accuracy)", prose)
    assert re.findall("^#+ heading", body, re.M) == []


def test_text_code_and_block_keep_to_themselves() -> None:
    assert text("a_b *c* <d> [e](f)\n# g") == r"a\_b \*c\* \<d\> \[e\](f) \# g"
    assert text("1. first") == r"1\. first" and text("16.4 GB") == "16.4 GB" and text("- x") == r"\- x"
    assert "https:" not in text("https://example.com")
    assert code("a`b``c") == "```a`b``c```" and code("`x`") == "`` `x` ``"
    assert block("```\nescape", "bash") == "````bash\n```\nescape\n````"


def test_the_onnxruntime_example_runs(
    run: dict[str, Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    # A "classifier" that answers with the brightest of three channels.
    shape = {"image": ["n", 3, 4, 6], "scores": ["n", 3]}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in shape.items()}
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    node = helper.make_node("ReduceMean", ["image", "axes"], ["scores"], keepdims=0)
    graph = helper.make_graph([node], "brightest", [values["image"]], [values["scores"]], [axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    spec = {"size": [3, 4, 6], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "task": "classify"}
    helper.set_model_props(model, {"trimtab.spec": json.dumps(spec), "trimtab.labels": json.dumps(["r", "g", "b"])})
    onnx.save(model, tmp_path / "model.onnx")
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[..., 1] = 200
    Image.fromarray(pixels).save(tmp_path / "picture.png")

    _, body = parts(run, tmp_path)
    (example,) = [b for b in re.findall(r"```python\n(.*?)\n```", body, re.S) if "onnxruntime" in b]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "card", "exec"), {})
    assert capsys.readouterr().out.strip() == "g"
