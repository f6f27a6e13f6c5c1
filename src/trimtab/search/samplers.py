"""Which networks are trained in a step. Samplers draw from a private generator, never from the data's randomness.

Their state goes into the checkpoint of `tt.fit`: a resumed run trains the same networks. All processes of a
distributed run draw the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trimtab.search.space import Arch, Space


class Sampler:
    """Base of samplers: subclasses give `next`; draw from `self.rng` only."""

    def __init__(self, space: Space, *, seed: int = 0) -> None:
        self.space = space
        self.rng = np.random.default_rng(seed)

    def next(self, step: int) -> list[dict[str, Any]]:
        """The architectures of a step, in the order in which they are trained."""
        raise NotImplementedError(f"{type(self).__name__} must define next(step)")

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]


class Uniform(Sampler):
    """`n` random networks (SPOS, arXiv 1904.00420)."""

    def __init__(self, space: Space, n: int = 1, *, seed: int = 0) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        super().__init__(space, seed=seed)
        self.n = n

    def next(self, step: int) -> list[dict[str, Any]]:
        return [self.space.sample(self.rng) for _ in range(self.n)]


class Sandwich(Sampler):
    """The largest network, `n` random ones, the smallest (arXiv 1903.05134, Section 3.1).

    >>> space = Space({"width": (8, 16, 32)})
    >>> [a["width"] for a in Sandwich(space, n=0).next(0)]
    [32, 8]
    """

    def __init__(self, space: Space, n: int = 2, *, seed: int = 0) -> None:
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        super().__init__(space, seed=seed)
        self.n = n

    def next(self, step: int) -> list[dict[str, Any]]:
        return [self.space.max(), *(self.space.sample(self.rng) for _ in range(self.n)), self.space.min()]


class Chain(Sampler):
    """Always the same networks, in this order."""

    def __init__(self, space: Space, archs: Sequence[Arch]) -> None:
        super().__init__(space)
        self.archs = [space.check(a) for a in archs]
        if not self.archs:
            raise ValueError("a chain needs at least one architecture")

    def next(self, step: int) -> list[dict[str, Any]]:
        return [dict(a) for a in self.archs]


class Among(Sampler):
    """`n` networks drawn from a list.

    Args:
        p: how likely each of them is; None: all alike.
    """

    def __init__(
        self, space: Space, archs: Sequence[Arch], n: int = 1, *, p: Sequence[float] | None = None, seed: int = 0
    ) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        super().__init__(space, seed=seed)
        self.archs = [space.check(a) for a in archs]
        self.n, self.p = n, p
        if not self.archs or (p is not None and (len(p) != len(archs) or min(p) < 0 or abs(sum(p) - 1) > 1e-6)):
            raise ValueError(f"p must be probabilities of {len(archs)} networks (at least one), got {p}")

    def next(self, step: int) -> list[dict[str, Any]]:
        return [dict(self.archs[i]) for i in self.rng.choice(len(self.archs), self.n, p=self.p)]
