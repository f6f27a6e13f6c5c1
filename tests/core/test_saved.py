"""Bytes kept for the backward pass."""

from __future__ import annotations

import torch
from torch import nn

from trimtab.core.saved import saved_bytes


class Twice(nn.Module):
    """Squares two views of one activation: one memory."""

    def forward(self, x):
        y = x.exp()
        return y[:, :4].square() + y[:, 4:].square()


def test_memory_is_counted_once_and_by_storage():
    x = torch.zeros(2, 8, requires_grad=True)
    assert saved_bytes(Twice(), x) == 2 * 8 * 4


def test_parameters_and_buffers_are_not_counted_and_gradients_are_not_needed_from_the_caller():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        assert saved_bytes(net, torch.zeros(1, 3, 8, 8)) == (3 + 4) * 64 * 4
    assert all(p.grad is None for p in net.parameters())


def test_the_meta_device_gives_the_same_number():
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))
    real = saved_bytes(net, torch.zeros(5, 8))
    assert saved_bytes(net.to("meta"), torch.zeros(5, 8, device="meta")) == real


def test_a_model_that_keeps_nothing_and_one_that_keeps_the_mask_of_dropout():
    assert saved_bytes(nn.Identity(), torch.zeros(3)) == 0
    net = nn.Dropout(0.5)
    x = torch.ones(4, 8, requires_grad=True)
    assert saved_bytes(net.train(), x) > 0 == saved_bytes(net.eval(), x)
