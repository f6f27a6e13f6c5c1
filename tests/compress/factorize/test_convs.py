"""Tucker and CP of convolutions: exact where they can be, inside the budget, and plain modules afterwards."""

from __future__ import annotations

import itertools
import sys

import pytest
import tensorly
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab import testing
from trimtab.compress import cp, magnitude, tucker
from trimtab.compress.factorize.convs import CPConv2d, TuckerConv2d, _cp_weights, _tucker_weights
from trimtab.core.errors import BudgetError, MissingExtra, SurgeryError

SIZE = (3, 12, 12)
METHODS = {"tucker": (tucker, TuckerConv2d), "cp": (cp, CPConv2d)}
HOW = [
    {"padding": 1},
    {"padding": (1, 0), "stride": (2, 1)},
    {"padding": 2, "dilation": 2, "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "circular"},
    {"kernel_size": (1, 3), "padding": (0, 1)},
    {"kernel_size": 1, "stride": 2, "padding": 1},
]


class Net(nn.Module):
    """(B, 3, 12, 12) -> (B, 10), with a convolution of each kind."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.depth = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.point = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.depth(self.body(self.stem(x).relu()).relu())).relu()
        return self.head(x.mean((2, 3)))


def fresh() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def cost(model: nn.Module, size=SIZE) -> tuple[int, int]:
    found = tt.measure(model, size, what=("params", "macs"))
    return found.params, found.macs


def pair(conv: nn.Conv2d, kind: type[nn.Module], **ranks) -> nn.Module:
    """The chain of `kind` for a convolution, filled with its decomposition."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
    chain = kind(**{n: getattr(conv, n) for n in names}, **ranks)
    weight = conv.weight.detach()
    values = _tucker_weights(weight, ranks) if kind is TuckerConv2d else _cp_weights(weight, ranks["rank"], 500, 0)
    chain.load_state_dict(values | {"expand.bias": conv.bias.detach()})
    return chain


@pytest.mark.parametrize("how", HOW, ids=str)
def test_full_tucker_ranks_reproduce_the_convolution(how):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, **{"kernel_size": 3, **how})
    ranks = (12, 8)
    x = torch.randn(2, 8, 11, 9)
    torch.testing.assert_close(pair(conv, TuckerConv2d, ranks=ranks)(x), conv(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", HOW, ids=str)
def test_cp_of_a_sum_of_two_products_is_exact_at_rank_2(how):
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(8, 12, **{"kernel_size": 3, **how})
    sizes = conv.weight.shape
    with torch.no_grad():
        a, b, c, d = (torch.randn(n, 2, generator=generator) for n in sizes)
        conv.weight.copy_(torch.einsum("or,ir,hr,wr->oihw", a, b, c, d))
    x = torch.randn(2, 8, 11, 9, generator=generator)
    torch.testing.assert_close(pair(conv, CPConv2d, rank=2)(x), conv(x), rtol=1e-2, atol=1e-2)


def test_counts_are_those_of_the_formulas():
    x, o, i, k = (1, 24, 8, 8), 32, 24, 3
    chain = TuckerConv2d(i, o, k, ranks=(10, 6), padding=1, bias=False)
    assert cost(chain, x[1:]) == (w := i * 6 + 9 * 6 * 10 + 10 * o, 64 * w)
    chain = CPConv2d(i, o, k, rank=7, padding=1, bias=False)
    assert cost(chain, x[1:]) == (w := 7 * (i + k + k + o), 64 * w)


def test_a_stride_is_taken_once_and_as_late_as_the_kernel():
    chain = CPConv2d(8, 8, 3, rank=4, stride=2, padding=1)
    assert [c.stride for c in chain] == [(1, 1), (2, 1), (1, 2), (1, 1)]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", ["macs<=50%", "params<=60%"])
def test_a_share_is_met_and_nearly_used(name, budget):
    model = fresh()
    small = METHODS[name][0](model, SIZE, budget=budget)
    which = budget.startswith("macs")
    share = cost(small)[which] / cost(model)[which]
    limit = float(budget[-3:-1]) / 100
    assert limit - 0.1 < share <= limit


@pytest.mark.parametrize("name", METHODS)
def test_grouped_and_narrow_convolutions_stay(name):
    operate, kind = METHODS[name]
    small = operate(fresh(), SIZE, budget="params<=60%")
    assert [n for n, m in small.named_modules() if isinstance(m, kind)] == ["body", "point"]
    assert [len(small.body), len(small.point)] == ([3, 2] if name == "tucker" else [4, 2])
    only = operate(fresh(), SIZE, budget="params<=95%", layers="bod*")
    assert [n for n, m in only.named_modules() if isinstance(m, kind)] == ["body"]


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_that_holds_already_changes_nothing(name):
    model = fresh()
    small = METHODS[name][0](model, SIZE, budget="macs<=100%")
    assert small is not model and cost(small) == cost(model)


@pytest.mark.parametrize("name", METHODS)
def test_the_battery(name):
    operate = METHODS[name][0]
    testing.check_surgery(lambda m, s: operate(m, s, budget="macs<=70%"), model="trim_10k")


def test_more_rank_is_nearer_to_the_model():
    model, x = fresh(), torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(1))
    for operate in (tucker, cp):
        errors = [(operate(model, SIZE, budget=f"params<={p}%")(x) - model(x)).norm() for p in (90, 60, 40)]
        assert all(a < b for a, b in itertools.pairwise(errors))


def test_what_was_factorized_can_be_pruned():
    """Chains are plain convolutions, which the channel graph cuts."""
    small = tucker(fresh(), SIZE, budget="macs<=60%")
    assert cost(magnitude(small, SIZE, budget="macs<=60%"))[1] <= 0.6 * cost(small)[1]


def test_a_trained_net_keeps_what_it_learned():
    data = tt.load_data("digits", limit=600)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 10),
    )  # fmt: skip
    tt.fit(net, data, epochs=10, batch_size=32, lr=0.05, augment="none", progress=False)
    whole = tt.evaluate(net, data)["accuracy"]
    for operate in (tucker, cp):
        small = operate(net, data, budget="macs<=60%")
        assert whole > 0.8 and tt.evaluate(small, data)["accuracy"] > whole - 0.15


def test_the_users_tensorly_backend_is_left_alone():
    tensorly.set_backend("pytorch")
    try:
        tucker(fresh(), SIZE, budget="macs<=60%")
        assert tensorly.get_backend() == "pytorch"
    finally:
        tensorly.set_backend("numpy")


def test_cp_is_repeatable_and_draws_no_random_numbers():
    state = torch.random.get_rng_state()
    first, second = (cp(fresh(), SIZE, budget="macs<=60%").state_dict() for _ in range(2))
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_tensorly_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorly", None)
    with pytest.raises(MissingExtra, match=r"pip install 'trimtab\[factorize\]'"):
        tucker(fresh(), SIZE)


def test_what_cannot_be_done_is_said():
    with pytest.raises(SurgeryError, match="Sequential has no convolution to factorize"):
        tucker(nn.Sequential(nn.Conv2d(3, 4, 3)), SIZE)
    with pytest.raises(BudgetError, match="macs<=1k cannot be met: with the lowest ranks it is macs"):
        cp(fresh(), SIZE, budget="macs<=1k")
    with pytest.raises(ValueError, match="min_channels must be at least 1, got 0"):
        cp(fresh(), SIZE, min_channels=0)
