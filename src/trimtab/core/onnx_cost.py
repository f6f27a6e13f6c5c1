"""What a delivered `.onnx` file costs: counted on the file itself, timed and planned as ONNX Runtime runs it."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.core import energy as _energy
from trimtab.core.cost import WHAT, Cost, LayerCost
from trimtab.core.lifetime import Step, peak
from trimtab.core.onnx_file import example_inputs, open_session, read_onnx
from trimtab.core.timing import timed

if TYPE_CHECKING:
    import onnx

Shapes = dict[str, tuple[tuple[int, ...], int]]  # value -> (shape, bytes of an element)

# Inputs that describe how numbers are coded, and are no parameters: scales and zero points.
_CODING = {
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "QGemm": (1, 2, 4, 5, 7, 8),
    "ConvInteger": (2, 3),
    "MatMulInteger": (2, 3),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    "DynamicQuantizeMatMul": (2, 3),
    "MatMulNBits": (2, 3, 4),
    "QLinearAdd": (1, 2, 4, 5, 6, 7),
    "QLinearMul": (1, 2, 4, 5, 6, 7),
    "QLinearSoftmax": (1, 2, 3, 4),
    "QLinearGlobalAveragePool": (1, 2, 3, 4),
    "QLinearAveragePool": (1, 2, 3, 4),
    "QLinearSigmoid": (1, 2, 3, 4),
    "QLinearLeakyRelu": (1, 2, 3, 4),
}
# May write over an input that dies there (the list that ONNX Runtime's own kernels allow, less the rare ones).
_IN_PLACE = frozenset(
    [
        "Relu",
        "LeakyRelu",
        "Clip",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Tanh",
        "Elu",
        "Celu",
        "Selu",
        "Gelu",
        "FastGelu",
        "QuickGelu",
        "Mish",
        "Softplus",
        "Erf",
        "Exp",
        "Log",
        "Sqrt",
        "Neg",
        "Abs",
        "Round",
        "Floor",
        "Ceil",
        "Reciprocal",
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Min",
        "Max",
        "Where",
        "BiasGelu",
        "BatchNormalization",
        "QLinearAdd",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearLeakyRelu",
        "Not",
        "Softmax",
        "Dropout",
    ]
)
_VIEWS = frozenset(["Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"])
_LAYOUT = frozenset(["Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Transpose", "Cast", "Expand"])


# --------------------------------------------------------------------------------------------------------------- shapes


def _itemsize(elem: int) -> int:
    import onnx

    return int(onnx.helper.tensor_dtype_to_np_dtype(elem).itemsize)


def _static_shapes(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> Shapes:
    """Shapes by inference, with the input sizes filled in; values that it cannot tell are missing."""
    import onnx

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        if value.name in feeds:
            shape = onnx.helper.make_tensor_type_proto(value.type.tensor_type.elem_type, feeds[value.name].shape)
            value.type.CopyFrom(shape)
    for value in fixed.graph.output:  # a symbolic name here would win over what is inferred
        value.type.tensor_type.ClearField("shape")
    del fixed.graph.value_info[:]
    try:
        fixed = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    except Exception:
        return {}
    out: Shapes = {}
    for value in (*fixed.graph.input, *fixed.graph.value_info, *fixed.graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim) and kind.elem_type:
            out[value.name] = tuple(d.dim_value for d in kind.shape.dim), _itemsize(kind.elem_type)
    return out


def _real_shapes(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], missing: list[str]) -> Shapes:
    """Shapes of `missing` as they come out when the graph is run, with nothing fused away."""
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    have = {v.name for v in probe.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=n) for n in missing if n not in have)
    session = open_session(probe.SerializeToString(), optimize=False)
    names = [o.name for o in session.get_outputs()]
    values = session.run(names, dict(feeds))
    wanted = {*missing}
    return {
        n: (v.shape, v.dtype.itemsize)
        for n, v in zip(names, values, strict=True)
        if n in wanted and isinstance(v, np.ndarray)
    }


def _shapes(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> Shapes:
    shapes = _static_shapes(model, feeds)
    for t in model.graph.initializer:
        shapes[t.name] = tuple(t.dims), _itemsize(t.data_type)
    missing = [o for node in model.graph.node for o in node.output if o and o not in shapes]
    if missing:
        shapes.update(_real_shapes(model, feeds, missing))
    return shapes


# ------------------------------------------------------------------------------------------------------------- products


def _attr(node: onnx.NodeProto, name: str, default: Any) -> Any:
    import onnx

    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _node_macs(node: onnx.NodeProto, shapes: Shapes) -> int | None:
    """MACs of one node, or None when it is no product."""

    def shape(i: int) -> tuple[int, ...]:
        return shapes[node.input[i]][0]

    out = shapes.get(node.output[0], ((), 4))[0]
    op = node.op_type
    if op in ("Conv", "FusedConv", "ConvInteger", "NhwcFusedConv", "QLinearConv", "DeformConv"):
        weight = shape(3 if op == "QLinearConv" else 1)
        return math.prod(out) // weight[0] * math.prod(weight)
    if op == "ConvTranspose":
        return math.prod(shape(0)) * math.prod(shape(1)[1:])
    if op in ("Gemm", "QGemm"):
        a = shape(0)
        return math.prod(out) * (a[0] if _attr(node, "transA", 0) else a[1])
    if op in ("MatMul", "MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
        return math.prod(out) * shape(0)[-1]
    if op in ("FusedMatMul", "TransposeMatMul"):
        return math.prod(out) * shape(0)[-2 if _attr(node, "transA", 0) else -1]
    if op == "MatMulNBits":
        return math.prod(out) * int(_attr(node, "K", 0))
    if op == "Einsum":
        return _einsum_macs(_attr(node, "equation", b"").decode(), [shape(i) for i in range(len(node.input))])
    if op == "Attention" and node.domain in ("", "ai.onnx"):  # (B, heads, N, D) each
        q, k, v = shape(0), shape(1), shape(2)
        if len(q) == 4:
            return math.prod(q) * k[-2] + math.prod(q[:-1]) * k[-2] * v[-1]
        return math.prod(q) * k[-2] + q[0] * q[1] * k[-2] * v[-1] * int(_attr(node, "q_num_heads", 1)) // max(
            1, int(_attr(node, "kv_num_heads", 1))
        )
    if op == "MultiHeadAttention":
        q, k, v = shape(0), shape(1), shape(2)
        return math.prod(q) * k[-2] + math.prod(q[:-1]) * k[-2] * v[-1]
    if op == "Attention":  # com.microsoft: the projection of q, k and v, then attention
        x, w = shape(0), shape(1)
        tokens = math.prod(x[:-1])
        return tokens * math.prod(w) + 2 * tokens * x[-2] * (w[1] // 3)
    if op in ("LSTM", "GRU", "RNN"):
        x, w, r = shape(0), shape(1), shape(2)
        return x[0] * x[1] * (math.prod(w) + math.prod(r))
    return None


def _einsum_macs(equation: str, shapes: list[tuple[int, ...]]) -> int:
    sizes: dict[str, int] = {}
    for term, shape in zip(equation.replace(" ", "").split("->")[0].split(","), shapes, strict=True):
        letters = list(term.replace("...", ""))
        lead = len(shape) - len(letters)
        names = [f".{i}" for i in range(lead)] + letters if "..." in term else letters
        for n, s in zip(names, shape, strict=False):
            sizes[n] = max(s, sizes.get(n, 1))
    return math.prod(sizes.values()) if len(shapes) > 1 else 0


def _constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Every tensor that the file holds: initializers and the tensors of Constant nodes."""
    found = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            for a in node.attribute:
                if a.name == "value":
                    found[node.output[0]] = a.t
    return found


