"""The battery over the surgeries, on one network of each kind."""

from __future__ import annotations

import copy

import pytest
import torch

from trimtab import testing
from trimtab.compress import magnitude
from trimtab.core.edit import Remove, apply


def halve(model, size):
    return magnitude(model, size, budget="macs<=60%")


CASES = {
    "trim_10k": {},
    "trim_mobile_10k": {},
    "simplenet_cifar_310k": {"scale": 0.25, "input_size": (3, 32, 32)},
    "cct_2_3x2_32": {},
}


@pytest.mark.parametrize("name", CASES)
def test_magnitude(name):
    testing.check_surgery(halve, model=name, slow=False, **CASES[name])


def test_magnitude_exports():
    testing.check_surgery(halve, slow=True)


def test_magnitude_on_a_model_that_was_adapted_to_small_images():
    testing.check_surgery(halve, model="resnet8_mlperf_tiny", slow=False, img_size=8, in_chans=1)


def inplace(model, size):
    return apply(model, [Remove("stages.1.0.act")])


def forgets(model, size):
    small = magnitude(model, size, budget="macs<=60%")
    small.__dict__.pop("_trimtab")
    return small


def nothing(model, size):
    return copy.deepcopy(model)


@pytest.mark.parametrize(
    ("operate", "message"),
    [
        (inplace, "original_untouched: the surgery must give a new model"),
        (forgets, "edits_round_trip: the surgery must remember its edits"),
        (nothing, "smaller: multiply-adds must fall"),
    ],
)
def test_the_battery_finds_what_is_wrong(operate, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_surgery(operate, model="trim_1k", slow=False)


def test_the_shared_model_is_not_degenerate():
    """Fresh batch norms would hide errors: the battery's model has seen data."""
    model = testing.ModelCase("trim_1k").model
    assert all(m.running_var.ne(1).any() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
