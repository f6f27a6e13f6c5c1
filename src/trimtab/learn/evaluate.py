"""Evaluation: how good a model is on a split."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.errors import DataError
from trimtab.learn.objective import Batch, Objective
from trimtab.nn.modes import eval_mode


def evaluate(
    model: nn.Module,
    data: Any,
    split: str = "test",
    *,
    objective: Objective | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """How good a model is on a split.

    Args:
        objective: gives the prediction, where that is more than what the task's own objective predicts.
        device: where to run; by default where the model is. The model comes back to where it was, in its mode.
        metrics: more torchmetrics by name, updated with (prediction, target): logits and labels, pictures and
            high-resolution pictures, or detections and objects as lists of dicts.

    Returns:
        ``n``, the number of images, the names in `metrics`, and by ``data.task``: classify: ``accuracy`` and ``loss``
        (cross-entropy). segment: ``miou`` (mean intersection over union), ``accuracy`` and ``loss`` of pixels; of
        volumes also ``dice`` (the mean coefficient) and ``dice_NAME`` of each region or class; larger ones than
        ``data.size`` are seen whole, in windows that overlap by half. detect:
        ``map`` (COCO's mean average precision) and ``ap50``. restore: ``psnr`` in dB and ``ssim``, on luma.

    Raises:
        DataError: there is no such split, or it is empty.
    """
    if getattr(data, "task", "classify") != "classify":
        return _evaluate_task(model, data, split, metrics or {}, objective, batch_size=batch_size, device=device)
    from torchmetrics import MeanMetric
    from torchmetrics.classification import MulticlassAccuracy

    loss: Any = MeanMetric(sync_on_compute=False).set_dtype(torch.float64)
    accuracy: Any = None
    n = 0
    for logits, batch in predictions(model, data, split, objective=objective, batch_size=batch_size, device=device):
        if accuracy is None:
            accuracy = MulticlassAccuracy(num_classes=logits.shape[1], average="micro", sync_on_compute=False)
            accuracy, loss = accuracy.to(logits.device), loss.to(logits.device)
        label = batch["label"]
        accuracy.update(logits, label)
        loss.update(F.cross_entropy(logits, label, reduction="none"))
        for metric in (metrics or {}).values():
            metric.update(logits, label)
        n += len(label)
    if accuracy is None:
        raise DataError(f"split {split!r} is empty")
    more = {name: _plain(metric.compute()) for name, metric in (metrics or {}).items()}
    return {"accuracy": float(accuracy.compute()), "loss": float(loss.compute()), "n": n, **more}


def _evaluate_task(
    model: nn.Module, data: Any, split: str, metrics: Mapping[str, Any], objective: Objective | None, **where: Any
) -> dict[str, Any]:
    from trimtab.learn.tasks import task_of

    task = task_of(data)
    tally, n = task.measure(data, True), 0
    for out, batch in predictions(model, data, split, objective=objective, whole=True, **where):
        target = task.target(batch)
        tally.update(out, target)
        for metric in metrics.values():
            metric.update(out, target)
        n += len(batch["image"])
    if not n:
        raise DataError(f"split {split!r} is empty")
    return {**tally.compute(), "n": n, **{name: _plain(metric.compute()) for name, metric in metrics.items()}}


def logits(
    model: nn.Module,
    data: Any,
    split: str = "test",
    *,
    objective: Objective | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """All logits (N, K) and labels (N,) of a split in its order, on the CPU."""
    rows = [
        (out.cpu(), batch["label"].cpu())
        for out, batch in predictions(model, data, split, objective=objective, batch_size=batch_size, device=device)
    ]
    if not rows:
        raise DataError(f"split {split!r} is empty")
    return torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])


def evaluate_sets(
    model: nn.Module,
    data: Any,
    sets: str | os.PathLike[str],
    split: str = "test",
    *,
    most: int = 5,
    min_size: int = 100,
) -> dict[str, Any]:
    """How good a classifier is where an image may have several valid labels, see `data.MultiLabelAccuracy`.

    Args:
        sets: a file with all valid labels of each image of the split, by name: JSON or CSV.
        most, min_size: ASMA averages groups of up to so many labels, and of at least so many images.

    Raises:
        DataError: there is no such split, or an image is not in the file.
    """
    from trimtab.data.curate.imagenet_multilabel import MultiLabelAccuracy, multi_hot, read_label_sets

    if split not in data.splits:
        raise DataError(f"split must be one of {', '.join(data.splits)}, got {split!r}")
    valid = multi_hot(read_label_sets(sets, data.splits[split].names), data.num_classes)
    metric = MultiLabelAccuracy(data.num_classes, most=most, min_size=min_size, protocol=Path(sets).name)
    scores, label = logits(model, data, split)
    metric.update(scores, valid, label)
    return metric.compute()


def predictions(
    model: nn.Module,
    data: Any,
    split: str,
    *,
    objective: Objective | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    channels_last: bool = False,
    rank: int = 0,
    world: int = 1,
    whole: bool = False,
) -> Iterator[tuple[Any, Batch]]:
    """The prediction for each batch of a split, with the batch; no augmentation, no gradient, eval mode.

    For classifiers float32 logits (B, K); for other tasks what their objective predicts. Volumes that are larger than
    what a network is fed are seen in windows if they are wanted `whole`; otherwise only their middles.
    """
    if split not in data.splits:
        raise DataError(f"split must be one of {', '.join(data.splits)}, got {split!r}")
    where = torch.device(device) if device is not None else device_of(model)
    predict = (objective or _usual(data)).predict
    whole = whole and len(getattr(data, "size", ())) == 3
    if whole:
        predict = partial(_in_windows, predict, data.size)
    loader = data.loader(
        split,
        batch_size=batch_size,
        shuffle=False,
        augment="whole" if whole else "none",
        drop_last=False,
        rank=rank,
        world=world,
        device=where,
    )
    with evaluating(model, where):
        for given in loader:
            batch = Batch(given).to(where)
            if len(batch["image"]) == 0:  # a rank may get nothing of a short last batch
                continue
            if channels_last:
                batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                out = predict(model, batch)
            yield out.float() if isinstance(out, Tensor) else out, batch


def _in_windows(predict: Callable[..., Any], window: tuple[int, int, int], model: nn.Module, batch: Batch) -> Tensor:
    """Logits (1, K, D, H, W) for one volume of any size."""
    from trimtab.data.volumes import in_windows

    def run(x: Any) -> Any:
        return predict(model, Batch(image=torch.from_numpy(x)).to(home)).float().cpu().numpy()

    home = batch["image"].device
    (volume,) = batch["image"].cpu().numpy()
    return torch.from_numpy(in_windows(run, volume, window))[None].to(home)


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model in eval mode on a device; afterwards every submodule is in the mode and place it was in."""
    home = device_of(model)
    with eval_mode(model):
        if home != device:
            model.to(device)
        try:
            yield
        finally:
            if home != device:
                model.to(home)


class Tally:
    """Accuracy and loss by counting, for the loop: torchmetrics alone costs seconds to import."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # correct, loss, n

    def update(self, logits: Tensor, label: Tensor) -> None:
        correct = (logits.argmax(1) == label).sum()
        loss = F.cross_entropy(logits, label, reduction="sum")
        sums = torch.stack([correct.double(), loss.double(), torch.full_like(loss, len(label)).double()])
        self.sums = sums if self.sums is None else self.sums + sums

    def compute(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        sums = self.sums if self.sums is not None else torch.zeros(3, dtype=torch.float64)
        correct, loss, n = (sums if reduce is None else reduce(sums)).tolist()
        if n == 0:
            raise DataError("the validation split is empty")
        return {"accuracy": correct / n, "loss": loss / n}


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter (or buffer) of a model is."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return first.device if first is not None else torch.device("cpu")


def _usual(data: Any) -> Objective:
    """The objective of the data's task."""
    if getattr(data, "task", "classify") == "classify":
        return Objective()
    from trimtab.learn.tasks import task_of

    return task_of(data).objective()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value
