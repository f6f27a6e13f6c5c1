"""The space of networks: named choices, and what a search does with them.

An architecture is a mapping from each gene's name to one of its choices. Architectures that build the same network have
the same `key`: genes that a choice makes idle (those of a block that is left out) do not count.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.core.errors import TrimtabError

Arch = Mapping[str, Any]
Key = tuple[Any, ...]
_DRAWS = 10_000


class SpaceError(TrimtabError, ValueError):
    """A space without the networks that were asked of it."""


@dataclass(frozen=True)
class Gene:
    """One choice. The choices of an ordered gene go from the smallest network to the largest."""

    name: str
    choices: tuple[Any, ...]
    ordered: bool = True

    def __post_init__(self) -> None:
        choices = tuple(self.choices)
        if not choices or len(set(choices)) != len(choices):
            raise ValueError(f"choices of {self.name} must be distinct and at least one, got {choices}")
        if self.ordered and list(choices) != sorted(choices):
            raise ValueError(f"choices of {self.name} must go from small to large (or ordered=False), got {choices}")
        object.__setattr__(self, "choices", choices)

    def index(self, value: Any) -> int:
        """Where a value is among the choices.

        Raises:
            ValueError: it is not one of them.
        """
        try:
            return self.choices.index(value)
        except ValueError:
            raise ValueError(f"{self.name} must be one of {self.choices}, got {value!r}") from None


class Space:
    """All architectures of some genes.

    Args:
        genes: a mapping from name to choices (small to large), or genes.
        valid: says whether an architecture is one of the space; the largest and the smallest must be.
        idle: names the genes that do not matter in an architecture.

    >>> space = Space({"width": (8, 16), "depth": (1, 2, 3)})
    >>> space.size(), space.max(), space.scale(0.5)
    (6, {'width': 16, 'depth': 3}, {'width': 8, 'depth': 2})
    """

    def __init__(
        self,
        genes: Mapping[str, Sequence[Any]] | Sequence[Gene],
        *,
        valid: Callable[[Arch], bool] | None = None,
        idle: Callable[[Arch], Sequence[str]] | None = None,
    ) -> None:
        if isinstance(genes, Mapping):
            genes = [Gene(name, tuple(choices)) for name, choices in genes.items()]
        self.genes = tuple(genes)
        self._valid, self._idle = valid, idle
        names = [g.name for g in self.genes]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a space needs genes with distinct names, got {names}")
        for which in (self.min(), self.max()):
            if not self.valid(which):
                raise ValueError(f"the smallest and the largest network must be valid, got {which}")

    def __contains__(self, arch: object) -> bool:
        if not isinstance(arch, Mapping) or set(arch) != {g.name for g in self.genes}:
            return False
        return all(arch[g.name] in g.choices for g in self.genes) and self.valid(arch)

    # -- single architectures ------------------------------------------------------------------------------------------

    def min(self) -> dict[str, Any]:
        """The first choice of every gene."""
        return {g.name: g.choices[0] for g in self.genes}

    def max(self) -> dict[str, Any]:
        """The last choice of every gene."""
        return {g.name: g.choices[-1] for g in self.genes}

    def scale(self, fraction: float) -> dict[str, Any]:
        """The same place in every ordered gene: 0 is the smallest network, 1 the largest; others keep their last."""
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be in [0, 1], got {fraction}")
        return {g.name: self._at(g, fraction) for g in self.genes}

    def grid(self, levels: int | None = None, *, free: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Every different valid network whose genes of one kind are all at the same place.

        The kind of a gene is the first word of its name: all of `width.stem`, `width.stage` grow together.

        Args:
            levels: places of a kind, at most; by default as many as its richest gene has choices.
            free: kinds whose genes are each on their own.

        >>> list(Space({"width.a": (8, 16), "width.b": (8, 12, 16)}).grid())
        [{'width.a': 8, 'width.b': 8}, {'width.a': 8, 'width.b': 12}, {'width.a': 16, 'width.b': 16}]
        """
        kind_of = {}
        for g in self.genes:
            kind = g.name.partition(".")[0]
            kind_of[g.name] = g.name if kind in free else kind
        counts: dict[str, int] = {}
        for g in self.genes:
            kind = kind_of[g.name]
            counts[kind] = max(counts.get(kind, 1), len(g.choices))
        places = {kind: min(n, levels or n) for kind, n in counts.items()}
        seen = set()
        for chosen in itertools.product(*(range(n) for n in places.values())):
            shares = {kind: i / (n - 1) if n > 1 else 1.0 for i, (kind, n) in zip(chosen, places.items(), strict=True)}
            arch = {g.name: self._at(g, shares[kind_of[g.name]]) for g in self.genes}
            if self.key(arch) not in seen and self.valid(arch):
                seen.add(self.key(arch))
                yield self._canonical(arch)

    def check(self, arch: Arch) -> dict[str, Any]:
        """The architecture in canonical form: idle genes at their first choice.

        Raises:
            ValueError: it is not one of the space; says what is wrong.
        """
        names = {g.name for g in self.genes}
        if set(arch) != names:
            wrong = ", ".join(sorted(set(arch) ^ names)[:4])
            raise ValueError(f"an architecture must have the {len(names)} genes of its space, differs in {wrong}")
        for g in self.genes:
            g.index(arch[g.name])
        if not self.valid(arch):
            raise ValueError(f"not a valid architecture of this space: {dict(arch)}")
        return self._canonical(arch)

    def key(self, arch: Arch) -> Key:
        """Equal for architectures that are the same network."""
        canonical = self._canonical(arch)
        return tuple(canonical[g.name] for g in self.genes)

    def valid(self, arch: Arch) -> bool:
        return self._valid is None or bool(self._valid(arch))

    def encode(self, arch: Arch) -> np.ndarray:
        """Integers (genes,): the place of each value among its gene's choices."""
        return np.array([g.index(arch[g.name]) for g in self.genes], np.int64)

    def decode(self, places: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """The inverse of `encode`."""
        return {g.name: g.choices[int(i)] for g, i in zip(self.genes, places, strict=True)}

    # -- chance --------------------------------------------------------------------------------------------------------

    def sample(self, rng: np.random.Generator) -> dict[str, Any]:
        """A network, every choice of every gene being equally likely among the valid ones."""
        return self._draw(lambda: {g.name: g.choices[int(rng.integers(len(g.choices)))] for g in self.genes})

    def mutate(self, arch: Arch, p: float, rng: np.random.Generator) -> dict[str, Any]:
        """Each gene drawn anew with probability `p`."""

        def once() -> dict[str, Any]:
            return {
                g.name: g.choices[int(rng.integers(len(g.choices)))] if rng.random() < p else arch[g.name]
                for g in self.genes
            }

        return self._draw(once)

    def crossover(self, a: Arch, b: Arch, rng: np.random.Generator) -> dict[str, Any]:
        """Each gene from either parent."""
        return self._draw(lambda: {g.name: (a if rng.random() < 0.5 else b)[g.name] for g in self.genes})

    def _draw(self, once: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        for _ in range(_DRAWS):
            arch = once()
            if self.valid(arch):
                return arch
        raise SpaceError(f"no valid architecture in {_DRAWS} draws; give the space fewer rules")

    # -- all of them ---------------------------------------------------------------------------------------------------

    def neighbors(self, arch: Arch) -> Iterator[dict[str, Any]]:
        """Valid architectures that differ in one gene."""
        for g in self.genes:
            for choice in g.choices:
                other = {**arch, g.name: choice}
                if choice != arch[g.name] and self.valid(other):
                    yield other

    def size(self) -> int:
        """Number of combinations, the invalid ones and those that are the same network included."""
        return math.prod(len(g.choices) for g in self.genes)

    def enumerate(self) -> Iterator[dict[str, Any]]:
        """Every different valid network once, by rising places."""
        seen = set()
        for values in itertools.product(*(g.choices for g in self.genes)):
            arch = self._canonical(dict(zip((g.name for g in self.genes), values)))
            key = tuple(arch.values())
            if key not in seen and self.valid(arch):
                seen.add(key)
                yield arch

    def restrict(self, choices: Mapping[str, Sequence[Any]]) -> Space:
        """The sub-space in which these genes have fewer choices.

        >>> Space({"width": (8, 16), "depth": (1, 2, 3)}).restrict({"depth": (3,)}).size()
        2
        """
        unknown = set(choices) - {g.name for g in self.genes}
        if unknown:
            raise ValueError(f"the space has no gene {', '.join(sorted(unknown))}")
        genes = []
        for g in self.genes:
            kept = choices.get(g.name, g.choices)
            places = sorted(g.index(v) for v in kept)
            genes.append(Gene(g.name, tuple(g.choices[i] for i in places), g.ordered))
        return Space(genes, valid=self._valid, idle=self._idle)

    def _at(self, g: Gene, fraction: float) -> Any:
        return g.choices[math.floor(fraction * (len(g.choices) - 1) + 1e-9) if g.ordered else -1]

    def _canonical(self, arch: Arch) -> dict[str, Any]:
        idle = set(self._idle(arch)) if self._idle is not None else ()
        return {g.name: g.choices[0] if g.name in idle else arch[g.name] for g in self.genes}
