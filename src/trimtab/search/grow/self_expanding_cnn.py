"""Self Expanding CNNs (Appolinary et al., "Self Expanding Convolutional Neural Networks", arXiv 2401.05686).

Training starts with a tiny network of blocks, and goes on while the network gets deeper (a layer that is the identity)
or wider (channels for every layer of a block). When, where and which is decided by the natural expansion score: the
squared norm of the natural gradient of the network as it would be, with a diagonal empirical Fisher. The networks
before each expansion are a family of models of many sizes, from one run.

What differs: by default an expansion leaves the function exactly as it is (up to rounding): what is new feeds nothing
yet, and a LeakyReLU of slope s becomes two of slope sqrt(s) around an inserted layer, because it would otherwise scale
negative values twice. `noise=1e-4` is the paper's almost-preserving start; scores are computed with it in any case. The
paper does not give its penalty; here added parameters count relative to those there are. The optimizer's momentum
starts anew at every look (each is a run of `fit`), so that what was interrupted goes on to the same result; the
schedule of the learning rate is that of the whole run.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from trimtab.core.budget import Budget
from trimtab.core.card import Card, Claim
from trimtab.core.cost import WHAT, measure
from trimtab.core.edit import Edit, Insert, Narrow, SetAttr, Widen, apply, describe
from trimtab.core.errors import BudgetError
from trimtab.learn.evaluate import evaluate
from trimtab.learn.fit import fit
from trimtab.learn.settings import Settings
from trimtab.models.classify.secnn import SECNN, ConvLayer
from trimtab.nn.modes import eval_mode
from trimtab.search.candidates import Tried
from trimtab.search.supernet import Found

CARD = Card(
    slug="self_expanding_cnn",
    title="Self Expanding Convolutional Neural Networks",
    arxiv="2401.05686",
    year=2024,
    kind="method",
    tasks=("classify",),
    claims=(
        Claim(
            "grow_on_demand",
            "One run that starts from 3 single-conv blocks of 16 channels and grows by the natural expansion score "
            "reaches 84.1% mean CIFAR-10 accuracy (5 trials) with 62.7k parameters on average, without a restart",
        ),
        Claim(
            "size_family",
            "The same run passes 70% accuracy at ~11.4k parameters and 80% at ~33.7k: checkpoints before each "
            "expansion form a model family",
        ),
        Claim(
            "criterion",
            "eta = g^T F^-1 g, damped by exp(-lambda (delta P)^2), decides where, what (depth or width) and when to "
            "expand",
        ),
        Claim(
            "near_preserving",
            "An inserted layer (identity + small noise) or inserted channels (weights ~1e-4) leaves the function "
            "almost unchanged",
        ),
    ),
)

log = logging.getLogger(__name__)

LAYER = "trimtab.models.classify.secnn.ConvLayer"
_WHOLE_RUN = ("sched", "warmup", "min_lr")  # settings of `fit` that are about all epochs together
_START = 1e-4  # the paper's scale of what is new
_NOT_OURS = ("time_limit", "val", "patience", "keep", "on_epoch")


@dataclass(frozen=True)
class Grown:
    """A run of growth.

    Attributes:
        family: the network before each expansion, and at the end; from the smallest to the largest.
        tried: accuracy on held-out images and costs of each.
        expansions: what was done between them.
        budget: what growth had to stay inside, or None.
    """

    family: tuple[nn.Module, ...]
    tried: tuple[Tried, ...]
    expansions: tuple[Expansion, ...]
    budget: Budget | None = None

    @property
    def model(self) -> nn.Module:
        """The network at the end."""
        return self.family[-1]

    def search(self, budget: str | Budget) -> Found:
        """The most accurate network of the family inside a budget, and all that are inside.

        Raises:
            BudgetError: none is.
        """
        bounds = Budget(budget).resolve(self.tried[0].cost)
        inside = tuple(t for t in self.tried if bounds.check(t.cost, partial=True).ok)
        if not inside:
            raise BudgetError(
                f"no network of the family is inside {bounds}; the smallest has {dict(self.tried[0].cost)}"
            )
        return Found(max(inside, key=lambda t: (t.accuracy, -t.cost["macs"])), inside, bounds)

    def best(self, budget: str | Budget) -> nn.Module:
        """That network."""
        chosen = self.search(budget).chosen
        return next(net for net, t in zip(self.family, self.tried, strict=True) if t is chosen)


def self_expanding_cnn(
    network: nn.Module,
    data: Any,
    *,
    budget: str | Budget | None = None,
    tau: float = 2.0,
    channels: int = 2,
    capacity: int = 10,
    cooldown: int = 10,
    penalty: float = 1.0,
    fisher: str = "diagonal",
    samples: int = 128,
    noise: float = 0.0,
    epochs: int = 300,
    seed: int = 0,
    out: str | Path | None = None,
    **training: Any,
) -> Grown:
    """Train a network that grows where the natural expansion score asks for it.

    Args:
        network: a `secnn` of any widths and depths, trained or new. It is copied.
        data: a `Data` to train on.
        budget: what the network may cost; growth stops before it would cost more. Percent refer to the network given.
        tau: by which factor the score must rise for an expansion.
        channels: how many an expansion adds to every layer of a block.
        capacity: layers of a block at most.
        cooldown: epochs after an expansion before the next, and before the first.
        penalty: lambda, on the square of the share of parameters that an expansion adds.
        fisher: "diagonal" as in the paper, or "full", in which size alone does not raise the score.
        samples: training images that scores are computed on.
        noise: of new weights; 0 keeps the function exactly, 1e-4 is the paper's.
        epochs: of the whole run.
        out: folder of the checkpoints; what was interrupted goes on there, to the same result.
        **training: as for `fit`; time_limit, val, patience, keep and on_epoch have no meaning here.

    Raises:
        ValueError: an argument makes no sense. BudgetError: the network is outside the budget before it grows.
        KeyboardInterrupt: training was interrupted; what `out` has is resumed by the same call.

    >>> import trimtab as tt
    >>> data = tt.load_data("digits", limit=200)
    >>> net = tt.create_model("secnn", widths=(4, 4, 4), num_classes=10, in_chans=1, img_size=8)
    >>> kind = {"epochs": 3, "cooldown": 1, "samples": 32, "batch_size": 32, "progress": False}
    >>> grown = self_expanding_cnn(net, data, tau=1.0, **kind)
    >>> len(grown.family) == len(grown.expansions) + 1
    True
    """
    _growable(network)
    for name, value, least in (("channels", channels, 1), ("capacity", capacity, 1), ("cooldown", cooldown, 1),
                               ("samples", samples, 2), ("epochs", epochs, 1)):  # fmt: skip
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    for name, number in (("tau", tau), ("penalty", penalty), ("noise", noise)):
        if not number >= 0:
            raise ValueError(f"{name} must not be negative, got {number}")
    if fisher not in ("diagonal", "full"):
        raise ValueError(f"fisher must be 'diagonal' or 'full', got {fisher!r}")
    if wrong := [k for k in _NOT_OURS if k in training]:
        raise ValueError(f"growth decides itself when to stop and what to keep; it has no {', '.join(wrong)}")
    schedule = Settings(epochs=epochs, **{k: training.pop(k) for k in _WHOLE_RUN if k in training}).schedule()
    size = (data.in_chans, *data.size)
    model = copy.deepcopy(network)
    bounds = None if budget is None else Budget(budget).resolve(_cost(model, size))
    if bounds is not None and not (verdict := bounds.check(_cost(model, size, bounds), partial=True)).ok:
        raise BudgetError(f"the network is outside the budget before it grows: {verdict.explain()}")
    split = "val" if "val" in data.splits else "train"
    family: list[nn.Module] = []
    tried: list[Tried] = []
    expansions: list[Expansion] = []

    def keep() -> None:
        family.append(copy.deepcopy(model).eval())
        cost = _cost(model, size, bounds)
        accuracy = evaluate(model, data, split, device=training.get("device"))["accuracy"]
        tried.append(Tried(shape(model), accuracy, cost))
        log.info("%s parameters: %s accuracy %.4f", cost["params"], split, accuracy)

    done, wait = 0, cooldown
    while True:
        part = min(wait, epochs - done)
        model = _train(model, data, schedule, done, part, epochs, seed=seed, out=out, **training)
        done, wait = done + part, 1
        if done == epochs:
            keep()
            return Grown(tuple(family), tuple(tried), tuple(expansions), bounds)
        batch = next(
            iter(data.loader("train", batch_size=samples, shuffle=True, augment="none", seed=seed, epoch=done))
        )
        device = next(model.parameters()).device
        x, y = batch["image"].to(device), batch["label"].to(device)
        allowed = expansions_of(model, channels=channels, capacity=capacity)
        if bounds is not None:
            costs = [_cost(apply(copy.deepcopy(model), e.edits), size, bounds) for e in allowed]
            allowed = [e for e, cost in zip(allowed, costs) if bounds.check(cost, partial=True).ok]
        how: dict[str, Any] = {"tau": tau, "penalty": penalty, "fisher": fisher}
        chosen = choose(model, allowed, x, y, **how, noise=noise, seed=seed + done)
        if chosen is not None:
            keep()
            model = expand(model, chosen, x, noise=noise, seed=seed + done)
            expansions.append(chosen)
            wait = cooldown


def _train(
    model: nn.Module, data: Any, schedule: Any, done: int, part: int, epochs: int, *, seed: int,
    out: str | Path | None, **training: Any,
) -> nn.Module:  # fmt: skip
    """Epochs `done` to `done + part` of the whole run."""
    result = fit(
        model, data, epochs=part, sched=lambda p: schedule((done + p * part) / epochs), seed=seed + done, val=None,
        out=None if out is None else Path(out) / f"epoch-{done}", **training,
    )  # fmt: skip
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    return result.model


# -- expansions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expansion:
    """One way to enlarge a network: `what` is "layer" or "channels", `block` says where."""

    what: str
    block: int
    edits: tuple[Edit, ...]


def expansions_of(model: nn.Module, *, channels: int = 2, capacity: int = 10) -> list[Expansion]:
    """All expansions: a layer for each block that has less than `capacity`, and `channels` more for each block.

    >>> [(e.what, e.block) for e in expansions_of(SECNN(widths=(4, 4), depths=(1, 2)), capacity=2)]
    [('layer', 0), ('channels', 0), ('channels', 1)]
    """
    blocks = range(len(_growable(model).blocks))
    deeper = [Expansion("layer", i, tuple(deeper_edits(model, i))) for i in blocks if len(layers(model, i)) < capacity]
    return deeper + [Expansion("channels", i, tuple(wider_edits(model, i, channels))) for i in blocks]


def layers(model: nn.Module, block: int) -> dict[str, ConvLayer]:
    """The layers of a block by name, in the order in which they run."""
    inside = f"blocks.{block}.layers"
    named = model.get_submodule(inside).named_modules(prefix=inside)
    return {name: m for name, m in named if isinstance(m, ConvLayer)}


def shape(model: nn.Module) -> dict[str, Any]:
    """Width and depth of every block, as {"width.0": 16, "depth.0": 1, ...}."""
    found: dict[str, Any] = {}
    for i in range(len(_growable(model).blocks)):
        inside = list(layers(model, i).values())
        found |= {f"width.{i}": inside[0].conv.out_channels, f"depth.{i}": len(inside)}
    return found


def deeper_edits(model: nn.Module, block: int) -> list[Edit]:
    """A layer after the one with the smallest slope (of equals, the last); the two share its slope."""
    name, layer = min(reversed(layers(model, block).items()), key=lambda item: item[1].act.negative_slope)
    width, slope = layer.conv.out_channels, math.sqrt(layer.act.negative_slope)
    return [
        Insert(name, "next", LAYER, {"in_chs": width, "out_chs": width, "slope": slope}),
        SetAttr(f"{name}.base.act", "negative_slope", slope),
    ]


def wider_edits(model: nn.Module, block: int, channels: int) -> list[Edit]:
    """More channels for every layer of a block, and more inputs for what it feeds: the next block, and the fusion."""
    edits: list[Edit] = []
    own = layers(model, block)
    for j, (name, layer) in enumerate(own.items()):
        width = layer.conv.out_channels + channels
        edits += [Widen(f"{name}.conv.weight", 0, width), SetAttr(f"{name}.conv", "out_channels", width)]
        edits += [Widen(f"{name}.norm.{t}", 0, width) for t in ("weight", "bias", "running_mean", "running_var")]
        edits.append(SetAttr(f"{name}.norm", "num_features", width))
        if j:
            edits += _more_inputs(name, layer, channels)
    blocks = _growable(model).blocks
    if block + 1 < len(blocks):
        edits += _more_inputs(*next(iter(layers(model, block + 1).items())), channels)
    if block in (0, len(blocks) - 1):
        fuse = model.get_submodule("fuse")
        assert isinstance(fuse, ConvLayer)
        edits += _more_inputs("fuse", fuse, channels)
        if block == 0:  # the inputs are (first block, last block): what is new goes between them
            first, total = next(iter(own.values())).conv.out_channels, fuse.conv.in_channels
            order = (*range(first), *range(total, total + channels), *range(first, total))
            edits.append(Narrow("fuse.conv.weight", 1, order))
    return edits


def _more_inputs(name: str, layer: ConvLayer, channels: int) -> list[Edit]:
    inputs = layer.conv.in_channels + channels
    return [Widen(f"{name}.conv.weight", 1, inputs), SetAttr(f"{name}.conv", "in_channels", inputs)]


def expand(model: nn.Module, expansion: Expansion, images: Tensor, *, noise: float = 0.0, seed: int = 0) -> nn.Module:
    """An enlarged copy, whose new tensors are filled; batch norms that are new are measured on `images` (B, C, H, W).

    Without noise its function is the same; with it, the new weights are drawn at that scale, and it is nearly the same.
    """
    generator = torch.Generator().manual_seed(seed)
    grown = apply(copy.deepcopy(model), expansion.edits)
    with torch.no_grad(), eval_mode(grown), ExitStack() as hooks:
        if expansion.what == "layer":
            layer = _inserted(grown, expansion)
            nn.init.dirac_(layer.conv.weight)
            layer.conv.weight += _normal(layer.conv.weight, noise, generator)
            hooks.callback(layer.norm.register_forward_pre_hook(_be_identity).remove)
        else:
            old = layers(model, expansion.block)
            for name, layer in layers(grown, expansion.block).items():
                start = old[name].conv.out_channels
                filters = layer.conv.weight[start:]
                filters.copy_(_normal(filters, noise or math.sqrt(2.0 / filters[0].numel()), generator))
                layer.norm.weight[start:] = 1.0
                hooks.callback(layer.norm.register_forward_pre_hook(_measure_from(start)).remove)
            if noise:
                _fill_inputs(grown, model, expansion, noise, generator)
        grown(images)
    return grown


def _inserted(model: nn.Module, expansion: Expansion) -> ConvLayer:
    insert = expansion.edits[0]
    assert isinstance(insert, Insert)
    layer = model.get_submodule(f"{insert.module}.{insert.name}")
    assert isinstance(layer, ConvLayer)
    return layer


def _fill_inputs(
    grown: nn.Module, model: nn.Module, expansion: Expansion, noise: float, generator: torch.Generator
) -> None:
    """The paper's start of new inputs of filters that were there: small instead of zero."""
    for e in expansion.edits:
        if isinstance(e, Widen) and e.dim == 1:
            weight, was = grown.get_parameter(e.tensor), model.get_parameter(e.tensor)
            between = e.tensor == "fuse.conv.weight" and expansion.block == 0
            end = next(iter(layers(grown, 0).values())).conv.out_channels if between else weight.shape[1]
            part = weight[: was.shape[0], end - (weight.shape[1] - was.shape[1]) : end]
            part.copy_(_normal(part, noise, generator))


