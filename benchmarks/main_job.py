"""The main job against MLPerf Tiny's ResNet-8: same data, same time, same machine, one after the other.

`trimtab compact` gets a budget (by default that of ResNet-8: 96 KB as a file, 12.5 M MACs) and a time limit. ResNet-8
(77,962 parameters) is trained by `tt.fit` for the same time with a plain recipe: SGD with Nesterov momentum, one cycle,
crops and flips, no weight decay on norms, in the precision and memory layout that is fastest on this machine. Both are
exported to 8 bits the same way; accuracies are those of the delivered files on the test split.

    python -m benchmarks.main_job --data ../shared/data/cifar10 --time 25m
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import trimtab as tt
from benchmarks.runner import Comparison, Series
from trimtab.compact.journal import seconds
from trimtab.compact.speed import fastest_settings
from trimtab.core import log
from trimtab.core.timing import torch_threads
from trimtab.deploy import OnnxModel

RESULT = Path(__file__).parent / "results" / "main_job.json"


def resnet8(data: Any, limit: float, folder: Path, seed: int) -> dict[str, Any]:
    """Train the reference for `limit` seconds and export it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tt.create_model(
            "resnet8_mlperf_tiny", num_classes=data.num_classes, in_chans=data.in_chans, img_size=data.size
        )
    settings = fastest_settings(model, data)
    with torch_threads(settings.threads):
        done = tt.fit(model, data, time_limit=limit, seed=seed, out=folder / "fit", **settings.recipe(model, data))
    row = {"epochs": len(done.history), "float accuracy": tt.evaluate(model, data, "test")["accuracy"]}
    return row | exported(model, data, folder / "resnet8.onnx")


def exported(model: Any, data: Any, path: Path) -> dict[str, Any]:
    """Costs and test accuracy of the 8-bit file of a model."""
    tt.export(model, path, data=data, int8=True)
    cost = tt.core.cost.measure_onnx(path)
    accuracy = OnnxModel(path, threads=os.cpu_count() or 1).evaluate(data, "test")["accuracy"]
    return {"accuracy": accuracy, "size": cost.size, "macs": cost.macs, "params": cost.params}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="what load_data takes")
    parser.add_argument("--budget", default="size<=96KB, macs<=12.5M")
    parser.add_argument("--time", default="25m", help="for each of the two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--keep", type=Path, help="keep the files of both here; a run that was stopped goes on")
    args = parser.parse_args(argv)
    log.setup(0)
    limit = seconds(args.time)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        run = tt.compact(args.data, budget=args.budget, time=limit, out=folder / "compact", seed=args.seed)
        took = {"compact": run["seconds"]}
        cost = run["result"]["cost"]
        rows = {
            "compact": {
                "accuracy": run["result"]["accuracy"]["test"],
                "model": run["result"]["model"],
                "budget met": run["budget"]["met"],
                **{k: cost[k] for k in ("size", "macs", "params")},
            }
        }
        start = time.perf_counter()
        rows["resnet8"] = resnet8(tt.load_data(args.data), limit, folder, args.seed)
        took["resnet8"] = time.perf_counter() - start
    gain = 100 * (rows["compact"]["accuracy"] - rows["resnet8"]["accuracy"])
    facts = {
        "data": Path(args.data).name, "budget": args.budget, "time limit": limit, "seed": args.seed,
        "gain": f"{gain:+.2f} points of test accuracy (goal: at least +2 at no more bytes)",
        **{f"{n}: {k}": v for n, row in rows.items() for k, v in row.items()},
    }  # fmt: skip
    series = {n: Series(n, [took[n]], returned=rows[n]) for n in rows}
    result = Comparison(series, "resnet8", 1, facts)
    result.show("the main job against ResNet-8")
    result.save(args.out)


if __name__ == "__main__":
    main()
