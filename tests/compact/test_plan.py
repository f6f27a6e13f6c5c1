from dataclasses import dataclass

import pytest
import torch

from trimtab.compact import plan
from trimtab.core.budget import Budget
from trimtab.core.cost import measure
from trimtab.core.errors import BudgetError


@dataclass
class Shape:
    """As much of a Data as planning looks at."""

    size: tuple[int, int]
    in_chans: int = 3
    num_classes: int = 10


DIGITS, CIFAR = Shape((8, 8), 1), Shape((32, 32))


@pytest.mark.parametrize(
    ("shape", "budget"),
    [(DIGITS, "size<=8KB, macs<=200k"), (CIFAR, "size<=96KB, macs<=12.5M"), (CIFAR, "memory<=64KiB, params<=20k")],
)
def test_every_candidate_keeps_the_bounds_or_says_that_it_must_be_cut(shape, budget):
    found = plan.candidates(shape, Budget(budget), most=10)
    assert len(found) >= 4
    assert len({c.label for c in found}) == len(found)
    for c in found:
        model = c.build(shape)
        cost = measure(model, (shape.in_chans, *shape.size), what=("params", "macs"))
        assert (cost.params, cost.macs) == (c.cost["params"], c.cost["macs"])
        assert model(torch.zeros(1, shape.in_chans, *shape.size)).shape == (1, 10)
        verdict = Budget(budget).check(c.cost)
        assert verdict.ok != c.cut
        assert plan.Candidate.from_json(c.to_json()) == c


def test_the_widest_fits_and_one_more_channel_does_not():
    budget = Budget("macs<=12.5M")
    kwargs = {"depths": (1, 1, 1)}
    best = plan.widest(CIFAR, budget, "trim_net", kwargs)
    wider = plan._costed(CIFAR, "trim_net", {**kwargs, "width": best.kwargs["width"] + 1})
    assert budget.check(best.cost).ok
    assert not budget.check(wider.cost).ok


def test_filling_uses_what_bisection_leaves():
    budget = Budget("size<=96KB, macs<=12.5M")
    best = plan.widest(CIFAR, budget, "trim_net", {"depths": (1, 1, 1)})
    filled = plan.fill(CIFAR, budget, best)
    assert budget.check(filled.cost).ok
    assert filled.cost["macs"] > best.cost["macs"]
    assert max(filled.cost["macs"] / 12.5e6, filled.cost["size"] / 96e3) > 0.97


def test_a_budget_that_nothing_fits_says_how_near_the_smallest_came():
    with pytest.raises(BudgetError, match=r"smallest one tried.*params is .* over 10"):
        plan.candidates(DIGITS, Budget("params<=10"))


def test_the_default_budget_grows_with_the_images():
    small, large = plan.default_budget(DIGITS), plan.default_budget(Shape((224, 224)))
    assert small.limit("size") < large.limit("size")
    assert small.limit("macs") == pytest.approx(12_000 * 64)
    assert plan.candidates(DIGITS, small, most=2)
