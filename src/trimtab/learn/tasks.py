"""Tasks: what a model is asked, hence which objective is the default, and by what number validation judges it.

A task is known by the word in ``data.task``. Its objective gives predictions (`Objective.predict`), its tally counts
how good they are, batch by batch, and adds up over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.errors import DataError, need
from trimtab.data.images import VOID
from trimtab.learn.evaluate import Tally
from trimtab.learn.losses import soft_ce
from trimtab.learn.objective import Batch, Classify, Context, Losses, Objective, check_logits, probe
from trimtab.nn.modes import eval_mode

Reduce = Callable[[Tensor], Tensor]  # the sum over processes


class Measure(Protocol):
    """Counts how good predictions are."""

    def update(self, out: Any, target: Any) -> None:
        """Count a batch: what was predicted, and what is true."""

    def compute(self, reduce: Reduce | None = None) -> dict[str, float]:
        """The scores by name, of all processes together. Raises DataError when nothing was counted."""


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        objective: what is minimised by default.
        measure: (data, full) -> what counts, for validation; full: for evaluation, where it may take longer.
        target: batch -> what predictions are compared with.
        scores: what validation gives; it maximises the first.
        unit: of the first score: "share", or a unit in words.
        opt, batch_size: defaults of `fit`.
    """

    objective: type[Objective]
    measure: Callable[[Any, bool], Measure]
    target: Callable[[Mapping[str, Any]], Any]
    scores: tuple[str, ...]
    unit: str = "share"
    opt: str = "adamw"
    batch_size: int = 16

    def rank(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """Of a row of the history; higher is better, and of equal scores the one with less loss."""
        return row[f"val_{self.scores[0]}"], -row.get("val_loss", 0.0)

    def words(self, value: float) -> str:
        """The first score for people."""
        return f"{value:.2%}" if self.unit == "share" else f"{value:.2f} {self.unit}"


def task_of(data: Any) -> Task:
    """The task that some data are for.

    Raises:
        DataError: there is no such task.
    """
    name = getattr(data, "task", "classify")
    if name not in TASKS:
        raise DataError(f"data.task must be one of {', '.join(TASKS)}, got {name!r}")
    return VOLUMES if name == "segment" and len(getattr(data, "size", ())) == 3 else TASKS[name]


# ----------------------------------------------------------------------------------------------------------- objectives


class Segment(Objective):
    """Cross-entropy of every pixel, without those that are void (255).

    A model with a loss of its own, a method ``criterion(outputs, batch)``, learns with that. A model that gives several
    logits while it trains (deep supervision, from full resolution down) has a loss on each, every next one weighing
    half; labels are thinned out to their sizes.

    Args:
        smoothing: label smoothing.
    """

    def __init__(self, *, smoothing: float = 0.0) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        self.smoothing = smoothing
        self._classes = 0

    def prepare(self, data: Any, settings: Any, device: torch.device) -> Any:
        self._classes = data.num_classes
        return data

    def setup(self, model: nn.Module, batch: Batch) -> None:
        logits, label = probe(self, model, batch), batch["label"][:2]
        if label.ndim == batch["image"].ndim:  # masks of regions, which may overlap
            if not callable(getattr(model, "criterion", None)):
                raise ValueError(
                    f"regions that may overlap need a model with a loss for them, a method criterion(outputs, batch); "
                    f"{type(model).__name__} has none"
                )
            if not isinstance(logits, Tensor) or logits.shape != label.shape:
                got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"the model must give logits {tuple(label.shape)}, one for each mask, got {got}")
            return
        classes = check_logits(logits, batch)
        if classes < self._classes:
            raise ValueError(f"the model must have {self._classes} classes for these data, got {classes}")

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        out: Any = model(batch["image"])
        own = getattr(model, "criterion", None)
        if callable(own):
            return own(out, batch)
        outs = [out] if isinstance(out, Tensor) else list(out)
        weights = [0.5**i for i in range(len(outs))]
        return sum(
            (w / sum(weights) * self._loss(o, batch["label"]) for w, o in zip(weights, outs)),
            start=torch.zeros((), device=batch["image"].device),
        )

    def _loss(self, logits: Tensor, label: Tensor) -> Tensor:
        if logits.shape[2:] != label.shape[1:]:
            label = F.interpolate(label[:, None].float(), logits.shape[2:], mode="nearest")[:, 0].long()
        if (label == VOID).all():  # a mean over no pixel would be NaN
            return 0.0 * logits.sum()
        return soft_ce(logits, label, smoothing=self.smoothing)


