"""SortedNet: nesting, what a step trains, the look-up."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from tests.search.nets import SIZE, WORDS, Own, images, own
from trimtab import testing
from trimtab.core.errors import BudgetError
from trimtab.learn import Context
from trimtab.search import elastic
from trimtab.search.children import cut
from trimtab.search.samplers import Among
from trimtab.search.supernets.sortednet import Nested, family, look_up

FIT = {"batch_size": 32, "progress": False, "augment": "none"}
SPACE = {"width": (0.25, 0.5, 0.75, 1), "depth": "blocks"}


@pytest.fixture(scope="module")
def net():
    return elastic(own(), SIZE, SPACE)


# -- nesting


def test_resnet_34_has_the_counts_of_the_papers_grid():
    model = tt.create_model("resnet34", num_classes=10, img_size=32)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)  # the stem for CIFAR
    net = elastic(model, (3, 32, 32), SPACE, order=None)
    stages = {"depth.layer1": 3, "depth.layer2": 3, "depth.layer3": 5, "depth.layer4": 2}  # blocks that may go

    def child(width: float = 1, depths: tuple[int, ...] = (3, 4, 6, 3)) -> tuple[int, float]:
        arch = {g.name: width for g in net.space.genes if g.name.startswith("width")}
        first = (0, 1, 1, 1)  # the blocks that change the shape stay
        arch |= {name: d - f for name, d, f in zip(stages, depths, first, strict=True)}
        cost = net.cost(arch)
        return cost["params"], round(cost["macs"] / 1e6, 2)

    assert child() == (21_282_122, 1159.40)
    assert child(0.75) == (11_975_674, 652.50)
    assert child(0.5) == (5_326_506, 290.29)
    assert child(0.25) == (1_334_618, 72.80)
    assert child(depths=(2, 3, 5, 2)) == (15_011_402, 857.41)
    assert child(depths=(2, 2, 2, 2)) == (11_173_962, 555.42)
    assert child(depths=(1, 1, 1, 1)) == (4_903_242, 253.43)


def test_the_family_is_every_width_with_every_depth_of_every_stage_sorted(net):
    members = family(net)
    macs = [net.cost(a)["macs"] for a in members]
    assert len(members) == 4 * (3 * 2) and macs == sorted(macs)
    assert members[0] == net.space.min() and members[-1] == net.space.max()
    seen = {(a["width.stem"], a["depth.first"], a["depth.second"]) for a in members}
    assert seen == {(w, *d) for w in SPACE["width"] for d in itertools.product((1, 2, 3), (1, 2))}


def test_a_network_is_the_beginning_of_every_larger_one(net):
    """Of networks of which one is smaller in width and in depth, each tensor of it is a corner of the other's."""
    chain = [net.space.scale(f) for f in (0, 0.5, 1)]
    children = [dict(net.extract(a).named_parameters()) for a in chain]
    for small, large in itertools.pairwise(children):
        assert set(small) <= set(large)
        for name, t in small.items():
            assert torch.equal(t, cut(large[name], tuple(t.shape)))
    x = images(net)
    net.model.eval()
    for arch in chain:
        torch.testing.assert_close(net.extract(arch)(x), net(x, arch), rtol=0, atol=1e-6)


# -- one step


def test_what_a_network_lacks_gets_no_gradient(net, step):
    arch = net.space.min()
    objective = net.objective(Among(net.space, [arch]), distil=False)
    got = step(net, objective)
    used = net.child(arch).use(net.model)
    assert got["first.2.conv1.weight"] is None and got["second.1.conv3.weight"] is None  # blocks that it leaves out
    for name, gradient in got.items():
        if gradient is not None:
            assert not gradient[used[name] == 0].any() and gradient[used[name] == 1].any()
    assert sum(int(u.sum()) for u in used.values()) == net.cost(arch)["params"]


def test_what_a_step_expects_is_the_weighted_sum_over_the_family(net, batch):
    """Drawing every network once, weighted with its probability, gives the gradient of the whole objective."""
    members = family(net)
    p = np.random.default_rng(0).dirichlet(np.ones(len(members)))
    net.model.train().zero_grad()
    for arch, weight in zip(members, p, strict=True):
        (weight * F.cross_entropy(net(batch.image, arch), batch.label)).backward()
    drawn = {n: q.grad.clone() for n, q in net.model.named_parameters()}
    net.model.zero_grad()
    sum(w * F.cross_entropy(net(batch.image, a), batch.label) for a, w in zip(members, p, strict=True)).backward()
    for name, q in net.model.named_parameters():
        torch.testing.assert_close(drawn[name], q.grad, rtol=1e-4, atol=1e-6)


def test_gradients_of_a_step_are_averaged_over_batches_with_networks_of_their_own(data):
    """One step of four batches: what `fit` does is the mean of four separate gradients."""
    net = elastic(own(), SIZE, {"depth": "blocks"})
    members = family(net)
    start = copy.deepcopy(net.model)
    few = data.subset({"train": 128}, seed=0)
    tt.fit(
        net.model, few, Nested(net, members, seed=7), epochs=1, accum=4, lr=0.1, opt="momentum", momentum=0.0,
        weight_decay=0.0, sched="constant", warmup=0.0, val=None, **FIT,
    )  # fmt: skip
    sampler = Among(net.space, members, seed=7)
    start.train().zero_grad()
    loader = few.loader("train", batch_size=32, shuffle=True, augment="none", seed=0, epoch=0, drop_last=True)
    for b in loader:
        (arch,) = sampler.next(0)
        (F.cross_entropy(net(b["image"], arch, model=start), b["label"]) / 4).backward()
    for (name, p), (_, q) in zip(start.named_parameters(), net.model.named_parameters(), strict=True):
        moved = p if p.grad is None else p - 0.1 * p.grad
        torch.testing.assert_close(q, moved, rtol=1e-5, atol=1e-6, msg=name)


