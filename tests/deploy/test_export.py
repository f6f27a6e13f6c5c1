"""Export: the file computes what the model computes, is lean, and int8 is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.artifact import InputSpec
from trimtab.core.cost import measure, measure_onnx
from trimtab.deploy import Exported, ExportError, OnnxModel, export
from trimtab.deploy.to_onnx import spec_of

SPEC = InputSpec((3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


@pytest.fixture(scope="module")
def data() -> Any:
    return tt.load_data("digits")


@pytest.fixture(scope="module")
def trained(data: Any) -> nn.Module:
    model = tt.create_model("trim_10k", num_classes=10, in_chans=1)
    tt.fit(model, data, epochs=14, progress=False, seed=0)
    return model


def run(path: Path, images: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": images})[0]


def test_zeros_around_an_image_are_not_taken_for_the_padding_of_a_max_pool(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    model[3].weight.data.fill_(0.01)
    spec = InputSpec((3, 32, 32), (0.0,) * 3, (1.0,) * 3)
    done = export(model, tmp_path / "m.onnx", spec=spec)
    x = -torch.rand(4, 3, 32, 32) - 1  # below every zero: ONNX Runtime alone would lose the border
    with torch.no_grad():
        assert np.allclose(run(done.path, x.numpy()), model(x).numpy(), atol=1e-4)


def test_exported_file_computes_what_the_model_computes(trained: nn.Module, data: Any, tmp_path: Path) -> None:
    trained.train()
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    rng = torch.get_rng_state()
    done = export(trained, tmp_path / "m.onnx", data=data)
    assert isinstance(done, Exported) and done.exporter == "dynamo" and done.dynamic_batch and not done.notes
    assert trained.training and all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert done.path == tmp_path / "m.onnx" and done.size == done.path.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    onnx.checker.check_model(onnx.load(done.path), full_check=True)
    trained.eval()
    for n in (1, 2, 5):
        x = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            assert np.allclose(run(done.path, x.numpy()), trained(x).numpy(), atol=1e-4)
    assert done.max_abs_diff < 1e-4 and done.agreement == 1.0
    want = tt.evaluate(trained, data, "val")["accuracy"]
    assert done.accuracy == pytest.approx(want)


def test_metadata_makes_the_file_complete(trained: nn.Module, data: Any, tmp_path: Path) -> None:
    done = export(trained, tmp_path / "out", data=data, exporter="classic")
    assert done.path == tmp_path / "out" / "model.onnx"
    notes = {p.key: p.value for p in onnx.load(done.path).metadata_props}
    assert InputSpec.from_json(json.loads(notes["trimtab.spec"])) == data.spec
    assert json.loads(notes["trimtab.labels"]) == list(data.class_names)
    assert onnx.load(done.path).producer_name == "trimtab"


def test_int8_keeps_the_accuracy_and_is_small(trained: nn.Module, data: Any, tmp_path: Path) -> None:
    full = export(trained, tmp_path / "f.onnx", data=data, exporter="classic")
    int8 = export(trained, tmp_path / "q.onnx", data=data, exporter="classic", int8=True)
    assert int8.int8 and not full.int8
    onnx.checker.check_model(onnx.load(int8.path), full_check=True)
    a, b = (OnnxModel(e.path).evaluate(data, "test")["accuracy"] for e in (full, int8))
    assert a > 0.9 and b > a - 0.015
    assert int8.agreement > 0.97
    assert int8.size < 0.45 * full.size
    what = ("params", "macs", "memory", "bops", "energy")
    p, q = measure_onnx(full.path, what=what), measure_onnx(int8.path, what=what)
    assert (p.params, p.macs) == (q.params, q.macs)
    assert q.memory <= p.memory / 2 and q.bops == p.bops / 16 and q.energy < p.energy / 3


def test_whole_network_runs_in_integers(trained: nn.Module, data: Any, tmp_path: Path) -> None:
    """ONNX Runtime fuses every convolution, residual addition, the pooling and the classifier to integer kernels."""
    done = export(trained, tmp_path / "q.onnx", data=data, exporter="classic", int8=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(done.path, options, providers=["CPUExecutionProvider"])
    ops = [n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node]
    assert {"Conv", "FusedConv", "Gemm", "Add", "GlobalAveragePool", "DequantizeLinear"}.isdisjoint(ops)
    assert {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm"} <= {*ops}
    assert ops.count("QuantizeLinear") == 1  # the image, once


def test_int8_resnet8_of_mlperf_tiny_fits_90_kilobytes(data: Any, tmp_path: Path) -> None:
    model = tt.create_model("resnet8_mlperf_tiny", num_classes=10, in_chans=3)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):  # no two alike, so that nothing can be shared
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    params = measure(model, (3, 32, 32), what="params").params
    assert params == 77_962

    class Colour:  # digits, made as large and colourful as CIFAR
        splits, class_names = data.splits, data.class_names
        spec = InputSpec((3, 32, 32), data.spec.mean * 3, data.spec.std * 3)

        def loader(self, split: str, **kwargs: Any) -> Any:
            for batch in data.loader(split, **kwargs):
                image = batch["image"].repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
                yield batch | {"image": image.contiguous()}

    done = export(model, tmp_path / "q.onnx", data=Colour(), int8=True, exporter="classic", limit=64)
    assert params < done.size <= 84_000  # everything but the weights: 6 KB


def test_lean_files_hold_nothing_but_the_network(trained: nn.Module, data: Any, tmp_path: Path) -> None:
    graph = onnx.load(export(trained, tmp_path / "m.onnx", data=data, exporter="dynamo").path).graph
    assert not graph.value_info and not any(n.name or n.doc_string or n.metadata_props for n in graph.node)
    assert not any("conv" in t.name or len(t.name) > 2 for t in graph.initializer)
    assert "BatchNormalization" not in {n.op_type for n in graph.node}
    contents = [(t.data_type, tuple(t.dims), t.raw_data) for t in graph.initializer]
    assert len({*contents}) == len(contents)


# -------------------------------------------------------------------------------------------------- models of all kinds


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224", "levit_128s", "ghostnet_100"]
)
def test_timm_families_export_with_open_batch(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kwargs = {"depth": 2} if "vit_tiny" in name else {}
    model = timm.create_model(name, num_classes=7, **kwargs)
    done = export(model, tmp_path / "m.onnx", exporter="classic")
    assert done.dynamic_batch
    size = model.default_cfg["input_size"]
    assert measure_onnx(done.path, what="macs").macs == measure(model, size, what="macs").macs
    x = torch.randn(4, *size)
    with torch.no_grad():
        assert np.allclose(run(done.path, x.numpy()), model.eval()(x).numpy(), atol=1e-4)


def test_attention_and_channels_last_through_torch_export(tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 4, 4)
            self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.layer(x.flatten(2).transpose(1, 2))
            return self.head(y.transpose(1, 2).unflatten(2, x.shape[2:]).mean((2, 3)) + self.pool(x).flatten(1))

    model = Small().half().to(memory_format=torch.channels_last)  # also: precision that the CPU runtime would not like
    done = export(model, tmp_path / "m.onnx", spec=SPEC, opset=18)
    assert done.exporter == "dynamo" and done.dynamic_batch
    assert next(model.parameters()).dtype == torch.float16
    session = ort.InferenceSession(done.path)
    assert session.get_inputs()[0].shape[1:] == [3, 32, 32] and isinstance(session.get_inputs()[0].shape[0], str)
    assert run(done.path, np.zeros((7, 3, 32, 32), np.float32)).shape == (7, 5)
    ops = {n.op_type for n in onnx.load(done.path).graph.node}
    assert "GlobalAveragePool" in ops and "ReduceMean" not in ops
    assert [o.version for o in onnx.load(done.path).opset_import] == [18]


class LooksAtBatch(nn.Module):
    """Reads the batch size into Python: tracing makes a constant of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        n = int(np.asarray(x.shape[0]))  # neither exporter can follow this
        return x.reshape(n, 4) * torch.ones(n, 1)


