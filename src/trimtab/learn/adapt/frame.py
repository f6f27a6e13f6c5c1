"""The frame around every method of a stream: learn a task, measure all that were learned, keep what was reached.

A `Learner` says what a method does with a task; `follow` takes it through a stream. After every task all test images
of the tasks so far are looked at again. With `out`, a run that was interrupted goes on where it stopped, inside a task
too.
"""

from __future__ import annotations

import logging
import shutil
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.learn import checkpoint
from trimtab.learn.adapt.metrics import Row, StreamResult
from trimtab.learn.adapt.streams import Stream, Task
from trimtab.learn.evaluate import logits
from trimtab.learn.fit import FitResult, fit
from trimtab.learn.objective import Objective
from trimtab.learn.settings import FREE, plain_value

log = logging.getLogger(__name__)

FILE = "stream.safetensors"
# The protocol of the field: no task chooses its best epoch, what was learned last is what is measured.
TRAINING: dict[str, Any] = {"val": None, "keep": "last"}


class Learner:
    """What a method does with a stream.

    Attributes:
        model: a copy of the model that was given; what is trained.
        stream: where it learns.
        training: arguments for `fit`.
    """

    at_once = False  # whether all tasks are learned together

    def __init__(self, model: nn.Module, stream: Stream, **training: Any) -> None:
        self.model, self.stream = deepcopy(model), stream
        self.out: Path | None = None
        self.training: dict[str, Any] = {**TRAINING, **training}

    def learn(self, task: Task) -> None:
        """Learn a task from its training images."""
        raise NotImplementedError(f"{type(self).__name__} must define learn(task)")

    def deliver(self) -> nn.Module:
        """The model as it would be given away now: a plain module with a logit for every class of the data."""
        return self.model

    def logits(self, task: Task) -> tuple[Tensor, Tensor]:
        """Logits (N, num_classes) and labels (N,) of the test images of a task."""
        return logits(self.deliver(), task.data, "test")

    def state_dict(self) -> dict[str, Any]:
        """What must survive a kill between two tasks, besides the weights of `model`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def details(self) -> dict[str, Any]:
        """What else there is to say about the run, as JSON values."""
        return {}

    def fit(
        self, data: Any, objective: Objective, part: str, *, model: nn.Module | None = None, **how: Any
    ) -> FitResult:
        """`fit`, resumable in the folder of the run.

        Raises:
            KeyboardInterrupt: training was interrupted.
        """
        out = self.out / part if self.out is not None else None
        if out is not None and (out / checkpoint.FILE).is_file() and checkpoint.read(out / checkpoint.FILE)["done"]:
            shutil.rmtree(out)  # killed before the stream's state was kept: what the method noted besides is lost
        done = fit(model if model is not None else self.model, data, objective, out=out, **{**self.training, **how})
        if done.stopped == "interrupted":
            raise KeyboardInterrupt
        return done


def check_classes(model: nn.Module, stream: Stream) -> None:
    """Raises ValueError when the model cannot have a logit for every class of the stream."""
    k = getattr(model, "num_classes", None)
    if isinstance(k, int) and k != stream.num_classes:
        raise ValueError(
            f"the model must have {stream.num_classes} classes, those of the whole stream, got {k}; make it with "
            f"num_classes={stream.num_classes}"
        )


def follow(name: str, learner: Learner, *, out: str | Path | None = None, resume: bool = True) -> StreamResult:
    """Take a learner through its stream, task by task.

    Args:
        out: folder for what is needed to go on after an interruption.
        resume: go on with what is there.

    Raises:
        ValueError: what is there belongs to another run.
        KeyboardInterrupt: interrupted; the same call goes on.
    """
    stream, started = learner.stream, time.perf_counter()
    state: dict[str, Any] = {"run": _run(name, learner), "learned": 0, "accuracy": [], "seconds": 0.0}
    file = None
    if out is not None:
        learner.out = Path(out)
        file = learner.out / FILE
        if not resume:
            file.unlink(missing_ok=True)
            _drop_trainings(learner.out)
        elif file.is_file():
            state = _take_up(file, state["run"], learner)
    if stream.kind != "class" and "before" not in state:
        state["before"] = _measure(learner, len(stream) - 1)
    before_this_life = state["seconds"]

    def keep() -> None:
        state["seconds"] = before_this_life + time.perf_counter() - started
        if file is not None:
            learned = {"model": learner.model.state_dict(), "learner": learner.state_dict()}
            checkpoint.write(file, state | learned)

    for i in range(len(state["accuracy"]), 1 if learner.at_once else len(stream)):
        if state["learned"] == i:
            learner.learn(stream[i])
            state["learned"] = i + 1
            keep()  # before it is measured, which may take long
            if learner.out is not None:
                _drop_trainings(learner.out)
        state["accuracy"].append(_measure(learner, len(stream) - 1 if learner.at_once else i))
        keep()
        log.info("task %d of %d: %s", i + 1, len(stream), ", ".join(map(_percent, state["accuracy"][-1])))
    return StreamResult(
        name,
        stream.kind,
        learner.deliver().eval(),
        state["accuracy"],
        [len(stream)] if learner.at_once else list(range(1, len(stream) + 1)),
        [len(t.data.splits["test"]) for t in stream],
        state.get("before"),
        state["seconds"],
        learner.details(),
    )


def _measure(learner: Learner, after: int) -> Row:
    """Accuracy on every task once the tasks up to `after` are learned."""
    stream = learner.stream
    row: Row = []
    for task in stream:
        if stream.kind == "class" and task.id > after:
            row.append(None)
            continue
        out, labels = learner.logits(task)
        if out.shape[1] != stream.num_classes:
            raise ValueError(
                f"the model must give a logit for each of the {stream.num_classes} classes, got {out.shape[1]}"
            )
        allowed = torch.tensor(stream.candidates(after, task.id))
        row.append(float((allowed[out[:, allowed].argmax(1)] == labels).double().mean()))
    return row


def _run(name: str, learner: Learner) -> dict[str, Any]:
    """What makes this run this run, as plain values."""
    options = {k: plain_value(v) for k, v in vars(learner).items() if not k.startswith("_")}
    for own in ("model", "stream", "out", "training"):
        options.pop(own, None)
    return {
        "method": name,
        "options": options,
        "training": {k: plain_value(v) for k, v in learner.training.items() if k not in FREE | {"on_epoch"}},
        "stream": learner.stream.said,
        "samples": [len(t.data.splits["train"]) for t in learner.stream],
        "model": {k: list(v.shape) for k, v in learner.model.state_dict().items()},
    }


def _take_up(file: Path, run: dict[str, Any], learner: Learner) -> dict[str, Any]:
    state = checkpoint.read(file)
    differ = [k for k in run if state["run"].get(k) != run[k]]
    if differ:
        raise ValueError(
            f"{file} belongs to another run ({', '.join(differ)} differ); give another out, or resume=False"
        )
    learner.load_state_dict(state.pop("learner"))
    learner.model.load_state_dict(state.pop("model"))
    log.info("going on from %s after task %d", file, state["learned"])
    return state


def _drop_trainings(out: Path) -> None:
    """Remove what the trainings of single tasks have left: it is part of the stream's state, or of another run."""
    for folder in out.glob("task-*"):
        shutil.rmtree(folder)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
