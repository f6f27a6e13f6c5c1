"""Which layers are quantized: plain ones, used once, less the ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trimtab.compress.quantize.swap import layers
from trimtab.models import create_model


def names(model, **kwargs):
    return list(layers(model, **kwargs))


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 3))


def test_the_first_and_the_last_stay_by_default():
    assert names(stack()) == ["1", "3"]
    assert names(stack(), skip=()) == ["0", "1", "3", "4"]
    assert names(stack(), kinds=("linear",)) == ["3"]
    assert names(stack(), skip=("[01]",), kinds=("linear",)) == ["3", "4"]


def test_layers_that_are_used_twice_share_weights_or_do_more_stay():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.again = self.a
            self.tied, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.other.weight = self.tied.weight
            self.attention = nn.MultiheadAttention(4, 2)  # reads the weights of its linear layers itself
            self.reflect = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
            self.plain = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(x)

    assert names(Net(), skip=()) == ["plain"]


def test_a_timm_transformer_has_its_attention_and_mlp():
    with torch.device("meta"):
        vit = create_model("vit_tiny_patch16_224")
    found = names(vit)
    assert len(found) == 4 * 12 and "head" not in found and "patch_embed.proj" not in found


def test_wrong_words_are_refused():
    with pytest.raises(ValueError, match="kinds must be some of linear, conv"):
        layers(stack(), kinds=("norm",))
    with pytest.raises(ValueError, match="skip must name layers of the model, got 'head'"):
        layers(stack(), skip=("head",))
    with pytest.raises(ValueError, match="there is nothing to quantize"):
        layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
