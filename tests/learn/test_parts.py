"""The small parts that methods share."""

from __future__ import annotations

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.learn.toy import Toy, net, same, weights
from trimtab.core.errors import DataError
from trimtab.learn import (
    Batch,
    Context,
    Frozen,
    Mixup,
    Schedule,
    bn_frozen,
    bn_recalibrate,
    convert,
    evaluate,
    kl,
    logits,
    make_optimizer,
    param_groups,
    snapshot,
    soft_ce,
    stages,
    taps,
)
from trimtab.learn.evaluate import Tally, predictions

DATA = Toy()


# -- losses ---------------------------------------------------------------------------------------------------------


def test_soft_ce_with_one_hot_targets_is_cross_entropy():
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    hot = F.one_hot(y, 4).float()
    for smoothing in (0.0, 0.2):
        expected = F.cross_entropy(x, y, label_smoothing=smoothing)
        assert torch.allclose(soft_ce(x, y, smoothing=smoothing), expected)
        assert torch.allclose(soft_ce(x, hot, smoothing=smoothing), expected)
    assert soft_ce(x, hot, reduction="none").shape == (6,)
    with pytest.raises(ValueError, match="must have 4 classes, got 3"):
        soft_ce(x, hot[:, :3])
    with pytest.raises(ValueError, match=r"\(B,\) or \(B, K\)"):
        soft_ce(x, y[:5])


def test_kl_is_teacher_first_and_reductions_are_what_they_say():
    s, t, T = torch.randn(5, 7), torch.randn(5, 7), 3.0
    p, q = (t / T).softmax(1), (s / T).softmax(1)
    rows = (p * (p.log() - q.log())).sum(1)
    assert torch.allclose(kl(s, t, T, reduction="none"), rows, atol=1e-6)
    assert torch.allclose(kl(s, t, T, reduction="batchmean"), rows.mean(), atol=1e-6)
    assert torch.allclose(kl(s, t, T, reduction="mean"), rows.sum() / 35, atol=1e-6)
    t.requires_grad_()
    kl(s.requires_grad_(), t).backward()
    assert t.grad is None and s.grad is not None
    with pytest.raises(ValueError, match="reduction must be"):
        kl(s, t, reduction="avg")
    with pytest.raises(ValueError, match="T must be positive, got 0"):
        kl(s, t, 0)


# -- schedules and optimizers ---------------------------------------------------------------------------------------


def test_schedules_at_their_corners():
    one = Schedule("onecycle", 1.0, 0.0, warmup=0.25, first=0.1)
    assert [one(p) for p in (0.0, 0.25, 1.0)] == pytest.approx([0.1, 1.0, 0.0])
    assert one(0.625) == pytest.approx(0.5)
    assert Schedule("cosine", 2.0, 1.0)(0.5) == pytest.approx(1.5)
    falling = Schedule("exponential", 1.0, 0.01, least=0.05)
    assert falling(0.25) == pytest.approx(0.01**0.25) and falling(0.9) == falling(1.0) == 0.05
    assert Schedule("constant", 3.0)(0.7) == 3.0 and Schedule("linear", 1.0, 3.0)(0.5) == 2.0
    assert one(-1) == one(0) and one(2) == one(1)
    with pytest.raises(ValueError, match="warmup must be in"):
        Schedule(warmup=1.0)
    with pytest.raises(ValueError, match="an exponential needs a start and an end above 0"):
        Schedule("exponential")


def test_timm_schedules_follow_progress():
    from trimtab.learn.schedule import timm_schedule

    cosine = timm_schedule("cosine", end=0.0)
    assert [cosine(p) for p in (0.0, 0.5, 0.25)] == pytest.approx(
        [1.0, 0.5, 0.5 * (1 + math.cos(math.pi / 4))], abs=1e-3
    )
    step = timm_schedule("step", warmup=0.1)
    assert step(0.05) == pytest.approx(0.5, abs=0.02) and step(0.2) == 1.0 and step(0.9) < step(0.5) < 1.0


def test_biases_and_one_dimensional_tensors_do_not_decay():
    model = net()
    model.register_parameter("token", nn.Parameter(torch.zeros(1, 1, 8)))
    model.no_weight_decay = lambda: {"token"}
    groups = param_groups(model, lr=0.1, weight_decay=0.05)
    decay = {id(p) for g in groups if g["weight_decay"] == 0.05 for p in g["params"]}
    rest = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    named = dict(model.named_parameters())
    assert decay == {id(named[n]) for n in ("0.weight", "3.weight", "9.weight")}
    assert decay | rest == {id(p) for p in model.parameters()} and not decay & rest


def test_frozen_and_shared_parameters_are_not_optimised_twice_or_at_all():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    seen = [p for g in param_groups([model, model], lr=1.0) for p in g["params"]]
    assert len(seen) == 2 and not any(p is model[0].bias for p in seen)
    only = param_groups(model, lr=1.0, only=lambda name, p: name == "1.bias")
    assert [p is model[1].bias for g in only for p in g["params"]] == [True]


