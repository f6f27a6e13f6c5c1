"""MLC: the identities of coding rates, sums of memberships, and clusters that k-means does not see."""

from __future__ import annotations

import math

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from tests.learn.adapt.nets import cnn
from trimtab.learn.adapt import cluster_metrics, methods, mlc
from trimtab.learn.adapt.mlc import (
    MLCHead,
    RateReduction,
    cluster_rate,
    coding_rate,
    doubly_stochastic,
    feature_data,
    head_codes,
    rivals,
    similarity,
    sinkhorn,
    spectral_labels,
)
from trimtab.learn.objective import Batch, Context
from trimtab.testing import check_objective

SMALL = {"dim": 12, "hidden": 32, "layers": 1, "batch_size": 128, "progress": False}


def directions(n: int, d: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def subspaces(noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four orthogonal subspaces of three dimensions in twelve, 25 directions in each."""
    z = torch.block_diag(*(directions(25, 3, seed + k) for k in range(4)))
    return z + noise * directions(100, 12, seed), torch.arange(4).repeat_interleave(25)


def spheres(n: int = 100, noise: float = 0.05, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four spheres around the origin of 24 dimensions, each in three directions of its own, bent."""
    g = torch.Generator().manual_seed(seed)
    points = F.normalize(torch.randn(4, n, 3, generator=g), dim=2)
    span = torch.linalg.qr(torch.randn(4, 24, 3, generator=g))[0]
    x = torch.einsum("knr,kdr->knd", points, span).flatten(0, 1)
    x = x + 0.15 * (3 * x @ (torch.randn(24, 24, generator=g) / 24**0.5)).tanh()
    return x + noise * torch.randn(x.shape, generator=g), torch.arange(4).repeat_interleave(n)


# -- rates -----------------------------------------------------------------------------------------------------------


def test_a_uniform_membership_reduces_nothing():
    z = directions(40, 12)
    torch.testing.assert_close(cluster_rate(z, torch.full((40, 40), 1 / 40).double()), coding_rate(z))


def test_each_sample_by_itself_costs_half_a_logarithm():
    z = directions(50, 16)
    rate = float(cluster_rate(z, torch.eye(50).double(), eps2=0.1))
    assert rate == pytest.approx(0.5 * math.log(1 + 16 / 0.1), abs=1e-9) == pytest.approx(2.54070, abs=1e-5)


def test_blocks_are_the_hard_clusters_of_mcr2():
    z, labels = subspaces()
    members = F.one_hot(labels).double()
    blocks = members @ members.T / 25
    hard = sum(25 / 200 * torch.logdet(torch.eye(12) + 12 / (25 * 0.1) * part.T @ part) for part in z.view(4, 25, 12))
    torch.testing.assert_close(cluster_rate(z, blocks), hard)
    torch.testing.assert_close(cluster_rate(z, members), hard)
    whole, apart, alone = coding_rate(z), cluster_rate(z, blocks), cluster_rate(z, torch.eye(100).double())
    assert 14.1 < whole < 14.3 and 5.48 < apart < 5.56 and whole - apart == pytest.approx(8.67, abs=0.1)
    assert whole - alone == pytest.approx(11.787, abs=0.1)  # more than the truth gives: why Gamma is held back


def test_rates_and_their_gradients_are_those_of_the_formula():
    def formula(z: Tensor, gamma: Tensor) -> Tensor:
        total = torch.zeros((), dtype=z.dtype)
        for g in gamma.T:
            mass = g.sum()
            total = total + mass / 20 * torch.logdet(torch.eye(4).double() + 4 / (mass * 0.2) * z.T @ g.diag() @ z)
        return total - torch.logdet(torch.eye(4).double() + 4 / (10 * 0.2) * z.T @ z) / 2

    z, gamma = directions(10, 4).requires_grad_(), sinkhorn(similarity(directions(10, 4, seed=1))).requires_grad_()
    got = cluster_rate(z, gamma, eps2=0.2) - coding_rate(z, eps2=0.2)
    torch.testing.assert_close(got, formula(z, gamma))
    for a, b in zip(*(torch.autograd.grad(f, (z, gamma)) for f in (got, formula(z, gamma))), strict=True):
        torch.testing.assert_close(a, b)


def test_the_weight_decides_how_many_clusters_are_best():
    """Six subspaces of four dimensions, filled evenly: coded as six, or with each direction by itself."""
    corners = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).double() / 2
    z, six = torch.block_diag(*[corners] * 6), torch.block_diag(*[torch.ones(4, 4).double() / 4] * 6)
    alone, whole = torch.eye(24).double(), torch.full((24, 24), 1 / 24).double()
    cost = {m: float(cluster_rate(z, gamma)) for m, gamma in ((6, six), (24, alone), (1, whole))}
    for m, rate in cost.items():
        assert rate == pytest.approx(24 / (2 * m) * math.log(1 + m / 0.1))
    for m, gamma in ((6, six), (24, alone), (1, whole)):
        assert float(gamma.square().sum()) == pytest.approx(m)
    best = lambda weight: min(cost, key=lambda m: cost[m] + weight / 2 * m)
    assert [best(w) for w in (0.05, 0.6, 0.62, 8.0, 8.5)] == [24, 24, 6, 6, 1]


def test_rotations_and_signs_change_nothing():
    z, c = directions(30, 8), directions(30, 8, seed=1)
    gamma = sinkhorn(similarity(c))
    turn = torch.linalg.qr(directions(8, 8, seed=2))[0]
    torch.testing.assert_close(coding_rate(z @ turn), coding_rate(z))
    torch.testing.assert_close(cluster_rate(z @ turn, gamma), cluster_rate(z, gamma))
    flips = torch.where(torch.arange(30) % 3 == 0, -1.0, 1.0)[:, None]
    torch.testing.assert_close(sinkhorn(similarity(c * flips)), gamma)


def test_rates_of_many_clusters_are_computed_in_parts(monkeypatch):
    z, gamma = directions(30, 8), sinkhorn(similarity(directions(30, 8, seed=1)))
    whole = cluster_rate(z, gamma)
    monkeypatch.setitem(cluster_rate.__globals__, "_NUMBERS", 7 * 64)
    torch.testing.assert_close(cluster_rate(z, gamma), whole)


# -- memberships -----------------------------------------------------------------------------------------------------


def test_five_half_steps_are_exact_on_rows_and_near_on_columns():
    gamma = sinkhorn(similarity(directions(200, 16)))
    assert (gamma.sum(1) - 1).abs().max() < 1e-6 and (gamma.sum(0) - 1).abs().max() < 0.05
    assert float(gamma.sum()) == pytest.approx(200, abs=1e-4)  # of total mass n, not 1
    assert 0 < (gamma - gamma.T).abs().max() < 0.02
    many = sinkhorn(similarity(directions(200, 16)), steps=201)
    assert (many.sum(1) - 1).abs().max() < 1e-6 and (many.sum(0) - 1).abs().max() < 1e-6
    assert (many - many.T).abs().max() < 1e-6


@pytest.mark.parametrize("eta", [0.02, 0.175, 1.0])
def test_a_membership_is_doubly_stochastic_to_a_tolerance(eta):
    codes, _ = subspaces(noise=0.2)
    a = similarity(F.normalize(codes, dim=1))
    a = (a + a.T) / 2
    gamma = doubly_stochastic(a, eta=eta, tolerance=1e-10)
    assert (gamma.sum(0) - 1).abs().max() < 1e-9 and (gamma.sum(1) - 1).abs().max() < 1e-9
    assert torch.equal(gamma, gamma.T) and (gamma > 0).all()
    if eta > 0.1:  # at 0.02 alternate steps are far from it after thousands
        torch.testing.assert_close(gamma, sinkhorn(a, eta=eta, steps=1001), atol=1e-8, rtol=1e-6)


def test_the_norm_of_a_membership_lies_between_uniform_and_permutation():
    assert float(doubly_stochastic(torch.ones(30, 30)).square().sum()) == pytest.approx(1)
    assert float(doubly_stochastic(torch.eye(30), eta=0.01).square().sum()) == pytest.approx(30)
    assert 1 < float(doubly_stochastic(torch.eye(30), eta=0.3).square().sum()) < 30


def test_gradients_go_through_all_half_steps():
    a = torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: sinkhorn(a, eta=0.5), a)


