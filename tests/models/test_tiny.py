from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.core.cost import measure
from trimtab.models import create_model, load, save
from trimtab.models.classify.tiny import PRESETS, TrimNet

PARAMS = {
    "trim_1k": 1_090,
    "trim_3k": 3_228,
    "trim_10k": 10_088,
    "trim_30k": 30_900,
    "trim_80k": 78_042,
    "trim_300k": 300_182,
    "trim_mobile_10k": 10_074,
    "trim_mobile_80k": 82_106,
}


@pytest.mark.parametrize(("name", "params"), PARAMS.items())
def test_presets_have_the_size_their_name_says(name, params):
    assert sum(p.numel() for p in create_model(name).parameters()) == params


@pytest.mark.parametrize("name", ["trim_80k", "trim_mobile_80k"])
def test_the_80k_presets_keep_the_budget_of_mlperf_tiny(name):
    cost = measure(create_model(name), (3, 32, 32), what=("params", "macs"))
    assert cost.macs <= 12.6e6 and cost.params <= 85_000


def test_keyword_arguments_override_a_preset():
    net = create_model("trim_net", width=20, depths=(1, 2), growth=1.5, num_classes=3, in_chans=1)
    assert [len(s) for s in net.stages] == [1, 2]
    assert [i["num_chs"] for i in net.feature_info] == [20, 30]
    assert create_model("trim_80k", width=8).feature_info[-1]["num_chs"] == 32  # width replaces the preset's list
    with pytest.raises(ValueError, match="depths must have 3 values"):
        create_model("trim_80k", depths=(1, 1))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"width": 5, "depths": (2, 1), "strides": (2, 2), "stem_stride": 2},
        {"widths": (6, 9, 12), "kind": "bottleneck", "expand": 0.5},
        {"widths": (8, 16, 16), "kind": "bottleneck", "expand": 4, "group_width": 1, "head_width": 24, "stem_width": 4},
        {"widths": (8, 8, 8), "kind": "bottleneck", "expand": 2, "group_width": 4, "kernel": 5, "drop_rate": 0.1},
    ],
)
def test_every_option_survives_an_artifact(kwargs, tmp_path):
    net = create_model("trim_net", num_classes=4, in_chans=1, **kwargs).eval()
    save(net, tmp_path / "a")
    again = load(tmp_path / "a")
    x = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(again(x), net(x))


def test_the_strides_asked_for_are_kept_on_small_images():
    net = create_model("trim_net", img_size=8, strides=(1, 2, 2))
    assert net.eval().forward_features(torch.zeros(1, 3, 8, 8)).shape[-1] == 2


def test_inverted_residual_is_depthwise_and_ends_linearly():
    net = TrimNet(widths=(8, 8), depths=(1, 1), kind="bottleneck", expand=4, group_width=1)
    convs = [m for m in net.stages[0].modules() if isinstance(m, nn.Conv2d)]
    assert [(c.kernel_size[0], c.groups) for c in convs] == [(1, 1), (3, 32), (1, 1)]
    assert isinstance(net.stages[0][0].act, nn.Identity)


def test_every_convolution_is_followed_by_batch_norm_and_has_no_bias():
    for name in PRESETS:
        modules = [m for m in create_model(name).modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
        assert all(m.bias is None for m in modules[::2]) and all(isinstance(m, nn.BatchNorm2d) for m in modules[1::2])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"width": 0}, "width must be a positive integer, got 0"),
        ({"widths": (8, 16)}, "widths must have one value per stage"),
        ({"strides": (1,)}, "strides must have one value per stage"),
        ({"kind": "plain"}, "kind must be"),
        ({"kernel": 4}, "kernel must be odd"),
        ({"expand": -1}, "must be positive"),
        ({"group_width": 2}, "group_width must be 0"),
        ({"num_classes": -1}, "num_classes must be a non-negative integer"),
    ],
)
def test_wrong_arguments_say_what_was_expected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TrimNet(**kwargs)
