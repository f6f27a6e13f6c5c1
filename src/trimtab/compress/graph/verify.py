"""Running a cut module beside the graph it must agree with, until they part."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from trimtab.compress.graph.trace import module_of
from trimtab.nn.modes import eval_mode

if TYPE_CHECKING:
    from trimtab.compress.graph.channels import ChannelGraph

TOLERANCE = 1e-3  # relative to the largest value of a tensor; a wrong integer is wrong by far more


def scrambled(model: nn.Module, seed: int) -> nn.Module:
    """A copy with random weights of sensible scale: nothing is zero, so every branch shows in the output."""
    g = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if not p.is_floating_point() or p.numel() == 0:
                continue
            buffer = not isinstance(p, nn.Parameter)
            if buffer and not name.endswith(("running_mean", "running_var")):
                continue
            if name.endswith("running_var") or (p.dim() == 1 and not name.endswith("bias") and not buffer):
                value = torch.rand(p.shape, generator=g) + 0.5
            elif p.dim() > 1:
                value = torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.shape[0] > 1 else 0.2)
            else:
                value = torch.randn(p.shape, generator=g) * 0.1
            p.copy_(value.to(p))
    return model


@dataclass
class Expected:
    """What the narrowed graph gives: its outputs, and the outputs of every call of the leaf modules with weights."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    outputs: list[Tensor]
    leaves: dict[str, list[Tensor]]
    order: list[tuple[int, str]]  # position in the graph and name of each leaf call

    @classmethod
    def of(cls, graph: ChannelGraph, mask: NDArray[np.bool_], model: nn.Module, seed: int) -> Expected:
        g = torch.Generator().manual_seed(seed + 1)

        def noise(t: Tensor) -> Tensor:
            return torch.randn(t.shape, generator=g).to(t) if t.is_floating_point() else t

        args = tuple(map(noise, graph.args))
        kwargs = {k: noise(t) for k, t in graph.kwargs.items()}
        reference = graph.reference(mask, model=model)
        leaf = {n for n, m in model.named_modules() if not any(m.children()) and any(True for _ in m.parameters())}
        recorder = Recorder(reference, leaf)
        with torch.no_grad():
            out = recorder.run(*args, *kwargs.values())
        return cls(args, kwargs, tensors_of(out), recorder.leaves, recorder.order)


class Recorder(fx.Interpreter):
    """Runs a graph and keeps what each call of a leaf module gave: the last of its run of nodes."""

    def __init__(self, module: fx.GraphModule, leaf: set[str]) -> None:
        super().__init__(module)
        self.leaves: dict[str, list[Tensor]] = defaultdict(list)
        self.order: list[tuple[int, str]] = []
        self._leaf, self._last, self._position = leaf, "", 0

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.op == "call_function":
            self._position += 1
            path = module_of(n)
            name = path[-1] if path else ""
            if name in self._leaf and isinstance(out, Tensor):
                if self._last == name and self.leaves[name]:
                    self.leaves[name][-1] = out
                else:
                    self.leaves[name].append(out)
                    self.order.append((self._position, name))
            self._last = name
        return out


def tensors_of(out: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]


def close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return True
    a, b = torch.nan_to_num(a.double()), torch.nan_to_num(b.double())
    return bool((a - b).abs().max() <= TOLERANCE * max(float(b.abs().max()), 1e-6)) if a.numel() else True


class _Stop(Exception):
    """A leaf gave something else."""


@dataclass(frozen=True)
class Outcome:
    """How far a run came: leaf calls that agreed, and the modules running where it went wrong (outermost first)."""

    ok: bool
    progress: int
    stack: tuple[str, ...] = ()
    reason: str = ""


def run_beside(model: nn.Module, expected: Expected) -> Outcome:
    """Run the module, comparing every leaf call with what the graph gave; stops at the first that differs."""
    calls: dict[str, int] = defaultdict(int)
    running: list[str] = []
    progress, reason = 0, ""
    names = {m: n for n, m in model.named_modules()}

    def enter(module: nn.Module, *_: Any) -> None:
        running.append(names[module])

    def leave(module: nn.Module, _: Any, out: Any) -> None:
        nonlocal progress, reason
        name = names[module]
        want = expected.leaves.get(name, [])
        i = calls[name]
        calls[name] += 1
        if i < len(want) and isinstance(out, Tensor):
            if not close(out, want[i]):
                shapes = f"shape {tuple(out.shape)}, expected {tuple(want[i].shape)}"
                reason = f"{name} gives {'other values' if out.shape == want[i].shape else shapes}"
                raise _Stop
            progress += 1
        running.pop()

    hooks = [m.register_forward_pre_hook(enter) for m in names] + [m.register_forward_hook(leave) for m in names]
    try:
        with torch.no_grad(), eval_mode(model):
            out = model(*expected.args, **expected.kwargs)
    except _Stop:
        return Outcome(False, progress, tuple(running), reason)
    except Exception as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        return Outcome(False, progress, tuple(running), first)
    finally:
        for h in hooks:
            h.remove()
    got = tensors_of(out)
    same = len(got) == len(expected.outputs) and all(map(close, got, expected.outputs))
    return Outcome(same, progress + same, ("",), "" if same else "the output differs")
