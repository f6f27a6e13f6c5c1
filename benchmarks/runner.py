"""The one runner of all benchmarks: contenders in turn, medians and spreads, ratios, machine and versions.

Contenders take turns (a b c, b c a, c a b, ...), so that a machine that slows down or speeds up does so for all of
them, and no one always comes first. Warm-up turns are not counted. What is reported is the median, the interquartile
range and every single time; a ratio is the median of the ratios within a round, which a drifting machine cannot bend.

    from benchmarks.runner import compare

    result = compare({"ours": ours, "theirs": theirs}, baseline="theirs", rounds=9)
    result.show("loading 10,000 images")
    result.save(out)

`compare` calls functions in this process; `compare_processes` starts whole programs, for what imports and
start-up cost, for peak memory, or for contenders that must not share a process.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.core import host
from trimtab.core.files import write_text


@dataclass
class Series:
    """The runs of one contender: seconds, and peak memory in bytes where whole processes were run."""

    name: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    returned: Any = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        """Interquartile range in seconds; 0 for fewer than two runs."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low

    def asdict(self) -> dict[str, Any]:
        peak = {"peak_bytes": int(statistics.median(self.peak_bytes))} if self.peak_bytes else {}
        return {
            "median": self.median,
            "iqr": self.iqr,
            "min": min(self.seconds),
            "seconds": self.seconds,
            **peak,
            "returned": self.returned if _is_json(self.returned) else None,
        }


@dataclass
class Comparison:
    """What came out; `series[name].returned` is what the contender's last run returned (or printed as JSON)."""

    series: dict[str, Series]
    baseline: str
    rounds: int
    facts: dict[str, Any] = field(default_factory=dict)

    def ratio(self, name: str) -> float:
        """Time of `name` over time of the baseline, median over the rounds: 0.5 is twice as fast."""
        pairs = zip(self.series[name].seconds, self.series[self.baseline].seconds)
        return statistics.median(a / b for a, b in pairs)

    def asdict(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline,
            "rounds": self.rounds,
            "results": {name: s.asdict() | {"ratio": self.ratio(name)} for name, s in self.series.items()},
            "facts": self.facts,
            "threads": os.environ.get("OMP_NUM_THREADS"),
            **host.provenance(Path(__file__).parent),
        }

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all."""
        return write_text(path, json.dumps(self.asdict(), indent=1) + "\n")

    def show(self, title: str = "") -> None:
        """Print the table."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{title} ({self.rounds} rounds)".strip(), title_justify="left")
        for column in ("contender", "median", "IQR", "min", f"x {self.baseline}", "peak memory"):
            table.add_column(column, justify="left" if column == "contender" else "right")
        for name, s in self.series.items():
            peak = f"{statistics.median(s.peak_bytes) / 1e6:,.0f} MB" if s.peak_bytes else ""
            times = [seconds(t) for t in (s.median, s.iqr, min(s.seconds))]
            table.add_row(name, *times, f"{self.ratio(name):.3f}", peak)
        console = Console()
        console.print(table)
        for name, value in self.facts.items():
            console.print(f"{name}: {value}", markup=False, highlight=False)
        here = host.machine()
        console.print(f"{here['cpu']}, {here['cores']} cores; torch {host.versions().get('torch')}", highlight=False)


def compare(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    warmup: int = 1,
    baseline: str | None = None,
    inner: int = 1,
    facts: dict[str, Any] | None = None,
) -> Comparison:
    """Time functions without arguments, in turn, in this process.

    inner: calls per measurement, for what is too short to time; the seconds are per call. baseline: the contender
    that the ratios refer to, by default the last one.

    >>> result = compare({"short": lambda: sum(range(10)), "long": lambda: sum(range(10_000))}, rounds=3)
    >>> result.ratio("long"), result.ratio("short") < 1
    (1.0, True)
    """
    chosen = _baseline(contenders, baseline, rounds)
    series = {name: Series(name) for name in contenders}
    for turn in range(-warmup, rounds):
        for name in _order(list(contenders), turn):
            gc.collect()
            call, start = contenders[name], time.perf_counter()
            for _ in range(inner):
                returned = call()
            took = (time.perf_counter() - start) / inner
            if turn >= 0:
                series[name].seconds.append(took)
                series[name].returned = returned
    return Comparison(series, chosen, rounds, dict(facts or {}))


def compare_processes(
    contenders: Mapping[str, Sequence[str]],
    *,
    rounds: int = 3,
    warmup: int = 0,
    baseline: str | None = None,
    facts: dict[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 3600,
) -> Comparison:
    """Time whole programs (argument lists; ``"python"`` in front means this Python), in turn, with their peak memory.

    A program's last line of output, if it is JSON, is kept as what it returned.

    Raises:
        RuntimeError: a program failed; its last words are in the message.
    """
    chosen = _baseline(contenders, baseline, rounds)
    series = {name: Series(name) for name in contenders}
    for turn in range(-warmup, rounds):
        for name in _order(list(contenders), turn):
            took, peak, returned = _program(name, list(contenders[name]), env, timeout)
            if turn >= 0:
                series[name].seconds.append(took)
                series[name].returned = returned
                if peak:
                    series[name].peak_bytes.append(peak)
    return Comparison(series, chosen, rounds, dict(facts or {}))


def seconds(value: float) -> str:
    """A time as people read it.

    >>> seconds(0.00213), seconds(2.5), seconds(1.5e-6)
    ('2.13 ms', '2.50 s', '1.50 us')
    """
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if value < limit:
            return f"{value * factor:.2f} {unit}"
    return f"{value:.2f} s"


def _baseline(contenders: Mapping[str, Any], baseline: str | None, rounds: int) -> str:
    if len(contenders) < 1 or rounds < 1:
        raise ValueError(f"need at least one contender and one round, got {len(contenders)} and {rounds}")
    chosen = list(contenders)[-1] if baseline is None else baseline
    if chosen not in contenders:
        raise ValueError(f"baseline must be one of {', '.join(contenders)}, got {chosen!r}")
    return chosen


def _order(names: list[str], turn: int) -> list[str]:
    shift = turn % len(names)
    return names[shift:] + names[:shift]


def _program(name: str, command: list[str], env: Mapping[str, str] | None, timeout: float) -> tuple[float, int, Any]:
    if command and command[0] == "python":
        command[0] = sys.executable
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told"
        launch = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(told), *command]
        process = subprocess.Popen(
            launch,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        try:
            printed, said = process.communicate(timeout=timeout)
        except BaseException as e:  # also Ctrl-C: nothing may go on running behind the benchmark's back
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(e, subprocess.TimeoutExpired):
                raise RuntimeError(f"{name} took longer than {timeout} s") from None
            raise
        if process.returncode != 0:
            raise RuntimeError(f"{name} failed with exit code {process.returncode}: {said.strip()[-800:]}")
        took, peak = told.read_text(encoding="utf-8").split()
    last = printed.strip().splitlines()[-1:] or [""]
    try:
        returned = json.loads(last[0])
    except ValueError:
        returned = None
    return float(took), int(peak) * (1 if sys.platform == "darwin" else 1024), returned


# A child starts with its parent's peak memory on Linux, so a program that is to be measured needs a small parent.
_LAUNCHER = """
import os, sys, time
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as f:
    f.write(f"{time.perf_counter() - start} {usage.ru_maxrss}")
sys.exit(min(abs(os.waitstatus_to_exitcode(status)), 125))
"""


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
