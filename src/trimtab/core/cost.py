"""What a model costs: parameters, multiply-accumulates, activations, bytes, memory, latency, energy.

Everything is counted at the level of operators, never by module type, so any `nn.Module` is counted: a copy of the
model without data (on the meta device) is run once, every operator that reaches PyTorch's dispatcher is seen, and the
formulas of `torch.utils.flop_counter` say what it costs. Paper-scale models need no memory, and the model itself is
never run: latency, too, is that of a copy which shares its weights.

A module may say more about itself than its tensors show:

- `stored_bytes()` -> int: bytes that the module and all below it occupy when stored (packed codes, sparse ...);
- `stored_params()` -> int: how many weights it holds, where they are packed in buffers;
- `weight_bits`, `act_bits`: the precision in which its products are made; used for `bops` and `energy`.

Operators of your own are counted once they are registered with `torch.utils.flop_counter.register_flop_formula`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from trimtab.core import energy as _energy
from trimtab.core import meta
from trimtab.core.lifetime import Step, peak
from trimtab.core.timing import timed, torch_threads

ROOT = "(model)"
WHAT = ("params", "macs", "activations", "size", "memory", "bops", "latency", "energy")


@dataclass(frozen=True)
class LayerCost:
    """One row of the per-layer table: what a module costs itself, without the modules below it."""

    name: str
    kind: str
    params: int
    macs: int
    activations: int
    size: int


@dataclass(frozen=True)
class Cost:
    """What a model costs. A field that was not asked for is None.

    Attributes:
        params: parameters, shared ones once.
        macs: multiply-accumulates of one forward pass (FLOPs are twice that).
        activations: elements that convolutions, matrix products and attention put out.
        size: bytes as stored: parameters and persistent buffers, or the file.
        memory: peak bytes of activations alive at once at inference (`core.lifetime`), weights not counted.
        bops: MACs x bits of the weight x bits of the activation.
        latency, latency_iqr: seconds of one forward pass, median and interquartile range.
        energy: joules of one forward pass, estimated from the table in `core.energy`.
        energy_rapl: joules measured by the processor's own counters, None where the machine has none to read.
        runtime: what the latency was measured in, with the number of threads.
        layers: the per-layer table.
    """

    params: int | None = None
    macs: int | None = None
    activations: int | None = None
    size: int | None = None
    memory: int | None = None
    bops: float | None = None
    latency: float | None = None
    latency_iqr: float | None = None
    energy: float | None = None
    energy_rapl: float | None = None
    runtime: str | None = None
    layers: tuple[LayerCost, ...] = field(default=(), repr=False)

    def asdict(self) -> dict[str, Any]:
        """Plain JSON values; `layers` is a list of dicts."""
        out: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        out["layers"] = [{f.name: getattr(row, f.name) for f in fields(row)} for row in self.layers]
        return out


# ------------------------------------------------------------------------------------------------------------- formulas
# Products that torch's registry does not know. Each takes the arguments of the operator and gives MACs.


def _mv(mat: Tensor, *_: Any, **__: Any) -> int:
    return math.prod(mat.shape)


def _stored(a: Tensor) -> int:
    """Elements that a matrix really multiplies with: all of a dense one, the stored ones of a sparse one."""
    return a._nnz() if a.layout is not torch.strided else math.prod(a.shape)


def _sparse_mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return _stored(a) * b.shape[-1] if a.layout is not torch.strided else _stored(b) * a.shape[0]


MAC_FORMULAS: dict[str, Callable[..., int]] = {
    "aten::mv": _mv,
    "aten::dot": _mv,
    "aten::vdot": _mv,
    "aten::addmv": lambda bias, mat, *_, **__: _mv(mat),
    "aten::addmv_": lambda bias, mat, *_, **__: _mv(mat),
    "aten::addbmm": lambda bias, a, b, *_, **__: math.prod(a.shape) * b.shape[-1],
    "aten::_int_mm": lambda a, b, *_, **__: math.prod(a.shape) * b.shape[-1],
    "aten::_sparse_mm": _sparse_mm,
    "aten::_sparse_addmm": lambda bias, a, b, *_, **__: _sparse_mm(a, b),
    "aten::_trilinear": lambda a, b, c, *_, **__: math.prod(a.shape) * c.shape[-1] + b.shape[0] * a.shape[0],
    "torchvision::deform_conv2d": lambda x, w, *_, _out=None, **__: (
        _out.shape[0] * math.prod(_out.shape[2:]) * math.prod(w.shape)
    ),
}
_NEEDS_OUT = {"torchvision::deform_conv2d"}
_FOLDED = ("aten::native_batch_norm", "aten::_native_batch_norm_legit_no_training", "aten::cudnn_batch_norm")


def _macs(func: Any, args: tuple, kwargs: dict, out: Any) -> int | None:
    """MACs of one operator call, or None when it is no product."""
    packet = func._overloadpacket
    name = packet._qualified_op_name
    if (formula := MAC_FORMULAS.get(name)) is not None:
        return int(formula(*args, **kwargs, _out=out) if name in _NEEDS_OUT else formula(*args, **kwargs))
    mat = [a for a in args if isinstance(a, Tensor)]
    if name in ("aten::mm", "aten::addmm") and any(m.layout is not torch.strided for m in mat):
        return _sparse_mm(*mat[-2:])
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out)) // 2
    return None


# ---------------------------------------------------------------------------------------------------------------- trace


@dataclass
class _Product:
    owner: str
    macs: int
    activations: int
    bits: int  # of the operands, as they are


def _key(t: Tensor) -> int | None:
    """Identity of the memory under a tensor: views share it."""
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without storage
        return None


class _Tracer(TorchDispatchMode):
    """Sees every operator: what it costs, on whose behalf, and which memory it reads and writes."""

    def __init__(self, model: nn.Module, inputs: list[Tensor]) -> None:
        super().__init__()
        self.products: list[_Product] = []
        self.steps: list[Step] = []
        self.sizes: dict[int, int] = {}  # only what depends on the input: the rest is constant at inference
        self.traffic = 0  # bytes of activations read and written by operators that no runtime fuses away
        self._alive: list[StorageWeakRef] = []  # keeps identities unique, not the data
        self._stack: list[str] = []
        self._owners: dict[int, str] = {}
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            for p in module.parameters(recurse=False):
                if (k := _key(p)) is not None:
                    self._owners.setdefault(k, name or ROOT)
            self._handles.append(module.register_forward_pre_hook(self._enter(name or ROOT), prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self.inputs = [k for t in inputs if (k := self._note(t)) is not None]

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._stack.append(name)

        return hook

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._stack.pop()

    def _note(self, t: Tensor) -> int | None:
        k = _key(t)
        if k is not None and k not in self.sizes:
            storage = t.untyped_storage()
            self._alive.append(StorageWeakRef(storage))
            self.sizes[k] = storage.nbytes()
        return k

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.is_meta for t in tensors) and not all(t.is_meta for t in tensors):
            # A constant that the model made on its own device meets the shapes we push through.
            args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
        out = meta.call(func, args, kwargs)
        macs = _macs(func, args, kwargs, out)
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if macs is not None:
            operands = [t for t in tensors if t.dtype != torch.bool]
            owner = next((self._owners[k] for t in tensors if (k := _key(t)) in self._owners), None)
            bits = max((8 * t.dtype.itemsize for t in operands), default=32)
            owner = owner or (self._stack[-1] if self._stack else ROOT)
            self.products.append(_Product(owner, macs, outs[0].numel() if outs else 0, bits))
        self._live(func, tensors, outs)
        return out

    def _live(self, func: Any, tensors: list[Tensor], outs: list[Tensor]) -> None:
        reads = tuple(dict.fromkeys(k for t in tensors if (k := _key(t)) in self.sizes))
        if not reads:
            return
        mutable = func._schema.is_mutable
        before = len(self.sizes)
        writes = []
        if mutable:  # a constant that the input is written into is an activation from here on
            for spec, t in zip(func._schema.arguments, tensors, strict=False):
                if spec.alias_info is not None and spec.alias_info.is_write:
                    writes.append(self._note(t))
        writes += [self._note(t) for t in outs]
        made = len(self.sizes) > before
        keys = tuple(dict.fromkeys(k for k in writes if k is not None))
        fused = torch.Tag.pointwise in func.tags or func._overloadpacket._qualified_op_name in _FOLDED
        if made or mutable:
            if not fused:
                self.traffic += sum(self.sizes[k] for k in {*reads, *keys[:1]})
            self.steps.append(Step(reads, keys, in_place=fused))
        else:  # a view: it reads, and occupies nothing
            self.steps.append(Step(reads, ()))

    def close(self) -> None:
        for h in self._handles:
            h.remove()

    def peak(self, outputs: Any) -> int:
        outs = {k for t in tree_leaves(outputs) if isinstance(t, Tensor) and (k := _key(t)) in self.sizes}
        read = {k for s in self.steps for k in s.reads} | outs
        steps = [
            Step(s.reads, tuple(k for j, k in enumerate(s.writes) if j == 0 or k in read), s.in_place)
            for s in self.steps
        ]
        return peak(steps, self.sizes, inputs=self.inputs, outputs=outs)


# --------------------------------------------------------------------------------------------------------------- copies


def _on_meta(t: Tensor) -> Tensor:
    if t.is_meta:
        return t
    if t.layout is not torch.strided:
        return t.to("meta")
    return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta")


def _unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside torch.compile, DataParallel or DistributedDataParallel."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _loose(module: nn.Module) -> Iterator[Tensor]:
    """Tensors kept as plain attributes, also in lists, tuples and dicts one level down."""
    for value in vars(module).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (v for v in value if isinstance(v, Tensor))
        elif isinstance(value, dict):
            yield from (v for v in value.values() if isinstance(v, Tensor) and not isinstance(v, nn.Parameter))


def _no_lazy(model: nn.Module) -> None:
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(t, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
            raise ValueError(f"{name} has no shape yet (a lazy module); run the model once first")


def twin(model: nn.Module, *, meta: bool = False) -> nn.Module:
    """A copy in eval mode that can be run without the model noticing.

    Parameters share the model's memory (or have none, with `meta`), buffers are copied, gradients and the user's hooks
    are left behind. Hooks that torch itself needs for a weight (weight norm, spectral norm, pruning masks) stay.
    """
    memo: dict[int, Any] = {}
    _no_lazy(model)
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if id(p) not in memo:
                data = _on_meta(p.detach()) if meta else p.detach()
                memo[id(p)] = nn.Parameter(data, requires_grad=False) if type(p) is nn.Parameter else data
        for b in (*module.buffers(recurse=False), *_loose(module)):
            if id(b) not in memo and not isinstance(b, nn.Parameter):
                memo[id(b)] = _on_meta(b.detach()) if meta else b.detach().clone()
    result = copy.deepcopy(model, memo)
    for module in result.modules():
        module._forward_hooks.clear()
        module._forward_hooks_with_kwargs.clear()
        module._forward_hooks_always_called.clear()
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()
        for k, hook in list(module._forward_pre_hooks.items()):
            if not type(hook).__module__.startswith("torch."):
                del module._forward_pre_hooks[k]
    return result.eval()


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Run a forward pass that leaves no trace: no gradients, no random numbers drawn, no opaque fused encoder."""
    cuda = sorted({t.device.index or 0 for t in (*model.parameters(), *model.buffers()) if t.is_cuda})
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def _example(model: nn.Module, input_size: Any, batch_size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) to call the model with; a size gives a tensor on meta of the model's floating type."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(input_size, Tensor):
        return (input_size,), {}
    if isinstance(input_size, Mapping):
        return (), dict(input_size)
    if isinstance(input_size, Sequence) and len(input_size) and not isinstance(input_size, str):
        if all(isinstance(n, int) and not isinstance(n, bool) for n in input_size):
            if min(input_size) < 1:
                raise ValueError(f"input_size must be positive, got {tuple(input_size)}")
            tensors = (*model.parameters(), *model.buffers())
            dtype = next((t.dtype for t in tensors if t.dtype.is_floating_point), torch.float32)
            dtype = torch.float32 if dtype.itemsize == 1 else dtype
            return (torch.empty(batch_size, *input_size, dtype=dtype, device="meta"),), {}
        if any(isinstance(t, Tensor) for t in input_size):
            return tuple(input_size), {}
    raise ValueError(f"input_size must be (C, H, W), a tensor, or a tuple of example inputs, got {input_size!r}")