def test_blocks_are_found_by_their_eigenvectors():
    z, labels = subspaces(noise=0.05)
    a = similarity(F.normalize(z, dim=1))
    found = spectral_labels(doubly_stochastic((a + a.T) / 2), 4)
    assert cluster_metrics(found, labels) == {"acc": 1.0, "nmi": 1.0, "ari": 1.0}


# -- training --------------------------------------------------------------------------------------------------------


def test_the_head_has_the_size_of_the_open_code_and_nothing_for_a_sample():
    assert sum(p.numel() for p in MLCHead(768, 10).parameters()) == 20_988_160
    x, _ = spheres(20)
    few, many = (mlc(x[: len(x) // part], clusters=2, epochs=1, **SMALL).model.state_dict() for part in (2, 1))
    assert {k: v.shape for k, v in few.items()} == {k: v.shape for k, v in many.items()}


def losses_at(progress: float, objective: RateReduction, head: MLCHead, x: Tensor) -> set[str]:
    return set(objective.losses(head, Batch(image=x), Context(progress=progress)))


def test_codes_start_once_where_features_are():
    x = torch.randn(16, 6)
    same = lambda head: torch.equal(head.code.weight, head.feature.weight)
    head, objective = MLCHead(6, 2, 4, 8, 1), RateReduction(spread=0.5)
    assert losses_at(0.4, objective, head, x) == {"rate"} and not same(head)
    assert losses_at(0.5, objective, head, x) == {"rate", "clusters", "membership"} and same(head)
    resumed = RateReduction(spread=0.5)
    resumed.load_state_dict(objective.state_dict())
    nn.init.zeros_(head.code.weight)
    losses_at(0.6, resumed, head, x)
    assert not same(head)
    head = MLCHead(6, 2, 4, 8, 1)
    losses_at(0.5, RateReduction(init="random"), head, x)
    assert not same(head)


def test_the_loss_is_the_one_of_the_paper():
    head, x = MLCHead(6, 2, 4, 8, 1).eval(), torch.randn(16, 6)
    with torch.no_grad():
        got = RateReduction(spread=0, init="random", weight=0.1).losses(head, Batch(image=x), Context())
        z, c = head.codes(x)
        gamma = sinkhorn(similarity(c))
    want = -coding_rate(z) + cluster_rate(z, gamma) + 0.05 * gamma.square().sum()
    torch.testing.assert_close(sum(got.values()), want)


def toy() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), MLCHead(16, 10, 10, 16, 1))


def objective() -> RateReduction:
    return RateReduction("2", spread=0)


def test_it_is_an_objective_as_others_are():
    check_objective(objective, model=toy, slow=False, lr=0.02)


def test_bfloat16_does_not_reach_the_determinants():
    row = tt.fit(toy(), tt.load_data("digits", limit=100), objective(), epochs=1, val=None, precision="bf16",
                 progress=False, augment="none").history[-1]  # fmt: skip
    assert math.isfinite(row["loss"])


# -- clusters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straightened():
    x, labels = spheres()
    return mlc(x, clusters=4, epochs=40, lr=0.01, **SMALL | {"hidden": 64}), x, labels


def test_spheres_that_k_means_mixes_become_subspaces(straightened):
    found, x, labels = straightened
    acc = cluster_metrics(found.labels, labels)["acc"]
    assert acc > cluster_metrics(rivals(x, 4)["k-means"], labels)["acc"] + 0.2
    z, _ = head_codes(found.model, x)
    apart = (z @ z.T).abs()[labels[:, None] != labels].mean()
    raw = F.normalize(x, dim=1)
    assert apart < 0.75 * (raw @ raw.T).abs()[labels[:, None] != labels].mean()


def test_what_was_found_is_a_membership_of_the_samples_drawn(straightened):
    found, x, _ = straightened
    assert torch.equal(found.rows, torch.arange(len(x))) and torch.equal(found.features, x)
    torch.testing.assert_close(found.membership.sum(0), torch.ones(len(x)), atol=1e-5, rtol=0)
    part = mlc(x, clusters=4, graph=80, epochs=1, **SMALL)
    assert len(part.rows) == 80 == len(part.membership) and len(part.labels) == len(x)


def test_new_points_are_placed_by_a_forward_pass(straightened):
    found, x, _ = straightened
    new = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        scores = found.model(new)
    assert scores.shape == (len(x), 4) and scores.min() >= 0 and scores.max() <= 1 + 1e-5
    assert (scores.argmax(1) == found.labels).float().mean() > 0.85


def test_the_same_seed_gives_the_same_clusters():
    x, _ = spheres(20)
    first, again = (mlc(x, clusters=4, epochs=2, seed=3, **SMALL) for _ in range(2))
    assert torch.equal(first.labels, again.labels) and torch.equal(first.membership, again.membership)


def test_images_of_a_network_are_clustered_kept_and_exported(tmp_path):
    data = tt.load_data("digits", limit=300)
    net = cnn()
    before = [p.clone() for p in net.parameters()]
    found = mlc(net, data, clusters=10, epochs=2, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    x = next(iter(data.loader("test", batch_size=8)))["image"]
    tt.save(found.model, tmp_path / "kept", spec=data.spec)
    torch.testing.assert_close(tt.load(tmp_path / "kept", base=cnn())(x), found.model(x))
    tt.export(found.model, tmp_path / "m.onnx", data=data)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), found.model(x).detach(), atol=1e-4, rtol=1e-3)


