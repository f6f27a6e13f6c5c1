"""Pruning by magnitude meets its budget, keeps what is large, and says what it cannot do."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from tests.compress import nets
from trimtab.compress import ChannelGraph, magnitude
from trimtab.compress.prune.magnitude import plan
from trimtab.compress.prune.to_budget import Order
from trimtab.core.cost import measure
from trimtab.core.edit import apply, history
from trimtab.core.errors import BudgetError

SIZE = (3, 8, 8)


def cost(model: nn.Module) -> tuple[int, int]:
    c = measure(model, SIZE, what=("macs", "params"))
    return c.macs, c.params


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("net", [nets.Residual, nets.Dense, nets.Transformer])
def test_a_percentage_of_macs_is_met_and_nearly_used(net: type[nn.Module], norm: int, scope: str) -> None:
    model = net().eval()
    small = magnitude(model, SIZE, budget="macs<=50%", norm=norm, scope=scope)
    assert type(small) is net
    assert 0.3 * cost(model)[0] < cost(small)[0] <= 0.5 * cost(model)[0]


def test_absolute_bounds_are_all_met() -> None:
    model = nets.Residual(16).eval()
    small = magnitude(model, SIZE, budget="params<=2k, macs<=90k")
    macs, params = cost(small)
    assert macs <= 90_000 and params <= 2_000


def test_a_measured_bound_is_met() -> None:
    model = nets.Residual(16).eval()
    small = magnitude(model, SIZE, budget="memory<=60%, macs<=80%")
    before, after = measure(model, SIZE), measure(small, SIZE)
    assert after.memory <= 0.6 * before.memory and after.macs <= 0.8 * before.macs


def test_the_budget_is_met_after_rounding() -> None:
    model = nets.Residual(32).eval()
    small = magnitude(model, SIZE, budget="macs<=50%", round_to=4)
    assert cost(small)[0] <= 0.5 * cost(model)[0]
    assert small.stem.out_channels % 4 == 0 and small.conv1.out_channels % 4 == 0


def test_an_unreachable_budget_says_how_near_it_came() -> None:
    words = r"macs<=100 cannot be met: with the fewest channels allowed macs is .* \(\d+ % of the model\)"
    with pytest.raises(BudgetError, match=words):
        magnitude(nets.Residual(), SIZE, budget="macs<=100")


def test_a_budget_that_holds_already_changes_nothing() -> None:
    model = nets.Residual().eval()
    small = magnitude(model, SIZE, budget="macs<=100%")
    assert small is not model and cost(small) == cost(model)


def test_the_largest_channels_stay() -> None:
    model = nets.Residual(8).eval()
    with torch.no_grad():
        for p in model.conv1.weight, model.conv2.weight.transpose(0, 1):
            p.mul_(torch.tensor([0.01] * 6 + [1.0] * 6).view(-1, 1, 1, 1))
        model.bn1.weight.mul_(torch.tensor([0.01] * 6 + [1.0] * 6))
        model.conv1.bias.mul_(torch.tensor([0.01] * 6 + [1.0] * 6))
    small = magnitude(model, SIZE, budget="macs<=60%")
    kept = next(e.keep for e in history(small).edits if getattr(e, "tensor", "") == "conv1.weight" and e.dim == 0)
    assert set(kept) <= set(range(6, 12))


def test_no_group_falls_below_min_keep() -> None:
    model = nets.Residual(16)
    graph = ChannelGraph(model, nets.image())
    scores = [torch.zeros(g.size) if g.id == 0 else torch.ones(g.size) for g in graph.groups]
    order = Order(graph, scores, scope="global", round_to=1, min_keep=0.25)
    least = order.mask(order.levels)
    assert [int(least[g.units].sum()) for g in graph.groups] == [4, 3]
    assert order.mask(0).all()


def test_choices_are_nested() -> None:
    graph = ChannelGraph(nets.Transformer(), nets.image())
    order = Order(graph, graph.norms(), scope="global", round_to=4, min_keep=0.1)
    masks = [order.mask(n) for n in range(order.levels + 1)]
    assert all((b <= a).all() for a, b in itertools.pairwise(masks))
    assert [graph.macs(m) for m in masks] == sorted((graph.macs(m) for m in masks), reverse=True)


def test_edits_applied_to_a_fresh_base_give_the_same_function() -> None:
    torch.manual_seed(0)
    model = nets.Transformer().eval()
    edits = plan(model, SIZE, budget="macs<=50%")
    small = magnitude(model, SIZE, budget="macs<=50%")
    assert history(small).edits == edits
    fresh = apply(nets.Transformer().eval(), edits)
    fresh.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(nets.image()), small(nets.image()))


def test_channels_that_the_class_cannot_lose_stay() -> None:
    """A hard-coded reshape refuses; the rest of the network is still pruned to the budget."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.free, self.body, self.stubborn = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 3, 1), nets.Stubborn()

        def forward(self, x: Tensor) -> Tensor:
            return self.stubborn(self.body(torch.relu(self.free(x))))

    model = Mixed().eval()
    small = magnitude(model, SIZE, budget="macs<=50%")
    assert cost(small)[0] <= 0.5 * cost(model)[0]
    assert small.stubborn.mix.conv.out_channels == 12 and small.free.out_channels < 32


