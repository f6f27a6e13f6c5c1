"""BigNAS: its space, its five rules, and what comes out."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from tests.models.test_mbconv import cost, unused
from tests.search.nets import GENES, SIZE, WORDS, Own, build, images, own
from trimtab.core.artifact import InputSpec
from trimtab.core.errors import BudgetError
from trimtab.learn import Context, soft_ce
from trimtab.models.classify.mbconv import MBConvNet
from trimtab.search import Sandwich, Space, elastic
from trimtab.search.supernets.bignas import SPACE, mobile, schedule, silence

bignas = importlib.import_module("trimtab.search.supernets.bignas")

FIT = {"batch_size": 32, "progress": False, "augment": "none"}

# -- the space


def test_the_space_has_the_size_of_the_papers_table():
    assert Space(SPACE).size() == 235_929_600


@pytest.mark.parametrize(("which", "params", "macs"), [("min", 5_653_016, 219.38), ("max", 19_724_664, 1899.78)])
def test_smallest_and_largest_network_have_the_counts_of_the_community_code(which, params, macs):
    genes = getattr(Space(SPACE), which)()
    side = genes.pop("resolution")
    with torch.device("meta"):
        net = mobile(se_of="expanded", **genes)
    found = cost(net, side)
    assert found[0] + unused(net) == params and found[1] == pytest.approx(1e6 * macs, abs=5000)


def test_squeezing_by_the_input_gives_the_papers_sizes():
    """BigNASModel-S has 4.5 M parameters; squeezing by the expanded channels, no network has fewer than 5.6 M."""
    genes = {name: choices[0] for name, choices in SPACE.items() if name != "resolution"}
    with torch.device("meta"):
        assert cost(mobile(**genes), 192)[0] < 4.5e6 < 5.6e6 > cost(mobile(se_of="expanded", **genes), 192)[0] - 1e5


def small(*, width: int, depth: int, kernel: int) -> MBConvNet:
    """The paper's kind of network, for tests."""
    stages = [
        {"width": 8, "expand": 1, "se": True},
        {"width": width, "depth": depth, "kernel": kernel, "expand": 2, "stride": 2, "se": True},
    ]
    return tt.create_model(
        "mbconv_net", stem=8, stem_stride=1, stages=stages, neck=24, se_of="input", num_classes=10, in_chans=1
    )


KINDS = {"width": (8, 12, 16), "depth": (1, 2, 3), "kernel": (3, 5)}

# -- initialisation


@pytest.mark.parametrize("kind", ["paper", "own"])
def test_at_the_start_depth_changes_nothing(kind):
    """With the statistics of the batch, dropped blocks being identities."""
    if kind == "paper":
        net = elastic(small, SIZE, KINDS)
    else:
        net = elastic(Own(), SIZE, {"depth": "blocks"})
        assert silence(net.model, SIZE) == [f"{s}.{i}.bn3" for s, n in (("first", 3), ("second", 2)) for i in range(n)]
    net.model.train()
    x = images(net, 16)
    whole = net.space.max()
    archs = [a for a in net.space.enumerate() if all(a[g] == whole[g] for g in a if not g.startswith("depth"))]
    assert len(archs) == (3 if kind == "paper" else 6)
    for arch in archs:
        assert torch.equal(net(x, arch), net(x, whole))


def test_silence_leaves_other_norms_and_the_mode_alone():
    model = own().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    silent = silence(model, SIZE)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {f"{n}.{leaf}" for n in silent for leaf in ("weight", "bias") if before[f"{n}.{leaf}"].any()}
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_only_a_new_network_is_silenced_unless_told(data, monkeypatch):
    monkeypatch.setattr(bignas, "train", lambda net, *a, **k: net)

    def silent(network, **given):
        net = bignas.bignas(network, data, space={"depth": "blocks"}, **given)
        return [not b.bn3.weight.any() for b in net.model.first]

    assert silent(Own()) == [True] * 3 and silent(own()) == [False] * 3
    assert silent(own(), zero_gamma=True) == [True] * 3 and silent(Own(), zero_gamma=False) == [False] * 3


# -- one step


def test_a_step_is_the_sum_and_only_the_largest_reaches_what_the_others_lack(step, batch):
    net = elastic(build, SIZE, GENES)
    objective = net.objective("sandwich", n=2, smoothing=0.1, seed=3)
    got = step(net, objective)
    archs = Sandwich(net.space, 2, seed=3).next(0)
    net.model.zero_grad()
    logits = net.model(batch.image)
    soft_ce(logits, batch.label, smoothing=0.1).backward()
    alone = {n: p.grad.clone() for n, p in net.model.named_parameters()}
    uses = [net.child(a).use(net.model) for a in archs[1:]]
    for arch in archs[1:]:
        F.cross_entropy(net(batch.image, arch), logits.detach().softmax(-1)).backward()
    only_largest = 0
    for name, p in net.model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-5, atol=1e-7)
        outside = sum(u[name] for u in uses) == 0
        only_largest += int(outside.sum())
        assert torch.equal(got[name][outside], alone[name][outside])
    assert only_largest > 100


def test_the_loss_of_a_child_is_least_where_it_says_what_its_teacher_says(batch):
    teacher = torch.randn(16, 10).softmax(-1)
    entropy = float(-(teacher * teacher.log()).sum(1).mean())
    logits = teacher.log().requires_grad_()
    loss = soft_ce(logits, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(entropy, abs=1e-6) and logits.grad.abs().max() < 1e-7
    assert (soft_ce(torch.randn(16, 10), teacher)) > entropy


def test_dropout_leaves_no_trace_in_the_smallest(step):
    """What the smallest network adds to a step is the same with dropout and without, given the same teacher."""
    parts = []
    for dropout in (0.0, 0.5):
        net = elastic(own(dropout=dropout), SIZE, WORDS, order=None)
        net.model.train()
        x = images(net, 16)
        target = torch.full((16, 10), 0.1)
        net.model.zero_grad()
        soft_ce(net(x, net.space.min()), target).backward()
        parts.append([p.grad.clone() for p in net.model.parameters() if p.grad is not None])
        passes = net.objective()._first_teaches(Sandwich(net.space).next(0), Context())
        assert [p.regularise for p in passes] == [True, False, False, False]
    assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True))


