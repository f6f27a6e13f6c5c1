"""Budgets: bounds on what a model may cost, written as people write them.

`Budget("params<=100k, size<=96KB, latency<=5ms, accuracy>=0.9")`. Counts take k, M, G (powers of 1000); bytes take B,
KB, MB, GB (1000) and KiB, MiB, GiB (1024); times take s, ms, us; energy takes J, mJ, uJ, nJ. `macs<=50%` is relative to
a reference cost and is made absolute by `resolve`.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.core.errors import BudgetError

_COUNT = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
_BYTES = {"": 1.0, "B": 1.0, "KB": 1e3, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_TIME = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_ENERGY = {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6, "nJ": 1e-9}
_RATIO = {"": 1.0}
UNITS: dict[str, dict[str, float]] = {
    "params": _COUNT, "macs": _COUNT, "bops": _COUNT, "activations": _COUNT, "size": _BYTES, "memory": _BYTES,
    "latency": _TIME, "energy": _ENERGY, "accuracy": _RATIO,
}  # fmt: skip
_OPS = {"<=": operator.le, ">=": operator.ge}
_CLAUSE = re.compile(
    r"\s*(?P<name>[A-Za-z_]+)?\s*(?P<op>[<>=!]+)?\s*(?P<num>[-+]?[\d.]+(?:[eE][-+]?\d+)?)?\s*(?P<unit>[^\s\d]*)\s*$"
)


@dataclass(frozen=True)
class Clause:
    """One bound. `limit` is in plain counts, bytes, seconds, joules; a fraction of the reference when `relative`."""

    name: str
    op: str
    limit: float
    relative: bool
    text: str

    def holds(self, value: float) -> bool:
        return bool(_OPS[self.op](value, self.limit))


@dataclass(frozen=True)
class Row:
    """One clause, checked: `value` is None when it was not measured, and then `ok` is False."""

    name: str
    op: str
    limit: float
    value: float | None
    ok: bool
    text: str

    @property
    def excess(self) -> float:
        """By which share of the limit the value misses it; 0 when the clause holds, infinite when not measured."""
        if self.ok:
            return 0.0
        if self.value is None:
            return math.inf
        return abs(self.value - self.limit) / self.limit if self.limit else math.inf


@dataclass(frozen=True)
class Verdict:
    """What `Budget.check` found."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def excess(self) -> float:
        """The largest relative miss over all clauses: 0 inside the budget, 0.1 for 10 % over."""
        return max((row.excess for row in self.rows), default=0.0)

    def explain(self) -> str:
        """What is over (or under) and by how much, in words; one line per clause that fails."""
        return "; ".join(_words(row) for row in self.rows if not row.ok) or "inside the budget"


class Budget:
    """Bounds on costs.

    Args:
        text: clauses `name<=number[unit]` or `name>=number[unit]`, separated by commas; names are those of `UNITS`.

    Raises:
        BudgetError: with a caret under the place that is wrong.

    >>> budget = Budget("params<=100k, size<=96KB")
    >>> verdict = budget.check({"params": 78_000, "size": 99_000})
    >>> verdict.ok, verdict.explain()
    (False, 'size is 99 KB, 3.1 % over 96 KB')
    """

    def __init__(self, text: str | Budget | Iterable[Clause]):
        if isinstance(text, str):
            self.clauses = _parse(text)
        else:
            self.clauses = text.clauses if isinstance(text, Budget) else tuple(text)

    def __str__(self) -> str:
        return ", ".join(c.text for c in self.clauses)

    def __repr__(self) -> str:
        return f"Budget({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Budget) and self.clauses == other.clauses

    def __hash__(self) -> int:
        return hash(self.clauses)

    def __contains__(self, name: str) -> bool:
        return any(c.name == name for c in self.clauses)

    @property
    def relative(self) -> bool:
        """True while a clause still needs `resolve`."""
        return any(c.relative for c in self.clauses)

    def limit(self, name: str) -> float | None:
        """The tightest upper bound on `name`, or None."""
        return min((c.limit for c in self.clauses if c.name == name and c.op == "<=" and not c.relative), default=None)

    def only(self, *names: str) -> Budget:
        """The clauses on these costs alone."""
        return Budget(c for c in self.clauses if c.name in names)

    def resolve(self, reference: Any) -> Budget:
        """The same budget with percentages turned into absolute bounds of `reference` (a Cost or a mapping).

        Raises:
            BudgetError: when the reference has no value for a relative clause.
        """
        costs = _costs(reference)
        out = []
        for c in self.clauses:
            if c.relative:
                base = costs.get(c.name)
                if base is None:
                    raise BudgetError(f"{c.text!r} is relative, but {c.name} of the reference was not measured")
                limit = c.limit * float(base)
                c = Clause(c.name, c.op, limit, False, f"{c.name}{c.op}{format_value(c.name, limit)}")
            out.append(c)
        return Budget(out)

    def check(self, cost: Any, *, partial: bool = False) -> Verdict:
        """Compare a cost (a Cost or a mapping; plain counts, bytes, seconds, joules) with every clause.

        Args:
            partial: leave out clauses whose cost was not measured instead of counting them as failed.

        Raises:
            BudgetError: when the budget is relative and was not resolved.
        """
        if self.relative:
            raise BudgetError(f"{str(self)!r} is relative to a reference; resolve it first")
        costs = _costs(cost)
        rows = []
        for c in self.clauses:
            value = costs.get(c.name)
            if value is None and partial:
                continue
            ok = value is not None and not math.isnan(value) and c.holds(float(value))
            rows.append(Row(c.name, c.op, c.limit, None if value is None else float(value), ok, c.text))
        return Verdict(tuple(rows))


