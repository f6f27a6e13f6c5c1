"""The memory of replay, and its losses."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.learn.adapt import ReplayBuffer, class_incremental, replay
from trimtab.learn.adapt.replay import Replay
from trimtab.learn.objective import Batch, Context
from trimtab.learn.settings import Settings


def fill(memory: ReplayBuffer, n: int, step: int = 7) -> None:
    for rows in torch.arange(n).split(step):
        image = rows.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).to(torch.uint8)
        memory.add(image=image, label=rows % 10, task=rows // 10, at=rows)


def test_a_reservoir_keeps_every_image_with_equal_chances():
    counts: Counter[int] = Counter()
    for seed in range(400):
        memory = ReplayBuffer(10, seed=seed)
        fill(memory, 40)
        counts.update(memory.fields["at"].tolist())
    assert len(counts) == 40 and all(60 < n < 140 for n in counts.values())  # 100 expected, deviation 9


def test_fields_stay_together_and_a_ring_keeps_the_last():
    for policy in ("reservoir", "ring"):
        memory = ReplayBuffer(10, policy=policy)
        fill(memory, 43)
        kept = memory.fields
        assert torch.equal(kept["at"] % 10, kept["label"]) and torch.equal(kept["image"][:, 0, 0, 0].long(), kept["at"])
    assert sorted(kept["at"].tolist()) == list(range(33, 43))


def test_its_state_goes_on_with_the_same_chances():
    whole, first, second = ReplayBuffer(10), ReplayBuffer(10), ReplayBuffer(10)
    fill(whole, 30)
    fill(whole, 30)
    fill(first, 30)
    second.load_state_dict(first.state_dict())
    fill(second, 30)
    assert torch.equal(whole.fields["at"], second.fields["at"])


def test_what_is_drawn_is_prepared_as_the_data_are_and_different_each_step():
    data = tt.load_data("digits", limit=100)
    memory = ReplayBuffer(20)
    rows = torch.arange(20)
    memory.add(image=data.splits["train"].pixels(rows), label=data.splits["train"].labels[rows], task=rows)
    drawn = memory.draw(8, data, augment=None, step=3)
    torch.testing.assert_close(
        drawn["image"], data.loader("train", batch_size=20, shuffle=False).batch(0)["image"][drawn["task"]]
    )
    assert torch.equal(drawn["label"], data.splits["train"].labels[drawn["task"]])
    assert not torch.equal(drawn["task"], memory.draw(8, data, step=4)["task"])
    assert len(memory.draw(50, data)["label"]) == 20


def objective(loss: str, **how) -> tuple[Replay, nn.Module, Batch, Batch]:
    """An objective in its second task with a full memory, a model, a new batch, and what is drawn first."""
    data = tt.load_data("digits", limit=200)
    task = class_incremental(data, tasks=5, seed=0)[1]
    memory = ReplayBuffer(30)
    old = data.splits["train"]
    rows = torch.arange(30)
    memory.add(
        image=old.pixels(rows),
        label=old.labels[rows],
        task=rows * 0,
        **({"logits": torch.randn(30, 10)} if loss == "der++" else {}),
    )
    made = Replay(memory, task=1, loss=loss, seen=(2, 8, 4, 9), **how)
    made.prepare(task.data, Settings(augment="none"), torch.device("cpu"))
    batch = Batch(task.data.loader("train", batch_size=6).batch(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return made, model, batch, memory.draw(6, task.data, augment="none", step=2 * 5)


def test_er_is_the_cross_entropy_of_both():
    made, model, batch, old = objective("er")
    parts = made.losses(model, batch, Context(step=5, epoch=1))
    assert float(parts["new"]) == pytest.approx(float(F.cross_entropy(model(batch["image"]), batch["label"])))
    assert float(parts["old"]) == pytest.approx(float(F.cross_entropy(model(old["image"]), old["label"])))
    assert made._memory.came == 30  # images enter in the first epoch only
    made.losses(model, batch, Context(step=0, epoch=0))
    assert made._memory.came == 36


def test_er_ace_hides_absent_old_classes_from_new_images():
    made, model, batch, _ = objective("er_ace")
    loss = made.losses(model, batch, Context(step=5, epoch=1))["new"]
    loss.backward()
    present = set(batch["label"].tolist())
    hidden = sorted({2, 8, 4, 9} - present)
    assert not model[1].weight.grad[hidden].any() and hidden
    for c in set(range(10)) - set(hidden):  # present ones, and those that did not come yet
        assert model[1].weight.grad[c].any()


def test_der_plus_plus_matches_the_logits_that_were():
    made, model, batch, old = objective("der++", alpha=0.3, beta=0.7)
    parts = made.losses(model, batch, Context(step=5, epoch=1))
    assert float(parts["alike"]) == pytest.approx(0.3 * float(F.mse_loss(model(old["image"]), old["logits"])), rel=1e-5)
    assert set(parts) == {"new", "alike", "old"}


def test_apart_and_together_differ_only_by_batch_norm():
    made, model, batch, _ = objective("er")
    a = made.losses(model, batch, Context(step=5, epoch=1))
    made.together = False
    b = made.losses(model, batch, Context(step=5, epoch=1))
    assert float(a["old"]) == pytest.approx(float(b["old"]), rel=1e-5)


def test_wrong_memories_are_refused():
    with pytest.raises(ValueError, match="the size of the memory must be at least 1 image, got 0"):
        ReplayBuffer(0)
    with pytest.raises(ValueError, match="policy must be one of reservoir, ring, got 'best'"):
        ReplayBuffer(5, policy="best")
    stream = class_incremental(tt.load_data("digits", limit=100), tasks=5)
    with pytest.raises(ValueError, match=r"loss must be one of er, er_ace, der\+\+, got 'mir'"):
        replay(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), stream, loss="mir")
