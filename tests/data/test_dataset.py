from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trimtab as tt
from trimtab.core.errors import DataError
from trimtab.data import Data, Split, class_weights, load_data, shapes
from trimtab.data.splits import choose, quotas


def test_digits_are_the_embedded_default():
    data = tt.load_data()
    assert data.name == "digits"
    assert (data.size, data.in_chans, data.num_classes) == ((8, 8), 1, 10)
    assert sum(map(len, data.splits.values())) == 1797
    everything = torch.cat([s.images for s in data.splits.values()])
    assert (everything.min(), everything.max()) == (0, 255)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    name = data.splits["test"].names[5]
    i = int(name.split("/")[-1])
    assert data.splits["test"].labels[5] == bunch.target[i]
    assert np.abs(data.splits["test"].images[5, 0].numpy() - bunch.images[i] * 255 / 16).max() <= 0.5


def test_the_division_is_deterministic_stratified_and_disjoint():
    a, b, other = load_data("digits"), load_data("digits"), load_data("digits", seed=1)
    names = {k: set(s.names) for k, s in a.splits.items()}
    assert names == {k: set(s.names) for k, s in b.splits.items()}
    assert names["test"] != set(other.splits["test"].names)
    assert sum(map(len, names.values())) == len(set.union(*names.values())) == 1797
    whole = np.sum([s.counts(10) for s in a.splits.values()], 0)
    for s in a.splits.values():
        assert np.abs(np.array(s.counts(10)) - whole * len(s) / 1797).max() <= 1.5


def test_moments_are_those_of_the_train_split():
    data = load_data("shapes:n=60,size=16")
    x = data.splits["train"].images.double() / 255
    assert data.mean == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert data.std == pytest.approx(x.std((0, 2, 3), correction=0).tolist(), abs=1e-5)
    assert data.spec.size == (3, 16, 16)
    assert data.spec.mean == data.mean


@pytest.mark.parametrize(("h", "w", "c"), [(8, 8, 1), (12, 20, 3), (48, 48, 3)])
def test_image_size_and_channels_can_be_chosen(h: int, w: int, c: int):
    data = load_data("digits", image_size=(h, w), in_chans=c, limit=40)
    assert (data.size, data.in_chans) == ((h, w), c)
    assert data.splits["train"].images.shape[1:] == (c, h, w)


def test_val_0_means_no_val():
    assert list(load_data("digits", val=0).splits) == ["train", "test"]


def test_limit_is_a_stratified_upper_bound():
    data = load_data("digits", limit=100)
    assert sum(map(len, data.splits.values())) == 100
    assert np.ptp(np.sum([s.counts(10) for s in data.splits.values()], 0)) <= 1


def test_subset_is_stratified_seeded_and_keeps_the_moments():
    data = load_data("digits")
    small = data.subset(50, seed=3)
    assert {k: len(v) for k, v in small.splits.items()} == {"train": 50, "val": 50, "test": 50}
    assert np.ptp(small.splits["train"].counts(10)) <= 1
    assert (small.mean, small.std, small.class_names) == (data.mean, data.std, data.class_names)
    assert small.splits["train"].names == data.subset(50, seed=3).splits["train"].names
    assert small.splits["train"].names != data.subset(50, seed=4).splits["train"].names
    assert {k: len(v) for k, v in data.subset({"train": 7}).splits.items()} == {"train": 7, "val": 144, "test": 359}
    for wrong in ({"dev": 3}, {"train": 0}, 0):
        with pytest.raises(ValueError, match=r"split|subset"):
            data.subset(wrong)


def test_summary_is_plain_json():
    data = load_data("shapes:n=40,classes=3")
    summary = json.loads(json.dumps(data.summary()))
    assert summary["counts"] == {"train": 29, "val": 3, "test": 8}
    assert summary["size"] == [32, 32]
    assert summary["class_names"] == ["circle", "square", "triangle"]
    assert repr(data) == "Data(shapes: 3 classes, 32x32 colour, train 29, val 3, test 8)"


def test_images_come_back_as_pictures():
    data = load_data("shapes:n=40,channels=1")
    picture = data.splits["train"].image(-1)
    assert (picture.mode, picture.size) == ("L", (32, 32))
    assert np.array_equal(np.asarray(picture), data.splits["train"].images[-1, 0].numpy())
    with pytest.raises(IndexError):
        data.splits["train"].image(10_000)


