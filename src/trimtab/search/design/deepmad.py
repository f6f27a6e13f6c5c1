"""DeepMAD (Shen et al., "DeepMAD: Mathematical Architecture Design for Deep Convolutional Neural Network", arXiv
2303.02165).

The entropy that the features of a network can carry is a formula of its widths, kernels and depths. Maximised alone, it
gives deep and narrow networks that do not train; so the depth relative to the mean width, `rho`, is bounded as well.
With budgets on parameters and MACs this is a program over a few dozen integers, solved in seconds without any data.

What differs: the solver is SciPy's differential evolution over coordinates in which widths rise and stay within their
limits by themselves; the authors mutate structures one by one. The map size in the entropy of depthwise networks is the
true one; the authors' code loses it at each squeeze-and-excitation. As in their code and unlike in the paper, entropy
is on half the scale (log of the root of the width), to which `beta` belongs, and the unevenness of depths is
exp(standard deviation), which does not overflow. For images smaller than 128 pixels the stem does not stride.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from trimtab.core.budget import Budget, format_value
from trimtab.core.card import Card, Claim
from trimtab.core.errors import BudgetError
from trimtab.models import create_model
from trimtab.models.classify.deepmad_nets import KINDS, se_width

CARD = Card(
    slug="deepmad",
    title="DeepMAD: Mathematical Architecture Design for Deep Convolutional Neural Network",
    arxiv="2303.02165",
    year=2023,
    kind="method",
    tasks=("classify",),
    claims=(
        Claim(
            "closed_form",
            "Expressiveness (entropy) and trainability (effectiveness) of a CNN are closed-form functions of widths, "
            "kernels, depths; design is a constrained mathematical program solved on a CPU in minutes, without data or "
            "gradients",
        ),
        Claim(
            "budget_match",
            "At ResNet-18/34/50 cost the designed nets get 77.7/79.7/80.6% ImageNet top-1 (ResNets 70.9/74.4/77.4)",
        ),
        Claim(
            "sota",
            "29M/4.5G: 82.5% (224), 82.8% (288) vs ConvNeXt-T 82.1, Swin-T 81.3; 50M/8.7G: 83.9% vs 83.1/83.0",
        ),
        Claim(
            "effectiveness",
            "Entropy alone picks untrainable deep-narrow nets; bounding rho (about 0.3 for ResNet-like, 0.5 for "
            "depthwise) fixes it",
        ),
    ),
)

BOUNDED = ("params", "macs")
RHO = {"bottleneck": 0.3, "depthwise": 0.5}
LAST = 8.0  # weight of the last stage's entropy; that of the others is 1
_MAX_DEPTH, _MAX_STEM, _FIRST_DEPTH = 40, 64, 3
_OUTSIDE = 1e9  # objective of a network outside the budget, and more the farther out


def deepmad(
    data: Any = (3, 224, 224),
    *,
    budget: str | Budget,
    kind: str = "bottleneck",
    rho: float | None = None,
    beta: float = 10.0,
    strides: Sequence[int] | None = None,
    neck: int = 0,
    max_width: int = 2048,
    num_classes: int | None = None,
    rounds: int = 600,
    seed: int = 0,
) -> nn.Module:
    """The network of the largest entropy inside a budget that still trains; not trained itself.

    Args:
        data: a `Data`, or the size (C, H, W) of the images.
        budget: bounds on params and macs.
        kind: of block: "bottleneck" (as in ResNet) or "depthwise" (with squeeze-and-excitation).
        rho: bound on depth relative to width; by default 0.3 for bottlenecks and 0.5 for depthwise blocks. Larger is
            deeper and narrower.
        beta: weight of the wish for stages of equal depth.
        strides: of the super-blocks, the stem's own not included; by default as many as leave a map of 4 to 8 pixels.
        neck: channels of a 1x1 convolution at the end; 0 for none.
        max_width: channels of the widest layer between blocks.
        num_classes: by default those of `data`, or 1000.
        rounds: of the solver; each looks at some 200 structures.
        seed: of the solver, and of the initial weights.

    Returns:
        `create_model("deepmad_net", ...)`.

    Raises:
        ValueError: an argument makes no sense. BudgetError: no network of this kind is inside the budget.

    >>> import trimtab as tt
    >>> net = deepmad((3, 32, 32), budget="macs<=5M, params<=100k", num_classes=10, rounds=20)
    >>> cost = tt.measure(net, (3, 32, 32))
    >>> cost.macs <= 5e6 and cost.params <= 100e3
    True
    """
    size = tuple(data) if isinstance(data, Sequence) else (data.in_chans, *data.size)
    classes = num_classes if num_classes is not None else getattr(data, "num_classes", 1000)
    found = design(
        size, budget=budget, kind=kind, rho=rho, beta=beta, strides=strides, neck=neck, max_width=max_width,
        num_classes=classes, rounds=rounds, seed=seed,
    )  # fmt: skip
    return create_model("deepmad_net", **found.kwargs(), num_classes=classes, in_chans=size[0], seed=seed)


# -- formulas ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Structure:
    """What a network of super-blocks is made from: the arguments of `deepmad_net`.

    Every number may be an array, one entry for each of many structures; only strides and kind are those of all.
    """

    stem: Any
    stages: tuple[tuple[Any, Any, Any, Any, int], ...]  # width, mid, kernel, depth, stride
    kind: str = "bottleneck"
    neck: int = 0
    stem_stride: int = 2

    def kwargs(self) -> dict[str, Any]:
        """As `create_model("deepmad_net", **kwargs)` takes it."""
        return {
            "stem": int(self.stem), "stages": [[int(n) for n in stage] for stage in self.stages], "kind": self.kind,
            "neck": self.neck, "stem_stride": self.stem_stride,
        }  # fmt: skip


@dataclass(frozen=True)
class End:
    """The end of a stage, where the resolution is about to halve, or the network ends.

    Attributes:
        channels, height, width: of its map. layers: convolutions so far on the main path.
        log_width: sum of the logarithms of their widths (inputs of one output: channels x kernel area / groups).
    """

    channels: Any
    height: int
    width: int
    layers: Any
    log_width: Any

    @property
    def entropy(self) -> Any:
        """Upper bound on what the map can carry, on the half scale (Eq. 5 with the root of each width)."""
        return np.log(self.height * self.width * self.channels) * self.log_width / 2

    @property
    def rho(self) -> Any:
        """Layers over the geometric mean of their widths (Eq. 6)."""
        return np.exp(np.log(self.layers) - self.log_width / self.layers)


@dataclass(frozen=True)
class Figures:
    """All that formulas say of a structure: the ends of its stages, its costs, and the depths that should be even."""

    ends: tuple[End, ...]
    params: Any
    macs: Any
    depths: tuple[Any, ...]

    @property
    def entropies(self) -> list[Any]:
        """Of each stage, weighted as in the objective."""
        return [e.entropy for e in self.ends[:-1]] + [LAST * self.ends[-1].entropy]

    @property
    def entropy(self) -> Any:
        return sum(self.entropies)

    @property
    def rho(self) -> Any:
        """The largest over the stages."""
        return np.max(np.broadcast_arrays(*(e.rho for e in self.ends)), axis=0)

    @property
    def unevenness(self) -> Any:
        """exp of the standard deviation of the depths."""
        return np.exp(np.std(np.broadcast_arrays(*self.depths), axis=0))


def figures(net: Structure, size: Sequence[int], num_classes: int = 1000) -> Figures:
    """Entropy, effectiveness, parameters and MACs of a structure, or of many at once, for images of a size (C, H, W).

    >>> net = Structure(32, ((96, 40, 5, 1, 2), (384, 40, 5, 6, 2)))
    >>> [round(float(h), 3) for h in figures(net, (3, 224, 224)).entropies]
    [21.263, 109.487, 5815.82]
    """
    tally = _Tally(size)
    ends: list[End] = []
    tally.conv(size[0], net.stem, 3, stride=net.stem_stride)
    chs = net.stem
    for width, mid, kernel, depth, stride in net.stages:
        if stride == 2:
            ends.append(tally.end(chs))
        for a, times, step in ((chs, 1, stride), (width, depth - 1, 1)):
            tally.conv(a, mid, 1, times=times)
            tally.conv(mid, mid, kernel, times=times, stride=step, depthwise=net.kind == "depthwise")
            if net.kind == "depthwise":
                tally.excite(mid, times)
            tally.conv(mid, width, 1, times=times)
        if net.kind == "bottleneck":
            tally.conv(chs, width, 1, main=False)
        chs = width
    if net.neck:
        tally.conv(chs, net.neck, 1)
        chs = net.neck
    ends.append(tally.end(chs))
    depths = [stage[3] for stage in net.stages]
    even = depths[1:] if net.kind == "bottleneck" else depths
    return Figures(
        tuple(ends), tally.params + (chs + 1) * num_classes, tally.macs + chs * num_classes, tuple(even or depths)
    )


class _Tally:
    """Counts convolutions as they come."""

    def __init__(self, size: Sequence[int]) -> None:
        self.height, self.width = size[1], size[2]
        self.params: Any = 0
        self.macs: Any = 0
        self.layers: Any = 0
        self.log_width: Any = 0.0

    def conv(
        self, a: Any, b: Any, kernel: Any, *, times: Any = 1, stride: int = 1, depthwise: bool = False,
        main: bool = True,
    ) -> None:  # fmt: skip
        """`times` convolutions from a to b channels with batch norms; the first halves the map if `stride` is 2."""
        self.height, self.width = -(-self.height // stride), -(-self.width // stride)
        fan_in = kernel**2 * (1 if depthwise else a)
        self.params = self.params + times * (fan_in * b + 2 * b)
        self.macs = self.macs + times * fan_in * b * self.height * self.width
        if main:
            self.layers = self.layers + times
            self.log_width = self.log_width + times * np.log(fan_in)

    def excite(self, mid: Any, times: Any) -> None:
        hidden = se_width(mid)
        self.params = self.params + times * (2 * mid * hidden + 2 * (mid + hidden))
        self.macs = self.macs + times * 2 * mid * hidden

    def end(self, chs: Any) -> End:
        return End(chs, self.height, self.width, self.layers, self.log_width)


# -- the program ------------------------------------------------------------------------------------------------------


def design(
    size: Sequence[int],
    *,
    budget: str | Budget,
    kind: str = "bottleneck",
    rho: float | None = None,
    beta: float = 10.0,
    strides: Sequence[int] | None = None,
    neck: int = 0,
    max_width: int = 2048,
    num_classes: int = 1000,
    rounds: int = 600,
    seed: int = 0,
) -> Structure:
    """Solve the program: the structure of the largest entropy inside the bounds; arguments as for `deepmad`."""
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"data must be a Data or an input size (channels, height, width), got {tuple(size)}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    rho = RHO[kind] if rho is None else rho
    if not rho > 0 or not beta >= 0:
        raise ValueError(f"rho must be positive and beta not negative, got {rho} and {beta}")
    if max_width < 8 or neck < 0 or rounds < 1:
        raise ValueError(f"max_width must be at least 8, neck 0 and rounds 1, got {max_width}, {neck} and {rounds}")
    stem_stride, usual = usual_strides(size)
    strides = tuple(usual if strides is None else strides)
    if not strides or not set(strides) <= {1, 2}:
        raise ValueError(f"strides must be of 1 and 2, one for each super-block, got {strides}")
    bounds = Budget(budget)
    if bounds.relative:
        raise BudgetError(f"{str(bounds)!r} is relative to a network; a design has none: give absolute bounds")
    if foreign := [c.text for c in bounds.clauses if c.name not in BOUNDED]:
        raise BudgetError(f"a design is bounded in {' and '.join(BOUNDED)} alone, got {', '.join(foreign)}")

    def structures(x: np.ndarray) -> Structure:
        return _decode(x, strides, kind=kind, neck=neck, stem_stride=stem_stride, max_width=max_width)

    def objective(x: np.ndarray) -> np.ndarray:
        f = figures(structures(x), size, num_classes)
        excess = np.maximum(0.0, f.rho / rho - 1)
        for c in bounds.clauses:
            over = getattr(f, c.name) / max(c.limit, 1e-9) - 1
            excess = excess + np.maximum(0.0, over if c.op == "<=" else -over)
        return np.where(excess > 0, _OUTSIDE * (1 + excess), beta * f.unevenness - f.entropy)

    x, value = _solve(objective, _coordinates(len(strides), kind), rounds, seed)
    found = structures(x)
    if value >= _OUTSIDE:
        f = figures(found, size, num_classes)
        raise BudgetError(
            f"no network of this kind is inside {bounds} with rho<={rho:g}; the nearest has "
            f"{format_value('macs', float(f.macs))} MACs, {format_value('params', float(f.params))} parameters and rho "
            f"{float(f.rho):.3g}; fewer strides, a larger rho or a larger budget would help"
        )
    return found


def usual_strides(size: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Strides of the stem and of the super-blocks that leave a map of 4 to 8 pixels; the paper's at 224.

    >>> usual_strides((3, 224, 224)), usual_strides((3, 32, 32))
    ((2, (2, 2, 2, 1, 2)), (1, (1, 2, 2, 2)))
    """
    halvings = max(1, int(math.log2(min(size[1:]) / 4))) if min(size[1:]) >= 8 else 1
    if halvings >= 5:
        return 2, (*[2] * (halvings - 2), 1, 2)
    return 1, (1, *[2] * halvings)


