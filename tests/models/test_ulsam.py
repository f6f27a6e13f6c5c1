"""ULSAM: the exact checks of its fact sheet, its traps, and what every surgery must do."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import timm
import torch
import torchvision
from timm.models.efficientnet import _gen_mobilenet_v1
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab import testing
from trimtab.compress import methods
from trimtab.core import edit
from trimtab.core.cost import measure
from trimtab.core.errors import SurgeryError
from trimtab.core.meta import shapes_only
from trimtab.models.classify.ulsam import ULSAM, Block, find, plan, ulsam

SIZE = (3, 224, 224)
SMALL = (3, 16, 16)

# host, blocks, parameters, MACs in M, all with g = 4
TABLE = [
    ("mobilenetv1_100", "512", 3_965_748, 516.658),
    ("mobilenetv1_075", "384", 2_435_044, 295.972),
    ("mobilenetv1_050", "256", 1_264_020, 136.301),
    ("mobilenetv2_100", "96", 3_387_092, 278.120),
    ("mobilenetv2_100", "160", 3_185_684, 285.314),
    ("mobilenetv2_100", "64+96", 3_333_152, 267.834),
    ("mobilenetv2_100", "160x2", 2_866_496, 269.853),
    ("mobilenetv2_100", "96+160", 3_067_904, 262.659),
    ("mobilenetv2_100", "96x2+160x2", 2_630_936, 224.544),
]
HOSTS = {
    "mobilenetv1_100": (4_231_976, 568.740),
    "mobilenetv1_075": (2_585_560, 325.400),
    "mobilenetv1_050": (1_331_592, 149.497),
    "mobilenetv2_100": (3_504_872, 300.774),
}
# what one block weighs (with its norms), and computes, in millions
BLOCKS = [
    ("mobilenetv2_100", "64", 54_272, None),
    ("mobilenetv2_100", "96", 118_272, 22.692),
    ("mobilenetv2_100", "160", 320_000, 15.476),
    ("mobilenetv1_100", "512", 266_752 + 2 * 2 * 512, 52.284),
]


def host(name: str) -> nn.Module:
    with shapes_only():
        if name in ("mobilenetv1_075", "mobilenetv1_050"):
            return _gen_mobilenet_v1("mobilenetv1_100", int(name[-3:]) / 100)
        return timm.create_model(name)


def params(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def mmacs(net: nn.Module) -> float:
    macs = measure(net, SIZE, what=("macs",)).macs
    assert macs is not None
    return macs / 1e6


def small_net(name: str = "trim_mobile_10k") -> nn.Module:
    return tt.create_model(name, num_classes=10, seed=0)


def settled(channels: int, groups: int) -> ULSAM:
    """A module whose norms have seen data and have scales, so that nothing is trivial."""
    torch.manual_seed(0)
    net = ULSAM(channels, groups=groups)
    for norm in (net.norm1, net.norm2):
        nn.init.uniform_(norm.weight, 0.5, 4)
        nn.init.normal_(norm.bias)
    for _ in range(3):
        net(torch.randn(8, channels, 6, 5))
    return net.eval()


# -- the module -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "groups", "count"), [(512, 1, 2563), (512, 4, 2572), (64, 4, 332)])
def test_parameters_are_five_per_channel_and_three_per_group(channels, groups, count):
    assert params(ULSAM(channels, groups=groups)) == count == 5 * channels + 3 * groups


def test_the_paper_counts_the_weights_of_the_two_convolutions_alone():
    net = ULSAM(512)
    assert net.depthwise.weight.numel() + net.pointwise.weight.numel() == 1024


@pytest.mark.parametrize("groups", [1, 2, 4, 8, 16])
def test_multiply_adds_are_two_per_value_for_any_number_of_maps(groups):
    assert measure(ULSAM(512, groups=groups), (512, 14, 14), what=("macs",)).macs == 200_704


@torch.no_grad()
def one_group_after_the_other(net: ULSAM, x: Tensor) -> Tensor:
    """The method as the fact sheet writes it down."""
    out = []
    for n, f in enumerate(x.chunk(net.groups, 1)):
        part = slice(n * f.shape[1], (n + 1) * f.shape[1])

        def norm(z: Tensor, layer: nn.BatchNorm2d, which: slice) -> Tensor:
            held = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
            return F.batch_norm(z, *(t[which] for t in held), eps=layer.eps)

        z = f * net.depthwise.weight[part].view(-1, 1, 1) + net.depthwise.bias[part].view(-1, 1, 1)
        z = F.max_pool2d(F.relu(norm(z, net.norm1, part)), 3, 1, 1)
        z = F.conv2d(z, net.pointwise.weight[n : n + 1], net.pointwise.bias[n : n + 1])
        z = F.relu(norm(z, net.norm2, slice(n, n + 1)))
        a = torch.softmax(z.reshape(len(x), 1, -1), 2).reshape(z.shape)
        out.append(f + a * f)
    return torch.cat(out, 1)


@pytest.mark.parametrize("groups", [1, 3, 12])
@torch.no_grad()
def test_grouped_convolutions_equal_one_small_network_per_group(groups):
    net, x = settled(12, groups), torch.randn(4, 12, 6, 5)
    torch.testing.assert_close(net(x), one_group_after_the_other(net, x))


@torch.no_grad()
def test_the_gain_is_the_same_for_a_group_and_sums_to_one_over_space():
    net, x = settled(24, 4), torch.randn(3, 24, 7, 6).abs() + 0.1
    gain = net(x) / x - 1  # (B, C, H, W)
    torch.testing.assert_close(gain.sum((2, 3)), torch.ones(3, 24), rtol=1e-4, atol=1e-4)
    for maps in gain.chunk(4, 1):
        torch.testing.assert_close(maps, maps[:, :1].expand_as(maps), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gain[:, ::6], net.attention(x), rtol=1e-3, atol=1e-5)
    assert (gain.chunk(4, 1)[0][:, 0] - gain.chunk(4, 1)[1][:, 0]).abs().max() > 0.01  # each group has its own map


@torch.no_grad()
def test_a_group_sees_no_other_group():
    net, x = settled(12, 3), torch.randn(2, 12, 5, 5)
    y = x.clone()
    y[:, 4:8] += 1
    changed = (net(x) != net(y)).any(0).any(-1).any(-1)
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4


@torch.no_grad()
def test_fresh_it_is_nearly_the_identity_the_more_so_on_large_maps():
    torch.manual_seed(0)
    net = ULSAM(16).eval()
    off = [((net(x) - x).abs() / x.abs()).max().item() for x in (torch.randn(1, 16, s, s) for s in (4, 14, 112))]
    assert off[0] < 0.5 and off[1] < 0.05 and off[2] < 1e-3


def test_norms_average_over_ten_batches_not_over_one():
    net = ULSAM(8)
    assert net.norm1.momentum == net.norm2.momentum == 0.1


def test_the_depthwise_weights_count_by_their_sign_only():
    net, x = settled(8, 2).train(), torch.randn(4, 8, 6, 6)
    nn.init.uniform_(net.depthwise.weight, 0.5, 1)  # near zero, the epsilon of the norm would tell
    before = net(x)
    with torch.no_grad():
        net.depthwise.weight.mul_(3)
        net.depthwise.bias.add_(1)
    torch.testing.assert_close(net(x), before, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        net.depthwise.weight.neg_()
    assert (net(x) - before).abs().max() > 1e-2


def test_on_a_map_of_2x2_the_attention_is_uniform_and_the_surgery_says_so(monkeypatch):
    said: list[str] = []
    logger = logging.getLogger("trimtab.models.classify.ulsam")
    monkeypatch.setattr(logger, "warning", lambda text, *values: said.append(text % values))
    net, x = settled(8, 2), torch.randn(3, 8, 2, 2)
    torch.testing.assert_close(net(x), 1.25 * x)  # the 3x3 maximum sees all positions from everywhere
    plan(small_net(), (3, 12, 12))
    assert said == []
    plan(small_net(), (3, 8, 8))
    assert said == ["stages.2.1 has a map of 2x2, on which attention is uniform: give larger images"]


@pytest.mark.parametrize("groups", [0, 5, -2, 2.0])
def test_groups_must_divide_the_channels(groups):
    with pytest.raises(ValueError, match="positive divisor of 12 channels, got"):
        ULSAM(12, groups=groups)


# -- the surgery ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTS)
def test_the_hosts_are_those_of_the_paper(name):
    net = host(name)
    assert params(net) == HOSTS[name][0]
    assert mmacs(net) == pytest.approx(HOSTS[name][1], abs=0.00051)


@pytest.mark.parametrize(("name", "blocks", "count", "macs"), TABLE)
def test_replaced_networks_cost_what_the_fact_sheet_says(name, blocks, count, macs):
    net = ulsam(host(name), SIZE, blocks=blocks)
    assert params(net) == count
    assert mmacs(net) == pytest.approx(macs, abs=0.00051)


@pytest.mark.parametrize(("name", "width", "count", "macs"), BLOCKS)
def test_a_removed_block_has_the_size_of_the_fact_sheet(name, width, count, macs):
    net = host(name)
    (e,) = plan(net, SIZE, blocks=width)
    assert params(net.get_submodule(e.module)) == count
    if macs is not None:
        gone = edit.apply(copy.deepcopy(net), [edit.Remove(e.module)])
        assert mmacs(net) - mmacs(gone) == pytest.approx(macs, abs=0.001)


@pytest.mark.parametrize(
    ("name", "shape", "macs"),
    [("mobilenetv1_100", "512", 0.2), ("mobilenetv1_100", "1024", 0.1), ("mobilenetv2_100", "160", 0.016)],
)
def test_added_it_costs_what_the_paper_says(name, shape, macs):
    net = host(name)
    more = mmacs(ulsam(net, SIZE, blocks=shape, mode="add")) - mmacs(net)
    assert more == pytest.approx(macs, rel=0.03)


def test_added_it_runs_after_the_block_which_stays():
    net = small_net().eval()
    (e,) = plan(net, SMALL, mode="add")
    assert e.module == "stages.2.1"
    added = ulsam(net, SMALL, mode="add").eval()
    x = torch.randn(2, 24, 4, 4)
    pair = added.stages[2][1]
    torch.testing.assert_close(pair(x), pair.attention(net.stages[2][1](x)))


def test_blocks_are_those_of_the_paper_in_timm_and_torchvision():
    with shapes_only():
        theirs = torchvision.models.mobilenet_v2()
    inside = [b for b in find(theirs, SIZE) if b.replaceable]
    assert [b.name for b in inside] == [f"features.{i}" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)]
    assert [b.width for b in inside] == [24, 32, 32, 64, 64, 64, 96, 96, 160, 160]
    assert [e.module for e in plan(theirs, SIZE)] == ["features.13", "features.16"]
    assert [e.module for e in plan(host("mobilenetv2_100"), SIZE)] == ["blocks.4.2", "blocks.5.2"]
    assert [e.module for e in plan(host("mobilenetv1_100"), SIZE)] == ["blocks.3.5"]
    assert params(ulsam(theirs, SIZE)) == 3_067_904


def test_blocks_are_found_in_other_networks_with_depthwise_convolutions():
    net = host("efficientnet_b0")
    assert [b.width for b in find(net, SIZE) if b.replaceable] == [24, 40, 80, 80, 112, 112, 192, 192, 192]
    small = ulsam(net, SIZE)
    assert [n for n, m in small.named_modules() if isinstance(m, ULSAM)] == ["blocks.4.2", "blocks.5.3"]
    assert mmacs(small) < mmacs(net) - 30


def test_shapes_are_those_of_the_given_images():
    blocks = find(small_net(), (3, 32, 32))
    assert blocks[-1] == Block("stages.2.1", (24, 8, 8), True)
    assert not find(small_net(), SMALL)[1].replaceable  # halves the map


def test_blocks_may_be_named():
    net = host("mobilenetv2_100")
    edits = plan(net, SIZE, blocks=["blocks.5.1", "blocks.4.1"], groups=8)
    assert [(e.module, e.kwargs) for e in edits] == [
        ("blocks.4.1", {"channels": 96, "groups": 8}),
        ("blocks.5.1", {"channels": 160, "groups": 8}),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": ["blocks.5.0"]}, "'blocks.5.0' changes the shape"),
        ({"blocks": ["blocks.9"]}, "must be some of blocks.1.1, .*, got 'blocks.9'"),
        ({"blocks": []}, "at least one block"),
        ({"blocks": "96x3"}, "24x1, 32x2, 64x3, 96x2, 160x2, got '96x3'"),
        ({"blocks": "320"}, "got '320'"),
        ({"blocks": "96,160"}, "must be widths such as 96\\+160"),
        ({"blocks": "96x0"}, "got '96x0'"),
        ({"groups": 7}, "divisor of 96 channels, got 7"),
        ({"mode": "insert"}, "mode must be one of replace, add, got 'insert'"),
    ],
)
def test_wrong_arguments_say_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(host("mobilenetv2_100"), SIZE, **arguments)


def test_networks_without_such_blocks_are_refused():
    with pytest.raises(SurgeryError, match="ResNetCifar has no blocks"):
        ulsam(tt.create_model("resnet20_cifar"), SMALL)
    with pytest.raises(SurgeryError, match="does not run on such an input"):
        ulsam(small_net(), (5, 16, 16))
    with pytest.raises(ValueError, match="data must be"):
        ulsam(small_net(), {"image": 1})


def test_the_result_depends_on_the_seed_and_on_no_random_state():
    torch.manual_seed(1)
    a = ulsam(small_net(), SMALL, blocks="12+24", seed=3)
    after = torch.rand(1)
    torch.manual_seed(1)
    small_net()
    assert torch.equal(after, torch.rand(1))
    b, c = (ulsam(small_net(), SMALL, blocks="12+24", seed=seed) for seed in (3, 4))
    new = [k for k in a.state_dict() if "pointwise.weight" in k]
    assert len(new) == 2
    assert all(torch.equal(a.state_dict()[k], v) for k, v in b.state_dict().items())
    assert not any(torch.equal(c.state_dict()[k], a.state_dict()[k]) for k in new)


@pytest.mark.parametrize("name", ["trim_mobile_10k", "mobilenetv2_035"])
def test_it_keeps_the_contract_of_surgeries(name):
    more = {"img_size": 32} if name != "trim_mobile_10k" else {}
    testing.check_surgery(lambda net, size: ulsam(net, size), model=name, slow=False if more else None, **more)


@torch.no_grad()
def test_a_network_with_it_can_be_pruned():
    net = ulsam(small_net("trim_mobile_80k"), SMALL)
    small = tt.compress.magnitude(net, SMALL, budget="macs<=60%")
    assert small.eval()(torch.randn(2, *SMALL)).shape == (2, 10)
    kinds = [type(m) for m in small.modules()]
    assert kinds.count(ULSAM) == 2


def test_it_is_a_method_of_compression_and_trains_on(tmp_path):
    data = tt.load_data("digits", limit=300)
    net = tt.create_model("trim_mobile_10k", num_classes=10, in_chans=1, strides=(1, 2, 1), seed=0)
    small = methods.run("ulsam", net, data, blocks="12+24", groups=2, seed=1)
    before = small.stages[2][1].norm2.weight.detach().clone()
    trained = tt.fit(small, data, epochs=8, batch_size=8, seed=0, progress=False).model
    assert not torch.equal(trained.stages[2][1].norm2.weight, before)
    assert tt.evaluate(trained, data)["accuracy"] > 0.3  # chance is 0.1
    tt.save(trained, tmp_path / "a")
    again, x = tt.load(tmp_path / "a"), torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x), trained.eval()(x))
    kept = json.loads((tmp_path / "a" / "trimtab.json").read_text())["edits"]
    assert [e["kwargs"]["groups"] for e in kept] == [2, 2]
