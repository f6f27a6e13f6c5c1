"""FLIQS: rewards, the policy's gradient, budgets that hold, layers that round as they say, and one run to the end."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from tests.elsewhere import python
from trimtab import testing
from trimtab.compress import fliqs
from trimtab.compress.quantize.fliqs import (
    CostModel,
    MixedLayer,
    Policy,
    Search,
    act,
    cost_of,
    entropy_weight,
    formats_of,
    packed,
    reward_of,
)
from trimtab.compress.quantize.formats import Format
from trimtab.compress.quantize.swap import layers
from trimtab.core.cost import measure_onnx
from trimtab.core.errors import BudgetError
from trimtab.core.onnx_file import read_onnx
from trimtab.data import load_data
from trimtab.deploy.runtime import OnnxModel
from trimtab.learn import Batch, Context

CONV = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
NET = {"num_classes": 10, "in_chans": 1, "img_size": 8}
QUICK = {"epochs": 2, "progress": False, "val": None, "clip_grad": 1.0, "batch_size": 32}


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def data():
    return load_data("digits", limit=400)


@pytest.fixture(scope="module")
def net():
    return tt.create_model("trim_net", width=8, depths=(1, 1), seed=0, **NET)


@pytest.fixture(scope="module")
def small(net, data):
    """Searched once, on few images, from a net that knows something: guesses would change with the last bit."""
    trained = tt.fit(copy.deepcopy(net), data, **QUICK | {"epochs": 12}, lr=0.05).model
    options = ("int2", "int4", "int8")
    return fliqs(trained, data, budget="bops<=2.5%", options=options, **QUICK | {"epochs": 8}, lr=0.02)


# -- the pieces of the search -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quality", "cost", "beta", "kind", "reward"),
    [
        (0.8, 15, 1, "absolute", -1.2),
        (0.95, 3, 2, "absolute", 0.15),
        (0.95, 3, 2, "one-sided", 0.95),
        (0.8, 10, 1, "soft", 1.6),
        (0.95, 3, 1, "hard", 0.95),
    ],
)
def test_rewards_of_the_fact_sheet(quality, cost, beta, kind, reward):
    assert reward_of(quality, cost, 5, beta=beta, kind=kind) == pytest.approx(reward)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_with_a_negative_beta_the_exponential_rewards_punish_cost(kind):
    assert reward_of(0.8, 10, 5, beta=-1, kind=kind) < reward_of(0.8, 6, 5, beta=-1, kind=kind)


def test_the_gradient_of_a_decision_is_advantage_times_p_minus_onehot():
    policy = Policy([3, 3, 2])
    with torch.no_grad():
        policy.logits.copy_(seeded(3, 3))
    p = policy.log_probs().detach().exp()
    assert p[2, 2] == 0 and torch.allclose(p.sum(1), torch.ones(3))
    onehot = F.one_hot(torch.tensor([2, 0, 1]), 3)
    (gradient,) = torch.autograd.grad(policy.loss([2, 0, 1], advantage=0.7, weight=0.0), policy.logits)
    torch.testing.assert_close(gradient, 0.7 * (p - onehot) / 3)


def test_the_entropy_of_even_distributions_is_ln_k_and_the_penalty_lowers_it():
    policy = Policy([3, 3])
    assert policy.entropy().item() == pytest.approx(math.log(3))
    with torch.no_grad():
        policy.logits.copy_(seeded(2, 3))
    before = policy.entropy().item()
    for _ in range(10):
        policy.learn([0, 0], reward=0.0, weight=0.1)  # no advantage: only the penalty acts
    assert policy.entropy().item() < before


def test_the_baseline_takes_the_reward_in_before_it_is_compared_with_it():
    policy = Policy([2])
    policy.learn([0], reward=1.0, weight=0.0)
    policy.learn([0], reward=2.0, weight=0.0)
    assert policy.baseline == pytest.approx(0.99 * 1.0 + 0.01 * 2.0)


@pytest.mark.parametrize(("schedule", "at"), [("cosine", 0.05), ("linear", 0.05), ("constant", 0.1), ("step", 0.1)])
def test_the_penalty_grows(schedule, at):
    weights = [entropy_weight(p, 0.2, 0.1, schedule) for p in np.linspace(0, 1, 21)]
    assert weights == sorted(weights) and weights[3] == 0.0 and weights[-1] == pytest.approx(0.1)
    assert entropy_weight(0.6 + 1e-9, 0.2, 0.1, schedule) == pytest.approx(at)


def bandit(entropy: float, seed: int, steps: int = 400) -> tuple[float, float, float, float]:
    """Six layers of different sensitivity: (reward of the choice, best reward, switches at the end, entropy)."""
    rng = np.random.default_rng(seed)
    bits, hurt = [2, 4, 8], np.array([0.5, 0.2, 0.1, 0.05, 0.02, 0.01])
    cost = CostModel("bops", 0, [[b * b for b in bits]] * 6, limit=6 * 16.0)

    def reward(picks):
        b = np.array([bits[k] for k in picks])
        return reward_of(1 - float((hurt * 4.0 ** (1 - b / 2)).sum()), cost.of(picks), cost.limit)

    policy, last, switches = Policy([3] * 6), None, 0
    for step in range(steps // 4, steps):
        picks = cost.decide(policy.noisy(rng))
        policy.learn(picks, reward(picks), entropy_weight(step / steps, 0.25, entropy))
        if step > 0.8 * steps:
            switches += sum(a != b for a, b in zip(picks, last))
        last = picks
    best = max(reward(p) for p in itertools.product(range(3), repeat=6))
    return reward(cost.decide(policy.log_probs())), best, switches / (0.2 * steps), policy.entropy().item()


def test_on_a_bandit_the_policy_comes_near_the_optimum_and_the_penalty_settles_it():
    """It commits early: most seeds end at one of the best two combinations, some at the third, however many steps."""
    held = [bandit(0.1, seed) for seed in range(3)]
    regret = [best - got for got, best, _, _ in held]
    assert np.mean(regret) <= 0.05 and max(regret) <= 0.1
    free = bandit(0.0, seed=1)
    assert held[1][2] < free[2] and held[1][3] < free[3]


def test_draws_follow_the_distributions():
    policy, rng = Policy([3, 2]), np.random.default_rng(0)
    with torch.no_grad():
        policy.logits.copy_(seeded(2, 3))
    draws = np.array([policy.noisy(rng).argmax(1).tolist() for _ in range(4000)])
    seen = np.stack([np.bincount(column, minlength=3) / 4000 for column in draws.T])
    np.testing.assert_allclose(seen, policy.log_probs().detach().exp(), atol=0.03)


def test_the_decision_is_the_most_probable_one_inside_the_limit():
    cost = CostModel("bops", 10, [[1, 4, 9], [1, 4, 9], [2, 8, 18]], limit=35)
    assert cost.decide(torch.zeros(3, 3)) == [0, 0, 0]  # a tie: the first
    for seed in range(10):
        lp = (3 * seeded(3, 3, seed=seed)).log_softmax(1)
        inside = [p for p in itertools.product(range(3), repeat=3) if cost.of(p) <= 35]
        best = max(inside, key=lambda p: sum(lp[d, k].item() for d, k in enumerate(p)))
        assert cost.decide(lp) == list(best)


def test_bops_of_resnet18_are_those_of_the_fact_sheet():
    with torch.device("meta"):
        model = tt.create_model("resnet18")
    held = layers(model, skip=())
    data = type("Data", (), {"spec": tt.core.artifact.InputSpec((3, 224, 224), (0.5,) * 3, (0.5,) * 3)})
    names = list(held)

    def bops(form: str) -> float:
        cost = cost_of(model, data, held, {}, names, [[form]] * len(names), "bops<=100%")
        return cost.of([0] * len(names))

    assert bops("int8") / 64 * 256 / 1e9 == pytest.approx(464.4, abs=0.05)
    assert bops("e4m3") / bops("e2m1") == 4


# -- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["int2", "int4", "int8", "e2m1", "e4m3"])
@pytest.mark.parametrize("conv", [None, CONV])
def test_a_layer_rounds_weights_per_channel_and_activations_per_tensor(form, conv):
    shape, x = ((8, 16), seeded(4, 16)) if conv is None else ((8, 3, 3, 3), seeded(2, 3, 5, 5))
    layer, f = MixedLayer(shape, conv=conv, weight_format=form, act_format=form), Format(form)
    w = layer.weight.detach()
    scale = w.flatten(1).abs().amax(1).reshape(-1, *(1 for _ in shape[1:])) / f.largest
    s = x.abs().max() / f.largest
    w_q, x_q = f.round(w / scale) * scale, f.round(x / s) * s
    want = F.linear(x_q, w_q, layer.bias) if conv is None else F.conv2d(x_q, w_q, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), want)
    scale_8 = MixedLayer(shape, conv=conv)
    scale_8.weight.data.fill_(1.0)[0].mul_(127)
    assert scale_8.weight_scale().flatten()[:2].tolist() == [1.0, pytest.approx(1 / 127)]


@pytest.mark.parametrize("form", ["int2", "int8", "e2m1"])
def test_weights_and_inputs_really_receive_the_straight_through_gradient(form):
    layer = MixedLayer((4, 6), bias=False, weight_format=form, act_format=form)
    x = seeded(3, 6).requires_grad_()
    layer(x).sum().backward()
    f = Format(form)
    scale = layer.weight_scale()
    w_q = f.round(layer.weight.detach() / scale) * scale
    x_q = act(x.detach(), f, x.detach().abs().max())
    torch.testing.assert_close(layer.weight.grad, x_q.sum(0).expand(4, 6))
    torch.testing.assert_close(x.grad, w_q.sum(0).expand(3, 6))


def test_in_eval_mode_an_image_does_not_depend_on_its_batch():
    layer = MixedLayer((4, 6), act_format="int4")
    for seed in range(5):
        layer(seeded(8, 6, seed=seed))
    layer.eval()
    x = seeded(8, 6, seed=9)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))


@pytest.mark.parametrize("form", ["int2", "int3", "int4", "int5", "int8", "e2m1", "e3m2", "e4m3", "e5m2"])
def test_the_packed_layer_computes_the_same_from_codes_alone(form):
    model = nn.Sequential(MixedLayer((8, 3, 3, 3), conv=CONV, weight_format=form, act_format=form))
    x = seeded(2, 3, 5, 5)
    model(x)
    model.eval()
    codes_only = packed(model).eval()
    assert [n for n, _ in codes_only.named_parameters()] == ["0.bias"]
    assert codes_only[0].weight.packed.numel() == -(-8 * 27 * Format(form).bits // 8)
    with torch.no_grad():
        torch.testing.assert_close(codes_only(x), model(x), rtol=1e-6, atol=1e-6)


# -- one run ----------------------------------------------------------------------------------------------------------


def test_the_result_is_inside_the_budget_and_measure_says_so(net, small, tmp_path, data):
    big, cost = (tt.measure(m, (1, 8, 8), what=("params", "macs", "bops", "size")) for m in (net, small))
    assert cost.bops <= 0.025 * big.bops and cost.params == big.params and cost.macs == big.macs
    forms = formats_of(small)
    ends = [n for n in layers(net, skip=()) if n not in layers(net)]
    assert {forms[n] for n in ends} == {"int8"} and set(forms.values()) <= {"int2", "int4", "int8"}
    file = tt.save(small, tmp_path / "small") / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == cost.size < 0.3 * big.size


def test_a_budget_on_bytes_holds_exactly(net, data):
    small = fliqs(net, data, budget="size<=20%", options=("int2", "int4", "int8"), **QUICK | {"epochs": 1})
    assert tt.measure(small, (1, 8, 8), what="size").size <= 0.2 * tt.measure(net, (1, 8, 8), what="size").size


def test_it_is_loaded_by_another_process(small, tmp_path, data):
    tt.save(small, tmp_path / "small", spec=data.spec)
    code = (
        "import torch, trimtab as tt; x = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8); "
        f"print(repr(tt.load({str(tmp_path / 'small')!r})(x).tolist()))"
    )
    said = python(code)
    with torch.no_grad():
        assert torch.equal(torch.tensor(eval(said)), small(torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)))


def test_a_model_that_is_not_packed_is_loaded_and_trained_on(net, data, tmp_path):
    latent = fliqs(net, data, formats="int4", pack=False, **QUICK | {"epochs": 1})
    tt.save(latent, tmp_path / "latent")
    again = tt.load(tmp_path / "latent")
    assert formats_of(again) == formats_of(latent)
    before = {n: p.detach().clone() for n, p in again.named_parameters()}
    tt.fit(again, data, epochs=1, lr=0.01, progress=False)
    assert all(not torch.equal(p, before[n]) for n, p in again.named_parameters() if p.ndim > 1)
    x = seeded(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(packed(again).eval()(x), again.eval()(x), rtol=1e-5, atol=1e-5)


def test_the_file_is_in_qdq_form_small_and_computes_the_same(net, small, data, tmp_path):
    big = tt.export(net, tmp_path / "big.onnx", spec=data.spec, exporter="classic")
    done = tt.export(small, tmp_path / "small.onnx", data=data, split="test", exporter="classic")
    ops = [n.op_type for n in read_onnx(done.path).graph.node]
    assert ops.count("QuantizeLinear") == len(layers(net, skip=()))  # an input of every layer
    images = next(iter(data.loader("test", batch_size=80, shuffle=False, augment=None)))["image"]
    with torch.no_grad():
        off = np.abs(OnnxModel(done.path).logits(images.numpy()) - small.eval()(images).numpy())
    assert np.quantile(off, 0.95) < 1e-3  # the last bit of a sum may turn an activation into the next level
    assert done.size < 0.5 * big.size
    assert abs(done.accuracy - tt.evaluate(small, data)["accuracy"]) < 0.03
    assert measure_onnx(done.path, what=("macs",)).macs == tt.measure(net, (1, 8, 8)).macs


def test_float_formats_export_too(net, data, tmp_path):
    small = fliqs(net, data, budget="bops<=3%", options=("e2m1", "e3m2", "e4m3"), **QUICK | {"epochs": 1})
    done = tt.export(small, tmp_path / "small.onnx", data=data, exporter="classic")
    assert {f[0] for f in formats_of(small).values()} == {"e", "i"} and done.agreement > 0.95


def test_a_killed_search_goes_on_to_the_same_formats_and_weights(net, data, tmp_path):
    given = {"budget": "bops<=2.5%", "options": ("int2", "int4", "int8"), **QUICK}
    whole = fliqs(net, data, **given)

    class Killed(Exception):
        pass

    def kill(row):
        raise Killed

    with pytest.raises(Killed):
        fliqs(net, data, **given, out=tmp_path, checkpoint_every=0, on_epoch=kill)
    for _ in range(2):  # to the end, and once more when it is complete
        resumed = fliqs(net, data, **given, out=tmp_path, checkpoint_every=0)
        assert formats_of(resumed) == formats_of(whole)
        assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())


def test_the_surgery_passes_the_battery(data):
    def operate(model, size):
        images = load_data("digits", limit=60) if size[0] == 1 else _coloured(size)
        return fliqs(model, images, formats="int4", **QUICK | {"epochs": 1})

    testing.check_surgery(operate, slow=False, skip=("smaller",), in_chans=1, img_size=8)


def _coloured(size):
    pixels = np.random.default_rng(0).integers(0, 255, (60, *size), dtype=np.uint8)
    return tt.data.Data.from_arrays((pixels, np.arange(60) % 10))


# -- the objective ----------------------------------------------------------------------------------------------------


def searching(choices=("int2", "int8"), **given):
    model = nn.Sequential(nn.Flatten(), MixedLayer((8, 4)), nn.ReLU(), MixedLayer((3, 8)))
    search = Search(None, ["1", "3"], [list(choices)] * 2, **given)
    search.cost = CostModel("bops", 0, [[1, 16]] * 2, 17)
    batch = Batch(image=seeded(6, 1, 2, 2), label=torch.arange(6) % 3)
    search.setup(model, batch)
    return model, search, batch


def test_formats_are_even_then_drawn_then_settled():
    model, search, batch = searching(delay=0.25, settle=0.1)
    first = search.policy.logits.detach().clone()
    seen = set()
    for _ in range(20):
        list(search.losses(model, batch, Context(progress=0.2)))
        seen.add(tuple(formats_of(model).values()))
    assert len(seen) == 4 and torch.equal(search.policy.logits, first)
    for _ in range(3):
        list(search.losses(model, batch, Context(progress=0.5)))
    learned = search.policy.logits.detach().clone()
    assert not torch.equal(learned, first)
    list(search.losses(model, batch, Context(progress=0.95)))
    assert torch.equal(search.policy.logits, learned)
    picks = search.cost.decide(search.policy.log_probs())
    assert list(formats_of(model).values()) == [("int2", "int8")[k] for k in picks]


def test_once_the_policy_learns_what_is_drawn_is_inside_the_budget():
    model, search, batch = searching(delay=0.25)  # two layers, and bit-operations for one of int8 only
    seen = set()
    for _ in range(30):
        list(search.losses(model, batch, Context(progress=0.5)))
        seen.add(tuple(formats_of(model).values()))
    assert seen == {("int2", "int2"), ("int2", "int8"), ("int8", "int2")}


def test_an_objective_that_yields_several_losses_is_passed_through():
    class Two(tt.learn.Classify):
        def losses(self, model, batch, ctx):
            yield super().losses(model, batch, ctx)
            yield {"again": super().losses(model, batch, ctx)}

    model, search, batch = searching()
    search.inner = Two()
    assert len(list(search.losses(model, batch, Context(progress=0.5)))) == 2


# -- the door ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"budget": "bops<=0.1%"}, r"bops<=0.1% cannot be met: with the smallest formats bops is .* % of the model|%"),
        ({"budget": "macs<=50%"}, "budget must be one upper bound on bops or size, got 'macs<=50%'"),
        ({"options": ("int4", "int4")}, "options must be different formats"),
        ({"options": ("int4", "fp8")}, "a format must be int2 to int8"),
        ({"formats": {"nope": "int4"}}, "formats must name layers among"),
        ({"at_least": {"*": 9}}, "at_least must leave"),
        ({"delay": 0.8, "settle": 0.3}, "delay and settle are shares of the run"),
        ({"reward": "linear"}, "reward must be one of absolute"),
        ({"schedule": "square"}, "schedule must be one of cosine"),
        ({"policy_lr": 0.0}, "policy_lr must be positive"),
        ({"epochs": 0}, "epochs must be a positive integer, got 0"),
        ({"keep": "best"}, "keep cannot be chosen"),
    ],
)
def test_wrong_arguments_are_refused_at_the_door(net, data, kwargs, message):
    with pytest.raises((ValueError, BudgetError), match=message):
        fliqs(net, data, **{"epochs": 1, **kwargs})


def test_layers_can_be_given_more_bits(net, data):
    name = next(iter(layers(net)))
    small = fliqs(net, data, budget="bops<=4%", options=("int2", "int8"), at_least={name: 8}, **QUICK | {"epochs": 1})
    assert formats_of(small)[name] == "int8"
