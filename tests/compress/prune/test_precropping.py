"""PreCropping: the exact checks of its fact sheet, its traps, and what every surgery must do."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests.compress import nets
from trimtab import testing
from trimtab.compress.graph import ChannelGraph
from trimtab.compress.prune import precropping as pc
from trimtab.core.edit import history
from trimtab.core.errors import BudgetError

SIZE = (3, 8, 8)
SIZES = np.array([432, 2304, 9216, 36864, 640])


def chain(
    widths: tuple[int, ...] = (3, 16, 16, 64, 64), classes: int | None = 10, *, he: bool = False
) -> nn.Sequential:
    """Bias-free 3x3 convolutions with ReLU, and a 1x1 convolution to the classes."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.ReLU()]
    if classes is not None:
        layers.append(nn.Conv2d(widths[-1], classes, 1, bias=False))
    net = nn.Sequential(*layers)
    if he:
        for m in net[::2]:
            nn.init.kaiming_normal_(m.weight)
    return net


def widths(net: nn.Module) -> list[int]:
    return [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]


def params(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def graph_and_densities(share: float = 5000 / SIZES.sum()) -> tuple[ChannelGraph, dict[str, float]]:
    net = chain()
    return ChannelGraph(net, torch.zeros(2, *SIZE)), pc.densities(net, SIZE, weights=share)


@pytest.fixture(scope="module")
def digits() -> object:
    return tt.load_data("digits", limit=400)


# -- the closed form --------------------------------------------------------------------------------------------------


def test_water_filling_gives_every_large_layer_the_same_number_of_weights() -> None:
    kept = pc.water_filling(SIZES, 5000) * SIZES
    np.testing.assert_allclose(kept, [432, 1309.333, 1309.333, 1309.333, 640], rtol=1e-6)
    for budget in (50, 3000, 20_000, 49_455):
        kept = pc.water_filling(SIZES, budget) * SIZES
        assert kept.sum() == pytest.approx(budget)
        assert np.allclose(kept[kept < SIZES - 1e-6], kept.max())


def test_a_budget_that_nothing_must_leave_for_keeps_all() -> None:
    assert (pc.water_filling(SIZES, SIZES.sum()) == 1).all()


def test_both_budgets_are_met_at_once_and_the_optimality_conditions_hold() -> None:
    a, m = np.array([400.0, 2000.0, 9000.0, 36000.0]), np.array([400.0, 8000.0, 9000.0, 2000.0]) * 100
    d = pc.water_filling(a, 12_000, m, 400_000)
    assert (a @ d, m @ d) == (pytest.approx(12_000), pytest.approx(400_000))
    free = d < 1
    u, v = np.linalg.lstsq(np.stack([a[free], m[free]], 1), 1 / d[free], rcond=None)[0]
    assert u > 0 and v > 0
    np.testing.assert_allclose(d, np.minimum(1, 1 / (u * a + v * m)), rtol=1e-6)


@pytest.mark.parametrize(("params_", "macs"), [(40_000, 100_000), (2_000, 1_900_000)])
def test_a_budget_that_does_not_bind_is_ignored(params_: float, macs: float) -> None:
    a, m = np.array([400.0, 2000.0, 9000.0, 36000.0]), np.array([400.0, 8000.0, 9000.0, 2000.0]) * 100
    d = pc.water_filling(a, params_, m, macs)
    alone = pc.water_filling(a, params_) if macs > 1e6 else pc.water_filling(m, macs)
    np.testing.assert_allclose(d, alone, rtol=1e-6)


def test_closed_form_maximises_the_product_of_densities() -> None:
    best = np.log(pc.water_filling(SIZES, 5000)).sum()
    rng = np.random.default_rng(0)
    for _ in range(200):
        d = np.minimum(1, rng.dirichlet(np.ones(5)) * 5000 / SIZES)
        assert np.log(d).sum() <= best + 1e-9


# -- scores of single weights -----------------------------------------------------------------------------------------


def test_synflow_is_conserved_at_every_hidden_unit() -> None:
    net = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False)
    )
    a, b, c = pc.scores(net, torch.zeros(1, 6), scorer="synflow").values()
    for before, after in ((a, b), (b, c)):
        torch.testing.assert_close(before.sum(1), after.sum(0), rtol=1e-12, atol=0)
    totals = [float(s.sum()) for s in pc.scores(chain(), SIZE, scorer="synflow").values()]
    assert totals == pytest.approx([totals[0]] * 5, rel=1e-12)


