"""CNN Filter DB: the exact checks of its fact sheet, its traps, and the files it reads and writes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import trimtab as tt
from evidence.cnn_filter_db import write_published
from trimtab.compress.analyze import cnn_filter_db as db
from trimtab.core.errors import TrimtabError

LIMIT = math.log10(9)


def gaussian(out: int, into: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, into, 3, 3, generator=torch.Generator().manual_seed(seed))


def net(widths: tuple[int, ...] = (3, 32, 32, 32), seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Conv2d(a, b, 3) for a, b in zip(widths[:-1], widths[1:], strict=True)))  # noqa: RUF007


# -- the measures of a layer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "entropy", "share", "tolerance"),
    [((16, 3), 0.908, 1.024, 0.02), ((64, 64), 0.9537, 1.0028, 0.0003), ((256, 256), 0.9542, 1.0031, 0.0002)],
)
def test_entropy_of_random_layers(shape: tuple[int, int], entropy: float, share: float, tolerance: float) -> None:
    found = [db.variance_entropy(gaussian(*shape, seed=s)) for s in range(5)]
    assert np.mean(found) == pytest.approx(entropy, abs=tolerance)
    assert np.mean(found) / db.random_entropy(shape[0] * shape[1]) == pytest.approx(share, abs=tolerance)


def test_entropy_of_the_default_initialization() -> None:
    torch.manual_seed(0)
    assert db.variance_entropy(nn.Conv2d(64, 64, 3).weight) == pytest.approx(0.9537, abs=0.0003)


def test_every_random_layer_of_48_kernels_or_more_is_called_random() -> None:
    shares = []
    for seed in range(60):
        out, into = ((48, 1), (16, 3), (32, 32), (8, 8))[seed % 4]
        shares.append(db.variance_entropy(gaussian(out, into, seed)) / db.random_entropy(out * into))
    assert min(shares) > 0.985 and max(shares) < 1.06
    assert np.mean(np.array(shares) >= 1) > 0.9


def test_one_kernel_at_many_scales_has_no_variety() -> None:
    scales = gaussian(32, 8)[..., :1, :1]
    assert db.variance_entropy(gaussian(1, 1, 5) * scales) == pytest.approx(0, abs=1e-6)


def test_a_constant_layer_has_neither_sparsity_nor_entropy() -> None:
    w = torch.full((16, 8, 3, 3), 0.1)
    assert (db.sparsity(w), db.variance_entropy(w)) == (0.0, 0.0)
    assert (db.sparsity(w * 0), db.variance_entropy(w * 0)) == (1.0, 0.0)


def test_zero_filters_are_sparse_and_the_clean_entropy_ignores_them() -> None:
    w = gaussian(64, 64)
    w[:32] = 0
    assert db.sparsity(w) == 0.5
    assert db.variance_entropy(w, clean=True) == pytest.approx(0.9535, abs=0.001)
    assert db.variance_entropy(w, clean=True) == pytest.approx(db.variance_entropy(w[32:]))


def test_one_outlier_makes_the_whole_layer_sparse() -> None:
    w = gaussian(16, 16)
    assert db.sparsity(w) == 0
    w[0, 0, 0, 0] = 1000
    assert db.sparsity(w) == pytest.approx(1 - 1 / 256)


def test_measures_see_plain_weights_not_normalized_ones() -> None:
    """Normalized, the small kernels of the second half would be as large as the others."""
    w = gaussian(64, 16)
    w[32:] *= 1e-3
    assert db.sparsity(w) == 0.5


def test_entropy_is_bounded_and_does_not_care_for_scale() -> None:
    w = gaussian(128, 128)
    assert 0 < db.variance_entropy(w) <= LIMIT
    assert db.variance_entropy(w * 1e-6) == pytest.approx(db.variance_entropy(w))


@pytest.mark.parametrize(
    ("kernels", "entropy"), [(9, 0.5515), (64, 0.9056), (256, 0.9433), (1024, 0.9499), (65536, 0.9513)]
)
def test_threshold_of_randomness(kernels: int, entropy: float) -> None:
    assert db.random_entropy(kernels) == pytest.approx(entropy, abs=5e-5)


def test_orthogonality() -> None:
    rows = torch.linalg.qr(torch.randn(72, 32, generator=torch.Generator().manual_seed(0)))[0].T
    assert db.orthogonality(rows.reshape(32, 8, 3, 3)) == pytest.approx(1.0, abs=1e-6)
    assert db.orthogonality(torch.ones(16, 4, 3, 3)) == pytest.approx(0.0, abs=1e-12)
    assert db.orthogonality(gaussian(64, 64)) == pytest.approx(0.9665, abs=0.001)
    assert np.mean([db.orthogonality(gaussian(16, 3, s)) for s in range(20)]) == pytest.approx(0.845, abs=0.015)
    assert math.isnan(db.orthogonality(gaussian(1, 4)))


# -- distributions ----------------------------------------------------------------------------------------------------


def test_normalized_kernels_know_no_scale_but_a_sign() -> None:
    w = gaussian(8, 4).reshape(-1, 9).numpy()
    np.testing.assert_allclose(db.normalized(w * 7.5), db.normalized(w), rtol=1e-6)
    np.testing.assert_allclose(db.normalized(-w), -db.normalized(w))
    assert np.abs(db.normalized(w)).max(axis=1) == pytest.approx(1)
    assert (db.normalized(np.zeros((2, 9))) == 0).all()


def test_basis_is_orthonormal_its_ratios_sum_to_one_and_it_reconstructs() -> None:
    w = gaussian(64, 16).reshape(-1, 9).numpy() * np.linspace(0.2, 1, 9)
    basis = db.Basis.fit(w)
    np.testing.assert_allclose(basis.components @ basis.components.T, np.eye(9), atol=1e-10)
    assert basis.ratio.sum() == pytest.approx(1) and (np.diff(basis.ratio) <= 0).all()
    np.testing.assert_allclose(basis.project(w) @ basis.components + basis.mean, db.normalized(w), atol=1e-10)
    np.testing.assert_allclose(
        basis.project(w).var(axis=0) / basis.project(w).var(axis=0).sum(), basis.ratio, atol=1e-9
    )


def test_divergence_of_two_normal_distributions() -> None:
    """Symmetric KL of N(0,1) and N(1,1) is exactly 1."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        p, q = rng.normal(0, 1, (100_000, 1)), rng.normal(1, 1, (100_000, 1))
        assert 0.98 < db.drift(p, q, np.ones(1), span=(-6, 6)) < 1.03


