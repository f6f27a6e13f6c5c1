"""Files are whole or not there, and packages import their names when they are used."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trimtab.core.files import replacing, write_bytes, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), replacing(target) as new:
        new.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    target = write_bytes(tmp_path / "a.bin", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(target, b"new")
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    target = write_bytes(tmp_path / "a.bin", b"old")
    with replacing(target) as new:
        new.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    old, young = tmp_path / ".a.txt.old.tmp", tmp_path / ".a.txt.young.tmp"
    old.touch(), young.touch()
    os.utime(old, (0, 0))
    write_text(tmp_path / "a.txt", "")
    assert sorted(os.listdir(tmp_path)) == [".a.txt.young.tmp", "a.txt"]


def test_files_get_the_permissions_of_any_new_file(tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    assert write_text(tmp_path / "ours", "").stat().st_mode == usual.stat().st_mode


def test_packages_import_their_names_when_they_are_used():
    code = (
        "import sys, trimtab.data as d; before = 'torch' in sys.modules; d.load_data;"
        "print(before, 'torch' in sys.modules, 'load_data' in dir(d))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


def test_an_unknown_name_of_a_package_is_an_attribute_error():
    import trimtab.data

    with pytest.raises(AttributeError, match=r"'trimtab\.data' has no attribute 'nothing'"):
        _ = trimtab.data.nothing
