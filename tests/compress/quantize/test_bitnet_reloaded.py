"""BitNet b1.58 Reloaded: the layer's formula, the codes' statistics, packed storage, and that it learns."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from tests.elsewhere import python
from trimtab import testing
from trimtab.compress import bitnet_reloaded
from trimtab.compress.quantize.bitnet_reloaded import BitLayer, PackedBitLayer, Ramp, packed, plan, scale_of
from trimtab.core.edit import history
from trimtab.data import load_data
from trimtab.learn import Batch, Context

CONV = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "groups": 2}


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def gaussian(measure: str) -> torch.Tensor:
    w = seeded(512, 512)
    return (w * scale_of(w, measure)).round().clamp(-1, 1)


# -- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["median", "mean", "max"])
def test_the_layer_is_the_four_step_formula_with_the_bias_added_last(measure):
    layer = BitLayer((24, 40), measure=measure)
    nn.init.normal_(layer.bias)
    x = seeded(6, 40)
    normed = F.layer_norm(x, (40,))
    s_x = 128 / normed.abs().amax(-1, keepdim=True)
    x_q = (normed * s_x).round().clamp(-128, 127)
    m = {"median": layer.weight.abs().median(), "mean": layer.weight.abs().mean(), "max": layer.weight.abs().max()}
    s_w = 1 / m[measure]
    w_q = (layer.weight * s_w).round().clamp(-1, 1)
    with torch.no_grad():
        assert torch.equal(layer(x), x_q @ w_q.T / (s_w * s_x) + layer.bias)
    # with gradients on the value is the same: (u + (q - u)) is exact for these numbers
    assert torch.equal(layer(x), x_q @ w_q.T / (s_w * s_x) + layer.bias)


def test_the_largest_positive_input_clips_to_127_the_largest_negative_reaches_minus_128():
    layer = BitLayer((1, 4), bias=False, norm=False, measure="max")
    layer.weight.data = torch.tensor([[1.0, 0, 0, 0]])
    with torch.no_grad():
        assert layer(torch.tensor([[2.0, 1, 0, -1]])).item() == 2 * 127 / 128
        assert layer(torch.tensor([[-2.0, 1, 0, -1]])).item() == -2


@pytest.mark.parametrize("conv", [None, CONV])
def test_the_gradient_of_the_weight_is_that_of_a_dense_layer_at_quantized_operands(conv):
    shape = (8, 6) if conv is None else (8, 3, 3, 3)
    layer = BitLayer(shape, conv=conv, norm=False)
    x = seeded(5, 6) if conv is None else seeded(5, 6, 7, 7)
    layer(x).square().sum().backward()
    codes, s_w = layer.codes()
    of = (-1,) if conv is None else (-3, -2, -1)
    s_x = 128 / x.abs().amax(of, keepdim=True)
    w = (codes / s_w).requires_grad_()
    x_hat = (x * s_x).round().clamp(-128, 127) / s_x
    bias = layer.bias.detach()
    y = F.linear(x_hat, w, bias) if conv is None else F.conv2d(x_hat, w, bias, **conv)
    y.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, w.grad, rtol=1e-4, atol=1e-4)


def test_no_gradient_is_masked_outside_the_clipping_range():
    layer = BitLayer((1, 3), bias=False, norm=False)
    layer.weight.data = torch.tensor([[0.1, -0.2, 50.0]])
    layer(torch.tensor([[1.0, 1.0, 1.0]])).sum().backward()
    assert (layer.weight.grad - 127 / 128).abs().max() < 1e-6


def test_strength_0_is_the_float_layer_up_to_float_noise():
    layer = BitLayer((16, 32))
    layer.strength = 0.0
    x = seeded(4, 32)
    want = F.linear(F.layer_norm(x, (32,)), layer.weight, layer.bias)
    assert (layer(x) - want).abs().max() < 2e-6 * want.abs().max()


@pytest.mark.parametrize(("measure", "share", "error"), [("mean", 0.3101, 0.264), ("median", 0.2641, 0.319)])
def test_zeros_and_squared_error_of_a_gaussian(measure, share, error):
    w, codes = seeded(512, 512), gaussian(measure)
    assert (codes == 0).double().mean().item() == pytest.approx(share, abs=2e-3)
    assert (codes / scale_of(w, measure) - w).square().mean().item() == pytest.approx(error, abs=4e-3)


def test_outliers_move_the_codes_of_the_mean_but_not_of_the_median():
    w = seeded(512, 512)
    hit = torch.rand(512, 512, generator=torch.Generator().manual_seed(1)) < 0.01
    changed = {}
    for measure in ("mean", "median"):
        before = (w * scale_of(w, measure)).round().clamp(-1, 1)
        big = torch.where(hit, 50 * w, w)
        after = (big * scale_of(big, measure)).round().clamp(-1, 1)
        changed[measure] = (before != after)[~hit].double().mean().item()
    assert changed["mean"] == pytest.approx(0.14, abs=0.01)
    assert changed["median"] == pytest.approx(0.003, abs=0.001)


def test_the_largest_weights_may_grow_without_any_effect_on_the_median():
    w = seeded(64, 64)
    big = torch.where(w.abs() >= w.abs().flatten().kthvalue(4055).values, 50 * w, w)
    assert torch.equal(scale_of(w, "median"), scale_of(big, "median"))


def test_the_median_of_an_even_number_is_the_lower_middle():
    assert scale_of(torch.tensor([1.0, -2.0, 3.0, 4.0]), "median").item() == 0.5


def test_more_than_half_zeros_saturate_the_rest():
    layer = BitLayer((1, 5))
    layer.weight.data = torch.tensor([[0.0, 0.0, 0.0, 0.01, -3.0]])
    assert layer.codes()[0].tolist() == [[0, 0, 0, 1, -1]]


def test_stochastic_signs_have_the_right_frequency_and_only_in_training():
    layer = BitLayer((1, 10_000), bias=False, stochastic=True, measure="max")
    layer.weight.data.fill_(0.25)
    layer.weight.data[0, 0] = 1.0
    torch.manual_seed(0)
    signs = layer.operand()[0].detach()
    assert set(signs.unique().tolist()) == {0.0, 1.0} and signs.mean().item() == pytest.approx(0.25, abs=0.02)
    assert layer.eval().operand()[0].detach().sum() == 1


def test_the_scale_is_kept_until_the_weights_change():
    layer = BitLayer((8, 8))
    first = layer.scale()
    assert layer.scale() is first
    with torch.no_grad():
        layer.weight.mul_(2)
    assert layer.scale().item() == pytest.approx(first.item() / 2)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.mul_(2)
    assert twin.scale().item() == pytest.approx(layer.scale().item() / 2)


# -- integers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["2-bit", "base-3"])
@pytest.mark.parametrize("conv", [None, CONV])
def test_the_packed_layer_computes_what_the_trained_one_computes(conv, storage):
    shape = (24, 40) if conv is None else (8, 3, 3, 3)
    net = nn.Sequential(BitLayer(shape, conv=conv, norm=conv is None))
    nn.init.normal_(net[0].bias)
    x = seeded(5, 40) if conv is None else seeded(5, 6, 7, 7)
    small = packed(net, storage=storage)
    assert isinstance(small[0], PackedBitLayer) and dict(small.named_parameters()).keys() == {"0.bias"}
    with torch.no_grad():
        assert torch.equal(small.eval()(x), net.eval()(x))


def test_int8_codes_with_int32_sums_give_the_same_output():
    layer = BitLayer((64, 256))
    x = seeded(32, 256)
    codes, s_w = layer.codes()
    normed = F.layer_norm(x, (256,))
    s_x = 128 / normed.abs().amax(-1, keepdim=True)
    x_q = (normed * s_x).round().clamp(-128, 127).to(torch.int8)
    sums = torch._int_mm(x_q, codes.T.contiguous())
    assert sums.dtype == torch.int32 and sums.abs().max() <= 128 * 256
    with torch.no_grad():
        assert torch.equal(sums / (s_w * s_x) + layer.bias, layer(x))


def test_float32_holds_the_largest_sums_exactly():
    ones = torch.ones(1, 131_071)
    assert F.linear(127 * ones, ones).item() == 127 * 131_071


# -- models ---------------------------------------------------------------------------------------------------------


def operate(model, size):
    return bitnet_reloaded(model, None, epochs=0)


@pytest.mark.parametrize("name", ["trim_10k", "cct_2_3x2_32"])
def test_the_battery(name):
    testing.check_surgery(operate, model=name, slow=False, skip=("smaller",))


def test_the_latent_model_passes_the_battery_too():
    testing.check_surgery(
        lambda m, size: bitnet_reloaded(m, None, epochs=0, storage=None), slow=False, skip=("smaller",)
    )


def test_measure_reports_bytes_that_are_really_stored_and_the_bits_it_computes_with(tmp_path):
    net = tt.create_model("trim_net", width=32, num_classes=10, in_chans=1, img_size=8)
    latent = bitnet_reloaded(net, None, epochs=0, storage=None)
    sizes = {}
    for name, model in {
        "float": net, "latent": latent, "2-bit": packed(latent), "base-3": packed(latent, storage="base-3"),
    }.items():  # fmt: skip
        cost = tt.measure(model, (1, 8, 8), what=("params", "macs", "size", "bops"))
        file = tt.save(model, tmp_path / name) / "model.safetensors"
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        # safetensors pads no tensor, so the file is the measured size and its header
        assert file.stat().st_size - header == cost.size
        sizes[name] = cost
    assert sizes["latent"].size == sizes["float"].size
    assert sizes["2-bit"].size < 0.12 * sizes["float"].size and sizes["base-3"].size < sizes["2-bit"].size
    scales = len(plan(net))
    assert sizes["2-bit"].params == sizes["float"].params and scales > 3
    assert sizes["2-bit"].macs == sizes["float"].macs
    assert sizes["2-bit"].bops == sizes["latent"].bops < 0.1 * sizes["float"].bops


def test_it_learns_saves_loads_elsewhere_and_exports(tmp_path):
    data = load_data("digits")
    net = mlp()
    small = bitnet_reloaded(net, data, skip=(), epochs=12, augment="none", progress=False, lr=5e-3)
    accuracy = tt.evaluate(small, data)["accuracy"]
    assert accuracy > 0.9 and sum(e.kind == "replace" for e in history(small).edits) == 6
    tt.save(small, tmp_path / "small", spec=data.spec)
    x = torch.stack([data.splits["test"].images[i].float() for i in range(4)])
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; from torch import nn; import trimtab as tt\n"
        "net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), "
        "nn.Linear(32, 10))\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r})\n"
        f"print(repr(tt.load({str(tmp_path / 'small')!r}, base=net)(x).tolist()))"
    )
    said = python(code)
    with torch.no_grad():
        assert torch.equal(torch.tensor(eval(said)), small(x))
    exported = tt.export(small, tmp_path / "small.onnx", data=data, split="test", exporter="classic")
    assert abs(exported.accuracy - accuracy) < 0.005 and "3 weights stored packed" in exported.notes[0]


def test_a_latent_model_is_loaded_and_trained_on_then_packed(tmp_path):
    data = load_data("digits", limit=300)
    latent = bitnet_reloaded(mlp(), data, storage=None, epochs=1, progress=False)
    tt.save(latent, tmp_path / "latent")
    again = tt.load(tmp_path / "latent", base=mlp())
    before = again[3].weight.detach().clone()
    tt.fit(again, data, epochs=1, opt="adamw", progress=False)
    assert not torch.equal(again[3].weight, before)
    small = packed(again)
    assert set(plan(mlp())[0].kwargs) >= {"shape", "measure"} and not any(
        "weight" in n for n, _ in small[3].named_parameters()
    )
    with torch.no_grad():
        x = seeded(3, 1, 8, 8)
        assert torch.equal(small.eval()(x), again.eval()(x))


def test_a_killed_training_goes_on_to_the_same_model(tmp_path):
    data = load_data("digits", limit=300)
    whole = bitnet_reloaded(mlp(), data, epochs=2, seed=3, ramp=0.5, progress=False, val=None)

    class Killed(Exception):
        pass

    def kill(row):
        raise Killed

    with pytest.raises(Killed):
        bitnet_reloaded(mlp(), data, epochs=2, seed=3, ramp=0.5, progress=False, val=None, out=tmp_path,
                        checkpoint_every=0, on_epoch=kill)  # fmt: skip
    resumed = bitnet_reloaded(mlp(), data, epochs=2, seed=3, ramp=0.5, progress=False, val=None, out=tmp_path)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())


def test_the_ramp_fades_in_and_never_shows_outside_the_losses():
    model = nn.Sequential(BitLayer((10, 4)))
    ramp, batch = Ramp(None, 0.5), Batch(image=seeded(6, 4), label=torch.arange(6))
    ramp.setup(model, batch)
    for progress, strength in ((0.0, 0.0), (0.25, 0.5), (0.75, 1.0)):
        ramp.losses(model, batch, Context(progress=progress))
        assert model[0].strength == strength
    ramp.losses(model, batch, Context(progress=0.1))
    ramp.on_epoch_end(Context())
    assert model[0].strength == 1.0


def test_the_objective_passes_the_battery():
    testing.check_objective(lambda: Ramp(None, 0.5), slow=False)


# -- ONNX Runtime ---------------------------------------------------------------------------------------------------


def test_the_file_keeps_two_bits_per_weight_and_computes_the_same(tmp_path):
    net = tt.create_model("trim_net", width=32, num_classes=10, in_chans=1, img_size=8)
    spec = tt.load_data("digits").spec
    big = tt.export(net, tmp_path / "big.onnx", spec=spec, exporter="classic")
    small = tt.export(bitnet_reloaded(net, None, epochs=0), tmp_path / "small.onnx", spec=spec, exporter="classic")
    assert small.max_abs_diff < 1e-3 and small.size < 0.16 * big.size


def test_two_bit_products_agree_up_to_the_rounding_of_activations(tmp_path):
    from trimtab.core.onnx_file import read_onnx

    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    small = bitnet_reloaded(net, None, skip=("1",), epochs=0)
    spec = tt.load_data("digits").spec
    done = tt.export(small, tmp_path / "small.onnx", spec=spec, two_bit=True, exporter="classic")
    nodes = [n for n in read_onnx(done.path).graph.node if n.op_type == "MatMulNBits"]
    assert [tuple(a.i for a in n.attribute if a.name in "KN") for n in nodes] == [(256, 256), (256, 10)]
    assert tt.core.cost.measure_onnx(done.path, what=("macs",)).macs == tt.measure(net, (1, 8, 8)).macs
    with torch.no_grad():
        scale = small(seeded(16, 1, 8, 8)).abs().max().item()
    assert 0 < done.max_abs_diff < 0.03 * scale


def test_two_bit_is_refused_where_there_is_nothing_ternary(tmp_path):
    with pytest.raises(ValueError, match="two_bit needs a model with packed ternary layers"):
        tt.export(mlp(), tmp_path / "x.onnx", spec=tt.load_data("digits").spec, two_bit=True, exporter="classic")


# -- the door -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"measure": "mode"}, "measure must be one of median, mean, max, got 'mode'"),
        ({"storage": "int2"}, "storage must be one of 2-bit, base-3 or None, got 'int2'"),
        ({"act_bits": 9}, "act_bits must be an integer from 2 to 8, got 9"),
        ({"ramp": 1.0}, r"ramp must be in \[0, 1\), got 1.0"),
        ({"epochs": -1}, "epochs must be a non-negative integer, got -1"),
        ({"kinds": ("norm",)}, "kinds must be some of linear, conv"),
    ],
)
def test_wrong_arguments_are_refused_at_the_door(kwargs, message):
    with pytest.raises(ValueError, match=message):
        bitnet_reloaded(mlp(), None, **{"epochs": 0, **kwargs})


def test_the_model_and_the_random_state_are_left_alone():
    net = mlp()
    before, state = copy.deepcopy(net.state_dict()), torch.random.get_rng_state()
    bitnet_reloaded(net, load_data("digits", limit=100), epochs=1, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.isfinite([p.sum().item() for p in net.parameters()]).all()
