"""What a system is and what it claims.

Every system module carries a `CARD = Card(...)` written with literals only. `catalogue()` therefore reads cards from
the source text, without importing a system or torch, and `trimtab systems` answers at once.
"""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.errors import TrimtabError

PACKAGE = Path(__file__).resolve().parent.parent
LEVELS = {0: "planned", 1: "present", 2: "exact", 3: "effective", 4: "usable"}


@dataclass(frozen=True)
class Claim:
    """One claim of a paper; `id` is that of its fact sheet and of its evidence."""

    id: str
    says: str


@dataclass(frozen=True)
class Card:
    """A system's identity: what it is, where it comes from, what it claims."""

    slug: str
    title: str
    kind: str
    tasks: tuple[str, ...]
    claims: tuple[Claim, ...]
    arxiv: str | None = None
    year: int | None = None


@dataclass(frozen=True)
class Entry:
    """A card with the place it was found in: `family` is the path of rooms, such as `compress/prune`."""

    card: Card
    family: str
    module: str
    path: Path


def catalogue() -> dict[str, Entry]:
    """All systems in the library, by slug, sorted.

    >>> catalogue()["cct"].card.year
    2021
    """
    return dict(_catalogue(PACKAGE))


@functools.cache
def _catalogue(package: Path) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for path in sorted(package.rglob("*.py")):
        for card in _cards(path):
            parts = path.relative_to(package).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if card.slug in found:
                raise TrimtabError(f"two systems are called {card.slug!r}: {found[card.slug].path} and {path}")
            found[card.slug] = Entry(card, "/".join(parts[:-1]), ".".join(("trimtab", *parts)), path)
    return dict(sorted(found.items()))


def evidence(slug: str) -> dict[str, Any] | None:
    """The measured evidence of a system (schema in `evidence/runner.py`), or None when none is on file."""
    for folder in (PACKAGE / "_evidence", PACKAGE.parent.parent / "evidence" / "results"):
        file = folder / f"{slug}.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    return None


def level(slug: str) -> int:
    """The evidence level (0 to 4, see `LEVELS`) that a system has reached."""
    result = evidence(slug)
    return int(result["level"]) if result else 1


def _cards(path: Path) -> Iterator[Card]:
    text = path.read_text(encoding="utf-8")
    if "CARD" not in text:
        return
    for node in ast.parse(text).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Call):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and target.id == "CARD":
            yield _literal(node.value, path)


def _literal(node: ast.AST, path: Path) -> Any:
    """`ast.literal_eval` that also knows Card(...) and Claim(...)."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Card", "Claim"):
        args = [_literal(a, path) for a in node.args]
        kwargs = {k.arg: _literal(k.value, path) for k in node.keywords if k.arg}
        return (Card if node.func.id == "Card" else Claim)(*args, **kwargs)
    if isinstance(node, ast.Tuple):
        return tuple(_literal(e, path) for e in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError as e:
        raise TrimtabError(f"{path}: a CARD is written with literals only, line {getattr(node, 'lineno', '?')}") from e
