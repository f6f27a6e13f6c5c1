"""Write data as parquet in Hugging Face layout: what was chosen, relabelled or made, for `load_data` to read again."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from trimtab.core.errors import DataError
from trimtab.core.files import replacing
from trimtab.data.dataset import Data, Split
from trimtab.data.images import Unreadable
from trimtab.data.sources import Items, Source

SHARD = 20_000  # images of a file
_GROUP = 200  # images of a row group


def write_parquet(data: Data, out: str | os.PathLike[str], *, source: Source | None = None) -> list[Path]:
    """All splits as ``SPLIT-00000-of-00001.parquet``; gives the files.

    Args:
        out: a folder without parquet files in it.
        source: where the images came from (`sources.find_source`). Their files are then copied byte by byte; otherwise
            the decoded images are written as PNG.

    Raises:
        DataError: `out` holds a data set already, or an image is not in the source or can no longer be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(out)
    if folder.is_dir() and any(folder.glob("*.parquet")):
        raise DataError(f"{folder} holds a data set already; give another folder, or delete it")
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": data.class_names}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata=about)
    files = []
    for name, split in data.splits.items():
        shards = -(-len(split) // SHARD)
        rows = _rows(name, split, source)
        for shard in range(shards):
            files.append(folder / f"{name}-{shard:05}-of-{shards:05}.parquet")
            left = min(SHARD, len(split) - shard * SHARD)
            with replacing(files[-1]) as new, pq.ParquetWriter(new, schema) as writer:
                while left:
                    some = [next(rows) for _ in range(min(_GROUP, left))]
                    writer.write_table(pa.Table.from_pylist(some, schema))
                    left -= len(some)
    return files


def _rows(name: str, split: Split, source: Source | None) -> Iterator[dict[str, Any]]:
    items = None if source is None else source.splits.get(name, source.splits.get("train"))
    places = {} if items is None else {n: i for i, n in enumerate(items.names)}
    for i, (called, label) in enumerate(zip(split.names, split.labels.tolist())):
        if items is not None and called not in places:
            raise DataError(f"{called} is not in {source.name}")  # type: ignore[union-attr]
        encoded = _png(split.image(i)) if items is None else _bytes(items, places[called])
        yield {"image": {"bytes": encoded, "path": called}, "label": label}


def _bytes(items: Items, i: int) -> bytes:
    try:
        found = items.read(i)
    except (Unreadable, OSError) as e:
        raise DataError(f"{items.names[i]} can no longer be read: {e}") from e
    return found if isinstance(found, bytes) else _png(found)


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
