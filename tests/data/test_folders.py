from __future__ import annotations

import os
import shutil
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import encoded, fill, noise
from trimtab.core.errors import DataError
from trimtab.data import load_data
from trimtab.data.folders import from_folder


def zipped(root: Path, name: str = "data.zip", prefix: str = "") -> Path:
    path = root.parent / name
    with zipfile.ZipFile(path, "w") as z:
        for f in sorted(root.rglob("*")):
            z.write(f, prefix + str(f.relative_to(root)))
    return path


def said(data, words: str) -> bool:
    return any(words in w for w in data.warnings)


def test_class_folders_become_classes(pets: Path):
    data = load_data(pets)
    assert data.class_names == ["cat", "dog"]
    assert (data.size, data.in_chans) == ((12, 12), 3)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 29, "val": 3, "test": 8}
    for split in data.splits.values():
        assert abs(split.counts(2)[0] - split.counts(2)[1]) <= 1
        for i, name in enumerate(split.names):
            assert np.array_equal(np.asarray(split.image(i)), np.asarray(Image.open(pets / name)))
            assert name.startswith(data.class_names[split.labels[i]])


def test_split_folders_are_kept_apart(split_pets: Path):
    data = load_data(split_pets)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 40, "val": 8, "test": 12}
    assert all(n.startswith(f"{k}/") for k, v in data.splits.items() for n in v.names)
    assert not data.warnings


@pytest.mark.parametrize("name", ["valid", "Validation", "dev"])
def test_other_words_for_val(split_pets: Path, name: str):
    (split_pets / "val").rename(split_pets / name)
    assert len(load_data(split_pets).splits["val"]) == 8


def test_a_zip_gives_the_same_as_its_folder(split_pets: Path):
    plain = load_data(split_pets)
    for path in (zipped(split_pets), zipped(split_pets, "wrapped.zip", "my pets/v1/")):
        data = load_data(path)
        for k in plain.splits:
            assert (data.splits[k].images == plain.splits[k].images).all()
            assert (data.splits[k].labels == plain.splits[k].labels).all()


def test_deeper_folders_belong_to_the_class(tmp_path: Path):
    fill(tmp_path / "d" / "train" / "n01" / "images", 12, 1)
    fill(tmp_path / "d" / "train" / "n02" / "images", 12, 2)
    fill(tmp_path / "d" / "test" / "n01", 2, 3)
    fill(tmp_path / "d" / "test" / "n02", 2, 4)
    assert load_data(tmp_path / "d").class_names == ["n01", "n02"]


def test_a_class_may_be_called_train(tmp_path: Path):
    for k, name in enumerate(("bus", "train", "plane")):
        fill(tmp_path / "d" / name, 12, k)
    assert load_data(tmp_path / "d").class_names == ["bus", "plane", "train"]


def test_junk_is_ignored_and_said(pets: Path):
    (pets / "cat" / "notes.txt").write_text("hello")
    (pets / "cat" / ".DS_Store").write_bytes(b"x")
    (pets / ".ipynb_checkpoints").mkdir()
    noise(9, 9, 5).save(pets / "cover.png")
    data = load_data(pets)
    assert data.class_names == ["cat", "dog"]
    assert said(data, "1 files that are not images were ignored (.txt)")
    assert said(data, "1 images outside of the class folders")


def test_an_unreadable_image_is_named_skipped_and_counted(pets: Path):
    (pets / "cat" / "003.png").write_bytes(b"this is no picture")
    (pets / "dog" / "005.png").write_bytes(b"")
    data = load_data(pets)
    assert sorted(data.skipped) == [("cat/003.png", "not an image of a known format"), ("dog/005.png", "empty file")]
    assert sum(map(len, data.splits.values())) == 38
    assert said(data, "2 images cannot be used")
    names = [n for s in data.splits.values() for n in s.names]
    assert "cat/003.png" not in names
    for s in data.splits.values():  # pixels, labels and names still belong together
        for i, name in enumerate(s.names):
            assert np.array_equal(np.asarray(s.image(i)), np.asarray(Image.open(pets / name)))
            assert name.startswith(data.class_names[s.labels[i]])


def test_a_file_that_vanished_is_skipped(pets: Path):
    (pets / "cat" / "003.png").unlink()
    (pets / "cat" / "003.png").symlink_to("nowhere")
    assert load_data(pets).skipped == [("cat/003.png", "No such file or directory")]


