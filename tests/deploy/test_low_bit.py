"""Low-bit weights in a file: exact when stored packed, near when multiplied in two bits, left alone otherwise."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trimtab.core.onnx_cost import measure_onnx
from trimtab.core.onnx_file import open_session
from trimtab.deploy.low_bit import matmul, store_packed, two_bit_products

RNG = np.random.default_rng(0)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return open_session(model.SerializeToString()).run(None, {"x": x})[0]


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def grid(levels: int, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Weights on a symmetric integer grid, with a scale per channel of `axis`; every channel reaches its largest."""
    top = levels // 2
    codes = np.moveaxis(RNG.integers(-top, top + 1, shape), axis, 0)
    codes[:, *(0 for _ in shape[1:])] = top
    scale = RNG.random(shape[axis]) + 0.1
    return np.moveaxis(codes * scale.reshape(-1, *(1 for _ in shape[1:])), 0, axis).astype(np.float32)


def conv(weight: np.ndarray, quantized: bool = False) -> onnx.ModelProto:
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", c, "h", "w"])
        for n, c in zip("xy", (weight.shape[1], weight.shape[0]))
    ]
    held = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.float32(0.05), "s")]
    held.append(numpy_helper.from_array(np.int8(0), "z"))
    around = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
    ]
    nodes = [*(around if quantized else []), helper.make_node("Conv", ["d" if quantized else "x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], held if quantized else held[:1])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(("levels", "bits"), [(3, 2), (15, 4), (31, 8), (255, 8)])
@pytest.mark.parametrize("kind", ["matmul", "conv"])
def test_stored_packed_it_computes_the_same_from_fewer_bytes(kind, levels, bits):
    shape, axis = ((96, 130), 1) if kind == "matmul" else ((40, 33, 3, 3), 0)
    weight = grid(levels, shape, axis)
    before, after = ((matmul if kind == "matmul" else conv)(weight) for _ in range(2))
    assert store_packed(after) == 1
    x = RNG.standard_normal((5, 96) if kind == "matmul" else (2, 33, 6, 6)).astype(np.float32)
    want = run(before, x)
    assert np.abs(run(after, x) - want).max() < 2e-6 * np.abs(want).max()
    assert after.ByteSize() < weight.size * bits / 8 + 4 * levels + 4 * max(shape) + 1200


def test_parameters_of_packed_weights_are_counted(tmp_path):
    weight = grid(15, (40, 33, 3, 3), 0)
    file = conv(weight)
    store_packed(file)
    (tmp_path / "x.onnx").write_bytes(file.SerializeToString())
    cost = measure_onnx(tmp_path / "x.onnx", what=("params", "macs"), input_size=(33, 6, 6))
    assert cost.params == weight.size and cost.macs == weight.size * 16


def test_with_quantized_activations_codes_decode_to_int8():
    weight = grid(15, (40, 33, 3, 3), 0)
    before, after = conv(weight, quantized=True), conv(weight, quantized=True)
    store_packed(after)
    assert ops(after)[-2:] == ["DequantizeLinear", "Conv"] and ops(after).count("DequantizeLinear") == 2
    x = RNG.standard_normal((2, 33, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(run(after, x), run(before, x), rtol=1e-4, atol=1e-3)


def test_with_quantized_activations_small_weights_are_int8_too():
    """ONNX Runtime would round a float weight there by itself, with one scale for all channels."""
    weight = grid(15, (4, 9, 1, 1), 0)
    before, after = conv(weight, quantized=True), conv(weight, quantized=True)
    assert store_packed(after) == 0
    assert ops(after)[-2:] == ["DequantizeLinear", "Conv"] and ops(after).count("DequantizeLinear") == 2
    x = RNG.standard_normal((2, 9, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(run(after, x), run(before, x), rtol=1e-4, atol=1e-3)


def test_with_few_bits_the_bias_stays_exact():
    """ONNX Runtime would round a bias inside the product to the product of the two scales."""
    weight = grid(15, (8, 33, 3, 3), 0)
    before = conv(weight, quantized=True)
    before.graph.node[-1].input.append("b")
    before.graph.initializer.append(numpy_helper.from_array(RNG.standard_normal(8).astype(np.float32), "b"))
    after = onnx.ModelProto.FromString(before.SerializeToString())
    store_packed(after)
    assert ops(after)[-2:] == ["Conv", "Add"]
    x = RNG.standard_normal((2, 33, 6, 6)).astype(np.float32)
    plain = open_session(before.SerializeToString(), optimize=False).run(None, {"x": x})[0]
    np.testing.assert_allclose(run(after, x), plain, rtol=1e-4, atol=1e-4)


def test_ordinary_weights_and_small_ones_stay():
    for weight in (RNG.standard_normal((64, 64)), grid(3, (8, 8), 1)):
        file = matmul(weight)
        assert store_packed(file) == 0 and ops(file) == ["MatMul"]


@pytest.mark.parametrize("inputs", [32, 64, 100, 257])
def test_two_bit_products_are_near(inputs):
    weight = grid(3, (inputs, 48), 1)
    before, after = matmul(weight), matmul(weight)
    assert two_bit_products(after) == 1 and ops(after) == ["MatMulNBits"]
    x = RNG.standard_normal((7, inputs)).astype(np.float32)
    want = run(before, x)
    assert np.abs(run(after, x) - want).max() < 0.02 * np.abs(want).max()


def test_in_exact_mode_the_packed_codes_are_exact():
    weight = grid(3, (100, 48), 1)
    before, after = matmul(weight), matmul(weight)
    two_bit_products(after)
    next(a for a in after.graph.node[0].attribute if a.name == "accuracy_level").i = 0
    x = RNG.standard_normal((7, 100)).astype(np.float32)
    np.testing.assert_allclose(run(after, x), run(before, x), rtol=1e-4, atol=1e-4)


def test_a_gemm_keeps_its_bias():
    weight, bias = grid(3, (48, 64), 0), RNG.standard_normal(48).astype(np.float32)
    file = matmul(weight.T)
    file.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    file.graph.initializer.append(numpy_helper.from_array(bias, "b"))
    file.graph.node[0].CopyFrom(helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1))
    x = RNG.standard_normal((3, 64)).astype(np.float32)
    want = run(file, x)
    assert two_bit_products(file) == 1 and ops(file) == ["MatMulNBits", "Add"]
    assert np.abs(run(file, x) - want).max() < 0.02 * np.abs(want).max()


def test_four_bits_are_no_two_bit_product():
    file = matmul(grid(15, (64, 48), 1))
    assert two_bit_products(file) == 0 and ops(file) == ["MatMul"]
