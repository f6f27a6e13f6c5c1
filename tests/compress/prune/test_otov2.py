"""Zero-invariant groups go without a trace, and the optimizer drives exactly the chosen ones to zero."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import trimtab as tt
from tests.compress import nets
from tests.learn.toy import Toy, net, same, weights
from trimtab import cli, testing
from trimtab.compress import ChannelGraph, magnitude, otov2
from trimtab.compress.graph.patch import scrambled
from trimtab.compress.prune.otov2 import DHSPG, HESSO, ZeroInvariantGroups, construct, penalty
from trimtab.core.cost import measure
from trimtab.core.edit import history
from trimtab.core.errors import BudgetError, SurgeryError
from trimtab.core.meta import shapes_only
from trimtab.learn import Classify, checkpoint

DATA = Toy()
RUN = {"epochs": 4, "batch_size": 16, "lr": 0.1, "progress": False}  # 24 steps


def groups_of(model: nn.Module, x: Tensor) -> ZeroInvariantGroups:
    return ZeroInvariantGroups(ChannelGraph(model, x), model)


def cifar_resnet(name: str) -> nn.Module:
    """timm's network with a 3x3 stem of stride 1 and no max-pool."""
    model = timm.create_model(name, num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


def vgg16_cifar(width: int = 64, size: int = 32) -> nn.Module:
    layers: list[nn.Module] = []
    before = 3
    for times in (1, 1, 0, 2, 2, 0, 4, 4, 4, 0, 8, 8, 8, 0, 8, 8, 8, 0):
        if times == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        c = width * times
        layers += [nn.Conv2d(before, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU()]
        before = c
    flat = before * (size // 32) ** 2
    head = [nn.Linear(flat, before), nn.ReLU(), nn.Linear(before, before), nn.ReLU(), nn.Linear(before, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


# -- groups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "size", "components", "groups"),
    [
        (lambda: cifar_resnet("resnet18"), 32, 12, 2_880),
        (torchvision.models.vgg16_bn, 224, 15, 12_416),
    ],
    ids=["ResNet-18", "VGG16-BN"],
)
def test_groups_are_those_of_the_official_code(make, size: int, components: int, groups: int) -> None:
    """ResNet-50, DenseNet-121 and MobileNetV2 are in tests/compress/test_channels.py."""
    with shapes_only():
        model = make().eval()
        graph = ChannelGraph(model, torch.zeros(1, 3, size, size))
        assert (ZeroInvariantGroups(graph, model).count, len(graph.groups)) == (groups, components)
        assert all(g.zero_invariant for g in graph.groups)


@pytest.mark.parametrize(
    ("make", "params", "macs"),
    [
        (lambda: cifar_resnet("resnet18"), 11_173_962, 555.42e6),
        (lambda: cifar_resnet("resnet50"), 23_520_842, 1_297.83e6),
        (vgg16_cifar, 15_253_578, 313.73e6),
    ],
    ids=["ResNet-18", "ResNet-50", "VGG16-BN"],
)
def test_the_dense_cifar_models_have_the_published_counts(make, params: int, macs: float) -> None:
    with shapes_only():
        cost = measure(make(), (3, 32, 32), what=("params", "macs"))
    assert cost.params == params and cost.macs == pytest.approx(macs, abs=5e3)


def narrow_vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)


BIG = {
    "VGG": (lambda: vgg16_cifar(width=4, size=64), 64),
    "ResNet": (lambda: tt.create_model("resnet8_mlperf_tiny"), 16),
    "ResNet with padded shortcuts": (lambda: tt.create_model("resnet8_mlperf_tiny", shortcut="pad"), 16),
    "DenseNet": (lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=10), 32),
    "MobileNetV2": (lambda: torchvision.models.MobileNetV2(10, 0.5, [[1, 16, 1, 1], [6, 24, 2, 2]]), 32),
    "ViT": (narrow_vit, 32),
    "ConvNeXt": (lambda: timm.models.ConvNeXt(num_classes=10, depths=(1, 1, 1, 1), dims=(8, 12, 16, 20)), 32),
    "squeeze and excitation": (nets.Gated, 8),
}


@pytest.mark.parametrize("name", BIG)
def test_random_zero_groups_are_removed_exactly(name: str) -> None:
    make, size = BIG[name]
    model = scrambled(make().eval(), seed=1)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    graph = ChannelGraph(model, x)
    groups = ZeroInvariantGroups(graph, model)
    gone = torch.rand(groups.count, generator=torch.Generator().manual_seed(2)) < 0.4
    groups.zero_(gone)
    assert torch.equal(groups.zeros(), gone)
    small = construct(model, x)
    with torch.no_grad():
        full, cut = model(x), small(x)
    assert (full - cut).abs().max() < 1e-5 * full.abs().max()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    left = groups_of(small, x)
    by_component = torch.bincount(groups.component[~gone], minlength=len(graph.groups)).clamp_min(1)
    assert left.count == int(by_component[by_component > 1].sum())  # a component with one channel cannot be cut


def test_what_a_layer_norm_looks_across_is_not_a_group() -> None:
    model = narrow_vit()
    graph = ChannelGraph(model, torch.zeros(2, 3, 32, 32))
    groups = ZeroInvariantGroups(graph, model)
    assert groups.count == 2 * (3 + 192) and ("norm.weight", 0) in graph.frozen


def test_a_group_is_a_row_of_everything_that_makes_the_channel() -> None:
    model = nets.Residual()
    groups = groups_of(model, nets.image())
    assert sorted(groups.sizes.tolist()) == sorted([27 + 12 * 9 + 1 + 4.0] * 8 + [72 + 1 + 2.0] * 12)
    with torch.no_grad():
        parts = [
            model.conv1.weight.square().sum((1, 2, 3)),
            *(t.square() for t in (model.conv1.bias, model.bn1.weight)),
        ]
    inner = groups.component == groups.component[groups.sizes == 75.0][0]
    x = [p.detach() for p in groups.params]
    torch.testing.assert_close(groups.dot(x, x)[inner].float(), sum(parts))


def test_a_forgotten_shift_is_not_a_zero_group() -> None:
    """Weights at zero with a shift left over must stay: cutting them would change the function."""
    model = nets.Residual().eval()
    with torch.no_grad():
        model.conv1.weight[3], model.conv1.bias[3], model.bn1.weight[3] = 0.0, 0.0, 0.0
        model.bn1.bias[3] = 0.5
    assert construct(model, nets.image()).conv1.out_channels == 12
    with torch.no_grad():
        model.bn1.bias[3] = 0.0
    assert construct(model, nets.image()).conv1.out_channels == 11


def test_of_a_component_that_is_zero_one_channel_stays() -> None:
    model = nets.Residual().eval()
    groups_of(model, nets.image()).zero_(torch.ones(20, dtype=torch.bool))
    small = construct(model, nets.image())
    assert (small.stem.out_channels, small.conv1.out_channels) == (1, 1)
    torch.testing.assert_close(small(nets.image()), model(nets.image()))


def test_layers_that_are_not_trained_are_not_touched() -> None:
    model = net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    small = otov2(model, DATA, budget="macs<=90%", **RUN)
    assert torch.equal(small[0].weight, before) and small[3].out_channels < 16
    with pytest.raises(SurgeryError, match="no channel of this model can be cut"):
        groups_of(nn.Linear(4, 2), torch.zeros(2, 4))


# -- the step ----------------------------------------------------------------------------------------------------------


def products(g: torch.Generator, n: int = 200, size: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randn(n, size, generator=g).double(), torch.randn(n, size, generator=g).double()


def dots(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (x * x).sum(1), (x * v).sum(1), (v * v).sum(1)


def test_a_penalty_between_its_bounds_shrinks_the_group_and_still_descends() -> None:
    x, v = products(torch.Generator().manual_seed(0))
    xx, xv, vv = dots(x, v)
    strength = penalty(xx, xv, vv, torch.full_like(xx, 1e-3), amplify=2.0, hat=1e6)
    grows = xv < 0
    cos = xv / (xx * vv).sqrt()
    lower, upper = -cos * vv.sqrt(), -vv.sqrt() / cos
    assert grows.any() and (lower[grows] < strength[grows]).all() and (strength[grows] < upper[grows]).all()
    step = v + strength[:, None] * x / xx.sqrt()[:, None]
    assert ((step * x).sum(1)[grows] > 0).all() and ((step * v).sum(1)[grows] > 0).all()
    assert (strength[~grows] == 1e-3).all()


def test_the_cap_of_the_penalty_may_leave_a_group_growing() -> None:
    x, v = products(torch.Generator().manual_seed(1))
    xx, xv, vv = dots(x, v)
    strength = penalty(xx, xv, vv, torch.full_like(xx, 1e-3), amplify=2.0, hat=10.0)
    assert (strength <= 10 * 1e-3 * (1 + 1e-9)).all()
    assert ((xv + strength * xx.sqrt())[xv < 0] < 0).any()


class Still(torch.optim.Optimizer):
    """A base that moves every parameter by a given amount times the learning rate."""

    def __init__(self, params, by: float) -> None:
        super().__init__(params, {"lr": 0.1})
        self.by = by

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * self.by * p)


def linear() -> tuple[nn.Module, ZeroInvariantGroups]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    return model, groups_of(model, torch.zeros(2, 4))


def test_a_step_takes_rate_times_lambda_off_the_norm() -> None:
    model, groups = linear()
    before = [p.detach().clone() for p in groups.params]
    optimizer = DHSPG(Still(model.parameters(), 0.0), groups, target=0.5, lambda_0=0.03, epsilon=0.0)
    optimizer.step()
    now = [p.detach() for p in groups.params]
    lost = groups.dot(before, before).sqrt() - groups.dot(now, now).sqrt()
    torch.testing.assert_close(lost, 0.1 * 0.03 * optimizer.redundant.double(), rtol=1e-3, atol=1e-7)
    assert int(optimizer.redundant.sum()) == 3


@pytest.mark.parametrize("by", [9.9, 10.1])
def test_with_epsilon_0_a_group_is_zero_once_the_trial_point_is_across(by: float) -> None:
    """x - 0.1 * by * x points away from x exactly when by > 10; the penalty is negligible."""
    model, groups = linear()
    DHSPG(Still(model.parameters(), by), groups, target=0.5, lambda_0=1e-9, epsilon=0.0).step()
    assert int(groups.zeros().sum()) == (3 if by > 10 else 0)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 0.95])
def test_epsilon_is_the_share_of_the_way_that_must_be_left(epsilon: float) -> None:
    for left in (epsilon - 0.02, epsilon + 0.02):
        model, groups = linear()
        base = Still(model.parameters(), 10 * (1 - left))
        DHSPG(base, groups, target=0.5, lambda_0=1e-9, epsilon=epsilon).step()
        assert int(groups.zeros().sum()) == (3 if left < epsilon else 0)


def test_groups_that_descent_shrinks_and_small_groups_go_first() -> None:
    _, groups = linear()
    optimizer = DHSPG(Still(groups.params, 0.0), groups, target=0.5, lambda_0=1.0)
    one = torch.ones(6, dtype=torch.float64)
    along = torch.tensor([1.0, -1.0, 0.5, 0.0, -0.5, 0.9], dtype=torch.float64)
    assert optimizer.importance(one, along, one).argsort().tolist() == [0, 5, 2, 3, 4, 1]
    size = torch.tensor([4.0, 1.0, 9.0, 16.0, 25.0, 0.25], dtype=torch.float64)
    assert optimizer.importance(size, 0 * one, one).argsort().tolist() == [5, 1, 0, 2, 3, 4]
    hesso = HESSO(Still(groups.params, 0.0), groups, target=0.5, finish=2)
    assert hesso.importance(one, along, one).argmin() != 1 and hesso.importance(size, 0 * one, one).argmin() == 5


def test_the_score_is_the_papers_formula() -> None:
    _, groups = linear()
    optimizer = DHSPG(Still(groups.params, 0.0), groups, target=0.5, lambda_0=1.0)
    x, v = products(torch.Generator().manual_seed(3), n=6, size=5)  # 4 weights and a bias
    cos = nn.functional.cosine_similarity(-x, -v)
    small = 1 / (x.norm(dim=1) / 5 + 1e-6)
    want = 0.5 * cos / cos.norm() + 0.5 * small / small.norm()
    torch.testing.assert_close(-optimizer.importance(*dots(x, v)), want)


def test_hesso_shrinks_along_a_line_to_exactly_zero() -> None:
    model, groups = linear()
    start = [p.detach().clone() for p in groups.params]
    optimizer = HESSO(Still(model.parameters(), 0.0), groups, target=0.5, finish=7)
    for t in range(7):
        optimizer.step()
        share = groups.dot([p.detach() for p in groups.params], start) / groups.dot(start, start)
        torch.testing.assert_close(
            share[optimizer.redundant], torch.full((3,), 1 - (t + 1) / 7).double(), atol=1e-6, rtol=0
        )
    assert torch.equal(groups.zeros(), optimizer.redundant)
    assert math.prod((7 - t - 1) / (7 - t) for t in range(7)) == 0


def mlp(**options) -> DHSPG:
    """800 steps of a 64-64 network that learns which of ten inputs is the largest; SGD without momentum."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    groups = groups_of(model, torch.zeros(2, 64))
    optimizer = DHSPG(torch.optim.SGD(model.parameters(), lr=0.1), groups, target=0.5, start=50, **options)
    for _ in range(800):
        x = torch.randn(32, 64, generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :10].argmax(1)).backward()
        optimizer.step()
    return optimizer


def test_strength_and_projection_decide_whether_the_target_is_reached_and_pace_always_does() -> None:
    slow = mlp(lambda_0=1e-3, amplify=2.0, hat=10.0, epsilon=0.0)
    fast = mlp(lambda_0=1e-2, amplify=20.0, hat=1e3, epsilon=0.95)
    paced = mlp(finish=400)
    assert [int(o.groups.zeros().sum()) for o in (slow, fast, paced)] == [0, 32, 32]
    assert paced.forced == 0


def test_without_the_half_space_step_groups_shrink_but_are_never_zero() -> None:
    model, groups = linear()
    optimizer = DHSPG(Still(model.parameters(), 0.0), groups, target=0.5, lambda_0=0.1, epsilon=None)
    for _ in range(300):
        optimizer.step()
    norms = groups.dot([p.detach() for p in groups.params], [p.detach() for p in groups.params]).sqrt()
    assert norms[optimizer.redundant].max() < 0.02 < norms[~optimizer.redundant].min()
    assert not groups.zeros().any()


def test_the_target_is_met_exactly_although_more_groups_are_pushed() -> None:
    model, groups = linear()
    optimizer = DHSPG(Still(model.parameters(), 20.0), groups, target=0.34, tolerance=0.34, lambda_0=1e-9, epsilon=0.0)
    optimizer.step()  # all candidates arrive at once
    assert int(optimizer.redundant.sum()) == 4 and int(groups.zeros().sum()) == 2
    assert optimizer.chosen_by[groups.zeros()].max() < optimizer.chosen_by[~groups.zeros()].min()
    left = [p.detach().clone() for p in groups.params]
    optimizer.step()
    assert int(groups.zeros().sum()) == 2  # the others are trained as ordinary variables again
    now = [p.detach() for p in groups.params]
    torch.testing.assert_close(groups.dot(now, left), -groups.dot(left, left))


def test_one_channel_of_each_component_always_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 2))
    with torch.no_grad():
        model[0].weight.mul_(1e-4), model[0].bias.mul_(1e-4)
    groups = groups_of(model, torch.zeros(2, 4))
    DHSPG(Still(model.parameters(), 0.0), groups, target=0.9, finish=1).step()
    assert int(groups.zeros().sum()) == int(0.9 * 23)
    assert torch.bincount(groups.component[~groups.zeros()], minlength=2).min() == 1


def test_zero_stays_zero_under_momentum_and_weight_decay() -> None:
    model, groups = linear()
    optimizer = DHSPG(
        torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01), groups, target=0.5, finish=3
    )
    for t in range(8):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        assert t < 2 or int(groups.zeros().sum()) == 3


def test_before_the_start_the_base_acts_alone() -> None:
    (a, groups), (b, _) = linear(), linear()
    ours = DHSPG(torch.optim.AdamW(a.parameters()), groups, target=0.5, start=5, finish=9)
    plain = torch.optim.AdamW(b.parameters())
    for t in range(9):
        for model, optimizer in ((a, ours), (b, plain)):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        assert same(weights(a), weights(b)) is (t < 5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": 1.0, "finish": 5}, r"target must be a share in \(0, 1\), got 1.0"),
        ({"target": 0.5, "finish": 5, "tolerance": 1}, "tolerance must be in"),
        ({"target": 0.5, "start": 5, "finish": 5}, "start must be at least 0 and finish after it, got 5 and 5"),
        ({"target": 0.5}, "lambda_0 must be given where there is no finish"),
        ({"target": 0.5, "lambda_0": 0.0}, "lambda_0 must be positive or None, got 0.0"),
        ({"target": 0.5, "finish": 5, "hat": 0.5}, "amplify must be positive and hat at least 1"),
        ({"target": 0.5, "finish": 5, "epsilon": 1.0}, r"epsilon must be in \[0, 1\) or None, got 1.0"),
    ],
)
def test_wrong_optimizer_settings_are_refused(options: dict, words: str) -> None:
    model, groups = linear()
    with pytest.raises(ValueError, match=words):
        DHSPG(torch.optim.SGD(model.parameters(), lr=0.1), groups, **options)


# -- the method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["dhspg", "hesso"])
def test_the_masked_and_the_constructed_model_are_equal(optimizer: str, tmp_path) -> None:
    """What training ends with, zeros and all, computes what is returned; nothing is trained afterwards."""
    model, masked, size = net(), net(), (1, 8, 8)
    small = otov2(model, DATA, budget="macs<=50%", optimizer=optimizer, out=tmp_path, **RUN)
    masked.load_state_dict(checkpoint.read(tmp_path / checkpoint.FILE)["model"])
    x = DATA.splits["test"].images
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked.eval()(x), rtol=1e-5, atol=1e-5)
    assert 0.35 * measure(model, size).macs < measure(small, size).macs <= 0.5 * measure(model, size).macs
    assert same(weights(model), weights(net())) and history(small).edits and not history(model).edits


@pytest.mark.parametrize("budget", ["params<=40%", "macs<=45%, size<=60%"])
def test_other_budgets_are_met(budget: str) -> None:
    model = net()
    small = otov2(model, DATA, budget=budget, **RUN)
    reference = measure(model, (1, 8, 8))
    assert tt.Budget(budget).resolve(reference).check(measure(small, (1, 8, 8))).ok


def test_it_learns_while_it_prunes_and_beats_pruning_without_training() -> None:
    data = Toy(train=192, noise=1.5)
    big = net()
    tt.fit(big, data, epochs=4, batch_size=16, lr=0.1, progress=False)
    small = otov2(big, data, budget="macs<=20%", **RUN)
    cut = magnitude(big, (1, 8, 8), budget="macs<=20%")
    scores = [tt.evaluate(m, data, "test")["accuracy"] for m in (small, cut)]
    assert scores[0] > max(0.8, scores[1] + 0.1)


def test_an_unreachable_budget_is_refused_before_training() -> None:
    with pytest.raises(BudgetError, match="cannot be met"):
        otov2(net(), DATA, budget="macs<=1%", **RUN)


class Cut(Exception):
    pass


class Crash(Classify):
    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def losses(self, model, batch, ctx):
        if ctx.step == self._at:
            raise Cut
        return super().losses(model, batch, ctx)


RESUMED = {**RUN, "opt": "adamw", "lr": 0.01, "checkpoint_every": 0}


@pytest.fixture(scope="module")
def whole() -> dict[str, nn.Module]:
    return {o: otov2(net(), DATA, objective=Crash(-1), optimizer=o, **RESUMED) for o in ("dhspg", "hesso")}


# before the choice, while groups shrink, after they are zero
@pytest.mark.parametrize(("optimizer", "at"), [("dhspg", 1), ("dhspg", 4), ("dhspg", 20), ("hesso", 5)])
def test_resume_is_bit_exact(optimizer: str, at: int, whole, tmp_path) -> None:
    run = {**RESUMED, "optimizer": optimizer, "out": tmp_path}
    with pytest.raises(Cut):
        otov2(net(), DATA, objective=Crash(at), **run)
    resumed = otov2(net(seed=4), DATA, objective=Crash(-1), **run)
    assert same(weights(resumed), weights(whole[optimizer]))
    assert history(resumed).edits == history(whole[optimizer]).edits
    again = otov2(net(seed=5), DATA, objective=Crash(0), **run)  # done: nothing is trained
    assert same(weights(again), weights(whole[optimizer]))


def test_another_run_is_not_continued(tmp_path) -> None:
    with pytest.raises(Cut):
        otov2(net(), DATA, objective=Crash(8), out=tmp_path, checkpoint_every=0, **RUN)
    with pytest.raises(ValueError, match="the state is of a run with"):
        otov2(net(), DATA, objective=Crash(-1), out=tmp_path, epsilon=0.5, **RUN)


def test_ctrl_c_interrupts_and_the_same_call_goes_on(tmp_path) -> None:
    import os
    import signal

    class Signal(Classify):
        def losses(self, model, batch, ctx):
            if ctx.step == 8 and not (tmp_path / "sent").exists():
                (tmp_path / "sent").touch()
                os.kill(os.getpid(), signal.SIGINT)
            return super().losses(model, batch, ctx)

    whole = otov2(net(), DATA, **RUN)
    with pytest.raises(KeyboardInterrupt):
        otov2(net(), DATA, objective=Signal(), out=tmp_path, **RUN)
    assert same(weights(otov2(net(), DATA, objective=Signal(), out=tmp_path, **RUN)), weights(whole))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "sgd"}, "optimizer must be 'dhspg' or 'hesso', got 'sgd'"),
        ({"start": 0.5, "finish": 0.5}, "start and finish must be shares"),
        ({"keep": "best"}, "keep must not be given to otov2"),
        ({"ema": 0.9}, "ema must not be given to otov2"),
        ({"time_limit": 3.0}, "time_limit must not be given to otov2"),
        ({"epsilon": 2.0}, "epsilon must be in"),
        ({"scope": "all"}, "scope must be"),
        ({"epochs": 0}, "epochs must be a positive integer"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
    ],
)
def test_wrong_arguments_are_refused_at_the_door(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        otov2(net(), DATA, **{**RUN, **options})


def test_data_must_be_data() -> None:
    with pytest.raises(ValueError, match="data must be a Data with a split 'train', got tuple"):
        otov2(net(), (1, 8, 8))


def test_it_passes_the_battery_of_surgeries() -> None:
    """Saved and loaded by name and edits, trained on, exported to ONNX."""

    def operate(model: nn.Module, size: tuple[int, int, int]) -> nn.Module:
        data = tt.load_data("shapes:classes=10,size=32,n=160", in_chans=size[0], image_size=size[1])
        return otov2(model, data, budget="macs<=60%", epochs=1, batch_size=16, progress=False)

    testing.check_surgery(operate)


def test_the_command_line_and_a_recipe_reach_it(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    tt.save(tt.create_model("trim_1k", num_classes=10, in_chans=1, img_size=8), "big", spec=tt.load_data("digits").spec)
    words = [
        "compress",
        "big",
        "--method",
        "otov2",
        "--budget",
        "macs<=50%",
        "--epochs",
        "1",
        "--out",
        "small",
        "--json",
    ]
    assert cli.main(words) == 0, capsys.readouterr().err
    recipe = "data: {spec: digits, limit: 300}\nmodel: {load: big}\nout: run\nphases:\n"
    recipe += '  - compress: {method: otov2, budget: "macs<=50%", epochs: 1}\n'
    (tmp_path / "r.yaml").write_text(recipe)
    assert cli.main(["run", "r.yaml", "--json"]) == 0, capsys.readouterr().err
    before = tt.measure(tt.load("big"), (1, 8, 8)).macs
    for folder in ("small", "run"):
        assert tt.measure(tt.load(folder), (1, 8, 8)).macs <= 0.5 * before
