"""CompactifAI: truncating the correlations inside weight matrices (arXiv 2401.14109).

The matrices of attention and MLP become matrix product operators (`nn.structured`), whose bond dimension chi says how
much of the correlation between their parts is kept. A sensitivity profile (truncate one layer alone, look at the
loss) tells which layers bear a small chi; short training of the cores, the "healing", brings the accuracy back.

What differs from the paper: it chooses chi by hand from the profile, here a budget does, by one of three allocations.
Its layers, chis and data are not published. Convolutions stay as they are (`tucker` and `cp` factorize those).

Two things to know. Fewer weights are not fewer products: for two balanced sites the factored product costs more than
the dense one from a small chi on, so layers build their weight in each pass where that is cheaper (mode "auto"), and
`merge` gives plain layers back. ``sites="lowrank"`` (the plain SVD) saves multiply-adds as it saves weights. And at
equal weights a matrix product operator need not be better than the plain SVD: measure both.
"""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from trimtab.compress.factorize.to_budget import bounds_of, chosen, first_that_fits, own_layers, rebuilt
from trimtab.core.budget import Budget
from trimtab.core.card import Card, Claim
from trimtab.core.edit import Edit, Replace
from trimtab.core.errors import SurgeryError
from trimtab.core.log import progress_wanted
from trimtab.learn import Objective, evaluate
from trimtab.learn import fit as train
from trimtab.nn.structured import (
    MODES,
    Sites,
    StructuredLinear,
    balanced_sites,
    bond_ranks,
    contract,
    core_params,
    decompose,
    spectra,
    sweep_macs,
)

CARD = Card(
    slug="compactifai",
    title="CompactifAI: Extreme Compression of Large Language Models using Quantum-Inspired Tensor Networks",
    arxiv="2401.14109",
    year=2024,
    kind="method",
    tasks=("language_modeling", "classify"),
    claims=(
        Claim(
            "correlation_space",
            "Replacing attention and MLP matrices by truncated matrix product operators (MPO) with bond dimension chi "
            "removes 70% of LLaMA-2 7B's parameters; with quantisation memory falls 93% (27.1 GB -> 2.1 GB) for a "
            "2-3% accuracy drop after brief healing",
        ),
        Claim(
            "healing",
            "A short retraining (< 1 epoch) of the tensor cores recovers most of the truncation loss",
        ),
        Claim(
            "sensitivity",
            "Layer profiling shows deeper layers tolerate much stronger truncation than the first ones",
        ),
    ),
)
HEALED = ("cores", "all")
ALLOCATIONS = ("sensitivity", "error", "uniform")
_WORST = 1e9  # what a metric that is not finite counts as
CONV1D = "transformers.pytorch_utils.Conv1D"
LAYER = "trimtab.nn.structured.StructuredLinear"

Metric = Callable[[nn.Module], float]
Choice = dict[str, int]  # chi by layer; a layer that is not in it stays dense


