"""What a network saw in a picture: in words for `predict`, and drawn to a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from trimtab.deploy import Vision


def told(vision: Vision, file: Path, out: Path | None, files: Sequence[Path]) -> dict[str, Any]:
    """The answer for one file as plain values; drawn to `out` under a name that no other of `files` gets."""
    from trimtab.deploy.vision import Detected, Segmented, opened
    from trimtab.report import draw_boxes, draw_mask

    picture = opened(file)
    (seen,) = vision.predict(picture)
    value: dict[str, Any] = {"image": str(file), **seen.plain()}
    drawn: dict[str, Image.Image] = {}
    if isinstance(seen, Segmented):
        from PIL import Image

        drawn = {"": draw_mask(picture, seen.mask), "-mask": Image.fromarray(seen.mask)}
    elif isinstance(seen, Detected):
        words = [f"{o['label']} {o['confidence']:.0%}" for o in value["objects"]]
        drawn = {"": draw_boxes(picture, seen.boxes, seen.index.tolist(), words)}
    else:
        drawn = {"": seen.image}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = _name(file, files)
        for ending, image in drawn.items():
            image.save(out / f"{name}{ending}.png")
        value["drawn"] = str(out / f"{name}.png")
    return value


def _name(file: Path, files: Sequence[Path]) -> str:
    """The stem; numbered when several files have it."""
    alike = [f for f in files if f.stem == file.stem]
    return file.stem if len(alike) == 1 else f"{file.stem}-{alike.index(file) + 1}"
