"""From scores to a choice of units inside a budget: what every pruner with an importance score shares."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from trimtab.compress.graph import ChannelGraph, Refused
from trimtab.compress.graph.links import link_refused
from trimtab.core.budget import Budget, format_value
from trimtab.core.cost import measure
from trimtab.core.edit import Edit, apply
from trimtab.core.errors import BudgetError

Mask = NDArray[np.bool_]
Scores = Sequence[Tensor]  # one tensor (size,) for each group, larger is more important
CLOSED_FORM = ("macs", "params")
SCOPES = ("global", "raw", "local")
MAX_REFUSALS = 200


def prune_to(
    graph: ChannelGraph,
    score: Callable[[ChannelGraph], Scores],
    budget: str | Budget,
    *,
    scope: str = "global",
    round_to: int = 1,
    min_keep: float = 0.1,
) -> tuple[list[Edit], Mask]:
    """The verified edits that keep the most important units and meet the budget, and which units they keep.

    Where the model's class cannot follow a cut, the channels that meet there are kept and the choice is made anew.

    Args:
        score: gives the scores of the groups that a graph has now.
        budget: upper bounds on "macs" and "params" are searched in closed form, bounds on other costs by measuring.
        scope: "global" ranks all units together, each score divided by its group's mean, so that groups of different
            size and kind compare; "raw" ranks them together by their scores as they are; "local" takes the same share
            of every group.
        round_to: keep multiples of this many channels, where a group has as many.
        min_keep: share of each group that always stays; one unit always does.

    Raises:
        ValueError: for a scope, round_to or min_keep out of range.
        BudgetError: when the budget cannot be met; says how near it came.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to must be a positive integer, got {round_to!r}")
    if not 0 <= min_keep <= 1:
        raise ValueError(f"min_keep must be in [0, 1], got {min_keep}")
    bounds = _bounds(Budget(budget), graph)
    for _ in range(MAX_REFUSALS):
        order = Order(graph, score(graph), scope=scope, round_to=round_to, min_keep=min_keep)
        try:
            mask = search(graph, order, bounds)
            return graph.edits(mask), mask
        except Refused as refused:
            if not len(refused.units):
                raise
            if not link_refused(graph, refused):
                graph.freeze(refused.units)
            last = refused
    raise last


def shares(budget: str | Budget, graph: ChannelGraph) -> dict[str, float]:
    """What share of the model's own cost each bound leaves, by cost: 0.5 for "macs<=50%", 1 where nothing must go."""
    bounds = _bounds(Budget(budget), graph)
    full: dict[str, Any] = {"macs": graph.macs(None), "params": graph.params(None)}
    if others := [c.name for c in bounds.clauses if c.name not in full]:
        full.update(_cost(graph.model, graph, others))
    found: dict[str, float] = {}
    for c in bounds.clauses:
        found[c.name] = min(found.get(c.name, 1.0), c.limit / float(full[c.name]))
    return found


