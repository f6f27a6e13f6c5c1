"""DepS (Annavajjala et al., "Delayed epsilon-Shrinking for Faster Once-For-All Training", arXiv 2407.06167).

The full network is trained alone until about half of the run. Only then does the sandwich begin, with the full network
as the teacher of the others, and their gradients are faded in: the learning rate that they see rises in a straight line
from zero. That costs less than to train all from the start, gives a better teacher, and spares the full network the
shock.

What differs: shares of the run instead of epochs. Channels are put in order of their norm when the supernet is made
(`order`), not once more at the transition; to have them ordered by what the full network has learned, train it with
`tt.fit` first and call `deps` with `start=0`. OFA's kernel transformations are not used, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.budget import Budget
from trimtab.core.card import Card, Claim
from trimtab.learn.objective import Batch, Context, Losses
from trimtab.learn.schedule import Schedule
from trimtab.search.from_builder import Rule
from trimtab.search.passes import Pass, Passes
from trimtab.search.samplers import Sandwich
from trimtab.search.space import Arch, Space
from trimtab.search.supernet import Elastic, elastic
from trimtab.search.trained import Trained, train

CARD = Card(
    slug="deps",
    title="DεpS: Delayed ε-Shrinking for Faster Once-For-All Training",
    arxiv="2407.06167",
    year=2024,
    kind="method",
    tasks=("classify",),
    claims=(
        Claim(
            "delayed",
            "Starting to shrink the full model when it is ~50% trained beats starting at once (BigNAS-like) or after "
            "full training (OFA progressive shrinking) in cost and accuracy: +1.83% ImageNet top-1, or the same "
            "accuracy at 1.3x fewer FLOPs, up to 2.5x lower training cost",
        ),
        Claim(
            "eps_ramp",
            "Raising the sub-networks' own learning rate slowly from zero at the transition avoids the loss spike in "
            "the full net and improves distillation",
        ),
        Claim(
            "ikd",
            "In-place distillation from a partially trained full net is better than from a random or a fixed fully "
            "trained one",
        ),
    ),
)
AGGREGATES = ("sum", "avg", "avg_sqrt")


def deps(
    network: nn.Module | Callable[..., nn.Module],
    data: Any,
    *,
    space: Mapping[str, Any] | Space,
    budget: str | Budget | None = None,
    start: float = 0.5,
    ramp: float = 5 / 180,
    multiplier: float = 1.0,
    n: int = 2,
    aggregate: str = "sum",
    smoothing: float = 0.1,
    temperature: float = 1.0,
    warmup: float = 0.0,
    floor: float = 2.5e-3 / 0.1625,
    weight_decay: float = 3e-5,
    order: str | None = "norm",
    rules: Mapping[str, Rule] | None = None,
    epochs: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    **training: Any,
) -> Trained:
    """A supernet whose full network is trained first; `.best("macs<=30%")` gives a network of it.

    Args:
        network, space, order, rules: as for `elastic`. The network is copied.
        data: a `Data` to train on.
        budget: what networks will be asked for; refused before training if the smallest cannot meet it.
        start: share of the run after which the others learn at full strength (T_0).
        ramp: share of the run, before that, in which their learning rate rises from zero (5 of 180 epochs).
        multiplier: their learning rate as a share of the full network's, at and after `start`.
        n: random networks in each step, besides the full and the smallest one.
        aggregate: "sum" adds the gradients of a step; "avg" divides each entry of them by the weights of the networks
            that have it, "avg_sqrt" by the square root of that.
        smoothing: of the labels that the full network learns. temperature: of the softmax that the others learn.
        warmup: share of the run. floor: share of the peak below which the cosine does not fall.
        out: folder of the checkpoint; what was interrupted goes on there, to the same result.
        **training: as for `fit`.

    Raises:
        ValueError: an argument makes no sense. SurgeryError: see `elastic`.
        BudgetError: no network of the space can meet the budget.
        KeyboardInterrupt: training was interrupted; what `out` has is resumed by the same call.

    >>> import trimtab as tt
    >>> data = tt.load_data("digits", limit=200)
    >>> net = tt.create_model("trim_10k", num_classes=10, in_chans=1, img_size=8)
    >>> family = deps(net, data, space={"width": (0.5, 1)}, epochs=2, batch_size=32, progress=False)
    >>> small = family.best("macs<=60%", evaluations=2)
    >>> tt.measure(small, (1, 8, 8)).macs < 0.6 * tt.measure(net, (1, 8, 8)).macs
    True
    """
    if "sched" in training:
        raise ValueError("the ramp belongs to a cosine: set warmup and floor instead of sched")
    sched = Schedule("cosine", warmup=warmup, least=floor)
    net = elastic(network, data, space, order=order, rules=rules, seed=seed)
    objective = Shrinking(
        net, sched, start=start, ramp=ramp, multiplier=multiplier, n=n, aggregate=aggregate, smoothing=smoothing,
        temperature=temperature, seed=seed,
    )  # fmt: skip
    return train(
        net, data, objective, budget=budget, out=out, epochs=epochs, seed=seed, sched=sched,
        weight_decay=weight_decay, **training,
    )  # fmt: skip


class Shrinking(Passes):
    """The full network alone, then a sandwich whose other networks are faded in.

    Args:
        lr: progress -> factor on the learning rate; the same that training uses.
    """

    def __init__(
        self,
        net: Elastic,
        lr: Callable[[float], float],
        *,
        start: float = 0.5,
        ramp: float = 5 / 180,
        multiplier: float = 1.0,
        n: int = 2,
        aggregate: str = "sum",
        smoothing: float = 0.1,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= start <= 1:
            raise ValueError(f"start must be a share of the run, in [0, 1], got {start}")
        if not 0 <= ramp <= 1:
            raise ValueError(f"ramp must be a share of the run, in [0, 1], got {ramp}")
        if multiplier <= 0:
            raise ValueError(f"multiplier must be positive, got {multiplier}")
        if aggregate not in AGGREGATES:
            raise ValueError(f"aggregate must be one of {', '.join(AGGREGATES)}, got {aggregate!r}")
        super().__init__(
            net, Sandwich(net.space, n, seed=seed), arrange=self._delayed, smoothing=smoothing, temperature=temperature
        )
        self._elastic, self._lr = net, lr
        self.start, self.ramp, self.multiplier, self.aggregate = start, min(ramp, start), multiplier, aggregate

    def beta(self, progress: float) -> float:
        """Weight of the other networks' losses: beta times the learning rate rises linearly, then beta is constant."""
        if progress >= self.start:
            return self.multiplier
        risen = (progress - (self.start - self.ramp)) / self.ramp if self.ramp else 0.0
        return max(0.0, risen) * self.multiplier * self._lr(self.start) / self._lr(progress)

    def _delayed(self, archs: Sequence[Arch], ctx: Context) -> list[Pass]:
        full, *others = archs
        beta = self.beta(ctx.progress)
        ctx.log("beta", beta)
        return [Pass(full, regularise=True), *(Pass(a, (0,), weight=beta) for a in others if beta)]

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        passes = self.arrange(self._sampler.next(ctx.step), ctx)
        return self._each(passes, model, batch) if self.aggregate == "sum" else self._divided(passes, model, batch)

    def _divided(self, passes: Sequence[Pass], model: nn.Module, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """Every gradient is divided as it arrives, before it is added to the others."""
        weights = self.weights(passes, model)
        if self.aggregate == "avg_sqrt":
            weights = {name: w.sqrt() for name, w in weights.items()}
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        hooks = [p.register_hook(lambda g, w=weights[name]: g / w) for name, p in trained]
        try:
            yield from self._each(passes, model, batch)
        finally:
            for hook in hooks:
                hook.remove()

    def weights(self, passes: Sequence[Pass], model: nn.Module) -> dict[str, Tensor]:
        """For each entry of each parameter, the weights of the networks that have it, added up (1 where none has)."""
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for p in passes:
            for name, used in self._elastic.child(p.arch).use(model).items():
                total[name] += p.weight * used
        return {name: torch.where(t > 0, t, torch.ones_like(t)) for name, t in total.items()}