def _real(value: Any, device: torch.device) -> Any:
    """The example with data: zeros where only a shape was given."""
    return tree_map_only(
        Tensor, lambda t: torch.zeros_like(t, device=device) if t.is_meta else t.detach().to(device), value
    )


def _trace(model: nn.Module, args: tuple, kwargs: dict) -> tuple[_Tracer, int]:
    tracer = _Tracer(model, [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)])
    try:
        with quiet(model), tracer:
            out = model(*args, **kwargs)
        return tracer, tracer.peak(out)
    finally:
        tracer.close()


def _run(model: nn.Module, args: tuple, kwargs: dict) -> tuple[_Tracer, int]:
    """Trace on meta; a model that looks at values (or an operator without shapes) is traced with data instead."""
    try:
        return _trace(twin(model, meta=True), *tree_map_only(Tensor, _on_meta, (args, kwargs)))
    except Exception as on_meta:
        device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        try:
            if device.type == "meta":
                raise on_meta
            return _trace(twin(model), *_real((args, kwargs), device))
        except Exception as e:
            shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            raise ValueError(f"cannot measure {type(model).__name__} on input {shapes}: {_one_line(e)}") from e


def _one_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


# -------------------------------------------------------------------------------------------------------------- measure


def _nbytes(t: Tensor) -> int:
    if is_traceable_wrapper_subclass(t):  # such as torchao's quantized weights: what is inside is what is stored
        return sum(_nbytes(getattr(t, name)) for name in t.__tensor_flatten__()[0])
    if t.layout is torch.strided:
        return t.numel() * t.element_size()
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return sum(_nbytes(p) for p in (t.crow_indices(), t.col_indices(), t.values()))
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return sum(_nbytes(p) for p in (t.ccol_indices(), t.row_indices(), t.values()))
    return _nbytes(t._indices()) + _nbytes(t._values())


