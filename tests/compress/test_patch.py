"""The user's own class follows a cut, or the cut is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from tests.compress import nets
from trimtab.compress.graph import ChannelGraph, Refused
from trimtab.core.edit import SetAttr, apply, from_json, to_json
from trimtab.core.errors import SurgeryError

VISION = [
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
    ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (2, 2), "num_heads": (4, 8), "embed_dim": 32}),
    ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)}),
    ("mobilevit_xxs", {}),
]


def half(graph: ChannelGraph) -> dict[int, range]:
    return {g.id: range((g.size + 1) // 2) for g in graph.groups}


def test_a_refused_cut_names_the_module_and_leaves_the_model_untouched() -> None:
    model = nets.Stubborn()
    before = copy.deepcopy(model)
    graph = ChannelGraph(model, nets.image())
    with pytest.raises(Refused, match=r"^mix \(Reshaper\) cannot follow the cut") as caught:
        graph.edits({0: range(6)})
    assert isinstance(caught.value, SurgeryError)
    assert caught.value.module == "mix" and sorted(caught.value.units) == list(range(12))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert vars(model.mix.conv)["out_channels"] == 12
    x = nets.image(seed=3)  # the reference graph can do what the class cannot
    with torch.no_grad():
        torch.testing.assert_close(graph.reference({0: range(6)})(x), graph.masked({0: range(6)})(x))
    graph.freeze(caught.value.units)
    assert graph.groups == []


def test_a_model_that_cannot_be_traced_says_so() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if float(x.sum()) > 0 else x

    with pytest.raises(SurgeryError, match=r"Branching cannot be traced by torch\.export"):
        ChannelGraph(Branching(), torch.zeros(2, 3))


@pytest.mark.parametrize(("name", "kwargs"), VISION, ids=[n for n, _ in VISION])
def test_pruned_models_are_the_users_class_and_edits_rebuild_them(name: str, kwargs: dict) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    size = kwargs.get("img_size", 64)
    graph = ChannelGraph(model, nets.image(size))
    assert not graph.unknown_ops
    edits = graph.edits(half(graph))
    small = apply(copy.deepcopy(model), edits)
    assert type(small) is type(model)
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())

    stored = from_json(json.loads(json.dumps(to_json(edits))))
    assert stored == edits
    torch.manual_seed(1)
    again = apply(timm.create_model(name, num_classes=5, **kwargs).eval(), stored)
    again.load_state_dict(small.state_dict())
    x = nets.image(size, seed=3)
    with torch.no_grad():
        assert torch.equal(again(x), small(x))

    small.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-2)
    before = [p.detach().clone() for p in small.parameters()]
    nn.functional.cross_entropy(small(x), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters())
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))


def test_integers_that_mean_something_else_stay() -> None:
    """Three heads, and the 3 of qkv: only the heads change. A window of 3 is no head."""

    class Net(nets.Transformer):
        def __init__(self) -> None:
            super().__init__()
            self.attn.window = 3
            self.attn.bias_shape = (3, 24)

    graph = ChannelGraph(Net().eval(), nets.image())
    heads = next(g for g in graph.groups if ("attn.qkv.weight", 0) in g.members)
    small = apply(copy.deepcopy(graph.model), graph.edits({heads.id: [1]}))
    assert small.attn.num_heads == 1
    assert small(nets.image()).shape == (2, 5)


def test_a_module_with_two_names_is_one_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nets.Attention()
            self.again = nn.ModuleDict({"same": self.first})
            self.stem, self.head = nn.Linear(3, 24), nn.Linear(24, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x.flatten(2).transpose(1, 2))
            return self.head((x + self.again["same"](x) + self.first(x)).mean(1))

    graph = ChannelGraph(Net().eval(), nets.image())
    small = apply(copy.deepcopy(graph.model), graph.edits(half(graph)))
    assert small.again["same"] is small.first and small.first.num_heads == 2
    assert small(nets.image()).shape == (2, 5)


def test_a_new_classifier_fits_after_pruning() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
    graph = ChannelGraph(model, nets.image(32))
    small = apply(copy.deepcopy(model), graph.edits(half(graph)))
    small.reset_classifier(7)
    assert small(nets.image(32)).shape == (2, 7)


def test_attribute_edits_are_json_values() -> None:
    graph = ChannelGraph(nets.Transformer(), nets.image())
    edits = graph.edits(half(graph))
    values = {(e.module, e.name): e.value for e in edits if isinstance(e, SetAttr)}
    assert values["norm", "normalized_shape"] == (12,)
    assert values["attn", "num_heads"] == 2 and values["up", "out_features"] == 16
