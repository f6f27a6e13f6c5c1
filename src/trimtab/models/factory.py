"""`create_model`: any architecture of timm or ours, for any image size, ready to be edited, saved and loaded."""

from __future__ import annotations

import difflib
import fnmatch
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import trimtab.models.classify  # (registers our models in timm)
import trimtab.models.dense
import trimtab.models.restore  # noqa: F401
from trimtab.core.artifact import WEIGHTS, load, save
from trimtab.core.edit import apply, remember_base
from trimtab.core.errors import TrimtabError
from trimtab.models.small_images import fit_to_size

__all__ = ["create_model", "list_models", "load", "load_weights", "save"]


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | Sequence[int] | None = None,
    pretrained: bool = False,
    weights: str | Path | None = None,
    adapt: bool = True,
    seed: int | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Make a model by name: ours (`list_models(ours=True)`) or any of timm's.

    Args:
        num_classes: classes; None keeps the architecture's own number, 0 gives pooled features.
        in_chans: channels of the input images; None keeps the architecture's own number (3 nearly always).
        img_size: side, or (H, W), of the images in pixels. Architectures made for larger images are then adapted: see
            `trimtab.models.small_images` for the rule. None leaves them as they are. Side, or (D, H, W), for volumes.
        pretrained: fetch timm's weights (needs the network).
        weights: a safetensors file, or an artifact directory, to start from.
        adapt: False switches the adaptation to small images off.
        seed: makes the initial weights depend on nothing else; None uses torch's global generator.
        **kwargs: passed on to the builder.

    Raises:
        ValueError: for an unknown name (with the nearest ones), or arguments that do not fit.

    >>> create_model("resnet8_mlperf_tiny", num_classes=10)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    _check_name(name)
    size = _check_size(img_size)
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 0):
        raise ValueError(f"num_classes must be a non-negative integer, got {num_classes!r}")
    if in_chans is not None and (not isinstance(in_chans, int) or in_chans < 1):
        raise ValueError(f"in_chans must be a positive integer, got {in_chans!r}")
    if pretrained and weights is not None:
        raise ValueError("give pretrained=True or weights=..., not both")
    given = {"num_classes": num_classes, "in_chans": in_chans}
    kwargs |= {k: v for k, v in given.items() if v is not None}
    edits: list[Any] = []
    if size is not None and len(size) == 2:
        kwargs, edits = fit_to_size(name, kwargs, (size[0], size[1]), adapt=adapt)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = _build(name, kwargs, pretrained)
    remember_base(model, name, kwargs)
    apply(model, edits)
    _tell_input(model, in_chans, img_size)
    if weights is not None:
        load_weights(model, weights)
    return model


def shape_for(data: Any) -> dict[str, Any]:
    """The arguments of `create_model` that data decide: classes, channels and size, or the scale of restoration."""
    if getattr(data, "task", "classify") == "restore":
        return {"in_chans": data.in_chans, "scale": data.scale}
    return {"num_classes": data.num_classes, "in_chans": data.in_chans, "img_size": data.size}


def list_models(filter: str = "*", *, ours: bool = False) -> list[str]:
    """Names that `create_model` knows, sorted; `filter` is a shell pattern.

    >>> list_models("resnet*_cifar", ours=True)
    ['resnet20_cifar', 'resnet56_cifar']
    """
    names = timm.list_models()
    if ours:
        names = [n for n in names if timm.model_entrypoint(n).__module__.startswith("trimtab.")]
    return sorted(fnmatch.filter(names, filter))


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill `model` from a safetensors file or an artifact directory, in place.

    What the architecture knows how to convert is converted (position embeddings to another image size, checkpoint
    layouts). A first convolution for another number of channels is summed or repeated as timm does. A classifier for
    another number of classes is left fresh, with a warning.

    Raises:
        ValueError: when the file cannot be read or its tensors do not fit; then the model is unchanged.
    """
    file = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"weights must be a safetensors file or an artifact directory, got {str(path)!r}")
    try:
        state: dict[str, Tensor] = load_file(file)
    except SafetensorError as e:
        raise ValueError(f"{file} is not a safetensors file: {e}") from e
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, model)
    want = model.state_dict()
    state = _fit_first_conv(model, state, want)
    state, fresh = _without_classifier(model, state, want)
    missing = sorted(k for k in want if k not in state and k not in fresh and not k.endswith("num_batches_tracked"))
    extra = sorted(set(state) - set(want))
    wrong = sorted(k for k in state if k in want and state[k].shape != want[k].shape)
    if missing or extra or wrong:
        what = [f"{n} {keys[:3]}" for n, keys in (("missing", missing), ("unexpected", extra)) if keys]
        what += [f"{k} has shape {tuple(state[k].shape)}, expected {tuple(want[k].shape)}" for k in wrong[:1]]
        raise ValueError(f"{file} does not fit {type(model).__name__}: {'; '.join(what)}")
    if fresh:
        warnings.warn(f"{file} has another number of classes: the classifier starts fresh", stacklevel=3)
    model.load_state_dict(state, strict=False)
    return model


def _check_name(name: str) -> None:
    if ":" in name or timm.is_model(name):  # "hf-hub:..." and "local-dir:..." are timm's business
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ValueError(f"unknown model {name!r}{hint} (trimtab models lists all)")


def _check_size(img_size: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if img_size is None:
        return None
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) not in (2, 3) or not all(isinstance(s, int) and s > 0 for s in size):
        raise ValueError(f"img_size must be a positive integer or (height, width), got {img_size!r}")
    return size


def _build(name: str, kwargs: Mapping[str, Any], pretrained: bool) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as e:
        if "unexpected keyword argument" in str(e):
            raise ValueError(f"{name} does not take this argument: {e}") from e
        raise
    except Exception as e:
        if not pretrained or isinstance(e, ValueError | RuntimeError):
            raise
        raise TrimtabError(f"the weights of {name} could not be fetched ({e}); give a file with weights=...") from e


def _tell_input(model: nn.Module, in_chans: int | None, img_size: int | Sequence[int] | None) -> None:
    """Write the input this model was made for where timm keeps it, for exporters and other readers."""
    volumes = getattr(model, "dims", 2) == 3
    size = (img_size,) * (3 if volumes else 2) if isinstance(img_size, int) else img_size
    if size is not None and len(size) != (3 if volumes else 2):
        takes, sides = ("volumes", "depth, height, width") if volumes else ("pictures", "height, width")
        raise ValueError(f"{type(model).__name__} takes {takes}: img_size must be ({sides}), got {tuple(size)}")
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, Mapping) and cfg.get("input_size"):
        channels, *native = cfg["input_size"]
        vars(model)["pretrained_cfg"] = {**cfg, "input_size": (in_chans or channels, *(size or native))}


def _fit_first_conv(model: nn.Module, state: dict[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from timm.models import adapt_input_conv

    names = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    for name in (names,) if isinstance(names, str) else names:
        key = f"{name}.weight"
        if key in state and key in want and state[key].ndim == 4 and state[key].shape[1] != want[key].shape[1]:
            state = {**state, key: adapt_input_conv(want[key].shape[1], state[key])}
    return state


def _without_classifier(
    model: nn.Module, state: dict[str, Tensor], want: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], set[str]]:
    """Leave the classifier's tensors out where their number of classes differs."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else names
    keys = {f"{n}.{leaf}" for n in names for leaf in ("weight", "bias")}
    differs = any(k in want and (k not in state or state[k].shape != want[k].shape) for k in keys) or any(
        k in state and k not in want for k in keys
    )
    if not differs:
        return state, set()
    return {k: v for k, v in state.items() if k not in keys}, keys & set(want)
