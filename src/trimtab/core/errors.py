"""Every error trimtab raises on purpose. Each is also the built-in error a caller would expect to catch."""

from __future__ import annotations

import importlib
from types import ModuleType


class TrimtabError(Exception):
    """Base of all errors raised on purpose; the command line prints them as one line."""


class EditError(TrimtabError, ValueError):
    """An edit that does not fit the model."""


class BudgetError(TrimtabError, ValueError):
    """A budget that cannot be read or used."""


class ArtifactError(TrimtabError, ValueError):
    """An artifact that is damaged, hostile, or made by something else."""


class DataError(TrimtabError, ValueError):
    """Data that cannot be learned from."""


class SurgeryError(TrimtabError, RuntimeError):
    """A surgery that cannot be carried out or cannot be verified; the model is untouched."""


class MissingExtra(TrimtabError, ImportError):
    """An optional dependency that is not installed."""


def need(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Raises:
        MissingExtra: when the module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise MissingExtra(f"{module} is not installed; get it with: pip install 'trimtab[{extra}]'") from e
