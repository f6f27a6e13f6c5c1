"""Networks of MBConv blocks: counts of the published ones, shortcuts, children inside parents."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.core.meta import shapes_only
from trimtab.models.classify.mbconv import MBConv, MBConvNet
from trimtab.search import elastic

STRIDES = (1, 2, 2, 2, 1, 2, 1)
MOBILENET = ((24, 2, False, "relu"), (40, 2, True, "relu"), (80, 2, False, "hard_swish"),
             (112, 1, True, "hard_swish"), (160, 2, True, "hard_swish"))  # fmt: skip


def mobilenet_v3(kernel: int, expand: int, depth: int) -> MBConvNet:
    """A network of once-for-all's space."""
    stages = [{"width": 16, "expand": 1, "act": "relu"}] + [
        {"width": w, "depth": depth, "kernel": kernel, "expand": expand, "stride": s, "se": se, "act": act}
        for w, s, se, act in MOBILENET
    ]
    kind = {"act": "hard_swish", "gate": "hard_sigmoid", "shortcut": "same", "num_classes": 1000}
    return MBConvNet(stem=16, stages=stages, neck=960, mix=1280, **kind)


def attentive(width: list[int], kernel: list[int], expand: list[int], depth: list[int]) -> MBConvNet:
    """A network of AttentiveNAS's space."""
    stages = [
        {"width": w, "kernel": k, "expand": e, "depth": d, "stride": s, "se": se}
        for w, k, e, d, s, se in zip(
            width[1:-1], kernel, expand, depth, STRIDES, [False, False, True, False] + 3 * [True]
        )
    ]
    neck, mix = 6 * width[-2], width[-1]
    return MBConvNet(stem=width[0], stages=stages, neck=neck, mix=mix, gate="hard_sigmoid", num_classes=1000)


def unused(net: MBConvNet) -> int:
    """Weights of the 1x1 convolutions that the reference code makes for shortcuts that are identities or only pool."""
    blocks = [m for m in net.modules() if isinstance(m, MBConv)]
    return sum(b.project[0].out_channels ** 2 for b in blocks if isinstance(b.match, nn.Identity))


def cost(net: nn.Module, side: int) -> tuple[int, int]:
    found = tt.measure(net, (3, side, side), what=("params", "macs"))
    return found.params, found.macs


@pytest.mark.parametrize(
    ("genes", "params", "macs"),
    [
        ((7, 6, 4), 7_664_760, 566.171),
        ((5, 4, 3), 4_551_792, 250.747),
        ((3, 3, 2), 3_410_792, 121.279),
        ((7, 3, 2), 3_493_352, 151.290),
        ((7, 4, 3), 4_657_776, 289.357),
    ],
)
def test_mobilenet_v3_of_once_for_all_has_its_counts(genes, params, macs):
    with shapes_only():
        net = mobilenet_v3(*genes)
    assert cost(net, 224) == (params, pytest.approx(1e6 * macs, abs=500))


