"""Segmentation, detection and restoration through the one loop."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from tests.learn.detector import Cells
from tests.learn.toy import distance, same, weights
from trimtab.core.errors import DataError
from trimtab.data import load_data
from trimtab.learn import Batch, Classify, Context, Detect, Restore, Segment, evaluate, fit
from trimtab.learn.image_quality import psnr, ssim
from trimtab.learn.tasks import TASKS, DetectTally, SegmentTally, task_of
from trimtab.nn.resize import upscale

ROOT = Path(__file__).parents[2]
VOID = 255


class Up(nn.Module):
    """The cubic, and something beside it that can be unlearned."""

    def __init__(self, scale: int = 2, channels: int = 3, noise: float = 0.05) -> None:
        super().__init__()
        self.scale = scale
        self.more = nn.Conv2d(channels, channels * scale**2, 3, padding=1)
        nn.init.normal_(self.more.weight, std=noise, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.more.bias)

    def forward(self, x):
        return upscale(x, self.scale) + F.pixel_shuffle(self.more(x), self.scale)


def segmenter(classes: int = 3, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(2, 16), nn.ReLU(), nn.Dropout(0.1),
            nn.Conv2d(16, 16, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(16, classes, 1),
        )  # fmt: skip


def model_of(task: str) -> nn.Module:
    return {"segment": segmenter, "detect": lambda: Cells(2, 32), "restore": Up}[task]()


def data_of(task: str) -> Any:
    options = {"restore": {"scale": 2, "patch": 8}}.get(task, {})
    return load_data("scenes:classes=2,size=32,n=70,noise=0", task=task, **options)


DATA = {task: data_of(task) for task in ("segment", "detect", "restore")}
RUN: dict[str, Any] = {"progress": False, "batch_size": 8, "lr": 0.01}


# ------------------------------------------------------------------------------------------------------------- measures


def test_mean_iou_is_that_of_torchmetrics():
    from torchmetrics.classification import MulticlassJaccardIndex

    g = torch.Generator().manual_seed(0)
    tally, theirs = SegmentTally(5), MulticlassJaccardIndex(5, average="macro", ignore_index=VOID)
    losses, pixels = 0.0, 0
    for _ in range(3):
        logits, label = (
            torch.randn(2, 5, 6, 7, generator=g),
            torch.randint(4, (2, 6, 7), generator=g),
        )  # none of class 4
        logits[:, 4] = -9.0
        label[0, :3] = VOID
        tally.update(logits, label)
        theirs.update(logits, label)
        losses += float(F.cross_entropy(logits, label, ignore_index=VOID, reduction="sum"))
        pixels += int((label != VOID).sum())
    got = tally.compute()
    assert got["miou"] == pytest.approx(float(theirs.compute()))
    assert got["loss"] == pytest.approx(losses / pixels)


def test_pixels_said_to_be_of_a_class_that_is_none_are_wrong():
    tally = SegmentTally(2)
    tally.update(torch.tensor([[0.0, 1.0, 2.0]]).view(1, 3, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long))
    assert tally.compute()["miou"] == 0.0
    with pytest.raises(DataError, match="no pixel that counts"):
        SegmentTally(2).compute()


def test_perfect_detections_have_precision_one():
    boxes = torch.tensor([[2.0, 3.0, 20.0, 18.0], [1.0, 1.0, 9.0, 9.0]])
    there = [{"boxes": boxes, "labels": torch.tensor([0, 1])}, {"boxes": boxes[:0], "labels": torch.zeros(0).long()}]
    found = [{**t, "scores": torch.linspace(0.9, 0.8, len(t["boxes"]))} for t in there]
    tally = DetectTally()
    tally.update(found, there)
    assert tally.compute() == {"map": pytest.approx(1.0), "ap50": pytest.approx(1.0)}
    shifted = DetectTally()
    shifted.update([{**f, "boxes": f["boxes"] + 2} for f in found], there)
    assert 0 < shifted.compute()["map"] < shifted.compute()["ap50"] <= 1


def test_restoration_is_measured_picture_by_picture_on_luma():
    got = evaluate(Up(noise=0), DATA["restore"])
    pairs = [(upscale(b["image"], 2), b["high"]) for b in DATA["restore"].loader("test")]
    for name, measure in (("psnr", psnr), ("ssim", ssim)):
        assert got[name] == pytest.approx(float(torch.cat([measure(*p, border=2) for p in pairs]).mean()))
    assert got["n"] == len(DATA["restore"].splits["test"])


def test_evaluation_adds_the_metrics_it_is_given():
    from torchmetrics.classification import MulticlassAccuracy

    more = {"mean_accuracy": MulticlassAccuracy(3, average="micro", ignore_index=VOID)}
    got = evaluate(segmenter(), DATA["segment"], metrics=more)
    assert set(got) == {"miou", "accuracy", "loss", "n", "mean_accuracy"}
    assert got["accuracy"] == pytest.approx(got["mean_accuracy"], abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("task", "score", "columns"),
    [
        ("segment", "miou", {"val_miou", "val_accuracy", "val_loss"}),
        ("detect", "ap50", {"val_map", "val_ap50"}),
        ("restore", "psnr", {"val_psnr"}),
    ],
)
def test_every_task_learns_with_nothing_but_its_data(task, score, columns):
    model, data = model_of(task), DATA[task]
    split = "train" if task == "detect" else "test"
    before = evaluate(model, data, split)[score]
    result = fit(model, data, epochs=10, augment="flip", **{**RUN, "lr": 0.02})
    assert evaluate(model, data, split)[score] > before + {"segment": 0.2, "detect": 0.02, "restore": 2.0}[task]
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]
    assert columns == {c for c in result.history[0] if c.startswith("val_")}
    first = f"val_{TASKS[task].scores[0]}"
    assert result.best[first] == max(r[first] for r in result.history)


def test_the_defaults_are_those_of_the_task():
    chosen: dict[str, Any] = {}

    class Spy(Segment):
        def prepare(self, data, settings, device):
            chosen.update(opt=settings.opt, batch_size=settings.batch_size)
            return super().prepare(data, settings, device)

    fit(segmenter(), DATA["segment"].subset(16), Spy(), epochs=1, progress=False)
    assert chosen == {"opt": "adamw", "batch_size": 16}
    assert (TASKS["classify"].opt, TASKS["classify"].batch_size) == ("sgd", 128)
    assert [type(task_of(d).objective()) for d in (object(), *DATA.values())] == [Classify, Segment, Detect, Restore]


def test_pixels_without_a_class_teach_nothing():
    torch.manual_seed(0)
    model, image = segmenter().eval(), torch.randn(2, 3, 8, 8)
    label = torch.randint(3, (2, 8, 8))
    label[:, 4:] = VOID
    losses = Segment().losses(model, Batch(image=image, label=label), Context())
    assert torch.allclose(losses, F.cross_entropy(model(image)[:, :, :4], label[:, :4]))
    nothing = Segment().losses(model, Batch(image=image, label=torch.full_like(label, VOID)), Context())
    assert nothing.item() == 0.0 and nothing.requires_grad


def test_deep_supervision_weighs_each_map_half_as_much():
    class Deep(nn.Module):
        def forward(self, x):
            return [x, x[:, :, ::2, ::2]] if self.training else x

    image, label = (
        torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.arange(128).view(2, 8, 8) % 3,
    )
    got = Segment().losses(Deep(), Batch(image=image, label=label), Context())
    fine, coarse = F.cross_entropy(image, label), F.cross_entropy(image[:, :, ::2, ::2], label[:, ::2, ::2])
    assert torch.allclose(got, (2 * fine + coarse) / 3)


def test_a_loss_of_the_models_own_is_used():
    class Own(nn.Sequential):
        def criterion(self, outputs, batch):
            return {"mine": outputs.square().mean()}

    result = fit(Own(nn.Conv2d(3, 3, 1)), DATA["segment"].subset(16), epochs=1, **RUN)
    assert "mine" in result.history[0]


@pytest.mark.parametrize(
    ("task", "model", "words"),
    [
        ("segment", nn.Conv2d(3, 2, 1), "the model must have at least 3 classes for these labels, got 2"),
        ("segment", nn.Conv2d(3, 3, 3), r"logits of the size of the labels \(32, 32\), got \(30, 30\)"),
        ("segment", nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)), r"must give logits \(B, K, H, W\), got \(2, 3\)"),
        ("detect", nn.Conv2d(3, 3, 1), "a detector must have a method 'criterion', Conv2d has none"),
        (
            "restore",
            nn.Conv2d(3, 3, 1),
            r"must give pictures \(2, 3, 16, 16\) for inputs \(2, 3, 8, 8\), got \(2, 3, 8, 8\)",
        ),
    ],
)
def test_models_that_do_not_fit_the_task_are_refused_with_shapes(task, model, words):
    with pytest.raises(ValueError, match=words):
        fit(model, DATA[task], epochs=1, **RUN)


def test_a_detector_must_give_a_tuple():
    class One(Cells):
        def forward(self, x):
            return super().forward(x)[0]

    with pytest.raises(ValueError, match=r"must give a tuple of tensors, got \(2, 16, 4\)"):
        fit(One(2, 32), DATA["detect"], epochs=1, **RUN)


def test_what_is_for_classification_only_is_refused():
    with pytest.raises(ValueError, match="mixup and cutmix are for classification, got data for task 'segment'"):
        fit(segmenter(), DATA["segment"], epochs=1, mixup=0.2, **RUN)
    with pytest.raises(ValueError, match="loss must be l1 or mse, got 'huber'"):
        Restore(loss="huber")
    with pytest.raises(DataError, match=r"data\.task must be one of classify, segment, detect, restore, got 'flow'"):
        evaluate(segmenter(), type("Flow", (), {"task": "flow", "splits": {"test": [1]}})())


# ---------------------------------------------------------------------------------------- resuming, and two processes


@pytest.mark.parametrize(("task", "at"), [("segment", 3), ("detect", 5), ("restore", 7)])
def test_resume_is_bit_exact(task, at, tmp_path):
    kind = type(TASKS[task].objective())

    class Cut(Exception):
        pass

    class Crash(kind):
        def losses(self, model, batch, ctx):
            if ctx.step == at:
                raise Cut
            return super().losses(model, batch, ctx)

    Crash.__qualname__ = kind.__qualname__
    data = DATA[task].subset({"train": 8 if task == "restore" else 32})
    run = {**RUN, "epochs": 2, "ema": 0.9, "checkpoint_every": 0}
    whole, again = model_of(task), model_of(task)
    expected = fit(whole, data, kind(), **run)
    with pytest.raises(Cut):
        fit(again, data, Crash(), out=tmp_path, **run)
    torch.manual_seed(99)
    got = fit(again, data, kind(), out=tmp_path, **run)
    assert expected.steps > at and same(weights(whole), weights(again))
    for ours, theirs in zip(got.history, expected.history, strict=True):
        assert {k: v for k, v in ours.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}


def child(out: Path) -> None:
    """What each of the two processes does."""
    rank = os.environ["RANK"]
    for task, data in DATA.items():
        model = model_of(task).eval()
        result = fit(model, data, epochs=1, augment="none", **RUN)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / f"{task}.{rank}.safetensors")
        (out / f"{task}.{rank}.json").write_text(json.dumps(result.history))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = f"from pathlib import Path; from tests.learn.test_tasks import child; child(Path({str(folder)!r}))"
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    common |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env={**common, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(2)
    ]
    assert [p.wait(timeout=150) for p in started] == [0, 0]
    return folder


@pytest.mark.parametrize("task", ["detect", "restore"])
def test_two_processes_are_one(task, two):
    """Without dropout, which each process draws for itself."""
    model = model_of(task)
    result = fit(model, DATA[task], epochs=1, augment="none", **RUN)
    first, second = (load_file(two / f"{task}.{rank}.safetensors") for rank in (0, 1))
    assert same(first, second)
    assert distance(first, weights(model)) < 2e-5
    there = json.loads((two / f"{task}.0.json").read_text())
    for name in TASKS[task].scores:
        assert there[0][f"val_{name}"] == pytest.approx(result.history[0][f"val_{name}"], abs=2e-3)


def test_two_processes_agree_on_the_scores_of_segmentation(two):
    rows = [json.loads((two / f"segment.{rank}.json").read_text()) for rank in (0, 1)]
    assert rows[0][0]["val_miou"] == rows[1][0]["val_miou"]
    model = segmenter()
    model.load_state_dict(load_file(two / "segment.0.safetensors"))
    got = evaluate(model, DATA["segment"], "val")
    assert got["miou"] == pytest.approx(rows[0][0]["val_miou"], abs=1e-6)
