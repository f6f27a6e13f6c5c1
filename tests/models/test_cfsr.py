"""CFSR: the exact checks of its fact sheet, merging, and the files that its authors gave out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab import testing
from trimtab.compress import magnitude, merge
from trimtab.models.restore.cfsr import CFSR, LAPLACIAN, SOBEL_X, SOBEL_Y, CFSRBlock, EdgeConv, load_released

PARAMS = {2: (298_236, 291_324), 3: (304_731, 297_819), 4: (313_824, 306_912)}  # in training, merged
MACS = {2: (640, 360, 65.06), 3: (426, 240, 29.53), 4: (320, 180, 17.16)}  # width, height of the small image, G
TINY = {"dim": 8, "depths": (1, 1), "layer_scale_init": 0.5}


def params(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def shaken(net: nn.Module) -> nn.Module:
    """With edges, shifts and scales that nothing cancels."""
    g = torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        if name.endswith(("strength", "shift", "gamma")):
            p.copy_(torch.randn(p.shape, generator=g))
    return net


def off(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", PARAMS)
def test_parameters_tensors_and_multiply_adds_are_the_published_ones(scale):
    with torch.device("meta"):
        train, deploy = (tt.create_model(f"cfsr_x{scale}", deploy=d) for d in (False, True))
    assert (params(train), params(deploy)) == PARAMS[scale]
    assert params(deploy) == 286_128 + 1_299 * scale**2
    assert len(deploy.state_dict()) == 252
    width, height, giga = MACS[scale]
    for net in (train, deploy):
        assert tt.measure(net, (3, height, width), what=("macs",)).macs / 1e9 == pytest.approx(giga, abs=0.005)


def test_a_block_is_made_of_what_the_paper_counts():
    train, deploy = (CFSRBlock(48, 96, 9, layer_scale_init=1e-6, deploy=d) for d in (False, True))
    assert (params(train), params(deploy)) == (22_176, 21_600)
    assert params(train.norm1) + params(train.mixer) == 11_088
    assert params(train.norm2) + params(train.mlp) == 10_992
    assert params(deploy.norm2) + params(deploy.mlp) == 10_416
    assert params(train.scale1) + params(train.scale2) == 96
    assert not [n for n, _ in train.named_buffers() if n in train.state_dict()]  # fixed filters are not stored


def test_a_pixel_sees_127_pixels():
    torch.manual_seed(0)
    net = CFSR(dim=2, depths=(6, 6), in_chans=1, scale=2, layer_scale_init=1.0).double()
    x = images(1, 1, 129, 129, dtype=torch.float64).requires_grad_()
    net(x)[0, 0, 128, 128].backward()  # of the pixel in the middle
    rows, columns = x.grad[0, 0].nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 127, 1, 127)


# -- the network ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_formulas_are_the_paper_s():
    net, x = shaken(CFSR(scale=2, dim=6, depths=(2, 1))).double(), images(2, 3, 9, 8, dtype=torch.float64)
    w = dict(net.named_parameters())

    def conv(x: Tensor, name: str, **how: int) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **how)

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return x * w[f"{name}.weight"].view(-1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1)

    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    def edges(x: Tensor, name: str) -> Tensor:
        """Four depthwise convolutions, summed."""
        y = conv(x, name, padding=1, groups=12)
        for n, fixed in enumerate((SOBEL_X, SOBEL_Y, LAPLACIAN)):
            kernel = torch.tensor(fixed, dtype=torch.float64).expand(12, 1, 3, 3)
            y = y + F.conv2d(x, w[f"{name}.strength"][n].view(-1, 1, 1, 1) * kernel, padding=1, groups=12)
            y = y + w[f"{name}.shift"][n].view(-1, 1, 1)
        return y

    mean = torch.tensor([0.4488, 0.4371, 0.4040]).double().view(3, 1, 1)
    first = y = conv(x - mean, "conv_first", padding=1)
    for group, depth in enumerate((2, 1)):
        for i in range(depth):
            b = f"layers.{group}.blocks.{i}"
            n = norm(y, f"{b}.norm1")
            a = conv(gelu(conv(n, f"{b}.mixer.gate.0")), f"{b}.mixer.gate.2", padding=4, groups=6)
            y = y + w[f"{b}.scale1.gamma"].view(-1, 1, 1) * conv(a * conv(n, f"{b}.mixer.v"), f"{b}.mixer.proj")
            h = gelu(conv(norm(y, f"{b}.norm2"), f"{b}.mlp.fc1"))
            h = h + gelu(edges(h, f"{b}.mlp.edge"))
            y = y + w[f"{b}.scale2.gamma"].view(-1, 1, 1) * conv(h, f"{b}.mlp.fc2")
        y = conv(y, f"layers.{group}.conv") + y
    y = conv(norm(y, "norm"), "conv_after_body", padding=1) + first
    y = F.pixel_shuffle(conv(y, "upsample.0", padding=1), 2) + mean
    assert off(net(x), y) < 1e-7  # the mean is kept in single precision


@torch.no_grad()
def test_without_blocks_it_is_its_convolutions():
    net, x = CFSR(scale=3, layer_scale_init=0.0, dim=8, depths=(2, 2)), images(1, 3, 7, 6)
    first = net.conv_first(x - net.mean)
    g = first
    for layer in net.layers:
        g = g + layer.conv(g)
    torch.testing.assert_close(net(x), net.upsample(net.conv_after_body(net.norm(g)) + first) + net.mean)


def test_edges_begin_at_nearly_nothing():
    torch.manual_seed(0)
    layer = EdgeConv(4000)
    for p in (layer.strength, layer.shift):
        assert p.std().item() == pytest.approx(1e-3, rel=0.05)
    assert layer.weight.abs().max() <= 1 / 3  # torch's own start


@torch.no_grad()
def test_the_mean_moves_with_the_model_and_fits_other_channels():
    net = CFSR(**TINY).to(torch.bfloat16)
    assert net.mean.dtype == torch.bfloat16 and "mean" not in net.state_dict()
    assert CFSR(in_chans=1, **TINY).mean.item() == pytest.approx((0.4488 + 0.4371 + 0.4040) / 3)


def test_wrong_arguments_say_what_was_expected():
    for message, arguments in {
        "kernel_size must be odd, got 8": {"kernel_size": 8},
        r"depths\[1\] must be a positive integer, got 0": {"depths": (2, 0)},
        r"mlp_ratio \* dim must be a positive integer, got 0": {"mlp_ratio": 0.0},
        "scale must be a positive integer, got 2.5": {"scale": 2.5},
    }.items():
        with pytest.raises(ValueError, match=message):
            CFSR(**arguments)


# -- merging ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_it_merges_exactly_into_the_deploy_form():
    net, x = shaken(tt.create_model("cfsr_x2", seed=0, depths=(2, 2))), images(2, 3, 12, 11)
    merged = merge(net)
    assert params(net) - params(merged) == 4 * 576
    assert off(merged(x), net(x)) < 1e-5
    assert off(merged.double()(x.double()), copy.deepcopy(net).double()(x.double())) < 1e-6
    assert not any(isinstance(m, EdgeConv) for m in merged.modules())
    deploy = tt.create_model("cfsr_x2", deploy=True, depths=(2, 2)).double()
    deploy.load_state_dict(merged.state_dict())
    assert torch.equal(deploy(x.double()), merged(x.double()))


@torch.no_grad()
def test_one_kernel_is_the_sum_of_four():
    layer, x = shaken(EdgeConv(96)).double(), images(2, 96, 10, 9, dtype=torch.float64)
    (plain,) = merge(nn.Sequential(layer))
    assert type(plain) is nn.Conv2d and params(layer) - params(plain) == 576
    y = F.conv2d(x, layer.weight, layer.bias, padding=1, groups=96)
    for n, fixed in enumerate((SOBEL_X, SOBEL_Y, LAPLACIAN)):
        kernel = torch.tensor(fixed, dtype=torch.float64).expand(96, 1, 3, 3)
        branch = F.conv2d(x, kernel, padding=1, groups=96)
        y = y + layer.strength[n].view(-1, 1, 1) * branch + layer.shift[n].view(-1, 1, 1)
    assert off(layer(x), y) < 1e-14 and off(plain(x), y) < 1e-14


def test_the_gradient_of_a_strength_is_that_of_the_kernel_along_its_filter():
    layer, x = shaken(EdgeConv(5)).double(), images(2, 5, 8, 8, dtype=torch.float64)
    kernel, bias = (t.detach().requires_grad_() for t in layer.kernel())
    F.conv2d(x, kernel, bias, padding=1, groups=5).square().sum().backward()
    layer(x).square().sum().backward()
    for n, fixed in enumerate((SOBEL_X, SOBEL_Y, LAPLACIAN)):
        along = (kernel.grad[:, 0] * torch.tensor(fixed, dtype=torch.float64)).sum((1, 2))
        torch.testing.assert_close(layer.strength.grad[n], along)
        torch.testing.assert_close(layer.shift.grad[n], bias.grad)


# -- released files ---------------------------------------------------------------------------------------------------


def released(name: str) -> str:
    """One of our names as the authors' files have it, spelled out."""
    part = name.split(".")
    if part[0] != "layers" or part[2] != "blocks":
        return name
    block, inner = ".".join(part[:4]), ".".join(part[4:-1])
    theirs = {
        "norm1": "attn.norm", "mixer.gate.0": "attn.a.0", "mixer.gate.2": "attn.a.2.lkb_reparam", "mixer.v": "attn.v",
        "mixer.proj": "attn.proj", "norm2": "mlp.norm", "mlp.fc1": "mlp.fc1", "mlp.edge": "mlp.pos",
        "mlp.fc2": "mlp.fc2",
    }  # fmt: skip
    if inner.startswith("scale"):
        return f"{block}.layer_scale_{inner[-1]}"
    return f"{block}.{theirs[inner]}.{part[-1]}"