def test_each_increment_is_trained_as_often_as_counting_says(net):
    """Of n nested networks, increment j is in a share (n - j + 1) / n of the passes, and in more of the updates."""
    chain = [net.space.scale(f) for f in (0, 0.4, 0.7, 1)]
    n, accum, steps = len(chain), 4, 4000
    sampler = Among(net.space, chain, accum, seed=0)
    order = {net.space.key(a): i for i, a in enumerate(chain, 1)}
    drawn = np.array([[order[net.space.key(a)] for a in sampler.next(t)] for t in range(steps)])  # (steps, passes)
    for j in range(1, n + 1):
        assert (drawn >= j).mean() == pytest.approx((n - j + 1) / n, abs=0.01)
        updated = 1 - (1 - (n - j + 1) / n) ** accum
        assert (drawn >= j).any(1).mean() == pytest.approx(updated, abs=0.02)
    assert 1 - (1 - 1 / n) ** accum == pytest.approx(0.684, abs=5e-4)


def test_the_optimizer_moves_what_has_a_zero_gradient_and_leaves_what_has_none():
    """Two steps of SGD (lr 0.1, momentum 0.9, decay 0.01) on a one: with a gradient, then unused."""

    def second(unused):
        p = nn.Parameter(torch.ones(1))
        sgd = torch.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.01)
        p.grad = torch.ones(1)
        sgd.step()
        before = p.item()
        p.grad = unused
        sgd.step()
        return before - p.item()

    assert second(None) == 0.0
    assert second(torch.zeros(1)) == pytest.approx(0.092, abs=5e-4)


def test_a_block_that_no_network_of_a_step_had_does_not_move(data):
    net = elastic(own(), SIZE, {"depth": "blocks"})
    before = copy.deepcopy(net.model)
    objective = net.objective(Among(net.space, [net.space.min()]), distil=False)
    tt.fit(net.model, data, objective, epochs=1, lr=0.1, weight_decay=0.1, val=None, **FIT)
    assert torch.equal(net.model.first[2].conv1.weight, before.first[2].conv1.weight)
    assert not torch.equal(net.model.first[0].conv1.weight, before.first[0].conv1.weight)


def test_the_largest_network_may_be_drawn_more_often_and_alone_is_regularised(net):
    members = family(net)
    objective = Nested(net, members, full=0.5, seed=0)
    drawn = [objective._sampler.next(t)[0] for t in range(2000)]
    share = np.mean([a == members[-1] for a in drawn])
    assert share == pytest.approx(0.5, abs=0.04)
    passes = objective.arrange([members[-1], members[0]], Context())
    assert [p.regularise for p in passes] == [True, False] and not any(p.teachers for p in passes)


def test_the_objective_passes_the_battery():
    def objective():
        net = elastic(testing.toy_net(), SIZE, {"width": (0.5, 1)}, order=None)
        return Nested(net, family(net), full=0.5, seed=1)

    testing.check_objective(objective, slow=False)


# -- what comes out


@pytest.fixture(scope="module")
def trained(data):
    return tt.search.sortednet(own(), data, space=WORDS, epochs=24, lr=0.1, **FIT)


@pytest.mark.parametrize("budget", ["macs<=100%", "macs<=50%", "params<=1500", "macs<=30%"])
def test_the_largest_network_inside_a_budget_is_looked_up(trained, budget):
    net, members = trained.net, family(trained.net)
    found = trained.search(budget, evaluations=1)
    bounds = found.budget
    inside = [a for a in members if bounds.check(net.cost(a)).ok]
    assert found.arch == inside[-1] and len(found.tried) == 1
    table = trained.search(budget)
    assert table.arch == found.arch and len(table.tried) == len(inside)


def test_nothing_is_looked_up_outside_the_family(trained):
    with pytest.raises(BudgetError, match="cannot be met: the smallest network has"):
        trained.search("macs<=1")


def test_one_checkpoint_holds_the_family(trained):
    whole = sum(p.numel() for p in own().parameters())
    assert sum(p.numel() for p in trained.net.model.parameters()) == whole
    model = trained.best("macs<=40%", evaluations=1)
    assert type(model) is Own and sum(p.numel() for p in model.parameters()) < whole


def test_every_network_of_the_family_has_learned(trained, data):
    alone = elastic(own(), SIZE, WORDS)
    tt.fit(alone.model, data, epochs=6, lr=0.1, val=None, **FIT)  # as many updates
    small = family(trained.net)[:4]
    ours, sliced = ([net.accuracy(a, data, split="test") for a in small] for net in (trained.net, alone))
    assert np.mean(ours) > np.mean(sliced) + 0.1


def test_look_up_takes_the_place_of_a_search(net, data):
    found = net.search(data, "macs<=60%", method=look_up([net.space.min()]), evaluations=3)
    assert found.arch == net.space.min()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"full": 1.5}, ValueError, "full must be a probability"),
        ({"accum": 0}, ValueError, "accum must be a positive integer"),
        ({"budget": "macs<=1"}, BudgetError, "cannot be met"),
    ],
)
def test_bad_input_is_refused(data, given, error, message):
    with pytest.raises(error, match=message):
        tt.search.sortednet(own(), data, space={"depth": "blocks"}, **given)
