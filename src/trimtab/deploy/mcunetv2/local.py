"""Which operators of a network are spatially local, how far each of them looks, and which window a window needs.

The network is the flat graph of ATen operators of `torch.export`. An operator is local when every position of its
output depends on a window of positions of its inputs that is found by arithmetic on each axis alone: convolutions,
pooling, norms with fixed statistics, elementwise work, concatenation, padding, strided slices, and views that leave
height and width as they are. A mean over the image is not.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from trimtab.compress.graph.trace import module_of, trace

A = torch.ops.aten
Window = tuple[int, int]  # rows or columns [first, last)


@dataclass(frozen=True)
class Reach:
    """How far an operator looks along one axis: output i reads inputs i * stride - pad + dilation * (0 ... kernel)."""

    kernel: int = 1
    stride: int = 1
    pad: int = 0
    dilation: int = 1

    def window(self, out: Window) -> Window:
        """The inputs that outputs [a, b) read; outside the input where they meet padding.

        >>> Reach(kernel=3, stride=2, pad=1).window((0, 7))
        (-1, 14)
        """
        low = out[0] * self.stride - self.pad
        return low, (out[1] - 1) * self.stride - self.pad + self.dilation * (self.kernel - 1) + 1


@dataclass(frozen=True)
class Local:
    """A local operator.

    Attributes:
        kind: how it is rewritten for a window ("conv", "max_pool", "avg_pool", "pad", "stride", "view", "point").
        reads: the activations that it reads.
        reach: along rows and along columns.
        axes: the dimensions of rows and columns in its output.
    """

    kind: str
    reads: tuple[fx.Node, ...]
    reach: tuple[Reach, Reach]
    axes: tuple[int, int]


class Program:
    """A network as a graph of operators, for one image (1, C, H, W).

    Attributes:
        image: where the graph begins. result: the node that it gives, or several.
        nodes: the operators that depend on the image, in order.
        local: those that are local, and how.
        tensors: parameters, buffers and constants by the name of their placeholder; they share the model's memory.
    """

    def __init__(self, model: nn.Module, size: Sequence[int]) -> None:
        if len(size) != 3:
            raise ValueError(f"patches are cut from images (C, H, W), got {tuple(size)}")
        device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        found = trace(model, (torch.zeros((1, *size), device=device),), {})
        self.graph, self.device = found.graph, device
        self.size = (int(size[0]), int(size[1]), int(size[2]))
        state: dict[str, Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self.tensors = {p: state[name].detach() for p, name in found.tensors.items()} | dict(found.constants)
        by_name = {n.name: n for n in self.graph.nodes}
        self.image = by_name[found.inputs[0]]
        results: Any = next(n for n in self.graph.nodes if n.op == "output").args[0]
        self.result = results[0] if len(results) == 1 else results
        self.nodes: list[fx.Node] = []
        active = {self.image}
        for node in self.graph.nodes:
            if node.op == "call_function" and any(i in active for i in node.all_input_nodes):
                active.add(node)
                self.nodes.append(node)
        self._heads: dict[fx.Node, list[fx.Node]] = {}
        self.local: dict[fx.Node, Local] = {}
        for node in self.nodes:
            if (rule := self._rule(node)) is not None:
                self.local[node] = rule

    def axes(self, node: fx.Node) -> tuple[int, int] | None:
        """The dimensions of rows and columns of an activation, None where it has none."""
        if node is self.image:
            return 2, 3
        return self.local[node].axes if node in self.local else None

    def side(self, node: fx.Node, axis: int) -> int:
        """Height (axis 0) or width (axis 1) of an activation."""
        axes = self.axes(node)
        assert axes is not None
        return int(value(node).shape[axes[axis]])

    @cached_property
    def cuts(self) -> list[fx.Node]:
        """Feature maps (1, C, H, W) that are, at their place, all that the rest of the network needs of the image.

        A cut before elementwise work would only split what runtimes fuse, so it is not one.
        """
        place = {n: i for i, n in enumerate(self.nodes)}
        last = {n: max((place.get(u, len(place)) for u in n.users), default=-1) for n in (self.image, *self.nodes)}
        found, open_until = [], last[self.image]
        for i, node in enumerate(self.nodes):
            if node not in self.local and node.target is not operator.getitem:
                break
            if open_until <= i and last[node] < len(place) and self._stands_alone(node):
                found.append(node)
            open_until = max(open_until, last[node])
        return found

    def _stands_alone(self, node: fx.Node) -> bool:
        if node not in self.local or not isinstance(node.meta["val"], Tensor):
            return False
        if value(node).dim() != 4 or self.axes(node) != (2, 3):
            return False
        users = list(node.users)
        return not (len(users) == 1 and users[0] in self.local and self.local[users[0]].kind in ("point", "view"))

    def head(self, cut: fx.Node) -> list[fx.Node]:
        """The operators that lead from the image to a cut, in order."""
        if cut not in self._heads:
            wanted = {cut}
            for node in reversed(self.nodes):
                if node in wanted:
                    wanted.update(self.local[node].reads)
            self._heads[cut] = [n for n in self.nodes if n in wanted]
        return self._heads[cut]

    def tail(self, cut: fx.Node) -> list[fx.Node]:
        """The operators after a cut, in order."""
        inside = {*self.head(cut)}
        return [n for n in self.nodes if n not in inside]

    @cached_property
    def _last_of(self) -> dict[str, fx.Node]:
        return {module: node for node in self.nodes for module in module_of(node)}

    def name(self, node: fx.Node) -> str:
        """The outermost module whose output an activation is, or else the module in which it was made."""
        for module in module_of(node):
            if module and self._last_of[module] is node:
                return module
        return (module_of(node) or (node.name,))[-1] or node.name

    def windows(self, cut: fx.Node, out: Window, axis: int, *, clip: bool = True) -> dict[fx.Node, Window] | None:
        """What every activation before a cut must have of itself, so that the cut gets the rows (columns) `out`.

        With `clip`, windows end at the borders of the image; None when one of them is wholly outside.
        """
        need = {cut: out}
        head = self.head(cut)
        for node in reversed(head):
            for source in self.local[node].reads:
                low, high = self.local[node].reach[axis].window(need[node])
                if clip:
                    low, high = max(low, 0), min(high, self.side(source, axis))
                    if low >= high:
                        return None
                old = need.get(source, (low, high))
                need[source] = min(old[0], low), max(old[1], high)
        for node in head:
            if node.target is operator.getitem:  # one of the parts of a tensor is as large as the others
                need[node] = need[self.local[node].reads[0]]
        return need

    def receptive_field(self, cut: fx.Node) -> int:
        """Pixels of the image along a side that one position of a cut may depend on."""
        need = self.windows(cut, (0, 1), 0, clip=False)
        assert need is not None
        return need[self.image][1] - need[self.image][0]

    # -- rules ---------------------------------------------------------------------------------------------------------

    def _rule(self, node: fx.Node) -> Local | None:
        reads = tuple(n for n in node.all_input_nodes if n is self.image or n in self.local)
        others = [n for n in node.all_input_nodes if n not in reads]
        if not reads or any(n in self.nodes for n in others):  # reads something that is not local
            return None
        kinds = {self.axes(n) for n in reads}
        sides = {(self.side(n, 0), self.side(n, 1)) for n in reads}
        if len(kinds) > 1 or len(sides) > 1:
            return None
        axes = kinds.pop()
        assert axes is not None
        given = arguments(node)
        if (rule := _RULES.get(node.target)) is not None:
            return rule(node, given, reads, axes)
        same = value(node).dim() == value(reads[0]).dim() and all(
            value(node).shape[d] == value(reads[0]).shape[d] for d in axes
        )
        constants = [value(n) for n in others if n.op == "placeholder"]
        flat = all(_flat(t, value(node).dim(), axes) for t in constants)
        if same and flat and is_pointwise(node) and len(constants) == len(others):
            return Local("point", reads, (Reach(), Reach()), axes)
        return None


def value(node: fx.Node) -> Tensor:
    """The (fake) tensor that a node makes; the first of several."""
    made = node.meta["val"]
    return made[0] if isinstance(made, tuple | list) else made


def is_pointwise(node: fx.Node) -> bool:
    """Whether every number of the output depends on the numbers at the same place alone."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target in _POINTWISE


