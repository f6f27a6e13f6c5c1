"""Features of any network: what its classifier is given, in eval mode, kept on disk."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.core.errors import ArtifactError
from trimtab.nn.features import FeatureExtractor, classifier_of, pooled_features


@pytest.fixture(scope="module")
def data():
    return tt.load_data("digits", limit=120)


def small(seed: int = 0) -> nn.Module:
    return tt.create_model("trim_1k", num_classes=10, in_chans=1, img_size=8, seed=seed)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet8_mlperf_tiny", {}),
        ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "adapt": False}),
        ("mobilenetv3_small_050", {}),
        ("convnext_atto", {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}),
        ("cct_2_3x2_32", {}),
        ("resnetv2_50x1_bit", {"channels": (128, 128, 128, 128)}),  # its classifier is a 1x1 convolution
    ],
)
def test_features_are_what_a_model_without_classifier_gives(name, kwargs):
    model = tt.create_model(name, num_classes=7, img_size=32, seed=0, **kwargs).train()
    x = torch.randn(2, 3, 32, 32)
    features = FeatureExtractor(model)(x)
    assert model.training
    model.eval()
    with torch.no_grad():
        pre_logits = model.forward_head(model.forward_features(x), pre_logits=True).flatten(1)
        model.reset_classifier(0)
        without = model(x).flatten(1)
    assert features.shape == (2, pre_logits.shape[1])
    torch.testing.assert_close(features, pre_logits)
    torch.testing.assert_close(features, without)


def test_the_paper_s_extractor_has_its_parameters():
    with torch.device("meta"):
        vit = tt.create_model("vit_base_patch16_224", num_classes=0)
    assert sum(p.numel() for p in vit.parameters()) == 85_798_656
    assert classifier_of(vit) == "head" and vit.num_features == 768


def test_batch_norms_are_left_alone_and_no_gradient_is_kept(data):
    model = small().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = FeatureExtractor(model, normalize=True, batch_size=7).of(data, "train")
    assert not found.values.requires_grad and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(found.values.norm(dim=1), torch.ones(len(found.values)))
    assert torch.equal(found.labels, data.splits["train"].labels)


def test_other_layers_are_pooled(data):
    model, x = small().eval(), next(iter(data.loader("test", batch_size=4)))["image"]
    maps = model.forward_features(x)
    at = [n for n, m in model.named_modules() if n and "." not in n and list(m.parameters())][-2]
    assert pooled_features(model, x, at=at).shape[0] == 4
    torch.testing.assert_close(pooled_features(model, x), model.global_pool(maps))
    torch.testing.assert_close(pooled_features(model, x, before=classifier_of(model)), model.global_pool(maps))


def test_the_cache_answers_for_the_same_weights_and_images_only(data, tmp_path, monkeypatch):
    model = small()
    first = FeatureExtractor(model, cache=tmp_path).of(data, "train")
    monkeypatch.setattr("trimtab.nn.features.pooled_features", lambda *a, **k: pytest.fail("computed again"))
    again = FeatureExtractor(model, cache=tmp_path, normalize=True, batch_size=3).of(data, "train")
    torch.testing.assert_close(again.values, nn.functional.normalize(first.values))
    monkeypatch.undo()
    FeatureExtractor(model, cache=tmp_path).of(data, "test")
    FeatureExtractor(model, cache=tmp_path).of(data.like(mean=(0.1,)), "train")
    FeatureExtractor(small(1), cache=tmp_path).of(data, "train")
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_cache_says_so(data, tmp_path):
    FeatureExtractor(small(), cache=tmp_path).of(data, "test")
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match="delete it, and it is made again"):
        FeatureExtractor(small(), cache=tmp_path).of(data, "test")


class Twice(nn.Module):
    """Its last linear layer does not give its output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x):
        return self.b(x.flatten(1)) + self.a(x.flatten(1))


def test_what_has_no_clear_classifier_is_refused(data):
    with pytest.raises(ValueError, match=r"has no single classifier .* name a layer with at"):
        FeatureExtractor(nn.Conv2d(1, 4, 3))
    with pytest.raises(ValueError, match="gives; name one with at"):
        FeatureExtractor(Twice()).of(data, "test")
    assert FeatureExtractor(Twice(), at="a").of(data, "test").values.shape[1] == 10
    with pytest.raises(ValueError, match="at and before must be modules of the model, got 'c'"):
        FeatureExtractor(Twice(), at="c").of(data, "test")
    with pytest.raises(ValueError, match=r"split must be one of .*, got 'dev'"):
        FeatureExtractor(small()).of(data, "dev")