# -- learning rate


def test_the_learning_rate_meets_its_floor_after_236_epochs():
    epochs = 360
    lr = schedule(warmup=0.0, every=2.4 / epochs)
    floor = 2.4 * math.log(0.05) / math.log(0.97)
    assert floor == pytest.approx(236.05, abs=0.01)
    for t in (0, 2.4, 100, 236):
        assert lr(t / epochs) == pytest.approx(max(0.05, 0.97 ** (t / 2.4)))
    assert lr(236.06 / epochs) == lr(1.0) == 0.05 < lr(236.0 / epochs)
    warm = schedule()
    assert warm(0.0) == 0.0 and warm(2.5 / 360) == pytest.approx(0.5) and warm(5 / 360) == 1.0


# -- what comes out


@pytest.fixture(scope="module")
def trained(data):
    return tt.search.bignas(own(), data, space=WORDS, epochs=8, lr=0.1, **FIT)


def test_best_is_a_plain_network_inside_the_budget_that_learns_on(trained, data, tmp_path):
    model = trained.best("macs<=50%", evaluations=8)
    assert type(model) is Own
    assert 2 * tt.measure(model, SIZE).macs <= tt.measure(own(), SIZE).macs
    tt.save(model, tmp_path)
    x = images(trained.net)
    assert torch.equal(tt.load(tmp_path, base=Own())(x), model(x))
    before = tt.evaluate(model, data, "val")["loss"]
    tt.fit(model, data, epochs=3, lr=0.02, keep="last", **FIT)
    assert tt.evaluate(model, data, "val")["loss"] < before


def test_the_largest_network_has_statistics_of_its_own(trained, data):
    again = trained.net.accuracy(trained.net.space.max(), data)
    assert tt.evaluate(trained.net.model, data, "val")["accuracy"] == pytest.approx(again, abs=1e-6)


def test_children_are_better_than_slices_of_a_network_trained_alone(trained, data):
    alone = elastic(own(), SIZE, WORDS)
    tt.fit(alone.model, data, epochs=8, lr=0.1, **FIT)
    arch = trained.net.space.min()
    ours, sliced = (net.accuracy(arch, data, split="test") for net in (trained.net, alone))
    assert ours > sliced + 0.1


def test_a_network_of_the_papers_kind_runs_in_onnx_and_loads_by_name(data, tmp_path):
    found = tt.search.bignas(small, data, space=KINDS, epochs=1, **FIT)
    arch = found.net.space.sample(np.random.default_rng(0))
    model = found.net.calibrate(found.net.extract(arch), data)
    x = images(found.net)
    found.net.model.eval()
    torch.testing.assert_close(found.net.extract(arch)(x), found.net(x, arch), rtol=0, atol=1e-5)
    tt.save(model, tmp_path / "a")
    assert torch.equal(tt.load(tmp_path / "a")(x), model(x))
    tt.export(model, tmp_path / "a.onnx", spec=InputSpec(SIZE, (0.0,), (1.0,)))
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"))
    seen = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(seen, model(x).softmax(-1).detach() if seen.min() >= 0 else model(x).detach(), atol=1e-4)


def test_the_same_call_gives_the_same_weights_and_what_is_done_is_not_done_again(data, tmp_path, monkeypatch):
    def once(**given):
        return tt.search.bignas(own(), data, space={"depth": "blocks"}, epochs=1, seed=3, **FIT, **given)

    a, b = once(), once(out=tmp_path)
    first = b.search("macs<=80%", evaluations=5)
    monkeypatch.setattr("trimtab.search.passes.Passes.losses", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr("trimtab.search.supernet.Elastic.accuracy", lambda *a, **k: pytest.fail("measured again"))
    c = once(out=tmp_path)
    again = c.search("macs<=80%", evaluations=5)
    assert again.arch == first.arch and again.accuracy == first.accuracy
    for name, t in a.net.model.state_dict().items():
        assert torch.equal(t, b.net.model.state_dict()[name]) and torch.equal(t, c.net.model.state_dict()[name])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"budget": "params<=10"}, BudgetError, "cannot be met: the smallest network has"),
        ({"floor": 2}, ValueError, "floor must be a share of the peak"),
        ({"decay": 0}, ValueError, r"decay must be in \(0, 1\]"),
        ({"space": {"width": (0, 1)}}, ValueError, "width must be rising shares"),
        ({"space": {"widht": (0.5, 1)}}, ValueError, "space of a network must be of width, depth, resolution"),
        ({"n": -1}, ValueError, "n must not be negative"),
        ({"smoothing": 1.0}, ValueError, "smoothing must be in"),
    ],
)
def test_bad_input_is_refused_before_training(data, given, error, message, monkeypatch):
    monkeypatch.setattr("trimtab.search.trained.fit", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(error, match=message):
        tt.search.bignas(own(), data, **{"space": WORDS, **given})


def test_an_interruption_is_not_a_result(data, monkeypatch):
    monkeypatch.setattr("trimtab.search.trained.fit", lambda *a, **k: SimpleNamespace(stopped="interrupted"))
    with pytest.raises(KeyboardInterrupt):
        tt.search.bignas(own(), data, space={"depth": "blocks"})


def test_a_network_without_norms_has_nothing_to_silence():
    assert silence(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), SIZE) == []
