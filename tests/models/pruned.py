"""Pruning of a model of the catalogue, as the tests of several families ask for it."""

from __future__ import annotations

import torch

import trimtab as tt


def prune(net, shape, folder, params):
    """To 60 % of the MACs: in the budget, below `params` of the parameters, the same when loaded, and it trains on."""
    small = tt.compress.magnitude(net, shape, budget="macs<=60%")
    before, after = (tt.measure(n, shape, what=("macs", "params")) for n in (net, small))
    assert type(small) is type(net) and 0.4 * before.macs < after.macs <= 0.6 * before.macs
    assert after.params < params * before.params
    tt.save(small, folder)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tt.load(folder).eval()(x), small(x))
    small.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())
