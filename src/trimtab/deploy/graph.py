"""Making an ONNX graph small without changing what it computes. Every pass takes a `ModelProto` and works in place.

Two weights of a kilobyte model cost less than one of its descriptions: exporters write a stack trace on every node, the
full Python name on every value, a shape for every intermediate, every attribute at its default, and every quantized
tensor brings its own copy of the same zero point. None of that is needed to run the file.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from trimtab.core.onnx_file import subgraphs

# Attributes at these values say nothing (ONNX's own defaults); kernel_shape is told by the weight.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "Conv": {"group": 1, "auto_pad": b"NOTSET"},
    "ConvTranspose": {"group": 1, "auto_pad": b"NOTSET"},
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0},
    "MaxPool": {"auto_pad": b"NOTSET", "ceil_mode": 0, "storage_order": 0},
    "AveragePool": {"auto_pad": b"NOTSET", "ceil_mode": 0, "count_include_pad": 0},
    "Flatten": {"axis": 1},
    "Reshape": {"allowzero": 0},
    "ReduceMean": {"keepdims": 1, "noop_with_empty_axes": 0},
    "QuantizeLinear": {"axis": 1, "saturate": 1, "block_size": 0, "output_dtype": 0, "precision": 0},
    "DequantizeLinear": {"axis": 1, "block_size": 0, "output_dtype": 0},
    "LayerNormalization": {"axis": -1, "stash_type": 1},
}
_ONES = dict.fromkeys(("Conv", "ConvTranspose", "MaxPool", "AveragePool"), ("dilations", "strides"))
_ZEROS = {
    "Conv": ("pads",),
    "ConvTranspose": ("pads", "output_padding"),
    "MaxPool": ("pads",),
    "AveragePool": ("pads",),
}


def lean(model: ModelProto) -> None:
    """Strip what a runtime does not need, share equal tensors, shorten every name but those of inputs and outputs."""
    _strip(model)
    _share(model)
    _rename(model)


# ------------------------------------------------------------------------------------------------------------ rewriting


def simplify(model: ModelProto) -> ModelProto:
    """Fold constants and batch norms, drop what has no effect: ONNX Runtime's own basic optimisations, then ours."""
    model = _runtime_basics(model)
    _bias_of_conv(model)
    _pool_of_mean(model)
    drop_unused(model)
    return model


def keep_zero_pads(model: ModelProto) -> None:
    """Stop ONNX Runtime from moving zeros around an image into a MaxPool, which pads with minus infinity instead.

    Its fusion (on by default) looks for a pad of exactly 0; the smallest normal number has no other effect.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    held = tensors(model)
    for pool in model.graph.node:
        pad = made.get(pool.input[0]) if pool.op_type == "MaxPool" else None
        if pad is None or pad.op_type != "Pad" or attribute(pad, "mode", b"constant") != b"constant":
            continue
        given = pad.input[2] if len(pad.input) > 2 else ""
        value = held[given] if given in held else attribute(made[given], "value") if given in made else None
        value = numpy_helper.to_array(value) if isinstance(value, TensorProto) else value
        if given and (value is None or value.dtype != np.float32 or np.any(value != 0)):
            continue
        pad.input[:] = [*pad.input[:2], pad.output[0] + ".zero", *pad.input[3:]]
        tiny = np.asarray(np.finfo(np.float32).tiny, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(tiny, pad.input[2]))


def _runtime_basics(model: ModelProto) -> ModelProto:
    """The graph that ONNX Runtime makes at its BASIC level: standard ONNX operators only."""
    import tempfile
    from pathlib import Path

    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "basic.onnx"
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 4
        ort.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["WeightBiasQuantization"],  # rounds float weights between quantized activations
        )
        return onnx.load(target)


def _users(model: ModelProto) -> dict[str, list[NodeProto]]:
    users: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    return users


def tensors(model: ModelProto) -> dict[str, np.ndarray]:
    """Every initializer as an array."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute, or `default`."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _bias_of_conv(model: ModelProto) -> None:
    """Conv(x, W) -> Add(c) with one constant per channel becomes the bias of the Conv."""
    users, held = _users(model), tensors(model)
    outputs = {v.name for v in model.graph.output}
    for node in list(model.graph.node):
        if node.op_type != "Conv" or len(node.input) > 2 or node.output[0] in outputs:
            continue
        after = users.get(node.output[0], [])
        if len(after) != 1 or after[0].op_type != "Add":
            continue
        add = after[0]
        other = next((n for n in add.input if n != node.output[0]), "")
        weight, bias = held.get(node.input[1]), held.get(other)
        if weight is None or bias is None or bias.shape[-3:] != (weight.shape[0], 1, 1) or bias.size != weight.shape[0]:
            continue
        name = other + ".bias"
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(bias.reshape(-1)), name))
        node.input.append(name)
        node.output[0] = add.output[0]
        model.graph.node.remove(add)


