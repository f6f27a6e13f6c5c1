"""Objectives: what to minimise, and nothing else.

An objective gives its loss in one of three forms: a tensor, a dict of named tensors (their sum is minimised, the parts
are logged), or, where one backward pass is not enough, a generator of those. The loop backpropagates each loss that a
generator yields before it resumes the generator, so only one graph is alive at a time, and gradients ADD.

Two rules for generators. Never yield inside a ``with`` (``no_grad``, ``autocast``): the loop would run in it; it
checks, and raises. Whatever changes the model between two yields belongs in try/finally: the loop closes a generator
that it abandons.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.data.images import VOID
from trimtab.learn.losses import soft_ce
from trimtab.nn.modes import eval_mode

if TYPE_CHECKING:
    from trimtab.learn.settings import Settings

Losses = Tensor | dict[str, Tensor] | Iterator[Tensor | dict[str, Tensor]]


class Batch(dict[str, Any]):
    """A batch: a dict of tensors whose keys can be read as attributes: ``batch.image``, ``batch.label``.

    >>> b = Batch(image=torch.zeros(2, 1, 4, 4), label=torch.tensor([0, 1]))
    >>> b.image.shape[0] == len(b.label), b.replace(label=None).label is None
    (True, True)
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the batch has no {name!r}; it has {', '.join(self)}") from None

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on `device`."""
        return Batch({k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in self.items()})

    def replace(self, **fields: Any) -> Batch:
        """A copy with some fields replaced or added."""
        return Batch({**self, **fields})


@dataclass
class Context:
    """Where training is, and the randomness it may use.

    Attributes:
        epoch, step: counted from 0; a step is one update of the optimizer.
        total_steps: steps of the whole run, or None when a clock ends it.
        progress: share of the run that is done, in [0, 1].
        generator: for tensors, on the training device; rng: for decisions on the host. Both are part of a
            checkpoint, so what is drawn from them is the same in a resumed run.
        device: where training runs.
    """

    epoch: int = 0
    step: int = 0
    total_steps: int | None = None
    progress: float = 0.0
    generator: torch.Generator = field(default_factory=torch.Generator)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    logged: list[tuple[str, Any]] = field(default_factory=list, repr=False)

    def log(self, name: str, value: float | Tensor) -> None:
        """Note a value; the history shows its mean over the epoch."""
        self.logged.append((name, value.detach() if isinstance(value, Tensor) else value))


class Objective:
    """What is minimised. Subclasses give `losses`; the rest has defaults.

    Attributes:
        extra: modules that are trained with the model and thrown away at the end; `setup` fills it.
    """

    extra: nn.ModuleDict

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Here and not in ``__init__``, so that a subclass cannot forget it."""
        self = super().__new__(cls)
        self.extra = nn.ModuleDict()
        return self

    def prepare(self, data: Any, settings: Settings, device: torch.device) -> Any:
        """The data to learn from: as given, or with views, fields or splits of the objective's own. Called first."""
        return data

    def setup(self, model: nn.Module, batch: Batch) -> None:
        """Build train-only modules from real shapes, and refuse at the door what cannot work."""

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        """A tensor, a dict of named tensors, or a generator of those."""
        raise NotImplementedError(f"{type(self).__name__} must define losses(model, batch, ctx)")

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """What evaluation measures: logits (B, K)."""
        return model(batch["image"])

    def finish(self, model: nn.Module) -> nn.Module:
        """The plain model again: layer swaps undone, heads dropped."""
        return model

    def on_epoch_start(self, ctx: Context) -> None:
        """Called before the first batch of an epoch (not when training resumes inside one)."""

    def on_epoch_end(self, ctx: Context) -> None:
        """Called after the last batch of an epoch, before evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """What else must survive a kill: tensors, numbers, strings, lists and dicts. `extra` is kept anyway."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class Classify(Objective):
    """Cross-entropy with hard or soft labels; the default objective.

    Args:
        smoothing: label smoothing.
    """

    def __init__(self, *, smoothing: float = 0.0) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        self.smoothing = smoothing

    def setup(self, model: nn.Module, batch: Batch) -> None:
        check_logits(probe(self, model, batch), batch)

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        return soft_ce(self.predict(model, batch), batch["label"], smoothing=self.smoothing)


@torch.no_grad()
def probe(objective: Objective, model: nn.Module, batch: Batch) -> Tensor:
    """The prediction for the first two samples, in eval mode; the model is left in the mode it had."""
    with eval_mode(model):
        return objective.predict(model, Batch({k: v[:2] if isinstance(v, Tensor) else v for k, v in batch.items()}))


