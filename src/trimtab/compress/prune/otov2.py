"""OTOv2: train once, and the small network falls out (Chen et al., "OTOv2: Automatic, Generic, User-Friendly", arXiv
2303.06862).

The channel graph divides the weights into zero-invariant groups: what makes one channel (rows, biases, norm scales and
shifts of every layer tied to it). When all of a group is zero, its channel is zero for every input and can be cut out
without changing the function. Early in training the groups that the budget cannot afford are chosen once; an optimizer
then drives exactly these to zero while the rest trains on, and at the end what is zero is cut: no fine-tuning.

What differs from the paper and its code:

- A budget (``macs<=50%``) says how many groups go, where the paper fixes their share. `DHSPG` itself takes either.
- Inside a budget, each score is divided by the mean of its layer's groups: the paper's scores as they are (``"raw"``)
  are norms per weight, small where groups are large, and all but empty the deep layers before MACs fall enough.
- `lambda_0` is by default what brings each redundant group to zero by the step `finish`, and lambda never is too small
  for this pace; the code's constant (1e-3) needs some thousand steps, and a group that the loss wants to grow may never
  arrive. What is left at `finish` is set to zero, so the budget is always met.
- The half-space step acts from `start` on (the paper's T_h is T_p, its default). epsilon is that of the paper's runs.
- Any optimizer is the base: its direction v is read off the step that it made.
- Channels that a layer norm looks across are not zero-invariant. They are never cut, so equality holds everywhere.
- HESSO, the successor, runs here with one period. Its cosine term counts descent that grows a group as important.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from trimtab.compress.graph import ChannelGraph, Group
from trimtab.compress.prune.to_budget import prune_to
from trimtab.core.budget import Budget
from trimtab.core.card import Card, Claim
from trimtab.core.edit import apply
from trimtab.core.errors import SurgeryError
from trimtab.core.example import example_of
from trimtab.learn import fit
from trimtab.learn.optim import make_optimizer
from trimtab.learn.settings import Settings

CARD = Card(
    slug="otov2",
    title="OTOv2: Automatic, Generic, User-Friendly",
    arxiv="2303.06862",
    year=2023,
    kind="method",
    tasks=("classify", "restore"),
    claims=(
        Claim(
            "exact_removal",
            "Removing the zero groups leaves a smaller network with exactly the same outputs: no fine-tuning",
        ),
        Claim(
            "one_shot",
            "One training run from scratch ends at a user-chosen group sparsity; ResNet-18/CIFAR-10 at 70% group "
            "sparsity keeps 8.8% of parameters and 20.3% of MACs for 92.86% vs 93.02% top-1",
        ),
        Claim(
            "automatic_groups",
            "Groups are found automatically from the traced graph, across residual adds, depthwise convs and concats",
        ),
    ),
)

Choose = Callable[[Tensor], Tensor]  # importance (groups,) -> which groups are redundant, bool (groups,)


def otov2(
    model: nn.Module,
    data: Any,
    *,
    budget: str | Budget = "macs<=50%",
    epochs: int = 10,
    optimizer: str = "dhspg",
    start: float = 0.1,
    finish: float = 0.3,
    lambda_0: float | None = None,
    amplify: float = 2.0,
    hat: float = 10.0,
    epsilon: float = 0.95,
    scope: str = "global",
    round_to: int = 1,
    min_keep: float = 0.1,
    opt: str = "sgd",
    momentum: float = 0.9,
    lr: float | None = None,
    batch_size: int = 128,
    accum: int = 1,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
    **training: Any,
) -> nn.Module:
    """A trained, narrowed copy of `model`, of the same class, that meets the budget; its edits are remembered.

    Args:
        data: a `Data` to train on. The model may be trained already or be new.
        budget: bounds on macs, params, latency, size or memory; a percentage is of the model's own cost.
        epochs: passes over the data in all; nothing needs to be trained afterwards.
        optimizer: "dhspg" or "hesso" (groups shrink by a fixed schedule).
        start: share of the run before the redundant groups are chosen (the paper's T_p); finish: share of it after
            which they all are zero (the paper's runs need a few percent; the rest recovers accuracy).
        lambda_0, amplify, hat, epsilon: see `DHSPG`.
        scope, round_to, min_keep: how groups are chosen, as for `magnitude`. The paper compares all scores as they are
            ("raw"), which suits a share of the groups, not of the MACs.
        opt: the base optimizer, by timm's name. lr: default as for `fit`.
        out: folder of the checkpoint: an interrupted run goes on there, to the same result.
        **training: passed on to `fit`, for instance objective, precision, augment, val. The weights are those of the
            last epoch: earlier ones are not pruned yet.

    Raises:
        BudgetError: when the budget cannot be met with the channels that can be cut exactly; says how near it came.
        SurgeryError: when the model cannot be traced or cut.
        KeyboardInterrupt: training was interrupted; what `out` has is resumed by the same call.

    >>> import trimtab as tt
    >>> data = tt.load_data("digits", limit=200)
    >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    >>> small = otov2(net, data, budget="macs<=50%", epochs=2, batch_size=32, progress=False)
    >>> small[0].out_channels, small[3].in_features
    (4, 144)
    """
    _check(data, optimizer, start, finish, training)
    rate = Settings(epochs=epochs, opt=opt, lr=lr, batch_size=batch_size, accum=accum).base_lr
    graph = _graph(model, next(iter(data.loader("train", batch_size=2)))["image"])
    model = copy.deepcopy(model)
    groups = ZeroInvariantGroups(graph, model)
    choose = _to_budget(graph, groups, budget, scope=scope, round_to=round_to, min_keep=min_keep)
    images = len(data.splits["train"])
    steps = epochs * -(-(images // min(batch_size, images)) // accum)
    first = min(int(start * steps), steps - 1)
    last = max(first + 1, round(finish * steps))

    def make(param_groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        base = make_optimizer(param_groups, opt, momentum=momentum)
        if optimizer == "hesso":
            return HESSO(base, groups, target=choose, start=first, finish=last)
        return DHSPG(
            base, groups, target=choose, start=first, finish=last,
            lambda_0=lambda_0, amplify=amplify, hat=hat, epsilon=epsilon,
        )  # fmt: skip

    trained = fit(
        model, data, opt=make, lr=rate, keep="last", epochs=epochs, batch_size=batch_size, accum=accum, seed=seed,
        out=out, progress=progress, **training,
    )  # fmt: skip
    if trained.stopped == "interrupted":
        raise KeyboardInterrupt
    return _cut(trained.model, graph, groups)


def construct(model: nn.Module, data: Any) -> nn.Module:
    """A copy of `model` without its zero groups, computing the same; its edits are remembered.

    Args:
        data: as for `magnitude`.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3))
    >>> with torch.no_grad():
    ...     for p in net[0].parameters():
    ...         p[:5] = 0
    >>> construct(net, (3, 8, 8))[0]
    Conv2d(3, 3, kernel_size=(3, 3), stride=(1, 1))
    """
    graph = _graph(model, example_of(data, model))
    return _cut(copy.deepcopy(model), graph, ZeroInvariantGroups(graph, model, trained=False))


class ZeroInvariantGroups:
    """The zero-invariant groups of a model: group j is row j of every tensor that makes channel j.

    Args:
        graph: what is not zero-invariant is frozen in it.
        model: whose parameters are looked at; it has the names of the graph's model.
        trained: freeze what has parameters that require no gradient as well.

    Attributes:
        count: number of groups.
        component: for each group, the set of coupled layers that it is a channel of. (count,)
        sizes: number of variables in each group. (count,)
        params: parameters that have a part in some group.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, *, trained: bool = True) -> None:
        named = dict(model.named_parameters())

        def can_go(g: Group) -> bool:
            return g.zero_invariant and (not trained or all(named[name].requires_grad for name, _ in g.producers))

        while stay := [u for g in graph.groups if not can_go(g) for u in g.units]:
            graph.freeze(stay)  # another factor of a product may take its place, so look again
        if not graph.groups:
            raise SurgeryError("no channel of this model can be cut without changing what it computes")
        self.count = graph.units
        self.component = torch.zeros(self.count, dtype=torch.long)
        rows: dict[tuple[str, int], np.ndarray] = {}
        for g in graph.groups:
            self.component[torch.from_numpy(g.units)] = g.id
            for member, local in graph.positions(g).items():
                if member in g.producers:
                    units = rows.setdefault(member, np.full(len(local), self.count))  # the last place is no group's
                    units[local >= 0] = g.units[local[local >= 0]]
        names = list(dict.fromkeys(name for name, _ in rows))
        self.params = [named[name] for name in names]
        self._slices = [(names.index(name), dim, torch.from_numpy(units)) for (name, dim), units in rows.items()]
        self.sizes = self.dot([torch.ones_like(p) for p in self.params], [torch.ones_like(p) for p in self.params])
        # Where a group is in the graph, however that numbers its units later.
        at, first = np.unique(graph.unit_of, return_index=True)
        self._labels = first[at >= 0]

    @torch.no_grad()
    def dot(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Inner products within each group of two lists of tensors shaped like `params`. (count,) in float64"""
        total = torch.zeros(self.count + 1, dtype=torch.float64, device=a[0].device)
        for i, dim, units in self._slices:
            along = (a[i] * b[i]).movedim(dim, 0).reshape(len(units), -1).sum(1, dtype=torch.float64)
            total.index_add_(0, units.to(total.device), along)
        return total[:-1]

    @torch.no_grad()
    def shrink(self, share: Tensor, of: list[Tensor], rates: list[float]) -> None:
        """Subtract from each parameter rate * share[group] * of. share: (count,)"""
        share = torch.cat([share, share.new_zeros(1)])
        for i, dim, units in self._slices:
            shape = [-1 if d == dim else 1 for d in range(of[i].ndim)]
            by = share[units.to(share.device)].to(of[i].dtype).view(shape)
            self.params[i].sub_(by * of[i], alpha=rates[i])

    @torch.no_grad()
    def zero_(self, which: Tensor) -> None:
        """Set groups to zero. which: bool (count,)"""
        for i, dim, units in self._slices:
            gone = torch.cat([which, which.new_zeros(1)])[units.to(which.device)].nonzero()[:, 0]
            if len(gone):
                self.params[i].index_fill_(dim, gone, 0.0)

    def zeros(self) -> Tensor:
        """Which groups are zero. bool (count,)"""
        return self.dot([p.detach() for p in self.params], [p.detach() for p in self.params]) == 0

    def units(self, graph: ChannelGraph) -> NDArray[np.int64]:
        """For each group, its unit in the graph as that is now; -1 where the unit has been frozen since. (count,)"""
        return graph.unit_of[self._labels]


class _GroupSparse(torch.optim.Optimizer):
    """What the two optimizers share: a base optimizer, one choice of redundant groups, and zero stays zero.

    Args:
        base: does the ordinary training. Parameter groups and state are its own.
        groups: the zero-invariant groups of the model that is trained.
        target: share of the groups that end as zero, in (0, 1), at most all but one of each component; or a function
            from importance (count,) to which are redundant, bool (count,).
        tolerance: share of groups that are made redundant beyond a target in numbers. Those not needed stay.
        start: step at which the redundant groups are chosen; before, only the base acts.
        finish: step by which they are zero; None for whenever they are.

    Attributes:
        redundant, zero: which groups are, bool (count,). forced: how many were not zero by themselves at `finish`.
    """

    base: torch.optim.Optimizer

    def __init__(
        self, base: torch.optim.Optimizer, groups: ZeroInvariantGroups, *, target: float | Choose,
        tolerance: float = 0.0, start: int = 0, finish: int | None = None,
    ) -> None:  # fmt: skip
        if not callable(target) and not 0 < target < 1:
            raise ValueError(f"target must be a share in (0, 1), got {target}")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")
        if start < 0 or (finish is not None and finish <= start):
            raise ValueError(f"start must be at least 0 and finish after it, got {start} and {finish}")
        super().__init__(base.param_groups, base.defaults)
        self.base, self.groups, self.target, self.tolerance = base, groups, target, tolerance
        self.start, self.finish = start, finish
        self.param_groups, self.state = base.param_groups, base.state
        self.t = self.forced = self.wanted = 0
        self.redundant, self.zero = (torch.zeros(groups.count, dtype=torch.bool) for _ in range(2))
        self.chosen_by = torch.zeros(groups.count, dtype=torch.float64)  # the importance when they were chosen

    def importance(self, xx: Tensor, xv: Tensor, vv: Tensor) -> Tensor:
        """Of each group, from its inner products of weights x and direction v. (count,)"""
        raise NotImplementedError

    def push(self, before: list[Tensor], v: list[Tensor], rates: list[float], left: int | None) -> Tensor:
        """After the base's step: move the redundant groups towards zero; gives those that arrived. bool (count,)"""
        raise NotImplementedError

    @property
    def active(self) -> Tensor:
        """Groups that are being driven to zero. bool (count,)"""
        done = int(self.zero.sum()) >= self.wanted
        return torch.zeros_like(self.redundant) if done else self.redundant & ~self.zero

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        busy = self.t == self.start or (self.t > self.start and bool(self.active.any()))
        before = [p.clone() for p in self.groups.params] if busy else []
        loss = self.base.step(closure)
        if busy:
            self._drive(before)
        if self.t >= self.start:
            self.groups.zero_(self.zero)  # momentum and the gradient of a shift would move it
        self.t += 1
        return loss

    def _drive(self, before: list[Tensor]) -> None:
        rate_of = {id(p): float(g["lr"]) for g in self.param_groups for p in g["params"]}
        rates = [rate_of[id(p)] for p in self.groups.params]
        v = [(b - p) / max(r, 1e-12) for b, p, r in zip(before, self.groups.params, rates, strict=True)]
        if self.t == self.start:
            self._choose(before, v)
        left = None if self.finish is None else self.finish - self.t
        arrived = self.push(before, v, rates, left) & self.active
        if left is not None and left <= 1:
            self.forced = min(int((self.active & ~arrived).sum()), self.wanted - int((self.zero | arrived).sum()))
            arrived = self.active
        surplus = int((self.zero | arrived).sum()) - self.wanted
        if surplus > 0:  # the least important first
            spared = self.chosen_by.masked_fill(~arrived, -torch.inf).topk(surplus).indices
            arrived[spared] = False
        self.zero |= arrived

    def _choose(self, x: list[Tensor], v: list[Tensor]) -> None:
        dot = self.groups.dot
        self.chosen_by = self.importance(dot(x, x), dot(x, v), dot(v, v))
        self.zero = self.zero.to(self.chosen_by.device)
        if callable(self.target):
            self.redundant = self.target(self.chosen_by.cpu()).to(self.chosen_by.device)
            self.wanted = int(self.redundant.sum())
            return
        component = self.groups.component.to(self.chosen_by.device)
        order = self.chosen_by.argsort()
        last_of = {int(component[u]): int(u) for u in order}  # the most important of each component always stays
        order = order[~torch.isin(order, torch.tensor(list(last_of.values()), device=order.device))]
        self.wanted = min(int(self.target * self.groups.count), len(order))
        candidates = int(self.groups.count * min(self.target + self.tolerance, 0.999))
        self.redundant = torch.zeros_like(self.zero)
        self.redundant[order[: max(candidates, self.wanted)]] = True

    def state_dict(self) -> dict[str, Any]:
        mine = {"t": self.t, "forced": self.forced, "wanted": self.wanted}
        tensors = {"redundant": self.redundant, "zero": self.zero, "chosen_by": self.chosen_by}
        return {**self.base.state_dict(), "groups": {**mine, **tensors, "settings": self._settings()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        mine = state_dict["groups"]
        if mine["settings"] != self._settings():
            raise ValueError(f"the state is of a run with {mine['settings']}, this one has {self._settings()}")
        self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "groups"})
        self.param_groups, self.state = self.base.param_groups, self.base.state
        self.t, self.forced, self.wanted = mine["t"], mine["forced"], mine["wanted"]
        device = self.groups.params[0].device
        self.redundant, self.zero, self.chosen_by = (mine[k].to(device) for k in ("redundant", "zero", "chosen_by"))

    def _settings(self) -> dict[str, Any]:
        names = ("tolerance", "start", "finish", "lambda_0", "amplify", "hat", "epsilon")
        numbers = {k: getattr(self, k) for k in names if hasattr(self, k)}
        return {"optimizer": type(self).__name__, "groups": self.groups.count, **numbers}


class DHSPG(_GroupSparse):
    """Dual half-space projected gradient around any optimizer; arguments as for `_GroupSparse`, and:

    Args:
        lambda_0: strength of the penalty; a step takes lr * lambda off a redundant group's norm. None for what brings
            the group to zero just by `finish`.
        amplify, hat: where the loss wants a group to grow, the penalty is `amplify` times what would stop that, at
            most `hat` times `lambda_0`.
        epsilon: a group becomes zero when the trial point is no further than epsilon of the way out in its own
            direction, in [0, 1). None: never (the half-space step is left out).

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> groups = ZeroInvariantGroups(ChannelGraph(net, torch.zeros(2, 4)), net)
    >>> optimizer = DHSPG(torch.optim.SGD(net.parameters(), lr=0.1), groups, target=0.5, finish=20)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     net(torch.ones(2, 4)).square().sum().backward()
    ...     optimizer.step()
    >>> int(groups.zeros().sum())
    3
    """

    def __init__(
        self, base: torch.optim.Optimizer, groups: ZeroInvariantGroups, *, lambda_0: float | None = None,
        amplify: float = 2.0, hat: float = 10.0, epsilon: float | None = 0.95, **common: Any,
    ) -> None:  # fmt: skip
        if lambda_0 is not None and not lambda_0 > 0:
            raise ValueError(f"lambda_0 must be positive or None, got {lambda_0}")
        if not amplify > 0 or not hat >= 1:
            raise ValueError(f"amplify must be positive and hat at least 1, got {amplify} and {hat}")
        if epsilon is not None and not 0 <= epsilon < 1:
            raise ValueError(f"epsilon must be in [0, 1) or None, got {epsilon}")
        super().__init__(base, groups, **common)
        if lambda_0 is None and self.finish is None:
            raise ValueError("lambda_0 must be given where there is no finish")
        self.lambda_0, self.amplify, self.hat, self.epsilon = lambda_0, amplify, hat, epsilon

    def importance(self, xx: Tensor, xv: Tensor, vv: Tensor) -> Tensor:
        """Low where descending already shrinks the group (cos(-x, -v) is high) and where its weights are small."""
        cos = xv / (xx.sqrt() * vv.sqrt()).clamp_min(1e-30)
        small = 1 / (xx.sqrt() / self.groups.sizes.to(xx.device) + 1e-6)
        return -0.5 * (_normalized(cos) + _normalized(small))

    def push(self, before: list[Tensor], v: list[Tensor], rates: list[float], left: int | None) -> Tensor:
        dot, now = self.groups.dot, [p.detach() for p in self.groups.params]
        xx, rate = dot(before, before), max(*rates, 1e-12)
        norm = xx.sqrt() + 1e-8
        lambda_0 = norm / (rate * max(left or 1, 1)) if self.lambda_0 is None else torch.full_like(norm, self.lambda_0)
        xv = dot(before, v)
        strength = penalty(xx, xv, dot(v, v), lambda_0, amplify=self.amplify, hat=self.hat)
        if self.lambda_0 is None:  # keep the pace, also where the only way to descend is to let the group grow
            strength = torch.maximum(strength, lambda_0 - xv.clamp_max(0) / norm)
        self.groups.shrink((strength / norm) * self.active, before, rates)
        if self.epsilon is None:
            return torch.zeros_like(self.active)
        return (dot(now, before) < self.epsilon * xx) | (xx == 0)


class HESSO(_GroupSparse):
    """The successor of DHSPG in one period: after the step t of T, redundant groups are multiplied by (T-t-1)/(T-t).

    The product of these factors is 0. Arguments as for `_GroupSparse`; `finish` is needed.
    """

    def __init__(self, base: torch.optim.Optimizer, groups: ZeroInvariantGroups, *, finish: int, **common: Any) -> None:
        super().__init__(base, groups, finish=finish, **common)

    def importance(self, xx: Tensor, xv: Tensor, vv: Tensor) -> Tensor:
        """Five scores with equal weights, each normalised over all groups."""
        norm = xx.sqrt()
        cos = xv / (norm * vv.sqrt()).clamp_min(1e-30)
        scores = (norm, norm / self.groups.sizes.to(xx.device), 1 - cos, xv.abs(), 0.5 * xv.square())
        return 0.2 * torch.stack([_normalized(s) for s in scores]).sum(0)

    def push(self, before: list[Tensor], v: list[Tensor], rates: list[float], left: int | None) -> Tensor:
        now = [p.detach().clone() for p in self.groups.params]
        self.groups.shrink(self.active / max(left or 1, 1), now, [1.0] * len(now))
        return self.active if left is not None and left <= 1 else torch.zeros_like(self.active)


def penalty(xx: Tensor, xv: Tensor, vv: Tensor, lambda_0: Tensor, *, amplify: float, hat: float) -> Tensor:
    """lambda of each group, from its inner products of weights x and direction v.

    Where <x, v> < 0 the step would grow the group. A lambda between `lower` = -<x,v>/||x|| and `upper` =
    -||v||^2 ||x||/<x,v> shrinks it and still descends; the cap at hat * lambda_0 may leave lambda below `lower`.
    """
    norm = xx.sqrt() + 1e-8
    against = xv.clamp_max(-1e-30)
    lower, upper = -against / norm, -vv * norm / against
    strength = torch.minimum(torch.maximum(amplify * lower, lambda_0), hat * lambda_0)
    strength = torch.where(strength >= upper, (lower + upper) / 2, strength)
    return torch.where(xv < 0, strength, lambda_0)


def _normalized(score: Tensor) -> Tensor:
    return score / score.norm().clamp_min(1e-30)


def _to_budget(graph: ChannelGraph, groups: ZeroInvariantGroups, budget: str | Budget, **how: Any) -> Choose:
    """Which groups are redundant: the least important ones, until the budget is met without them."""

    def choose(importance: Tensor) -> Tensor:
        def scores(now: ChannelGraph) -> list[Tensor]:
            # A unit that is no group of ours (another factor took over when one was frozen) is not to be cut.
            by_unit = torch.full((now.units,), float(spread) + 1.0, dtype=torch.float64)
            unit = torch.from_numpy(groups.units(now))
            by_unit[unit[unit >= 0]] = (importance - importance.min())[unit >= 0]
            return [by_unit[torch.from_numpy(g.units)] for g in now.groups]

        spread = importance.max() - importance.min()
        mask = torch.from_numpy(prune_to(graph, scores, budget, **how)[1])
        unit = torch.from_numpy(groups.units(graph))
        redundant = (unit >= 0) & ~mask[unit.clamp_min(0)]
        if int(redundant.sum()) != int((~mask).sum()):
            raise SurgeryError("the budget can only be met with channels that are not zero-invariant")
        return redundant

    prune_to(graph, lambda g: [torch.ones(n.size) for n in g.groups], budget, **how)  # refuse now what cannot be met
    return choose


def _cut(model: nn.Module, graph: ChannelGraph, groups: ZeroInvariantGroups) -> nn.Module:
    """Cut what is zero; of a component that is zero as a whole, one channel stays."""
    unit = groups.units(graph)[groups.zeros().cpu().numpy()]
    mask = np.ones(graph.units, bool)
    mask[unit[unit >= 0]] = False
    for g in graph.groups:
        mask[g.units[0]] |= not mask[g.units].any()
    return apply(model, graph.edits(mask))


def _graph(model: nn.Module, example: Any) -> ChannelGraph:
    """Of a copy that stays as it is while the model is trained, and on the CPU, where cuts are verified."""
    return ChannelGraph(copy.deepcopy(model).cpu(), tree_map_only(Tensor, Tensor.cpu, example))


def _check(data: Any, optimizer: str, start: float, finish: float, training: dict[str, Any]) -> None:
    if "train" not in getattr(data, "splits", ()):
        raise ValueError(f"otov2 trains, so data must be a Data with a split 'train', got {type(data).__name__}")
    if optimizer not in ("dhspg", "hesso"):
        raise ValueError(f"optimizer must be 'dhspg' or 'hesso', got {optimizer!r}")
    if not 0 <= start < finish <= 1:
        raise ValueError(f"start and finish must be shares with 0 <= start < finish <= 1, got {start} and {finish}")
    why = {
        "keep": "the weights are those of the last epoch",
        "ema": "an average of weights is not zero where they are",
        "patience": "the run must come to its end",
        "time_limit": "the run must come to its end; give epochs",
    }
    for name in why.keys() & training.keys():
        raise ValueError(f"{name} must not be given to otov2: {why[name]}")
