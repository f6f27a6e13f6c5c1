"""The battery over the objectives."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from trimtab import testing
from trimtab.learn import KD, Classify, Objective, soft_ce


def kd() -> KD:
    return KD(testing.toy_net().requires_grad_(False), T=2.0, alpha=0.5)


OBJECTIVES = {"classify": Classify, "smoothed": partial(Classify, smoothing=0.1), "kd": kd}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize(("_", "check"), testing.objective_checks(slow=False))
def test_fast_checks(objective, _, check):
    check(testing.ObjectiveCase(objective))


def test_two_processes_equal_one():
    testing.check_objective(kd, slow=True)


class Leaves(Classify):
    """Wrong: a module stays on the model."""

    def setup(self, model, batch):
        model.extra_head = torch.nn.Linear(2, 2)


class Unrepeatable(Classify):
    """Wrong: its state is not part of the checkpoint."""

    def __init__(self):
        super().__init__()
        self._calls = 0

    def losses(self, model, batch, ctx):
        self._calls += 1
        return super().losses(model, batch, ctx) * (1 + self._calls % 7)


class Constant(Objective):
    """Wrong: nothing to learn."""

    def losses(self, model, batch, ctx):
        return soft_ce(model(batch["image"]) * 0.0, batch["label"])


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Leaves, "leaves_nothing: training left something on the model: modules 'extra_head'"),
        (Unrepeatable, "resume: after a kill and a resume, .* differs"),
        (Constant, "loss_falls: the loss must fall"),
    ],
)
def test_the_battery_finds_what_is_wrong(objective, message):
    skip = {"leaves_nothing": ("loss_falls", "resume"), "resume": ("loss_falls",), "loss_falls": ()}[
        message.split(":")[0]
    ]
    with pytest.raises(AssertionError, match=message):
        testing.check_objective(objective, slow=False, skip=skip)
