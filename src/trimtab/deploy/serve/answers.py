"""What a service makes of a picture, and of what the model says of it, for each task."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from trimtab.data.images import preprocess
from trimtab.deploy.runtime import OnnxModel, softmax
from trimtab.deploy.vision import OnnxVision, Restored, Segmented, opened

RESTORED_PIXELS = 2**20  # of a picture that is restored: networks of this kind keep dozens of maps of its size
# Colours of classes in a mask, as three bytes each.
PALETTE = bytes(255 - (k * step) % 216 if k else 0 for k in range(256) for step in (67, 151, 29))


class Prepared(NamedTuple):
    """What the model is fed, float32 (C, H, W), and the picture where the answer needs it."""

    x: np.ndarray
    picture: Image.Image | None = None


class Served:
    """A model as the service uses it.

    Attributes:
        task, size, name, labels: of the model.
        together: whether pictures may run as one batch, for which they must have one size.
        max_pixels: of a picture, at most.
    """

    together = True
    max_pixels = 2**31

    def __init__(self, model: OnnxModel | OnnxVision, name: str) -> None:
        self.task, self.size, self.name = model.spec.task, model.spec.size, name
        self.labels = model.labels or []

    def prepare(self, data: bytes) -> Prepared:
        """Raises DataError when the picture cannot be decoded."""
        raise NotImplementedError

    def run(self, images: np.ndarray) -> np.ndarray:
        """Outputs for prepared pictures (B, C, H, W)."""
        raise NotImplementedError

    def answer(self, prepared: Prepared, output: np.ndarray, top: int) -> dict[str, Any]:
        """The answer as JSON values."""
        raise NotImplementedError


class Classifier(Served):
    """Names what is in a picture."""

    def __init__(self, model: OnnxModel, name: str) -> None:
        super().__init__(model, name)
        self.model = model

    def run(self, images: np.ndarray) -> np.ndarray:
        return self.model.logits(images)

    def prepare(self, data: bytes) -> Prepared:
        return Prepared(preprocess(data, self.model.spec))

    def answer(self, prepared: Prepared, output: np.ndarray, top: int) -> dict[str, Any]:
        p = softmax(output)
        names = dict(enumerate(self.model.labels))
        best: Sequence[int] = np.argsort(-p, kind="stable")[:top].tolist()
        guesses = [{"label": names.get(i, str(i)), "confidence": float(p[i])} for i in best]
        return guesses[0] | {"top": guesses}


class Looker(Served):
    """Segments, detects or restores. Masks and pictures are PNG files in base64."""

    def __init__(self, vision: OnnxVision, name: str) -> None:
        super().__init__(vision, name)
        self.vision = vision
        if self.task == "restore":
            self.together, self.max_pixels = False, RESTORED_PIXELS

    def run(self, images: np.ndarray) -> np.ndarray:
        return self.vision.run(images)

    def prepare(self, data: bytes) -> Prepared:
        picture = opened(data)
        return Prepared(self.vision.prepare(picture), picture)

    def answer(self, prepared: Prepared, output: np.ndarray, top: int) -> dict[str, Any]:
        assert prepared.picture is not None
        seen = self.vision.answer(prepared.picture, output)
        value = seen.plain()
        if isinstance(seen, Segmented):
            mask = Image.fromarray(seen.mask, mode="P")
            mask.putpalette(PALETTE)
            value["mask"] = _png(mask)
        elif isinstance(seen, Restored):
            value["picture"] = _png(seen.image)
        return value


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
