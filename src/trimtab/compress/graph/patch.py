"""Making the user's own class follow a cut: which of its integers must change.

Every node of the traced graph knows the modules whose forward was running when it was made. Where a constant of a node
changed from a to b, the integer attributes of these modules that equal a are candidates. The narrowed module is run
beside the narrowed graph on random input, with random weights (so that no branch hides behind a zero); where they part,
other candidates are tried, nearest module first. What cannot be made equal is refused.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trimtab.compress.graph.reference import constants
from trimtab.compress.graph.trace import innermost, module_of
from trimtab.compress.graph.verify import Expected, Outcome, run_beside, scrambled
from trimtab.compress.graph.walk import Follow
from trimtab.core.edit import Edit, SetAttr, apply
from trimtab.core.errors import SurgeryError

if TYPE_CHECKING:
    from trimtab.compress.graph.channels import ChannelGraph

Name = tuple[str, str]  # module, attribute
MAX_TRIALS = 24


class Refused(SurgeryError):
    """The module's class cannot follow a cut.

    Attributes:
        module: name of the module that cannot.
        units: units of the graph that take part there; the cut may succeed without them (`ChannelGraph.freeze`).
    """

    def __init__(self, message: str, module: str, units: NDArray[np.int64]) -> None:
        super().__init__(message)
        self.module, self.units = module, units


def attributes(graph: ChannelGraph, mask: NDArray[np.bool_], narrow: Sequence[Edit], *, seed: int) -> list[SetAttr]:
    """The attribute edits that make the narrowed module compute what the narrowed graph computes.

    Raises:
        Refused: when no candidates do.
    """
    changes = _changes(graph, mask)
    model = scrambled(graph.model, seed)
    expected = Expected.of(graph, mask, model, seed)
    if not all(bool(torch.isfinite(t).all()) for t in expected.outputs):  # random weights do not suit it
        model = copy.deepcopy(graph.model)
        expected = Expected.of(graph, mask, model, seed)
    apply(model, narrow)
    search = _Search(graph, mask, model, expected, changes)
    return search.run()


# ---------------------------------------------------------------------------------------------------------------------
# what changed


@dataclass
class _Change:
    """Of one module: constants that changed from a to b in its own code, and how often each did."""

    pairs: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    lists: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)
    follows: list[Follow] = field(default_factory=list)

    def add(self, old: Any, new: Any) -> None:
        if isinstance(old, list | tuple):
            for a, b in zip(old, new, strict=True):
                self.add(a, b)
            if list(old) != list(new):
                self.lists[tuple(old)] = tuple(new)
        elif isinstance(old, int) and not isinstance(old, bool):
            self.pairs[old][new] += 1

    def options(self, value: Any) -> list[Any]:
        """What an attribute with this value may become; most likely first; empty when it has no reason to change."""
        if isinstance(value, bool) or value is None:
            return []
        if isinstance(value, int):
            found = self.pairs.get(value, {})
            return [b for b in sorted(found, key=lambda b: -found[b]) if b != value and b > 0]
        if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
            if tuple(value) in self.lists:
                return [self.lists[tuple(value)]]
            each = [self.options(v) for v in value]
            if any(each):
                return [tuple(o[0] if o else v for o, v in zip(each, value, strict=True))]
        return []


def _changes(graph: ChannelGraph, mask: NDArray[np.bool_]) -> dict[str, _Change]:
    """Constants of nodes by the innermost module that was running, before and after."""
    full = np.ones_like(mask)
    changes: dict[str, _Change] = defaultdict(_Change)
    before = constants(graph._walk.follows, lambda labels: graph.kept(labels, full))
    after = constants(graph._walk.follows, lambda labels: graph.kept(labels, mask))
    for (follow, old), (_, new) in zip(before, after, strict=True):
        change = changes[innermost(follow.node)]
        if isinstance(follow.argument, int) and follow.target is not None:  # split by one size
            change.add(old[0], new[0])
        change.add(old, new)
        if old != new:
            change.follows.append(follow)
    return changes


def _standard(module: nn.Module, change: _Change | None) -> dict[str, Any]:
    """What the integers of torch's own layers say, read off their narrowed tensors."""
    w = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd) and w is not None:
        groups = module.groups
        if change is not None and (new := change.options(groups)):
            groups = new[0]
        a, b = (1, 0) if module.transposed else (0, 1)
        sizes = {"out_channels": w.shape[0], "in_channels": w.shape[1]}
        sizes = {"out_channels": w.shape[a] * (groups if a else 1), "in_channels": w.shape[b] * (groups if b else 1)}
        return {**sizes, "groups": groups}
    if isinstance(module, nn.Linear):
        return {"out_features": w.shape[0], "in_features": w.shape[1]} if isinstance(w, Tensor) else {}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        p = module.running_mean if w is None else w
        return {} if p is None else {"num_features": p.shape[0]}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and isinstance(w, Tensor):
        return {"normalized_shape": tuple(w.shape)}
    if isinstance(module, nn.GroupNorm):
        groups = module.num_groups
        if change is not None and (new := change.options(groups)):
            groups = new[0]
        return {"num_groups": groups, **({"num_channels": w.shape[0]} if isinstance(w, Tensor) else {})}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": w.shape[0], "embedding_dim": w.shape[1]} if isinstance(w, Tensor) else {}
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# the search