def test_layer_decay_shrinks_towards_the_input():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=3)
    groups = param_groups(model, lr=1.0, layer_decay=0.5)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    named = {n: rate[id(p)] for n, p in model.named_parameters()}
    assert named["head.weight"] == 1.0
    assert named["blocks.2.mlp.fc1.weight"] > named["blocks.0.mlp.fc1.weight"] > named["patch_embed.proj.weight"]


def test_optimizers_come_by_name_or_as_a_function():
    groups = param_groups(net(), lr=0.1, weight_decay=0.01)
    sgd = make_optimizer(groups, "sgd", momentum=0.8)
    assert sgd.defaults["nesterov"] and sgd.param_groups[0]["momentum"] == 0.8
    assert {g["weight_decay"] for g in sgd.param_groups} == {0.01, 0.0}
    assert isinstance(make_optimizer(groups, lambda g: torch.optim.Rprop(g)), torch.optim.Rprop)


# -- looking at, freezing and swapping modules ----------------------------------------------------------------------


def test_frozen_stays_in_eval_and_belongs_to_nobody():
    teacher, student = net(dropout=0.5), net()
    before = weights(teacher)
    student.teacher = Frozen(teacher)
    student.train()
    x = DATA.splits["train"].images[:8]
    out = student.teacher(x)
    assert not out.requires_grad and not teacher.training
    assert torch.equal(out, student.teacher(x)) and same(before, weights(teacher))
    assert not any(n.startswith("teacher") for n in student.state_dict())
    assert all(p.requires_grad for p in teacher.parameters())
    assert deepcopy(student).teacher.module is teacher


def test_gradients_flow_through_a_frozen_module_but_not_into_it():
    first, frozen = nn.Linear(4, 4), nn.Linear(4, 4)
    Frozen(frozen, through=True)(first(torch.ones(1, 4))).sum().backward()
    assert first.weight.grad is not None and frozen.weight.grad is None and frozen.weight.requires_grad


def test_cached_outputs_are_looked_up_by_index():
    calls = []

    class Counting(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return 2 * x

    frozen, x = Frozen(Counting(), cache=True), torch.arange(6.0).reshape(6, 1)
    frozen(x[:4], index=torch.arange(4))
    again = frozen(x[[3, 1]], index=torch.tensor([3, 1]))
    assert torch.equal(again, 2 * x[[3, 1]]) and calls == [4]
    frozen(x[2:], index=torch.arange(2, 6))
    assert calls == [4, 4]


def test_snapshot_does_not_follow_the_model():
    model = net()
    kept = snapshot(model)
    x = DATA.splits["train"].images[:4]
    before = kept(x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert torch.equal(kept(x), before)


def test_taps_collect_and_let_go():
    model, x = net(), DATA.splits["train"].images[:2]
    with taps(model, ["0", "7"]) as seen, taps(model, ["9"], inputs=True) as given:
        out = model.eval()(x)
    assert torch.equal(seen["0"], model[0](x)) and torch.equal(model[9](given["9"]), out)
    assert torch.equal(seen["7"], given["9"])
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="submodules of the model, got 'head'"), taps(model, ["head"]):
        pass


def test_convert_is_undone_and_prefers_the_exact_type():
    shared = nn.ReLU6()
    model = nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), shared), "b": nn.Sequential(shared)}).eval()
    kept = dict(model.named_modules())
    undo = convert(
        model, {nn.Hardtanh: lambda m: nn.Tanh(), nn.ReLU: lambda m: nn.GELU(), nn.ReLU6: lambda m: nn.SiLU()}
    )
    assert type(model["a"][0]) is nn.GELU and type(model["a"][1]) is nn.SiLU and model["a"][1] is model["b"][0]
    assert not model["a"][0].training
    assert undo() is model and dict(model.named_modules()) == kept
    with pytest.raises(ValueError, match="the model itself is a Linear"):
        convert(nn.Linear(1, 1), {nn.Linear: lambda m: m})


# -- batch normalisation --------------------------------------------------------------------------------------------


def test_bn_frozen_leaves_statistics_and_uses_batch_statistics():
    model, x = net().train(), DATA.splits["train"].images[:32]
    before = weights(model)
    free = deepcopy(model)(x)
    with bn_frozen(model):
        out = model(x)
    assert torch.equal(out, free) and same(before, weights(model))
    assert model[1].momentum == 0.1


def test_bn_recalibrate_gives_the_mean_of_batch_statistics():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5))
    model.register_parameter("p", nn.Parameter(torch.zeros(1)))
    model.train()
    images = [3 * torch.randn(16, 1, 4, 4) + 2 for _ in range(5)]
    bn_recalibrate(model, [{"image": x} for x in images], limit=4)
    mean = torch.stack([x.mean() for x in images[:4]]).mean()
    var = torch.stack([x.var() for x in images[:4]]).mean()
    assert torch.allclose(model[0].running_mean, mean) and torch.allclose(model[0].running_var, var)
    assert model.training and model[0].momentum == 0.1
    with pytest.raises(ValueError, match="at least one batch"):
        bn_recalibrate(model, [])