def released_state(scale: int) -> tuple[dict[str, Tensor], nn.Module]:
    net = shaken(tt.create_model(f"cfsr_x{scale}", deploy=True, seed=0)).eval()
    return {released(k): v for k, v in net.state_dict().items()}, net


@pytest.mark.parametrize(("scale", "wrapped"), [(2, True), (3, False), (4, True)])
@torch.no_grad()
def test_released_files_load(scale, wrapped, tmp_path):
    state, net = released_state(scale)
    assert len(state) == 252 and state["upsample.0.weight"].shape == (3 * scale**2, 48, 3, 3)
    assert state["layers.1.blocks.5.attn.a.2.lkb_reparam.weight"].shape == (48, 1, 9, 9)
    assert state["layers.0.blocks.0.mlp.pos.weight"].shape == (96, 1, 3, 3)
    assert state["layers.0.blocks.0.layer_scale_1"].shape == (48,)
    torch.save({"params": state} if wrapped else state, tmp_path / "CFSR.pth")
    again, x = load_released(tmp_path / "CFSR.pth"), images(1, 3, 8, 7)
    assert torch.equal(again(x), net(x)) and not again.training
    tt.save(again, tmp_path / "a")
    assert torch.equal(tt.load(tmp_path / "a")(x), net(x))
    train = load_released(tmp_path / "CFSR.pth", deploy=False)
    assert params(train) == PARAMS[scale][0] and off(train(x), net(x)) < 1e-6