def _coordinates(blocks: int, kind: str) -> list[tuple[float, float]]:
    """Ranges of the solver's coordinates: log stem; of each super-block log growth, log mid, kernel, log depth."""
    mid = (0.1, 1.0) if kind == "bottleneck" else (1.5, 6.0)
    kernels = 2 if kind == "bottleneck" else 3
    ranges = [(math.log(8), math.log(_MAX_STEM))]
    for i in range(blocks):
        deepest = _FIRST_DEPTH if i == 0 else _MAX_DEPTH
        ranges += [(0.0, math.log(4)), (math.log(mid[0]), math.log(mid[1])), (0.0, kernels - 1e-6),
                   (math.log(0.51), math.log(deepest + 0.49))]  # fmt: skip
    return ranges


def _decode(
    x: np.ndarray, strides: Sequence[int], *, kind: str, neck: int, stem_stride: int, max_width: int
) -> Structure:
    """Structures from coordinates (4 B + 1,) or (4 B + 1, N); widths rise, at most fourfold, in multiples of 8."""
    stem = np.minimum(_eights(np.exp(x[0])), max_width)
    stages, width = [], stem
    for i, stride in enumerate(strides):
        growth, share, kernel, depth = x[4 * i + 1 : 4 * i + 5]
        width = np.clip(_eights(width * np.exp(growth)), width, max_width)
        mid = _eights(width * np.exp(share))
        stages.append((width, mid, 3 + 2 * np.floor(kernel), np.maximum(1, np.round(np.exp(depth))), stride))
    return Structure(stem, tuple(stages), kind, neck, stem_stride)


def _eights(channels: Any) -> Any:
    return np.maximum(8, np.round(channels / 8) * 8)


def _solve(
    objective: Callable[[np.ndarray], np.ndarray], ranges: Sequence[tuple[float, float]], rounds: int, seed: int
) -> tuple[np.ndarray, float]:
    from scipy.optimize import differential_evolution

    result = differential_evolution(
        objective, ranges, maxiter=rounds, popsize=10, strategy="currenttobest1bin", recombination=0.9, tol=0.0,
        polish=False, vectorized=True, updating="deferred", seed=np.random.default_rng(seed),
    )  # fmt: skip
    return result.x, float(result.fun)
