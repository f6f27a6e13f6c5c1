"""The file that goes out: export, measure on the file itself, choose between float and 8-bit by what they are worth."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.core.budget import Budget, Verdict
from trimtab.core.cost import measure_onnx
from trimtab.core.log import logger
from trimtab.data import Data
from trimtab.deploy import OnnxModel, export

log = logger(__name__)

TIE = 0.003  # a smaller file may cost this much validation accuracy
COSTS = ("params", "macs", "activations", "size", "memory", "latency", "energy")


@dataclass(frozen=True)
class Delivery:
    """One exported file, measured: its costs, what the budget says to them, and validation accuracy."""

    path: Path
    int8: bool
    cost: dict[str, Any]
    verdict: Verdict
    accuracy: float | None = None
    notes: list[str] = field(default_factory=list)


def measured(path: Path, budget: Budget) -> dict[str, Any]:
    """The costs of an ONNX file; latency and energy only where the budget asks for them."""
    slow = [w for w in ("latency", "energy") if w in budget]
    cost = measure_onnx(path, what=("params", "macs", "activations", "size", "memory", *slow)).asdict()
    return {k: v for k, v in cost.items() if v is not None and k != "layers"}


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

    A float file whose weights alone are too large is not made. Accuracy clauses are checked on validation data.

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
    made = []
    for kind in kinds:
        path = folder / f"{kind}.onnx"
        export(model, path, data=data, int8=kind == "int8", limit=1, exporter=exporter)  # accuracy: below
        cost = measured(path, budget)
        accuracy = OnnxModel(path, threads=os.cpu_count() or 1).evaluate(data, "val")["accuracy"] if evaluate else None
        verdict = budget.check({**cost, "accuracy": accuracy}, partial=accuracy is None)
        made.append(Delivery(path, kind == "int8", cost, verdict, accuracy))
        log.log(
            logging.INFO if evaluate else logging.DEBUG, "  %s file: %.1f KB%s, %s", kind, cost["size"] / 1e3,
            "" if accuracy is None else f", validation accuracy {accuracy:.4f}", verdict.explain(),
        )  # fmt: skip
    return sorted(made, key=lambda d: _rank(d, made))


def _rank(d: Delivery, among: list[Delivery]) -> tuple[float, float, float]:
    best = max((o.accuracy or 0.0 for o in among if o.verdict.ok), default=0.0)
    close = d.verdict.ok and (d.accuracy or 0.0) >= best - TIE
    return (d.verdict.excess, 0.0 if close else best - (d.accuracy or 0.0), d.cost["size"] if close else 0.0)
