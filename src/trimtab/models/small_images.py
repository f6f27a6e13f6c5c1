"""Architectures made for 224-pixel images, fitted to 8-pixel ones.

An ImageNet architecture divides the image by 32; of a 32-pixel image one pixel is left, and most of its layers see
nothing. The rule here:

1. A model is fine, and left alone, if its final feature map at the requested size is at least 3 pixels on the shorter
   side, or if the requested size is at least 0.8 of the size it was made for. Classes with `any_size = True` (the
   `trim_*` family, whose strides the caller chooses) are always left alone.
2. Transformers whose builder takes `img_size` and `patch_size` get a smaller patch: the largest divisor of the image
   that gives a grid of at least 6 (a plain ViT, one resolution throughout) or a final map of at least 3 (others).
3. Other models keep their layers, but the leading strides go, one octave after the other, until the final map is at
   least 3 pixels (so 4 for sizes that are powers of two): strided convolutions get stride 1 and their padding made to
   fit, stem pools are removed. These changes are recorded as edits, so artifacts carry them.
4. Builders that take `img_size` only (position tables inside) are told the size their stages will then see.

Every candidate is tried out on the meta device (no memory, no arithmetic) before it is chosen. What cannot be adapted
is returned as it is if it runs, and refused with an error if it does not.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from trimtab.core.edit import Edit, Remove, SetAttr, apply
from trimtab.core.meta import Shortcuts, shapes_only

LEAST_MAP = 3  # pixels on the shorter side of the final feature map
LEAST_GRID = 6  # tokens on the shorter side of a plain ViT
NEAR_NATIVE = 0.8
OCTAVES = (1, 2, 4, 8, 16)
Plan = tuple[dict[str, Any], list[Edit]]


def fit_to_size(name: str, kwargs: Mapping[str, Any], size: tuple[int, int], *, adapt: bool = True) -> Plan:
    """How to build `name` for images of `size` (H, W): the builder's arguments, and edits to apply to the result.

    Raises:
        ValueError: when no adaptation lets the model run at this size.
    """
    builder = timm.model_entrypoint(name) if timm.is_model(name) else None
    try:
        hash(tuple(kwargs.values()))
        fit: Callable[..., Plan] = _fit_once
    except TypeError:
        fit = _fit
    built_with, edits = fit(name, builder, size, adapt, **kwargs)
    return dict(built_with), list(edits)


def _fit(name: str, _: Any, size: tuple[int, int], adapt: bool, /, **kwargs: Any) -> Plan:
    probe = _Probe(name, kwargs, size)
    plain = probe.kwargs_for(size)
    if not adapt or probe.fine():
        return plain, []
    too_small: list[tuple[int, Plan, nn.Module]] = []
    for plan in _plans(probe, size):
        side, model = probe.final_side(*plan)
        if side >= (LEAST_GRID if probe.columnar else LEAST_MAP):
            if probe.runs(model):
                return plan
        elif side:
            too_small.append((side, plan, model))
    for *_, plan, model in sorted(too_small, key=lambda tried: -tried[0]):
        if probe.runs(model):
            return plan
    raise ValueError(
        f"{name} does not run on {size[0]}x{size[1]} images, also not with smaller strides; "
        f"choose another model or resize the images (it is made for {probe.native[0]}x{probe.native[1]})"
    )


# Trying out takes longer than building, and a job, a search or a comparison makes the same network many times. The
# builder is part of the key, since a name may be registered anew.
_fit_once = functools.lru_cache(maxsize=256, typed=True)(_fit)


def final_map(model: nn.Module, size: tuple[int, int], in_chans: int) -> tuple[int, int]:
    """Height and width of the last feature map for images of `size`; a token sequence counts as a square."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = model.training
    try:
        with torch.no_grad(), Shortcuts():
            features: Any = model.eval().forward_features
            out = features(torch.zeros(1, in_chans, *size, device=device))
    finally:
        model.train(training)
    while isinstance(out, tuple | list):
        out = out[-1] if out[-1].ndim >= out[0].ndim else out[0]
    if out.ndim == 4:
        channels_last = out.shape[1] != model.num_features and out.shape[-1] == model.num_features
        return tuple(out.shape[1:3]) if channels_last else tuple(out.shape[2:4])
    if out.ndim == 3:
        side = math.isqrt(out.shape[1])
        return side, side
    return 1, 1


def _plans(probe: _Probe, size: tuple[int, int]) -> Iterator[Plan]:
    """Candidates, from the least change to the largest."""
    if probe.takes("img_size") and probe.takes("patch_size") and probe.patch:
        for patch in range(probe.patch, 0, -1):
            if size[0] % patch == 0 and size[1] % patch == 0:
                changed = {} if patch == probe.patch else {"patch_size": patch}
                yield {**probe.kwargs_for(size), **changed}, []
        return
    for octaves in OCTAVES:
        inner = (size[0] * octaves, size[1] * octaves)
        edits = probe.without_leading_strides(octaves)
        if edits is not None:
            yield probe.kwargs_for(inner), edits


@dataclass(frozen=True)
class _Step:
    """Modules that together take the map from one size to a smaller one."""

    before: int
    after: int
    modules: tuple[str, ...]

    @property
    def factor(self) -> int:
        return max(1, round(self.before / self.after))


