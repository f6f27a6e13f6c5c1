"""ESPCN: the exact checks of its fact sheet, and its tail as a transposed convolution."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.compress import deconvolution, magnitude, methods
from trimtab.core.edit import Narrow, history
from trimtab.core.errors import SurgeryError
from trimtab.learn.image_quality import psnr
from trimtab.models.restore.espcn import ESPCN, SRCNN, icnr_, plan
from trimtab.nn.resize import downscale, upscale
from trimtab.nn.restorer import sub_pixel_conv

PARAMS = {2: 21_284, 3: 22_729, 4: 24_752}
FULL_HD = {2: 10.98, 3: 5.213, 4: 3.193}  # G MACs for 1920 x 1080 pixels


def params(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def shaken(net: nn.Module) -> nn.Module:
    """With biases that nothing cancels, and a last layer that counts."""
    g = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return net


# -- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", PARAMS)
def test_parameters_and_multiply_adds_are_the_published_ones(scale):
    net = tt.create_model(f"espcn_x{scale}")
    assert params(net) == params(tt.create_model("espcn", scale=scale)) == PARAMS[scale]
    h, w = 1080 // scale, 1920 // scale
    macs = tt.measure(net, (1, h, w), what=("macs",)).macs
    assert macs == h * w * (1600 + 18432 + 288 * scale**2)
    assert macs / 1e9 == pytest.approx(FULL_HD[scale], rel=1e-3)


def test_the_baseline_works_at_high_resolution():
    for name, count, per_pixel, giga in (("srcnn_955", 57_281, 57_184, 118.58), ("srcnn_915", 8_129, 8_032, 16.65)):
        net = tt.create_model(name, scale=3)
        assert params(net) == count
        assert tt.measure(net, (1, 4, 5), what=("macs",)).macs == 4 * 5 * 9 * per_pixel
        assert per_pixel * 1920 * 1080 / 1e9 == pytest.approx(giga, abs=0.01)
    ratios = [57_184 * 1920 * 1080 / 1e9 / g for g in FULL_HD.values()]
    assert ratios == pytest.approx([10.8, 22.7, 37.1], abs=0.06)


def test_other_layouts_count_as_derived():
    assert params(ESPCN(scale=3, in_chans=3)) == 31_131
    assert params(ESPCN(scale=3, widths=(64, 64, 32), act="relu")) == 59_657  # PyTorch's own example


@torch.no_grad()
def test_the_formulas_are_the_paper_s():
    net, x = shaken(ESPCN(scale=3)), images(2, 1, 6, 5)
    (w1, b1), (w2, b2), (w3, b3) = ((m.weight, m.bias) for m in net.modules() if isinstance(m, nn.Conv2d))
    h = torch.tanh(F.conv2d(x, w1, b1, padding=2))
    h = torch.tanh(F.conv2d(h, w2, b2, padding=1))
    h = F.conv2d(h, w3, b3, padding=1)  # (B, 9, H, W): the place in a 3 x 3 square, row by row
    y = torch.zeros(2, 1, 18, 15)
    for i in range(3):
        for j in range(3):
            y[:, 0, i::3, j::3] = h[:, 3 * i + j]
    torch.testing.assert_close(net(x), y)
    assert (net(10 * x).abs() > 1).any()  # nothing squashes or clamps the image


def test_shuffling_there_and_back_is_exact():
    t = images(2, 12, 5, 4)
    assert torch.equal(F.pixel_unshuffle(F.pixel_shuffle(t, 2), 2), t)


def test_a_pixel_sees_nine_by_nine():
    net = shaken(ESPCN(scale=2).double())
    x = images(1, 1, 15, 15, dtype=torch.float64).requires_grad_()
    net(x)[0, 0, 14, 14].backward()  # of the pixel in the middle
    rows, columns = x.grad[0, 0].nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 11, 3, 11)


def test_fresh_weights_are_drawn_as_re_implementations_do():
    convs = [m for m in tt.create_model("espcn_x3", seed=0).modules() if isinstance(m, nn.Conv2d)]
    assert [c.weight.std().item() for c in convs] == pytest.approx(
        [(2 / (64 * 25)) ** 0.5, (2 / (32 * 9)) ** 0.5, 1e-3], rel=0.05
    )
    assert not any(c.bias.any() for c in convs)


@torch.no_grad()
def test_icnr_begins_with_nearest_neighbours():
    tail = shaken(sub_pixel_conv(6, 2, 3))
    icnr_(tail[0], 3)
    x = images(2, 6, 5, 4)
    low = F.conv2d(x, tail[0].weight[::9], tail[0].bias[::9], padding=1)
    assert torch.equal(tail(x), F.interpolate(low, scale_factor=3, mode="nearest"))
    y = ESPCN(scale=2, in_chans=3, icnr=True)(images(1, 3, 4, 4))
    assert torch.equal(y, F.interpolate(y[..., ::2, ::2], scale_factor=2, mode="nearest"))


def test_wrong_arguments_say_what_was_expected():
    for message, make in {
        "scale must be a positive integer, got 0": lambda: ESPCN(scale=0),
        "act must be one of tanh, relu, got 'gelu'": lambda: ESPCN(act="gelu"),
        r"widths\[1\] must be a positive integer, got 0": lambda: ESPCN(widths=(8, 0)),
        r"kernels must be 3 odd numbers, got \(9, 4, 5\)": lambda: SRCNN(kernels=(9, 4, 5)),
        "espcn_x3 does not take this argument": lambda: tt.create_model("espcn_x3", num_classes=10),
        r"\(B, 1, H, W\), got shape \(1, 3, 8, 8\)": lambda: ESPCN()(images(1, 3, 8, 8)),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


def test_training_beats_the_cubic_by_a_decibel():
    """Stripes of all directions, which the cubic blurs, at twice the size."""
    g = torch.Generator().manual_seed(0)
    at = torch.arange(24.0)

    def stripes(count: int) -> Tensor:
        angle, phase = torch.rand(2, count, 1, 1, 1, generator=g) * 6.3
        return 0.5 + 0.4 * torch.sin(1.7 * (angle.cos() * at[:, None] + angle.sin() * at) + phase)

    train, test = stripes(64), stripes(32)
    net = tt.create_model("espcn_x2", widths=(16, 16), seed=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(150):
        high = train[(16 * step) % 64 :][:16]
        optimizer.zero_grad()
        F.mse_loss(net(downscale(high, 2)), high).backward()
        optimizer.step()
    low = downscale(test, 2)
    with torch.no_grad():
        learned = psnr(net(low), test, border=2).mean()
    assert learned > psnr(upscale(low, 2), test, border=2).mean() + 1


# -- the tail as a transposed convolution -----------------------------------------------------------------------------


@pytest.mark.parametrize(("r", "k"), [(2, 3), (3, 3), (4, 3), (3, 5)])
@pytest.mark.parametrize("bias", ["none", "alike", "any"])
@torch.no_grad()
def test_a_sub_pixel_convolution_is_a_transposed_one(r, k, bias):
    conv = nn.Conv2d(5, 2 * r * r, k, padding=k // 2, bias=bias != "none").double()
    net = shaken(nn.Sequential(conv, nn.PixelShuffle(r)))
    if bias == "alike":
        conv.bias.copy_(conv.bias[:: r * r].repeat_interleave(r * r))
    turned, x = deconvolution(net), images(2, 5, 7, 6, dtype=torch.float64)
    assert (turned(x) - net(x)).abs().max() < 1e-13
    last = turned[1]
    assert type(last) is nn.ConvTranspose2d and last.kernel_size == (k * r, k * r) and last.stride == (r, r)
    assert type(turned[0]) is (nn.ConstantPad3d if bias == "any" else nn.Identity)
    if bias != "any":  # element by element, as the fact sheet has it
        for c, i, j, u, v in ((0, 1, 0, k - 1, 0), (1, 0, 1, 0, 1)):
            want = conv.weight[c * r * r + i * r + j, :, k - 1 - u, k - 1 - v]
            assert torch.equal(last.weight[:, c, i + r * u, j + r * v], want)


@torch.no_grad()
def test_the_whole_network_keeps_its_function_its_cost_and_is_kept(tmp_path):
    net = shaken(tt.create_model("espcn_x3")).eval()
    turned, x = methods.run("deconvolution", net, (1, 12, 12)), images(2, 1, 9, 8)
    torch.testing.assert_close(turned(x), net(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, nn.PixelShuffle) for m in turned.modules())
    macs = [tt.measure(m, (1, 12, 12), what=("macs",)).macs for m in (net, turned)]
    assert macs[1] - macs[0] == 12 * 12 * 81  # the channel of ones
    tt.save(turned, tmp_path / "a")
    assert torch.equal(tt.load(tmp_path / "a")(x), turned(x))
    alike = tt.create_model("espcn_x3", icnr=True)
    assert len({tt.measure(m, (1, 12, 12), what=("macs",)).macs for m in (alike, deconvolution(alike))}) == 1


def test_it_trains_on_and_the_original_is_left_alone():
    net = shaken(tt.create_model("espcn_x2"))
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    turned = deconvolution(net)
    assert torch.equal(torch.get_rng_state(), state) and not history(net).edits
    assert [e.kind for e in plan(net)] == [e.kind for e in history(turned).edits] == ["replace", "replace"]
    turned(images(1, 1, 6, 6)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in turned.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_what_is_no_sub_pixel_convolution_is_refused():
    for last in (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 2, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU()):
        with pytest.raises(SurgeryError, match="Sequential has no sub-pixel convolution"):
            deconvolution(nn.Sequential(last, nn.PixelShuffle(2)))
    with pytest.raises(SurgeryError, match="ESPCN has no sub-pixel convolution"):
        deconvolution(deconvolution(ESPCN()))


# -- as every other model ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_half_of_it_is_pruned_through_the_pixel_shuffle():
    net, x = shaken(tt.create_model("espcn_x2", in_chans=3)).eval(), images(2, 3, 8, 8)
    small = magnitude(net, (3, 8, 8), budget="macs<=50%", scope="global").eval()  # cuts everywhere
    macs = [tt.measure(m, (3, 8, 8), what=("macs",)).macs for m in (net, small)]
    assert macs[1] <= macs[0] / 2 and small(x).shape == (2, 3, 16, 16)
    cut = [e for e in history(small).edits if isinstance(e, Narrow) and e.tensor.startswith("upsample")]
    assert [(e.tensor, e.dim) for e in cut] == [("upsample.0.weight", 1)]  # what makes the image stays whole
    assert torch.equal(small.upsample[0].weight, net.upsample[0].weight[:, cut[0].keep])


@pytest.mark.parametrize("turned", [False, True])
@torch.no_grad()
def test_the_exported_file_computes_the_same(turned, tmp_path):
    from trimtab.deploy import OnnxModel

    net = shaken(tt.create_model("espcn_x3", seed=0)).eval()
    net = deconvolution(net) if turned else net
    exported = tt.export(net, tmp_path / "net.onnx", exporter="classic")
    assert exported.max_abs_diff < 1e-4 and exported.dynamic_batch
    import onnx

    ops = {n.op_type for n in onnx.load(tmp_path / "net.onnx").graph.node}
    assert ("ConvTranspose" in ops, "DepthToSpace" in ops) == (turned, not turned)
    x = images(3, 1, 32, 32)
    got = torch.from_numpy(OnnxModel(tmp_path / "net.onnx").logits(x.numpy()))
    torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-4)


def test_trained_pruned_and_turned_it_is_still_an_upscaler(tmp_path):
    data = tt.load_data("scenes:size=48,n=24", task="restore", scale=2, in_chans=1, patch=12)
    net = tt.create_model("espcn", scale=data.scale, widths=(16, 16), seed=0)
    objective = tt.learn.Restore(loss="mse")
    net = tt.fit(net, data, objective, epochs=12, lr=1e-2, val=None, progress=False).model
    whole = tt.evaluate(net, data)["psnr"]
    small = tt.fit(
        magnitude(net, data, budget="macs<=50%"), data, objective, epochs=3, lr=3e-3, val=None, progress=False
    )
    turned = deconvolution(small.model)
    tt.save(turned, tmp_path / "a", spec=data.spec)
    scores = [tt.evaluate(m, data)["psnr"] for m in (small.model, tt.load(tmp_path / "a"))]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3) and min(scores) > whole - 4 > 12


def test_a_recipe_trains_prunes_and_turns_it(tmp_path):
    from trimtab.compact.recipe import run

    (tmp_path / "r.yaml").write_text(f"""
data: {{spec: "scenes:size=48,n=24", task: restore, scale: 2, in_chans: 1, patch: 12}}
model: {{name: espcn, widths: [16, 16]}}
out: {tmp_path / "o"}
phases:
  - train: {{objective: {{restore: {{loss: mse}}}}, epochs: 2, progress: false}}
  - compress: {{method: magnitude, budget: "macs<=60%"}}
  - compress: {{method: deconvolution}}
""")
    result = run(tmp_path / "r.yaml")
    assert [p["phase"] for p in result["phases"]] == ["train", "compress", "compress"]
    kept = tt.load(tmp_path / "o")
    assert kept.scale == 2 and any(isinstance(m, nn.ConvTranspose2d) for m in kept.modules())
    assert {e.kind for e in history(kept).edits} >= {"narrow", "replace"}
