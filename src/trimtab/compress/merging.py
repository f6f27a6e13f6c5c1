"""Merging: what only training needs goes, and the model computes what it computed.

Works on any model: every module that knows its plain equivalent (a method ``merged_parts()``, see `trimtab.nn.merge`)
is put in that form: the blocks of UniRepLKNet and its parallel dilated branches, convolutions with learnable spacings.
Nothing is trained, nothing approximated; in float32 logits agree to about 1e-6. Batch norms are merged as they are in
eval mode, so a merged model may be trained on, but no longer has them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from trimtab.core.edit import Edit
from trimtab.core.errors import SurgeryError
from trimtab.nn.merge import Mergeable, Plain, edits_of, put


def merge(model: nn.Module, data: Any = None) -> nn.Module:
    """A copy of `model` with everything merged that can be; its edits are remembered.

    Args:
        data: not looked at; all methods take it.

    Raises:
        SurgeryError: there is nothing to merge.

    >>> from trimtab.models import create_model
    >>> net = create_model("unireplknet_micro_32")
    >>> sum(p.numel() for p in net.parameters()), sum(p.numel() for p in merge(net).parameters())
    (845884, 824596)
    """
    return put(model, _find(model))


def plan(model: nn.Module, data: Any = None) -> list[Edit]:
    """The edits that `merge` applies; arguments as there."""
    return edits_of(_find(model))


def _find(model: nn.Module) -> dict[str, Plain | None]:
    """What goes where, by module; a module that speaks for itself speaks for all inside it."""
    found: dict[str, Plain | None] = {}
    spoken: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, Mergeable) or name.startswith(tuple(spoken)):
            continue
        parts = module.merged_parts()
        if "" in parts and not name:
            raise SurgeryError(f"the model itself is a {type(module).__name__}; merge needs a model that contains it")
        found |= {".".join(filter(None, (name, leaf))): plain for leaf, plain in parts.items()}
        spoken += [f"{name}." if name else ""] if parts else []
    if not found:
        raise SurgeryError(f"{type(model).__name__} has no layers to merge, or they are merged already")
    return found