def _parameters(model: onnx.ModelProto) -> dict[str, int]:
    """name -> elements of every tensor that is a parameter: not scales, zero points, scalars, shapes or indices."""
    import onnx

    kind = onnx.TensorProto
    held = _constants(model)
    coding: set[str] = set()
    weights: set[str] = set()  # integer tensors are parameters only where they are decoded or multiplied
    for node in model.graph.node:
        places = _CODING.get(node.op_type, ())
        for i, name in enumerate(node.input):
            (coding if i in places else weights).add(name)
    integer_users = {
        name
        for node in model.graph.node
        if node.op_type in _CODING
        for i, name in enumerate(node.input)
        if i not in _CODING[node.op_type]
    }
    floats = {kind.FLOAT, kind.FLOAT16, kind.DOUBLE, kind.BFLOAT16}
    out = {}
    for name, t in held.items():
        if name in coding or name not in weights or not t.dims:
            continue
        if t.data_type in floats or name in integer_users:
            out[name] = math.prod(t.dims)
    for node in model.graph.node:  # packed: the file holds K x N codes in fewer bytes
        if node.op_type == "MatMulNBits" and node.input[1] in out:
            out[node.input[1]] = int(_attr(node, "K", 0)) * int(_attr(node, "N", 0))
    out.update(_decoded(model, held, out))
    return out


