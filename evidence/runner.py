"""Finds the evidence scripts, runs them, keeps what they saw.

Result files follow one schema::

    {"slug", "level": 1-4, "claims": [{"id", "says", "holds", "measured", "baseline", "seeds", "data", "note"}],
     "command", "seconds", "machine", "versions", "commit", "date"}

The level is not what the author wishes but what was seen, see `reached`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from evidence import tables
from trimtab.core import card, host, log
from trimtab.core.files import write_text

T = TypeVar("T")
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
NOT_SCRIPTS = {"__init__", "__main__", "pictures", "runner", "step_cost", "tables"}
ENOUGH_SEEDS = 3


@dataclass(frozen=True)
class ClaimResult:
    """What was seen of one claim.

    id: the claim's id on the system's card (and in its fact sheet).
    holds: whether the claim held here, in direction and about in size.
    measured, baseline: numbers by name, JSON values; `stats` makes them from one number per seed.
    seeds: the seeds behind the numbers; empty for an exact claim (a count, an identity).
    data: what it was measured on, such as ``digits`` or ``cifar10, 5000 images``.
    note: why it does not hold, or what differs from the paper's setting.
    says: the claim in words; left empty, the words of the card.
    """

    id: str
    holds: bool
    measured: dict[str, Any]
    baseline: dict[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    data: str = ""
    note: str = ""
    says: str = ""


@dataclass
class Context:
    """What a script is run with.

    data: the argument of ``--data`` (a folder or data set that `load_data` reads), None when not given.
    seeds: the seeds to run; only one in a smoke run.
    smoke: toy size. Everything must be walked through, nothing needs to come out well.
    """

    slug: str
    data: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    smoke: bool = False
    _tell: Callable[[str], None] = field(default=lambda text: None, repr=False)

    @property
    def device(self) -> str:
        """``cuda`` where there is a GPU, otherwise ``cpu``."""
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def load_data(self, default: str = "digits", **options: Any) -> Any:
        """The user's ``--data``, otherwise `default`; a smoke run takes `default`, 256 images of it at most."""
        from trimtab.data import load_data

        if self.smoke:
            options["limit"] = min(options.get("limit") or 256, 256)
        return load_data(default if self.smoke or self.data is None else self.data, **options)

    def choose(self, *, full: T, smoke: T) -> T:
        """`smoke` in a smoke run, otherwise `full`: for epochs, widths, numbers of images."""
        return smoke if self.smoke else full

    def each_seed(self, what: str = "") -> Iterator[int]:
        """The seeds, one after the other, shown in the live table."""
        for n, seed in enumerate(self.seeds):
            self.say(f"{what} seed {seed} ({n + 1}/{len(self.seeds)})".strip())
            yield seed

    def say(self, text: str) -> None:
        """What the script is doing now; the last one stands in the live table."""
        self._tell(text)


def stats(values: Iterable[float], digits: int = 5) -> dict[str, Any]:
    """One number per seed -> mean, standard deviation (n - 1), smallest, largest, and the values themselves.

    >>> stats([0.5, 0.7])
    {'mean': 0.6, 'std': 0.14142, 'min': 0.5, 'max': 0.7, 'values': [0.5, 0.7]}
    """
    values = [float(v) for v in values]
    if not values:
        raise ValueError("values must not be empty")
    numbers = {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
    }
    return {k: round(v, digits) for k, v in numbers.items()} | {"values": [round(v, digits) for v in values]}


def reached(results: Sequence[ClaimResult], author: int = 3) -> int:
    """The level that the results support.

    The headline is the first claim that was measured with seeds, in the order of the card, which is that of the paper.

    1: a claim without seeds, of exact numbers, does not hold. 2: all of these hold. 3: so does the headline, with three
    or more seeds. 4: level 3, and the author vouches for it (``LEVEL = 4``). Tables say how many of all claims hold.
    """
    headline = next((r for r in results if r.seeds), None)
    if not all(r.holds for r in results if not r.seeds):
        return 1
    if headline is None or not headline.holds or len(set(headline.seeds)) < ENOUGH_SEEDS:
        return min(2, author)
    return author


