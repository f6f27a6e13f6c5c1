"""Accuracies of networks, kept in a file: a search that was interrupted does not measure them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from torch import nn

from trimtab.core.files import write_text
from trimtab.search.space import Arch


class Scores:
    """What is known about the networks of a supernet.

    Args:
        path: the file; None keeps nothing. One about other weights or another measurement is started anew.
        of: the largest network. how: how accuracies are measured.
    """

    def __init__(self, path: str | Path | None, of: nn.Module, how: str) -> None:
        self._path = Path(path) if path is not None else None
        self._known: dict[str, float] = {}
        if self._path is None:
            return
        self._of = f"{how}, weights {_digest(of)}"
        if self._path.is_file():
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            if kept["of"] == self._of:
                self._known = kept["accuracy"]

    def once(self, arch: Arch, measure: Callable[[], float]) -> float:
        """The accuracy of a network, measured if it is not known yet."""
        key = json.dumps(dict(sorted(arch.items())))
        if key not in self._known:
            self._known[key] = measure()
            if self._path is not None:
                write_text(self._path, json.dumps({"of": self._of, "accuracy": self._known}, indent=1))
        return self._known[key]


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(name.encode())
        digest.update(p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
