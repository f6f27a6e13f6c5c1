"""Pictures in low and high resolution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.conftest import fill, noise
from trimtab.core.errors import DataError
from trimtab.data import load_data
from trimtab.nn.resize import downscale, rgb_to_y


@pytest.fixture(scope="module")
def data():
    return load_data("scenes:size=48x60,n=20", task="restore", scale=3, patch=8)


def test_low_pictures_are_made_as_the_field_does(data):
    batch = next(iter(data.loader("test")))
    high, low = batch["high"], batch["image"]
    assert high.shape == (1, 3, 48, 60) and low.shape == (1, 3, 16, 20)
    assert torch.equal(low, downscale(high, 3, round_to_8_bits=True))
    assert torch.equal((255 * low).round() / 255, low) and low.min() >= 0 and low.max() <= 1
    assert (data.mean, data.std, data.spec.task, data.spec.size) == ((0.0,) * 3, (1.0,) * 3, "restore", (3, 8, 8))


def test_one_channel_is_the_studio_luma_rounded_to_8_bits(tmp_path):
    for i in range(6):
        noise(40, 40, i).save(tmp_path / f"{i}.png")
    data = load_data(tmp_path, task="restore", scale=2, in_chans=1, val=0, test=0)
    split = data.splits["train"]
    rgb = torch.tensor(np.asarray(Image.open(tmp_path / "0.png")), dtype=torch.float32).permute(2, 0, 1)[None] / 255
    luma = (255 * rgb_to_y(rgb)).round()[0]
    assert torch.equal(torch.tensor(np.asarray(split.high(0)), dtype=torch.float32), luma[0])
    assert luma.min() >= 16 and luma.max() <= 235


def test_high_pictures_are_cut_to_a_multiple_of_the_scale(tmp_path):
    fill(tmp_path, 6, 1, size=(50, 67))
    batch = next(iter(load_data(tmp_path, task="restore", scale=3).loader("test")))
    assert batch["high"].shape == (1, 3, 48, 66) and batch["image"].shape == (1, 3, 16, 22)


@pytest.mark.parametrize("augment", ["none", "flip+turn"])
def test_patches_of_low_and_high_are_of_one_place(data, augment):
    """Made small again, the inside of a high patch is its low one."""
    for batch in data.loader("train", batch_size=16, augment=augment):
        again = downscale(batch["high"], 3, round_to_8_bits=True)
        assert torch.allclose(again[:, :, 2:-2, 2:-2], batch["image"][:, :, 2:-2, 2:-2], atol=1.01 / 255)


def test_an_epoch_sees_as_many_pixels_as_there_are(data):
    pictures = len(data.splits["train"].which)
    assert len(data.splits["train"]) == pictures * (16 // 8) * (20 // 8)
    assert len(data.splits["val"]) == len(data.splits["val"].which)


def test_turns_and_flips_happen_and_epochs_differ(data):
    options = {"batch_size": 40, "shuffle": False}
    plain, turned, other = (
        data.loader("train", augment=a, epoch=e, **options).batch(0) for a, e in (("none", 0), ("auto", 0), ("none", 1))
    )
    changed = [i for i in range(40) if not torch.equal(plain["image"][i], turned["image"][i])]
    assert 25 < len(changed) < 40  # one in eight stays as it was
    for i in changed:
        views = [torch.rot90(v, k, (1, 2)) for v in (plain["high"][i], plain["high"][i].flip(2)) for k in range(4)]
        assert any(torch.equal(turned["high"][i], v) for v in views)
    assert not torch.equal(plain["image"], other["image"])


def test_batches_depend_on_seed_epoch_and_row_only(data):
    options = {"batch_size": 10, "augment": "auto", "seed": 3, "epoch": 2}
    whole = list(data.loader("train", **options))
    rest = list(data.loader("train", skip=2, **options))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(whole[2:], rest, strict=True) for k in a)
    parts = [data.loader("train", rank=r, world=2, **options).batch(1) for r in (0, 1)]
    assert all(torch.equal(whole[1][k], torch.cat([p[k] for p in parts])) for k in whole[1])


def test_processes_share_whole_pictures(data):
    whole = [int(b["index"]) for b in data.loader("test", batch_size=64)]
    shared = [b["index"].tolist() for r in (0, 1) for b in data.loader("test", batch_size=64, rank=r, world=2)]
    assert sorted(i for rows in shared for i in rows) == whole == list(range(len(data.splits["test"])))


def test_pictures_that_are_not_kept_are_the_same(tmp_path):
    fill(tmp_path, 12, 3, size=(40, 44))
    kept, lazy = (load_data(tmp_path, task="restore", cache=c) for c in ("memory", "lazy"))
    pairs = zip(kept.loader("train", augment="auto"), lazy.loader("train", augment="auto"), strict=True)
    assert all(torch.equal(a[k], b[k]) for a, b in pairs for k in a)


def test_a_set_for_tests_only_is_enough(tmp_path):
    fill(tmp_path / "test", 3, 1, size=(40, 40))
    data = load_data(tmp_path, task="restore", scale=2)
    assert {k: len(v) for k, v in data.splits.items()} == {"test": 3}


def test_what_cannot_be_used_is_named(tmp_path):
    fill(tmp_path, 60, 1, size=(60, 60))
    (tmp_path / "000.png").write_bytes(b"nothing")
    noise(20, 90, 1).save(tmp_path / "001.png")
    data = load_data(tmp_path, task="restore", scale=2, val=0, test=0)
    assert {name[-7:]: reason for name, reason in data.skipped} == {
        "000.png": "not an image of a known format",
        "001.png": "45x10 pixels in low resolution, at least 16 are needed",
    }
    (tmp_path / "few").mkdir()
    with pytest.raises(DataError, match="holds no pictures; data for task 'restore' must be"):
        load_data(tmp_path / "few", task="restore")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 0}, "scale must be a whole number, 1 or more, got 0"),
        ({"patch": 4}, "patch must be a whole number, 8 or more, got 4"),
        ({"image_size": 32}, "keep their sizes; choose patch instead"),
        ({"void": 1}, "task 'restore' takes scale, patch, got 'void'"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        load_data("scenes:n=8", task="restore", **options)


def test_subsets_are_of_pictures(data):
    small = data.subset({"train": 2})
    assert len(small.splits["train"].which) == 2 and len(small.splits["train"]) == 8
    assert small.summary()["scale"] == 3 and len(data.splits["train"].which) > 2
