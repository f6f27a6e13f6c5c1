"""What a search for a network leaves behind: an ONNX file, run.json, and a report with the front of what was tried."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from torch import nn

from trimtab import report
from trimtab.compact.finish import layers
from trimtab.core import host
from trimtab.core.budget import format_value
from trimtab.core.cost import measure
from trimtab.core.edit import describe, history
from trimtab.core.files import write_text
from trimtab.data import Data
from trimtab.deploy import export
from trimtab.search import Found


def write(
    found: Found, model: nn.Module, data: Data, out: Path, *, method: str, tested: float, command: str, seed: int
) -> dict[str, Any]:
    """Write model.onnx (checked against the model), run.json and report.html; gives the run.

    Args:
        found: what the search found. model: the network that was taken out, calibrated.
        method: the system that trained the supernet. tested: accuracy of the model on the test split.
    """
    exported = export(model, out / "model.onnx", data=data, limit=1)
    whole = measure(model, (data.in_chans, *data.size), per_layer=True)
    cost = {k: v for k, v in whole.asdict().items() if k != "layers" and v is not None} | dict(found.cost)
    said = found.asdict()
    met = all(row["ok"] for row in said["budget"]["rows"])
    run = said | {
        "title": f"{data.name} within {found.budget}",
        "command": command,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "machine": host.machine(),
        "versions": host.versions(),
        "data": data.summary(),
        "budget": said["budget"] | {"met": met},
        "result": {
            "model": f"{type(model).__name__}, found by {method}",
            "summary": f"{tested:.2%} test accuracy on {data.name} with {format_value('macs', cost['macs'])} MACs; the "
            f"most accurate of {len(found.tried)} networks inside the budget on validation data",
            "cost": cost,
            "accuracy": {"val": found.accuracy, "test": tested},
            "edits": describe(history(model).edits),
            "files": [{"name": "model.onnx", "bytes": exported.path.stat().st_size}],
        },
        "front": [dict(t.arch) | {"accuracy": t.accuracy, **t.cost} for t in found.front()],
        "layers": {"before": [], "after": layers(whole)},
    }
    write_text(out / "run.json", json.dumps(run, indent=1))
    report.write(run, out / "report.html")
    return run