def test_expected_synflow_score_of_a_randomly_pruned_chain_is_the_product_of_densities() -> None:
    net = nn.Sequential(
        nn.Linear(12, 20, bias=False), nn.ReLU(), nn.Linear(20, 20, bias=False), nn.ReLU(), nn.Linear(20, 5, bias=False)
    )
    d, g, masked = (0.7, 0.4, 0.8), torch.Generator().manual_seed(0), []

    def flow(layers: list[Tensor]) -> float:
        x = torch.ones(12, dtype=torch.float64)
        for w in layers:
            x = w @ x
        return float(x.sum())

    weights = [p.detach().double().abs() for p in net.parameters()]
    assert flow(weights) == pytest.approx(float(pc.scores(net, torch.zeros(1, 12), scorer="synflow")["4.weight"].sum()))
    for _ in range(2000):
        masked.append(flow([w * (torch.rand(w.shape, generator=g) < p) for w, p in zip(weights, d, strict=True)]))
    assert np.mean(masked) == pytest.approx(flow(weights) * math.prod(d), rel=0.05)


def test_synflow_ignores_what_batch_norm_has_seen() -> None:
    """Batch statistics of the all-ones input would change the scores."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    bare = nn.Sequential(net[0], nn.ReLU(), net[3])
    scale = 1 / (1 + net[1].eps) ** 0.5
    with_norm, without = (list(pc.scores(n, SIZE, scorer="synflow").values()) for n in (net, bare))
    with torch.no_grad():
        net[0].bias.zero_(), net[3].bias.zero_()
    with_norm, without = (list(pc.scores(n, SIZE, scorer="synflow").values()) for n in (net, bare))
    for a, b in zip(with_norm, without, strict=True):
        torch.testing.assert_close(a, b * scale, rtol=1e-9, atol=0)


def test_snip_is_weight_times_gradient(digits) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    part = digits.subset({"train": 100}, seed=0)
    batch = next(iter(part.loader("train", batch_size=100, shuffle=False)))
    nn.functional.cross_entropy(net(batch["image"]), batch["label"]).backward()
    got = pc.scores(net, digits, scorer="snip", seed=0)["1.weight"]
    torch.testing.assert_close(got.float(), (net[1].weight * net[1].weight.grad).abs(), rtol=1e-3, atol=1e-7)


def test_grasp_foretells_how_the_gradient_shrinks_without_a_weight(digits) -> None:
    """Taking weight q away changes the squared norm of the gradient by -2 w_q (H g)_q, to first order."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    batch = next(iter(digits.subset({"train": 100}, seed=0).loader("train", batch_size=100, shuffle=False)))
    x, y = batch["image"].double(), batch["label"]

    def squared() -> float:
        grads = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), [net[1].weight, net[3].weight])
        return float(sum((g * g).sum() for g in grads))

    found = pc.scores(net, digits, scorer="grasp", seed=0)["3.weight"]
    full, changes, step = squared(), [], 1e-4
    for q in range(0, 120, 3):
        w = net[3].weight.data.view(-1)
        old = float(w[q])
        w[q] = old * (1 - step)
        changes.append((squared() - full) / step)
        w[q] = old
    foretold = -2 * found.flatten()[0:120:3]
    np.testing.assert_allclose(changes, foretold, rtol=0.01, atol=1e-3 * float(foretold.abs().max()))


@pytest.mark.parametrize("scorer", pc.WEIGHT_SCORERS)
def test_masks_keep_exactly_the_share_asked_for(digits, scorer: str) -> None:
    net = tt.create_model("trim_10k", num_classes=10, in_chans=1, img_size=8, seed=0)
    kept = pc.masks(net, digits, scorer=scorer, density=0.1)
    total = sum(m.numel() for m in kept.values())
    assert sum(int(m.sum()) for m in kept.values()) == round(0.1 * total)
    names = {f"{n}.weight" for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert set(kept) == names  # neither biases nor norms count


def test_layers_collapse_under_snip_but_not_under_synflow_or_the_closed_form() -> None:
    deep = chain((3, *[16] * 20), None)
    deep.append(nn.Flatten()).append(nn.Linear(16 * 16, 10, bias=False))
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (100, 3, 4, 4), generator=g, dtype=torch.uint8).numpy()
    data = tt.data.Data.from_arrays((pixels, np.arange(100) % 10))
    total = sum(p.numel() for p in deep.parameters())
    least = {
        s: min(int(m.sum()) for m in pc.masks(deep, data, scorer=s, density=0.01).values()) for s in ("snip", "synflow")
    }
    closed = pc.densities(deep, data, weights=0.01)
    assert least["snip"] <= 1 and least["synflow"] >= 10
    assert min(closed[n] * p.numel() for n, p in pc._layers(deep).items()) == pytest.approx(0.01 * total / 21, rel=0.02)


