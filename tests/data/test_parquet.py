from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import encoded, noise
from trimtab.core.errors import DataError
from trimtab.data import load_data


def pictures(n: int, seed: int) -> list[bytes]:
    return [encoded(noise(10, 10, seed * 1000 + i)) for i in range(n)]


@pytest.fixture
def folder(tmp_path: Path, write_parquet: Callable) -> Path:
    root = tmp_path / "birds"
    write_parquet(root / "train-00000-of-00002.parquet", pictures(20, 1), [0, 1] * 10, ["crow", "wren"])
    write_parquet(root / "train-00001-of-00002.parquet", pictures(10, 2), [0, 1] * 5, ["crow", "wren"])
    write_parquet(root / "test-00000-of-00001.parquet", pictures(6, 3), [1, 0] * 3, ["crow", "wren"])
    return root


def test_hugging_face_layout(folder: Path):
    data = load_data(folder)
    assert data.class_names == ["crow", "wren"]
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 27, "val": 3, "test": 6}
    assert not data.warnings
    assert data.splits["test"].labels.tolist() == [1, 0] * 3
    for i in range(6):
        assert np.array_equal(np.asarray(data.splits["test"].image(i)), np.asarray(noise(10, 10, 3000 + i)))
    train = data.splits["train"]
    for i, name in enumerate(train.names):  # rows from both shards, through small row groups
        shard, row = ("train-00000" in name), int(name.split()[-1])
        expected = noise(10, 10, (1000 if shard else 2000) + row)
        assert np.array_equal(np.asarray(train.image(i)), np.asarray(expected))


@pytest.mark.parametrize("layout", ["data/{}-00000-of-00001.parquet", "default/{}/0000.parquet", "{}.parquet"])
def test_other_layouts(tmp_path: Path, write_parquet: Callable, layout: str):
    for k, split in enumerate(("train", "validation", "test")):
        write_parquet(tmp_path / "d" / layout.format(split), pictures(20, k), [0, 1] * 10)
    data = load_data(tmp_path / "d")
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 20, "val": 20, "test": 20}


def test_a_single_file_is_train(tmp_path: Path, write_parquet: Callable):
    write_parquet(tmp_path / "all.parquet", pictures(30, 1), ["b", "a", "c"] * 10)
    data = load_data(tmp_path / "all.parquet")
    assert data.class_names == ["a", "b", "c"]
    assert sum(map(len, data.splits.values())) == 30


def test_numbers_that_are_not_0_to_n_are_renumbered(tmp_path: Path, write_parquet: Callable):
    write_parquet(tmp_path / "all.parquet", pictures(30, 1), [30, 4, 7] * 10)
    data = load_data(tmp_path / "all.parquet")
    assert data.class_names == ["4", "7", "30"]
    assert set(data.splits["train"].labels.tolist()) == {0, 1, 2}


def test_two_label_columns(tmp_path: Path, write_parquet: Callable):
    write_parquet(tmp_path / "all.parquet", pictures(30, 1), [0, 1] * 15, ["x", "y"], label="fine_label")
    assert load_data(tmp_path / "all.parquet").class_names == ["x", "y"]


def test_a_test_split_without_labels_is_not_used(tmp_path: Path, write_parquet: Callable):
    write_parquet(tmp_path / "d" / "train.parquet", pictures(30, 1), [0, 1] * 15, ["x", "y"])
    write_parquet(tmp_path / "d" / "test.parquet", pictures(4, 2), [-1] * 4, ["x", "y"])
    data = load_data(tmp_path / "d")
    assert "test has no labels and was not used" in data.warnings
    assert len(data.splits["test"]) == 6  # made from train


def test_rows_without_label_or_image_are_skipped(tmp_path: Path, write_parquet: Callable):
    images: list = pictures(60, 1)
    images[5], images[7] = None, b"broken"
    labels: list = [0, 1] * 30
    labels[9] = None
    write_parquet(tmp_path / "all.parquet", images, labels, ["x", "y"])
    data = load_data(tmp_path / "all.parquet")
    assert dict(data.skipped) == {
        "all.parquet row 5": "no image in this row",
        "all.parquet row 7": "not an image of a known format",
        "all.parquet row 9": "no valid label",
    }
    assert sum(map(len, data.splits.values())) == 57


