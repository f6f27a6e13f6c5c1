"""HVCM: sizes, where gradients go, what the score is, and that it finds strange images."""

from __future__ import annotations

import math

import onnxruntime
import pytest
import torch

import trimtab as tt
from tests.learn.adapt.nets import cnn
from trimtab.core.edit import SetAttr, apply
from trimtab.learn.adapt import ClassStatistics, hold_out, hvcm, hvcm_scores, noise, ood_metrics
from trimtab.learn.adapt.hvcm import HVCMHead, Mixtures, divergences
from trimtab.learn.objective import Batch, Context
from trimtab.nn.features import FeatureExtractor

SMALL = {"groups": 4, "dim": 4, "embedding": 16, "batch_size": 32, "lr": 0.1, "augment": "none", "progress": False}


def net(num_classes: int = 10):
    return tt.create_model("trim_1k", num_classes=num_classes, in_chans=1, img_size=8, seed=0)


@pytest.fixture(scope="module")
def data():
    return tt.load_data("digits", limit=700)


@pytest.fixture(scope="module")
def learned(data):
    known, unknown = hold_out(data, 3, seed=0)
    wide = {"groups": 8, "dim": 8, "embedding": 64, "lr": 2.0}
    return hvcm(cnn(), known, epochs=12, **SMALL | wide), known, unknown


def test_sizes_are_those_of_the_open_code():
    head = HVCMHead(512, 10, groups=32, dim=32)
    count = lambda *parts: sum(p.numel() for n, p in head.named_parameters() if n.split(".")[0] in parts)
    assert count("body") == 131_328 and count("direction", "gain") == 263_168 and count("component") == 8_192
    assert count("body", "direction", "gain", "component") == 402_688
    assert not head.gain.requires_grad
    three = HVCMHead(2048, 2, groups=2, dim=4, hidden=2048)
    widths = [(m.in_features, m.out_features) for m in three.body if hasattr(m, "in_features")]
    assert widths == [(2048, 2048), (2048, 2048), (2048, 256)]
    with torch.device("meta"):
        fold = HVCMHead(2048, 100, groups=32, dim=256)
    assert round(fold.whitening.nbytes / 2**30, 2) == 0.78


def test_attributes_are_within_one():
    head = HVCMHead(16, 3, groups=4, dim=8)
    q, g = head.parts(100 * torch.randn(50, 16))
    assert q.shape == (50, 4, 8) and g.shape == (50, 4) and q.abs().max() <= 1
    torch.testing.assert_close(
        head.logits(q)[:, 1], torch.cosine_similarity(q.flatten(1), head.centres[1].flatten()[None])
    )


