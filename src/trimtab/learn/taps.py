"""`taps`: read what named submodules give (or get) while the model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def taps(model: nn.Module, names: Iterable[str], *, inputs: bool = False) -> Iterator[dict[str, Any]]:
    """Collect the outputs of submodules; a module that runs twice leaves its last output.

    Args:
        names: dotted names, as in `named_modules`.
        inputs: collect the first positional input instead.

    Raises:
        ValueError: there is no submodule of that name.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with taps(net, ["0"]) as seen:
    ...     y = net(torch.ones(1, 2))
    >>> seen["0"].shape
    torch.Size([1, 3])
    """
    modules = dict(model.named_modules())
    wanted = list(names)
    unknown = [n for n in wanted if n not in modules]
    if unknown:
        raise ValueError(f"names must be submodules of the model, got {', '.join(map(repr, unknown))}")
    seen: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def keep(_module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            seen[name] = given[0] if inputs else output

        return keep

    handles = [modules[n].register_forward_hook(hook(n)) for n in wanted]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
