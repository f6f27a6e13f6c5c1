"""Pruning ResNet-56 on CIFAR-10 to half of its multiply-adds: trimtab beside torch-pruning.

Every contender starts from the same published weights and trains for the same number of epochs on the same images with
the same settings: the pruners cut first and fine-tune the small network, OTOv2 trains the large one and cuts at the
end. torch-pruning cannot follow the padded, subsampled shortcuts of this network (its forward fails after the cut), so
there only the inner channels of each block are pruned, as is usually done; trimtab may cut all. It is used as in its
own examples: global scores, one small step after the other until its own counter says that the goal is reached. Seeds
take turns. The time is that of pruning and training, without loading and testing.

    python -m benchmarks.pruning --data ../shared/data/cifar10 --weights ../shared/weights/cifar10_resnet56.safetensors
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import trimtab as tt
from benchmarks.runner import Series, compare
from trimtab.core import log

RESULT = Path(__file__).parent / "results" / "pruning.json"
SHARE = 0.5
STEPS = 200  # of torch-pruning, from nothing to everything: each takes half a percent of the channels


class Contender:
    """Prunes and trains with one seed after the other; a call is one seed, timed by the runner."""

    def __init__(self, prune: Callable[..., nn.Module], args: argparse.Namespace, data: Any) -> None:
        self.prune, self.args, self.data = prune, args, data
        self.models: list[nn.Module] = []
        self.processor: list[float] = []

    def __call__(self) -> int:
        model = tt.create_model("resnet56_cifar", num_classes=10, weights=self.args.weights)
        args, start = self.args, time.process_time()
        run = {
            "epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "seed": len(self.models), "val": None,
            "precision": "bf16", "channels_last": True, "progress": False, "device": "cpu",
        }  # fmt: skip
        self.models.append(self.prune(model, self.data, run))
        self.processor.append(time.process_time() - start)
        return len(self.models)

    def results(self) -> dict[str, Any]:
        """Test accuracy and costs of the model of each seed."""
        costs = [tt.measure(m, self.data.spec.size, what=("macs", "params")) for m in self.models]
        accuracy = [tt.evaluate(m, self.data, "test")["accuracy"] for m in self.models]
        return {
            "accuracy": statistics.fmean(accuracy),
            "accuracy std": statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0,
            "accuracy of each seed": accuracy,
            "processor seconds": self.processor,
            "macs": [c.macs for c in costs],
            "params": [c.params for c in costs],
        }


def torch_pruning(importance: str) -> Callable[..., nn.Module]:
    """Global pruning by torch-pruning, one small step after the other until the multiply-adds are met."""

    def prune(model: nn.Module, data: Any, run: dict[str, Any]) -> nn.Module:
        import torch_pruning as tp

        entry, reduction = {
            "magnitude": (tp.pruner.MagnitudePruner, "first"),  # of the layer that makes the channel
            "group-norm": (tp.pruner.GroupNormPruner, "mean"),  # of all that goes with it
        }[importance]
        example = torch.zeros(1, *data.spec.size)
        net: Any = model
        stream = [net.conv1, net.linear, *(b.conv2 for s in net.stage_names for b in getattr(net, s))]
        pruner = entry(
            model.eval(), example, importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction=reduction),
            pruning_ratio=1.0, max_pruning_ratio=0.9, global_pruning=True, iterative_steps=STEPS, ignored_layers=stream,
        )  # fmt: skip
        full, _ = tp.utils.count_ops_and_params(model, example)
        for _ in range(STEPS):
            pruner.step()
            if tp.utils.count_ops_and_params(model, example)[0] <= SHARE * full:
                break
        return tt.fit(model, data, **run).model

    return prune


def magnitude(scope: str) -> Callable[..., nn.Module]:
    def prune(model: nn.Module, data: Any, run: dict[str, Any]) -> nn.Module:
        small = tt.compress.magnitude(model, data, budget=f"macs<={SHARE:.0%}", scope=scope)
        return tt.fit(small, data, **run).model

    return prune


def otov2(model: nn.Module, data: Any, run: dict[str, Any]) -> nn.Module:
    return tt.compress.otov2(model, data, budget=f"macs<={SHARE:.0%}", **run)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10, as load_data takes it")
    parser.add_argument("--weights", type=Path, required=True, help="of ResNet-56 (safetensors)")
    parser.add_argument("--images", type=int, default=1024, help="training images")
    parser.add_argument("--test", type=int, default=2000, help="test images")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", default="test", choices=("test", "val"), help="val: to look at settings")
    parser.add_argument("--only", nargs="*", help="contenders")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    log.setup(0)
    data = tt.load_data(args.data, seed=0)
    if args.split == "val":
        data.splits["test"] = data.splits["val"]
    data = data.subset({"train": args.images, "test": args.test}, seed=0)
    methods = {
        "torch-pruning magnitude": torch_pruning("magnitude"),
        "torch-pruning group-norm": torch_pruning("group-norm"),
        "trimtab magnitude": magnitude("raw"),
        "trimtab magnitude, scores by group": magnitude("global"),
        "trimtab otov2": otov2,
    }
    contenders = {n: Contender(m, args, data) for n, m in methods.items() if not args.only or n in args.only}
    result = compare(contenders, rounds=args.seeds, warmup=0, baseline=next(iter(contenders)))
    start = tt.create_model("resnet56_cifar", num_classes=10, weights=args.weights)
    full = tt.measure(start, data.spec.size, what=("macs", "params"))
    assert full.macs is not None and full.params is not None
    result.facts |= {
        "model": f"ResNet-56, {full.macs / 1e6:.1f} M multiply-adds, {full.params:,} parameters, published weights",
        "accuracy before": tt.evaluate(start, data, "test")["accuracy"],
        "data": f"CIFAR-10 as JPEG, {args.images} training images only, {args.test} {args.split} images",
        "training": f"{args.epochs} epochs of batch {args.batch_size}, SGD lr {args.lr}, bf16, channels last, for all",
        "torch-pruning": "inner channels of the blocks only: it cannot follow the padded shortcuts",
    }
    for name, contender in contenders.items():
        row = contender.results()
        result.series[name] = Series(name, result.series[name].seconds, returned=row)
        result.facts[name] = (
            f"accuracy {100 * row['accuracy']:.2f} +- {100 * row['accuracy std']:.2f} %, "
            f"{statistics.fmean(row['macs']) / 1e6:.1f} M multiply-adds, {statistics.fmean(row['params']):,.0f} "
            f"parameters, {statistics.median(row['processor seconds']):.0f} s of processor time"
        )
    result.show("ResNet-56 on CIFAR-10 at half of its multiply-adds")
    result.save(args.out)


if __name__ == "__main__":
    main()
