"""int8 for ONNX Runtime: static, 8-bit activations without sign, 8-bit weights with sign and a scale per channel.

The arithmetic is ONNX Runtime's own (`onnxruntime.quantization`, QDQ form), run after its pre-process step, without
which nothing is gained. What is ours is what it leaves on the table for small models:

- batch norms that no convolution precedes (DenseNet, pre-activation) become depthwise 1x1 convolutions, and the hard
  sigmoid of MobileNetV3 becomes a change of scale: both would drag every feature map through float;
- the last product hands out float logits, instead of 256 levels of them (no ties between classes, two nodes less);
- zero points of symmetric weights are left out where ONNX Runtime fuses without them;
- biases of convolutions stay float32 in the file. ONNX Runtime turns them into the same int32 when it loads the file,
  so that a bias costs 4 bytes and not 12 (value, scale, zero point).
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from trimtab.deploy.graph import attribute, drop_unused, ranks, tensors

# Whole-graph quantization suits convolutional nets; in a transformer softmax, norms and residuals lose too much.
PRODUCTS = ("Conv", "Gemm", "MatMul")
_TRANSFORMER = {"Softmax", "LayerNormalization", "Attention"}


def is_transformer(model: ModelProto) -> bool:
    """Whether the graph has the operators that int8 activations hurt."""
    return any(n.op_type in _TRANSFORMER for n in model.graph.node)


@contextmanager
def _hushed() -> Iterator[None]:
    """Silence what onnxruntime.quantization has to say: advice and tracebacks to the log, progress to stdout."""
    import onnxruntime as ort

    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.CRITICAL)
    ort.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(before)
        ort.set_default_logger_severity(2)


def preprocess(model: ModelProto) -> ModelProto:
    """ONNX Runtime's quantization pre-process: symbolic shapes, fusions, shapes again."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, _hushed():
        out, file = Path(folder) / "pre.onnx", Path(folder) / "model.onnx"
        onnx.save(model, file)  # given a graph in memory, it may take the weights out of it and not find them again
        try:
            quant_pre_process(file, out)
        except Exception:  # symbolic shape inference gives up on some graphs; the rest of the step is what matters
            quant_pre_process(file, out, skip_symbolic_shape=True)
        ready = onnx.load(out)
    _norms_to_convs(ready)
    drop_unused(ready)
    return ready


def _norms_to_convs(model: ModelProto) -> None:
    """BatchNormalization over (B, C, H, W) as a convolution with one weight per channel, which int8 holds exactly."""
    held, have = tensors(model), ranks(model)
    for i, node in enumerate(list(model.graph.node)):
        if node.op_type != "BatchNormalization" or have.get(node.input[0]) != 4 or len(node.output) > 1:
            continue
        if attribute(node, "training_mode", 0) or any(n not in held for n in node.input[1:5]):
            continue
        gamma, beta, mean, var = (held[n].astype(np.float64) for n in node.input[1:5])
        weight = gamma / np.sqrt(var + attribute(node, "epsilon", 1e-5))
        name = node.output[0]
        for suffix, value in ((".w", weight.reshape(-1, 1, 1, 1)), (".b", beta - mean * weight)):
            model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name + suffix))
        inputs = [node.input[0], name + ".w", name + ".b"]
        conv = onnx.helper.make_node("Conv", inputs, [name], name=node.name or f"{name}.norm", group=len(weight))
        model.graph.node.remove(node)
        model.graph.node.insert(i, conv)


