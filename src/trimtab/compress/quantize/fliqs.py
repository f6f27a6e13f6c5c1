"""FLIQS: which number format each layer gets, found while the network is trained, once.

Dotzel et al., "FLIQS: One-Shot Mixed-Precision Floating-Point and Integer Quantization Search", arXiv 2308.03290. At
every step each layer draws a format from its own small distribution; one copy of the weights is trained in whatever was
drawn; and the distributions learn by REINFORCE, from a reward that weighs the quality of the batch against how far the
cost is from its target. A penalty on entropy that grows with time makes the choice settle, so that the network ends as
one that was trained in the formats it has, and no retraining follows.

What differs from the paper and its open code:

- Quality is minus the loss, as in the open code (the paper takes the accuracy of the batch), so `beta` is in units
  of the loss. The baseline starts at the first reward.
- Cost is that of the whole model, counted in real multiply-accumulates (the open code counts weights), and a budget is
  a bound: once the policy learns, what is drawn is inside it, and what is chosen in the end is the most probable
  combination inside it. Drawn freely, the policy would come to like combinations a little over the budget, and the
  nearest one inside would be one that nobody tried.
- The last tenth of the training (`settle`) keeps the chosen formats, so that batch norms see nothing else.
- Weights have a scale per output channel, activations one per tensor: that of the batch in training, and the moving
  average of these in eval mode, so that a prediction does not depend on its neighbours and exports as it is.
- Architecture decisions (FLIQNAS) are not part of this.
"""

from __future__ import annotations

import copy
import fnmatch
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.compress.quantize.around import Around
from trimtab.compress.quantize.fake import EPS, MaxObserver, straight_through
from trimtab.compress.quantize.formats import TINY, Format
from trimtab.compress.quantize.packing import PackedWeight, packed_bytes
from trimtab.compress.quantize.packing import pack as pack_codes
from trimtab.compress.quantize.swap import add_bias, arguments, layers, plain_conv, product, replace, weights_of
from trimtab.core.budget import Budget, format_value
from trimtab.core.card import Card, Claim
from trimtab.core.cost import measure
from trimtab.core.edit import Edit, Replace, SetAttr, apply
from trimtab.core.errors import BudgetError
from trimtab.learn.fit import fit
from trimtab.learn.norm import bn_recalibrate
from trimtab.learn.objective import Batch, Context, Losses, Objective, as_generator

log = logging.getLogger(__name__)

CARD = Card(
    slug="fliqs",
    title="FLIQS: One-Shot Mixed-Precision Floating-Point and Integer Quantization Search",
    kind="method",
    tasks=("classify",),
    claims=(
        Claim("one_shot", "formats per layer are chosen during the single training run; nothing is retrained"),
        Claim("entropy", "an entropy penalty that grows with time reduces the error of switching formats"),
        Claim("fp_and_int", "integer and low-precision float formats are searched alike"),
    ),
    arxiv="2308.03290",
    year=2023,
)

REWARDS = ("absolute", "one-sided", "soft", "hard")
SCHEDULES = ("cosine", "linear", "constant", "step")
COSTS = ("bops", "size")


