"""Volumes: made or read from files, checked, divided, moved together with their labels."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from trimtab.core.errors import DataError, MissingExtra
from trimtab.data import load_data, volume_files
from trimtab.data.images import VOID, Unreadable
from trimtab.data.synthetic import nested_ellipsoids
from trimtab.data.volumes import at_size, standardise
from trimtab.deploy.vision import scores
from trimtab.learn import evaluate
from trimtab.learn.evaluate import predictions


def case(seed: int, *, classes: int = 3, size: tuple[int, int, int] = (8, 8, 8)) -> tuple[np.ndarray, np.ndarray]:
    """A volume (2, D, H, W) whose first channel is 10 times the label."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, size)
    return np.stack([10.0 * label, rng.standard_normal(size)]), label


def write(root: Path, n: int = 10, **shape) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        image, label = case(i, **shape)
        np.savez_compressed(root / f"{i:02}.npz", image=image, label=label)
    return root


def load(root: Path, **options):
    return load_data(root, task="segment", **options)


# ---------------------------------------------------------------------------------------------------------------- made


def test_made_volumes_are_regions_or_classes():
    data = load_data("volumes:n=10,size=8x16x8,seed=3")  # nothing but segmentation can be meant
    assert (data.task, data.size, data.in_chans, data.overlap) == ("segment", (8, 16, 8), 4, True)
    assert data.spec.size == (4, 8, 16, 8) and data.spec.overlap
    batch = next(iter(data.loader("train", batch_size=3)))
    assert batch["image"].shape == (3, 4, 8, 16, 8) and batch["label"].shape == (3, 3, 8, 16, 8)
    assert batch["label"].unique().tolist() == [0.0, 1.0]
    classes = load_data("volumes:n=10,size=8x16x8,seed=3,overlap=0", task="segment")
    assert classes.class_names == ["background", "whole", "core", "enhancing"] and not classes.spec.overlap
    same = next(iter(classes.loader("train", batch_size=3)))
    assert torch.equal(same["image"], batch["image"]) and torch.equal(same["label"], batch["label"].sum(1).long())


def test_the_same_seed_gives_the_same_batches_after_a_resumption():
    data = load_data("volumes:n=20,size=8")
    whole, rest = (list(data.loader("train", batch_size=4, augment="auto", seed=2, epoch=3, skip=k)) for k in (0, 2))
    assert len(whole) == 3 and len(rest) == 1
    assert all(torch.equal(whole[2][k], rest[0][k]) for k in ("image", "label", "index"))
    assert [len(b["image"]) for b in data.loader("test", batch_size=4)] == [1] * 4  # evaluated one at a time


def test_labels_move_with_their_volumes():
    data = load_data("volumes:n=12,size=8,noise=0,channels=1,classes=1", test=0, val=0)
    flipped = data.loader("train", batch_size=12, augment="flip", seed=1).batch(0)
    label, bright = flipped["label"][:, 0] > 0, flipped["image"][:, 0] > 0
    assert torch.equal(label, bright)
    plain = data.splits["train"].pairs(flipped["index"])[0]
    assert (flipped["image"] != plain).flatten(1).any(1).float().mean() > 0.5  # one in eight stays as it is
    shifted = data.loader("train", batch_size=12, augment="shift", seed=1).batch(0)
    plain = data.splits["train"].pairs(shifted["index"])[0]
    assert 0 < (shifted["image"] - plain).abs().max() < 0.1 * plain.abs().max() + 0.1
    with pytest.raises(ValueError, match="augment must be made of none, crop, flip, shift, whole joined by"):
        data.loader("train", augment="rrc")


# --------------------------------------------------------------------------------------------------------------- parts


def spots(root: Path, n: int = 4, *, masks: bool = False) -> Path:
    """Volumes (1, 16, 24, 8) whose values say where a voxel is, with a voxel each of class 1 and of class 2."""
    root.mkdir()
    image = np.arange(16 * 24 * 8, dtype=np.float32).reshape(1, 16, 24, 8) + 1
    label = np.zeros((16, 24, 8), np.uint8)
    label[0, 1, 2], label[15, 20, 7] = 1, 2
    for i in range(n):
        np.savez(root / f"{i}.npz", image=image, label=np.stack([label == 1, label == 2]) if masks else label)
    return root


