"""Pieces of a network as modules of their own: the head for one kind of patch, and the rest.

A piece is a plain `fx.GraphModule` on the model's own tensors. In the head of a patch every operator gets exactly the
window that it reads, and padding only where that window crosses the border of the true feature map: padding the image
once would be wrong, for a padded position is not zero any more after a norm or a bias.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from trimtab.deploy.mcunetv2.local import A, Local, Program, Window, arguments, spatial_pads, two, value

Windows = Mapping[fx.Node, Window]
Kind = tuple[Any, ...]
_FILL = {"max_pool": float("-inf")}


def whole(program: Program) -> fx.GraphModule:
    """The network, run at once."""
    return _extract(program, program.nodes, program.image, program.result)


def tail(program: Program, cut: fx.Node) -> fx.GraphModule:
    """What follows a cut."""
    return _extract(program, program.tail(cut), cut, program.result)


def head(program: Program, cut: fx.Node, rows: Windows, columns: Windows) -> fx.GraphModule:
    """What leads to a cut, for a patch with these windows."""

    def call(graph: fx.Graph, node: fx.Node, args: dict[str, Any]) -> fx.Node:
        return _windowed(graph, program, node, args, (rows, columns))

    return _extract(program, program.head(cut), program.image, cut, call)


def kind(program: Program, nodes: Sequence[fx.Node], windows: Windows, axis: int) -> Kind:
    """Equal for rows (columns) of patches that the same piece computes."""
    found: list[Any] = [windows[program.image][1] - windows[program.image][0]]
    for node in nodes:
        for source in program.local[node].reads:
            found.append(_crop_and_pad(program, node, source, windows, axis))
    return tuple(found)


def _extract(
    program: Program,
    nodes: Sequence[fx.Node],
    source: fx.Node,
    result: Any,
    call: Callable[[fx.Graph, fx.Node, dict[str, Any]], fx.Node] | None = None,
) -> fx.GraphModule:
    graph, root = fx.Graph(), nn.Module()
    env: dict[fx.Node, fx.Node] = {source: graph.placeholder("x")}
    inside = {*nodes}

    def get(node: fx.Node) -> fx.Node:
        if node in env:
            return env[node]
        if node.name in program.tensors:
            root.register_buffer(node.name, program.tensors[node.name])
            env[node] = graph.get_attr(node.name)
        else:  # something that the model makes of constants
            env[node] = graph.node_copy(node, get)
        return env[node]

    for node in nodes:
        read = node.all_input_nodes
        if node.target is operator.getitem and read[0] in env and env[read[0]].target is F.batch_norm:
            env[node] = env[read[0]]
        elif node.target is A._native_batch_norm_legit_no_training.default:
            given = {k: get(v) if isinstance(v, fx.Node) else v for k, v in arguments(node).items()}
            env[node] = graph.call_function(
                F.batch_norm,
                (given["input"], given["running_mean"], given["running_var"], given["weight"], given["bias"]),
                {"training": False, "momentum": given["momentum"], "eps": given["eps"]},
            )
        elif call is not None and isinstance(node.target, torch._ops.OpOverload):
            env[node] = call(graph, node, fx.map_arg(arguments(node), get))
        else:
            env[node] = graph.node_copy(node, get)
    assert inside <= {*env}
    graph.output(fx.map_arg(result, get))
    graph.eliminate_dead_code()
    return fx.GraphModule(root, graph).eval().requires_grad_(False)


def _windowed(
    graph: fx.Graph, program: Program, node: fx.Node, args: dict[str, Any], windows: tuple[Windows, Windows]
) -> fx.Node:
    """A local operator on its window; `args` are its arguments in the new graph."""
    local = program.local[node]
    seen: dict[fx.Node, fx.Node] = {}
    pads: list[tuple[int, int]] = [(0, 0), (0, 0)]
    for source in local.reads:
        new = _new_name(node, source, args)
        axes = program.axes(source)
        assert axes is not None
        cropped = new
        for axis in (0, 1):
            (low, high), pads[axis] = _crop_and_pad(program, node, source, windows[axis], axis)
            if (low, high) != (0, windows[axis][source][1] - windows[axis][source][0]):
                cropped = graph.call_function(A.slice.Tensor, (cropped, axes[axis], low, high))
        seen[new] = cropped
    args = dict(fx.map_arg(args, lambda n: seen.get(n, n)))
    return graph.call_function(*_without_border(graph, node, local, args, pads, windows))


def _new_name(node: fx.Node, source: fx.Node, args: dict[str, Any]) -> fx.Node:
    """The node of the new graph that stands where `source` stood among the arguments."""
    pairs: list[tuple[fx.Node, fx.Node]] = []
    old, new = arguments(node), args
    for name in old:
        olds: list[fx.Node] = []
        news: list[fx.Node] = []
        fx.map_arg(old[name], olds.append)
        fx.map_arg(new[name], news.append)
        pairs += zip(olds, news, strict=True)
    return next(b for a, b in pairs if a is source)


def _crop_and_pad(
    program: Program, node: fx.Node, source: fx.Node, windows: Windows, axis: int
) -> tuple[Window, tuple[int, int]]:
    """What an operator takes of its source's window, and how much padding it meets before and after it."""
    low, high = program.local[node].reach[axis].window(windows[node])
    side, start = program.side(source, axis), windows[source][0]
    return (max(low, 0) - start, min(high, side) - start), (max(0, -low), max(0, high - side))


def _without_border(
    graph: fx.Graph,
    node: fx.Node,
    local: Local,
    args: dict[str, Any],
    pads: Sequence[tuple[int, int]],
    windows: tuple[Windows, Windows],
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Target and arguments of an operator whose input is its window and nothing more."""
    shape = [windows[axis][node][1] - windows[axis][node][0] for axis in (0, 1)]
    if local.kind in ("conv", "max_pool", "avg_pool"):
        name = "input" if "input" in args else "self"
        even = all(a == b for a, b in pads) and (
            local.kind == "conv" or all(2 * p[0] <= k for p, k in zip(pads, two(args["kernel_size"])))
        )
        if not even:
            fill = _FILL.get(local.kind, 0.0)
            args[name] = graph.call_function(F.pad, (args[name], [*pads[1], *pads[0]], "constant", fill))
        args["padding"] = [pads[0][0], pads[1][0]] if even else [0, 0]
        if "ceil_mode" in args:
            args["ceil_mode"] = False
        target = A.conv2d.default if local.kind == "conv" else node.target
        return target, tuple(args.values()), {}
    if local.kind == "pad":
        dims = value(node).dim()
        numbers = list(args["pad"]) + [0] * (2 * dims - len(args["pad"]))
        for dim, (before, after) in zip(local.axes, pads):
            numbers[2 * (dims - 1 - dim) : 2 * (dims - dim)] = before, after
        assert spatial_pads(numbers, dims, local.axes[0]) == tuple(pads[0])
        return F.pad, (args["self"], numbers, "constant", args["value"] or 0.0), {}
    if local.kind == "stride":
        return node.target, (args["self"], args["dim"], 0, 2**62, args["step"]), {}
    if local.kind == "view":
        return A.reshape.default, (args["self"], [*value(node).shape[:-2], *shape]), {}
    positional = {a.name for a in node.target._schema.arguments if not a.kwarg_only}  # type: ignore[union-attr]
    names = {k: v for k, v in args.items() if k not in positional and v is not None}
    return node.target, tuple(v for k, v in args.items() if k in positional), names