def test_erk_and_uniform_meet_their_budget() -> None:
    net = chain()
    for scorer in ("erk", "uniform"):
        d = list(pc.densities(net, SIZE, scorer=scorer, weights=0.1).values())
        assert d @ SIZES == pytest.approx(0.1 * SIZES.sum())
    erk = np.array(list(pc.densities(net, SIZE, scorer="erk", weights=0.1).values()))
    raw = np.array([(16 + 3 + 6) / 432, 38 / 2304, (80 + 6) / 9216, (128 + 6) / 36864, (74 + 2) / 640])
    free = erk < 1
    assert np.ptp((erk / raw)[free]) < 1e-6 and free.sum() >= 3


# -- from densities to widths -----------------------------------------------------------------------------------------


def test_ratios_of_the_fact_sheets_chain_solve_the_boxed_problem() -> None:
    graph, d = graph_and_densities()
    r = pc.ratios(graph, d)
    np.testing.assert_allclose(r, [0.6213, 1, 0.1300, 0.2793], atol=6e-5)
    plain = np.round(r * [16, 16, 64, 64]).astype(int)
    assert plain.tolist() == [10, 16, 8, 18]
    assert params(chain((3, *plain.tolist()))) == 4338
    # Normal equations of the free ratios: a_j e_j + a_(j+1) e_(j+1) = 0.
    logs = np.log([1, *r, 1])
    e = logs[:-1] + logs[1:] - np.log(list(d.values()))
    slope = SIZES[:-1] * e[:-1] + SIZES[1:] * e[1:]
    assert abs(slope[[0, 2, 3]]).max() < 1e-3 * SIZES.max() * abs(e).max() and slope[1] < 0
    clamped = np.minimum(1, [0.3621, 1.8986, 0.0714, 0.5038])
    assert abs(r - clamped).max() > 0.2  # clamping the unboxed solution is something else


def test_the_unboxed_solution_is_found_where_it_lies_inside() -> None:
    graph, _ = graph_and_densities()
    d = dict(zip(graph_and_densities()[1], [0.4, 0.24, 0.3, 0.1, 0.2], strict=True))  # products of ratios .4 .6 .5 .2
    d = {k: a * b for k, a, b in zip(d, (1, 0.4, 0.6, 0.5, 0.2), (0.4, 0.6, 0.5, 0.2, 1), strict=True)}
    np.testing.assert_allclose(pc.ratios(graph, d), [0.4, 0.6, 0.5, 0.2], rtol=1e-5)


def test_ratios_of_the_square_root_rule() -> None:
    graph, d = graph_and_densities()
    np.testing.assert_allclose(pc.ratios(graph, d, rule="sqrt"), [0.877, 0.565, 0.283, 0.594], atol=6e-4)


def test_correction_after_rounding_uses_the_budget_up() -> None:
    small = pc.precropping(chain(), SIZE, budget="params<=5000")
    assert widths(small) == [11, 16, 9, 20, 10]
    assert params(small) == 4997


def test_parameters_after_the_crop_are_what_the_realised_ratios_say() -> None:
    small = pc.precropping(chain(), SIZE, budget="params<=20%")
    r = np.array([1, *(np.array(widths(small)[:-1]) / [16, 16, 64, 64]), 1])
    assert params(small) == round((SIZES * r[:-1] * r[1:]).sum())


def test_a_depthwise_layer_keeps_the_ratio_itself_not_its_square() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 4, 1))
    graph = ChannelGraph(net, torch.zeros(2, *SIZE))
    d = {"1.weight": 0.25}
    assert len(graph.groups) == 1
    for rule in pc.RULES:
        np.testing.assert_allclose(pc.ratios(graph, d, rule=rule), [0.25], rtol=1e-6)


def test_concatenated_groups_are_averaged() -> None:
    graph = ChannelGraph(nets.Dense(), torch.zeros(2, *SIZE))
    r = pc.ratios(graph, {"layers.1.weight": 0.5})  # (10 -> 4), reads 6 of the stem and 4 of layer 0
    share = {g.producers[0][0]: r[g.id] for g in graph.groups}
    read = (6 * share["stem.weight"] + 4 * share["layers.0.weight"]) / 10
    assert read * share["layers.1.weight"] == pytest.approx(0.5, rel=1e-5)


