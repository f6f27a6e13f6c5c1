"""What a model is fed, apart from everything that needs torch: deployed models are run without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class InputSpec:
    """What a model eats: `size` (C, H, W) in pixels, and the mean and standard deviation that normalise 0..1 values.

    The size of volumes is (C, D, H, W). `overlap`: the answer is a mask of each region, which may overlap (each output
    above 0), and not one class for every place (the largest output).
    """

    size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    task: str = "classify"
    overlap: bool = False

    def __post_init__(self) -> None:
        size, mean, std = (tuple(v) for v in (self.size, self.mean, self.std))
        if len(size) not in (3, 4) or not all(isinstance(v, int) and 1 <= v <= 2**16 for v in size):
            raise ValueError(f"size must be (C, H, W), or (C, D, H, W) for volumes, each 1 to 65536, got {size}")
        if len(mean) != size[0] or len(std) != size[0] or not all(s > 0 for s in std):
            raise ValueError(f"mean and std need {size[0]} numbers, std positive, got {mean} and {std}")
        for name, value in (("size", size), ("mean", mean), ("std", std)):
            object.__setattr__(self, name, value)

    def to_json(self) -> dict[str, Any]:
        plain = {"size": list(self.size), "mean": list(self.mean), "std": list(self.std), "task": self.task}
        return plain | ({"overlap": True} if self.overlap else {})

    @classmethod
    def from_json(cls, d: Mapping[str, Any]) -> InputSpec:
        return cls(
            tuple(d["size"]), tuple(map(float, d["mean"])), tuple(map(float, d["std"])), d.get("task", "classify"),
            bool(d.get("overlap", False)),
        )  # fmt: skip
