"""Training mode and eval mode, put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule is in the mode it had, also where they differed.

    Modules that keep tensors computed from their weights in eval mode (LeViT's attention biases) forget them when they
    are told to train: before, so that the weights are seen at work, and after, because a trace leaves fakes behind.

    >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with eval_mode(net):
    ...     print([m.training for m in net])
    [False, False]
    >>> [m.training for m in net]
    [True, False]
    """
    modes = [(m, m.training) for m in model.modules()]
    model.train().eval()
    try:
        yield
    finally:
        model.train()
        for module, training in modes:
            module.training = training
