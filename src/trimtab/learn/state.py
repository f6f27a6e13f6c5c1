"""What of a run must survive a kill, and how a new process takes it up."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.learn import checkpoint, rng
from trimtab.learn.settings import RESCUE, plain_value

if TYPE_CHECKING:
    from trimtab.learn.fit import Run

log = logging.getLogger(__name__)


def save(run: Run, *, done: bool) -> None:
    """Write the checkpoint of a run. Of a run that is done, only what it gave is kept."""
    assert run.file is not None
    start = time.perf_counter()
    ctx = run.ctx
    tree: dict[str, Any] = {
        "run": fingerprint(run),
        "done": done,
        "stopped": run.stopped,
        "epoch": ctx.epoch,
        "position": run.position,
        "step": ctx.step,
        "progress": ctx.progress,
        "elapsed": run.clock.elapsed(),
        "history": run.history,
        "best": run.best,
        "waited": run.waited,
        "validated": run.validated,
        "validation_seconds": run.clock.validation,
        "model": run.model.state_dict(),
    }
    if not done:
        tree |= {
            "best_weights": run.best_weights,
            "extra": run.objective.extra.state_dict(),
            "objective": run.objective.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "ema": run.ema.module.state_dict() if run.ema is not None else None,
            "meter": run.meter.state_dict(),
            "rng": _randomness(run),
        }
    if run.accelerator.is_main_process:
        checkpoint.write(run.file, tree)
    run.accelerator.wait_for_everyone()
    run.clock.saved(start)
    run.saved_step = ctx.step


def load(run: Run) -> bool:
    """Take up the checkpoint of a run, if there is one; True if the run was already done.

    Raises:
        ValueError: it belongs to a run with other settings.
        ArtifactError: it cannot be read.
    """
    if run.file is None or not run.s.resume or not run.file.exists():
        return False
    tree = checkpoint.read(run.file)
    _compare(run, tree["run"])
    ctx = run.ctx
    run.model.load_state_dict(tree["model"])
    ctx.epoch, ctx.step, ctx.progress = tree["epoch"], tree["step"], tree["progress"]
    run.position, run.validated, run.saved_step = tree["position"], tree["validated"], tree["step"]
    run.history, run.best, run.waited = tree["history"], tree["best"], tree["waited"]
    run.clock.spent = run.clock.validated_at = tree["elapsed"]
    if tree["done"]:
        log.info("%s is complete: nothing to train", run.file)
        run.stopped = tree["stopped"]
        return True
    log.info("resuming from %s at step %d", run.file, ctx.step)
    run.clock.validation = tree["validation_seconds"]
    run.best_weights = tree["best_weights"]
    run.objective.extra.load_state_dict(tree["extra"])
    run.objective.load_state_dict(tree["objective"])
    _load_optimizer(run.optimizer, tree["optimizer"])
    if run.ema is not None:
        run.ema.module.load_state_dict(tree["ema"])
    run.meter.load_state_dict(tree["meter"])
    mine = tree["rng"][run.rank]
    ctx.generator.set_state(mine["device"])
    ctx.rng.bit_generator.state = mine["host"]
    rng.restore(mine["global"], run.device)
    return False


def fingerprint(run: Run) -> dict[str, Any]:
    """What makes this run this run. Of the objective: its class and its public attributes."""
    given = vars(run.objective).items()
    things = {k: plain_value(v) for k, v in given if k != "extra" and not k.startswith("_")}
    return {
        **run.s.fingerprint(),
        "processes": run.world,
        "objective": [plain_value(type(run.objective)), sorted([k, v] for k, v in things.items())],
        "samples": len(run.data.splits["train"]),
        "model": {k: list(v.shape) for k, v in run.model.state_dict().items() if isinstance(v, Tensor)},
    }


def _compare(run: Run, then: dict[str, Any]) -> None:
    now = fingerprint(run)
    differ = [k for k in now if then.get(k) != now[k]]
    for k in differ:
        if k in RESCUE:
            log.warning("continuing %s with %s=%s, was %s", run.file, k, now[k], then.get(k))
    others = [k for k in differ if k not in RESCUE]
    if others:
        words = ["the model's tensors" if k == "model" else f"{k} {then.get(k)!r} -> {now[k]!r}" for k in others]
        raise ValueError(f"{run.file} belongs to another run ({'; '.join(words)}); give another out, or resume=False")


def _randomness(run: Run) -> list[dict[str, Any]]:
    """The random states of every process."""
    mine = [
        {
            "global": rng.capture(run.device),
            "device": run.ctx.generator.get_state(),
            "host": run.ctx.rng.bit_generator.state,
        }
    ]
    if run.world == 1:
        return mine
    from accelerate.utils import gather_object

    return gather_object(mine)


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Momentum and the like come back in the memory layout of their parameters, which `load_state_dict` forgets."""
    rates = [g["initial_lr"] for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates):
        group["initial_lr"] = rate
    for p, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                kept[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
