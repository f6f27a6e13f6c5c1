"""Artifacts: how a model is kept. A directory with `model.safetensors` and `trimtab.json`, no pickle anywhere.

The manifest says what the model started from (a registry name and its arguments), the edits made since, and what its
input, labels, cost and origin are. Loading builds the base, repeats the edits and fills in the weights; everything in
the files is checked against the model's own shapes before memory is taken for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from trimtab.core import edit
from trimtab.core.errors import ArtifactError, EditError
from trimtab.core.meta import shapes_only
from trimtab.core.spec import InputSpec

SCHEMA = 1
WEIGHTS, MANIFEST = "model.safetensors", "trimtab.json"
MAX_MANIFEST = 64 * 2**20  # bytes
MAX_HEADER = 100 * 2**20
# Arguments of timm.create_model that read files or the network: never taken from an artifact.
FORBIDDEN_KWARGS = frozenset(
    [
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "weights",
        "features_only",
    ]
)


class Manifest(BaseModel):
    """The content of `trimtab.json`."""

    model_config = ConfigDict(extra="forbid")
    schema_version: Literal[1] = 1
    base: str | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    cls: str | None = None
    edits: list[dict[str, Any]] = Field(default_factory=list)
    sha256: str
    aliases: dict[str, str] = Field(default_factory=dict)
    spec: dict[str, Any] | None = None
    labels: list[str] | None = None
    cost: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None

    @property
    def input_spec(self) -> InputSpec | None:
        return InputSpec.from_json(self.spec) if self.spec else None


def save(
    model: nn.Module,
    path: str | Path,
    *,
    spec: InputSpec | None = None,
    labels: Sequence[str] | None = None,
    cost: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write `model` as an artifact: the directory `path`, made if needed.

    A crash at any moment leaves the previous artifact loadable. A model that did not come from `create_model` is saved
    too; `load` then needs its `base`.

    Raises:
        ArtifactError: when the state dict holds something that is not a tensor.
    """
    path = Path(path)
    tensors, aliases = _tensors(model)
    h = edit.history(model)
    path.mkdir(parents=True, exist_ok=True)
    new_weights, new_manifest = (path / f".{name}.{os.getpid()}" for name in (WEIGHTS, MANIFEST))
    try:
        _save_tensors(tensors, new_weights)
        manifest = Manifest(
            base=h.base, kwargs=h.kwargs, cls=f"{type(model).__module__}.{type(model).__qualname__}",
            edits=edit.to_json(h.edits), sha256=_sha256(new_weights), aliases=aliases,
            spec=spec.to_json() if spec else None, labels=list(labels) if labels is not None else None,
            cost=_plain(cost), metrics=_plain(metrics), provenance=_plain(provenance),
        )  # fmt: skip
        new_manifest.write_text(json.dumps(manifest.model_dump(), indent=1) + "\n", encoding="utf-8")
        backup = path / f"{WEIGHTS}.bak"
        if _is_current(path, path / WEIGHTS):
            os.replace(path / WEIGHTS, backup)  # load() finds it there if we die before the manifest is in place
        os.replace(new_weights, path / WEIGHTS)
        os.replace(new_manifest, path / MANIFEST)
        backup.unlink(missing_ok=True)
    finally:
        for leftover in (new_weights, new_manifest):
            leftover.unlink(missing_ok=True)
    return path


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the artifact at `path`.

    Raises:
        ArtifactError: when it is not one, or not one this version can read.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise ArtifactError(f"{path} is not an artifact: it has no {MANIFEST}")
    if file.stat().st_size > MAX_MANIFEST:
        raise ArtifactError(f"{file} has {file.stat().st_size} bytes, more than the {MAX_MANIFEST} allowed")
    try:
        d = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ArtifactError(f"{file} is not JSON: {e}") from e
    if not isinstance(d, dict) or d.get("schema_version") != SCHEMA:
        got = d.get("schema_version") if isinstance(d, dict) else None
        raise ArtifactError(f"{file} has schema version {got!r}, this trimtab reads {SCHEMA}; upgrade trimtab")
    try:
        manifest = Manifest.model_validate(d)
        manifest.input_spec  # noqa: B018  (validates)
        return manifest
    except (ValidationError, KeyError, TypeError, ValueError) as e:
        first = e.errors()[0] if isinstance(e, ValidationError) else {"loc": ("spec",), "msg": str(e)}
        raise ArtifactError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from e


