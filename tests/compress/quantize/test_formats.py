"""Every format rounds exactly, and every code comes back as the value it stands for."""

from __future__ import annotations

import itertools

import pytest
import torch

from trimtab.compress.quantize.formats import Format, _step, _step_exported

FLOATS = [f"e{e}m{m}" for e, m in itertools.product(range(1, 6), range(7)) if e + m <= 7]
INTS = [f"int{b}" for b in range(2, 9)]


def six_decades(n: int = 100_000) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=g) * 10 ** (6 * torch.rand(n, generator=g) - 3)


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bit_floats_are_torchs(name, dtype):
    form = Format(name)
    x = six_decades()
    assert torch.equal(form.round(x), x.clamp(-form.largest, form.largest).to(dtype).float())


@pytest.mark.parametrize("name", [n for n in FLOATS if not n.endswith("m0")])
def test_rounding_is_to_the_nearest_level_with_ties_to_the_even_code(name):
    form = Format(name)
    levels = form.levels()
    positive = levels[: len(levels) // 2]
    positive = positive[: int(positive.argmax()) + 1]
    x = torch.cat([six_decades(2000) * form.largest / 100, (positive[1:] + positive[:-1]) / 2, positive])
    got = form.round(x)
    size = x.abs().clamp(max=form.largest).double()
    distance = (size[:, None] - positive.double()).abs()
    code = torch.arange(len(positive))
    nearest = distance == distance.amin(1, keepdim=True)
    best = torch.where(nearest & ((code % 2 == 0) | (nearest.sum(1, keepdim=True) == 1)), code, -1).amax(1)
    assert torch.equal(got.abs(), positive[best])


def test_grids():
    assert Format("e2m1").levels()[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert [Format(n).largest for n in ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")] == [6, 7.5, 28, 448, 57344]
    assert Format("int2").round(torch.tensor([-3.0, -1.2, -0.4, 0.6, 5.0])).tolist() == [-2, -1, 0, 1, 1]


@pytest.mark.parametrize("name", INTS)
def test_integers_are_the_formula(name):
    n = 2 ** (Format(name).bits - 1) - 1
    x = six_decades(5000)
    assert Format(name).largest == n and torch.equal(Format(name).round(x), x.round().clamp(-n - 1, n))


@pytest.mark.parametrize("name", [*FLOATS, *INTS])
def test_codes_fit_their_bits_and_come_back(name):
    form = Format(name)
    values = form.round(six_decades(5000) * form.largest / 30)
    codes = form.encode(values)
    assert codes.min() >= 0 and codes.max() < 2**form.bits == len(form.levels())
    assert torch.equal(form.levels()[codes], values)


@pytest.mark.parametrize("name", FLOATS)
def test_the_exported_form_takes_the_same_steps(name):
    e, m = int(name[1]), int(name[3])
    powers = 2.0 ** torch.arange(-20, 16)
    x = torch.cat([six_decades(), powers, powers * (1 - 2**-23), torch.zeros(1)]).abs().clamp(max=Format(name).largest)
    assert torch.equal(_step(x, e, m), _step_exported(x, e, m))


@pytest.mark.parametrize(
    ("winner", "loser", "tails"),
    [("e2m1", "int4", 3), ("e4m3", "int8", 3), ("e2m1", "int4", None), ("int8", "e4m3", None), ("int6", "e3m2", None),
     ("e2m3", "int6", None)],
)  # fmt: skip
def test_which_format_has_the_smaller_error(winner, loser, tails):
    torch.manual_seed(0)
    x = torch.randn(200_000) if tails is None else torch.distributions.StudentT(float(tails)).sample((200_000,))
    error = {}
    for name in (winner, loser):
        s = x.abs().max() / Format(name).largest
        error[name] = (Format(name).round(x / s) * s - x).square().mean()
    assert error[winner] < error[loser]


@pytest.mark.parametrize("name", ["int1", "int9", "e4m4", "e0m3", "fp8", "e6m1"])
def test_what_is_no_format_is_refused(name):
    with pytest.raises(ValueError, match="a format must be int2 to int8, or a float such as e2m1"):
        Format(name)