def fliqs(
    model: nn.Module,
    data: Any,
    *,
    budget: str | Budget = "bops<=2%",
    options: Sequence[str] = ("int4", "int6", "int8"),
    formats: str | Mapping[str, str] | None = None,
    ends: str | None = "int8",
    at_least: Mapping[str, int] | None = None,
    kinds: Sequence[str] = ("linear", "conv"),
    beta: float = 1.0,
    reward: str = "absolute",
    delay: float = 0.25,
    settle: float = 0.1,
    entropy: float = 0.1,
    schedule: str = "cosine",
    policy_lr: float = 0.05,
    pack: bool = True,
    epochs: int = 10,
    objective: Objective | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> nn.Module:
    """A copy of `model` whose layers have the formats that fit them best inside the budget, trained, then packed.

    Args:
        data: a `Data`.
        budget: an upper bound on "bops" or "size" of the result; a percentage is of the float32 model (uniform 4 bits
            are 1.56 % of its bit-operations).
        options: the formats to choose from, such as "int4" or "e4m3".
        formats: no search: one format for all layers, or one for each by name. The budget is then not looked at.
        ends: format of the first and the last layer; None leaves them float.
        at_least: bits that layers must have, by patterns of their names.
        kinds: which layers: "linear", "conv", or both.
        beta: weight of the cost in the reward.
        reward: "absolute", "one-sided", "soft" or "hard" (exponential, with a negative `beta`); see `reward_of`.
        delay: share of the training in which formats are drawn evenly and the policy does not learn.
        settle: share at the end in which the chosen formats stay.
        entropy: largest weight of the penalty on the policy's entropy.
        schedule: how it grows from `delay` on: "cosine", "linear", "constant", or "step" (at half of the way).
        policy_lr: learning rate of the policy (Adam).
        pack: deliver codes only; False keeps the float weights, to train on.
        epochs, objective, seed, out, progress, **settings: for `tt.fit`.

    Raises:
        ValueError: a setting that makes no sense, or no layer to quantize.
        BudgetError: the budget cannot be met with these options; says how near it would come.
    """
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs must be a positive integer, got {epochs!r}")
    if "keep" in settings:
        raise ValueError("keep cannot be chosen: the last weights fit the formats, others do not")
    chosen = layers(model, kinds=kinds, skip=())
    inner = layers(model, kinds=kinds)
    fixed = {n: ends for n in chosen if n not in inner and ends is not None}
    if formats is not None:
        fixed |= _each(formats, list(inner))
    free = [n for n in inner if n not in fixed]
    choices = [_allowed(n, options, at_least or {}) for n in free]
    held = {n: m for n, m in chosen.items() if n in inner or n in fixed}
    search = Search(
        objective, free, choices, beta=beta, reward=reward, delay=delay, settle=settle, entropy=entropy,
        schedule=schedule, lr=policy_lr, seed=seed,
    )  # fmt: skip
    if free:
        search.cost = cost_of(model, data, held, fixed, free, choices, budget)
    start = {n: fixed.get(n) or choices[free.index(n)][-1] for n in held}
    edits = [
        Replace(n, f"{__name__}.MixedLayer", arguments(m) | {"weight_format": start[n], "act_format": start[n]})
        for n, m in held.items()
    ]
    mixed = replace(copy.deepcopy(model), edits, weights_of(model, edits))
    fit(mixed, data, search, epochs=epochs, seed=seed, out=out, progress=progress, keep="last", **settings)
    apply(mixed, search.edits(mixed))
    bn_recalibrate(mixed, data.loader("train", batch_size=256, augment="none"), limit=16)
    log.info("formats: %s", ", ".join(f"{n} {f}" for n, f in formats_of(mixed).items()))
    return packed(mixed) if pack else mixed


def formats_of(model: nn.Module) -> dict[str, str]:
    """The format of every layer that has one, by name."""
    return {n: m.weight_format for n, m in model.named_modules() if isinstance(m, MixedLayer | PackedMixedLayer)}


def packed(model: nn.Module) -> nn.Module:
    """A copy of a model in which every `MixedLayer` holds codes only; it computes the same in eval mode.

    Raises:
        ValueError: the model has no such layer.
    """
    edits: list[Edit] = []
    weights: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, MixedLayer):
            continue
        given = {
            "shape": list(layer.weight.shape), "bias": layer.bias is not None, "conv": plain_conv(layer.conv),
            "weight_format": layer.weight_format, "act_format": layer.act_format, "peak": float(layer.seen.peak),
        }  # fmt: skip
        edits.append(Replace(name, f"{__name__}.PackedMixedLayer", given))
        form, scale = Format(layer.weight_format), layer.weight_scale()
        codes = form.encode(form.round(layer.weight.detach() / scale))
        weights[f"{name}.weight.packed"] = pack_codes(codes, form.bits)
        weights[f"{name}.scale"] = scale
        if layer.bias is not None:
            weights[f"{name}.bias"] = layer.bias.detach()
    if not edits:
        raise ValueError("the model has no layers in mixed formats to pack")
    return replace(copy.deepcopy(model), edits, weights)


# -------------------------------------------------------------------------------------------------------------- layers


