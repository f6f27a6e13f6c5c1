"""Packages whose names are imported when they are first used, so that `import trimtab` and `--help` answer at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def lazy(package: str, where: Mapping[str, str | None]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package: the package's `__name__`.
        where: the module that defines each name, relative to the package or from "trimtab." on; followed by
            ":attribute" where it has another name there; None where the name is a module of the package.

    Usage::

        __getattr__, __dir__ = lazy(__name__, {"load_data": "load", "Data": "dataset"})
    """

    def getattribute(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = where[name]
        if home is None:
            return importlib.import_module(f"{package}.{name}")
        home, _, attribute = home.partition(":")
        module = importlib.import_module(home if home.startswith("trimtab.") else f"{package}.{home}")
        value = getattr(module, attribute or name)
        setattr(sys.modules[package], name, value)  # found at once the next time
        return value

    def directory() -> list[str]:
        return sorted({*vars(sys.modules[package]), *where})

    return getattribute, directory


def callable_package(package: str, function: str) -> None:
    """Let a module be called as the function in it that has its name.

    Importing `trimtab.room.system` puts the module into `trimtab.room`, where `room.system(...)` is to work as before.
    """

    class CallablePackage(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, function)(*args, **kwargs)

    sys.modules[package].__class__ = CallablePackage
