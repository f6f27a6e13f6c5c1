"""CompactifAI: profile, allocation, truncation and healing do what the paper and the budget say."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

import trimtab as tt
from tests.elsewhere import python
from trimtab import testing
from trimtab.compress import compactifai
from trimtab.compress.factorize.compactifai import merge, sensitivity, trainable, truncated
from trimtab.core.edit import history
from trimtab.core.errors import BudgetError, SurgeryError
from trimtab.nn.structured import StructuredLinear

SIZE = (1, 8, 8)
FREE = {"epochs": 0, "allocation": "error", "progress": False}


class Net(nn.Module):
    """Residual MLP blocks between an entry and a classifier: (B, 1, 8, 8) -> (B, 10)."""

    def __init__(self, width: int = 48, depth: int = 2):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 2, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)  # (B, 16, D)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


def fresh(**kwargs) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(**kwargs)


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def structured(model: nn.Module) -> dict[str, StructuredLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, StructuredLinear)}


@pytest.fixture(scope="module")
def data():
    return tt.load_data("digits", limit=600)


@pytest.fixture(scope="module")
def trained(data):
    model = fresh()
    tt.fit(model, data, epochs=15, opt="adamw", lr=5e-3, batch_size=32, augment="none", progress=False)
    return model


@pytest.fixture(scope="module")
def profile(trained, data):
    return sensitivity(trained, data, progress=False)


# -- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [2, 3, "lowrank"])
@pytest.mark.parametrize("allocation", ["error", "uniform"])
def test_a_share_of_the_parameters_is_met_and_nearly_used(sites, allocation):
    model = fresh()
    small = compactifai(model, SIZE, budget="params<=50%", sites=sites, **{**FREE, "allocation": allocation})
    assert 0.45 * params(model) < params(small) <= 0.5 * params(model)


def test_the_budget_is_nearly_used_between_two_points_of_the_profile(trained, data, profile):
    small = compactifai(trained, data, budget="params<=50%", profile=profile, epochs=0)
    assert 0.48 * params(trained) < params(small) <= 0.5 * params(trained)


def test_low_rank_meets_a_bound_on_macs():
    model = fresh()
    small = compactifai(model, SIZE, budget="macs<=50%, size<=60%", sites="lowrank", **FREE)
    before, after = (tt.measure(m, SIZE) for m in (model, small))
    assert 0.4 * before.macs < after.macs <= 0.5 * before.macs
    assert after.size <= 0.6 * before.size


def test_seventy_percent_of_the_linear_weights_can_go():
    model = fresh()
    linear = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head")
    small = compactifai(model, SIZE, budget=f"params<={params(model) - int(0.7 * linear)}", **FREE)
    left = sum(core.numel() for m in structured(small).values() for core in m.cores)
    assert 0.28 * linear < left <= 0.3 * linear


def test_a_budget_that_holds_already_changes_nothing():
    model = fresh()
    small = compactifai(model, SIZE, budget="params<=100%", **FREE)
    assert small is not model and not structured(small) and not history(small).edits


def test_an_unreachable_budget_says_how_near_it_came():
    with pytest.raises(BudgetError, match=r"params<=100 cannot be met: with the lowest ranks it is params 1.754k"):
        compactifai(fresh(), SIZE, budget="params<=100", **FREE)


# -- what is replaced ------------------------------------------------------------------------------------------------


def test_every_linear_layer_but_the_classifier_is_replaced_and_the_rest_is_untouched():
    model = fresh()
    small = compactifai(model, SIZE, budget="params<=30%", **FREE)
    assert list(structured(small)) == ["blocks.0.1", "blocks.0.3", "blocks.1.1", "blocks.1.3"]
    for name in ("stem.weight", "head.weight", "blocks.0.0.weight", "blocks.0.1.bias"):
        assert torch.equal(small.state_dict()[name], model.state_dict()[name])


def test_layers_are_chosen_by_patterns():
    small = compactifai(fresh(), SIZE, budget="params<=90%", layers=["blocks.1.*"], **FREE)
    assert {n.split(".")[1] for n in structured(small)} == {"1"}
    with pytest.raises(ValueError, match=r"layers must match some of blocks\.0\.1.*got 'stages\.\*'"):
        compactifai(fresh(), SIZE, layers="stages.*", **FREE)


def test_tied_shared_and_computed_weights_stay():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Embedding(48, 48)
            self.twice = nn.Linear(48, 48)
            self.again = self.twice
            self.normed = weight_norm(nn.Linear(48, 48))
            self.plain = nn.Linear(48, 48)
            self.out = nn.Linear(48, 48, bias=False)
            self.out.weight = self.token.weight

        def forward(self, x):
            return self.out(self.plain(self.normed(self.again(self.twice(self.token(x))))))

    tokens = torch.zeros(2, 5, dtype=torch.long)
    small = compactifai(Odd(), tokens, budget="params<=90%", layers="*", **FREE)
    assert list(structured(small)) == ["plain"]
    assert small.out.weight is small.token.weight


def test_conv1d_of_transformers_is_not_transposed():
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(96, 48), nn.GELU(), Conv1D(48, 96), nn.Linear(48, 10))
    nn.init.normal_(net[0].bias)
    for layer in (net[0], net[2]):  # (in, out): sums of two Kronecker products
        shapes = ((6, 12), (8, 8)) if layer is net[0] else ((8, 8), (12, 6))
        with torch.no_grad():
            layer.weight.copy_(sum(torch.kron(torch.randn(shapes[0]), torch.randn(shapes[1])) for _ in range(2)))
    x = torch.randn(2, 7, 48)
    small = compactifai(net, x, budget="params<=12%", **FREE)
    assert {n: m.ranks for n, m in structured(small).items()} == {"0": (2,), "2": (2,)}
    torch.testing.assert_close(small(x), net(x), rtol=1e-3, atol=1e-3)


def test_multi_head_attention_reads_the_weight_of_a_truncated_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, 48)
    small = compactifai(layer, x, budget="params<=80%", layers="*", **FREE)
    assert sorted(structured(small)) == ["linear1", "linear2", "self_attn.out_proj"]
    dense = merge(small)
    torch.testing.assert_close(small(x), dense(x))
    torch.testing.assert_close(small.eval()(x), dense.eval()(x))  # the fused path
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(SurgeryError, match="Sequential has no linear layer that would get smaller"):
        compactifai(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(288, 10)), SIZE, **FREE)


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [2, 3])
def test_structure_that_is_there_costs_nothing(sites):
    model = fresh().eval()
    shapes = [((12, 6), (8, 8)), ((8, 8), (6, 12))]
    if sites == 3:
        shapes = [((6, 3), (4, 4), (4, 4)), ((4, 4), (4, 4), (3, 6))]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.blocks:
            for linear, factors in zip((block[1], block[3]), shapes):
                product = torch.ones(1, 1)
                for shape in factors:
                    product = torch.kron(product, torch.randn(shape, generator=generator))
                linear.weight.copy_(product / product.norm())
    small = compactifai(model, SIZE, budget="params<=2500", sites=sites, **{**FREE, "allocation": "uniform"})
    x = torch.randn(3, *SIZE)
    assert len(structured(small)) == 4
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_merged_layers_compute_the_same(tmp_path):
    small = compactifai(fresh(), SIZE, budget="params<=40%", **FREE).eval()
    dense, x = merge(small), torch.randn(3, *SIZE)
    assert not structured(dense) and params(dense) == params(fresh())
    torch.testing.assert_close(dense(x), small(x))
    tt.save(dense, tmp_path)
    assert torch.equal(tt.load(tmp_path, base=fresh())(x), dense(x))


def test_half_precision_stays():
    small = compactifai(fresh().to(torch.bfloat16), SIZE, budget="params<=50%", **FREE)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


# -- allocation ------------------------------------------------------------------------------------------------------


def test_uniform_is_one_chi_for_all():
    small = compactifai(fresh(), SIZE, budget="params<=50%", **{**FREE, "allocation": "uniform"})
    assert len({m.ranks for m in structured(small).values()}) == 1


def test_equal_error_is_equal():
    model = fresh()
    with torch.no_grad():  # one layer is nearly one Kronecker product, and needs less
        model.blocks[0][1].weight.mul_(0.05).add_(torch.kron(torch.randn(12, 6), torch.randn(8, 8)))
    small = compactifai(model, SIZE, budget="params<=60%", **FREE)
    easy, *others = structured(small).items()
    assert easy[0] == "blocks.0.1" and easy[1].ranks == (1,)
    with torch.no_grad():
        wholes = [model.get_submodule(n).weight for n, _ in others]
        errors = [float((m.weight - w).norm() / w.norm()) for (_, m), w in zip(others, wholes)]
    assert len(errors) == 3 and max(errors) - min(errors) < 0.05


def distance(model: nn.Module, seed: int):
    """How far the outputs of another model are from those of this one."""
    x = torch.randn(32, *SIZE, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        want = model(x)
    return lambda other: float((other(x) - want).detach().norm())


def test_what_does_not_matter_goes_first():
    model = fresh()
    with torch.no_grad():
        model.blocks[0][3].weight.zero_()  # nothing that block 0 computes reaches the output
    small = compactifai(model, SIZE, budget="params<=60%", epochs=0, metric=distance(model, 0), progress=False)
    assert list(structured(small)) == ["blocks.0.1", "blocks.0.3"]
    assert distance(model, 1)(small) < 1e-5


def test_sensitivity_stays_nearer_to_the_model_than_uniform():
    model = fresh()
    with torch.no_grad():
        model.blocks[1][3].weight.mul_(0.1)  # the last block hardly matters
    found = {}
    for allocation in ("sensitivity", "uniform"):
        given = {**FREE, "allocation": allocation, "metric": distance(model, 0)}
        found[allocation] = distance(model, 1)(compactifai(model, SIZE, budget="params<=50%", **given))
    assert found["sensitivity"] < 0.8 * found["uniform"]


# -- profile ---------------------------------------------------------------------------------------------------------


def test_a_row_is_the_loss_with_that_layer_alone_truncated(trained, data, profile):
    row = next(r for r in profile.rows if r.layer == "blocks.1.3" and r.chi == 4)
    layer = trained.blocks[1][3]
    alone = copy.deepcopy(trained)
    sites = {"out_sites": (8, 6), "in_sites": (8, 12)}
    alone.blocks[1][3] = StructuredLinear.from_dense(layer.weight, layer.bias, ranks=4, **sites)
    few = data.subset({"train": 256}, seed=0)
    assert row.metric == pytest.approx(tt.evaluate(alone, few, "train")["loss"], rel=1e-4)
    assert profile.base == pytest.approx(tt.evaluate(trained, few, "train")["loss"], rel=1e-6)
    assert row.drop == row.metric - profile.base
    assert (row.params, row.dense) == (4 * (8 * 8 + 6 * 12), 48 * 96)
    assert row.error == pytest.approx(sum(s * s for s in profile.spectra["blocks.1.3"][0][4:]) ** 0.5, rel=1e-3)


def test_the_profile_covers_every_layer_on_a_log_grid_and_its_errors_fall(profile):
    layers = list(dict.fromkeys(r.layer for r in profile.rows))
    assert layers == ["blocks.0.1", "blocks.0.3", "blocks.1.1", "blocks.1.3"]
    for depth, layer in enumerate(layers):
        rows = [r for r in profile.rows if r.layer == layer]
        assert [r.chi for r in rows] == [1, 2, 4, 8, 16, 32] and {r.depth for r in rows} == {depth}
        assert all(a.error > b.error for a, b in pairwise(rows))
        assert sum(s * s for s in profile.spectra[layer][0]) == pytest.approx(1, rel=1e-4)
    json.dumps(profile.asdict())


def test_truncation_hurts_more_the_stronger_it_is(profile):
    worst = max(profile.rows, key=lambda r: r.drop)
    assert worst.chi == 1 and worst.drop > 0.05
    assert all(abs(r.drop) < worst.drop / 2 for r in profile.rows if r.chi == 32)


def test_profiling_leaves_the_model_alone_and_takes_any_metric(trained):
    before = copy.deepcopy(trained.state_dict())
    found = sensitivity(trained, metric=lambda m: float(m.blocks[0][1].weight.norm()), chis=[2, 999], progress=False)
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    assert [r.chi for r in found.rows if r.layer == "blocks.0.1"] == [2, 33]
    assert {r.drop for r in found.rows if r.layer != "blocks.0.1"} == {0.0}
    assert all(r.drop < 0 for r in found.rows if r.layer == "blocks.0.1")


def test_a_metric_that_breaks_counts_as_the_worst(trained):
    found = sensitivity(trained, metric=lambda m: float("nan"), chis=[1], progress=False)
    small = compactifai(trained, SIZE, budget="params<=60%", profile=found, epochs=0)
    assert params(small) <= 0.6 * params(trained)


# -- healing ---------------------------------------------------------------------------------------------------------

HEAL = {"budget": "params<=35%", "lr": 5e-3, "progress": False, "augment": "none", "batch_size": 32}


@pytest.fixture(scope="module")
def healed(trained, data, profile):
    return compactifai(trained, data, profile=profile, epochs=6, **HEAL)


def test_healing_recovers_most_of_what_truncation_cost(trained, data, profile, healed):
    cut = compactifai(trained, data, profile=profile, epochs=0, budget="params<=35%")
    whole, lost, back = (tt.evaluate(m, data, "test")["loss"] for m in (trained, cut, healed))
    assert lost > whole + 0.2
    assert back < whole + 0.5 * (lost - whole)


def test_healing_beats_training_random_cores_as_long(trained, data, profile, healed):
    random = compactifai(trained, data, profile=profile, epochs=0, budget="params<=35%")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for m in structured(random).values():
            m.reset_parameters()
    options = {"opt": "adamw", "lr": 5e-3, "weight_decay": 0.0, "sched": "cosine", "augment": "none", "batch_size": 32}
    with trainable(random):
        tt.fit(random, data, epochs=6, progress=False, **options)
    assert tt.evaluate(healed, data, "test")["loss"] < tt.evaluate(random, data, "test")["loss"]


def test_healing_trains_the_cores_only_and_leaves_all_trainable(trained, healed):
    inside = tuple(structured(healed))
    rest = {n: v for n, v in healed.state_dict().items() if not n.startswith(inside)}
    assert rest and all(torch.equal(v, trained.state_dict()[n]) for n, v in rest.items())
    assert all(p.requires_grad for p in healed.parameters())


def test_healing_may_train_everything(trained, data, profile):
    small = compactifai(trained, data, profile=profile, epochs=1, heal="all", **HEAL)
    assert not torch.equal(small.stem.weight, trained.stem.weight)


def test_healing_is_repeatable_and_resumes(trained, data, profile, healed, tmp_path):
    again = compactifai(trained, data, profile=profile, epochs=6, out=tmp_path, **HEAL)
    once_more = compactifai(trained, data, profile=profile, epochs=6, out=tmp_path, **HEAL)  # finds it done
    for name, value in healed.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
        assert torch.equal(once_more.state_dict()[name], value)


# -- artifacts, export, command line ---------------------------------------------------------------------------------


def cut(model, size):
    return compactifai(model, size, budget="params<=60%", **FREE)


def low_rank(model, size):
    return compactifai(model, size, budget="macs<=85%", sites="lowrank", **FREE)


def test_the_battery():
    """Operators of two balanced sites save weights, not products; the plain SVD saves both."""
    testing.check_surgery(cut, model="cct_2_3x2_32", slow=False, skip=("smaller",))
    testing.check_surgery(low_rank, model="cct_2_3x2_32", slow=False)


def test_the_exported_file_computes_the_same_and_is_smaller(tmp_path):
    """Also with another batch than the one exported; the file holds the cores, not the weights."""
    spec = tt.core.artifact.InputSpec(SIZE, (0.5,), (0.25,))
    model = fresh(width=96)
    small = compactifai(model, SIZE, budget="params<=30%", **FREE)
    sizes = [tt.export(m, tmp_path / f"{k}.onnx", spec=spec).size for k, m in enumerate((model, small))]
    assert sizes[1] < 0.5 * sizes[0]
    case = testing.ModelCase(lambda: copy.deepcopy(small), input_size=SIZE)
    case.__dict__["model"] = small.eval()
    testing.check_onnx(case)


def test_a_fresh_process_loads_it_and_computes_the_same(tmp_path):
    model = tt.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    small = compactifai(model, (3, 16, 16), budget="params<=80%", **FREE).eval()
    tt.save(small, tmp_path / "small", spec=tt.core.artifact.InputSpec((3, 16, 16), (0.5,) * 3, (0.25,) * 3))
    x = torch.linspace(-1, 1, 768).view(1, 3, 16, 16)
    code = f"""
