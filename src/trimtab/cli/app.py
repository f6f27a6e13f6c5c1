"""The root of the command line: global options, errors, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trimtab import __version__
from trimtab.cli import session
from trimtab.core import log
from trimtab.core.errors import TrimtabError


class Interrupted(Exception):
    """Ctrl-C, on its way to `main`."""


class Commands(TyperGroup):
    """Takes ``--json``, ``--quiet`` and ``--verbose`` wherever they stand; lists commands in their order."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = session.before_dashes(args)
        lifted = sorted(own, key=lambda a: a not in session.GLOBAL)  # stable: the rest keeps its order
        return super().parse_args(ctx, lifted + args[len(own) :])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # before the framework sees it and leaves without a word
            raise Interrupted from None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


app = typer.Typer(
    name="trimtab",
    cls=Commands,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="--json, --quiet and --verbose may stand anywhere. Exit codes: 0 done, 1 failed, 2 wrong use.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    now = session.begin(args)
    try:
        with session.clean(now):
            code = app(args=args, standalone_mode=False, prog_name="trimtab")
        return code if isinstance(code, int) else 0
    except (Interrupted, KeyboardInterrupt, typer.Abort):
        return session.failed(
            "interrupted; the same command goes on where it stopped, if it had something to keep", 130
        )
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except Exception as e:
        if hasattr(e, "format_message"):  # the command line itself was wrong
            where = getattr(getattr(e, "ctx", None), "command_path", "trimtab")
            words = e.format_message().removeprefix("Invalid value: ").rstrip(".")
            return session.failed(f"{words} (see {where} --help)", getattr(e, "exit_code", 2))
        log.logger(__name__).debug("traceback", exc_info=e)  # shown with --verbose
        expected = isinstance(e, TrimtabError | ValueError | OSError | ImportError)
        if not expected and not now.verbose:
            return session.failed(f"{type(e).__name__}: {e} (unexpected; --verbose shows where)", 1)
        return session.failed(str(e) or type(e).__name__, 1)


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Everything, with tracebacks.")] = False,
) -> None:
    """Make vision models small.

    \b
    Examples:
      trimtab compact                               # the built-in digits
      trimtab compact photos/ --budget "size<=96KB" # your images, by class
      trimtab measure mobilenetv3_small_100         # what a model costs
      trimtab systems                               # the methods in here
    """
    if version:
        session.emit({"version": __version__}, lambda: print(f"trimtab {__version__}"))
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