def _normal(like: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    return scale * torch.randn(like.shape, generator=generator).to(like)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)


def _be_identity(norm: nn.Module, args: tuple[Any, ...]) -> None:
    """A norm that gives what it gets, with the statistics of what it gets: also in training, nearly."""
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    mean, var = _statistics(args[0])
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    norm.weight.copy_((var + norm.eps).sqrt())
    norm.bias.copy_(mean)


def _measure_from(start: int) -> Any:
    """Statistics of the channels from `start` on."""

    def hook(norm: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        mean, var = _statistics(args[0])
        norm.running_mean[start:], norm.running_var[start:] = mean[start:], var[start:]

    return hook


# -- the score --------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, images: Tensor, labels: Tensor, *, chunk: int = 16) -> Iterator[Tensor]:
    """Gradients of the loss of each image alone, in eval mode: matrices (at most `chunk`, parameters)."""
    values = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    rest = {k: t.detach() for k, t in itertools.chain(model.named_parameters(), model.named_buffers())
            if k not in values}  # fmt: skip

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, values | rest, (x[None],)), y[None])

    with eval_mode(model):
        for x, y in zip(images.split(chunk), labels.split(chunk)):
            found = vmap(grad(loss), in_dims=(None, 0, 0))(values, x, y)
            yield torch.cat([g.flatten(1) for g in found.values()], 1)


