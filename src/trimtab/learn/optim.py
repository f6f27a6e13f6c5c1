"""Parameter groups and optimizers: what is trained, with which decay and which share of the learning rate."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def param_groups(
    modules: nn.Module | Iterable[nn.Module],
    *,
    lr: float,
    weight_decay: float = 0.0,
    no_decay: Callable[[str, Tensor], bool] | None = None,
    layer_decay: float | None = None,
    only: Callable[[str, Tensor], bool] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer; each parameter that requires a gradient is in exactly one of them.

    A layer may speak for its own parameters, by name: ``no_weight_decay()``, and ``lr_scales``, factors on the learning
    rate.

    Args:
        modules: what is trained: the model, or the model and the modules trained along with it.
        lr: learning rate; each group carries its own ``lr``.
        weight_decay: for weights; 1-D tensors, biases and what the model lists in ``no_weight_decay()`` get none.
        no_decay: (name, tensor) -> bool, instead of that rule.
        layer_decay: learning rate of each layer as a share of the layer above it (the layers are timm's grouping).
        only: (name, tensor) -> bool: train nothing else.

    >>> groups = param_groups(nn.Linear(3, 2), lr=0.1, weight_decay=1e-4)
    >>> [(g["weight_decay"], len(g["params"])) for g in groups]
    [(0.0001, 1), (0.0, 1)]
    """
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    seen: set[int] = set()
    for module in [modules] if isinstance(modules, nn.Module) else modules:
        rule = no_decay or _default_rule(module)
        scales = _layer_scales(module, layer_decay)
        for name, p in module.named_parameters():
            if not p.requires_grad or id(p) in seen or (only is not None and not only(name, p)):
                continue
            seen.add(id(p))
            decay, scale = (0.0 if rule(name, p) else weight_decay), scales.get(name, 1.0)
            group = groups.setdefault((decay, scale), {"params": [], "lr": lr * scale, "weight_decay": decay})
            group["params"].append(p)
    if not groups:
        raise ValueError("there is nothing to train: no parameter requires a gradient (or `only` picked none)")
    return list(groups.values())


def make_optimizer(
    groups: list[dict[str, Any]], opt: str | Callable[..., torch.optim.Optimizer] = "sgd", *, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """An optimizer by timm's name (``sgd`` is Nesterov, ``momentum`` is not, ``adamw``, ``lamb``, ``lion``, ...).

    opt may also be a callable that takes the groups. Multi-tensor updates are used where the optimizer has them.
    """
    if callable(opt):
        return opt(groups)
    from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers

    try:
        cls = get_optimizer_class(opt, bind_defaults=False)
    except ValueError as e:
        raise ValueError(
            f"opt must be one of timm's optimizers ({', '.join(map(str, list_optimizers()))}), got {opt!r}"
        ) from e
    foreach: Any = {"foreach": True} if "foreach" in inspect.signature(cls).parameters else {}
    lr = max(g["lr"] for g in groups)
    return create_optimizer_v2(groups, opt=opt, lr=lr, weight_decay=0.0, momentum=momentum, **foreach)


def _default_rule(module: nn.Module) -> Callable[[str, Tensor], bool]:
    listed = {
        f"{owner}.{name}" if owner else name
        for owner, m in module.named_modules(remove_duplicate=False)
        for name in getattr(m, "no_weight_decay", tuple)()
    }
    return lambda name, p: p.ndim <= 1 or name.endswith(".bias") or name in listed


def _layer_scales(module: nn.Module, layer_decay: float | None) -> dict[str, float]:
    name_of = {id(p): name for name, p in module.named_parameters()}
    scales: dict[str, float] = {}
    if layer_decay is not None and layer_decay != 1 and name_of:
        from timm.optim import param_groups_layer_decay

        grouped = param_groups_layer_decay(module, layer_decay=layer_decay)
        scales = {name_of[id(p)]: float(g["lr_scale"]) for g in grouped for p in g["params"]}
    own = {name_of[id(getattr(m, leaf))]: factor for m in module.modules()
           for leaf, factor in getattr(m, "lr_scales", {}).items()}  # fmt: skip
    return scales | {name: scales.get(name, 1.0) * factor for name, factor in own.items()}
