"""What could be trained inside a budget: candidates with their costs, before anything is trained.

A candidate is a registry name with arguments. Families with a free width are widened until the budget is just kept;
fixed architectures are taken when they fit, or when they are near enough to be cut to fit after a first training. All
costs come from models without memory (the meta device); the bytes of the file to deliver are estimated here and
measured later, on a real export.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab.core.budget import Budget
from trimtab.core.cost import measure
from trimtab.core.errors import BudgetError
from trimtab.core.meta import shapes_only
from trimtab.data import Data
from trimtab.models import create_model

COUNTED = ("params", "macs", "activations", "memory")
# Bytes of an exported file beside its weights, from exports of the trim family: per layer (its node, its quantization
# nodes and names), per output channel (bias and scales), and once.
INT8_LAYER, INT8_CHANNEL, FILE = 320, 8, 900
CUT_AT_MOST = 4.0  # a fixed architecture may cost this many times the budget and still be cut to fit
MIN_WIDTH, MAX_WIDTH = 2, 512


@dataclass(frozen=True)
class Candidate:
    """A model that could be trained; `cut` when it must be pruned to fit."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    cut: bool = False

    @property
    def label(self) -> str:
        """Short and unique: `trim_net(width=20, depths=1-1-1)`."""
        inside = ", ".join(f"{k}={_short(v)}" for k, v in self.kwargs.items())
        return f"{self.name}({inside})" if inside else self.name

    def build(self, data: Data) -> torch.nn.Module:
        return create_model(
            self.name, num_classes=data.num_classes, in_chans=data.in_chans, img_size=data.size, **self.kwargs
        )

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "kwargs": self.kwargs, "cost": self.cost, "cut": self.cut}

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> Candidate:
        kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in d["kwargs"].items()}
        return cls(d["name"], kwargs, d["cost"], d["cut"])


def default_budget(data: Data) -> Budget:
    """A sensible budget for images of this size: what a small microcontroller or a cheap CPU takes without pain.

    About 12 k multiply-accumulates per pixel (the density of the MLPerf Tiny image classifier), and a file of 32 KB for
    images up to 16 pixels a side, 96 KB up to 48, and 1 MB beyond.
    """
    height, width = data.size
    side = max(height, width)
    size = "32KB" if side <= 16 else "96KB" if side <= 48 else "1MB"
    macs = 12_000 * height * width
    return Budget(f"size<={size}, macs<={macs / 1e6:.3g}M")


def candidates(data: Data, budget: Budget, *, most: int = 12) -> list[Candidate]:
    """Candidates for `budget`, the most promising kinds first, at most `most`.

    Raises:
        BudgetError: when not even the smallest network fits; it says how near that came.
    """
    bounds = structural(budget)
    found: dict[str, Candidate] = {}
    for candidate in _inside(data, bounds):
        found.setdefault(candidate.label, candidate)
        if len(found) == most:
            break
    if not found:
        smallest = min(
            (_costed(data, n, {**k, "width": MIN_WIDTH}) for n, k in _elastic(data)), key=lambda c: c.cost["params"]
        )
        raise BudgetError(
            f"no network fits {str(budget)!r}; the smallest one tried, {smallest.label}, misses it: "
            + bounds.check(smallest.cost).explain()
        )
    return list(found.values())


def _inside(data: Data, bounds: Budget) -> Iterator[Candidate]:
    """Candidates as they are found; each takes a few counts, so later ones are only looked at when wanted."""
    for name, kwargs in _elastic(data):
        elastic = widest(data, bounds, name, kwargs)
        if elastic is not None:
            yield fill(data, bounds, elastic)
    for name in _fixed(data):
        fixed = _costed(data, name, {})
        excess = bounds.check(fixed.cost).excess
        if excess == 0 and _fills(fixed, bounds):
            yield fixed
        elif 0 < excess <= CUT_AT_MOST - 1:
            yield Candidate(name, {}, fixed.cost, cut=True)


def widest(data: Data, bounds: Budget, name: str, kwargs: dict[str, Any]) -> Candidate | None:
    """The widest member of a family inside `bounds`, or None when even the narrowest is not.

    Costs grow with width, so bisection finds it in a handful of counts.
    """

    def fits(width: int) -> Candidate | None:
        candidate = _costed(data, name, {**kwargs, "width": width})
        return candidate if bounds.check(candidate.cost).ok else None

    low, best = MIN_WIDTH, fits(MIN_WIDTH)
    if best is None:
        return None
    high = MAX_WIDTH + 1
    width = 16
    while high - low > 1:
        candidate = fits(width)
        if candidate is None:
            high = width
        else:
            low, best = width, candidate
        width = low * 2 if high > MAX_WIDTH and low * 2 < high else (low + high) // 2
    return best


