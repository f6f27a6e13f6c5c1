from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def noise(h: int, w: int, seed: int, mode: str = "RGB") -> Image.Image:
    """An image that no other seed gives."""
    shape = (h, w) if mode == "L" else (h, w, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def fill(folder: Path, n: int, seed: int, size: tuple[int, int] = (12, 12)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        noise(*size, seed * 1000 + i).save(folder / f"{i:03}.png")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two classes of 20 small images."""
    root = tmp_path / "pets"
    fill(root / "cat", 20, 1)
    fill(root / "dog", 20, 2)
    return root


@pytest.fixture
def split_pets(tmp_path: Path) -> Path:
    root = tmp_path / "split_pets"
    for k, (split, n) in enumerate((("train", 20), ("val", 4), ("test", 6))):
        fill(root / split / "cat", n, 10 + k)
        fill(root / split / "dog", n, 20 + k)
    return root


@pytest.fixture
def write_parquet() -> Callable[..., None]:
    """write_parquet(path, images, labels, names=None, label="label", feature=True)"""

    def write(path: Path, images: list, labels: list, names: list[str] | None = None, label: str = "label") -> None:
        import json

        import pyarrow as pa
        import pyarrow.parquet as pq

        cells = [c if isinstance(c, dict) or c is None else {"bytes": c, "path": None} for c in images]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(cells, kind), label: pa.array(labels)})
        if names is not None:
            features = {"image": {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=7)

    return write


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a network, and with nothing of the hub's on its disk."""

    def unknown(*args: object) -> None:
        raise OSError(-2, "Name or service not known")

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
