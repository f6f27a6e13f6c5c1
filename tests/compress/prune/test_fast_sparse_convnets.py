"""Fast Sparse ConvNets: the fact sheet's exact checks, the masks while training, and what becomes of the model."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import yaml
from torch import nn

import trimtab as tt
from tests.elsewhere import python
from trimtab import testing
from trimtab.compress.prune.fast_sparse_convnets import (
    MagnitudeSchedule,
    fast_sparse_convnets,
    fold,
    keep_largest,
    plan,
    schedule,
)
from trimtab.core.artifact import InputSpec
from trimtab.core.cost import measure
from trimtab.core.edit import apply, from_json, to_json
from trimtab.core.errors import SurgeryError
from trimtab.nn.sparse import SparseConv1x1, densify, kernel

# name -> parameters, weights of 1x1 convolutions, those in squeeze-excite, share of the convolutions' MACs in per cent
NETWORKS = {
    "mobilenetv1_100": (4_231_976, 3_139_584, 0, 95.0),
    "mobilenetv2_100": (3_504_872, 2_124_672, 0, 89.5),
    "efficientnet_b0": (5_288_548, 3_773_312, 627_200, 88.2),
    "efficientnet_b1": (7_794_184, 6_179_456, 1_108_480, 89.0),
}
# pixels x out x in
SHAPES = [
    (12544, 16, 32), (12544, 96, 16), (3136, 24, 96), (3136, 144, 24), (3136, 24, 144),
    (784, 32, 144), (784, 192, 32), (784, 32, 192), (196, 64, 192), (196, 384, 64),
    (196, 64, 384), (196, 96, 384), (196, 576, 96), (196, 96, 576), (49, 160, 576),
    (49, 960, 160), (49, 160, 960), (49, 320, 960), (49, 1280, 320),
]  # fmt: skip


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def toy() -> nn.Module:
    """A small separable network for images (1, 8, 8); no batch norm, whose statistics depend on the batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32), nn.Conv2d(32, 64, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(1024, 10),
        )  # fmt: skip
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
    return net


def sparse_layers(model: nn.Module) -> dict[str, SparseConv1x1]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseConv1x1)}


# -- exact checks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_shares_of_1x1_convolutions_are_those_of_the_fact_sheet(name):
    params, weights, squeeze, share = NETWORKS[name]
    model = on_meta(name)
    cost = measure(model, (3, 224, 224), what="params", per_layer=True)
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    small = {n for n, m in convs.items() if m.kernel_size == (1, 1)}
    assert cost.params == params
    assert sum(convs[n].weight.numel() for n in small) == weights
    macs = {row.name: row.macs for row in cost.layers if row.name in convs}
    assert 100 * sum(macs[n] for n in small) / sum(macs.values()) == pytest.approx(share, abs=0.06)
    chosen = [e.kwargs for e in plan(model, (3, 224, 224), sparsity=0.5)]
    assert sum(k["in_channels"] * k["out_channels"] for k in chosen) == weights - squeeze


def test_the_19_shapes_of_mobilenet_v2():
    model = on_meta("mobilenetv2_100")
    rows = {r.name: r for r in measure(model, (3, 224, 224), per_layer=True).layers}
    shapes = []
    for edit in plan(model, (3, 224, 224)):
        out, into = edit.kwargs["out_channels"], edit.kwargs["in_channels"]
        shapes.append((rows[edit.module].activations // out, out, into))
    assert list(dict.fromkeys(shapes)) == SHAPES


def test_cubic_schedule():
    ramp = {"sparsity": 0.9, "start": 0.2, "end": 0.6}
    assert schedule(0.2, **ramp) == 0 == schedule(0.0, **ramp)
    assert schedule(0.6, **ramp) == schedule(1.0, **ramp) == 0.9
    assert schedule(0.4, **ramp) == pytest.approx(0.875 * 0.9)
    assert (schedule(0.6, **ramp) - schedule(0.6 - 1e-4, **ramp)) / 1e-4 < 1e-5  # flat at the end


def test_ideal_speed_up_of_mobilenet_v1_at_90_percent():
    model = on_meta("mobilenetv1_100")
    convs = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}

    def macs(net):
        return sum(r.macs for r in measure(net, (3, 224, 224), per_layer=True).layers if r.name in convs)

    small = apply(on_meta("mobilenetv1_100"), plan(model, (3, 224, 224), sparsity=0.9))
    assert macs(model) / macs(small) == pytest.approx(6.9, abs=0.05)


def test_unstructured_37_x_24_at_80_percent_keeps_178():
    weight = torch.randn(37, 24, generator=torch.Generator().manual_seed(0))
    keep = keep_largest(weight, 0.8)
    assert keep.sum() == 178
    assert weight[keep].abs().min() > weight[~keep].abs().max()


@pytest.mark.parametrize("block", [2, 4])
@pytest.mark.parametrize("out_channels", [37, 40])
def test_block_masks_are_exact_blocks_chosen_by_mean_magnitude(block, out_channels):
    weight = torch.randn(out_channels, 24, generator=torch.Generator().manual_seed(0))
    keep = keep_largest(weight, 0.8, block)
    body = out_channels // block * block
    blocks, score = keep[:body].unflatten(0, (-1, block)), weight[:body].abs().unflatten(0, (-1, block)).mean(1)
    assert torch.equal(blocks.all(1), blocks.any(1))
    on = blocks.all(1)
    assert on.sum() == round(0.2 * on.numel())
    assert score[on].min() > score[~on].max()
    left = keep[body:]
    assert left.sum() == round(0.2 * left.numel())


# -- which layers ---------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.strided = nn.Conv2d(16, 16, 1, stride=2)
        self.grouped = nn.Conv2d(16, 16, 1, groups=2)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, padding=1)
        self.twice = nn.Conv2d(16, 16, 1)
        self.again = nn.Conv2d(16, 16, 1)
        self.again.weight = self.twice.weight
        self.squeeze = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        x = self.grouped(self.strided(self.pointwise(self.first(x))))
        x = self.again(self.twice(self.depthwise(x)))
        return self.squeeze(x.mean((2, 3), keepdim=True)).flatten(1)