def compactifai(
    model: nn.Module,
    data: Any,
    *,
    budget: str | Budget = "params<=50%",
    sites: int | str = 2,
    allocation: str = "sensitivity",
    layers: str | Sequence[str] | None = None,
    profile: Profile | None = None,
    metric: Metric | None = None,
    samples: int = 256,
    mode: str = "auto",
    heal: str = "cores",
    epochs: int = 1,
    objective: Objective | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
    lr: float = 1e-3,
    opt: str = "adamw",
    weight_decay: float = 0.0,
    sched: str = "cosine",
    **fit: Any,
) -> nn.Module:
    """A copy of `model` with truncated linear layers that meets the budget, healed; its edits are remembered.

    Args:
        data: a `Data`; without healing and with a `metric`, a `profile` or another allocation also an input size
            (C, H, W), an example input (B, ...), or a tuple or dict of example inputs.
        budget: upper bounds on params, size, macs, bops, activations or memory; a percentage is of the model's own.
        sites: factors of each matrix: 2 (a Kronecker sum), 3, ...; or "lowrank" for the plain SVD.
        allocation: how chi is shared out: "sensitivity" takes first what costs the least metric per weight on the
            profile, "error" allows every layer the same relative error, "uniform" gives every layer the same chi.
        layers: patterns of the layers to truncate, such as ``blocks.*.mlp.*``; default: every linear layer (and
            transformers' Conv1D) but the classifier, those with tied weights, and those that would not get smaller.
        profile: of this model and these sites (see `sensitivity`), when it is at hand; otherwise it is made.
        metric: model -> a number that is better when lower; default: cross-entropy on `samples` training images.
        mode: how the layers run, see `StructuredLinear`.
        heal: what healing trains: the "cores" (and the biases beside them), or "all".
        epochs: of healing; 0 for none. The paper needs less than one.
        objective: what healing minimises, such as ``KD(model)``; default: cross-entropy.
        out: folder of the checkpoint of the healing, which then can be resumed.
        lr, opt, weight_decay, sched: of healing. Decay would shrink a product of cores once for each of them.
        **fit: anything else that `tt.fit` takes.

    Raises:
        BudgetError: the budget cannot be met; says how near it came.
        SurgeryError: there is no layer to truncate.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> small = compactifai(net, (1, 8, 8), budget="params<=50%", allocation="error", epochs=0)
    >>> small[1].ranks, sum(p.numel() for p in small.parameters())
    ((13,), 2378)
    """
    if heal not in HEALED:
        raise ValueError(f"heal must be one of {', '.join(HEALED)}, got {heal!r}")
    if not isinstance(epochs, int) or epochs < 0:
        raise ValueError(f"epochs must be a non-negative integer, got {epochs!r}")
    if epochs and not hasattr(data, "splits"):
        raise ValueError(f"healing needs data to train on, got {type(data).__name__}; or say epochs=0")
    edits = plan(
        model, data, budget=budget, sites=sites, allocation=allocation, layers=layers, profile=profile, metric=metric,
        samples=samples, mode=mode, seed=seed, progress=progress,
    )  # fmt: skip
    small = truncated(model, edits)
    if epochs and edits:
        settings = {"lr": lr, "opt": opt, "weight_decay": weight_decay, "sched": sched, "out": out, **fit}
        with trainable(small, heal):
            train(small, data, objective, epochs=epochs, seed=seed, progress=progress, **settings)
    return small


def plan(
    model: nn.Module,
    data: Any,
    *,
    budget: str | Budget = "params<=50%",
    sites: int | str = 2,
    allocation: str = "sensitivity",
    layers: str | Sequence[str] | None = None,
    profile: Profile | None = None,
    metric: Metric | None = None,
    samples: int = 256,
    mode: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> list[Edit]:
    """The edits that `compactifai` applies (`truncated` fills them with weights); arguments as there."""
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    bounds = bounds_of(budget, model, data)
    matrices = _matrices(model, sites, layers)

    def edits(choice: Choice) -> list[Edit]:
        return [matrices[name].edit(chi, mode) for name, chi in choice.items()]

    if allocation == "sensitivity":
        if profile is None:
            profile = sensitivity(
                model, data, sites=sites, layers=layers, metric=metric, samples=samples, seed=seed, progress=progress
            )
        if profile.sites != sites:
            raise ValueError(f"sites must be those of the profile, {profile.sites!r}, got {sites!r}")
        choices = list(_by_sensitivity(matrices, profile))
    else:
        choices = list(_by_error(matrices) if allocation == "error" else _by_chi(matrices))
    n = first_that_fits(model, data, bounds, choices, edits)
    if n and allocation == "sensitivity":  # between two points of the grid there may be room for more
        between = list(_between(choices[n - 1], choices[n], matrices))
        return edits(between[first_that_fits(model, data, bounds, between, edits)])
    return edits(choices[n])


def truncated(model: nn.Module, edits: Sequence[Edit]) -> nn.Module:
    """A copy of `model` with the edits of `plan`, and the cores that the model's own weights give."""
    weights: dict[str, Tensor] = {}
    for e in edits:
        if not isinstance(e, Replace) or e.with_ != LAYER:
            raise ValueError(f"edits must be those of plan(), got {e}")
        how = {k: e.kwargs[k] for k in ("out_sites", "in_sites", "ranks")}
        weight, bias = _dense(model.get_submodule(e.module))
        layer = StructuredLinear.from_dense(weight, bias, **how)
        weights |= {f"{e.module}.{name}": value for name, value in layer.state_dict().items()}
    return rebuilt(model, edits, weights)


@contextmanager
def trainable(model: nn.Module, which: str = "cores") -> Iterator[list[nn.Parameter]]:
    """What healing trains, for a training loop of your own: the "cores" (and biases) of truncated layers, or "all".

    The other parameters require no gradient inside the ``with``; afterwards they do again.
    """
    if which not in HEALED:
        raise ValueError(f"which must be one of {', '.join(HEALED)}, got {which!r}")
    inside = {id(p) for m in model.modules() if isinstance(m, StructuredLinear) for p in m.parameters()}
    free = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in free if which == "cores" and id(p) not in inside]
    try:
        for p in frozen:
            p.requires_grad_(False)
        yield [p for p in free if p.requires_grad]
    finally:
        for p in frozen:
            p.requires_grad_(True)


