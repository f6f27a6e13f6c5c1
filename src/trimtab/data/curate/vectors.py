"""Many vectors of unit length, and their spherical clusters: in memory, in a memory-mapped file, or on a Ray cluster.

Nothing here holds more than a chunk of the vectors, the sample that clusters are found on, and eight bytes per vector.
Whatever the vectors are kept in, the same seed gives the same clusters.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.core.errors import DataError

CHUNK = 2**24  # numbers of a chunk: 64 MB in float32
PER_CLUSTER = 256  # vectors per cluster that clusters are found on


class Vectors:
    """Vectors (N, D) of any float type; what comes out is float32 of unit length.

    Args:
        given: an array or tensor, or the path of an .npy file, which is mapped into memory.
        rows: only these.
    """

    def __init__(self, given: Any, rows: np.ndarray | None = None) -> None:
        if isinstance(given, (str, os.PathLike)):
            given = _mapped(Path(given))
        array = given if isinstance(given, np.ndarray) else np.asarray(given)
        if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
            raise ValueError(f"vectors must be floats (N, D), got {array.dtype} {array.shape}")
        self.array, self._rows = array, rows

    def __len__(self) -> int:
        return len(self.array) if self._rows is None else len(self._rows)

    @property
    def dim(self) -> int:
        return self.array.shape[1]

    def take(self, rows: np.ndarray) -> Vectors:
        """Only these rows; nothing is copied."""
        return Vectors(self.array, rows if self._rows is None else self._rows[rows])

    def at(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of these rows (n,), ascending."""
        places = rows if self._rows is None else self._rows[rows]
        return unit(self.array[places], places)

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        step = max(1, CHUNK // self.dim)
        for start in range(0, len(self), step):
            part = slice(start, min(len(self), start + step))
            places = np.arange(part.start, part.stop) if self._rows is None else self._rows[part]
            yield part, unit(self.array[part if self._rows is None else places], places)

    def nearest(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The cluster of each vector, int32 (N,), and 1 - cosine to its centroid, float32 (N,)."""
        labels, distance = np.empty(len(self), np.int32), np.empty(len(self), np.float32)
        for part, x in self.chunks():
            labels[part], distance[part] = nearest(x, centroids)
        return labels, distance


class RayVectors:
    """The columns "id" (0 to N - 1, in any order) and "vector" of a `ray.data.Dataset`; work is done at its blocks."""

    def __init__(self, given: Any) -> None:
        columns = given.schema().names
        if not {"id", "vector"} <= set(columns):
            raise ValueError(f"a Ray data set must have columns 'id' and 'vector', got {', '.join(columns)}")
        self.data, self._n = given.select_columns(["id", "vector"]), int(given.count())

    def __len__(self) -> int:
        return self._n

    def at(self, rows: np.ndarray) -> np.ndarray:
        def some(batch: dict[str, np.ndarray], rows: np.ndarray = rows) -> dict[str, np.ndarray]:
            wanted = np.isin(batch["id"], rows)
            return {name: column[wanted] for name, column in batch.items()}

        batches = [b for b in self.data.map_batches(some).iter_batches(batch_format="numpy") if len(b["id"])]
        ids = np.concatenate([b["id"] for b in batches])
        order = np.argsort(ids)
        if not np.array_equal(ids[order], rows):
            raise DataError("the ids of a Ray data set must be 0 to N - 1, each once")
        return unit(np.concatenate([_matrix(b["vector"]) for b in batches])[order], rows)

    def nearest(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        def block(batch: dict[str, np.ndarray], centroids: np.ndarray = centroids) -> dict[str, np.ndarray]:
            labels, distance = nearest(unit(_matrix(batch["vector"]), batch["id"]), centroids)
            return {"id": batch["id"], "label": labels, "distance": distance}

        labels, distance = np.full(self._n, -1, np.int32), np.empty(self._n, np.float32)
        for batch in self.data.map_batches(block).iter_batches(batch_format="numpy"):
            labels[batch["id"]], distance[batch["id"]] = batch["label"], batch["distance"]
        if labels.min() < 0:
            raise DataError("the ids of a Ray data set must be 0 to N - 1, each once")
        return labels, distance


def vectors_of(given: Any) -> Vectors | RayVectors:
    """Vectors in whatever they are kept: array, tensor, path of an .npy file, or Ray data set."""
    if isinstance(given, (Vectors, RayVectors)):
        return given
    return RayVectors(given) if type(given).__module__.startswith("ray.") else Vectors(given)


def spherical_kmeans(vectors: Vectors | RayVectors, k: int, *, iterations: int = 100, seed: int = 0) -> np.ndarray:
    """Centroids, float32 (k, D) of unit length, found on at most `PER_CLUSTER` k vectors.

    A cluster that loses all its members starts again at the vector that is farthest from its centroid.

    Raises:
        ValueError: there are fewer vectors than clusters.
    """
    n = len(vectors)
    if not 2 <= k <= n:
        raise ValueError(f"clusters must be 2 to the number of samples ({n}), got {k}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng(seed)
    size = min(n, PER_CLUSTER * k)
    x = vectors.at(np.sort(rng.choice(n, size, replace=False)))
    centroids = x[rng.choice(size, k, replace=False)]
    sample, before = Vectors(x), np.full(size, -1)
    for _ in range(iterations):
        labels, distance = sample.nearest(centroids)
        if np.array_equal(labels, before):
            break
        members = csr_matrix((np.ones(size, np.float32), labels, np.arange(size + 1)), shape=(size, k))
        centroids = _length_one(np.asarray(members.T @ x), centroids)
        lost = np.flatnonzero(np.bincount(labels, minlength=k) == 0)
        centroids[lost] = x[np.argsort(-distance, kind="stable")[: len(lost)]]
        before = labels
    return centroids


def nearest(x: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each vector (n, D), int32 (n,), and 1 - cosine to it, float32 (n,) in 0..2."""
    cosines = x @ centroids.T
    labels = cosines.argmax(1)
    return labels.astype(np.int32), (1 - cosines[np.arange(len(x)), labels]).clip(0, 2)


def unit(x: np.ndarray, names: np.ndarray | None = None) -> np.ndarray:
    """Rows (n, D) in float32 at unit length.

    Raises:
        DataError: a row is zero, infinite or NaN; `names` (n,) says which.
    """
    x = x.astype(np.float32)
    length = np.sqrt(np.einsum("nd,nd->n", x, x))
    bad = np.flatnonzero(~((length > 0) & np.isfinite(length)))
    if len(bad):
        which = bad[0] if names is None else names[bad[0]]
        raise DataError(f"vector {which} has no direction (it is zero, infinite or NaN)")
    return x / length[:, None]


def _length_one(sums: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Sums (k, D) at unit length; where they vanish, what there was before."""
    length = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(length > 1e-12, sums / np.maximum(length, 1e-12), before).astype(np.float32)


def _matrix(column: Any) -> np.ndarray:
    """A column of vectors as (n, D); Ray gives an array, or an array of arrays."""
    return np.stack(list(column))


def _mapped(path: Path) -> np.ndarray:
    if path.suffix != ".npy" or not path.is_file():
        raise DataError(f"vectors must be in an .npy file, got {path}")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as e:
        raise DataError(f"{path} is not an .npy file of numbers: {e}") from e
