"""Scores of strange images, and the numbers made of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import trimtab as tt
from trimtab.core.errors import DataError
from trimtab.learn.adapt import ClassStatistics, compare, hold_out, noise, ood_metrics, post_hoc
from trimtab.learn.adapt.ood import class_distance, energy, knn, msp, strangers


def test_scores_are_their_formulas():
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(msp(logits), 1 - torch.tensor([0.880797, 0.5]))
    torch.testing.assert_close(energy(logits, 2.0), -2 * torch.logsumexp(logits / 2, 1))
    x, bank = torch.randn(5, 4), torch.randn(20, 4)
    near = torch.cdist(F.normalize(x, dim=1), F.normalize(bank, dim=1)).sort(1).values
    torch.testing.assert_close(knn(x, bank, 3, chunk=2), near[:, 2])
    with pytest.raises(ValueError, match="k must be 1 to the 20 features of the bank, got 21"):
        knn(x, bank, 21)


def test_the_distance_is_to_the_nearest_class():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 2
    x = torch.randn(60, 3, generator=g, dtype=torch.float64) + 4 * y[:, None]
    s = ClassStatistics(5, 3)  # three classes were never seen
    s.update(x, y)
    for shared in (False, True):
        d = class_distance(x, s, relative=0.0, shared=shared)
        each = []
        for c in (0, 1):
            gap = x - x[y == c].mean(0)
            cov = sum(29 * torch.cov(x[y == k].T) for k in (0, 1)) / 59 if shared else torch.cov(x[y == c].T)
            each.append((gap @ torch.linalg.inv(cov) * gap).sum(1))
        torch.testing.assert_close(d, torch.stack(each).amin(0))


def test_both_conventions_of_fpr95_have_their_own_name():
    known = torch.arange(100) / 100
    strange = known + 0.5
    m = ood_metrics(known, strange)
    # 95 known images score at most 0.94: 45 strange ones (0.50 to 0.94) pass with them
    assert m["fpr95"] == pytest.approx(0.45)
    # 95 strange images score at least 0.55: 45 known ones (0.55 to 0.99) are stopped with them
    assert m["fpr95_strange"] == pytest.approx(0.45)
    lopsided = ood_metrics(torch.tensor([0.0] * 50 + [0.9] * 50), torch.full((10,), 0.5))
    assert (lopsided["fpr95"], lopsided["fpr95_strange"], lopsided["auroc"]) == (1.0, 0.5, 0.5)
    assert ood_metrics(known, known + 2)["auroc"] == 1 and ood_metrics(known, known)["auroc"] == 0.5
    with pytest.raises(ValueError, match="scores must be finite"):
        ood_metrics(known, torch.tensor([]))


def test_usual_scores_tell_digits_from_noise():
    data = tt.load_data("digits", limit=600)
    known, unknown = hold_out(data, 3, seed=0)
    net = tt.create_model("trim_1k", num_classes=7, in_chans=1, img_size=8, seed=0)
    tt.fit(net, known, epochs=15, lr=0.2, batch_size=32, augment="none", progress=False)
    table = compare(post_hoc(net, known, k=10), known, {"held out": unknown, "noise": noise(known, 200)})
    assert set(table) == {"msp", "energy", "knn", "mahalanobis", "mahalanobis_shared"}
    assert table["knn"]["noise"]["auroc"] > 0.7 and table["mahalanobis"]["noise"]["auroc"] > 0.7
    assert all(sets["held out"]["auroc"] > 0.5 for sets in table.values())


def test_a_class_with_one_image_has_no_covariance_and_the_other_scores_go_on():
    data = tt.load_data("digits", limit=200)
    train = data.splits["train"]
    rows = torch.cat([(train.labels != 3).nonzero().flatten(), (train.labels == 3).nonzero().flatten()[:1]])
    few = data.like(splits={**data.splits, "train": train.take(rows)})
    scores = post_hoc(tt.create_model("trim_1k", num_classes=10, in_chans=1, img_size=8, seed=0), few)
    with pytest.raises(ValueError, match="class 3 has 1 training images; a covariance needs at least 2"):
        scores["mahalanobis"](few, "test")
    assert all(scores[name](few, "test").isfinite().all() for name in ("msp", "energy", "knn", "mahalanobis_shared"))


def test_held_out_classes_are_in_neither_part_twice():
    data = tt.load_data("digits", limit=300)
    known, unknown = hold_out(data, 4, seed=1)
    assert sorted(known.class_names + unknown.class_names) == data.class_names
    assert len(known.splits["train"]) + len(unknown.splits["train"]) == len(data.splits["train"])
    with pytest.raises(ValueError, match="classes to hold out must be 1 to 8 of the 10, got 9"):
        hold_out(data, 9)
    with pytest.raises(ValueError, match="must be 1 to 8 of 0 to 9"):
        hold_out(data, [3, 11])
    assert hold_out(data, ["8", 3])[1].class_names == hold_out(data, [3, 8])[1].class_names == ["3", "8"]
    with pytest.raises(ValueError, match="no class is called 'owl'; the classes are 0, 1, 2"):
        hold_out(data, ["owl"])
    with pytest.raises(DataError, match=r"has images \(3, 16, 16\), .* \(1, 8, 8\)"):
        strangers(data, {"shapes": tt.load_data("shapes:n=40,size=16")})
