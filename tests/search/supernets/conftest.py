"""What the tests of supernet systems share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from trimtab.learn import Batch, Context, backward_all


@pytest.fixture(scope="session")
def data() -> Any:
    return tt.load_data("digits", limit=600)


@pytest.fixture
def batch() -> Batch:
    g = torch.Generator().manual_seed(0)
    return Batch(image=torch.randn(16, 1, 8, 8, generator=g), label=torch.randint(10, (16,), generator=g))


@pytest.fixture
def step(batch):
    """The gradients of one step, by name; None where there is none."""

    def gradients(net: Any, objective: Any, progress: float = 0.0) -> dict[str, Tensor | None]:
        net.model.train().zero_grad()
        backward_all(lambda: objective.losses(net.model, batch, Context(progress=progress)))
        return {n: None if p.grad is None else p.grad.clone() for n, p in net.model.named_parameters()}

    return gradients
