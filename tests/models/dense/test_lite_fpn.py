"""The light segmenter on backbones of timm."""

from __future__ import annotations

import pytest
import torch

import trimtab as tt
from trimtab.models.dense.lite_fpn import LiteFPN


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "resnet18", "swin_tiny_patch4_window7_224"])
def test_any_backbone_with_maps_will_do(backbone):
    more = {"backbone_args": {"img_size": 64}} if "swin" in backbone else {}
    with torch.device("meta"):
        net = tt.create_model("lite_fpn", backbone=backbone, num_classes=5, **more)
        assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 5, 64, 64)


def test_odd_sizes_and_one_channel():
    net = tt.create_model("lite_fpn", num_classes=4, in_chans=1, seed=0).eval()
    assert net(torch.zeros(1, 1, 50, 37)).shape == (1, 4, 50, 37)


def test_logits_are_classified_features():
    """Enlarging and classifying commute: a 1 x 1 convolution and a weighted mean of places are both linear."""
    net = tt.create_model("lite_fpn", num_classes=4, seed=0).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(net.forward_head(net.forward_features(x)), net(x), atol=1e-5)


def test_it_sees_all_scales():
    """A change anywhere reaches the logits everywhere: the coarsest map has the whole picture."""
    net = tt.create_model("lite_fpn", num_classes=2, seed=0).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    net(x)[0, 0, 0, 0].backward()
    assert x.grad is not None and (x.grad[0].abs().sum(0)[56:, 56:] > 0).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbone": "hf-hub:someone/something"}, "backbone must be the name of a registered model"),
        ({"backbone_args": {"checkpoint_path": "x"}}, "backbone_args must not have checkpoint_path"),
        ({"dim": 0}, "dim must be a positive integer, got 0"),
    ],
)
def test_wrong_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        LiteFPN(**options)
