"""`fit`: the one training loop. It runs every objective; what is special about a method is in its objective.

Read `Run.run`, `Run.epoch` and `Run.step`; the rest is set-up and what happens at an epoch's end.
Accelerate gives the device, the processes and the trackers. The model is never wrapped: gradients are exchanged
explicitly (see `parallel`), which is what lets an objective run several backward passes in one step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.core.errors import DataError, TrimtabError
from trimtab.learn import checkpoint, rng, state
from trimtab.learn.clock import Clock
from trimtab.learn.evaluate import predictions
from trimtab.learn.interrupt import Interrupt
from trimtab.learn.meter import Meter
from trimtab.learn.mix import Mixer, Mixup
from trimtab.learn.objective import Batch, Context, Objective, backward_all
from trimtab.learn.optim import make_optimizer, param_groups
from trimtab.learn.progress import Bar
from trimtab.learn.settings import Settings
from trimtab.learn.tasks import task_of

log = logging.getLogger(__name__)

_LOOK = 16  # steps between two looks at the losses: looking means waiting for the device


class Diverged(TrimtabError, ArithmeticError):
    """The loss or the weights became infinite or NaN."""


@dataclass
class FitResult:
    """What training gave.

    Attributes:
        model: the model that was given, trained, in eval mode, with nothing left on it.
        history: one row per epoch: epoch (from 1), step, loss, lr, val_accuracy, val_loss, seconds, and what the
            objective logged. The scores of other tasks: val_miou, val_accuracy, val_loss (segment), val_map, val_ap50
            (detect), val_psnr (restore); the first of them decides which row is best.
        best: the row whose weights the model has; None without validation or with ``keep="last"``.
        steps: updates made in all; seconds: time spent in all, including runs that were interrupted.
        stopped: "done", "early" (no more progress), "time" (the limit was reached) or "interrupted" (Ctrl-C).
    """

    model: nn.Module
    history: list[dict[str, Any]]
    best: dict[str, Any] | None
    steps: int
    seconds: float
    stopped: str


def fit(
    model: nn.Module,
    data: Any,
    objective: Objective | None = None,
    *,
    epochs: int | None = None,
    time_limit: float | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    opt: str | Callable[..., torch.optim.Optimizer] | None = None,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    layer_decay: float | None = None,
    sched: str | Callable[[float], float] = "onecycle",
    warmup: float | None = None,
    min_lr: float | None = None,
    clip_grad: float | None = None,
    accum: int = 1,
    precision: str = "fp32",
    channels_last: bool = False,
    ema: float | None = None,
    augment: str | Callable[..., Any] | None = "auto",
    mixup: float = 0.0,
    cutmix: float = 0.0,
    mixer: Mixer | None = None,
    seed: int = 0,
    val: str | None = "val",
    patience: int | None = None,
    keep: str = "best",
    out: str | Path | None = None,
    resume: bool = True,
    checkpoint_every: float = 30.0,
    tracker: Any = None,
    progress: bool = True,
    on_epoch: Callable[[dict[str, Any]], Any] | None = None,
    device: torch.device | str | None = None,
) -> FitResult:
    """Train a model, in place.

    The same call gives the same weights on the CPU, bit by bit, whether or not it was killed and started again in
    between (with `out`). The caller's random state is left as it was.

    Args:
        model: any `nn.Module`.
        data: what `load_data` gives, or anything with ``splits``, ``num_classes`` and ``loader``.
        objective: what is minimised; by default that of ``data.task``: cross-entropy of images (classify) or of pixels
            (segment), the detector's own criterion (detect), the mean absolute difference (restore).
        epochs: how long to train; 10 if there is no time limit either.
        time_limit: seconds, validation included. Alone, it drives the schedule: the learning rate ends low when the
            time ends. With `epochs`, it only stops a run that would take longer.
        batch_size: of one backward pass, over all processes together; 128 for classify, 16 for other tasks, 2 volumes.
        lr: default 0.1 per 128 samples for SGD; 0.001 per 128, growing with the square root, for others.
        opt: timm's name, or a callable that makes an optimizer of parameter groups; "sgd" for classify, "adamw" for
            other tasks.
        weight_decay: not for biases and 1-D tensors. layer_decay: share of the learning rate, layer by layer.
        sched: "onecycle", "cosine", "linear", "constant", a schedule of timm's, or progress -> factor.
        warmup: share of the run. min_lr: where the schedule ends.
        clip_grad: largest norm of the gradient.
        accum: batches per step.
        precision: "fp32" or "bf16" (autocast). channels_last: memory layout for convolutions.
        ema: decay of a moving average of the weights (warmed up), which is then what is validated and kept.
        augment: what the loader does to training images. mixup, cutmix: alpha. mixer: another `Mixer` instead.
        val: the split that chooses the best epoch; None for none.
        patience: stop after so many validations without a better accuracy.
        keep: weights at the end: those of the "best" validation, or the "last".
        out: folder of the checkpoint, written at each epoch's end and every `checkpoint_every` seconds (0: each step;
            otherwise at most a fiftieth of the time goes into writing).
        resume: continue from the checkpoint in `out`, if there is one.
        tracker: "tensorboard" (in `out`), or a tracker object of Accelerate's.
        on_epoch: called with each row of the history.
        device: default: what Accelerate finds.

    Raises:
        ValueError: a setting, the model or the objective does not fit.
        Diverged: the loss became NaN or infinite; the message names the step and the last good checkpoint.

    >>> import trimtab as tt
    >>> data = tt.load_data("digits")
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> result = tt.fit(net, data, epochs=5, augment="none")
    >>> result.stopped, result.best["val_accuracy"] > 0.8
    ('done', True)
    """
    given = locals()
    task = task_of(data)
    chosen: dict[str, Any] = {"out": Path(out) if out else None, "opt": opt or task.opt}
    chosen["batch_size"] = task.batch_size if batch_size is None else batch_size
    settings = Settings(**{f.name: given[f.name] for f in fields(Settings)} | chosen)
    return Run(model, data, objective or task.objective(), settings, on_epoch).run()


class Run:
    """One run of the loop."""

    def __init__(
        self, model: nn.Module, data: Any, objective: Objective, s: Settings, on_epoch: Callable[..., Any] | None
    ) -> None:
        if not isinstance(objective, Objective):
            raise ValueError(f"objective must be an Objective, got {type(objective).__name__}")
        if "train" not in data.splits:
            raise DataError("the data has no split 'train'")
        self.task = task_of(data)
        if (s.mixup or s.cutmix) and getattr(data, "task", "classify") != "classify":
            raise ValueError(f"mixup and cutmix are for classification, got data for task {data.task!r}")
        self.s, self.model, self.objective, self.on_epoch = s, model, objective, on_epoch
        started = Clock(s.time_limit, shared=False).started
        self.accelerator = _accelerator(s)
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.clock = Clock(s.time_limit, shared=self.world > 1)
        self.clock.started = started  # importing Accelerate takes time as well
        self.device = torch.device(s.device) if s.device is not None else self.accelerator.device
        self.data = data = objective.prepare(data, s, self.device)
        if s.batch_size % self.world:
            raise ValueError(f"batch_size must be a multiple of the {self.world} processes, got {s.batch_size}")
        self.batch_size = min(s.batch_size, len(data.splits["train"]) // self.world * self.world)
        self.val = _validation_split(data, s)
        self.file = s.out / checkpoint.FILE if s.out is not None else None
        self.schedule = s.schedule()
        self.meter = Meter()
        self.stopped: str | None = None
        self.position = 0  # batches of this epoch that are done
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.best_weights: dict[str, Any] | None = None
        self.waited = 0  # validations since the best
        self.validated = -1  # the step of the last validation
        self.saved_step: int | None = None
        self.agreed: Any = None  # what several processes said to each other at the last step
        self.trackers: list[Any] = []

    # -- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> FitResult:
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())  # whatever the caller has set
            stack.enter_context(rng.isolated(self.s.seed + self.rank, self.device))
            self.interrupt = stack.enter_context(Interrupt())
            stack.callback(lambda: [t.finish() for t in self.trackers])  # end_training would end the processes' group
            try:
                self.set_up()
                if not state.load(self):
                    self.bar = stack.enter_context(Bar(self.s.progress and self.accelerator.is_main_process))
                    while self.stopped is None:
                        self.epoch()
                    self.settle()
            except BaseException:
                with suppress(Exception):  # leave a plain model behind, whatever happened
                    self.strip()
                raise
            model = self.strip().eval()
        best = self.best if self.val is not None and self.s.keep == "best" else None
        return FitResult(model, self.history, best, self.ctx.step, self.clock.here(), self.stopped or "done")

    def epoch(self) -> None:
        """Train on the rest of the epoch, then look at what it brought."""
        ctx = self.ctx
        self.model.train()
        self.objective.extra.train()
        if self.position == 0:
            self.objective.on_epoch_start(ctx)
        loader = self.loader(ctx.epoch, skip=self.position)
        self.batches = self.position + len(loader)
        self.clock.tick(count=False)
        for group in _groups(loader, self.s.accum):
            self.step(group)
            self.position += len(group)
            self.look_around()
            if self.stopped is not None:
                break
        if self.stopped is None or (self.stopped == "time" and self.position >= self.batches):
            self.end_epoch()

    def step(self, group: list[dict[str, Any]]) -> None:
        """One update of the weights from one batch, or from a few whose gradients are added up."""
        s, ctx = self.s, self.ctx
        ctx.progress = self.progress()
        factor = self.schedule(ctx.progress)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = param_group["initial_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        plain = self.world == 1 and len(group) == 1
        total: Any = 0.0
        weights = 0.0
        for given in group:
            batch = Batch(given).to(self.device)
            if s.channels_last:
                batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
            weight = 1.0 if plain else len(batch["image"]) / (self.batch_size // self.world)
            if weight == 0.0:  # a process may get nothing of a short last batch
                continue
            if self.mixer is not None:
                batch = self.mixer(batch, self.model, ctx)
            losses = partial(self.objective.losses, self.model, batch, ctx)
            loss = backward_all(losses, weight=weight, autocast=self.autocast, log=ctx.log)
            total = total + (loss if weight == 1.0 else loss * weight)
            weights += weight
        if self.world > 1:
            total = self.share_gradients(total, weights)
        elif weights != 1.0:
            torch._foreach_div_([p.grad for p in self.trained if p.grad is not None], weights)
            total = total / weights
        if s.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.trained, s.clip_grad)
        self.optimizer.step()
        ctx.step += 1
        if self.ema is not None:
            self.ema.update(self.model, ctx.step)
        self.meter.add(total, s.base_lr * factor)

    def look_around(self) -> None:
        """Between two steps: is anything due?"""
        if len(self.meter.pending) >= _LOOK:
            self.look_at_losses()
        self.clock.tick()
        stop, save = (self.agreed.stop, self.agreed.save) if self.world > 1 else self._wishes()
        if stop:
            self.stopped = "interrupted"
        elif self.time_is_up():
            self.stopped = "time"
        elif save and self.position < self.batches:
            self.save()
            self.clock.tick(count=False)
        self.bar.update(self._words)

    def share_gradients(self, total: Any, weights: float) -> Tensor:
        """Exchange gradients with the other processes, and agree on what to do."""
        loss = total if isinstance(total, Tensor) else torch.zeros((), device=self.device)
        stop, save = self._wishes()
        self.agreed = self.exchange(loss, weights, stop=stop, save=save, elapsed=self.clock.here())
        self.clock.agreed = self.agreed.elapsed
        return self.agreed.loss

    def look_at_losses(self) -> None:
        """Add up the losses since the last look, and stop at the first that is not a number.

        Raises:
            Diverged: there is one.
        """
        first = self.ctx.step - len(self.meter.pending)
        bad = self.meter.flush(self.ctx.logged)
        if bad is not None:
            index, value, lr = bad
            raise self._diverged(f"the loss became {value}", first + index + 1, lr)
        for tracker in self.trackers:
            tracker.log({"train/loss": self.meter.last, "train/lr": self.meter.lr}, step=self.ctx.step)

    def end_epoch(self) -> None:
        """Average, validate, write the history, keep the best, save; then on to the next epoch."""
        s, ctx = self.s, self.ctx
        self.look_at_losses()
        self.objective.on_epoch_end(ctx)
        self.meter.flush(ctx.logged)
        last = self.time_is_up() or ctx.epoch + 1 == s.all_epochs
        self.record(last or not s.by_clock or self.clock.worth_validating())
        ctx.epoch, self.position = ctx.epoch + 1, 0
        if ctx.epoch == s.all_epochs:
            self.stopped = "done"
        elif s.patience is not None and self.waited >= s.patience:
            self.stopped = "early"
        elif last or (self.validated == ctx.step and self.time_is_up()):
            self.stopped = "time"
        elif self.interrupt.requested and self.world == 1:
            self.stopped = "interrupted"
        else:
            self.save()

    # -- an epoch's end -------------------------------------------------------------------------------------------

    def record(self, validate: bool) -> None:
        """Write a row of the history, tell those who want to know, and keep the weights if they are the best."""
        scores = self.validate() if validate and self.val is not None else {}
        row: dict[str, Any] = {
            "epoch": self.ctx.epoch + 1,
            "step": self.ctx.step,
            "loss": self.meter.mean(),
            "lr": self.meter.lr,
            **{f"val_{name}": scores.get(name) for name in self.task.scores},
            "seconds": self.clock.here(),
            **self.meter.logged(),
        }
        self.meter.reset()
        self.history.append(row)
        if scores:
            better = self.best is None or self.task.rank(row) > self.task.rank(self.best)
            self.waited = 0 if better else self.waited + 1
            if better:
                self.best = row
                if self.s.keep == "best":
                    self.best_weights = {k: _copy(v) for k, v in self.kept.state_dict().items()}
        for tracker in self.trackers:
            values = {f"epoch/{k}": v for k, v in row.items() if isinstance(v, (int, float))}
            tracker.log(values, step=self.ctx.step)
        if self.accelerator.is_main_process:
            log.debug("%s", row)
            if self.on_epoch is not None:
                self.on_epoch(dict(row))

    def validate(self) -> dict[str, float]:
        """The task's scores of the weights that would be kept; accuracy and loss for classifiers."""
        start = time.perf_counter()
        self._average_buffers()
        tally = self.task.measure(self.data, False)
        for out, batch in self._predictions():
            tally.update(out, self.task.target(batch))
        scores = tally.compute(partial(self.accelerator.reduce, reduction="sum") if self.world > 1 else None)
        self.validated, self.clock.validated_at = self.ctx.step, self.clock.elapsed()
        self.clock.validation = self._mean(time.perf_counter() - start)
        return scores

    def settle(self) -> None:
        """After the last step: the weights that are kept, and the last checkpoint."""
        if self.stopped == "interrupted":
            self.save()
        elif self.position > 0:  # the time was up in the middle of an epoch
            self.look_at_losses()
            self.record(True)
        self._average_buffers()
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        elif self.ema is not None and self.stopped != "interrupted":
            self.model.load_state_dict(self.ema.module.state_dict())
        if self.stopped != "interrupted":
            self.save(done=True)

    def save(self, *, done: bool = False) -> None:
        """Write the checkpoint, if there is a place for it.

        Raises:
            Diverged: the weights are not finite; nothing is written.
        """
        if not done:
            self.look_at_losses()
        self._average_buffers()
        values = [t for t in self.model.state_dict().values() if isinstance(t, Tensor) and t.is_floating_point()]
        if not all(torch.stack([t.isfinite().all() for t in values]).tolist()):
            raise self._diverged("the weights are no longer finite", self.ctx.step, self.meter.lr)
        if self.file is not None:
            state.save(self, done=done)

    def strip(self) -> nn.Module:
        """The plain model, with nothing of training left on it."""
        if self.s.channels_last:
            self.model.to(memory_format=torch.contiguous_format)
        self.model.zero_grad(set_to_none=True)
        return self.objective.finish(self.model)

    # -- set-up -------------------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Everything that the loop needs, from a first batch."""
        s = self.s
        self.ctx = Context(
            generator=torch.Generator(self.device).manual_seed(s.seed + self.rank),
            rng=np.random.default_rng([s.seed, self.rank]),
            device=self.device,
        )
        self.model.to(self.device)
        if s.channels_last:
            self.model.to(memory_format=torch.channels_last)
        loader = self.loader(0)
        if len(loader) == 0:
            raise DataError("the split 'train' gives no batch; is it empty?")
        self.objective.setup(self.model, Batch(next(iter(loader))).to(self.device))
        self.objective.extra.to(self.device)
        everything: list[nn.Module] = [self.model, self.objective.extra]
        groups = param_groups(everything, lr=s.base_lr, weight_decay=s.weight_decay, layer_decay=s.layer_decay)
        for group in groups:
            group["initial_lr"] = group["lr"]
        self.trained: list[nn.Parameter] = [p for g in groups for p in g["params"]]
        self.optimizer = make_optimizer(groups, s.opt, momentum=s.momentum)
        if self.world > 1:
            from trimtab.learn.parallel import Exchange, same_start

            same_start(self.accelerator, everything)
            self.exchange = Exchange(self.accelerator, self.trained)
        self.ema: Any = None
        if s.ema is not None:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(self.model, decay=s.ema, use_warmup=True)
        self.kept: nn.Module = self.model if self.ema is None else self.ema.module
        self.mixer = s.mixer
        if s.mixup or s.cutmix:
            self.mixer = Mixup(self.data.num_classes, mixup=s.mixup, cutmix=s.cutmix)
        self.autocast: Callable[[], Any] = nullcontext
        if s.precision == "bf16":
            self.autocast = partial(torch.autocast, self.device.type, dtype=torch.bfloat16)
        if s.all_epochs is not None:
            self.ctx.total_steps = s.all_epochs * -(-len(loader) // s.accum)
        if s.tracker is not None and self.accelerator.is_main_process:
            plain = {k: v for k, v in s.asdict().items() if isinstance(v, (bool, int, float, str))}
            self.accelerator.init_trackers("trimtab", config=plain)
            self.trackers = list(self.accelerator.trackers)
        if s.time_limit is not None and self.val is not None:
            self.clock.validation = self._foresee_validation()

    def loader(self, epoch: int, skip: int = 0) -> Any:
        """The batches of an epoch of the training split, from batch `skip` on."""
        return self.data.loader(
            "train",
            batch_size=self.batch_size,
            shuffle=True,
            augment=self.s.augment,
            seed=self.s.seed,
            epoch=epoch,
            drop_last=True,
            rank=self.rank,
            world=self.world,
            device=self.device,
            skip=skip,
        )

    # -- helpers ------------------------------------------------------------------------------------------------

    def progress(self) -> float:
        """Share of the run that is done, by steps or by the clock; it never goes back."""
        if self.ctx.total_steps is not None:
            return min(1.0, self.ctx.step / self.ctx.total_steps)
        return max(self.ctx.progress, self.clock.progress())

    def time_is_up(self) -> bool:
        return self.clock.is_up(validated=self.val is None or self.validated == self.ctx.step)

    def _wishes(self) -> tuple[bool, bool]:
        """Does this process want to stop, or to save?"""
        return self.interrupt.requested, self.file is not None and self.clock.save_due(self.s.checkpoint_every)

    def _predictions(self) -> Iterator[tuple[Any, Batch]]:
        return predictions(
            self.kept,
            self.data,
            self.val or "",
            objective=self.objective,
            batch_size=2 * self.batch_size,
            device=self.device,
            channels_last=self.s.channels_last,
            rank=self.rank,
            world=self.world,
        )

    def _foresee_validation(self) -> float:
        """Seconds that a validation will take, from its first batches."""
        times, batches = [time.perf_counter()], self._predictions()
        for _ in islice(batches, 3):
            times.append(time.perf_counter())
        batches.close()  # type: ignore[attr-defined]  # a generator: the model is back in its mode
        took = [b - a for a, b in pairwise(times)]
        loader = self.data.loader(self.val, batch_size=2 * self.batch_size, shuffle=False, drop_last=False)
        return self._mean(min(took, default=0.0) * len(loader))

    def _mean(self, seconds: float) -> float:
        """The mean over processes, which is the same number on each of them."""
        if self.world == 1:
            return seconds
        return float(self.accelerator.reduce(torch.tensor(seconds, device=self.device), reduction="mean"))

    def _average_buffers(self) -> None:
        if self.world > 1:
            from trimtab.learn.parallel import average_buffers

            average_buffers(self.accelerator, [self.model] if self.ema is None else [self.model, self.ema.module])

    def _diverged(self, what: str, step: int, lr: float) -> Diverged:
        good = f"the last good checkpoint is {self.file} (step {self.saved_step})"
        if self.saved_step is None:
            good = "there is no checkpoint" + ("" if self.file else " (no out was given)")
        where = f"at step {step} (epoch {self.ctx.epoch + 1}, lr {lr:.3g})"
        return Diverged(f"{what} {where}; {good}; try a lower lr, a longer warmup or clip_grad=1.0")

    def _words(self) -> tuple[float, str]:
        words = f"epoch {self.ctx.epoch + 1}  loss {self.meter.last:.3f}"
        name, say = f"val_{self.task.scores[0]}", self.task.words
        seen = [r[name] for r in self.history if r[name] is not None]
        return self.progress(), words + (f"  val {say(seen[-1])} (best {say(max(seen))})" if seen else "")


def _groups(loader: Any, size: int) -> Iterator[list[dict[str, Any]]]:
    """The batches of each step."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


def _validation_split(data: Any, s: Settings) -> str | None:
    if s.val is None or (s.val in data.splits and len(data.splits[s.val])):
        return s.val
    if s.val != "val" or s.patience is not None:
        raise DataError(f"val must be one of {', '.join(data.splits)}, got {s.val!r}")
    log.info("the data has no validation split: the last weights are kept")
    return None


def _accelerator(s: Settings) -> Any:
    """Accelerate's view of this machine. Precision stays with the loop: Accelerate has one per process, we per run."""
    from accelerate import Accelerator
    from accelerate.state import PartialState

    on_cpu = s.device is not None and torch.device(s.device).type == "cpu"
    return Accelerator(
        cpu=True if on_cpu and not PartialState._shared_state else None,
        log_with=s.tracker,
        project_dir=s.out if s.tracker is not None else None,
    )


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
