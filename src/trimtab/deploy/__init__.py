"""Deployment: export to ONNX, int8, and the runtime that needs nothing but the file. Names import when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy

_NAMES = {
    "export": "to_onnx",
    "Exported": "to_onnx",
    "ExportError": "to_onnx",
    "OnnxModel": "runtime",
    "Prediction": "runtime",
    "OnnxVision": "vision",
    "Vision": "vision",
    "OnnxVolumes": "volumes",
    "PatchedModel": "patched",
    "CascadeModel": "cascade",
    "ResultCache": "cascade",
    "dual_cnn": "dual_cnn",
    "mcunetv2": "mcunetv2",
}
__all__ = [
    "CascadeModel", "ExportError", "Exported", "OnnxModel", "OnnxVision", "OnnxVolumes", "PatchedModel", "Prediction",
    "ResultCache", "Vision", "dual_cnn", "export", "mcunetv2",
]  # fmt: skip

if TYPE_CHECKING:
    from trimtab.deploy.cascade import CascadeModel, ResultCache
    from trimtab.deploy.dual_cnn import dual_cnn
    from trimtab.deploy.mcunetv2 import mcunetv2
    from trimtab.deploy.patched import PatchedModel
    from trimtab.deploy.runtime import OnnxModel, Prediction
    from trimtab.deploy.to_onnx import Exported, ExportError, export
    from trimtab.deploy.vision import OnnxVision, Vision
    from trimtab.deploy.volumes import OnnxVolumes

__getattr__, __dir__ = lazy(__name__, _NAMES)
