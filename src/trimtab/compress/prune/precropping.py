"""PreCropping: a network is made narrower before it is ever trained (Cai et al., "Structured Pruning is All You Need
for Pruning CNNs at Initialization", arXiv 2203.02549).

Methods that prune single weights at initialization decide, in effect, only how many weights each layer keeps. So it is
enough to find these layer densities (with any such method, or in closed form), to turn them into channel counts, and to
train the narrower dense network once, from fresh weights. Nothing of the method remains: no mask, no sparse kernel.

What differs from the paper, or is not in its abstract and therefore ours:

- How densities become widths (`ratios`): the paper's exact rule is not known to us; ours is the weighted least squares
  of the logarithms inside the box of ratios up to 1, on the groups of the channel graph, so that residual, depthwise,
  gated and concatenating networks need no configuration. The simple square root is kept as ``rule="sqrt"``.
- The closed form is that of a chain, on every graph: a residual network is a sum of chains, and the density of every
  layer is a factor of those that pass through it.
- With a bound on MACs, the scorers of single weights are asked for the same share of the weights; the closed form takes
  MACs into account exactly. The final correction meets the bound in either case.
- "Fresh weights" of a registry model are those of a newly built one, cut, and scaled to the new fan where its
  initializer depends on the fan; for independent weights that is the same distribution as initializing the narrow
  layer. Any other class is initialized by the ``reset_parameters`` of its layers.
- Widening a layer beyond the reference network ("PreConfig") is left to architecture search.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq, least_squares
from torch import Tensor, nn

from trimtab.compress.graph import ChannelGraph
from trimtab.compress.prune.to_budget import prune_to, shares
from trimtab.core.budget import Budget
from trimtab.core.card import Card, Claim
from trimtab.core.cost import measure
from trimtab.core.edit import Edit, apply, history
from trimtab.core.example import example_of

CARD = Card(
    slug="precropping",
    title="Structured Pruning is All You Need for Pruning CNNs at Initialization",
    arxiv="2203.02549",
    year=2022,
    kind="method",
    tasks=("classify",),
    claims=(
        Claim(
            "structured_equals_unstructured",
            "At initialization the per-layer compression ratio, not the identity of the kept weights, decides the "
            "final accuracy; channel cropping with the same per-layer ratios matches weight-level pruning at "
            "initialization (SNIP / GraSP / SynFlow)",
        ),
        Claim(
            "shuffle_invariance",
            "Shuffling the mask inside each layer (same layer densities) leaves the accuracy of a pruned-at-init "
            "network unchanged",
        ),
        Claim(
            "dense_speed",
            "The result is a plain dense, narrower CNN: parameters, training memory and MACs fall together on "
            "commodity hardware",
        ),
    ),
)

WEIGHT_SCORERS = ("snip", "grasp", "synflow", "magnitude", "random")
SCORERS = ("closed_form", *WEIGHT_SCORERS, "erk", "uniform")
RULES = ("least_squares", "sqrt")
SYNFLOW_ROUNDS = 100
WEIGHTY = ("params", "size")  # costs that fall with the number of weights; all others fall with the MACs


def precropping(
    model: nn.Module,
    data: Any,
    *,
    budget: str | Budget = "params<=50%",
    scorer: str = "closed_form",
    rule: str = "least_squares",
    round_to: int = 1,
    min_keep: float = 0.0,
    init: str = "fresh",
    seed: int = 0,
) -> nn.Module:
    """A narrower, untrained copy of `model`, of the same class, that meets the budget; its edits are remembered.

    Train it as the whole model would be trained. Weights that `model` may have learned are not used.

    Args:
        data: a `Data`, an input size (C, H, W), or an example input (B, C, H, W). "snip" and "grasp" need a `Data`,
            of which they see one batch of 10 images of each class.
        budget: bounds on params, macs, or any cost that can be measured; percent are of the model's own cost.
        scorer: where layer densities come from: "closed_form" (SynFlow's optimum: every layer keeps the same number of
            weights, small layers all), "snip", "grasp", "synflow", "magnitude", "random", "erk" or "uniform".
        rule: how densities become widths: "least_squares" or "sqrt".
        round_to: keep multiples of this many channels, where a layer has as many; 8 is fast on most hardware.
        min_keep: share of each group of channels that always stays; one channel always does.
        init: "fresh", or "slice" for the weights that the model has (an ablation: their variance is that of the old
            fan).
        seed: of the fresh weights, and of what the scorers draw.

    Raises:
        BudgetError: when the budget cannot be met; says how near it came.
        SurgeryError: when the model cannot be traced or cut.

    >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 10, 1))
    >>> small = precropping(net, (3, 8, 8), budget="params<=50%")
    >>> [m.out_channels for m in small if isinstance(m, nn.Conv2d)]
    [11, 20, 10]
    """
    if init not in ("fresh", "slice"):
        raise ValueError(f"init must be 'fresh' or 'slice', got {init!r}")
    edits = plan(
        model, data, budget=budget, scorer=scorer, rule=rule, round_to=round_to, min_keep=min_keep, seed=seed
    )  # fmt: skip
    small = apply(copy.deepcopy(model), edits)
    return small if init == "slice" else _initialize(small, model, edits, seed)


def plan(
    model: nn.Module,
    data: Any,
    *,
    budget: str | Budget = "params<=50%",
    scorer: str = "closed_form",
    rule: str = "least_squares",
    round_to: int = 1,
    min_keep: float = 0.0,
    seed: int = 0,
) -> list[Edit]:
    """The edits that `precropping` applies; arguments as there."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    _check_scorer(scorer, SCORERS)
    graph = ChannelGraph(model, example_of(data, model))
    left = shares(budget, graph)
    weights = min((v for k, v in left.items() if k in WEIGHTY), default=1.0)
    macs = min((v for k, v in left.items() if k not in WEIGHTY), default=1.0)
    found = densities(model, data, scorer=scorer, weights=weights, macs=macs, seed=seed)
    return prune_to(
        graph, lambda g: _scores_of(g, ratios(g, found, rule=rule)), budget,
        scope="raw", round_to=round_to, min_keep=min_keep,
    )[0]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# step 1: layer densities


