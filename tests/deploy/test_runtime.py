"""Predicting from the file alone, and refusing files that are not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from torch import nn

import trimtab as tt
from trimtab.core.artifact import InputSpec
from trimtab.core.errors import ArtifactError, DataError
from trimtab.deploy import OnnxModel, export
from trimtab.deploy.runtime import softmax

# mean and deviation 0.5: a white image is fed as +1, a black one as -1
SPEC = InputSpec((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
LABELS = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that says which colour channel is brightest."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.dirac_(model[0].weight)
    path = tmp_path_factory.mktemp("m") / "colour.onnx"
    return export(model, path, spec=SPEC, labels=LABELS, exporter="classic").path


def test_predicts_with_nothing_but_the_file(file: Path, tmp_path: Path) -> None:
    model = OnnxModel(file)
    assert (model.spec, model.labels, model.batch) == (SPEC, LABELS, None)
    photo = tmp_path / "photo.png"
    Image.new("RGB", (100, 40), (0, 255, 0)).save(photo)
    blue = Image.new("RGB", (7, 9), "blue")
    red = np.zeros((20, 20, 3), np.uint8)
    red[..., 0] = 255
    found = model.predict([photo, blue, red], top=2)
    assert [p.label for p in found] == ["green", "blue", "red"]
    assert [p.index for p in found] == [1, 2, 0]
    assert found[0].confidence == pytest.approx(np.exp(1) / (np.exp(1) + 2 * np.exp(-1)), abs=1e-5)
    assert found[0].top[0] == ("green", found[0].confidence) and len(found[0].top) == 2
    assert model.predict(str(photo))[0].label == "green"
    assert sum(p for _, p in model.predict(blue)[0].top) == pytest.approx(1)
    assert model.predict([]) == []


def test_batches_of_any_size_give_the_same(file: Path) -> None:
    model = OnnxModel(file, threads=2)
    images = np.random.default_rng(0).standard_normal((5, 3, 16, 16)).astype(np.float32)
    assert np.allclose(model.logits(images), np.concatenate([model.logits(images[i : i + 1]) for i in range(5)]))
    assert np.allclose(model.logits(images), images.mean((2, 3)), atol=1e-6)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 16, 16\), got \(5, 3, 8, 8\)"):
        model.logits(images[:, :, :8, :8])
    median, spread = model.latency(5)
    assert median > 0 and spread >= 0


def test_evaluates_on_data_with_other_statistics(tmp_path: Path) -> None:
    data = tt.load_data("digits", limit=300)
    model = tt.create_model("trim_1k", num_classes=10, in_chans=1)
    own = export(model, tmp_path / "a.onnx", data=data, exporter="classic")
    got = OnnxModel(own.path).evaluate(data, "test")
    assert got["n"] == len(data.splits["test"])
    assert got["accuracy"] == pytest.approx(tt.evaluate(model, data, "test")["accuracy"])
    assert OnnxModel(own.path).evaluate(data, "test", limit=10)["n"] == 10
    # A file made for other statistics sees the same pixels, normalised its own way.
    other = InputSpec(data.spec.size, (0.0,), (1.0,))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    file = export(plain, tmp_path / "b.onnx", spec=other, exporter="classic").path
    right = 0
    for i in range(len(data.splits["test"])):
        right += OnnxModel(file).predict(data.splits["test"].image(i))[0].index == int(data.splits["test"].labels[i])
        if i == 20:
            break
    assert OnnxModel(file).evaluate(data, "test", limit=21)["accuracy"] == pytest.approx(right / 21)
    with pytest.raises(ValueError, match="the data gives images"):
        OnnxModel(file).evaluate(tt.load_data("digits", image_size=16, limit=60), "test")


def test_labels_default_to_numbers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    path = export(model, tmp_path / "m.onnx", spec=SPEC, exporter="classic").path
    assert OnnxModel(path).labels == ["0", "1", "2"]
    assert OnnxModel(path).predict(Image.new("RGB", (4, 4), "blue"))[0].label == "2"


def test_labels_in_any_language(tmp_path: Path) -> None:
    names = ["röd", "зелёный", "青"]
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    path = export(model, tmp_path / "m.onnx", spec=SPEC, labels=names, exporter="classic").path
    assert OnnxModel(path).labels == names


def test_images_that_cannot_be_read(file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"bad\.jpg"):
        OnnxModel(file).predict(bad)
    with pytest.raises(DataError):
        OnnxModel(file).predict(tmp_path / "missing.jpg")


def edited(file: Path, target: Path, **notes: str | None) -> Path:
    model = onnx.load(file)
    kept = {p.key: p.value for p in model.metadata_props} | {f"trimtab.{k}": v for k, v in notes.items()}
    del model.metadata_props[:]
    for key, value in kept.items():
        if value is not None:
            model.metadata_props.add(key=key, value=value)
    target.write_bytes(model.SerializeToString())
    return target


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({"spec": None}, "does not say how images are prepared"),
        ({"spec": "{"}, "damaged"),
        ({"spec": "[]"}, "damaged"),
        ({"spec": '{"size": [3, 16]}'}, "damaged"),
        ({"spec": '{"size": [3, 16, 16], "mean": [0, 0, 0], "std": [0, 0, 0]}'}, "damaged"),
        ({"spec": "[" * 100_000}, "damaged"),
        ({"spec": '{"size": [3, 8, 8], "mean": [0, 0, 0], "std": [1, 1, 1]}'}, "but says that it takes"),
        ({"labels": '{"0": "red"}'}, "damaged"),
        ({"labels": '["a", 1, "c"]'}, "damaged"),
        ({"labels": '["a", "b"]'}, "3 outputs but 2 labels"),
    ],
)
def test_damaged_descriptions(file: Path, tmp_path: Path, notes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        OnnxModel(edited(file, tmp_path / "m.onnx", **notes))


def test_files_that_are_no_models(file: Path, tmp_path: Path) -> None:
    for name, content in {"empty": b"", "text": b"hello " * 100, "zip": b"PK\x03\x04" + bytes(500)}.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="no ONNX file"):
            OnnxModel(path)
    with pytest.raises(ArtifactError, match="is not a file"):
        OnnxModel(tmp_path)
    whole = file.read_bytes()
    cut = tmp_path / "cut.onnx"
    for n in range(0, len(whole), 11):
        cut.write_bytes(whole[:n])
        with pytest.raises(ArtifactError):
            OnnxModel(cut)


def test_flipped_bytes_never_crash_the_reader(file: Path, tmp_path: Path) -> None:
    whole = bytearray(file.read_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / "m.onnx"
    refused = 0
    for _ in range(60):
        hurt = bytearray(whole)
        hurt[rng.integers(len(hurt))] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(hurt))
        try:
            OnnxModel(path)
        except ArtifactError:
            refused += 1
    assert refused > 5


def test_spec_survives_json() -> None:
    assert InputSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC


def test_softmax_is_stable() -> None:
    p = softmax(np.array([[1e4, 0, -1e4], [0, 0, 0]], np.float32))
    assert np.allclose(p, [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]])
