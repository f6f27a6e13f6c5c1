"""Costs of a delivered file, on graphs small enough to count by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trimtab.core.cost import Cost, measure_onnx
from trimtab.core.errors import ArtifactError

COUNTS = ("params", "macs", "activations", "size")


def write(
    path: Path, nodes: list[Any], held: dict[str, np.ndarray], size: tuple[Any, ...] = ("batch", 3, 8, 8)
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in held.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def f32(*shape: int) -> np.ndarray:
    return np.full(shape, 0.5, np.float32)


def test_conv_and_gemm(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "v", "c"], ["y"], transB=1),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"w": f32(8, 3, 3, 3), "b": f32(8), "v": f32(5, 8), "c": f32(5) + 1})
    cost = measure_onnx(path, per_layer=True)
    assert cost.params == 8 * 27 + 8 + 5 * 8 + 5
    assert cost.macs == 64 * 8 * 27 + 40
    assert cost.activations == 64 * 8 + 5
    assert cost.size == path.stat().st_size
    assert cost.memory == 4 * 64 * (3 + 8)  # the relu is free
    assert cost.latency > 0 and cost.runtime.startswith("ONNX Runtime")
    assert [r.kind for r in cost.layers] == ["Conv", "Gemm"]
    for column in ("params", "macs", "activations"):
        assert sum(getattr(r, column) for r in cost.layers) == getattr(cost, column)
    assert measure_onnx(path, what="macs", batch_size=3) == Cost(macs=3 * cost.macs)


def test_products_of_every_kind(tmp_path: Path) -> None:
    i8 = np.ones((6, 7), np.int8)
    cases: dict[str, tuple[list[Any], dict[str, np.ndarray], int, int]] = {
        # name: nodes, tensors, MACs, parameters; x is (5, 6)
        "MatMul": ([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": f32(6, 7)}, 210, 42),
        "Gemm transposed": (
            [helper.make_node("Gemm", ["w", "x"], ["y"], transA=1, transB=1)],
            {"w": f32(6, 7)},
            210,
            42,
        ),
        "Einsum": ([helper.make_node("Einsum", ["x", "w"], ["y"], equation="ij,jk->ik")], {"w": f32(6, 7)}, 210, 42),
        "MatMulInteger": (
            [
                helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
                helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
                helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["f", "s"], ["y"]),
            ],
            {"w": i8},
            210,
            42,
        ),
        "QDQ": (
            [
                helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
                helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
                helper.make_node("DequantizeLinear", ["w", "t"], ["v"], axis=1),
                helper.make_node("MatMul", ["d", "v"], ["y"]),
            ],
            {"w": i8, "t": f32(7), "s": np.array(0.1, np.float32), "z": np.array(0, np.uint8)},
            210,
            42,
        ),
        "MatMulNBits": (
            [
                helper.make_node(
                    "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=6, N=7, bits=4, block_size=16
                )
            ],
            {"w": np.zeros((7, 1, 8), np.uint8), "s": f32(7)},
            210,
            42,
        ),
        "ConvTranspose": (
            [
                helper.make_node("Reshape", ["x", "to"], ["r"]),
                helper.make_node("ConvTranspose", ["r", "w"], ["y"]),
            ],
            {"w": f32(6, 7, 1), "to": np.array([1, 6, 5], np.int64)},
            210,
            42,
        ),
    }
    for name, (nodes, held, macs, params) in cases.items():
        cost = measure_onnx(write(tmp_path / "m.onnx", nodes, held, (5, 6)), what=("params", "macs"))
        assert (cost.macs, cost.params) == (macs, params), name


def test_shapes_and_scalars_are_no_parameters(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "half"], ["m"]),
        helper.make_node("Reshape", ["m", "to"], ["y"]),
    ]
    held = {"half": np.array(0.5, np.float32), "to": np.array([0, -1], np.int64)}
    assert measure_onnx(write(tmp_path / "m.onnx", nodes, held), what=("params", "macs")) == Cost(params=0, macs=0)


def test_int8_file_needs_a_quarter_of_the_memory(tmp_path: Path) -> None:
    scale = {"s": np.array(0.1, np.float32), "z": np.array(0, np.uint8), "t": f32(16), "u": f32(16) + 1}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "t"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["h"]),
        helper.make_node("QuantizeLinear", ["h", "s", "z"], ["hq"]),
        helper.make_node("DequantizeLinear", ["hq", "s", "z"], ["hd"]),
        helper.make_node("DequantizeLinear", ["v", "u"], ["vd"], axis=0),
        helper.make_node("Conv", ["hd", "vd"], ["k"]),
        helper.make_node("QuantizeLinear", ["k", "s", "z"], ["kq"]),
        helper.make_node("DequantizeLinear", ["kq", "s", "z"], ["kd"]),
        helper.make_node("GlobalAveragePool", ["kd"], ["p"]),
        helper.make_node("QuantizeLinear", ["p", "s", "z"], ["pq"]),
        helper.make_node("DequantizeLinear", ["pq", "s", "z"], ["y"]),
    ]
    weights = {"w": np.ones((16, 3, 1, 1), np.int8), "v": np.ones((16, 16, 1, 1), np.int8)}
    int8 = measure_onnx(write(tmp_path / "q.onnx", nodes, scale | weights), what=("memory", "macs", "bops", "energy"))
    plain = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("Conv", ["h", "v"], ["k"]),
        helper.make_node("GlobalAveragePool", ["k"], ["y"]),
    ]
    held = {k: v.astype(np.float32) for k, v in weights.items()}
    full = measure_onnx(write(tmp_path / "f.onnx", plain, held), what=("memory", "macs", "bops", "energy"))
    assert full.memory == 4 * 64 * 32
    assert int8.memory == full.memory // 4
    assert int8.macs == full.macs == 64 * (48 + 256)
    assert full.bops == full.macs * 1024 and int8.bops == int8.macs * 64
    assert int8.energy < full.energy / 3


def test_open_image_size_must_be_given(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, {"w": f32(4, 3, 1, 1)}, ("n", 3, "h", "w_"))
    with pytest.raises(ValueError, match="open dimensions"):
        measure_onnx(path, what="macs")
    assert measure_onnx(path, what="macs", input_size=(3, 10, 10)).macs == 100 * 12


@pytest.mark.parametrize("content", [b"", b"hello world, this is no model", bytes(range(256)) * 4, b"\x08\x09"])
def test_files_that_are_no_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="no ONNX file"):
        measure_onnx(path, what=COUNTS)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    whole = write(tmp_path / "m.onnx", nodes, {"w": f32(4, 3, 1, 1)}).read_bytes()
    cut = tmp_path / "cut.onnx"
    for n in range(0, len(whole) - 8, 7):
        cut.write_bytes(whole[:n])
        with pytest.raises(ArtifactError):
            measure_onnx(cut)


def test_missing_file_and_weights_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a file"):
        measure_onnx(tmp_path / "none.onnx")
    model = onnx.load(write(tmp_path / "m.onnx", [helper.make_node("Conv", ["x", "w"], ["y"])], {"w": f32(4, 3, 1, 1)}))
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    tensor.ClearField("raw_data")
    (tmp_path / "e.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="weights in other files"):
        measure_onnx(tmp_path / "e.onnx", what=COUNTS)


def test_wrong_arguments(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [helper.make_node("Conv", ["x", "w"], ["y"])], {"w": f32(4, 3, 1, 1)})
    with pytest.raises(ValueError, match="what must be some of"):
        measure_onnx(path, what=("speed",))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        measure_onnx(path, batch_size=0)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        measure_onnx(path, what="latency", threads=0)
