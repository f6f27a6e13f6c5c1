import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.core.edit import (
    Insert,
    Narrow,
    Remove,
    Replace,
    SetAttr,
    Tie,
    Widen,
    apply,
    describe,
    from_json,
    history,
    meta_copy,
    remember_base,
    resolve_class,
    to_json,
)
from trimtab.core.errors import EditError


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def keep_channels(keep) -> list:
    keep = tuple(keep)
    norm = [Narrow(f"1.{n}", 0, keep) for n in ("weight", "bias", "running_mean", "running_var")]
    return [Narrow("0.weight", 0, keep), Narrow("0.bias", 0, keep), *norm, Narrow("3.weight", 1, keep)]


X = torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True))
def test_narrowing_equals_zeroing_the_channels_that_go(keep):
    net = small_net().eval()
    masked = copy.deepcopy(net)
    with torch.no_grad():
        for c in set(range(8)) - set(keep):
            masked[3].weight[:, c] = 0
    apply(net, keep_channels(keep))
    torch.testing.assert_close(net(X), masked(X))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True), st.integers(1, 3))
def test_edits_survive_json(keep, more):
    edits = [
        *keep_channels(keep), SetAttr("0", "out_channels", len(keep)), Widen("3.bias", 0, 4 + more),
        Insert("2", "extra", "torch.nn.Dropout", {"p": 0.5}, where="before"), Remove("1"),
        Replace("2", "torch.nn.GELU", {"approximate": "tanh"}), SetAttr("0", "stride", (2, 2)),
    ]  # fmt: skip
    assert from_json(json.loads(json.dumps(to_json(edits)))) == edits
    assert len(describe(edits)) == len(edits)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (Narrow("0.weight", 0, (9,)), "distinct indices in"),
        (Narrow("0.weight", 0, (1, 1)), "distinct indices in"),
        (Narrow("0.weight", 0, ()), "nothing would be left"),
        (Narrow("0.weight", 4, (0,)), "dim must be in"),
        (Narrow("nope.weight", 0, (0,)), "no module 'nope'"),
        (Narrow("0.nope", 0, (0,)), "no tensor '0.nope'"),
        (Widen("0.weight", 0, 1), "at least 2"),
        (Replace("9", "torch.nn.ReLU"), "no module '9'"),
        (Replace("", "torch.nn.ReLU"), "itself cannot be replaced"),
        (Replace("2", "os.system"), "not in an allowed package"),
        (Replace("2", "torch.nn.functional.relu"), "not a module class"),
        (Replace("2", "torch.nn.Nope"), "does not exist"),
        (Replace("2", "torch.nn.Linear", {"nope": 1}), "cannot be built"),
        (Insert("2", "base", "torch.nn.ReLU"), "other than 'base'"),
        (Insert("2", "a", "torch.nn.ReLU", {}, where="beside"), "'before' or 'after'"),
        (Tie("0.weight", "3.weight"), "cannot be the parameter 3.weight"),
        (Tie("1.running_mean", "1.bias"), "cannot be the parameter 1.bias"),
        (Tie("0.weight", "nope.weight"), "no module 'nope'"),
        (SetAttr("0", "nope", 1), "no attribute"),
        (SetAttr("0", "forward", 1), "only numbers, strings"),
        (SetAttr("0", "__class__", 1), "no attribute"),
        (SetAttr("0", "out_channels", "many"), "cannot become"),
    ],
)
def test_a_wrong_edit_leaves_model_and_optimizer_untouched(bad, says):
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    params = list(net.parameters())
    with pytest.raises(EditError, match=says):
        apply(net, [*keep_channels((0, 1)), bad], optimizer=optimizer)
    assert all(a is b for a, b in zip(params, net.parameters(), strict=True))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert optimizer.param_groups[0]["params"] == params
    assert history(net).edits == []


def test_training_goes_on_after_surgery_as_if_the_channels_had_never_been():
    """A dead channel (zero in and out) never moves, so cutting it must not change how the others are trained."""

    def net_with_dead_channels():
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        torch.manual_seed(1)
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape))
            net[0].weight[5:] = 0
            net[0].bias[5:] = 0
            net[2].weight[:, 5:] = 0
        return net

    def step(net, optimizer):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()

    whole, cut = net_with_dead_channels(), net_with_dead_channels()
    opts = [torch.optim.AdamW(n.parameters(), lr=0.01) for n in (whole, cut)]
    ema = copy.deepcopy(cut)
    for net, opt in zip((whole, cut), opts, strict=True):
        for _ in range(3):
            step(net, opt)
    keep = tuple(range(5))
    edits = [Narrow("0.weight", 0, keep), Narrow("0.bias", 0, keep), Narrow("2.weight", 1, keep)]
    apply(cut, edits, optimizer=opts[1], also=[ema])
    assert ema[0].weight.shape == cut[0].weight.shape
    for net, opt in zip((whole, cut), opts, strict=True):
        for _ in range(3):
            step(net, opt)
    torch.testing.assert_close(whole(X), cut(X))
    torch.testing.assert_close(whole[0].weight[:5], cut[0].weight)