def densities(
    model: nn.Module,
    data: Any,
    *,
    scorer: str = "closed_form",
    weights: float = 1.0,
    macs: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:
    """Which share of its weights every convolution and linear layer should keep, by the weight's name; at least one.

    Args:
        data: as in `precropping`.
        scorer: one of `SCORERS`.
        weights, macs: shares in [0, 1] of all these weights, and of their multiply-accumulates, that are to be left.

    >>> chain = nn.Sequential(*(nn.Conv2d(a, b, 3) for a, b in ((3, 16), (16, 16), (16, 64), (64, 64))))
    >>> {k: round(v, 3) for k, v in densities(chain, (3, 16, 16), weights=0.1).items()}
    {'0.weight': 1.0, '1.weight': 0.644, '2.weight': 0.161, '3.weight': 0.04}
    """
    _check_scorer(scorer, SCORERS)
    for name, value in (("weights", weights), ("macs", macs)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    owners = _layers(model)
    sizes = np.array([p.numel() for p in owners.values()], float)
    if scorer in WEIGHT_SCORERS:
        kept = masks(model, data, scorer=scorer, density=min(weights, macs), seed=seed)
        found = np.array([float(kept[name].double().mean()) for name in owners])
    elif scorer == "closed_form":
        work = np.zeros_like(sizes) if macs >= 1 else _macs_of(model, data, owners)
        found = water_filling(sizes, weights * sizes.sum(), work, macs * work.sum())
    elif scorer == "erk":  # Mocanu et al. 2018, with kernels as in Evci et al. 2020
        raw = np.array([sum(p.shape) / p.numel() for p in owners.values()])
        found = _capped(raw, sizes, min(weights, macs) * sizes.sum())
    else:
        found = np.full(len(sizes), min(weights, macs))
    return {name: float(d) for name, d in zip(owners, np.maximum(found, 1 / sizes), strict=True)}


def water_filling(
    sizes: Sequence[float] | NDArray[np.float64],
    budget: float,
    macs: Sequence[float] | NDArray[np.float64] | None = None,
    mac_budget: float = 0.0,
) -> NDArray[np.float64]:
    """The densities that maximise SynFlow's expected score of a randomly pruned chain inside the budgets.

    The score is that of the whole chain times the product of all densities, so sum log d is maximised subject to
    sum(sizes * d) <= budget, sum(macs * d) <= mac_budget and d <= 1. The optimum is d = min(1, 1 / (u sizes + v macs))
    with multipliers u, v >= 0; without MACs, every layer keeps the same number of weights, small layers all of them.

    Args:
        sizes: (L,) weights of each layer. budget: how many of them are to be left in all.
        macs: (L,) multiply-accumulates of each layer; None or zeros for no such bound. mac_budget: likewise.

    >>> (water_filling([432, 2304, 9216, 36864, 640], 5000) * [432, 2304, 9216, 36864, 640]).round(2).tolist()
    [432.0, 1309.33, 1309.33, 1309.33, 640.0]
    """
    a = np.asarray(sizes, float)
    m = np.zeros_like(a) if macs is None else np.asarray(macs, float)
    if a.ndim != 1 or m.shape != a.shape or (a <= 0).any():
        raise ValueError(f"sizes must be positive and macs as many, got {a.tolist()} and {m.tolist()}")

    def density(u: float, v: float) -> NDArray[np.float64]:
        return np.minimum(1.0, 1.0 / np.maximum(u * a + v * m, 1e-300))

    def multiplier(over: Callable[[float], float], scale: float) -> float:
        """The least u at which `over` is no longer positive."""
        if over(0.0) <= 0:
            return 0.0
        high = 1.0 / scale
        while over(high) > 0:
            high *= 2
        return float(brentq(over, 0.0, high, xtol=1e-300, rtol=1e-13))

    def for_weights(v: float) -> float:
        return multiplier(lambda u: float(a @ density(u, v)) - max(budget, 1e-9), float(a.max()))

    if not m.any():
        return density(for_weights(0.0), 0.0)
    v = multiplier(lambda v: float(m @ density(for_weights(v), v)) - max(mac_budget, 1e-9), float(m.max()))
    return density(for_weights(v), v)


def masks(model: nn.Module, data: Any, *, scorer: str, density: float, seed: int = 0) -> dict[str, Tensor]:
    """Which single weights the method `scorer` keeps before training: boolean, by the weight's name, like the weight.

    This is unstructured pruning at initialization, which `precropping` replaces: the weights with the largest scores in
    the whole network stay.

    Args:
        scorer: "snip" (arXiv 1810.02340), "grasp" (2002.07376), "synflow" (2006.05467), "magnitude" or "random".
        density: share of all convolution and linear weights that stays.
    """
    _check_scorer(scorer, WEIGHT_SCORERS)
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], got {density}")
    kept = {name: torch.ones_like(p, dtype=torch.bool) for name, p in _layers(model).items()}
    rounds = SYNFLOW_ROUNDS if scorer == "synflow" and density < 1 else 1
    for t in range(1, rounds + 1):
        found = scores(model, data, scorer=scorer, kept=kept if rounds > 1 else None, seed=seed)
        # What is gone stays gone, also where a score is negative or all scores of a layer are zero.
        flat = torch.cat([found[name].masked_fill(~kept[name], -math.inf).flatten() for name in kept])
        share = density if t == rounds else density ** (t / rounds)
        stay = torch.zeros_like(flat, dtype=torch.bool)
        stay[flat.topk(round(share * len(flat))).indices] = True
        parts = stay.split([k.numel() for k in kept.values()])
        kept = {name: part.view_as(kept[name]) for name, part in zip(kept, parts, strict=True)}
    return kept


def scores(
    model: nn.Module, data: Any, *, scorer: str, kept: Mapping[str, Tensor] | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """The importance of every single convolution and linear weight, float64, by the weight's name.

    Args:
        scorer: "snip": abs(w dL/dw) on one batch. "grasp": w (H g), positive where the gradient would shrink without
            the weight. "synflow": abs(w dR/dw), where R is the sum of the outputs for an input of ones, of the network
            with abs(w) for weights; no data. "magnitude": abs(w). "random".
        kept: weights elsewhere count as zero.
    """
    _check_scorer(scorer, WEIGHT_SCORERS)
    if scorer == "random":
        g = torch.Generator().manual_seed(seed)
        return {
            n: torch.rand(p.shape, generator=g, dtype=torch.float64).to(p.device) for n, p in _layers(model).items()
        }
    net = copy.deepcopy(model).double()
    weights = _layers(net)
    with torch.no_grad():
        for name, mask in (kept or {}).items():
            weights[name].mul_(mask)
        if scorer == "synflow":
            for p in net.parameters():
                p.abs_()
    if scorer == "magnitude":
        return {name: p.detach().abs() for name, p in weights.items()}
    found = list(weights.values())
    if scorer == "synflow":  # batch statistics would change the flow, so they are frozen
        x = torch.ones_like(_example(data, net)[:1], dtype=torch.float64)
        grads = _grad(_sum(net.eval()(x)), found)
        return {n: (p * g).abs().detach() for (n, p), g in zip(weights.items(), grads, strict=True)}
    images, labels = _scoring_batch(data, net, seed)
    with _seeded(seed):
        loss = nn.functional.cross_entropy(net.train()(images.double()), labels)
    if scorer == "snip":
        grads = _grad(loss, found)
        return {n: (p * g).abs().detach() for (n, p), g in zip(weights.items(), grads, strict=True)}
    grads = _grad(loss, found, create_graph=True)
    flow = torch.stack([(g * g.detach()).sum() for g in grads]).sum()  # its gradient is H g
    return {n: (p * h).detach() for (n, p), h in zip(weights.items(), _grad(flow, found), strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# step 2: from densities to widths


def ratios(graph: ChannelGraph, densities: Mapping[str, float], *, rule: str = "least_squares") -> NDArray[np.float64]:
    """(number of groups,): which share of its channels every group should keep, before rounding and correction.

    A weight keeps the product of the shares of its input and output channels. "least_squares" minimises
    sum a_l (log of that product - log d_l)^2 over ratios in (0, 1], where a_l is the number of weights: the share of a
    side that cannot be cut (images, classes) is 1, that of concatenated groups their mean. "sqrt" gives each side the
    square root of the layer's density (a depthwise convolution, which has one side only, the density itself) and every
    group the mean of what its layers ask for.

    Args:
        densities: by the weight's name, in (0, 1]; weights that are not named have no say.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    variables = graph.linked()  # groups that must keep the same share have one ratio
    sides: dict[tuple[str, int], NDArray[np.float64]] = {}  # channels of each group in one dimension of one weight
    for v, members in enumerate(variables):
        for group in members:
            for member, at in graph.positions(group).items():
                if member[0] in densities:
                    sides.setdefault(member, np.zeros(len(variables)))[v] += (at >= 0).sum()
    shapes = {name: p.shape for name, p in graph.model.named_parameters()}
    layers = list(dict.fromkeys(name for name, _ in sides))
    counts = np.array(list(sides.values())).reshape(len(sides), len(variables))
    fixed = np.array([shapes[name][dim] for name, dim in sides]) - counts.sum(axis=1)
    of = np.array([[name == layer for name, _ in sides] for layer in layers], float).reshape(len(layers), len(sides))
    goal = np.log([densities[name] for name in layers])
    # Side by side, each variable's mean of what the layers ask for: the answer of "sqrt", and where to start from.
    groups = [getattr(graph.model.get_submodule(name.rpartition(".")[0]), "groups", 1) for name in layers]
    power = np.array([1.0 if n > 1 and shapes[name][1] == 1 else 0.5 for n, name in zip(groups, layers, strict=True)])
    asked = (of.T @ np.exp(goal * power))[:, None] * (counts > 0)
    times = (counts > 0).sum(axis=0)
    r = np.where(times > 0, asked.sum(axis=0) / np.maximum(times, 1), 1.0)
    if rule == "least_squares" and len(layers):
        weight = np.sqrt([math.prod(shapes[name]) for name in layers])
        weight /= weight.max()

        def parts(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            kept = counts * np.exp(x)
            return kept, kept.sum(axis=1) + fixed

        def residual(x: NDArray[np.float64]) -> NDArray[np.float64]:
            return weight * (of @ np.log(parts(x)[1] / (counts.sum(axis=1) + fixed)) - goal)

        def slope(x: NDArray[np.float64]) -> NDArray[np.float64]:
            kept, total = parts(x)
            return weight[:, None] * (of @ (kept / total[:, None]))

        start = np.clip(np.log(r), -20.0, -1e-3)
        solved = least_squares(residual, start, slope, bounds=(-25.0, 0.0), xtol=1e-12, ftol=1e-12, gtol=1e-12)
        r = np.exp(solved.x)
    each = np.ones(len(graph.groups))
    for v, members in enumerate(variables):
        each[members] = r[v]
    return each


def _scores_of(graph: ChannelGraph, ratio: NDArray[np.float64]) -> list[Tensor]:
    """Scores of units whose order, from the last, is that in which channels go as one factor s on all ratios falls.

    A group of n channels keeps round(s r n), so its k-th channel goes when s falls below (k - 1/2) / (r n). The budget
    is then met with the largest s whose rounded widths fit.
    """
    return [torch.from_numpy(ratio[g.id] * g.size / (np.arange(g.size) + 0.5)) for g in graph.groups]


# ---------------------------------------------------------------------------------------------------------------------
# steps 3 and 4: fresh weights for the narrow network


def _initialize(small: nn.Module, model: nn.Module, edits: Sequence[Edit], seed: int) -> nn.Module:
    """Give `small`, which is `model` after `edits`, the initial weights that its layers would have been born with."""
    past = history(model)
    with _seeded(seed):
        if past.base is None or not timm.is_model(past.base):
            for module in small.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
            return small
        born = apply(timm.create_model(past.base, pretrained=False, **past.kwargs), past.edits)
    cut = apply(copy.deepcopy(born), edits).state_dict()
    for name, factor in _fan_factors(born, cut).items():
        cut[name] = cut[name] * factor
    small.load_state_dict(cut)
    return small


def _fan_factors(born: nn.Module, cut: Mapping[str, Tensor]) -> dict[str, float]:
    """By which factor initial weights and biases grow because their fan has shrunk.

    The initializer is read off the second moment of each weight: gain / fan for the usual gains and fans, or a fixed
    standard deviation. Where several fit one layer, the one that fits most layers of the network is taken.
    """
    layers = {n: m for n, m in born.named_modules() if _is_layer(m)}
    laws: dict[str, list[tuple[str, float]]] = {}
    for name, m in layers.items():
        moment = float(m.weight.detach().double().square().mean())
        near = 4 * math.sqrt(2 / m.weight.numel()) + 0.02
        fans = _fans(m.weight.shape, m) | {"none": 1.0}
        laws[name] = [
            (fan, gain)
            for fan, size in fans.items()
            for gain in ((4e-4, 1e-4) if fan == "none" else (2.0, 1.0, 1 / 3))
            if moment > 0 and abs(math.log(moment * size / gain)) < near
        ]
    votes = Counter(law for found in laws.values() for law in found)
    factors: dict[str, float] = {}
    for name, m in layers.items():
        old, new = (_fans(shape, m) for shape in (m.weight.shape, cut[f"{name}.weight"].shape))
        if laws[name]:
            fan = max(laws[name], key=lambda law: votes[law])[0]
            factors[f"{name}.weight"] = math.sqrt(old.get(fan, 1.0) / new.get(fan, 1.0))
        if isinstance(m.bias, Tensor) and float(m.bias.detach().abs().max()) > 0:  # PyTorch's own: 1 / sqrt(fan_in)
            factors[f"{name}.bias"] = math.sqrt(old["in"] / new["in"])
    return factors


def _fans(shape: Sequence[int], module: Any) -> dict[str, float]:
    """Products that enter an output or leave an input, as the usual initializers count them.

    Args:
        shape: of the weight, perhaps after a cut. module: the layer before it.
    """
    kernel = math.prod(shape[2:])
    fan_in, fan_out, groups = shape[1] * kernel, shape[0] * kernel, getattr(module, "groups", 1)
    if groups > 1 and groups == module.in_channels:  # depthwise: as many groups as channels are left
        groups = shape[0] * groups / module.weight.shape[0]
    return {"in": fan_in, "out": fan_out, "both": (fan_in + fan_out) / 2, "out of group": fan_out / groups}


# ---------------------------------------------------------------------------------------------------------------------
# small parts


def _is_layer(module: nn.Module) -> bool:
    kinds = isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
    return kinds and isinstance(getattr(module, "weight", None), nn.Parameter)


def _layers(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of convolutions and linear layers, by name, shared ones once."""
    found = {f"{name}.weight" if name else "weight": m.weight for name, m in model.named_modules() if _is_layer(m)}
    if not found:
        raise ValueError(f"model must have convolutions or linear layers, got a {type(model).__name__} without")
    first: dict[int, tuple[str, nn.Parameter]] = {}
    for name, p in found.items():
        first.setdefault(id(p), (name, p))
    return dict(first.values())


def _macs_of(model: nn.Module, data: Any, owners: Mapping[str, Tensor]) -> NDArray[np.float64]:
    rows = measure(model, example_of(data, model), what=("macs",), per_layer=True).layers
    each = {row.name: row.macs for row in rows}
    return np.array([each.get(name.removesuffix(".weight"), 0) for name in owners], float)


def _capped(raw: NDArray[np.float64], sizes: NDArray[np.float64], budget: float) -> NDArray[np.float64]:
    """min(1, eps raw) that leaves `budget` weights."""
    if budget >= sizes.sum():
        return np.ones_like(raw)
    eps = brentq(lambda e: float(sizes @ np.minimum(1.0, e * raw)) - budget, 0.0, 1 / raw.min())
    return np.minimum(1.0, eps * raw)


def _scoring_batch(data: Any, net: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    """Ten images of each class, as far as there are as many."""
    if not hasattr(data, "subset"):
        raise ValueError(f"snip and grasp need data with labels (tt.load_data), got {type(data).__name__}")
    count = min(10 * data.num_classes, len(data.splits["train"]))
    part = data.subset({"train": count}, seed=seed)
    batch = next(iter(part.loader("train", batch_size=count, shuffle=False)))
    device = next(net.parameters()).device
    return batch["image"].to(device), batch["label"].to(device)


def _example(data: Any, net: nn.Module) -> Tensor:
    example = example_of(data, net)
    if not isinstance(example, Tensor):
        raise ValueError(f"synflow needs one image input, got {type(example).__name__}")
    return example


def _sum(out: Any) -> Tensor:
    return torch.stack([t.sum() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]).sum()


def _grad(value: Tensor, weights: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Gradients; zero for weights that take no part."""
    found = torch.autograd.grad(value, list(weights), create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _check_scorer(scorer: str, known: Sequence[str]) -> None:
    if scorer not in known:
        raise ValueError(f"scorer must be one of {', '.join(known)}, got {scorer!r}")
