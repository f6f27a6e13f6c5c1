"""Methods by name: what the command line and recipes use to curate data with one that is chosen at run time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.core import options as options_of
from trimtab.core.files import replacing
from trimtab.data.curate.concept_pruning import concept_pruning, only
from trimtab.data.curate.relabel import relabel

if TYPE_CHECKING:
    from torch import nn

    from trimtab.data.dataset import Data

METHODS: dict[str, Callable[..., Any]] = {"concept_pruning": concept_pruning, "relabel": relabel}


def check(name: str, options: dict[str, Any]) -> None:
    """Raises ValueError when there is no such method, or it has no such option."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    options_of.check(name, options, options_of.parameters(METHODS[name], keyword_only=True))


def run(name: str, data: Data, model: nn.Module, folder: Path, **options: Any) -> Data:
    """The data as later phases of a recipe see them; done once, and then read from `folder`.

    concept_pruning keeps its rows there, and gives data with only these images in train. relabel writes label maps
    there, and gives the data as they are.
    """
    if name == "relabel":
        relabel(data, model, folder, **options)
        return data
    file = folder / "rows.npy"
    if not file.is_file():
        save_rows(concept_pruning(data, model, **options).rows, file)
    return only(data, np.load(file, allow_pickle=False))


def save_rows(rows: np.ndarray, file: Path) -> None:
    with replacing(file) as new, open(new, "wb") as f:
        np.save(f, rows)
