"""Reversible sequences: exact gradients, one tensor kept, and what must not be inside."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from trimtab.core.saved import saved_bytes
from trimtab.models.dense.reversible_unet import MBConv
from trimtab.nn.reversible import ReversibleSequence


def chain(blocks: int = 3, width: int = 8, expansion: int = 2, *, seed: int = 0) -> ReversibleSequence:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        half = width // 2
        return ReversibleSequence(
            (MBConv(half, half, expansion, 3), MBConv(half, half, expansion, 3)) for _ in range(blocks)
        )


def twins(**arguments) -> tuple[ReversibleSequence, ReversibleSequence]:
    """The same weights, with and without reversing."""
    one = chain(**arguments)
    other = copy.deepcopy(one)
    other.reversible = False
    return one, other


def volume(channels: int = 8, side: int = 4, **options) -> torch.Tensor:
    return torch.randn(2, channels, side, side, side, generator=torch.Generator().manual_seed(1)).to(**options)


def gradients(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(net(x).float().sin().mul(100).sum(), [x, *net.parameters()]))


def test_gradients_are_those_of_ordinary_backpropagation():
    one, other = (net.double() for net in twins())
    x = volume(dtype=torch.double)
    assert torch.equal(one(x), other(x))
    for got, want in zip(gradients(one, x), gradients(other, x), strict=True):
        assert (got - want).abs().max() < 1e-12 * max(1.0, want.abs().max())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.double, 1e-12), (torch.float32, 1e-4)])
def test_the_input_comes_back_after_eight_blocks(dtype, limit):
    net, x = chain(8, 32, 4).to(dtype), volume(32, dtype=dtype)
    assert (net.inverse(net(x)) - x).abs().max() < limit


@pytest.mark.parametrize("expansion", [2, 4, 6])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_stage_keeps_its_output_and_its_twin_grows_with_every_block(blocks, expansion):
    """In units of the stage's input; the statistics of group norms are the rest."""
    one, other = twins(blocks=blocks, width=32, expansion=expansion)
    x = torch.zeros(1, 32, 8, 8, 8, device="meta")
    unit = x.numel() * 4
    assert saved_bytes(one.to("meta"), x) == unit
    assert saved_bytes(other.to("meta"), x) / unit == pytest.approx(blocks * (6 * expansion + 2) + 0.5, rel=0.002)


def test_hooks_see_a_gradient_once():
    one, other = twins()
    for net in (one, other):
        net.seen = []
        for p in net.parameters():
            p.register_hook(lambda g, net=net: net.seen.append(1) or 3 * g)
        net(volume()).square().sum().backward()
    assert len(one.seen) == len(other.seen) == len(list(one.parameters()))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)


def test_frozen_parameters_stay_frozen_and_a_graph_can_be_kept():
    one, _ = twins()
    one.blocks[1].f.requires_grad_(False)
    loss = one(volume()).square().sum()
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None}
    assert not any(n.startswith("blocks.1.f.") for n in first)
    loss.backward()
    assert all(torch.allclose(p.grad, 2 * first[n]) for n, p in one.named_parameters() if n in first)


def test_one_module_in_two_places_gets_the_sum_of_both_gradients():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shared, rest = nn.Linear(4, 4), [nn.Linear(4, 4) for _ in range(2)]
    one = ReversibleSequence([(shared, rest[0]), (shared, rest[1])]).double()
    other = copy.deepcopy(one)
    other.reversible = False
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()
    for got, want in zip(gradients(one, x), gradients(other, x), strict=True):
        torch.testing.assert_close(got, want)


def test_autocast_recomputes_in_the_precision_of_the_forward_pass():
    one, other = twins()
    found = []
    for net in (one, other):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(volume()).square().sum()
            _ = net(volume().detach())  # weights that autocast has met before
        loss.backward()
        found.append([p.grad for p in net.parameters()])
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() < 0.02 * want.norm() + 1e-6


def test_a_backward_pass_inside_autocast_still_reaches_the_weights():
    one, _ = twins()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        one(volume())
    with torch.autocast("cpu", torch.bfloat16):
        one(volume()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in one.parameters())


def test_sums_of_half_precision_networks_are_made_in_float32():
    """What a sum in bfloat16 loses, up to 1 in 256, no subtraction brings back."""
    net = chain(8, 32, 4).bfloat16()
    x = volume(32).bfloat16()
    stream = net._run(x.float(), torch.bfloat16)
    halves = stream.chunk(2, 1)
    for block in reversed(net.blocks):
        halves = block.inverse(*halves, torch.bfloat16)
    assert stream.dtype is torch.float32 and net(x).dtype is torch.bfloat16
    assert (torch.cat(halves, 1) - x.float()).abs().max() < 1e-5


@pytest.mark.parametrize(
    "what", [nn.BatchNorm3d(4), nn.Dropout(0.1), DropPath(0.1), nn.InstanceNorm3d(4, track_running_stats=True)]
)
def test_what_does_something_else_the_second_time_is_refused(what):
    with pytest.raises(ValueError, match=f"g.0 .{type(what).__name__}. does not"):
        ReversibleSequence([(nn.Conv3d(4, 4, 1), nn.Sequential(what))])


def test_odd_channels_are_refused():
    with pytest.raises(ValueError, match=r"two halves, got shape \(2, 5, 4, 4, 4\)"):
        chain(width=8)(volume(5))


def test_an_output_that_was_overwritten_is_noticed():
    one, _ = twins()
    y = one(volume())
    y.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives_are_refused():
    one, _ = twins()
    x = volume().requires_grad_()
    (g,) = torch.autograd.grad(one(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
