"""Whatever works on features takes those of any network of timm's, and of an artifact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.data.curate.concept_pruning import concept_pruning
from trimtab.learn.adapt import class_incremental, hvcm, hvcm_scores, mlc, nmc, post_hoc, slca

NETWORKS = {
    "vit_tiny_patch16_224": {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2, "adapt": False},
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4,
                                     "adapt": False},
    "convnext_atto": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
    "resnetv2_50x1_bit": {"channels": (128, 128, 128, 128)},  # its classifier is a 1x1 convolution
}  # fmt: skip
QUICK = {"epochs": 1, "batch_size": 32, "augment": "none", "progress": False}


@pytest.fixture(scope="module")
def data():
    return tt.load_data("digits", limit=150, image_size=16)


def artifact(folder) -> nn.Module:
    """A network that was pruned, kept and loaded again."""
    whole = tt.create_model("resnet8_mlperf_tiny", num_classes=10, in_chans=1, img_size=16, seed=0)
    tt.save(tt.compress.magnitude(whole, (1, 16, 16), budget="macs<=60%"), folder)
    return tt.load(folder)


@pytest.mark.parametrize("name", [*NETWORKS, "artifact"])
def test_methods_over_features_take_any_network(data, tmp_path, name):
    if name == "artifact":
        net = artifact(tmp_path / "pruned")
    else:
        net = tt.create_model(name, num_classes=10, in_chans=1, img_size=16, seed=0, **NETWORKS[name])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    stream, x = class_incremental(data, tasks=2), torch.zeros(2, 1, 16, 16)
    known = hvcm(net, data, groups=2, dim=4, embedding=16, **QUICK)
    made = [
        nmc(net, stream).model,
        slca(net, stream, align=1, covariance="diag", **QUICK).model,
        mlc(net, data, clusters=10, dim=16, hidden=16, layers=1, epochs=1, batch_size=50, progress=False).model,
        known,
    ]
    assert all(m(x).shape == (2, 10) for m in made)
    scores = [score(data, "test") for score in post_hoc(net, data, k=5).values()]
    assert all(s.isfinite().all() for s in [*scores, hvcm_scores(known, data)])
    assert len(concept_pruning(data, net, keep="50%", clusters=5).rows) == round(len(data.splits["train"]) / 2)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
