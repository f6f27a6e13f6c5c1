"""Parquet in Hugging Face layout, datasets saved to disk, and datasets of the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from trimtab.core.errors import DataError
from trimtab.data.images import MAX_FILE_BYTES, Unreadable
from trimtab.data.sources import SPLITS, Items, Source, hub_name, printable

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
_LABELS = ("label", "labels", "fine_label", "class", "target", "category")
_IMAGES = ("image", "img", "picture", "jpg", "png")


def parquet_files(root: Path) -> dict[str, list[Path]]:
    """Parquet files of each split below `root`; a file whose name and folder say nothing belongs to train."""
    out: dict[str, list[Path]] = {}
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [b for b in below if not b.startswith(".")]
        found += [Path(folder, n) for n in names if n.endswith(".parquet") and not n.startswith(".")]
    for path in sorted(found):
        out.setdefault(_split_of(path, root), []).append(path)
    return out


def from_parquet(path: Path) -> Source:
    """A parquet file, or a folder of them (``train-00000-of-00001.parquet``, ``data/test-...``, ``test/0000.parquet``).

    Raises:
        DataError: when there is no image or no label column, or a file is damaged.
    """
    found, warnings = tables(path)
    columns: tuple[str, str] | None = None
    readers, raw, names, class_names = {}, {}, {}, None
    for split, table in found.items():
        image, label = columns = columns or _columns(str(path), list(table.types), table.types, table.features)
        raw[split] = table.values(label, beside=image)
        readers[split] = _Rows(table.paths, image)
        names[split] = table.row_names(readers[split])
        class_names = class_names or _class_names(table.features, label)
    return _source(name_of(path), readers, names, raw, class_names, warnings)


def name_of(path: Path) -> str:
    """What a data set of parquet files is called."""
    return path.stem if path.is_file() else path.resolve().name


@dataclass
class Table:
    """The parquet files of one split: columns with their types (in words) and Hugging Face features."""

    where: str
    split: str
    paths: list[Path]
    types: dict[str, str]
    features: dict[str, Any]

    def values(self, column: str, *, beside: str | None = None) -> list[Any]:
        """A column as plain values; every file must have it, and `beside`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        values: list[Any] = []
        try:
            for p in self.paths:
                file = pq.ParquetFile(p)
                if not {beside or column, column} <= set(file.schema_arrow.names):
                    words = f"columns {beside!r} and {column!r}" if beside else f"column {column!r}"
                    raise DataError(f"{p} has no {words}, unlike {self.paths[0].name}")
                values += file.read(columns=[column]).column(0).to_pylist()
        except (pa.ArrowException, OSError) as e:
            raise self._damaged(e) from e
        return values

    def pictures(self, taken: Sequence[str] = ()) -> Items:
        """The image column, stretched when decoded. taken: columns of images that are something else."""
        column = self.column("image", [n for n in _images(self.types, self.features) if n not in taken])
        reader = self.reader(column)
        count = sum(reader.lengths)
        return Items(reader, np.arange(count), np.zeros(count, np.int64), self.row_names(reader), "stretch")

    def reader(self, column: str) -> _Rows:
        """Encoded images of a column, which every file must have."""
        reader = _Rows(self.paths, column)
        for p, file in zip(self.paths, reader.files, strict=True):
            if column not in file.schema_arrow.names:
                raise DataError(f"{p} has no column {column!r}, unlike {self.paths[0].name}")
        return reader

    def column(self, what: str, candidates: Sequence[str]) -> str:
        """The first of the candidates that there is."""
        for name in candidates:
            if name in self.types:
                return name
        raise DataError(f"{self.where} has no {what} column; columns: {', '.join(self.types)}")

    def class_names(self, column: str) -> list[str]:
        """Of a column, or of the ``category`` in it; empty where the features do not say."""
        feature = self.features.get(column) or {}
        inner = feature.get("category", feature) if isinstance(feature, dict) else {}
        inner = inner.get("feature", inner) if isinstance(inner, dict) else {}
        return _class_names({column: inner}, column) or []

    def row_names(self, reader: _Rows) -> list[str]:
        return [f"{p.name} row {i}" for p, n in zip(reader.paths, reader.lengths) for i in range(n)]

    def _damaged(self, e: Exception) -> DataError:
        return DataError(f"{self.where} has a damaged parquet file for {self.split}: {str(e)[:160]}")


