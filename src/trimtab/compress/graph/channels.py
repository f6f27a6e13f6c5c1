"""Units and groups of any model, what a choice of them costs, and the edits that cut them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from trimtab.compress.graph import patch
from trimtab.compress.graph.blocks import residual_blocks
from trimtab.compress.graph.count import Counter
from trimtab.compress.graph.labels import Labels, Solution
from trimtab.compress.graph.reference import narrowed_graph
from trimtab.compress.graph.trace import innermost, input_shapes, inside, module_of, trace
from trimtab.compress.graph.walk import Axis, Walk
from trimtab.core.edit import Edit, Narrow, apply

Keep = Mapping[int, Sequence[int]]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that touch the same parameter dimensions; importance is compared within a group.

    Attributes:
        size: number of units.
        members: (parameter or buffer, dimension) pairs that lose indices when a unit goes.
        producers: the parameters among them that make the channel: rows of weights, biases, norm scales.
        consumers: the parameters whose input dimension it is.
        width: indices that one unit takes in its widest producer: 1 for plain channels, head_dim for heads.
        norm_spans: a layer norm, softmax or mean looks across these units, so a model with a unit's parameters at zero
            is not exactly the model without the unit.
        zero_invariant: a unit whose producers are zero adds nothing anywhere, so it can go without a trace (the
            zero-invariant groups of OTO).
        units: numbers of the units in the graph.
    """

    id: int
    size: int
    members: tuple[tuple[str, int], ...]
    producers: tuple[tuple[str, int], ...]
    consumers: tuple[tuple[str, int], ...]
    width: int
    norm_spans: bool
    zero_invariant: bool
    units: NDArray[np.int64] = field(repr=False)


