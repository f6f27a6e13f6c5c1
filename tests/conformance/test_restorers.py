"""What all restoration networks of ours do: the battery, with images in the place of logits."""

from __future__ import annotations

import pytest
import timm
import torch

import trimtab as tt
from trimtab import testing
from trimtab.models import list_models
from trimtab.nn.restorer import Restorer, restore_rgb

SAME = {"cfsr_x3", "cfsr_x4"}  # others of the list with another tail
OURS = [
    n
    for n in list_models(ours=True)
    if timm.model_entrypoint(n).__module__.startswith("trimtab.models.restore") and n not in SAME
]


@pytest.mark.parametrize("name", OURS)
def test_fast_checks(name):
    chans = timm.get_pretrained_cfg(name).input_size[0]
    testing.check_model(
        lambda: tt.create_model(name), input_size=(chans, 12, 12), slow=False, skip=("forward", "backward")
    )


@pytest.mark.parametrize("name", OURS)
def test_images_of_any_size_become_larger_and_the_loss_reaches_every_weight(name):
    net = tt.create_model(name, seed=0)
    assert isinstance(net, Restorer) and net.training
    for p in net.parameters():  # a gain that starts at nearly nothing would block the gradient for a good reason
        if not p.any() or p.abs().max() < 1e-5:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    x = torch.rand(2, net.in_chans, 9, 7, generator=torch.Generator().manual_seed(0))
    y = net(x)
    assert y.shape == (2, net.in_chans, 9 * net.scale, 7 * net.scale)
    (y - 0.5).abs().mean().backward()
    assert all(p.grad is not None and p.grad.any() and p.grad.isfinite().all() for p in net.parameters())
    with torch.no_grad():
        torch.testing.assert_close(net(x[:1]), y[:1])
        for one in (x[..., :1, :1], x[..., :5]):
            assert net(one).shape[2:] == (one.shape[2] * net.scale, one.shape[3] * net.scale)


@pytest.mark.parametrize("name", OURS)
def test_artifacts_are_loaded_by_name(name, tmp_path):
    net = tt.create_model(name, seed=0).eval()
    tt.save(net, tmp_path / "a")
    x = torch.rand(1, net.in_chans, 8, 8)
    with torch.no_grad():
        assert torch.equal(tt.load(tmp_path / "a")(x), net(x))
    assert tt.load(tmp_path / "a").scale == net.scale


@pytest.mark.parametrize("name", OURS)
def test_colour_pictures_go_through_luma_or_as_they_are(name):
    net = tt.create_model(name, seed=0).eval()
    gray = torch.full((1, 3, 10, 10), 0.5)
    out = restore_rgb(net, gray)
    assert out.shape == (1, 3, 10 * net.scale, 10 * net.scale) and 0 <= out.min() <= out.max() <= 1
    if net.in_chans == 1:  # only the luma is the network's: gray stays gray
        torch.testing.assert_close(out[:, :1].expand_as(out), out, rtol=0, atol=1e-5)
    else:
        with torch.no_grad():
            assert torch.equal(out, net(gray).clamp(0, 1))