def _decoded(model: onnx.ModelProto, held: Mapping[str, onnx.TensorProto], out: dict[str, int]) -> dict[str, int]:
    """Weights that nodes decode from packed codes: elements by the tensor of codes; what decodes them leaves `out`."""
    import onnx

    makers = {o: n for n in model.graph.node for o in n.output}
    found: dict[str, str] = {}  # decoded value -> codes
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        leaves, ops, seen, todo = [], set(), set(), [node.input[1]]
        while todo:
            name = todo.pop()
            if name in seen:  # an activation may have come by exponentially many ways
                continue
            seen.add(name)
            maker = makers.get(name)
            if maker is None or name in held:
                leaves.append(name)
            else:
                ops.add(maker.op_type)
                todo.extend(maker.input)
        if "Gather" in ops and all(n in held for n in leaves):
            found[node.input[1]] = max(leaves, key=lambda n: len(held[n].raw_data))
            for name in leaves:
                out.pop(name, None)
    if not found:
        return {}
    known = {v.name: v for v in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info}
    return {
        codes: math.prod(d.dim_value for d in known[name].type.tensor_type.shape.dim)
        for name, codes in found.items()
        if name in known
    }


def _bits(node: onnx.NodeProto, shapes: Shapes, makers: Mapping[str, onnx.NodeProto]) -> tuple[int, int]:
    """(weight bits, activation bits) of a product, seen through the DequantizeLinear nodes before it."""
    if node.op_type == "MatMulNBits":
        return int(_attr(node, "bits", 4)), 32
    if node.op_type in _CODING:
        return 8, 8

    def width(name: str) -> int:
        for _ in range(4):
            maker = makers.get(name)
            if maker is None or maker.op_type not in ("DequantizeLinear", *_LAYOUT):
                break
            name = maker.input[0]
        return 8 * shapes[name][1] if name in shapes else 32

    return width(node.input[1]) if len(node.input) > 1 else 32, width(node.input[0])


# --------------------------------------------------------------------------------------------------------------- memory


def _peak(model: onnx.ModelProto, shapes: Shapes) -> int:
    """Peak bytes of the tensors that depend on the input."""
    held = {*_constants(model)}
    inputs = [v.name for v in model.graph.input if v.name not in held]
    live = {*inputs}
    alias: dict[str, str] = {}
    steps: list[Step] = []
    for node in model.graph.node:
        reads = tuple(dict.fromkeys(alias.get(n, n) for n in node.input if alias.get(n, n) in live))
        if not reads or node.op_type in ("Shape", "Size"):
            continue
        if node.op_type in _VIEWS and alias.get(node.input[0], node.input[0]) in live:
            alias[node.output[0]] = alias.get(node.input[0], node.input[0])
            steps.append(Step(reads, ()))
            continue
        writes = tuple(n for n in node.output if n)
        live.update(writes)
        steps.append(Step(reads, writes, in_place=node.op_type in _IN_PLACE))
    sizes = {n: math.prod(shapes[n][0]) * shapes[n][1] for n in live if n in shapes}
    outputs = [alias.get(v.name, v.name) for v in model.graph.output]
    read = {n for s in steps for n in s.reads} | {*outputs}
    steps = [Step(s.reads, tuple(n for j, n in enumerate(s.writes) if j == 0 or n in read), s.in_place) for s in steps]
    return peak(steps, sizes, inputs=inputs, outputs=outputs)


