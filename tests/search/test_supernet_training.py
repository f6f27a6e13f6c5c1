"""Training with shared weights, and searching afterwards."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from tests.search.nets import GENES, SIZE, WORDS, Own, build, own
from trimtab.core.budget import Budget
from trimtab.core.errors import BudgetError, DataError, MissingExtra
from trimtab.learn import Batch, Classify, Context, backward_all, soft_ce
from trimtab.report import pareto_svg
from trimtab.search import Chain, Pass, Passes, Sandwich, Space, elastic
from trimtab.search.candidates import Candidates
from trimtab.search.methods import METHODS, run

FIT = {"epochs": 2, "batch_size": 32, "progress": False, "augment": "none"}


@pytest.fixture(scope="module")
def data():
    return tt.load_data("digits", limit=600)


def batch(n=16, classes=10):
    g = torch.Generator().manual_seed(0)
    return Batch(image=torch.randn(n, *SIZE, generator=g), label=torch.randint(classes, (n,), generator=g))


def step(net, objective, b=None):
    """Gradients of one step, by name."""
    net.model.train().zero_grad()
    b = batch() if b is None else b
    backward_all(lambda: objective.losses(net.model, b, Context()))
    return {n: p.grad.clone() for n, p in net.model.named_parameters() if p.grad is not None}


# -- one step


def test_a_sandwich_step_is_the_sum_of_its_passes():
    net, b = elastic(build, SIZE, GENES), batch()
    got = step(net, net.objective(seed=3), b)
    archs = Sandwich(net.space, 2, seed=3).next(0)
    net.model.zero_grad()
    logits = net.model(b.image)
    soft_ce(logits, b.label).backward()
    target = logits.detach().softmax(-1)
    for arch in archs[1:]:
        F.cross_entropy(net(b.image, arch), target).backward()
    for name, p in net.model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-5, atol=1e-7)


def test_distilling_a_network_into_itself_has_no_gradient():
    net = elastic(build, SIZE, GENES)
    full = net.space.max()
    taught = net.objective(Chain(net.space, [full, full]), temperature=2.0)
    alone = net.objective(Chain(net.space, [full]))
    a, b = step(net, taught), step(net, alone)
    assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)


def test_teachers_are_averaged_and_weights_count():
    net, b = elastic(build, SIZE, GENES), batch()
    archs = [net.space.max(), net.space.scale(0.5), net.space.min()]

    def arrange(archs, ctx):
        return [Pass(archs[0]), Pass(archs[1]), Pass(archs[2], teachers=(0, 1), weight=0.3)]

    got = step(net, net.objective(Chain(net.space, archs), arrange=arrange), b)
    net.model.zero_grad()
    seen = [net(b.image, a) for a in archs]
    target = torch.stack([z.detach().softmax(-1) for z in seen[:2]]).mean(0)
    (soft_ce(seen[0], b.label) + soft_ce(seen[1], b.label) + 0.3 * soft_ce(seen[2], target)).backward()
    for name, p in net.model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-5, atol=1e-7)


def test_only_the_largest_is_regularised():
    net = elastic(own(dropout=0.9), SIZE, WORDS)
    net.model.train()
    x, small = batch().image, net.space.min()
    assert torch.equal(net(x, small), net(x, small))
    assert not torch.equal(net(x, small, regularise=True), net(x, small, regularise=True))
    torch.manual_seed(0)
    passes = net.objective()._first_teaches(net.objective()._sampler.next(0), Context())
    assert [p.regularise for p in passes] == [True, False, False, False]


def test_uniform_passes_use_the_labels_only():
    net = elastic(build, SIZE, GENES)
    objective = net.objective("uniform", n=3)
    passes = objective.arrange(objective._sampler.next(0), Context())
    assert len(passes) == 3 and not any(p.teachers for p in passes)


def test_without_extra_children_it_is_plain_training():
    net = elastic(own(), SIZE, {"width": (0.5, 1)})
    objective = net.objective(Chain(net.space, [net.space.max()]))
    a = step(net, objective)
    model = copy.deepcopy(net.model).train()
    model.zero_grad()
    b = batch()
    Classify().losses(model, b, Context()).backward()
    assert all(torch.equal(a[n], p.grad) for n, p in model.named_parameters())


# -- tt.fit


def test_objective_passes_the_battery():
    from trimtab import testing

    def objective():
        return elastic(testing.toy_net(), (1, 8, 8), {"width": (0.5, 1)}, order=None).objective(seed=1)

    testing.check_objective(objective, slow=False)


class Killed(Exception):
    pass


class Dying(Passes):
    """Fails once, before a step; to the checkpoint it is the objective it was made of."""

    @classmethod
    def of(cls, objective, at):
        self = cls.__new__(cls)
        self.__dict__.update(objective.__dict__)
        self._at = at
        return self

    def losses(self, model, batch, ctx):
        if ctx.step == self._at:
            raise Killed
        return super().losses(model, batch, ctx)


Dying.__qualname__ = Passes.__qualname__


def test_killed_and_resumed_training_is_bit_exact(data, tmp_path):
    def supernet():
        net = elastic(build, SIZE, GENES, seed=1)
        return net, net.objective(seed=5)

    whole, objective = supernet()
    tt.fit(whole.model, data, objective, **FIT)
    broken, objective = supernet()
    dying = Dying.of(objective, at=15)
    with pytest.raises(Killed):
        tt.fit(broken.model, data, dying, out=tmp_path, checkpoint_every=0, **FIT)
    torch.manual_seed(99)
    again, objective = supernet()
    with torch.no_grad():
        for p in again.model.parameters():
            p.mul_(3.0)  # what the weights were must not matter
    tt.fit(again.model, data, objective, out=tmp_path, checkpoint_every=0, **FIT)
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), again.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


# -- calibration


def test_calibration_finds_the_mean_and_variance_of_what_a_child_sees(data):
    net = elastic(own(), SIZE, WORDS)
    arch = net.space.min()
    model = net.calibrate(net.extract(arch), data, batches=2, batch_size=64)
    loader = data.loader("train", batch_size=64, shuffle=True, augment="none", seed=0)
    images = [b["image"] for _, b in zip(range(2), loader)]
    seen = [model.stem(x) for x in images]
    mean = torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0)
    var = torch.stack([s.var((0, 2, 3)) for s in seen]).mean(0)
    torch.testing.assert_close(model.bn.running_mean, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.bn.running_var, var, rtol=1e-5, atol=1e-5)


def test_accuracy_asked_of_the_supernet_is_that_of_the_delivered_network(data):
    net = elastic(own(), SIZE, WORDS)
    tt.fit(net.model, data, net.objective(), **FIT)
    arch = net.space.sample(np.random.default_rng(0))
    model = net.calibrate(net.extract(arch), data)
    assert net.accuracy(arch, data) == pytest.approx(tt.evaluate(model, data, "val")["accuracy"], abs=1e-6)


# -- search


def landscape(space, limit=60, budget="macs<=60", cost=None):
    """A space with a known optimum: accuracy is a smooth function with an interaction, cost grows with every gene."""
    value = {name: {c: i for i, c in enumerate(g.choices)} for name, g in ((g.name, g) for g in space.genes)}

    def score(a):
        x = np.array([value[n][c] for n, c in a.items()], float)
        return float(1 - 1 / (1 + x @ np.arange(1, len(x) + 1)) + 0.01 * np.sin(x[0] * x[-1]))

    def macs(a):
        return {"macs": int(sum((i + 2) * value[n][c] for i, (n, c) in enumerate(a.items()))), "params": 1}

    return Candidates(space, cost or macs, lambda a: {}, score, Budget(budget), limit)


SMALL = Space({f"g{i}": (0, 1, 2, 3, 4) for i in range(4)})  # 625 networks


def optimum(budget):
    every = landscape(SMALL, limit=10**6, budget=budget)
    run("exhaustive", every, 0)
    return every


@pytest.mark.parametrize("method", ["coarse_to_fine", "evolution", "tpe"])
@pytest.mark.parametrize("budget", ["macs<=20", "macs<=35, macs>=12"])
def test_searches_find_nearly_the_best_and_never_leave_the_budget(method, budget):
    best = optimum(budget).best
    found = landscape(SMALL, limit=120, budget=budget)
    run(method, found, 0)
    assert len(found.tried) <= 120
    assert all(found.budget.check(t.cost).ok for t in found.tried.values())
    assert found.best.accuracy >= best.accuracy - 0.01


@pytest.mark.parametrize("method", METHODS)
def test_a_search_is_the_same_again(method):
    a, b = landscape(SMALL, limit=30), landscape(SMALL, limit=30)
    run(method, a, 4)
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    run(method, b, 4)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert list(a.tried) == list(b.tried) and a.best == b.best


@pytest.mark.parametrize("method", METHODS)
def test_a_space_that_is_smaller_than_the_evaluations_ends_the_search(method):
    tiny = landscape(Space({"a": (0, 1), "b": (0, 1)}), limit=50)
    run(method, tiny, 0)
    assert len(tiny.tried) <= 4 and tiny.best.arch == {"a": 1, "b": 1}


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_no_network_meets_says_what_the_smallest_costs(method):
    with pytest.raises(BudgetError, match="params<=0 cannot be met: the smallest network has 1"):
        run(method, landscape(SMALL, budget="params<=0"), 0)


def test_coarse_to_fine_beats_the_grid_alone():
    found = landscape(SMALL, limit=100, budget="macs<=20")
    run("coarse_to_fine", found, 0)
    coarse = max(t.accuracy for t in list(found.tried.values())[:50])
    assert found.best.accuracy >= coarse


def test_evolution_without_pymoo_says_how_to_get_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pymoo", None)
    with pytest.raises(MissingExtra, match=r"trimtab\[search\]"):
        run("evolution", landscape(SMALL), 0)


@pytest.fixture(scope="module")
def trained(data):
    net = elastic(own(), SIZE, WORDS)
    tt.fit(net.model, data, net.objective(), **{**FIT, "epochs": 6}, lr=0.05)
    return net


@pytest.mark.parametrize("budget", ["macs<=50%", "params<=2000", "macs<=60%, size<=20KB", "memory<=90%"])
def test_best_is_a_plain_network_inside_the_budget(trained, data, budget, tmp_path):
    model = trained.best(data, budget, evaluations=8)
    whole = tt.measure(trained.model, SIZE)
    assert Budget(budget).resolve(whole).check(tt.measure(model, SIZE)).ok
    assert type(model) is Own and not any(m._forward_hooks for m in model.modules())
    tt.save(model, tmp_path)
    x = batch().image
    assert torch.equal(tt.load(tmp_path, base=Own())(x), model(x))


def test_a_trained_supernet_is_saved_as_any_network_and_made_elastic_again(trained, tmp_path):
    tt.save(trained.model, tmp_path)
    again = elastic(tt.load(tmp_path, base=Own()), SIZE, WORDS, order=None)
    x, small = batch().image, trained.space.min()
    trained.model.eval()
    assert torch.equal(again(x, small), trained(x, small))


def test_best_learns_on(trained, data):
    model = trained.best(data, "macs<=50%", evaluations=4)
    before = tt.evaluate(model, data, "val")["loss"]
    tt.fit(model, data, epochs=3, lr=0.02, progress=False, keep="last")
    assert tt.evaluate(model, data, "val")["loss"] < before


def test_sandwich_with_distillation_serves_the_smallest_better_than_training_the_largest_alone(trained, data):
    alone = elastic(own(), SIZE, WORDS)
    tt.fit(alone.model, data, epochs=6, lr=0.05, batch_size=32, progress=False, augment="none")
    small = trained.space.min()
    assert trained.accuracy(small, data) > alone.accuracy(small, data) + 0.1


def test_calibration_matters(trained, data):
    arch = {**trained.space.max(), "depth.first": 1, "depth.second": 1}
    stale = tt.evaluate(trained.extract(arch), data, "val")["loss"]
    model = trained.calibrate(trained.extract(arch), data)
    assert tt.evaluate(model, data, "val")["loss"] < stale


def test_the_front_is_what_the_report_plots(trained, data):
    found = trained.search(data, "macs<=70%", evaluations=10)
    front = found.front()
    assert [t.cost["macs"] for t in front] == sorted(t.cost["macs"] for t in front)
    assert [t.accuracy for t in front] == sorted({t.accuracy for t in front})
    assert front[-1].accuracy == found.accuracy
    dominated = [t for t in found.tried if t not in front]
    assert all(any(f.accuracy >= t.accuracy and f.cost["macs"] <= t.cost["macs"] for f in front) for t in dominated)
    run_ = found.asdict()
    assert sum(row["chosen"] for row in run_["tried"]) == 1
    assert "<svg" in pareto_svg(run_) and run_["budget"]["rows"][0]["ok"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda n, d: n.objective("all"), ValueError, "passes must be"),
        (lambda n, d: n.objective(Sandwich(n.space), n=3), ValueError, "a Sampler knows"),
        (lambda n, d: n.objective(temperature=0.0), ValueError, "temperature must be positive"),
        (lambda n, d: n.objective(smoothing=1.0), ValueError, "smoothing must be in"),
        (lambda n, d: n.search(d, "macs<=50%", method="luck"), ValueError, "method must be one of"),
        (lambda n, d: n.search(d, "macs<=50%", evaluations=0), ValueError, "evaluations must be at least 1"),
        (lambda n, d: n.search(d, "macs<=50%", split="dev"), DataError, "split must be one of"),
        (lambda n, d: n.search(d, "macs<=10"), BudgetError, "cannot be met: the smallest network has"),
        (lambda n, d: n.best(d, "accuracy>=1", evaluations=2), BudgetError, "train the supernet longer"),
    ],
)
def test_bad_input_is_refused(trained, data, call, error, message):
    with pytest.raises(error, match=message):
        call(trained, data)


def test_a_teacher_that_comes_later_is_refused():
    net = elastic(build, SIZE, GENES)
    objective = Passes(net, Sandwich(net.space), arrange=lambda archs, ctx: [Pass(archs[0], teachers=(1,))])
    with pytest.raises(ValueError, match="must be earlier passes"):
        step(net, objective)


def test_a_supernet_with_too_few_classes_is_refused(data):
    net = elastic(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(288, 5)), SIZE, {"width": (0.5, 1)})
    with pytest.raises(ValueError, match="at least 10 classes"):
        tt.fit(net.model, data, net.objective(), **FIT)