class _Probe:
    """Builds throw-away copies of a model, without memory, and looks at them."""

    def __init__(self, name: str, kwargs: dict[str, Any], size: tuple[int, int]):
        self.name, self.kwargs, self.size = name, kwargs, size
        self.model = self.build(kwargs)
        cfg = getattr(self.model, "pretrained_cfg", None) or {}
        native = cfg.get("input_size") or (3, 224, 224)
        self.native: tuple[int, int] = (int(native[1]), int(native[2]))
        self.in_chans = int(kwargs.get("in_chans", native[0]))
        self._steps: list[_Step] | None = None
        patches = (p for m in self.model.modules() if (p := getattr(m, "patch_size", None)))
        patch = kwargs.get("patch_size") or next(patches, None)
        self.patch: int = int(patch if isinstance(patch, int) else patch[0]) if patch else 0
        self.columnar = False
        if self.patch and self.takes("patch_size") and self.takes("img_size"):
            self.columnar = min(self._final(self.model, self.native)) >= min(self.native) // self.patch

    def build(self, kwargs: Mapping[str, Any]) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            try:
                with shapes_only():
                    return timm.create_model(self.name, pretrained=False, **kwargs)
            except (NotImplementedError, RuntimeError):  # an initialisation that needs numbers
                return timm.create_model(self.name, pretrained=False, **kwargs)

    def takes(self, argument: str) -> bool:
        for cls in type(self.model).__mro__:
            parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
            if argument in parameters:
                return True
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                return False
        return False

    def fine(self) -> bool:
        return getattr(self.model, "any_size", False) or min(self.size) >= NEAR_NATIVE * min(self.native)

    def kwargs_for(self, size: tuple[int, int]) -> dict[str, Any]:
        """`img_size` is told to builders that take it, when it differs from the native size."""
        if self.takes("img_size") and "img_size" not in self.kwargs and size != self.native:
            return {**self.kwargs, "img_size": list(size)}
        return dict(self.kwargs)

    def final_side(self, kwargs: Mapping[str, Any], edits: list[Edit]) -> tuple[int, nn.Module]:
        """Shorter side of the final map at the requested size, and the model; 0 when it does not come so far."""
        model = self.model
        try:
            model = apply(self.build(kwargs), edits)
            return min(self._final(model, self.size)), model
        except Exception:  # whatever a third-party forward raises, it means: not this one
            return 0, model

    def runs(self, model: nn.Module) -> bool:
        """Whether the whole model takes images of the requested size."""
        try:
            with torch.no_grad(), Shortcuts():
                model.eval()(self._image(model, self.size))
        except Exception:
            return False
        return True

    def without_leading_strides(self, factor: int) -> list[Edit] | None:
        """Edits that make the final map `factor` times larger; None when there are not so many strides."""
        if factor == 1:
            return []
        edits: list[Edit] = []
        for step in self.steps():
            if factor == 1:
                break
            keep = step.factor // factor if step.factor > factor else 1
            factor = max(1, factor // step.factor)
            for name in step.modules:
                edits += _restride(self.model, name, keep, alone=len(step.modules) == 1)
        return edits if factor == 1 else None

    def steps(self) -> list[_Step]:
        if self._steps is None:
            try:
                self._steps = self._trace()
            except Exception:  # the plain model does not even run at its native size: nothing to adapt
                self._steps = []
        return self._steps

    def _trace(self) -> list[_Step]:
        """Strided modules on the way from the image to the final map, at the native size, in order."""
        seen: dict[tuple[int, int], list[str]] = {}
        hooks = []

        def watch(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
                x = args[0] if args else None
                if isinstance(x, Tensor) and isinstance(out, Tensor) and x.ndim == out.ndim == 4:
                    a, b = min(x.shape[2:]), min(out.shape[2:])
                    if a > b * 1.4:
                        seen.setdefault((a, b), []).append(name)

            return hook

        for name, module in self.model.named_modules():
            if hasattr(module, "stride") and not any(True for _ in module.children()):
                hooks.append(module.register_forward_hook(watch(name)))
        try:
            goal = min(self._final(self.model, self.native))
        finally:
            for h in hooks:
                h.remove()
        if seen and all(b >= 1.5 * goal for _, b in seen):  # the last reductions are no convolutions or poolings
            goal = min(b for _, b in seen)
        chain: list[_Step] = []
        for (a, b), names in reversed(list(seen.items())):
            if goal <= b < 1.5 * goal:
                chain.append(_Step(a, b, tuple(dict.fromkeys(names))))
                goal = a
        return chain[::-1]

    def _image(self, model: nn.Module, size: tuple[int, int]) -> Tensor:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return torch.zeros(1, self.in_chans, *size, device=device)

    def _final(self, model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
        return final_map(model, size, self.in_chans)


def _restride(model: nn.Module, name: str, stride: int, *, alone: bool) -> list[Edit]:
    """Edits that give a strided module a smaller stride, with padding that keeps the map's size."""
    module = model.get_submodule(name)
    kernel: Any = getattr(module, "kernel_size", None)
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d) and stride == 1:
        size = kernel if isinstance(kernel, int) else kernel[0]
        if alone or size % 2 == 0:
            return [Remove(name)]
        return [
            SetAttr(name, "stride", _like(module.stride, 1)),
            SetAttr(name, "padding", _like(module.padding, size // 2)),
        ]
    edits: list[Edit] = [SetAttr(name, "stride", _like(module.stride, stride))]
    padding = getattr(module, "padding", None)
    if isinstance(module, nn.Conv2d) and isinstance(padding, tuple) and "Same" not in type(module).__name__:
        reach = module.dilation[0] * (module.kernel_size[0] - 1) + 1
        if padding[0] == 0 and module.kernel_size[0] == _first(module.stride):  # patches that did not overlap now do
            edits.append(SetAttr(name, "padding", [math.ceil((reach - stride) / 2)] * 2))
    return edits


def _first(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]


def _like(old: Any, value: int) -> int | list[int]:
    return value if isinstance(old, int) else [value] * len(old)
