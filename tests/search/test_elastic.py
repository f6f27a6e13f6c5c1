"""Supernets of a user's own network, and of builders."""

from __future__ import annotations

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import trimtab as tt
from tests.search.nets import GENES, SIZE, VIT, WORDS, Own, build, images, own, vit
from trimtab.core.artifact import InputSpec
from trimtab.core.edit import apply, from_json, to_json
from trimtab.core.errors import SurgeryError
from trimtab.search import elastic
from trimtab.search.from_builder import blocks

# -- any network


@pytest.fixture(scope="module")
def users():
    """A user's own network, with everything that may be left out of it."""
    return elastic(own(), SIZE, WORDS)


def test_making_a_supernet_changes_neither_the_network_nor_its_function():
    model = own().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    net = elastic(model, SIZE, WORDS)
    x = images(net)
    torch.testing.assert_close(net.model.eval()(x), model(x), rtol=0, atol=1e-5)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_channels_with_the_largest_weights_come_first():
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 5, 3, bias=False))
    with torch.no_grad():
        model[0].weight[:4] *= 1e-4  # half of the channels do nothing to speak of, and are first
    sorted_, plain = (elastic(model, SIZE, {"width": (0.5, 1)}, order=order) for order in ("norm", None))
    x = images(plain)
    sorted_.model.eval(), plain.model.eval()
    torch.testing.assert_close(sorted_(x, sorted_.space.min()), model(x), rtol=0, atol=1e-3)
    assert (plain(x, plain.space.min()) - model(x)).abs().max() > 0.05
    assert torch.equal(plain.model[0].weight, model[0].weight)


def test_blocks_are_found_and_the_last_go_first():
    net = elastic(own(), SIZE, {"depth": "blocks"})
    assert {g.name: g.choices for g in net.space.genes} == {"depth.first": (1, 2, 3), "depth.second": (1, 2)}
    model = net.extract({"depth.first": 2, "depth.second": 1})
    assert [type(m).__name__ for m in model.first] == ["Block", "Block", "Identity"]
    assert [type(m).__name__ for m in model.second] == ["Block", "Identity"]
    shares = elastic(own(), SIZE, {"depth": (0.5, 1)})
    assert {g.name: g.choices for g in shares.space.genes} == {"depth.first": (2, 3), "depth.second": (1, 2)}


def test_blocks_that_change_the_resolution_stay():
    net = elastic(tt.create_model("resnet20_cifar", num_classes=5, in_chans=3), (3, 16, 16), {"depth": "blocks"})
    blocks = [b for s in net._source._stages.values() for b in s.blocks]
    assert "layer2.0" not in blocks and {"layer1.0", "layer2.1", "layer2.2"} <= set(blocks)


def test_width_of_a_block_that_is_left_out_does_not_count(users):
    net = users
    small = {**net.space.max(), "depth.first": 1}
    other = {**small, "width.first.2.conv1": 0.25}
    assert net.space.key(small) == net.space.key(other) and net.cost(small) == net.cost(other)
    assert net.space.key(small) != net.space.key({**small, "width.first.0.conv1": 0.25})


def test_width_by_pattern_leaves_other_layers_whole():
    net = elastic(own(), SIZE, {"width": {"first*": (0.5, 1)}})
    assert [g.name for g in net.space.genes] == [f"width.first.{i}.conv1" for i in range(3)]


def test_edits_make_the_child_and_survive_json(users, tmp_path):
    net = users
    arch = net.space.sample(np.random.default_rng(4))
    edits = from_json(to_json(net.edits(arch)))
    x = images(net)
    again = apply(copy.deepcopy(net.model), edits).eval()
    net.model.eval()
    torch.testing.assert_close(again(x), net(x, arch), rtol=0, atol=1e-6)
    model = net.extract(arch)
    tt.save(model, tmp_path)
    assert torch.equal(tt.load(tmp_path, base=Own())(x), model(x))


def test_child_of_a_registered_network_loads_by_name_alone(tmp_path):
    model = tt.create_model("trim_10k", num_classes=10, in_chans=1, img_size=8)
    net = elastic(model, SIZE, {"width": (0.5, 1)})
    small = net.extract(net.space.min())
    tt.save(small, tmp_path)
    x = images(net)
    assert torch.equal(tt.load(tmp_path)(x), small(x))


def test_child_of_a_named_builder_loads_by_name_alone(tmp_path):
    net = elastic(vit, (3, 16, 16), VIT)
    small = net.extract(net.space.min())
    tt.save(small, tmp_path)
    x = images(net)
    assert torch.equal(tt.load(tmp_path)(x), small(x))


