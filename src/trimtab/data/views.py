"""A picture and what belongs to it, changed together: transforms of torchvision, the same bits for the same seed.

A sample is a dict of torchvision's `tv_tensors` (image, mask, boxes) and labels. Its view depends on the seed, the
epoch and its row alone, so a resumed run, or another process, sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from trimtab.data.augment import read_words
from trimtab.data.images import VOID
from trimtab.data.loader import Batch, Loader

Sample = dict[str, Any]
Maker = Callable[[float | None, tuple[int, int], Any], list[Any]]


class Views:
    """Transforms of samples, one after the other.

    Args:
        steps: each takes a sample and gives one; their randomness is torch's global one.
    """

    def __init__(self, steps: Sequence[Callable[[Any], Any]], text: str = "") -> None:
        self.steps, self.text = list(steps), text

    def __call__(self, sample: Sample, seed: Sequence[int]) -> Sample:
        with seeded(seed):
            for step in self.steps:
                sample = step(sample)
        return sample

    def __repr__(self) -> str:
        return f"Views({self.text!r})"


class SampleLoader(Loader):
    """A `Loader` whose batches are made of samples; subclasses say what is in one, and how they are put together."""

    augment: Any  # the `Views`
    in_advance = False  # transforms draw from torch's global generator, which belongs to the thread that trains

    def batch(self, k: int) -> Batch:
        whole, mine = self.rows(k)
        rows = whole[mine]
        return {name: x.to(self.device) for name, x in {**self.made(rows), "index": rows}.items()}

    def made(self, rows: Tensor) -> Batch:
        """The batch of some rows, on the CPU, without "index"."""
        raise NotImplementedError

    def view(self, sample: Sample, row: int) -> Sample:
        return self.augment(sample, (self.seed, self.epoch, row))


def parse_views(augment: Any, words: Mapping[str, Maker], size: tuple[int, int], mean: Sequence[float]) -> Views:
    """From words joined by "+" (a number may follow "="), a transform of torchvision, any function of samples, or None.

    Args:
        words: what each word makes, of its number, the size of the pictures and what fills the outside.
        mean: colour of the data in 0..1 units, which fills the outside of a picture; masks are filled with `VOID`.
    """
    if isinstance(augment, Views):
        return augment
    if augment is None:
        return Views([])
    if isinstance(augment, str):
        text = [w.strip() for w in augment.lower().split("+")]
        fill = {tv_tensors.Image: [round(255 * m) for m in mean], tv_tensors.Mask: VOID}
        steps = [step for name, value in read_words(text, words) for step in words[name](value, size, fill)]
        return Views(steps, "+".join(text))
    if callable(augment):
        return Views([augment], "custom")
    raise ValueError(f"augment must be words, a transform or None, got {augment!r}")


def flip(value: float | None, size: tuple[int, int], fill: Any) -> list[Any]:
    return [v2.RandomHorizontalFlip()]


def color(value: float | None, size: tuple[int, int], fill: Any) -> list[Any]:
    """Brightness, contrast, saturation and hue, as SSD changes them."""
    return [v2.RandomPhotometricDistort()]


def none(value: float | None, size: tuple[int, int], fill: Any) -> list[Any]:
    return []


@contextmanager
def seeded(seed: Sequence[int]) -> Iterator[None]:
    """torch's CPU generator with a state of its own inside; afterwards it is where it was."""
    before = torch.get_rng_state()
    state = np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)
    torch.default_generator.manual_seed(int(state[0]) >> 1)  # torch.manual_seed would seed the GPU's as well
    try:
        yield
    finally:
        torch.set_rng_state(before)