def merge(model: nn.Module) -> nn.Module:
    """A copy with every truncated layer contracted into a plain linear one: the original speed, and size."""
    edits: list[Replace] = []
    weights: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, StructuredLinear):
            kwargs = {"in_features": layer.in_features, "out_features": layer.out_features}
            edits.append(Replace(name, "torch.nn.Linear", kwargs | {"bias": layer.bias is not None}))
            weights[f"{name}.weight"] = layer.to_dense().detach()
            if layer.bias is not None:
                weights[f"{name}.bias"] = layer.bias.detach()
    return rebuilt(model, edits, weights)


# -------------------------------------------------------------------------------------------------------------- profile


@dataclass(frozen=True)
class Row:
    """One layer truncated alone to one chi: what it does to the metric, and what it saves.

    layer, depth: its name, and its place among the layers profiled. error: relative Frobenius error of the weight.
    drop: the metric minus that of the whole model. params, macs: of the truncated layer, per token and factored;
    dense: weights, and multiply-adds per token, of the layer as it was.
    """

    layer: str
    depth: int
    chi: int
    error: float
    metric: float
    drop: float
    params: int
    macs: int
    dense: int


@dataclass(frozen=True)
class Profile:
    """The sensitivity profile: `base` is the metric of the whole model, `spectra` the singular values of each layer's
    bonds as shares of the weight's norm, `sites` how the layers were factored."""

    base: float
    rows: tuple[Row, ...]
    spectra: dict[str, tuple[tuple[float, ...], ...]]
    sites: int | str

    def asdict(self) -> dict[str, Any]:
        """Plain JSON values, as `trimtab.report.sensitivity_svg` draws them."""
        return asdict(self)