class _Search:
    def __init__(
        self, graph: ChannelGraph, mask: NDArray[np.bool_], model: nn.Module, expected: Expected,
        changes: Mapping[str, _Change],
    ) -> None:  # fmt: skip
        self.graph, self.mask, self.model, self.expected, self.changes = graph, mask, model, expected, changes
        self.modules = dict(model.named_modules())
        self.ran = {name for node in graph._trace.graph.nodes for name in module_of(node)}
        calls = [n for n in graph._trace.graph.nodes if n.op == "call_function"]
        self.position = {n: i for i, n in enumerate(calls, 1)}
        self.original: dict[Name, Any] = {}
        self.chosen: dict[Name, Any] = {}

    def run(self) -> list[SetAttr]:
        self._first_guess()
        outcome = self._try()
        while not outcome.ok:
            better = self._improve(outcome)
            if better is None:
                raise self._refusal(outcome)
            outcome = better
        self._cosmetic()
        return [
            SetAttr(module, name, tuple(value) if isinstance(value, list) else value)
            for (module, name), value in self.chosen.items()
            if value != self.original[module, name]
        ]

    def _set(self, name: Name, value: Any) -> None:
        module = self.modules[name[0]]
        self.original.setdefault(name, getattr(module, name[1]))
        if isinstance(self.original[name], list) and isinstance(value, tuple):
            value = list(value)
        self.chosen[name] = value
        setattr(module, name[1], value)

    def _first_guess(self) -> None:
        for path, module in self.modules.items():
            change = self.changes.get(path)
            standard = _standard(module, change)
            for name, value in standard.items():
                if getattr(module, name) != value:
                    self._set((path, name), value)
            if change is not None and change.follows:
                for owner in (path, *self._silent(path)):
                    for name, value in _integers(self.modules[owner]):
                        if (owner != path or name not in standard) and (options := change.options(value)):
                            self._set((owner, name), options[0])

    def _silent(self, path: str) -> list[str]:
        """Modules below `path` that never ran themselves: their parent calls other methods of theirs."""
        prefix = path + "." if path else ""
        return [n for n in self.modules if n.startswith(prefix) and n != path and n not in self.ran]

    def _improve(self, at: Outcome) -> Outcome | None:
        """Other values for attributes of the modules that were running where it went wrong, nearest first."""
        trials = 0
        for path in self._suspects(at):
            for names, values in self._alternatives(path):
                before = {n: getattr(self.modules[n[0]], n[1]) for n in names}
                for n, v in zip(names, values, strict=True):
                    self._set(n, v)
                outcome = self._try()
                if outcome.ok:
                    return outcome
                if outcome.progress > at.progress:
                    return self._learn(path, names, before, outcome)
                for n, v in before.items():
                    self._set(n, v)
                trials += 1
                if trials >= MAX_TRIALS:
                    return None
        return None

    def _between(self, at: Outcome) -> list[Follow]:
        """Constants that changed between the last leaf call that agreed and the next, which did not."""
        calls = self.expected.order
        start = calls[at.progress - 1][0] if 0 < at.progress <= len(calls) else 0
        end, leaf = calls[at.progress] if at.progress < len(calls) else (len(self.position), "")
        changed = {f for c in self.changes.values() for f in c.follows}
        return [
            f
            for f in self.graph._walk.follows
            if f in changed and start < self.position[f.node] <= end and innermost(f.node) != leaf
        ]

    def _suspects(self, at: Outcome) -> list[str]:
        """Modules to change, the likeliest first: those whose constants changed just there, then those running."""
        near = [innermost(f.node) for f in reversed(self._between(at))]
        return list(dict.fromkeys([*near, *reversed(at.stack)]))

    def _learn(self, path: str, names: Sequence[Name], before: Mapping[Name, Any], outcome: Outcome) -> Outcome:
        """What helped one module is done to the others of its class that come later, unless that does harm."""
        saved = dict(self.chosen)
        source = self.modules[path]
        todo = []
        for module, name in names:
            if module != path:
                continue
            old, new = before[module, name], getattr(source, name)
            if old == new:
                continue
            todo.append((name, new == self.original[module, name]))
        later = list(self.modules)[list(self.modules).index(path) + 1 :]
        for other in later:
            if type(self.modules[other]) is not type(source):
                continue
            for name, back in todo:
                value = getattr(self.modules[other], name, None)
                if back and (other, name) in self.original:
                    self._set((other, name), self.original[other, name])
                elif not back and (options := self._options(other, self.original.get((other, name), value))):
                    self._set((other, name), options[0])
        again = self._try()
        if again.ok or again.progress >= outcome.progress:
            return again
        for name_ in list(self.chosen):
            self._set(name_, saved.get(name_, self.original[name_]))
        return outcome

    def _alternatives(self, path: str) -> Iterator[tuple[list[Name], list[Any]]]:
        """Assignments that differ from the present one in few attributes of `path`."""
        names: list[Name] = []
        choices: list[list[Any]] = []
        for owner in (path, *self._silent(path)[:8]):
            for name, value in _integers(self.modules[owner]):
                original = self.original.get((owner, name), value)
                options = [original, *self._options(path, original)]
                if len(options) > 1:
                    names.append((owner, name))
                    choices.append(options)
        present = [getattr(self.modules[owner], name) for owner, name in names]
        for count in range(1, min(len(names), 3) + 1):
            for picked in itertools.combinations(range(len(names)), count):
                others = [[o for o in choices[i] if not _same(o, present[i])] for i in picked]
                for values in itertools.product(*others):
                    yield [names[i] for i in picked], list(values)

    def _options(self, path: str, value: Any) -> list[Any]:
        """What an attribute of a module may become, judged by everything that changed in it or below it."""
        merged = _Change()
        prefix = path + "." if path else ""
        for other, change in self.changes.items():
            if other == path or other.startswith(prefix):
                for a, counts in change.pairs.items():
                    for b, n in counts.items():
                        merged.pairs[a][b] += n
                merged.lists.update(change.lists)
        found: list[Any] = [self._sizes_option(path, value), *merged.options(value), *self._shape_options(path, value)]
        if isinstance(value, int) and not isinstance(value, bool):  # what is divided before it is used
            multiples = [(a, b) for a, new in merged.pairs.items() if a > 1 and value % a == 0 for b in new if a != b]
            found += [value // a * b for a, b in multiples]
        return [o for i, o in enumerate(found) if o is not None and o not in found[:i]]

    def _sizes_option(self, path: str, value: Any) -> tuple[int, ...] | None:
        """A list that holds the sizes of consecutive weights below `path`, such as the parts of a split."""
        if not isinstance(value, list | tuple) or len(value) < 2:
            return None
        prefix = path + "." if path else ""
        for d in (0, 1):
            axes = [a for a in self.graph._walk.axes
                    if a.dim == d and a.tensor.startswith(prefix) and a.tensor.endswith("weight")]  # fmt: skip
            for i in range(len(axes) - len(value) + 1):
                if [len(a.labels) for a in axes[i : i + len(value)]] == list(value):
                    new = tuple(self.graph.kept(a.labels, self.mask) for a in axes[i : i + len(value)])
                    if new != tuple(value):
                        return new
        return None

    def _shape_options(self, path: str, value: Any) -> list[int]:
        """What became of parameter sizes below `path` that were this value; at most three."""
        if isinstance(value, bool) or not isinstance(value, int):
            return []
        prefix = path + "." if path else ""
        axes = (a for a in self.graph._walk.axes if len(a.labels) == value and a.tensor.startswith(prefix))
        sizes = dict.fromkeys(self.graph.kept(a.labels, self.mask) for a in axes)
        return [n for n in sizes if n != value][:3]

    def _try(self) -> Outcome:
        return run_beside(self.model, self.expected)

    def _cosmetic(self) -> None:
        """The width that the model announces (timm's num_features), so that a new classifier fits."""
        for name in ("num_features", "embed_dim", "head_hidden_size", "hidden_size"):
            value = vars(self.model).get(name)
            if ("", name) in self.chosen or isinstance(value, bool) or not isinstance(value, int):
                continue
            for m in reversed(list(self.model.children())):
                linear = next((x for x in reversed(list(m.modules())) if isinstance(x, nn.Linear | nn.Conv2d)), None)
                if linear is not None:
                    axis = next((a for a in self.graph._walk.axes
                                 if a.dim == 1 and a.tensor == self._name_of(linear) + ".weight"), None)  # fmt: skip
                    if axis is not None and len(axis.labels) == value:
                        self._set(("", name), self.graph.kept(axis.labels, self.mask))
                        if not self._try().ok:
                            self._set(("", name), value)
                    break

    def _name_of(self, module: nn.Module) -> str:
        return next(n for n, m in self.modules.items() if m is module)

    def _refusal(self, at: Outcome) -> Refused:
        """Names the nearest module with its own part in the cut, and the units that take part there."""
        path, units = "", np.empty(0, np.int64)
        for follow in reversed(self._between(at)):
            path, units = innermost(follow.node), self._units(follow.arrays())
            if len(units):
                break
        for running in () if len(units) else reversed(at.stack):
            path, prefix = running, running + "." if running else ""
            units = self._units([a.labels for a in self.graph._walk.axes if a.tensor.startswith(prefix)])
            if len(units) and (any(self.modules[path].children()) or path == ""):
                break
        what = type(self.modules[path]).__name__
        return Refused(
            f"{path or 'the model'} ({what}) cannot follow the cut: no integer attribute makes it agree with the "
            f"narrowed graph ({at.reason}). Keep the channels that meet there, or use ChannelGraph.reference(keep).",
            path, np.asarray(units, np.int64),
        )  # fmt: skip

    def _units(self, arrays: Sequence[Any]) -> NDArray[np.int64]:
        if not arrays:
            return np.empty(0, np.int64)
        unit = np.unique(self.graph.unit_of[np.concatenate(arrays)])
        unit = unit[unit >= 0]
        gone = {g.id for g in self.graph.groups if not self.mask[g.units].all()}
        alive = [g.units for g in self.graph.groups if g.id in gone and np.isin(g.units, unit).any()]
        return np.concatenate(alive) if alive else np.empty(0, np.int64)


def _integers(module: nn.Module) -> list[tuple[str, Any]]:
    """Plain attributes that hold an integer or a sequence of integers."""
    found = []
    for name, value in vars(module).items():
        if name.startswith("__") or name == "training" or isinstance(value, bool):
            continue
        if isinstance(value, int) or (
            isinstance(value, list | tuple) and value and all(type(v) is int for v in value) and len(value) < 64
        ):
            found.append((name, value))
    return found


def _same(a: Any, b: Any) -> bool:
    return (tuple(a) if isinstance(a, list) else a) == (tuple(b) if isinstance(b, list) else b)
