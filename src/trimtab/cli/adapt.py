"""Adapt a model: to classes that come one after the other, to images that belong to none, or by adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli import arguments, say
from trimtab.cli.app import app
from trimtab.cli.make import Fresh, Seed
from trimtab.cli.session import emit, plain
from trimtab.core import log
from trimtab.core.files import write_text


@app.command()
def adapt(
    model: Annotated[str, typer.Argument(metavar="NAME_OR_PATH", help="The artifact to adapt (or a registry name).")],
    data: Annotated[str, typer.Option(help="Data with all classes of the stream.")] = "digits",
    method: Annotated[
        str,
        typer.Option(
            help="nmc, slca, adab2n, replay learn a stream; finetune and joint are its floor and ceiling; hvcm finds "
            "images of no known class; compacter and adapters train adapters in a frozen transformer; mlc "
            "clusters without labels."
        ),
    ] = "nmc",
    kind: Annotated[
        str | None, typer.Option(help="Of the stream: class, task or domain.", show_default="class")
    ] = None,
    tasks: Annotated[int | None, typer.Option(help="Tasks of the stream.", show_default="5")] = None,
    given: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="An option of the method or the stream; may be repeated."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over each task.", show_default="the method's")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step.", show_default="the method's")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="the method's")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Image size in pixels; by default that of the data.")] = None,
    weights: Annotated[Path | None, typer.Option(exists=True, help="Weights to start from (safetensors).")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from timm's weights (a download).")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the model and what was measured.")] = Path("trimtab-adapted"),
    seed: Seed = 0,
    fresh: Fresh = False,
) -> None:
    """Adapt a model to what comes after its training.

    A stream brings the classes of the data task by task (or all of them in another look, task by task); after each task
    everything learned so far is tested again. Adapters are trained in a frozen model, and kept in a file of their own
    as well. Writes the model, result.json, and for streams a picture. Interrupted, the same command goes on where it
    stopped.

    \b
    Examples:
      trimtab adapt big/ --data photos/ --method nmc --tasks 5
      trimtab adapt big/ --data photos/ --method slca --tasks 10 --epochs 20 --set slow=0.01
      trimtab adapt resnet20_cifar --data digits --method adab2n --set buffer=200 --set loss=er
      trimtab adapt big/ --data photos/ --method finetune --kind domain --set shift=permute --epochs 2
      trimtab adapt vit_tiny_patch16_224 --data photos/ --pretrained --method compacter --set n=4 --epochs 20
      trimtab adapt resnet20_cifar --data photos/ --method hvcm --set hold_out=3 --epochs 30
      trimtab adapt big/ --data photos/ --method mlc --set clusters=20 --epochs 40
    """
    options = arguments.options_of(given)
    said = {"kind": kind, "tasks": tasks, "epochs": epochs, "batch_size": batch_size, "lr": lr}
    options |= {k: v for k, v in said.items() if v is not None}
    from trimtab.learn.adapt import methods

    with arguments.wrong_use():
        methods.check(method, options)
    net, loaded = arguments.model_and_data(model, data, size=size, weights=weights, pretrained=pretrained, seed=seed)
    done = methods.run(
        method,
        net,
        loaded,
        out=out / "training",
        resume=not fresh,
        seed=seed,
        progress=log.progress_wanted(),
        **options,
    )
    result = arguments.keep(
        done.model, done.data, out, "adapt", seed=seed, source=model, method=method, options=options
    )
    result["report"] = done.report
    write_text(out / "result.json", json.dumps(plain(done.report), indent=1))
    if "learned" in done.report:
        from trimtab.report import stream_svg

        stream_svg(done.report, out / "stream.svg")
    emit(result, lambda: say.adapted(result))
