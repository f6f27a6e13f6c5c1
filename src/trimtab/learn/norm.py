"""BatchNorm statistics: held still during extra passes, or measured again after the weights changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trimtab.nn.modes import eval_mode


@contextmanager
def bn_frozen(model: nn.Module) -> Iterator[None]:
    """Forward passes inside leave the running statistics as they are (batch statistics are still used in training).

    Wrap the forward pass only; never yield a loss inside.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(m, m.momentum, m.num_batches_tracked) for m in layers]
    for m in layers:
        m.momentum = 0.0
        if m.num_batches_tracked is not None:
            m.num_batches_tracked = m.num_batches_tracked.clone()
    try:
        yield
    finally:
        for m, momentum, count in kept:
            m.momentum = momentum
            m.num_batches_tracked = count


@torch.no_grad()
def bn_recalibrate(
    model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor], *, limit: int | None = None
) -> nn.Module:
    """Measure the running statistics of every BatchNorm again, as plain averages over some batches.

    Needed whenever the weights were not trained together with their statistics: sub-networks, averaged weights, a
    model just pruned. Only BatchNorm layers are in training mode while this runs.

    Args:
        batches: batches with an ``image``, or image tensors (B, C, H, W).
        limit: stop after this many batches.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return model
    momenta = [m.momentum for m in layers]
    device = next(model.parameters()).device
    with eval_mode(model):
        try:
            for m in layers:
                m.reset_running_stats()
                m.momentum = None  # None means cumulative average
                m.train()
            count = 0
            for count, batch in enumerate(batches, start=1):
                model((batch if isinstance(batch, Tensor) else batch["image"]).to(device))
                if limit is not None and count >= limit:
                    break
            if count == 0:
                raise ValueError("bn_recalibrate needs at least one batch, got none")
        finally:
            for m, momentum in zip(layers, momenta):
                m.momentum = momentum
    return model
