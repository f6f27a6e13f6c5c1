"""Killed and started again is the same as never killed, bit by bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.learn.toy import Toy, net, same, weights
from trimtab.core.errors import ArtifactError
from trimtab.learn import Classify, checkpoint, fit

ROOT = Path(__file__).parents[2]
DATA = Toy()
# everything that has a state: dropout, mixing, averaged weights, momentum of two kinds, groups of batches, the best
RUN = {
    "epochs": 3,
    "batch_size": 16,
    "accum": 2,
    "opt": "adamw",
    "lr": 0.01,
    "ema": 0.9,
    "mixup": 0.2,
    "cutmix": 1.0,
    "clip_grad": 1.0,
    "channels_last": True,
    "progress": False,
}  # 96 images: 3 steps an epoch, 9 in all


class Cut(Exception):
    pass


class Crash(Classify):
    """Fails once, in the middle of a step; and draws from the context's generator, which must resume as well."""

    def __init__(self, at: int) -> None:
        super().__init__(smoothing=0.1)
        self._at = at

    def losses(self, model, batch, ctx):
        if ctx.step == self._at:
            raise Cut
        noise = torch.randn(batch.image.shape, generator=ctx.generator)
        return super().losses(model, batch.replace(image=batch.image + 0.1 * noise), ctx)


@pytest.fixture(scope="module")
def whole():
    model = net(dropout=0.3)
    result = fit(model, DATA, Crash(-1), **RUN)
    return weights(model), [{k: v for k, v in r.items() if k != "seconds"} for r in result.history]


@pytest.mark.parametrize("at", range(9))
def test_resume_at_any_step_is_bit_exact(at, whole, tmp_path):
    with pytest.raises(Cut):
        fit(net(dropout=0.3), DATA, Crash(at), out=tmp_path, checkpoint_every=0, **RUN)
    torch.manual_seed(1000 + at)  # what the caller does must not matter
    model = net(seed=5, dropout=0.3)  # nor what the weights were
    result = fit(model, DATA, Crash(-1), out=tmp_path, checkpoint_every=0, **RUN) if at else None
    if at == 0:
        assert not (tmp_path / checkpoint.FILE).exists()
        return
    assert same(weights(model), whole[0])
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in result.history] == whole[1]


@pytest.mark.parametrize("opt", ["sgd", "lamb", "lion", "adafactor", "rmsprop"])
def test_resume_with_other_optimizers_is_bit_exact(opt, tmp_path):
    run = {"epochs": 2, "batch_size": 16, "opt": opt, "lr": 0.003, "precision": "bf16"}
    whole, model = net(), net()
    fit(whole, DATA, Crash(-1), **run)
    with pytest.raises(Cut):
        fit(model, DATA, Crash(8), out=tmp_path, checkpoint_every=0, **run)
    fit(model, DATA, Crash(-1), out=tmp_path, **run)
    assert same(weights(model), weights(whole))


CHILD = """
import os, signal, sys
from safetensors.torch import save_file
from tests.learn.test_resume import DATA, RUN, Crash, net
from trimtab.learn import fit

out, kill_at, kill_in_write = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

class Killed(Crash):
    def losses(self, model, batch, ctx):
        if ctx.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(model, batch, ctx)

Killed.__qualname__ = "Crash"
replace, calls = os.replace, 0

def dying_replace(*args):
    global calls
    calls += 1
    if calls == kill_in_write:
        os.kill(os.getpid(), signal.SIGKILL)  # the new checkpoint is written, but not yet in place
    replace(*args)

os.replace = dying_replace
model = net(dropout=0.3)
fit(model, DATA, Killed(-1), out=out, checkpoint_every=0, **RUN)
save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out + "/final.safetensors")
"""


