from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.data.conftest import fill, noise
from trimtab.core.errors import DataError
from trimtab.data import Data, decode, load_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def same(a: Data, b: Data) -> None:
    assert a.splits.keys() == b.splits.keys()
    assert (a.mean, a.std, a.warnings, a.skipped) == (b.mean, b.std, b.warnings, b.skipped)
    for split in a.splits:
        ours, theirs = (list(d.loader(split, batch_size=8, augment="crop_flip")) for d in (a, b))
        assert len(ours) == len(theirs)
        for x, y in zip(ours, theirs):
            assert all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("how", ["disk", "lazy"])
@pytest.mark.parametrize("damaged", [False, True])
def test_disk_and_lazy_give_what_memory_gives(pets: Path, how: str, damaged: bool):
    if damaged:
        (pets / "cat" / "002.png").write_bytes(b"no picture")
    expected = load_data(pets, cache="memory")
    for _ in range(2):  # the second time from what is on disk
        same(load_data(pets, cache=how), expected)
    same(load_data(pets, cache=how).subset(9), expected.subset(9))


def test_lazy_loading_resumes_and_stops_early(pets: Path):
    data = load_data(pets, cache="lazy")
    options = {"batch_size": 4, "augment": "crop_flip", "seed": 2}
    whole = list(data.loader("train", **options))
    rest = list(data.loader("train", **options, skip=3))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(whole[3:], rest, strict=True))
    next(iter(data.loader("train", **options)))  # a reader that stops does not hang


def test_an_image_that_vanishes_after_loading_is_named(pets: Path):
    data = load_data(pets, cache="lazy")
    shutil.rmtree(pets / "dog")
    with pytest.raises(DataError, match=r"dog/\d+\.png can no longer be read"):
        list(data.loader("train", batch_size=8))


def test_what_does_not_fit_in_memory_goes_to_disk(pets: Path, own_cache: Path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_DATA_MEMORY", "1000")
    data = load_data(pets)
    assert data.splits["train"].mapped
    assert len(list(own_cache.glob("*.u8"))) == len(list(own_cache.glob("*.json"))) == 3
    monkeypatch.setenv("TRIMTAB_DATA_MEMORY", "1e9")
    assert not load_data(pets).splits["train"].mapped


def test_what_does_not_fit_on_disk_either_is_lazy(pets: Path, own_cache: Path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_DATA_MEMORY", "1000")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    data = load_data(pets)
    assert not isinstance(data.splits["train"].images, torch.Tensor)
    assert not own_cache.exists()


def test_parquet_cannot_be_lazy_and_says_what_to_do(tmp_path: Path, write_parquet):
    from tests.data.conftest import encoded

    images = [encoded(noise(8, 8, i)) for i in range(30)]
    write_parquet(tmp_path / "a.parquet", images, [0, 1] * 15)
    with pytest.raises(DataError, match=r"parquet is too slow to be decoded lazily.*image_size"):
        load_data(tmp_path / "a.parquet", cache="lazy")
    same(load_data(tmp_path / "a.parquet", cache="disk"), load_data(tmp_path / "a.parquet"))


def test_the_cache_is_used_and_renewed_when_files_change(pets: Path, own_cache: Path, monkeypatch):
    load_data(pets, cache="disk")
    monkeypatch.setattr(decode, "decode", lambda *a: pytest.fail("decoded again"))
    load_data(pets, cache="disk")
    monkeypatch.undo()
    monkeypatch.setenv("TRIMTAB_CACHE", str(own_cache.parent))
    noise(12, 12, 4242).save(pets / "cat" / "000.png")
    same(load_data(pets, cache="disk"), load_data(pets, cache="memory"))


@pytest.mark.parametrize("hurt", ["truncate", "no note", "bad note"])
def test_a_damaged_cache_is_made_again(pets: Path, own_cache: Path, hurt: str):
    expected = load_data(pets, cache="disk")
    for path in own_cache.glob("*.u8" if hurt == "truncate" else "*.json"):
        if hurt == "no note":
            path.unlink()
        else:  # a new file in its place: the old one is still mapped
            (own_cache / "new").write_bytes(path.read_bytes()[:5])
            (own_cache / "new").replace(path)
    same(load_data(pets, cache="disk"), expected)


def test_an_interrupted_decoding_leaves_nothing_behind(pets: Path, own_cache: Path, monkeypatch):
    calls = []

    def interrupted(*args: object) -> None:
        calls.append(1)
        if len(calls) > 10:
            raise KeyboardInterrupt

    real = decode.to_pixels
    monkeypatch.setattr(decode, "to_pixels", lambda *a, **k: (interrupted(), real(*a))[1])
    with pytest.raises(KeyboardInterrupt):
        load_data(pets, cache="disk")
    assert list(own_cache.iterdir()) == []


def test_a_cache_folder_that_cannot_be_written_is_named(pets: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"the cache of decoded images in .*file"):
        load_data(pets, cache=tmp_path / "file")


def test_a_bar_is_shown_only_on_a_terminal_and_after_a_while(pets: Path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "_SHOW_AFTER", -1.0)
    load_data(pets)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(decode, "progress_wanted", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    load_data(pets)
    assert "reading images" in capsys.readouterr().err


def test_the_memory_cap_can_be_set(monkeypatch):
    assert decode.memory_cap() >= 64 * 2**20
    monkeypatch.setenv("TRIMTAB_DATA_MEMORY", "2e9")
    assert decode.memory_cap() == 2 * 10**9
    monkeypatch.setenv("TRIMTAB_DATA_MEMORY", "lots")
    with pytest.raises(ValueError, match="must be a number of bytes, got 'lots'"):
        decode.memory_cap()


def test_many_threads_keep_order(tmp_path: Path, monkeypatch):
    fill(tmp_path / "d" / "a", 90, 1)
    fill(tmp_path / "d" / "b", 90, 2)
    monkeypatch.setattr(decode, "workers", lambda: 8)
    many = load_data(tmp_path / "d")
    monkeypatch.setattr(decode, "workers", lambda: 1)
    same(many, load_data(tmp_path / "d"))
