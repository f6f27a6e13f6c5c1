"""Commands that look around: systems, show, models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli import arguments, say
from trimtab.cli.app import app
from trimtab.cli.session import emit


@app.command()
def systems(
    task: Annotated[str | None, typer.Option(help="Only those for this task, such as classify.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind: architecture, method, objective ...")] = None,
    family: Annotated[str | None, typer.Option(help="Only this family, such as compress/prune or prune.")] = None,
) -> None:
    """List the published methods in the library, with their evidence.

    \b
    Examples:
      trimtab systems
      trimtab systems --family prune --task classify
      trimtab systems --kind architecture --json
    """
    from trimtab.core.card import LEVELS, catalogue, level

    rows: list[dict[str, Any]] = []
    for slug, entry in catalogue().items():
        card = entry.card
        if (
            (task and task not in card.tasks)
            or (kind and kind != card.kind)
            or (family and family.strip("/") not in (entry.family, *entry.family.split("/")))
        ):
            continue
        rows.append(
            {"slug": slug, "title": card.title, "kind": card.kind, "tasks": card.tasks, "family": entry.family}
            | {"level": level(slug), "arxiv": card.arxiv, "year": card.year}
        )
    shown = [{**r, "tasks": ", ".join(r["tasks"]), "level": f"{r['level']} {LEVELS[r['level']]}"} for r in rows]
    columns = {"slug": "system", "kind": "kind", "family": "family", "level": "evidence", "title": "paper"}
    emit(rows, lambda: say.table(shown, columns, "no system fits"))


@app.command()
def show(slug: Annotated[str, typer.Argument(help="A system, as trimtab systems lists them.")]) -> None:
    """Show one system: its card, where it is, and the evidence measured for it.

    \b
    Examples:
      trimtab show cct
      trimtab show cct --json
    """
    from dataclasses import asdict

    from trimtab.core.card import LEVELS, catalogue, evidence, level

    known = catalogue()
    if slug not in known:
        raise typer.BadParameter(f"no system is called {slug!r}{arguments.near(slug, known)}")
    entry, seen, reached = known[slug], evidence(slug), level(slug)
    about, use = _about(entry.path, entry.module)
    value = asdict(entry.card) | {
        "family": entry.family,
        "module": entry.module,
        "about": about,
        "use": use,
        "level": reached,
        "evidence": seen,
    }
    emit(value, lambda: say.system(value, f"{reached} {LEVELS[reached]}"))


@app.command()
def models(
    pattern: Annotated[
        str, typer.Argument(help="Names with wildcards; a bare word finds names that contain it.")
    ] = "*",
    ours: Annotated[bool, typer.Option("--ours", help="Only those that trimtab adds to timm's.")] = False,
) -> None:
    """List models that can be made by name.

    \b
    Examples:
      trimtab models --ours
      trimtab models "mobilenet*small*"
      trimtab models cct
    """
    from trimtab.models import list_models

    names = list_models(pattern if any(c in pattern for c in "*?[") else f"*{pattern}*", ours=ours)
    emit(names, lambda: print("\n".join(names) if names else f"no model fits {pattern!r}"))


def _about(path: Path, module: str) -> tuple[str, list[str]]:
    """What a system is and how to call it: its module's docstring and public names. Read, not imported."""
    import ast

    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    made = [n.name for n in public if any(getattr(d, "id", "") == "register_model" for d in n.decorator_list)]
    if made:
        use = [f'tt.create_model("{name}", num_classes=...)' for name in made]
    else:
        use = [f"from {module} import {n.name}" for n in public]
    return ast.get_docstring(tree) or "", use
