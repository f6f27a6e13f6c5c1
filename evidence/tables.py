"""The tables in README.md and docs/ that are made from the cards and the results, between marker comments::

    <!-- table: systems -->
    (generated, do not edit)
    <!-- end of table -->

Tables: ``systems`` (all), ``family compress/prune`` (cards of one family, in words), ``evidence`` (every claim with its
numbers), ``benchmarks`` (all), ``ternary_matmul`` and ``quantized`` (from these), ``supernets`` (a run that three
systems share), ``picture`` (one of `evidence.pictures`, once it can be drawn).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tables import benchmarks, markdown, quantized, short, ternary_matmul
from evidence import pictures
from trimtab.core import card
from trimtab.core.files import write_text

RESULTS = Path(__file__).resolve().parent / "results"
MARKED = re.compile(r"(<!-- table: (?P<name>\w+)(?: (?P<arg>[\w/]+))? -->\n).*?(<!-- end of table -->)", re.DOTALL)
SUPERNETS = ("bignas", "sortednet", "deps")
KINDS = {0: "planned", 1: "1 present", 2: "2 exact", 3: "3 effective", 4: "4 usable"}


def update(root: Path) -> list[Path]:
    """Rewrite every marked table below `root`, draw its pictures; returns the files that changed."""
    changed = pictures.update(root)
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        if not path.is_file():
            continue
        old = path.read_text(encoding="utf-8")
        new = fill(old)
        if new != old:
            write_text(path, new)
            changed.append(path)
    return changed


def fill(text: str) -> str:
    """`text` with every marked table made anew.

    Raises:
        ValueError: for a table that nobody makes, or a marker without its end.
    """

    def one(match: re.Match[str]) -> str:
        name, arg = match["name"], match["arg"]
        if name not in MAKERS:
            raise ValueError(f"tables must be one of {', '.join(MAKERS)}, got {name!r}")
        return f"{match[1]}{MAKERS[name](arg)}\n{match[4]}"

    if text.count("<!-- table: ") != len(MARKED.findall(text)):
        raise ValueError("a '<!-- table: ... -->' marker has no '<!-- end of table -->'")
    return MARKED.sub(one, text)


def systems(_: str | None = None) -> str:
    """All systems: slug, title, family, level."""
    rows = []
    for slug, entry in card.catalogue().items():
        rows.append([f"`{slug}`", _paper(entry.card), entry.family, _level(slug)])
    return markdown(["System", "Paper", "Family", "Evidence"], rows) if rows else "*No systems yet.*"


def family(where: str | None) -> str:
    """The systems of one family: card and claims."""
    parts = []
    for slug, entry in card.catalogue().items():
        if entry.family != where:
            continue
        seen = {c["id"]: c for c in (_result(slug) or {}).get("claims", [])}
        about = f"{_paper(entry.card)}. {entry.card.kind.capitalize()}, evidence level {_level(slug)}."
        lines = [f"### {slug}", "", about]
        lines += ["", f"`{entry.module}`", ""]
        for claim in entry.card.claims:
            lines.append(f"- *{_cell(claim.says)}*: {_verdict(seen.get(claim.id))}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) if parts else "*No system of this family is in the library yet.*"


def evidence(_: str | None = None) -> str:
    """Every claim that has been measured."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for c in result["claims"]:
            note = c.get("note") or ""
            rows.append(
                [
                    f"`{result['slug']}`",
                    _cell(c["says"]),
                    "yes" if c["holds"] else "**no**",
                    _cell(short(c["measured"])),
                    _cell(short(c["baseline"])),
                    str(len(c["seeds"])) if c["seeds"] else "exact",
                    _cell(". ".join(t for t in (c.get("data") or "", note) if t)),
                ]
            )
    head = ["System", "Claim", "Holds", "Measured", "Baseline", "Seeds", "Data and notes"]
    return markdown(head, rows) if rows else "*No evidence has been measured yet.*"


def supernets(_: str | None = None) -> str:
    """Every training of the run that the systems of supernets share: accuracy of its networks, in percent."""
    columns = ("smallest", "median", "largest", "25 %", "50 %", "75 %")
    table: dict[str, list[str]] = {}
    for slug in SUPERNETS:
        for claim in (_result(slug) or {"claims": []})["claims"]:
            for name, row in (claim["measured"] | claim["baseline"]).items():
                if isinstance(row, dict) and isinstance(row.get("smallest"), dict):  # with a spread over seeds
                    cost = row.get("MMACs per image and step")
                    cells = [
                        f"{100 * c['mean']:.1f} ± {100 * c['std']:.1f}" if (c := row.get(k)) else "" for k in columns
                    ]
                    table[name] = [f"`{name}`" if name in SUPERNETS else name, f"{cost}" if cost else "", *cells]
    if not table:
        return "*Not measured yet.*"
    return markdown(["Trained", "M MACs a step", *columns], list(table.values()))


def picture(name: str | None) -> str:
    """A picture that is drawn from a result, for a page of a family."""
    made = pictures.PICTURES[str(name)]
    return f"![{made.says}](../images/{name}.svg)" if made.result.is_file() else "*Not measured yet.*"


MAKERS: dict[str, Callable[[str | None], str]] = {
    "systems": systems,
    "family": family,
    "evidence": evidence,
    "benchmarks": benchmarks,
    "ternary_matmul": ternary_matmul,
    "quantized": quantized,
    "supernets": supernets,
    "picture": picture,
}


def _result(slug: str) -> dict[str, Any] | None:
    path = RESULTS / f"{slug}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _level(slug: str) -> str:
    result = _result(slug)
    if result is None:
        return KINDS[1]
    held = [c["holds"] for c in result["claims"]]
    return KINDS[int(result["level"])] + (f" ({sum(held)} of {len(held)} claims)" if not all(held) else "")


def _verdict(claim: dict[str, Any] | None) -> str:
    if claim is None:
        return "not measured yet."
    base = f" against {_cell(short(claim['baseline']))}" if claim["baseline"] else ""
    where = f" ({_cell(claim['data'])})" if claim.get("data") else ""
    word = "holds" if claim["holds"] else "**does not hold**"
    note = f" {_cell(claim['note'])}" if claim.get("note") else ""
    return f"{word}: {_cell(short(claim['measured']))}{base}{where}.{note}"


def _paper(c: card.Card) -> str:
    year = f", {c.year}" if c.year else ""
    return f"{_cell(c.title)} (arXiv {c.arxiv}{year})" if c.arxiv else f"{_cell(c.title)}{year and f' ({c.year})'}"


def _cell(text: str) -> str:
    """Safe inside a table cell."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