def is_view(node: fx.Node) -> bool:
    """Whether the output lies in the memory of the input."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    returns = node.target._schema.returns
    return node.target in _COPY_FREE or (bool(returns) and returns[0].alias_info is not None)


def is_depthwise(node: fx.Node) -> bool:
    """Whether a node is a convolution of every channel by itself."""
    if node.target not in (A.conv2d.default, A.conv2d.padding):
        return False
    given = arguments(node)
    channels = value(given["input"]).shape[1]
    return given["groups"] == channels == value(node).shape[1] and channels > 1


def macs(node: fx.Node) -> int:
    """Multiply-accumulates of a local product on the whole image."""
    given = arguments(node)
    if "weight" not in given or node.target not in (A.conv2d.default, A.conv2d.padding, A.linear.default):
        return 0
    return value(node).numel() * math.prod(value(given["weight"]).shape[1:])


def arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by name, defaults included."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    schema = node.target._schema.arguments
    given = {a.name: a.default_value if a.has_default_value() else None for a in schema}
    return given | dict(zip((a.name for a in schema), node.args)) | dict(node.kwargs)


def two(given: Any) -> tuple[int, int]:
    """One number or one per axis -> one per axis."""
    numbers = [given] if isinstance(given, int) else list(given)
    return (numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


def cells(side: int, grid: int) -> list[Window]:
    """A side in `grid` parts that differ by one at most.

    >>> cells(7, 3)
    [(0, 2), (2, 4), (4, 7)]
    """
    return list(pairwise(i * side // grid for i in range(grid + 1)))


Rule = Callable[[fx.Node, Mapping[str, Any], tuple[fx.Node, ...], tuple[int, int]], Local | None]


def _flat(t: Tensor, dims: int, axes: Iterable[int]) -> bool:
    """Whether a constant is the same for all positions."""
    return all(t.dim() < dims - d or t.shape[d - dims] == 1 for d in axes)


def _point(node: fx.Node, given: Mapping[str, Any], reads: tuple[fx.Node, ...], axes: tuple[int, int]) -> Local:
    return Local("point", reads, (Reach(), Reach()), axes)


def _conv(node: fx.Node, given: Mapping[str, Any], reads: tuple[fx.Node, ...], axes: tuple[int, int]) -> Local | None:
    if len(reads) != 1 or axes != (2, 3) or given["input"] is not reads[0]:
        return None
    kernel, dilation = two(value(given["weight"]).shape[2:]), two(given["dilation"])
    if isinstance(given["padding"], str):
        total = [d * (k - 1) if given["padding"] == "same" else 0 for k, d in zip(kernel, dilation)]
        pad = total[0] // 2, total[1] // 2
    else:
        pad = two(given["padding"])
    stride = two(given["stride"])
    return Local("conv", reads, _reach(kernel, stride, pad, dilation), axes)


def _max_pool(node: fx.Node, given: Mapping[str, Any], reads: tuple[fx.Node, ...], axes: tuple[int, int]) -> Local:
    kernel = two(given["kernel_size"])
    stride = two(given["stride"] or kernel)
    return Local("max_pool", reads, _reach(kernel, stride, two(given["padding"]), two(given["dilation"])), axes)


def _avg_pool(
    node: fx.Node, given: Mapping[str, Any], reads: tuple[fx.Node, ...], axes: tuple[int, int]
) -> Local | None:
    kernel, pad = two(given["kernel_size"]), two(given["padding"])
    reach = _reach(kernel, two(given["stride"] or kernel), pad, (1, 1))
    shape, source = value(node).shape, value(reads[0]).shape
    if any(pad) and not given["count_include_pad"] and not given["divisor_override"]:
        return None  # the divisor differs along the border
    if any(r.window((0, shape[d]))[1] > source[d] + p for r, d, p in zip(reach, axes, pad)):
        return None  # so it does where the last window hangs over
    return Local("avg_pool", reads, reach, axes)


def _pad(node: fx.Node, given: Mapping[str, Any], reads: tuple[fx.Node, ...], axes: tuple[int, int]) -> Local | None:
    if given.get("mode", "constant") != "constant":
        return None
    rows, columns = (Reach(pad=spatial_pads(given["pad"], value(node).dim(), d)[0]) for d in axes)
    return Local("pad", reads, (rows, columns), axes)


def _slice(node: fx.Node, given: Mapping[str, Any], reads: tuple[fx.Node, ...], axes: tuple[int, int]) -> Local | None:
    dim = given["dim"] % value(node).dim()
    if dim not in axes:
        return Local("point", reads, (Reach(), Reach()), axes)
    start, side = given["start"] or 0, value(reads[0]).shape[dim]
    reach = Reach(stride=given["step"], pad=-(start + side if start < 0 else start))
    rows, columns = (reach if d == dim else Reach() for d in axes)
    return Local("stride", reads, (rows, columns), axes)


def _moved(order: Sequence[int]) -> Callable[[tuple[int, int]], tuple[int, int]]:
    return lambda axes: (list(order).index(axes[0]), list(order).index(axes[1]))


def _permute(node: fx.Node, given: Mapping[str, Any], reads: tuple[fx.Node, ...], axes: tuple[int, int]) -> Local:
    dims = value(node).dim()
    if "dims" in given:
        order = [d % dims for d in given["dims"]]
    else:
        order = list(range(dims))
        a, b = given["dim0"] % dims, given["dim1"] % dims
        order[a], order[b] = order[b], order[a]
    return Local("point", reads, (Reach(), Reach()), _moved(order)(axes))


def _view(node: fx.Node, given: Mapping[str, Any], reads: tuple[fx.Node, ...], axes: tuple[int, int]) -> Local | None:
    old, new = value(reads[0]).shape, value(node).shape
    if axes != (len(old) - 2, len(old) - 1) or len(new) < 3 or tuple(new[-2:]) != tuple(old[-2:]):
        return None
    return Local("view", reads, (Reach(), Reach()), (len(new) - 2, len(new) - 1))


def _last_dims(node: fx.Node, given: Mapping[str, Any], reads: tuple[fx.Node, ...], axes: tuple[int, int]) -> Any:
    """Works on the last dimensions: a layer norm, a linear layer."""
    count = len(given["normalized_shape"]) if "normalized_shape" in given else 1
    if len(reads) != 1 or max(axes) >= value(node).dim() - count:
        return None
    return _point(node, given, reads, axes)


def _along(node: fx.Node, given: Mapping[str, Any], reads: tuple[fx.Node, ...], axes: tuple[int, int]) -> Local | None:
    """Works along one dimension, which must not be of space: concatenation, splitting."""
    return None if given["dim"] % value(reads[0]).dim() in axes else _point(node, given, reads, axes)


def _reach(
    kernel: tuple[int, int], stride: tuple[int, int], pad: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Reach, Reach]:
    rows, columns = (Reach(k, s, p, d) for k, s, p, d in zip(kernel, stride, pad, dilation))
    return rows, columns


def spatial_pads(pad: Sequence[int], dims: int, dim: int) -> tuple[int, int]:
    """What `F.pad` with these numbers puts before and after dimension `dim`."""
    i = 2 * (dims - 1 - dim)
    return (pad[i], pad[i + 1]) if i < len(pad) else (0, 0)


NORMS = (A._native_batch_norm_legit_no_training.default,)
_POINTWISE = {A.hardswish.default, A.add.Tensor, A.sub.Tensor, A.mul.Tensor, A.div.Tensor, A.gelu.default}
_COPY_FREE = {A.alias.default, A.dropout.default, A.clone.default, A._unsafe_view.default, A.contiguous.default}
_RULES: dict[Any, Rule] = {
    A.conv2d.default: _conv,
    A.conv2d.padding: _conv,
    A.max_pool2d.default: _max_pool,
    A.avg_pool2d.default: _avg_pool,
    A.pad.default: _pad,
    A.constant_pad_nd.default: _pad,
    A.slice.Tensor: _slice,
    A.permute.default: _permute,
    A.transpose.int: _permute,
    A.view.default: _view,
    A.reshape.default: _view,
    A._unsafe_view.default: _view,
    A.layer_norm.default: _last_dims,
    A.linear.default: _last_dims,
    A.cat.default: _along,
    A.split.Tensor: _along,
    A.split_with_sizes.default: _along,
    A.chunk.default: _along,
    A.alias.default: _point,
    A.clone.default: _point,
    A.dropout.default: _point,
    A._native_batch_norm_legit_no_training.default: _point,
    operator.getitem: _point,
}
