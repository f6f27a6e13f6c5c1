"""Commands that use a model: measure, predict, export, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli import arguments, say
from trimtab.cli.app import app
from trimtab.cli.session import emit, plain


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help="Artifact folder, .onnx file, or registry name.")],
    input_: Annotated[str | None, typer.Option("--input", help="Input as C,H,W, or C,D,H,W for volumes.")] = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="A row for every layer.")] = False,
    latency: Annotated[bool, typer.Option("--latency", help="Also run it and take the time.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads for --latency.")] = 1,
    num_classes: Annotated[int | None, typer.Option(min=0, help="Classes, for a registry name.")] = None,
    budget: Annotated[str | None, typer.Option(help="Check these bounds; exit with 1 when one is not met.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the cost of every layer to this .html or .svg file.")] = None,
) -> None:
    """Say what a model costs: parameters, MACs, bytes, memory, and time if asked.

    \b
    Examples:
      trimtab measure mobilenetv3_small_100 --input 3,224,224
      trimtab measure trimtab-out/ --per-layer --plot layers.html
      trimtab measure trimtab-out/model.onnx --latency --budget "size<=96KB, latency<=5ms"
    """
    from dataclasses import asdict

    bounds = arguments.budget_of(budget)
    if bounds and any(c.relative for c in bounds.clauses):
        raise typer.BadParameter(
            f"--budget cannot be in percent here: there is nothing to compare with, got {budget!r}"
        )
    if plot is not None and plot.suffix not in (".html", ".svg"):
        raise typer.BadParameter(f"--plot must end in .html or .svg, got {plot}")
    timed = latency or bool(bounds and "latency" in bounds)
    cost = arguments.measured(
        model,
        arguments.size_of(input_) if input_ else None,
        what=("params", "macs", "activations", "size", "memory") + (("latency",) if timed else ()),
        per_layer=per_layer or plot is not None,
        threads=threads,
        num_classes=num_classes,
    )
    if plot is not None:
        from trimtab.report import layers_plot

        layers_plot([asdict(layer) for layer in cost.layers], plot)
    verdict = bounds.check(cost) if bounds else None
    value = {"model": model, **cost.asdict()}
    if not per_layer:
        value.pop("layers", None)
    if verdict:
        value["budget"] = {"text": budget, "met": verdict.ok, "rows": [asdict(r) for r in verdict.rows]}
    emit(value, lambda: say.cost(model, cost, per_layer, verdict, plot))
    if verdict and not verdict.ok:
        raise typer.Exit(1)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="Artifact folder or .onnx file.")],
    images: Annotated[list[Path], typer.Argument(exists=True, help="Images or volumes, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="How many answers per image, of a classifier.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder for pictures with masks or boxes drawn, or restored pictures.")
    ] = None,
    least: Annotated[float, typer.Option(min=0, max=1, help="Objects that are less sure are not told.")] = 0.3,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="Who has the other part, for the parts of a split model.")
    ] = None,
    deadline: Annotated[float, typer.Option(min=0.001, help="Seconds for an answer of that server.")] = 5.0,
) -> None:
    """Name what is in images; or segment them, find objects in them, restore them, as the model was trained to.

    \b
    Examples:
      trimtab predict trimtab-out/ cat.jpg dog.jpg
      trimtab predict trimtab-out/model.onnx photos/ --top 3 --json
      trimtab predict detector/ photos/ --out drawn/
      trimtab predict volumes.onnx scan.npz --out drawn/
      trimtab predict parts/ cat.jpg --server http://10.0.0.5:9000 --deadline 0.5
    """
    if (Path(model) / "split.json").is_file() or server is not None:
        told = arguments.asked(model, arguments.image_files(images), top, server, deadline)
        emit(told, lambda: say.answers(told))
        return
    spec = arguments.spec_of(model)
    files = arguments.image_files(images, volumes=spec is not None and len(spec.size) == 4)
    seen = arguments.seen(model, spec, files, out, least)
    if seen is not None:
        emit(seen, lambda: say.seen(seen))
        return
    if out is not None:
        raise typer.BadParameter(f"{model} classifies, so there is nothing to draw; drop --out")
    answers = arguments.predicted(model, files, top)
    emit(answers, lambda: say.answers(answers))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="The artifact to export.")],
    path: Annotated[Path, typer.Argument(help="The .onnx file to write; a folder for --memory and --second.")],
    data: Annotated[str | None, typer.Option(help="Data to check on, and to calibrate 8 bit with.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize to 8 bit (needs --data).")] = False,
    check: Annotated[bool, typer.Option(help="Compare the file's answers with the model's.")] = True,
    memory: Annotated[str | None, typer.Option(help="Run in patches inside this memory, such as 256KB.")] = None,
    second: Annotated[str | None, typer.Option(help="Another artifact to ask when in doubt (needs --data).")] = None,
) -> None:
    """Write a model as ONNX, checked against the original.

    \b
    Examples:
      trimtab export trimtab-out/ model.onnx
      trimtab export trimtab-out/ model-int8.onnx --int8 --data photos/
      trimtab export trimtab-out/ patches/ --memory 256KB
      trimtab export small/ pair/ --second other/ --data photos/
    """
    if int8 and data is None:
        raise typer.BadParameter("--int8 needs --data to calibrate with")
    if second is not None and data is None:
        raise typer.BadParameter("--second needs --data, whose validation images say when to ask it")
    if int8 + (memory is not None) + (second is not None) > 1:
        raise typer.BadParameter("give one of --int8, --memory and --second")
    import trimtab as tt

    kept = arguments.artifact(model)
    loaded = kept.load_data(data, seed=0) if data is not None else None
    if loaded is None and kept.spec is None:
        raise typer.BadParameter(f"{model} does not say what input it takes; give --data")
    if memory is not None:
        with arguments.wrong_use():
            schedule = tt.deploy.mcunetv2(kept.model, loaded or kept.spec, memory=memory, labels=kept.labels)
        value = {"path": str(schedule.save(path)), "schedule": str(schedule)}
    elif second is not None and loaded is not None:
        pair = tt.deploy.dual_cnn({model: kept.model, second: arguments.artifact(second).model}, loaded)
        value = {"path": str(pair.save(path)), "pair": str(pair)}
    else:
        done = tt.export(kept.model, path, data=loaded, spec=kept.spec, labels=kept.labels, int8=int8, check=check)
        value = plain(done)
    emit(value, lambda: say.pairs(value))


@app.command()
def report(
    run_json: Annotated[Path, typer.Argument(exists=True, help="run.json of a run, or the folder it lies in.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The .html to write; by default beside run.json.")
    ] = None,
) -> None:
    """Make the report of a finished run again.

    \b
    Examples:
      trimtab report trimtab-out/
      trimtab report trimtab-out/run.json --out report.html
    """
    from trimtab.report import write

    source = run_json / "run.json" if run_json.is_dir() else run_json
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise typer.BadParameter(f"{source.parent} has no run.json") from None
    except ValueError as e:
        raise ValueError(f"{source} is not JSON: {e}") from e
    path = write(content, out or source.with_name("report.html"))
    emit({"report": str(path)}, lambda: print(path))
