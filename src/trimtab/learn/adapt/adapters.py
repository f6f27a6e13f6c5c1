"""Adapters: small modules inserted into a frozen network, and kept in a file of their own beside it.

Here is what all kinds of adapters share: where they go, what is trained, the file; and the ordinary bottleneck adapter
(Houlsby et al., arXiv 1902.00751), against which the others are measured.

An adapter takes the output of a sub-layer (self-attention, feed-forward) before its dropout and residual sum. Networks
of timm and of transformers are known by the names of their modules; of others, `layers` names them. Cross-attention
gets none. Trained are the adapters, the norms of the backbone, and the classifier where there is one.
"""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core import edit
from trimtab.core.edit import Edit, Insert, Tie
from trimtab.core.errors import ArtifactError, EditError, SurgeryError
from trimtab.core.files import replacing
from trimtab.learn.evaluate import device_of
from trimtab.learn.fit import fit as run_fit
from trimtab.learn.rng import isolated

FORMAT = 1
NAME = "adapter"  # of the inserted module; the layer it follows is then called base
OUTPUTS = {
    "attention": re.compile(
        r"(^|\.)(attn|attention|self_attn|self_attention|SelfAttention)"
        r"\.(proj|o|o_proj|out_proj|out_lin|c_proj|output\.dense)$"
    ),
    "feed_forward": re.compile(
        r"(^|\.)((mlp|ffn|feed_forward)\.(fc2|lin2|c_proj|down_proj)|DenseReluDense|layers?\.\d+\.(fc2|output\.dense))$"
    ),
}
SEQUENCE = re.compile(r"(^|\.)(mlp|ffn|feed_forward)$")  # a plain nn.Sequential of this name: its last linear layer
HEADS = ("classifier", "score", "qa_outputs", "head")  # where transformers and others keep what makes logits
TRAINING: dict[str, Any] = {"opt": "adamw", "sched": "linear", "warmup": 0.05, "weight_decay": 0.0}


class Adapter(nn.Module):
    """x + up(gelu(down(x))) over the last dimension: (..., D) -> (..., D). It may be kept in another precision than x.

    Args:
        down, up: modules (..., D) -> (..., k) and (..., k) -> (..., D).
    """

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x: Tensor) -> Tensor:
        inner = x.to(next(self.down.parameters()).dtype)
        return x + self.up(F.gelu(self.down(inner), approximate="tanh")).to(x.dtype)


class BottleneckAdapter(Adapter):
    """Two ordinary linear layers, D -> k -> D, near the identity at first: weights from N(0, 0.01^2), no bias."""

    def __init__(self, width: int, bottleneck: int) -> None:
        down, up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        super().__init__(down, up)
        for layer in (down, up):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)


def adapters(
    model: nn.Module,
    data: Any = None,
    *,
    bottleneck: int | None = None,
    reduction: int = 32,
    attention: bool = True,
    layers: str | Sequence[str] | None = None,
    norms: bool = True,
    train: str | Sequence[str] | None = None,
    seed: int = 0,
    epochs: int = 20,
    lr: float = 1e-3,
    **fit: Any,
) -> nn.Module:
    """A copy of `model`, frozen, with ordinary bottleneck adapters (Houlsby's placement; Pfeiffer's without attention).

    Arguments as those of `compacter`.

    >>> import timm
    >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)
    >>> count(adapters(vit, bottleneck=8)).adapters  # 4 x (2 x 192 x 8 + 8 + 192)
    13088
    """
    at = places(model, attention=attention, layers=layers)
    sizes = {name: {"width": width, "bottleneck": narrow(width, bottleneck, reduction)} for name, width in at.items()}
    small = freeze(insert(model, BottleneckAdapter, sizes, seed=seed), norms=norms, train=train)
    return tuned(small, data, seed=seed, epochs=epochs, lr=lr, **fit)