class _Formatted(nn.Module):
    """A linear layer or convolution (`conv`: its arguments) whose operands are rounded to formats."""

    def __init__(
        self,
        shape: Sequence[int],
        *,
        bias: bool = True,
        conv: Mapping[str, Any] | None = None,
        weight_format: str = "int8",
        act_format: str = "int8",
    ) -> None:
        super().__init__()
        Format(weight_format), Format(act_format)  # refuses what is no format
        self.shape, self.conv = tuple(shape), conv
        self.weight_format, self.act_format = weight_format, act_format
        self.bias = nn.Parameter(torch.zeros(self.shape[0])) if bias else None

    @property
    def weight_bits(self) -> int:
        return Format(self.weight_format).bits

    @property
    def act_bits(self) -> int:
        return Format(self.act_format).bits

    def extra_repr(self) -> str:
        conv = "" if self.conv is None else f", conv={dict(self.conv)}"
        return f"{self.shape}{conv}, {self.weight_format} x {self.act_format}, bias={self.bias is not None}"


class MixedLayer(_Formatted):
    """A layer that is trained: one float weight, rounded on the fly to whatever format it is in now.

    >>> layer = MixedLayer((4, 16), weight_format="e2m1", act_format="int8")
    >>> layer(torch.randn(2, 16)).shape, layer.weight_bits, layer.act_bits
    (torch.Size([2, 4]), 4, 8)
    """

    def __init__(self, shape: Sequence[int], **given: Any) -> None:
        super().__init__(shape, **given)
        self.weight = nn.Parameter(torch.empty(self.shape))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.seen = MaxObserver()
        self.register_buffer("choice", torch.zeros((), dtype=torch.uint8))  # so that a checkpoint knows
        self.choice: Tensor

    def set(self, name: str, choice: int) -> None:
        """Change the format of weights and activations; `choice` is its place among the layer's options."""
        if self.weight_format != name or self.act_format != name:
            self.weight_format = self.act_format = name
        self.choice.fill_(choice)

    @torch.no_grad()
    def weight_scale(self) -> Tensor:
        """One scale per output channel, (out, 1, ...)."""
        peak = self.weight.detach().abs().amax(tuple(range(1, self.weight.ndim)), keepdim=True)
        return (peak / Format(self.weight_format).largest).clamp(min=TINY)

    def forward(self, x: Tensor) -> Tensor:
        form, scale = Format(self.weight_format), self.weight_scale()
        weight = straight_through(self.weight, form.round(self.weight.detach() / scale) * scale)
        x = straight_through(x, act(x.detach(), Format(self.act_format), self.seen(x)))
        return add_bias(product(x, weight, self.conv), self.bias, self.conv)


class PackedMixedLayer(_Formatted):
    """A layer for inference: codes in bytes, a scale per output channel, the bias.

    Args:
        peak: largest magnitude of the activations.
    """

    def __init__(self, shape: Sequence[int], *, peak: float = 1.0, **given: Any) -> None:
        super().__init__(shape, **given)
        form = Format(self.weight_format)
        self.weight = PackedWeight(self.shape, form.bits)
        self.register_buffer("scale", torch.ones(self.shape[0], *(1 for _ in self.shape[1:])))
        self.register_buffer("levels", form.levels(), persistent=False)
        self.scale: Tensor
        self.levels: Tensor
        self.peak = max(peak, EPS)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.levels[self.weight()] * self.scale
        x = straight_through(x, act(x.detach(), Format(self.act_format), self.peak))
        return add_bias(product(x, weight, self.conv), self.bias, self.conv)


def act(x: Tensor, form: Format, peak: Tensor | float) -> Tensor:
    """Activations in a format whose largest value stands for `peak`.

    Integers go through torch's own operator, which exporters write as QuantizeLinear and DequantizeLinear.
    """
    if isinstance(peak, Tensor):
        scale: Any = (peak / form.largest).clamp(min=TINY).to(x.dtype)
        zero: Any = torch.zeros((), dtype=torch.int32, device=x.device)
    else:
        scale, zero = max(peak / form.largest, TINY), 0
    if not form.integer:
        return form.round(x / scale) * scale
    if form.bits < 8:
        x = x.clamp((-form.largest - 1) * scale, form.largest * scale)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, -128, 127)


# -------------------------------------------------------------------------------------------------------------- search