ATTENTIVE = {  # resolution, widths, kernels, expansions, depths; parameters where known, MACs
    "max": (288, [24, 24, 32, 40, 72, 128, 216, 224, 1984], 7 * [5], [1, 6, 6, 6, 6, 6, 6], [2, 5, 6, 6, 8, 8, 2],
            23_934_704, 1939.34),
    "A0": (192, [16, 16, 24, 32, 64, 112, 192, 216, 1792], 7 * [3], [1, 4, 4, 4, 4, 6, 6], [1, 3, 3, 3, 3, 3, 1],
           9_064_648, 203.389568),
    "A1": (224, [16, 16, 24, 32, 64, 112, 192, 216, 1984], [3, 3, 3, 5, 3, 5, 3], [1, 4, 4, 4, 4, 6, 6],
           [1, 3, 3, 3, 3, 3, 1], None, 279.238816),
    "A2": (224, [16, 16, 24, 32, 64, 112, 200, 224, 1984], [3, 3, 3, 3, 3, 5, 3], [1, 4, 5, 4, 4, 6, 6],
           [1, 3, 3, 3, 3, 4, 1], None, 316.73008),
    "A3": (224, [16, 16, 24, 32, 64, 112, 208, 224, 1984], [3, 3, 3, 5, 3, 3, 3], [1, 4, 4, 4, 4, 6, 6],
           [2, 3, 3, 4, 3, 5, 1], None, 356.5184),
    "A4": (256, [16, 16, 24, 32, 64, 112, 192, 216, 1984], [3, 3, 3, 5, 3, 5, 3], [1, 4, 4, 5, 4, 6, 6],
           [1, 3, 3, 4, 3, 5, 1], None, 443.530752),
    "A5": (256, [16, 16, 24, 32, 72, 112, 192, 216, 1792], [3, 3, 3, 5, 3, 3, 3], [1, 4, 5, 4, 4, 6, 6],
           [1, 3, 3, 3, 4, 6, 1], None, 490.520064),
    "A6": (288, [16, 16, 24, 32, 64, 112, 216, 224, 1984], [3, 3, 3, 3, 3, 5, 3], [1, 4, 6, 5, 4, 6, 6],
           [1, 3, 3, 4, 4, 6, 1], 15_441_448, 709.007232),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTIVE)
def test_attentive_nas_has_its_counts(name):
    side, *genes, params, macs = ATTENTIVE[name]
    with shapes_only():
        net = attentive(*genes)
    found = cost(net, side)
    assert found[1] == pytest.approx(1e6 * macs, abs=5000 if name == "max" else 1)
    assert params is None or found[0] + unused(net) == params


def test_a_residual_branch_starts_at_zero_and_a_shortcut_is_light():
    block = MBConvNet(stem=8, stages=[{"width": 8, "depth": 2}], neck=16).eval().stages[0][1]
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(block(x), x)
    net = MBConvNet(stem=8, stages=[{"width": 8, "stride": 2}, {"width": 12, "stride": 1}], neck=16).eval()
    assert torch.equal(net.stages[0](x), nn.functional.avg_pool2d(x, 2))
    assert torch.equal(net.stages[1](x), nn.functional.conv2d(x, net.stages[1][0].match.weight))
    odd = torch.randn(2, 8, 5, 5)
    assert net.stages[0](odd).shape == (2, 8, 3, 3)


def test_it_is_a_supernet_of_any_smaller_one():
    def build(width, depth, kernel):
        stages = [
            {"width": 8, "expand": 1},
            {"width": width, "depth": depth, "kernel": kernel, "stride": 2, "se": True},
        ]
        return tt.create_model("mbconv_net", stem=8, stem_stride=1, stages=stages, neck=24, mix=16, num_classes=5)

    net = elastic(build, (3, 8, 8), {"width": (8, 16), "depth": (1, 2), "kernel": (3, 5)})
    x = torch.randn(2, 3, 8, 8)
    net.model.eval()
    for arch in net.space.enumerate():
        torch.testing.assert_close(net.extract(arch)(x), net(x, arch), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stages": []}, "at least one mapping"),
        ({"stages": [{"width": 8, "widht": 3}]}, r"stages\[0\] may have width, .* got widht"),
        ({"stages": [{"width": 0}]}, r"stages\[0\].width must be a positive integer"),
        ({"stages": [{"kernel": 4}]}, r"stages\[0\].kernel must be odd, got 4"),
        ({"stages": [{"depth": 2, "expand": [6]}]}, r"stages\[0\].expand must have a value for each of 2 blocks"),
        ({"stages": [{"stride": 3}]}, "stride must be 1 or 2"),
        ({"se_of": "output"}, "se_of must be one of input, expanded"),
        ({"shortcut": "none"}, "shortcut must be one of all, same"),
    ],
)
def test_bad_input_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MBConvNet(**kwargs)