# -- mixing ---------------------------------------------------------------------------------------------------------


def batch_of(n: int = 8) -> Batch:
    label = torch.arange(n) % 3
    image = torch.arange(n, dtype=torch.float32).reshape(n, 1, 1, 1).expand(n, 1, 8, 8).contiguous()
    return Batch(image=image, label=label)


@pytest.mark.parametrize("options", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}])
def test_labels_are_mixed_as_the_pixels_are(options):
    """Image i is constant i, so its mean says how much of each partner it has."""
    mixer, model, ctx = Mixup(3, **options), nn.Identity(), Context(rng=np.random.default_rng(1))
    for _ in range(30):
        mixed, given = mixer(batch_of(), model, ctx), batch_of()
        lam = (mixed.image.mean((1, 2, 3))[0] - 7) / (0 - 7)  # image 0 with image 7
        expected = lam * F.one_hot(given.label, 3) + (1 - lam) * F.one_hot(given.label.flip(0), 3)
        assert torch.allclose(mixed.label, expected, atol=1e-5)
        assert torch.allclose(mixed.label.sum(1), torch.ones(8), atol=1e-6)


def test_mixup_of_no_batch_leaves_the_image_alone():
    mixed = Mixup(3, mixup=1.0, prob=0.0)(batch_of(), nn.Identity(), Context())
    assert torch.equal(mixed.image, batch_of().image)
    assert torch.equal(mixed.label, F.one_hot(batch_of().label, 3).float())


# -- stages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, n", [("resnet18", 5), ("vit_tiny_patch16_224", 4), ("convnext_atto", None),
                                     ("mobilenetv3_small_050", 6)])  # fmt: skip
def test_stages_partition_real_networks(name, n):
    import timm

    size = {"img_size": 64} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=5, **size).eval()
    parts = stages(model, n)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(parts.run(x), model(x))
        assert torch.equal(parts.run(parts.run(x, 0, 2), 2), model(x))
    owned = [id(p) for part in parts for p in part.parameters()]
    assert len(owned) == len(set(owned)) and set(owned) == {id(p) for p in model.parameters()}
    assert len(parts) == n or (n is None and len(parts) > 4)
    names = {id(p): k for k, p in model.named_parameters()}
    assert any(names[id(p)].startswith(("head", "fc", "classifier")) for p in parts[len(parts) - 1].parameters())


def test_training_a_stage_trains_the_model_and_only_there():
    model = net()
    parts = stages(model, 3)
    before = weights(model)
    x = DATA.splits["train"].images[:16]
    hidden = parts.run(x, 0, 1).detach()
    parts.run(hidden, 1, 2).square().mean().backward()
    graded = {n for n, p in model.named_parameters() if p.grad is not None}
    assert graded == {n for n, p in model.named_parameters() if any(p is q for q in parts[1].parameters())}
    assert before.keys() == weights(model).keys()


def test_stages_say_no():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 3)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else -self.a(x)

    with pytest.raises(ValueError, match=r"give it a method stages\(\)"):
        stages(Branching())
    with pytest.raises(ValueError, match="n must be between 1 and 5"):
        stages(net(), 9)


# -- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluate_counts_right_and_restores_the_mode():
    import torchmetrics

    model = net().train()
    model[1].eval()
    before = weights(model)
    metric = torchmetrics.classification.MulticlassRecall(num_classes=3, average="none")
    seen = evaluate(model, DATA, "val", batch_size=10, metrics={"recall": metric})
    out, labels = logits(model, DATA, "val", batch_size=7)
    assert seen["n"] == 48 and out.shape == (48, 3) and torch.equal(labels, DATA.splits["val"].labels)
    assert seen["accuracy"] == pytest.approx(float((out.argmax(1) == labels).float().mean()))
    assert seen["loss"] == pytest.approx(float(F.cross_entropy(out, labels)), rel=1e-5)
    hits = [float((out.argmax(1)[labels == c] == c).float().mean()) for c in range(3)]
    assert seen["recall"] == pytest.approx(hits)
    assert model.training and not model[1].training and model[2].training and same(before, weights(model))
    tally = Tally()
    for given, batch in predictions(model, DATA, "val", batch_size=10):
        tally.update(given, batch["label"])
    assert tally.compute() == pytest.approx({"accuracy": seen["accuracy"], "loss": seen["loss"]}, rel=1e-6)


def test_evaluate_names_the_splits_there_are():
    with pytest.raises(DataError, match="one of train, val, test, got 'dev'"):
        evaluate(net(), DATA, "dev")