def test_extracted_child_runs_in_onnx(users, tmp_path):
    net = users
    model = net.extract({**net.space.min(), "depth.first": 2})
    tt.export(model, tmp_path / "m.onnx", spec=InputSpec(SIZE, (0.0,), (1.0,)))
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    x = images(net, 1)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(out, model(x).detach().numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: elastic(own(), SIZE, {}), "must be of width, depth"),
        (lambda: elastic(own(), SIZE, {"wdith": (0.5, 1)}), "must be of width, depth"),
        (lambda: elastic(own(), SIZE, {"width": (0.5, 0.75)}), "rising shares that end with 1"),
        (lambda: elastic(own(), SIZE, {"width": (1, 0.5)}), "rising shares that end with 1"),
        (lambda: elastic(own(), SIZE, {"depth": "all"}), "or 'blocks'"),
        (lambda: elastic(own(), SIZE, WORDS, order="random"), "order must be"),
        (lambda: elastic(own(), SIZE, {"resolution": (4, 4, 8)}), "rising numbers of pixels"),
        (lambda: elastic(own(), SIZE, {"resolution": (4, 6)}), "must end with the side of square images, 8"),
        (lambda: elastic(own(), SIZE, tt.search.Space({"width": (1, 2)})), "must be a mapping"),
        (lambda: elastic("resnet18", SIZE, WORDS), "module or a function"),
        (lambda: elastic(build, SIZE, GENES).edits({}), "built, not cut"),
        (lambda: elastic(own(), SIZE, WORDS).extract({"width": 1}), "architecture must have"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_network_with_nothing_to_leave_out_says_so():
    with pytest.raises(SurgeryError, match="nothing that could be left out"):
        elastic(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), SIZE, {"depth": "blocks"})


class Stubborn(nn.Module):
    """Its forward says in numbers how many channels its first layer has."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 5, 3)

    def forward(self, x):
        x = self.a(x)
        x = x.reshape(x.shape[0], 2, 4, *x.shape[2:]).sum(1).repeat(1, 2, 1, 1)
        return self.c(self.b(x).relu()).mean((2, 3))


def test_what_a_class_cannot_follow_keeps_its_width():
    net = elastic(Stubborn(), SIZE, {"width": (0.5, 1)})
    assert [g.name for g in net.space.genes] == ["width.b"]
    x, small = images(net), net.space.min()
    torch.testing.assert_close(net(x, small), net.extract(small)(x), rtol=0, atol=1e-6)


def test_integers_without_a_simple_law_are_verified_for_every_child():
    net = elastic(vit(embed_dim=32, depth=1, mlp_ratio=2.0), (3, 16, 16), {"width": (0.5, 1)})
    with_laws = net.draft(net.space.min())
    net._children.clear()
    net._source._laws = None
    net.model.eval()
    x = images(net)
    assert torch.equal(net(x, net.space.min()), with_laws(x))


def test_images_are_resized_by_the_delivered_network_itself(tmp_path):
    net = elastic(own(), SIZE, {"resolution": (4, 8)})
    x = images(net)
    model = net.extract({"resolution": 4})
    small = torch.nn.functional.interpolate(x, size=(4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model(x), net.model.eval()(small))
    tt.save(model, tmp_path)
    assert torch.equal(tt.load(tmp_path, base=Own())(x), model(x))
    assert net.cost({"resolution": 4})["macs"] < net.cost({"resolution": 8})["macs"] / 3


def test_images_that_two_layers_read_cannot_be_resized():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)

        def forward(self, x):
            return (self.a(x) + self.b(x)).mean((2, 3))

    net = elastic(Two(), SIZE, {"resolution": (4, 8)})
    with pytest.raises(SurgeryError, match="a single layer that reads them, found a, b"):
        net.extract({"resolution": 4})


# -- builders


def test_builder_whose_child_has_a_layer_that_the_parent_lacks_is_refused_by_name():
    def shortcut(width):
        layers = [nn.Conv2d(1, width, 3)]
        if width != 16:
            layers.append(nn.Conv2d(width, 16, 1))
        return nn.Sequential(*layers)

    with pytest.raises(SurgeryError, match=r"1\.weight of .* does not exist in the largest network"):
        elastic(shortcut, SIZE, {"width": (8, 16)})


def test_builder_whose_child_is_larger_is_refused():
    with pytest.raises(SurgeryError, match="not inside the largest's"):
        elastic(lambda width: nn.Conv2d(1, 32 // width, 3), SIZE, {"width": (1, 2)})


def test_kernels_are_cut_from_the_centre():
    net = elastic(build, SIZE, GENES)
    small = net.extract({**net.space.max(), "kernel": 3})
    assert torch.equal(small.body[6].weight, net.model.body[6].weight[:, :, 1:4, 1:4])


def test_rules_choose_other_rows():
    def halves(width):
        return nn.Sequential(nn.Conv2d(1, 2 * width, 3))

    net = elastic(halves, SIZE, {"width": (2, 4)}, rules={"0.*": blocks(2)})
    small = net.extract({"width": 2})
    assert torch.equal(small[0].weight, net.model[0].weight[[0, 1, 4, 5]])


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b = nn.Linear(8, width), nn.Linear(8, width)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.a(x).square() + self.b(x)

    net = elastic(Tied, (1, 8, 8), {"width": (4, 8)})
    child = net.child({"width": 4}).copy(net.model)
    assert child.a.weight is child.b.weight
    x = images(net)
    torch.testing.assert_close(net(x, {"width": 4}), net.extract({"width": 4})(x), rtol=0, atol=1e-6)


def test_building_leaves_the_global_randomness_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = elastic(build, SIZE, GENES, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    b = elastic(build, SIZE, GENES, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))
