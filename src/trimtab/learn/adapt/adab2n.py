"""AdaB2N: batch norms that do not lean to the task at hand (Lyu et al., arXiv 2310.08855), for streams with replay.

A batch of a replay method mixes many new images with few old ones, so BatchNorm leans to the present twice: inside the
batch, and in its running average. This layer weighs the tasks of a batch with the posterior mean of a Dirichlet
distribution whose prior it learns, lets the momentum fall from a cumulative towards an exponential average, and adds a
loss that ties the moments of batches to the running ones. `convert` puts it in the place of every batch norm of a
model, by edits; at the end `merged` gives plain batch norms back. In eval mode it is a batch norm all along.

Differences from the open code: the weight of tasks that are missing in a batch is given to those that are there
(``renormalize=False`` loses it, as the code does: with 10 images of 20 tasks moments shrink by a lot), and the task of
an image is looked up, so tasks may differ in size. As there, the biased variance goes into the running average.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from trimtab.core.card import Card, Claim
from trimtab.core.edit import Edit, Replace, apply
from trimtab.learn.adapt.frame import check_classes, follow
from trimtab.learn.adapt.metrics import StreamResult
from trimtab.learn.adapt.replay import Rehearsing, Replay, ReplayBuffer, check_loss
from trimtab.learn.adapt.streams import Stream
from trimtab.learn.objective import Batch
from trimtab.nn.merge import Plain

CARD = Card(
    slug="adab2n",
    title="Overcoming Recency Bias of Normalization Statistics in Continual Learning: Balance and Adaptation",
    arxiv="2310.08855",
    year=2023,
    kind="block",
    tasks=("continual-learning", "classification"),
    claims=(
        Claim(
            "drop_in",
            "a drop-in replacement of BatchNorm2d that balances the contribution of tasks to the batch statistics and "
            "adapts the running-average momentum; gains up to 7.68 / 6.86 / 4.26 points on Split CIFAR-10 / CIFAR-100 "
            "/ Mini-ImageNet (online)",
        ),
        Claim(
            "momentum",
            "one parameter kappa interpolates between a cumulative average (kappa=0) and the usual exponential average "
            "(kappa=1)",
        ),
        Claim("cost", "almost no extra compute over BN"),
    ),
)


# Activations that a batch norm of timm may have inside, by timm's names.
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hard_swish", "hard_sigmoid", "sigmoid",
               "tanh", "identity")  # fmt: skip


def task_weights(counts: Tensor, prior: Tensor) -> Tensor:
    """Posterior mean of the shares of tasks: (exp(prior) + counts), divided by its sum.

    Args:
        counts: (k + 1,) images of each task in the batch. prior: (k + 1,), logarithms.

    >>> task_weights(torch.tensor([5.0, 5.0, 0.0]), torch.zeros(3))
    tensor([0.4615, 0.4615, 0.0769])
    """
    mass = prior.exp() + counts
    return mass / mass.sum()


def next_momentum(before: float, *, momentum: float, kappa: float) -> float:
    """The share eta of the next batch in the running average, from the one before (0: there was none).

    >>> eta, seen = 0.0, []
    >>> for _ in range(3):
    ...     eta = next_momentum(eta, momentum=0.1, kappa=0.4)
    ...     seen.append(round(eta, 5))
    >>> seen
    [0.39811, 0.29341, 0.23433]
    """
    return momentum**kappa if before == 0 else before / (before + (1 - momentum) ** kappa)


class AdaB2N(nn.Module):
    """A batch norm over (B, C, ...) that balances tasks and adapts its momentum.

    Args:
        num_features: C. num_tasks: tasks that may come.
        kappa: 0 makes the running average cumulative, 1 exponential.
        eps, momentum: as of a batch norm. renormalize: see the module.
        kind: the class of the batch norm that it stands for, and becomes again when merged.
        act: name of the activation that this class has inside (timm's ``BatchNormAct2d``).

    Attributes:
        prior (num_tasks,): learnt. eta: the last momentum. gap: the adaptation loss of the last batch.
    """

    def __init__(
        self,
        num_features: int,
        num_tasks: int = 1,
        kappa: float = 0.4,
        eps: float = 1e-5,
        momentum: float = 0.1,
        renormalize: bool = True,
        kind: str = "torch.nn.BatchNorm2d",
        act: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= kappa <= 1:
            raise ValueError(f"kappa must be in [0, 1], got {kappa}")
        self.num_features, self.kappa, self.eps, self.momentum = num_features, kappa, eps, momentum
        self.renormalize, self.kind, self.act_name = renormalize, kind, act
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.prior = nn.Parameter(torch.zeros(num_tasks))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.eta: Tensor
        self.num_batches_tracked: Tensor
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.register_buffer("eta", torch.zeros((), dtype=torch.float64))
        self.act = _activation(act) if act is not None else None
        self.gap: Tensor | None = None
        self._tasks: Tensor | None = None  # of the samples of this batch, see task_batch
        self._finished = 0

    def no_weight_decay(self) -> set[str]:
        return {"prior"}

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._active(
                F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            )
        share = self.sample_weights(len(x)).to(x.dtype)
        flat = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)  # (B, C, S)
        mean = share @ flat.mean(2)
        var = share @ (flat - mean[:, None]).square().mean(2)
        self._update(mean.detach(), var.detach())
        self.gap = F.mse_loss(mean, self.running_mean) + F.mse_loss(var, self.running_var)
        shape = (1, -1, *[1] * (x.ndim - 2))
        gain = self.weight * (var + self.eps).rsqrt()
        return self._active(x * gain.view(shape) + (self.bias - mean * gain).view(shape))

    def sample_weights(self, n: int) -> Tensor:
        """The weight (B,) of each sample in the moments of the batch."""
        device = self.prior.device
        if self._tasks is None or self._finished == 0:
            return torch.full((n,), 1 / n, device=device)
        tasks = self._tasks.to(device)
        if len(tasks) != n:
            raise ValueError(f"task_batch was given {len(tasks)} tasks for a batch of {n}")
        counts = torch.bincount(tasks, minlength=self._finished + 1).to(self.prior.dtype)
        w = task_weights(counts, self.prior[: self._finished + 1])
        share = w[tasks] / counts[tasks]  # indexed first: the count of an absent task is zero
        return share / share.sum() if self.renormalize else share

    def _active(self, x: Tensor) -> Tensor:
        return x if self.act is None else self.act(x)

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor) -> None:
        self.num_batches_tracked += 1
        self.eta.fill_(next_momentum(float(self.eta), momentum=self.momentum, kappa=self.kappa))
        self.running_mean.lerp_(mean.to(self.running_mean), float(self.eta))
        self.running_var.lerp_(var.to(self.running_var), float(self.eta))

    def merged_parts(self) -> dict[str, Plain | None]:
        """The plain batch norm that it is in eval mode."""
        kwargs: dict[str, Any] = {"num_features": self.num_features, "eps": self.eps, "momentum": self.momentum}
        kept = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        tensors = {name: getattr(self, name).detach() for name in kept}
        return {"": Plain(self.kind, kwargs | ({"act_layer": self.act_name} if self.act_name else {}), tensors)}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: not the loss of the last batch, which hangs on its graph."""
        return {**self.__dict__, "gap": None, "_tasks": None}

    def extra_repr(self) -> str:
        return f"{self.num_features}, num_tasks={len(self.prior)}, kappa={self.kappa}"


def convert(model: nn.Module, *, num_tasks: int, kappa: float = 0.4, renormalize: bool = True) -> nn.Module:
    """A copy of a model with AdaB2N in the place of every batch norm, by edits; weights and statistics are kept.

    Convert before the optimizer is made: the layers have a parameter of their own.

    Raises:
        ValueError: there is no batch norm, or one of a kind that is not known.

    >>> net = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), num_tasks=5)
    >>> net[1]
    AdaB2N(4, num_tasks=5, kappa=0.4)
    """
    edits: list[Edit] = []
    weights: dict[str, Tensor] = {}
    for name, norm in model.named_modules():
        if not isinstance(norm, _BatchNorm):
            continue
        if not name or norm.running_mean is None or norm.weight is None or norm.momentum is None:
            raise ValueError(f"{name or 'the model itself'} must be a batch norm inside a model, with weights, running "
                             "statistics and a momentum")  # fmt: skip
        kind, act = _kind(norm)
        kwargs = {
            "num_features": norm.num_features, "num_tasks": num_tasks, "kappa": kappa, "eps": norm.eps,
            "momentum": norm.momentum, "renormalize": renormalize, "kind": kind, "act": act,
        }  # fmt: skip
        edits.append(Replace(name, f"{__name__}.AdaB2N", kwargs))
        weights |= {f"{name}.{k}": v for k, v in norm.state_dict(keep_vars=True).items() if k != "num_batches_tracked"}
    if not edits:
        raise ValueError(f"{type(model).__name__} has no batch norm")
    return apply(deepcopy(model), edits, weights={k: v.detach().clone() for k, v in weights.items()})


def merged(model: nn.Module) -> nn.Module:
    """A copy with plain batch norms in the place of AdaB2N; it computes the same in eval mode."""
    copy = deepcopy(model)
    plain = {n: m.merged_parts()[""] for n, m in copy.named_modules() if isinstance(m, AdaB2N)}
    edits = [Replace(n, p.path, p.kwargs) for n, p in plain.items() if p is not None]
    return apply(copy, edits, weights={f"{n}.{k}": t for n, p in plain.items() if p for k, t in p.tensors.items()})


@contextmanager
def task_batch(model: nn.Module, tasks: Tensor, *, finished: int) -> Iterator[None]:
    """Say of which task each sample of a batch is, to all layers of the model.

    Args:
        tasks: int64 (B,). finished: tasks that are over; with 0 moments are those of a batch norm.
    """
    layers = [m for m in model.modules() if isinstance(m, AdaB2N)]
    for m in layers:
        m._tasks, m._finished = tasks, finished
    try:
        yield
    finally:
        for m in layers:
            m._tasks, m._finished = None, 0


def adaptation_loss(model: nn.Module) -> Tensor:
    """Sum over layers of the squared distance of the last batch's moments to the running ones; they forget it."""
    layers = [m for m in model.modules() if isinstance(m, AdaB2N) and m.gap is not None]
    gaps = [m.gap for m in layers]
    for m in layers:
        m.gap = None
    return torch.stack([g for g in gaps if g is not None]).sum()


def norm_flops(shape: tuple[int, ...], layer: str = "adab2n") -> int:
    """Operations of a norm layer in training on (B, C, ...): with S numbers in all, 8 S + 10 C for a batch norm.

    >>> norm_flops((10, 64, 32, 32), "bn"), norm_flops((10, 64, 32, 32))
    (5243520, 5245056)
    """
    b, c = shape[:2]
    s = int(torch.Size(shape).numel())
    return 8 * s + 10 * c if layer == "bn" else 8 * s + 2 * b * c + 14 * c


class Balanced(Replay):
    """Replay in one pass over new and old images, whose tasks the layers are told.

    Args:
        weight: of the adaptation loss. first: the first task in which it counts.
        **how: as of `Replay`.
    """

    def __init__(self, memory: ReplayBuffer, *, weight: float = 0.1, first: int = 1, **how: Any) -> None:
        super().__init__(memory, **how)
        self.weight, self.first = weight, first

    def forward(self, model: nn.Module, parts: list[Batch]) -> Tensor:
        with task_batch(model, torch.cat([p["task"] for p in parts]), finished=self.task):
            return super().forward(model, parts)

    def penalties(self, model: nn.Module) -> dict[str, Tensor]:
        gap = adaptation_loss(model)
        return {"adaptation": self.weight * gap} if self.task >= self.first else {}


class _Balancing(Rehearsing):
    objective = Balanced

    def __init__(
        self, given: nn.Module, stream: Stream, memory: ReplayBuffer, how: dict[str, Any], *, kappa: float,
        renormalize: bool, **training: Any,
    ) -> None:  # fmt: skip
        converted = convert(given, num_tasks=len(stream), kappa=kappa, renormalize=renormalize)
        super().__init__(converted, stream, memory, how, **training)
        self.kappa, self.renormalize, self._given = kappa, renormalize, given

    def deliver(self) -> nn.Module:
        return _as_it_was(self._given, self.model)


def _as_it_was(given: nn.Module, trained: nn.Module) -> nn.Module:
    """The model that was given, with what was learned: batch norms never left its history."""
    plain = deepcopy(given)
    state = trained.state_dict()
    plain.load_state_dict({k: state[k] for k in plain.state_dict()})
    return plain.to(next(trained.parameters()).device)


def adab2n(
    model: nn.Module,
    stream: Stream,
    *,
    kappa: float = 0.4,
    weight: float = 0.1,
    first: int = 1,
    renormalize: bool = True,
    buffer: int = 500,
    loss: str = "er_ace",
    draw: int | None = None,
    alpha: float = 0.1,
    beta: float = 0.5,
    epochs: int = 1,
    batch_size: int = 10,
    lr: float = 0.03,
    opt: str = "momentum",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    sched: Any = "constant",
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    **training: Any,
) -> StreamResult:
    """Replay with AdaB2N in the place of every batch norm; what comes out has plain batch norms.

    Args:
        model: is not changed; has batch norms, and a logit for every class of the stream.
        kappa: between a cumulative (0) and an exponential (1) running average; the paper searches 0.1 to 1.
        weight: of the adaptation loss (lambda; 0.01 to 10 in the paper's search on CIFAR). first: the task from which
            on it counts, from 0.
        renormalize: give the weight of tasks that a batch lacks to those that it has.
        buffer, loss, draw, alpha, beta: as of `replay`.
        epochs, batch_size, lr, ...: for `fit`; the defaults are the paper's online setting, where every image of the
            stream comes once and the rate does not change.
        out: folder for what is needed to go on after an interruption. resume: go on with what is there.

    Raises:
        ValueError: the model has no batch norm, or the stream has more classes than the model.

    >>> import trimtab as tt
    >>> data = tt.load_data("digits", limit=200)
    >>> net = tt.create_model("trim_1k", num_classes=10, in_chans=1, img_size=8, seed=0)
    >>> result = adab2n(net, tt.learn.adapt.class_incremental(data, tasks=5), buffer=50, progress=False)
    >>> [type(m).__name__ for m in result.model.modules() if "Norm" in type(m).__name__][0]
    'BatchNorm2d'
    """
    check_classes(model, stream)
    check_loss(loss)
    if weight < 0:
        raise ValueError(f"weight must not be negative, got {weight}")
    how = {"loss": loss, "draw": draw, "alpha": alpha, "beta": beta, "weight": weight, "first": first}
    learner = _Balancing(
        model, stream, ReplayBuffer(buffer, seed=seed), how, kappa=kappa, renormalize=renormalize, epochs=epochs,
        batch_size=batch_size, lr=lr, opt=opt, momentum=momentum, weight_decay=weight_decay, sched=sched, seed=seed,
        **training,
    )  # fmt: skip
    return follow("adab2n", learner, out=out, resume=resume)


def _kind(norm: _BatchNorm) -> tuple[str, str | None]:
    """The dotted path of a batch norm's class, and the name of the activation inside it."""
    from timm.layers import BatchNormAct2d

    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return f"torch.nn.{type(norm).__name__}", None
    if type(norm) is BatchNormAct2d and isinstance(norm.drop, nn.Identity):
        names = [n for n in ACTIVATIONS if type(_activation(n)) is type(norm.act)]
        if names:
            return "timm.layers.BatchNormAct2d", names[0]
    raise ValueError(f"batch norms of the kind {type(norm).__name__} cannot be converted: {norm}")


def _activation(name: str) -> nn.Module:
    from timm.layers import create_act_layer

    return create_act_layer(name, inplace=True) or nn.Identity()