class Order:
    """Nested choices of units, from all (level 0) to the fewest allowed (level `levels`).

    Groups that are linked go in step: what they lose is always the same share of each.
    """

    def __init__(self, graph: ChannelGraph, scores: Scores, *, scope: str, round_to: int, min_keep: float) -> None:
        self._graph = graph
        self._rows: list[_Row] = []
        shares: list[NDArray[np.float64]] = []
        for members in graph.linked():
            row = _Row()
            steps = math.gcd(*(graph.groups[i].size for i in members))
            total = np.zeros(steps)
            for i in members:
                g, values = graph.groups[i], scores[i].detach().double().cpu().numpy()
                if values.shape != (g.size,) or not np.isfinite(values).all():
                    raise ValueError(f"scores of group {g.id} must be {g.size} finite numbers")
                by = np.argsort(-values, kind="stable")
                each = g.size // steps
                row.ranks.append(g.units[by].reshape(steps, each))
                scale = 1.0 if scope == "raw" else max(values.mean(), 1e-30)
                total += (values[by] / scale).reshape(steps, each).mean(axis=1)
                channels = round_to // math.gcd(round_to, g.width)
                row.step = math.lcm(row.step, channels // math.gcd(channels, each))
            row.least = max(1, math.ceil(min_keep * steps))
            self._rows.append(row)
            shares.append(total / len(members) if scope != "local" else 1 - np.arange(steps) / steps)
        # At level n the n steps with the least share are gone: remember when each step of each row goes.
        flat = np.concatenate([*shares, np.empty(0)])
        when = np.empty(len(flat), np.int64)
        when[np.argsort(flat, kind="stable")] = np.arange(len(flat))
        ends = np.cumsum([0, *(len(s) for s in shares)])
        for row, start, end in zip(self._rows, ends[:-1], ends[1:], strict=True):
            row.when = np.sort(when[start:end])
        self.levels = len(flat)

    def mask(self, level: int) -> Mask:
        mask = np.ones(self._graph.units, bool)
        for row in self._rows:
            keep = row.keep(level)
            for rank in row.ranks:
                mask[rank[keep:]] = False
        return mask


@dataclass
class _Row:
    """Linked groups: their units, most important first, in as many equal steps."""

    ranks: list[NDArray[np.int64]] = field(default_factory=list)
    when: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    step: int = 1
    least: int = 1

    def keep(self, level: int) -> int:
        n = len(self.when)
        keep, least = n - int(np.searchsorted(self.when, level)), self.least
        if keep < n and self.step > 1:
            keep = min(n, max(self.step, round(keep / self.step) * self.step))
            least = min(n, math.ceil(least / self.step) * self.step)
        return max(keep, least)


def search(graph: ChannelGraph, order: Order, bounds: Budget) -> Mask:
    """The choice of the lowest level that meets the bounds, by bisection: choices are nested, so costs fall."""
    closed = bounds.only(*CLOSED_FORM)
    measured = Budget(c for c in bounds.clauses if c.name not in CLOSED_FORM)

    def count(mask: Mask) -> dict[str, int]:
        return {"macs": graph.macs(mask), "params": graph.params(mask)}

    def weigh(mask: Mask) -> Any:
        return _measure(graph, mask, measured)

    level = _bisect(lambda n: closed.check(count(order.mask(n))).ok, 0, order.levels)
    if level is None:
        raise _unreachable(closed, count(order.mask(order.levels)), graph)
    if measured.clauses:
        level = _bisect(lambda n: measured.check(weigh(order.mask(n))).ok, level, order.levels)
        if level is None:
            raise _unreachable(measured, weigh(order.mask(order.levels)), graph)
    return order.mask(level)


def _bisect(good: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least level in [low, high] that is good, or None; goodness is monotone."""
    if good(low):
        return low
    if not good(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high


def _bounds(budget: Budget, graph: ChannelGraph) -> Budget:
    """Upper bounds on costs of the model alone, percentages made absolute."""
    clauses = [c for c in budget.clauses if c.op == "<=" and c.name != "accuracy"]
    if not clauses:
        raise BudgetError(f"a pruner needs an upper bound such as macs<=50%, got {str(budget)!r}")
    reference: dict[str, Any] = {"macs": graph.macs(None), "params": graph.params(None)}
    if others := tuple({c.name for c in clauses if c.relative and c.name not in reference}):
        reference.update((k, v) for k, v in _cost(graph.model, graph, others).items() if k in others)
    return Budget(clauses).resolve(reference)


def _measure(graph: ChannelGraph, mask: Mask, bounds: Budget) -> dict[str, Any]:
    names = tuple({c.name for c in bounds.clauses})
    return _cost(apply(copy.deepcopy(graph.model), graph.edits(mask)), graph, names)


def _cost(model: nn.Module, graph: ChannelGraph, what: Sequence[str]) -> dict[str, Any]:
    args = tuple(t[:1] for t in graph.args)
    example = args if not graph.kwargs else {k: t[:1] for k, t in graph.kwargs.items()}
    return measure(model, example, what=what).asdict()


def _unreachable(bounds: Budget, least: dict[str, Any], graph: ChannelGraph) -> BudgetError:
    full = {"macs": graph.macs(None), "params": graph.params(None)}
    parts = []
    for row in bounds.check(least).rows:
        if not row.ok and row.value is not None:
            share = f" ({100 * row.value / full[row.name]:.0f} % of the model)" if row.name in full else ""
            parts.append(
                f"{row.name}<={format_value(row.name, row.limit)} cannot be met: with the fewest channels allowed "
                f"{row.name} is {format_value(row.name, row.value)}{share}"
            )
    return BudgetError("; ".join(parts) + "; lower min_keep or round_to, or choose a smaller model")
