"""Values into words: units, careful rounding, and the verdict in one sentence. Standard library only."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

TITLES = {
    "accuracy": "Accuracy",
    "params": "Parameters",
    "macs": "MACs",
    "size": "Size",
    "latency": "Latency",
    "memory": "Peak memory",
    "activations": "Activations",
    "energy": "Energy",
    "bops": "Bit operations",
}

_UNITS: dict[str, tuple[tuple[float, str], ...]] = {
    "count": ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"), (1.0, "")),
    "bytes": ((1e9, " GB"), (1e6, " MB"), (1e3, " KB"), (1.0, " bytes")),
    "seconds": ((1.0, " s"), (1e-3, " ms"), (1e-6, " µs")),
    "joules": ((1.0, " J"), (1e-3, " mJ"), (1e-6, " µJ")),
}
_KIND = {"size": "bytes", "memory": "bytes", "latency": "seconds", "energy": "joules"}

# Characters that can hide, reorder or break text: controls, bidirectional overrides, line separators, lone surrogates.
_UNSAFE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]")


# ---------------------------------------------------------------- reading a run, in which anything may be missing


def clean(value: Any) -> str:
    """`value` as text that can be written as UTF-8, without characters that hide or reorder others."""
    odd = value is None or isinstance(value, Mapping | list | tuple | set) or value != value  # NaN is not itself
    return "" if odd else _UNSAFE.sub("\ufffd", str(value))


def number(value: Any) -> float | None:
    """`value` as a finite float, or None (also for booleans, text, NaN and infinities)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def get(run: Any, *keys: str) -> Any:
    """Walk nested mappings; None as soon as a key is missing or something is not a mapping."""
    for key in keys:
        if not isinstance(run, Mapping):
            return None
        run = run.get(key)
    return run


def items(value: Any) -> list[Any]:
    """`value` as a list when it is a sequence (not text), otherwise the empty list."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else []


def rows(value: Any) -> list[Mapping[str, Any]]:
    """The mappings in a list of mappings; anything else is dropped."""
    return [row for row in items(value) if isinstance(row, Mapping)]


# ---------------------------------------------------------------- numbers


def _significant(value: float, digits: int) -> str:
    """`value` with that many significant digits, all integer digits, and no trailing zeros after the point."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float, decimals: int = 1) -> str:
    """0.967 -> '96.7%'. Never rounds up to 100% what is not, nor down to 0%.

    >>> percent(0.967), percent(0.99961), percent(1.0)
    ('96.7%', '99.96%', '100%')
    """
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    text = f"{100 * share:.{decimals}f}"
    if float(text) in (0.0, 100.0) and decimals < 6:
        return percent(share, decimals + 1)
    return f"{text}%"


def quantity(name: str, value: Any, digits: int = 3) -> str:
    """A cost or accuracy with its unit (KB = 1000 bytes); a dash when it is not a number.

    >>> quantity("size", 96_300), quantity("macs", 12_480_000), quantity("latency", 0.00123), quantity("accuracy", 0.9)
    ('96.3 KB', '12.5 M', '1.23 ms', '90.0%')
    """
    value = number(value)
    if value is None:
        return "–"
    if name == "accuracy":
        return percent(value, max(1, digits - 2))
    units = _UNITS[_KIND.get(name, "count")]
    for step, (factor, unit) in enumerate(units):
        if abs(value) >= factor or step == len(units) - 1:
            text = _significant(value / factor, digits)
            if step and abs(float(text)) * factor >= units[step - 1][0]:  # 999.9 k reads 1 M
                factor, unit = units[step - 1]
                text = _significant(value / factor, digits)
            return text + (unit[:-1] if unit == " bytes" and text == "1" else unit)
    raise AssertionError


def pair(name: str, value: Any, limit: Any) -> tuple[str, str]:
    """Value and limit with as many digits as it takes to tell them apart: 96.04 KB is not 96 KB."""
    for digits in range(3, 10):
        texts = quantity(name, value, digits), quantity(name, limit, digits)
        if texts[0] != texts[1] or number(value) == number(limit):
            break
    return texts


def duration(seconds: Any) -> str:
    """Seconds as people say them: '3.2 s', '1 min 32 s', '2 h 5 min'."""
    value = number(seconds)
    if value is None or value < 0:
        return "–"
    if value < 60:
        return "0 s" if value == 0 else quantity("latency", value, 2) if value < 9.95 else f"{value:.0f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    minutes = round(value / 60)
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")


