"""What a network saw in a picture or a volume: in words for `predict`, and drawn to a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from trimtab.deploy import Vision
    from trimtab.deploy.volumes import Volumes


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
    return value | _kept(drawn, out, _name(file, files))


def told_of_volume(vision: Volumes, file: Path, out: Path | None, files: Sequence[Path]) -> dict[str, Any]:
    """The same for a volume: its middle slices are drawn, and a file `write_mask` makes has all of the mask."""
    from trimtab.data.volume_files import write_mask
    from trimtab.deploy.volumes import opened
    from trimtab.report import draw_volume

    volume = opened(file)
    seen = vision.predict(volume)
    value: dict[str, Any] = {"image": str(file), **seen.plain()}
    if out is None:
        return value
    name = _name(file, files)
    mask = write_mask(out, name, seen.mask, file)
    return value | _kept({"": draw_volume(volume, seen.mask)}, out, name) | {"mask": str(mask)}


def _kept(drawn: dict[str, Image.Image], out: Path | None, name: str) -> dict[str, str]:
    """Pictures by the ending of their names, put into a folder; where the first is."""
    if out is None:
        return {}
    out.mkdir(parents=True, exist_ok=True)
    for ending, image in drawn.items():
        image.save(out / f"{name}{ending}.png")
    return {"drawn": str(out / f"{name}.png")}


def _name(file: Path, files: Sequence[Path]) -> str:
    """The name without ending; numbered when several files have it."""
    alike = [f for f in files if _stem(f) == _stem(file)]
    return _stem(file) if len(alike) == 1 else f"{_stem(file)}-{alike.index(file) + 1}"


def _stem(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).stem
