"""One model, one server and one browser for all tests of serving."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from torch import nn

from tests.deploy.serve.service import Service, running
from tests.report.conftest import browser  # noqa: F401
from trimtab.core.spec import InputSpec
from trimtab.deploy import export

# mean and deviation 0.5: the strongest channel is fed as +1, the others as -1
SPEC = InputSpec((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
HOSTILE = '<img src=x onerror="window.hacked = 1">'
LABELS = ["red", "green", HOSTILE]


@pytest.fixture(scope="session")
def colour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that says which colour channel is brightest; its name for blue is not a nice one."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.dirac_(model[0].weight)
    path = tmp_path_factory.mktemp("served") / "colour.onnx"
    return export(model, path, spec=SPEC, labels=LABELS, exporter="classic").path


@pytest.fixture(scope="session")
def service(colour: Path) -> Iterator[Service]:
    limits = ("--seconds", "2", "--max-mb", "0.2", "--max-megapixels", "1", "--places", "8", "--max-batch", "8")
    with running(colour, *limits) as started:
        yield started
        assert started.process.poll() is None  # nothing that the tests sent has brought it down


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.address, timeout=20, trust_env=False) as opened:
        yield opened
