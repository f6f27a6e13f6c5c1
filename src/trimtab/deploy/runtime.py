"""Running an exported file: `trimtab predict model.onnx photo.jpg` needs the file and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.core.errors import ArtifactError
from trimtab.core.onnx_file import open_session, read_onnx
from trimtab.core.spec import InputSpec
from trimtab.core.timing import timed

if TYPE_CHECKING:
    from trimtab.data import Data

SPEC_KEY, LABELS_KEY = "trimtab.spec", "trimtab.labels"


@dataclass(frozen=True)
class Prediction:
    """What the model sees in one image: the best class, and the best few with their probabilities."""

    label: str
    index: int
    confidence: float
    top: tuple[tuple[str, float], ...]


class Predictor:
    """Classifies images; a subclass gives `logits`.

    Attributes:
        spec: the input.
        labels: names of the classes ("0", "1", ... when none are known).
    """

    spec: InputSpec
    labels: list[str]

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Raw outputs (B, K) for prepared float32 images (B, C, H, W)."""
        raise NotImplementedError

    def predict(self, images: Any, *, top: int = 5, batch_size: int = 64) -> list[Prediction]:
        """What is in each image.

        Args:
            images: one or several of: a path, a PIL image, a uint8 array (H, W) or (H, W, C).
            top: how many classes to list.

        Raises:
            DataError: an image that cannot be read.
        """
        from trimtab.data import preprocess

        if isinstance(images, str | bytes | os.PathLike | np.ndarray) or not isinstance(images, Iterable):
            images = [images]
        images = list(images)
        found: list[Prediction] = []
        for i in range(0, len(images), batch_size):
            ready = np.stack([preprocess(image, self.spec) for image in images[i : i + batch_size]])
            for p in softmax(self.logits(ready)):
                best = np.argsort(-p, kind="stable")[: max(1, top)]
                names = tuple((self._name(int(j)), float(p[j])) for j in best)
                found.append(Prediction(names[0][0], int(best[0]), names[0][1], names))
        return found

    def _name(self, index: int) -> str:
        return self.labels[index] if index < len(self.labels) else str(index)

    def evaluate(
        self, data: Data, split: str = "test", *, batch_size: int = 256, limit: int | None = None
    ) -> dict[str, float]:
        """{"accuracy", "n"} on a split of the data, or on its first `limit` images."""
        if data.spec.size != self.spec.size:
            raise ValueError(f"the data gives images {data.spec.size}, the model takes {self.spec.size}")
        right = seen = 0
        for images, labels in batches(data, split, batch_size=batch_size, limit=limit, spec=self.spec):
            right += int((self.logits(images).argmax(-1) == labels).sum())
            seen += len(labels)
        return {"accuracy": right / max(1, seen), "n": seen}


