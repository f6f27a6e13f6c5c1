"""The commands. Each is a thin shell over one function of the library, with the same names for the same things.

What is heavy is imported inside the commands, so that ``trimtab --help`` answers at once. Exit codes: 0 done, 1 failed
(or a budget was not met), 2 wrong use, 130 interrupted.
"""

from trimtab.cli.app import app, main

# Registers the commands, in the order of --help.
from trimtab.cli import make, search, adapt, curate, use, serve, analyze, label_sets, look  # noqa: F401  # isort: skip

__all__ = ["app", "main"]
