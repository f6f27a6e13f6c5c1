"""ImageNet architectures on small images: each runs, sees more than it would unadapted, and survives an artifact."""

from __future__ import annotations

import pytest
import timm
import torch

from trimtab.core.edit import Remove, SetAttr, history
from trimtab.models import create_model, load, save
from trimtab.models.small_images import final_map

# A cross-section of timm: classic, mobile, patchified, re-parameterised, transformer, hybrid, odd ones.
ARCHITECTURES = [
    *("resnet18", "resnet18d", "densenet121", "inception_v3", "regnetx_002", "hrnet_w18_small", "repvgg_a0"),
    *("mobilenetv3_small_050", "mobilenetv4_conv_small", "efficientnet_b0", "tinynet_e", "ghostnet_050", "starnet_s1"),
    *("convnext_atto", "poolformer_s12", "mambaout_femto", "repvit_m0_9", "pvt_v2_b0", "vit_tiny_patch16_224"),
    *("swin_tiny_patch4_window7_224", "levit_128s", "tiny_vit_5m_224", "efficientformerv2_s0", "mobilevit_xxs"),
]


def unadapted_side(name: str) -> int:
    """Shorter side of the final map at 32 pixels when nothing is done; 0 when it does not even run."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, in_chans=1)
        return min(final_map(model, (32, 32), 1))
    except Exception:
        return 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_32_pixels_one_channel(name, tmp_path):
    model = create_model(name, num_classes=5, in_chans=1, img_size=32, seed=0).eval()
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    y = model(x)
    assert y.shape == (2, 5) and torch.isfinite(y).all()
    side = min(final_map(model, (32, 32), 1))
    assert side >= 3 and side > unadapted_side(name)
    save(model, tmp_path / "a")
    torch.testing.assert_close(load(tmp_path / "a")(x), y, atol=1e-5, rtol=1e-5)


def test_resnet_loses_stem_stride_and_stem_pool():
    assert history(create_model("resnet18", img_size=32)).edits == [
        SetAttr("conv1", "stride", [1, 1]),
        Remove("maxpool"),
    ]


def test_64_pixels_lose_one_stride_only():
    assert history(create_model("resnet18", img_size=64)).edits == [SetAttr("conv1", "stride", [1, 1])]
    net = create_model("convnext_atto", img_size=64)
    assert net.stem[0].stride == (2, 2) and final_map(net, (64, 64), 3) == (4, 4)


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 224), ("resnet18", 96), ("cct_2_3x2_32", 32), ("resnet20_cifar", 32), ("tinynet_e", 90)],
)
def test_models_that_are_fine_are_left_alone(name, size):
    assert history(create_model(name, img_size=size)).edits == []


def test_adapt_false_leaves_everything():
    model = create_model("resnet18", img_size=32, adapt=False)
    assert history(model).edits == [] and model.conv1.stride == (2, 2)


def test_transformers_get_a_patch_that_divides_the_image():
    for size, patch in [(28, 4), (64, 8)]:
        model = create_model("vit_tiny_patch16_224", img_size=size)
        assert model.patch_embed.patch_size == (patch, patch)
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 1000)


def test_rectangles():
    model = create_model("mobilenetv3_small_050", img_size=(32, 64), num_classes=3).eval()
    assert final_map(model, (32, 64), 3) == (4, 8)
    model = create_model("cct_2_3x2_32", img_size=(32, 64), num_classes=3).eval()
    assert tuple(model.grid_size) == (8, 16) and model(torch.zeros(1, 3, 32, 64)).shape == (1, 3)


def test_digits_of_8_pixels():
    for name in ("resnet18", "mobilenetv3_small_050", "simplenet_cifar_310k", "resnet8_mlperf_tiny", "cct_2_3x2_32"):
        model = create_model(name, num_classes=10, in_chans=1, img_size=8).eval()
        assert min(final_map(model, (8, 8), 1)) >= 3
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_what_cannot_be_adapted_says_so():
    with pytest.raises(ValueError, match="crossvit_9_240 does not run on 32x32 images"):
        create_model("crossvit_9_240", img_size=32)


def test_adaptation_keeps_the_weights_and_the_callers_random_state():
    before = torch.random.get_rng_state()
    adapted = create_model("resnet18", img_size=32, seed=3)
    plain = create_model("resnet18", seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in adapted.state_dict().items())