def test_empty_bins_count_as_densities() -> None:
    """In counts this would be 11.9, in probabilities 6.33."""
    rng = np.random.default_rng(0)
    p, q = rng.uniform(0, 1, (100_000, 1)), rng.uniform(0, 0.5, (100_000, 1))
    assert db.drift(p, q, np.ones(1), span=(-1, 1)) == pytest.approx(8.05, abs=0.05)


def test_drift_is_zero_for_itself_symmetric_and_weighted() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(500, 2)), rng.normal(size=(700, 2)) + [0, 1]
    weights = np.array([0.75, 0.25])
    assert db.drift(p, p, weights) == 0
    assert db.drift(p, q, weights) == pytest.approx(db.drift(q, p, weights)) and db.drift(p, q, weights) > 0
    span = (-6, 6)
    parts = [db.drift(p[:, [k]], q[:, [k]], np.ones(1), span=span) for k in range(2)]
    assert db.drift(p, q, weights, span=span) == pytest.approx(weights @ parts)


def test_sets_of_different_size_are_compared_on_equal_samples() -> None:
    """Unequal samples of one distribution look far apart only because one is small."""
    rng = np.random.default_rng(0)
    big, other, small = (rng.normal(size=(n, 1)) for n in (50_000, 50_000, 2_000))
    one = np.ones(1)
    fair = db.drifts({"big": big, "other": other, "small": small}, one)
    assert (fair == fair.T).all() and (np.diag(fair) == 0).all()
    assert fair[0, 1] == pytest.approx(fair[0, 2], rel=0.6)
    assert db.drift(big, small, one) > 5 * db.drift(big, other, one)
    assert (fair == db.drifts({"big": big, "other": other, "small": small}, one)).all()


