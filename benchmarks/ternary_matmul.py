"""Ternary products: where 2-bit weights are fast, and where they are not.

    python -m benchmarks.ternary_matmul

One product of a layer (outputs x inputs) with a batch of rows, one thread, all in one process and in turn: ONNX Runtime
in float32 (the baseline), its `MatMulNBits` with the 2-bit weights that `tt.export(two_bit=True)` writes, the same
operator in its exact mode, int8 with dynamic activations, PyTorch in float32, and `torch._int_mm` on codes that are
int8 already. Ratios are times over that of the baseline: below 1 is faster. Kept with them: how far an output is from
the float32 product, relative to the largest, and the bytes of the file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from benchmarks.runner import Comparison, compare
from trimtab.core.files import write_text
from trimtab.core.onnx_file import open_session
from trimtab.deploy.low_bit import matmul, two_bit_products

RESULT = Path(__file__).parent / "results" / "ternary_matmul.json"
SHAPES = ((576, 192), (1024, 1024), (3072, 768), (4096, 4096))  # outputs, inputs
BATCHES = (1, 8, 64, 197)
BASELINE = "float32, ONNX Runtime"
SLOWEST = 0.25  # seconds of a call; what takes longer is measured in one round only


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the smallest shape only")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cells, rows = [], []
    for shape in SHAPES[:1] if args.quick else SHAPES:
        for batch in BATCHES:
            result = measure(shape, batch, args.rounds)
            result.show(f"{shape[0]}x{shape[1]}, batch {batch}")
            cells.append(result)
            rows.append(result.facts | {"ratios": {n: round(result.ratio(n), 3) for n in result.series}})
    about = cells[0].asdict()
    kept = {"table": rows, "cells": [c.asdict() for c in cells]} | {k: about[k] for k in ("machine", "versions")}
    write_text(args.out, json.dumps(kept, indent=1) + "\n")


def measure(shape: tuple[int, int], batch: int, rounds: int) -> Comparison:
    """One cell of the table."""
    outputs, inputs = shape
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(-1, 2, (inputs, outputs)), np.float32(0.02)
    x = rng.standard_normal((batch, inputs)).astype(np.float32)
    files = _files(codes, scale)
    calls = {name: _session(file, x) for name, file in files.items()} | _torch(codes, scale, x)
    exact = x @ (codes * scale).astype(np.float32)
    error = {n: float(np.abs(call() - exact).max() / np.abs(exact).max()) for n, call in calls.items()}
    slow = max(_seconds(call) for call in calls.values())
    return compare(
        calls,
        rounds=rounds if slow < SLOWEST else 3,
        baseline=BASELINE,
        inner=max(1, min(50, int(0.02 / slow))),
        facts={
            "outputs": outputs, "inputs": inputs, "batch": batch, "threads": 1,
            "error": {n: float(f"{e:.2g}") for n, e in error.items()},
            "file bytes": {n: f.ByteSize() for n, f in files.items()},
        },
    )  # fmt: skip


def _files(codes: np.ndarray, scale: np.float32) -> dict[str, ModelProto]:
    dense = (codes * scale).astype(np.float32)
    two_bit, exact = matmul(dense), matmul(dense)
    two_bit_products(two_bit)
    two_bit_products(exact)
    (level,) = (a for a in exact.graph.node[0].attribute if a.name == "accuracy_level")
    level.i = 0
    return {
        BASELINE: matmul(dense),
        "2-bit MatMulNBits": two_bit,
        "2-bit MatMulNBits, exact mode": exact,
        "int8, dynamic": _dynamic_int8(codes, scale),
    }


def _dynamic_int8(codes: np.ndarray, scale: np.float32) -> ModelProto:
    """DynamicQuantizeLinear, MatMulInteger and the scaling, which ONNX Runtime fuses into one operator."""
    held = [numpy_helper.from_array(codes.astype(np.int8), "w"), numpy_helper.from_array(np.asarray(scale), "s")]
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "q_scale", "q_zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "q_zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["q_scale", "s"], ["factor"]),
        helper.make_node("Mul", ["float", "factor"], ["y"]),
    ]
    file = matmul(codes)
    ends = list(file.graph.input), list(file.graph.output)
    graph = helper.make_graph(nodes, "g", *ends, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _session(file: ModelProto, x: np.ndarray) -> Callable[[], Any]:
    session = open_session(file.SerializeToString())
    return lambda: session.run(None, {"x": x})[0]


def _torch(codes: np.ndarray, scale: np.float32, x: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Activations are quantized in the call, per row; the weights are ready in the layout that is fastest."""
    rows, dense = torch.from_numpy(x), torch.from_numpy(np.ascontiguousarray((codes * scale).T, np.float32))
    small = torch.from_numpy(codes.astype(np.int8))

    @torch.no_grad()
    def int8() -> np.ndarray:
        s = 127 / rows.abs().amax(1, keepdim=True)
        return (torch._int_mm((rows * s).round().to(torch.int8), small) * (float(scale) / s)).numpy()

    @torch.no_grad()
    def float32() -> np.ndarray:
        return torch.nn.functional.linear(rows, dense).numpy()

    return {"float32, PyTorch": float32, "int8 codes, torch._int_mm": int8}


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
