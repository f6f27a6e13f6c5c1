"""Data: sources, decoding, splits, loaders, batch augmentation and synthetic images.

``load_data(spec)`` is the one door; see `trimtab.data.dataset`. Names import when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy

_NAMES = {
    "Data": "dataset",
    "Split": "dataset",
    "load_data": "load",
    "class_weights": "dataset",
    "Loader": "loader",
    "normalise": "loader",
    "Augment": "augment",
    "parse_augment": "augment",
    "open_image": "images",
    "preprocess": "images",
    "shapes": "synthetic",
}
__all__ = [
    "Augment",
    "Data",
    "Loader",
    "Split",
    "class_weights",
    "load_data",
    "normalise",
    "open_image",
    "parse_augment",
    "preprocess",
    "shapes",
]

if TYPE_CHECKING:
    from trimtab.data.augment import Augment, parse_augment
    from trimtab.data.dataset import Data, Split, class_weights
    from trimtab.data.images import open_image, preprocess
    from trimtab.data.load import load_data
    from trimtab.data.loader import Loader, normalise
    from trimtab.data.synthetic import shapes

__getattr__, __dir__ = lazy(__name__, _NAMES)