import torch, trimtab as tt
y = tt.load({str(tmp_path / "small")!r})(torch.linspace(-1, 1, 768).view(1, 3, 16, 16))
print([float(v).hex() for v in y[0, :5]])
"""
    said = python(code)
    with torch.no_grad():
        assert said.strip() == str([float(v).hex() for v in small(x)[0, :5]])


# -- at the door -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"allocation": "magic"}, "allocation must be one of sensitivity, error, uniform, got 'magic'"),
        ({"heal": "none"}, "heal must be one of cores, all, got 'none'"),
        ({"epochs": -1}, "epochs must be a non-negative integer, got -1"),
        ({"epochs": 1}, "healing needs data to train on, got tuple; or say epochs=0"),
        ({"mode": "fast"}, "mode must be one of auto, factored, dense, got 'fast'"),
        ({"allocation": "sensitivity"}, "a profile needs data to measure the loss on, or a metric, got tuple"),
        ({"budget": "latency<=5ms"}, "can be made to fit params, size, macs, .*, got latency"),
        ({"budget": "accuracy>=0.9"}, "needs an upper bound such as params<=50%"),
        ({"sites": 1}, "sites must be 'lowrank' or an integer of at least 2, got 1"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        compactifai(fresh(), SIZE, **{**FREE, **kwargs})


def test_a_profile_of_another_model_is_refused(profile):
    with pytest.raises(ValueError, match="it knows nothing of"):
        compactifai(fresh(depth=3), SIZE, profile=profile, epochs=0)
    with pytest.raises(ValueError, match="sites must be those of the profile, 2, got 3"):
        compactifai(fresh(), SIZE, profile=profile, sites=3, epochs=0)


def test_foreign_edits_are_refused():
    with pytest.raises(ValueError, match="edits must be those of plan"):
        truncated(fresh(), [tt.core.edit.Remove("blocks.0")])