def test_kill_9_twice_and_resume_is_bit_exact(whole, tmp_path):
    """Once in the middle of a step inside an epoch, once while a checkpoint is being written."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    env["OMP_NUM_THREADS"] = str(torch.get_num_threads())

    def child(at: int, write: int) -> int:
        command = [sys.executable, "-c", CHILD, str(tmp_path), str(at), str(write)]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=150)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    assert child(4, -1) == -signal.SIGKILL
    assert checkpoint.read(tmp_path / checkpoint.FILE)["step"] == 4
    assert child(-1, 3) == -signal.SIGKILL
    assert list(tmp_path.glob(f".{checkpoint.FILE}.*.tmp"))
    assert checkpoint.read(tmp_path / checkpoint.FILE)["step"] == 6
    assert child(-1, -1) == 0
    assert same(load_file(tmp_path / "final.safetensors"), whole[0])


def test_a_finished_run_is_not_trained_again(tmp_path, whole):
    first, again = net(dropout=0.3), net(seed=3, dropout=0.3)
    one = fit(first, DATA, Crash(-1), out=tmp_path, **RUN)
    two = fit(again, DATA, Crash(0), out=tmp_path, **RUN)  # a step would raise
    assert same(weights(first), weights(again)) and same(weights(first), whole[0])
    assert (two.history, two.best, two.steps, two.stopped) == (one.history, one.best, one.steps, "done")


def test_another_run_is_refused_and_resume_false_starts_anew(tmp_path):
    run = {"epochs": 1, "batch_size": 32}
    fit(net(), DATA, out=tmp_path, **run)
    with pytest.raises(ValueError, match=r"belongs to another run \(seed 0 -> 1\)"):
        fit(net(), DATA, out=tmp_path, seed=1, **run)
    with pytest.raises(ValueError, match="the model's tensors"):
        fit(net(norm="none"), DATA, out=tmp_path, **run)
    assert fit(net(), DATA, out=tmp_path, seed=1, resume=False, **run).steps == 3


def test_objectives_may_keep_a_state(tmp_path):
    class Counting(Crash):
        def __init__(self, at):
            super().__init__(at)
            self._seen = 0

        def losses(self, model, batch, ctx):
            loss = super().losses(model, batch, ctx)
            self._seen += 1
            ctx.log("seen", self._seen)
            return loss

        def state_dict(self):
            return {"seen": self._seen}

        def load_state_dict(self, state):
            self._seen = state["seen"]

    run = {"epochs": 1, "batch_size": 16, "out": tmp_path, "checkpoint_every": 0}
    with pytest.raises(Cut):
        fit(net(), DATA, Counting(4), **run)
    assert fit(net(), DATA, Counting(-1), **run).history[0]["seen"] == pytest.approx(3.5)


def test_checkpoint_round_trip_without_pickle(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    tree = {"a": [1, 2.5, None, True, "x"], 3: (shared, shared.T), "deep": {"n": 2**100, "nan": float("inf")}}
    path = checkpoint.write(tmp_path / "c", tree)
    back = checkpoint.read(path)
    assert back["a"] == tree["a"] and back["deep"] == tree["deep"]
    assert isinstance(back[3], tuple) and torch.equal(back[3][0], shared) and torch.equal(back[3][1], shared.T)
    with pytest.raises(TypeError, match="cannot keep /bad: object"):
        checkpoint.write(tmp_path / "d", {"bad": object()})


@pytest.mark.parametrize("damage", ["truncated", "garbage", "foreign"])
def test_damaged_checkpoints_give_one_clear_error(damage, tmp_path):
    path = checkpoint.write(tmp_path / checkpoint.FILE, {"x": torch.zeros(1000)})
    raw = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "garbage":
        path.write_bytes(b"\x80\x04garbage")
    else:
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match=r"not a readable checkpoint .*resume=False"):
        fit(net(), DATA, epochs=1, out=tmp_path)


def test_checkpoints_by_time_are_rare():
    from trimtab.learn.clock import Clock

    clock = Clock(None, shared=False)
    assert clock.save_due(0) and not clock.save_due(30.0)
    clock.saved_at -= 31
    assert clock.save_due(30.0)
    clock.save = 2.0  # writing is slow: at most a fiftieth of the time
    assert not clock.save_due(30.0)
    clock.saved_at -= 70
    assert clock.save_due(30.0)