def _held(model: nn.Module) -> dict[str, tuple[str, int, int]]:
    """name -> (kind, params, bytes) of every module's own tensors; tensors and modules that are shared count once."""
    rows: dict[str, tuple[str, int, int]] = {}
    seen: set[int] = set()
    inside = ""  # below a module that has already spoken for everything under it
    silent_params = False
    for name, module in model.named_modules():
        params = size = 0
        spoken = bool(inside) and name.startswith(inside)
        if not spoken:
            inside, silent_params = "", False
        transient = module._non_persistent_buffers_set
        tensors = [(p, True) for p in module._parameters.values() if p is not None]
        tensors += [(b, False) for n, b in module._buffers.items() if b is not None and n not in transient]
        for t, is_param in tensors:
            if id(t) in seen:
                continue
            seen.add(id(t))
            params += t.numel() if is_param and not silent_params else 0
            size += 0 if spoken else _nbytes(t)
        if not spoken and callable(getattr(module, "stored_bytes", None)):
            size = int(module.stored_bytes())
            inside = name + "." if name else ""
            if not name:  # the root speaks for the whole model
                inside = "\0"
            if callable(getattr(module, "stored_params", None)):
                params, silent_params = int(module.stored_params()), True
        rows[name or ROOT] = (type(module).__name__, params, size)
        if inside == "\0":
            total = params if silent_params else sum(p.numel() for p in model.parameters())
            return {ROOT: (type(model).__name__, total, size)}
    return rows


