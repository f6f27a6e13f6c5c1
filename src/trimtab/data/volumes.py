"""Made volumes: nested ellipsoids in noise, with the masks of three regions. As `synthetic`, but in three dimensions.

Volumes are float and have no file format that `load_data` would read, so they come as a small object with what
`tt.fit` asks of data.

>>> data = Volumes(train=4, test=2, side=16)
>>> batch = next(iter(data.loader("train", batch_size=2, seed=0)))
>>> batch["image"].shape, batch["label"].shape
(torch.Size([2, 4, 16, 16, 16]), torch.Size([2, 3, 16, 16, 16]))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

REGIONS = ("whole", "core", "enhancing")
# How bright ground, whole, core and enhancing are in each modality: no one of them tells all regions apart.
CONTRAST = np.array(
    [[0.0, 1.0, 0.3, 0.3], [0.0, 0.2, 1.0, 0.2], [0.0, 0.2, 0.2, 1.0], [0.0, 1.0, 1.0, 0.5]], np.float32
)


def nested_ellipsoids(
    n: int, *, side: int = 32, noise: float = 0.3, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Volumes of four noisy modalities, each with one tumour: an ellipsoid in an ellipsoid in an ellipsoid.

    Args:
        n: volumes. side: voxels, at least 8. noise: standard deviation, where contrasts are up to 1.

    Returns:
        volumes float32 (n, 4, side, side, side), every modality with mean 0 and deviation 1; masks bool
        (n, 3, side, side, side) of the regions, each inside the one before; their names.

    >>> volumes, masks, names = nested_ellipsoids(2, side=16)
    >>> volumes.shape, names, bool((masks[:, 1] <= masks[:, 0]).all())
    ((2, 4, 16, 16, 16), ('whole', 'core', 'enhancing'), True)
    """
    if n < 1 or side < 8:
        raise ValueError(f"n must be at least 1 and side at least 8, got {n} and {side}")
    places = np.stack(np.meshgrid(*[np.linspace(-1, 1, side, dtype=np.float32)] * 3, indexing="ij"))  # (3, D, H, W)
    volumes = np.empty((n, 4, side, side, side), np.float32)
    masks = np.empty((n, 3, side, side, side), bool)
    for i in range(n):
        rng = np.random.default_rng([seed, i, 73])
        centre, radii = rng.uniform(-0.35, 0.35, 3), rng.uniform(0.4, 0.65, 3)
        for k, shrink in enumerate((1.0, rng.uniform(0.6, 0.8), rng.uniform(0.35, 0.5))):
            away = (places - centre[:, None, None, None]) / (radii * shrink)[:, None, None, None]
            masks[i, k] = (away**2).sum(0) < 1
        volume = CONTRAST[:, masks[i].sum(0)] + noise * rng.standard_normal((4, side, side, side), np.float32)
        volumes[i] = (volume - volume.mean((1, 2, 3), keepdims=True)) / volume.std((1, 2, 3), keepdims=True)
    return volumes, masks, REGIONS


class Volumes:
    """Splits of `nested_ellipsoids`; a batch has "image" (B, 4, D, H, W) and "label" (B, 3, D, H, W), 0 or 1."""

    task = "segment"
    num_classes = len(REGIONS)
    class_names = list(REGIONS)
    in_chans = 4

    def __init__(self, *, train: int = 32, test: int = 8, side: int = 32, noise: float = 0.3, seed: int = 0):
        counts, self.size = {"train": train, "test": test}, (side, side, side)
        self.splits = {
            split: _Split(*nested_ellipsoids(n, side=side, noise=noise, seed=2 * seed + k)[:2])
            for k, (split, n) in enumerate(counts.items())
        }

    def loader(
        self,
        split: str,
        *,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool = False,
        skip: int = 0,
        **ignored: Any,
    ) -> _Batches:
        """Batches of a split, in an order that seed and epoch decide; `skip` leaves the first ones out."""
        held = self.splits[split]
        order = np.random.default_rng([seed, epoch]).permutation(len(held)) if shuffle else np.arange(len(held))
        last = len(held) - batch_size + 1 if drop_last else len(held)
        return _Batches(held, [order[i : i + batch_size] for i in range(0, last, batch_size)][skip:])


class _Split:
    def __init__(self, volumes: np.ndarray, masks: np.ndarray):
        self.images, self.labels = torch.from_numpy(volumes), torch.from_numpy(masks).float()

    def __len__(self) -> int:
        return len(self.images)


class _Batches:
    def __init__(self, held: _Split, rows: list[np.ndarray]):
        self.held, self.rows = held, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for rows in map(torch.from_numpy, self.rows):
            yield {"image": self.held.images[rows], "label": self.held.labels[rows], "index": rows}