def narrow(width: int, bottleneck: int | None, reduction: int, multiple: int = 1) -> int:
    """The bottleneck k of an adapter for width D: what was said, else D / reduction, rounded up to a multiple.

    >>> narrow(768, None, 32, 4), narrow(192, None, 32, 4)  # 192 / 32 = 6 is no multiple of 4
    (24, 8)
    """
    if bottleneck is None:
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {reduction}")
        return max(1, -(-width // (reduction * multiple))) * multiple
    if bottleneck < 1 or bottleneck % multiple:
        raise ValueError(f"bottleneck must be a positive multiple of n = {multiple}, got {bottleneck}")
    return bottleneck


def places(model: nn.Module, *, attention: bool = True, layers: str | Sequence[str] | None = None) -> dict[str, int]:
    """Where adapters go: the modules whose output they take, with its width D, in the order of the model.

    Args:
        attention: after self-attention as well as after feed-forward.
        layers: patterns of module names, such as ``blocks.*.mlp.fc2``, instead.

    Raises:
        SurgeryError: there are none, or one that an adapter cannot follow.
    """
    names = [name for name, _ in model.named_modules() if name]
    if layers is None:
        kinds = list(OUTPUTS) if attention else ["feed_forward"]
        hits = {kind: [name for name in names if OUTPUTS[kind].search(name)] for kind in kinds}
        hits["feed_forward"] += _ends_of_sequences(model)
    else:
        patterns = [layers] if isinstance(layers, str) else layers
        hits = {pattern: fnmatch.filter(names, pattern) for pattern in patterns}
    for kind, found in hits.items():
        if not found:
            raise SurgeryError(
                f"{type(model).__name__} has no module known as output of {kind}; name its modules with layers"
                if layers is None
                else f"layers must name modules of the model, got {kind!r}"
            )
    chosen = {name for found in hits.values() for name in found}
    if not chosen:
        raise SurgeryError(f"layers must name modules of the model, got {layers!r}")
    return {name: _width(model, name) for name in names if name in chosen}


def _ends_of_sequences(model: nn.Module) -> list[str]:
    ends = []
    for name, module in model.named_modules():
        if SEQUENCE.search(name) and isinstance(module, nn.Sequential):
            ends += [f"{name}.{leaf}" for leaf, m in module.named_children() if isinstance(m, nn.Linear)][-1:]
    return ends


def insert(
    model: nn.Module, cls: type[Adapter], sizes: Mapping[str, Mapping[str, Any]], *, tied: Sequence[str] = (), seed: int
) -> nn.Module:
    """A copy of `model` with an adapter after each module named in `sizes`; the edits are remembered.

    Args:
        sizes: arguments of the adapter's class, by module.
        tied: parameters of adapters that are one and the same in all of them, such as ``down.mix``.

    Raises:
        SurgeryError: the model has adapters already.
    """
    if any(isinstance(m, Adapter) for m in model.modules()):
        raise SurgeryError("the model has adapters already; start from the model without")
    path = f"{cls.__module__}.{cls.__qualname__}"
    edits: list[Edit] = [Insert(name, NAME, path, dict(kwargs)) for name, kwargs in sizes.items()]
    shared = [f"{name}.{NAME}.{parameter}" for name in sizes for parameter in tied]
    return _edited(model, [*edits, *(Tie(name, shared[0]) for name in shared[1:])], seed)


def freeze(model: nn.Module, *, norms: bool = True, train: str | Sequence[str] | None = None) -> nn.Module:
    """Let nothing be trained but adapters, norms and classifier, in place; an artifact that was loaded forgets that.

    Args:
        norms: train the layer norms (and RMS norms) of the backbone.
        train: patterns of modules that are trained besides; by default the classifier: what timm says it is, else
            modules called classifier, score, qa_outputs or head; () for none.

    Raises:
        ValueError: a pattern names no module.
    """
    named = dict(model.named_modules())
    if train is None:
        free = _heads(model)
    else:
        patterns = [train] if isinstance(train, str) else train
        for pattern in patterns:
            if not fnmatch.filter(named, pattern):
                raise ValueError(f"train must name modules of the model, got {pattern!r}")
        free = [m for name, m in named.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    free += [m for m in named.values() if isinstance(m, Adapter) or (norms and _is_norm(m))]
    model.requires_grad_(False)
    for module in free:
        module.requires_grad_(True)
    return model


def tuned(model: nn.Module, data: Any, **fit: Any) -> nn.Module:
    """The model, trained in place if there are data; `fit` is for `tt.fit`."""
    if data is not None and run_fit(model, data, **TRAINING | fit).stopped == "interrupted":
        raise KeyboardInterrupt
    return model


@dataclass(frozen=True)
class Count:
    """How many parameters are `trained`, how many of them are in `adapters`, and how many the `base` has without those.

    Shared parameters count once. The share is that of the papers: of the base, the adapters not added to it.
    """

    trained: int
    adapters: int
    base: int

    @property
    def share(self) -> float:
        return self.trained / self.base


def count(model: nn.Module) -> Count:
    """What is trained of a model, and how much that is."""
    inside = {id(p): p.numel() for m in model.modules() if isinstance(m, Adapter) for p in m.parameters()}
    every = {id(p): p.numel() for p in model.parameters()}
    free = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Count(free, sum(inside.values()), sum(every.values()) - sum(inside.values()))


# ------------------------------------------------------------------------------------------------------------- the file


def save_adapters(model: nn.Module, path: str | Path) -> int:
    """Write what was trained (and buffers, which are small) to the safetensors file `path`; gives its size in bytes.

    The base is not in it, only a digest of what is frozen. To keep everything in one artifact, use `tt.save`.

    Raises:
        SurgeryError: the model has no adapters, or was changed in other ways after they were inserted.
    """
    from safetensors.torch import save_file

    edits = _edits_of(model)
    free = {name for name, p in model.named_parameters() if p.requires_grad}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in _kept(model, free).items()}
    note = {"format": FORMAT, "edits": edit.to_json(edits), "base": _digest(_frozen(model, free))}
    with replacing(path) as new:
        save_file(tensors, new, {"trimtab": json.dumps(note | {"sha256": _digest(tensors)})})
    return Path(path).stat().st_size


def load_adapters(base: nn.Module, path: str | Path) -> nn.Module:
    """A copy of `base` with the adapters kept at `path`, in eval mode, frozen as it was for training.

    Args:
        base: the network that the adapters were trained on. Its norms and its classifier may differ, if they were
            trained: they are in the file.

    Raises:
        ArtifactError: the file is damaged, or the base is another one.
    """
    tensors, edits, digest = _read(Path(path))
    if any(isinstance(m, Adapter) for m in base.modules()):
        raise ArtifactError(f"{path} does not fit this base: it has adapters already")
    try:
        shapes = edit.apply(edit.meta_copy(base), edits).state_dict()
    except EditError as e:
        raise ArtifactError(f"{path} does not fit this base: {e}") from e
    for name, value in tensors.items():
        if name not in shapes or shapes[name].shape != value.shape:
            has = tuple(shapes[name].shape) if name in shapes else "no such tensor"
            raise ArtifactError(f"{path} does not fit this base: {name} is {tuple(value.shape)}, the base has {has}")
    small = _edited(base, edits, seed=0)
    if _digest(_frozen(small, tensors)) != digest:
        raise ArtifactError(f"{path} was trained on another base: its frozen weights differ from those given")
    held = small.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in tensors.items():
            held[name].copy_(value)
    for name, p in small.named_parameters():
        p.requires_grad_(name in tensors)
    return small.eval()


def _read(path: Path) -> tuple[dict[str, Tensor], list[Edit], str]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ArtifactError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            note = json.loads((file.metadata() or {}).get("trimtab", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
        if not isinstance(note, dict) or note.get("format") != FORMAT:
            raise ArtifactError(f"{path} is not a file of adapters that this trimtab reads")
        edits = edit.from_json(note.get("edits"))
        ours = all(_is_ours(e) or isinstance(e, Tie) for e in edits)
        whole = note.get("sha256") == _digest(tensors)
    except (SafetensorError, OSError, ValueError, RecursionError) as e:
        raise e if isinstance(e, ArtifactError) else ArtifactError(f"{path} cannot be read: {e}") from e
    if not whole:
        raise ArtifactError(f"{path} is damaged or was changed: its hash is not the one it states")
    if not ours:
        raise ArtifactError(f"{path} holds edits other than inserted adapters")
    return tensors, edits, str(note.get("base"))


def _edits_of(model: nn.Module) -> list[Edit]:
    """The edits that inserted the adapters; they must be the last ones."""
    edits = edit.history(model).edits
    first = next((i for i, e in enumerate(edits) if _is_ours(e)), None)
    if first is None:
        raise SurgeryError(f"{type(model).__name__} has no adapters to save")
    if not all(_is_ours(e) or isinstance(e, Tie) for e in edits[first:]):
        raise SurgeryError("the model was changed after its adapters were inserted; keep all of it, with tt.save")
    return edits[first:]


def _is_ours(e: Edit) -> bool:
    return isinstance(e, Insert) and issubclass(edit.resolve_class(e.with_), Adapter)


def _kept(model: nn.Module, free: set[str]) -> dict[str, Tensor]:
    frozen = {name for name, _ in model.named_parameters(remove_duplicate=False)} - free
    values = {name: value for name, value in model.named_parameters() if name in free}
    return values | {k: v for k, v in model.state_dict().items() if k not in frozen | free and isinstance(v, Tensor)}


def _frozen(model: nn.Module, kept: set[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name not in kept}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        raw: Any = value.view(-1).view(torch.uint8).numpy()
        found.update(raw)
    return found.hexdigest()


def _edited(model: nn.Module, edits: Sequence[Edit], seed: int) -> nn.Module:
    small = copy.deepcopy(model)
    with isolated(seed, device_of(model)):
        return edit.apply(small, edits)


def _width(model: nn.Module, name: str) -> int:
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        raise SurgeryError(f"{name} is read by torch's attention and never called, so that no adapter can follow it")
    inside = model.get_submodule(name).modules()
    widths = [w for m in inside if (w := getattr(m, "out_features", None) or getattr(m, "nf", None))]  # nf: of Conv1D
    if not widths:
        raise SurgeryError(f"{name} has no linear layer that says how wide its output is")
    return int(widths[-1])


def _heads(model: nn.Module) -> list[nn.Module]:
    told: Any = getattr(model, "get_classifier", None)
    if callable(told):
        heads = told()
        return [m for m in (heads if isinstance(heads, (tuple, list)) else [heads]) if isinstance(m, nn.Module)]
    return [m for name, m in model.named_modules() if name.rpartition(".")[2] in HEADS]


def _is_norm(module: nn.Module) -> bool:
    """LayerNorm and RMSNorm, also those of libraries that have their own."""
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm")) or isinstance(module, (nn.LayerNorm, nn.RMSNorm))
