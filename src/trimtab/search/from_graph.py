"""Children of any network: the channel graph says what can be narrowed, its residual blocks what can be left out."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from trimtab.compress.graph import ChannelGraph, Refused
from trimtab.compress.graph.links import link_refused
from trimtab.compress.graph.trace import inside
from trimtab.core.edit import Edit, Narrow, Remove, SetAttr, apply, meta_copy
from trimtab.core.errors import SurgeryError
from trimtab.search.children import Child, Part
from trimtab.search.resolution import RESOLUTION
from trimtab.search.space import Arch, Gene, Space

_Sizes = Mapping[tuple[str, int], int]  # (tensor, dimension) -> length
Shares = Sequence[float] | Mapping[str, Sequence[float]]
WORDS = ("width", "depth", "resolution")
_REFUSALS = 200
# Attributes of torch's layers that only say what their tensors are; no forward reads them.
_SAID = ("in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels",
         "num_embeddings", "embedding_dim")  # fmt: skip
_TOLD = (nn.modules.conv._ConvNd, nn.Linear, nn.GroupNorm, nn.Embedding, _NormBase)


class FromGraph:
    """A supernet whose parent is a copy of `model`.

    Genes: `width.<layer>` is the share of channels kept of a set of groups that go together (the first ones; they are
    put in order of their norm when the supernet is made, which does not change the function); `depth.<container>` is
    how many of a container's residual blocks run (the first ones); `resolution` is the side of the images.

    Args:
        example: an input (B, C, H, W).
        words: "width": shares, ending with 1, or a mapping from patterns of layer names to shares; "depth": "blocks"
            for any number of each container's blocks, or shares of them, ending with 1; "resolution": sides in pixels.
            See `check_words`.
        order: "norm" or None: put the channels with the largest weights first.

    Raises:
        SurgeryError: when the network cannot be traced, or has nothing that could be left out.
    """

    def __init__(
        self, model: nn.Module, example: Any, words: Mapping[str, Any], *, order: str | None = "norm", seed: int = 0
    ) -> None:
        if order not in ("norm", None):
            raise ValueError(f"order must be 'norm' or None, got {order!r}")
        self.model = copy.deepcopy(model)
        self._graph = ChannelGraph(self.model, example)
        self._seed = seed
        self._frozen: list[np.ndarray] = []  # units, in the order in which they were frozen
        self._stages = _depth_stages(self._graph, words["depth"]) if "depth" in words else {}
        self._widths, witnesses = self._settle(words["width"]) if "width" in words else ({}, [])
        if order == "norm":
            self._sort()
        self._bare = meta_copy(self.model)  # what skeletons are copied from; without the history of edits
        self._bare.__dict__.pop("_trimtab", None)
        self._members = {name: self._blocks_of(name) for name in self._widths}
        genes = [Gene(name, tuple(w.steps)) for name, w in self._widths.items()]
        genes += [Gene(name, s.counts) for name, s in self._stages.items()]
        genes += [Gene(RESOLUTION, tuple(words[RESOLUTION]))] if RESOLUTION in words else []
        if not genes:
            raise SurgeryError(
                f"{type(model).__name__} has nothing that could be left out: no channels that may be cut, no "
                "residual blocks"
            )
        self.space = Space(genes, idle=self._idle)
        self._laws = self._find_laws(witnesses)
        self._at = {side: self._graph_at(side) for side in words.get(RESOLUTION, ())}

    # -- what there is to search ---------------------------------------------------------------------------------------

    def child(self, arch: Arch) -> Child:
        mask, gone = self._mask(arch), self._gone(arch)
        narrow = self._graph.narrow(mask)
        skeleton = copy.deepcopy(self._bare)
        for module, name, value in self._attributes(arch, mask, self._sizes(narrow)):
            owner = skeleton.get_submodule(module)
            setattr(owner, name, list(value) if isinstance(getattr(owner, name), list) else value)
        for block in gone:
            skeleton.set_submodule(block, nn.Identity())
        parts: dict[str, list[Part]] = {}
        for name, tensor in (*skeleton.named_parameters(), *skeleton.named_buffers()):
            parts[name] = list(tensor.shape)
        for e in narrow:
            if isinstance(e, Narrow) and e.tensor in parts:
                parts[e.tensor][e.dim] = _part(e.keep)
        return Child(skeleton, {name: tuple(p) for name, p in parts.items()})

    def cost(self, arch: Arch) -> dict[str, int]:
        mask, gone = self._mask(arch), self._gone(arch)
        graph = self._at[arch[RESOLUTION]] if RESOLUTION in arch else self._graph
        return {"params": graph.params(mask, without=gone), "macs": graph.macs(mask, without=gone)}

    def edits(self, arch: Arch) -> list[Edit]:
        """The edits that make the parent this child, verified by the channel graph."""
        gone = self._gone(arch)
        kept = []
        for e in self._graph.edits(self._mask(arch), seed=self._seed):
            where = e.tensor if isinstance(e, Narrow) else e.module if isinstance(e, SetAttr) else ""
            if not inside(where, gone):
                kept.append(e)
        return [*kept, *(Remove(block) for block in gone)]

    def extract(self, arch: Arch) -> nn.Module:
        return apply(copy.deepcopy(self.model), self.edits(arch)).eval()

    # -- what a choice means -------------------------------------------------------------------------------------------

    def _keep(self, arch: Arch) -> dict[int, range]:
        return _first(self._graph, self._widths, {name: w.steps[arch[name]] for name, w in self._widths.items()})

    def _mask(self, arch: Arch) -> np.ndarray:
        return self._graph.mask(self._keep(arch))

    def _gone(self, arch: Arch) -> list[str]:
        return [block for name, stage in self._stages.items() for block in stage.blocks[arch[name] :]]

    def _idle(self, arch: Arch) -> list[str]:
        """Widths of which nothing is left outside blocks that are left out."""
        gone = set(self._gone(arch))
        return [name for name, blocks in self._members.items() if blocks is not None and blocks <= gone]

    def _blocks_of(self, name: str) -> set[str] | None:
        """The blocks that all tensors of a width lie in, or None if some lie in none."""
        blocks = [block for stage in self._stages.values() for block in stage.blocks]
        found: set[str] = set()
        for group in self._widths[name].groups:
            for tensor, _ in self._graph.groups[group].members:
                block = next((b for b in blocks if inside(tensor, [b])), None)
                if block is None:
                    return None
                found.add(block)
        return found

    # -- making the graph ready ----------------------------------------------------------------------------------------

    def _settle(self, shares: Shares) -> tuple[dict[str, _Width], list[_Witness]]:
        """Widths that can be cut, and verified cuts as witnesses; what a class cannot cut is linked or kept whole."""
        graph = self._graph
        for _ in range(_REFUSALS):
            widths = _widths(graph, shares)
            try:
                return widths, [self._witness(widths, steps) for steps in self._trials(widths)]
            except Refused as refused:
                if not len(refused.units):
                    raise
                if not link_refused(graph, refused):
                    graph.freeze(refused.units)
                    self._frozen.append(refused.units)
        raise SurgeryError(f"{type(self.model).__name__} refuses every cut; leave width out of the space")

    def _trials(self, widths: Mapping[str, _Width]) -> list[dict[str, int]]:
        """Steps to keep of every width: the smallest, a random choice, and for each binary digit those widths narrowed
        whose number has it, so that what changes with a width changes with no other."""
        rng = np.random.default_rng(self._seed)
        numbers = {name: i for i, name in enumerate(widths, start=1)}
        trials = [{n: next(iter(w.steps.values())) for n, w in widths.items()}]
        trials.append({n: list(w.steps.values())[int(rng.integers(len(w.steps)))] for n, w in widths.items()})
        for bit in range(len(numbers).bit_length()):
            trials.append(
                {n: int(rng.integers(1, w.total)) if numbers[n] >> bit & 1 else w.total for n, w in widths.items()}
            )
        return trials

    def _witness(self, widths: Mapping[str, _Width], steps: Mapping[str, int]) -> _Witness:
        edits = self._graph.edits(_first(self._graph, widths, steps), seed=self._seed)
        kept = {n: steps[n] / w.total for n, w in widths.items()}
        return _Witness(kept, self._sizes(edits), {(e.module, e.name): e.value for e in self._read(edits)})

    def _graph_at(self, side: int) -> ChannelGraph:
        """The graph for images of another size: the same units, other costs."""
        (x,) = self._graph.args
        graph = ChannelGraph(self.model, x.new_zeros((*x.shape[:2], side, side)))
        for units in self._frozen:
            graph.freeze(units)
        if [g.members for g in graph.groups] != [g.members for g in self._graph.groups]:
            raise SurgeryError(f"at a resolution of {side} the network has other channels that go together")
        return graph

    def _sort(self) -> None:
        """Put the units with the largest norm first, where that leaves the function as it is."""
        norms = self._graph.norms()
        orders = {
            group: torch.argsort(norms[group], descending=True, stable=True).tolist()
            for width in self._widths.values()
            for group in width.groups
        }
        sorted_ = copy.deepcopy(self.model)
        try:
            apply(sorted_, self._graph.permutation(orders))
        except ValueError:  # units of different shapes
            return
        generator = torch.Generator().manual_seed(self._seed)
        inputs = [torch.randn(t.shape, generator=generator).to(t) for t in self._graph.args]
        before, after = (_outputs(m, inputs) for m in (self.model, sorted_))
        if torch.allclose(before, after, rtol=1e-3, atol=1e-4 * max(1.0, float(before.abs().max()))):
            self.model = self._graph.model = sorted_

    # -- the integers of a class ---------------------------------------------------------------------------------------

    def _attributes(self, arch: Arch, mask: np.ndarray, sizes: _Sizes) -> list[tuple[str, str, Any]]:
        if self._laws is None:
            return [(e.module, e.name, e.value) for e in self._read(self._graph.edits(mask, seed=self._seed))]
        kept = {name: w.steps[arch[name]] / w.total for name, w in self._widths.items()}
        return [(module, name, law.value(kept, sizes)) for (module, name), law in self._laws.items()]

    def _find_laws(self, witnesses: Sequence[_Witness]) -> dict[tuple[str, str], _Law] | None:
        """How the integers that a forward reads follow from the genes; None if they do so in no simple way."""
        laws = {}
        for module, name in dict.fromkeys(key for w in witnesses for key in w.integers):
            law = _law((module, name), getattr(self.model.get_submodule(module), name), witnesses, self._sizes([]))
            if law is None:
                return None
            laws[module, name] = law
        return laws

    def _sizes(self, edits: Sequence[Edit]) -> _Sizes:
        """The length of every dimension of every tensor after some edits."""
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        whole = {(name, dim): n for name, t in tensors for dim, n in enumerate(t.shape)}
        return whole | {(e.tensor, e.dim): len(e.keep) for e in edits if isinstance(e, Narrow)}

    def _read(self, edits: Sequence[Edit]) -> list[SetAttr]:
        """The edits that set an integer that a forward reads."""
        told = {n for n, m in self.model.named_modules() if isinstance(m, _TOLD)}
        return [e for e in edits if isinstance(e, SetAttr) and not (e.name in _SAID and e.module in told)]


@dataclass(frozen=True)
class _Width:
    """Linked groups that keep the same share, in steps: `steps` of `total` for each share that may be chosen."""

    groups: tuple[int, ...]
    total: int
    steps: dict[float, int]


@dataclass(frozen=True)
class _Stage:
    """The blocks of a container that may be left out, and how many of them may run."""

    blocks: tuple[str, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class _Witness:
    """A verified cut: the share kept of every width, the sizes of all tensors, and the integers that it set."""

    kept: Mapping[str, float]
    sizes: _Sizes
    integers: Mapping[tuple[str, str], Any]


@dataclass(frozen=True)
class _Law:
    """An integer, or a tuple of them: each constant (None), in proportion to a width, or the length of a dimension."""

    whole: Any
    follows: tuple[str | tuple[str, int] | None, ...]

    def value(self, kept: Mapping[str, float], sizes: _Sizes) -> Any:
        """Its value when so much of each width is kept and the tensors have these sizes."""
        new = tuple(
            v if f is None else round(v * kept[f]) if isinstance(f, str) else sizes[f]
            for v, f in zip(_each(self.whole), self.follows, strict=True)
        )
        return new if isinstance(self.whole, list | tuple) else new[0]


def _law(key: tuple[str, str], whole: Any, witnesses: Sequence[_Witness], sizes: _Sizes) -> _Law | None:
    """The simplest law that gives the values seen."""
    values = [_each(w.integers.get(key, whole)) for w in witnesses]
    follows: list[str | tuple[str, int] | None] = []
    for v, seen in zip(_each(whole), zip(*values, strict=True), strict=True):
        dimensions: list[Any] = [place for place, n in sizes.items() if n == v]
        laws = (_Law(v, (f,)) for f in [None, *witnesses[0].kept, *dimensions])
        fits = (law for law in laws if all(law.value(w.kept, w.sizes) == s for w, s in zip(witnesses, seen)))
        law = next(fits, None)
        if law is None:
            return None
        follows += law.follows
    return _Law(whole, tuple(follows))


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _first(graph: ChannelGraph, widths: Mapping[str, _Width], steps: Mapping[str, int]) -> dict[int, range]:
    """The first units of every group: as many steps as each width is to keep."""
    return {g: range(steps[n] * (graph.groups[g].size // w.total)) for n, w in widths.items() for g in w.groups}


def _widths(graph: ChannelGraph, shares: Shares) -> dict[str, _Width]:
    found: dict[str, _Width] = {}
    for members in graph.linked():
        first = graph.groups[min(members)]
        layer = first.members[0][0].rpartition(".")[0] or first.members[0][0]
        chosen: Sequence[float] = shares if not isinstance(shares, Mapping) else ()
        if isinstance(shares, Mapping):
            chosen = next((s for pattern, s in shares.items() if fnmatch.fnmatch(layer, pattern)), ())
        total = math.gcd(*(graph.groups[i].size for i in members))
        steps: dict[float, int] = {}
        for share in chosen:
            count = max(1, round(share * total))
            if count not in steps.values():
                steps[share] = count
            elif share == 1:  # the whole is always called 1
                steps = {s: n for s, n in steps.items() if n != count} | {share: count}
        if len(steps) > 1:
            name = f"width.{layer}"
            while name in found:
                name += "'"
            found[name] = _Width(tuple(members), total, steps)
    return found


def _depth_stages(graph: ChannelGraph, depth: Any) -> dict[str, _Stage]:
    containers: dict[str, list[str]] = {}
    for block in graph.blocks():
        containers.setdefault(block.rpartition(".")[0], []).append(block)
    found = {}
    for container, blocks in containers.items():
        children = graph.model.get_submodule(container).named_children()
        others = [n for n, m in children if next(m.parameters(), None) is not None]
        least = 0 if len(others) > len(blocks) else 1
        n = len(blocks)
        counts = range(least, n + 1) if depth == "blocks" else [max(least, round(share * n)) for share in depth]
        if len(set(counts)) > 1:
            name = f"depth.{container}" if container else "depth"
            found[name] = _Stage(tuple(blocks), tuple(sorted(set(counts))))
    return found


def check_words(words: Any) -> None:
    """Raises ValueError unless the space of a network is said in words that make sense."""
    if not isinstance(words, Mapping) or not words or set(words) - set(WORDS):
        said = sorted(map(str, words)) if isinstance(words, Mapping) else words
        raise ValueError(f"the space of a network must be of {', '.join(WORDS)}, got {said!r}")
    width = words.get("width", (1.0,))
    for shares in width.values() if isinstance(width, Mapping) else [width]:
        _check_shares("width", shares)
    if words.get("depth", "blocks") != "blocks":
        _check_shares("depth", words["depth"])
    _check_sides(words.get(RESOLUTION, (1,)))


def _check_sides(sides: Any) -> None:
    good = isinstance(sides, list | tuple) and sides and all(isinstance(s, int) and s > 0 for s in sides)
    if not good or list(sides) != sorted(set(sides)):
        raise ValueError(f"resolution must be rising numbers of pixels, got {sides!r}")


def _check_shares(word: str, shares: Any) -> None:
    good = isinstance(shares, list | tuple) and shares and all(isinstance(s, int | float) for s in shares)
    if not good or min(shares) <= 0 or list(shares) != sorted(set(shares)) or shares[-1] != 1:
        also = " or 'blocks'" if word == "depth" else ""
        raise ValueError(f"{word} must be rising shares that end with 1, such as (0.5, 0.75, 1){also}, got {shares!r}")


def _part(keep: Sequence[int]) -> Part:
    start, stop = keep[0], keep[-1] + 1
    if tuple(keep) != tuple(range(start, stop)):
        return torch.tensor(keep)
    return stop if start == 0 else slice(start, stop)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    model = copy.deepcopy(model).eval()
    return model(*inputs)
