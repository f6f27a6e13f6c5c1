"""What a step costs, against plain training."""

from __future__ import annotations

import torch
from torch import nn

from evidence.step_cost import Alive, step_cost
from trimtab import testing
from trimtab.learn import KD, Classify

BATCH = {"image": torch.randn(8, 1, 8, 8), "label": torch.arange(8)}


def test_bytes_alive_are_counted_from_birth_to_death():
    x = torch.zeros(1000)
    with Alive() as alive:
        y = x * 2  # 4000 bytes read, 4000 made
        z = y.exp()
        assert (alive.now, alive.peak) == (12_000, 12_000)
        del y
        assert (alive.now, alive.peak) == (8_000, 12_000)
        z.view(10, 100).add_(1)  # no memory of its own
        assert alive.now == 8_000


def test_what_is_kept_for_the_backward_pass_counts():
    p = torch.ones(1000, requires_grad=True)
    with Alive() as alive:
        loss = p.exp().sin().sum()
        assert alive.now == 2 * 4000 + 4  # p, its exponential, the sum
        loss.backward()
        del loss
        assert alive.now == 2 * 4000  # p and its gradient


def test_plain_training_costs_what_plain_training_costs():
    assert step_cost(Classify(), testing.toy_net(), BATCH, repeats=1)["memory_ratio"] == 1


def test_a_teacher_costs_memory_and_the_model_is_left_alone():
    model = testing.toy_net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 5000), nn.Linear(5000, 10))
    cost = step_cost(KD(teacher), model, BATCH, repeats=1)
    assert cost["memory_ratio"] > 5 and cost["time_ratio"] > 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
