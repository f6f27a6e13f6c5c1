"""Units and groups: the right ones, and cutting them does what zeroing them does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.compress import nets
from trimtab.compress.graph import ChannelGraph
from trimtab.compress.graph.patch import scrambled
from trimtab.core.cost import measure
from trimtab.core.edit import apply
from trimtab.core.meta import shapes_only

# Groups and channels that OTO's own code and torch-pruning 1.6.1 both find (the last two: torch-pruning only). Counted
# are units, one channel each in these networks, in groups of channels that go together, the classifier and the image
# left out. Ours are the same to the last channel.
COUNTS = {
    "resnet50": (37, 11_456),
    "densenet121": (120, 10_240),
    "mobilenetv2_100": (25, 9_128),
    "convnext_tiny": (22, 27_936),
    "efficientnet_b0": (40, 11_404),
}
CNNS = [nets.Residual, nets.Gated, nets.Grouped, nets.Dense, nets.Shuffle, nets.Normed]


def half(graph: ChannelGraph) -> dict[int, range]:
    return {g.id: range((g.size + 1) // 2) for g in graph.groups}


@pytest.mark.parametrize("name", COUNTS)
def test_reference_counts(name: str) -> None:
    import timm

    with shapes_only():
        model = timm.create_model(name)
        graph = ChannelGraph(model, torch.zeros(1, 3, 64, 64))
    assert (len(graph.groups), sum(g.size for g in graph.groups)) == COUNTS[name]
    assert not graph.unknown_ops
    spans = [g for g in graph.groups if g.norm_spans]
    assert len(spans) == (4 if name == "convnext_tiny" else 0)  # the four residual widths under layer norms


@pytest.mark.parametrize("net", CNNS)
def test_masked_equals_narrowed(net: type[nn.Module]) -> None:
    model = scrambled(net().eval(), seed=1)
    graph = ChannelGraph(model, nets.image())
    assert graph.groups and not any(g.norm_spans for g in graph.groups)
    keep = half(graph)
    x = nets.image(seed=3)
    narrowed = apply(copy.deepcopy(model), graph.edits(keep))
    with torch.no_grad():
        torch.testing.assert_close(narrowed(x), graph.masked(keep)(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(narrowed(x), graph.reference(keep)(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(narrowed(x), model(x), atol=1e-3)


def test_what_a_model_keeps_while_evaluated_hides_no_weight() -> None:
    model = nets.Caching().eval()
    model(nets.image())  # the kept tensor stands in for the weight from now on
    graph = ChannelGraph(model, nets.image())
    members = {name for g in graph.groups for name, _ in g.members}
    assert members == {"stem.weight", "stem.bias", "strength", "fc.weight"}  # and not what nothing reads
    keep = half(graph)
    narrowed = apply(copy.deepcopy(model), graph.edits(keep))
    with torch.no_grad():
        for m in (model, narrowed.train().eval()):
            assert type(m(nets.image(seed=3))) is torch.Tensor and m.cache is not None
        torch.testing.assert_close(narrowed(nets.image(seed=3)), graph.masked(keep)(nets.image(seed=3)))


@pytest.mark.parametrize("name", nets.BETWEEN)
def test_operators_carry_channels_through(name: str) -> None:
    model = scrambled(nets.BETWEEN[name]().eval(), seed=1)
    graph = ChannelGraph(model, nets.image())
    assert graph.groups and not graph.unknown_ops
    keep = half(graph)
    x = nets.image(seed=3)
    narrowed = apply(copy.deepcopy(model), graph.edits(keep))
    with torch.no_grad():
        torch.testing.assert_close(narrowed(x), graph.masked(keep)(x), rtol=1e-4, atol=1e-4)
    assert graph.macs(keep) == measure(narrowed, (3, 8, 8), what=("macs",)).macs < graph.macs(None)


@pytest.mark.parametrize("net", CNNS)
def test_zero_invariant_units_are_silent_when_only_their_producers_are_zero(net: type[nn.Module]) -> None:
    model = scrambled(net().eval(), seed=1)
    graph = ChannelGraph(model, nets.image())
    x = nets.image(seed=3)
    for g in graph.groups:
        if not g.zero_invariant:
            continue
        quiet = copy.deepcopy(model)
        tensors = dict(quiet.named_parameters())
        for (name, dim), unit in graph.positions(g).items():
            if (name, dim) in g.producers:
                with torch.no_grad():
                    tensors[name].index_fill_(dim, torch.from_numpy((unit == 0).nonzero()[0]), 0.0)
        with torch.no_grad():
            cut = graph.reference({g.id: range(1, g.size)})(x)
            torch.testing.assert_close(quiet(x), cut, rtol=1e-4, atol=1e-5)


def test_residual_channels_go_together_and_the_classifier_stays() -> None:
    graph = ChannelGraph(nets.Residual(), nets.image())
    stream, inner = graph.groups
    assert (stream.size, inner.size) == (8, 12)
    assert set(stream.producers) >= {("stem.weight", 0), ("bn0.weight", 0), ("conv2.bias", 0), ("bn2.bias", 0)}
    assert set(stream.consumers) == {("conv1.weight", 1), ("fc.weight", 1)}
    assert ("bn2.running_var", 0) in stream.members
    assert ("fc.weight", 0) in graph.frozen and ("stem.weight", 1) in graph.frozen


def test_grouped_convolution_loses_the_same_of_every_group() -> None:
    model = nets.Grouped().eval()
    graph = ChannelGraph(model, nets.image())
    assert [(g.size, g.width) for g in graph.groups] == [(4, 3), (8, 3)]
    narrowed = apply(copy.deepcopy(model), graph.edits({0: [1, 2], 1: [0, 3, 7]}))
    assert narrowed.b.weight.shape == (9, 2, 3, 3) and narrowed.b.groups == 3
    assert (narrowed.b.in_channels, narrowed.b.out_channels) == (6, 9)


def test_depthwise_convolution_follows_its_input() -> None:
    model = nets.Gated().eval()
    graph = ChannelGraph(model, nets.image())
    narrowed = apply(copy.deepcopy(model), graph.edits({0: range(5)}))
    assert narrowed.depthwise.groups == narrowed.depthwise.in_channels == narrowed.depthwise.out_channels == 5
    assert narrowed.up.out_channels == 5 and narrowed.down.in_channels == 5


def test_group_norm_loses_whole_groups() -> None:
    model = nets.Normed().eval()
    graph = ChannelGraph(model, nets.image())
    (group,) = graph.groups
    assert (group.size, group.width, group.norm_spans) == (4, 4, False)
    narrowed = apply(copy.deepcopy(model), graph.edits({0: [0, 2, 3]}))
    assert (narrowed.norm.num_groups, narrowed.norm.num_channels) == (3, 12)
    (whole,) = ChannelGraph(nets.Normed(groups=1), nets.image()).groups
    assert whole.norm_spans and whole.size == 16


def test_attention_is_cut_by_whole_heads() -> None:
    model = nets.Transformer().eval()
    graph = ChannelGraph(model, nets.image())
    heads = next(g for g in graph.groups if ("attn.qkv.weight", 0) in g.members)
    assert (heads.size, heads.width) == (3, 24)  # 8 rows each of q, k and v
    assert ("attn.proj.weight", 1) in heads.consumers
    narrowed = apply(copy.deepcopy(model), graph.edits({heads.id: [0, 2]}))
    assert type(narrowed) is nets.Transformer
    assert (narrowed.attn.num_heads, narrowed.attn.head_dim) == (2, 8)
    assert narrowed.attn.qkv.weight.shape == (48, 24) and narrowed.attn.proj.weight.shape == (24, 16)
    rows = model.attn.qkv.weight.view(3, 3, 8, 24)[:, [0, 2]].reshape(48, 24)
    assert torch.equal(narrowed.attn.qkv.weight, rows)


@pytest.mark.parametrize("norm", [False, True])
def test_masked_equals_narrowed_in_a_transformer_unless_a_layer_norm_spans_the_cut(norm: bool) -> None:
    model = scrambled(nets.Transformer(norm=norm).eval(), seed=1)
    graph = ChannelGraph(model, nets.image())
    x = nets.image(seed=3)
    assert [g.norm_spans for g in graph.groups].count(True) == norm
    for g in graph.groups:
        keep = {g.id: range((g.size + 1) // 2)}
        with torch.no_grad():
            narrowed, masked = apply(copy.deepcopy(model), graph.edits(keep))(x), graph.masked(keep)(x)
        assert torch.allclose(narrowed, masked, rtol=1e-4, atol=1e-5) is not g.norm_spans


def test_an_unknown_operator_freezes_what_enters_it_and_no_more() -> None:
    model = nets.Odd().eval()
    graph = ChannelGraph(model, nets.image())
    assert graph.unknown_ops
    cut = {name for g in graph.groups for name, _ in g.members}
    assert ("b.weight", 0) in graph.frozen and ("c.weight", 1) in graph.frozen
    assert cut == {"a.weight", "a.bias", "b.weight", "c.weight", "c.bias", "d.weight"}
    keep = half(graph)
    x = nets.image(seed=3)
    with torch.no_grad():
        torch.testing.assert_close(apply(copy.deepcopy(model), graph.edits(keep))(x), graph.masked(keep)(x))


@pytest.mark.parametrize("net", [*CNNS, nets.Transformer, nets.Placed])
def test_closed_form_costs_are_what_is_measured(net: type[nn.Module]) -> None:
    model = net().eval()
    graph = ChannelGraph(model, nets.image())
    keep = half(graph)
    narrowed = apply(copy.deepcopy(model), graph.edits(keep))
    for k, m in (None, model), (keep, narrowed):
        cost = measure(m, (3, 8, 8), what=("macs", "params"))
        assert (graph.macs(k), graph.params(k)) == (cost.macs, cost.params)


@pytest.mark.parametrize("net", [nets.Residual, nets.Grouped, nets.Dense, nets.Transformer])
def test_a_permutation_of_units_computes_the_same_function(net: type[nn.Module]) -> None:
    model = scrambled(net().eval(), seed=1)
    graph = ChannelGraph(model, nets.image())
    edits = graph.permutation({g.id: list(reversed(range(g.size))) for g in graph.groups})
    turned = apply(copy.deepcopy(model), edits)
    x = nets.image(seed=3)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), turned.parameters(), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(turned(x), model(x), rtol=1e-4, atol=1e-5)


def test_norms_sum_over_everything_that_goes_with_a_unit() -> None:
    model = nets.Residual()
    graph = ChannelGraph(model, nets.image())
    inner = graph.groups[1]
    squares = model.conv1.weight.pow(2).sum((1, 2, 3)) + model.conv1.bias.pow(2)
    squares += model.bn1.weight.pow(2) + model.bn1.bias.pow(2)
    torch.testing.assert_close(graph.norms(members="producers")[inner.id].float(), squares.sqrt())
    squares = squares + model.conv2.weight.pow(2).sum((0, 2, 3))
    torch.testing.assert_close(graph.norms()[inner.id].float(), squares.sqrt())


def test_the_model_and_the_random_state_are_untouched() -> None:
    model = nets.Transformer().train()
    model.up.eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    graph = ChannelGraph(model, nets.image())
    graph.edits(half(graph))
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training and not model.up.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_wrong_choices_are_refused_at_the_door() -> None:
    graph = ChannelGraph(nets.Residual(), nets.image())
    with pytest.raises(ValueError, match=r"group must be in \[0, 2\), got 7"):
        graph.edits({7: [0]})
    with pytest.raises(ValueError, match=r"units of group 0 must be in \[0, 8\)"):
        graph.edits({0: [8]})
    with pytest.raises(ValueError, match="at least one unit of group 0"):
        graph.edits({0: []})
    assert graph.edits({}) == []