@pytest.mark.parametrize("cache", ["memory", "lazy"])
@pytest.mark.parametrize("masks", [False, True])
def test_crops_lie_anywhere_and_a_third_of_them_around_a_label(tmp_path, masks, cache):
    data = load(spots(tmp_path / "a", masks=masks), image_size=8, test=0, val=0, cache=cache)
    assert data.larger and data.auto_augment() == "crop+flip+shift"
    (whole, label), *_ = data.splits["train"].whole(torch.tensor([0]))
    assert whole.shape == (1, 16, 24, 8)
    found, corners = [], set()
    for epoch in range(60):
        batch = data.loader("train", batch_size=4, augment="crop", epoch=epoch, seed=1).batch(0)
        for x, y in zip(batch["image"], batch["label"], strict=True):
            corner = [int(v) for v in (whole[0] == x[0, 0, 0, 0]).nonzero()[0]]
            place = (..., *(slice(at, at + 8) for at in corner))
            assert torch.equal(x, whole[place]) and torch.equal(y.long(), label[place].long())
            corners.add(tuple(corner))
            found.append([bool(y[0].any()), bool(y[1].any())] if masks else [bool((y == k).any()) for k in (1, 2)])
    assert len({c[0] for c in corners}) == 9 and len({c[1] for c in corners}) == 17 and {c[2] for c in corners} == {0}
    first, second = np.mean(found, axis=0)  # by chance alone 2 of 153 corners show class 1, and 4 class 2
    assert 0.1 < first < 0.3 and 0.1 < second < 0.3
    assert not load(write(tmp_path / "b")).larger and load(tmp_path / "b").auto_augment() == "flip+shift"


def test_small_volumes_and_those_without_a_label_have_crops_too(tmp_path):
    for i, side in enumerate((4, 16)):
        np.savez(
            tmp_path / f"{i}.npz", image=np.random.default_rng(i).random((1, side, 8, 8)), label=np.zeros((side, 8, 8))
        )
    data = load(tmp_path, image_size=8, test=0, val=0, class_names=["ground", "rare"])
    for epoch in range(9):
        batch = data.loader("train", batch_size=2, augment="crop", epoch=epoch).batch(0)
        small = batch["label"][batch["index"].tolist().index(0)]
        assert batch["image"].shape == (2, 1, 8, 8, 8)
        assert (small[[0, 1, 6, 7]] == VOID).all() and (small[2:6] == 0).all()
    with pytest.raises(ValueError, match="augment must have crop or whole, not both"):
        data.loader("train", augment="crop+whole")


def test_whole_volumes_come_one_at_a_time_and_at_least_as_large_as_a_network_wants(tmp_path):
    data = load(spots(tmp_path / "a"), image_size=(8, 8, 16), test=0, val=0)
    for batch in data.loader("train", batch_size=4, augment="whole"):
        assert batch["image"].shape == (1, 1, 16, 24, 16) and (batch["label"][..., :4] == VOID).all()
        assert torch.equal(batch["image"][0, ..., 4:12], data.splits["train"].whole(batch["index"])[0][0])


class Threshold(torch.nn.Module):
    """Region 1 where a value is above 0: voxel by voxel, so windows and the whole must say the same."""

    def forward(self, x):
        assert x.shape[2:] == (8, 8, 8)
        return torch.cat([-x, x], 1)