def test_halves_of_a_layer_are_nearer_than_other_kernels() -> None:
    smooth = gaussian(64, 64) + gaussian(64, 64, 1)[..., :1, :1] * 3
    kernels = smooth.reshape(-1, 9).numpy()
    other = gaussian(64, 32, 2).reshape(-1, 9).numpy()
    basis = db.Basis.fit(kernels)
    groups = {"a": basis.project(kernels[::2]), "b": basis.project(kernels[1::2]), "random": basis.project(other)}
    d = db.drifts(groups, basis.ratio)
    assert d[0, 1] < 0.2 * min(d[0, 2], d[1, 2])


# -- collecting -------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.point, self.depthwise = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.up, self.volume, self.row = nn.ConvTranspose2d(8, 8, 3), nn.Conv3d(1, 1, 3), nn.Conv1d(1, 1, 3)
        self.grouped, self.five = nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 4, 5)


def test_only_plain_3x3_convolutions_are_collected() -> None:
    found = db.collect(Mixed(), name="mixed", task="classify")
    assert [(x.name, x.depth, x.shape) for x in found.layers] == [
        ("a", 0, (8, 3)), ("depthwise", 2, (8, 1)), ("grouped", 3, (6, 4))
    ]  # fmt: skip
    assert [x.depth_norm for x in found.layers] == [0, 0.5, 0.75]
    assert found.kernels.shape == (24 + 8 + 24, 9)
    assert found.layers[0].about == {"task": "classify", "3x3_filter_share": 56 / (56 + 64 + 24)}


def test_rows_are_the_kernels_themselves() -> None:
    model = Mixed()
    found = db.collect(model)
    for layer in found.layers:
        weight = model.get_submodule(layer.name).weight.detach()
        np.testing.assert_array_equal(found.of(layer).reshape(*layer.shape, 3, 3), weight.numpy())


