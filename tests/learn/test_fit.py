"""The loop: what it learns, what it refuses, when it stops, what it leaves behind."""

from __future__ import annotations

import os
import random
import signal
import time
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.learn.toy import Toy, distance, net, same, weights
from trimtab.core.errors import DataError
from trimtab.learn import KD, Classify, Context, Diverged, Mixup, Objective, evaluate, fit, soft_ce

DATA = Toy()
QUICK = {"epochs": 2, "batch_size": 32, "progress": False}


class Wrong(Classify):
    """Does something odd at one step."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__()
        self._at, self._what = at, what  # private attributes are not part of what identifies a run

    def losses(self, model, batch, ctx):
        loss = super().losses(model, batch, ctx)
        if ctx.step == self._at:
            if self._what == "nan":
                return loss * float("nan")
            if self._what == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            if self._what == "crash":
                raise OSError("the disk is gone")
        return loss


def test_loss_falls_and_history_says_so():
    result = fit(net(), DATA, epochs=6, batch_size=16, lr=0.1)
    assert result.stopped == "done" and result.steps == 36
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert result.best["val_accuracy"] > 0.9
    first = result.history[0]
    assert {"epoch", "step", "loss", "lr", "val_accuracy", "val_loss", "seconds"} <= first.keys()
    assert [r["epoch"] for r in result.history] == [1, 2, 3, 4, 5, 6] and result.history[-1]["step"] == 36
    assert not result.model.training and all(p.grad is None for p in result.model.parameters())


def test_equals_the_hand_written_loop_bit_by_bit():
    mine, model = net(), net()
    fit(model, DATA, epochs=2, batch_size=32, lr=0.1, opt="momentum", weight_decay=0.0, sched="linear", val=None)
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9, foreach=True)
    step = 0
    for epoch in range(2):
        for batch in DATA.loader("train", batch_size=32, shuffle=True, epoch=epoch, drop_last=True):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 6)
            optimizer.zero_grad()
            F.cross_entropy(mine(batch["image"]), batch["label"]).backward()
            optimizer.step()
            step += 1
    assert same(weights(mine), weights(model))


def test_same_call_same_weights_and_other_seed_other_weights():
    runs = []
    for seed in (0, 0, 1):
        model = net(dropout=0.2)
        fit(model, DATA, seed=seed, mixup=0.2, cutmix=1.0, **QUICK)
        runs.append(weights(model))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_global_random_state_is_given_back():
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    fit(net(dropout=0.5), DATA, mixup=0.2, **QUICK)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert before[2] == random.getstate()


def test_it_learns_where_the_caller_has_switched_gradients_off():
    model, alike = net(), net()
    fit(model, DATA, **QUICK)
    with torch.no_grad():
        fit(alike, DATA, **QUICK)
        assert not torch.is_grad_enabled()
    assert same(weights(model), weights(alike))


def test_accumulated_batches_equal_one_large_batch():
    one, two = net(norm="group"), net(norm="group")
    fit(one, DATA, epochs=2, batch_size=32, lr=0.1, clip_grad=0.5)
    fit(two, DATA, epochs=2, batch_size=8, accum=4, lr=0.1, clip_grad=0.5)
    assert 0 < distance(weights(one), weights(two)) < 1e-5


def test_a_short_last_group_is_a_mean_too():
    """96 images: 6 batches of 16 in groups of 4 are steps of 64 and 32 images."""
    model, mine = net(norm="none"), net(norm="none")
    fit(model, DATA, epochs=1, batch_size=16, accum=4, lr=0.1, opt="momentum", momentum=0.0, weight_decay=0.0,
        sched="constant", val=None)  # fmt: skip
    images = list(DATA.loader("train", batch_size=16, shuffle=True, drop_last=True))
    for group in (images[:4], images[4:]):
        x, y = torch.cat([b["image"] for b in group]), torch.cat([b["label"] for b in group])
        F.cross_entropy(mine(x), y).backward()
        with torch.no_grad():
            for p in mine.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    assert distance(weights(model), weights(mine)) < 1e-6


def test_parameters_unused_in_a_step_stay_as_they_are():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.used, self.idle = nn.Linear(64, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            return self.used(self.body(x.flatten(1)))

    model = TwoHeads()
    before = weights(model.idle)
    fit(model, DATA, **QUICK)
    assert same(before, weights(model.idle))


def test_clipping_bounds_the_step():
    model = net()
    before = weights(model)
    fit(model, DATA, epochs=1, batch_size=96, lr=1.0, sched="constant", opt="momentum", momentum=0.0, weight_decay=0.0,
        clip_grad=0.01, val=None)  # fmt: skip
    moved = sum(float((p.detach() - before[n]).square().sum()) for n, p in model.named_parameters()) ** 0.5
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"channels_last": True},
        {"opt": "adamw", "lr": 0.01},
        {"opt": "lamb", "lr": 0.02},
        {"sched": "cosine"},
        {"sched": "tanh"},
        {"ema": 0.9},
        {"precision": "bf16", "channels_last": True, "ema": 0.9, "clip_grad": 1.0},
    ],
)
def test_every_option_learns_and_leaves_a_plain_model(options):
    model = net()
    shapes = {k: (v.shape, v.dtype, v.stride()) for k, v in model.state_dict().items()}
    result = fit(model, DATA, epochs=8, batch_size=16, **options)
    assert result.model is model
    assert result.best["val_accuracy"] > 0.8
    assert {k: (v.shape, v.dtype, v.stride()) for k, v in model.state_dict().items()} == shapes
    assert evaluate(model, DATA, "val")["accuracy"] == pytest.approx(result.best["val_accuracy"])


def test_ema_weights_are_what_is_kept():
    raw, averaged = net(), net()
    fit(raw, DATA, **QUICK, val=None)
    fit(averaged, DATA, **QUICK, val=None, ema=0.99)
    assert distance(weights(raw), weights(averaged)) > 1e-3


def test_best_and_last():
    class Ruin(Classify):
        """Learns in the first epochs, then unlearns."""

        def losses(self, model, batch, ctx):
            loss = super().losses(model, batch, ctx)
            return loss if ctx.epoch < 3 else -3.0 * loss.clamp(max=30)

    options = {"epochs": 6, "batch_size": 16, "lr": 0.05, "sched": "constant"}
    best, last = net(), net()
    kept = fit(best, DATA, Ruin(), **options)
    fit(last, DATA, Ruin(), keep="last", **options)
    assert kept.best["epoch"] <= 4
    assert evaluate(best, DATA, "val")["accuracy"] == pytest.approx(kept.best["val_accuracy"])
    assert evaluate(last, DATA, "val")["accuracy"] < kept.best["val_accuracy"]


def test_early_stop():
    result = fit(net(), DATA, epochs=50, batch_size=32, lr=1e-9, patience=2)
    assert result.stopped == "early" and len(result.history) <= 6


def test_time_limit_drives_the_schedule_and_holds():
    class Slow(Classify):
        def losses(self, model, batch, ctx):
            time.sleep(0.01)
            return super().losses(model, batch, ctx)

    fit(net(), DATA, **QUICK)  # imports are not on the clock
    start = time.perf_counter()
    result = fit(net(), DATA, Slow(), time_limit=2.0, batch_size=16)
    took = time.perf_counter() - start
    assert result.stopped == "time"
    assert 1.7 < took < 2.15  # room for a busy machine
    assert result.history[-1]["val_accuracy"] is not None
    assert result.history[-1]["lr"] < 0.2 * max(r["lr"] for r in result.history)


def test_time_limit_with_epochs_only_stops():
    result = fit(net(), DATA, epochs=100_000, time_limit=0.7, batch_size=32, sched="linear", lr=0.1)
    assert result.stopped == "time" and result.seconds < 1.5
    assert result.history[-1]["lr"] > 0.09  # the schedule did not hurry


def test_nan_names_step_rate_and_checkpoint(tmp_path):
    with pytest.raises(Diverged, match=r"nan at step 5 \(epoch 2, lr 0\.\d+\); the last good checkpoint is .*step 3"):
        fit(net(), DATA, Wrong(4, "nan"), epochs=3, batch_size=32, lr=0.1, out=tmp_path)
    with pytest.raises(Diverged, match=r"step 1 .*no checkpoint"):
        fit(net(), DATA, Wrong(0, "nan"), epochs=3, batch_size=32)
    tried = {"epochs": 3, "batch_size": 32, "out": tmp_path}
    assert fit(net(), DATA, Wrong(-1, ""), lr=0.05, **tried).stopped == "done"  # the way out: a lower rate


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Burst(Classify):
        """The loss is fine, its gradient is not."""

        def losses(self, model, batch, ctx):
            loss = super().losses(model, batch, ctx)
            return loss if ctx.step != 2 else loss + (model[0].weight.sum() * 0.0).sqrt()

    with pytest.raises(Diverged, match="weights are no longer finite at step 3"):
        fit(net(), DATA, Burst(), epochs=2, batch_size=32, out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", [0, 8, 11, 17])  # the first step, inside an epoch, an epoch's last, the very last
def test_ctrl_c_leaves_a_resumable_checkpoint(at, tmp_path):
    whole = net(dropout=0.2)
    fit(whole, DATA, Wrong(-1, ""), epochs=3, batch_size=16)
    model = net(dropout=0.2)
    first = fit(model, DATA, Wrong(at, "interrupt"), epochs=3, batch_size=16, out=tmp_path)
    assert first.stopped == "interrupted" and first.steps == at + 1
    handler = signal.getsignal(signal.SIGINT)
    again = net(dropout=0.2)
    second = fit(again, DATA, Wrong(-1, ""), epochs=3, batch_size=16, out=tmp_path)
    assert second.stopped == "done" and second.steps == 18
    assert same(weights(again), weights(whole))
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("what", ["nan", "crash"])
def test_a_run_that_fails_leaves_a_plain_model(what):
    from trimtab.learn import convert

    class Swapped(Wrong):
        def setup(self, model, batch):
            self._undo = convert(model, {nn.ReLU: lambda layer: nn.LeakyReLU(0.01)})

        def finish(self, model):
            return self._undo()

    model = net()
    layout = {k: v.stride() for k, v in model.state_dict().items()}
    with pytest.raises((Diverged, OSError)):
        fit(model, DATA, Swapped(2, what), channels_last=True, **QUICK)
    assert {k: v.stride() for k, v in model.state_dict().items()} == layout
    assert [type(m) for m in model] == [type(m) for m in net()] and all(p.grad is None for p in model.parameters())


def test_objectives_need_no_init_of_their_base():
    class Bare(Objective):
        def __init__(self):
            self.scale = 1.0

        def losses(self, model, batch, ctx):
            return self.scale * soft_ce(self.predict(model, batch), batch.label)

    assert fit(net(), DATA, Bare(), **QUICK).stopped == "done"


def test_the_bar_is_drawn_seldom(monkeypatch):
    from rich.progress import Progress

    from trimtab.learn import progress

    draws = []
    monkeypatch.setattr(progress, "progress_wanted", lambda: True)
    monkeypatch.setattr(Progress, "refresh", lambda self: draws.append(self.tasks[0].fields["words"]))
    result = fit(net(), DATA, epochs=30, batch_size=8)
    assert 1 < len(draws) < 5 * result.seconds + 6 < result.steps
    assert any("loss" in words and "val" in words for words in draws)


def test_a_second_ctrl_c_stops_at_once():
    class Impatient(Classify):
        def losses(self, model, batch, ctx):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().losses(model, batch, ctx)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(net(), DATA, Impatient(), **QUICK)
    assert signal.getsignal(signal.SIGINT) is before


def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(net(), DATA, **QUICK, out=tmp_path, tracker="tensorboard")
    folder = next(p.parent for p in tmp_path.rglob("events.out.tfevents.*"))
    events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Scalars("epoch/val_accuracy")] == [3, 6]


def test_logged_values_are_averaged_into_the_history():
    class Parts(Classify):
        def losses(self, model, batch, ctx: Context):
            ctx.log("twice", 2.0 * ctx.step)
            loss = super().losses(model, batch, ctx)
            return {"a": loss * 0.25, "b": loss * 0.75}

    row = fit(net(), DATA, Parts(), **QUICK).history[0]
    assert row["twice"] == pytest.approx(2.0)
    assert row["a"] + row["b"] == pytest.approx(row["loss"], rel=1e-5)
    assert row["b"] == pytest.approx(3 * row["a"], rel=1e-5)


def test_on_epoch_sees_every_row():
    rows = []
    result = fit(net(), DATA, **QUICK, on_epoch=rows.append)
    assert rows == result.history


def test_kd_teaches_and_refuses_other_classes():
    teacher = net(1)
    fit(teacher, DATA, epochs=8, batch_size=16)
    expert = evaluate(teacher, DATA, "val")["accuracy"]
    before = weights(teacher)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    noise = deepcopy(DATA)
    noise.splits["train"].labels = torch.randint(3, (96,), generator=torch.Generator().manual_seed(0))
    result = fit(student, noise, KD(teacher, alpha=1.0), epochs=20, batch_size=16)  # no true label in sight
    assert expert > 0.9 and result.best["val_accuracy"] > 0.85
    assert same(before, weights(teacher)) and {"ce", "kd"} <= result.history[0].keys()
    assert all(p.requires_grad for p in teacher.parameters())
    with pytest.raises(ValueError, match="same classes, got 5 and 3"):
        fit(student, DATA, KD(nn.Sequential(nn.Flatten(), nn.Linear(64, 5))), **QUICK)


def test_extra_modules_are_trained_and_thrown_away():
    class Reconstruct(Objective):
        def setup(self, model, batch):
            self.extra["decoder"] = nn.Linear(64, batch.image[0].numel())

        def losses(self, model, batch, ctx):
            features = model[:-1](batch.image)
            error = F.mse_loss(self.extra["decoder"](features), batch.image.flatten(1))
            return {"ce": soft_ce(model[-1](features), batch.label), "mse": error}

    model, objective = net(), Reconstruct()
    keys = list(model.state_dict())
    result = fit(model, DATA, objective, epochs=6, batch_size=16)
    assert result.history[-1]["mse"] < 0.95 * result.history[0]["mse"]
    assert list(result.model.state_dict()) == keys and type(result.model) is nn.Sequential


def test_finish_undoes_what_setup_did():
    from trimtab.learn import convert

    class Swapped(Classify):
        def setup(self, model, batch):
            self._undo = convert(model, {nn.ReLU: lambda layer: nn.LeakyReLU(0.01)})
            super().setup(model, batch)

        def finish(self, model):
            return self._undo()

    model = net()
    result = fit(model, DATA, Swapped(), **QUICK)
    assert [type(m) for m in result.model] == [type(m) for m in net()]
    x = DATA.splits["test"].images
    fresh = net()
    fresh.load_state_dict(result.model.state_dict())
    assert torch.equal(fresh.eval()(x), result.model(x))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"epochs": 0}, "epochs must be a positive integer"),
        ({"batch_size": 1.5}, "batch_size must be"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"opt": "sdg"}, "opt must be one of timm's optimizers"),
        ({"sched": "zigzag"}, "sched must be one of"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16"),
        ({"ema": 1.0}, "ema must be a decay"),
        ({"mixup": -0.1}, "mixup must not be negative"),
        ({"mixer": Mixup(3, mixup=0.1), "mixup": 0.2}, "exclude each other"),
        ({"patience": 2, "val": None}, "patience needs"),
        ({"val": "holdout"}, "val must be one of train, val, test"),
        ({"tracker": "tensorboard"}, "needs a folder"),
        ({"objective": "kd"}, "objective must be an Objective"),
    ],
)
def test_wrong_settings_are_refused_at_the_door(options, words):
    model = net()
    before = weights(model)
    with pytest.raises(ValueError, match=words):
        fit(model, DATA, **options)
    assert same(before, weights(model))


def test_wrong_models_are_refused_at_the_door():
    with pytest.raises(ValueError, match="at least 3 classes for these labels, got 2"):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), DATA)
    with pytest.raises(ValueError, match=r"logits \(B, K\), got"):
        fit(nn.Conv2d(1, 3, 1), DATA)
    frozen = net().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(frozen, DATA)
    with pytest.raises(DataError, match="no split 'train'"):
        empty = deepcopy(DATA)
        del empty.splits["train"]
        fit(net(), empty)


def test_batch_size_larger_than_the_data_is_the_data():
    assert fit(net(), DATA, epochs=2, batch_size=1000).steps == 2


def test_digits_end_to_end():
    import trimtab as tt

    data = tt.load_data("digits")
    model = net()
    model[-1] = nn.Linear(64, 10)
    result = tt.fit(model, data, epochs=8, batch_size=64, lr=0.1, channels_last=True)
    assert tt.evaluate(result.model, data)["accuracy"] > 0.9
