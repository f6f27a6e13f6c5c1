"""How to train fast on this machine: threads, precision and memory layout are measured, not guessed."""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from trimtab.core.edit import history
from trimtab.core.timing import torch_threads
from trimtab.data import Data

STEPS = 3
TUNE = 0.1  # of the learning rate, for a model that has learned already
TRANSFORMERS = ("vit", "deit", "cct", "cvt", "swin", "beit", "eva", "cait", "pit", "xcit", "mobilevit", "text_cct")


@dataclass(frozen=True)
class Settings:
    """What was found: the number of threads, and the arguments of `fit` that decide the speed."""

    precision: str = "fp32"
    channels_last: bool = False
    batch_size: int = 128
    threads: int = 1
    speed: float = 1000.0  # images per second, forward, backward and update

    @property
    def words(self) -> str:
        layout = ", channels last" if self.channels_last else ""
        return f"{self.precision}{layout}, batches of {self.batch_size}, threads: {self.threads}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def recipe(self, model: nn.Module, data: Data, *, tune: bool = False) -> dict[str, Any]:
        """Arguments of `fit` for a model: AdamW for transformers, SGD with Nesterov momentum for the rest.

        Layers that round to few bits learn in float32, whatever is fastest. With `tune`, the rate is a tenth: the model
        has learned already.
        """
        base = history(model).base or type(model).__name__.lower()
        rounds = any(getattr(m, "weight_bits", 32) < 32 for m in model.modules())
        common = {
            "batch_size": self.batch_size, "precision": "fp32" if rounds else self.precision,
            "channels_last": self.channels_last, "sched": "onecycle", "progress": True,
        }  # fmt: skip
        share = TUNE if tune else 1.0
        if base.startswith(TRANSFORMERS):
            adamw = {"opt": "adamw", "lr": 1e-3 * share, "weight_decay": 0.05, "warmup": 0.1, "clip_grad": 1.0}
            return {**common, **adamw}
        lr = 0.3 * share * self.batch_size / 128
        return {**common, "opt": "sgd", "lr": lr, "momentum": 0.9, "weight_decay": 5e-4}


def fastest_settings(model: nn.Module, data: Data) -> Settings:
    """Time a few steps of `model` on one thread in both precisions and memory layouts, then the best on all threads.

    Very small networks run faster on one thread, as does anything on a busy machine. The model is left as it was.
    """
    images = len(data.splits["train"])
    batch = 128 if images >= 4000 else 64 if images >= 600 else 32
    image = torch.randn(batch, data.in_chans, *data.size)
    best = Settings(batch_size=batch, speed=0.0)

    def try_out(precision: str, channels_last: bool, threads: int) -> None:
        nonlocal best
        with torch_threads(threads):
            speed = _images_per_second(copy.deepcopy(model), image, precision, channels_last)
        if speed > best.speed:
            best = Settings(precision, channels_last, batch, threads, speed)

    for precision, channels_last in product(("fp32", "bf16"), (False, True)):
        try_out(precision, channels_last, 1)
    if torch.get_num_threads() > 1:
        try_out(best.precision, best.channels_last, torch.get_num_threads())
    return best


def _images_per_second(model: nn.Module, image: torch.Tensor, precision: str, channels_last: bool) -> float:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.train().to(memory_format=layout)
    image = image.contiguous(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    took = []
    with torch.random.fork_rng(devices=[]):
        for _ in range(STEPS + 1):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
                out = model(image)
            out.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            took.append(time.perf_counter() - start)
    return len(image) / min(took[1:])
