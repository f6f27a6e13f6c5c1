"""SimpleNet: every line of the fact sheet's exact checks, and its traps."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from trimtab.core.cost import measure
from trimtab.models import create_model
from trimtab.models.classify.simplenet import LAYOUTS, SimpleNet, parse_layout

# name, classes, channels, size, parameters, MACs in M
TABLE = [
    ("simplenet_cifar_310k", 10, 3, 32, 312_362, 55.788),
    ("simplenet_cifar_310k", 100, 3, 32, 318_212, None),
    ("simplenet_cifar_460k", 10, 3, 32, 456_446, 75.242),
    ("simplenet_cifar_460k_port", 10, 3, 32, 385_790, 73.190),
    ("simplenet_cifar_5m", 10, 3, 32, 5_498_378, 652.151),
    ("simplenet_cifar_5m", 100, 3, 32, 5_521_508, None),
    ("simplenet_cifar_5m", 10, 1, 28, 5_497_226, 488.239),
    ("simplenet_mnist_301k", 10, 1, 28, 301_452, None),
    ("simplenet_small_m1_05", 1000, 3, 224, 1_506_792, 340.923),
    ("simplenet_small_m2_05", 1000, 3, 224, 1_506_792, 427.628),
    ("simplenet_small_m1_075", 1000, 3, 224, 3_287_272, 758.853),
    ("simplenet_small_m2_075", 1000, 3, 224, 3_287_272, 953.937),
    ("simplenet_5m_m1", 1000, 3, 224, 5_752_808, 1341.762),
    ("simplenet_5m_m2", 1000, 3, 224, 5_752_808, 1688.578),
    ("simplenet_5m_m3", 1000, 3, 224, 5_752_808, 2035.395),
    ("simplenet_5m_m4", 1000, 3, 224, 5_752_808, 2729.028),
    ("simplenet_9m_m1", 1000, 3, 224, 9_508_968, 2774.250),
    ("simplenet_9m_m2", 1000, 3, 224, 9_508_968, 3554.587),
]
CAFFE_LAYOUTS = [("cifar_5m", 5_493_258), ("cifar_310k", 311_594), ("cifar_460k", 455_862)]


def on_meta(name: str, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize(("name", "classes", "chans", "size", "params", "macs"), TABLE)
def test_counts_equal_the_fact_sheet(name, classes, chans, size, params, macs):
    model = on_meta(name, num_classes=classes, in_chans=chans)
    cost = measure(model, (chans, size, size), what=("params", "macs"))
    assert cost.params == params
    if macs is not None:
        assert cost.macs / 1e6 == pytest.approx(macs, abs=0.00051)


@pytest.mark.parametrize(("layout", "params"), CAFFE_LAYOUTS)
def test_caffe_form_has_no_batch_norm_on_the_last_three_convolutions(layout, params):
    with torch.device("meta"):
        net = SimpleNet(layout=layout, norm_first=10)
    assert sum(p.numel() for p in net.parameters()) == params
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 10


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_thirteen_convolutions_in_every_layout(layout):
    tokens = parse_layout(LAYOUTS[layout])
    assert sum(t is not None for t in tokens) == 13


def test_only_convolutions_11_and_12_of_the_5m_net_are_1x1():
    convs = [m for m in on_meta("simplenet_cifar_5m").modules() if isinstance(m, nn.Conv2d)]
    assert [i + 1 for i, c in enumerate(convs) if c.kernel_size == (1, 1)] == [11, 12]
    assert all(c.bias is not None for c in convs)  # although batch norm follows


def test_map_sizes_of_5m_at_32():
    net = on_meta("simplenet_cifar_5m").eval()
    x, sizes = torch.zeros(1, 3, 32, 32, device="meta"), []
    for layer in net.features:
        x = layer(x)
        if not sizes or sizes[-1] != x.shape[-1]:
            sizes.append(x.shape[-1])
    assert sizes == [32, 16, 8, 4, 2]


@pytest.mark.parametrize("mode", [1, 2, 3, 4])
def test_final_map_is_7x7_in_every_mode(mode):
    x = torch.zeros(1, 3, 224, 224, device="meta")
    for name, width in [(f"simplenet_5m_m{mode}", 256), (f"simplenet_9m_m{mode}", 320)]:
        assert on_meta(name).eval().forward_features(x).shape == (1, width, 7, 7)


@pytest.mark.parametrize(("name", "width"), [("simplenet_small_m1_05", 128), ("simplenet_small_m2_075", 192)])
def test_final_width_of_the_small_nets(name, width):
    x = torch.zeros(1, 3, 224, 224, device="meta")
    assert on_meta(name).eval().forward_features(x).shape == (1, width, 7, 7)


def test_modes_change_macs_but_never_parameters():
    costs = [measure(on_meta(f"simplenet_5m_m{m}"), (3, 224, 224), what=("params", "macs")) for m in (1, 2, 3, 4)]
    assert len({c.params for c in costs}) == 1
    assert [c.macs for c in costs] == sorted({c.macs for c in costs})


def test_the_extra_pooling_of_the_early_port_is_another_network():
    layout = LAYOUTS["cifar_5m"].replace("512 ", "512 P ")
    with torch.device("meta"):
        net = SimpleNet(layout=layout)
    cost = measure(net, (3, 32, 32), what=("params", "macs"))
    assert cost.params == 5_498_378
    assert cost.macs / 1e6 == pytest.approx(631.507, abs=0.00051)
    with pytest.raises(RuntimeError):
        net.eval()(torch.zeros(1, 3, 28, 28, device="meta"))


def test_caffe_rounds_pooled_sizes_up():
    x = torch.zeros(1, 1, 28, 28)
    assert SimpleNet(scale=0.1, in_chans=1).eval().forward_features(x).shape[-1] == 1
    assert SimpleNet(scale=0.1, in_chans=1, ceil_mode=True).eval().forward_features(x).shape[-1] == 2


def test_the_last_pooling_is_max():
    net = SimpleNet(scale=0.1).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        net.forward_head(net.forward_features(x), pre_logits=True), net.forward_features(x).amax((2, 3))
    )


def test_batch_norm_momentum_and_init():
    torch.manual_seed(0)
    net = SimpleNet()
    assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {0.05}
    conv = net.features[1][0]  # 64 -> 32, 3x3: Xavier bound with gain sqrt 2
    bound = 2**0.5 * (6 / (9 * (64 + 32))) ** 0.5
    assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)


def test_dropout_goes_after_the_four_poolings_or_where_the_index_says():
    net = SimpleNet(drop_rates=0.1)
    assert [i for i, m in enumerate(net.features) if any(isinstance(k, nn.Dropout2d) for k in m)] == [4, 8, 11, 15]
    net = SimpleNet(layout="imagenet_5m", drop_rates={11: 0.02, 12: 0.05, 13: 0.05, 15: 0.1})
    rates = {i: k.p for i, m in enumerate(net.features) for k in m if isinstance(k, nn.Dropout2d)}
    assert rates == {11: 0.02, 12: 0.05, 13: 0.05}
    assert net.drop_rate == 0.1  # index 15 is the one before the classifier
    with pytest.raises(ValueError, match=r"keys in 0\.\.17"):
        SimpleNet(drop_rates={18: 0.1})


def test_features_only_gives_every_resolution():
    maps = timm.create_model("simplenet_cifar_310k", features_only=True).eval()(torch.zeros(1, 3, 32, 32))
    assert [(m.shape[1], m.shape[2]) for m in maps] == [(32, 32), (64, 16), (64, 8), (64, 4), (64, 2)]
    maps = timm.create_model("simplenet_small_m1_05", features_only=True).eval()(torch.zeros(1, 3, 64, 64))
    assert [m.shape[2] for m in maps] == [32, 16, 8, 4, 2]


def test_wrong_arguments_say_what_was_expected():
    with pytest.raises(ValueError, match="mode must be one of"):
        SimpleNet(mode=7)
    with pytest.raises(ValueError, match="got '64x3'"):
        SimpleNet(layout="64x3 P")
    with pytest.raises(ValueError, match="scale must be positive"):
        SimpleNet(scale=0)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got shape"):
        create_model("simplenet_cifar_310k")(torch.zeros(3, 32, 32))
