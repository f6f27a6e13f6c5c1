"""Two processes are one: the same global batch gives the same weights.

One pair of processes (gloo, loopback) runs every case and leaves what came out in files; the tests look at them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.learn.toy import Toy, distance, net, weights
from trimtab.core.errors import TrimtabError
from trimtab.learn import Classify, evaluate, fit, soft_ce

ROOT = Path(__file__).parents[2]
DATA = Toy(train=100, val=49)  # 49: the last batch of the validation is shared unevenly
RUN = {"epochs": 2, "batch_size": 20, "lr": 0.1, "clip_grad": 1.0, "ema": 0.9, "progress": False}
CASES = {
    "plain": {},
    "accum": {"accum": 2},
    "bn": {},
    "nan": {},
    "whole": {"checkpoint_every": 0},
    "cut": {"checkpoint_every": 0},
    "clock": {"epochs": None, "time_limit": 1.5},
}


class Sometimes(Classify):
    """Something happens in one process."""

    def __init__(self, what: str = "", rank: int = 0) -> None:
        super().__init__()
        self._what, self._rank = what, rank

    def losses(self, model, batch, ctx):
        loss = soft_ce(self.predict(model, batch), batch.label)
        if self._what == "nan" and self._rank == 1 and ctx.step == 2:
            return loss * float("nan")
        if self._what == "cut" and ctx.step == 7:
            raise KeyError
        return loss


def child(out: Path) -> None:
    """What each of the two processes does."""
    rank = int(os.environ["RANK"])
    for what, options in CASES.items():
        norm = "batch" if what == "bn" else "group"
        model = net(seed=rank, norm=norm)  # the weights of rank 0 count
        given = {**RUN, **options, "out": out / what if "checkpoint_every" in options else None}
        told: dict[str, Any] = {}
        try:
            try:
                result = fit(model, DATA, Sometimes(what, rank), **given)
            except KeyError:
                told["cut"] = True
                result = fit(model, DATA, Sometimes(), **given)
            told |= {"history": result.history, "best": result.best, "stopped": result.stopped, "steps": result.steps}
        except TrimtabError as e:
            told["error"] = str(e)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / f"{what}.{rank}.safetensors")
        (out / f"{what}.{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(2):
        env = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        }  # fmt: skip
        code = f"from pathlib import Path; from tests.learn.test_parallel import child; child(Path({str(folder)!r}))"
        children.append(
            subprocess.Popen([sys.executable, "-c", code], env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        )
    try:
        errors = [c.communicate(timeout=150)[1] for c in children]
    finally:
        for c in children:
            c.kill()
    assert [c.returncode for c in children] == [0, 0], "\n".join(errors)
    return folder


def told(out: Path, what: str) -> list[dict[str, Any]]:
    return [json.loads((out / f"{what}.{r}.json").read_text()) for r in range(2)]


def ranks(out: Path, what: str) -> list[dict[str, Any]]:
    return [load_file(out / f"{what}.{r}.safetensors") for r in range(2)]


@pytest.mark.parametrize("what", ["plain", "accum"])
def test_two_processes_equal_one(what, out):
    model = net(norm="group")
    result = fit(model, DATA, Sometimes(), **RUN, **CASES[what])
    a, b = ranks(out, what)
    assert distance(a, b) == 0
    assert distance(a, weights(model)) < 1e-5
    assert distance(a, weights(net(norm="group"))) > 1e-2
    for t in told(out, what):
        assert t["best"]["val_accuracy"] == pytest.approx(result.best["val_accuracy"])
        assert t["best"]["val_loss"] == pytest.approx(result.best["val_loss"], rel=1e-4)
        assert t["history"][-1]["loss"] == pytest.approx(result.history[-1]["loss"], rel=1e-4)


def test_running_statistics_are_the_same_everywhere_and_work(out):
    a, b = ranks(out, "bn")
    assert distance(a, b) == 0
    model = net()
    model.load_state_dict(a)
    assert evaluate(model, DATA, "val")["accuracy"] == pytest.approx(told(out, "bn")[0]["best"]["val_accuracy"])


def test_a_nan_in_one_process_stops_both_with_the_same_words(out):
    first, second = told(out, "nan")
    assert first == second and "the loss became nan at step 3 " in first["error"]


def test_resume_with_two_processes_is_bit_exact(out):
    assert all(t["cut"] for t in told(out, "cut"))
    for a, b in zip(ranks(out, "cut"), ranks(out, "whole")):
        assert distance(a, b) == 0


def test_the_clock_is_the_same_for_both(out):
    first, second = told(out, "clock")
    assert first["stopped"] == "time" and first["steps"] == second["steps"] > 0
    assert [r["lr"] for r in first["history"]] == [r["lr"] for r in second["history"]]
    assert distance(*ranks(out, "clock")) == 0
