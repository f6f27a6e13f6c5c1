"""SECNN: what an expansion changes and what it leaves, the score, the decision, the run."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import trimtab as tt
from tests.elsewhere import python
from trimtab.core.edit import from_json, history, to_json
from trimtab.core.errors import BudgetError
from trimtab.deploy import OnnxModel
from trimtab.search.grow import self_expanding_cnn as grow
from trimtab.search.grow.self_expanding_cnn import (
    damped,
    decide,
    diagonal_score,
    expand,
    expansions_of,
    full_score,
    gradients,
    layers,
    score,
    scored,
    self_expanding_cnn,
    shape,
)  # fmt: skip

FIT = {"epochs": 3, "cooldown": 1, "samples": 32, "batch_size": 32, "lr": 0.05, "augment": "none", "progress": False}


def images(n: int = 32, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def start(seed: int = 0, **kwargs) -> nn.Module:
    """A network whose norms have seen images."""
    net = tt.create_model("secnn", **{"widths": (4, 5, 6), "depths": (2, 1, 1), "seed": seed, **kwargs})
    net.train()
    net(images(seed=1))
    return net.eval()


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def data():
    return tt.load_data("digits", limit=300)


@pytest.fixture
def tiny():
    return tt.create_model("secnn", widths=(4, 4, 4), num_classes=10, in_chans=1, img_size=8, seed=0)


# -- sizes


def test_sizes_of_the_start_and_of_inserted_layers():
    net, seen = tt.create_model("secnn", seed=0), []
    for _ in range(4):
        seen.append(params(net))
        net = expand(net, expansions_of(net)[1], images())
    assert seen == [6688, 9024, 11360, 13696]


@pytest.mark.parametrize(("w", "d"), [((16, 16, 16), (1, 1, 1)), ((16, 20, 24), (2, 3, 1)), ((8, 12, 10), (1, 4, 2))])
def test_the_parameter_formula(w, d):
    (w1, w2, w3), net = w, tt.create_model("secnn", widths=w, depths=d)
    inner = sum((n - 1) * (9 * x * x + 2 * x) for x, n in zip(w, d))
    body = 29 * w1 + 9 * w1 * w2 + 2 * w2 + 9 * w2 * w3 + 2 * w3 + inner
    assert params(net) == body + 8 * (w1 + w3) + 16 + 1280


@pytest.mark.parametrize("block", [0, 1, 2])
def test_an_expanded_network_is_as_large_as_one_built_so(block):
    net = start()
    for what, width, depth in (("layer", 0, 1), ("channels", 3, 0)):
        e = next(e for e in expansions_of(net, channels=3) if (e.what, e.block) == (what, block))
        widths, depths = [4, 5, 6], [2, 1, 1]
        widths[block] += width
        depths[block] += depth
        assert params(expand(net, e, images())) == params(tt.create_model("secnn", widths=widths, depths=depths))


# -- the function at the moment of growth


@pytest.mark.parametrize("slope", [0.01, 0.0])
def test_an_expansion_leaves_the_function_identical(slope):
    net, x = start(slope=slope), images(8, seed=3)
    for expansion in expansions_of(net, channels=3):
        grown = expand(net, expansion, images(), seed=1)
        torch.testing.assert_close(grown.eval()(x), net(x), rtol=0, atol=5e-6)
        assert params(grown) > params(net)


def test_expansion_after_expansion_leaves_it_identical_and_the_blocks_consistent():
    net, x = start(), images(8, seed=3)
    want = net(x)
    for what, block in (("layer", 0), ("channels", 0), ("layer", 0), ("channels", 2), ("layer", 2), ("channels", 1)):
        e = next(e for e in expansions_of(net, channels=2) if (e.what, e.block) == (what, block))
        net = expand(net, e, images(), seed=2).eval()
        torch.testing.assert_close(net(x), want, rtol=0, atol=2e-5)
    assert shape(net) == {"width.0": 6, "depth.0": 4, "width.1": 7, "depth.1": 1, "width.2": 8, "depth.2": 2}
    assert net.fuse.conv.in_channels == 6 + 8 == net.fuse.conv.weight.shape[1]
    product = math.prod(m.act.negative_slope for m in layers(net, 0).values())
    assert product == pytest.approx(0.01**2)  # of the two layers that were there


def test_a_dirac_layer_after_leaky_relu_is_not_the_identity_and_after_relu_it_is():
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight)
    for slope, most in ((0.0, 0.0), (0.01, 0.05)):
        act = nn.LeakyReLU(slope)
        apart = float((act(conv(act(x))) - act(x)).abs().max().detach())
        assert apart <= most and (apart > 0.01) == (slope > 0)
    split = nn.LeakyReLU(0.1)  # two of the root of the slope are one of the slope
    torch.testing.assert_close(split(conv(split(x))), nn.LeakyReLU(0.01)(x))


def test_noise_is_the_papers_start_and_nearly_preserving():
    net, x = start(), images(64, seed=3)
    y = torch.arange(64) % 10
    before = float(nn.functional.cross_entropy(net(x), y).detach())
    for expansion in expansions_of(net):
        grown = expand(net, expansion, images(), noise=1e-4).eval()
        after = float(nn.functional.cross_entropy(grown(x), y).detach())
        assert 0 < abs(after - before) < 0.01 * before
    wide = expand(net, expansions_of(net)[3], images(), noise=1e-4)
    new = wide.blocks[0].layers[0].conv.weight[4:]
    assert 5e-5 < float(new.std()) < 2e-4
    assert 0 < float(wide.fuse.conv.weight[:, 4:6].abs().max()) < 1e-3  # between the two parts that were there
    assert torch.equal(wide.fuse.conv.weight[:, :4], net.fuse.conv.weight[:, :4])
    assert torch.equal(wide.fuse.conv.weight[:, 6:], net.fuse.conv.weight[:, 4:])


def test_in_training_the_new_layer_hardly_changes_what_comes_out():
    net, x = start(), images()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):  # its statistics are those of x
            m.reset_running_stats()
            m.momentum = None
    net.train()(x)
    grown = expand(net, expansions_of(net)[0], x).train()
    torch.testing.assert_close(grown(x), copy.deepcopy(net).train()(x), rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", ["layer", "channels"])
def test_what_is_new_learns(kind):
    net, x, y = start(), images(), torch.arange(32) % 10
    e = next(e for e in expansions_of(net) if e.what == kind)
    grown = expand(net, e, x).train()
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    first = {k: v.clone() for k, v in grown.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(grown(x), y).backward()
        optimizer.step()
    moved = {k: (v - first[k]).abs() for k, v in grown.named_parameters()}
    if kind == "layer":
        assert all(float(m.max()) > 0 for k, m in moved.items() if ".next." in k)
    else:
        assert float(moved["blocks.0.layers.0.conv.weight"][4:].max()) > 0
        assert float(moved["fuse.conv.weight"][:, 4:6].max()) > 0


# -- the score


def test_each_parameter_adds_between_0_and_1_and_one_image_gives_all_of_them():
    g = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    each = [diagonal_score([g[:, [i]]]) for i in range(200)]
    assert min(each) >= 0 and max(each) <= 1 and sum(each) == pytest.approx(diagonal_score([g]))
    assert diagonal_score([g[:1]]) == pytest.approx(200)


def test_the_score_does_not_see_the_scale_of_the_loss_and_chunks_do_not_matter():
    g = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    assert diagonal_score([7 * g]) == pytest.approx(diagonal_score([g])) == pytest.approx(diagonal_score(g.split(16)))


def test_pure_noise_scores_parameters_over_images():
    g = torch.Generator().manual_seed(0)
    mean = sum(diagonal_score([torch.randn(64, 200, generator=g)]) for _ in range(200)) / 200
    assert mean == pytest.approx(200 / 64, rel=0.05)


def test_parameters_without_gradient_add_nothing():
    g = torch.randn(8, 3)
    assert diagonal_score([torch.cat([g, torch.zeros(8, 5)], 1)]) == pytest.approx(diagonal_score([g]))


def test_the_full_score_is_the_direct_solve_lies_in_0_1_and_never_falls_with_more_parameters():
    g = torch.randn(50, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, fisher = g.mean(0), g.T @ g / 50
    direct = float(mean @ torch.linalg.solve(fisher + 1e-3 * torch.eye(20, dtype=torch.float64), mean))
    assert full_score(g, damping=1e-3) == pytest.approx(direct, abs=1e-12)
    growing = [full_score(g[:, :n], damping=0.0) for n in (1, 5, 10, 15, 20)]
    assert all(0 <= s <= 1 for s in growing) and growing == sorted(growing)


def test_gradients_are_those_of_each_image_alone():
    net, x, y = start(), images(5), torch.arange(5)
    together = torch.cat(list(gradients(net, x, y, chunk=2)))
    net.zero_grad()
    nn.functional.cross_entropy(net(x[3:4]), y[3:4]).backward()
    alone = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(together[3], alone, rtol=1e-3, atol=1e-5)
    assert score(net, x[:1], y[:1]) <= params(net)


def test_new_filters_count_in_the_score_although_they_feed_nothing_yet():
    net, x, y = start(), images(1), torch.tensor([3])  # the score of one image: all parameters that matter to it
    for wider in expansions_of(net)[3:]:
        grown = expand(net, wider, x)
        filters = sum(2 * (layer.conv.weight[0].numel() + 2) for layer in layers(grown, wider.block).values())
        assert score(grown, x, y) == pytest.approx(params(grown) - filters)
        assert scored(net, [wider], x, y, penalty=0.0) == pytest.approx([params(grown)])


def test_the_penalty():
    assert damped(5.0, 1000, 100, 0.0) == damped(5.0, 0, 100, 3.0) == 5.0
    ratio = [damped(eta, 30, 100, 2.0) / damped(eta, 60, 100, 2.0) for eta in (1.0, 9.0)]
    assert ratio[0] == pytest.approx(ratio[1]) == pytest.approx(math.exp(2 * (0.36 - 0.09)))


def test_the_decision_table():
    assert decide(1, 3, 2.5) == "layer" and decide(1, 2.5, 3) == "channels" and decide(1, 1.9, 1.5) is None
    assert decide(1, 3, 3) is None  # neither is larger


def test_a_full_block_gets_no_layer():
    net = start()
    assert [e.block for e in expansions_of(net, capacity=2) if e.what == "layer"] == [1, 2]
    assert [e.block for e in expansions_of(net, capacity=1)] == [0, 1, 2]


# -- the run


def test_one_run_gives_a_family_that_is_kept_exported_and_trained_on(data, tiny, tmp_path):
    before = copy.deepcopy(tiny.state_dict())
    grown = self_expanding_cnn(tiny, data, tau=0.0, channels=4, **FIT)
    assert all(torch.equal(before[k], v) for k, v in tiny.state_dict().items())  # a copy was trained
    sizes = [t.cost["params"] for t in grown.tried]
    assert len(sizes) == 3 and sizes == sorted(sizes) == [params(m) for m in grown.family]
    assert grown.best(f"params<={sizes[1]}") in grown.family[:2]
    edits = history(grown.model).edits
    assert from_json(to_json(edits)) == edits
    assert {type(e).__name__ for e in edits} <= {"Insert", "Widen", "Narrow", "SetAttr", "Remove"}
    tt.save(grown.model, tmp_path / "net")
    again, x = tt.load(tmp_path / "net"), torch.randn(3, 1, 8, 8)
    assert torch.equal(again(x), grown.model(x))
    code = f"import trimtab as tt; print(tt.measure(tt.load({str(tmp_path / 'net')!r}), (1, 8, 8)).params)"
    assert int(python(code)) == sizes[2]
    file = tt.export(again, tmp_path / "m.onnx", data=data).path
    torch.testing.assert_close(torch.from_numpy(OnnxModel(file).logits(x.numpy())), again(x), rtol=0, atol=1e-4)
    loss = [r["loss"] for r in tt.fit(again, data, epochs=3, lr=0.02, batch_size=32, progress=False).history]
    assert loss[-1] < loss[0]
    small = tt.compress.magnitude(again, data, budget="macs<=80%")
    assert tt.measure(small, (1, 8, 8)).macs <= 0.8 * tt.measure(again, (1, 8, 8)).macs


def test_without_a_reason_to_grow_it_does_not(data, tiny):
    grown = self_expanding_cnn(tiny, data, tau=1e9, **FIT)
    assert len(grown.family) == 1 and not grown.expansions


def test_the_budget_and_the_cooldown_bound_growth(data, tiny):
    limit = round(1.3 * params(tiny))
    grown = self_expanding_cnn(tiny, data, tau=0.0, budget="params<=130%", **{**FIT, "epochs": 5})
    assert params(grown.model) <= limit and len(grown.family) > 1
    slow = self_expanding_cnn(tiny, data, tau=0.0, **{**FIT, "epochs": 5, "cooldown": 2})
    assert len(slow.expansions) == 2  # after epochs 2 and 4


def test_an_interrupted_run_goes_on_to_the_same_result(data, tiny, tmp_path, monkeypatch):
    whole = self_expanding_cnn(tiny, data, tau=0.0, **FIT)
    real, calls = grow.fit, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(grow, "fit", stopping)
    with pytest.raises(KeyboardInterrupt):
        self_expanding_cnn(tiny, data, tau=0.0, out=tmp_path, **FIT)
    resumed = self_expanding_cnn(tiny, data, tau=0.0, out=tmp_path, **FIT)
    want = whole.model.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in resumed.model.state_dict().items())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"channels": 0}, "channels must be an integer of at least 1, got 0"),
        ({"tau": -1}, "tau must not be negative"),
        ({"noise": float("nan")}, "noise must not be negative"),
        ({"fisher": "block"}, "fisher must be 'diagonal' or 'full'"),
        ({"patience": 3}, "it has no patience"),
    ],
)
def test_wrong_arguments(data, tiny, kwargs, message):
    with pytest.raises(ValueError, match=message):
        self_expanding_cnn(tiny, data, **kwargs)


def test_what_cannot_grow_is_refused(data, tiny):
    with pytest.raises(ValueError, match="must be one of blocks that can grow"):
        self_expanding_cnn(tt.create_model("trim_10k"), data)
    with pytest.raises(BudgetError, match="outside the budget before it grows: params is"):
        self_expanding_cnn(tiny, data, budget="params<=50%")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"widths": (8,), "depths": (1,)}, "two blocks at least"), ({"slope": 1.0}, "slope must be in"),
     ({"widths": (8, 8), "depths": (1,)}, "one of each")],
)  # fmt: skip
def test_networks_that_cannot_be_built(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tt.create_model("secnn", **kwargs)