def test_only_plain_1x1_convolutions_on_more_than_one_pixel_become_sparse():
    assert [e.module for e in plan(Mixed(), (3, 8, 8))] == ["pointwise"]


def test_every_layer_has_the_same_sparsity_and_late_ones_have_blocks():
    model = tt.create_model("trim_mobile_80k", num_classes=10)
    small = fast_sparse_convnets(model, (3, 32, 32), sparsity=0.8, block=4, late=0.5, epochs=0)
    layers = list(sparse_layers(small).values())
    assert [m.block for m in layers] == [1] * (len(layers) // 2) + [4] * (len(layers) - len(layers) // 2)
    assert all(m.sparsity == pytest.approx(0.8, abs=0.5 * 4 / m.weight.numel()) for m in layers)
    kept = {type(m) for n, m in small.named_modules() if n.startswith("stem")}
    assert SparseConv1x1 not in kept and nn.Conv2d in kept


def test_plan_is_what_is_done():
    model = toy()
    edits = plan(model, (1, 8, 8), sparsity=0.7, block=2, late=1.0)
    small = fast_sparse_convnets(model, (1, 8, 8), sparsity=0.7, block=2, late=1.0, epochs=0)
    assert from_json(json.loads(json.dumps(to_json(edits)))) == edits
    fresh = apply(toy(), edits).eval()
    fresh.load_state_dict(small.state_dict())
    x = torch.ones(1, 1, 8, 8)
    with torch.no_grad(), kernel("csr"):
        assert torch.equal(fresh(x), small.eval()(x))


# -- training -------------------------------------------------------------------------------------------------------


def half() -> MagnitudeSchedule:
    return MagnitudeSchedule(sparsity=0.5)


def test_objective_passes_the_battery():
    testing.check_objective(half, model=toy, slow=False)


class Recorder(MagnitudeSchedule):
    """Notes which weights of the first 1x1 convolution are masked at each step."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self._seen: list[torch.Tensor] = []

    def losses(self, model, batch, ctx):
        loss = super().losses(model, batch, ctx)
        self._seen.append(next(iter(self._layers.values())).mask.clone())
        return loss


def test_masks_follow_the_ramp_let_weights_return_and_then_stay():
    objective = Recorder(sparsity=0.8, start=0.25, end=0.75, updates=20)
    data = tt.load_data("digits")
    result = tt.fit(toy(), data, objective, epochs=8, batch_size=64, lr=0.05, progress=False, keep="last")
    seen = torch.stack(objective._seen).flatten(1)
    share = 1 - seen.float().mean(1)
    steps = len(seen)
    assert share[: steps // 4].max() == 0
    assert share[int(0.5 * steps)] == pytest.approx(0.875 * 0.8, abs=0.02)
    assert share[-1] == pytest.approx(0.8, abs=0.001)
    assert ((~seen[:-1]) & seen[1:]).any()  # some weight came back
    assert (seen[int(0.76 * steps) :] == seen[-1]).all()
    assert [round(r["sparsity"], 2) for r in result.history][::7] == [0.0, 0.8]
    for name, kept in objective.kept.items():  # a plain model with real zeros
        conv = result.model.get_submodule(name)
        assert type(conv) is nn.Conv2d
        assert not conv.weight[:, :, 0, 0][~kept].any() and conv.weight[:, :, 0, 0][kept].all()


def test_gradual_training_beats_dropping_weights_at_once():
    data = tt.load_data("digits")
    model = tt.fit(toy(), data, epochs=6, lr=0.05, progress=False).model
    trained = fast_sparse_convnets(model, data, sparsity=0.9, epochs=8, lr=0.05, progress=False)
    at_once = fast_sparse_convnets(model, data, sparsity=0.9, epochs=0)
    accuracy = [tt.evaluate(m, data)["accuracy"] for m in (model, trained, at_once)]
    assert accuracy[1] > accuracy[2] + 0.2
    assert accuracy[1] > accuracy[0] - 0.1


def test_a_training_that_is_cut_short_is_sparse_all_the_same():
    data = tt.load_data("digits", limit=300)
    small = fast_sparse_convnets(toy(), data, epochs=500, time_limit=0.3, progress=False)
    assert [round(m.sparsity, 2) for m in sparse_layers(small).values()] == [0.9, 0.9]


def test_an_average_of_the_weights_has_the_mask_too():
    data = tt.load_data("digits", limit=300)
    small = fast_sparse_convnets(toy(), data, sparsity=0.5, epochs=4, ema=0.9, progress=False)
    assert all(m.sparsity == 0.5 for m in sparse_layers(small).values())
    assert all(m.values.all() for m in sparse_layers(small).values())


def test_resumed_after_the_end_it_gives_the_same(tmp_path):
    data = tt.load_data("digits", limit=300)
    arguments = {"sparsity": 0.8, "epochs": 2, "out": tmp_path, "progress": False, "weight_decay": 0.1}
    first = fast_sparse_convnets(toy(), data, **arguments).state_dict()
    again = fast_sparse_convnets(toy(), data, **arguments).state_dict()
    assert all(torch.equal(again[k], v) for k, v in first.items())


def test_zeros_survive_further_training_and_may_return_when_asked():
    data, net = tt.load_data("digits"), toy()
    for i in (2, 5):
        net[i].weight.data.mul_(0.2)  # small enough for others to overtake in a short training
    small = fast_sparse_convnets(net, data, sparsity=0.9, epochs=0)
    masks = {n: m.keep.clone() for n, m in sparse_layers(small).items()}
    values = {n: m.values.detach().clone() for n, m in sparse_layers(small).items()}
    tt.fit(small, data, epochs=1, lr=0.05, progress=False)
    for name, layer in sparse_layers(small).items():
        assert torch.equal(layer.weight[:, :, 0, 0] != 0, masks[name])
        assert not torch.equal(layer.values, values[name])
    again = fast_sparse_convnets(small, data, sparsity=0.9, epochs=4, start=0.5, batch_size=32, lr=0.05, progress=False)
    for name, layer in sparse_layers(again).items():
        assert layer.keep.sum() == masks[name].sum()
        assert (layer.keep & ~masks[name]).any()


# -- the model that comes out ---------------------------------------------------------------------------------------


def at_once(block):
    def operate(model, size):
        return fast_sparse_convnets(model, size, sparsity=0.8, block=block, late=0.5, epochs=0)

    return operate


@pytest.mark.parametrize("block", [1, 4])
def test_surgery_passes_the_battery(block):
    testing.check_surgery(at_once(block), model="trim_mobile_10k", slow=False)


def test_its_file_is_checked_and_smaller_where_there_are_zeros_enough(tmp_path):
    testing.check_surgery(
        at_once(1), model="trim_mobile_10k", slow=True, skip=[n for n, _ in testing.surgery_checks(slow=False)]
    )
    net, spec = toy().eval(), InputSpec((1, 8, 8), (0.5,), (0.5,))
    small = fast_sparse_convnets(net, (1, 8, 8), epochs=0).eval()
    dense, sparse = (
        tt.export(m, tmp_path / f"{n}.onnx", spec=spec, exporter="classic").size for n, m in (("d", net), ("s", small))
    )
    assert sparse < 0.9 * dense


SCRIPT = """
import json, sys, torch, trimtab as tt
model = tt.load(sys.argv[1])
x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
with torch.no_grad():
    print(json.dumps({"y": model(x)[0].tolist(), "kinds": sorted({type(m).__name__ for m in model.modules()})}))
"""


def test_kept_and_loaded_in_a_fresh_process_with_fewer_bytes(tmp_path):
    model = tt.create_model("trim_mobile_80k", num_classes=10).eval()
    small = fast_sparse_convnets(model, (3, 32, 32), sparsity=0.9, epochs=0).eval()
    for name, net in (("big", model), ("small", small)):
        tt.save(net, tmp_path / name)
    told = json.loads(python(SCRIPT, tmp_path / "small").strip().splitlines()[-1])
    assert "SparseConv1x1" in told["kinds"]
    x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(told["y"]), small(x)[0], rtol=1e-4, atol=1e-5)
    saved = {n: (tmp_path / n / "model.safetensors").stat().st_size for n in ("big", "small")}
    size = {n: measure(m, (3, 32, 32), what="size").size for n, m in (("big", model), ("small", small))}
    layers = sparse_layers(small).values()
    gone = sum(4 * m.weight.numel() - 4 * m.values.numel() - m.mask.numel() for m in layers)
    assert size["big"] - size["small"] == gone > 0.85 * sum(4 * m.weight.numel() for m in layers)
    assert saved["big"] - saved["small"] == pytest.approx(gone, abs=5000)  # names in the header


def test_same_function_as_the_dense_masked_model_and_macs_of_what_is_left():
    model = tt.create_model("trim_mobile_10k", num_classes=10).eval()
    small = fast_sparse_convnets(model, (3, 32, 32), sparsity=0.75, epochs=0).eval()
    dense = densify(small)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name in ("numba", "csr", "dense"):
            with kernel(name):
                torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)
    rows = {r.name: r.macs for r in measure(dense, (3, 32, 32), per_layer=True).layers}
    less = {r.name: r.macs for r in measure(small, (3, 32, 32), per_layer=True).layers}
    for name, layer in sparse_layers(small).items():
        assert less[name] == rows[name] * layer.values.numel() // layer.weight.numel()
    assert {n: m for n, m in less.items() if n not in sparse_layers(small)} == {
        n: m for n, m in rows.items() if n not in sparse_layers(small)
    }


@pytest.mark.parametrize("name", ["trim_mobile_10k", "mobilenetv2_050"])
def test_batch_norms_and_relus_fold_without_touching_zeros(name):
    case = testing.ModelCase(name, input_size=(3, 32, 32))
    small = fast_sparse_convnets(case.model, (3, 32, 32), sparsity=0.8, epochs=0).eval()
    folded = fold(small, (3, 32, 32))
    x = case.images(2)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), small(x), rtol=1e-3, atol=1e-4)
    layers, before = sparse_layers(folded), sparse_layers(small)
    assert all(torch.equal(layers[n].keep, m.keep) and layers[n].bias is not None for n, m in before.items())
    assert any(m.act for m in layers.values()) and not all(m.act for m in layers.values())  # linear bottlenecks
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) for net in (small, folded)]
    assert norms[0] - norms[1] == len(layers)


def test_a_folded_model_is_kept_too(tmp_path):
    model = tt.create_model("trim_mobile_10k", num_classes=10).eval()
    folded = fold(fast_sparse_convnets(model, (3, 32, 32), epochs=0), (3, 32, 32)).eval()
    x = torch.ones(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(tt.load(tt.save(folded, tmp_path))(x), folded(x))
        torch.testing.assert_close(densify(folded)(x), folded(x), rtol=1e-4, atol=1e-5)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y  # the raw output is needed as well


def test_folding_that_would_change_the_function_is_refused():
    net = Reused()
    net.norm.running_mean.fill_(3.0)
    with pytest.raises(SurgeryError, match="changes what the model computes"):
        fold(fast_sparse_convnets(net, (4, 8, 8), sparsity=0.5, epochs=0), (4, 8, 8))


def test_a_recipe_runs_it(tmp_path):
    recipe = {
        "data": {"spec": "digits", "limit": 200}, "model": {"name": "trim_mobile_10k"}, "out": str(tmp_path / "out"),
        "phases": [{"compress": {"method": "fast_sparse_convnets", "sparsity": 0.8, "epochs": 1, "progress": False}}],
    }  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    from trimtab.compact.recipe import run

    run(file)
    assert sparse_layers(tt.load(tmp_path / "out"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be above 0 and below 1, got 1.0"),
        ({"block": 3}, "block must be one of 1, 2, 4, got 3"),
        ({"late": 2}, "late must be a share from 0 to 1, got 2"),
        ({"start": 0.8, "end": 0.5}, "0 <= start < end <= 1, got 0.8, 0.5"),
        ({"updates": 0}, "updates must be a positive integer, got 0"),
        ({"epochs": -1}, "epochs must be a whole number, 0 or more, got -1"),
        ({"epochs": 3}, "data must be a Data to train on, or epochs 0, got tuple and 3"),
        ({"keep": "best"}, "keep must not be given"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        fast_sparse_convnets(toy(), (1, 8, 8), **{"epochs": 0, **arguments})


def test_a_model_without_1x1_convolutions_is_refused():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    with pytest.raises(SurgeryError, match="no 1x1 convolution to make sparse"):
        fast_sparse_convnets(net, (1, 8, 8), epochs=0)
    with pytest.raises(ValueError, match="input size"):
        fast_sparse_convnets(toy(), "digits", epochs=0)
