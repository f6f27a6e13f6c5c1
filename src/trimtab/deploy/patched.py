"""Running a network patch by patch from files, with NumPy and ONNX Runtime alone.

The folder is what `Schedule.save` writes: ONNX files for the kinds of patches, one for the rest of the network, and
`schedule.json`, which says which window of the image each patch reads and which window of the map it fills. Anything
that can run ONNX can follow it; this is the loop.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.core.errors import ArtifactError
from trimtab.core.onnx_file import open_session
from trimtab.core.spec import InputSpec
from trimtab.deploy.runtime import Predictor

SCHEDULE = "schedule.json"
MAX_BYTES = 16 * 2**20  # of schedule.json
FileName = Annotated[str, Field(pattern=r"^[\w-]+\.onnx$")]
Box = tuple[int, int, int, int]  # top, left, bottom, right; the last two are outside


class Patch(BaseModel):
    """A patch: the file that computes it, what it reads of the image, what it fills of the map."""

    model_config = ConfigDict(extra="forbid")
    part: FileName
    window: Box
    out: Box


class Manifest(BaseModel):
    """The content of `schedule.json`."""

    model_config = ConfigDict(extra="forbid")
    schema_version: Literal[1] = 1
    spec: dict[str, Any]
    labels: list[str] | None = None
    stage: tuple[int, int, int] | None  # channels, height, width of the map; None without patches
    patches: list[Patch]
    tail: FileName
    sha256: dict[FileName, str]
    figures: dict[str, Any] = Field(default_factory=dict)


def read_manifest(folder: str | os.PathLike[str]) -> tuple[Manifest, InputSpec]:
    """What a folder says of itself.

    Raises:
        ArtifactError: it has no schedule, or a damaged one.
    """
    file = Path(folder) / SCHEDULE
    if not file.is_file() or file.stat().st_size > MAX_BYTES:
        raise ArtifactError(f"{folder} is no network in patches: it has no {SCHEDULE}")
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
        spec = InputSpec.from_json(manifest.spec)
        _check(manifest, spec)
    except (ValidationError, ValueError, KeyError, TypeError) as e:
        raise ArtifactError(f"{file} is damaged: {(str(e).splitlines() or ['?'])[0]}") from e
    return manifest, spec


def _check(manifest: Manifest, spec: InputSpec) -> None:
    if manifest.stage is None:
        if manifest.patches:
            raise ValueError("patches without a map to fill")
        return
    channels, height, width = manifest.stage
    if min(channels, height, width) < 1 or max(channels, height, width) > 2**20:
        raise ValueError(f"a map of {channels} x {height} x {width}")
    filled = np.zeros((height, width), np.int64)
    for patch in manifest.patches:
        for (top, left, bottom, right), (h, w) in ((patch.window, spec.size[-2:]), (patch.out, (height, width))):
            if not (0 <= top < bottom <= h and 0 <= left < right <= w):
                raise ValueError(f"a patch with a window {(top, left, bottom, right)} in {h} x {w}")
        filled[patch.out[0] : patch.out[2], patch.out[1] : patch.out[3]] += 1
    if not (filled == 1).all():
        raise ValueError("patches do not fill every place of the map once")


class PatchedModel(Predictor):
    """A network that `Schedule.save` has written, run one patch after the other.

    Args:
        path: the folder.
        threads: threads of one call.

    Attributes:
        spec, labels: the input, and the names of the classes.
        figures: what the schedule was expected to cost: "peak", "whole", "overhead", ...

    Raises:
        ArtifactError: a file is missing, damaged, or not the one that was written.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 1) -> None:
        self.path = Path(path)
        self._manifest, self.spec = read_manifest(path)
        self.figures = self._manifest.figures
        names = {p.part for p in self._manifest.patches} | {self._manifest.tail}
        self._sessions = {}
        for name in sorted(names):
            raw = (self.path / name).read_bytes() if (self.path / name).is_file() else b""
            if hashlib.sha256(raw).hexdigest() != self._manifest.sha256.get(name):
                raise ArtifactError(f"{self.path / name} is missing, or not the file that was written")
            # Without arenas: a patch's memory must be free again when the next one needs it.
            self._sessions[name] = open_session(raw, threads=threads, arena=False)
        shape = self._sessions[self._manifest.tail].get_outputs()[0].shape
        classes = shape[-1] if shape and isinstance(shape[-1], int) else 0
        self.labels = self._manifest.labels or [str(i) for i in range(classes)]

    def stage(self, image: np.ndarray) -> np.ndarray:
        """The map (1, C, h, w) that the patches of an image (1, C, H, W) fill together."""
        assert self._manifest.stage is not None
        out = np.empty((1, *self._manifest.stage), np.float32)
        for patch in self._manifest.patches:
            top, left, bottom, right = patch.window
            up, start, down, end = patch.out
            out[:, :, up:down, start:end] = self._call(patch.part, image[:, :, top:bottom, left:right])
        return out

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Raw outputs (B, K) for prepared float32 images (B, C, H, W), one image after the other."""
        images = np.ascontiguousarray(images, dtype=np.float32)
        if images.ndim != 4 or images.shape[1:] != tuple(self.spec.size):
            want = ", ".join(map(str, self.spec.size))
            raise ValueError(f"images must be (B, {want}), got {images.shape}")
        patched = self._manifest.stage is not None
        rows = [
            self._call(self._manifest.tail, self.stage(images[i : i + 1]) if patched else images[i : i + 1])
            for i in range(len(images))
        ]
        return np.concatenate(rows) if rows else np.empty((0, len(self.labels)), np.float32)

    def _call(self, part: str, x: np.ndarray) -> np.ndarray:
        session = self._sessions[part]
        return np.asarray(session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(x)})[0])


def dump(manifest: Manifest) -> str:
    """The text of `schedule.json`."""
    return json.dumps(manifest.model_dump(), indent=1) + "\n"
