"""SkipNet: the exact counts of the fact sheet, and the traps: any image size, any width."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from trimtab.core.cost import measure
from trimtab.core.meta import shapes_only
from trimtab.models import create_model
from trimtab.models.classify.skipnet_bias_loss import SkipBlockNet

# name, arguments, parameters, MACs in M at 224
TABLE = [
    ("skipblocknet_m", {}, 5_532_352, 236.622),
    ("skipblocknet_xs", {}, 2_332_584, 78.537),
    ("skipblocknet_s", {}, 3_587_416, 170.236),
    ("skipblocknet_l", {}, 7_014_472, 361.272),
    ("skipblocknet_s", {"head_width": 1280}, 4_027_992, 170.676),
    ("skipblocknet_m", {"num_classes": 10}, 4_264_162, None),
]


def on_meta(name: str, **kwargs):
    with shapes_only():
        return timm.create_model(name, **kwargs)


def params(*modules: nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


@pytest.mark.parametrize(("name", "arguments", "count", "macs"), TABLE)
def test_counts_equal_the_fact_sheet(name, arguments, count, macs):
    cost = measure(on_meta(name, **arguments), (3, 224, 224), what=("params", "macs"))
    assert cost.params == count
    if macs is not None:
        assert cost.macs / 1e6 == pytest.approx(macs, abs=0.00051)


def test_every_part_has_the_parameters_of_the_official_code():
    net = on_meta("skipblocknet_m")
    assert [params(m) for m in (net.conv_stem, net.base)] == [464, 752]
    assert [params(m) for m in net.blocks] == [96_464, 130_824, 600_544, 2_023_944]
    assert [params(m) for m in net.skips] == [8_240, 4_520]
    assert params(net.conv_last) == 155_520
    assert params(net.conv_head, net.classifier) == 2_511_080


def test_ten_classes_save_1268190_parameters():
    assert params(on_meta("skipblocknet_m")) - params(on_meta("skipblocknet_m", num_classes=10)) == 1281 * 990


def test_without_skip_blocks_only_they_are_missing():
    with shapes_only():
        whole, plain = (SkipBlockNet(num_classes=1000, skips=skips) for skips in (True, False))
    assert params(whole) - params(plain) == 12_760
    assert set(plain.state_dict()) == {k for k in whole.state_dict() if not k.startswith("skips.")}


def test_the_skip_blocks_feed_the_second_and_the_third_group():
    """The network is what the paper's formula says, written out."""
    torch.manual_seed(0)
    net = SkipBlockNet(width=0.25, head_width=32).eval()
    x = torch.randn(2, 3, 64, 64)
    g1, g2, g3, g4 = net.blocks
    s1, s2 = (skip.block for skip in net.skips)
    b = net.base(net.conv_stem(x))
    assert b.shape[-1] == 32
    u = g1(b)
    u = g2(u + s1(nn.functional.adaptive_avg_pool2d(b, 8)))
    u = g3(u + s2(nn.functional.adaptive_avg_pool2d(b, 4)))
    torch.testing.assert_close(net.forward_features(x), net.conv_last(g4(u)))


def test_at_224_the_skip_blocks_pool_to_28_and_14():
    net = on_meta("skipblocknet_m")
    sizes = []
    for skip in net.skips:
        skip.register_forward_hook(lambda m, args, out: sizes.append(tuple(args[1])))
    net(torch.zeros(1, 3, 224, 224, device="meta"))
    assert sizes == [(28, 28), (14, 14)]


@pytest.mark.parametrize("size", [(33, 47), (64, 64), (96, 40)])
def test_other_sizes_than_224_work(size):
    net = SkipBlockNet(width=0.25, head_width=32).eval()
    assert net(torch.zeros(1, 3, *size)).shape == (1, 10)


def test_squeeze_and_excitation_is_where_the_table_has_it():
    net = on_meta("skipblocknet_m")
    has = [[type(b.se).__name__ == "SqueezeExcite" for b in group] for group in net.blocks]
    assert has == [[False, False, True, True, True], [False] * 4, [True] * 2, [True] * 3]
    se = net.blocks[0][2].se
    assert (se.conv_reduce.out_channels, type(se.act1), type(se.gate).__name__) == (24, nn.ReLU, "Hardsigmoid")
    assert all(type(s.block.se) is nn.Identity and not s.block.has_skip for s in net.skips)


def test_init_is_that_of_the_official_code():
    torch.manual_seed(0)
    net = SkipBlockNet()
    conv = net.blocks[3][2].conv_pw.weight  # 160 -> 960, 1x1
    assert conv.std().item() == pytest.approx((2 / 960) ** 0.5, rel=0.02)
    assert net.classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not net.classifier.bias.any()


def test_features_are_those_of_the_whole_network():
    """`features_only` must run the skip blocks, too."""
    net = create_model("skipblocknet_xs", num_classes=10, seed=0).eval()
    maps = timm.create_model("skipblocknet_xs", features_only=True).eval()
    maps.model.load_state_dict(
        {k: v for k, v in net.state_dict().items() if not k.startswith("classifier")}, strict=False
    )
    x = torch.randn(1, 3, 64, 64)
    found = maps(x)
    assert [(m.shape[1], m.shape[2]) for m in found] == [(8, 32), (16, 16), (24, 8), (56, 4), (480, 2)]
    torch.testing.assert_close(found[-1], net.forward_features(x))


def test_wrong_arguments_say_what_was_expected():
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        SkipBlockNet(width=0)
    with pytest.raises(ValueError, match="head_width must be a positive integer, got 0"):
        SkipBlockNet(head_width=0)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got shape"):
        SkipBlockNet(width=0.25)(torch.zeros(3, 64, 64))
