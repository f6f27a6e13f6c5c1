"""Results in words, for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.core.cost import Cost


def words(name: str, value: Any) -> str:
    from trimtab.report.words import quantity

    return quantity(name, value)


def score(name: str, value: float) -> str:
    """A score of any task, or a cost."""
    if name in ("psnr", "ssim"):
        return f"{value:.2f} dB" if name == "psnr" else f"{value:.4f}"
    return words("accuracy" if name in SCORES else name, value)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], empty: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not rows:
        print(empty)
        return
    console = Console()
    if not console.is_terminal:  # a pipe gets every character, in columns
        widths = [max(len(head), *(len(str(r[key])) for r in rows)) for key, head in columns.items()]
        print("  ".join(head.ljust(w) for head, w in zip(columns.values(), widths, strict=True)).rstrip())
        for r in rows:
            print("  ".join(str(r[key]).ljust(w) for key, w in zip(columns, widths, strict=True)).rstrip())
        return
    table = Table(box=box.SIMPLE_HEAD)
    for head in columns.values():
        table.add_column(head, overflow="fold")
    for r in rows:
        table.add_row(*(str(r[key]) for key in columns))
    console.print(table, markup=False)


def pairs(value: Mapping[str, Any]) -> None:
    shown = {k: v for k, v in value.items() if v is not None}
    width = max(len(k) for k in shown)
    for k, v in shown.items():
        print(f"{k.replace('_', ' '):{width}}  {words(k, v) if isinstance(v, float | int) and k in UNITS else v}")


SCORES = ("dice", "miou", "accuracy", "map", "ap50", "psnr", "ssim")
UNITS = ("params", "macs", "activations", "size", "memory", "latency", "latency_iqr", "energy", "bops", "accuracy")


def cost(model: str, cost: Cost, per_layer: bool, verdict: Any, plot: Path | None) -> None:
    print(model)
    for name in UNITS:
        value = getattr(cost, name, None)
        if value is not None:
            unit = "latency" if name == "latency_iqr" else name
            print(f"  {name.replace('_', ' '):12}{words(unit, value)}")
    if per_layer:
        rows = [
            {"name": layer.name, "kind": layer.kind}
            | {k: words(k, getattr(layer, k)) for k in ("params", "macs", "activations", "size")}
            for layer in cost.layers
        ]
        columns = {"name": "layer", "kind": "kind", "params": "params", "macs": "MACs", "activations": "activations"}
        print()
        table(rows, columns | {"size": "size"}, "no layers")
    if verdict:
        print(verdict.explain())
    if plot:
        print(f"plot: {plot}")


def result(result: Mapping[str, Any]) -> None:
    before = result.get("before")
    print(f"model: {result['model']}")
    rows = {k: result[k] for k in SCORES if k in result} | {k: v for k, v in result["cost"].items() if k in UNITS}
    was = {**before, **before["cost"]} if before else {}
    for name, value in rows.items():
        if value is not None:
            past = f"   (was {score(name, was[name])})" if was.get(name) is not None else ""
            print(f"  {name:12}{score(name, value)}{past}")


def searched(found: Mapping[str, Any]) -> None:
    result(found)
    print(f"best at their cost, of {found['tried']} networks inside the budget:")
    for row in found["front"]:
        print(
            f"  {words('accuracy', row['accuracy']):>8}  {words('macs', row['macs'])}  {words('params', row['params'])}"
        )
    budget(found["budget"])
    for file in found["files"]:
        print(f"  {file}")


def adapted(value: Mapping[str, Any]) -> None:
    result(value)
    report = value["report"]
    if "adapters" in report:
        print(f"trained {report['trained']} of {report['base']} parameters ({report['share']:.3%})")
        print(f"  {report['file']!s:32} {words('size', report['bytes'])}")
        return
    if "clustering" in report:
        rows = [{"by": by, **{k: f"{v:.3f}" for k, v in m.items()}} for by, m in report["clustering"].items()]
        title = f"{report['clusters']} clusters of {report['images']} training images"
        table(rows, {"by": title, "acc": "accuracy", "nmi": "NMI", "ari": "ARI"}, "")
        return
    if "learned" not in report:
        print("accuracy  " + ", ".join(f"{k} {words('accuracy', v)}" for k, v in report["accuracy"].items()))
        rows = [
            {"score": score, "set": other, "auroc": f"{m['auroc']:.3f}", "fpr95": words("accuracy", m["fpr95"])}
            for score, sets in report["ood"].items()
            for other, m in sets.items()
        ]
        table(rows, {"set": "strange images", "score": "score", "auroc": "AUROC", "fpr95": "FPR95"}, "")
        return
    for name in ("average_accuracy", "incremental_accuracy", "forgetting", "backward_transfer", "forward_transfer"):
        if report[name] is not None:
            print(f"  {name.replace('_', ' '):21}{100 * report[name]:.2f}%")


def run(run: Mapping[str, Any], out: Path) -> None:
    result = run.get("result") or {}
    print(result.get("summary") or run.get("title"))
    budget(run.get("budget"))
    named = {file["name"]: file.get("bytes") for file in result.get("files") or []}
    for name in ("model.onnx", "report.html", "run.json"):
        if (out / name).is_file():
            print(f"  {out / name!s:32} {words('size', named.get(name) or (out / name).stat().st_size)}")


def recipe(result: Mapping[str, Any]) -> None:
    for row in result["phases"]:
        named = ((*k.rpartition("_")[::2], v) for k, v in row.items())
        reached = next((f"{split} {name} {score(name, v)}" for split, name, v in named if name in SCORES), "")
        print(f"  {row['phase']:10}{row.get('as') or '':12}{reached}")
    name = next(k for k in SCORES if k in result)
    print(f"test {name} {score(name, result[name])}")
    budget(result["budget"])
    for file in result["files"]:
        print(f"  {file}")


def budget(budget: Mapping[str, Any] | None) -> None:
    for row in (budget or {}).get("rows", []):
        print(f"  {'ok  ' if row['ok'] else 'MISS'} {row['text']}: {words(row['name'], row['value'])}")


def answers(answers: Sequence[Mapping[str, Any]]) -> None:
    width = max(len(a["image"]) for a in answers)
    for a in answers:
        best = a.get("top") or [a]
        print(f"{a['image']:{width}}  " + "  ".join(f"{b['label']} {words('accuracy', b['confidence'])}" for b in best))


def seen(answers: Sequence[Mapping[str, Any]]) -> None:
    width = max(len(a["image"]) for a in answers)
    for a in answers:
        said = [f"{c['label']} {words('accuracy', c['share'])}" for c in a.get("classes", [])[:5]]
        said += [f"{o['label']} {words('accuracy', o['confidence'])}" for o in a.get("objects", [])[:8]]
        said += [f"{len(a['objects']) - 8} more"] if len(a.get("objects", [])) > 8 else []
        if "size" in a:
            said.append(f"{a['size'][0]}x{a['size'][1]}")
        print(f"{a['image']:{width}}  {', '.join(said) or 'nothing'}" + (f"  -> {a['drawn']}" if "drawn" in a else ""))


def system(value: Mapping[str, Any], reached: str) -> None:
    year = f", {value['year']}" if value["year"] else ""
    paper = f"arXiv {value['arxiv']}{year}" if value["arxiv"] else str(value["year"] or "")
    print(f"{value['slug']}: {value['title']}" + (f" ({paper})" if paper else ""))
    print(f"{value['kind']} for {', '.join(value['tasks'])}, in {value['module']}; evidence level {reached}\n")
    print(value["about"])
    if value["use"]:
        more = f"\n  ... and {len(value['use']) - 5} more, see --json" if len(value["use"]) > 5 else ""
        print("\nUse\n  " + "\n  ".join(value["use"][:5]) + more)
    seen = {c["id"]: c for c in (value["evidence"] or {}).get("claims", [])}
    print("\nClaims")
    for claim in value["claims"]:
        print(f"  {claim['id']}: {claim['says']}")
        got = seen.get(claim["id"])
        if got is None:
            print("    not measured yet")
            continue
        print(f"    {'holds' if got['holds'] else 'DOES NOT HOLD'}: {json.dumps(got['measured'], ensure_ascii=False)}")
        if got.get("baseline"):
            print(f"    baseline: {json.dumps(got['baseline'], ensure_ascii=False)}")
        if got.get("note"):
            print(f"    {got['note']}")
