"""Images per second of `Data.loader` next to a torchvision `DataLoader`: crop and flip, batches on the CPU.

    python -m benchmarks.data_loading [--data DIR]

Every contender starts from the same uint8 images in memory, as `torchvision.datasets.CIFAR10` keeps them, and ends in
normalised float32 batches. The DataLoaders keep their workers between epochs, and an untimed epoch comes first, so
their start is not counted. Without --data, the images are made (noise, 32x32): the work is the same.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.runner import compare
from trimtab.data import Data, load_data

BATCH = 128


class Pictures(Dataset):
    """As `torchvision.datasets.CIFAR10`: arrays (H, W, C), made into a PIL image when asked for."""

    def __init__(self, images: np.ndarray, labels: list[int], transform: Callable[[Any], Tensor], pil: bool) -> None:
        self.images, self.labels, self.transform, self.pil = images, labels, transform, pil

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        x = Image.fromarray(self.images[i]) if self.pil else torch.from_numpy(self.images[i])
        return self.transform(x), self.labels[i]


def torchvision_loader(data: Data, workers: int, pil: bool) -> Callable[[], int]:
    """One epoch per call. pil False: v2 transforms on tensors, torchvision's own faster way."""
    split = data.splits["train"]
    pixels = split.pixels(torch.arange(len(split))).numpy()
    images = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)) if pil else pixels
    first = [v2.ToImage()] if pil else []
    side = data.size[0]
    transform = v2.Compose([
        v2.RandomCrop(side, padding=side // 8), v2.RandomHorizontalFlip(), *first,
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std),
    ])  # fmt: skip
    pictures = Pictures(images, split.labels.tolist(), transform, pil)
    loader = DataLoader(
        pictures, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: sum(len(labels) for _, labels in loader)


def our_loader(data: Data, threads: int) -> Callable[[], int]:
    epoch = [0]

    def run() -> int:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            epoch[0] += 1
            loader = data.loader("train", batch_size=BATCH, augment="crop_flip", epoch=epoch[0])
            return sum(len(batch["label"]) for batch in loader)
        finally:
            torch.set_num_threads(before)

    return run


def check_same_work(data: Data, loaders: dict[str, Callable[[], int]]) -> None:
    """Everyone gives as many images; ours are normalised as torchvision's are."""
    counts = {name: run() for name, run in loaders.items()}
    if len(set(counts.values())) != 1:
        raise RuntimeError(f"contenders must do the same work, but gave so many images: {counts}")
    batch = next(iter(data.loader("train", batch_size=BATCH)))
    raw = data.splits["train"].images[batch["index"]]
    theirs = v2.functional.normalize(raw.float() / 255, list(data.mean), list(data.std))
    torch.testing.assert_close(batch["image"], theirs, atol=1e-5, rtol=1e-5)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with images, e.g. CIFAR-10 as parquet; without it, made images are used")
    parser.add_argument("--images", type=int, default=20_000, help="images per epoch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data_loading.json")
    args = parser.parse_args(argv)

    if args.data:
        data = load_data(args.data, cache="memory").subset({"train": args.images})
    else:
        noise = np.random.default_rng(0).integers(0, 256, (int(args.images / 0.72) + 1, 3, 32, 32), dtype=np.uint8)
        data = Data.from_arrays((noise, np.arange(len(noise)) % 10), name="noise").subset({"train": args.images})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    baseline = f"torchvision, {args.workers} workers"
    contenders = {
        "trimtab": our_loader(data, cores),
        "trimtab, 1 thread": our_loader(data, 1),
        f"torchvision tensors, {args.workers} workers": torchvision_loader(data, args.workers, pil=False),
        baseline: torchvision_loader(data, args.workers, pil=True),
    }
    check_same_work(data, contenders)
    result = compare(contenders, rounds=args.rounds, warmup=1, baseline=baseline)
    images, ours = int(result.series["trimtab"].returned), result.series["trimtab"].median
    best = min((n for n in contenders if n.startswith("torchvision")), key=lambda n: result.series[n].median)
    result.facts = {
        "data": data.name,
        "size": list(data.size),
        "batch_size": BATCH,
        "images per epoch": images,
        "images per second": {name: round(images / s.median) for name, s in result.series.items()},
        "times as many as the baseline": {n: round(1 / result.ratio(n), 2) for n in contenders},
        "times as many as the faster torchvision": round(result.series[best].median / ours, 2),
        "load average of the machine": [round(v, 1) for v in os.getloadavg()],
        "target": "at least 2 times as many as the baseline",
        "target met": 1 / result.ratio("trimtab") >= 2 and 1 / result.ratio("trimtab, 1 thread") >= 2,
    }
    result.show(f"{data.name}, {data.size[0]}x{data.size[1]}, crop and flip, {images} images")
    print(f"wrote {result.save(args.out)}")
    return result.asdict()


if __name__ == "__main__":
    main()
