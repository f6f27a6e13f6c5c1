"""Adaptation by name: what the command line and recipes use to call a method that is chosen at run time.

Most methods learn a stream: `method(model, stream, ...)` gives a `StreamResult`. `hvcm` learns classes, and is measured
on images of others. Adapters are trained in a frozen network: `method(model, data, ...)`.
"""

from __future__ import annotations

from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.core import options as options_of
from trimtab.data import Data, load_data
from trimtab.learn import options as training

STREAMED = ("finetune", "joint", "replay", "nmc", "slca", "adab2n")
INSERTED = ("adapters", "compacter")
STREAM: dict[str, Any] = {"kind": "class", "tasks": 5, "sizes": None, "order": None, "shift": "rotate", "seed": 0}
STRANGE: dict[str, Any] = {"hold_out": None, "strange": ()}
CLUSTERS: dict[str, Any] = {"clusters": None}
FREE = ("out", "resume", "progress")  # said to all methods; those that do not take them do not hear it


@dataclass(frozen=True)
class Adapted:
    """What came of an adaptation.

    Attributes:
        model: the adapted model. data: what it knows: all classes, or those that were not held out.
        report: accuracies and metrics, as JSON values.
    """

    model: nn.Module
    data: Data
    report: dict[str, Any]


def names() -> list[str]:
    """All methods.

    >>> names()
    ['adab2n', 'adapters', 'compacter', 'finetune', 'hvcm', 'joint', 'mlc', 'nmc', 'replay', 'slca']
    """
    return sorted([*STREAMED, *INSERTED, "hvcm", "mlc"])


def parameters(method: str) -> dict[str, Any]:
    """Options of a method and of its stream, with defaults; those of `fit` where the method trains.

    Raises:
        ValueError: there is no such method; those there are are named.

    >>> parameters("nmc")["metric"], parameters("slca")["tasks"]
    ('euclidean', 5)
    """
    if method not in names():
        raise ValueError(f"method must be one of {', '.join(names())}, got {method!r}")
    more = STREAM if method in STREAMED else STRANGE if method == "hvcm" else {}
    return more | training.parameters(_find(method)) | (CLUSTERS if method == "mlc" else {})


def check(method: str, options: dict[str, Any]) -> None:
    """Raises ValueError when the method has no such option."""
    options_of.check(method, options, parameters(method))


def run(method: str, model: nn.Module, data: Data, **options: Any) -> Adapted:
    """Adapt a model by a method's name; the model stays as it is.

    Args:
        **options: of the method, for streams also those of `make_stream`. For `hvcm`: `hold_out`, classes that are left
            out of training and are then strange, how many or which (numbers or names); `strange`, more data sets of
            strange images. For `mlc`: `clusters`, as many as classes or more.

    Raises:
        ValueError: an option is unknown or does not fit the data.
        KeyboardInterrupt: interrupted; what `out` has is resumed by the same call.
    """
    given = {k: v for k, v in options.items() if k not in FREE or k in parameters(method)}
    check(method, given)
    if method == "hvcm":
        return _density(model, data, **given)
    if method == "mlc":
        return _clusters(model, data, **given)
    if method in INSERTED:
        return _inserted(method, model, data, **given)
    from trimtab.learn.adapt.streams import make_stream

    own = training.parameters(_find(method))
    stream = make_stream(data, **{k: v for k, v in given.items() if k in STREAM})
    result = _find(method)(model, stream, **{k: v for k, v in given.items() if k in own})
    return Adapted(result.model, data, result.asdict())


def known(method: str, data: Data, **options: Any) -> Data:
    """The data as the adapted model knows them: without classes that were held out, with a name for every cluster.

    Args:
        **options: as for `run`.

    >>> data = load_data("digits")
    >>> known("hvcm", data, hold_out=[8, 9]).class_names[-1], known("mlc", data, clusters=12).class_names[-1]
    ('7', 'cluster 11')
    """
    if method == "hvcm" and options.get("hold_out") is not None:
        from trimtab.learn.adapt.ood import hold_out

        return hold_out(data, options["hold_out"], seed=options.get("seed", 0))[0]
    if method == "mlc" and (options.get("clusters") or 0) > data.num_classes:
        more = copy(data)
        more.class_names = [
            *data.class_names,
            *(f"cluster {i}" for i in range(data.num_classes, options["clusters"])),
        ]
        return more
    return data


