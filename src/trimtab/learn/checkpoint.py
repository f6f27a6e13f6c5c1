"""Checkpoints without pickle: one safetensors file whose header carries the structure as JSON.

One file means one atomic step: it is written under a temporary name and renamed, so a kill at any moment leaves
either the old checkpoint or the new one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import ArtifactError
from trimtab.core.files import replacing

FILE = "checkpoint.safetensors"
SCHEMA = 1


def write(path: Path, tree: dict[str, Any]) -> Path:
    """Keep a tree of dicts, lists, tuples, tensors, numbers, strings, bools and None.

    Raises:
        TypeError: there is something else in it; the message says where.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    shape = _pack(tree, "", tensors)
    with replacing(path) as new:
        save_file(tensors, new, metadata={"trimtab": json.dumps({"schema": SCHEMA, "tree": shape})})
    return path


def read(path: Path) -> dict[str, Any]:
    """The tree that `write` kept; tensors are on the CPU.

    Raises:
        ArtifactError: the file is damaged, or not a checkpoint of trimtab.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as f:
            meta = json.loads((f.metadata() or {})["trimtab"])
            if meta["schema"] != SCHEMA:
                raise ArtifactError(f"{path} has checkpoint schema {meta['schema']}, this version reads {SCHEMA}")
            return _unpack(meta["tree"], f)
    except (SafetensorError, KeyError, ValueError, TypeError) as e:
        if isinstance(e, ArtifactError):
            raise
        raise ArtifactError(f"{path} is not a readable checkpoint ({e}); remove it, or train with resume=False") from e


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        # a copy: safetensors refuses tensors that share memory (tied weights) or are not contiguous
        tensors[path] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"t": path}
    if isinstance(value, dict):
        return {"d": [[_key(k, path), _pack(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_pack(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return {"l" if isinstance(value, list) else "u": items}
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a numpy scalar
        return value.item()
    raise TypeError(f"a checkpoint cannot keep {path or 'the root'}: {type(value).__name__}")


def _key(key: Any, path: str) -> str | int:
    if isinstance(key, (str, int)):
        return key
    raise TypeError(f"a checkpoint cannot keep the key {key!r} in {path or 'the root'}: it must be str or int")


def _unpack(value: Any, tensors: Any) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "t":
        return tensors.get_tensor(content)
    if kind == "d":
        return {k: _unpack(v, tensors) for k, v in content}
    items = [_unpack(v, tensors) for v in content]
    return items if kind == "l" else tuple(items)
