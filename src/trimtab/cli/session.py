"""How the command line speaks: results on stdout, as words or JSON; all else on stderr; errors in one line."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import typer

from trimtab.core import log

GLOBAL = {"--json": "json", "--quiet": "quiet", "-q": "quiet", "--verbose": "verbose", "-v": "verbose"}


@dataclass
class Session:
    """How this invocation speaks."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    out: TextIO = field(default_factory=lambda: sys.stdout)


_current = Session()


def begin(args: Sequence[str]) -> Session:
    """Read how to speak, before the arguments are parsed, so that wrong use is reported in the same way."""
    global _current
    flags = {GLOBAL[a] for a in before_dashes(args) if a in GLOBAL}
    _current = Session(json="json" in flags, quiet="quiet" in flags, verbose="verbose" in flags)
    log.setup(-1 if _current.quiet else int(_current.verbose))
    return _current


def before_dashes(args: Sequence[str]) -> list[str]:
    """The arguments before ``--``."""
    return list(args[: args.index("--")] if "--" in args else args)


def emit(value: Any, show: Callable[[], None]) -> None:
    """The result of a command: JSON when asked for, otherwise what `show` prints."""
    if _current.json:
        print(json.dumps(plain(value), indent=1, ensure_ascii=False), file=_current.out, flush=True)
    elif not _current.quiet:
        show()


@contextlib.contextmanager
def clean(session: Session) -> Iterator[None]:
    """With --json, stdout carries the result and nothing else, whatever libraries print."""
    with contextlib.ExitStack() as stack:
        if not session.verbose:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        if session.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def failed(message: str, code: int) -> int:
    """Say in one line what went wrong; gives the exit code back."""
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    if _current.json:
        print(json.dumps({"error": line, "exit_code": code}), file=_current.out)
    return code


def plain(value: Any) -> Any:
    """JSON values: dataclasses become dicts, paths words, tensors and numpy numbers Python's, NaN null."""
    from dataclasses import fields, is_dataclass

    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def exit_on_budget(budget: Mapping[str, Any] | None) -> None:
    """Leave with 1 when a bound was not kept."""
    if budget and not budget["met"]:
        missed = [row["text"] for row in budget["rows"] if not row["ok"]]
        print(f"error: the budget could not be met: {', '.join(missed)}", file=sys.stderr)
        raise typer.Exit(1)
