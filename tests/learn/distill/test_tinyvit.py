"""TinyViT: exact counts, records, views that can be made again, and students that do not need the teacher."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch import nn

import trimtab as tt
from trimtab import testing
from trimtab.core.errors import ArtifactError, DataError
from trimtab.core.meta import shapes_only
from trimtab.learn import KD, FastDistill, Mixup, methods
from trimtab.learn.distill.tinyvit import LabelStore, dense, mix_pairs, record, save_labels, sparse

GIB = 2**30
AUGMENTS = ("none", "crop_flip", "rrc=0.35+flip", "randaugment", "trivial+cutout")


@pytest.fixture(scope="module")
def data():
    return tt.load_data("shapes:classes=3,size=16,n=110")


def net(classes: int = 3, seed: int = 0, *, sure: float = 1.0, chans: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(chans, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes)
        )
        model[-1].weight.data *= sure
    return model


class NeverCalled(nn.Module):
    def forward(self, x):
        raise AssertionError("the teacher was run")


def make(path, data, teacher=None, **options):
    return save_labels(path, teacher or net(sure=20), data, **{"epochs": 2, "progress": False, **options})


def batches(views, epoch=0, batch_size=12):
    return list(views.loader("train", epoch=epoch, batch_size=batch_size))


# -- the models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "with_22k", "macs"),
    [
        ("tiny_vit_5m_224", 5_392_764, 12_082_725, 1.255e9),
        ("tiny_vit_11m_224", 10_996_972, 20_354_581, 2.016e9),
        ("tiny_vit_21m_224", 21_198_568, 33_223_825, 4.250e9),
        ("tiny_vit_21m_384", 21_230_488, None, 13.698e9),
        ("tiny_vit_21m_512", 21_268_120, None, 26.884e9),
    ],
)
def test_parameters_and_macs_are_those_of_the_authors(name, params, with_22k, macs):
    with shapes_only():
        model = timm.create_model(name, num_classes=1000)
        size = model.pretrained_cfg["input_size"]
    cost = tt.measure(model, size, what=("params", "macs"))
    assert cost.params == params
    assert abs(cost.macs / macs - 1) < 5e-4
    if with_22k:
        width = model.num_features
        assert params + 20_841 * (width + 1) == with_22k


def test_every_smaller_model_is_a_contraction_of_the_next_larger():
    """No factor grows from 21M to 11M to 5M: widths, blocks, windows, expansions."""

    def factors(name):
        with shapes_only():
            model = timm.create_model(name)
        blocks = [b for stage in model.stages for b in stage.blocks]
        return (
            [info["num_chs"] for info in model.feature_info],
            [len(stage.blocks) for stage in model.stages],
            [getattr(b, "window_size", 0) for b in blocks],
            [b.conv1.conv.out_channels / b.conv1.conv.in_channels for b in model.stages[0].blocks],
            [b.mlp_ratio for b in blocks if hasattr(b, "mlp_ratio")],
        )

    large, middle, small = (factors(f"tiny_vit_{size}_224") for size in ("21m", "11m", "5m"))
    for before, after in ((large, middle), (middle, small)):
        for a, b in zip(before, after, strict=True):
            assert len(a) == len(b) and all(x >= y for x, y in zip(a, b, strict=True))
    assert small[0] == [64, 128, 160, 320] and middle[0] == [64, 128, 256, 448] and large[0] == [96, 192, 384, 576]


def test_stage_shapes():
    with shapes_only():
        model = timm.create_model("tiny_vit_5m_224").eval()
        x, shapes = model.patch_embed(torch.zeros(1, 3, 224, 224)), []
        for stage in model.stages:
            x = stage(x)
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 56, 56), (128, 28, 28), (160, 14, 14), (320, 7, 7)]


@pytest.fixture(scope="module")
def small_model():
    return timm.create_model(
        "tiny_vit_5m_224", embed_dims=(8, 16, 16, 16), depths=(2, 1, 1, 1), num_heads=(1, 1, 1, 1), num_classes=3
    ).eval()


def test_mbconv_starts_as_gelu(small_model):
    x = torch.randn(2, 8, 6, 6)
    for block in small_model.stages[0].blocks:
        assert torch.allclose(block(x.clone()), nn.functional.gelu(x), atol=1e-6)


def test_with_an_identity_as_local_convolution_a_block_is_a_plain_window_block(small_model):
    block = small_model.stages[1].blocks[0]
    delta = torch.zeros_like(block.local_conv.conv.weight)
    delta[:, 0, 1, 1] = (1 + block.local_conv.bn.eps) ** 0.5  # undone by the norm, whose statistics are 0 and 1
    block.local_conv.conv.weight.data = delta
    x = torch.randn(2, 14, 14, 16)
    with torch.no_grad():
        windows = x.view(2, 2, 7, 2, 7, 16).transpose(2, 3).reshape(8, 49, 16)
        attended = block.attn(windows).view(2, 2, 2, 7, 7, 16).transpose(2, 3).reshape(2, 14, 14, 16)
        y = x + attended
        assert torch.allclose(block(x), y + block.mlp(y), atol=1e-5)


# -- records ----------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_paper():
    assert record(10).itemsize == 44 and record(100).itemsize == 404
    assert round(1_281_167 * 300 * record(10).itemsize / GIB, 2) == 15.75
    assert round(14_197_122 * 90 * record(100).itemsize / GIB, 2) == 480.76
    assert round(21_841 * 2 / 404) == 108


def test_a_store_on_disk_has_these_bytes(tmp_path, data):
    store = make(tmp_path, data, topk=2, epochs=3)
    n = len(data.splits["train"])
    assert sum(f.stat().st_size for f in tmp_path.glob("*.bin")) == store.records.nbytes == 3 * n * (4 + 4 * 2)
    assert len(list(tmp_path.iterdir())) == 3  # one shard, its note, labels.json


@pytest.mark.parametrize("k", [1, 3, 10, 20])
def test_rebuilt_labels_are_probabilities_with_the_same_winner(k):
    logits = 4 * torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    rows = sparse(logits, torch.arange(64), k)
    assert (np.diff(rows["values"].astype(np.float32), axis=1) <= 0).all()
    p = dense(torch.from_numpy(rows["classes"]), torch.from_numpy(rows["values"]), 20)
    assert torch.allclose(p.sum(1), torch.ones(64), atol=1e-3) and (p >= 0).all()
    assert (p.argmax(1) == logits.argmax(1)).all()
    if k == 20:
        assert torch.allclose(p, logits.softmax(1), rtol=2**-11, atol=1e-7)
    kept = torch.zeros(64, 20, dtype=torch.bool).scatter(1, torch.from_numpy(rows["classes"]).long(), True)
    assert all(len(p[i][~kept[i]].unique()) <= 1 for i in range(64))  # the rest is shared evenly


def test_one_label_is_adaptive_smoothing():
    p = dense(torch.tensor([[2]]), torch.tensor([[0.7]]), 4)
    assert torch.allclose(p, torch.tensor([[0.1, 0.1, 0.7, 0.1]]))


def test_a_sum_above_one_leaves_nothing():
    p = dense(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.4005]], dtype=torch.float16), 4)
    assert p[0, 2:].tolist() == [0.0, 0.0]


# -- views ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", AUGMENTS)
def test_a_seed_gives_the_same_picture_whatever_stands_beside_it(tmp_path, data, augment):
    views = make(tmp_path, data, augment=augment, epochs=1).views(data, augment)
    images, seeds = data.splits["train"].images[:24], torch.arange(1000, 1024)
    together = views.pictures(images, seeds)
    assert torch.equal(together, views.pictures(images, seeds))
    turn = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(views.pictures(images[turn], seeds[turn]), together[turn])
    alone = torch.cat([views.pictures(images[i : i + 1], seeds[i : i + 1]) for i in range(24)])
    assert torch.equal(alone, together)
    assert views.pictures(images[:0], seeds[:0]).shape == images[:0].shape
    other = views.pictures(images, seeds + 1)
    assert augment == "none" or (other != together).flatten(1).any(1).float().mean() > 0.5


@pytest.mark.parametrize("options", [{}, {"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}], ids=str)
@pytest.mark.parametrize("augment", ["crop_flip", "randaugment"])
def test_stored_labels_are_what_the_teacher_says_of_the_pictures_in_the_batch(tmp_path, data, options, augment):
    teacher = net(sure=20)
    views = make(tmp_path, data, teacher, augment=augment, **options).views(data, augment)
    seen = []
    for epoch in range(3):
        for batch in batches(views, epoch):
            with torch.no_grad():
                assert torch.allclose(batch.soft, teacher(batch.image).softmax(1), atol=1e-3)
        seen.append(torch.cat([b.image[b.index.argsort()] for b in batches(views, epoch)[:1]]))
    assert not torch.equal(seen[0], seen[1])  # another epoch, other views


def test_after_its_last_epoch_a_store_starts_again(tmp_path, data):
    views = make(tmp_path, data, epochs=2).views(data)

    def pictures(epoch):
        found = batches(views, epoch, batch_size=500)[0]
        return found.image[found.index.argsort()]

    assert torch.equal(pictures(0), pictures(2)) and not torch.equal(pictures(0), pictures(1))


def test_the_order_of_a_pair_does_not_matter():
    x, seeds = torch.rand(8, 3, 16, 16), torch.tensor([3, 9, 2**31 - 1, 0, 5, 6, 7, 8])
    swap = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    for mixup in (Mixup(1, mixup=0.8), Mixup(1, cutmix=1.0), Mixup(1, mixup=0.8, cutmix=1.0)):
        mixed = mix_pairs(x, seeds, mixup)
        assert torch.equal(mix_pairs(x[swap], seeds[swap], mixup)[swap], mixed)
        assert torch.allclose(mixed + mixed[swap], x + x[swap], atol=1e-6)  # what one lost the other has
        assert not torch.equal(mix_pairs(x, seeds + torch.tensor([1, 0] * 4), mixup), mixed)


def test_pairs_stay_together_and_differ_from_epoch_to_epoch(tmp_path, data):
    views = make(tmp_path, data.subset({"train": 41}), cutmix=1.0).views(data.subset({"train": 41}))
    pairs = []
    for epoch in range(2):
        index = torch.cat([b.index for b in batches(views, epoch, batch_size=4)])
        assert len(index.unique()) == len(index) == 40
        pairs.append({frozenset(p) for p in index.view(-1, 2).tolist()})
    assert pairs[0] != pairs[1]
    assert pairs[0] == {frozenset(p) for p in views.plan.order(0).view(-1, 2).tolist()}
    with pytest.raises(ValueError, match="batch_size must be a multiple of 2 to keep pairs, got 5"):
        views.loader("train", batch_size=5)


# -- making a store ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


class DiesAfter(nn.Module):
    """A teacher that computes as another, some times."""

    def __init__(self, inner, calls):
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, x):
        self.calls -= 1
        if self.calls < 0:
            raise Killed
        return self.inner(x)


def table(path):
    return b"".join(f.read_bytes() for f in sorted(path.glob("*.bin")))


def test_interrupted_making_ends_with_the_same_bytes(tmp_path, data):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make(whole, data, DiesAfter(net(sure=20), 10**6), batch_size=8)
    for calls in (4, 6, 10**6):
        teacher = DiesAfter(net(sure=20), calls)
        if calls < 10:
            with pytest.raises(Killed):
                make(parts, data, teacher, batch_size=8)
            with pytest.raises(ArtifactError, match="finish making it"):
                LabelStore(parts).records.verify()
        else:
            make(parts, data, teacher, batch_size=8)
    assert table(parts) == table(whole)


def test_shards_made_apart_are_the_whole(tmp_path, data):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make(whole, data, mixup=0.5)
    for only in (2, 0, 1):
        store = make(parts, data, mixup=0.5, shards=3, only=only)
        assert store.records.complete == (only == 1)
    assert table(parts) == table(whole)


def test_a_finished_store_does_not_run_the_teacher_again(tmp_path, data):
    make(tmp_path, data, DiesAfter(net(sure=20), 10**6))
    before = table(tmp_path)
    make(tmp_path, data, DiesAfter(net(sure=20), 1))  # once, to see how many classes it has
    assert table(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"topk": 4}, "topk must be 1 to 3, the number of classes, got 4"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"shards": 2, "only": 2}, "only must be one of the 2 shards, got 2"),
        ({"mixup": 1.0, "batch_size": 7}, "batch_size must be even to keep pairs, got 7"),
        ({"augment": lambda x, g: x}, "augment must be words here, since functions see whole batches"),
        ({"teacher": net(2**15 + 1)}, r"at most 32768 classes, got \(1, 32769\)"),
        ({"teacher": nn.Conv2d(3, 3, 1)}, r"teacher must give logits \(B, C\).*got \(1, 3, 16, 16\)"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, data, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "new", data, **options)
    assert not (tmp_path / "new").exists()


def test_int16_holds_every_class_that_is_let_in(tmp_path, data):
    store = make(tmp_path, data.subset({"train": 8}), net(2**15, sure=0.0), epochs=1, topk=2)
    assert store.records.read(np.arange(8))["classes"].min() >= 0


# -- students ---------------------------------------------------------------------------------------------------------


def fit(model, data, objective, **options):
    settings = {"epochs": 3, "batch_size": 20, "lr": 0.05, "progress": False, "val": None, "device": "cpu"}
    return tt.fit(model, data, objective, **settings | options)


def distance(a, b):
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_student_of_the_store_is_a_student_of_the_teacher(tmp_path, data):
    teacher = net(seed=1, sure=20)
    views = make(tmp_path, data, teacher, epochs=3).views(data)
    stored, live, other = net(seed=2), net(seed=2), net(seed=2)
    fit(stored, data, FastDistill(tmp_path))
    fit(live, views, KD(teacher, T=1.0, alpha=1.0))  # the same views, the teacher run on every batch
    fit(other, views, FastDistill(make(tmp_path / "other", data, net(seed=5, sure=20), epochs=3).path))
    assert distance(stored, live) < 1e-4 < 0.05 < distance(stored, other)


def test_the_store_is_made_on_the_way_and_then_stands_for_the_teacher(tmp_path, data):
    teacher = net(seed=1, sure=20)
    first, second = net(seed=2), net(seed=2)
    fit(first, data, FastDistill(tmp_path / "store", teacher, topk=2))
    fit(second, data, FastDistill(tmp_path / "store"))
    assert distance(first, second) == 0.0
    third = fit(net(seed=2), data, methods.make("tinyvit", store=str(tmp_path / "store")), val="val", batch_size=15)
    assert third.best is not None  # the validation split is looked at as ever


def test_a_student_may_have_another_batch_size_and_order(tmp_path, data):
    make(tmp_path, data, mixup=0.8, epochs=2)
    for options in ({"batch_size": 8, "seed": 5}, {"batch_size": 30, "epochs": 5}):
        assert fit(net(), data, FastDistill(tmp_path, mixup=0.8), **options).stopped == "done"


def changed(data):
    other = data.subset({"train": len(data.splits["train"])})
    other.splits["train"] = data.splits["train"].take(torch.arange(len(data.splits["train"])))
    other.splits["train"].images = 255 - other.splits["train"].images
    return other


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: {"data": d.subset({"train": 50})}, DataError, r"was made with data '\d+ images .*not '50 images"),
        (lambda d: {"data": changed(d)}, DataError, "was made with data"),
        (lambda d: {"augment": "randaugment"}, ValueError, "was made with augment 'crop_flip', not 'randaugment'"),
        (lambda d: {"teacher": net(seed=7)}, ValueError, r"was made with teacher 'Sequential \w+', not 'Sequential"),
        (lambda d: {"teacher": net(sure=20), "topk": 2}, ValueError, "was made with topk 3, not 2"),
        (lambda d: {"teacher": net(sure=20), "views_seed": 1}, ValueError, "was made with seed 0, not 1"),
        (lambda d: {"teacher": net(sure=20), "epochs": 4}, ValueError, "was made with epochs 2, not 4"),
        (lambda d: {"mixer": Mixup(3, mixup=1.0)}, ValueError, "fit must not mix what the labels were made for"),
        (lambda d: {"fit_mixup": 0.8}, ValueError, "fit must not mix what the labels were made for"),
        (lambda d: {"model": net(4)}, ValueError, "the student must give 3 logits, as the teacher did"),
    ],
)
def test_a_store_that_does_not_fit_is_refused(tmp_path, data, change, error, message):
    make(tmp_path, data)
    given = {"data": data, "model": net(), "teacher": None, **change(data)}
    training = {k: given.pop(k) for k in ("augment", "mixer") if k in given}
    training |= {"mixup": given.pop("fit_mixup")} if "fit_mixup" in given else {}
    model, used = given.pop("model"), given.pop("data")
    if given["teacher"] is not None:
        given.setdefault("epochs", 2)
    with pytest.raises(error, match=message):
        fit(model, used, FastDistill(tmp_path, **given), **training)


def test_views_that_can_no_longer_be_made_are_noticed(tmp_path, data):
    store = make(tmp_path, data)
    plan = store.plan.model_copy(update={"torch": "1.0", "probes": [p + 0.01 for p in store.plan.probes]})
    (tmp_path / "labels.json").write_text(plan.model_dump_json())
    with pytest.raises(ArtifactError, match=r"can no longer be made from their seeds \(its labels .* torch 1.0"):
        fit(net(), data, FastDistill(tmp_path))


def test_a_folder_that_is_no_store_or_damaged_is_refused(tmp_path, data):
    with pytest.raises(ArtifactError, match=r"has no labels.json, so it is no store of labels; give a teacher"):
        fit(net(), data, FastDistill(tmp_path))
    make(tmp_path, data)
    file = next(tmp_path.glob("*.bin"))
    raw = bytearray(file.read_bytes())
    raw[100] ^= 4
    file.write_bytes(raw)
    with pytest.raises(ArtifactError, match="damaged"):
        fit(net(), data, FastDistill(tmp_path))
    manifest = tmp_path / "labels.json"
    for wrong in ('{"topk": 3}', manifest.read_text().replace('"epochs": 2', '"epochs": -2'), "not JSON"):
        manifest.write_text(wrong)
        with pytest.raises(ArtifactError, match=r"labels.json cannot be read: \w+: "):
            LabelStore(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": 3}, "teacher must be an nn.Module or Frozen, got int"),
        ({"mixup": -1.0}, "mixup must be at least 0, got -1.0"),
        ({"topk": 0}, "topk must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FastDistill("labels", **options)


def test_a_time_limit_alone_does_not_say_how_many_epochs_to_store(tmp_path, data):
    with pytest.raises(ValueError, match="epochs must be given to the objective"):
        fit(net(), data, FastDistill(tmp_path, net()), epochs=None, time_limit=5)


def toy_teacher() -> nn.Module:
    teacher = testing.toy_net()
    list(teacher.parameters())[-2].data *= 30  # sure of what it says, so that there is something to learn
    return teacher


def taught(path: str) -> FastDistill:
    return FastDistill(path, toy_teacher(), epochs=2)


@pytest.mark.parametrize(("name", "check"), testing.objective_checks())
def test_battery(tmp_path, name, check):
    check(testing.ObjectiveCase(partial(taught, str(tmp_path))))


def test_from_the_command_line(tmp_path, monkeypatch):
    from trimtab import cli

    monkeypatch.chdir(tmp_path)
    common = ["train", "shapes:classes=3,size=16,n=60", "--model", "resnet20_cifar", "--epochs", "1", "--quiet"]
    assert cli.main([*common, "--out", "big"]) == 0
    stored = [*common, "--objective", "tinyvit", "--set", "store=labels"]
    assert cli.main([*stored, "--teacher", "big", "--set", "topk=2", "--out", "first"]) == 0
    assert (tmp_path / "labels/labels.json").exists()
    assert cli.main([*stored, "--out", "second"]) == 0  # the store stands for the teacher
    assert distance(tt.load("first"), tt.load("second")) == 0.0
    assert cli.main([*stored, "--set", "store=nowhere", "--out", "third"]) != 0


def test_from_a_recipe(tmp_path):
    from trimtab.compact.recipe import run

    file = tmp_path / "recipe.yaml"
    file.write_text(f"""
data: "shapes:classes=3,size=16,n=60"
model: {{name: trim_10k}}
out: {tmp_path / "out"}
phases:
  - train: {{epochs: 1, progress: false}}
    as: big
  - train: {{objective: {{tinyvit: {{teacher: big, store: {tmp_path / "labels"}}}}}, epochs: 2, progress: false}}
""")
    assert [p["phase"] for p in run(file)["phases"]] == ["train", "train"]
    assert LabelStore(tmp_path / "labels").plan.epochs == 2
