"""`convert`: swap layers by type, and swap them back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn


def convert(
    model: nn.Module, swaps: Mapping[type[nn.Module], Callable[[nn.Module], nn.Module]]
) -> Callable[[], nn.Module]:
    """Replace every submodule of a listed type by what its function makes of it, in place.

    The most exact type wins (a subclass entry before its base class). Replacements are not searched again, and a
    layer that is used twice is converted once. Functions should reuse the layer's parameters, so that undoing the
    swap keeps what was learned.

    Returns:
        A function that puts the original layers back and returns the model.

    Raises:
        ValueError: the model itself is of a listed type, so there is no parent to hold the replacement.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> undo = convert(net, {nn.ReLU: lambda layer: nn.GELU()})
    >>> type(net[1]).__name__, type(undo()[1]).__name__
    ('GELU', 'ReLU')
    """
    if _match(model, swaps) is not None:
        raise ValueError(f"the model itself is a {type(model).__name__}; convert needs a model that contains it")
    made: dict[int, nn.Module] = {}
    undo: list[tuple[nn.Module, str, nn.Module]] = []

    def visit(parent: nn.Module, seen: set[int]) -> None:
        if id(parent) in seen:
            return
        seen.add(id(parent))
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            function = _match(child, swaps)
            if function is None:
                visit(child, seen)
                continue
            if id(child) not in made:
                made[id(child)] = function(child)
                made[id(child)].train(child.training)
            undo.append((parent, name, child))
            parent._modules[name] = made[id(child)]

    visit(model, set())

    def restore() -> nn.Module:
        while undo:
            parent, name, child = undo.pop()
            child.train(parent.training)
            parent._modules[name] = child
        return model

    return restore


def _match(
    module: nn.Module, swaps: Mapping[type[nn.Module], Callable[[nn.Module], nn.Module]]
) -> Callable[[nn.Module], nn.Module] | None:
    return next((swaps[c] for c in type(module).__mro__ if c in swaps), None)