def tables(path: Path, *, need_train: bool = True) -> tuple[dict[str, Table], list[str]]:
    """The splits of a parquet file or a folder of them, and what is odd about the files.

    Raises:
        DataError: when there are none for train, several data sets, or a file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = {"train": [path]} if path.is_file() else parquet_files(path)
    if need_train and "train" not in files:
        raise DataError(f"{path} has parquet files for {' and '.join(files)} but none for train")
    configs = {p.parent.parent if p.parent.name.lower() in SPLITS else p.parent for fs in files.values() for p in fs}
    if len(configs) > 1:
        choices = ", ".join(sorted(str(c.relative_to(path)) for c in configs)[:5])
        raise DataError(f"{path} holds several datasets; give one of its folders: {choices}")
    out = {}
    for split, paths in files.items():
        table = out[split] = Table(str(path), split, paths, {}, {})
        try:
            opened = [pq.ParquetFile(p) for p in paths]  # all of them: a damaged one is found now
            schema = opened[0].schema_arrow
        except (pa.ArrowException, OSError) as e:
            raise table._damaged(e) from e
        table.types, table.features = {f.name: str(f.type) for f in schema}, _features(schema.metadata)
    return out, [w for fs in files.values() for w in _missing_shards(fs)]


class Held(Table):
    """The same of a `datasets.Dataset`."""

    def __init__(self, where: str, split: str, data: Any) -> None:
        types = {name: str(getattr(feature, "dtype", feature)) for name, feature in data.features.items()}
        super().__init__(where, split, [], types, data.features.to_dict())
        self.data = data

    def values(self, column: str, *, beside: str | None = None) -> list[Any]:
        return list(self.data.select_columns([column])[column])

    def reader(self, column: str) -> Any:
        return _Dataset(self.data, column)

    def row_names(self, reader: Any) -> list[str]:
        return [f"{self.split} row {i}" for i in range(len(self.data))]


def find_tables(spec: str, *, need_train: bool = True) -> tuple[str, dict[str, Any], list[str]] | None:
    """What a data set is called, its splits, and what is odd about it; None if `spec` names none that has tables.

    Args:
        spec: parquet files, a dataset saved to disk, or one of the hub.
        need_train: whether there must be a split for training.

    Raises:
        DataError: it cannot be read, or reached.
    """
    path, online = Path(spec).expanduser(), hub_name(spec)
    if path.suffix == ".parquet" or (path.is_dir() and parquet_files(path)):
        return name_of(path), *tables(path, need_train=need_train)
    if is_saved(path):
        name, found = path.resolve().name, _from_disk(path)
    elif online is not None:
        name, found = _short(online), _from_hub(online)
    else:
        return None
    splits, warnings = _splits(found, name, need_train=need_train)
    return name, {split: Held(name, split, data) for split, data in splits.items()}, warnings


def is_saved(path: Path) -> bool:
    """Whether a folder is a dataset written by ``Dataset.save_to_disk``."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def from_disk(path: Path) -> Source:
    """A dataset written by ``Dataset.save_to_disk``."""
    return from_dataset(_from_disk(path), path.resolve().name)


def hub(name: str) -> Source:
    """A dataset of the hub by name, ``owner/name`` or ``owner/name:config``; downloaded once by `datasets`.

    Datasets that are Python scripts are refused by `datasets` itself: nothing from the hub is executed.
    """
    return from_dataset(_from_hub(name), _short(name))


def _short(name: str) -> str:
    return name.partition(":")[0].split("/")[-1]