def reward_of(quality: float, cost: float, target: float, *, beta: float = 1.0, kind: str = "absolute") -> float:
    """What a choice is worth. In the exponential kinds a positive `beta` rewards cost.

    >>> [round(reward_of(0.8, 15, 5), 6), round(reward_of(0.95, 3, 5, beta=2), 6)]
    [-1.2, 0.15]
    """
    ratio = cost / target
    match kind:
        case "absolute":
            return quality - beta * abs(ratio - 1)
        case "one-sided":
            return quality - beta * (max(ratio, 1.0) - 1)
        case "soft":
            return quality * ratio**beta
        case "hard":
            return quality * max(1.0, ratio) ** beta
    raise ValueError(f"reward must be one of {', '.join(REWARDS)}, got {kind!r}")


def entropy_weight(progress: float, delay: float, largest: float, schedule: str = "cosine") -> float:
    """The weight of the entropy penalty: 0 until `delay`, `largest` at the end.

    >>> [round(entropy_weight(p, 0.25, 0.1), 3) for p in (0.2, 0.25, 0.625, 1.0)]
    [0.0, 0.0, 0.05, 0.1]
    """
    t = (progress - delay) / (1 - delay)
    if t < 0:
        return 0.0
    match schedule:
        case "cosine":
            return largest * (1 - math.cos(math.pi * t)) / 2
        case "linear":
            return largest * t
        case "constant":
            return largest
        case "step":
            return largest * (t >= 0.5)
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