class Detect(Objective):
    """The loss of the detector itself: the sum of what ``model.criterion(outputs, batch)`` gives."""

    def setup(self, model: nn.Module, batch: Batch) -> None:
        for name in ("criterion", "decode"):
            if not callable(getattr(model, name, None)):
                raise ValueError(
                    f"a detector must have a method {name!r}, {type(model).__name__} has none; models that classify or "
                    "segment cannot be trained to detect"
                )
        with eval_mode(model), torch.no_grad():
            out = model(batch["image"][:2])
        if not isinstance(out, tuple) or not all(isinstance(o, Tensor) for o in out):
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"a detector must give a tuple of tensors, got {got}")

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        criterion: Any = model.criterion
        return criterion(model(batch["image"]), batch)

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        """``[{"boxes" (N, 4), "scores" (N,), "labels" (N,)}, ...]``, one for each picture."""
        decode: Any = model.decode
        return decode(model(batch["image"]))


class Restore(Objective):
    """The distance between the model's picture and the high-resolution one.

    Args:
        loss: "l1" (mean absolute difference), or "mse" (mean squared difference).
    """

    def __init__(self, *, loss: str = "l1") -> None:
        if loss not in ("l1", "mse"):
            raise ValueError(f"loss must be l1 or mse, got {loss!r}")
        self.loss = loss

    def setup(self, model: nn.Module, batch: Batch) -> None:
        out, high = probe(self, model, batch), batch["high"][:2]
        if not isinstance(out, Tensor) or out.shape != high.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            low = tuple(batch["image"][:2].shape)
            raise ValueError(f"the model must give pictures {tuple(high.shape)} for inputs {low}, got {got}")

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        distance = F.l1_loss if self.loss == "l1" else F.mse_loss
        return distance(model(batch["image"]), batch["high"])


# -------------------------------------------------------------------------------------------------------------- tallies


class SegmentTally:
    """Mean intersection over union of the classes that are there, accuracy and loss over pixels; void is left out.

    Args:
        num_classes: what a model says beyond these is wrong.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.sums: Tensor | None = None  # true x predicted class, then the loss

    def update(self, logits: Tensor, label: Tensor) -> None:
        k = self.num_classes
        real = label != VOID
        pairs = label[real] * (k + 1) + logits.argmax(1)[real].clamp(max=k)
        loss = F.cross_entropy(logits, label, ignore_index=VOID, reduction="sum")
        sums = torch.cat([torch.bincount(pairs, minlength=k * (k + 1)).double(), loss.double()[None]])
        self.sums = sums if self.sums is None else self.sums + sums

    def compute(self, reduce: Reduce | None = None) -> dict[str, float]:
        k = self.num_classes
        sums = torch.zeros(k * (k + 1) + 1, dtype=torch.float64) if self.sums is None else self.sums
        sums = (sums if reduce is None else reduce(sums)).cpu()
        pairs = sums[:-1].view(k, k + 1)
        pixels, hit = float(pairs.sum()), pairs.diagonal()
        if pixels == 0:
            raise DataError("the split has no pixel that counts")
        union = pairs.sum(1) + pairs[:, :k].sum(0) - hit
        iou = hit[union > 0] / union[union > 0]
        return {"miou": float(iou.mean()), "accuracy": float(hit.sum()) / pixels, "loss": float(sums[-1]) / pixels}


class VolumeTally:
    """Dice coefficients, mean intersection over union, accuracy and loss of volumes.

    The coefficient of a region, 2 |found and there| / (|found| + |there|), is the mean over volumes, as the field's
    tables have it; it is 1 where the region is neither there nor found. Where voxels have one class each, the first is
    the ground, and has none. The others count the voxels of all volumes together; voxels that are void are left out.

    Args:
        names: of the regions, or of the classes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        # by class: coefficients, intersections, unions; then loss, hits, places, volumes, and of these with a ground
        self.sums: Tensor | None = None

    def update(self, logits: Tensor, label: Tensor) -> None:
        k, overlap = len(self.names), label.ndim == logits.ndim
        if overlap:
            found, there = logits[:, :k] > 0, label > 0.5
            loss = F.binary_cross_entropy_with_logits(logits[:, :k], label.to(logits.dtype), reduction="sum")
            hits, places = (found == there).sum(), label.numel()
        else:
            best, real = logits.argmax(1), label != VOID
            found, there = (torch.stack([(x == c) & real for c in range(k)], 1) for x in (best, label))
            loss = F.cross_entropy(logits, label, ignore_index=VOID, reduction="sum")
            hits, places = ((best == label) & real).sum(), int(real.sum())
        both = (found & there).flatten(2).sum(2)  # (B, K)
        each = found.flatten(2).sum(2) + there.flatten(2).sum(2)
        dice = torch.where(each > 0, 2 * both.double() / each.clamp(min=1), 1.0)
        by_class = torch.cat([dice.sum(0), both.sum(0).double(), (each - both).sum(0).double()])
        volumes = len(label)
        counts = [float(loss), float(hits), places, volumes, 0 if overlap else volumes]
        sums = torch.cat([by_class, by_class.new_tensor(counts)])
        self.sums = sums if self.sums is None else self.sums + sums

    def compute(self, reduce: Reduce | None = None) -> dict[str, float]:
        k = len(self.names)
        sums = torch.zeros(3 * k + 5, dtype=torch.float64) if self.sums is None else self.sums
        sums = (sums if reduce is None else reduce(sums)).cpu()
        dice, both, either = sums[:-5].view(3, k)
        loss, hits, places, volumes, grounds = sums[-5:].tolist()
        if places == 0:
            raise DataError("the split has no voxel that counts")
        first = int(grounds > 0)
        names, dice = self.names[first:], dice[first:] / volumes
        iou = both[either > 0] / either[either > 0]
        return {
            "dice": float(dice.mean()),
            **{f"dice_{name}": value for name, value in zip(names, dice.tolist(), strict=True)},
            "miou": float(iou.mean()),
            "accuracy": hits / places,
            "loss": loss / places,
        }