def test_paths_are_read_below_the_folder_only(tmp_path: Path, write_parquet: Callable):
    (tmp_path / "d" / "img").mkdir(parents=True)
    cells = []
    for i, data in enumerate(pictures(40, 1)):
        (tmp_path / "d" / "img" / f"{i}.png").write_bytes(data)
        cells.append({"bytes": None, "path": f"img/{i}.png"})
    (tmp_path / "secret.png").write_bytes(pictures(1, 2)[0])
    cells[3] = {"bytes": None, "path": "../secret.png"}
    cells[4] = {"bytes": None, "path": "img/absent.png"}
    write_parquet(tmp_path / "d" / "train.parquet", cells, [0, 1] * 20)
    data = load_data(tmp_path / "d")
    assert dict(data.skipped) == {
        "train.parquet row 3": "its path leads out of the dataset's folder",
        "train.parquet row 4": "No such file or directory",
    }


def test_a_missing_shard_is_reported(folder: Path):
    (folder / "train-00001-of-00002.parquet").unlink()
    assert "only 1 of 2 parquet files of train are there" in load_data(folder).warnings


def test_a_declared_class_without_images_is_reported(tmp_path: Path, write_parquet: Callable):
    write_parquet(tmp_path / "all.parquet", pictures(30, 1), [0, 2] * 15, ["x", "gone", "z"])
    data = load_data(tmp_path / "all.parquet")
    assert data.num_classes == 3
    assert "classes without training images: gone" in data.warnings


def test_missing_columns_are_explained(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"sentence": ["a", "b"], "label": [0, 1]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match=r"no image column .*columns: sentence, label"):
        load_data(tmp_path / "text.parquet")
    pq.write_table(pa.table({"image": [b"a", b"b"], "boxes": [[0], [1]]}), tmp_path / "boxes.parquet")
    with pytest.raises(DataError, match=r"no label column .*columns: image, boxes"):
        load_data(tmp_path / "boxes.parquet")


def test_a_damaged_file_is_an_error_that_names_it(folder: Path):
    path = folder / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="birds has a damaged parquet file for test"):
        load_data(folder)


def test_several_datasets_in_one_folder_are_an_error(tmp_path: Path, write_parquet: Callable):
    for name in ("one", "two"):
        write_parquet(tmp_path / "d" / name / "train.parquet", pictures(4, 1), [0, 1] * 2)
    with pytest.raises(DataError, match="holds several datasets; give one of its folders: one, two"):
        load_data(tmp_path / "d")


def test_overlap_is_found_in_parquet_too(tmp_path: Path, write_parquet: Callable):
    images = pictures(30, 1)
    write_parquet(tmp_path / "d" / "train.parquet", images, [0, 1] * 15)
    write_parquet(tmp_path / "d" / "test.parquet", images[:4], [0, 1] * 2)
    assert any("4 of 4 test images are also in train" in w for w in load_data(tmp_path / "d").warnings)


def test_a_hub_name_goes_through_load_dataset(folder: Path, tmp_path: Path, monkeypatch):
    """The real `datasets.load_dataset`, given a local folder where it would go to the hub."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data, local = load_data(f"hub:{folder}"), load_data(folder)
    assert data.class_names == ["crow", "wren"]
    for split in local.splits:
        assert (data.splits[split].images == local.splits[split].images).all()
        assert (data.splits[split].labels == local.splits[split].labels).all()


def test_a_dataset_saved_to_disk(folder: Path, tmp_path: Path):
    import datasets

    found = datasets.load_dataset("parquet", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    found.save_to_disk(str(tmp_path / "saved"))
    data = load_data(tmp_path / "saved")
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 27, "val": 3, "test": 6}


@pytest.mark.usefixtures("no_network")
def test_no_network_is_said_at_once():
    start = time.monotonic()
    with pytest.raises(DataError, match="'someone/something' is not a folder here, and the Hugging Face hub cannot be"):
        load_data("someone/something")
    assert time.monotonic() - start < 10
