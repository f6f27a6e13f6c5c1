"""Sums by class: any order, any parts, exact forgetting; covariances as numpy has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.learn.adapt.statistics import ClassStatistics, mahalanobis


def samples(n: int = 90, dim: int = 6, classes: int = 3, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    return torch.randn(n, dim, generator=g, dtype=torch.float64) @ torch.randn(dim, dim, generator=g).double() + y[
        :, None
    ], y


def fitted(x, y, **how) -> ClassStatistics:
    s = ClassStatistics(3, x.shape[1], **how)
    s.update(x, y)
    return s


def same(a: ClassStatistics, b: ClassStatistics, atol: float = 1e-12) -> None:
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[name], atol=atol, rtol=1e-12)


@pytest.mark.parametrize("how", [{"kind": "mean"}, {"kind": "diag", "groups": 2}, {"kind": "full", "groups": 3}])
def test_order_and_parts_do_not_matter(how):
    x, y = samples()
    whole = fitted(x, y, **how)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    parts = ClassStatistics(3, 6, **how)
    for rows in order.split(7):
        parts.update(x[rows], y[rows])
    same(parts, whole)
    same(fitted(x[:30], y[:30], **how).merge(fitted(x[30:], y[30:], **how)), whole)


def test_moments_are_numpy_s():
    x, y = samples()
    s = fitted(x, y)
    for c in range(3):
        mine = x[y == c].numpy()
        np.testing.assert_allclose(s.mean()[c, 0], mine.mean(0), atol=1e-12)
        np.testing.assert_allclose(s.covariance(c)[0], np.cov(mine.T), atol=1e-11)  # n - 1
        np.testing.assert_allclose(fitted(x, y, kind="diag").covariance(c)[0], np.diag(mine.var(0, ddof=1)), atol=1e-11)
        grouped = fitted(x, y, groups=2).covariance(c, ridge=0.5)
        np.testing.assert_allclose(grouped[1], np.cov(mine[:, 3:].T) + 0.5 * np.eye(3), atol=1e-11)
    factor = s.cholesky(0, ridge=1e-4)[0]
    torch.testing.assert_close(factor @ factor.T, s.covariance(0, ridge=1e-4)[0])


def test_weights_count_samples_more_than_once():
    x, y = samples(20)
    w = torch.randint(1, 4, (20,), generator=torch.Generator().manual_seed(2))
    s = ClassStatistics(3, 6)
    s.update(x, y, w)
    same(s, fitted(x.repeat_interleave(w, 0), y.repeat_interleave(w)), atol=1e-10)


def test_a_class_is_forgotten_as_if_it_had_never_been():
    x, y = samples()
    s = fitted(x, y)
    s.forget(1)
    same(s, fitted(x[y != 1], y[y != 1]))
    assert s.known == [0, 2] and not s.mean()[1].any()


def test_distances_are_mahalanobis_s():
    x, y = samples()
    s = fitted(x, y)
    d = mahalanobis(x, s.mean(), s.whitening(), chunk=7)[..., 0]
    shared = mahalanobis(x, s.mean(), s.pooled().whitening())[..., 0]
    inner = sum((x[y == c] - x[y == c].mean(0)).T @ (x[y == c] - x[y == c].mean(0)) for c in range(3)) / (len(y) - 1)
    for c in range(3):
        gap = x - x[y == c].mean(0)
        for got, cov in ((d, torch.cov(x[y == c].T)), (shared, inner)):
            torch.testing.assert_close(got[:, c], (gap @ torch.linalg.inv(cov) * gap).sum(1))


def test_memory_is_that_of_the_sheets():
    mebibyte = 2**20
    how = {"dtype": torch.float32, "device": "meta"}
    assert ClassStatistics(100, 768, **how).second.nbytes == 225 * mebibyte  # slca, full
    assert round(ClassStatistics(100, 768, kind="diag", **how).second.nbytes / mebibyte, 2) == 0.29
    assert round(ClassStatistics(100, 8192, groups=32, **how).second.nbytes / 2**30, 2) == 0.78  # hvcm, ImageNet fold
    assert round(ClassStatistics(100, 8192, groups=32, device="meta").second.nbytes / 2**30, 2) == 1.56


def test_what_cannot_be_computed_is_refused():
    x, y = samples(12)
    s = ClassStatistics(3, 6)
    s.update(x[:4], torch.tensor([0, 0, 0, 1]))
    with pytest.raises(ValueError, match="class 1 has 1 training images; a covariance needs at least 2"):
        s.covariance(1)
    with pytest.raises(ValueError, match=r"covariance of class 0 is singular .* use a larger ridge"):
        s.cholesky(0)
    assert s.cholesky(0, ridge=1e-4).isfinite().all() and s.cholesky(0, relative=1e-3).isfinite().all()
    with pytest.raises(ValueError, match="labels must be 0 to 2, got 0 to 3"):
        s.update(x[:2], torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"features must be \(B, 6\)"):
        s.update(x[:2, :5], y[:2])
    with pytest.raises(ValueError, match="keeps no covariance"):
        fitted(x, y, kind="mean").covariance(0)
    with pytest.raises(ValueError, match="groups must divide the 6 features, got 4"):
        ClassStatistics(3, 6, groups=4)
    with pytest.raises(ValueError, match="can be merged"):
        s.merge(ClassStatistics(3, 6, kind="diag"))
