"""Edits: how structure changes, as small values that can be stored.

A surgery returns a list of edits; `apply(model, edits)` performs them in order and remembers them on the model, so that
an artifact (`core/artifact.py`) can rebuild the model from its base. Tensors and modules are named as in `state_dict()`
and `named_modules()`. `apply` first rehearses the whole list on a copy without memory (the meta device): if any edit is
wrong, the model is untouched.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import EditError

# Classes that an edit may bring in. Anything else in an artifact is refused before it is imported.
ALLOWED_PACKAGES = ("torch.nn", "timm.layers", "timm.models", "torchvision.ops", "torchvision.models", "trimtab")
_SCALARS = (bool, int, float, str)


@dataclass(frozen=True)
class Edit:
    """Base of all edits. Fields are JSON values; sequences are tuples."""

    kind: ClassVar[str] = ""

    def to_json(self) -> dict[str, Any]:
        return {"edit": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Narrow(Edit):
    """Keep only the indices `keep` of dimension `dim` of the parameter or buffer `tensor`, in that order."""

    tensor: str
    dim: int
    keep: tuple[int, ...]
    kind: ClassVar[str] = "narrow"


@dataclass(frozen=True)
class Widen(Edit):
    """Grow dimension `dim` of `tensor` to `size`; the new entries are zero (give others through `apply(weights=)`)."""

    tensor: str
    dim: int
    size: int
    kind: ClassVar[str] = "widen"


@dataclass(frozen=True)
class Replace(Edit):
    """Put a new module of class `with_` (dotted path, allowed package), built from `kwargs`, in a module's place."""

    module: str
    with_: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    kind: ClassVar[str] = "replace"


@dataclass(frozen=True)
class Remove(Edit):
    """Put an identity in a module's place; the names of all others stay."""

    module: str
    kind: ClassVar[str] = "remove"


@dataclass(frozen=True)
class Insert(Edit):
    """Run a new module before or after `module`: its place is taken by a Sequential of `base` and `name`."""

    module: str
    name: str
    with_: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    where: str = "after"
    kind: ClassVar[str] = "insert"


@dataclass(frozen=True)
class SetAttr(Edit):
    """Set the plain attribute `name` (number, string, or a tuple of them) of `module`; "" is the model itself."""

    module: str
    name: str
    value: Any
    kind: ClassVar[str] = "set_attr"


@dataclass(frozen=True)
class Tie(Edit):
    """Let the parameter `tensor` be the parameter `to`, of the same shape: one tensor with several names."""

    tensor: str
    to: str
    kind: ClassVar[str] = "tie"


KINDS: dict[str, type[Edit]] = {c.kind: c for c in (Narrow, Widen, Replace, Remove, Insert, SetAttr, Tie)}


@dataclass
class History:
    """What a model was made from: a registry name with its arguments, and the edits applied since."""

    base: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)


def history(model: nn.Module) -> History:
    """The model's history; an empty one is attached when there is none."""
    if "_trimtab" not in model.__dict__:
        model.__dict__["_trimtab"] = History()
    return model.__dict__["_trimtab"]


def remember_base(model: nn.Module, name: str, kwargs: Mapping[str, Any]) -> None:
    """Record that `model` is what the registry builds from `name` and `kwargs`; forgets earlier edits."""
    model.__dict__["_trimtab"] = History(name, dict(kwargs), [])


def to_json(edits: Iterable[Edit]) -> list[dict[str, Any]]:
    """Edits as JSON values."""
    return [e.to_json() for e in edits]


def from_json(items: Any) -> list[Edit]:
    """Edits from JSON values.

    Raises:
        EditError: for anything that is not a list of well-formed edits.

    >>> from_json(to_json([Narrow("conv.weight", 0, (0, 2))]))
    [Narrow(tensor='conv.weight', dim=0, keep=(0, 2))]
    """
    if not isinstance(items, list):
        raise EditError(f"edits must be a list, got {type(items).__name__}")
    return [_from_json(item) for item in items]


