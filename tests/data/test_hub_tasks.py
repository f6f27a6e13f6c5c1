"""Pictures with masks, with boxes, and alone: from the hub as from parquet files here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from tests.data import test_detect, test_segment
from tests.data.conftest import encoded, noise
from trimtab.core.errors import DataError
from trimtab.data import load_data

TASKS = ("segment", "detect", "restore")


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """A folder with parquet files of two splits for every task."""
    for split, n in (("train", 20), ("test", 6)):
        mask = [encoded(test_segment.stripes(8, 12, i % 2, 1)) for i in range(n)]
        rows = [(encoded(noise(8, 12, 10 * n + i)), mask[i]) for i in range(n)]
        boxes = [{"bbox": [[1, 1, 5, 6 + i % 2]], "category": [i % 2]} for i in range(n)]
        for task in TASKS:
            (tmp_path / "street" / task).mkdir(parents=True, exist_ok=True)
        file = f"{split}-00000-of-00001.parquet"
        test_segment.parquet(tmp_path / "street" / "segment" / file, rows)
        test_detect.parquet(tmp_path / "street" / "detect" / file, boxes, names=["car", "bus"])
        large = [(encoded(noise(40, 44, 10 * n + i)), mask[i]) for i in range(n)]
        test_segment.parquet(tmp_path / "street" / "restore" / file, large)
    return tmp_path / "street"


@pytest.fixture
def hub(street: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """`datasets.load_dataset` as if the hub had the folder as someone/street; gives what it is asked."""
    asked, real = [], datasets.load_dataset

    def load(repo: str, config: str | None = None) -> Any:
        asked.append((repo, config))
        return real("parquet", data_dir=str(street / (config or "segment")), cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("trimtab.data.parquet._check_network", lambda *args: None)
    return asked


@pytest.mark.parametrize("task", TASKS)
def test_the_hub_gives_what_the_same_files_here_give(street: Path, hub: list[Any], tmp_path: Path, task: str) -> None:
    want = load_data(street / task, task=task)
    saved = tmp_path / "saved"
    datasets.load_dataset("x", task).save_to_disk(str(saved))
    for spec in (f"someone/street:{task}", f"hub:street:{task}", saved):
        got = load_data(spec, task=task)
        assert (got.task, got.class_names, got.size) == (task, want.class_names, want.size)
        assert {s: len(part) for s, part in got.splits.items()} == {s: len(part) for s, part in want.splits.items()}
        for split in want.splits:
            one, other = (next(iter(d.loader(split, batch_size=4, shuffle=False))) for d in (got, want))
            assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert hub[1:] == [("someone/street", task), ("street", task)] and got.name == "saved"


def test_a_dataset_without_what_the_task_needs_is_an_error(hub: list[Any]) -> None:
    with pytest.raises(DataError, match=r"street has no objects \(boxes\) column; columns: image, annotation"):
        load_data("someone/street", task="detect")
    with pytest.raises(DataError, match=r"street has no annotation \(masks\) column; columns: image, objects"):
        load_data("someone/street:detect", task="segment")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("task", TASKS)
def test_without_a_network_it_is_said_at_once(task: str) -> None:
    with pytest.raises(DataError, match="'someone/something' is not a folder here, and the Hugging Face hub cannot be"):
        load_data("someone/something", task=task)
    with pytest.raises(DataError, match=f"data for task '{task}' must be .*owner/name.*; got 'nowhere'"):
        load_data("nowhere", task=task)
