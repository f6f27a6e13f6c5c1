"""Logging and the description of the machine."""

from __future__ import annotations

import io
import json
import logging

import pytest

from trimtab.core import host, log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restore():
    root = log.logger()
    before = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.level, root.propagate = before


def said(verbosity: int, stream: io.StringIO) -> str:
    log.setup(verbosity, stream)
    mine = log.logger("trimtab.some.module")
    mine.debug("detail")
    mine.info("news")
    mine.warning("care")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("verbosity", "words"), [(-1, {"care"}), (0, {"news", "care"}), (1, {"detail", "news", "care"})]
)
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_verbosity_decides_what_is_said(verbosity, words, stream):
    text = said(verbosity, stream())
    assert {w for w in ("detail", "news", "care") if w in text} == words


def test_a_file_gets_plain_lines():
    assert said(0, io.StringIO()) == "news\nwarning: care\n"


def test_setup_twice_says_things_once():
    log.setup(0, io.StringIO())
    assert said(0, io.StringIO()).count("news") == 1


def test_importing_configures_nothing():
    root = logging.getLogger("trimtab.fresh")
    assert not root.handlers


def test_no_progress_bars_outside_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    log.setup(0)
    assert not log.progress_wanted()
    monkeypatch.setattr("sys.stderr", Terminal())
    log.setup(0)
    assert log.progress_wanted()
    log.setup(-1)
    assert not log.progress_wanted()


def test_machine_and_versions_are_json():
    here = json.loads(json.dumps(host.machine()))
    assert here["cores"] >= 1 and here["cpu"]
    found = host.versions()
    assert {"python", "trimtab", "torch", "timm"} <= set(found)


def test_commit_marks_changed_files(tmp_path):
    import subprocess

    def git(*args: str) -> str:
        user = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", "-C", tmp_path, *user, *args], check=True, capture_output=True, text=True).stdout

    assert host.commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "a")
    head = git("rev-parse", "HEAD").strip()
    assert host.commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert host.commit(tmp_path) == head + "-dirty"
