"""A network with a `Bottleneck` in two parts: the files for each machine.

`export` writes a folder: ``device.safetensors`` (the encoder's weights), ``codec.msgpack`` (integer tables),
``split.json`` (what they are, with their hashes), and ``server/``, an artifact. A device needs the first three.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from trimtab.core.artifact import read_manifest
from trimtab.core.errors import ArtifactError
from trimtab.core.files import write_bytes, write_text
from trimtab.core.spec import InputSpec
from trimtab.deploy.split.bottleneck import Bottleneck, Encoder
from trimtab.deploy.split.codec import Codec
from trimtab.models import save

MANIFEST, WEIGHTS, CODEC, SERVER = "split.json", "device.safetensors", "codec.msgpack", "server"
MAX_SIDE = 4096  # pixels


class Parts(BaseModel):
    """The content of ``split.json``; hashes are SHA-256."""

    model_config = ConfigDict(extra="forbid")
    schema_version: Literal[1] = 1
    encoder: dict[str, int]
    latent: tuple[int, int, int]
    spec: dict[str, Any]
    labels: list[str]
    codec: str
    weights: str
    model: str

    @property
    def id(self) -> str:
        """What a device and its server must agree on: of a hash of all this, 64 bits."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


class Rest(nn.Module):
    """A network from the place of one of its modules on: that module's output is given, not computed.

    The network still sees an image, of zeros, so that whatever its forward asks of one is there. (B, ...) to logits.
    """

    def __init__(self, net: nn.Module, name: str, size: tuple[int, ...], before: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.size, self._given = net, size, _Given()
        self.before = before or nn.Identity()  # what is done to the given first
        parent, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(parent), leaf, self._given)

    def forward(self, given: Tensor) -> Tensor:
        try:
            self._given.value = self.before(given)
            return self.net(given.new_zeros(len(given), *self.size))
        finally:
            self._given.value = None


class _Given(nn.Module):
    value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor | None:
        return self.value


def bottleneck_of(model: nn.Module) -> tuple[str, Bottleneck]:
    """The name and the bottleneck of a model.

    Raises:
        ValueError: it has none.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, Bottleneck)]
    if len(found) != 1 or not found[0][0]:
        raise ValueError(f"the model must have one bottleneck, got {len(found)}; see tt.compress.entropic_student")
    return found[0]


def export(
    model: nn.Module, folder: str | Path, *, spec: InputSpec, labels: Sequence[str] | None = None
) -> tuple[Path, Codec]:
    """Write both parts of a model, each file whole or not at all; gives the folder and its codec.

    Raises:
        ValueError: the model has no bottleneck, or cannot be loaded by another process because it is not a named one.
    """
    folder = Path(folder)
    twin = deepcopy(model).cpu().eval()
    _, bottleneck = bottleneck_of(twin)
    encoder, codec = bottleneck.encoder, Codec.of(bottleneck.prior)
    with torch.no_grad():
        latent = tuple(encoder(torch.zeros(1, *spec.size)).shape[1:])
        classes = twin(torch.zeros(1, *spec.size)).shape[-1]
    names = list(labels) if labels is not None else [str(i) for i in range(classes)]
    if len(names) != classes:
        raise ValueError(f"labels must name the {classes} outputs of the model, got {len(names)} names")
    save(model, folder / SERVER, spec=spec, labels=names)
    kept = read_manifest(folder / SERVER)
    if kept.base is None:
        raise ValueError(f"the model must come from create_model, so that a server can load it, got a {kept.cls}")
    weights = save_tensors({k: v.contiguous() for k, v in encoder.state_dict().items()})
    write_bytes(folder / WEIGHTS, weights)
    write_bytes(folder / CODEC, codec.raw)
    parts = Parts(
        encoder=encoder.sizes,
        latent=latent,
        spec=spec.to_json(),
        labels=names,
        codec=codec.id,
        weights=hashlib.sha256(weights).hexdigest(),
        model=kept.sha256,
    )
    write_text(folder / MANIFEST, json.dumps(parts.model_dump(), indent=1) + "\n")
    return folder, codec


def read_parts(folder: str | Path) -> tuple[Parts, Codec]:
    """The description and the codec in a folder that `export` wrote.

    Raises:
        ArtifactError: it is damaged, or none.
    """
    folder = Path(folder)
    try:
        parts = Parts.model_validate_json((folder / MANIFEST).read_bytes())
        spec = InputSpec.from_json(parts.spec)
        codec = Codec.read((folder / CODEC).read_bytes())
    except (OSError, ValidationError, ValueError, KeyError, TypeError) as e:
        raise ArtifactError(f"{folder} is not a split model: {' '.join(str(e).split())[:300]}") from e
    if codec.id != parts.codec:
        raise ArtifactError(f"{folder / CODEC} is not the one that {MANIFEST} was written with")
    if parts.latent[0] != codec.channels or not 0 < max(parts.latent[1:]) <= max(spec.size[1:]) <= MAX_SIDE:
        raise ArtifactError(f"{folder / MANIFEST} does not fit its codec, or is for images that are too large")
    return parts, codec


def read_encoder(folder: str | Path, parts: Parts) -> Encoder:
    """The device's part, in eval mode.

    Raises:
        ArtifactError: its weights are damaged.
    """
    file = Path(folder) / WEIGHTS
    try:
        raw = file.read_bytes()
        if hashlib.sha256(raw).hexdigest() != parts.weights:
            raise ValueError(f"its hash is not the one in {MANIFEST}")
        encoder = Encoder(**parts.encoder)
        encoder.load_state_dict(load_tensors(raw))
    except (OSError, ValueError, TypeError, RuntimeError) as e:
        raise ArtifactError(f"{file} cannot be used: {e}") from e
    return encoder.eval()