def check_logits(logits: Any, batch: Batch, *, who: str = "the model") -> int:
    """The number of classes of some logits, if they are (B, K) with enough classes for the labels of the batch.

    Where labels are maps (B, H, W), logits are (B, K, H, W); 255 in them is no class.

    Raises:
        ValueError: they are not.
    """
    label = batch["label"]
    per_pixel = label.ndim > 2
    if not isinstance(logits, Tensor) or logits.ndim != (label.ndim + 1 if per_pixel else 2):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{who} must give logits (B, K{', H, W' if per_pixel else ''}), got {got}")
    if per_pixel and logits.shape[2:] != label.shape[1:]:
        want, got = (tuple(x.shape[-2:]) for x in (label, logits))
        raise ValueError(f"{who} must give logits of the size of the labels {want}, got {got}")
    seen = label.masked_fill(label == VOID, -1) if per_pixel else label
    need = label.shape[1] if label.ndim == 2 else int(seen.max()) + 1
    if logits.shape[1] < need:
        raise ValueError(f"{who} must have at least {need} classes for these labels, got {logits.shape[1]}")
    return logits.shape[1]


def as_generator(losses: Losses) -> Generator[Tensor | dict[str, Tensor], None, None]:
    """The three forms of a loss as one."""
    if isinstance(losses, (Tensor, dict)):
        return _one(losses)
    if isinstance(losses, Generator):
        return losses
    raise TypeError(f"losses() must return a tensor, a dict of tensors, or be a generator, got {type(losses).__name__}")


def _one(losses: Tensor | dict[str, Tensor]) -> Generator[Tensor | dict[str, Tensor], None, None]:
    yield losses


def backward_all(
    compute: Callable[[], Losses],
    *,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    weight: float = 1.0,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    log: Callable[[str, Tensor], None] | None = None,
) -> Tensor:
    """Compute the losses of one batch and backpropagate each as it comes; never collect them first.

    ``list(gen)`` or ``sum(gen)`` would be silently wrong for methods that need the gradient between two losses, and
    would hold every graph at once. Autocast is entered around the computing of a loss only.

    Args:
        compute: gives the losses, e.g. ``lambda: objective.losses(model, batch, ctx)``.
        backward: what backpropagates a scalar. weight: factor on every loss.
        log: called with the name and value of each part of a dict.

    Returns:
        The sum of all losses, detached.

    Raises:
        RuntimeError: a generator yielded inside ``no_grad``, ``autocast`` or the like.
        ValueError: a loss is not a scalar with a gradient, or there was none.
    """
    with autocast():
        losses = compute()
    if isinstance(losses, Tensor):  # the common case, without the detour
        _backward(losses, backward, weight)
        return losses.detach()
    total: Tensor | None = None
    with closing(as_generator(losses)) as generator:
        while True:
            with autocast():
                before = _mode()
                loss: Any = next(generator, None)
                if _mode() != before:
                    raise RuntimeError(
                        "losses() yielded inside a context manager that changes autograd or autocast "
                        f"({_difference(before, _mode())}); end the `with` before the yield"
                    )
                if isinstance(loss, dict):
                    if log is not None:
                        for name, part in loss.items():
                            log(name, part)
                    loss = sum(loss.values()) if loss else None
                    if loss is None:
                        raise ValueError("losses() gave an empty dict")
            if loss is None:
                break
            _backward(loss, backward, weight)
            total = loss.detach() if total is None else total + loss.detach()
            del loss  # the graph must be gone before the next one is built
    if total is None:
        raise ValueError("losses() yielded nothing")
    return total


def _backward(loss: Any, backward: Callable[[Tensor], Any], weight: float) -> None:
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.requires_grad:
        if isinstance(loss, Tensor) and loss.ndim == 0:
            raise ValueError("a loss must depend on parameters that require a gradient, got one that does not")
        got = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"a loss must be a scalar tensor, got {got}")
    backward(loss if weight == 1.0 else loss * weight)


def _mode() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
    )


def _difference(before: tuple[Any, ...], after: tuple[Any, ...]) -> str:
    names = ("gradients enabled", "inference mode", "autocast on CPU", "autocast on CUDA")
    return ", ".join(f"{n}: {a} -> {b}" for n, a, b in zip(names, before, after) if a != b)
