"""State-space models: the exact checks of the fact sheet, its traps, and what they do in the library."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

import trimtab as tt
from trimtab.core.cost import measure
from trimtab.models.classify.mamba_survey import CORES, S4D, S5, Vim, VimBlock, VMamba, hippo, hippo_modes
from trimtab.models.dense.mamba_unets import MambaLayer, UMamba, VMUNet
from trimtab.nn.scan import count_scans
from trimtab.nn.ssm import S6, SS2D

TINY = {"dims": (16, 32, 64, 128, 128), "img_size": 64, "in_chans": 1}
# name, arguments, image size, parameters, MACs in G, length x channels x states in M (None: not looked at here)
TABLE = [
    ("vim_tiny", {}, 224, 7_148_008, "1.2929", "58.1"),
    ("vim_small", {}, 224, 25_796_584, None, None),
    ("vim_base", {}, 224, 97_598_440, None, None),
    ("vim_tiny_plus", {}, 224, 7_250_344, None, None),
    ("vim_small_plus", {}, 224, 26_001_256, None, None),
    ("vmamba_tiny_v0", {}, 224, 22_893_448, "3.6770", "211.9"),
    ("vmamba_tiny", {}, 224, 30_249_064, "4.8126", "6.3"),
    ("vmamba_tiny_s2l5", {}, 224, 30_705_832, "4.7162", "10.8"),
    ("vmamba_small", {}, 224, 50_147_752, None, None),
    ("vmamba_base", {}, 224, 88_557_800, None, None),
    ("vm_unet", {}, 256, 27_427_561, "5.2884", "327.2"),
    ("vm_unet_large", {}, 256, 44_273_833, None, None),
    ("u_mamba_bot", {"in_chans": 1}, 256, 47_514_892, "26.2202", "0.3"),
    ("u_mamba_enc", {"in_chans": 1}, 256, 46_387_532, "27.4416", "88.3"),
    ("u_mamba_bot", TINY, 64, 1_887_688, "0.3316", None),
    ("u_mamba_enc", TINY, 64, 1_810_504, "0.3491", None),
]  # fmt: skip


def params(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("name", "arguments", "side", "count", "gmacs", "steps"), TABLE)
def test_sizes_are_those_of_the_official_code(name, arguments, side, count, gmacs, steps):
    with torch.device("meta"):
        net = timm.create_model(name, **arguments).eval()
        image = torch.zeros(1, arguments.get("in_chans", 3), side, side)
    assert params(net) == count
    if gmacs:
        with count_scans() as counted:
            cost = measure(net, tuple(image.shape[1:]), what=("macs",))
        assert f"{cost.macs / 1e9:.4f}" == gmacs
        if steps:
            counted.clear()
            with count_scans() as counted, torch.no_grad():
                net(image)
            assert f"{sum(counted) / 1e6:.1f}" == steps


def test_cores_have_the_published_parameters():
    assert params(S4D(128, state=64)) == 49_664
    layer = VimBlock(128, S5(128, state=256))
    layer.norm = nn.LayerNorm(128)
    assert params(layer) == 82_816
    gate = 128 * 128 + 128
    assert params(S5(128)) - gate == 66_048 and params(S5(128, bidirectional=True)) - gate == 98_816


def test_shapes_of_the_mixers_are_those_of_the_official_code():
    vim = S6(192, bidirectional=True)
    for branch in vim.branches:
        shapes = [
            tuple(p.shape) for p in (branch.x_proj.weight, branch.dt_proj.weight, branch.conv.weight, branch.A_log)
        ]
        assert shapes == [(44, 384), (384, 12), (384, 1, 4), (384, 16)]
    assert tuple(vim.in_proj.weight.shape) == (768, 192) and len(vim.branches) == 2
    with torch.device("meta"):
        mixer = timm.create_model("vmamba_tiny").stages[0].blocks[0].mixer
    shapes = {n: tuple(p.shape) for n, p in mixer.named_parameters()}
    assert shapes == {
        "x_proj": (4, 8, 96), "dt_weight": (4, 96, 6), "dt_bias": (4, 96), "A_log": (384, 1), "D": (384,),
        "in_proj.weight": (96, 96), "conv.weight": (96, 1, 3, 3), "out_proj.weight": (96, 96),
        "norm.weight": (96,), "norm.bias": (96,),
    }  # fmt: skip


def test_hippo_is_normal_and_its_modes_come_in_pairs():
    s = hippo(16)
    assert np.abs(s + s.T + np.eye(16)).max() < 1e-14
    values, vectors = hippo_modes(16)
    assert np.abs(values.real + 0.5).max() < 1e-14
    assert np.abs(np.sort(values.imag) + np.sort(values.imag)[::-1]).max() < 1e-12
    assert round(float(values.imag.max()), 3) == 80.966
    assert np.abs(vectors * values @ vectors.conj().T - s).max() < 1e-12


@torch.no_grad()
def test_s4d_as_a_convolution_equals_the_recurrence():
    torch.manual_seed(0)
    layer, u = S4D(8, state=16), torch.randn(2, 64, 8)
    dt = layer.log_dt.exp()[:, None]
    a = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    decay, b, c = (dt * a).exp(), ((dt * a).exp() - 1) / a, torch.view_as_complex(layer.C)
    h, want = torch.zeros(2, 8, 8, dtype=torch.complex64), []
    for t in range(64):
        h = decay * h + b * u[:, t, :, None]
        want.append(2 * (c * h).sum(-1).real + layer.D * u[:, t])
    assert (layer.ssm(u) - torch.stack(want, 1)).abs().max() < 5e-6


@pytest.mark.parametrize("bidirectional", [False, True])
@torch.no_grad()
def test_s5_equals_its_recurrence(bidirectional):
    torch.manual_seed(0)
    layer, u = S5(6, state=16, blocks=2, bidirectional=bidirectional).double(), torch.randn(2, 40, 6).double()
    rate = torch.view_as_complex(layer.Lambda)
    decay = (rate * layer.log_dt.exp()).exp()
    b = ((decay - 1) / rate)[:, None] * torch.view_as_complex(layer.B)
    want = layer.D * u
    for c, turned in zip(torch.view_as_complex(layer.C), (False, True)):
        v, h, found = u.flip(1) if turned else u, 0, []
        for t in range(40):
            h = decay * h + v[:, t].to(b.dtype) @ b.T
            found.append(2 * (h @ c.T).real)
        y = torch.stack(found, 1)
        want = want + (y.flip(1) if turned else y)
    assert (layer.ssm(u) - want).abs().max() < 1e-12


@torch.no_grad()
def test_the_exported_form_of_s4d_is_its_convolution(tmp_path):
    torch.manual_seed(0)
    layer, u = S4D(4, state=8).eval(), torch.randn(1, 12, 4)
    exported = torch.export.export(layer, (u,), strict=False)
    assert not any("fft" in str(n.target) for n in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(u), layer(u), rtol=1e-4, atol=1e-5)


def test_steps_start_between_a_thousandth_and_a_tenth_and_no_init_touches_them():
    for net in (tt.create_model("vim_nano_32"), tt.create_model("vmamba_nano_32"), tt.create_model("vm_unet_nano_32")):
        biases = [p for n, p in net.named_parameters() if n.endswith(("dt_proj.bias", "dt_bias"))]
        steps = nn.functional.softplus(torch.cat([b.flatten() for b in biases]))
        assert 0.99e-3 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.101


def test_decays_get_no_weight_decay():
    from trimtab.learn import param_groups

    net = tt.create_model("vmamba_nano_32")
    free = {id(p) for g in param_groups(net, lr=1.0, weight_decay=0.1) if not g["weight_decay"] for p in g["params"]}
    assert all((id(p) in free) == (p.ndim == 1 or n.endswith(("A_log", "dt_bias"))) for n, p in net.named_parameters())


@torch.no_grad()
def test_the_class_token_stands_in_the_middle_and_directions_are_averaged():
    torch.manual_seed(0)
    net = Vim(img_size=16, patch_size=4, embed_dim=8, depth=1).eval()
    nn.init.zeros_(net.pos_embed)
    net.cls_token.fill_(7)
    assert (net._tokens(torch.zeros(1, 3, 16, 16))[0, 8] == 7).all()
    mixer = S6(8, bidirectional=True)
    x = torch.randn(1, 6, 8)
    inner, gate = mixer.in_proj(x).chunk(2, -1)
    there, back = mixer.branches[0](inner), mixer.branches[1](inner.flip(1))
    gated = (there * nn.functional.silu(gate) + (back * nn.functional.silu(gate.flip(1))).flip(1)) / 2
    torch.testing.assert_close(mixer(x), mixer.out_proj(gated))


@torch.no_grad()
def test_u_mamba_replaces_the_map_unless_told_to_add():
    torch.manual_seed(0)
    layer, x = MambaLayer(8), torch.randn(1, 8, 4, 4)
    added = copy.deepcopy(layer)
    added.residual = True
    torch.testing.assert_close(added(x), x + layer(x))
    assert [m.by_channel for m in UMamba(**TINY | {"in_chans": 3}, mamba="enc").mamba if isinstance(m, MambaLayer)] == [
        False, False, True]  # fmt: skip


def test_deep_supervision_gives_logits_of_every_stage_while_training():
    net = UMamba(dims=(8, 8, 16), deep_supervision=True, img_size=16)
    assert [tuple(y.shape) for y in net(torch.zeros(2, 3, 16, 16))] == [(2, 2, 16, 16), (2, 2, 8, 8)]
    assert net.eval()(torch.zeros(1, 3, 16, 16)).shape == (1, 2, 16, 16)


def test_every_core_can_be_built_without_memory():
    for core in CORES:
        with torch.device("meta"):
            net = timm.create_model("vim_nano_32", core=core, depth=1)
            assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_classifier_learns_and_a_segmenter_learns_maps():
    data = tt.load_data("digits", limit=1000)
    net = tt.create_model(
        "vmamba_nano_32", num_classes=10, in_chans=1, img_size=8, dims=(16, 32), depths=(1, 1), seed=0
    )
    result = tt.fit(net, data, epochs=4, batch_size=32, opt="adamw", lr=4e-3, progress=False, seed=0)
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < 0.8 * losses[0]
    torch.manual_seed(0)
    unet = tt.create_model("vm_unet_nano_32", dim=8, seed=0)
    x = torch.randn(8, 3, 32, 32)
    maps = (x.mean(1) > 0).long()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=5e-3)
    first = None
    for _ in range(25):
        loss = nn.functional.cross_entropy(unet(x), maps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < 0.8 * first


def test_wrong_arguments_say_what_was_expected():
    for message, make in {
        "core must be one of s6, s4d, s5, got 'ssd'": lambda: Vim(core="ssd"),
        "scan must be one of unidi, .*, got 'x'": lambda: VMamba(scan="x"),
        "dims and depths must be equally many": lambda: VMamba(dims=(8,)),
        "stem_stride must be 2 or 4, got 3": lambda: VMamba(stem_stride=3),
        "state must be even": lambda: S4D(8, state=3),
        "state must be a multiple of 2 x blocks = 8, got 12": lambda: S5(8, state=12, blocks=4),
        "depths and depths_decoder must be equally many": lambda: VMUNet(depths=(1, 1)),
        "mamba must be bot, enc or none, got 'mid'": lambda: UMamba(mamba="mid"),
        "width must be a positive integer, got 0": lambda: SS2D(8, expand=0.1),
        "must be multiples of 32, got": lambda: VMUNet(dim=8)(torch.zeros(1, 3, 48, 48)),
        r"built for images of \(16, 16\)": lambda: UMamba(dims=(8, 8), mamba="enc", img_size=16)(
            torch.zeros(1, 3, 32, 32)
        ),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()