def _find(method: str) -> Any:
    from trimtab.learn import adapt

    return getattr(adapt, method)


def _inserted(method: str, model: nn.Module, data: Data, *, out: Any = None, **given: Any) -> Adapted:
    """Trained adapters; beside the state of the training in `out`, the file that keeps them without the network."""
    from trimtab.learn.adapt.adapters import count, save_adapters

    small = _find(method)(model, data, out=out, **given)
    counted = count(small)
    report = {"method": method, **asdict(counted), "share": counted.share}
    if out is not None:
        file = Path(out) / "adapters.safetensors"
        report |= {"file": str(file), "bytes": save_adapters(small, file)}
    return Adapted(small, data, report)


def _clusters(
    model: nn.Module, data: Data, *, clusters: int | None = None, seed: int = 0, **given: Any
) -> Adapted:  # fmt: skip
    """MLC, and beside it the usual clusters of the same features. Each gets the name of the class that fits it best."""
    from trimtab.learn.adapt.metrics import cluster_metrics
    from trimtab.learn.adapt.mlc import mlc, rivals

    k = clusters if clusters is not None else data.num_classes
    if k < data.num_classes:
        raise ValueError(
            f"clusters must be at least {data.num_classes}, the classes of the data, so that the model can be "
            f"evaluated, got {k}; trimtab.learn.adapt.mlc takes any number"
        )
    labels = data.splits["train"].labels
    found = mlc(model, data, clusters=k, seed=seed, **given).named(labels)
    same = {"mlc": found.labels[found.rows], **rivals(found.features[found.rows], k, seed=seed)}
    report = {
        "method": "mlc", "clusters": k, "images": len(found.rows),
        "clustering": {name: cluster_metrics(c, labels[found.rows]) for name, c in same.items()},
    }  # fmt: skip
    return Adapted(found.model, known("mlc", data, clusters=k), report)


def _density(
    model: nn.Module,
    data: Data,
    *,
    hold_out: Any = None,
    strange: Any = (),
    seed: int = 0,
    out: Any = None,
    **given: Any,
) -> Adapted:
    """HVCM, and beside it the same network trained as a classifier as long, with the usual scores."""
    from trimtab.learn.adapt import baselines, hvcm, ood
    from trimtab.learn.adapt.hvcm import hvcm_scores
    from trimtab.learn.evaluate import evaluate

    own, sets = data, {}
    if hold_out is not None:
        own, sets["held out"] = ood.hold_out(data, hold_out, seed=seed)
    paths = [strange] if isinstance(strange, str) else list(strange)
    shape: dict[str, Any] = {"image_size": data.size, "in_chans": data.in_chans}
    sets |= ood.strangers(own, {path: load_data(path, **shape) for path in paths})
    sets["noise"] = ood.noise(own, seed=seed)
    folder = Path(out) if out is not None else None
    learned = hvcm(model, own, seed=seed, out=folder / "hvcm" if folder else None, **given)
    how = {k: v for k, v in given.items() if k in training.parameters(baselines.classifier)}
    plain = baselines.classifier(model, own, seed=seed, out=folder / "classifier" if folder else None, **how)
    scores = {"hvcm": lambda other, split: hvcm_scores(learned, other, split), **ood.post_hoc(plain, own)}
    accuracy = {"hvcm": evaluate(learned, own)["accuracy"], "classifier": evaluate(plain, own)["accuracy"]}
    return Adapted(learned, own, {"method": "hvcm", "accuracy": accuracy, "ood": ood.compare(scores, own, sets)})
