"""Merging: the pass that puts every layer that can in its plain form, on any model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.compress import dcls, merge
from trimtab.compress.merging import plan
from trimtab.core.edit import Remove, Replace
from trimtab.core.errors import SurgeryError
from trimtab.models.classify.dcls import DCLS2d
from trimtab.models.classify.unireplknet import DilatedReparam
from trimtab.nn.merge import depthwise, fold_norm, gain_and_shift, pad_to


def test_layers_of_several_systems_merge_at_once():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), DilatedReparam(6, 7), nn.Sequential(DCLS2d(6, 6, 5, 9, groups=6))).eval()
    edits = plan(net)
    assert [(e.module, e.with_) for e in edits] == [("1", "torch.nn.Conv2d"), ("2.0", "torch.nn.Conv2d")]
    merged, x = merge(net), torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(merged(x), net(x))
    assert [type(m) for m in merged.modules() if not isinstance(m, nn.Sequential)] == [nn.Conv2d] * 3


def test_a_block_speaks_for_the_layers_inside_it():
    edits = plan(tt.create_model("unireplknet_micro_32"))
    assert all(".branches." not in e.module for e in edits)
    per_block = [e for e in edits if e.module.startswith("stages.1.blocks.0.")]
    assert {e.module.rpartition(".")[2]: type(e) for e in per_block} == {
        "mixer": Replace, "norm1": Remove, "fc2": Replace, "norm2": Remove, "scale": Remove, "grn": Replace
    }  # fmt: skip


def test_modes_and_random_state_are_left_alone():
    net = tt.create_model("unireplknet_micro_32", seed=0)
    state = torch.get_rng_state()
    assert all(m.training for m in merge(net).modules())
    assert not any(m.training for m in merge(net.eval()).modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_merged_is_said():
    with pytest.raises(SurgeryError, match="ResNetCifar has no layers to merge"):
        merge(tt.create_model("resnet20_cifar"))
    with pytest.raises(SurgeryError, match="or they are merged already"):
        merge(merge(tt.create_model("unireplknet_micro_32")))
    with pytest.raises(SurgeryError, match="the model itself is a DilatedReparam"):
        merge(DilatedReparam(4, 7))
    with pytest.raises(SurgeryError, match="keeps no running statistics"):
        net = nn.Sequential(DilatedReparam(4, 7))
        net[0].norm = nn.BatchNorm2d(4, track_running_stats=False)
        merge(net)


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_is_a_gain_and_a_shift(affine):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3).double(), nn.BatchNorm2d(5, affine=affine).double()
    norm(torch.randn(8, 5, 4, 4, dtype=torch.float64) * 3 + 1)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    norm.eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    gain, shift = gain_and_shift(norm)
    y = conv(x)
    torch.testing.assert_close(norm(y), y * gain.view(-1, 1, 1) + shift.view(-1, 1, 1))
    torch.testing.assert_close(norm(y), nn.functional.conv2d(x, *fold_norm(conv.weight, conv.bias, norm)))


def test_a_small_kernel_goes_to_the_middle():
    assert pad_to(torch.ones(1, 1, 3, 3), 7)[0, 0].nonzero().tolist() == [[r, c] for r in (2, 3, 4) for c in (2, 3, 4)]


def test_depthwise_convolutions_are_found_where_their_window_is_centred():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good = nn.Conv2d(4, 4, 5, 2, 2, groups=4)
            self.same = nn.Conv1d(4, 4, 3, padding="same", groups=4)
            self.dilated = nn.Conv3d(2, 2, 3, padding=2, dilation=2, groups=2)
            self.shifted = nn.Conv2d(4, 4, 5, padding=1, groups=4)
            self.dense = nn.Conv2d(4, 4, 3, padding=1)
            self.even = nn.Conv2d(4, 4, 4, padding=2, groups=4)
            self.pointwise = nn.Conv2d(4, 4, 1, groups=4)
            self.wide = nn.Conv2d(4, 8, 3, padding=1, groups=4)
            self.circular = nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="circular")
            self.used = nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.again = self.used

    assert list(depthwise(Net())) == ["good", "same", "dilated"]


@torch.no_grad()
def test_a_merged_block_leaves_the_word_to_what_is_put_into_it_later():
    net = merge(tt.create_model("unireplknet_micro_32", layer_scale_init=1.0, seed=0)).eval()
    spaced = dcls(net, dilated_size=7)
    assert sum(isinstance(m, DCLS2d) for m in spaced.modules()) == 6
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(merge(spaced)(x), spaced(x))
    with pytest.raises(SurgeryError, match="has no depthwise convolutions"):  # these are still to be merged
        dcls(tt.create_model("unireplknet_micro_32"))