class OnnxModel(Predictor):
    """A classifier in an `.onnx` file that trimtab exported, in ONNX Runtime on the CPU.

    Args:
        path: the file. Its metadata says how images are prepared and what the classes are called.
        threads: threads of one call.

    Attributes:
        spec: the input.
        labels: names of the classes ("0", "1", ... when none were exported).
        batch: images per call when the file fixes it, else None.

    Raises:
        ArtifactError: no such file, damaged, not ONNX, or not exported by trimtab.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 1) -> None:
        self.path = Path(path)
        self.spec, labels, model = read_notes(path)
        if self.spec.task != "classify":
            raise ArtifactError(f"{self.path} is for task {self.spec.task!r}; open it with OnnxVision")
        if len(model.graph.input) != 1 or len(model.graph.output) != 1:
            raise ArtifactError(f"{self.path} must have one input and one output")
        self._session = open_session(self.path, threads=threads)
        self._input = self._session.get_inputs()[0].name
        shape = self._session.get_inputs()[0].shape
        sides = [d for d in shape[1:] if isinstance(d, int)]
        if len(shape) != 1 + len(self.spec.size) or sides != list(self.spec.size):
            raise ArtifactError(f"{self.path} takes input {shape}, but says that it takes {list(self.spec.size)}")
        self.batch: int | None = shape[0] if isinstance(shape[0], int) else None
        out = self._session.get_outputs()[0].shape
        classes = out[-1] if out and isinstance(out[-1], int) else None
        if labels is not None and classes is not None and len(labels) != classes:
            raise ArtifactError(f"{self.path} has {classes} outputs but {len(labels)} labels")
        self.labels: list[str] = labels if labels is not None else [str(i) for i in range(classes or 0)]

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Raw outputs (B, K) for prepared float32 images (B, C, H, W)."""
        images = np.ascontiguousarray(images, dtype=np.float32)
        if images.shape[1:] != self.spec.size:
            want = ", ".join(map(str, self.spec.size))
            raise ValueError(f"images must be (B, {want}), got {images.shape}")
        if self.batch is None or len(images) == self.batch:
            return np.asarray(self._session.run(None, {self._input: images})[0])
        parts = []  # a file with a fixed batch: pad the last one
        for i in range(0, len(images), self.batch):
            part = images[i : i + self.batch]
            padded = np.zeros((self.batch, *images.shape[1:]), np.float32)
            padded[: len(part)] = part
            parts.append(np.asarray(self._session.run(None, {self._input: padded})[0])[: len(part)])
        return np.concatenate(parts)

    def latency(self, repeats: int | None = None, *, batch_size: int = 1) -> tuple[float, float]:
        """(median, interquartile range) of the seconds of one call; None = as many as half a second holds."""
        rng = np.random.default_rng(0)
        images = rng.standard_normal((self.batch or batch_size, *self.spec.size)).astype(np.float32)
        return timed(lambda: self._session.run(None, {self._input: images}), repeats=repeats)


def read_notes(path: str | os.PathLike[str]) -> tuple[InputSpec, list[str] | None, Any]:
    """What an exported file says of itself: its input, the names of its classes; and the graph.

    Raises:
        ArtifactError: no such file, damaged, not ONNX, or not exported by trimtab.
    """
    model = read_onnx(Path(path))
    notes = {p.key: p.value for p in model.metadata_props}
    if SPEC_KEY not in notes:
        raise ArtifactError(f"{path} does not say how images are prepared; only files written by `trimtab export` do")
    try:
        spec = InputSpec.from_json(json.loads(notes[SPEC_KEY]))
        labels = json.loads(notes.get(LABELS_KEY, "null"))
        if labels is not None and not (isinstance(labels, list) and all(isinstance(v, str) for v in labels)):
            raise ValueError("labels are no list of names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ArtifactError(f"the description inside {path} is damaged: {e}") from e
    return spec, labels, model


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, in float64."""
    z = logits.astype(np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def batches(
    data: Data,
    split: str,
    *,
    batch_size: int,
    limit: int | None = None,
    shuffle: bool = False,
    spec: InputSpec | None = None,
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """(images float32 (B, C, H, W), labels (B,)) of a split, normalised as `spec` says, without augmentation.

    Where images have no labels (detection, restoration), their rows stand in for them.
    """
    loader = data.loader(split, batch_size=batch_size, shuffle=shuffle, augment="none", drop_last=False)
    own = data.spec
    left = limit
    for batch in loader:
        images, labels = batch["image"].numpy(), batch["label" if "label" in batch else "index"].numpy()
        if spec is not None:
            images = renormalise(images, own, spec)
        if left is not None:
            images, labels = images[:left], labels[:left]
            left -= len(images)
        if len(images):
            yield images, labels
        if left is not None and left <= 0:
            return


def renormalise(images: np.ndarray, old: InputSpec, new: InputSpec) -> np.ndarray:
    """Images (B, C, H, W) that were prepared as `old` says, as `new` wants them."""
    if (old.mean, old.std) == (new.mean, new.std):
        return images

    def column(values: Sequence[float]) -> np.ndarray:
        return np.asarray(values, np.float32).reshape(1, -1, 1, 1)

    pixels = images * column(old.std) + column(old.mean)
    return np.asarray((pixels - column(new.mean)) / column(new.std), np.float32)