def quantize(model: ModelProto, batches: Iterable[np.ndarray], *, ops: Sequence[str] | None = None) -> ModelProto:
    """The int8 form of a float32 graph with one image input.

    Args:
        model: the float graph, already pre-processed.
        batches: float32 (B, C, H, W) as the model is fed; what they span becomes the range of the activations.
        ops: operator types to quantize; None = everything ONNX Runtime can.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    name = model.graph.input[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {name: batch}

    copy = ModelProto()
    copy.CopyFrom(model)
    with tempfile.TemporaryDirectory() as folder, _hushed():
        out = Path(folder) / "int8.onnx"
        quantize_static(
            copy,
            out,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(ops) if ops else None,
            nodes_to_exclude=_attention(copy) if ops else None,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"QuantizeBias": False},
        )
        result = onnx.load(out)
    _hard_sigmoids(result)
    _float_logits(result)
    _drop_zero_points(result)
    return result


def _attention(model: ModelProto) -> list[str]:
    """Products of two activations: one 200th, a common probability, is one level of 255. Each node gets a name."""
    held = {t.name for t in model.graph.initializer}
    found = []
    for i, node in enumerate(model.graph.node):
        if node.op_type == "MatMul" and held.isdisjoint(node.input):
            node.name = node.name or f"attention{i}"
            found.append(node.name)
    return found


def _hard_sigmoids(model: ModelProto) -> None:
    """HardSigmoid without arithmetic: clip(x, -3, 3) / 6 + 1/2 are the codes of x with range -3..3, read as 0..1.

    ONNX Runtime has no integer HardSigmoid, but it has an integer LeakyRelu (a table of 256 bytes); with slope 1 that
    is the change of scale. The middle of the codes is 128 instead of 127.5, an error of 0.002.
    """
    makers = {o: n for n in model.graph.node for o in n.output}
    users: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for i in node.input:
            users.setdefault(i, []).append(node)
    constants = {
        "hs_in": np.float32(6 / 255), "hs_mid": np.uint8(128), "hs_out": np.float32(1 / 255), "hs_zero": np.uint8(0),
    }  # fmt: skip
    done = False
    for node in model.graph.node:
        if node.op_type != "HardSigmoid" or makers.get(node.input[0], node).op_type != "DequantizeLinear":
            continue
        if abs(attribute(node, "alpha", 0.2) - 1 / 6) > 1e-4 or abs(attribute(node, "beta", 0.5) - 0.5) > 1e-6:
            continue
        after = users.get(node.output[0], [])
        reads = users.get(after[0].output[0], []) if len(after) == 1 else []
        if (
            len(after) != 1
            or after[0].op_type != "QuantizeLinear"
            or {n.op_type for n in reads} != {"DequantizeLinear"}
        ):
            continue
        node.op_type = "LeakyRelu"
        del node.attribute[:]
        node.attribute.append(onnx.helper.make_attribute("alpha", 1.0))
        after[0].input[1:] = ["hs_in", "hs_mid"]
        for dq in reads:
            dq.input[1:] = ["hs_out", "hs_zero"]
        done = True
    if done:
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())


def _float_logits(model: ModelProto) -> None:
    """Gemm/MatMul -> Quantize -> Dequantize -> output becomes Gemm/MatMul -> output."""
    makers = {o: n for n in model.graph.node for o in n.output}
    uses: dict[str, int] = {}
    for node in model.graph.node:
        for i in node.input:
            uses[i] = uses.get(i, 0) + 1
    for value in model.graph.output:
        dq = makers.get(value.name)
        q = makers.get(dq.input[0]) if dq is not None and dq.op_type == "DequantizeLinear" else None
        if dq is None or q is None or q.op_type != "QuantizeLinear":
            continue
        source = makers.get(q.input[0])
        if source is None or source.op_type not in ("Gemm", "MatMul", "Add") or uses.get(q.input[0]) != 1:
            continue
        if uses.get(value.name) or uses.get(dq.input[0]) != 1:
            continue
        source.output[0] = value.name
        model.graph.node.remove(dq)
        model.graph.node.remove(q)
        if source.op_type == "Gemm" and len(source.input) == 3:
            _int32_bias(model, source, makers)


def _int32_bias(model: ModelProto, gemm: NodeProto, makers: dict[str, NodeProto]) -> None:
    """The one bias that must be int32 in the file: ONNX Runtime does not convert it for a Gemm with float output."""
    x, w = makers.get(gemm.input[0]), makers.get(gemm.input[1])
    held = tensors(model)
    bias = held.get(gemm.input[2])
    if bias is None or bias.dtype != np.float32 or any(n is None or n.op_type != "DequantizeLinear" for n in (x, w)):
        return
    assert x is not None and w is not None
    scale = np.asarray(held[x.input[1]] * held[w.input[1]], np.float32).reshape(-1)
    codes = np.rint(bias.reshape(-1) / scale)
    if scale.size not in (1, bias.size) or np.abs(codes).max(initial=0) >= 2**31:
        return
    name = gemm.input[2]
    scales = scale if scale.size > 1 else scale.reshape(())
    model.graph.initializer.append(numpy_helper.from_array(codes.astype(np.int32), name + "_q"))
    model.graph.initializer.append(numpy_helper.from_array(scales, name + "_s"))
    axis: dict[str, Any] = {"axis": 0} if scales.ndim else {}
    node = onnx.helper.make_node("DequantizeLinear", [name + "_q", name + "_s"], [name + "_d"], **axis)
    model.graph.node.insert(list(model.graph.node).index(gemm), node)
    gemm.input[2] = name + "_d"


def _drop_zero_points(model: ModelProto) -> None:
    """Weights of convolutions need none: they are zero, which is the default. QGemm does want to see its own."""
    held = {t.name: t for t in model.graph.initializer}
    values = tensors(model)
    users: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for i in node.input:
            users.setdefault(i, []).append(node)
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3 or node.input[0] not in held:
            continue
        if held[node.input[0]].data_type != TensorProto.INT8 or values[node.input[2]].any():
            continue
        if all(u.op_type == "Conv" for u in users.get(node.output[0], [])):
            del node.input[2]