def test_directions_start_as_short_as_the_other_layers_of_the_head():
    """With a variance of one they would be 50 times as long, and a step would turn them 2500 times less."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = HVCMHead(64, 10, groups=32, dim=32)
    assert float(head.direction.detach().norm(dim=1).mean()) == pytest.approx(0.02 * 256**0.5, rel=0.05)


def test_divergences_move_one_side_each():
    q, c = (torch.randn(5, 4, 8, requires_grad=True) for _ in range(2))
    move, follow = divergences(q, c)
    p, r = q.softmax(-1), c.softmax(-1)
    torch.testing.assert_close(move, (r * (r.log() - p.log())).sum(-1))
    torch.testing.assert_close(follow, (p * (p.log() - r.log())).sum(-1))
    assert torch.autograd.grad(move.sum(), c, allow_unused=True)[0] is None
    assert torch.autograd.grad(follow.sum(), q, allow_unused=True)[0] is None
    assert torch.autograd.grad(divergences(q, c)[0].sum(), q)[0].any()


def test_centres_start_at_a_divergence_of_about_a_half():
    g = torch.Generator().manual_seed(0)
    q = torch.nn.functional.normalize(torch.randn(64, 1024, generator=g), dim=1).view(64, 32, 32)
    move, _ = divergences(q, torch.randn(64, 32, 32, generator=g))
    assert float(move.mean()) == pytest.approx(0.45, abs=0.05)


def made(**how):
    head = HVCMHead(6, 3, groups=4, dim=5, embedding=8)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 6), head)
    objective = Mixtures("2", **how)
    batch = Batch(image=torch.randn(7, 1, 3, 3), label=torch.tensor([0, 0, 2, 2, 2, 0, 2]))
    return model, head, objective, batch


def test_component_weights_get_no_gradient_from_the_centres_and_attributes_none_from_them():
    model, head, objective, batch = made()
    objective.losses(model, batch, Context())["components"].backward()
    assert head.component.weight.grad.any()
    assert head.centres.grad is None and head.direction.grad is None  # the divergences in it stand still
    model.zero_grad()
    objective.losses(model, batch, Context())["centres"].backward()
    assert head.centres.grad[[0, 2]].any() and not head.centres.grad[1].any() and head.direction.grad.any()
    assert head.component.weight.grad is None or not head.component.weight.grad.any()


def test_omega_follows_its_classes_and_stays_a_distribution():
    model, head, objective, batch = made(gamma=0.25)
    before = head.omega.clone()
    _, g = head.parts(model[1](model[0](batch["image"])))
    objective.losses(model, batch, Context())
    assert torch.equal(head.omega[1], before[1])
    share = g.softmax(1)[batch["label"] == 2].mean(0).detach()
    torch.testing.assert_close(head.omega[2], 0.75 * before[2] + 0.25 * share)
    for _ in range(50):
        objective.losses(model, batch, Context())
    torch.testing.assert_close(head.omega.sum(1), torch.ones(3))


def fitted(q: torch.Tensor, y: torch.Tensor, groups: int, relative: float = 0.0) -> HVCMHead:
    """A head whose Gaussians are those of attributes (N, K d)."""
    head = HVCMHead(4, 3, groups=groups, dim=q.shape[1] // groups, embedding=8).double()
    s = ClassStatistics(3, q.shape[1], groups=groups)
    s.update(q, y)
    head.mean.copy_(s.mean())
    head.whitening.copy_(s.whitening(relative=relative))
    return head


def attributes(seed: int = 0, n: int = 90, dim: int = 6):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.randn(n, dim, generator=g).double() @ torch.randn(dim, dim, generator=g).double() + y[:, None], y


def test_one_group_is_half_the_squared_mahalanobis_distance():
    q, y = attributes()
    head = fitted(q, y, 1)
    head.omega.fill_(1.0)
    each = []
    for c in range(3):
        gap = q - q[y == c].mean(0)
        each.append(0.5 * (gap @ torch.linalg.inv(torch.cov(q[y == c].T)) * gap).sum(1))
    torch.testing.assert_close(head.score(q.view(-1, 1, 6)), torch.stack(each).amin(0))


def test_the_score_does_not_see_maps_inside_a_group_but_mixing_across_groups():
    q, y = attributes()
    g = torch.Generator().manual_seed(3)
    inside = torch.block_diag(*(torch.randn(3, 3, generator=g).double() + 2 * torch.eye(3) for _ in range(2)))
    across = torch.linalg.qr(torch.randn(6, 6, generator=g).double())[0]
    first = fitted(q, y, 2)
    want = first.score(q.view(-1, 2, 3))
    for mix, same in ((inside, True), (across, False)):
        other = fitted(q @ mix, y, 2)
        other.omega.copy_(first.omega)
        got = other.score((q @ mix).view(-1, 2, 3))
        assert torch.allclose(got, want, rtol=1e-6) == same


def test_it_learns_to_classify_and_finds_strange_images(learned):
    model, known, unknown = learned
    assert tt.evaluate(model, known)["accuracy"] > 0.85
    scores = hvcm_scores(model, known)
    for strange in (unknown, noise(known, 200)):
        assert ood_metrics(scores, hvcm_scores(model, strange))["auroc"] > 0.6
    ((at, head),) = [(name, m) for name, m in model.named_modules() if isinstance(m, HVCMHead)]
    features = FeatureExtractor(model, before=at).of(known, "test")
    with torch.no_grad():
        torch.testing.assert_close(head.score(head.parts(features.values)[0]), scores, atol=1e-3, rtol=1e-3)


def test_what_comes_out_is_kept_and_exported_with_its_scores(learned, tmp_path):
    model, known, _ = learned
    x = next(iter(known.loader("test", batch_size=8)))["image"]
    tt.save(model, tmp_path / "kept", spec=known.spec)
    kept = tt.load(tmp_path / "kept", base=cnn())
    torch.testing.assert_close(kept(x), model(x))
    torch.testing.assert_close(hvcm_scores(kept, known), hvcm_scores(model, known))
    name = next(n for n, m in kept.named_modules() if isinstance(m, HVCMHead))
    tt.export(kept, tmp_path / "m.onnx", data=known)
    both = apply(kept, [SetAttr(name, "with_score", True)])
    logits, score = both(x)
    torch.testing.assert_close(logits, model(x))
    torch.testing.assert_close(score, hvcm_scores(model, known)[:8], atol=1e-3, rtol=1e-3)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), logits.detach(), atol=1e-4, rtol=1e-3)


def test_centres_may_stay_where_they_are(data):
    model = hvcm(net(), data, epochs=1, train_centres=False, seed=3, **SMALL)
    same = hvcm(net(), data, epochs=2, train_centres=False, seed=3, **SMALL)
    find = lambda m: next(h for h in m.modules() if isinstance(h, HVCMHead)).centres
    assert torch.equal(find(model), find(same)) and find(model).requires_grad
    assert not torch.equal(find(model), find(hvcm(net(), data, epochs=1, seed=3, **SMALL)))


def test_wrong_use_is_refused(data, caplog):
    with pytest.raises(ValueError, match="groups must be at least 1, got 0"):
        hvcm(net(), data, **SMALL | {"groups": 0})
    train = data.splits["train"]
    rows = torch.cat([(train.labels != 3).nonzero().flatten(), (train.labels == 3).nonzero().flatten()[:1]])
    few = data.like(splits={**data.splits, "train": train.take(rows)})
    with pytest.raises(ValueError, match=r"at least 2 training images .* '3' has 1"):
        hvcm(net(), few, **SMALL)
    with pytest.raises(ValueError, match="the model must have one HVCMHead"):
        hvcm_scores(net(), data)
    scarce = data.subset({"train": 40})
    with caplog.at_level("WARNING", logger="trimtab"):
        model = hvcm(net(), scarce, epochs=1, **SMALL | {"dim": 8})
    assert "training images for covariances of 8 attributes" in caplog.text
    assert math.isfinite(float(hvcm_scores(model, data).sum()))
