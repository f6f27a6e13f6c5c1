"""The results of the benchmarks as tables of the documentation; `evidence.tables` puts them between its markers."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.runner import seconds

HERE = Path(__file__).parent
UNKNOWN = "*Not measured yet.*"


def result(name: str) -> dict[str, Any] | None:
    """What a benchmark wrote, None if it has not run."""
    file = HERE / "results" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def benchmarks(_: str | None = None) -> str:
    """A section for each benchmark: what it asks, its command, and what came out; then those of its other ways to run.

    The result of ``NAME --OPTION`` is the file ``NAME_OPTION.json``.
    """
    parts = []
    for path in sorted(HERE.glob("*.py")):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        about = re.sub(r"\\\n +", "", about)  # a command in two lines
        commands = [
            line.strip().split("  ")[0]
            for line in about.splitlines()
            if "python -m benchmarks." in line and line[:4] == "    "
        ]
        if commands:
            parts += [
                f"## {path.stem}",
                about.splitlines()[0],
                f"```\n{commands[0]}\n```",
                _one(path.stem),
            ]
            for more in sorted((HERE / "results").glob(f"{path.stem}_*.json")):
                option = more.stem.removeprefix(f"{path.stem}_")
                command = next((c for c in commands if f"--{option} " in c), commands[0])
                parts += [f"### {path.stem} --{option}", f"```\n{command}\n```", _one(more.stem)]
    return "\n\n".join(parts)


def ternary_matmul(_: str | None = None) -> str:
    """Time over that of float32."""
    found = result("ternary_matmul")
    if found is None:
        return UNKNOWN
    cells = found["table"]
    names = list(cells[0]["ratios"])[1:]  # the first is the baseline
    rows = [
        [f"{c['outputs']} x {c['inputs']}", str(c["batch"]), *(f"{c['ratios'][n]:.2f}" for n in names)] for c in cells
    ]
    return markdown(["Outputs x inputs", "Batch", *names], rows)


def quantized(_: str | None = None) -> str:
    """Files in 8 bits beside float32: bytes, accuracy where the network is trained, time."""
    found = result("quantized")
    if found is None:
        return UNKNOWN
    rows = []
    for name, small in found["facts"].items():
        if not name.endswith(", int8"):
            continue
        large = found["facts"][name.removesuffix("int8") + "float32"]
        accuracy = [f"{100 * k['accuracy']:.2f} %" if "accuracy" in k else "" for k in (large, small)]
        sizes = [f"{k['bytes'] / 1e3:,.0f} KB" for k in (large, small)]
        rows.append([name.removesuffix(", int8"), *sizes, *accuracy, f"{small['ratio']:.2f}"])
    head = ["Network", "float32", "int8", "accuracy, float32", "accuracy, int8", "time of int8 / float32"]
    return markdown(head, rows)


def prunability(_: str | None = None) -> str:
    """How many models of each suite pass, and where the others stop."""
    found = result("prunability")
    if found is None:
        return UNKNOWN
    suites = list(found["summary"])
    tools = list(found["summary"][suites[0]])
    cells = [[t, *("{ok} of {of}".format(**found["summary"][s][t]) for s in suites), _stops(found, t)] for t in tools]
    return markdown(["Tool", *suites, "stopped at"], cells)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown.

    >>> print(markdown(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def short(numbers: Any) -> str:
    """Numbers by name in one line; what `stats` made is shown as mean ± standard deviation.

    >>> short({"accuracy": {"mean": 0.9123, "std": 0.004, "values": [0.9, 0.92]}, "params": 3760139})
    'accuracy 0.9123 ± 0.004, params 3,760,139'
    """
    return ", ".join(f"{name} {value(v)}" for name, v in numbers.items()) if numbers else ""


def value(v: Any) -> str:
    """A number, a mean with its deviation, or several of them, as people read it.

    >>> value([1200, 0.123456, {"mean": 1.5, "std": 0.0}])
    '[1,200, 0.1235, 1.5]'
    """
    if isinstance(v, Mapping):
        if "mean" in v:
            return f"{value(v['mean'])} ± {value(v['std'])}" if v.get("std") else value(v["mean"])
        return "(" + ", ".join(f"{k} {value(x)}" for k, x in v.items()) + ")"
    if isinstance(v, (list, tuple)):
        return "[" + ", ".join(value(x) for x in v[:8]) + (", ..." if len(v) > 8 else "") + "]"
    if isinstance(v, bool) or not isinstance(v, (int, float)):
        return str(v)
    return f"{v:,}" if isinstance(v, int) else f"{v:.4g}"


def _one(name: str) -> str:
    special = {"ternary_matmul": ternary_matmul, "quantized": quantized, "prunability": prunability}.get(name)
    found = result(name)
    if special or found is None:
        return special() if special else UNKNOWN
    parts = [_comparison(c) for c in found.get("grey", [found]) if "baseline" in c]
    parts += [f"- {k}: {short(v) if isinstance(v, Mapping) else value(v)}" for k, v in found.get("summary", {}).items()]
    parts += [f"- {short(row)}" for row in found.get("images", [])]
    cpu = found["machine"]["cpu"]
    return "\n".join([*parts, "", f"{cpu}, {found['machine']['cores']} cores, {found['date'][:10]}."])


def _comparison(found: Mapping[str, Any]) -> str:
    """A table of the contenders: time, ratio, and what each returned; below it the other facts."""
    facts, results = found["facts"], found["results"]
    extra = {n: _scalars(r["returned"]) or _scalars(facts.get(n)) for n, r in results.items()}
    keys = list(dict.fromkeys(k for row in extra.values() for k in row))
    rows = [
        [n, seconds(r["median"]), f"{r['ratio']:.3g}", *(value(extra[n].get(k, "")) for k in keys)]
        for n, r in results.items()
    ]
    shown = {*results, *(f"{n}: {k}" for n in results for k in keys)}
    told = [f"- {k}: {value(v)}" for k, v in facts.items() if k not in shown]
    return "\n".join([markdown(["", "median time", f"x {found['baseline']}", *keys], rows), "", *told])


def _scalars(row: Any) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not isinstance(v, dict | list)} if isinstance(row, Mapping) else {}


def _stops(found: Mapping[str, Any], tool: str) -> str:
    steps: dict[str, int] = {}
    for row in found["rows"]:
        if row["tool"] == tool and not row["ok"]:
            steps[row["step"]] = steps.get(row["step"], 0) + 1
    return short(steps)
