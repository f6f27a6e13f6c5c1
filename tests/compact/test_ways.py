"""How methods bring a given model inside a budget, and what a file of few bits or many zeros is worth."""

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.compact import ways
from trimtab.compact.deliver import as_stored, deliver, tighter
from trimtab.compact.speed import TUNE, Settings
from trimtab.compress.quantize.bitnet_reloaded import BitLayer, PackedBitLayer
from trimtab.compress.quantize.packing import PackedWeight
from trimtab.core.budget import Budget


@pytest.fixture(scope="module")
def data():
    return tt.load_data("digits", limit=160)


@pytest.fixture(scope="module")
def net():
    return tt.create_model("trim_net", width=12, num_classes=10, in_chans=1, img_size=8, seed=0)  # 43 k weights


def params(model):
    return tt.measure(model, (1, 8, 8), what="params").params


def test_fewer_bits_leave_more_weights(net, data):
    room = {bits: ways.room(net, data, Budget("size<=20KB"), bits=bits) for bits in (8, 4, 2)}
    assert 13_000 < room[8] < 18_000  # what is not weights takes its part
    assert 1.3 * room[8] < room[4] < 2 * room[8] and room[2] > 1.7 * room[4]
    assert ways.room(net, data, Budget("macs<=10k"), bits=8) == float("inf")


def test_few_bits_are_of_use_where_bytes_are_short(net, data):
    for budget, use in (("size<=20KB", True), ("size<=60KB", False), ("macs<=50k", False)):
        assert ways.of_use("fliqs", net, data, Budget(budget)) == use
        assert ways.of_use("magnitude", net, data, Budget(budget))


@pytest.mark.parametrize("method", ["bitnet_reloaded", "fliqs"])
def test_a_low_bit_file_holds_more_weights_in_as_many_bytes(net, data, method, tmp_path):
    budget = Budget("size<=20KB")
    goal = Budget(f"params<={ways.room(net, data, budget, bits=ways.WAYS[method].bits):.0f}")
    small = ways.bring(method, net, data, budget, goal, epochs=1, batch_size=64, progress=False)
    assert any(m.weight_bits < 8 for m in small.modules() if hasattr(m, "weight_bits"))
    stored = as_stored(small)
    assert any(isinstance(m, PackedWeight) for m in stored.modules())
    (made,) = deliver(stored, data, budget, tmp_path, evaluate=True, exporter="classic")
    assert made.kind == "low-bit" and made.excess == 0 and made.accuracy is not None
    assert made.cost["size"] <= 20_000 and params(stored) == params(small)
    assert params(small) > 1.15 * ways.room(net, data, budget, bits=8)
    assert tighter(made, stored, data, safety=0.02) is None


def test_sparse_layers_pay_in_bytes_of_the_file(data, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 120, 1), nn.ReLU(), nn.Conv2d(120, 64, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    budget, goal = Budget("size<=8KB"), Budget("params<=20k")
    sparse = ways.bring("fast_sparse_convnets", net, data, budget, goal)
    kinds = deliver(sparse, data, budget, tmp_path, evaluate=False, only="int8", exporter="classic")
    assert kinds[0].excess == 0  # 10 k weights dense
    assert deliver(net, data, budget, tmp_path, evaluate=False, only="int8", exporter="classic")[0].excess > 0.2


def test_other_bounds_are_met_by_pruning_first(net, data):
    macs = tt.measure(net, (1, 8, 8), what="macs").macs
    goal = Budget(f"macs<={macs // 2}")
    small = ways.bring("bitnet_reloaded", net, data, Budget("size<=20KB"), goal)
    assert tt.measure(small, (1, 8, 8), what="macs").macs <= macs // 2
    assert isinstance(small.get_submodule("stages.0.0.body.0.0"), BitLayer)


def test_layers_hold_codes_only_when_stored_and_a_float_model_is_left_alone(net, data):
    small = ways.bring("bitnet_reloaded", net, data, Budget("size<=20KB"), Budget("params<=1M"))
    stored = as_stored(small)
    kinds = {type(m) for m in stored.modules()}
    assert PackedBitLayer in kinds and BitLayer not in kinds
    assert as_stored(net) is net and as_stored(stored) is stored


def test_what_rounds_learns_in_float32_and_what_has_learned_more_slowly(net, data):
    fast = Settings(precision="bf16", batch_size=64)
    small = ways.bring("bitnet_reloaded", net, data, Budget("size<=20KB"), Budget("params<=1M"))
    assert fast.recipe(net, data)["precision"] == "bf16" and fast.recipe(small, data)["precision"] == "fp32"
    assert fast.recipe(net, data, tune=True)["lr"] == TUNE * fast.recipe(net, data)["lr"]