class Derived(nn.Module):
    """head_dim = channels // num_heads, worked out at run time: heads and channels must keep the same share."""

    def __init__(self, dim: int = 32, num_heads: int = 4) -> None:
        super().__init__()
        self.stem, self.attn, self.head = nn.Linear(3, dim), _DerivedAttention(dim, num_heads), nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(2).transpose(1, 2))
        return self.head((x + self.attn(x)).mean(1))


class _DerivedAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


def test_groups_whose_shares_hang_together_are_cut_in_step() -> None:
    model = Derived().eval()
    small = magnitude(model, SIZE, budget="macs<=60%")
    assert cost(small)[0] <= 0.6 * cost(model)[0]
    assert small.attn.num_heads < 4 and small.stem.out_features == 8 * small.attn.num_heads


def test_multi_head_attention_of_torch_is_cut_in_step_with_its_width() -> None:
    """torch insists that embed_dim = num_heads * head_dim."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.attn = nn.Linear(3, 32), nn.MultiheadAttention(32, 4, batch_first=True)
            self.head = nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x.flatten(2).transpose(1, 2))
            return self.head((x + self.attn(x, x, x, need_weights=False)[0]).mean(1))

    model = Net().eval()
    small = magnitude(model, SIZE, budget="macs<=60%")
    assert (small.attn.num_heads, small.attn.embed_dim) == (2, 16)
    assert small(nets.image()).shape == (2, 5) and cost(small)[0] <= 0.6 * cost(model)[0]


def test_keyword_inputs_and_structured_outputs() -> None:
    """As Hugging Face models have them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nets.Residual(16)

        def forward(self, pixel_values: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.body(pixel_values)
            return {"logits": logits if scale is None else logits * scale, "double": 2 * logits}

    model = Net().eval()
    example = {"pixel_values": nets.image(), "scale": torch.ones(2, 1)}
    small = magnitude(model, example, budget="params<=50%")
    count = sum(p.numel() for p in small.parameters())
    assert count <= 0.5 * sum(p.numel() for p in model.parameters())
    assert set(small(**example)) == {"logits", "double"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"norm": 3}, "norm must be 1 or 2, got 3"),
        ({"scope": "all"}, "scope must be one of global, raw, local, got 'all'"),
        ({"round_to": 0}, "round_to must be a positive integer, got 0"),
        ({"min_keep": 1.5}, r"min_keep must be in \[0, 1\], got 1.5"),
        ({"budget": "accuracy>=0.9"}, "a pruner needs an upper bound"),
    ],
)
def test_wrong_arguments_are_refused_at_the_door(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        magnitude(nets.Residual(), SIZE, **kwargs)


def test_the_model_is_not_changed() -> None:
    model = nets.Residual()
    before = copy.deepcopy(model.state_dict())
    magnitude(model, SIZE)
    assert model.training and not history(model).edits
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_networks_with_instance_norms_are_cut_like_others() -> None:
    parts = (nn.Conv2d(3, 16, 3, padding=1), nn.InstanceNorm2d(16, affine=True), nn.ReLU(), nn.Conv2d(16, 5, 1))
    model = nn.Sequential(*parts).eval()
    small = magnitude(model, SIZE, budget="macs<=50%")
    assert small[1].num_features == small[0].out_channels == 8 and cost(small)[0] == cost(model)[0] / 2
