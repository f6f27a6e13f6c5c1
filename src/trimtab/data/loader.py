"""Batches as a pure function of (seed, epoch, batch index): a resumed run sees what it would have seen."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trimtab.data.augment import Augment
from trimtab.data.images import affine

if TYPE_CHECKING:
    from trimtab.data.dataset import Split

Batch = dict[str, Tensor]
_AHEAD = 3  # batches decoded in advance when images are decoded as they are needed


class Loader:
    """Batches of one epoch of a split: ``{"image": (B, C, H, W), "label": (B,), "index": (B,)}``.

    With them comes ``"crop_box"`` (B, 4), what part of the original is shown: x1, y1, x2, y2 in units of its sides. It
    is left out where the augmentation moves pixels in another way.

    Made by `Data.loader`, which describes the arguments. ``len`` counts the batches it will still give (after `skip`),
    `total` those of the whole epoch.
    """

    in_advance = True  # images that are not in memory are decoded by a thread, a few batches ahead

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        shuffle: bool,
        augment: Augment,
        seed: int,
        epoch: int,
        drop_last: bool,
        rank: int,
        world: int,
        device: str | torch.device,
        skip: int,
        raw: bool,
    ) -> None:
        self.split, self.batch_size, self.augment = split.at(epoch), batch_size, augment
        self.seed, self.epoch, self.rank, self.world, self.skip, self.raw = seed, epoch, rank, world, skip, raw
        self.device = torch.device(device)
        n = len(split)
        self.order = torch.randperm(n, generator=_generator(seed, epoch, -1)) if shuffle else torch.arange(n)
        self.total = n // batch_size if drop_last else -(-n // batch_size)
        self.mean, self.std = mean, std
        self._fill = torch.tensor([255 * m for m in mean]).view(-1, 1, 1).to(self.device)

    def __len__(self) -> int:
        return max(0, self.total - self.skip)

    def __iter__(self) -> Iterator[Batch]:
        if not self.in_advance or isinstance(self.split.images, Tensor):
            for k in range(self.skip, self.total):
                yield self.batch(k)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="trimtab-loader") as pool:
            waiting: deque[Future[Batch]] = deque()
            try:
                for k in range(self.skip, self.total):
                    waiting.append(pool.submit(self.batch, k))
                    if len(waiting) > _AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:  # also when the reader stops early
                for future in waiting:
                    future.cancel()

    def rows(self, k: int) -> tuple[Tensor, slice]:
        """The rows of batch k, and which of them are this rank's."""
        whole = self.order[k * self.batch_size : (k + 1) * self.batch_size]
        b = len(whole)
        return whole, slice(b * self.rank // self.world, b * (self.rank + 1) // self.world)

    def batch(self, k: int) -> Batch:
        """Batch k of the epoch; with several processes, this rank's slice of it."""
        whole, mine = self.rows(k)
        b = len(whole)
        need = slice(0, b) if self.augment.whole_batch else mine
        rows = whole[need]
        images = self.split.pixels(rows)
        if self.device.type == "cuda":
            images = images.pin_memory().to(self.device, non_blocking=True)
        else:
            images = images.to(self.device)
        size, draws = (images.shape[2], images.shape[3]), []
        if self.augment.steps:
            draws = self.augment.draw(b, size, _generator(self.seed, self.epoch, k))
            images = self.augment.apply(images, [{n: v[need] for n, v in d.items()} for d in draws], self._fill)
        if need is not mine:
            images, rows = images[mine], rows[mine]
        if not self.raw:
            images = normalise(images, self.mean, self.std)
        elif images.dtype != torch.uint8:
            images = images.clamp(0, 255).round().to(torch.uint8)
        batch = {"image": images, "label": self.split.labels[rows].to(self.device), "index": rows.to(self.device)}
        box = self.augment.crop_box(b, size, draws)
        return batch if box is None else batch | {"crop_box": box[mine].to(self.device)}


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """0..255 (B, C, H, W) of any type to float32 (x / 255 - mean) / std, as x * scale + shift.

    >>> round(normalise(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), (0.5,), (0.5,)).item(), 4)
    1.0
    """
    scale, shift = affine(mean, std)
    if images.device.type == "cpu":
        # As `preprocess` does it, to the bit. numpy stays on this core: torch would wait for its other threads, which
        # on a busy machine takes longer than the work.
        b, c, h, w = images.shape
        out = images.numpy().reshape(b, c, h * w).astype(np.float32)
        out *= scale[:, None]
        out += shift[:, None]
        return torch.from_numpy(out.reshape(b, c, h, w))
    wide = [torch.from_numpy(v).view(1, -1, 1, 1).to(images.device) for v in (scale, shift)]
    return images.to(torch.float32, copy=True).mul_(wide[0]).add_(wide[1])


def _generator(seed: int, epoch: int, batch: int) -> torch.Generator:
    """A private generator for one batch (-1: the order of the epoch); unrelated for different arguments."""
    state = np.random.SeedSequence([seed, epoch, batch + 1]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