@torch.no_grad()
def test_weights_of_another_scale_load_without_the_tail(tmp_path):
    from safetensors.torch import save_file

    state, net = released_state(2)
    save_file(state, tmp_path / "x2.safetensors")
    x = images(1, 3, 8, 7)
    assert torch.equal(load_released(tmp_path / "x2.safetensors")(x), net(x))
    with pytest.warns(UserWarning, match="starts fresh"):
        other = tt.create_model("cfsr_x4", deploy=True, weights=tmp_path / "x2.safetensors")
    torch.testing.assert_close(other.forward_features(x), net.forward_features(x))


def test_other_files_are_refused(tmp_path):
    state, _ = released_state(2)
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({k: v for k, v in state.items() if k != "norm.bias"}, tmp_path / "missing.pth")
    torch.save({"conv_first.weight": state["conv_first.weight"]}, tmp_path / "other.pth")
    torch.save({"epoch": 3}, tmp_path / "number.pth")
    torch.save(nn.Conv2d(1, 1, 1), tmp_path / "module.pth")
    for file, message in {
        "text.pth": "not a file of weights", "missing.pth": r"does not fit cfsr_x2: .*norm\.bias",
        "other.pth": "none of the three tails", "number.pth": "must hold tensors by name",
        "module.pth": "not a file of weights", "absent.pth": "path must be a file",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load_released(tmp_path / file)


# -- as every other model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deploy", [False, True])
@torch.no_grad()
def test_half_of_it_is_pruned(deploy, tmp_path):
    net = shaken(tt.create_model("cfsr_tiny", **TINY, deploy=deploy, seed=0)).eval()
    x = images(2, 3, 12, 10)
    small = magnitude(net, (3, 12, 10), budget="macs<=50%", scope="global").eval()  # cuts everywhere
    macs = [tt.measure(m, (3, 12, 10), what=("macs",)).macs for m in (net, small)]
    assert macs[1] <= macs[0] / 2 and small(x).shape == (2, 3, 24, 20)
    assert small.upsample[0].weight.shape[0] == 12 and small.conv_first.weight.shape[0] < 8
    mixer = small.layers[0].blocks[0].mixer
    assert mixer.gate[2].groups == mixer.gate[0].out_channels == mixer.v.out_channels < 8
    tt.save(small, tmp_path / "a")
    assert torch.equal(tt.load(tmp_path / "a")(x), small(x))
    if not deploy:
        assert off(merge(small)(x), small(x)) < 1e-5


def test_a_pruned_network_trains_on():
    net = magnitude(tt.create_model("cfsr_tiny", **TINY, seed=0), (3, 12, 12), budget="macs<=60%").train()
    x, y = images(4, 3, 12, 12), images(4, 3, 24, 24, seed=2)
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=5e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(F.l1_loss(net(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@torch.no_grad()
def test_the_exported_file_is_the_merged_network(tmp_path):
    import onnx

    net = shaken(tt.create_model("cfsr_tiny", **TINY, seed=0)).eval()
    exported = tt.export(net, tmp_path / "net.onnx", exporter="classic")
    assert exported.max_abs_diff < 1e-4 and exported.dynamic_batch
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert sum(n.op_type == "Conv" for n in graph.node) == 3 + 2 + 2 * 7  # one convolution where four were learned
    assert not [n for n in graph.node if n.op_type == "Einsum"]


def test_the_slow_checks_of_the_battery_hold():
    testing.check_model(lambda: CFSR(scale=2, dim=4, depths=(1,)), input_size=(3, 8, 8), slow=True)