def diagonal_score(gradients: Iterator[Tensor] | Sequence[Tensor]) -> float:
    """g^T F^-1 g with the diagonal of the empirical Fisher (Section 3); each parameter adds something in [0, 1].

    >>> diagonal_score([torch.tensor([[1.0, 0.0, 2.0]])])  # of one image: the number of parameters that matter
    2.0
    """
    n, first, second = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for g in gradients:
        g = g.double()
        n, first, second = n + len(g), first + g.sum(0), second + (g**2).sum(0)
    return float(torch.where(second > 0, first**2 / (n * second), 0.0).sum())


def full_score(gradients: Tensor, *, damping: float = 1e-3) -> float:
    """The same with the whole empirical Fisher, by its kernel (N, N) instead of (P, P); in [0, 1].

    >>> round(full_score(torch.ones(4, 3), damping=0.0), 6)
    1.0
    """
    g = gradients.double()
    n = len(g)
    kernel = g @ g.T / n
    ones = torch.ones(n, dtype=torch.float64)
    damped = kernel + damping * torch.eye(n, dtype=torch.float64)
    return float(ones @ torch.linalg.lstsq(damped, kernel @ ones, driver="gelsd").solution) / n


def score(model: nn.Module, images: Tensor, labels: Tensor, *, fisher: str = "diagonal") -> float:
    """The natural expansion score of a network on a batch: (B, C, H, W) and (B,)."""
    if fisher == "full":
        return full_score(torch.cat([g.cpu() for g in gradients(model, images, labels)]))
    return diagonal_score(g.cpu() for g in gradients(model, images, labels))


