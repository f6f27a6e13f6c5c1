"""The command that stays: serve a model over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli import arguments
from trimtab.cli.app import app
from trimtab.cli.session import emit


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Artifact folder or .onnx file.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the model.")] = 1,
    max_mb: Annotated[float, typer.Option(min=0.001, help="Largest request, in MB.")] = 10.0,
    max_megapixels: Annotated[float, typer.Option(min=0.001, help="Largest picture, in millions of pixels.")] = 50.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time limit of a request.")] = 10.0,
    max_batch: Annotated[int, typer.Option(min=1, help="Pictures that are run together at most.")] = 32,
    places: Annotated[int, typer.Option(min=1, help="Requests worked on at once; more are told to come back.")] = 64,
    split: Annotated[
        Path | None, typer.Option(help="Write the parts of a split model here, and answer devices instead.")
    ] = None,
) -> None:
    """Answer over HTTP what is in pictures, with a page to drop them on, until Ctrl-C.

    A model with a bottleneck (--method entropic_student) can be split: devices then encode, and this is their server.

    \b
    Examples:
      trimtab serve trimtab-out/
      trimtab serve model.onnx --port 9000 --threads 2
      trimtab serve student/ --split parts/ --port 9000
      trimtab serve parts/ --port 9000
      trimtab predict parts/ cat.jpg --server http://127.0.0.1:9000
    """

    def started(address: str) -> None:
        line = f"serving {model} at {address} (Ctrl-C ends it)"
        emit({"address": address, "model": model}, lambda: print(line, flush=True))

    splitting = split is not None or (Path(model) / "split.json").is_file()
    kind = "parts" if splitting else arguments.kind_of(model)
    if kind == "name":
        raise typer.BadParameter(f"{model} must be an artifact folder or an .onnx file: a bare name knows no weights")
    from trimtab.deploy import serve as service

    limits = service.Limits(
        max_bytes=round(max_mb * 1e6),
        max_pixels=round(max_megapixels * 1e6),
        seconds=seconds,
        max_batch=max_batch,
        places=places,
    )
    how: dict[str, Any] = {"host": host, "port": port, "limits": limits, "started": started}
    if splitting:
        from trimtab.deploy.split.tail import serve_tail

        serve_tail(_split(model, split) if split is not None else model, **how)
    else:
        service.serve(arguments.folder_of(model) if kind == "artifact" else model, threads=threads, **how)


def _split(model: str, folder: Path) -> Path:
    """Write the parts of an artifact."""
    from trimtab.deploy.split.parts import export

    kept = arguments.artifact(model)
    if kept.spec is None:
        raise typer.BadParameter(f"{model} does not say what input it takes, so it cannot be split")
    return export(kept.model, folder, spec=kept.spec, labels=kept.labels)[0]
