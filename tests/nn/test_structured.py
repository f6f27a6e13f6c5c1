"""Structured linear layers: counts, exactness and errors as linear algebra says them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from tensorly.decomposition import tensor_train
from torch import Tensor, nn

from trimtab.core.cost import measure
from trimtab.nn.structured import (
    StructuredLinear,
    apply_cores,
    balanced_sites,
    bond_ranks,
    contraction_macs,
    core_params,
    decompose,
    spectra,
    sweep_macs,
)

SHAPES = [(64, 96, 2), (64, 96, 3), (37, 41, 2), (37, 41, 3), (30, 50, "lowrank"), (48, 48, 4)]


def matrix(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)


def truncated(weight: Tensor, sites: int | str, ranks: int, **kwargs) -> StructuredLinear:
    out_sites, in_sites = balanced_sites(*weight.shape, sites)
    return StructuredLinear.from_dense(weight, out_sites=out_sites, in_sites=in_sites, ranks=ranks, **kwargs)


def error(weight: Tensor, sites: int | str, ranks: int) -> float:
    return float((truncated(weight, sites, ranks).to_dense() - weight).detach().norm())


# -- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chi", [1, 5, 20, 36])
def test_three_sites_of_6x6_have_2_36_chi_plus_36_chi_squared_weights(chi):
    layer = StructuredLinear(216, 216, out_sites=(6, 6, 6), in_sites=(6, 6, 6), ranks=chi, bias=False)
    assert layer.params() == 2 * 36 * chi + 36 * chi**2


def test_ranks_beyond_the_bond_are_capped():
    layer = StructuredLinear(216, 216, out_sites=(6, 6, 6), in_sites=(6, 6, 6), ranks=1000, bias=False)
    assert layer.ranks == (36, 36) and layer.params() == 49_248 > 216**2 == 46_656


def test_weights_of_a_4096_matrix_in_two_sites():
    sites = (64, 64)
    assert balanced_sites(4096, 4096) == (sites, sites)
    assert bond_ranks(sites, sites, 10**6) == (4096,)  # exact there
    assert all(core_params(sites, sites, (chi,)) == 8192 * chi for chi in (1, 614, 2048))
    assert core_params(sites, sites, (2048,)) == 4096**2  # break-even
    assert core_params(sites, sites, (614,)) / 4096**2 == pytest.approx(0.3, abs=0.001)


def test_macs_of_a_4096_matrix_break_even_at_chi_32():
    sites = (64, 64)
    assert sweep_macs(sites, sites, (7,)) == (524_288 * 7, 524_288 * 7)
    assert min(sweep_macs(sites, sites, (32,))) == 4096**2
    assert min(sweep_macs(sites, sites, (614,))) / 4096**2 == pytest.approx(19.2, abs=0.05)


@pytest.mark.parametrize(("o1", "o2", "i1", "i2", "chi"), [(8, 4, 3, 10, 5), (2, 9, 7, 2, 3)])
def test_two_sites_cost_the_smaller_of_two_formulas(o1, o2, i1, i2, chi):
    both = (chi * o1 * i2 * (i1 + o2), chi * i1 * o2 * (i2 + o1))
    assert sweep_macs((o1, o2), (i1, i2), (chi,)) == both


def test_one_trivial_factor_is_the_plain_svd():
    out_sites, in_sites = balanced_sites(40, 24, "lowrank")
    for chi in (1, 7, 15):
        assert (
            core_params(out_sites, in_sites, (chi,)) == chi * (40 + 24) == min(sweep_macs(out_sites, in_sites, (chi,)))
        )
    w = matrix(40, 24)
    tail = torch.linalg.svdvals(w)[7:].norm()
    assert error(w, "lowrank", 7) == pytest.approx(float(tail), rel=1e-9)


@pytest.mark.parametrize(("out_features", "in_features", "sites"), SHAPES)
@pytest.mark.parametrize("mode", ["factored", "dense", "auto"])
def test_macs_are_those_that_measure_counts(out_features, in_features, sites, mode):
    layer = truncated(matrix(out_features, in_features).float(), sites, 4, mode=mode)
    for tokens in (1, 9, 300):
        assert measure(layer, (tokens, in_features), what="macs").macs == layer.macs(tokens)
    assert measure(layer, (1, in_features), what="params").params == layer.params()


def test_auto_builds_the_weight_once_there_are_many_tokens():
    layer = truncated(matrix(64, 64), 2, 12)
    assert layer.macs(1) == min(sweep_macs((8, 8), (8, 8), (12,)))
    assert layer.macs(1000) == 1000 * 64**2 + contraction_macs((8, 8), (8, 8), (12,))
    assert layer.macs(1000) < layer.macs(1000, "factored")


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out_features", "in_features", "sites"), SHAPES)
def test_full_rank_reproduces_the_weight(out_features, in_features, sites):
    w = matrix(out_features, in_features).float()
    assert error(w, sites, 10**6) <= 1e-5 * w.norm()


@pytest.mark.parametrize(("out_features", "in_features", "sites"), SHAPES)
@pytest.mark.parametrize("ranks", [1, 6])
def test_the_factored_product_equals_the_dense_one(out_features, in_features, sites, ranks):
    w = matrix(out_features, in_features)
    layer = truncated(w, sites, ranks, bias=torch.arange(out_features, dtype=torch.float64))
    x = torch.randn(3, 5, in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = []
    for mode in ("factored", "dense"):
        layer.mode = mode
        layer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        grads.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(grads[0][0], nn.functional.linear(x, layer.weight, layer.bias).detach())


@pytest.mark.parametrize(("out_features", "in_features", "sites"), SHAPES)
def test_the_error_never_grows_with_chi(out_features, in_features, sites):
    w = matrix(out_features, in_features)
    errors = [error(w, sites, chi) for chi in (1, 2, 4, 8, 16, 32)]
    assert all(a >= b - 1e-9 for a, b in pairwise(errors))


def test_two_sites_lose_exactly_the_tail_of_the_singular_values():
    w = matrix(48, 64)
    (values,) = spectra(w, *balanced_sites(48, 64))
    for chi in (1, 5, 20):
        assert error(w, 2, chi) == pytest.approx(float(values[chi:].norm()), rel=1e-9)


@pytest.mark.parametrize("sites", [3, 4])
def test_more_sites_lose_at_most_the_root_of_all_tails(sites):
    w = matrix(48, 64)
    tails = sum(float(s[5:].square().sum()) for s in spectra(w, *balanced_sites(48, 64, sites)))
    assert 0 < error(w, sites, 5) <= math.sqrt(tails) + 1e-9


def test_padding_costs_no_accuracy_beyond_the_discarded_spectrum():
    w = matrix(37, 41)
    (values,) = spectra(w, *balanced_sites(37, 41))
    assert math.prod(balanced_sites(37, 41)[0]) > 37
    assert error(w, 2, 6) <= float(values[6:].norm()) + 1e-9
    whole = matrix(36, 40)  # without padding the two are equal
    (values,) = spectra(whole, (6, 6), (5, 8))
    layer = StructuredLinear.from_dense(whole, out_sites=(6, 6), in_sites=(5, 8), ranks=6)
    assert float((layer.weight - whole).detach().norm()) == pytest.approx(float(values[6:].norm()), rel=1e-9)


def test_chi_1_is_the_best_kronecker_product():
    """Van Loan and Pitsianis: the SVD of the matrix whose rows are the blocks."""
    w = matrix(12, 20)
    blocks = torch.stack([w[3 * a : 3 * a + 3, 5 * b : 5 * b + 5].flatten() for a in range(4) for b in range(4)])
    u, s, vh = torch.linalg.svd(blocks)
    best = torch.kron(u[:, 0].view(4, 4), s[0] * vh[0].view(3, 5))
    layer = StructuredLinear.from_dense(w, out_sites=(4, 3), in_sites=(4, 5), ranks=1)
    torch.testing.assert_close(layer.weight.detach(), best)


@pytest.mark.parametrize("r", [1, 3])
def test_a_sum_of_r_kronecker_products_is_exact_at_chi_r(r):
    """Fails for a plain reshape without interleaving: its rank is not r."""
    w = sum(torch.kron(matrix(4, 6, k), matrix(5, 3, k + 9)) for k in range(r))
    layer = StructuredLinear.from_dense(w, out_sites=(4, 5), in_sites=(6, 3), ranks=r)
    torch.testing.assert_close(layer.weight.detach(), w)


def test_a_hypercomplex_product_is_two_sites_with_bond_n():
    """y = x H with H = sum of A_i kron B_i (row vectors, as in Compacter)."""
    n, d_in, d_out = 4, 24, 12
    a, b = [matrix(n, n, k) for k in range(n)], [matrix(d_in // n, d_out // n, k + 9) for k in range(n)]
    h = sum(torch.kron(x, y) for x, y in zip(a, b))
    cores = [torch.stack([m.T for m in a], -1)[None], torch.stack([m.T for m in b])[..., None]]
    x = matrix(5, d_in, 3)
    torch.testing.assert_close(apply_cores(x, cores, d_out), x @ h)


@pytest.mark.parametrize("chi", [2, 9])
def test_three_sites_truncate_as_well_as_tensorly(chi):
    w = matrix(24, 48)
    out_sites, in_sites = balanced_sites(24, 48, 3)
    t = w.reshape(*out_sites, *in_sites).permute(0, 3, 1, 4, 2, 5)
    t = t.reshape([o * i for o, i in zip(out_sites, in_sites)])
    theirs = tensor_train(t.numpy(), rank=[1, *bond_ranks(out_sites, in_sites, chi), 1]).to_tensor()
    assert error(w, 3, chi) == pytest.approx(float((t - torch.from_numpy(theirs)).norm()), rel=1e-6)


def test_a_gaussian_matrix_gains_nothing():
    """The negative control: without structure, 30 % of the weights hold little of the norm."""
    w = matrix(64, 64)
    assert error(w, 2, 9) / w.norm() > 0.7


def test_a_zero_weight_gives_zeros_and_not_nan():
    layer = truncated(torch.zeros(16, 16), 2, 3)
    assert not layer(torch.ones(2, 16)).any()


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [2, 3])
def test_random_cores_start_with_the_variance_of_a_linear_layer(sites):
    torch.manual_seed(0)
    out_sites, in_sites = balanced_sites(256, 256, sites)
    w = StructuredLinear(256, 256, out_sites=out_sites, in_sites=in_sites, ranks=16).weight
    assert float(w.var().detach()) == pytest.approx(1 / (3 * 256), rel=0.3)


@pytest.mark.parametrize("sites", [2, 3])
def test_singular_values_are_shared_by_the_cores_they_join(sites):
    w = matrix(64, 64)
    cores = decompose(w, *balanced_sites(64, 64, sites), bond_ranks(*balanced_sites(64, 64, sites), 6))
    first, last = cores[0].flatten(0, 2), cores[-1].flatten(1)
    if sites == 2:
        torch.testing.assert_close(first.norm(dim=0), last.norm(dim=1))
    assert max(c.norm() for c in cores) / min(c.norm() for c in cores) < 20


def test_half_precision_stays():
    layer = truncated(matrix(32, 32).to(torch.bfloat16), 2, 8)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.ones(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_building_from_a_weight_leaves_the_random_state():
    before = torch.random.get_rng_state()
    truncated(matrix(32, 32), 2, 8)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"out_sites": (2, 2)}, "out_sites must be positive and multiply to at least 16"),
        ({"in_sites": (16,)}, "equally many, 2 or more"),
        ({"ranks": 0}, "ranks must be 1 positive integers"),
        ({"ranks": (3, 3)}, "ranks must be 1 positive integers"),
        ({"mode": "fast"}, "mode must be one of auto, factored, dense, got 'fast'"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        StructuredLinear(16, 16, **{"out_sites": (4, 4), "in_sites": (4, 4), "ranks": 2, **kwargs})


@pytest.mark.parametrize("sites", [1, True, "svd"])
def test_wrong_sites_are_refused(sites):
    with pytest.raises(ValueError, match="sites must be 'lowrank' or an integer of at least 2"):
        balanced_sites(16, 16, sites)
