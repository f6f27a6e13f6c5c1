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
}
__all__ = ["ExportError", "Exported", "OnnxModel", "Prediction", "export"]

if TYPE_CHECKING:
    from trimtab.deploy.runtime import OnnxModel, Prediction
    from trimtab.deploy.to_onnx import Exported, ExportError, export

__getattr__, __dir__ = lazy(__name__, _NAMES)
