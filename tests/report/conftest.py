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


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    problem = chromium.missing()
    if problem and os.environ.get("CI"):
        pytest.fail(problem)
    if problem:
        pytest.skip(problem)
    with chromium.opened() as opened:
        yield opened
