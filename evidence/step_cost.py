"""What a step of an objective costs, against a step of plain training of the same network on the same batch."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trimtab.learn import Batch, Classify, Context, Objective, backward_all, make_optimizer, param_groups


def step_cost(
    objective: Objective,
    model: nn.Module,
    batch: dict[str, Any],
    *,
    plain: Objective | None = None,
    repeats: int = 10,
) -> dict[str, float]:
    """How many times as long, and as much memory, as a plain step a step of the objective takes.

    A step is losses, backward passes and the update (SGD with momentum). Time is the median over pairs of steps that
    take turns. Memory is the peak of the bytes of all tensors alive: weights, gradients, momentum, what is kept for the
    backward pass, and what else the objective uses, such as a teacher. One epoch (of one step) lies behind both, for
    objectives that look back.

    Args:
        objective: a fresh one; it is set up here.
        model: copied, once for either side.
        batch: as the loader gives it, on the device of the model.
        plain: what to compare with; by default cross-entropy.
        repeats: pairs of steps that are timed.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> batch = {"image": torch.zeros(4, 1, 8, 8), "label": torch.arange(4)}
    >>> step_cost(Classify(smoothing=0.1), net, batch, repeats=1)["memory_ratio"]
    1.0
    """
    batch = Batch(batch)
    memory, steps = [], []
    for it in (plain or Classify(), objective):
        step, bytes_ = prepared(it, deepcopy(model).train(), batch)
        memory.append(bytes_)
        steps.append(step)
    ratios = []
    for _ in range(repeats):
        usual, special = (_seconds(step) for step in steps)
        ratios.append(special / usual)
    return {"time_ratio": round(statistics.median(ratios), 3), "memory_ratio": round(memory[1] / memory[0], 3)}


def prepared(objective: Objective, model: nn.Module, batch: Batch) -> tuple[Callable[[], None], int]:
    """A step that can be repeated, after a first epoch, and the most bytes that a second one needs at once."""
    device = batch["image"].device
    ctx = Context(device=device, generator=torch.Generator(device).manual_seed(0), total_steps=2, progress=0.5)
    with Alive() as alive:
        objective.setup(model, batch)
        objective.extra.to(device).train()
        optimizer = make_optimizer(param_groups([model, objective.extra], lr=1e-6), "sgd")

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            backward_all(partial(objective.losses, model, batch, ctx))
            optimizer.step()

        for ctx.epoch in range(2):
            objective.on_epoch_start(ctx)
            alive.peak = alive.now  # of the last epoch only
            step()
            objective.on_epoch_end(ctx)
            ctx.step += 1
    return step, alive.peak


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are made or read while it is entered and still exist, on every device.

    Attributes: `now` and `peak`, in bytes; `peak` may be set back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:  # several tensors may be views of one memory
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