# -- the narrow network -----------------------------------------------------------------------------------------------

NETS = {
    "residual": nets.Residual,
    "gated depthwise": nets.Gated,
    "grouped": nets.Grouped,
    "dense": nets.Dense,
    "shuffle": nets.Shuffle,
}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
def test_any_wiring_meets_the_budget_with_stock_layers(net: type[nn.Module]) -> None:
    model = net()
    small = pc.precropping(model, SIZE, budget="params<=60%")
    assert type(small) is net and small(nets.image()).shape == (2, 5)
    assert 0.35 * params(model) < params(small) <= 0.6 * params(model)
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())


def test_two_budgets_are_met_by_a_network_of_timm() -> None:
    model = tt.create_model("densenet121", num_classes=10, growth_rate=8, block_config=(2, 2), seed=0)
    size = (3, 64, 64)
    before = tt.measure(model, size, what=("params", "macs"))
    small = pc.precropping(model, size, budget="params<=40%, macs<=50%")
    after = tt.measure(small, size, what=("params", "macs"))
    assert type(small) is type(model)
    assert after.params <= 0.4 * before.params and after.macs <= 0.5 * before.macs
    assert after.params > 0.36 * before.params or after.macs > 0.46 * before.macs


def test_widths_are_rounded_and_never_zero() -> None:
    small = pc.precropping(chain((3, 32, 64, 64)), SIZE, budget="params<=30%", round_to=8)
    assert all(w % 8 == 0 for w in widths(small)[:-1])
    tiny = pc.precropping(chain(), SIZE, budget="params<=400")
    assert min(widths(tiny)) >= 1 and params(tiny) <= 400
    assert min(widths(pc.precropping(chain(), SIZE, budget="params<=50%", min_keep=0.5))[:-1]) >= 8


def test_other_costs_bound_it_too() -> None:
    model = nets.Residual(16)
    small = pc.precropping(model, SIZE, budget="memory<=60%, size<=50%")
    before, after = tt.measure(model, SIZE), tt.measure(small, SIZE)
    assert after.memory <= 0.6 * before.memory and after.size <= 0.5 * before.size


def test_an_unreachable_budget_says_how_near_it_came() -> None:
    with pytest.raises(BudgetError, match=r"params<=20 cannot be met: with the fewest channels allowed params is"):
        pc.precropping(chain(), SIZE, budget="params<=20")


@pytest.mark.parametrize("scorer", pc.SCORERS)
def test_every_scorer_gives_a_network_inside_the_budget(digits, scorer: str) -> None:
    net = tt.create_model("trim_10k", num_classes=10, in_chans=1, img_size=8, seed=0)
    small = pc.precropping(net, digits, scorer=scorer, budget="params<=50%")
    assert 0.4 * params(net) < params(small) <= 0.5 * params(net)


# -- its weights ------------------------------------------------------------------------------------------------------


def _variance(w: Tensor) -> float:
    return float(w.detach().double().square().mean())


def test_he_variance_follows_the_new_fan_and_slicing_does_not() -> None:
    model = tt.create_model("resnet20_cifar", num_classes=10, img_size=32, seed=0)
    fresh, sliced = (pc.precropping(model, (3, 32, 32), budget="params<=25%", init=i) for i in ("fresh", "slice"))
    ratios = []
    for (name, a), b, full in zip(fresh.named_modules(), sliced.modules(), model.modules(), strict=True):
        if isinstance(a, nn.Conv2d) and a.weight.numel() > 500:
            want = 2 / (9 * a.in_channels)
            assert _variance(a.weight) == pytest.approx(want, rel=0.25), name
            ratios.append(_variance(b.weight) / want)
            assert _variance(b.weight) == pytest.approx(2 / (9 * full.in_channels), rel=0.25)
    assert min(ratios) < 0.75