def test_the_network_can_be_trained_along_on_two_views():
    data = tt.load_data("digits", limit=200)
    net = cnn()
    found = mlc(net, data, clusters=10, epochs=3, spread=0.5, backbone=True, **SMALL)
    assert not torch.equal(found.model[0].weight, net[0].weight) and "views" in found.history[0]
    assert found.model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_by_name_clusters_get_the_names_of_classes_and_are_compared():
    data = tt.load_data("digits", limit=300)
    done = methods.run("mlc", cnn(), data, clusters=12, epochs=2, **SMALL)
    assert set(done.report["clustering"]) == {"mlc", "k-means", "spectral"}
    assert done.data.class_names[9:] == ["9", "cluster 10", "cluster 11"]
    accuracy = tt.evaluate(done.model, done.data, "train")["accuracy"]  # cluster k is class k as well as it can be
    assert accuracy == pytest.approx(done.report["clustering"]["mlc"]["acc"], abs=0.25) and accuracy > 0.15
    with pytest.raises(ValueError, match="clusters must be at least 10"):
        methods.run("mlc", cnn(), data, clusters=4)


def test_metrics_of_clusters():
    truth = torch.tensor([0, 0, 1, 1, 2, 2])
    assert cluster_metrics(torch.tensor([2, 2, 0, 0, 1, 1]), truth) == {"acc": 1.0, "nmi": 1.0, "ari": 1.0}
    one = cluster_metrics(torch.zeros(6, dtype=torch.int64), truth)
    assert one["acc"] == pytest.approx(1 / 3) and one["nmi"] == one["ari"] == 0