def _from_disk(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as e:
        raise DataError(f"{path} cannot be read as a saved dataset: {_line(e)}") from e


def _from_hub(name: str) -> Any:
    import datasets

    repo, _, config = name.partition(":")
    if not Path(repo).exists() and not (Path(datasets.config.HF_DATASETS_CACHE) / repo.replace("/", "___")).exists():
        _check_network(repo, datasets.config.HF_ENDPOINT)
    try:
        return datasets.load_dataset(repo, config or None)
    except Exception as e:  # network, missing, gated, needs a config: each library layer has its own types
        raise DataError(f"{repo!r} is not a folder here, and the Hugging Face hub did not give it: {_line(e)}") from e


def _check_network(repo: str, endpoint: str) -> None:
    """Without a network, say so at once: `datasets` would try for half a minute."""
    if any(k.lower() in ("https_proxy", "http_proxy", "all_proxy") for k in os.environ):
        return
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
    except OSError as e:
        raise DataError(
            f"{repo!r} is not a folder here, and the Hugging Face hub cannot be reached ({e.strerror or e})"
        ) from e


def from_dataset(found: Any, name: str) -> Source:
    """From a `datasets.Dataset` or `DatasetDict`."""
    splits, warnings = _splits(found, name, need_train=True)
    readers, raw, names, class_names = {}, {}, {}, None
    for split, data in splits.items():
        table = Held(name, split, data)
        image, label = _columns(name, data.column_names, table.types, table.features)
        readers[split], raw[split] = table.reader(image), table.values(label)
        names[split] = table.row_names(readers[split])
        class_names = class_names or _class_names(table.features, label)
    return _source(name, readers, names, raw, class_names, warnings)


def _splits(found: Any, name: str, *, need_train: bool) -> tuple[dict[str, Any], list[str]]:
    """The splits that are used, by our names, and a word on the others."""
    splits: dict[str, Any] = dict(found) if isinstance(found, dict) else {"train": found}
    known = {SPLITS[s.lower()]: d for s, d in splits.items() if s.lower() in SPLITS}
    if "train" not in known and (need_train or not known):
        raise DataError(f"{name} has splits {', '.join(splits)} but no train")
    return known, [f"split {s!r} of {name} was not used" for s in splits if s.lower() not in SPLITS]


class _Rows:
    """The image column of parquet files, read one row group at a time; the last few stay in memory."""

    random_access = False

    def __init__(self, paths: list[Path], column: str) -> None:
        import pyarrow.parquet as pq

        self.paths, self.column = paths, column
        self.files = [pq.ParquetFile(p) for p in paths]
        self.lengths = [f.metadata.num_rows for f in self.files]
        self.groups = [(k, g) for k, f in enumerate(self.files) for g in range(f.metadata.num_row_groups)]
        sizes = [self.files[k].metadata.row_group(g).num_rows for k, g in self.groups]
        self.ends = np.cumsum(sizes)
        self._recent: OrderedDict[int, list[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, i: int) -> bytes:
        group = int(np.searchsorted(self.ends, i, side="right"))
        with self._lock:
            if group not in self._recent:
                k, g = self.groups[group]
                try:
                    self._recent[group] = _cells(self.files[k].read_row_group(g, columns=[self.column]).column(0))
                except Exception as e:
                    raise Unreadable(f"damaged parquet row group: {_line(e)}") from e
                if len(self._recent) > 4:
                    self._recent.popitem(last=False)
            cells = self._recent[group]
            cell = cells[i - int(self.ends[group])]  # counted from the end
        return _cell_bytes(cell, self.paths[self.groups[group][0]].parent, trusted=False)

    def nbytes(self, i: int) -> int | None:
        return None

    def stamp(self) -> str:
        return repr([(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in self.paths])


class _Dataset:
    """The image column of a `datasets.Dataset`."""

    random_access = True

    def __init__(self, data: Any, column: str) -> None:
        import datasets

        if isinstance(data.features[column], datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
        self.data, self.column, self.lengths = data.select_columns([column]), column, [len(data)]

    def read(self, i: int) -> Any:
        return _cell_bytes(self.data[i][self.column], None, trusted=True)

    def nbytes(self, i: int) -> int | None:
        return None

    def stamp(self) -> str:
        return str(getattr(self.data, "_fingerprint", ""))


def _cells(column: Any) -> list[Any]:
    """One value per row: bytes where the bytes are in the file, otherwise the {"path"} of them."""
    import pyarrow as pa

    if not pa.types.is_struct(column.type):
        return column.to_pylist()
    column = column.combine_chunks()
    cells = column.field("bytes").to_pylist()
    if None in cells:
        cells = [c if c is not None else row.as_py() for c, row in zip(cells, column)]
    return cells


def _cell_bytes(cell: Any, folder: Path | None, *, trusted: bool) -> Any:
    """Encoded bytes of one cell: {"bytes", "path"}, bytes, or what `datasets` decoded already."""
    if cell is None:
        raise Unreadable("no image in this row")
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if data is not None:
        if isinstance(data, bytes) and len(data) > MAX_FILE_BYTES:
            raise Unreadable(f"larger than {MAX_FILE_BYTES >> 20} MiB")
        return data
    if not path:
        raise Unreadable("no image in this row")
    file = Path(path) if folder is None else folder / path
    if not trusted and folder is not None and not file.resolve().is_relative_to(folder.resolve()):
        raise Unreadable("its path leads out of the dataset's folder")
    if file.stat().st_size > MAX_FILE_BYTES:
        raise Unreadable(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return file.read_bytes()


def _source(
    name: str, readers: dict[str, Any], names: dict[str, list[str]], raw: dict[str, list[Any]],
    class_names: list[str] | None, warnings: list[str],
) -> Source:  # fmt: skip
    """Labels of any kind to 0..num_classes-1, and rows without one out."""
    values = {s: [_label_value(v) for v in column] for s, column in raw.items()}
    if class_names is None:
        seen = {v for column in values.values() for v in column if v is not None}
        kinds = {type(v) for v in seen}
        if not seen or len(kinds) > 1:
            got = " and ".join(sorted(k.__name__ for k in kinds)) or "none"
            raise DataError(f"{name}: labels must be all whole numbers or all text, got {got}")
        ordered = sorted(seen)
        class_names, index = [printable(str(v)) for v in ordered], {v: k for k, v in enumerate(ordered)}
    else:
        index = {k: k for k in range(len(class_names))} | {n: k for k, n in enumerate(class_names)}
    items, skipped = {}, []
    for split, column in values.items():
        labels = np.asarray([-1 if v is None else index.get(v, -1) for v in column], np.int64)
        rows = np.flatnonzero(labels >= 0)
        if not len(rows):
            if split == "train":
                raise DataError(f"{name}: train has no labelled rows")
            warnings.append(f"{split} has no labels and was not used")
            continue
        skipped += [(names[split][i], "no valid label") for i in np.flatnonzero(labels < 0).tolist()]
        items[split] = Items(readers[split], rows, labels[rows], [names[split][i] for i in rows.tolist()])
    return Source(name, items, class_names, warnings, skipped)


def _label_value(v: Any) -> int | str | None:
    """None for no label: null, NaN, or the -1 of hidden test labels."""
    if isinstance(v, (bool, int)):
        return int(v) if v >= 0 else None
    if isinstance(v, float):
        return int(v) if v >= 0 and v == int(v) else None
    return v if isinstance(v, str) and v else None


def _columns(where: str, names: list[str], types: dict[str, str], features: dict[str, Any]) -> tuple[str, str]:
    """The image and the label column."""
    kinds = {n: features[n].get("_type") for n in names if isinstance(features.get(n), dict)}
    images = _images({n: types[n] for n in names}, features)
    plain = ("int", "string", "Value", "ClassLabel", "dictionary", "uint", "bool", "large_string")
    labels = [n for n in names if kinds.get(n) == "ClassLabel"]
    labels += [n for n in _LABELS if n in names and n not in labels and types[n].startswith(plain)]
    labels.sort(key=lambda n: _LABELS.index(n) if n in _LABELS else len(_LABELS))
    have = ", ".join(names)
    if not images:
        raise DataError(f"{where} has no image column (expected 'image', a struct of bytes and path); columns: {have}")
    if not labels:
        raise DataError(f"{where} has no label column (expected 'label', whole numbers or text); columns: {have}")
    return images[0], labels[0]


def _images(types: dict[str, str], features: dict[str, Any]) -> list[str]:
    """Columns of images, the likeliest first."""
    said = [n for n in types if isinstance(features.get(n), dict) and features[n].get("_type") == "Image"]
    raw = [n for n in types if "bytes: binary" in types[n] or types[n] in ("binary", "large_binary")]
    images = said + [n for n in raw if n not in said]
    return sorted(images, key=lambda n: _IMAGES.index(n) if n in _IMAGES else len(_IMAGES))


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(features: dict[str, Any], label: str) -> list[str] | None:
    feature = features.get(label)
    names = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, dict):  # older files: {"0": "cat", ...}
        names = [names[k] for k in sorted(names, key=int)]
    return [printable(str(n)) for n in names] if names else None


def _split_of(path: Path, root: Path) -> str:
    word = re.match(r"[A-Za-z]+", path.stem)
    if word and word[0].lower() in SPLITS:
        return SPLITS[word[0].lower()]
    folder = path.parent.name.lower() if path.parent != root else ""
    return SPLITS.get(folder, "train")


def _missing_shards(paths: list[Path]) -> list[str]:
    totals = Counter(m[2] for p in paths if (m := _SHARD.search(p.stem)))
    split = paths[0].stem.split("-")[0]
    return [f"only {k} of {int(t)} parquet files of {split} are there" for t, k in totals.items() if k < int(t)]


def _line(e: BaseException) -> str:
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200] if str(e).strip() else ''}"