def test_more_than_five_percent_unreadable_is_an_error(pets: Path):
    for i in range(3):
        (pets / "cat" / f"{i:03}.png").write_bytes(b"x" * 50)
    with pytest.raises(DataError, match=r"3 of 40 images cannot be used .*cat/000\.png: not an image"):
        load_data(pets)


def test_no_readable_image_at_all(tmp_path: Path):
    for c in "ab":
        (tmp_path / "d" / c).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "d" / c / f"{i}.jpg").write_bytes(b"no")
    with pytest.raises(DataError, match="all of 10 images cannot be used"):
        load_data(tmp_path / "d")


def test_too_few_images_to_divide(tmp_path: Path):
    for k, c in enumerate("ab"):
        fill(tmp_path / "d" / c, 1, k)
    with pytest.raises(DataError, match=r"2 training images .* are too few to take test images from"):
        load_data(tmp_path / "d")


def test_an_empty_class_folder_is_left_out_with_a_word(pets: Path):
    (pets / "bird").mkdir()
    data = load_data(pets)
    assert data.class_names == ["cat", "dog"]
    assert said(data, "class folders without images were left out: bird")


def test_a_single_class_is_an_error(tmp_path: Path):
    fill(tmp_path / "d" / "cat", 5, 1)
    with pytest.raises(DataError, match=r"single class \(cat\); at least two"):
        load_data(tmp_path / "d")


def test_images_without_class_folders_are_explained(tmp_path: Path):
    fill(tmp_path / "flat", 5, 1)
    with pytest.raises(DataError, match="5 images but none in a class folder; expected one folder of images per class"):
        load_data(tmp_path / "flat")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        load_data(tmp_path / "nothing")


def test_test_without_train_is_an_error(split_pets: Path):
    shutil.rmtree(split_pets / "train")
    with pytest.raises(DataError, match="test/ and val/ but no train/"):
        load_data(split_pets)


def test_a_class_that_train_lacks_is_an_error(split_pets: Path):
    fill(split_pets / "test" / "bird", 2, 99)
    with pytest.raises(DataError, match="class 'bird' is in test but has no images in train"):
        load_data(split_pets)


def test_two_folders_for_one_split_are_an_error(split_pets: Path):
    fill(split_pets / "valid" / "cat", 2, 99)
    with pytest.raises(DataError, match="two folders for val"):
        load_data(split_pets)


def test_train_images_in_test_are_reported(split_pets: Path):
    shutil.copy(split_pets / "train" / "cat" / "004.png", split_pets / "test" / "cat" / "copy.png")
    data = load_data(split_pets)
    assert said(data, "1 of 13 test images are also in train, byte for byte (e.g. test/cat/copy.png = train/cat/004.p")


def test_copies_stay_on_one_side_of_a_split_we_make(tmp_path: Path):
    root = tmp_path / "d"
    for c, name in enumerate("ab"):
        fill(root / name, 12, c)
        for i in range(12):
            shutil.copy(root / name / f"{i:03}.png", root / name / f"{i:03}_copy.png")
    for seed in range(4):
        data = load_data(root, seed=seed, val=0.2)
        seen: dict[str, str] = {}
        for split, part in data.splits.items():
            for n in part.names:
                original = n.replace("_copy", "")
                assert seen.setdefault(original, split) == split
        assert not said(data, "also in train")


def test_a_class_of_copies_stays_in_train(pets: Path):
    for i in range(20):
        shutil.copy(pets / "cat" / "000.png", pets / "cat" / f"{i:03}.png.new")
        (pets / "cat" / f"{i:03}.png.new").rename(pets / "cat" / f"{i:03}.png")
    data = load_data(pets)
    assert data.splits["train"].counts(2)[0] == 20
    assert said(data, "test has no images of cat")


def test_one_image_under_two_labels_is_reported(pets: Path):
    shutil.copy(pets / "cat" / "000.png", pets / "dog" / "copy.png")
    assert said(load_data(pets), "1 images appear under more than one label")


def test_imbalance_is_reported(tmp_path: Path):
    fill(tmp_path / "d" / "common", 60, 1)
    fill(tmp_path / "d" / "rare", 8, 2)
    data = load_data(tmp_path / "d")
    assert said(data, "classes are unbalanced: 'common' has")
    assert all(part.counts(2)[1] for part in data.splits.values())  # stratified: the rare class is everywhere