def _pool_of_mean(model: ModelProto) -> None:
    """A mean over height and width becomes a global average pool, which runtimes know how to quantize."""
    held = tensors(model)
    have = ranks(model)
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type != "ReduceMean" or have.get(node.input[0]) != 4:
            continue
        axes = held.get(node.input[1]) if len(node.input) > 1 else attribute(node, "axes")
        if axes is None or sorted(int(a) % 4 for a in np.ravel(axes)) != [2, 3]:
            continue
        pool = helper.make_node("GlobalAveragePool", [node.input[0]], [node.output[0]], name=node.name)
        nodes[-1] = pool
        if not attribute(node, "keepdims", 1):
            pool.output[0] = node.output[0] + ".pool"
            nodes.append(helper.make_node("Flatten", [pool.output[0]], [node.output[0]], name=node.name + ".flat"))
    pooled = {n.output[0] for n in nodes if n.op_type == "GlobalAveragePool"}
    for i, node in enumerate(nodes):  # (B, C, 1, 1) -> (B, C), however it was written
        if node.op_type == "Reshape" and node.input[0] in pooled and have.get(node.output[0]) == 2:
            shape = held.get(node.input[1])
            if shape is not None and (shape[0] in (-1, 0) or shape[1] == -1):
                nodes[i] = helper.make_node("Flatten", [node.input[0]], [node.output[0]], name=node.name)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def ranks(model: ModelProto) -> dict[str, int]:
    """Number of dimensions of every value whose shape can be inferred."""
    try:
        known = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:
        known = model
    values = (*known.graph.input, *known.graph.value_info, *known.graph.output)
    return {v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.tensor_type.HasField("shape")}


def drop_unused(model: ModelProto) -> None:
    """Nodes whose results nobody reads, then tensors that no node reads."""
    wanted = {v.name for v in model.graph.output}
    keep: list[NodeProto] = []
    for node in reversed(model.graph.node):
        if wanted & {*node.output}:
            keep.append(node)
            wanted |= {*node.input, *_inner_names(node)}
    del model.graph.node[:]
    model.graph.node.extend(reversed(keep))
    held = [t for t in model.graph.initializer if t.name in wanted]
    del model.graph.initializer[:]
    model.graph.initializer.extend(held)


# ------------------------------------------------------------------------------------------------------------ the small


def _inner_names(node: NodeProto) -> Iterator[str]:
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from inner.input
            yield from _inner_names(inner)
        yield from (v.name for v in graph.output)


def _clear(message: Any, *names: str) -> None:
    for name in names:
        message.ClearField(name)