def sensitivity(
    model: nn.Module,
    data: Any = None,
    *,
    sites: int | str = 2,
    layers: str | Sequence[str] | None = None,
    chis: Sequence[int] | None = None,
    metric: Metric | None = None,
    samples: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Profile:
    """What truncating each layer alone does to the metric.

    Args:
        chis: bond dimensions to try; default: the powers of two at which the layer is smaller than dense.
        data, sites, layers, metric, samples: as for `compactifai`; `data` is needed only for the default metric.
    """
    if metric is None:
        metric = _loss_on(data, samples, seed)
    if chis is not None and (not chis or min(chis) < 1):
        raise ValueError(f"chis must be positive integers, got {chis}")
    matrices = _matrices(model, sites, layers)
    whole = copy.deepcopy(model).eval()
    base = _number(metric, whole)
    rows, values = [], {}
    bar: dict[str, Any] = {
        "console": Console(stderr=True),
        "disable": not (progress and progress_wanted()),
        "transient": True,
    }
    for depth, (name, m) in enumerate(track(matrices.items(), "profile", **bar)):
        held = _dense(whole.get_submodule(name))[0].detach()  # the memory of the copy's own weight
        kept = m.weight
        norm = float(kept.norm()) or 1.0
        values[name] = tuple(tuple((s / norm).tolist()) for s in spectra(kept, m.out_sites, m.in_sites))
        grid = sorted({min(c, m.top) for c in chis}) if chis else [2**k for k in range(m.top.bit_length())]
        for chi, near in zip(grid, m.truncations(kept, grid)):
            held.copy_(near)
            after = _number(metric, whole)
            error = float((near - kept).norm()) / norm
            rows.append(Row(name, depth, chi, error, after, after - base, m.params(chi), m.macs(chi), m.dense))
        held.copy_(kept)
    return Profile(base, tuple(rows), values, sites)


def _loss_on(data: Any, samples: int, seed: int) -> Metric:
    if not hasattr(data, "splits"):
        raise ValueError(f"a profile needs data to measure the loss on, or a metric, got {type(data).__name__}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    few = data.subset({"train": min(samples, len(data.splits["train"]))}, seed=seed)
    return lambda model: evaluate(model, few, "train")["loss"]


def _number(metric: Metric, model: nn.Module) -> float:
    with torch.no_grad():
        value = float(metric(model))
    return value if math.isfinite(value) else _WORST


# ----------------------------------------------------------------------------------------------------------- allocation


def _by_chi(matrices: Mapping[str, Matrix]) -> Iterator[Choice]:
    """The same chi everywhere, ever smaller; where that would not save anything, the layer stays dense."""
    for chi in range(max(m.top for m in matrices.values()) + 1, 0, -1):
        yield {name: chi for name, m in matrices.items() if chi <= m.top}


def _by_error(matrices: Mapping[str, Matrix]) -> Iterator[Choice]:
    """The same relative error everywhere, ever larger."""
    errors = {name: m.errors() for name, m in matrices.items()}  # of chi = 1, 2, ..., top
    steps = [(error, name, chi) for name, all_ in errors.items() for chi, error in enumerate(all_, 1)]
    choice: Choice = {}
    yield {}
    for _, name, chi in sorted(steps, key=lambda step: (step[0], -step[2])):
        choice = {**choice, name: chi}
        yield choice


def _by_sensitivity(matrices: Mapping[str, Matrix], profile: Profile) -> Iterator[Choice]:
    """Step by step whatever costs the least metric for each weight it saves, effects taken as additive.

    A step may pass over points of the grid, so that one bad point does not hide the good ones below it.
    """
    points: dict[str, list[tuple[int, float, int]]] = {}  # params, drop, chi; from mild to harsh
    for row in sorted(profile.rows, key=lambda row: -row.chi):
        if row.layer in matrices:
            points.setdefault(row.layer, []).append((matrices[row.layer].params(row.chi), row.drop, row.chi))
    if missing := [name for name in matrices if name not in points]:
        raise ValueError(f"profile must be of this model and these layers; it knows nothing of {missing[0]}")

    def best(name: str, params: int, drop: float) -> tuple[float, int, str, int, float, int] | None:
        steps = [((d - drop) / (params - p), p - params, name, p, d, chi) for p, d, chi in points[name] if p < params]
        return min(steps, default=None)

    heap = [step for name, m in matrices.items() if (step := best(name, m.dense, 0.0))]
    heapq.heapify(heap)
    choice: Choice = {}
    yield {}
    while heap:
        _, _, name, params, drop, chi = heapq.heappop(heap)
        choice = {**choice, name: chi}
        yield choice
        if step := best(name, params, drop):
            heapq.heappush(heap, step)


def _between(mild: Choice, harsh: Choice, matrices: Mapping[str, Matrix]) -> Iterator[Choice]:
    """From a choice to the next, the chi of the layers that differ going down one by one."""
    at = {name: mild.get(name, matrices[name].top + 1) for name in harsh}
    for name, chi in harsh.items():
        while at[name] > chi:
            at[name] -= 1
            yield {n: c for n, c in at.items() if c <= matrices[n].top}


# --------------------------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Matrix:
    """A layer that may be truncated. `dense` is its number of weights; `top` the largest chi that has fewer."""

    name: str
    weight: Tensor  # (out, in)
    bias: bool
    out_sites: Sites
    in_sites: Sites
    top: int

    @property
    def dense(self) -> int:
        return self.weight.numel()

    def ranks(self, chi: int) -> tuple[int, ...]:
        return bond_ranks(self.out_sites, self.in_sites, chi)

    def params(self, chi: int) -> int:
        return core_params(self.out_sites, self.in_sites, self.ranks(chi))

    def macs(self, chi: int) -> int:
        return min(sweep_macs(self.out_sites, self.in_sites, self.ranks(chi)))

    def errors(self) -> list[float]:
        """A bound on the relative error for chi = 1, ..., top: exact for two sites, else the root of all bonds' sum."""
        lost = torch.zeros(self.top, dtype=torch.float64)
        for s in spectra(self.weight, self.out_sites, self.in_sites):
            tail = s.double().square().flip(0).cumsum(0).flip(0)  # of keeping 0, 1, 2, ... values
            kept = torch.arange(1, self.top + 1).clamp(max=len(s))
            lost += torch.cat([tail, tail.new_zeros(1)]).cpu()[kept]
        return (lost.sqrt() / max(float(self.weight.norm()), 1e-30)).tolist()

    def truncations(self, weight: Tensor, chis: Sequence[int]) -> Iterator[Tensor]:
        """The weight truncated to each chi; for two sites one decomposition serves all."""
        out_features, in_features = weight.shape
        whole = decompose(weight, self.out_sites, self.in_sites, self.ranks(max(chis)), exact=False)
        for chi in chis:
            if len(whole) == 2:
                cores = [whole[0][..., :chi], whole[1][:chi]]
            else:
                cores = decompose(weight, self.out_sites, self.in_sites, self.ranks(chi), exact=False)
            yield contract(cores)[:out_features, :in_features]

    def edit(self, chi: int, mode: str) -> Edit:
        out_features, in_features = self.weight.shape
        kwargs = {
            "in_features": in_features, "out_features": out_features, "out_sites": self.out_sites,
            "in_sites": self.in_sites, "ranks": self.ranks(chi), "bias": self.bias, "mode": mode,
        }  # fmt: skip
        return Replace(self.name, LAYER, kwargs)


def _matrices(model: nn.Module, sites: int | str, layers: str | Sequence[str] | None) -> dict[str, Matrix]:
    """The layers that may be truncated, in the order of the model."""
    found = list(own_layers(model, nn.Linear, CONV1D))
    if layers is not None:
        found = chosen(found, layers)
    else:
        head = _head(model, found)
        found = [name for name in found if name != head]
    matrices = {}
    for name in found:
        weight, bias = _dense(model.get_submodule(name))
        out_sites, in_sites = balanced_sites(weight.shape[0], weight.shape[1], sites)
        top = _largest_saving(out_sites, in_sites, weight.numel())
        if top:
            matrices[name] = Matrix(name, weight.detach(), bias is not None, out_sites, in_sites, top)
    if not matrices:
        raise SurgeryError(f"{type(model).__name__} has no linear layer that would get smaller by truncation")
    return matrices


def _dense(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias of a layer; Conv1D stores the transpose."""
    return (module.weight if isinstance(module, nn.Linear) else module.weight.T), module.bias


def _head(model: Any, found: Sequence[str]) -> str | None:
    """The classifier: what timm or transformers say it is, otherwise the last linear layer."""
    for get in ("get_classifier", "get_output_embeddings"):
        head = getattr(model, get)() if callable(getattr(model, get, None)) else None
        if isinstance(head, nn.Module):
            return next((name for name, m in model.named_modules() if m is head), None)
    return found[-1] if found else None


def _largest_saving(out_sites: Sites, in_sites: Sites, dense: int) -> int:
    """The largest chi with fewer weights than the matrix, 0 when there is none."""

    def saves(chi: int) -> bool:
        return core_params(out_sites, in_sites, bond_ranks(out_sites, in_sites, chi)) < dense

    low, high = 0, max(bond_ranks(out_sites, in_sites, dense))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if saves(middle) else (low, middle - 1)
    return low
