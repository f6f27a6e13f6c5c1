"""Experience replay: a small memory of images, rehearsed while new ones are learned.

Three losses of the field: "er" (cross-entropy of both, Chaudhry et al. 2019), "er_ace" (new images do not push old
classes away, Caccia et al. 2022) and "der++" (the memory keeps logits, too, Buzzega et al. 2020).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.data import Data, Split
from trimtab.learn.adapt.frame import Learner, check_classes, follow
from trimtab.learn.adapt.metrics import StreamResult
from trimtab.learn.adapt.streams import Stream, Task
from trimtab.learn.objective import Batch, Context, Objective, check_logits, probe
from trimtab.learn.settings import Settings

LOSSES = ("er", "er_ace", "der++")
POLICIES = ("reservoir", "ring")


class ReplayBuffer:
    """A memory of a fixed number of images, as bytes; they are augmented anew whenever they are drawn.

    Args:
        size: images.
        policy: "reservoir" (every image that came is kept with equal chances), or "ring" (the last ones).
        seed: of the chances.

    Attributes:
        fields: what is kept of each image: image uint8 (n, C, H, W), label, task, and what else `add` was given.

    >>> memory = ReplayBuffer(3, policy="ring")
    >>> memory.add(image=torch.zeros(5, 1, 2, 2, dtype=torch.uint8), label=torch.arange(5), task=torch.zeros(5).long())
    >>> len(memory), sorted(memory.fields["label"].tolist())
    (3, [2, 3, 4])
    """

    def __init__(self, size: int, *, policy: str = "reservoir", seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"the size of the memory must be at least 1 image, got {size}")
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        self.size, self.policy = size, policy
        self.came = 0
        self.fields: dict[str, Tensor] = {}
        self._rng = np.random.default_rng([seed, 577])

    def __len__(self) -> int:
        return min(self.came, self.size)

    def add(self, **fields: Tensor) -> None:
        """Images that come, one after the other: ``image`` uint8 (B, C, H, W), ``label`` (B,), ``task`` (B,), ..."""
        fields = {k: v.detach().cpu() for k, v in fields.items()}
        for i in range(len(fields["label"])):
            place = self._place()
            self.came += 1
            for name, value in fields.items():
                if name not in self.fields:
                    self.fields[name] = value.new_zeros(self.size, *value.shape[1:])
                if place is not None:
                    self.fields[name][place] = value[i]

    def draw(self, n: int, like: Data, *, augment: Any = None, seed: int = 0, step: int = 0) -> Batch:
        """At most `n` different images of the memory, augmented and normalised as `like` does it."""
        kept = {k: v[: len(self)] for k, v in self.fields.items()}
        data = like.like(splits={"train": Split(kept["image"], kept["label"])})
        size = min(n, len(self))
        drawn = data.loader("train", batch_size=size, shuffle=True, augment=augment, seed=seed, epoch=step).batch(0)
        more = {k: v[drawn["index"]] for k, v in kept.items() if k not in ("image", "label")}
        return Batch(drawn | more)

    def _place(self) -> int | None:
        """Where the next image goes."""
        if self.came < self.size:
            return self.came
        if self.policy == "ring":
            return self.came % self.size
        place = int(self._rng.integers(self.came + 1))
        return place if place < self.size else None

    def state_dict(self) -> dict[str, Any]:
        """Images, fields and chances."""
        return {"came": self.came, "fields": dict(self.fields), "rng": _plain(self._rng.bit_generator.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.came, self.fields = state["came"], {k: v.clone() for k, v in state["fields"].items()}
        self._rng.bit_generator.state = {**state["rng"], "state": {k: int(v) for k, v in state["rng"]["state"].items()}}


class Replay(Objective):
    """The loss of a task with a memory: every batch comes with as many images of the memory.

    Args:
        memory: what is rehearsed; new images enter it in the first epoch. task: the number of the task.
        loss: "er", "er_ace" or "der++". alpha, beta: weights of the last one's terms.
        draw: images of the memory in a step; None: as many as the batch has.
        together: one pass over new and old images, so that batch norms see both; or a pass for each.
        seen: classes of this and earlier tasks; "er_ace" hides those that are not in the batch from new images.
    """

    def __init__(
        self,
        memory: ReplayBuffer,
        *,
        task: int = 0,
        loss: str = "er",
        draw: int | None = None,
        alpha: float = 0.1,
        beta: float = 0.5,
        together: bool = True,
        seen: tuple[int, ...] = (),
    ) -> None:
        self._memory, self.task, self.loss, self.draw = memory, task, loss, draw
        self.alpha, self.beta, self.together, self.seen = alpha, beta, together, list(seen)

    def prepare(self, data: Any, settings: Settings, device: torch.device) -> Any:
        self._data, self._augment, self._seed = data, settings.augment, settings.seed
        return data

    def setup(self, model: nn.Module, batch: Batch) -> None:
        check_logits(probe(self, model, batch), batch)

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        draws = (2 if self.loss == "der++" else 1) if len(self._memory) else 0
        old = [self._rehearsed(batch, 2 * ctx.step + i) for i in range(draws)]
        parts = [batch.replace(task=torch.full_like(batch["label"], self.task)), *old]
        logits = self.passes(model, parts)
        found = {"new": self._new(logits[0], batch["label"]), **self._old(logits[1:], old), **self.penalties(model)}
        if ctx.epoch == 0:
            raw = self._data.splits["train"].pixels(batch["index"].cpu())
            kept = {"image": raw, "label": batch["label"], "task": parts[0]["task"]}
            self._memory.add(**kept, **({"logits": logits[0].float()} if self.loss == "der++" else {}))
        return found

    def passes(self, model: nn.Module, parts: list[Batch]) -> list[Tensor]:
        """Logits of new images, and of each draw from the memory."""
        if not self.together:
            return [model(p["image"]) for p in parts]
        return list(self.forward(model, parts).split([len(p["label"]) for p in parts]))

    def forward(self, model: nn.Module, parts: list[Batch]) -> Tensor:
        """Logits of all images in one pass."""
        return model(torch.cat([p["image"] for p in parts]))

    def penalties(self, model: nn.Module) -> dict[str, Tensor]:
        """More terms of the loss."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return self._memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._memory.load_state_dict(state)

    def _rehearsed(self, batch: Batch, step: int) -> Batch:
        n = self.draw or len(batch["label"])
        drawn = self._memory.draw(n, self._data, augment=self._augment, seed=self._seed, step=step)
        return drawn.to(batch["image"].device)

    def _new(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.loss == "er_ace" and self.seen:
            absent = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            absent[self.seen] = True
            absent[labels] = False
            logits = logits.masked_fill(absent, torch.finfo(logits.dtype).min)
        return F.cross_entropy(logits, labels)

    def _old(self, logits: list[Tensor], old: list[Batch]) -> dict[str, Tensor]:
        if not old:
            return {}
        if self.loss == "der++":
            alike = self.alpha * F.mse_loss(logits[0], old[0]["logits"])
            return {"alike": alike, "old": self.beta * F.cross_entropy(logits[1], old[1]["label"])}
        return {"old": F.cross_entropy(logits[0], old[0]["label"])}


class Rehearsing(Learner):
    """A learner with a memory; `how` are arguments of its objective."""

    objective: type[Replay] = Replay

    def __init__(
        self, model: nn.Module, stream: Stream, memory: ReplayBuffer, how: dict[str, Any], **training: Any
    ) -> None:
        super().__init__(model, stream, **training)
        self._memory, self._how = memory, how
        self.size, self.policy, self.how = memory.size, memory.policy, [f"{k}={v}" for k, v in sorted(how.items())]

    def learn(self, task: Task) -> None:
        seen = self.stream.seen(task.id) if task.id else ()
        objective = self.objective(self._memory, task=task.id, seen=seen, **self._how)
        self.fit(task.data, objective, f"task-{task.id}")

    def state_dict(self) -> dict[str, Any]:
        return self._memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._memory.load_state_dict(state)


def check_loss(loss: str) -> None:
    """Raises ValueError when there is no such loss."""
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")


def replay(
    model: nn.Module,
    stream: Stream,
    *,
    buffer: int = 500,
    policy: str = "reservoir",
    loss: str = "er",
    draw: int | None = None,
    alpha: float = 0.1,
    beta: float = 0.5,
    together: bool = True,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    **training: Any,
) -> StreamResult:
    """Fine-tune on one task after the other, with a memory of earlier images.

    Args:
        buffer: images in the memory. policy: how it is filled, see `ReplayBuffer`.
        loss: "er", "er_ace" or "der++"; alpha, beta: weights of the last one's terms.
        draw: images of the memory in each step; None: as many as are new.
        together: one pass over new and old images, or a pass for each.
        seed: of the training and the memory.
        out, resume, **training: as for `finetune`.
    """
    check_classes(model, stream)
    check_loss(loss)
    how = {"loss": loss, "draw": draw, "alpha": alpha, "beta": beta, "together": together}
    learner = Rehearsing(model, stream, ReplayBuffer(buffer, policy=policy, seed=seed), how, seed=seed, **training)
    return follow("replay", learner, out=out, resume=resume)


def _plain(state: Any) -> dict[str, Any]:
    """The state of a generator; its 128-bit numbers as words, since checkpoints keep what JSON keeps."""
    return {**state, "state": {k: str(v) for k, v in state["state"].items()}}
