"""The gene that every space may have: the side of the images. A child resizes what it is given."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.edit import Edit, Insert
from trimtab.core.errors import SurgeryError

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
    hooks = []
    for name, m in model.named_modules():
        if name and not any(m.children()):
            note = lambda m, args, name=name: readers.append(name) if args and args[0] is x else None  # noqa: E731
            hooks.append(m.register_forward_pre_hook(note))
    modes = [(m, m.training) for m in model.modules()]
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        for hook in hooks:
            hook.remove()
        for m, training in modes:
            m.training = training
    if len(readers) != 1:
        found = ", ".join(readers) or "none"
        raise SurgeryError(f"images can be resized only before a single layer that reads them, found {found}")
    return [Insert(readers[0], "resize", "torch.nn.Upsample", {"size": [side, side], **_HOW}, where="before")]