def format_value(name: str, value: float) -> str:
    """A cost in its usual unit, at most four digits: `format_value("size", 96_000)` is `96 KB`.

    >>> format_value("latency", 0.0052), format_value("macs", 12_500_000)
    ('5.2 ms', '12.5M')
    """
    if name in ("params", "macs", "bops", "activations"):
        steps, gap = [(1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")], ""
    elif name in ("size", "memory"):
        steps, gap = [(1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1, "B")], " "
    elif name == "latency":
        steps, gap = [(1, "s"), (1e-3, "ms"), (1e-6, "us")], " "
    elif name == "energy":
        steps, gap = [(1, "J"), (1e-3, "mJ"), (1e-6, "uJ"), (1e-9, "nJ")], " "
    else:
        return f"{value:.4g}"
    scale, unit = next(((s, u) for s, u in steps if abs(value) >= s), steps[-1])
    return f"{value / scale:.4g}{gap}{unit}"


def _words(row: Row) -> str:
    limit = format_value(row.name, row.limit)
    if row.value is None:
        return f"{row.name} was not measured (limit {limit})"
    side = "over" if row.op == "<=" else "under"
    share = f"{100 * row.excess:.1f} % " if math.isfinite(row.excess) else ""
    return f"{row.name} is {format_value(row.name, row.value)}, {share}{side} {limit}"


def _costs(cost: Any) -> Mapping[str, Any]:
    return cost if isinstance(cost, Mapping) else cost.asdict()


def _parse(text: str) -> tuple[Clause, ...]:
    clauses, start = [], 0
    for part in text.split(","):
        clauses.append(_clause(text, part, start))
        start += len(part) + 1
    return tuple(clauses)


def _clause(text: str, part: str, start: int) -> Clause:
    def fail(message: str, at: int) -> BudgetError:
        return BudgetError(f"{message}\n  {text}\n  {' ' * (start + at)}^")

    if not part.strip():
        raise fail("empty clause, expected something like size<=96KB", max(len(part) - 1, 0))
    m = _CLAUSE.match(part)
    if m is None:
        at = len(part) - len(part.lstrip())
        raise fail(f"cannot read {part.strip()!r}, expected something like size<=96KB", at)
    name, op, num, unit = m["name"], m["op"], m["num"], m["unit"]
    lead = len(part) - len(part.lstrip())
    if name not in UNITS:
        raise fail(f"unknown cost {name or part.strip()!r}, expected one of {', '.join(UNITS)}", lead)
    if op not in _OPS:
        raise fail(f"expected <= or >= after {name}", m.start("op") if op else m.end("name"))
    after_op = m.end("op")
    if num is None:
        raise fail(f"expected a number after {op}", min(after_op, len(part.rstrip())))
    try:
        value = float(num)
    except ValueError:
        raise fail(f"{num!r} is not a number", m.start("num")) from None
    if not math.isfinite(value) or value < 0:
        raise fail("a bound must be finite and not negative", m.start("num"))
    shown = f"{name}{op}{num}{unit}"
    if unit == "%":
        relative = name != "accuracy"
        return Clause(name, op, value / 100, relative, shown)
    if unit not in UNITS[name]:
        known = ", ".join(u for u in UNITS[name] if u) or "none"
        what = f"unknown unit {unit!r}" if unit else "a unit is needed"
        raise fail(f"{what} for {name}, expected {known}, or %", m.start("unit"))
    if name == "accuracy" and value > 1:
        raise fail("accuracy is a fraction of 1 (0.9 or 90%)", m.start("num"))
    return Clause(name, op, value * UNITS[name][unit], False, shown)
