"""What arguments mean: a model is an artifact, an ONNX file or a name; budgets, sizes and times are read at the door.

Whatever is wrong with an argument is wrong use: `typer.BadParameter`, exit code 2.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from trimtab.cli.session import plain

if TYPE_CHECKING:
    from torch import nn

    from trimtab.core.artifact import InputSpec
    from trimtab.core.budget import Budget
    from trimtab.core.cost import Cost
    from trimtab.data import Data

HUB = ("hf-hub:", "hf_hub:")
# What is trained when no model is named.
USUAL = {"classify": "resnet8_mlperf_tiny", "segment": "lite_fpn", "detect": "ssd_nano", "restore": "espcn"}
USUAL_VOLUMES = "reversible_unet_tiny_1"
FOLDERS = {"schedule.json": "PatchedModel", "cascade.json": "CascadeModel"}  # of several .onnx files


def kind_of(model: str) -> str:
    """What a model argument is: "artifact", "onnx", "parts" (a folder of several .onnx files) or "name"."""
    path = Path(model)
    if any((path / name).is_file() for name in FOLDERS):
        return "parts"
    if path.is_dir():
        folder_of(model)
        return "artifact"
    if path.suffix == ".onnx":
        if not path.is_file():
            raise typer.BadParameter(f"there is no file {model}")
        return "onnx"
    if path.suffix in (".pt", ".pth", ".safetensors") or ("/" in model and not model.startswith(HUB)):
        raise typer.BadParameter(f"{model} is neither an artifact folder, nor an .onnx file, nor a model name")
    return "name"


def folder_of(model: str) -> Path:
    """The artifact in a folder: the folder itself, or ``model/`` in the folder of a finished run."""
    for path in (Path(model), Path(model) / "model"):
        if (path / "trimtab.json").is_file():
            return path
    raise typer.BadParameter(f"{model} is a folder without trimtab.json, so it is not an artifact")


@dataclass(frozen=True)
class Kept:
    """An artifact that was opened.

    Attributes:
        loading: options of `load_data` besides size and channels with which it was trained.
    """

    path: str
    model: nn.Module
    spec: InputSpec | None
    labels: list[str] | None
    loading: Mapping[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        return self.spec.task if self.spec else "classify"

    def load_data(self, source: str, seed: int) -> Data:
        """Data as the model was trained to see them: its size, channels, mean and standard deviation.

        Raises:
            ValueError: the classes are not the model's, or its answers overlap and the data's do not.
        """
        from trimtab.data import load_data

        if self.spec is None:
            loaded = load_data(source, seed=seed)
        else:
            channels, *sides = self.spec.size
            given: dict[str, Any] = {"in_chans": channels, "seed": seed, **self.loading}
            if self.task == "restore":
                given |= {"patch": sides[0]}
            else:
                given |= {"image_size": tuple(sides)}
            loaded = load_data(source, task=self.task, **given)
            if loaded.spec.overlap != self.spec.overlap:
                kinds = {True: "masks that may overlap", False: "one class for every place"}
                ours, theirs = (kinds[s.overlap] for s in (self.spec, loaded.spec))
                raise ValueError(f"{self.path} gives {ours}; the labels of the data are {theirs}")
        if self.labels is not None and loaded.class_names != self.labels:
            ours, theirs = (", ".join(names[:6]) for names in (self.labels, loaded.class_names))
            raise ValueError(f"{self.path} knows the classes {ours}; the data have {theirs}")
        if self.spec is None:
            return loaded
        return loaded.like(mean=self.spec.mean, std=self.spec.std)

    def vision(self, **limits: float) -> Any:
        """What looks at pictures, or volumes, with this model, for all tasks but classification."""
        import torch

        from trimtab.deploy import Vision
        from trimtab.deploy.to_onnx import Candidates
        from trimtab.deploy.volumes import Volumes

        assert self.spec is not None
        net = Candidates(self.model, self.spec) if self.task == "detect" else self.model

        def run(images: Any) -> Any:
            with torch.inference_mode():
                return net(torch.from_numpy(images)).float().numpy()

        if len(self.spec.size) == 4:
            return Volumes(run, self.spec, self.labels)
        return Vision(run, self.spec, self.labels, **limits)


def artifact(model: str) -> Kept:
    """Open an artifact."""
    if kind_of(model) != "artifact":
        raise typer.BadParameter(f"{model} must be an artifact: a folder that trimtab wrote, with trimtab.json")
    from trimtab.core.artifact import read_manifest
    from trimtab.models import load

    folder = folder_of(model)
    manifest = read_manifest(folder)
    return Kept(model, load(folder), manifest.input_spec, manifest.labels or None, loading_of(model))


def loading_of(model: str | None) -> dict[str, Any]:
    """The options of `load_data` with which an artifact was trained; none for other models."""
    if model is None or kind_of(model) != "artifact":
        return {}
    from trimtab.core.artifact import read_manifest

    return (read_manifest(folder_of(model)).provenance or {}).get("loading") or {}


def by_name(name: str, **kwargs: Any) -> nn.Module:
    """A fresh model from the registry."""
    from trimtab.models import create_model, list_models

    known = list_models()
    bare = name.split(".")[0]
    if bare not in known and not name.startswith(HUB):
        raise typer.BadParameter(f"no model is called {name!r}{near(bare, known)}")
    return create_model(name, **kwargs)


def model_and_data(
    model: str | None,
    source: str,
    *,
    size: int | None = None,
    weights: Path | None,
    pretrained: bool,
    seed: int,
    task: str | None = None,
    loading: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Data]:
    """What to train, and on what: an artifact with data in its shape, or a model made for the data.

    model: None for the task's `USUAL`, or `USUAL_VOLUMES`. loading: more options of `load_data`.
    """
    loading = dict(loading or {})
    if model is not None and kind_of(model) == "artifact":
        if size or weights or pretrained:
            raise typer.BadParameter("an artifact has its own size and weights; drop --size, --weights, --pretrained")
        kept = artifact(model)
        if task not in (None, kept.task):
            raise typer.BadParameter(f"{model} was trained for task {kept.task!r}, got --task {task}")
        return kept.model, replace(kept, loading={**kept.loading, **loading}).load_data(source, seed)
    if weights and pretrained:
        raise typer.BadParameter("give --weights or --pretrained, not both")
    from trimtab.data import load_data
    from trimtab.models.factory import shape_for

    with wrong_use():
        check_loading(source, task, loading)
    if size:
        loading["image_size"] = size
    loaded: Any = load_data(source, task=task, seed=seed, **loading)
    model = model or (USUAL_VOLUMES if len(loaded.size) == 3 else USUAL[task or "classify"])
    return by_name(model, **shape_for(loaded), weights=weights, pretrained=pretrained, seed=seed), loaded


def check_loading(source: str, task: str | None, loading: Mapping[str, Any]) -> None:
    """Raises ValueError when `load_data` has no such option for the data and the task."""
    from trimtab.data.load import options_of

    known = (*options_of(source, task), "in_chans", "val", "test", "limit")
    for name in loading:
        if name not in known:
            raise ValueError(f"--load takes {', '.join(known)} for task {task or 'classify'!r}, got {name!r}")


def cost_of(net: nn.Module, data: Data) -> dict[str, Any]:
    """Cost of one image of the data, without the layers."""
    from trimtab import measure as measure_model

    return {k: v for k, v in measure_model(net, data.spec.size).asdict().items() if k != "layers"}


def keep(net: nn.Module, data: Data, out: Path, step: str, **how: Any) -> dict[str, Any]:
    """Test, measure and save a model; gives what is to be said about it."""
    import trimtab as tt
    from trimtab.core import host

    metrics = tt.evaluate(net, data, "test" if "test" in data.splits else "val")
    cost = cost_of(net, data)
    provenance = {"step": step, **how, "data": data.name, "machine": host.machine(), "versions": host.versions()}
    path = tt.save(
        net, out, spec=data.spec, labels=data.class_names, cost=cost, metrics=metrics, provenance=plain(provenance)
    )
    scores = {k: v for k, v in metrics.items() if k not in ("n", "loss")}
    return {"model": str(path), "cost": cost, **scores, "images": metrics["n"]}


def measured(
    model: str,
    size: tuple[int, ...] | None,
    *,
    what: Sequence[str],
    per_layer: bool,
    threads: int,
    num_classes: int | None,
) -> Cost:
    """The cost of whatever `model` is."""
    kind = kind_of(model)
    if num_classes is not None and kind != "name":
        raise typer.BadParameter(f"--num-classes is for registry names; {model} has its own classes")
    if kind == "parts":
        raise typer.BadParameter(f"{model} has several .onnx files; measure one of them")
    if kind == "onnx":
        from trimtab.core.cost import measure_onnx

        return measure_onnx(model, what=what, per_layer=per_layer, threads=threads, input_size=size)
    from trimtab.core.cost import measure as measure_model

    if kind == "artifact":
        kept = artifact(model)
        net, size = kept.model, size or (kept.spec.size if kept.spec else None)
        if size is None:
            raise typer.BadParameter(f"{model} does not say what input it takes; give --input C,H,W")
    else:
        kwargs: dict[str, Any] = {"in_chans": size[0], "img_size": size[1:]} if size else {}
        net = by_name(model, num_classes=num_classes, **kwargs)
        size = size or _usual_input(net)
    return measure_model(net, size, what=what, per_layer=per_layer, threads=threads)


def _usual_input(net: nn.Module) -> tuple[int, ...]:
    """What a registry model is usually given (timm keeps it with the weights)."""
    config = getattr(net, "pretrained_cfg", None) or getattr(net, "default_cfg", None) or {}
    usual = config.get("input_size") if hasattr(config, "get") else None
    return tuple(usual) if usual else (3, 224, 224)


def predicted(model: str, files: list[Path], top: int) -> list[dict[str, Any]]:
    """The `top` labels of every image, with confidences."""
    kind = kind_of(model)
    if kind == "name":
        raise typer.BadParameter(f"{model} must be an artifact folder or an .onnx file: a bare name knows no weights")
    if kind in ("onnx", "parts"):
        from trimtab import deploy

        opened = next((f for name, f in FOLDERS.items() if (Path(model) / name).is_file()), "OnnxModel")
        found = getattr(deploy, opened)(model).predict(files)
        ranked = [list(p.top) for p in found]
    else:
        ranked = _predicted_by_artifact(model, files)
    return _best(files, ranked, top)


def asked(folder: str, files: list[Path], top: int, server: str | None, deadline: float) -> list[dict[str, Any]]:
    """The `top` labels of every image by both parts of a split model, with the bytes of each code."""
    if server is None:
        raise typer.BadParameter(f"{folder} is one part of a split model; give --server, the address of the other")
    if not (Path(folder) / "split.json").is_file():
        raise typer.BadParameter(f"--server is for the parts of a split model, and {folder} has no split.json")
    from trimtab.deploy.runtime import softmax
    from trimtab.deploy.split.device import Device

    with wrong_use():
        device = Device(folder, server, deadline=deadline)
    ranked, payloads = [], []
    for file in files:
        answer = device(file)
        payloads.append(answer.payload)
        pairs = zip(device.parts.labels, softmax(answer.logits).tolist(), strict=True)
        ranked.append(sorted(pairs, key=lambda pair: -pair[1]))
    return [value | {"payload": n} for value, n in zip(_best(files, ranked, top), payloads, strict=True)]


def _best(files: list[Path], ranked: Sequence[Sequence[tuple[str, float]]], top: int) -> list[dict[str, Any]]:
    answers = []
    for file, pairs in zip(files, ranked, strict=True):
        best = [{"label": label, "confidence": float(p)} for label, p in pairs[:top]]
        answers.append({"image": str(file), **best[0], **({"top": best} if top > 1 else {})})
    return answers


def seen(
    model: str, spec: InputSpec | None, files: list[Path], out: Path | None, least: float
) -> list[dict[str, Any]] | None:
    """What a network that segments, detects or restores sees in every image, drawn to `out`; None for a classifier.

    spec: what the model is fed (`spec_of`).
    """
    if spec is None or spec.task == "classify":
        return None
    if spec.task == "restore" and out is None:
        raise typer.BadParameter("give --out, a folder for the restored pictures")
    from trimtab.cli import pictures
    from trimtab.deploy import OnnxVision, OnnxVolumes

    volumes = len(spec.size) == 4
    if kind_of(model) == "artifact":
        vision: Any = artifact(model).vision(least=least)
    else:
        vision = OnnxVolumes(model) if volumes else OnnxVision(model, least=least)
    told: Any = pictures.told_of_volume if volumes else pictures.told
    return [told(vision, file, out, files) for file in files]


def spec_of(model: str) -> InputSpec | None:
    """What an artifact or an .onnx file is fed; None where that is not known, and for several files."""
    kind = kind_of(model)
    if kind == "onnx":
        from trimtab.deploy.runtime import read_notes

        return read_notes(model)[0]
    if kind != "artifact":
        return None
    from trimtab.core.artifact import read_manifest

    return read_manifest(folder_of(model)).input_spec


def _predicted_by_artifact(model: str, files: list[Path]) -> list[list[tuple[str, float]]]:
    import torch

    from trimtab.data import preprocess

    kept = artifact(model)
    spec, labels = kept.spec, kept.labels
    if spec is None:
        raise ValueError(f"{model} does not say what input it takes, so images cannot be prepared for it")
    ranked = []
    with torch.inference_mode():
        for file in files:
            x = torch.from_numpy(preprocess(file, spec)).unsqueeze(0)  # (1, C, H, W)
            p = kept.model(x).float().softmax(-1)[0]
            order = p.argsort(descending=True).tolist()
            ranked.append([(labels[i] if labels else str(i), float(p[i])) for i in order])
    return ranked


def image_files(paths: Sequence[Path], *, volumes: bool = False) -> list[Path]:
    """The files named, and the pictures, or volumes, in the folders named."""
    from trimtab.data.volume_files import ENDINGS

    pictures = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
    known = ENDINGS if volumes else pictures
    files: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.name.lower().endswith(known)) if path.is_dir() else [path]
        if not inside:
            raise typer.BadParameter(f"no {'volumes' if volumes else 'images'} in {path}")
        files += inside
    return files


def one_data(argument: str | None, option: str | None, usual: str = "digits") -> str:
    """The data, given as DATA or as ``--data``."""
    if argument is not None and option is not None:
        raise typer.BadParameter("give the data once, as DATA or as --data")
    return argument or option or usual


def task_of(text: str | None) -> str:
    """A task by its word."""
    from trimtab.data.load import TASKS

    if text is not None and text not in TASKS:
        raise typer.BadParameter(f"--task must be one of {', '.join(TASKS)}, got {text!r}")
    return text or "classify"


def budget_of(text: str | None) -> Budget | None:
    """A budget, read at the door: a wrong one is wrong use."""
    if text is None:
        return None
    from trimtab.core.budget import Budget

    with wrong_use():
        return Budget(text)


@contextlib.contextmanager
def wrong_use() -> Iterator[None]:
    """A ValueError in here means that an argument is wrong."""
    try:
        yield
    except ValueError as e:
        raise typer.BadParameter(str(e)) from None


def options_of(given: Sequence[str] | None, flag: str = "--set") -> dict[str, Any]:
    """``NAME=VALUE`` pairs; values as in YAML: numbers, true, words, [lists].

    >>> options_of(["norm=1", "scope=local", "widths=[8, 16]"])
    {'norm': 1, 'scope': 'local', 'widths': [8, 16]}
    """
    import yaml

    options = {}
    for pair in given or ():
        name, sign, value = pair.partition("=")
        if not sign or not name.strip().isidentifier():
            raise typer.BadParameter(f"{flag} must be NAME=VALUE, such as norm=1, got {pair!r}")
        try:
            options[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise typer.BadParameter(f"{flag} {name.strip()}: {value!r} is not a value") from None
    return options


def size_of(text: str) -> tuple[int, ...]:
    """``3,224,224`` or ``3x224x224`` or ``224`` (then three channels); ``4,32,32,32`` for volumes.

    >>> size_of("1,28,28"), size_of("224"), size_of("4,16,32,32")
    ((1, 28, 28), (3, 224, 224), (4, 16, 32, 32))
    """
    try:
        numbers = [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers = [3, numbers[0], numbers[0]]
    if len(numbers) not in (3, 4) or min(numbers) < 1:
        raise typer.BadParameter(f"--input must be C,H,W, such as 3,224,224, or C,D,H,W for volumes, got {text!r}")
    return tuple(numbers)


def seconds_of(text: str) -> float:
    """``90s``, ``10m``, ``2h`` or plain seconds.

    >>> seconds_of("90s"), seconds_of("1.5m"), seconds_of("20")
    (90.0, 90.0, 20.0)
    """
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        value = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"a time must be like 90s, 10m or 2h, got {text!r}")
    return value


def near(name: str, known: Collection[str]) -> str:
    """A question about names that are alike, to end an error with; empty when there are none."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
