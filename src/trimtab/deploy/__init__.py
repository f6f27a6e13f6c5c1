"""Deployment: export to ONNX, int8, and the runtime that needs nothing but the file. Names import when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name in __all__:
        value = getattr(importlib.import_module(f"trimtab.deploy.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'trimtab.deploy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
