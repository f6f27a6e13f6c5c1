"""Runs to render, and a browser to open them in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.report import browser as chromium
from tests.report import sample


@pytest.fixture
def run() -> dict[str, Any]:
    """A realistic run that met its budget; each test may change its own copy."""
    return sample.realistic()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """For the tests of one file: while it is open, an event loop runs, and others could not start theirs."""
    problem = chromium.missing()
    if problem and os.environ.get("CI"):
        pytest.fail(problem)
    if problem:
        pytest.skip(problem)
    with chromium.opened() as opened:
        yield opened