def test_scores_are_those_of_whole_volumes(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        image = rng.standard_normal((1, 20, 12 + i, 6))
        label = (image[0] > 0) ^ (np.arange(20)[:, None, None] < 4)  # at one end, outside of the middle, all is wrong
        np.savez(tmp_path / f"{i}.npz", image=image, label=label)
    data = load(tmp_path, image_size=8, test=0.5, val=0)
    wrong, voxels = 0, 0
    for image, label in data.splits["test"].whole(torch.arange(3)):
        wrong += int(((image[0] > 0).long() != label).sum())
        voxels += label.numel()
    seen = evaluate(Threshold(), data)
    assert seen["n"] == 3 and seen["accuracy"] == pytest.approx(1 - wrong / voxels) and 0.7 < seen["accuracy"] < 0.9
    again = scores(lambda x: np.concatenate([-x, x], 1), data.spec, data, "test")
    assert again == pytest.approx(seen, rel=1e-6)
    middles = [batch for _, batch in predictions(Threshold(), data, "test")]  # as a validation while training has it
    assert all(batch["image"].shape == (1, 1, 8, 8, 8) for batch in middles)


# --------------------------------------------------------------------------------------------------------------- files


def test_a_folder_gives_volumes_and_their_classes(tmp_path):
    data = load(write(tmp_path))
    assert (data.class_names, data.in_chans, data.size) == (["0", "1", "2"], 2, (8, 8, 8))
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 7, "val": 1, "test": 2}
    for batch in data.loader("train", batch_size=4):
        assert batch["label"].dtype == torch.int64
        for volume, label in zip(batch["image"], batch["label"]):
            levels = [volume[0][label == c].unique() for c in range(3)]
            assert [len(x) for x in levels] == [1, 1, 1] and levels[0] < levels[1] < levels[2]
            assert volume.mean((1, 2, 3)).abs().max() < 1e-5 and (volume.std((1, 2, 3)) - 1).abs().max() < 1e-2


def test_regions_are_made_of_classes(tmp_path):
    data = load(write(tmp_path), regions={"all": [1, 2], "inner": 2})
    classes = load(tmp_path)
    assert data.class_names == ["all", "inner"] and data.overlap
    masks, label = (next(iter(d.loader("test")))["label"][0] for d in (data, classes))
    assert torch.equal(masks[0] > 0, label > 0) and torch.equal(masks[1] > 0, label == 2)


def test_void_is_left_out_and_classes_have_names(tmp_path):
    data = load(write(tmp_path, classes=4), void=1, class_names=["ground", "unsure", "liver", "lesion"])
    assert data.class_names == ["ground", "liver", "lesion"]
    assert next(iter(data.loader("test")))["label"].unique().tolist() == [0, 1, 2, VOID]


def test_splits_are_those_of_the_folder_and_labels_may_lie_apart(tmp_path):
    for k, (split, n) in enumerate((("train", 20), ("val", 2), ("test", 3))):
        for i in range(n):
            image, label = case(100 * k + i)
            for name, array in (("images", image), ("labels", label)):
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                np.save(tmp_path / split / name / f"{i}.npy", array)
    (tmp_path / "train" / "labels" / "5.npy").unlink()
    data = load(tmp_path, test=0.5)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 19, "val": 2, "test": 3}
    assert data.skipped == [("train/5.npy", "has no label")]


def test_what_is_not_kept_in_memory_is_read_again(tmp_path):
    kept, lazy = (load(write(tmp_path), cache=cache) for cache in ("memory", "lazy"))
    assert kept.splits["train"].kept is not None and lazy.splits["train"].kept is None
    for a, b in zip(kept.loader("train", batch_size=3), lazy.loader("train", batch_size=3), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in ("image", "label", "index"))
    part = lazy.subset({"train": 3})
    assert len(part.splits["train"]) == 3 and len(list(part.loader("train", batch_size=3))) == 1
    (tmp_path / lazy.splits["test"].names[0].removeprefix("train/")).unlink()
    with pytest.raises(DataError, match="volumes can no longer be read"):
        list(lazy.loader("test"))


def test_volumes_of_several_sizes_are_brought_to_one(tmp_path):
    write(tmp_path, 9)
    image, label = case(99, size=(4, 12, 8))
    np.savez(tmp_path / "99.npz", image=image, label=label)
    data = load(tmp_path, test=0, val=0)
    assert data.size == (8, 8, 8) and any(
        "volumes are 4x8x8 to 8x12x8 voxels; networks are fed parts of 8x8x8" in w for w in data.warnings
    )
    masks = data.splits["train"].pairs(torch.tensor([9]))[1][0]
    assert (masks[:2] == VOID).all() and (masks[6:] == VOID).all()
    assert np.array_equal(masks[2:6], label[:, 2:10])
    assert load(tmp_path, image_size=16).size == (16, 16, 16)
    assert load(tmp_path, image_size=(8, 16, 24)).size == (8, 16, 24)


