"""A child computes, costs and learns exactly what the network that is taken out of the supernet does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import trimtab as tt
from tests.search.nets import GENES, SIZE, VIT, WORDS, build, images, own, vit
from trimtab.models.classify.resnet_cifar import ResNetCifar
from trimtab.search import elastic
from trimtab.search.children import cut


def sources():
    return {
        "own": lambda: elastic(own(), SIZE, WORDS),
        "builder": lambda: elastic(build, SIZE, {**GENES, "resolution": (4, 6, 8)}),
        "vit": lambda: elastic(vit, (3, 16, 16), VIT),
        "padded shortcut": lambda: elastic(
            ResNetCifar(depths=(1, 1, 1), num_classes=5), (3, 16, 16), {"width": (0.3, 0.6, 1)}
        ),
        "resolutions": lambda: elastic(own(), SIZE, {"width": (0.5, 1), "resolution": (4, 8)}),
        "attention": lambda: elastic(
            vit(embed_dim=32, depth=2, mlp_ratio=2.0), (3, 16, 16), {"width": (0.5, 1), "depth": "blocks"}
        ),
    }


@pytest.fixture(scope="module", params=sources())
def net(request):
    net = sources()[request.param]()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for p in net.model.parameters():
            p.add_(0.05 * torch.randn_like(p))  # nothing hides behind a zero
        net.model.train()(torch.randn(16, *net._size))
    return net


def archs(net, n, seed=0):
    rng = np.random.default_rng(seed)
    return [net.space.min(), net.space.max(), *(net.space.sample(rng) for _ in range(n))]


@torch.no_grad()
def test_child_computes_what_the_extracted_network_does(net):
    net.model.eval()
    x = images(net)
    for arch in archs(net, 3):
        model = net.extract(arch)
        torch.testing.assert_close(net(x, arch), model(x), rtol=0, atol=1e-6)
        torch.testing.assert_close(net.draft(arch)(x), model(x), rtol=0, atol=1e-6)


def test_cost_in_closed_form_is_what_is_measured(net):
    for arch in archs(net, 20, seed=1):
        cost = tt.measure(net.draft(arch), net._size, what=("params", "macs"))
        assert net.cost(arch) == {"params": cost.params, "macs": cost.macs}


def test_gradients_land_in_the_slices_of_the_parent_and_nowhere_else(net):
    arch = archs(net, 1, seed=2)[-1]
    model = net.extract(arch)
    x = images(net)
    net.model.zero_grad()
    net.model.eval()
    net(x, arch).square().sum().backward()
    model.eval()(x).square().sum().backward()
    cuts = net.child(arch).cuts
    own = {name.replace(".base.", "."): p for name, p in model.named_parameters()}  # "base" where a resize came before
    for name, p in net.model.named_parameters():
        if name not in own:
            assert p.grad is None, name
            continue
        torch.testing.assert_close(cut(p.grad, cuts[name]), own[name].grad, rtol=1e-4, atol=1e-5)
        used = torch.ones_like(p).requires_grad_()
        cut(used, cuts[name]).sum().backward()
        assert not (p.grad * (1 - used.grad)).any(), name


def test_training_a_child_leaves_the_statistics_of_the_parent_alone(net):
    net.model.train()
    before = {n: b.clone() for n, b in net.model.named_buffers()}
    for arch in archs(net, 2, seed=3):
        net(images(net, 8), arch)
    assert all(torch.equal(b, before[n]) for n, b in net.model.named_buffers())
    net(images(net, 8), net.space.max(), regularise=True)
    norms = any(isinstance(m, nn.BatchNorm2d) for m in net.model.modules())
    assert norms == any(not torch.equal(b, before[n]) for n, b in net.model.named_buffers())


def test_extraction_leaves_the_parent_alone(net):
    before = {n: t.clone() for n, t in net.model.state_dict().items()}
    model = net.extract(net.space.min())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert all(torch.equal(t, before[n]) for n, t in net.model.state_dict().items())


def test_the_same_network_asked_for_twice_is_made_once(net):
    assert net.child(net.space.min()) is net.child(net.space.min())
