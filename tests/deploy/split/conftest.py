"""A small network with a bottleneck, and its two parts on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.core.edit import apply
from trimtab.core.spec import InputSpec
from trimtab.deploy.entropic_student import cut
from trimtab.deploy.split.parts import bottleneck_of, export

SPEC = InputSpec((3, 32, 32), (0.5,) * 3, (0.25,) * 3)


def student(seed: int = 0) -> nn.Module:
    """Untrained, but its latent has numbers other than zero."""
    net = tt.create_model("resnet8_mlperf_tiny", num_classes=5, seed=seed).eval()
    torch.manual_seed(seed)
    apply(net, cut(net, SPEC.size, "layer2").edits(4))
    bottleneck = bottleneck_of(net)[1]
    with torch.no_grad():
        bottleneck.encoder.conv3.weight *= 40
        bottleneck.prior.quantiles[:, 1] = torch.tensor([0.3, -0.4, 0.1, 0.0])
    return net.eval()


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(student(), tmp_path_factory.mktemp("split") / "parts", spec=SPEC, labels=list("abcde"))[0]


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((6, *SPEC.size)).astype(np.float32)
