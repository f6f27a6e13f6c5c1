"""TinyViT's fast pre-training distillation: stored sparse labels against the live teacher, and against hard labels.

Teacher and student are residual nets on images of 16 x 16 pixels. The teacher has learned from all training images; the
students learn from a part of them, each with the same views, steps and initial weights. Three seeds take about four
minutes of one CPU core.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from evidence.runner import ClaimResult, Context, stats
from evidence.step_cost import step_cost
from trimtab.core.cost import measure
from trimtab.learn import KD, Classify, FastDistill, Objective, evaluate, fit
from trimtab.learn.distill.tinyvit import LabelStore, Views, record, save_labels
from trimtab.models import create_model

LEVEL = 4
SPLIT = "test"
GIB = 2**30
TEACHER: dict[str, Any] = {"name": "trim_net", "widths": (16, 32, 64), "depths": (1, 1, 1), "strides": (1, 2, 2)}
STUDENT: dict[str, Any] = {"name": "trim_net", "widths": (6, 12, 24), "depths": (1, 1, 1), "strides": (1, 2, 2)}
KEPT = (3, 10)  # K
MODELS = {
    "tiny_vit_5m_224": (5_392_764, 1.255),
    "tiny_vit_11m_224": (10_996_972, 2.016),
    "tiny_vit_21m_224": (21_198_568, 4.250),
}


def run(context: Context) -> list[ClaimResult]:
    return [_storage(), _models(), *_students(context)]


def _storage() -> ClaimResult:
    one, all_ = 1_281_167 * 300 * record(10).itemsize, 14_197_122 * 90 * record(100).itemsize
    measured = {"imagenet_1k_gib": round(one / GIB, 2), "imagenet_22k_gib": round(all_ / GIB, 2)}
    return ClaimResult(
        "storage",
        measured == {"imagenet_1k_gib": 15.75, "imagenet_22k_gib": 480.76},
        measured | {"bytes_per_view": [record(10).itemsize, record(100).itemsize]},
        {"dense_22k_gib": round(14_197_122 * 90 * 2 * 21_841 / GIB)},
        note="K = 10 for 1k x 300 epochs, K = 100 for 22k x 90 epochs; against all probabilities in float16.",
    )


def _models() -> ClaimResult:
    measured: dict[str, Any] = {}
    for name in MODELS:
        with torch.device("meta"):
            cost = measure(timm.create_model(name, num_classes=1000), (3, 224, 224), what=("params", "macs"))
        assert cost.params is not None and cost.macs is not None
        measured[name] = (cost.params, round(cost.macs / 1e9, 3))
    return ClaimResult(
        "accuracy",
        measured == MODELS,
        measured,
        MODELS,
        note="Parameters and G MACs only; the accuracies need ImageNet.",
    )


def _students(context: Context) -> list[ClaimResult]:
    teaching, epochs = context.choose(full=(10, 30), smoke=(1, 1))
    images = context.choose(full=1000, smoke=128)
    names = ["hard labels", "live teacher", *(f"stored, K={k}" for k in KEPT)]
    accuracy: dict[str, list[float]] = {name: [] for name in ("teacher", *names)}
    ratios: dict[str, list[float]] = {"time": [], "memory": [], "training": []}
    drift: list[float] = []
    data: Any = None
    with tempfile.TemporaryDirectory(prefix="trimtab-labels-") as folder:
        for seed in context.each_seed():
            whole = context.load_data(limit=6000, image_size=16, seed=seed)
            data = whole.subset({"train": min(images, len(whole.splits["train"]))}, seed=seed)
            kind = {"num_classes": data.num_classes, "in_chans": data.in_chans, "img_size": data.size, "seed": seed}
            settings: dict[str, Any] = {
                "seed": seed,
                "val": None,
                "progress": False,
                "device": context.device,
                "batch_size": 64,
            }
            context.say(f"seed {seed}: teacher")
            teacher = fit(create_model(**TEACHER, **kind), whole, epochs=teaching, **settings).model
            accuracy["teacher"].append(_accuracy(teacher, data, context))
            stores = {
                k: save_labels(
                    Path(folder) / f"{seed}-{k}", teacher, data, epochs=epochs, topk=k, device=context.device,
                    progress=False,
                )
                for k in KEPT
            }  # fmt: skip
            views = stores[KEPT[-1]].views(data)
            taught: dict[str, tuple[Any, Objective]] = {
                "hard labels": (views, Classify()),
                "live teacher": (views, KD(teacher, T=1.0, alpha=1.0)),
            }
            taught |= {f"stored, K={k}": (data, FastDistill(stores[k].path)) for k in KEPT}
            seconds = {}
            for name, (used, objective) in taught.items():
                context.say(f"seed {seed}: {name}")
                done = fit(create_model(**STUDENT, **kind), used, objective, epochs=epochs, **settings)
                seconds[name] = done.seconds
                accuracy[name].append(_accuracy(done.model, data, context))
            ratios["training"].append(seconds[names[-1]] / seconds["live teacher"])
            step = _step(views, teacher, create_model(**STUDENT, **kind), stores[KEPT[-1]], context)
            for what in ("time", "memory"):
                ratios[what].append(step[f"{what}_ratio"])
            drift.append(_drift(views, teacher, context))
    mean = {name: sum(values) / len(values) for name, values in accuracy.items()}
    where = f"{data.name}, {len(data.splits['train'])} training images of 16 x 16, teacher {len(whole.splits['train'])}"
    macs = [measure(create_model(**net, **kind), data.spec.size, what="macs").macs or 0 for net in (TEACHER, STUDENT)]
    kept = {name: stats(accuracy[name]) for name in names[2:]}
    size = {f"bytes_per_view_K={k}": record(k).itemsize for k in KEPT}
    return [
        ClaimResult(
            "sparse_logits_equivalent",
            all(mean[f"stored, K={k}"] > mean["live teacher"] - 0.01 for k in KEPT)
            and max(drift) < 1e-3
            and max(ratios["time"]) < 1,
            kept
            | size
            | {
                "step_time": stats(ratios["time"]),
                "step_memory": stats(ratios["memory"]),
                "training_time": stats(ratios["training"]),
                "largest_error": max(drift),
            },
            {"live_teacher": stats(accuracy["live teacher"])},
            context.seeds,
            where,
            "Time and memory are shares of those with the live teacher; training_time includes making the views. "
            "largest_error: of stored probabilities (K = all) against those recomputed from replayed views. Holds: "
            "none more than a point behind the live teacher, at less time per step. The teacher costs only "
            f"{macs[0] / macs[1]:.1f} times the MACs of the student; a larger one saves more.",
        ),
        ClaimResult(
            "distill_helps_small",
            mean[names[-1]] > mean["hard labels"] + 0.01,
            {"stored_labels": stats(accuracy[names[-1]]), "teacher": stats(accuracy["teacher"])},
            {"hard_labels": stats(accuracy["hard labels"])},
            context.seeds,
            where,
            f"Same views, {epochs} epochs. Holds: more than a point ahead.",
        ),
    ]


def _accuracy(model: nn.Module, data: Any, context: Context) -> float:
    return evaluate(model, data, SPLIT, device=context.device)["accuracy"]


def _step(
    views: Views, teacher: nn.Module, student: nn.Module, store: LabelStore, context: Context
) -> dict[str, float]:
    """Time and memory of a step with stored labels, as shares of those with the live teacher."""
    batch = next(iter(views.loader("train", batch_size=128, device=context.device)))
    live = KD(teacher, T=1.0, alpha=1.0)
    return step_cost(FastDistill(store.path), student.to(context.device), batch, plain=live)


@torch.no_grad()
def _drift(views: Views, teacher: nn.Module, context: Context) -> float:
    """Largest difference between the labels of a store and what the teacher says of the views it replays."""
    teacher.to(context.device).eval()
    batches = views.loader("train", batch_size=256, epoch=1, device=context.device)
    return max(float((teacher(b.image).softmax(1) - b.soft).abs().max()) for b in batches)
