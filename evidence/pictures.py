"""The pictures of the documentation that are drawn from the results, as the tables are made from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.core.files import write_text
from trimtab.report import rates_svg

RESULTS = Path(__file__).resolve().parent / "results"


class Picture(NamedTuple):
    """Which result it is drawn from, what it shows in words, and the result as SVG."""

    slug: str
    says: str
    draw: Callable[[dict[str, Any]], str]

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.slug}.json"


def update(root: Path) -> list[Path]:
    """Draw every picture below `root` whose result is there; returns the files that changed."""
    changed = []
    for name, picture in PICTURES.items():
        path = root / "docs" / "images" / f"{name}.svg"
        if not (picture.result.is_file() and path.parent.is_dir()):
            continue
        new = picture.draw(json.loads(picture.result.read_text(encoding="utf-8"))) + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != new:
            changed.append(write_text(path, new))
    return changed


def rates(result: dict[str, Any]) -> str:
    """Accuracy over bytes: the learned code, pictures, the bottleneck without its prior, and features as floats."""
    claim = next(c for c in result["claims"] if c["id"] == "rate_distortion")

    def mean(row: dict[str, Any]) -> tuple[float, float]:
        return row["bytes"]["mean"], row["accuracy"]["mean"]

    other = claim["baseline"]
    curves = {
        "entropic student": [mean(row) for row in claim["measured"].values()],
        **{form: [(row["bytes"], row["accuracy"]) for row in other[form]] for form in ("JPEG", "WEBP")},
        "equal steps, zlib": [mean(row) for name, row in other.items() if name.startswith("uniform")],
        "features in float32": [(other["float32 features"]["bytes"], other["float32 features"]["accuracy"])],
    }
    return rates_svg(curves, title=f"What a server understands of an image ({claim['data'].split(',')[0]})")


PICTURES = {"rates": Picture("entropic_student", "Accuracy over the bytes that are sent for an image", rates)}
