"""Reading `.onnx` files from anywhere, safely, and running them in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trimtab.core.errors import ArtifactError

if TYPE_CHECKING:
    import onnx
    import onnxruntime

MAX_FILE = 2 * 2**30  # bytes: what one protobuf can hold


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node (the branches of an If, the body of a Loop)."""
    for a in node.attribute:
        if a.HasField("g"):
            yield a.g
        yield from a.graphs


def all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor in the file: initializers and attributes, in subgraphs and functions too."""

    def of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
        for node in nodes:
            for a in node.attribute:
                if a.HasField("t"):
                    yield a.t
                yield from a.tensors
            for graph in subgraphs(node):
                yield from graph.initializer
                yield from of_nodes(graph.node)

    yield from model.graph.initializer
    for sparse in model.graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from of_nodes(model.graph.node)
    for function in model.functions:
        yield from of_nodes(function.node)


def read_onnx(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Parse a file, or say in one line why not.

    Raises:
        ArtifactError: no such file, not ONNX, truncated, or with weights in other files.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} is not a file")
    if path.stat().st_size > MAX_FILE:
        raise ArtifactError(f"{path} is larger than an ONNX file can be")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except DecodeError as e:
        raise ArtifactError(f"{path} is no ONNX file, or only a part of one") from e
    if not model.graph.node or not model.graph.output or not model.opset_import:
        raise ArtifactError(f"{path} is no ONNX file, or only a part of one")
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in all_tensors(model)):
        raise ArtifactError(f"{path} keeps its weights in other files, which trimtab does not read")
    return model


def open_session(
    source: str | os.PathLike[str] | bytes,
    *,
    threads: int = 1,
    optimize: bool = True,
    save: Path | None = None,
    arena: bool = True,
) -> onnxruntime.InferenceSession:
    """A CPU session of ONNX Runtime with a fixed number of threads.

    Without its arena, a session gives the memory of activations back as soon as they are dead.

    Raises:
        ArtifactError: when ONNX Runtime does not accept the model.
    """
    import onnxruntime as ort

    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = arena
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if save is not None:
        options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(save)
    try:
        raw = source if isinstance(source, bytes) else Path(source).read_bytes()
        return ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime raises many classes with no useful base
        name = "the model" if isinstance(source, bytes) else str(source)
        raise ArtifactError(f"ONNX Runtime cannot run {name}: {(str(e).splitlines() or ['?'])[0]}") from e


def example_inputs(
    model: onnx.ModelProto, *, batch_size: int = 1, size: Sequence[int] | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random inputs. The first open dimension is the batch; the others must be given by `size` (C, H, W)."""
    import onnx

    rng = np.random.default_rng(seed)
    held = {t.name for t in model.graph.initializer}
    feeds = {}
    for value in model.graph.input:
        if value.name in held:
            continue
        kind = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else 0 for d in kind.shape.dim]
        if dims and dims[0] <= 0:
            dims[0] = batch_size
        if size is not None and len(dims) == len(size) + 1:
            dims[1:] = [have or want for have, want in zip(dims[1:], size, strict=True)]
        if any(d <= 0 for d in dims):
            raise ValueError(f"input {value.name!r} has open dimensions {dims}; pass input_size=(C, H, W)")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if np.issubdtype(dtype, np.integer) or np.issubdtype(dtype, np.bool_):
            feeds[value.name] = np.zeros(dims, dtype)
        else:
            feeds[value.name] = rng.standard_normal(dims).astype(dtype)
    return feeds
