"""Low-bit weights in an ONNX file: small as stored, and, where asked for, as they are multiplied.

Exporters write a packed layer out as the float32 tensor that its codes decode to. `store_packed` finds such tensors by
their values (few distinct ones per channel, in units of the channel's largest) and stores codes again, followed by
the nodes that decode them. They depend on constants only, so a runtime folds them when it loads the file: small on
disk, float32 in memory, and every operator is standard. Where the activations are quantized too (QDQ), codes decode to
int8 and ONNX Runtime multiplies in int8.

`two_bit_products` goes further: ternary products become ONNX Runtime's own 2-bit operator, `MatMulNBits`, which reads a
sixteenth of the bytes. It rounds activations to 8 bits in blocks of 32 (about 0.5 % of the output; its exact mode is
many times slower than float32, so it is not offered), wins where memory is the limit, and loses elsewhere: see
`benchmarks/ternary_matmul.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from trimtab.deploy.graph import attribute, drop_unused, tensors

BLOCK = 32  # inputs that share a scale in MatMulNBits
SAME = 1e-5  # relative: values this near are one level; those of any format of 8 bits or less are further apart
INT8_STEPS = 127
INT8_ACCUMULATION = 4  # accuracy_level of MatMulNBits


def store_packed(model: ModelProto) -> int:
    """Store weights that lie on a grid of at most 256 values as packed codes. Returns how many weights it was.

    >>> weight = np.where(np.arange(4096).reshape(64, 64) % 3, 0.5, -0.5).astype(np.float32)
    >>> file = matmul(weight)
    >>> before = file.ByteSize()
    >>> store_packed(file), before // file.ByteSize()
    (1, 13)
    """
    held, makers = tensors(model), {o: n for n in model.graph.node for o in n.output}
    done = 0
    for node in list(model.graph.node):
        weight = held.get(node.input[1]) if node.op_type in ("Conv", "Gemm", "MatMul") else None
        if weight is None or weight.dtype != np.float32 or weight.ndim < 2:
            continue
        axis = _out_axis(node, weight)
        levels, codes, scale = _grid(weight, axis)
        bits = next((b for b in (1, 2, 4, 8) if len(levels) <= 2**b), None)
        if bits is None:
            continue
        source = makers.get(node.input[0])
        n = _steps(levels)
        steps = levels * n
        integer = source is not None and source.op_type == "DequantizeLinear" and _whole(steps)
        if codes.size * bits // 8 + 4 * levels.size + 4 * scale.size + 256 <= 0.9 * weight.nbytes:
            _decode(model, node, codes, bits, levels, scale, axis, steps if integer else None)
            done += 1
        elif integer:
            _dequantize(model, node, np.rint(steps).astype(np.int8)[codes], scale / n, axis)
        if integer and n < INT8_STEPS:
            _late_bias(model, node, held, weight.ndim)
    drop_unused(model)
    return done


def two_bit_products(model: ModelProto) -> int:
    """Turn every product with a ternary matrix into `MatMulNBits` with 2 bits. Returns how many it was.

    >>> file = matmul(np.where(np.arange(4096).reshape(64, 64) % 3, 0.5, -0.5).astype(np.float32))
    >>> two_bit_products(file), file.graph.node[0].op_type
    (1, 'MatMulNBits')
    """
    held = tensors(model)
    done = 0
    for node in list(model.graph.node):
        weight = held.get(node.input[1]) if node.op_type in ("Gemm", "MatMul") else None
        if weight is None or weight.dtype != np.float32 or weight.ndim != 2:
            continue
        plain = attribute(node, "alpha", 1.0) == 1 and attribute(node, "beta", 1.0) == 1
        axis = _out_axis(node, weight)
        levels, codes, scale = _grid(weight, axis)
        if attribute(node, "transA", 0) or not plain or not _ternary(levels):
            continue
        signs = np.rint(levels[codes]).astype(np.int64)
        _multiply(model, node, signs if axis == 0 else signs.T, scale.reshape(-1))
        done += 1
    if done and not any(o.domain == "com.microsoft" for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    drop_unused(model)
    return done


def matmul(weight: np.ndarray) -> ModelProto:
    """A file that multiplies (B, K) with `weight` (K, N): for benchmarks and examples."""
    value = numpy_helper.from_array(np.ascontiguousarray(weight, np.float32), "w")
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", size])
        for n, size in zip(("x", "y"), weight.shape, strict=True)
    ]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [value])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


# --------------------------------------------------------------------------------------------------------------- pieces


def _out_axis(node: NodeProto, weight: np.ndarray) -> int:
    """Along which dimension of its weight the outputs of a product lie."""
    if node.op_type == "Conv" or attribute(node, "transB", 0):
        return 0
    return weight.ndim - 1


def _grid(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(levels in [-1, 1] ascending, code of every weight, scale per channel): weight = levels[codes] x scale."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.abs(weight).max(axis=others, keepdims=True)
    scale[scale == 0] = 1
    values = weight / scale
    distinct = np.unique(values)
    new = np.abs(np.diff(distinct)) > SAME * np.maximum(np.abs(distinct[1:]), np.abs(distinct[:-1]))
    group = np.concatenate([[0], np.cumsum(new)])
    levels = np.array([distinct[group == g].mean() for g in range(group[-1] + 1)]) if group[-1] < 256 else distinct
    levels = levels.astype(np.float32)
    codes = group[np.searchsorted(distinct, values)] if group[-1] < 256 else np.zeros(weight.shape, np.int64)
    return levels, codes.reshape(weight.shape), scale.astype(np.float32)


def _ternary(levels: np.ndarray) -> bool:
    return len(levels) <= 3 and bool(np.all(np.abs(levels - np.rint(levels)) < SAME))


def _steps(levels: np.ndarray) -> float:
    """How many steps of the integer grid the largest level is, if the levels are one: 1, 7, 127, ..."""
    return next((float(n) for n in (1, *(2**b - 1 for b in range(2, 8))) if _whole(levels * n)), float(INT8_STEPS))


def _whole(values: np.ndarray) -> bool:
    return bool(np.all(np.abs(values - np.rint(values)) < 1e-3))


def _decode(
    model: ModelProto,
    node: NodeProto,
    codes: np.ndarray,
    bits: int,
    levels: np.ndarray,
    scale: np.ndarray,
    axis: int,
    steps: np.ndarray | None,
) -> None:
    """bytes -> shift, mask -> levels by code -> shape -> x scale; `steps`: the levels as int8, decoded in QDQ form."""
    each, base = 8 // bits, f"{node.output[0]}.w"
    flat = np.pad(codes.reshape(-1), (0, -codes.size % each)).reshape(-1, each)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed = (flat << shifts).sum(1, keepdims=True).astype(np.uint8)
    table, factor = levels, scale
    if steps is not None:
        n = _steps(levels)
        table, factor = np.rint(steps).astype(np.int8), (scale / n).reshape(-1)
    constants = {
        "packed": packed, "shifts": shifts, "base": np.array(2**bits % 256 or 255, np.uint8), "levels": table,
        "flat": np.array([-1], np.int64), "count": np.array([codes.size], np.int64), "zero": np.array([0], np.int64),
        "shape": np.array(codes.shape, np.int64), "scale": factor.astype(np.float32),
    }  # fmt: skip
    for key, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(value, f"{base}.{key}"))
    nodes: list[NodeProto] = []

    def then(op: str, *inputs: str, **attributes: Any) -> str:
        out = f"{base}.{len(nodes)}"
        nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def held(key: str) -> str:
        return f"{base}.{key}"

    now = held("packed")
    if bits < 8:
        now = then("BitShift", now, held("shifts"), direction="RIGHT")
        now = then("Mod", now, held("base"))
    now = then("Cast", now, to=TensorProto.INT32)
    now = then("Gather", held("levels"), now)
    if codes.size % each:
        now = then("Slice", then("Reshape", now, held("flat")), held("zero"), held("count"))
    now = then("Reshape", now, held("shape"))
    if steps is None:
        now = then("Mul", now, held("scale"))
    else:
        now = then("DequantizeLinear", now, held("scale"), axis=axis)
    node.input[1] = now
    at = list(model.graph.node).index(node)
    for i, new in enumerate(nodes):
        model.graph.node.insert(at + i, new)


def _dequantize(model: ModelProto, node: NodeProto, codes: np.ndarray, scale: np.ndarray, axis: int) -> None:
    """The weight as plain int8: a float one between quantized activations would be rounded when the file is loaded."""
    base = f"{node.output[0]}.w"
    for key, value in (("codes", codes), ("scale", scale.reshape(-1).astype(np.float32))):
        model.graph.initializer.append(numpy_helper.from_array(value, f"{base}.{key}"))
    node.input[1] = f"{base}.0"
    decode = helper.make_node("DequantizeLinear", [f"{base}.codes", f"{base}.scale"], [node.input[1]], axis=axis)
    model.graph.node.insert(list(model.graph.node).index(node), decode)


def _late_bias(model: ModelProto, node: NodeProto, held: dict[str, np.ndarray], ndim: int) -> None:
    """The bias as a sum after the product, where ONNX Runtime leaves it in float32.

    Inside the product it is rounded, when the file is loaded, to multiples of the scale of the input times that of the
    weight: fine steps with 8 bits, coarse ones with fewer.
    """
    bias = held.get(node.input[2]) if len(node.input) > 2 else None
    if bias is None or (node.op_type == "Gemm" and attribute(node, "beta", 1.0) != 1):
        return
    out, base = node.output[0], f"{node.output[0]}.b"
    wide = bias.reshape(-1, *(1 for _ in range(ndim - 2))) if node.op_type == "Conv" else bias
    model.graph.initializer.append(numpy_helper.from_array(wide, base))
    del node.input[2]
    node.output[0] = f"{base}.0"
    model.graph.node.insert(
        list(model.graph.node).index(node) + 1, helper.make_node("Add", [node.output[0], base], [out])
    )


def _multiply(model: ModelProto, node: NodeProto, signs: np.ndarray, scale: np.ndarray) -> None:
    """MatMulNBits in the place of a product; `signs` (N, K) are -1, 0, 1, stored as 0, 1, 2 with zero point 1."""
    n, k = signs.shape
    blocks = math.ceil(k / BLOCK)
    codes = np.ones((n, blocks * BLOCK), np.uint8)
    codes[:, :k] = signs + 1
    shifts = np.arange(0, 8, 2, dtype=np.uint8)
    base = f"{node.output[0]}.n"
    inputs = {
        "b": (codes.reshape(n, blocks, BLOCK // 4, 4) << shifts).sum(-1).astype(np.uint8),
        "s": np.repeat(scale.astype(np.float32)[:, None], blocks, 1),
        "z": np.full((n, math.ceil(blocks / 4)), 0b01010101, np.uint8),
    }
    for key, value in inputs.items():
        model.graph.initializer.append(numpy_helper.from_array(value, f"{base}.{key}"))
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    out = f"{base}.y" if bias else node.output[0]
    new = [
        helper.make_node(
            "MatMulNBits", [node.input[0], *(f"{base}.{key}" for key in inputs)], [out], domain="com.microsoft",
            K=k, N=n, bits=2, block_size=BLOCK, accuracy_level=INT8_ACCUMULATION,
        )
    ]  # fmt: skip
    if bias:
        new.append(helper.make_node("Add", [out, bias], [node.output[0]]))
    at = list(model.graph.node).index(node)
    model.graph.node.remove(node)
    for i, each in enumerate(new):
        model.graph.node.insert(at + i, each)