def fill(data: Data, bounds: Budget, candidate: Candidate) -> Candidate:
    """Use what whole widths leave of the budget: widen single stages, the last first, while everything still fits."""
    if candidate.name != "trim_net" or candidate.cut:
        return candidate
    kwargs = {k: v for k, v in candidate.kwargs.items() if k not in ("width", "growth")}
    width, growth = candidate.kwargs["width"], candidate.kwargs.get("growth", 2.0)
    widths = [max(1, round(width * growth**i)) for i in range(len(kwargs["depths"]))]
    best = candidate
    for stage in reversed(range(len(widths))):
        step = max(1, widths[stage] // 8)
        while step:
            wider = [w + step if i == stage else w for i, w in enumerate(widths)]
            tried = _costed(data, candidate.name, {**kwargs, "widths": tuple(wider)})
            if bounds.check(tried.cost).ok and wider[stage] <= 1.3 * width * growth**stage:
                widths, best = wider, tried
            else:
                step //= 2
    return best


def estimated_size(cost: dict[str, float], *, layers: int, channels: int, bits: int) -> int:
    """Bytes of the ONNX file of a model, before it is exported."""
    weights = cost["params"] * bits / 8
    extra = channels * INT8_CHANNEL + layers * INT8_LAYER if bits == 8 else layers * INT8_LAYER / 2
    return math.ceil(weights + extra + FILE)


def _elastic(data: Data) -> Iterator[tuple[str, dict[str, Any]]]:
    """Families whose width is free, shaped for the size of the images."""
    side = min(data.size)
    stem = 1 if side < 48 else 2
    stages = max(2, min(5, round(math.log2(max(side / stem, 8) / 8)) + 1))

    def depths(first: int, rest: int) -> tuple[int, ...]:
        return (first, *([rest] * (stages - 1)))

    common = {"stem_stride": stem} if stem > 1 else {}
    small = side >= 16 and stem == 1
    yield "trim_net", {"depths": depths(1, 1), **common}
    if small:  # a thin stem at full size, then half of it at once: most depth where positions and weights are balanced
        late = {"depths": depths(3, 2)[: stages - 1], "strides": (2,) * (stages - 1), "stem_width": 12, "growth": 1.6}
        yield "trim_net", late
        yield "trim_net", {**late, "head_width": 96}
    yield "trim_net", {"depths": depths(1, 2), "growth": 1.6, **common}
    mobile = {"kind": "bottleneck", "group_width": 1, "growth": 1.6}
    yield "trim_net", {"depths": depths(1, 2), "expand": 4, **mobile, **common}
    yield "trim_net", {"depths": depths(2, 2), **common}
    if small:
        yield "trim_net", {"depths": depths(1, 1)[1:], "stem_stride": 2}
        yield "trim_net", {"depths": depths(1, 2)[1:], "stem_stride": 2, "growth": 1.6}
    yield "trim_net", {"depths": depths(1, 3), "expand": 3, **mobile, **common}
    yield "trim_net", {"depths": depths(3, 3), **common}


def _fixed(data: Data) -> Iterator[str]:
    """Architectures with a name, from small to large, that take images of this size."""
    side = min(data.size)
    if side < 24:
        return
    if side < 64:
        yield from ("resnet8_mlperf_tiny", "resnet20_cifar", "cct_2_3x2_32")
    yield from (
        "mobilenetv4_conv_small_035",
        "mobilenetv3_small_050",
        "lcnet_050",
        "tinynet_e",
        "mobilenetv3_small_100",
    )
    if side >= 64:
        yield from ("repvgg_a0", "efficientnet_lite0", "mobilenetv3_large_100", "resnet18", "efficientnet_b0")


def _costed(data: Data, name: str, kwargs: dict[str, Any]) -> Candidate:
    candidate = Candidate(name, kwargs)
    with shapes_only():
        model = candidate.build(data)
    cost = measure(model, (data.in_chans, *data.size), what=COUNTED)
    counts: dict[str, float] = {k: getattr(cost, k) for k in COUNTED}
    heavy = [p for p in model.parameters() if p.dim() > 1]  # one per product
    channels = sum(p.shape[0] for p in heavy)
    for bits in (8, 32):
        counts[f"size_{bits}"] = estimated_size(counts, layers=len(heavy), channels=channels, bits=bits)
    counts["size"] = counts["size_8"]
    return Candidate(name, kwargs, counts)


def structural(budget: Budget) -> Budget:
    """The upper bounds that can be counted before a model exists as a file."""
    return Budget(c for c in budget.clauses if c.name in (*COUNTED, "size") and c.op == "<=")


def prunable(budget: Budget, cost: dict[str, float]) -> Budget:
    """Bounds on parameters and MACs that bring a model of this cost inside the structural bounds of `budget`."""
    goal: dict[str, float] = {}
    for c in structural(budget).clauses:
        name, limit = ("params" if c.name in ("params", "size") else "macs"), c.limit
        if c.name == "size":  # what is not weights stays
            limit = max(c.limit - (cost["size"] - cost["params"]), 0.1 * c.limit)
        elif c.name not in goal and c.name not in ("params", "macs"):
            limit = cost["macs"] * c.limit / cost[c.name]
        goal[name] = min(goal.get(name, float("inf")), limit)
    return Budget(", ".join(f"{k}<={int(v)}" for k, v in goal.items()))


def _fills(candidate: Candidate, bounds: Budget) -> bool:
    """A fixed architecture far below every bound would waste the budget."""
    if not bounds.clauses:
        return True
    return any(candidate.cost[c.name] >= 0.3 * c.limit for c in bounds.clauses)


def _short(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "-".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
