"""The file that goes out: export, measure on the file itself, choose between kinds of files by what they are worth."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.compress.quantize import bitnet_reloaded, fliqs
from trimtab.compress.quantize.packing import PackedWeight
from trimtab.core.budget import Budget, Verdict
from trimtab.core.cost import measure, measure_onnx
from trimtab.core.log import logger
from trimtab.data import Data
from trimtab.deploy import OnnxModel, export

log = logger(__name__)

TIE = 0.003  # a smaller file may cost this much validation accuracy
BYTES = {"float": 4.0, "int8": 1.0, "low-bit": 0.5}  # of a weight, by kind of file


@dataclass(frozen=True)
class Delivery:
    """One exported file, measured: its kind, its costs, what the budget says to them, and validation accuracy."""

    path: Path
    kind: str
    cost: dict[str, Any]
    verdict: Verdict
    accuracy: float | None = None

    @property
    def excess(self) -> float:
        """The largest relative miss of a bound on costs: 0 where all are kept, whatever the accuracy is."""
        return max((row.excess for row in self.verdict.rows if row.name != "accuracy"), default=0.0)


def measured(path: Path, budget: Budget) -> dict[str, Any]:
    """The costs of an ONNX file; latency, energy and bit-operations only where the budget asks for them."""
    slow = [w for w in ("latency", "energy", "bops") if w in budget]
    cost = measure_onnx(path, what=("params", "macs", "activations", "size", "memory", *slow)).asdict()
    return {k: v for k, v in cost.items() if v is not None and k != "layers"}


def as_stored(model: nn.Module) -> nn.Module:
    """The model as it is delivered: layers that learn in few bits hold their codes only."""
    kinds = {bitnet_reloaded.BitLayer: bitnet_reloaded.packed, fliqs.MixedLayer: fliqs.packed}
    for layer, packed in kinds.items():
        if any(isinstance(m, layer) for m in model.modules()):
            model = packed(model)
    return model


def deliver(
    model: nn.Module,
    data: Data,
    budget: Budget,
    folder: Path,
    *,
    evaluate: bool = True,
    only: str | None = None,
    exporter: str = "auto",
) -> list[Delivery]:
    """Export `model` in float and in 8 bits to `folder`, and measure both files against `budget`.

    A float file whose weights alone are too large is not made. A model whose weights are packed in fewer bits gives one
    file, of kind "low-bit". Accuracy clauses are checked on validation data.

    Args:
        evaluate: also measure validation accuracy in ONNX Runtime.
        only: "float" or "int8" to make one of them.
        exporter: as in `export`.

    Returns:
        The deliveries, best first: inside the budget before outside, then more accurate, then smaller.
    """
    folder.mkdir(parents=True, exist_ok=True)
    limit = budget.limit("size")
    weights = 4 * sum(p.numel() for p in model.parameters())
    kinds = [k for k in ("float", "int8") if only in (None, k)]
    if only is None and limit is not None and weights > limit:
        kinds = ["int8"]
    if any(isinstance(m, PackedWeight) for m in model.modules()):
        kinds = ["low-bit"]
    made = []
    for kind in kinds:
        path = folder / f"{kind}.onnx"
        export(model, path, data=data, int8=kind == "int8", limit=1, exporter=exporter)  # accuracy: below
        cost = measured(path, budget)
        accuracy = OnnxModel(path, threads=os.cpu_count() or 1).evaluate(data, "val")["accuracy"] if evaluate else None
        verdict = budget.check({**cost, "accuracy": accuracy}, partial=accuracy is None)
        made.append(Delivery(path, kind, cost, verdict, accuracy))
        log.log(
            logging.INFO if evaluate else logging.DEBUG, "  %s file: %.1f KB%s, %s", kind, cost["size"] / 1e3,
            "" if accuracy is None else f", validation accuracy {accuracy:.4f}", verdict.explain(),
        )  # fmt: skip
    return sorted(made, key=lambda d: _rank(d, made))


def tighter(best: Delivery, model: nn.Module, data: Data, *, safety: float) -> Budget | None:
    """Bounds on parameters and MACs that should bring a file inside its budget; None when cutting cannot help."""
    rows = [r for r in best.verdict.rows if not r.ok and r.op == "<=" and r.value is not None]
    if not rows:
        return None
    now = measure(model, (data.in_chans, *data.size), what=("params", "macs"))
    assert now.params is not None and now.macs is not None
    params, macs = float(now.params), float(now.macs)
    for r in rows:
        assert r.value is not None
        ratio = r.limit / r.value * (1 - safety)
        if r.name == "size":
            excess = (r.value - r.limit * (1 - safety)) / BYTES[best.kind]
            params = min(params, max(now.params - excess, 0.05 * now.params))
        elif r.name == "params":
            params = min(params, now.params * ratio)
        else:
            macs = min(macs, now.macs * ratio)
    clauses = [f"{n}<={int(v)}" for n, v, was in (("params", params, now.params), ("macs", macs, now.macs)) if v < was]
    return Budget(", ".join(clauses)) if clauses else None


def _rank(d: Delivery, among: list[Delivery]) -> tuple[float, float, float]:
    best = max((o.accuracy or 0.0 for o in among if o.verdict.ok), default=0.0)
    close = d.verdict.ok and (d.accuracy or 0.0) >= best - TIE
    return (d.verdict.excess, 0.0 if close else best - (d.accuracy or 0.0), d.cost["size"] if close else 0.0)
