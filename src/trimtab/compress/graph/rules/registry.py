"""The registry of rules, and what several of them use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trimtab.compress.graph.labels import Dim

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators by name; "conv2d" stands for all its overloads."""

    def register(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, f))
        return f

    return register


def is_value(a: Any) -> bool:
    return isinstance(a, tuple) and all(isinstance(d, tuple) for d in a)


def aligned(a: Sequence[Dim], b: Sequence[Dim]) -> list[tuple[Dim, Dim]]:
    """Dimensions side by side, right-aligned."""
    rank = max(len(a), len(b))
    left = [()] * (rank - len(a)) + list(a)
    right = [()] * (rank - len(b)) + list(b)
    return list(zip(left, right, strict=True))


def product_zero(d: Dim, *operands: Dim) -> Dim:
    """A product is zero where one of its operands is."""
    zero = any(x and all(f.zero for f in x) for x in operands)
    return tuple(f.with_zero(zero) for f in d)
