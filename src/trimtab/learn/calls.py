"""`calls`: which modules a network runs, in order, and what each takes and gives.

What depends on the way through a network (where its features end, what follows a stage) is found by looking, so that
objectives need no configuration for a network that they have never seen.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.nn.modes import eval_mode


@dataclass(eq=False)
class Call:
    """One run of a module.

    Attributes:
        name, module: which one.
        given: its first positional argument; out: what it returned.
        alone: it was given that argument and nothing else.
        parent: the call that it was made in.
        start, end: places in the order of all beginnings and endings.
    """

    name: str
    module: nn.Module
    given: Any
    alone: bool
    parent: Call | None
    start: int
    end: int = -1
    out: Any = None


@torch.no_grad()
def calls(model: nn.Module, x: Tensor) -> list[Call]:
    """Every call of a submodule while the model runs on `x`, in eval mode, in the order in which they begin.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
    >>> made = calls(net, torch.zeros(1, 1, 5, 5))
    >>> [c.name for c in made], made[1].given is made[0].out
    (['0', '1', '2'], True)
    """
    made: list[Call] = []
    running: list[Call] = []
    clock = iter(range(10**9))

    def begin(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            parent = running[-1] if running else None
            alone = len(args) == 1 and not kwargs
            call = Call(name, module, args[0] if args else None, alone, parent, next(clock))
            made.append(call)
            running.append(call)

        return hook

    def finish(_module: nn.Module, _args: Any, _kwargs: Any, out: Any) -> None:
        call = running.pop()
        call.out, call.end = out, next(clock)

    with eval_mode(model), ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                before = module.register_forward_pre_hook(begin(name), with_kwargs=True)
                hooks.callback(before.remove)
                hooks.callback(module.register_forward_hook(finish, with_kwargs=True).remove)
        model(x)
    return made


def is_map(value: Any) -> bool:
    """Is it features at more than one place: (B, C, H, W), (B, H, W, C) or tokens (B, N, D)?"""
    return isinstance(value, Tensor) and (
        (value.ndim == 4 and value.shape[2:].numel() > 1) or (value.ndim == 3 and value.shape[1] > 1)
    )


def onward(made: list[Call], start: Call) -> list[Call] | None:
    """The calls that lead from the output of `start` to the last feature map, each given what the one before gave.

    None where something else than modules is in between: an addition, a concatenation, a module of two inputs.
    """
    chain, at = [], start
    while True:
        follows = [c for c in made if c.start > at.end]
        nearest = next((c for c in follows if c.alone and c.given is at.out), None)
        if nearest is not None and _goes_on(nearest):
            chain.append(nearest)
            at = nearest
        elif any(is_map(c.given) and c.given is not at.out for c in follows):
            return None
        else:
            return chain


def _goes_on(call: Call) -> bool:
    """Not a pooling or a head: it gives a map, or has weights and gives a map of one place."""
    out = call.out
    return isinstance(out, Tensor) and out.ndim > 2 and (is_map(out) or any(True for _ in call.module.parameters()))


def last_map(model: nn.Module, x: Tensor) -> tuple[str, bool] | None:
    """Where the last feature map before pooling is: a module's name, and whether it is its input (or its output).

    A model that says it itself (timm's ``forward_features``) is believed; otherwise it is the last map that a module
    gives. None if no module ever takes or gives one.
    """
    made = calls(model, x)
    told = _told(model, x)
    if told is not None:
        gave = [c for c in made if _equal(c.out, told)]
        took = [c for c in made if _equal(c.given, told)]
        if gave:
            return max(gave, key=lambda c: c.end).name, False
        if took:
            return took[-1].name, True
    maps = [c for c in made if is_map(c.out)] or [c for c in made if isinstance(c.out, Tensor) and c.out.ndim == 4]
    if not maps:
        return None
    last = max(maps, key=lambda c: c.end)
    pool = next((c for c in made if c.start > last.end and is_map(c.given)), None)
    return (last.name, False) if pool is None else (pool.name, True)


@torch.no_grad()
def _told(model: nn.Module, x: Tensor) -> Tensor | None:
    features: Any = getattr(model, "forward_features", None)
    if not callable(features):
        return None
    with eval_mode(model):
        out = features(x)
    return out if isinstance(out, Tensor) and out.ndim > 2 else None


def _equal(value: Any, told: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == told.shape and torch.equal(value, told)