def describe(edits: Sequence[Edit]) -> list[str]:
    """Edits in words, one line per tensor or module, in order of first appearance."""
    lines: dict[str, str] = {}
    for e in edits:
        match e:
            case Narrow():
                lines[f"{e.tensor}:{e.dim}"] = f"{e.tensor}: keep {len(e.keep)} along dimension {e.dim}"
            case Widen():
                lines[f"{e.tensor}:{e.dim}"] = f"{e.tensor}: widen dimension {e.dim} to {e.size}"
            case Replace():
                lines[e.module] = f"{e.module}: replace by {e.with_.rsplit('.', 1)[-1]}"
            case Remove():
                lines[e.module] = f"{e.module}: remove"
            case Insert():
                new = e.with_.rsplit(".", 1)[-1]
                lines[f"{e.module}+{e.name}"] = f"{e.module}: insert {new} {e.where} it as {e.name!r}"
            case SetAttr():
                lines[f"{e.module}.{e.name}"] = f"{e.module or 'model'}.{e.name} = {e.value}"
            case Tie():
                lines[f"{e.tensor} tied"] = f"{e.tensor}: the same as {e.to}"
    return list(lines.values())


def apply(
    model: nn.Module,
    edits: Sequence[Edit],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    also: Sequence[nn.Module] = (),
    weights: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Perform edits on `model`, in place and in order; all of them or none.

    Args:
        optimizer: its parameter groups and per-entry state (momentum, second moments) follow the edits; parameters of
            removed modules leave it, parameters of new modules join its first group.
        also: copies of the model (an exponential moving average) that must follow.
        weights: values, by name after the edits, for the tensors of new or widened modules.

    Returns:
        The same `model`.

    Raises:
        EditError: when an edit does not fit; then nothing was changed anywhere.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> keep = (0, 1, 2)
    >>> narrow = [Narrow("0.weight", 0, keep), Narrow("0.bias", 0, keep), Narrow("2.weight", 1, keep)]
    >>> apply(net, narrow)[0].weight.shape
    torch.Size([3, 3, 3, 3])
    """
    edits = list(edits)
    if edits or weights:
        for target in (model, *also):
            _rehearse(target, edits, weights or {})
    before = list(model.parameters())  # held, so that no id below is used twice
    moved: list[_Move] = []
    for e in edits:
        _perform(model, e, moved)
    for copy_ in also:
        for e in edits:
            _perform(copy_, e, [])
    for target in (model, *also):
        _fill(target, weights or {})
    if optimizer is not None:
        _follow(optimizer, model, moved, before)
    history(model).edits.extend(edits)
    for copy_ in also:
        history(copy_).edits.extend(edits)
    return model


def meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers take no memory (device "meta")."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = b.detach().to("meta")
    return copy.deepcopy(model, memo)


def resolve_class(path: str) -> type[nn.Module]:
    """The module class that a dotted path names, when its package is allowed.

    Raises:
        EditError: for a package outside `ALLOWED_PACKAGES`, or when it names no module class.
    """
    if not isinstance(path, str) or not any(path.startswith(p + ".") for p in ALLOWED_PACKAGES):
        raise EditError(f"class {path!r} is not in an allowed package ({', '.join(ALLOWED_PACKAGES)})")
    package, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as e:
        raise EditError(f"class {path!r} does not exist") from e
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise EditError(f"{path!r} is not a module class")
    if not any(f"{cls.__module__}.".startswith(p + ".") for p in ALLOWED_PACKAGES):
        raise EditError(f"{path!r} is defined in {cls.__module__}, outside the allowed packages")
    return cls


# ---------------------------------------------------------------------------------------------------------------------
# performing


@dataclass
class _Move:
    """A parameter that was swapped for another, and how its per-entry state follows."""

    old: nn.Parameter
    new: nn.Parameter
    follow: Callable[[Tensor], Tensor]


def _rehearse(model: nn.Module, edits: Sequence[Edit], weights: Mapping[str, Tensor]) -> None:
    stage = meta_copy(model)
    for i, e in enumerate(edits):
        try:
            _perform(stage, e, [])
        except EditError as error:
            raise EditError(f"edit {i} ({_short(e)}): {error}") from error
    shapes = {k: v.shape for k, v in stage.state_dict(keep_vars=True).items()}
    for name, value in weights.items():
        if name not in shapes:
            raise EditError(f"weights for {name!r}, which the edited model does not have")
        if shapes[name] != value.shape:
            raise EditError(f"weights for {name!r} have shape {tuple(value.shape)}, expected {tuple(shapes[name])}")


def _perform(model: nn.Module, e: Edit, moved: list[_Move]) -> None:
    match e:
        case Narrow():
            old = _tensor(model, e.tensor, e.dim)
            if not e.keep:
                raise EditError(f"nothing would be left of {e.tensor}")
            if len(set(e.keep)) != len(e.keep) or min(e.keep) < 0 or max(e.keep) >= old.shape[e.dim]:
                raise EditError(f"keep must be distinct indices in [0, {old.shape[e.dim]}) of {e.tensor}")
            index = torch.tensor(e.keep, device=old.device)
            _swap(model, old, lambda t: t.index_select(e.dim, index.to(t.device)), moved)
        case Widen():
            old = _tensor(model, e.tensor, e.dim)
            if e.size < old.shape[e.dim]:
                raise EditError(f"size must be at least {old.shape[e.dim]}, got {e.size}")
            _swap(model, old, functools.partial(_pad, dim=e.dim, size=e.size), moved)
        case Replace():
            _put(model, e.module, _build(e.with_, e.kwargs, like=_module(model, e.module), model=model))
        case Remove():
            _put(model, e.module, nn.Identity().train(_module(model, e.module).training))
        case Insert():
            base = _module(model, e.module)
            if e.where not in ("before", "after"):
                raise EditError(f"where must be 'before' or 'after', got {e.where!r}")
            if not e.name.isidentifier() or e.name == "base":
                raise EditError(f"name must be an identifier other than 'base', got {e.name!r}")
            new = _build(e.with_, e.kwargs, like=base, model=model)
            parts = [("base", base), (e.name, new)] if e.where == "after" else [(e.name, new), ("base", base)]
            _put(model, e.module, nn.Sequential(OrderedDict(parts)))
        case SetAttr():
            owner = _module(model, e.module) if e.module else model
            setattr(owner, e.name, _checked_value(owner, e.name, e.value))
        case Tie():
            own, other = _tensor(model, e.tensor), _tensor(model, e.to)
            if not isinstance(own, nn.Parameter) or not isinstance(other, nn.Parameter) or own.shape != other.shape:
                raise EditError(f"{e.tensor} {tuple(own.shape)} cannot be the parameter {e.to} {tuple(other.shape)}")
            parent, _, leaf = e.tensor.rpartition(".")
            model.get_submodule(parent)._parameters[leaf] = other
        case _:
            raise EditError(f"{type(e).__name__} is not an edit")


def _module(model: nn.Module, name: str) -> nn.Module:
    if not name:
        raise EditError("the model itself cannot be replaced; name one of its modules")
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise EditError(f"there is no module {name!r}") from None


def _tensor(model: nn.Module, name: str, dim: int = 0) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    module = _module(model, owner) if owner else model
    held: dict[str, Tensor | None] = {**module._buffers, **module._parameters}
    tensor = held.get(leaf)
    if tensor is None:
        raise EditError(f"there is no tensor {name!r}")
    if not 0 <= dim < tensor.dim():
        raise EditError(f"dim must be in [0, {tensor.dim()}) for {name}, got {dim}")
    return tensor


def _pad(t: Tensor, dim: int, size: int) -> Tensor:
    shape = list(t.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([t, t.new_zeros(shape)], dim)


def _swap(model: nn.Module, old: Tensor, follow: Callable[[Tensor], Tensor], moved: list[_Move]) -> None:
    """Replace `old` in every place that holds it (tied weights), with its gradient."""
    with torch.no_grad():
        value = follow(old.detach()).contiguous()
    new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    if isinstance(new, nn.Parameter) and isinstance(old, nn.Parameter):
        if old.grad is not None:
            new.grad = follow(old.grad).contiguous()
        moved.append(_Move(old, new, follow))
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for key, held in store.items():
                if held is old:
                    store[key] = new


def _build(path: str, kwargs: Mapping[str, Any], *, like: nn.Module, model: nn.Module) -> nn.Module:
    cls = resolve_class(path)
    device = next((p.device for m in (like, model) for p in m.parameters()), torch.device("cpu"))
    try:
        with torch.device(device):
            new = cls(**_tuples(kwargs))
    except Exception as e:
        raise EditError(f"{path} cannot be built from {dict(kwargs)}: {e}") from e
    return new.train(like.training)


def _put(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    owner._modules[leaf] = new


def _checked_value(owner: nn.Module, name: str, value: Any) -> Any:
    where = f"{type(owner).__name__}.{name}"
    if name.startswith("__") or not hasattr(owner, name):
        raise EditError(f"there is no attribute {where}")
    now = getattr(owner, name)
    if not _plain(now):
        raise EditError(f"{where} is a {type(now).__name__}; only numbers, strings and tuples of them can be set")
    value = _tuples(value)
    if not _plain(value):
        raise EditError(f"value must be a number, a string or a tuple of them, got {value!r}")
    if isinstance(now, list | tuple) and isinstance(value, tuple):
        return list(value) if isinstance(now, list) else value
    same = type(now) is type(value) or now is None or value is None or {type(now), type(value)} <= {int, float}
    if not (same or {type(now), type(value)} <= {int, tuple}):
        raise EditError(f"{where} is {now!r}; it cannot become {value!r}")
    return value


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, _SCALARS)


def _tuples(value: Any) -> Any:
    """JSON lists as tuples, which is what module arguments and attributes are."""
    if isinstance(value, Mapping):
        return {k: _tuples(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_tuples(v) for v in value)
    return value


def _fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    if weights:
        state = model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, value in weights.items():
                state[name].copy_(value)


def _follow(optimizer: torch.optim.Optimizer, model: nn.Module, moved: list[_Move], before: list[nn.Parameter]) -> None:
    """Let an optimizer's groups and state follow the model, whose parameters were `before`."""
    groups = optimizer.param_groups
    for m in moved:  # in order: a parameter narrowed twice moves twice
        for group in groups:
            group["params"] = [m.new if p is m.old else p for p in group["params"]]
        state = optimizer.state.pop(m.old, None)
        if state is not None:
            optimizer.state[m.new] = {
                k: m.follow(v).contiguous() if isinstance(v, Tensor) and v.dim() and v.shape == m.old.shape else v
                for k, v in state.items()
            }
    now = {id(p) for p in model.parameters()}
    gone = {id(p) for p in [*before, *(m.new for m in moved)]} - now
    for group in groups:
        for p in [p for p in group["params"] if id(p) in gone]:
            optimizer.state.pop(p, None)
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    known = {id(p) for p in before} | {id(m.new) for m in moved}
    groups[0]["params"].extend(p for p in model.parameters() if id(p) not in known and p.requires_grad)


def _short(e: Edit) -> str:
    target = getattr(e, "tensor", None) or getattr(e, "module", "") or "model"
    return f"{e.kind} {target}"


def _from_json(item: Any) -> Edit:
    if not isinstance(item, Mapping) or item.get("edit") not in KINDS:
        raise EditError(f"not an edit: {str(item)[:80]!r}, expected an object with 'edit' in {sorted(KINDS)}")
    cls = KINDS[item["edit"]]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {k: v for k, v in item.items() if k != "edit"}
    unknown = set(values) - set(fields)
    missing = {
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing -= set(values)
    if unknown or missing:
        raise EditError(f"{cls.kind}: unknown fields {sorted(unknown)}, missing fields {sorted(missing)}")
    for name, value in values.items():
        _check_field(cls, name, value)
    if cls is SetAttr or "keep" in values:
        values = {k: _tuples(v) if k in ("keep", "value") else v for k, v in values.items()}
    return cls(**values)


def _check_field(cls: type[Edit], name: str, value: Any) -> None:
    def is_int(v: Any) -> bool:
        return isinstance(v, int) and not isinstance(v, bool)

    if name in ("dim", "size"):
        good = is_int(value)
    elif name == "keep":
        good = isinstance(value, list | tuple) and all(is_int(v) for v in value)
    elif name == "kwargs":
        good = isinstance(value, dict) and all(isinstance(k, str) for k in value)
    elif name == "value":
        good = _plain(value)
    else:
        good = isinstance(value, str)
    if not good:
        raise EditError(f"{cls.kind}: {name} cannot be {str(value)[:80]!r}")