def count(value: Any, noun: str, plural: str | None = None) -> str:
    """'1 model', '1,797 images'."""
    whole = number(value) or 0
    return f"{whole:,.0f} {noun if whole == 1 else plural or noun + 's'}"


def listing(parts: Sequence[str], last: str = "and") -> str:
    """'a, b and c'."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {last} {parts[-1]}" if parts else ""


def interval(share: float, trials: float, z: float = 1.96) -> tuple[float, float]:
    """95% Wilson score interval of a share seen in `trials` images."""
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def noun(name: str) -> str:
    """What a cost is called within a sentence."""
    return "MACs" if name == "macs" else TITLES.get(name, clean(name)).lower()


def moment(value: Any) -> str:
    """An ISO time as '2025-11-21 14:05 UTC'; anything else as it is.

    >>> moment("2025-11-21T14:05:50+00:00"), moment("last Friday")
    ('2025-11-21 14:05 UTC', 'last Friday')
    """
    said = clean(value)
    try:
        when = datetime.fromisoformat(said)
    except ValueError:
        return said
    if "T" not in said:
        return said
    return f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".rstrip()


# ---------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class Verdict:
    """`state` is 'met', 'missed', 'open' (a budget, but not all of it measured) or 'none' (no budget)."""

    state: str
    head: str
    rest: str

    @property
    def sentence(self) -> str:
        return f"{self.head}: {self.rest}" if self.rest else f"{self.head}."


def budget_rows(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The budget's clauses that say what they bound."""
    return [row for row in rows(get(run, "budget", "rows")) if row.get("name") and isinstance(row["name"], str)]


_OWN: Any = object()


def excess(row: Mapping[str, Any], value: Any = _OWN) -> float | None:
    """How far a value (the row's own by default) is outside the limit, as a share of it; negative: room."""
    limit = number(row.get("limit"))
    seen = number(row.get("value") if value is _OWN else value)
    if limit is None or seen is None:
        return None
    over = seen - limit if str(row.get("op", "<=")).startswith("<") else limit - seen
    if limit == 0:
        return 0.0 if over == 0 else math.copysign(math.inf, over)
    return over / abs(limit)


def row_ok(row: Mapping[str, Any]) -> bool | None:
    """Whether a budget row holds: as the run says, else by its numbers; None when the value was not measured."""
    if "value" in row and number(row["value"]) is None:
        return None
    if isinstance(row.get("ok"), bool):
        return bool(row["ok"])
    off = excess(row)
    return None if off is None else off <= 0


def slack(row: Mapping[str, Any], value: Any = _OWN) -> str:
    """The distance to the limit in words: '4.2% to spare', '16.7% over', '1.3 points short'."""
    off = excess(row, value)
    if off is None:
        return "not measured"
    room = off <= 0
    if str(row.get("name")) == "accuracy":
        points = _significant(100 * abs(off * float(row["limit"])), 2)
        unit = "point" if points == "1" else "points"
        return "exactly" if off == 0 else f"{points} {unit} {'to spare' if room else 'short'}"
    if off == 0:
        return "exactly"
    if math.isinf(off):
        return "to spare" if room else "over"
    above = str(row.get("op", "<=")).startswith("<")
    times = 1 + off if above else 0.0
    if times >= 3:
        return f"{_significant(times, 2)} times the limit"
    return f"{_significant(100 * abs(off), 2)}% {'to spare' if room else 'over' if above else 'short'}"


def candidate_value(row: Mapping[str, Any], name: str) -> float | None:
    """The value of a tried model under a budget's name for it."""
    return number(row.get("val_accuracy" if name == "accuracy" else name))


def closest(run: Mapping[str, Any]) -> tuple[int, float] | None:
    """Index of the tried model whose worst excess over the budget is smallest, with that excess."""
    clauses = [row for row in budget_rows(run) if number(row.get("limit")) is not None]
    missed = {row["name"] for row in clauses if row_ok(row) is False}
    best: tuple[int, float] | None = None
    for index, tried in enumerate(rows(run.get("tried"))):
        offs = {row["name"]: excess(row, candidate_value(tried, row["name"])) for row in clauses}
        known = {name: off for name, off in offs.items() if off is not None}
        if known and missed <= known.keys():
            worst = max(known.values())
            if best is None or worst < best[1]:
                best = index, worst
    return best


