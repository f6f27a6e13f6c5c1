from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from trimtab.core.cost import measure
from trimtab.models import create_model
from trimtab.models.classify.resnet_cifar import PadShortcut, ResNetCifar


def test_resnet8_of_mlperf_tiny_has_its_parameters_and_macs():
    model = create_model("resnet8_mlperf_tiny", num_classes=10)
    cost = measure(model, (3, 32, 32), what=("params", "macs"))
    assert cost.params == 77_962
    assert cost.macs == 12_501_632


def test_resnet8_with_folded_batch_norm_is_the_reference_network():
    """Folded, every convolution has a bias whether it had one or not: 77,706 numbers, as in the reference."""
    model = create_model("resnet8_mlperf_tiny", num_classes=10)
    folded = sum(m.weight.numel() + m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    assert folded + sum(p.numel() for p in model.linear.parameters()) == 77_706


@pytest.mark.parametrize(
    ("name", "params", "macs"), [("resnet20_cifar", 269_722, 40.551e6), ("resnet56_cifar", 853_018, 125.486e6)]
)
def test_cifar_resnets_have_the_published_counts(name, params, macs):
    with torch.device("meta"):
        cost = measure(timm.create_model(name), (3, 32, 32), what=("params", "macs"))
    assert cost.params == params
    assert cost.macs == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize(("name", "depth"), [("resnet20_cifar", 3), ("resnet56_cifar", 9)])
def test_published_layout_loads_as_it_is(name, depth, tmp_path):
    """Names and shapes of the published checkpoints, without batch counters, inside DataParallel's prefix."""
    g = torch.Generator().manual_seed(0)
    state = {"conv1.weight": torch.randn(16, 3, 3, 3, generator=g)}
    norms = {"bn1": 16}
    for s, (width, before) in enumerate(((16, 16), (32, 16), (64, 32))):
        for b in range(depth):
            name_ = f"layer{s + 1}.{b}"
            state[f"{name_}.conv1.weight"] = torch.randn(width, before if b == 0 else width, 3, 3, generator=g)
            state[f"{name_}.conv2.weight"] = torch.randn(width, width, 3, 3, generator=g)
            norms |= {f"{name_}.bn1": width, f"{name_}.bn2": width}
    for n, width in norms.items():
        state |= {f"{n}.{k}": torch.rand(width, generator=g) for k in ("weight", "bias", "running_mean", "running_var")}
    state |= {"linear.weight": torch.randn(10, 64, generator=g), "linear.bias": torch.randn(10, generator=g)}
    save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / "w.safetensors")
    model = create_model(name, weights=tmp_path / "w.safetensors")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


def test_option_a_shortcut_takes_every_second_pixel_and_pads_both_sides():
    x = torch.randn(2, 4, 6, 6)
    y = PadShortcut(4, 8, 2)(x)
    assert y.shape == (2, 8, 3, 3)
    torch.testing.assert_close(y[:, 2:6], x[:, :, ::2, ::2])
    assert y[:, :2].abs().sum() == y[:, 6:].abs().sum() == 0


def test_block_is_relu_of_sum():
    torch.manual_seed(0)
    net = ResNetCifar(depths=(1, 1), widths=(4, 8), shortcut="conv").eval()
    b, x = net.layer2[0], torch.randn(1, 4, 8, 8)
    y = F.conv2d(x, b.conv1.weight, stride=2, padding=1) / (1 + 1e-5) ** 0.5
    y = F.conv2d(y.relu(), b.conv2.weight, padding=1) / (1 + 1e-5) ** 0.5
    want = (y + F.conv2d(x, b.shortcut.weight, b.shortcut.bias, stride=2)).relu()
    torch.testing.assert_close(b(x), want, atol=1e-4, rtol=1e-4)


def test_features_only():
    maps = timm.create_model("resnet20_cifar", features_only=True).eval()(torch.zeros(1, 3, 32, 32))
    assert [(m.shape[1], m.shape[2]) for m in maps] == [(16, 32), (16, 32), (32, 16), (64, 8)]
    assert all((m >= 0).all() for m in maps)  # the activation is inside each tap


def test_wrong_arguments_say_what_was_expected():
    with pytest.raises(ValueError, match="shortcut must be"):
        ResNetCifar(shortcut="b")
    with pytest.raises(ValueError, match="same length"):
        ResNetCifar(depths=(1, 1), widths=(8,))
    with pytest.raises(ValueError, match="must not shrink"):
        ResNetCifar(widths=(16, 8, 64))
