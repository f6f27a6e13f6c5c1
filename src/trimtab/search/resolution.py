"""The gene that every space may have: the side of the images. A child resizes what it is given."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.edit import Edit, Insert
from trimtab.core.errors import SurgeryError
from trimtab.nn.modes import eval_mode

RESOLUTION = "resolution"
_HOW = {"mode": "bicubic", "align_corners": False}


def resize(x: Tensor, side: int | None) -> Tensor:
    """Images (B, C, H, W) as squares of this side; as they are for None, or when they are already."""
    if side is None or tuple(x.shape[2:]) == (side, side):
        return x
    return F.interpolate(x, size=(side, side), mode="bicubic", align_corners=False)


def resizing(model: nn.Module, size: tuple[int, ...], side: int | None) -> list[Edit]:
    """The edits that make a network for images of `size` (C, H, W) resize them itself, as `resize` does.

    Raises:
        SurgeryError: it is not one layer alone that reads the images.
    """
    if side is None or tuple(size[1:]) == (side, side):
        return []
    p = next(model.parameters())
    x = torch.zeros((2, *size), device=p.device, dtype=p.dtype)
    readers: list[str] = []

    def note(name: str, args: tuple[Any, ...]) -> None:
        if args and args[0] is x:
            readers.append(name)

    with ExitStack() as hooks, eval_mode(model), torch.no_grad():
        for name, m in model.named_modules():
            if name and not any(m.children()):
                handle = m.register_forward_pre_hook(lambda _m, args, name=name: note(name, args))
                hooks.callback(handle.remove)
        model(x)
    if len(readers) != 1:
        found = ", ".join(readers) or "none"
        raise SurgeryError(f"images can be resized only before a single layer that reads them, found {found}")
    return [Insert(readers[0], "resize", "torch.nn.Upsample", {"size": [side, side], **_HOW}, where="before")]
