"""What the main job is worth, in three comparisons: same data, same time, same machine, one after the other.

**Against MLPerf Tiny's ResNet-8** (the default). `trimtab compact` gets a budget (by default that of ResNet-8: 96 KB as
a file, 12.5 M MACs) and a time limit. ResNet-8 (77,962 parameters) is trained by `tt.fit` for the same time with a
plain recipe: SGD with Nesterov momentum, one cycle, crops and flips, no weight decay on norms, in the precision and
memory layout that is fastest on this machine. Both are exported to 8 bits the same way.

    python -m benchmarks.main_job --data ../shared/data/cifar10 --time 25m

**With and without its parts** (`--parts`): the same job without a teacher and a supernet, with a teacher, and with a
supernet around the winner of the search. What pays is what `compact` does by itself.

    python -m benchmarks.main_job --parts --data ../shared/data/cifar10 --limit 10000 --time 4m --seeds 2

**A given model, before and after** (`--model`): compressed by magnitude pruning only, as the job did before it had
other methods, and by what the job chooses among all of its methods.

    python -m benchmarks.main_job --model resnet20_cifar --weights ../shared/weights/cifar10_resnet20.safetensors \\
        --data ../shared/data/cifar10 --limit 5000 --budget "macs<=50%, size<=80KB" --time 4m

Accuracies are those of the delivered files on the test split.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import trimtab as tt
from benchmarks.runner import Comparison, Series
from trimtab.compact.journal import seconds
from trimtab.compact.speed import fastest_settings
from trimtab.core import log
from trimtab.core.timing import torch_threads
from trimtab.data import Data
from trimtab.deploy import OnnxModel

RESULTS = Path(__file__).parent / "results"
BUDGET = "size<=96KB, macs<=12.5M"
VAL = 0.2  # of the training images, where they are few: what the job chooses by
PARTS: dict[str, list[str]] = {"plain": [], "distillation": ["distillation"], "elastic": ["elastic"]}

Row = dict[str, Any]
Contender = Callable[[Path, int], Row]  # (folder, seed) -> what came out


def resnet8(args: argparse.Namespace, folder: Path, seed: int) -> Row:
    """Train the reference for as long as the job may take, and export it."""
    data = tt.load_data(args.data) if isinstance(args.data, str) else args.data
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tt.create_model(
            "resnet8_mlperf_tiny", num_classes=data.num_classes, in_chans=data.in_chans, img_size=data.size
        )
    settings = fastest_settings(model, data)
    with torch_threads(settings.threads):
        done = tt.fit(model, data, time_limit=args.time, seed=seed, out=folder / "fit", **settings.recipe(model, data))
    row = {"epochs": len(done.history), "float accuracy": tt.evaluate(model, data, "test")["accuracy"]}
    return row | exported(model, data, folder / "resnet8.onnx") | {"seconds": time.perf_counter() - start}


def exported(model: Any, data: Any, path: Path) -> Row:
    """Costs and test accuracy of the 8-bit file of a model."""
    tt.export(model, path, data=data, int8=True)
    cost = tt.core.cost.measure_onnx(path)
    accuracy = OnnxModel(path, threads=os.cpu_count() or 1).evaluate(data, "test")["accuracy"]
    return {"accuracy": accuracy, "size": cost.size, "macs": cost.macs, "params": cost.params}


def job(args: argparse.Namespace, folder: Path, seed: int, **choice: Any) -> Row:
    """The main job, and what it delivered."""
    run = tt.compact(args.data, budget=args.budget, time=args.time, out=folder, seed=seed, **choice)
    result = run["result"]
    return {
        "accuracy": result["accuracy"]["test"],
        "model": Path(result["model"]).name,
        "budget met": run["budget"]["met"],
        **{k: result["cost"][k] for k in ("size", "macs", "params")},
        "tried": {Path(t["name"]).name: t["val_accuracy"] for t in run["tried"] if t["stage"] in ("method", "elastic")},
        "seconds": run["seconds"],
    }


def contenders(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Contender], str]:
    """Who is compared, and the name of the baseline."""
    if args.model is not None:
        model = given(args, folder / "given")
        return {
            "magnitude only": lambda f, seed: job(args, f, seed, model=model, methods=["magnitude"]),
            "chosen": lambda f, seed: job(args, f, seed, model=model),
        }, "magnitude only"
    if args.parts:
        return {n: lambda f, seed, p=p: job(args, f, seed, parts=p) for n, p in PARTS.items()}, "plain"  # type: ignore[misc]
    return {
        "compact": lambda f, seed: job(args, f, seed),
        "resnet8": lambda f, seed: resnet8(args, f, seed),
    }, "resnet8"


def given(args: argparse.Namespace, folder: Path) -> Path:
    """The model to compress as an artifact."""
    if args.weights is None:
        return Path(args.model)
    data: Data = args.data
    model = tt.create_model(
        args.model, num_classes=data.num_classes, in_chans=data.in_chans, img_size=data.size, weights=args.weights
    )
    return tt.save(model, folder, spec=data.spec, labels=data.class_names)


def compare(args: argparse.Namespace, folder: Path) -> Comparison:
    """Every contender with every seed, in turn."""
    who, baseline = contenders(args, folder)
    rows: dict[str, list[Row]] = {n: [] for n in who}
    for seed in range(args.seed, args.seed + args.seeds):
        for name, run in who.items():
            rows[name].append(run(folder / f"{name.replace(' ', '-')}-{seed}", seed))
    mean = {n: statistics.fmean(r["accuracy"] for r in rows[n]) for n in rows}
    gains = {n: 100 * (mean[n] - mean[baseline]) for n in rows if n != baseline}
    facts = {
        "data": args.data if isinstance(args.data, str) else args.data.name,
        "images": "all" if args.limit is None else f"{args.limit} of each split, {VAL:.0%} of train to choose by",
        "budget": args.budget, "time limit": args.time, "seeds": args.seeds,
        **{f"{n}: gain": f"{gain:+.2f} points of test accuracy over {baseline}" for n, gain in gains.items()},
        **{f"{n}, seed {args.seed + i}": row for n in rows for i, row in enumerate(rows[n])},
    }  # fmt: skip
    series = {n: Series(n, [r["seconds"] for r in rows[n]], returned=rows[n]) for n in rows}
    return Comparison(series, baseline, args.seeds, facts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="what load_data takes")
    parser.add_argument("--limit", type=int, help="use so many images of each split")
    parser.add_argument("--budget", help=f"default: {BUDGET}; with --model, macs<=50%%")
    parser.add_argument("--time", default="25m", type=seconds, help="for each contender")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    parser.add_argument("--parts", action="store_true", help="compare the job with and without its parts")
    parser.add_argument("--model", help="compress this model: an artifact, or a name with --weights")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--out", type=Path, help="the JSON file, beside the others by default")
    parser.add_argument("--keep", type=Path, help="keep all files here; a run that was stopped goes on")
    args = parser.parse_args(argv)
    log.setup(0)
    kind = "_model" if args.model is not None else "_parts" if args.parts else ""
    args.budget = args.budget or ("macs<=50%" if args.model is not None else BUDGET)
    if args.limit is not None or args.weights is not None:
        args.data = tt.load_data(args.data, limit=args.limit, val=VAL)
    with tempfile.TemporaryDirectory() as temporary:
        result = compare(args, args.keep or Path(temporary))
    result.show("the main job")
    result.save(args.out or RESULTS / f"main_job{kind}.json")


if __name__ == "__main__":
    main()