def test_damaged_and_unlike_files_are_named_and_left_out(tmp_path):
    write(tmp_path, 120)

    def put(i: int, **arrays) -> None:
        np.savez(tmp_path / f"{i:02}.npz", **arrays)

    image, label = case(0)
    put(3, image=image, mask=label)
    put(4, image=image, label=label[:4])
    put(5, image=image[:1], label=label)
    put(6, image=np.where(image > 0, np.nan, image), label=label)
    put(7, image=image, label=label / 2)
    (tmp_path / "08.npz").write_bytes((tmp_path / "09.npz").read_bytes()[:700])
    data = load(tmp_path, test=0, val=0)
    reasons = {Path(name).stem: reason for name, reason in data.skipped}
    assert reasons.pop("08").startswith("damaged, or no .npz file: ")
    assert reasons == {
        "03": "has no array 'label' (it has image, mask)",
        "04": "the label is (4, 8, 8), its volume (8, 8, 8) (D, H, W)",
        "05": "has 1 channels and classes, most others 2 channels and classes",
        "06": "the volume has values that are not finite",
        "07": "its label must be whole numbers from 0 to 255",
    }
    assert len(data.splits["train"]) == 114 and any("6 images cannot be used" in w for w in data.warnings)


def test_too_many_unlike_files_are_an_error(tmp_path):
    write(tmp_path, 12, classes=2)
    for i in range(8):
        image, label = case(i)
        np.savez(tmp_path / f"{50 + i}.npz", image=image, label=label)
    with pytest.raises(DataError, match=r"8 of 20 images cannot be used .* class 2 in its label is none of the 2"):
        load(tmp_path, class_names=["a", "b"])


def test_pickles_and_bombs_are_not_opened(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", image=np.array([{}], object), label=np.zeros(1))
    with pytest.raises(Unreadable, match="holds Python objects, which are not read"):
        volume_files.read_volume(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "b.npz", image=np.zeros((1, 64, 64, 64)))
    monkeypatch.setattr(volume_files, "MAX_BYTES", 10**6)
    with pytest.raises(Unreadable, match=r"image has 2,097,152 bytes when unpacked"):
        volume_files.read_volume(tmp_path / "b.npz")
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535)
    with pytest.raises(Unreadable, match=r"damaged, or no \.npy file"):
        volume_files.read_volume(tmp_path / "c.npy")


def test_nifti_files_are_turned_to_depth_first(tmp_path, monkeypatch):
    for i in range(21):
        for name, array in zip(("images", "labels"), case(i, size=(8, 16, 24))):
            (tmp_path / name).mkdir(exist_ok=True)
            stored = nibabel.Nifti1Image(array.T.astype(np.float32), np.eye(4))  # (W, H, D[, C]), as in the format
            nibabel.save(stored, tmp_path / name / f"{i}.nii.gz")
    (tmp_path / "images" / "bad.nii").write_bytes(b"no header")
    (tmp_path / "labels" / "bad.nii").write_bytes(b"no header")
    data = load(tmp_path)
    assert data.size == (8, 16, 24) and data.in_chans == 2 and data.class_names == ["0", "1", "2"]
    assert [name for name, why in data.skipped if "damaged, or no .nii file" in why] == ["train/bad.nii"]
    image, label = volume_files.find_cases(tmp_path).splits["train"].reader.case(0)
    want = case(0, size=(8, 16, 24))
    assert np.array_equal(label, want[1]) and np.allclose(image, want[0], atol=1e-6)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(MissingExtra, match=r"nibabel is not installed; get it with: pip install 'trimtab\[volumes\]'"):
        load(tmp_path)


TURNS = {"as wanted": "RAS", "radiological": "LPS", "turned": "SAR", "mirrored and turned": "PIL"}