def _bits(model: nn.Module) -> dict[str, tuple[float | None, float | None]]:
    """name -> (weight_bits, act_bits) as the module or the nearest one above it declares."""
    out: dict[str, tuple[float | None, float | None]] = {}
    for name, module in model.named_modules():
        above = out.get(name.rpartition(".")[0] or ROOT, (None, None))
        w, a = getattr(module, "weight_bits", None), getattr(module, "act_bits", None)
        out[name or ROOT] = (
            float(w) if isinstance(w, int | float) else above[0],
            float(a) if isinstance(a, int | float) else above[1],
        )
    return out


def _latency(model: nn.Module, args: tuple, kwargs: dict, threads: int) -> tuple[float, float, float | None, str]:
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    if device.type == "meta":
        raise ValueError("latency must be measured on a model with data, got one on the meta device")
    runner = twin(model)
    args, kwargs = _real((args, kwargs), device)

    def call() -> None:
        runner(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch_threads(threads), torch.random.fork_rng(devices=cuda), torch.inference_mode():
        median, iqr = timed(call)
        joules = _energy.rapl_joules(call) if _energy.rapl_available() else None
    where = str(device) if device.type != "cpu" else f"{threads} thread{'s' if threads > 1 else ''}"
    return median, iqr, joules, f"PyTorch {torch.__version__.split('+')[0]}, {where}"


def measure(
    model: nn.Module,
    input_size: Sequence[int] | Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    what: Sequence[str] = ("params", "macs", "activations", "size", "memory"),
    batch_size: int = 1,
    per_layer: bool = False,
    threads: int = 1,
) -> Cost:
    """What a model costs at inference (eval mode). The model is not changed in any way, and may be on the meta device.

    MACs of convolutions, matrix products (also batched, also einsum), and attention, fused or not; bias additions,
    norms and elementwise work are not counted, as in the literature. They equal `torch.utils.flop_counter` / 2.

    Args:
        input_size: (C, H, W); or a tensor, a tuple of example inputs, or a dict of keyword inputs, batch included.
        what: any of "params", "macs", "activations", "size", "memory", "bops", "latency", "energy".
        batch_size: images in the batch, for an `input_size` without one; MACs, activations, memory, latency and energy
            are those of the whole batch.
        per_layer: also fill `Cost.layers`; its columns add up to the totals.
        threads: for the latency; put back afterwards.

    Raises:
        ValueError: the model does not take such an input, or an unknown cost is asked for.

    Example:
        >>> cost = measure(nn.Conv2d(3, 8, 3, padding=1), (3, 32, 32))
        >>> cost.params, cost.macs
        (224, 221184)
    """
    what = (what,) if isinstance(what, str) else tuple(what)
    if wrong := [w for w in what if w not in WHAT]:
        raise ValueError(f"what must be some of {', '.join(WHAT)}, got {', '.join(map(repr, wrong))}")
    model = _unwrap(model)
    _no_lazy(model)
    args, kwargs = _example(model, input_size, batch_size)
    got: dict[str, Any] = {}
    held = _held(model)
    if "params" in what:
        got["params"] = sum(p for _, p, _ in held.values())
    if "size" in what:
        got["size"] = sum(b for _, _, b in held.values())
    products: list[_Product] = []
    if per_layer or {"macs", "activations", "memory", "bops", "energy"} & {*what}:
        tracer, memory = _run(model, args, kwargs)
        products = tracer.products
        if "macs" in what:
            got["macs"] = sum(p.macs for p in products)
        if "activations" in what:
            got["activations"] = sum(p.activations for p in products)
        if "memory" in what:
            got["memory"] = memory
        if {"bops", "energy"} & {*what}:
            bits = _bits(model)
            widths = [(p.macs, bits[p.owner][0] or p.bits, bits[p.owner][1] or p.bits) for p in products]
            if "bops" in what:
                got["bops"] = sum(m * w * a for m, w, a in widths)
            if "energy" in what:
                arithmetic = sum(m * _energy.mac_pj(w, a) for m, w, a in widths)
                weights = sum(b for _, _, b in held.values())
                got["energy"] = _energy.estimate(arithmetic, weights, tracer.traffic)
    if "latency" in what:
        got["latency"], got["latency_iqr"], joules, got["runtime"] = _latency(model, args, kwargs, threads)
        got["energy_rapl"] = joules if "energy" in what else None
    if per_layer:
        got["layers"] = _table(model, held, products)
    return Cost(**got)


def _table(
    model: nn.Module, held: Mapping[str, tuple[str, int, int]], products: Sequence[_Product]
) -> tuple[LayerCost, ...]:
    """Rows in the order of the modules; modules that hold and do nothing are left out."""
    macs: dict[str, int] = {}
    acts: dict[str, int] = {}
    for p in products:
        macs[p.owner] = macs.get(p.owner, 0) + p.macs
        acts[p.owner] = acts.get(p.owner, 0) + p.activations
    rows = []
    for name, module in model.named_modules():
        name = name or ROOT
        _, params, size = held.get(name, ("", 0, 0))
        row = LayerCost(name, type(module).__name__, params, macs.get(name, 0), acts.get(name, 0), size)
        if row.params or row.macs or row.activations or row.size:
            rows.append(row)
    return tuple(rows)


def __getattr__(name: str) -> Any:
    if name == "measure_onnx":  # needs onnx and onnxruntime, which take a while to import
        from trimtab.core.onnx_cost import measure_onnx

        return measure_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