def test_parameters_of_new_modules_are_trained_and_of_removed_ones_forgotten():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(X).sum().backward()
    optimizer.step()
    apply(
        net,
        [Remove("1"), Insert("3", "more", "torch.nn.Conv2d", {"in_channels": 4, "out_channels": 4, "kernel_size": 1})],
        optimizer=optimizer,
    )
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in net.parameters()}
    assert {id(p) for p in optimizer.state} <= held


def test_tied_weights_stay_tied():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    apply(net, [Narrow("0.weight", 0, (0, 1)), Narrow("0.weight", 1, (0, 1))])
    assert net[1].weight is net[0].weight
    assert net[1].weight.shape == (2, 2)


def test_insert_and_remove_of_identities_do_not_change_the_function():
    net = small_net().eval()
    want = net(X)
    apply(net, [Insert("3", "new", "torch.nn.Identity"), Insert("0", "pre", "torch.nn.Identity", where="before")])
    torch.testing.assert_close(net(X), want)


def test_widen_keeps_the_function_and_takes_given_weights():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    want = net(x)
    grown = torch.cat([net[0].weight.detach(), torch.ones(2, 3)])
    apply(net, [Widen("0.weight", 0, 6), Widen("0.bias", 0, 6), Widen("2.weight", 1, 6)], weights={"0.weight": grown})
    torch.testing.assert_close(net(x), want)
    assert net[0].weight[5].tolist() == [1, 1, 1]
    with pytest.raises(EditError, match="shape"):
        apply(net, [], weights={"0.weight": torch.ones(1)})


def test_history_survives_deepcopy_and_is_separate_from_then_on():
    net = small_net()
    remember_base(net, "small", {"width": 8})
    twin = copy.deepcopy(net)
    apply(twin, keep_channels((0, 1)))
    assert history(twin).base == "small"
    assert len(history(twin).edits) == 7
    assert history(net).edits == []


def test_meta_copy_takes_no_memory_and_keeps_ties():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    ghost = meta_copy(net)
    assert all(p.is_meta for p in ghost.parameters())
    assert ghost[1].weight is ghost[0].weight
    assert not net[0].weight.is_meta


def test_a_class_defined_elsewhere_is_refused_even_through_an_allowed_module(monkeypatch):
    class Foreign(nn.Module):
        pass

    monkeypatch.setattr(nn, "Foreign", Foreign, raising=False)
    with pytest.raises(EditError, match="outside the allowed packages"):
        resolve_class("torch.nn.Foreign")


@pytest.mark.parametrize(
    "item",
    [
        3, {"edit": "explode"}, {"edit": "narrow", "tensor": "a", "dim": 0}, {"edit": "remove", "module": 3},
        {"edit": "narrow", "tensor": "a", "dim": True, "keep": [0]},
        {"edit": "narrow", "tensor": "a", "dim": 0, "keep": ["0"]},
        {"edit": "remove", "module": "a", "more": 1},
        {"edit": "set_attr", "module": "a", "name": "b", "value": {"c": 1}},
    ],
)  # fmt: skip
def test_malformed_json_is_one_clear_error(item):
    with pytest.raises(EditError):
        from_json([item])


def test_tied_parameters_are_one_and_are_narrowed_together():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ties = [Tie("1.weight", "0.weight"), Tie("1.bias", "0.bias")]
    assert from_json(json.loads(json.dumps(to_json(ties)))) == ties
    assert describe(ties) == ["1.weight: the same as 0.weight", "1.bias: the same as 0.bias"]
    apply(net, ties, optimizer=optimizer)
    assert net[1].weight is net[0].weight and net[1].bias is net[0].bias
    assert len(optimizer.param_groups[0]["params"]) == len(list(net.parameters())) == 4
    apply(net, [Narrow("0.weight", 0, (0, 1))])
    assert net[1].weight is net[0].weight and net[1].weight.shape == (2, 4)
