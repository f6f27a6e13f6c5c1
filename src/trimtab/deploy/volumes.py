"""Running networks that segment volumes: window by window, to a mask of the volume's own size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.core.errors import ArtifactError, DataError
from trimtab.core.onnx_file import open_session
from trimtab.core.spec import InputSpec
from trimtab.deploy.runtime import read_notes
from trimtab.deploy.vision import Run


@dataclass(frozen=True)
class SegmentedVolume:
    """The class of every voxel, or masks of regions.

    Attributes:
        mask: uint8 (D, H, W), positions in the labels; or (K, D, H, W), 0 or 1, of regions that may overlap. It lies as
            `trimtab.data.volume_files.read_volume` has the volume; `write_mask` turns it back.
        shares: of the volume that each class or region has, largest first, without those it does not have.
    """

    mask: np.ndarray
    shares: Mapping[str, float]

    def plain(self) -> dict[str, Any]:
        """As JSON values, without the mask."""
        return {"classes": [{"label": label, "share": share} for label, share in self.shares.items()]}


class Volumes:
    """Segments volumes of any size with a network for volumes of one size.

    Windows of that size overlap by half, and what they say is averaged; a smaller volume lies in the middle of zeros.

    Args:
        run: the network, float32 (1, C, D, H, W) -> logits (1, K, D, H, W). spec: its input. labels: names of the
            classes or regions.
    """

    def __init__(self, run: Run, spec: InputSpec, labels: list[str] | None) -> None:
        if spec.task != "segment" or len(spec.size) != 4:
            raise ValueError(f"spec must be for volumes to segment, got task {spec.task!r} and size {spec.size}")
        self.run, self.spec, self.labels = run, spec, labels

    def predict(self, volume: str | os.PathLike[str] | np.ndarray) -> SegmentedVolume:
        """What is in a volume: a file (see `trimtab.data.volume_files`), or an array (C, D, H, W) or (D, H, W).

        Raises:
            DataError: it cannot be read, or has other channels than the network.
        """
        from trimtab.data.volumes import in_windows, standardise

        array = volume if isinstance(volume, np.ndarray) else opened(volume)
        array = array[None] if array.ndim == 3 else array
        if array.ndim != 4 or len(array) != self.spec.size[0]:
            name = "the volume" if isinstance(volume, np.ndarray) else str(volume)
            raise DataError(f"{name} must be (C, D, H, W) with {self.spec.size[0]} channels, got {array.shape}")
        logits = in_windows(self.run, standardise(array.astype(np.float32)), self.spec.size[1:])
        if self.spec.overlap:
            mask = (logits > 0).astype(np.uint8)
            shares = mask.mean((1, 2, 3))
        else:
            mask = logits.argmax(0).astype(np.uint8)
            shares = np.bincount(mask.reshape(-1)) / mask.size
        seen = [int(k) for k in np.argsort(-shares, kind="stable") if shares[k]]
        return SegmentedVolume(mask, {self._name(k): float(shares[k]) for k in seen})

    def _name(self, index: int) -> str:
        return self.labels[index] if self.labels and index < len(self.labels) else str(index)


class OnnxVolumes(Volumes):
    """The same from an `.onnx` file that trimtab exported, in ONNX Runtime on the CPU.

    Raises:
        ArtifactError: no such file, damaged, not exported by trimtab, or not for volumes.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 1) -> None:
        spec, labels, _ = read_notes(path)
        if spec.task != "segment" or len(spec.size) != 4:
            raise ArtifactError(f"{path} is not for volumes to segment; it takes {spec.size} for task {spec.task!r}")
        session = open_session(path, threads=threads)
        name = session.get_inputs()[0].name
        super().__init__(lambda x: np.asarray(session.run(None, {name: x})[0]), spec, labels)


def opened(path: str | os.PathLike[str]) -> np.ndarray:
    """The volume in a file, float32 (C, D, H, W).

    Raises:
        DataError: when it cannot be read.
    """
    from trimtab.data.images import Unreadable
    from trimtab.data.volume_files import read_volume

    try:
        return read_volume(Path(path))
    except (Unreadable, OSError) as e:
        raise DataError(f"{path} cannot be read: {e}") from e
