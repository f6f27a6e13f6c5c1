"""What all tests of the command line share."""

from __future__ import annotations

import pytest

from trimtab import cli


@pytest.fixture
def trimtab(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        return code, out, err

    return call