class ChannelGraph:
    """Finds the groups of coupled channels of `model` and cuts them. Nothing needs to be configured.

    Args:
        model: any module that `torch.export` can follow. It is never changed.
        example: an input (B, C, H, W), a tuple of inputs, or a dict of keyword inputs.

    Raises:
        SurgeryError: when the model cannot be traced.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = model
        self.args, self.kwargs = input_shapes(example)
        self._trace = trace(model, self.args, self.kwargs)
        self._walk = Walk(self._trace).run(model)
        self._also_frozen = np.empty(0, np.int64)
        self._links: list[list[int]] = []  # one label of each group that is linked
        self._solve()

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def unknown_ops(self) -> dict[str, int]:
        """Operators without a rule, and how often they occur; what enters them is never cut."""
        return dict(self._walk.unknown_ops)

    @property
    def frozen(self) -> list[tuple[str, int]]:
        """Parameter dimensions in which nothing can be cut."""
        return [(a.tensor, a.dim) for a in self._walk.axes if a.parameter and not (self.unit_of[a.labels] >= 0).any()]

    def positions(self, group: int | Group) -> dict[tuple[str, int], NDArray[np.int64]]:
        """For each member of a group, which unit of the group each index belongs to; -1 for other indices."""
        g = self.groups[group] if isinstance(group, int) else group
        local = np.full(self.units + 1, -1)
        local[g.units] = np.arange(g.size)
        axes = {(a.tensor, a.dim): a for a in self._walk.axes}
        return {m: local[self.unit_of[axes[m].labels]] for m in g.members}

    def mask(self, keep: Keep | Mask | None) -> Mask:
        """Which units stay, as one boolean per unit; groups that `keep` does not name stay whole.

        Raises:
            ValueError: when a group or unit does not exist, or a group would lose all of its units.
        """
        if keep is None:
            return np.ones(self.units, bool)
        if isinstance(keep, np.ndarray):
            if keep.shape != (self.units,) or keep.dtype != bool:
                raise ValueError(f"keep must be {self.units} booleans, got {keep.dtype} {keep.shape}")
            mask = keep
        else:
            mask = np.ones(self.units, bool)
            for number, chosen in keep.items():
                if number not in range(len(self.groups)):
                    raise ValueError(f"group must be in [0, {len(self.groups)}), got {number}")
                g, stay = self.groups[number], np.asarray(list(chosen), np.int64)
                if ((stay < 0) | (stay >= g.size)).any():
                    raise ValueError(f"units of group {number} must be in [0, {g.size}), got {stay.tolist()}")
                mask[g.units] = False
                mask[g.units[stay]] = True
        for g in self.groups:
            if not mask[g.units].any():
                raise ValueError(f"at least one unit of group {g.id} ({g.members[0][0]}) must be kept")
        return mask

    # -- what a choice costs -------------------------------------------------------------------------------------------

    def macs(self, keep: Keep | Mask | None, *, without: Sequence[str] = ()) -> int:
        """Multiply-accumulates for one sample with only `keep`, in closed form; none of the modules `without`."""
        mask = self.mask(keep)
        if not without:
            return self._counter.macs(mask) // self._walk.batch
        runs = [not any(inside(m, without) for m in module_of(node)) for node, _ in self._walk.products]
        return int(self._counter.each_macs(mask)[runs].sum()) // self._walk.batch

    def params(self, keep: Keep | Mask | None, *, without: Sequence[str] = ()) -> int:
        """Number of parameters with only `keep`, and none of the modules `without`."""
        mask = self.mask(keep)
        if not without:
            return self._counter.params(mask) + self._other_params
        sizes = self._counter.each_params(mask)
        return sum(sizes.get(n, p.numel()) for n, p in self.model.named_parameters() if not inside(n, without))

    def blocks(self) -> list[str]:
        """Names of the residual blocks: modules that can be left out, for what they add to their input is not needed.

        Of blocks inside blocks, the innermost.
        """
        return residual_blocks(self._trace, [n for n, _ in self.model.named_parameters()])

    # -- importance ----------------------------------------------------------------------------------------------------

    def reduce(self, values: Mapping[str, Tensor], *, members: str = "all") -> list[Tensor]:
        """Sum per-entry values (squared weights, weight times gradient) over everything that goes with each unit.

        Args:
            values: by parameter name, tensors shaped like the parameter; missing ones count nothing.
            members: "all", "producers" or "consumers".

        Returns:
            One tensor (size,) for each group.
        """
        total = np.zeros(self.units + 1)
        for axis, role in zip(self._walk.axes, self._roles, strict=True):
            value = values.get(axis.tensor)
            if value is None or members not in ("all", role):
                continue
            others = [d for d in range(value.dim()) if d != axis.dim]
            along = value.detach().double().sum(others) if others else value.detach().double()
            total += np.bincount(self.unit_of[axis.labels] % (self.units + 1), along.cpu().numpy(), self.units + 1)
        return [torch.from_numpy(total[g.units]) for g in self.groups]

    def norms(self, *, p: int = 2, members: str = "all") -> list[Tensor]:
        """L1 or L2 norm of all parameters that go with each unit, one tensor (size,) for each group."""
        if p not in (1, 2):
            raise ValueError(f"norm must be 1 or 2, got {p}")
        values = {name: w.detach().abs() ** p for name, w in self.model.named_parameters()}
        return [s ** (1 / p) for s in self.reduce(values, members=members)]

    # -- cutting -------------------------------------------------------------------------------------------------------

    def narrow(self, keep: Keep | Mask | None) -> list[Edit]:
        """The tensor part of a cut."""
        mask = np.append(self.mask(keep), True)
        edits: list[Edit] = []
        for a in self._walk.axes:
            stays = mask[self.unit_of[a.labels]]
            if not stays.all():
                edits.append(Narrow(a.tensor, a.dim, tuple(np.flatnonzero(stays).tolist())))
        return edits

    def edits(self, keep: Keep | Mask | None, *, seed: int = 0) -> list[Edit]:
        """The edits that leave only `keep` of each group, verified.

        The narrowed module must compute, on random input and random weights, what the narrowed graph computes.

        Raises:
            Refused: (a SurgeryError) when the class cannot follow; names the module. The model is untouched.
        """
        mask = self.mask(keep)
        narrow = self.narrow(mask)
        return [*narrow, *patch.attributes(self, mask, narrow, seed=seed)] if narrow else []

    def reference(self, keep: Keep | Mask | None, *, model: nn.Module | None = None) -> fx.GraphModule:
        """The narrowed graph itself as a module: no Python of the model is involved, so it is always right.

        Its parameters have the model's names. It takes batches of the example's size (at least 2).
        """
        mask = self.mask(keep)
        narrowed = apply(copy.deepcopy(self.model if model is None else model), self.narrow(mask))
        every = (narrowed.named_parameters, narrowed.named_buffers)
        tensors = {name: t for named in every for name, t in named(remove_duplicate=False)}
        return narrowed_graph(self._trace, self._walk.follows, tensors, lambda labels: self.kept(labels, mask))

    def masked(self, keep: Keep | Mask | None) -> nn.Module:
        """A copy of the model in which the parameters of all other units are zero."""
        mask = np.append(self.mask(keep), True)
        model = copy.deepcopy(self.model)
        tensors = dict(model.named_parameters())
        with torch.no_grad():
            for a in self._walk.axes:
                gone = np.flatnonzero(~mask[self.unit_of[a.labels]])
                if a.parameter and len(gone):
                    tensors[a.tensor].index_fill_(a.dim, torch.from_numpy(gone).to(tensors[a.tensor].device), 0.0)
        return model

    def permutation(self, orders: Mapping[int, Sequence[int]]) -> list[Edit]:
        """Edits that put unit `order[i]` of a group in place i; the model computes the same function.

        Raises:
            ValueError: when an order is not a permutation, or the units of a group differ in shape.
        """
        source = np.arange(self.units + 1)
        for number, order in orders.items():
            g = self.groups[number]
            if sorted(order) != list(range(g.size)):
                raise ValueError(f"order of group {number} must be a permutation of {g.size} units")
            source[g.units] = g.units[list(order)]
        edits: list[Edit] = []
        for a in self._walk.axes:
            unit = self.unit_of[a.labels]
            if (source[unit] == unit % (self.units + 1)).all():
                continue
            keep = np.arange(len(unit))
            for u in np.unique(unit[unit >= 0]):
                here, there = np.flatnonzero(unit == u), np.flatnonzero(unit == source[u])
                if len(here) != len(there):
                    raise ValueError(f"units {u} and {source[u]} differ in {a.tensor} and cannot change places")
                keep[here] = there
            edits.append(Narrow(a.tensor, a.dim, tuple(keep.tolist())))
        return edits

    def freeze(self, units: Iterable[int] | NDArray[np.int64]) -> None:
        """Never cut these units (numbers as in `Group.units`); groups are numbered anew."""
        gone = np.isin(self.unit_of, np.asarray(list(units), np.int64))
        self._also_frozen = np.union1d(self._also_frozen, np.flatnonzero(gone))
        self._solve()

    def link(self, groups: Iterable[int]) -> None:
        """Keep the same share of these groups: code such as `head_dim = channels // num_heads` needs it."""
        self._links.append([int(np.flatnonzero(self.unit_of == self.groups[g].units[0])[0]) for g in groups])

    def linked(self) -> list[list[int]]:
        """Every group, as a set with those of which the same share must be kept; a link to a frozen group freezes."""
        group_of = np.full(self.units + 1, -1)
        for g in self.groups:
            group_of[g.units] = g.id
        sets = [{g.id} for g in self.groups]
        for link in self._links:
            members = {int(group_of[self.unit_of[label]]) for label in link}
            joined = [s for s in sets if s & members]
            sets = [s for s in sets if not s & members] + [set().union(members, *joined)]
        return [sorted(s) for s in sorted(sets, key=lambda s: max(s)) if -1 not in s]

    def meeting(self, module: str) -> list[int]:
        """Groups that meet in the code of a module: that enter or leave it, or set a constant of its own operators."""
        prefix = module + "." if module else ""
        own = [labels for f in self._walk.follows if innermost(f.node) == module for labels in f.arrays()]
        named = np.unique(self.unit_of[np.concatenate(own)]) if own else np.empty(0, np.int64)
        found = []
        for g in self.groups:
            inside = [name.startswith(prefix) for name, _ in g.members]
            if any(inside) and (not all(inside) or np.isin(g.units, named).any()):
                found.append(g.id)
        return found

    def kept(self, labels: Labels, mask: Mask) -> int:
        """How many of these labels stay."""
        unit = self.unit_of[labels]
        return int(((unit < 0) | np.append(mask, True)[unit]).sum())

    # ------------------------------------------------------------------------------------------------------------------

    def _solve(self) -> None:
        solution = self._walk.ledger.solve(self._also_frozen)
        axes, ledger = self._walk.axes, self._walk.ledger
        consumed = np.zeros(ledger.count, bool)
        consumed[ledger.marked("consumed")] = True
        self._roles = [
            "buffer" if not a.parameter else "consumers" if consumed[a.labels[0]] else "producers" for a in axes
        ]
        self.unit_of, self.units = _units(
            solution, [a for a, r in zip(axes, self._roles, strict=True) if r == "producers"]
        )
        self.groups = self._group()
        self._counter = Counter(self._walk, self.unit_of)
        total = sum(p.numel() for p in self.model.parameters())
        self._other_params = total - self._counter.params(np.ones(self.units, bool))  # no dimension, or not run

    def _group(self) -> list[Group]:
        """Group units by the axes they touch; groups of one unit cannot be cut and are dropped."""
        axes = self._walk.axes
        touched = [np.unique(u[u >= 0]) for u in (self.unit_of[a.labels] for a in axes)]
        where = np.concatenate([np.full(len(t), i) for i, t in enumerate(touched)] or [np.empty(0, np.int64)])
        unit = np.concatenate([*touched, np.empty(0, np.int64)]).astype(np.int64)
        # A unit's key: the sum of one random 64-bit number for each axis it touches.
        numbers = np.random.default_rng(0).integers(1, 2**63, max(len(axes), 1), dtype=np.uint64)
        key = np.zeros(self.units, np.uint64)
        np.add.at(key, unit, numbers[where.astype(np.int64)] if len(where) else np.empty(0, np.uint64))
        first = np.full(self.units, len(axes))
        np.minimum.at(first, unit, where.astype(np.int64))
        _, group_of, sizes = np.unique(key, return_inverse=True, return_counts=True)
        if (sizes == 1).any():
            alone = np.flatnonzero(sizes[group_of] == 1)
            renumber = np.full(self.units + 1, -1)
            stay = np.setdiff1d(np.arange(self.units), alone)
            renumber[stay] = np.arange(len(stay))
            self.unit_of, self.units = renumber[self.unit_of], len(stay)
            return self._group()
        ledger = self._walk.ledger
        spans = self._has_mark(ledger.marked("spans"))
        leaks = self._has_mark(ledger.marked("leaks"))
        roles = self._roles
        order: dict[int, list[int]] = {}
        for u in np.lexsort((np.arange(self.units), first)):
            order.setdefault(int(group_of[u]), []).append(int(u))
        groups = []
        for number, units in enumerate(order.values()):
            mine = np.sort(np.array(units))
            at = [i for i, t in enumerate(touched) if len(t) and _in(mine[0], t)]
            made = [i for i in at if roles[i] == "producers"]
            width = max((int((self.unit_of[axes[i].labels] == mine[0]).sum()) for i in made or at), default=1)
            names = {r: tuple((axes[i].tensor, axes[i].dim) for i in at if roles[i] == r) for r in set(roles)}
            across = bool(spans[mine].any())
            groups.append(
                Group(
                    id=number,
                    size=len(mine),
                    members=tuple((axes[i].tensor, axes[i].dim) for i in at),
                    producers=names.get("producers", ()),
                    consumers=names.get("consumers", ()),
                    width=width,
                    norm_spans=across,
                    zero_invariant=not across and not bool(leaks[mine].any()),
                    units=mine,
                )
            )
        return groups

    def _has_mark(self, labels: Labels) -> Mask:
        marked = np.zeros(self.units + 1, bool)
        marked[self.unit_of[labels]] = True
        return marked[:-1] if self.units else marked[:0]


def _in(x: np.int64, sorted_values: NDArray[np.int64]) -> bool:
    i = int(np.searchsorted(sorted_values, x))
    return i < len(sorted_values) and sorted_values[i] == x


def _units(solution: Solution, producers: Sequence[Axis]) -> tuple[Labels, int]:
    """Number the components that may be cut and that some parameter makes; -1 for every other label."""
    component, frozen = solution.component, solution.frozen
    cuttable = np.zeros(len(frozen), bool)
    for a in producers:
        cuttable[component[a.labels]] = True
    cuttable &= ~frozen
    number = np.full(len(frozen), -1)
    number[cuttable] = np.arange(int(cuttable.sum()))
    return number[component], int(cuttable.sum())