class Policy:
    """A distribution over formats for every decision, and how it learns.

    Args:
        counts: options of every decision.
        lr: of Adam. decay: of the average reward.
    """

    def __init__(self, counts: Sequence[int], *, lr: float = 0.05, decay: float = 0.99) -> None:
        self.counts, self.decay = tuple(counts), decay
        most = max(counts, default=1)
        self.logits = torch.full((len(counts), most), 0.5, requires_grad=True)
        self._none = torch.arange(most) >= torch.tensor(counts).reshape(-1, 1)  # options that a decision lacks
        self._adam = torch.optim.Adam([self.logits], lr=lr)
        self.baseline: float | None = None

    def log_probs(self) -> Tensor:
        """(D, K); -inf for options that a decision does not have."""
        return self.logits.masked_fill(self._none, -math.inf).log_softmax(1)

    def noisy(self, rng: np.random.Generator) -> Tensor:
        """log p plus Gumbel noise, (D, K): the largest of each row is a draw from its distribution."""
        lp = self.log_probs().detach().double()
        return lp + torch.from_numpy(rng.gumbel(size=tuple(lp.shape)))

    def even(self, rng: np.random.Generator) -> list[int]:
        """One option for every decision, each with equal probability."""
        return [int(rng.integers(n)) for n in self.counts]

    def entropy(self) -> Tensor:
        """The mean entropy of a decision, in nats."""
        lp = self.log_probs()
        return -(lp.exp() * lp.masked_fill(self._none, 0.0)).sum(1).mean()

    def loss(self, picks: Sequence[int], advantage: float, weight: float) -> Tensor:
        """-A x mean log p(picks) + weight x mean entropy: the plus is a penalty."""
        taken = self.log_probs().gather(1, torch.tensor(picks).reshape(-1, 1))
        return -advantage * taken.mean() + weight * self.entropy()

    def learn(self, picks: Sequence[int], reward: float, weight: float) -> None:
        """One step; the baseline takes the reward in before it is compared with it."""
        last = reward if self.baseline is None else self.baseline
        self.baseline = self.decay * last + (1 - self.decay) * reward
        self._adam.zero_grad()
        self.loss(picks, reward - self.baseline, weight).backward()
        self._adam.step()

    def state_dict(self) -> dict[str, Any]:
        adam = self._adam.state.get(self.logits, {})
        return {"logits": self.logits.detach().clone(), "baseline": self.baseline, "adam": dict(adam)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        self.baseline = state["baseline"]
        if state["adam"]:
            self._adam.state[self.logits] = dict(state["adam"])


class CostModel:
    """What the model costs for every choice: a constant, and a number for each option of each decision."""

    def __init__(self, name: str, constant: float, options: Sequence[Sequence[float]], limit: float) -> None:
        self.name, self.constant, self.options, self.limit = name, constant, [list(row) for row in options], limit

    def of(self, picks: Sequence[int]) -> float:
        return self.constant + sum(row[k] for row, k in zip(self.options, picks, strict=True))

    def decide(self, log_probs: Tensor) -> list[int]:
        """The most probable combination inside the limit; an integer program, solved exactly.

        Of options that are equally probable, the first. With noise on the probabilities (`Policy.noisy`): a draw that
        is inside the limit.
        """
        from scipy.optimize import LinearConstraint, milp

        lp = log_probs.detach().double().numpy()
        picks = [int(np.argmax(row)) for row in lp]
        if self.of(picks) <= self.limit:
            return picks
        place = [(d, k) for d, row in enumerate(self.options) for k in range(len(row))]
        one_each = np.array([[d == e for e, _ in place] for d in range(len(self.options))], float)
        costs = np.array([self.options[d][k] for d, k in place]) / self.limit
        solved = milp(
            [-max(lp[d, k], -1e6) for d, k in place],
            integrality=np.ones(len(place)),
            bounds=(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(costs, -np.inf, 1 - self.constant / self.limit),
            ],
        )
        taken = [place[i] for i in np.flatnonzero(np.round(solved.x))]
        return [k for _, k in taken]


def cost_of(
    model: nn.Module,
    data: Any,
    held: Mapping[str, nn.Linear | nn.Conv2d],
    fixed: Mapping[str, str],
    free: Sequence[str],
    choices: Sequence[Sequence[str]],
    budget: str | Budget,
) -> CostModel:
    """The cost that the budget names, of the packed model; what is not quantized costs what it does in float32."""
    clauses = [c for c in Budget(budget).clauses if c.op == "<=" and c.name in COSTS]
    if len(clauses) != 1 or len(Budget(budget).clauses) != 1:
        raise BudgetError(f"budget must be one upper bound on {' or '.join(COSTS)}, got {str(budget)!r}")
    name = clauses[0].name
    whole = measure(model, data.spec.size, what=("macs", "size", "bops"), per_layer=True)
    limit = Budget(budget).resolve(whole).limit(name)
    assert limit is not None
    macs = {row.name: row.macs for row in whole.layers}

    def one(layer: str, form: str) -> float:
        bits, weight = Format(form).bits, held[layer].weight
        if name == "bops":
            return macs[layer] * bits * bits
        return packed_bytes(weight.numel(), bits) + 4 * weight.shape[0]  # codes and scales

    before = {n: macs[n] * 32 * 32 if name == "bops" else 4 * m.weight.numel() for n, m in held.items()}
    total = float((whole.bops if name == "bops" else whole.size) or 0)
    constant = total - sum(before.values()) + sum(one(n, f) for n, f in fixed.items() if n in held)
    costs = CostModel(name, constant, [[one(n, f) for f in row] for n, row in zip(free, choices)], limit)
    least = costs.of([int(np.argmin(row)) for row in costs.options])
    if least > limit:
        near = f"{format_value(name, least)} ({least / total:.2%} of the model)"
        raise BudgetError(f"{clauses[0].text} cannot be met: with the smallest formats {name} is {near}")
    return costs


class Search(Around):
    """Draws formats at every batch, and learns which to draw."""

    def __init__(
        self,
        inner: Objective | None,
        names: Sequence[str],
        choices: Sequence[Sequence[str]],
        *,
        beta: float = 1.0,
        reward: str = "absolute",
        delay: float = 0.25,
        settle: float = 0.1,
        entropy: float = 0.1,
        schedule: str = "cosine",
        lr: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(inner)
        reward_of(1.0, 1.0, 1.0, kind=reward)
        entropy_weight(1.0, 0.0, 1.0, schedule)
        if not (delay >= 0 and settle >= 0 and delay + settle < 1):
            raise ValueError(f"delay and settle are shares of the run and must leave some of it, got {delay}, {settle}")
        if not lr > 0 or not entropy >= 0:
            raise ValueError(f"policy_lr must be positive and entropy not negative, got {lr} and {entropy}")
        self.beta, self.reward, self.delay, self.settle = beta, reward, delay, settle
        self.entropy, self.schedule, self.lr, self.seed = entropy, schedule, lr, seed
        self.names, self.choices = list(names), [list(c) for c in choices]
        self.policy = Policy([len(c) for c in choices], lr=lr)
        self.cost: CostModel | None = None
        self._layers: list[MixedLayer] = []
        self._last: list[int] = []
        self._draws = 0

    def setup(self, model: nn.Module, batch: Batch) -> None:
        found = [model.get_submodule(n) for n in self.names]
        self._layers = [m for m in found if isinstance(m, MixedLayer)]
        super().setup(model, batch)

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        if self.cost is None:  # nothing to search
            return self.inner.losses(model, batch, ctx)
        return self._search(self.cost, model, batch, ctx)

    def _search(
        self, cost: CostModel, model: nn.Module, batch: Batch, ctx: Context
    ) -> Iterator[Tensor | dict[str, Tensor]]:
        end = 1 - self.settle
        learning = self.delay <= ctx.progress < end
        picks = self._draw(cost, ctx, settled=ctx.progress >= end)
        total = 0.0
        losses = as_generator(self.inner.losses(model, batch, ctx))
        try:
            for loss in losses:
                total += float((sum(loss.values()) if isinstance(loss, dict) else loss).detach())  # type: ignore[union-attr]
                yield loss
        finally:
            losses.close()
        if learning:
            quality = -_shared(total, ctx)
            quality = math.exp(quality) if self.reward in ("soft", "hard") else quality  # these need a positive one
            reward = reward_of(quality, cost.of(picks), cost.limit, beta=self.beta, kind=self.reward)
            self.policy.learn(
                picks, reward, entropy_weight(ctx.progress / end, self.delay / end, self.entropy, self.schedule)
            )
        ctx.log("policy entropy", float(self.policy.entropy().detach()))

    def on_epoch_end(self, ctx: Context) -> None:
        self._settle()
        super().on_epoch_end(ctx)

    def finish(self, model: nn.Module) -> nn.Module:
        if self._draws:
            self._settle()
        return super().finish(model)

    def edits(self, model: nn.Module) -> list[Edit]:
        """What fixes the formats found. A run that was complete already left them in the layers' buffers."""
        found: list[Edit] = []
        for name, options in zip(self.names, self.choices):
            layer = model.get_submodule(name)
            assert isinstance(layer, MixedLayer)
            form = options[int(layer.choice)]
            found += [SetAttr(name, "weight_format", form), SetAttr(name, "act_format", form)]
        return found

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"policy": self.policy.state_dict(), "draws": self._draws, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.policy.load_state_dict(state["policy"])
        self._draws, self._last = state["draws"], list(state["last"])

    def _draw(self, cost: CostModel, ctx: Context, *, settled: bool) -> list[int]:
        rng = np.random.default_rng((self.seed, self._draws))  # the same on every process
        if settled:
            picks = cost.decide(self.policy.log_probs())
        elif ctx.progress < self.delay:
            picks = self.policy.even(rng)
        else:
            picks = cost.decide(self.policy.noisy(rng))
        if self._last:
            ctx.log("format switches", sum(a != b for a, b in zip(picks, self._last)))
        self._draws, self._last = self._draws + 1, picks
        self._set(picks)
        return picks

    def _settle(self) -> None:
        if self.cost is not None:
            self._set(self.cost.decide(self.policy.log_probs()))

    def _set(self, picks: Sequence[int]) -> None:
        for layer, options, k in zip(self._layers, self.choices, picks):
            layer.set(options[k], k)


def _shared(value: float, ctx: Context) -> float:
    """The mean over processes, so that their policies stay one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    mean = torch.tensor(value, device=ctx.device)
    torch.distributed.all_reduce(mean)
    return float(mean) / torch.distributed.get_world_size()


def _each(formats: str | Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    given = dict.fromkeys(names, formats) if isinstance(formats, str) else dict(formats)
    if set(given) - set(names):
        raise ValueError(
            f"formats must name layers among {', '.join(names)}, got {sorted(set(given) - set(names))[0]!r}"
        )
    for form in given.values():
        Format(form)
    return given


def _allowed(name: str, options: Sequence[str], at_least: Mapping[str, int]) -> list[str]:
    """The options of a layer, narrowest first."""
    if len(set(options)) != len(options) or not options:
        raise ValueError(f"options must be different formats, got {list(options)}")
    least = max((bits for pattern, bits in at_least.items() if fnmatch.fnmatchcase(name, pattern)), default=0)
    found = [o for o in sorted(options, key=lambda o: Format(o).bits) if Format(o).bits >= least]
    if not found:
        raise ValueError(f"at_least must leave {name} an option of {', '.join(options)}, got {least} bits")
    return found
