"""SLCA: what moves slowly, what stays still, how heads are aligned, and that alignment never accumulates."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.learn import param_groups
from trimtab.learn.adapt import (
    ClassStatistics,
    align_heads,
    class_incremental,
    domain_incremental,
    slca,
    task_incremental,
)
from trimtab.learn.adapt.heads import GrowingHead
from trimtab.learn.adapt.slca import CurrentTask, Gaussians, _Slow, normalised_logits, shrink, slowed
from trimtab.learn.objective import Batch, Context

FIT = {"epochs": 3, "batch_size": 32, "lr": 0.1, "augment": "none", "progress": False}


@pytest.fixture(scope="module")
def data():
    return tt.load_data("digits", limit=700)


def net() -> nn.Module:
    return tt.create_model("trim_1k", num_classes=10, in_chans=1, img_size=8, seed=0)


def apart(dim: int = 16, classes: int = 6, n: int = 60) -> tuple[GrowingHead, Gaussians, torch.Tensor, torch.Tensor]:
    """Heads that were trained task by task on their own classes only, with the Gaussians of all classes."""
    g = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(classes, dim, generator=g)
    y = torch.arange(classes).repeat_interleave(n)
    x = centres[y] + torch.randn(classes * n, dim, generator=g) @ torch.randn(dim, dim, generator=g) * 0.5
    statistics = ClassStatistics(classes, dim)
    statistics.update(x, y)
    head, gaussians = GrowingHead(dim, num_classes=classes), Gaussians(classes, dim, per_class=64)
    for t in range(classes // 2):
        pair = (2 * t + 1, 2 * t)
        head.add(pair, seed=t)
        mine = (y == pair[0]) | (y == pair[1])
        optimizer = torch.optim.SGD(head.parts[t].parameters(), lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            batch = Batch(image=x[mine], label=y[mine])
            (CurrentTask(pair).losses(head, batch, Context()) * (t + 1)).backward()
            optimizer.step()
        gaussians.add(statistics, pair)
    return head, gaussians, x, y


def accuracy(head: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((head(x).argmax(1) == y).float().mean())


def test_only_the_current_slice_gets_a_gradient():
    head = GrowingHead(8, num_classes=6)
    for t, classes in enumerate(((3, 0), (5, 1, 2))):
        head.add(classes, seed=t)
    logits = head(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    logits.retain_grad()
    model = lambda _: logits
    batch = Batch(image=torch.zeros(4), label=torch.tensor([5, 1, 2, 5]))
    CurrentTask((5, 1, 2)).losses(model, batch, Context()).backward()
    assert not logits.grad[:, [0, 3, 4]].any() and logits.grad[:, [5, 1, 2]].all()
    assert not head.parts[0].weight.grad.any() and head.parts[1].weight.grad.any()


def test_heads_give_logits_in_the_numbers_of_the_data():
    head = GrowingHead(4, num_classes=5)
    head.add((3, 1), seed=0)
    x = torch.randn(2, 4)
    assert head(x)[:, [0, 2, 4]].isneginf().all()
    torch.testing.assert_close(head(x)[:, [3, 1]], head.parts[0](x))
    head.add((4, 0, 2), seed=1)
    weight, bias = head.as_single()
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), head(x))
    assert head.parts[0].weight.std() < 0.03 and not head.parts[0].bias.any()
    with pytest.raises(ValueError, match="classes must be new ones, got"):
        head.add((1,))


def test_alignment_takes_five_steps_per_class_and_leaves_the_heads_bit_for_bit():
    head, gaussians, *_ = apart()
    before = deepcopy(head.state_dict())
    aligned, done = align_heads(head, gaussians)
    assert done.steps == 5 * 6 and gaussians.loader("train", batch_size=64)[0]["image"].shape == (64, 16)
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in aligned.state_dict().items())


def test_alignment_repairs_heads_that_were_trained_apart():
    head, gaussians, x, y = apart()
    aligned, _ = align_heads(head, gaussians)
    assert accuracy(aligned, x, y) > accuracy(head, x, y) + 0.05


def test_normalised_logits_do_not_depend_on_their_scale():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    a = normalised_logits(logits, [3, 4], 0.1)
    torch.testing.assert_close(normalised_logits(100 * logits, [3, 4], 0.1), a, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(normalised_logits(logits, [3, 4], 0.05), 2 * a)


def test_older_means_shrink_as_in_the_open_code():
    assert [round(shrink(t, 9), 2) for t in range(10)] == [0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0]


def test_features_drawn_have_the_moments_of_the_class():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=g).double() @ torch.randn(5, 5, generator=g).double() + 2
    statistics = ClassStatistics(3, 5)
    statistics.update(x, torch.ones(40).long())
    gaussians = Gaussians(3, 5)
    gaussians.add(statistics, (1,))
    gaussians.scale = {1: 0.5}
    drawn = gaussians.draw(1, 40_000, g).double()
    torch.testing.assert_close(drawn.mean(0), 0.5 * x.mean(0), atol=0.06, rtol=0)
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(x.T) + 1e-4 * torch.eye(5), atol=0.2, rtol=0.05)
    assert gaussians.factor[1].dtype == torch.float32 and gaussians.mean[1].dtype == torch.float64


def test_all_of_the_network_is_slow_norms_too_and_old_heads_still(data):
    learner = _Slow(
        net(), class_incremental(data, tasks=5), slow=0.01, align=0, temperature=0.1, per_class=8, covariance="full"
    )
    for t in range(2):
        learner._head.add(learner.stream[t].classes, seed=t)
    with slowed(learner.model, learner._head, 0.01):
        learner._head.parts[0].requires_grad_(False)
        rates = {id(p): g["lr"] for g in param_groups(learner.model, lr=1.0) for p in g["params"]}
    for name, p in learner.model.named_parameters():
        want = None if ".parts.0." in name else 1.0 if ".parts.1." in name else 0.01
        assert rates.get(id(p)) == want, name
    assert not any("lr_scales" in vars(m) for m in learner.model.modules())


def test_with_one_task_it_is_fine_tuning_at_two_rates(data):
    stream = class_incremental(data, tasks=1)
    a, b = slca(net(), stream, align=5, **FIT), slca(net(), stream, align=0, **FIT)
    assert all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())


def test_a_slow_network_keeps_what_it_knew_and_alignment_compares_the_tasks(data):
    start = net()
    known = data.subset({"train": 300})
    tt.fit(start, known, epochs=8, lr=0.2, batch_size=32, augment="none", progress=False)
    stream = class_incremental(data, tasks=5, seed=0)
    slow = slca(start, stream, **FIT)
    fast = slca(start, stream, slow=1.0, **FIT)
    unaligned = slca(start, stream, align=0, **FIT)
    assert slow.last_accuracy > fast.last_accuracy + 0.1
    assert slow.last_accuracy > unaligned.last_accuracy + 0.05
    assert tt.evaluate(slow.model, data, "test")["accuracy"] == pytest.approx(slow.last_accuracy)


def test_tasks_of_different_size_and_known_tasks(data, tmp_path):
    stream = task_incremental(data, sizes=(1, 4, 2, 3), seed=4)
    result = slca(net(), stream, covariance="diag", **FIT)
    assert result.accuracy[0][0] == 1.0  # a task of one class
    tt.save(result.model, tmp_path / "kept", spec=data.spec)
    x = torch.randn(3, 1, 8, 8)
    kept = tt.load(tmp_path / "kept")
    torch.testing.assert_close(kept(x), result.model(x))
    assert type(kept.get_classifier()) is nn.Linear


class Stop(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_bits(data, tmp_path):
    stream = class_incremental(data, tasks=3)
    whole = slca(net(), stream, **FIT)
    rows = iter(range(99))

    def count(row):
        if next(rows) == 7:  # in the third task
            raise Stop

    with pytest.raises(Stop):
        slca(net(), stream, out=tmp_path, checkpoint_every=0, on_epoch=count, **FIT)
    again = slca(net(), stream, out=tmp_path, checkpoint_every=0, **FIT)
    assert again.accuracy == whole.accuracy
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in whole.model.state_dict().items())


def test_wrong_use_is_refused(data):
    stream = class_incremental(data, tasks=5)
    with pytest.raises(ValueError, match="slca needs tasks with classes of their own"):
        slca(net(), domain_incremental(data, tasks=2))
    for how, says in (
        ({"slow": 0}, r"slow must be in \(0, 1\], got 0"),
        ({"covariance": "low"}, "covariance must be one of full, diag, got 'low'"),
        ({"temperature": 0}, "temperature positive"),
    ):
        with pytest.raises(ValueError, match=says):
            slca(net(), stream, **how)
    train = data.splits["train"]
    rows = np.r_[np.flatnonzero(train.labels != 3), np.flatnonzero(train.labels == 3)[:1]]
    few = data.like(splits={**data.splits, "train": train.take(torch.from_numpy(rows))})
    with pytest.raises(ValueError, match=r"every class must have at least 2 training images .* '3' has 1"):
        slca(net(), class_incremental(few, tasks=5))