def scripts(folder: Path = HERE) -> dict[str, Path]:
    """The evidence scripts of a folder, by slug."""
    found = {p.stem: p for p in sorted(folder.glob("*.py"))}
    return {slug: path for slug, path in found.items() if slug not in NOT_SCRIPTS and not slug.startswith("_")}


def check(slug: str, results: Any) -> list[ClaimResult]:
    """The results of a script if they keep the contract, in the order of the card.

    Raises:
        ValueError: says what is wrong with them.
    """
    if not isinstance(results, list) or not results or not all(isinstance(r, ClaimResult) for r in results):
        raise ValueError(f"run() of {slug} must return a list of ClaimResult, got {results!r:.80}")
    ids = [r.id for r in results]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{slug}: each claim once, got {ids}")
    entry = card.catalogue().get(slug)
    known = {c.id: c.says for c in entry.card.claims} if entry else None
    checked = []
    for r in results:
        if known is not None and r.id not in known:
            raise ValueError(f"{slug}: claim ids must be those of the card ({', '.join(known)}), got {r.id!r}")
        if not r.says and not (known or {}).get(r.id):
            raise ValueError(f"{slug}: claim {r.id!r} stands on no card, so its words (says=) must be given")
        if not r.measured:
            raise ValueError(f"{slug}: claim {r.id!r} has no measured numbers")
        full = asdict(r) | {"says": r.says or (known or {})[r.id], "seeds": [int(s) for s in r.seeds]}
        full["holds"] = bool(r.holds)
        full["measured"], full["baseline"] = plain(r.measured), plain(r.baseline)
        checked.append(ClaimResult(**full))
    order = list(known or ids)
    return sorted(checked, key=lambda r: order.index(r.id))


def plain(value: Any) -> Any:
    """JSON values only: tensors and numpy numbers become Python's, NaN and infinities become words."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Path):
        return str(value)
    raise ValueError(f"results must be JSON values, got {type(value).__name__}: {value!r:.60}")


def write(path: Path, value: Any) -> None:
    """JSON, whole or not at all; NaN is refused."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 when every script ran (whether or not its claims held), 1 when one broke, 2 on wrong use."""
    args = _arguments(argv)
    folder = Path(args.scripts)
    found = scripts(folder)
    if args.tables:
        return _tables(Path(args.root))
    slugs = list(found) if args.all else args.slugs
    unknown = [s for s in slugs if s not in found]
    if unknown or not (slugs or args.all):
        what = f"no evidence script for {', '.join(unknown)}" if unknown else "name a system, or say --all"
        print(f"error: {what}; there are: {', '.join(found) or 'none'}", file=sys.stderr)
        return 2
    log.setup(-1)  # the live table has the terminal
    board = _Board(slugs, args.smoke)
    broken = []
    with board:
        for slug in slugs:
            context = Context(slug, args.data, (0,) if args.smoke else tuple(range(args.seeds)), args.smoke)
            context._tell = lambda text, slug=slug: board.show(slug, text)  # type: ignore[misc]
            if not _one(found[slug], context, board, Path(args.results), _command(args, slug)):
                broken.append(slug)
    if not args.smoke and slugs and not args.no_tables:
        _tables(Path(args.root))
    kind = "smoke run" if args.smoke else "evidence"
    failed = f"; broken: {', '.join(broken)}" if broken else ""
    print(f"{kind}: {len(slugs) - len(broken)} of {len(slugs)} scripts ran through{failed}")
    return 1 if broken else 0


def _one(path: Path, context: Context, board: _Board, results: Path, command: str) -> bool:
    """Run one script and, unless it is a smoke run, keep what it saw. False when it broke."""
    slug, start = context.slug, time.perf_counter()
    board.show(slug, "running")
    try:
        module = _load(path)
        claims = check(slug, module.run(context))
    except Exception:
        board.done(slug, [], time.perf_counter() - start, None, traceback.format_exc())
        return False
    seconds = time.perf_counter() - start
    level = reached(claims, int(getattr(module, "LEVEL", 3)))
    board.done(slug, claims, seconds, level, None)
    if not context.smoke:
        record = {
            "slug": slug,
            "level": level,
            "claims": [asdict(c) for c in claims],
            "command": command,
            "seconds": round(seconds, 1),
            **host.provenance(HERE),
        }
        write(results / f"{slug}.json", record)
    return True


