"""Choose which images to train on, or write better labels for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli import arguments
from trimtab.cli.app import app
from trimtab.cli.make import Seed
from trimtab.cli.session import emit

if TYPE_CHECKING:
    from torch import nn

    from trimtab.data import Data


@app.command()
def curate(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Images as for train, or an .npy file of features.")],
    method: Annotated[str, typer.Option(help="concept_pruning or relabel, see trimtab show.")] = "concept_pruning",
    model: Annotated[
        str | None, typer.Option(help="The network whose features or labels are used: an artifact, or a registry name.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help='What to keep: a share such as "50%", or a number.', show_default="50%")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for what is made.")] = Path("trimtab-curated"),
    given: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An option of the method; may be repeated.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(exists=True, help="Weights for a registry name (safetensors).")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="A registry name with timm's weights.")] = False,
    seed: Seed = 0,
) -> None:
    """Choose which images to train on, or write better labels for them.

    concept_pruning writes the images that it keeps as a data set (parquet), which every other command reads; of an .npy
    file of features, the rows that it keeps. relabel writes localized labels, to train with the objective of its name.

    \b
    Examples:
      trimtab curate photos/ --model big/ --keep 50% --out half/
      trimtab curate photos/ --model resnet18 --pretrained --keep 5000 --set clusters=60 --set mode=random
      trimtab curate features.npy --keep 10% --set dedup=0.05 --out kept/
      trimtab curate photos/ --method relabel --model big/ --out maps/
    """
    options = arguments.options_of(given)
    options |= {"keep": keep} if keep is not None else {}
    from trimtab.data.curate import methods

    with arguments.wrong_use():
        methods.check(method, options)
    function = methods.METHODS[method]
    vectors = data.endswith(".npy")
    if vectors and method != "concept_pruning":
        raise typer.BadParameter(f"{method} needs images, got {data}")
    if not vectors and model is None:
        raise typer.BadParameter("--model is needed to look at images: an artifact, or a registry name")
    if method == "relabel":
        net, loaded = arguments.model_and_data(str(model), data, weights=weights, pretrained=pretrained, seed=seed)
        found = function(loaded, net, out, **options).summary()
    elif vectors:
        found = _rows(function(data, seed=seed, **options), out)
    else:
        net, loaded = _looked_at(str(model), data, weights, pretrained, seed)
        found = _images(function(loaded, net, seed=seed, **options), loaded, data, out)
    emit(found | {"out": str(out)}, lambda: _say(found, out))


def _looked_at(model: str, source: str, weights: Path | None, pretrained: bool, seed: int) -> tuple[nn.Module, Data]:
    """A network for features, and data as it is used to see them; its classes may be others."""
    if arguments.kind_of(model) != "artifact":
        return arguments.model_and_data(model, source, weights=weights, pretrained=pretrained, seed=seed)
    from trimtab.data import load_data

    kept = arguments.artifact(model)
    if kept.spec is None:
        return kept.model, load_data(source, seed=seed)
    channels, height, width = kept.spec.size
    loaded = load_data(source, image_size=(height, width), in_chans=channels, seed=seed)
    return kept.model, loaded.like(mean=kept.spec.mean, std=kept.spec.std)


def _images(found: Any, loaded: Data, source: str, out: Path) -> dict[str, Any]:
    from trimtab.data.sources import find_source
    from trimtab.data.write import write_parquet

    where = find_source(source)
    files = write_parquet(found.of(loaded), out, source=where if where.splits else None)
    return _kept(found, out) | {"files": [str(f) for f in files]}


def _rows(found: Any, out: Path) -> dict[str, Any]:
    from trimtab.data.curate.methods import save_rows

    save_rows(found.rows, out / "rows.npy")
    return _kept(found, out) | {"files": [str(out / "rows.npy")]}


def _kept(found: Any, out: Path) -> dict[str, Any]:
    from trimtab.core.files import write_text

    summary = found.summary()
    write_text(out / "curation.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _say(found: dict[str, Any], out: Path) -> None:
    if "kept" in found:
        copies = f", {found['copies']} near copies" if found["copies"] else ""
        print(f"kept {found['kept']} of {found['total']} ({found['clusters']} clusters{copies})")
    else:
        print(f"labels of {found['images']} images, {found['bytes'] / 1e6:.1f} MB")
    for file in found.get("files", [str(out)]):
        print(f"  {file}")