def test_batch_norm_is_folded_when_asked() -> None:
    model = Mixed().eval()
    with torch.no_grad():
        model.norm.weight.copy_(torch.rand(8) + 0.5)
        model.norm.running_var.copy_(torch.rand(8) + 0.1)
    plain, folded = (db.collect(model, fold_bn=f) for f in (False, True))
    x = torch.randn(2, 3, 6, 6)
    w = torch.from_numpy(folded.of(folded.layers[0])).reshape(8, 3, 3, 3)
    shift = (
        model.norm.bias - model.norm.running_mean * model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    )
    with torch.no_grad():
        torch.testing.assert_close(nn.functional.conv2d(x, w, shift), model.norm(model.a(x)), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(plain.of(plain.layers[1]), folded.of(folded.layers[1]))  # no norm behind it


def test_sets_are_joined_selected_and_kept(tmp_path: Path) -> None:
    both = db.collect(net(), name="a", task="x") + db.collect(Mixed(), name="b")
    assert both.where(lambda x: x.model == "b").kernels.shape == (56, 9)
    again = db.Filters.load(both.save(tmp_path / "filters.safetensors"))
    assert again.layers == both.layers and (again.kernels == both.kernels).all()
    (tmp_path / "broken").write_bytes(b"not this")
    with pytest.raises(TrimtabError, match="is not a file of filters"):
        db.Filters.load(tmp_path / "broken")


# -- the published file -----------------------------------------------------------------------------------------------


def test_the_published_layout_is_read(tmp_path: Path) -> None:
    kernels = write_published(tmp_path / "dataset.h5")
    found = db.read_h5(tmp_path / "dataset.h5")
    np.testing.assert_array_equal(found.kernels, kernels)
    assert [(x.start, x.stop) for x in found.layers] == [(0, 12), (12, 28), (28, 41)]  # ids name the last filter
    assert [(x.model, x.depth, x.depth_norm) for x in found.layers] == [("0", 0, 0.0), ("0", 1, 1.0), ("1", 0, 0.0)]
    assert found.layers[2].about == {"Task": "Segmentation", "total_filters": 13}
    by_task = found.where(lambda x: x.about["Task"] == "Classification")
    np.testing.assert_array_equal(by_task.kernels, kernels[:28])


def test_a_hostile_table_is_refused(tmp_path: Path) -> None:
    write_published(tmp_path / "bad.h5", words=b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(TrimtabError, match=r"os\.system is not allowed"):
        db.read_h5(tmp_path / "bad.h5")
    write_published(tmp_path / "long.h5", last="28:41")
    with pytest.raises(TrimtabError, match="rows 28 to 42 of conv 0 are not among 41"):
        db.read_h5(tmp_path / "long.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(TrimtabError, match="not laid out"):
        db.read_h5(tmp_path / "text.h5")


def test_without_h5py_the_error_says_what_to_install(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"trimtab\[analyze\]"):
        db.read_h5(tmp_path / "dataset.h5")


# -- everything at once -----------------------------------------------------------------------------------------------


def test_degenerated_layers_are_named_for_what_they_are() -> None:
    model = net((3, 32, 32, 32, 32))
    with torch.no_grad():
        smooth = gaussian(32, 3, 1) + 0.8 * gaussian(32, 3)[..., :1, :1]
        model[0].weight.copy_(smooth)  # healthy
        model[1].weight[:24] = 0  # sparse
        model[2].weight.copy_(gaussian(32, 32)[..., :1, :1] * gaussian(1, 1, 3))  # one pattern
    report = tt.compress.analyze.filters(model)
    assert [q.degenerated for q in report.quality] == [(), ("sparse",), ("low entropy",), ("random",)]
    assert report.models[0]["degenerated"] == ["1", "2", "3"]


def test_too_few_kernels_are_not_called_random() -> None:
    (q,) = db.filters(nn.Sequential(nn.Conv2d(16, 16, 3, groups=16))).quality
    assert q.kernels == 16 and q.degenerated == ()


def test_report_of_two_models_is_plain_json_and_consistent() -> None:
    report = db.filters({"a": net(), "b": net(seed=1)}, seed=3)
    value = json.loads(json.dumps(report.asdict()))
    assert [m["name"] for m in value["models"]] == ["a", "b"] and len(value["quality"]) == 6
    width = np.diff(report.edges)
    for rows in value["histograms"].values():
        np.testing.assert_allclose((np.array(rows) * width).sum(axis=1), 1, rtol=1e-9)
    assert sum(value["ratio"]) == pytest.approx(1)
    assert 0 < value["drift"][0][1] == value["drift"][1][0] < 0.5
    assert db.filters({"a": net(), "b": net(seed=1)}, seed=3).asdict() == report.asdict()


def test_depth_is_split_into_deciles_with_enough_kernels() -> None:
    found = db.collect(net((3, *[40] * 11)))
    groups = db.by_depth(found, db.Basis.fit(found.kernels))
    assert list(groups) == [f"{k / 10:.1f}-{(k + 1) / 10:.1f}" for k in range(10)]
    assert len(groups["0.0-0.1"]) == 3 * 40 + 40 * 40  # depths 0 and 0.1, as in [0, 0.1]
    assert len(groups["0.1-0.2"]) == 40 * 40
    assert "0.0-0.1" not in db.by_depth(found, db.Basis.fit(found.kernels), least=1721)


def test_wrong_arguments_are_refused_at_the_door() -> None:
    for call, message in [
        (lambda: db.filters(), "models must be at least one"),
        (lambda: db.filters(nn.Conv2d(3, 3, 1)), "model has no 3x3 convolution"),
        (lambda: db.filters("resnet18"), "models must be modules, .*, got str"),
        (lambda: db.filters({"a": net()}, {"a": net()}), "'a' twice"),
        (lambda: db.filters(net(), sparse=2), r"sparse must be in \[0, 1\], got 2"),
        (lambda: db.sparsity(np.zeros((4, 5, 5))), r"kernels must be \(..., 3, 3\)"),
        (lambda: db.random_entropy(0), "kernels must be a positive integer, got 0"),
        (lambda: db.drifts({"a": np.zeros((0, 9))}, np.ones(9)), "at least one kernel each"),
        (lambda: db.drifts({"a": np.zeros((5, 9))}, np.ones(9), bins=0), "bins must be a positive integer, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
