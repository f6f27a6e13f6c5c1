"""Sparse 1x1 convolutions next to PyTorch's dense ones: every MobileNet layer, and the whole networks at 224 pixels.

    python -m benchmarks.sparse_conv [--sparsity 0.5 0.7 0.8 0.9 0.95]

One thread, one image, float32, contiguous NCHW; contenders take turns in one process, each turn is some 10 ms of warm
calls (one call of a whole network), times are medians. A layer is compared with `torch.nn.Conv2d` of the same shape. A
network is compared with itself with the zeros filled in (the same weights, the same modules, batch norms and ReLUs
folded alike), with the plain dense network as it was trained, and with ONNX Runtime running the dense one. Weights are
random: the time does not depend on their values.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.runner import compare, seconds
from trimtab.compress import fast_sparse_convnets
from trimtab.compress.prune.fast_sparse_convnets import fold, keep_largest, plan
from trimtab.core import host
from trimtab.core.artifact import InputSpec
from trimtab.core.cost import measure
from trimtab.core.files import write_text
from trimtab.core.timing import torch_threads
from trimtab.deploy import export
from trimtab.models import create_model
from trimtab.nn.sparse import SparseConv1x1, available, chosen, kernel

NETWORKS = ("mobilenetv1_100", "mobilenetv2_100")
SIZE = (3, 224, 224)
SPARSITY = (0.5, 0.7, 0.8, 0.9, 0.95)
TARGET = 0.9  # the sparsity of the summary
TARGET_MS = 10.0  # of dense calls per measurement, so that all contenders run warm


def shapes(names: tuple[str, ...] = NETWORKS) -> dict[tuple[int, int, int], list[str]]:
    """(C_out, C_in, H) of the 1x1 convolutions -> the networks that have it, in the order of the networks."""
    found: dict[tuple[int, int, int], list[str]] = {}
    for name in names:
        with torch.device("meta"):
            model = create_model(name)
        rows = {r.name: r for r in measure(model, SIZE, per_layer=True).layers}
        for edit in plan(model, SIZE):
            out, into = edit.kwargs["out_channels"], edit.kwargs["in_channels"]  # type: ignore[attr-defined]
            side = math.isqrt(rows[edit.module].activations // out)  # type: ignore[attr-defined]
            found.setdefault((out, into, side), []).append(name)
    return found


@torch.inference_mode()
def layer_times(out: int, into: int, side: int, sparsities: list[float], rounds: int) -> dict[str, Any]:
    """Seconds of the dense convolution, and of every kernel at every sparsity, as shares of it."""
    conv = nn.Conv2d(into, out, 1, bias=False).eval()
    x = torch.randn(1, into, side, side)
    contenders: dict[str, Callable[[], Any]] = {"dense": _forced(conv, None, x)}
    for sparsity in sparsities:
        for block in (1, 4):
            weight = conv.weight.detach()
            layer = SparseConv1x1.of(conv, keep_largest(weight, sparsity, block), block=block).eval()
            for name in [n for n in available() if n == "numba" or (n == "csr" and block == 1)]:
                run = _forced(layer, name, x)
                run()
                contenders[f"{name}{' blocks of 4' if block == 4 else ''} {sparsity:g}"] = run
    alone = compare({"dense": contenders["dense"]}, rounds=3).series["dense"].median
    inner = max(1, round(TARGET_MS / 1e3 / alone))
    result = compare(contenders, rounds=rounds, warmup=1, baseline="dense", inner=inner)
    return {
        "dense_seconds": result.series["dense"].median,
        "ratio": {n: round(result.ratio(n), 3) for n in contenders if n != "dense"},
    }


def crossing(sparsities: list[float], ratios: list[float]) -> float | str:
    """The sparsity at which sparse and dense take the same time, between the two nearest measurements.

    >>> crossing([0.5, 0.9], [1.2, 0.8])
    0.7
    """
    for (s, a), (t, b) in zip(zip(sparsities, ratios), zip(sparsities[1:], ratios[1:])):
        if a > 1 >= b:
            return round(s + (t - s) * (a - 1) / (a - b), 2)
    return f"below {sparsities[0]:g}" if ratios[0] <= 1 else f"above {sparsities[-1]:g}"


@torch.inference_mode()
def network_times(name: str, sparsities: list[float], rounds: int) -> dict[str, Any]:
    """The whole network: `ratio` is to the same network with the zeros filled in."""
    x = torch.randn(1, *SIZE)
    plain = create_model(name).eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for m in plain.modules():
            if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None and m.running_var is not None:
                # as of a network that has seen data, so that no activation is trivial
                m.running_mean.normal_(std=0.1)
                m.running_var.uniform_(0.5, 1.5)
    contenders: dict[str, Callable[[], Any]] = {
        "dense, as trained": _forced(plain, None, x),
        "dense, ONNX Runtime": _ort(plain, x),
    }
    size = {"dense": measure(plain, SIZE, what=("size", "macs"))}
    picked: dict[str, Any] = {}
    for block in (1, 4):
        for sparsity in sparsities if block == 1 else [TARGET]:
            at = f"{sparsity:g}{' blocks of 4' if block == 4 else ''}"
            small = fast_sparse_convnets(plain, SIZE, sparsity=sparsity, block=block, late=0.5, epochs=0)
            small = fold(small, SIZE).eval()
            size[at] = measure(small, SIZE, what=("size", "macs"))
            if "dense" not in contenders:
                contenders["dense"] = _forced(small, "dense", x)
            small(x)  # lets every layer choose its kernel
            picked[at] = _picked(small, x)
            for which in (None, "numba", "csr") if at == f"{TARGET:g}" else (None,):
                if which is None or which in available():
                    contenders[f"{which or 'sparse'} {at}"] = _forced(small, which, x)
    result = compare(contenders, rounds=rounds, warmup=2, baseline="dense")
    return {
        "seconds": {n: {"median": s.median, "iqr": s.iqr} for n, s in result.series.items()},
        "ratio": {n: round(result.ratio(n), 3) for n in contenders},
        "kernels": picked,
        "bytes": {n: c.size for n, c in size.items()},
        "macs": {n: c.macs for n, c in size.items()},
    }


def _forced(module: nn.Module, name: str | None, x: torch.Tensor) -> Callable[[], Any]:
    def run() -> None:  # the output is dropped at once, so that its memory serves the next call
        with kernel(name):
            module(x)

    return run


def _picked(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """How many layers chose which kernel."""
    counts: dict[str, int] = {}
    hooks = []
    known = chosen()

    def note(m: Any, given: Any, y: Any) -> None:
        key = (m.out_channels, m.in_channels, m.values.numel(), m.block, 1, *given[0].shape[2:])
        counts[known[key]] = counts.get(known[key], 0) + 1

    for m in model.modules():
        if isinstance(m, SparseConv1x1):
            hooks.append(m.register_forward_hook(note))
    model(x)
    for hook in hooks:
        hook.remove()
    return counts


def _ort(model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        spec = InputSpec(SIZE, (0.5,) * 3, (0.5,) * 3)
        with torch.inference_mode(False):
            file = export(
                copy.deepcopy(model), Path(folder) / "m.onnx", spec=spec, exporter="classic", check=False
            ).path
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy().astype(np.float32)}
    return lambda: session.run(None, feed)


def summary(layers: list[dict[str, Any]], sparsities: list[float]) -> dict[str, Any]:
    """Per kernel: how often it wins at the target sparsity, and where it crosses the dense convolution."""
    best = {s: [min(v for n, v in row["ratio"].items() if n.endswith(f" {s:g}")) for row in layers] for s in sparsities}
    plain = {
        s: [min(v for n, v in row["ratio"].items() if n.endswith(f" {s:g}") and "block" not in n) for row in layers]
        for s in sparsities
    }
    return {
        "layers": len(layers),
        "median ratio of the faster kernel, single weights": {f"{s:g}": _median(plain[s]) for s in sparsities},
        "median ratio of the faster kernel, blocks of 4 allowed": {f"{s:g}": _median(best[s]) for s in sparsities},
        "layers faster than dense, single weights": {f"{s:g}": sum(v < 1 for v in plain[s]) for s in sparsities},
        "crossing, single weights": crossing(sparsities, [_median(plain[s]) for s in sparsities]),
    }


def _median(values: list[float]) -> float:
    return round(float(np.median(values)), 3)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITY))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sparse_conv.json")
    args = parser.parse_args(argv)
    if TARGET not in args.sparsity:
        parser.error(f"--sparsity must contain {TARGET}, which the summary is about")
    sparsities = sorted(args.sparsity)
    torch.manual_seed(0)
    gc.freeze()  # the runner collects garbage between turns; what is loaded once need not be looked at again
    with torch_threads(1):
        layers = []
        for (out, into, side), users in shapes().items():
            row = layer_times(out, into, side, sparsities, args.rounds)
            kinds = sorted({n.rsplit(" ", 1)[0] for n in row["ratio"]})
            cross = {k: crossing(sparsities, [row["ratio"][f"{k} {s:g}"] for s in sparsities]) for k in kinds}
            layers.append({"layer": f"{out}x{into}x{side}^2", "used": {u: users.count(u) for u in set(users)}, **row})
            layers[-1]["crossing"] = cross
            at = {n.removesuffix(f" {TARGET:g}"): r for n, r in row["ratio"].items() if n.endswith(f" {TARGET:g}")}
            print(
                f"{layers[-1]['layer']:>14}  dense {seconds(row['dense_seconds']):>9}  at {TARGET:g}: {at}", flush=True
            )
        networks = {name: network_times(name, sparsities, args.rounds) for name in NETWORKS}
    for name, result in networks.items():
        print(name)
        for who, ratio in result["ratio"].items():
            print(f"  {who:<28} {seconds(result['seconds'][who]['median']):>9}  x {ratio:.3f}")
        result["crossing"] = crossing(sparsities, [result["ratio"][f"sparse {s:g}"] for s in sparsities])
    report = {
        "summary": summary(layers, sparsities),
        "networks": networks,
        "layers": layers,
        "rounds": args.rounds,
        "threads": 1,
        "load average of the machine": [round(v, 1) for v in os.getloadavg()],
        **host.provenance(Path(__file__).parent, "numba"),
    }
    print(json.dumps(report["summary"], indent=1))
    write_text(args.out, json.dumps(report, indent=1) + "\n")
    print(f"wrote {args.out}")
    return report


if __name__ == "__main__":
    main()
