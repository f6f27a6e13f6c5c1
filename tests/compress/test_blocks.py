"""Residual blocks in the channel graph, and what a network costs without some."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.compress import ChannelGraph
from trimtab.core.edit import Remove, apply


class Block(nn.Module):
    """One of many forms: x + f(x), f(x) + x, relu of it, gated, not residual at all."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.conv, self.bn = form, nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        match self.form:
            case "after":
                return y + x
            case "activated":
                return self.act(x + y)
            case "twice":
                x = x + y
                return x + self.bn(self.conv(x))
            case "reshaped":
                return (x.flatten(2) + y.flatten(2)).reshape(x.shape)
            case "gated":
                return x * y.sigmoid()
            case "plain":
                return y
            case "doubled":
                return y + y
        return x + y


def net(*forms: str) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), *map(Block, forms), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize(
    ("form", "residual"),
    [("before", True), ("after", True), ("activated", True), ("twice", True), ("reshaped", True),
     ("gated", False), ("plain", False), ("doubled", False)],
)  # fmt: skip
def test_a_block_is_what_adds_to_its_input(form, residual):
    assert ChannelGraph(net(form), torch.zeros(2, 1, 8, 8)).blocks() == (["1"] if residual else [])


def test_of_blocks_in_blocks_the_innermost_are_found():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(Block("before"), Block("activated")), nn.Conv2d(4, 2, 1))
    assert ChannelGraph(model, torch.zeros(2, 1, 8, 8)).blocks() == ["1.0", "1.1"]


@pytest.mark.parametrize(
    ("name", "kwargs", "blocks"),
    [
        ("resnet8_mlperf_tiny", {"num_classes": 10}, ["layer1.0"]),
        ("resnet18", {"num_classes": 10}, [f"layer{i}.1" for i in (2, 3, 4)] + ["layer1.0", "layer1.1"]),
        (
            "vit_tiny_patch16_224",
            {"depth": 2, "num_classes": 10, "img_size": 32, "patch_size": 8},
            ["blocks.0", "blocks.1"],
        ),
        ("mobilenetv2_035", {"num_classes": 10}, None),
    ],
)
def test_networks_without_their_blocks_cost_what_is_counted(name, kwargs, blocks):
    model = tt.create_model(name, in_chans=3, **kwargs)
    graph = ChannelGraph(model, torch.zeros(2, 3, 32, 32))
    found = graph.blocks()
    assert found and (blocks is None or sorted(found) == sorted(blocks))
    keep = {g.id: range(max(1, g.size // 2)) for g in graph.groups if g.width == 1 and not name.startswith("vit")}
    small = apply(copy.deepcopy(model), graph.edits(keep))
    apply(small, [Remove(b) for b in found])
    cost = tt.measure(small, (3, 32, 32))
    assert (graph.params(keep, without=found), graph.macs(keep, without=found)) == (cost.params, cost.macs)
