"""Commands that look at label sets: analyze labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli import arguments, say
from trimtab.cli.analyze import analyze
from trimtab.cli.session import emit


@analyze.command()
def labels(
    model: Annotated[str, typer.Argument(help="The classifier: an artifact, or a registry name with weights.")],
    sets: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="All valid labels of each image: JSON or CSV, by name.")
    ],
    data: Annotated[str, typer.Option(help="The images.")] = "digits",
    split: Annotated[str, typer.Option(help="Which of them.")] = "test",
    weights: Annotated[
        Path | None, typer.Option(exists=True, help="Weights for a registry name (safetensors).")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="A registry name with timm's weights.")] = False,
    most: Annotated[int, typer.Option(min=1, help="ASMA averages groups of up to so many labels.")] = 5,
    min_size: Annotated[int, typer.Option(min=1, help="And of at least so many images.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the division into splits.")] = 0,
) -> None:
    """Measure a classifier against all valid labels of each image.

    Says how often the best prediction is valid (ReaL), whether the g best ones are the g valid ones, by number of
    labels, and the mean over these groups (ASMA).

    \b
    Examples:
      trimtab analyze labels big/ --data photos/ --sets labels.json
      trimtab analyze labels big/ --data photos/ --sets labels.csv --min-size 20 --json
    """
    from trimtab.learn import evaluate_sets

    net, loaded = arguments.model_and_data(model, data, weights=weights, pretrained=pretrained, seed=seed)
    if split not in loaded.splits:
        raise typer.BadParameter(f"--split must be one of {', '.join(loaded.splits)}, got {split!r}")
    found = evaluate_sets(net, loaded, sets, split, most=most, min_size=min_size)
    emit(found, lambda: _say(found))


def _say(found: dict[str, Any]) -> None:
    for name, words in (("top1", "original label"), ("real", "any valid label"), ("asma", "mean over groups"),
                        ("micro", "mean over images"), ("exact", "exactly the valid ones")):  # fmt: skip
        value = "–" if found[name] is None else f"{found[name]:.2%}"
        print(f"{name:6}{value:>8}  {words}")
    rows = [{"labels": g, "images": v["n"], "accuracy": f"{v['accuracy']:.2%}", "top1": f"{v['top1']:.2%}"}
            for g, v in found["groups"].items()]  # fmt: skip
    columns = {"labels": "labels", "images": "images", "accuracy": "valid among the g best", "top1": "best is valid"}
    say.table(rows, columns, "no labels")
    groups = ", ".join(map(str, found["asma_groups"])) or "none"
    print(f"ASMA averages groups {groups}; {found['unlabelled']} images unlabelled")
