"""The reversible U-Net: exact counts of parameters, MACs and kept bytes, its twin, and its way to ONNX."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

import trimtab as tt
from trimtab.core.artifact import InputSpec
from trimtab.core.saved import saved_bytes
from trimtab.data import load_data
from trimtab.models.dense.reversible_unet import MBConv, ReversibleUNet
from trimtab.nn.reversible import ReversibleSequence

NETS = {  # parameters, and MB kept of 4 x 32^3 voxels: reversible, plain
    "tiny_1": (613_123, 13.66, 307.2),
    "tiny_2": (1_136_003, 13.66, 595.1),
    "tiny_4": (2_181_763, 13.66, 1171.1),
    "wide": (3_419_283, None, None),
}


def small(**arguments) -> ReversibleUNet:
    return tt.create_model("reversible_unet_tiny_1", widths=(8, 16), expansion=2, seed=0, **arguments)


@pytest.mark.parametrize("name", NETS)
def test_parameters_and_kept_bytes_are_those_of_the_paper_s_configurations(name):
    params, reversible, plain = NETS[name]
    with torch.device("meta"):
        nets = [timm.create_model(f"reversible_unet_{name}", reversible=r) for r in (True, False)]
        volume = torch.zeros(1, 4, 32, 32, 32)
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [params, params]
    if reversible is not None:
        kept = [saved_bytes(net, volume) / 1e6 for net in nets]
        assert kept == [pytest.approx(reversible, abs=0.005), pytest.approx(plain, abs=0.05)]


@pytest.mark.parametrize(("side", "reversible", "plain"), [(16, 1.7, 74.4), (48, 46.1, 2008.6), (64, 109.3, 4761.1)])
def test_at_equal_bytes_the_reversible_net_takes_more_than_three_times_the_side(side, reversible, plain):
    with torch.device("meta"):
        nets = [timm.create_model("reversible_unet_tiny_2", reversible=r) for r in (True, False)]
        volume = torch.zeros(1, 4, side, side, side)
    kept = [saved_bytes(net, volume) / 1e6 for net in nets]
    assert kept == [pytest.approx(reversible, abs=0.05), pytest.approx(plain, abs=0.05)]


def test_macs_of_a_volume_of_128():
    with torch.device("meta"):
        net = timm.create_model("reversible_unet_tiny_2")
    assert tt.measure(net, (4, 128, 128, 128), what="macs").macs == pytest.approx(109.88e9, rel=1e-4)


def test_parameters_of_one_bottleneck_and_one_block():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    def formula(c, e):
        return 2 * e * c**2 + 27 * e * c + 4 * e * c + 2 * c

    assert count(MBConv(16, 16, 4, 3)) == formula(16, 4) == 4_064
    assert count(MBConv(10, 10, 6, 3)) == formula(10, 6)
    assert count(ReversibleSequence([(MBConv(16, 16, 4, 3), MBConv(16, 16, 4, 3))])) == 8_128


@pytest.mark.parametrize("resample", ["pool", "mbconv"])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_plain_twin_has_the_same_state_outputs_and_gradients(dims, resample):
    one, other = (small(dims=dims, resample=resample, blocks=2, reversible=r).double() for r in (True, False))
    other.load_state_dict(one.state_dict(), strict=True)
    x = torch.randn(2, 4, *[8] * dims, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    found = [torch.autograd.grad(net(x).square().sum(), list(net.parameters())) for net in (one, other)]
    assert torch.equal(one(x), other(x))
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() < 1e-11 * max(1.0, want.abs().max())
    assert saved_bytes(one, x) < 0.4 * saved_bytes(other, x)


def test_it_learns_regions_of_volumes_as_its_twin_does():
    data = load_data("volumes:n=12,size=16", val=0, test=1 / 3)
    curves, dice = [], []
    for reversible in (True, False):
        net = small(reversible=reversible)
        rows = tt.fit(
            net, data, epochs=10, batch_size=2, lr=0.01, augment="none", progress=False, clip_grad=1.0
        ).history
        curves.append(torch.tensor([row["loss"] for row in rows]))
        dice.append(tt.evaluate(net, data)["dice"])
    torch.testing.assert_close(*curves, rtol=0, atol=1e-3)
    assert min(dice) > 0.5


def test_the_loss_of_masks_and_of_classes():
    net, logits = small(), torch.zeros(1, 3, 4, 4, 4)
    masks = (torch.rand(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    losses = net.criterion(logits, {"label": masks})
    assert losses["cross_entropy"].item() == pytest.approx(torch.log(torch.tensor(2.0)).item())
    filled = masks.flatten(2).sum(2)
    assert losses["dice"].item() == pytest.approx((1 - (filled + 1) / (filled + 33)).mean().item())
    classes = torch.full((1, 4, 4, 4), 255)
    classes[:, 0] = 1
    logits = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    want = F.cross_entropy(logits[:, :, 0], classes[:, 0])
    assert net.criterion(logits, {"label": classes})["cross_entropy"].item() == pytest.approx(want.item())


def test_saved_and_loaded_it_trains_on(tmp_path):
    net = small(blocks=2).eval()
    tt.save(net, tmp_path / "net")
    again = tt.load(tmp_path / "net")
    x = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
    assert again.encoder[0].reversible
    again(x).sum().backward()
    assert all(p.grad is not None for p in again.parameters())


@pytest.mark.parametrize("dims", [2, 3])
def test_its_channels_can_be_pruned(dims):
    net, size = small(dims=dims), (4, *[8] * dims)
    less = tt.compress.magnitude(net, size, budget="macs<=50%")
    assert tt.measure(less, size).macs <= 0.5 * tt.measure(net, size).macs
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    less.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in less.parameters())
    torch.testing.assert_close(less.encoder[0].inverse(less.encoder[0](less.stem(x))), less.stem(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dims", [2, 3])
def test_exported_to_onnx_it_computes_the_same(tmp_path, dims):
    from trimtab.deploy import OnnxModel

    net, size = small(dims=dims).eval(), (4, *[8] * dims)
    done = tt.export(net, tmp_path / "net.onnx", spec=InputSpec(size, (0.0,) * 4, (1.0,) * 4), exporter="classic")
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = net(x)
    torch.testing.assert_close(
        torch.from_numpy(OnnxModel(tmp_path / "net.onnx").logits(x.numpy())), want, rtol=1e-3, atol=1e-4
    )
    assert done.dynamic_batch


def test_the_registered_volume_says_what_it_eats():
    from trimtab.deploy.to_onnx import spec_of

    assert spec_of(small()).size == (4, 32, 32, 32)
    assert spec_of(small(img_size=(8, 16, 24), in_chans=2)).size == (2, 8, 16, 24)
    assert spec_of(small(img_size=16)).size == (4, 16, 16, 16)
    with pytest.raises(ValueError, match=r"takes volumes: img_size must be \(depth, height, width\), got \(8, 8\)"):
        small(img_size=(8, 8))
    with pytest.raises(ValueError, match=r"takes pictures: img_size must be \(height, width\), got \(8, 8, 8\)"):
        tt.create_model("resnet8_mlperf_tiny", img_size=(8, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (8, 15)}, r"widths must be even.*got \(8, 15\)"),
        ({"dims": 1}, "dims must be 2 .images. or 3 .volumes., got 1"),
        ({"resample": "stride"}, "resample must be one of pool, mbconv, got 'stride'"),
        ({"blocks": 0}, "blocks must be a positive integer, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReversibleUNet(**arguments)


def test_sides_must_be_divisible_by_the_levels():
    net = ReversibleUNet(widths=(4, 8, 8), blocks=1, expansion=1)
    with pytest.raises(ValueError, match=r"depth, height and width must be multiples of 4, got \(8, 8, 6\)"):
        net(torch.zeros(1, 4, 8, 8, 6))