def test_batch_size_that_no_exporter_leaves_open_is_fixed_with_a_note(tmp_path: Path) -> None:
    done = export(LooksAtBatch(), tmp_path / "m.onnx", spec=SPEC)
    assert not done.dynamic_batch and "fixed at 1" in done.notes[0]
    model = OnnxModel(done.path)
    assert model.batch == 1
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    assert model.logits(images).shape == (3, 4)
    assert np.allclose(model.logits(images)[1:2], model.logits(images[1:2]))


def test_classic_steps_in_where_torch_export_fails(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).mean((2, 3))
            return x if x.abs().sum().item() >= 0 else -x  # depends on data, always the same way

    done = export(Branch(), tmp_path / "m.onnx", spec=SPEC)
    assert done.exporter == "classic" and done.dynamic_batch


@pytest.mark.parametrize("affine", [True, False])
def test_the_classic_exporter_knows_rms_norms(tmp_path: Path, affine: bool) -> None:
    norm = nn.RMSNorm((30, 30), elementwise_affine=affine, eps=0.1 if affine else None)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if affine:
        nn.init.uniform_(norm.weight, 0.5, 2)
    done = export(model, tmp_path / "m.onnx", spec=SPEC, exporter="classic")
    assert done.dynamic_batch and done.max_abs_diff < 1e-5


# ------------------------------------------------------------------------------------------------------------- refusals


class Unfaithful(nn.Module):
    """Computes something else while it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return x + 0.25 if torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting() else x


def test_parity_failure_names_the_difference_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"outputs differ by up to 0\.25 "):
        export(Unfaithful(), tmp_path / "m.onnx", spec=SPEC)
    assert list(tmp_path.iterdir()) == []
    done = export(Unfaithful(), tmp_path / "m.onnx", spec=SPEC, check=False, exporter="classic")
    assert done.max_abs_diff == pytest.approx(0.25, abs=1e-4)


def test_models_that_cannot_be_exported(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, x

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) / 0

    with pytest.raises(ExportError, match="must return one tensor"):
        export(Two(), tmp_path / "m.onnx", spec=SPEC)
    with pytest.raises(ExportError, match="not finite"):
        export(Broken(), tmp_path / "m.onnx", spec=SPEC)
    assert list(tmp_path.iterdir()) == []


def test_arguments_are_checked_at_the_door(data: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    out = tmp_path / "m.onnx"
    with pytest.raises(ValueError, match="to must be 'onnx', got 'tflite'"):
        export(model, out, to="tflite", spec=SPEC)
    with pytest.raises(ValueError, match="exporter must be"):
        export(model, out, spec=SPEC, exporter="fast")
    with pytest.raises(ValueError, match="pass data="):
        export(model, out, spec=SPEC, int8=True)
    with pytest.raises(ValueError, match="does not say what its input is"):
        export(model, out)
    with pytest.raises(ValueError, match="labels must name the 4 outputs of the model, got 2 names"):
        export(model, out, spec=SPEC, labels=["a", "b"], exporter="classic")
    with pytest.raises(ValueError, match="one size"):
        export(model, out, spec=SPEC, data=data)
    assert not out.exists()


def test_the_input_of_a_registry_model_is_known() -> None:
    assert spec_of(timm.create_model("resnet18")) == InputSpec(
        (3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    own = tt.create_model("vit_tiny_patch16_224", depth=1, num_classes=3, in_chans=1, img_size=48)
    assert spec_of(own).size == (1, 48, 48) and len(spec_of(own).mean) == 1
