"""The scan: three ways that are one function, its gradient, its cost, and the orders of pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.nn.scan import (
    SCANS,
    count_scans,
    linear_scan,
    merge,
    orders,
    scan_by,
    selective_scan,
    step_by_step,
    unroll,
)  # fmt: skip
from trimtab.nn.ssm import S6, SS2D


def parts(batch=2, groups=2, length=131, width=5, state=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x, dt = torch.randn(2, batch, groups, length, width, generator=g)
    b, c = torch.randn(2, batch, groups, length, state, generator=g)
    a = -torch.rand(groups, state, width, generator=g) * 5 - 0.1
    return [v.to(dtype) for v in (x, dt.abs() * 0.2, a, b, c)]


def off(got, want):
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-9)).item()


@pytest.mark.parametrize("way", ["kernel", "chunks", "steps"])
@pytest.mark.parametrize("length", [1, 8, 9, 64, 65, 131])
def test_every_way_equals_the_float64_reference_with_its_gradients(way, length):
    given = [v.requires_grad_() for v in parts(length=length)]
    exact = [v.detach().double().requires_grad_() for v in given]
    want = step_by_step(*exact)
    with scan_by(way):
        got = selective_scan(*given)
    assert off(got, want) < 1e-6
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    options = {"allow_unused": True, "materialize_grads": True}  # one step uses no decay
    for p, q in zip(torch.autograd.grad((got * weight).sum(), given, **options),
                    torch.autograd.grad((want * weight).sum(), exact, **options)):  # fmt: skip
        assert off(p, q) < 5e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 5e-15)])
def test_the_two_level_scan_equals_the_loop(dtype, tolerance):
    x, dt, a, b, c = parts(length=1024, dtype=dtype)
    with scan_by("chunks"):
        assert off(selective_scan(x, dt, a, b, c), step_by_step(x, dt, a, b, c)) < tolerance


@torch.no_grad()
def test_pairs_of_real_numbers_are_complex_numbers():
    a = torch.randn(2, 75, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.5
    b = torch.randn(2, 75, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ac, bc, h, want = torch.view_as_complex(a), torch.view_as_complex(b), 0, []
    for t in range(75):
        h = ac[:, t] * h + bc[:, t]
        want.append(h)
    assert off(torch.view_as_complex(linear_scan(a, b, complex_pairs=True)), torch.stack(want, 1)) < 1e-13


def test_strong_decay_underflows_to_nothing_and_makes_no_nan():
    x, dt, a, b, c = (v.requires_grad_() for v in parts())
    for way in ("kernel", "chunks"):
        with scan_by(way):
            y = selective_scan(x, dt * 1e4, a, b, c)
        assert torch.isfinite(y).all()
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), (x, dt, a, b, c)))


def test_the_work_is_linear_and_the_operators_are_few():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func._overloadpacket in (torch.ops.aten.mul, torch.ops.aten.add):
                self.work, self.calls = self.work + out.numel(), self.calls + 1
            return out

    work, calls = {}, {}
    for length in (512, 4096, 32768):
        mode = Count()
        mode.work = mode.calls = 0
        with mode:
            linear_scan(torch.ones(1, length), torch.ones(1, length))
        work[length], calls[length] = mode.work / length, mode.calls
    assert max(work.values()) / min(work.values()) < 1.1
    assert calls[4096] - calls[512] == calls[32768] - calls[4096] < 30


def test_the_state_is_float32_for_half_precision():
    given = parts(length=64)
    low = [v.bfloat16() for v in given]
    y = selective_scan(*low)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, selective_scan(*(v.float() for v in low)).bfloat16())


@pytest.mark.parametrize("scan", SCANS)
@torch.no_grad()
def test_merging_what_was_unrolled_gives_the_image_times_its_visits(scan):
    x = torch.randn(2, 6 * 10, 3)
    paths = orders(scan, 6, 10)
    visits = paths.size // 60
    assert all((np.bincount(paths.ravel()) == visits).tolist())
    assert visits == {"unidi": 1, "bidi": 2, "local": 2, "spiral": 2, "es2d": 1}.get(scan, 4)
    assert torch.equal(unroll(x, scan, 6, 10), x[:, torch.from_numpy(paths.copy())])
    torch.testing.assert_close(merge(unroll(x, scan, 6, 10), scan, 6, 10), visits * x)
    for path in paths if scan != "es2d" else ():
        inverse = np.argsort(path)
        assert (path[inverse] == np.arange(60)).all() and (inverse[path] == np.arange(60)).all()


def test_orders_are_those_of_the_papers():
    assert orders("cross2d", 2, 3).tolist() == [
        [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]  # fmt: skip
    assert orders("zigzag", 3, 2)[0].tolist() == [0, 1, 3, 2, 4, 5]
    assert orders("local", 2, 4, 2)[0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert orders("spiral", 3, 3)[0].tolist() == [0, 1, 2, 5, 8, 7, 6, 3, 4]
    assert orders("es2d", 2, 4).tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert orders("diagonal", 2, 2)[0].tolist() == [0, 1, 2, 3]
    steps = np.abs(np.diff(orders("zigzag", 5, 4)[:2], axis=1))
    assert set(steps.ravel().tolist()) <= {1, 4}  # neighbours stay neighbours


@pytest.mark.parametrize(("scan", "everything"), [("unidi", False), ("bidi", True), ("cross2d", True)])
def test_one_way_sees_the_past_only_and_cross2d_everything(scan, everything):
    torch.manual_seed(0)
    layer = SS2D(8, state=4, scan=scan)
    layer.conv.weight.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0  # no mixing but the scan's
    x = torch.randn(1, 5, 5, 8, requires_grad=True)
    reach = torch.autograd.grad(layer(x)[0, 2, 2].sum(), x)[0].abs().sum(-1).flatten() > 0
    assert reach.tolist() == [everything or i <= 12 for i in range(25)]


def test_the_mamba_mixer_is_causal():
    torch.manual_seed(0)
    x = torch.randn(1, 9, 8, requires_grad=True)
    reach = torch.autograd.grad(S6(8)(x)[0, 4].sum(), x)[0].abs().sum(-1)[0] > 0
    assert reach.tolist() == [t <= 4 for t in range(9)]


def test_fixed_step_input_and_output_make_it_a_convolution():
    x, dt, a, b, c = parts(length=40, dtype=torch.float64)
    dt, b, c = (v[:1, :, :1].expand(x.shape[0], -1, 40, -1) for v in (dt, b, c))
    steps = torch.arange(40)[:, None, None]
    for g in range(x.shape[1]):
        decay = torch.exp(steps * (dt[0, g, 0] * a[g]))  # (L, N, E)
        kernel = (c[0, g, 0][:, None] * b[0, g, 0][:, None] * decay).sum(1) * dt[0, g, 0]  # (L, E)
        want = torch.stack([(kernel[: t + 1].flip(0) * x[:, g, : t + 1]).sum(1) for t in range(40)], 1)
        assert off(selective_scan(x, dt, a, b, c)[:, g], want) < 1e-13


def test_what_scans_do_is_counted():
    with count_scans() as counted:
        SS2D(16, expand=2, state=3, scan="cross2d")(torch.zeros(2, 4, 4, 16))
    assert counted == [4 * 16 * 32 * 3]


def test_wrong_arguments_say_what_was_expected():
    x, dt, a, b, c = parts()
    for message, call in {
        r"a must be \(G, N, E\) = \(2, 3, 5\)": lambda: selective_scan(x, dt, a.mT, b, c),
        r"x and dt must be \(B, G, L, E\)": lambda: selective_scan(x, dt[:1], a, b, c),
        "a and b must have one shape": lambda: linear_scan(x, b),
        "chunk must be at least 2, got 1": lambda: linear_scan(x, x, chunk=1),
        "scan must be one of unidi, .*, got 'hilbert'": lambda: orders("hilbert", 4, 4),
        "es2d needs even sizes, got 3 x 4": lambda: orders("es2d", 3, 4),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="way must be one of auto"), scan_by("loop"):
        pass