def damped(eta: float, added: int, params: int, penalty: float) -> float:
    """eta exp(-penalty (added / params)^2).

    >>> damped(3.0, 0, 100, 1.0), damped(3.0, 50, 100, 0.0)
    (3.0, 3.0)
    """
    return eta * math.exp(-penalty * (added / params) ** 2)


def decide(now: float, layer: float, channels: float, tau: float = 2.0) -> str | None:
    """Which of the best scores wins, if it is more than `tau` times the score of the network as it is.

    >>> decide(1, 3, 2.5), decide(1, 2.5, 3), decide(1, 1.9, 1.5)
    ('layer', 'channels', None)
    """
    if layer == channels or max(layer, channels) <= tau * now:
        return None
    return "layer" if layer > channels else "channels"


def choose(
    model: nn.Module, expansions: Sequence[Expansion], images: Tensor, labels: Tensor, *, tau: float = 2.0,
    penalty: float = 1.0, fisher: str = "diagonal", noise: float = 0.0, seed: int = 0,
) -> Expansion | None:  # fmt: skip
    """The expansion that the score asks for, if any."""
    scores = scored(model, expansions, images, labels, penalty=penalty, fisher=fisher, noise=noise, seed=seed)
    top = {kind: max((s for s, e in zip(scores, expansions) if e.what == kind), default=0.0)
           for kind in ("layer", "channels")}  # fmt: skip
    won = decide(score(model, images, labels, fisher=fisher), top["layer"], top["channels"], tau)
    return next((e for s, e in zip(scores, expansions) if e.what == won and s == top[won]), None) if won else None


