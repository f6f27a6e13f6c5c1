"""Weights with many zeros in an ONNX file: one bit per weight, and the values that are not zero.

Exporters write a sparse layer out as a dense tensor. `store_sparse` stores a mask and the non-zero values instead, and
the nodes that put them in their places. They depend on constants only, so a runtime folds them when it loads the file:
small on disk, dense in memory and on the clock, and every operator is standard. It follows quantization: of int8 codes
the same is true.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from trimtab.deploy.graph import drop_unused, tensors

DECODER = 500  # bytes of the nodes that decode a weight, and their names


def store_sparse(model: ModelProto) -> int:
    """Store weights of products without their zeros, where that saves a tenth. Returns how many weights it was.

    >>> from trimtab.deploy.low_bit import matmul
    >>> weight = np.where(np.arange(16384).reshape(128, 128) % 9, 0, np.arange(128)).astype(np.float32)
    >>> file = matmul(weight)
    >>> before = file.ByteSize()
    >>> store_sparse(file), before // file.ByteSize()
    (1, 6)
    """
    held = tensors(model)
    makers = {o: n for n in model.graph.node for o in n.output}
    done = 0
    for node in list(model.graph.node):
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        decoder = makers.get(node.input[1])
        quantized = decoder is not None and decoder.op_type == "DequantizeLinear"
        at, place = (decoder, 0) if quantized and decoder is not None else (node, 1)
        weight = held.get(at.input[place])
        if weight is None or weight.ndim < 2 or weight.dtype not in (np.float32, np.int8):
            continue
        kept = np.count_nonzero(weight)
        if weight.size / 8 + kept * weight.itemsize + DECODER <= 0.9 * weight.nbytes:
            _decode(model, at, place, weight)
            done += 1
    drop_unused(model)
    return done


def _decode(model: ModelProto, node: NodeProto, place: int, weight: np.ndarray) -> None:
    """bytes -> bits -> for each weight, the number of its value, or 0 -> values by number -> shape."""
    flat = weight.reshape(-1)
    on, base = flat != 0, f"{node.output[0]}.s"
    constants: dict[str, np.ndarray] = {
        "mask": np.packbits(on, bitorder="little")[:, None], "shifts": np.arange(8, dtype=np.uint8),
        "two": np.array(2, np.uint8), "flat": np.array([-1], np.int64), "axis": np.array(0, np.int64),
        "values": np.concatenate([np.zeros(1, flat.dtype), flat[on]]), "zero": np.array([0], np.int64),
        "count": np.array([flat.size], np.int64), "shape": np.array(weight.shape, np.int64),
    }  # fmt: skip
    model.graph.initializer.extend(numpy_helper.from_array(v, f"{base}.{k}") for k, v in constants.items())
    nodes: list[NodeProto] = []

    def then(op: str, *inputs: str, **attributes: Any) -> str:
        names = [f"{base}.{i}" if i in constants else i for i in inputs]
        nodes.append(helper.make_node(op, names, [f"{base}.{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    bits = then("Mod", then("BitShift", "mask", "shifts", direction="RIGHT"), "two")
    bits = then("Reshape", then("Cast", bits, to=TensorProto.INT32), "flat")
    now = then("Gather", "values", then("Mul", then("CumSum", bits, "axis"), bits))
    if flat.size % 8:
        now = then("Slice", now, "zero", "count")
    node.input[place] = then("Reshape", now, "shape")
    at = list(model.graph.node).index(node)
    for i, new in enumerate(nodes):
        model.graph.node.insert(at + i, new)