@pytest.mark.parametrize(
    ("features", "how", "says"),
    [
        (torch.randn(7, 4), {"clusters": 8}, r"clusters must be 2 to the number of samples \(7\), got 8"),
        (torch.randn(7, 4), {"clusters": 1}, "clusters must be 2 to"),
        (torch.randn(30, 4), {"clusters": 9, "dim": 8}, r"dim must be at least clusters \(9\)"),
        (torch.randn(30, 4), {"clusters": 3, "rank": 13, "dim": 12}, "rank must be 1 to dim"),
        (torch.randn(30, 4), {"clusters": 3, "graph": 2}, "graph must be at least clusters"),
        (torch.randn(30, 4), {"clusters": 3, "eta": 0.001}, "eta must be at least 0.01, got 0.001"),
        (torch.randn(30, 4), {"clusters": 3, "eps2": 0}, "eps2 must be positive, got 0"),
        (torch.randn(30, 4), {"clusters": 3, "spread": 1}, "spread must be a share"),
        (torch.randn(30, 4), {"clusters": 3, "init": "zero"}, "init must be one of copy, random"),
        (torch.randn(30, 4), {"clusters": 3, "weight": -1}, "weight must not be negative"),
        (torch.randn(30, 4), {"clusters": 3, "layers": 0}, "layers must be at least 1"),
        (torch.randn(30, 4), {"clusters": 3, "backbone": True}, "backbone=True needs a network"),
        (torch.randn(30, 4, 2), {"clusters": 3}, r"features must be \(N, F\), got \(30, 4, 2\)"),
        (torch.full((30, 4), math.nan), {"clusters": 3}, "features must be finite; those of sample 0 are not"),
        (nn.Linear(4, 2), {"clusters": 3}, "data must be given"),
    ],
)
def test_wrong_use_is_refused(features, how, says):
    with pytest.raises(ValueError, match=says):
        mlc(features, **how)


def test_more_wrong_use_is_refused(caplog):
    with pytest.raises(ValueError, match="data must be None"):
        mlc(torch.randn(30, 4), feature_data(torch.randn(30, 4)), clusters=3)
    with pytest.raises(ValueError, match="steps must be odd, got 4"):
        sinkhorn(torch.rand(4, 4), steps=4)
    with pytest.raises(ValueError, match="affinity must be a symmetric matrix"):
        doubly_stochastic(torch.tensor([[1.0, 0.5], [0.4, 1.0]]))
    with caplog.at_level("WARNING", logger="trimtab"):
        mlc(torch.randn(30, 4), clusters=10, epochs=1, **SMALL)
    assert "has few of each of 10 clusters" in caplog.text