def _strip(model: ModelProto) -> None:
    graph = model.graph
    # An empty string is still written, a cleared field is not.
    _clear(model, "producer_name", "producer_version", "doc_string", "domain", "model_version")
    _clear(graph, "doc_string")
    graph.name = "g"  # must not be empty
    for field in (model.metadata_props, model.training_info, graph.value_info, graph.metadata_props):
        del field[:]
    del graph.quantization_annotation[:]
    for value in (*graph.input, *graph.output):
        _clear(value, "doc_string")
        del value.metadata_props[:]
    held = {t.name: t for t in graph.initializer}
    for node in graph.node:
        _clear(node, "name", "doc_string")
        if not node.overload:
            _clear(node, "overload")
        if node.domain in ("", "ai.onnx"):
            _clear(node, "domain")
        del node.metadata_props[:]
        _drop_default_attributes(node, held)
        for inner in subgraphs(node):
            del inner.value_info[:]
            _clear(inner, "doc_string")
            for n in inner.node:
                _clear(n, "name", "doc_string")
                del n.metadata_props[:]
    used = {n.domain for n in graph.node} | {n.domain for f in model.functions for n in f.node}
    used |= {f.domain for f in model.functions} | {i.domain for n in graph.node for g in subgraphs(n) for i in g.node}
    opsets = [o for o in model.opset_import if (o.domain if o.domain != "ai.onnx" else "") in {*used, ""}]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    drop_unused(model)


def _drop_default_attributes(node: NodeProto, held: dict[str, TensorProto]) -> None:
    if node.domain not in ("", "ai.onnx"):
        return
    keep = []
    defaults = _DEFAULTS.get(node.op_type, {})
    for a in node.attribute:
        value = helper.get_attribute_value(a)
        _clear(a, "doc_string")
        if a.name in defaults and value == defaults[a.name]:
            continue
        if a.name in _ONES.get(node.op_type, ()) and all(v == 1 for v in value):
            continue
        if a.name in _ZEROS.get(node.op_type, ()) and not any(value):
            continue
        if a.name == "axis" and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = held.get(node.input[1])
            if scale is not None and math.prod(scale.dims) == 1 and not scale.dims:
                continue  # one scale for all: there is no axis
        keep.append(a)
    del node.attribute[:]
    node.attribute.extend(keep)


def _share(model: ModelProto) -> None:
    """Equal initializers become one; every tensor is written as raw bytes, which is the shortest form."""
    first: dict[tuple[Any, ...], str] = {}
    same: dict[str, str] = {}
    kept = []
    for t in model.graph.initializer:
        array = numpy_helper.to_array(t)
        key = (t.data_type, tuple(t.dims), array.tobytes())
        if key in first:
            same[t.name] = first[key]
            continue
        first[key] = t.name
        if t.data_type in (TensorProto.STRING,) or t.raw_data:
            _clear(t, "doc_string")
            del t.metadata_props[:]
        else:
            t = numpy_helper.from_array(array, t.name)
        kept.append(t)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    if same:
        _map_names(model, lambda n: same.get(n, n))


def _map_names(model: ModelProto, new: Any) -> None:
    def walk(nodes: Iterable[NodeProto]) -> None:
        for node in nodes:
            node.input[:] = [new(n) if n else n for n in node.input]
            node.output[:] = [new(n) if n else n for n in node.output]
            for graph in subgraphs(node):
                walk(graph.node)
                for v in (*graph.input, *graph.output, *graph.initializer):
                    v.name = new(v.name)

    walk(model.graph.node)
    for t in model.graph.initializer:
        t.name = new(t.name)


_LETTERS = string.ascii_letters


def _rename(model: ModelProto) -> None:
    """One and two letters instead of Python paths; the most used name gets the shortest."""
    fixed = {v.name for v in (*model.graph.input, *model.graph.output)}
    names = dict.fromkeys(t.name for t in model.graph.initializer)
    for node in model.graph.node:
        names.update(dict.fromkeys((*node.input, *node.output)))
    inner = {n for node in model.graph.node for n in _inner_names(node)}
    if inner:  # names inside subgraphs see through to the outside: leave them alone
        return
    short: dict[str, str] = {name: name for name in fixed}
    number = 0
    for name in names:
        if not name or name in short:
            continue
        while (candidate := _letters(number)) in fixed:
            number += 1
        short[name] = candidate
        number += 1
    _map_names(model, lambda n: short[n])


def _letters(number: int) -> str:
    out = _LETTERS[number % 52]
    number //= 52
    while number:
        number -= 1
        out += _LETTERS[number % 52]
        number //= 52
    return out
