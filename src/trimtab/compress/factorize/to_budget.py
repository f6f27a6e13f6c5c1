"""The mildest of several plans that meets a budget: what all factorizations share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from trimtab.core.budget import Budget, format_value
from trimtab.core.cost import measure
from trimtab.core.edit import Edit, Replace, apply, meta_copy
from trimtab.core.errors import BudgetError
from trimtab.core.example import size_of

T = TypeVar("T")
COSTS = ("params", "size", "macs", "bops", "activations", "memory")


def bounds_of(budget: str | Budget, model: nn.Module, data: Any) -> Budget:
    """The upper bounds of a budget on costs that structure alone decides; percentages are of the model's own cost.

    Raises:
        BudgetError: there is none, or one that only a run can tell.
    """
    clauses = [c for c in Budget(budget).clauses if c.op == "<=" and c.name != "accuracy"]
    if not clauses:
        raise BudgetError(f"a factorization needs an upper bound such as params<=50%, got {str(budget)!r}")
    if unknown := [c.name for c in clauses if c.name not in COSTS]:
        raise BudgetError(f"a factorization can be made to fit {', '.join(COSTS)}, got {unknown[0]}")
    bounds = Budget(clauses)
    return bounds.resolve(_cost(model, data, bounds)) if bounds.relative else bounds


def first_that_fits(
    model: nn.Module, data: Any, bounds: Budget, plans: Sequence[T], edits: Callable[[T], list[Edit]]
) -> int:
    """The index of the first plan that meets the bounds, by bisection: plans go from the mildest to the harshest.

    Raises:
        BudgetError: not even the last one does; says how near it comes.
    """

    def fits(n: int) -> bool:
        return bounds.check(_cost(apply(meta_copy(model), edits(plans[n])), data, bounds)).ok

    if fits(0):  # costs may rise at first: two products in the place of one
        return 0
    low, high = 0, len(plans) - 1
    if not fits(high):
        cost = _cost(apply(meta_copy(model), edits(plans[high])), data, bounds)
        near = ", ".join(f"{r.name} {format_value(r.name, r.value or 0)}" for r in bounds.check(cost).rows if not r.ok)
        raise BudgetError(f"{bounds} cannot be met: with the lowest ranks it is {near}; factorize more layers")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def own_layers(model: nn.Module, *kinds: type[nn.Module] | str) -> dict[str, Any]:
    """The layers of some classes (or dotted names of classes) that can be replaced, in the order of the model.

    Not those whose class computes something else with the weight, whose weight is computed (weight norm) or shared,
    or that stand in two places.
    """
    places: dict[int, int] = {}
    holders: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        places[id(module)] = places.get(id(module), 0) + 1
    for module in model.modules():
        for p in module._parameters.values():
            holders[id(p)] = holders.get(id(p), 0) + 1

    def fits(module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        if weight is None or places[id(module)] > 1 or holders[id(weight)] > 1:
            return False
        cls: Any = type(module)
        return any(
            f"{cls.__module__}.{cls.__qualname__}" == kind if isinstance(kind, str)
            else issubclass(cls, kind) and cls.forward is kind.forward
            for kind in kinds
        )  # fmt: skip

    return {name: module for name, module in model.named_modules() if name and fits(module)}


def rebuilt(model: nn.Module, edits: Sequence[Edit], weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy with the edits; new layers have these weights, and the precision of the ones they replace."""
    with torch.random.fork_rng(devices=[]):
        changed = apply(copy.deepcopy(model), edits, weights=weights)
    for e in edits:
        if isinstance(e, Replace):
            changed.get_submodule(e.module).to(next(model.get_submodule(e.module).parameters()).dtype)
    return changed


def chosen(names: Sequence[str], layers: str | Sequence[str]) -> list[str]:
    """The names that match one of some patterns, such as ``blocks.*.mlp.fc?``.

    Raises:
        ValueError: a pattern matches none.
    """
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in names):
            raise ValueError(f"layers must match some of {', '.join(names) or 'no layer at all'}, got {pattern!r}")
    return [n for n in names if any(fnmatchcase(n, p) for p in patterns)]


def _cost(model: nn.Module, data: Any, bounds: Budget) -> dict[str, Any]:
    one = size_of(data) or tree_map_only(Tensor, lambda t: t[:1], data)
    return measure(model, one, what=tuple({c.name for c in bounds.clauses})).asdict()
