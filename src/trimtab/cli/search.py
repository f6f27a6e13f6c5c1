"""Search for a network: train one supernet, and take the best network inside a budget out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli import arguments, say
from trimtab.cli.app import app
from trimtab.cli.make import Fresh, Seed
from trimtab.cli.session import emit
from trimtab.core import log


@app.command()
def search(
    model: Annotated[
        str, typer.Argument(metavar="NAME_OR_PATH", help="The largest network, or the one to grow: a name or artifact.")
    ] = "resnet20_cifar",
    data: Annotated[str, typer.Option(help="Data to train on, and to choose by.")] = "digits",
    method: Annotated[
        str, typer.Option(help="bignas, deps, sortednet train a supernet; self_expanding_cnn grows; deepmad designs.")
    ] = "bignas",
    budget: Annotated[str, typer.Option(help="What to reach; percent refer to the network named.")] = "macs<=50%",
    space: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="What may differ: width, depth, resolution; may be repeated.",
            show_default="width=[0.25,0.5,0.75,1] depth=blocks",
        ),
    ] = None,
    given: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An option of the method; may be repeated.")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="How to choose: coarse_to_fine, evolution, tpe, exhaustive.", show_default="the method's own way"
        ),
    ] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="How many networks may be looked at.")] = 100,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data to train the supernet.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per backward pass.")] = 128,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; by default the optimizer's usual one.")] = None,
    opt: Annotated[str, typer.Option(help="Optimizer, by timm's name.")] = "sgd",
    size: Annotated[int | None, typer.Option(min=1, help="Image size in pixels; by default that of the data.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the network, its ONNX file and the report.")] = Path(
        "trimtab-searched"
    ),
    seed: Seed = 0,
    fresh: Fresh = False,
) -> None:
    """Train many networks at once, and take out the best one inside a budget.

    They are all parts of one, and share its weights; none is trained again afterwards. Interrupted, the same command
    goes on where it stopped. With another --budget it only chooses anew: the supernet in --out is trained already.

    \b
    Examples:
      trimtab search resnet20_cifar --data photos/ --budget "macs<=30%" --epochs 30
      trimtab search big/ --method sortednet --space width=[0.5,0.75,1] --set accum=2
      trimtab search trim_300k --method deps --set start=0.5 --strategy tpe --budget "latency<=2ms"
      trimtab search secnn --method self_expanding_cnn --data photos/ --budget "params<=30k" --epochs 60
      trimtab search --method deepmad --data photos/ --budget "macs<=10M, params<=300k" --set rho=0.5
    """
    arguments.budget_of(budget)
    options = arguments.options_of(given)
    options |= {"space": arguments.options_of(space, "--space")} if space else {}
    from trimtab.compact import searched
    from trimtab.search import systems

    try:
        systems.check(method, {**options, "evaluations": evaluations, "strategy": strategy})
    except ValueError as e:
        raise typer.BadParameter(str(e)) from None
    net, loaded = arguments.model_and_data(model, data, size=size, weights=None, pretrained=False, seed=seed)
    training: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "opt": opt, "seed": seed}
    training |= {"out": out / "training", "resume": not fresh, "progress": log.progress_wanted()}
    small, found = systems.run(
        method, net, loaded, budget=budget, strategy=strategy, evaluations=evaluations, **{**training, **options}
    )
    result = arguments.keep(small, loaded, out, "search", seed=seed, source=model, method=method, options=options)
    run = searched.write(
        found, small, loaded, out, method=method, tested=result["accuracy"], seed=seed,
        command=f"trimtab search {model} --method {method} --budget '{budget}'",
    )  # fmt: skip
    result |= {"arch": dict(found.arch), "tried": len(found.tried), "front": run["front"], "budget": run["budget"]}
    result |= {"files": [str(out / name) for name in ("model.onnx", "report.html", "run.json")]}
    emit(result, lambda: say.searched(result))