def scored(
    model: nn.Module, expansions: Sequence[Expansion], images: Tensor, labels: Tensor, *, penalty: float = 1.0,
    fisher: str = "diagonal", noise: float = 0.0, seed: int = 0,
) -> list[float]:  # fmt: skip
    """The penalised score of each expansion, all on the same images.

    What is new starts small in it, also where it will start at zero: what feeds a zero has no gradient, so the filters
    that widening adds would count nothing, and inserted layers, which feed what they replace, would win.
    """
    params = _params(model)
    found = []
    for expansion in expansions:
        grown = expand(model, expansion, images, noise=noise or _START, seed=seed)
        found.append(damped(score(grown, images, labels, fisher=fisher), _params(grown) - params, params, penalty))
        log.debug("%s: %.4g", "; ".join(describe(expansion.edits[:1])), found[-1])
    return found


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _cost(model: nn.Module, size: tuple[int, ...], budget: Budget | None = None) -> dict[str, Any]:
    names = {"params", "macs", *(c.name for c in (budget.clauses if budget else ()))} & set(WHAT)
    return {k: v for k, v in measure(model, size, what=sorted(names)).asdict().items() if k in names}


def _growable(model: nn.Module) -> SECNN:
    if not isinstance(model, SECNN):
        raise ValueError(f"the network must be one of blocks that can grow (secnn), got {type(model).__name__}")
    return model
