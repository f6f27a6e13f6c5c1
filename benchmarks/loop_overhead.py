"""What the loop costs: `tt.fit` against a hand-written PyTorch loop that does the same work.

A ResNet-8 (78 k parameters), batches of 128 images of 32 x 32, SGD with Nesterov momentum and a one-cycle schedule.
The contenders take turns in one process; a turn is one epoch over the same batches from the same loader, and the time
of `fit` is that of the whole call, set-up included. Extra rows show what the speed options of `fit` bring.

    OMP_NUM_THREADS=1 python -m benchmarks.loop_overhead
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from benchmarks.runner import compare

BATCH, SIZE, CLASSES = 128, 32, 10
RESULT = Path(__file__).parent / "results" / "loop_overhead.json"


class Memory:
    """Random images in memory: the cheapest possible data, so that the loop itself shows."""

    num_classes = CLASSES
    task = "classify"

    def __init__(self, batches: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.images = torch.randn(batches * BATCH, 3, SIZE, SIZE, generator=g)
        self.labels = torch.randint(CLASSES, (batches * BATCH,), generator=g)
        self.splits = {"train": self.labels}

    def loader(self, split: str, *, skip: int = 0, **ignored: Any) -> _Batches:
        return _Batches(self, skip)


class _Batches:
    def __init__(self, data: Memory, skip: int) -> None:
        self.data, self.skip = data, skip

    def __len__(self) -> int:
        return len(self.data.labels) // BATCH - self.skip

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for k in range(self.skip, self.skip + len(self)):
            rows = slice(k * BATCH, (k + 1) * BATCH)
            yield {"image": self.data.images[rows], "label": self.data.labels[rows]}


def by_hand(model: nn.Module, data: Memory, lr: float) -> nn.Module:
    """One epoch, as one would write it."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 5e-4}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, foreach=True)
    batches = data.loader("train")
    steps = len(batches)
    schedule = tt.learn.Schedule("onecycle", warmup=0.2, first=0.05)
    model.train()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step / steps)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(batch["image"]), batch["label"])
        if not torch.isfinite(loss):
            raise RuntimeError(f"loss is {loss}")
        loss.backward()
        optimizer.step()
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=30, help="steps in a turn")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    data = Memory(args.batches)
    start = tt.create_model("resnet8_mlperf_tiny", num_classes=CLASSES, img_size=SIZE, seed=0)
    parameters = sum(p.numel() for p in start.parameters())

    busy: dict[str, list[float]] = {}

    def timed(name: str, train: Callable[[nn.Module], Any]) -> Callable[[], float]:
        """Also notes the processor time, which a busy machine bends less than the clock on the wall."""

        def call() -> float:
            model, begin = deepcopy(start), time.process_time()
            train(model)
            busy.setdefault(name, []).append(time.process_time() - begin)
            return sum(float(p.detach().double().sum()) for p in model.parameters())

        return call

    def fit(**options: Any) -> Callable[[nn.Module], Any]:
        return lambda model: tt.fit(model, data, epochs=1, batch_size=BATCH, lr=0.1, val=None, **options)

    contenders: dict[str, Callable[[nn.Module], Any]] = {
        "by hand": lambda model: by_hand(model, data, 0.1),
        "fit": fit(),
        "fit, channels_last": fit(channels_last=True),
        "fit, bf16": fit(precision="bf16"),
        "fit, bf16 + channels_last": fit(precision="bf16", channels_last=True),
        "fit, EMA + clipping": fit(ema=0.999, clip_grad=1.0),
    }
    result = compare(
        {name: timed(name, train) for name, train in contenders.items()},
        rounds=args.rounds,
        baseline="by hand",
        facts={"parameters": parameters, "steps per turn": args.batches, "torch threads": torch.get_num_threads()},
    )
    same = result.series["fit"].returned == result.series["by hand"].returned
    cpu = {name: statistics.median(a / b for a, b in zip(t[1:], busy["by hand"][1:])) for name, t in busy.items()}
    result.facts["same weights as by hand, bit by bit"] = same
    result.facts["overhead of fit"] = f"{result.ratio('fit') - 1:+.2%} (goal: at most 3 %)"
    result.facts["overhead of fit in processor time"] = f"{cpu['fit'] - 1:+.2%}"
    result.facts["processor time x by hand"] = {name: round(ratio, 4) for name, ratio in cpu.items()}
    result.show("one epoch of ResNet-8, batch 128, 32 x 32")
    result.save(args.out)


if __name__ == "__main__":
    main()
