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
    "scenes": "synthetic",
    "SegmentData": "segment",
    "DetectData": "detect",
    "RestoreData": "restore",
    "VolumeData": "volumes",
    "write_parquet": "write",
    "concept_pruning": "curate.concept_pruning",
    "relabel": "curate.relabel",
    "MultiLabelAccuracy": "curate.imagenet_multilabel",
}
__all__ = [
    "Augment",
    "Data",
    "Loader",
    "Split",
    "MultiLabelAccuracy",
    "class_weights",
    "concept_pruning",
    "load_data",
    "normalise",
    "open_image",
    "parse_augment",
    "preprocess",
    "relabel",
    "shapes",
    "scenes",
    "SegmentData",
    "DetectData",
    "RestoreData",
    "VolumeData",
    "write_parquet",
]

if TYPE_CHECKING:
    from trimtab.data.augment import Augment, parse_augment
    from trimtab.data.curate.concept_pruning import concept_pruning
    from trimtab.data.curate.imagenet_multilabel import MultiLabelAccuracy
    from trimtab.data.curate.relabel import relabel
    from trimtab.data.dataset import Data, Split, class_weights
    from trimtab.data.detect import DetectData
    from trimtab.data.images import open_image, preprocess
    from trimtab.data.load import load_data
    from trimtab.data.loader import Loader, normalise
    from trimtab.data.restore import RestoreData
    from trimtab.data.segment import SegmentData
    from trimtab.data.synthetic import scenes, shapes
    from trimtab.data.volumes import VolumeData
    from trimtab.data.write import write_parquet

__getattr__, __dir__ = lazy(__name__, _NAMES)
