"""One objective for all weight sharing: which networks are trained in a step, on which target, with which weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trimtab.learn.losses import soft_ce
from trimtab.learn.objective import Batch, Context, Losses, Objective, check_logits, probe
from trimtab.search.samplers import Sampler
from trimtab.search.space import Arch, Space


class Network(Protocol):
    """What is trained: a supernet."""

    @property
    def space(self) -> Space: ...

    def __call__(
        self, x: Tensor, arch: Arch, *, model: nn.Module | None = None, regularise: bool = False
    ) -> Tensor: ...


@dataclass(frozen=True)
class Pass:
    """One network's part in a step.

    Attributes:
        arch: the network.
        teachers: places, in this step, of earlier passes whose mean softmax is the target; none means the labels.
        weight: factor on its loss. Losses of a step are summed.
        regularise: dropout, drop-path and the like are on.
    """

    arch: Arch
    teachers: tuple[int, ...] = ()
    weight: float = 1.0
    regularise: bool = False


class Passes(Objective):
    """Several backward passes a step; one network's graph is alive at a time, and gradients add up.

    Args:
        net: the supernet.
        sampler: draws the networks of a step; its state is part of the checkpoint.
        arrange: makes passes of them. By default the first is trained on the labels, with its regularisation, and the
            others on the first's softmax if `distil`, else on the labels.
        distil: see above.
        temperature: of softmax in distillation; the loss is multiplied by its square.
        smoothing: label smoothing.
        distance: (logits, target probabilities) -> loss of a distilled pass; default cross-entropy.
    """

    def __init__(
        self,
        net: Network,
        sampler: Sampler,
        *,
        arrange: Callable[[Sequence[Arch], Context], Sequence[Pass]] | None = None,
        distil: bool = True,
        temperature: float = 1.0,
        smoothing: float = 0.0,
        distance: Callable[[Tensor, Tensor], Tensor] = soft_ce,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        self._net, self._sampler = net, sampler
        self.sampler = type(sampler).__qualname__  # public attributes tell one run from another
        self.distil, self.temperature, self.smoothing, self.distance = distil, temperature, smoothing, distance
        self.arrange = arrange or self._first_teaches

    def setup(self, model: nn.Module, batch: Batch) -> None:
        check_logits(probe(self, model, batch), batch, who="the largest network")
        smallest = self._net.space.min()
        two = Batch({k: v[:2] if isinstance(v, Tensor) else v for k, v in batch.items()})
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                check_logits(self._net(two["image"], smallest, model=model), two, who="the smallest network")
        finally:
            model.train(training)

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        passes = self.arrange(self._sampler.next(ctx.step), ctx)
        return self._each(passes, model, batch)

    def _each(self, passes: Sequence[Pass], model: nn.Module, batch: Batch) -> Iterator[dict[str, Tensor]]:
        wanted = {t for p in passes for t in p.teachers}
        seen: dict[int, Tensor] = {}
        for i, p in enumerate(passes):
            if any(not 0 <= t < i for t in p.teachers):
                raise ValueError(f"teachers of pass {i} must be earlier passes of the step, got {p.teachers}")
            logits = self._net(batch["image"], p.arch, model=model, regularise=p.regularise)
            if i in wanted:
                seen[i] = (logits.detach().float() / self.temperature).softmax(-1)
            if p.teachers:
                target = torch.stack([seen[t] for t in p.teachers]).mean(0)
                loss = self.distance(logits / self.temperature, target) * self.temperature**2
            else:
                loss = soft_ce(logits, batch["label"], smoothing=self.smoothing)
            yield {f"pass_{i}": loss * p.weight}

    def _first_teaches(self, archs: Sequence[Arch], ctx: Context) -> list[Pass]:
        first, *others = archs
        teachers = (0,) if self.distil else ()
        return [Pass(first, regularise=True), *(Pass(a, teachers) for a in others)]

    def state_dict(self) -> dict[str, Any]:
        return {"sampler": self._sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampler.load_state_dict(state["sampler"])