def test_mixed_sizes_become_a_square_and_are_reported(tmp_path: Path):
    fill(tmp_path / "d" / "a", 10, 1, (30, 20))
    fill(tmp_path / "d" / "b", 10, 2, (50, 40))
    data = load_data(tmp_path / "d")
    assert data.size == (30, 30)  # the median of shorter sides 20 and 40
    assert said(data, "images are 20x30 to 40x50 pixels; they are used at 30x30")
    assert load_data(tmp_path / "d", image_size=(16, 24)).size == (16, 24)


def test_large_images_are_capped(tmp_path: Path):
    for c in "ab":
        (tmp_path / "d" / c).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (640, 480), (i * 40, 3, 3 if c == "a" else 4)).save(tmp_path / "d" / c / f"{i}.jpg")
    assert load_data(tmp_path / "d").size == (224, 224)


def test_grey_images_stay_grey(tmp_path: Path):
    for k, c in enumerate("ab"):
        (tmp_path / "d" / c).mkdir(parents=True)
        for i in range(6):
            noise(9, 9, 10 * k + i, "L").save(tmp_path / "d" / c / f"{i}.png")
    assert load_data(tmp_path / "d").in_chans == 1
    assert load_data(tmp_path / "d", in_chans=3).in_chans == 3
    noise(9, 9, 77).save(tmp_path / "d" / "a" / "colour.png")
    assert load_data(tmp_path / "d").in_chans == 3


def test_names_that_cannot_be_shown_are_escaped(pets: Path):
    (pets / "cat" / "a\x1b[2J\n.png").write_bytes(b"broken")
    data = load_data(pets)
    assert data.skipped[0][0] == "cat/a\\x1b[2J\\n.png"
    os.rename(os.fsencode(pets / "dog"), os.fsencode(pets) + b"/d\xffg")
    assert load_data(pets).class_names == ["cat", "d\\udcffg"]


def test_links_in_a_circle_and_pipes_do_no_harm(pets: Path):
    (pets / "cat" / "loop").symlink_to(pets)
    os.mkfifo(pets / "cat" / "pipe.png")
    assert stat.S_ISFIFO((pets / "cat" / "pipe.png").stat().st_mode)
    source = from_folder(pets)
    assert sum(map(len, source.splits.values())) == 40


def test_a_linked_class_folder_is_followed(pets: Path, tmp_path: Path):
    (pets / "dog").rename(tmp_path / "elsewhere")
    (pets / "dog").symlink_to(tmp_path / "elsewhere")
    assert sum(map(len, load_data(pets).splits.values())) == 40


def hostile_zip(pets: Path, **members: bytes) -> Path:
    path = zipped(pets, "hostile.zip")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items():
            z.writestr(name, data)
    return path


@pytest.mark.parametrize("name", ["../../cat/evil.png", "/cat/evil.png", "cat\\..\\..\\evil.png", "C:/cat/evil.png"])
def test_a_zip_path_that_leads_out_is_reported_and_nothing_is_written(pets: Path, tmp_path: Path, name: str):
    path = hostile_zip(pets, **{name: encoded(noise(12, 12, 5))})
    before = sorted(tmp_path.rglob("*"))
    data = load_data(path)
    assert [reason for _, reason in data.skipped] == ["unsafe path in the zip"]
    assert sum(map(len, data.splits.values())) == 40
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bomb_in_a_zip_is_skipped(pets: Path, monkeypatch):
    bomb = encoded(Image.new("1", (9000, 9000)))
    data = load_data(hostile_zip(pets, **{"cat/bomb.png": bomb}))
    assert data.skipped == [("cat/bomb.png", "9000x9000 has too many pixels (limit 80 million)")]
    monkeypatch.setattr("trimtab.data.folders.MAX_FILE_BYTES", 10_000)
    data = load_data(hostile_zip(pets, **{"cat/zeros.png": bytes(20_000)}))
    assert data.skipped[0][0] == "cat/zeros.png"
    assert "20000 bytes when unpacked" in data.skipped[0][1]


def test_a_damaged_member_is_skipped(pets: Path):
    path = zipped(pets)
    with zipfile.ZipFile(path) as z:
        info = z.getinfo("cat/007.png")
    raw = bytearray(path.read_bytes())
    raw[info.header_offset + 80] ^= 0xFF
    path.write_bytes(raw)
    data = load_data(path)
    assert data.skipped[0][0] == "cat/007.png"
    assert "damaged in the zip" in data.skipped[0][1]


def test_a_file_that_is_no_zip(tmp_path: Path):
    (tmp_path / "a.zip").write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match=r"a\.zip is not a readable zip file"):
        load_data(tmp_path / "a.zip")
