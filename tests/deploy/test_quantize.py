"""int8 beyond what ONNX Runtime does by itself: what stays in integers, and that it is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from trimtab.core.artifact import InputSpec
from trimtab.deploy import OnnxModel, export

SPEC = InputSpec((3, 16, 16), (0.5,) * 3, (0.5,) * 3)


class Blobs:
    """Smooth random images in the shape of `Data`."""

    spec, class_names, splits = SPEC, ["a", "b", "c", "d"], {"train": 0, "val": 0}

    def __init__(self) -> None:
        noise = torch.randn(128, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        self.images = nn.functional.interpolate(noise, size=(16, 16), mode="bilinear")

    def loader(self, split: str, *, batch_size: int, **_: Any) -> Any:
        for x in self.images.split(batch_size):
            yield {"image": x, "label": torch.zeros(len(x), dtype=torch.long)}


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Random weights and norm statistics, so that no scale is 1 and no shift is 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1, 0.3)
                nn.init.normal_(m.bias, 0, 0.3)
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 2)
    return model.eval()


def kernels(path: Path, folder: Path) -> Counter[str]:
    """What ONNX Runtime makes of a file."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "run.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(folder / "run.onnx").graph.node)


def relative_error(model: nn.Module, path: Path) -> float:
    images = Blobs().images
    with torch.no_grad():
        want = model(images).numpy()
    return float(np.abs(OnnxModel(path).logits(images.numpy()) - want).max() / np.ptp(want))


class PreActivation(nn.Module):
    """Norm before convolution, and a concatenation: the block of DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2, self.head = nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(self.norm1(x).relu())], 1)
        return self.head(self.norm2(x).relu().mean((2, 3)))


class HardSwish(nn.Module):
    """The activation and the squeeze-and-excitation gate of MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16)
        self.gate, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.norm(self.stem(x)))
        x = x * nn.functional.hardsigmoid(self.gate(nn.functional.adaptive_avg_pool2d(x, 1)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("block", [PreActivation, HardSwish])
def test_whole_blocks_stay_in_integers_and_are_right(block: type[nn.Module], tmp_path: Path) -> None:
    model = seeded(block)
    done = export(model, tmp_path / "q.onnx", data=Blobs(), int8=True, exporter="classic")
    onnx.checker.check_model(onnx.load(done.path), full_check=True)
    ops = kernels(done.path, tmp_path)
    floats = {"Conv", "BatchNormalization", "HardSigmoid", "HardSwish", "Mul", "Concat", "DequantizeLinear", "Gemm"}
    assert floats.isdisjoint(ops), ops
    assert ops["QuantizeLinear"] == 1
    assert relative_error(model, done.path) < 0.06 and done.agreement > 0.93


def test_transformers_keep_norms_and_residuals_in_float(tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 4, 4)
            self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
            self.head = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.stem(x).flatten(2).transpose(1, 2)).mean(1))

    model = seeded(Small)
    done = export(model, tmp_path / "q.onnx", data=Blobs(), int8=True, exporter="classic")
    graph = onnx.load(done.path).graph
    makers = {o: n.op_type for n in graph.node for o in n.output}
    readers = {i: n.op_type for n in graph.node for i in n.input}
    for node in graph.node:
        if node.op_type == "Softmax":
            assert readers[node.output[0]] != "QuantizeLinear"
        if node.op_type == "LayerNormalization":
            assert makers.get(node.input[0]) != "DequantizeLinear"
    weights = [t for t in graph.initializer if len(t.dims) >= 2]
    assert weights and all(t.data_type == onnx.TensorProto.INT8 for t in weights)
    assert relative_error(model, done.path) < 0.06


def test_weights_have_a_scale_per_channel_and_no_spare_bytes(tmp_path: Path) -> None:
    done = export(seeded(PreActivation), tmp_path / "q.onnx", data=Blobs(), int8=True, exporter="classic")
    graph = onnx.load(done.path).graph
    held = {t.name: t for t in graph.initializer}
    checked = 0
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in held and len(held[node.input[0]].dims) == 4:
            weight, scale = held[node.input[0]], held[node.input[1]]
            assert weight.data_type == onnx.TensorProto.INT8 and list(scale.dims) == [weight.dims[0]]
            assert len(node.input) == 2  # the zero point of a symmetric weight is the default
            checked += 1
    assert checked == 4  # stem, norm1, conv1, norm2
    points = [t for t in graph.initializer if t.data_type == onnx.TensorProto.UINT8]
    assert len({t.raw_data for t in points}) == len(points)


def test_quantizing_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export(seeded(PreActivation), tmp_path / "q.onnx", data=Blobs(), int8=True, exporter="classic")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
