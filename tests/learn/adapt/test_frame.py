"""The frame around methods: the field's numbers, floor and ceiling, and going on after an interruption."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.learn import checkpoint
from trimtab.learn.adapt import class_incremental, domain_incremental, finetune, joint, replay, task_incremental
from trimtab.learn.adapt.frame import Learner, follow
from trimtab.learn.adapt.metrics import StreamResult

FIT = {"epochs": 8, "batch_size": 32, "lr": 0.1, "augment": "none", "progress": False}


def net(num_classes: int = 10) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, num_classes))


@pytest.fixture(scope="module")
def data():
    return tt.load_data("digits", limit=600)


def test_numbers_of_the_field_are_those_of_its_papers():
    table = [[0.9, 0.2, 0.1], [0.6, 0.8, 0.3], [0.5, 0.4, 0.7]]
    result = StreamResult("m", "domain", nn.Identity(), table, [1, 2, 3], [10, 10, 20], before=[0.1, 0.1, 0.1])
    assert result.average_accuracy == pytest.approx((0.5 + 0.4 + 0.7) / 3)
    assert result.forgetting == pytest.approx(((0.9 - 0.5) + (0.8 - 0.4)) / 2)
    assert result.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.4 - 0.8)) / 2)
    assert result.forward_transfer == pytest.approx(((0.2 - 0.1) + (0.3 - 0.1)) / 2)
    assert result.so_far == pytest.approx([0.9, 0.7, (5 + 4 + 14) / 40])
    assert result.last_accuracy == pytest.approx(23 / 40)
    assert result.incremental_accuracy == pytest.approx((0.9 + 0.7 + 23 / 40) / 3)


def test_forgetting_counts_the_best_that_ever_was():
    table = [[0.5, None, None], [0.7, 0.6, None], [0.4, 0.6, 0.9]]
    result = StreamResult("m", "class", nn.Identity(), table, [1, 2, 3], [5, 5, 5])
    assert result.forgetting == pytest.approx(((0.7 - 0.4) + 0.0) / 2)
    assert result.backward_transfer == pytest.approx(((0.4 - 0.5) + 0.0) / 2)
    assert result.forward_transfer is None
    one = StreamResult("joint", "class", nn.Identity(), [[0.5, 0.5, 0.5]], [3], [5, 5, 5])
    assert one.forgetting is one.backward_transfer is one.incremental_accuracy is None and one.last_accuracy == 0.5


def test_fine_tuning_forgets_replay_forgets_less_and_joint_is_the_ceiling(data):
    stream = class_incremental(data, tasks=5, seed=0)
    floor = finetune(net(), stream, **FIT)
    kept = replay(net(), stream, buffer=100, **FIT)
    ceiling = joint(net(), stream, **FIT | {"epochs": 20})
    assert floor.last_accuracy < 0.35 and floor.forgetting > 0.7
    assert floor.last_accuracy + 0.2 < kept.last_accuracy < ceiling.last_accuracy + 0.02
    assert [row.count(None) for row in floor.accuracy] == [4, 3, 2, 1, 0] and len(ceiling.accuracy) == 1
    whole = tt.evaluate(kept.model, data, "test")["accuracy"]
    assert whole == pytest.approx(kept.last_accuracy)


def test_told_the_task_images_have_fewer_classes_to_choose_from(data):
    by_class, by_task = (make(data, tasks=5, seed=0) for make in (class_incremental, task_incremental))
    a, b = finetune(net(), by_class, **FIT), finetune(net(), by_task, **FIT)
    assert b.last_accuracy > a.last_accuracy + 0.3
    assert b.before is not None and b.forward_transfer is not None and None not in b.accuracy[0]


def test_a_stream_of_domains_is_measured_everywhere(data):
    stream = domain_incremental(data, tasks=3, shift="permute")
    result = finetune(net(), stream, **FIT)
    assert all(None not in row for row in result.accuracy) and result.backward_transfer < 0
    assert result.accuracy[0][0] > 0.7 > result.accuracy[0][1]


class Stop(Exception):
    pass


def run(stream, out, stop_after: int | None = None, **how):
    """Replay, killed in the training of a task if wanted."""
    steps = iter(range(10**6))

    def count(row):
        if stop_after is not None and next(steps) == stop_after:
            raise Stop

    return replay(net(), stream, buffer=40, loss="der++", out=out, checkpoint_every=0, on_epoch=count, **FIT, **how)


@pytest.mark.parametrize("stop_after", [3, 16, 27])
def test_a_killed_run_goes_on_to_the_same_bits(data, tmp_path, stop_after):
    stream = class_incremental(data, tasks=5, seed=1)
    whole = run(stream, None)
    with pytest.raises(Stop):
        run(stream, tmp_path, stop_after)
    resumed = run(stream, tmp_path)
    assert resumed.accuracy == whole.accuracy
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values())
    )
    assert [p.name for p in tmp_path.iterdir()] == ["stream.safetensors"]
    calls = pytest.MonkeyPatch()
    calls.setattr("trimtab.learn.adapt.frame.fit", lambda *a, **k: pytest.fail("trained again"))
    assert run(stream, tmp_path).accuracy == whole.accuracy
    calls.undo()


def test_another_run_s_state_is_refused(data, tmp_path):
    stream = class_incremental(data, tasks=5)
    finetune(net(), stream, out=tmp_path, **FIT | {"epochs": 1})
    with pytest.raises(ValueError, match=r"belongs to another run \(training differ\); give another out"):
        finetune(net(), stream, out=tmp_path, **FIT | {"epochs": 2})
    with pytest.raises(ValueError, match=r"\(stream, samples differ\)"):
        finetune(net(), class_incremental(data, tasks=5, seed=3), out=tmp_path, **FIT | {"epochs": 1})
    finetune(net(), class_incremental(data, tasks=5, seed=3), out=tmp_path, resume=False, **FIT | {"epochs": 1})
    assert checkpoint.read(tmp_path / "stream.safetensors")["learned"] == 5


def test_a_model_with_too_few_classes_is_refused(data):
    model = tt.create_model("trim_1k", num_classes=5, in_chans=1, img_size=8)
    with pytest.raises(ValueError, match="the model must have 10 classes, those of the whole stream, got 5"):
        finetune(model, class_incremental(data, tasks=5))

    class Idle(Learner):
        def learn(self, task):
            pass

    with pytest.raises(ValueError, match="must give a logit for each of the 10 classes, got 4"):
        follow("idle", Idle(net(4), class_incremental(data, tasks=5)))
