"""Commands that make a model: compact, train, compress, run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli import arguments, say
from trimtab.cli.app import app
from trimtab.cli.session import emit, exit_on_budget
from trimtab.core import log

Budget_ = Annotated[str | None, typer.Option(help='Bounds to meet, such as "params<=100k, size<=96KB, latency<=5ms".')]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]
Data_ = Annotated[str | None, typer.Argument(metavar="DATA", help="A folder of class folders, a data set, or digits.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of going on with what is in --out.")]
Task_ = Annotated[
    str | None,
    typer.Option("--task", metavar="TASK", help="classify, segment, detect or restore.", show_default="classify"),
]
DataOption = Annotated[str | None, typer.Option("--data", help="The same as DATA.")]


@app.command()
def compact(
    data: Data_ = None,
    data_option: DataOption = None,
    model: Annotated[str | None, typer.Option(help="Start from this model (artifact or registry name).")] = None,
    budget: Budget_ = None,
    time: Annotated[str, typer.Option(help="How long it may take, such as 90s, 10m or 2h.")] = "60s",
    out: Annotated[Path, typer.Option(help="Folder for the model, ONNX, report and run.json.")] = Path("trimtab-out"),
    seed: Seed = 0,
    fresh: Fresh = False,
    task: Task_ = None,
) -> None:
    """Find the best compact model for your data inside a budget.

    Writes the model, an ONNX file, a report to open in a browser, and run.json. Interrupted, the same command goes on
    where it was. Exits with 1 when the budget could not be met; the best model found is written all the same.

    \b
    Examples:
      trimtab compact
      trimtab compact photos/ --budget "params<=100k, size<=96KB" --time 10m
      trimtab compact photos/ --model mobilenetv3_small_100 --budget "macs<=50%"
    """
    arguments.budget_of(budget)
    arguments.seconds_of(time)
    if arguments.task_of(task) != "classify":
        raise typer.BadParameter(
            f"compact is for classification; for --task {task} use trimtab train --task {task}, then trimtab compress"
        )
    source = arguments.one_data(data, data_option)
    from trimtab.compact import compact as run_compact

    result = run_compact(source, model=model, budget=budget, time=time, out=out, seed=seed, fresh=fresh)
    emit(result, lambda: say.run(result, out))
    exit_on_budget(result.get("budget"))


@app.command()
def train(
    data: Data_ = None,
    data_option: DataOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Registry name, or an artifact to train on.",
            show_default="resnet8_mlperf_tiny; lite_fpn to segment (reversible_unet_tiny_1 volumes), "
            "ssd_nano to detect, espcn to restore",
        ),
    ] = None,
    task: Task_ = None,
    out: Annotated[Path, typer.Option(help="Folder for the trained model.")] = Path("trimtab-trained"),
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the data (10 when --time is not given).")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Train for so long instead, such as 90s or 10m.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per step.", show_default="128, or 16 for other tasks, 2 volumes")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; by default the optimizer's usual one.")] = None,
    opt: Annotated[
        str | None, typer.Option(help="Optimizer, by timm's name.", show_default="sgd, or adamw for other tasks")
    ] = None,
    warmup: Annotated[float | None, typer.Option(min=0, max=1, help="Share of the training that warms up.")] = None,
    clip_grad: Annotated[float | None, typer.Option(min=0, help="Largest norm of the gradient.")] = None,
    augment: Annotated[
        str, typer.Option(help="Augmentation in words joined by '+', such as crop_flip; or none.")
    ] = "auto",
    size: Annotated[int | None, typer.Option(min=1, help="Image size in pixels; by default that of the data.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What is minimised, by its name in trimtab.learn.",
            show_default="that of the task, or kd with --teacher",
        ),
    ] = None,
    loading: Annotated[
        list[str] | None,
        typer.Option(
            "--load",
            metavar="NAME=VALUE",
            help="An option of load_data for the task, such as scale=3; may be repeated.",
        ),
    ] = None,
    given: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="An option of the objective; may be repeated."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Artifact to distil from.")] = None,
    weights: Annotated[Path | None, typer.Option(exists=True, help="Weights to start from (safetensors).")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from timm's weights (a download).")] = False,
    seed: Seed = 0,
    fresh: Fresh = False,
) -> None:
    """Train a model on your data and keep it as an artifact.

    Started again after an interruption, it goes on where it stopped, to the same result.

    \b
    Examples:
      trimtab train digits --model resnet8_mlperf_tiny --epochs 20 --out small/
      trimtab train photos/ --model mobilenetv3_small_100 --time 10m --opt adamw
      trimtab train photos/ --model resnet8_mlperf_tiny --teacher big/ --set T=2 --set alpha=0.5
      trimtab train photos/ --model resnet8_mlperf_tiny --objective lsskd --set branches=3
      trimtab train street/ --task segment --size 128 --load void=11 --out segmenter/
      trimtab train pictures/ --task restore --load scale=3 --out upscaler/
      trimtab train scans/ --task segment --model reversible_unet_tiny_1 --out volumes/
    """
    if epochs is not None and time is not None:
        raise typer.BadParameter("give --epochs or --time, not both")
    limit = None if time is None else arguments.seconds_of(time)
    kept = arguments.artifact(model).task if model and arguments.kind_of(model) == "artifact" else None
    asked = arguments.task_of(task or kept)
    source = arguments.one_data(data, data_option, "digits" if asked == "classify" else "scenes")
    how_loaded = arguments.loading_of(model) | arguments.options_of(loading, "--load")
    name = objective or ("kd" if teacher else asked)
    options = arguments.options_of(given) | ({"teacher": teacher} if teacher else {})
    import trimtab as tt
    from trimtab.learn import methods

    with arguments.wrong_use():
        methods.check(name, options)
        network = {"teacher": arguments.artifact(teacher).model} if teacher else {}
        minimised = methods.make(name, **options | network)
    net, loaded = arguments.model_and_data(
        model, source, size=size, weights=weights, pretrained=pretrained, seed=seed, task=asked, loading=how_loaded
    )
    fitted = tt.fit(
        net,
        loaded,
        minimised,
        epochs=None if limit else epochs or 10,
        time_limit=limit,
        batch_size=batch_size,
        lr=lr,
        opt=opt,
        warmup=warmup,
        clip_grad=clip_grad,
        augment=augment,
        seed=seed,
        out=out / "training",
        resume=not fresh,
        progress=log.progress_wanted(),
    )
    how = {"objective": name, "options": options} | ({"loading": how_loaded} if how_loaded else {})
    result = arguments.keep(fitted.model, loaded, out, "train", seed=seed, **how)
    result |= {"seconds": fitted.seconds, "stopped": fitted.stopped}
    emit(result, lambda: say.result(result))


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="The artifact to make smaller (or a registry name, untrained).")],
    data: Annotated[str, typer.Option(help="Data to measure on, and to train on.")] = "digits",
    budget: Annotated[
        str | None,
        typer.Option(help="What to reach; percent refer to the model as it is.", show_default="the method's"),
    ] = None,
    method: Annotated[str, typer.Option(help="Which compression, by its name in trimtab.compress.")] = "magnitude",
    given: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An option of the method; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the smaller model.")] = Path("trimtab-compressed"),
    epochs: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Passes of training: within a method that trains by itself, otherwise afterwards; 0 for none.",
            show_default="the method's, or 5 afterwards; none for methods that compute the same",
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of that training.")] = None,
    opt: Annotated[str | None, typer.Option(help="Its optimizer, by timm's name.")] = None,
    seed: Seed = 0,
    fresh: Fresh = False,
) -> None:
    """Make a trained model smaller: surgery, and some training to recover.

    \b
    Examples:
      trimtab compress big/ --budget "macs<=50%" --out small/
      trimtab compress big/ --data photos/ --budget "params<=100k" --epochs 20
      trimtab compress big/ --method magnitude --set norm=1 --set scope=local --epochs 0
    """
    arguments.budget_of(budget)
    options = arguments.options_of(given)
    options |= {"budget": budget} if budget is not None else {}
    import trimtab as tt
    from trimtab.compress import methods

    with arguments.wrong_use():
        methods.check(method, options)
    has = methods.parameters(method)
    bars = log.progress_wanted()
    training: dict[str, Any] = {"seed": seed, "out": out / "training", "resume": not fresh, "progress": bars}
    training |= {k: v for k, v in (("epochs", epochs), ("lr", lr), ("opt", opt)) if v is not None}
    net, loaded = arguments.model_and_data(model, data, weights=None, pretrained=False, seed=seed)
    before = {"cost": arguments.cost_of(net, loaded), **tt.evaluate(net, loaded)}
    small = methods.run(method, net, loaded, **{k: v for k, v in training.items() if k in has}, **options)
    usual = 0 if method in methods.SAME_FUNCTION else 5
    if "epochs" not in has and (usual if epochs is None else epochs):
        small = tt.fit(small, loaded, **{"epochs": usual, **training}).model
    how = {"method": method, "options": options, "loading": arguments.loading_of(model)}
    result = arguments.keep(small, loaded, out, "compress", seed=seed, source=model, **how)
    result["before"] = before
    emit(result, lambda: say.result(result))


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A recipe in YAML.")],
) -> None:
    """Carry out a recipe: phases of training and surgery, written in YAML.

    \b
    Examples:
      trimtab run recipe.yaml
      trimtab run recipe.yaml --json
    """
    from trimtab.compact.recipe import RecipeError, read
    from trimtab.compact.recipe import run as run_recipe

    try:
        read(recipe)
    except RecipeError as e:
        raise typer.BadParameter(str(e)) from None
    result = run_recipe(recipe)
    emit(result, lambda: say.recipe(result))
    exit_on_budget(result["budget"])