def load(path: str | Path, *, base: nn.Module | None = None) -> nn.Module:
    """The model kept at `path`, in eval mode, on the CPU, ready to run or to train on.

    Args:
        base: for a model that is not in timm's registry, a fresh instance of its class; it is edited in place.

    Raises:
        ArtifactError: for anything damaged, hostile, or in need of a `base` that was not given.
    """
    path = Path(path)
    manifest = read_manifest(path)
    file = _weights_file(path, manifest)
    shapes = _header(file)
    try:
        edits = edit.from_json(manifest.edits)
        if base is None:
            _check_shapes(_meta_model(manifest, edits), shapes, manifest, file)
            base = _build(manifest)
        edit.apply(base, edits)
    except EditError as e:
        raise ArtifactError(f"{path}: {e}") from e
    _check_shapes(base, shapes, manifest, file)
    _fill(base, file, manifest)
    edit.history(base).base, edit.history(base).kwargs = manifest.base, dict(manifest.kwargs)
    return base.eval()


def _meta_model(manifest: Manifest, edits: list[edit.Edit]) -> nn.Module:
    """The edited model without memory, so that a hostile manifest cannot ask for any."""
    with shapes_only():
        return edit.apply(_build(manifest), edits)


def _build(manifest: Manifest) -> nn.Module:
    import timm

    name = manifest.base
    if name is None:
        cls = manifest.cls or "MyNet"
        raise ArtifactError(f"this model is a {cls}; give an instance: load(path, base={cls.rsplit('.', 1)[-1]}(...))")
    if not timm.is_model(name):
        raise ArtifactError(f"unknown base model {name!r}: neither timm nor trimtab has it")
    bad = FORBIDDEN_KWARGS & set(manifest.kwargs)
    if bad:
        raise ArtifactError(f"arguments {sorted(bad)} are not allowed in an artifact")
    try:
        return timm.create_model(name, pretrained=False, **edit._tuples(manifest.kwargs))
    except Exception as e:
        raise ArtifactError(f"base model {name!r} cannot be built from {manifest.kwargs}: {e}") from e


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict as separate contiguous tensors, and which further names share each (tied weights)."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ArtifactError(f"{name!r} in the state dict is a {type(value).__name__}, not a tensor")
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, aliases


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, file)
    with open(file, "rb") as f:
        os.fsync(f.fileno())


def _is_current(path: Path, file: Path) -> bool:
    """Whether `file` is what the manifest now at `path` describes."""
    try:
        return _weights_file(path, read_manifest(path)) == file
    except ArtifactError:
        return False


def _weights_file(path: Path, manifest: Manifest) -> Path:
    """The weights that the manifest was written for: usually the file itself, its backup after a crash in `save`."""
    files = [f for f in (path / WEIGHTS, path / f"{WEIGHTS}.bak") if f.is_file()]
    if not files:
        raise ArtifactError(f"{path} has no {WEIGHTS}")
    for file in files:
        if _sha256(file) == manifest.sha256:
            return file
    raise ArtifactError(f"{files[0]} is damaged or was changed: its hash is not the one in {MANIFEST}")


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file, read without trusting its lengths."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        head = f.read(8)
        n = struct.unpack("<Q", head)[0] if len(head) == 8 else None
        if n is None or n > min(size - 8, MAX_HEADER):
            raise ArtifactError(f"{file} is not a safetensors file, or is cut short")
        try:
            entries = json.loads(f.read(n))
            return {k: tuple(v["shape"]) for k, v in entries.items() if k != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ArtifactError(f"{file} is not a safetensors file: {e}") from e


def _check_shapes(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], manifest: Manifest, file: Path) -> None:
    want = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    lost = [k for k in manifest.aliases.values() if k not in shapes]
    if lost:
        raise ArtifactError(f"{file} does not fit the model: tied weights {lost[:3]} are missing")
    have = dict(shapes) | {a: shapes[k] for a, k in manifest.aliases.items()}
    missing, extra = sorted(set(want) - set(have)), sorted(set(have) - set(want))
    wrong = [k for k in want if k in have and want[k] != have[k]]
    if missing or extra:
        raise ArtifactError(f"{file} does not fit the model: missing {missing[:3]}, unexpected {extra[:3]}")
    if wrong:
        k = wrong[0]
        raise ArtifactError(f"{file} does not fit the model: {k} has shape {have[k]}, expected {want[k]}")


def _fill(model: nn.Module, file: Path, manifest: Manifest) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as e:
        raise ArtifactError(f"{file} cannot be read: {e}") from e
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, held in state.items():
            value = tensors[manifest.aliases.get(name, name)]
            held.data = held.data.to(value.dtype)  # half and integer models stay what they were
            held.copy_(value)


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _plain(value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if value is None else json.loads(json.dumps(dict(value), default=float))