def _as_run(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The graph that ONNX Runtime makes of the file (fused, quantized patterns turned into integer operators)."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        open_session(path, save=target)
        return onnx.load(target)


# -------------------------------------------------------------------------------------------------------------- measure


def measure_onnx(
    path: str | os.PathLike[str],
    *,
    what: Sequence[str] = ("params", "macs", "activations", "size", "memory", "latency"),
    threads: int = 1,
    batch_size: int = 1,
    input_size: Sequence[int] | None = None,
    per_layer: bool = False,
) -> Cost:
    """What a delivered ONNX file costs.

    `params` are the elements of weights and biases in the file (integer ones too; not scales, zero points, scalars or
    shapes); batch norms that were folded away are no longer there. `size` is bytes of the file. `macs` come from the
    graph with its shapes. `memory` follows the graph as ONNX Runtime fuses it, so an int8 file is counted in int8.
    `latency` is one call in ONNX Runtime with so many threads.

    Args:
        what: any of "params", "macs", "activations", "size", "memory", "bops", "latency", "energy".
        batch_size: images per call, where the file leaves it open.
        input_size: (C, H, W), where the file leaves them open.
        per_layer: also fill `Cost.layers`, one row per product.

    Raises:
        ArtifactError: the file is missing, damaged, no ONNX, or ONNX Runtime cannot run it.
        ValueError: an unknown cost, or an input with open dimensions and no `input_size`.
    """
    what = (what,) if isinstance(what, str) else tuple(what)
    if wrong := [w for w in what if w not in WHAT]:
        raise ValueError(f"what must be some of {', '.join(WHAT)}, got {', '.join(map(repr, wrong))}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    model = read_onnx(path)
    got: dict[str, Any] = {}
    parameters = _parameters(model)
    if "params" in what:
        got["params"] = sum(parameters.values())
    if "size" in what:
        got["size"] = Path(path).stat().st_size
    rows: tuple[LayerCost, ...] = ()
    feeds = example_inputs(model, batch_size=batch_size, size=input_size)
    if per_layer or {"macs", "activations", "bops", "energy"} & {*what}:
        shapes = _shapes(model, feeds)
        makers = {o: n for n in model.graph.node for o in n.output}
        products = [(n, m) for n in model.graph.node if (m := _node_macs(n, shapes)) is not None]
        if "macs" in what:
            got["macs"] = sum(m for _, m in products)
        if "activations" in what:
            got["activations"] = sum(math.prod(shapes[n.output[0]][0]) for n, _ in products)
        if {"bops", "energy"} & {*what}:
            widths = [(m, *_bits(n, shapes, makers)) for n, m in products]
            got["bops"] = sum(m * w * a for m, w, a in widths) if "bops" in what else None
            if "energy" in what:
                arithmetic = sum(m * _energy.mac_pj(w, a) for m, w, a in widths)
                moved = sum(
                    math.prod(shapes[v][0]) * _bits(n, shapes, makers)[1] // 8
                    for n, _ in products
                    for v in (n.input[0], n.output[0])
                )
                stored = sum(len(t.raw_data) or math.prod(t.dims) * 4 for t in _constants(model).values())
                got["energy"] = _energy.estimate(arithmetic, stored, moved)
        if per_layer:
            rows = _table(products, parameters, shapes, makers)
    if "memory" in what:
        run = _as_run(path)
        got["memory"] = _peak(run, _shapes(run, feeds))
    if "latency" in what:
        import onnxruntime

        session = open_session(path, threads=threads)
        got["latency"], got["latency_iqr"] = timed(lambda: session.run(None, feeds))
        plural = "s" if threads > 1 else ""
        got["runtime"] = f"ONNX Runtime {onnxruntime.__version__}, {threads} thread{plural}"
        if "energy" in what and _energy.rapl_available():
            got["energy_rapl"] = _energy.rapl_joules(lambda: session.run(None, feeds))
    return Cost(**got, layers=rows)


def _table(
    products: list[tuple[onnx.NodeProto, int]],
    parameters: Mapping[str, int],
    shapes: Shapes,
    makers: Mapping[str, onnx.NodeProto],
) -> tuple[LayerCost, ...]:
    """One row per product with the tensors it multiplies and adds; what is left over comes last, so sums are totals."""
    left = dict(parameters)
    rows = []
    for i, (node, macs) in enumerate(products):
        params = size = 0
        for name in node.input:
            while name not in left and name in makers and makers[name].op_type in ("DequantizeLinear", *_LAYOUT):
                name = makers[name].input[0]
            if name in left:
                n = left.pop(name)
                params, size = params + n, size + n * shapes.get(name, ((), 4))[1]
        acts = math.prod(shapes[node.output[0]][0])
        rows.append(LayerCost(node.name or f"{node.op_type}_{i}", node.op_type, params, macs, acts, size))
    if left:
        size = sum(n * shapes.get(name, ((), 4))[1] for name, n in left.items())
        rows.append(LayerCost("(other)", "initializers", sum(left.values()), 0, 0, size))
    return tuple(rows)