@pytest.mark.parametrize(
    ("name", "variance"),
    [
        ("resnet18", lambda m: 2 / (m.weight[0, 0].numel() * m.out_channels)),  # fan_out
        ("mobilenetv3_small_050", lambda m: 2 * m.groups / (m.weight[0, 0].numel() * m.out_channels)),
        ("simplenet_cifar_310k", lambda m: 4 / (m.weight[0, 0].numel() * (m.in_channels + m.out_channels))),  # Xavier
        ("convnext_atto", lambda m: 4e-4),
    ],
)
def test_the_architectures_own_initializer_is_followed(name: str, variance) -> None:
    model = tt.create_model(name, num_classes=10, seed=0)
    small = pc.precropping(model, (3, 32, 32), budget="params<=20%", round_to=4)
    assert type(small) is type(model) and 0.19 * params(model) < params(small) <= 0.2 * params(model)
    convs = [m for m in small.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 1500]
    off = [math.log(_variance(m.weight) / variance(m)) for m in convs]
    assert len(convs) > 5
    assert max(map(abs, off)) < 0.3 and abs(np.mean(off)) < 0.05


def test_learned_weights_are_forgotten_and_the_seed_decides() -> None:
    model = tt.create_model("trim_10k", num_classes=10, seed=0)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(3.0)
        trained.get_submodule(
            next(n for n, m in trained.named_modules() if isinstance(m, nn.BatchNorm2d))
        ).running_mean.fill_(7.0)
    a, b, c = (pc.precropping(m, (3, 32, 32), seed=s).state_dict() for m, s in ((model, 1), (trained, 1), (model, 2)))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_own_classes_are_initialized_by_their_layers() -> None:
    small = pc.precropping(chain(he=True), SIZE, budget="params<=60%", seed=3)
    for m in small[2:-1:2]:
        assert _variance(m.weight) == pytest.approx(1 / (27 * m.in_channels), rel=0.15)  # PyTorch: 1 / (3 fan_in)
    again = pc.precropping(chain(), SIZE, budget="params<=60%", seed=3)
    assert all(torch.equal(p, q) for p, q in zip(small.parameters(), again.parameters(), strict=True))


def test_the_callers_random_state_is_left_alone() -> None:
    model = nets.Residual()
    before = torch.random.get_rng_state()
    pc.precropping(model, SIZE, seed=5)
    assert torch.equal(before, torch.random.get_rng_state())


# -- as a surgery -----------------------------------------------------------------------------------------------------


def test_it_is_a_surgery() -> None:
    testing.check_surgery(lambda model, size: tt.compress.precropping(model, size, budget="params<=50%"))


def test_an_artifact_that_was_edited_before_is_cropped_and_kept(tmp_path) -> None:
    model = tt.create_model("resnet18", num_classes=10, img_size=32, seed=0)  # adapted to small images: it has edits
    assert history(model).edits
    tt.save(model, tmp_path / "a")
    small = pc.precropping(tt.load(tmp_path / "a"), (3, 32, 32), budget="params<=5%")
    tt.save(small, tmp_path / "b")
    again, x = tt.load(tmp_path / "b"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), small.eval()(x))


def test_it_learns(digits) -> None:
    data = tt.load_data("digits")
    model = tt.create_model("trim_net", num_classes=10, in_chans=1, img_size=8, width=16, depths=(1, 1), seed=0)
    small = pc.precropping(model, data, budget="params<=40%", scorer="snip")
    tt.fit(small, data, epochs=12, progress=False)
    assert tt.evaluate(small, data)["accuracy"] > 0.85


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scorer": "fisher"}, "scorer must be one of closed_form, snip, .*, got 'fisher'"),
        ({"rule": "max"}, "rule must be one of least_squares, sqrt, got 'max'"),
        ({"init": "zero"}, "init must be 'fresh' or 'slice', got 'zero'"),
        ({"round_to": 0}, "round_to must be a positive integer, got 0"),
        ({"min_keep": 2}, "min_keep must be in"),
        ({"scorer": "snip"}, "snip and grasp need data with labels"),
        ({"budget": "accuracy>=0.9"}, "needs an upper bound"),
    ],
)
def test_wrong_arguments_are_refused_at_the_door(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pc.precropping(nets.Residual(), SIZE, **kwargs)


def test_functions_refuse_shares_out_of_range_and_models_without_layers() -> None:
    with pytest.raises(ValueError, match=r"weights must be in \[0, 1\], got 1.5"):
        pc.densities(chain(), SIZE, weights=1.5)
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\], got -1"):
        pc.masks(chain(), SIZE, scorer="magnitude", density=-1)
    with pytest.raises(ValueError, match="model must have convolutions or linear layers"):
        pc.densities(nn.ReLU(), SIZE)
    with pytest.raises(ValueError, match="sizes must be positive"):
        pc.water_filling([1, 0], 1)
