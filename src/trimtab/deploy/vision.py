"""Running networks that segment, detect or restore: from a picture to what can be shown, at the picture's own size.

What a network of each task gives, as a file too: segment: logits (B, K, h, w). detect: (B, N, 4 + K), the corners
x1, y1, x2, y2 of N boxes as shares of width and height, then the probability of each class; boxes that overlap are
still in, and are sorted out here. restore: pictures (B, C, s h, s w) in [0, 1].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from trimtab.core.errors import ArtifactError, DataError
from trimtab.core.onnx_file import open_session
from trimtab.core.spec import InputSpec
from trimtab.deploy.runtime import read_notes, renormalise

if TYPE_CHECKING:
    from trimtab.data import Data

Run = Callable[[np.ndarray], np.ndarray]  # float32 (B, C, H, W) -> outputs


@dataclass(frozen=True)
class Segmented:
    """The class of every pixel.

    Attributes:
        mask: uint8 (H, W), positions in the labels.
        shares: of the picture that each class has, largest first, without those it does not have.
    """

    mask: np.ndarray
    shares: Mapping[str, float]

    def plain(self) -> dict[str, Any]:
        """As JSON values, without the mask."""
        return {"classes": [{"label": label, "share": share} for label, share in self.shares.items()]}


@dataclass(frozen=True)
class Detected:
    """The objects in a picture, the surest first.

    Attributes:
        boxes: float32 (N, 4): x1, y1, x2, y2 in pixels of the picture.
        scores: float32 (N,). index: int64 (N,), positions in the labels. labels: their names.
    """

    boxes: np.ndarray
    scores: np.ndarray
    index: np.ndarray
    labels: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        found = zip(self.labels, self.scores.tolist(), self.boxes.tolist(), strict=True)
        return {"objects": [{"label": n, "confidence": s, "box": [round(v, 1) for v in box]} for n, s, box in found]}


@dataclass(frozen=True)
class Restored:
    """The picture, larger and sharper."""

    image: Image.Image

    def plain(self) -> dict[str, Any]:
        """Its width and height as JSON values."""
        return {"size": list(self.image.size)}


Answer = Segmented | Detected | Restored


class Vision:
    """Looks at pictures with a network for one of these tasks.

    Args:
        run: the network. spec: its input. labels: names of its classes.
        least: objects with a lower score are not told. overlap: the most that two boxes of a class may.
    """

    def __init__(
        self, run: Run, spec: InputSpec, labels: list[str] | None, *, least: float = 0.3, overlap: float = 0.45
    ) -> None:
        if spec.task not in ("segment", "detect", "restore"):
            raise ValueError(f"spec.task must be segment, detect or restore, got {spec.task!r}")
        if len(spec.size) != 3:
            raise ValueError(f"spec must be for pictures, got volumes {spec.size}; they are for OnnxVolumes")
        for name, value in (("least", least), ("overlap", overlap)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {value}")
        self.run, self.spec, self.labels, self.least, self.overlap = run, spec, labels, least, overlap

    def predict(self, images: Any) -> list[Any]:
        """`Segmented`, `Detected` or `Restored` for each picture: a path, a PIL image, a uint8 array (H, W[, C]).

        Raises:
            DataError: a picture that cannot be read.
        """
        if isinstance(images, str | bytes | os.PathLike | np.ndarray) or not isinstance(images, Iterable):
            images = [images]
        pictures = (opened(image) for image in images)
        return [self.answer(picture, self.run(self.prepare(picture)[None])[0]) for picture in pictures]

    def prepare(self, picture: Image.Image) -> np.ndarray:
        """What the network is fed: float32 (C, H, W)."""
        from trimtab.data.images import picture_pixels, preprocess

        if self.spec.task != "restore":
            return preprocess(picture, self.spec)
        rgb = picture_pixels(picture, 3).astype(np.float32) / 255
        return rgb if self.spec.size[0] == 3 else self._luma_and_colour(rgb)[0]

    def answer(self, picture: Image.Image, output: np.ndarray) -> Answer:
        """What the output of the network for one picture says of it."""
        if self.spec.task == "segment":
            return self._segment(picture, output)
        return (self._detect if self.spec.task == "detect" else self._restore)(picture, output)

    def _segment(self, picture: Image.Image, output: np.ndarray) -> Segmented:
        mask = output.argmax(0).astype(np.uint8)
        mask = np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST))
        counts = np.bincount(mask.reshape(-1))
        seen = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
        return Segmented(mask, {self._name(k): float(counts[k] / mask.size) for k in seen})

    def _detect(self, picture: Image.Image, output: np.ndarray) -> Detected:
        boxes, scores, index = select(output[:, :4], output[:, 4:], least=self.least, overlap=self.overlap)
        w, h = picture.size
        boxes = np.clip(boxes, 0, 1) * np.array([w, h, w, h], np.float32)
        return Detected(boxes, scores, index, tuple(self._name(int(k)) for k in index))

    def _restore(self, picture: Image.Image, output: np.ndarray) -> Restored:
        if self.spec.size[0] == 1:  # the network had the luma; colour is enlarged by the cubic
            import torch

            from trimtab.data.images import picture_pixels
            from trimtab.nn.resize import upscale, ycbcr_to_rgb

            _, colour = self._luma_and_colour(picture_pixels(picture, 3).astype(np.float32) / 255)
            large = upscale(torch.from_numpy(colour)[None], output.shape[-1] // colour.shape[-1])
            output = ycbcr_to_rgb(torch.cat([torch.from_numpy(output)[None], large], 1))[0].numpy()
        pixels = np.rint(output.clip(0, 1) * 255).astype(np.uint8)
        return Restored(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))))

    @staticmethod
    def _luma_and_colour(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        from trimtab.nn.resize import rgb_to_ycbcr

        y = rgb_to_ycbcr(torch.from_numpy(rgb)[None])[0].numpy()
        return y[:1], y[1:]

    def _name(self, index: int) -> str:
        return self.labels[index] if self.labels and index < len(self.labels) else str(index)


class OnnxVision(Vision):
    """The same from an `.onnx` file that trimtab exported, in ONNX Runtime on the CPU.

    Raises:
        ArtifactError: no such file, damaged, not exported by trimtab, or a classifier.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 1, **limits: float) -> None:
        spec, labels, _ = read_notes(path)
        if spec.task == "classify":
            raise ArtifactError(f"{path} is a classifier; open it with OnnxModel")
        session = open_session(path, threads=threads)
        name, shape = session.get_inputs()[0].name, session.get_inputs()[0].shape

        def run(images: np.ndarray) -> np.ndarray:
            for have, want in zip(images.shape, shape):
                if isinstance(want, int) and have != want:
                    raise ValueError(f"{path} takes pictures of {shape}, got {list(images.shape)}")
            return np.asarray(session.run(None, {name: np.ascontiguousarray(images, np.float32)})[0])

        super().__init__(run, spec, labels, **limits)

    def evaluate(self, data: Data, split: str = "test", *, limit: int | None = None) -> dict[str, float]:
        """How good the file is on a split of the data, see `scores`."""
        return scores(self.run, self.spec, data, split, limit=limit)


