"""Commands that look into trained models: analyze filters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli import arguments, say
from trimtab.cli.app import app
from trimtab.cli.session import emit

if TYPE_CHECKING:
    from torch import nn

analyze = typer.Typer(no_args_is_help=True, help="Look into trained models: their filters.")
app.add_typer(analyze, name="analyze")


@analyze.command()
def filters(
    models: Annotated[list[str], typer.Argument(help="Artifacts, folders of artifacts, or registry names.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("filters.html"),
    fold_bn: Annotated[bool, typer.Option("--fold-bn", help="Scale kernels by the batch norm after them.")] = False,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Registry names with timm's weights.")] = False,
    sparse: Annotated[float, typer.Option(min=0, max=1, help="Share of zero kernels that makes a layer sparse.")] = 0.5,
    low_entropy: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a random layer's entropy below which it is low.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0,
) -> None:
    """Compare the 3x3 filters of models, and name layers that have degenerated.

    Needs no data. Prints a row for every layer, and writes a page with principal components, coefficients, and the
    drift between models and across depth.

    \b
    Examples:
      trimtab analyze filters trimtab-out/
      trimtab analyze filters small/ big/ --out filters.html
      trimtab analyze filters resnet18 --pretrained --fold-bn --json
    """
    if out.suffix != ".html":
        raise typer.BadParameter(f"--out must end in .html, got {out}")
    opened = _models(models, pretrained)
    from trimtab.compress.analyze import filters as find
    from trimtab.report.filters import filters_page

    found = find(opened, fold_bn=fold_bn, sparse=sparse, low_entropy=low_entropy, seed=seed).asdict()
    page = filters_page(found, out)
    emit(found | {"page": str(page)}, lambda: _say(found, page))


def _models(arguments_: list[str], pretrained: bool) -> dict[str, nn.Module]:
    """Models by what they were called, artifacts in a folder by their paths."""
    found: dict[str, nn.Module] = {}
    for given in arguments_:
        places = _artifacts(given)
        if not places:
            found[given] = arguments.by_name(given, pretrained=pretrained)
        for place in places:
            name = str(place)
            if name not in found:
                found[name] = arguments.artifact(name).model
    return found


def _artifacts(given: str) -> list[Path]:
    """The artifact that a folder is, or all those in it; none for a name."""
    path = Path(given)
    if not path.is_dir():
        if arguments.kind_of(given) != "name":
            raise typer.BadParameter(f"{given} is an ONNX file; filters are read from artifacts and registry names")
        return []
    if any((p / "trimtab.json").is_file() for p in (path, path / "model")):
        return [path]
    inside = sorted(p.parent for p in path.rglob("trimtab.json"))
    if not inside:
        raise typer.BadParameter(f"{given} is a folder without artifacts: no trimtab.json in it or below")
    return inside


def _say(found: dict[str, Any], page: Path) -> None:
    rows = [
        {"model": q["model"], "layer": q["layer"], "kernels": q["kernels"], "says": ", ".join(q["degenerated"])}
        | {k: "–" if q[k] != q[k] else f"{q[k]:.3f}" for k in ("sparsity", "entropy", "entropy_share", "orthogonality")}
        for q in found["quality"]
    ]
    columns = {"model": "model", "layer": "layer", "kernels": "kernels", "sparsity": "sparsity", "entropy": "entropy"}
    columns |= {"entropy_share": "of random", "orthogonality": "orthogonality", "says": "degenerated"}
    say.table(rows, columns, "no layers")
    names = [m["name"] for m in found["models"]]
    for i, row in enumerate(found["drift"]):
        for j in range(i):
            print(f"drift between {names[j]} and {names[i]}: {row[j]:.3f}")
    for model in found["models"]:
        print(f"{model['name']}: {len(model['degenerated'])} of {model['layers']} layers degenerated")
    print(f"page: {page}")