def _load(path: Path) -> ModuleType:
    if path.parent == HERE:
        return importlib.import_module(f"evidence.{path.stem}")
    spec = importlib.util.spec_from_file_location(f"evidence_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tables(root: Path) -> int:
    for path in tables.update(root):
        print(f"rewrote {path}")
    return 0


def _command(args: argparse.Namespace, slug: str) -> str:
    """The command that repeats this result; a data folder is named by its last part, the rest is this machine's."""
    data = f" --data {Path(args.data).name}" if args.data else ""
    return f"python -m evidence {slug}{data} --seeds {args.seeds}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evidence",
        description="Measure the claims of systems again and keep the numbers in evidence/results/.",
        epilog="examples: python -m evidence cct; python -m evidence --all --smoke; python -m evidence --tables",
    )
    parser.add_argument("slugs", nargs="*", metavar="SLUG", help="systems, such as cct")
    parser.add_argument("--all", action="store_true", help="every system that has a script")
    parser.add_argument("--data", help="a data set or folder that load_data reads; otherwise each script's own choice")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    parser.add_argument("--smoke", action="store_true", help="toy size, one seed, results are not kept")
    parser.add_argument("--tables", action="store_true", help="only rewrite the tables in README.md and docs/")
    parser.add_argument("--no-tables", action="store_true", help="leave README.md and docs/ alone")
    parser.add_argument("--results", default=str(RESULTS), help=argparse.SUPPRESS)
    parser.add_argument("--scripts", default=str(HERE), help=argparse.SUPPRESS)
    parser.add_argument("--root", default=str(HERE.parent), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    if args.all and args.slugs:
        parser.error("either SLUG... or --all")
    return args


def _clip(text: str, limit: int = 160) -> str:
    return escape(text if len(text) <= limit else text[: limit - 4] + " ...")


class _Board:
    """The live table: a row per script, rows per claim once it is done. Plain lines where there is no terminal."""

    def __init__(self, slugs: Sequence[str], smoke: bool) -> None:
        self.console = Console() if sys.stdout.isatty() else Console(width=150)
        self.rows: dict[str, list[tuple[str, str, str, str]]] = {s: [("", "waiting", "", "")] for s in slugs}
        self.smoke = smoke
        self.live: Any = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else nullcontext()
        self.errors: list[str] = []

    def __enter__(self) -> _Board:
        self.live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._draw()
        self.live.__exit__(*exc)
        if not self.console.is_terminal:
            self.console.print(self._table())
        for text in self.errors:
            self.console.print(text, style="red", markup=False, highlight=False)

    def show(self, slug: str, text: str) -> None:
        self.rows[slug] = [("", text, "", "")]
        if not self.console.is_terminal:
            print(f"{slug}: {text}", flush=True)
        self._draw()

    def done(self, slug: str, claims: list[ClaimResult], seconds: float, level: int | None, error: str | None) -> None:
        if error is not None:
            self.errors.append(f"{slug}:\n{error}")
            self.rows[slug] = [("", "[red]broken[/]", escape(error.strip().splitlines()[-1][:90]), f"{seconds:.1f} s")]
        else:
            words = {True: "[green]holds[/]", False: "[red]does not hold[/]"}
            toy = {True: "ran", False: "ran"}
            self.rows[slug] = [
                (c.id, (toy if self.smoke else words)[c.holds], _clip(tables.short(c.measured)), "") for c in claims
            ]
            where = "" if self.smoke else f"level {level}, "
            self.rows[slug].append(("", "", "", f"{where}{seconds:.1f} s"))
        self._draw()

    def _draw(self) -> None:
        if isinstance(self.live, Live):
            self.live.update(self._table())

    def _table(self) -> Table:
        table = Table(title="smoke run" if self.smoke else "evidence", title_justify="left")
        for name in ("system", "claim", "state", "measured", "took"):
            table.add_column(name)
        for slug, rows in self.rows.items():
            for n, row in enumerate(rows):
                table.add_row(slug if n == 0 else "", *row)
        return table