def scores(run: Run, spec: InputSpec, data: Data, split: str, *, limit: int | None = None) -> dict[str, float]:
    """How good a network is on a split, or on its first pictures, by the names of `tt.evaluate`.

    Args:
        run, spec: the network and its input, as `Vision` takes them.
        limit: so many pictures, and what is left of a batch.

    Raises:
        DataError: there is no such split, or it is empty.
        ValueError: the data are for another task.
        MissingExtra: for detection, which needs pycocotools.
    """
    import torch

    from trimtab.data.volumes import in_windows
    from trimtab.learn.objective import Batch
    from trimtab.learn.tasks import task_of

    if data.task != spec.task:
        raise ValueError(f"the model is for task {spec.task!r}, the data for {data.task!r}")
    if split not in data.splits:
        raise DataError(f"split must be one of {', '.join(data.splits)}, got {split!r}")
    task, n = task_of(data), 0
    tally = task.measure(data, True)
    volumes = len(spec.size) == 4
    augment = "whole" if volumes else "none"
    for batch in data.loader(split, batch_size=32, shuffle=False, augment=augment, drop_last=False):
        images = renormalise(batch["image"].numpy(), data.spec, spec)
        out: Any = np.stack([in_windows(run, x, spec.size[1:]) for x in images]) if volumes else run(images)
        if spec.task == "detect":
            h, w = batch["image"].shape[2:]
            found = (select(o[:, :4] * np.array([w, h, w, h], np.float32), o[:, 4:]) for o in out)
            names = ("boxes", "scores", "labels")
            predicted: Any = [dict(zip(names, map(torch.from_numpy, parts), strict=True)) for parts in found]
        else:
            predicted = torch.from_numpy(out)
        tally.update(predicted, task.target(Batch(batch)))
        n += len(out)
        if limit is not None and n >= limit:
            break
    return {**tally.compute(), "n": n}


def opened(image: Any) -> Image.Image:
    """An upright RGB or grey picture from a path, bytes, a PIL image or an array.

    Raises:
        DataError: when it cannot be read.
    """
    from PIL import ImageOps

    from trimtab.data.images import Unreadable, open_image

    try:
        if isinstance(image, np.ndarray):
            return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
        found = open_image(image)
        found.load()
        return ImageOps.exif_transpose(found)
    except (Unreadable, OSError) as e:
        name = "the image" if isinstance(image, (bytes, Image.Image)) else str(image)
        raise DataError(f"{name} cannot be read: {e}") from e


def select(
    boxes: np.ndarray, scores: np.ndarray, *, least: float = 0.01, overlap: float = 0.45, per_class: int = 400,
    keep: int = 200,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Class by class the best boxes, without those that overlap a better one (non-maximum suppression).

    Args:
        boxes: corners (N, 4). scores: (N, K).
        least: scores up to this are nothing. overlap: largest intersection over union of two boxes of a class.
        per_class: boxes of a class that are looked at. keep: boxes of all classes together.

    Returns:
        boxes (n, 4), scores (n,) and classes (n,), best first.

    >>> same = np.array([[0, 0, 1, 1], [0, 0, 1, 0.9], [2, 2, 3, 3]], np.float32)
    >>> select(same, np.array([[0.9], [0.8], [0.7]], np.float32))[1].tolist()
    [0.8999999761581421, 0.699999988079071]
    """
    found: list[tuple[float, int, int]] = []  # score, row, class
    area = (boxes[:, 2] - boxes[:, 0]).clip(0) * (boxes[:, 3] - boxes[:, 1]).clip(0)
    for k in range(scores.shape[1]):
        order = np.argsort(-scores[:, k], kind="stable")[:per_class]
        order = order[scores[order, k] > least]
        while len(order):
            best, rest = order[0], order[1:]
            found.append((float(scores[best, k]), int(best), k))
            low = np.maximum(boxes[best, :2], boxes[rest, :2])
            high = np.minimum(boxes[best, 2:], boxes[rest, 2:])
            shared = (high - low).clip(0).prod(1)
            order = rest[shared <= overlap * (area[best] + area[rest] - shared)]
    found = sorted(found, key=lambda f: -f[0])[:keep]
    rows = np.array([f[1] for f in found], np.int64)
    return boxes[rows], np.array([f[0] for f in found], np.float32), np.array([f[2] for f in found], np.int64)