@pytest.mark.parametrize("codes", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("channels", [0, 2])
def test_nifti_files_lie_the_same_way_whatever_way_they_are_stored(tmp_path, codes, channels):
    wanted = (
        np.random.default_rng(0).random((*((channels,) if channels else ()), 4, 5, 6)).astype(np.float32)
    )  # (D, H, W)
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(codes)
    )
    affine = np.diag([0.5, 1.0, 2.0, 1.0])
    stored = nibabel.Nifti1Image(wanted.T, affine).as_reoriented(turn)
    nibabel.save(stored, tmp_path / "scan.nii")
    assert "".join(nibabel.aff2axcodes(stored.affine)) == codes
    assert volume_files.shape_of(tmp_path / "scan.nii", "image") == wanted.shape
    read = volume_files.read_volume(tmp_path / "scan.nii")
    assert np.array_equal(read, wanted if channels else wanted[None])
    mask = (wanted > 0.5).astype(np.uint8)
    path = volume_files.write_mask(tmp_path, "scan", mask, tmp_path / "scan.nii")
    again = nibabel.load(path)
    assert path.name == "scan-mask.nii.gz" and np.array_equal(again.affine, stored.affine)
    assert np.array_equal(np.asarray(again.dataobj), np.asarray(stored.dataobj) > 0.5)


def test_a_nifti_file_that_does_not_say_how_it_lies_is_refused(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4))
    image.set_sform(np.diag([1.0, 0.0, 0.0, 1.0]), code=2)
    nibabel.save(image, tmp_path / "flat.nii")
    with pytest.raises(Unreadable, match="its header does not say how its axes lie"):
        volume_files.read_volume(tmp_path / "flat.nii")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"regions": {"a": []}}, ValueError, "regions must name the classes of each region"),
        ({"regions": [1]}, ValueError, "regions must name the classes of each region"),
        ({"image_size": (8, 8)}, ValueError, r"image_size of volumes must be 8 to 1024 voxels, or \(D, H, W\)"),
        ({"in_chans": 3}, DataError, "volumes have 2 channels, got in_chans=3"),
        ({"void": [0, 1]}, DataError, "a single class besides void"),
        ({"scale": 2}, ValueError, "task 'segment' takes void, class_names, regions, got 'scale'"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        load(write(tmp_path), **options)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("volumes:n=0", "volumes: n must be at least 1, got 0"),
        ("volumes:classes=4", "volumes: classes must be 1 to 3, got 4"),
        ("volumes:size=8x8", "volumes: size must be a number, got '8x8'"),
        ("volumes:size=4", "volumes: size must be 8 to 512 voxels, got 4"),
        ("volumes:channels=5", "volumes: channels must be 1 to 4, got 5"),
    ],
)
def test_wrong_words_are_refused(spec, words):
    with pytest.raises(DataError, match=words):
        load_data(spec)


# ------------------------------------------------------------------------------------------------------------- details


def test_the_outside_does_not_count_and_stays_zero():
    volume = np.zeros((2, 4, 4, 4))
    volume[:, 1:3] = 5 + np.random.default_rng(0).standard_normal((2, 2, 4, 4))
    done = standardise(volume)
    assert (done[:, 0] == 0).all() and (done[:, 3] == 0).all()
    assert np.abs(done[:, 1:3].mean((1, 2, 3))).max() < 1e-6 and np.abs(done[:, 1:3].std((1, 2, 3)) - 1).max() < 1e-5
    few = np.random.default_rng(1).standard_normal((1, 4, 4, 4))
    few[0, 0, 0, 0] = 0  # a value like others
    assert standardise(few)[0, 0, 0, 0] == pytest.approx(-few.mean() / few.std(), rel=1e-4)
    assert np.isfinite(standardise(np.ones((1, 4, 4, 4)))).all()


def test_cutting_undoes_padding():
    array = np.arange(2 * 5 * 4 * 3).reshape(2, 5, 4, 3)
    assert np.array_equal(at_size(at_size(array, (8, 9, 6)), (5, 4, 3)), array)


def test_regions_lie_in_each_other():
    volumes, masks, names = nested_ellipsoids(3, size=(8, 12, 16), seed=4)
    assert volumes.shape == (3, 4, 8, 12, 16) and names == ["whole", "core", "enhancing"]
    assert (masks[:, 1:] <= masks[:, :-1]).all() and masks[:, 2].any((1, 2, 3)).all()
    again = nested_ellipsoids(3, size=(8, 12, 16), seed=4, channels=2, classes=2)
    assert np.array_equal(again[1], masks[:, :2])
