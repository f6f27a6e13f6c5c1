"""DepS: the delay, the ramp, how gradients are put together."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from torch.nn import functional as F

import trimtab as tt
from tests.models.test_mbconv import cost, mobilenet_v3
from tests.search.nets import GENES, SIZE, WORDS, Own, build, images, own
from trimtab import testing
from trimtab.core.errors import BudgetError
from trimtab.core.meta import shapes_only
from trimtab.learn import Batch, Classify, Context, Schedule, backward_all, soft_ce
from trimtab.search import Sandwich, Space, elastic
from trimtab.search.supernets.deps import Shrinking

FIT = {"batch_size": 32, "progress": False, "augment": "none"}
LR = Schedule("cosine", least=2.5e-3 / 0.1625)


@pytest.fixture(scope="module")
def net():
    return elastic(build, SIZE, GENES)


# -- the ramp


@pytest.mark.parametrize(("start", "ramp", "multiplier"), [(0.5, 5 / 180, 1.0), (0.75, 0.2, 0.5), (0.5, 0.5, 2.0)])
def test_the_learning_rate_of_the_others_rises_in_a_line(net, start, ramp, multiplier):
    beta = Shrinking(net, LR, start=start, ramp=ramp, multiplier=multiplier).beta
    assert beta(0.0) == beta(start - ramp) == 0.0
    assert beta(start) == beta(0.5 * (1 + start)) == beta(1.0) == multiplier
    top = multiplier * LR(start)
    for i in range(101):
        t = start - ramp + ramp * i / 100
        assert beta(t) * LR(t) == pytest.approx(top * i / 100, abs=1e-9)


def test_the_cosine_covers_the_whole_run_and_ends_in_a_floor():
    assert LR(0.0) == 1.0 and LR(0.5) == pytest.approx(0.5)
    assert LR(1.0) == LR(0.97) == pytest.approx(2.5e-3 / 0.1625)


def passes_of(objective, progress):
    archs = objective._sampler.next(0)
    return objective.arrange(archs, Context(progress=progress))


def test_before_the_ramp_only_the_full_network_is_trained(net):
    objective = Shrinking(net, LR, start=0.5, ramp=0.1)
    assert [p.arch for p in passes_of(objective, 0.39)] == [net.space.max()]
    full, *others = passes_of(objective, 0.45)
    assert full.regularise and not full.teachers and full.weight == 1.0
    assert len(others) == 3 and others[-1].arch == net.space.min()
    assert all(p.teachers == (0,) and not p.regularise and p.weight == objective.beta(0.45) for p in others)


# -- what it costs


@pytest.mark.parametrize(
    ("kernels", "smallest", "mean", "step", "average", "share"),
    [((7,), 151.3, 313, 1344, 955, 0.71), ((3, 5, 7), 121.3, 272, 1232, 899, 0.73)],
)
def test_half_a_run_alone_saves_what_the_paper_saves(net, kernels, smallest, mean, step, average, share):
    """MMACs per step in once-for-all's MobileNetV3 space. A network's cost is a sum over its blocks, so its mean over
    independent choices is the mean over those in which all blocks choose alike; a third block costs what a fourth does,
    so three blocks are the mean depth."""

    def mmacs(kernel, expand, depth):
        with shapes_only():
            return cost(mobilenet_v3(kernel, expand, depth), 224)[1] / 1e6

    found = statistics.fmean(mmacs(k, e, 3) for k, e in itertools.product(kernels, (3, 4, 6)))
    full, least = mmacs(max(kernels), 6, 4), mmacs(min(kernels), 3, 2)
    assert full == pytest.approx(566.2, abs=0.05) and least == pytest.approx(smallest, abs=0.05)
    assert found == pytest.approx(mean, rel=0.03)  # the paper's figure is of 60 networks
    sandwich = full + least + 2 * found
    epochs, start, ramp = 180, 95 / 180, 5 / 180  # T_0 - R at half of the run
    objective = Shrinking(net, LR, start=start, ramp=ramp)
    steps = [(e + 0.5) / epochs for e in range(epochs)]
    together = statistics.fmean(objective.beta(p) > 0 for p in steps)
    assert together == pytest.approx((epochs - 95 + 5) / epochs)
    seen = together * sandwich + (1 - together) * full
    assert sandwich == pytest.approx(step, rel=0.02) and seen == pytest.approx(average, rel=0.02)
    assert seen / sandwich == pytest.approx(share, abs=0.01)


def test_mobilenet_v3_space_has_the_size_of_the_papers():
    """Five stages alike, of two to four blocks, each with its own kernel and expansion; idle blocks do not count."""

    def stage(kernels):
        genes = {"depth": (2, 3, 4)}
        for j in range(1, 5):
            genes |= {f"kernel.{j}": kernels, f"expand.{j}": (3, 4, 6)}

        def idle(arch):
            return [f"{word}.{j}" for j in range(arch["depth"] + 1, 5) for word in ("kernel", "expand")]

        return Space(genes, idle=idle)

    assert len(list(stage((7,)).enumerate())) == 9 + 27 + 81 == 117
    assert len({stage((3, 5, 7)).key(a) for a in stage((3, 5, 7)).enumerate()}) == 9**2 + 9**3 + 9**4 == 7371
    assert f"{7371**5:.1e} {117**5:.1e}" == "2.2e+19 2.2e+10"


# -- one step


def test_at_the_start_of_the_ramp_a_step_is_that_of_plain_training(step, batch):
    """Bit by bit."""
    net = elastic(own(), SIZE, {"depth": "blocks"})
    for progress in (0.0, 0.4):
        got = step(net, Shrinking(net, LR, start=0.5, ramp=0.1, smoothing=0.1), progress)
        net.model.zero_grad()
        Classify(smoothing=0.1).losses(net.model, batch, Context()).backward()
        assert all(torch.equal(got[n], p.grad) for n, p in net.model.named_parameters())


def test_in_the_ramp_gradients_of_the_others_are_scaled(step, batch, net):
    got = step(net, Shrinking(net, LR, start=0.5, ramp=0.2, smoothing=0.0, seed=3), 0.4)
    beta = 0.5 * LR(0.5) / LR(0.4)
    archs = Sandwich(net.space, 2, seed=3).next(0)
    net.model.zero_grad()
    logits = net.model(batch.image)
    soft_ce(logits, batch.label).backward()
    for arch in archs[1:]:
        (beta * F.cross_entropy(net(batch.image, arch), logits.detach().softmax(-1))).backward()
    for name, p in net.model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-5, atol=1e-7)


def test_the_gradient_of_distillation_is_a_difference_of_softmaxes():
    g = torch.Generator().manual_seed(0)
    child, full = torch.randn(4, 10, generator=g, requires_grad=True), torch.randn(4, 10, generator=g)
    (4 * soft_ce(child, full.softmax(-1))).backward()  # the loss is a mean over four images
    torch.testing.assert_close(child.grad, child.detach().softmax(-1) - full.softmax(-1), rtol=0, atol=1e-6)
    assert child.grad.sum(1).abs().max() < 1e-6


def gradients(net, batch, archs):
    """Those of every pass of a sandwich, apart."""
    net.model.train().zero_grad()
    logits = net.model(batch.image)
    found = []
    for i, arch in enumerate(archs):
        net.model.zero_grad()
        z = logits if i == 0 else net(batch.image, arch)
        (soft_ce(z, batch.label) if i == 0 else soft_ce(z, logits.detach().softmax(-1))).backward()
        found.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.model.named_parameters()})
    return found


@pytest.mark.parametrize("aggregate", ["avg", "avg_sqrt"])
def test_averages_count_each_entry_by_the_networks_that_have_it(step, batch, net, aggregate):
    given = {"start": 0.5, "ramp": 0.2, "smoothing": 0.0, "seed": 3}
    got = step(net, Shrinking(net, LR, aggregate=aggregate, **given), 0.4)
    beta = 0.5 * LR(0.5) / LR(0.4)
    archs = Sandwich(net.space, 2, seed=3).next(0)
    apart = gradients(net, batch, archs)
    uses = [net.child(a).use(net.model) for a in archs]
    alone = 0
    for name in got:
        total = apart[0][name] + beta * sum(g[name] for g in apart[1:])
        weight = 1 + beta * sum(u[name] for u in uses[1:])
        weight = weight.sqrt() if aggregate == "avg_sqrt" else weight
        torch.testing.assert_close(got[name], total / weight, rtol=1e-4, atol=1e-6)
        outside = sum(u[name] for u in uses[1:]) == 0
        torch.testing.assert_close(got[name][outside], apart[0][name][outside], rtol=1e-5, atol=1e-7)
        alone += int(outside.sum())
    assert alone > 100
    assert not any(p._backward_hooks for p in net.model.parameters())


def test_the_average_of_two_equal_gradients_is_that_gradient(batch):
    """The full network twice: once from the labels, once from its own softmax with those labels as target."""
    net = elastic(build, SIZE, GENES)
    objective = Shrinking(net, LR, start=0.0, n=0, aggregate="avg", smoothing=0.0)
    full = net.space.max()
    same = [p.__class__(full) for p in passes_of(objective, 1.0)]
    assert len(same) == 2
    net.model.train().zero_grad()
    backward_all(lambda: objective._divided(same, net.model, batch))
    got = {n: p.grad.clone() for n, p in net.model.named_parameters()}
    net.model.zero_grad()
    soft_ce(net(batch.image, full), batch.label).backward()
    for name, p in net.model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-5, atol=1e-7)


def test_averages_add_up_over_accumulated_batches(net, batch):
    """Each batch has networks of its own; what was added before is not divided again."""
    halves = [Batch({k: v[i::2] for k, v in batch.items()}) for i in (0, 1)]

    def accumulate(batches):
        objective = Shrinking(net, LR, start=0.0, aggregate="avg", smoothing=0.0, seed=1)
        net.model.train().zero_grad()
        found = []
        for b in batches:
            backward_all(lambda b=b: objective.losses(net.model, b, Context(progress=1.0)))
            found.append({n: p.grad.clone() for n, p in net.model.named_parameters()})
        return found

    first, both = accumulate(halves)
    objective = Shrinking(net, LR, start=0.0, aggregate="avg", smoothing=0.0, seed=1)
    objective._sampler.next(0)
    net.model.zero_grad()
    backward_all(lambda: objective.losses(net.model, halves[1], Context(progress=1.0)))
    for name, p in net.model.named_parameters():
        torch.testing.assert_close(both[name], first[name] + p.grad, rtol=1e-5, atol=1e-7)


def test_ordering_channels_leaves_the_full_network_as_it_is():
    model = own().eval()
    net = elastic(model, SIZE, WORDS, order="norm")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), net.model.parameters(), strict=True))
    x = images(net)
    torch.testing.assert_close(net.model.eval()(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("aggregate", ["sum", "avg"])
def test_the_objective_passes_the_battery(aggregate):
    """Resuming in the ramp included. The loss of a step grows when more networks have a part in it."""

    def objective():
        net = elastic(testing.toy_net(), SIZE, {"width": (0.5, 1)}, order=None)
        return Shrinking(net, LR, start=0.4, ramp=0.2, aggregate=aggregate, seed=1)

    testing.check_objective(objective, slow=False, skip=("loss_falls",))


def test_networks_are_drawn_without_touching_the_order_of_the_data(data):
    """Runs that shrink at other times see the same batches."""
    seen = {}
    for start in (0.0, 1.0):
        net = elastic(own(), SIZE, {"depth": "blocks"})
        objective = Shrinking(net, LR, start=start)
        batches = seen.setdefault(start, [])
        losses = objective.losses

        def watch(model, b, ctx, losses=losses, batches=batches):
            batches.append(b["label"].tolist())
            return losses(model, b, ctx)

        objective.losses = watch
        tt.fit(net.model, data, objective, epochs=1, val=None, **FIT)
    assert seen[0.0] == seen[1.0]


# -- what comes out


def test_best_is_a_plain_network_and_the_smallest_has_learned(data, tmp_path):
    given = {"space": WORDS, "epochs": 10, "lr": 0.05, **FIT}
    trained = tt.search.deps(own(), data, start=0.3, **given)
    model = trained.best("macs<=50%", evaluations=6)
    assert type(model) is Own and 2 * tt.measure(model, SIZE).macs <= tt.measure(own(), SIZE).macs
    tt.save(model, tmp_path)
    x = images(trained.net)
    assert torch.equal(tt.load(tmp_path, base=Own())(x), model(x))
    never = tt.search.deps(own(), data, start=1.0, ramp=0.0, **given)
    arch = trained.net.space.min()
    ours, sliced = (t.net.accuracy(arch, data, split="test") for t in (trained, never))
    assert ours > sliced + 0.1


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"start": 1.2}, ValueError, "start must be a share of the run"),
        ({"ramp": -1}, ValueError, "ramp must be a share of the run"),
        ({"multiplier": 0}, ValueError, "multiplier must be positive"),
        ({"aggregate": "mean"}, ValueError, "aggregate must be one of sum, avg, avg_sqrt"),
        ({"sched": "onecycle"}, ValueError, "set warmup and floor instead of sched"),
        ({"budget": "macs<=1"}, BudgetError, "cannot be met"),
    ],
)
def test_bad_input_is_refused(data, given, error, message):
    with pytest.raises(error, match=message):
        tt.search.deps(own(), data, space={"depth": "blocks"}, **given)