def test_from_arrays():
    x = torch.randint(0, 256, (40, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(40) % 2
    data = Data.from_arrays((x, y), test=(x[:6].numpy(), y[:6].numpy()), class_names=["even", "odd"])
    assert data.in_chans == 1
    assert torch.equal(data.splits["test"].images[:, 0], x[:6])
    assert any("6 of 6 test images are also in train" in w for w in data.warnings)
    with pytest.raises(ValueError, match="uint8"):
        Data.from_arrays((x.float(), y))
    with pytest.raises(ValueError, match="labels must be 0 to 0"):
        Data.from_arrays((x, y), class_names=["one"])
    with pytest.raises(ValueError, match="a label per image"):
        Data.from_arrays((x, y[:5]))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("digts", r"unknown data 'digts' \(did you mean 'digits'\?\); data must be 'digits', 'shapes:.*zip.*hub"),
        ("", "data must be 'digits'"),
        ("./absent", r"there is no file or folder \./absent"),
        ("absent.zip", r"there is no file or folder absent\.zip"),
        ("tests/absent", "there is no file or folder|unknown data"),
        ("shapes:colour=3", "shapes takes classes, n, channels"),
        ("shapes:n=many", "n must be a number, got 'many'"),
        ("shapes:classes=40", "classes must be 2 to 10, got 40"),
    ],
)
def test_an_unknown_spec_lists_what_would_be_accepted(spec: str, words: str, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(DataError, match=words):
        load_data(spec)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"neither \.zip nor \.parquet"):
        load_data(tmp_path / "data.csv")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 0}, "image_size must be 1 to 8192 pixels"),
        ({"in_chans": 4}, "in_chans must be 1 or 3, got 4"),
        ({"val": 1.0}, "val must be a share"),
        ({"limit": 1}, "limit must be at least 2"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_wrong_arguments_are_explained(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        load_data("digits", **options)


def test_class_weights_balance_the_classes():
    split = Split(torch.zeros(10, 1, 2, 2, dtype=torch.uint8), torch.tensor([0] * 7 + [1] * 2 + [3]))
    weights = class_weights(split, 4)
    assert weights[split.labels].mean().item() == pytest.approx(1)
    shares = torch.bincount(split.labels, weights=weights[split.labels].double(), minlength=4)
    assert shares[[0, 1, 3]].tolist() == pytest.approx([10 / 3] * 3)


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    n=st.integers(0, 300),
    spare=st.integers(0, 2),
)
def test_quotas_add_up_and_never_take_too_much(counts: list[int], n: int, spare: int):
    taken = quotas(np.array(counts), n, spare=spare)
    room = np.maximum(np.array(counts) - spare, 0)
    assert taken.sum() == min(n, room.sum())
    assert (taken >= 0).all()
    assert (taken <= room).all()
    if n >= np.count_nonzero(room):
        assert (taken[room > 0] >= 1).all()


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=80), n=st.integers(0, 80), seed=st.integers(0, 9))
def test_choose_takes_distinct_samples(labels: list[int], n: int, seed: int):
    chosen = choose(np.array(labels), n, seed)
    assert len(chosen) == len(set(chosen.tolist())) == min(n, len(labels))
    assert (np.diff(chosen) > 0).all()


def test_shapes_are_deterministic_balanced_and_learnable():
    a, labels, names = shapes(400, classes=4, size=16)
    b, _, _ = shapes(400, classes=4, size=16)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, shapes(400, classes=4, size=16, seed=1)[0])
    assert np.array_equal(a[:40], shapes(40, classes=4, size=16)[0])  # more images do not change the first ones
    assert np.bincount(labels).tolist() == [100] * 4
    assert len(names) == 4
    # Colour alone says nothing; form does: the outline, found as distance from the corner's colour, is enough.
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    colour = a.mean((2, 3))
    form = np.abs(a.astype(int) - a[:, :, :1, :1]).sum(1).reshape(400, -1)
    form = form / form.max(1, keepdims=True)
    guess = LogisticRegression(max_iter=500).fit(colour[:300], labels[:300]).score(colour[300:], labels[300:])
    known = KNeighborsClassifier(3).fit(form[:300], labels[:300]).score(form[300:], labels[300:])
    assert guess < 0.45
    assert known > 0.6


def test_all_ten_shapes_are_different():
    images, labels, names = shapes(200, classes=10, size=24, noise=0)
    form = np.abs(images.astype(int) - images[:, :, :1, :1]).sum(1) > 90
    share = [form[labels == k].mean() for k in range(10)]
    assert all(0.03 < s < 0.6 for s in share), dict(zip(names, share))
    assert len(set(names)) == 10


def test_importing_the_room_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, trimtab.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
