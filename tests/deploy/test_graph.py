"""Passes over the graph: smaller, and the same function."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from trimtab.deploy import graph as passes


def build(nodes: list[Any], held: dict[str, np.ndarray], size: tuple[Any, ...] = ("batch", 3, 6, 6)) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "a graph with a long name",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in held.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    model.graph.output[0].CopyFrom(onnx.shape_inference.infer_shapes(model).graph.output[0])
    return model


def outputs(model: onnx.ModelProto) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)})[0]


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def test_batch_norm_and_late_bias_go_into_the_convolution() -> None:
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"]),
        helper.make_node("BatchNormalization", ["a", "g", "b", "m", "v"], ["n"]),
        helper.make_node("Conv", ["n", "u"], ["c"]),
        helper.make_node("Add", ["bias", "c"], ["logits"]),
    ]
    held = {"w": random(4, 3, 3, 3), "g": random(4), "b": random(4), "m": random(4), "v": random(4) ** 2}
    held |= {"u": random(5, 4, 1, 1), "bias": random(1, 5, 1, 1)}
    before = build(nodes, held)
    after = passes.simplify(build(nodes, held))
    assert ops(after) == ["Conv", "Conv"] and all(len(n.input) == 3 for n in after.graph.node)
    assert np.allclose(outputs(before), outputs(after), atol=1e-4)


def test_weights_between_quantized_activations_are_not_rounded() -> None:
    scale = {"s": np.float32(0.05), "z": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["e"]),
        helper.make_node("DequantizeLinear", ["e", "s", "z"], ["logits"]),
    ]
    weight = random(4, 3, 3, 3)
    after = passes.simplify(build(nodes, {"w": weight, **scale}))
    held = [numpy_helper.to_array(t) for t in after.graph.initializer]
    assert any(h.shape == weight.shape and np.array_equal(h, weight) for h in held)


@pytest.mark.parametrize("keepdims", [0, 1])
def test_mean_over_the_image_is_a_pool(keepdims: int) -> None:
    tail = [helper.make_node("Reshape", ["m", "to"], ["logits"])] if keepdims else []
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["m" if keepdims else "logits"], keepdims=keepdims),
        *tail,
    ]
    held = {"axes": np.array([-1, 2], np.int64)} | ({"to": np.array([-1, 3], np.int64)} if keepdims else {})
    after = passes.simplify(build(nodes, held))
    assert ops(after) == ["GlobalAveragePool", "Flatten"] and not after.graph.initializer
    assert np.allclose(outputs(build(nodes, held)), outputs(after), atol=1e-6)


def test_means_over_other_axes_stay() -> None:
    nodes = [helper.make_node("ReduceMean", ["image", "axes"], ["logits"], keepdims=0)]
    assert ops(passes.simplify(build(nodes, {"axes": np.array([1, 2], np.int64)}))) == ["ReduceMean"]


def test_lean_keeps_the_function_and_drops_the_rest() -> None:
    nodes = [
        helper.make_node(
            "Conv",
            ["image", "a.long.name.weight"],
            ["hidden/state"],
            name="/conv",
            doc_string="stack trace " * 50,
            dilations=[1, 1],
            strides=[2, 2],
            pads=[0, 0, 0, 0],
            group=1,
        ),
        helper.make_node("Add", ["hidden/state", "first.copy"], ["x1"]),
        helper.make_node("Mul", ["x1", "second.copy"], ["logits"]),
        helper.make_node("Relu", ["x1"], ["nobody reads this"]),
    ]
    held = {"a.long.name.weight": random(4, 3, 3, 3), "first.copy": random(4, 1, 1), "second.copy": random(4, 1, 1)}
    held |= {"unused": random(100)}
    model = build(nodes, held)
    model.graph.value_info.append(helper.make_tensor_value_info("x1", TensorProto.FLOAT, ["batch", 4, 2, 2]))
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value="x" * 500)
    model.metadata_props.add(key="k", value="v")
    want, size = outputs(model), model.ByteSize()
    passes.lean(model)
    onnx.checker.check_model(model, full_check=True)
    assert np.allclose(outputs(model), want, atol=1e-5)
    assert ops(model) == ["Conv", "Add", "Mul"]
    assert len(model.graph.initializer) == 2 and model.ByteSize() < size / 3
    assert [a.name for a in model.graph.node[0].attribute] == ["strides"]
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["image", "logits"]


def test_names_inside_branches_still_resolve() -> None:
    def branch(value: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"out_{value}", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node("Mul", ["image", value], [f"out_{value}"])], "branch", [], [out])

    nodes = [
        helper.make_node("ReduceSum", ["image"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["is_positive"]),
        helper.make_node("If", ["is_positive"], ["logits"], then_branch=branch("big"), else_branch=branch("small")),
    ]
    held = {"zero": np.array(0, np.float32), "big": random(1) + 3, "small": random(1)}
    model = build(nodes, held)
    want = outputs(model)
    passes.lean(model)
    assert np.array_equal(outputs(model), want)


def test_short_names_never_repeat() -> None:
    names = [passes._letters(i) for i in range(60 * 52)]
    assert len({*names}) == len(names) and names[:3] == ["a", "b", "c"] and len(names[52]) == 2