class DetectTally:
    """Mean average precision as COCO has it, and at an intersection over union of one half."""

    def __init__(self) -> None:
        self.rows: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def update(self, found: list[dict[str, Tensor]], there: list[dict[str, Tensor]]) -> None:
        for pair in zip(found, there, strict=True):
            ours, theirs = ({k: v.detach().cpu() for k, v in side.items()} for side in pair)
            self.rows.append((ours, theirs))

    def compute(self, reduce: Reduce | None = None) -> dict[str, float]:
        need("pycocotools", "detect")
        from torchmetrics.detection import MeanAveragePrecision

        rows = self.rows
        if reduce is not None:  # several processes: pictures cannot be added up
            from accelerate.utils import gather_object

            rows = gather_object(rows)
        if not rows:
            raise DataError("the split has no pictures")
        metric = MeanAveragePrecision(sync_on_compute=False)
        metric.warn_on_many_detections = False
        metric.update([r[0] for r in rows], [r[1] for r in rows])
        values = metric.compute()
        return {"map": max(0.0, float(values["map"])), "ap50": max(0.0, float(values["map_50"]))}


class RestoreTally:
    """The mean of every picture's PSNR in dB (and SSIM, if `full`) on luma, as the field's tables have them.

    Args:
        border: pixels that are left out on every side.
    """

    def __init__(self, border: int, full: bool) -> None:
        from trimtab.learn import image_quality

        self.border = border
        self.measures = {"psnr": image_quality.psnr} | ({"ssim": image_quality.ssim} if full else {})
        self.sums: Tensor | None = None

    def update(self, out: Tensor, high: Tensor) -> None:
        values = [m(out, high, border=self.border).sum() for m in self.measures.values()]
        sums = torch.stack([*values, torch.full_like(values[0], len(high))])
        self.sums = sums if self.sums is None else self.sums + sums

    def compute(self, reduce: Reduce | None = None) -> dict[str, float]:
        sums = torch.zeros(len(self.measures) + 1, dtype=torch.float64) if self.sums is None else self.sums
        *totals, n = (sums if reduce is None else reduce(sums)).tolist()
        if n == 0:
            raise DataError("the split has no pictures")
        return {name: total / n for name, total in zip(self.measures, totals)}


def _label(batch: Mapping[str, Any]) -> Any:
    return batch["label"]


def _high(batch: Mapping[str, Any]) -> Any:
    return batch["high"]


def _objects(batch: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """What is there in each picture, without the padding."""
    return [
        {"boxes": boxes[labels >= 0], "labels": labels[labels >= 0]}
        for boxes, labels in zip(batch["boxes"], batch["box_label"])
    ]


TASKS = {
    "classify": Task(
        Classify, lambda data, full: Tally(), _label, ("accuracy", "loss"), opt="sgd", batch_size=128,
    ),
    "segment": Task(
        Segment, lambda data, full: SegmentTally(data.num_classes), _label, ("miou", "accuracy", "loss"),
    ),
    "detect": Task(Detect, lambda data, full: DetectTally(), _objects, ("map", "ap50")),
    "restore": Task(Restore, lambda data, full: RestoreTally(data.scale, full), _high, ("psnr",), unit="dB"),
}  # fmt: skip
VOLUMES = Task(  # segmentation in three dimensions
    Segment, lambda data, full: VolumeTally(data.class_names), _label, ("dice", "miou", "accuracy", "loss"),
    batch_size=2,
)  # fmt: skip