def _costs(run: Mapping[str, Any]) -> str:
    cost = get(run, "result", "cost")
    nouns = {"params": " parameters", "macs": " MACs", "size": "", "latency": ""}
    said = [quantity(n, get(cost, n)) + noun for n, noun in nouns.items() if number(get(cost, n)) is not None]
    for split in ("test", "val"):
        share = number(get(run, "result", "accuracy", split))
        if share is not None:
            name = "test" if split == "test" else "validation"
            return f"{percent(share)} {name} accuracy" + (f" with {listing(said)}" if said else "")
    return listing(said)


def verdict(run: Mapping[str, Any]) -> Verdict:
    """Met or not, and what came closest."""
    clauses = budget_rows(run)
    costs = _costs(run)
    if not clauses and not isinstance(get(run, "budget", "met"), bool):
        return Verdict("none", "No budget was set", costs and costs + ".")
    states = [row_ok(row) for row in clauses]
    met = get(run, "budget", "met")
    if not isinstance(met, bool):
        met = False if False in states else None if None in states else True
    if met and None not in states:
        tight = [row for row in clauses if excess(row) is not None]
        rest = costs
        if tight:
            row = max(tight, key=lambda r: excess(r) or 0.0)
            said = slack(row)
            end = "used exactly" if said == "exactly" else f"with {said}"
            rest = (rest + "; " if rest else "") + f"the tightest limit is {_noun(row)}, {end}"
        return Verdict("met", "Budget met", rest and rest + ".")
    if None in states and False not in states:
        unmeasured = listing([_noun(row) for row, ok in zip(clauses, states, strict=True) if ok is None])
        rest = f"{unmeasured} was not measured" + (f"; {costs}." if costs else ".")
        return Verdict("open", "Budget not decided", rest)
    failed = [row for row, ok in zip(clauses, states, strict=True) if ok is False]
    parts = []
    for row in failed:
        value, limit = pair(row["name"], row.get("value"), row.get("limit"))
        parts.append(f"{_noun(row)} is {value}, {slack(row)} (limit {limit})")
    return Verdict("missed", "Budget not met", (listing(parts) + _came_closest(run)) or (costs and costs + "."))


def guessing(run: Mapping[str, Any]) -> str:
    """A warning when the accuracy cannot be told from always answering one class; '' when it can, or is not known."""
    if get(run, "data", "task") not in (None, "classify"):
        return ""
    matrix = [[number(v) or 0.0 for v in items(row)] for row in items(get(run, "confusion", "matrix"))]
    seen = [sum(row) for row in matrix]
    classes = number(get(run, "data", "num_classes")) or len(items(get(run, "data", "class_names"))) or len(matrix)
    share = number(get(run, "result", "accuracy", "test"))
    trials = sum(seen) or number(get(run, "data", "counts", "test"))
    if share is None or not 0 <= share <= 1 or not trials or trials < 1 or classes < 2:
        return ""
    chance = max(seen) / sum(seen) if sum(seen) > 0 else 1 / classes
    if interval(share, trials)[0] > chance:
        return ""
    always = f"always answering one class would be right {percent(chance)} of the time"
    return f"This is not distinguishable from guessing: {always}."


def _noun(row: Mapping[str, Any]) -> str:
    title = TITLES.get(str(row["name"]), clean(row["name"]))
    return {"params": "parameter count", "macs": "MAC count"}.get(str(row["name"]), title.lower())


def _came_closest(run: Mapping[str, Any]) -> str:
    tried = rows(run.get("tried"))
    best = closest(run)
    if best is None or len(tried) < 2:
        return "."
    index, worst = best
    if tried[index].get("chosen") is True:
        return f". Of {len(tried)} tried, none came closer."
    name = clean(tried[index].get("name")) or f"candidate {index + 1}"
    if worst <= 0:
        return f". Closest of {len(tried)} tried: {name}, inside the limits during the search."
    clauses = [row for row in budget_rows(run) if excess(row, candidate_value(tried[index], row["name"])) == worst]
    if not clauses:
        return "."
    row = clauses[0]
    value = candidate_value(tried[index], row["name"])
    shown, _ = pair(row["name"], value, row.get("limit"))
    return f". Closest of {len(tried)} tried: {name}, {_noun(row)} {shown}, {slack(row, value)}."
