"""8 bits against float32 in ONNX Runtime: accuracy, bytes and time of the files that `tt.export` writes.

    python -m benchmarks.quantized --data ../shared/data/cifar10 --weights ../shared/weights

ResNet-20 and ResNet-56 with published weights, tested on all CIFAR-10 test images: float32, and static int8 calibrated
on training images (`int8=True`, no training). MobileNetV2 and ResNet-50 at 224 pixels have random weights and are only
timed. Batch 1, one thread; the files of one network take turns.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import trimtab as tt
from benchmarks.runner import Comparison, compare
from trimtab.core import log
from trimtab.deploy import OnnxModel

RESULT = Path(__file__).parent / "results" / "quantized.json"
TRAINED = {"ResNet-20": "resnet20_cifar", "ResNet-56": "resnet56_cifar"}
TIMED = {"MobileNetV2, 224": "mobilenetv2_100", "ResNet-50, 224": "resnet50"}
MORE: dict[str, dict[str, Any]] = {"resnet50": {"zero_init_last": False}}  # else a third of its weights are zero
KINDS = ("float32", "int8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10, as load_data takes it")
    parser.add_argument("--weights", type=Path, required=True, help="folder of cifar10_resnet20/56.safetensors")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    log.setup(0)
    torch.set_num_threads(1)
    cifar = tt.load_data(args.data, seed=0)
    large = tt.load_data("shapes:classes=4,size=224,n=256", seed=0)
    times: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, slug in {**TRAINED, **TIMED}.items():
            if name in TRAINED:
                weights = args.weights / f"cifar10_{slug.removesuffix('_cifar')}.safetensors"
                data, model = cifar, tt.create_model(slug, num_classes=10, weights=weights)
            else:
                data, model = large, tt.create_model(slug, num_classes=large.num_classes, seed=0, **MORE.get(slug, {}))
            result = measure(name, model, data, Path(folder), args.rounds, tested=name in TRAINED)
            result.show(name)
            times |= {f"{name}, {kind}": s for kind, s in result.series.items()}
            facts |= {f"{name}, {kind}": result.facts[kind] | {"ratio": result.ratio(kind)} for kind in KINDS}
    rounds = min(len(s.seconds) for s in times.values())
    Comparison(times, next(iter(times)), rounds, facts).save(args.out)


def measure(name: str, model: torch.nn.Module, data: Any, folder: Path, rounds: int, *, tested: bool) -> Comparison:
    """Both files of one network: times, bytes and, where it is trained, accuracy."""
    files, facts = {}, {}
    for kind in KINDS:
        done = tt.export(model, folder / f"{name}-{kind}.onnx", data=data, int8=kind == "int8", limit=256)
        files[kind] = OnnxModel(done.path)
        facts[kind] = {"bytes": done.size} | ({"accuracy": files[kind].evaluate(data)["accuracy"]} if tested else {})
    x = np.random.default_rng(0).standard_normal((1, *data.spec.size)).astype(np.float32)
    calls = {kind: lambda file=file: file.logits(x) for kind, file in files.items()}  # type: ignore[misc]
    return compare(calls, rounds=rounds, warmup=2, baseline="float32", inner=5, facts=facts)


if __name__ == "__main__":
    main()
