"""Runs to render: a realistic one from scikit-learn's digits, a very large one, and a hostile one.

python -m tests.report.sample OUT      writes the realistic run's report, model card and plot to OUT
"""

from __future__ import annotations

import base64
import io
import math
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(pixels: np.ndarray) -> str:
    """uint8 (H, W) or (H, W, 3) as a PNG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@cache
def _digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Test images, labels, and class probabilities of a nearest-centroid classifier (weak enough to make mistakes)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    train, test = slice(0, 1437), slice(1437, None)
    centres = np.stack([images[train][labels[train] == k].mean(0) for k in range(10)])
    distance = ((images[test][:, None] - centres[None]) ** 2).sum(-1)
    scores = np.exp(-(distance - distance.min(1, keepdims=True)) / 60)
    return images[test].reshape(-1, 8, 8), labels[test], scores / scores.sum(1, keepdims=True)


def tried(count: int, rng: random.Random, *, size_limit: float, mac_limit: float) -> list[dict[str, Any]]:
    rows = []
    for k in range(count):
        params = math.exp(rng.uniform(math.log(4e3), math.log(6e5)))
        macs = params * math.exp(rng.gauss(4.4, 0.35))
        size = params * (1.06 if rng.random() < 0.5 else 4.1) + 4000
        accuracy = 0.985 - 0.32 / (params / 2000) ** 0.62 + rng.gauss(0, 0.006)
        if rng.random() < 0.03:
            accuracy = rng.uniform(0.1, 0.4)
        stage = rng.choice(["search", "prune", "fine-tune", "int8"])
        rows.append(
            {
                "name": f"trim_resnet w{8 * rng.randint(1, 8)} d{rng.randint(1, 4)} #{k + 1}",
                "stage": stage,
                "params": round(params),
                "macs": round(macs),
                "size": round(size),
                "latency": macs * 4e-11 * math.exp(rng.gauss(0, 0.2)) + 4e-5,
                "val_accuracy": min(0.994, max(0.05, accuracy)),
                "seconds": rng.uniform(3, 60),
                "fits": size <= size_limit and macs <= mac_limit and accuracy >= 0.9,
                "chosen": False,
            }
        )
    inside = [row for row in rows if row["fits"]] or rows
    max(inside, key=lambda row: row["val_accuracy"])["chosen"] = True
    return rows


def layers(stages: int, blocks: int, rng: random.Random, keep: float = 1.0) -> list[dict[str, Any]]:
    rows = [_conv("stem.conv", 1, 32 * keep, 32, 3)]
    for s in range(stages):
        width, side = 32 * 2**s * keep, 32 / 2**s
        for b in range(blocks):
            inner = width * (rng.uniform(0.3, 0.8) if keep < 1 else 1)
            rows.append(_conv(f"stages.{s}.blocks.{b}.conv1", width, inner, side, 3))
            rows.append(_conv(f"stages.{s}.blocks.{b}.conv2", inner, width, side, 3))
    rows.append(
        {
            "name": "head.fc",
            "kind": "Linear",
            "params": int(width * 10 + 10),
            "macs": int(width * 10),
            "activations": 10,
        }
    )
    return rows


def _conv(name: str, inner: float, outer: float, side: float, kernel: int) -> dict[str, Any]:
    params = int(inner) * int(outer) * kernel * kernel
    macs = int(params * side * side)
    return {"name": name, "kind": "Conv2d", "params": params, "macs": macs, "activations": int(outer * side * side)}


def history(epochs: int, rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for e in range(1, epochs + 1):
        t = e / epochs
        rows.append(
            {
                "epoch": e,
                "loss": 0.06 + 2.2 * math.exp(-5 * t) + rng.gauss(0, 0.01),
                "val_accuracy": 0.968 - 0.6 * math.exp(-6 * t) + rng.gauss(0, 0.006),
                "lr": 0.1 * (1 + math.cos(math.pi * t)) / 2,
            }
        )
    return rows


def realistic(seed: int = 0) -> dict[str, Any]:
    """A run of the usual size that met its budget."""
    rng = random.Random(seed)
    images, truth, scores = _digits()
    guess = scores.argmax(1)
    matrix = np.zeros((10, 10), int)
    np.add.at(matrix, (truth, guess), 1)
    wrong = np.flatnonzero(guess != truth)[:8]
    shown = sorted([*np.flatnonzero(guess == truth)[:16].tolist(), *wrong.tolist()])
    candidates = tried(43, rng, size_limit=96_000, mac_limit=12.5e6)
    chosen = next(row for row in candidates if row["chosen"])
    accuracy = float((guess == truth).mean())
    cost = {name: chosen[name] for name in ("params", "macs", "size", "latency")}
    cost |= {"latency_iqr": chosen["latency"] * 0.06, "memory": 41_216, "runtime": "ONNX Runtime, 1 thread"}
    before, after = layers(3, 3, rng), layers(3, 3, rng, keep=0.5)
    limits = [("macs", "<=", 12.5e6), ("size", "<=", 96_000), ("accuracy", ">=", 0.8)]
    seen = {**cost, "accuracy": accuracy}
    return {
        "title": "Handwritten digits in 96 KB",
        "command": 'trimtab compact digits --budget "macs<=12.5M, size<=96KB, accuracy>=0.8" --time 10m --seed 0',
        "created": "2025-11-21 14:05 UTC",
        "seconds": 587.3,
        "machine": {"cpu": "Intel(R) Xeon(R) Processor", "cores": 2, "memory_gb": 16.4, "os": "Linux 6.1", "gpu": None},
        "versions": {
            "trimtab": "0.1.0",
            "python": "3.11.7",
            "torch": "2.15.0",
            "timm": "1.0.31",
            "onnxruntime": "1.27.0",
        },
        "data": {
            "name": "digits",
            "task": "classify",
            "num_classes": 10,
            "class_names": [str(k) for k in range(10)],
            "size": [8, 8],
            "in_chans": 1,
            "counts": {"train": 1294, "val": 143, "test": 360},
            "warnings": [
                "No test split in the source: the last 20% were set aside as test.",
                "14 pictures appear both in train and in test (exact duplicates); they were taken out of train.",
            ],
        },
        "budget": {
            "text": "macs<=12.5M, size<=96KB, accuracy>=0.8",
            "met": True,
            "rows": [
                {"name": n, "op": op, "limit": limit, "value": seen[n], "ok": True, "text": f"{n}{op}{limit:g}"}
                for n, op, limit in limits
            ],
        },
        "tried": candidates,
        "result": {
            "model": "trim_resnet_w24",
            "summary": "A small residual network found by a width and depth search, pruned by magnitude, tuned with "
            "distillation from the unpruned network and stored in 8 bits.",
            "cost": cost,
            "accuracy": {"val": 0.951, "test": accuracy},
            "edits": [
                f"Narrow stages.{s}.blocks.{b}.conv1 from {32 * 2**s} to {rng.randint(8, 16 * 2**s)} output channels"
                for s in range(3)
                for b in range(3)
            ]
            + ["Set head.in_features to 64"],
            "files": [{"name": "model.onnx", "bytes": chosen["size"]}, {"name": "model/trimtab.json", "bytes": 4312}],
            "history": history(40, rng),
        },
        "layers": {"before": before, "after": after},
        "confusion": {"labels": [str(k) for k in range(10)], "matrix": matrix.tolist()},
        "samples": [
            {
                "image": picture((images[k] / 16 * 255).astype(np.uint8)),
                "label": str(truth[k]),
                "predicted": str(guess[k]),
                "confidence": float(scores[k].max()),
            }
            for k in shown
        ],
    }


def missed() -> dict[str, Any]:
    """The same run against a budget that nothing tried could meet."""
    run = realistic()
    row = next(row for row in run["budget"]["rows"] if row["name"] == "accuracy")
    row |= {"limit": 0.999, "ok": False}
    run["budget"] |= {"met": False, "text": "macs<=12.5M, size<=96KB, accuracy>=0.999"}
    run["command"] = run["command"].replace("0.8", "0.999")
    for candidate in run["tried"]:
        candidate["fits"] = False
    return run


def large(classes: int = 100, candidates: int = 500, depth: int = 300, samples: int = 64) -> dict[str, Any]:
    """The largest run that must stay usable; the pictures are noisy photographs' size, the worst for a small file."""
    rng, noise = random.Random(1), np.random.default_rng(1)
    names = [
        f"{rng.choice(['northern', 'common', 'lesser', 'alpine', 'painted'])} species {k:03d}" for k in range(classes)
    ]
    matrix = noise.multinomial(50, noise.dirichlet([0.02] * classes, classes) * 0.25 + np.eye(classes) * 0.75).tolist()
    pictures = [picture(noise.integers(0, 256, (224, 224, 3), dtype=np.uint8)) for _ in range(4)]
    run = realistic()
    run["title"] = "One hundred species, five hundred candidates"
    run["data"] |= {"class_names": names, "num_classes": classes, "size": [224, 224], "in_chans": 3}
    run["confusion"] = {"labels": names, "matrix": matrix}
    run["tried"] = tried(candidates, rng, size_limit=96_000, mac_limit=12.5e6)
    run["layers"] = {side: layers(4, depth // 8, rng, keep) for side, keep in (("before", 1.0), ("after", 0.5))}
    run["result"]["history"] = history(300, rng)
    run["result"]["edits"] = [f"Narrow layer {k} to {rng.randint(8, 64)} channels" for k in range(depth)]
    run["samples"] = [
        {
            "image": pictures[k % 4],
            "label": names[k],
            "predicted": names[k if k % 5 else k + 1],
            "confidence": rng.random(),
        }
        for k in range(samples)
    ]
    return run


ATTACKS = (
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=1</script>",
    "\"><img src=x onerror='window.hacked=1'>",
    "<!--",
    "]]></style></title><svg onload=window.hacked=1>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:window.hacked=1",
    "gnp.exe\u202egpj\x00\x1b[31m\ud800",
    "`| [x](javascript:alert(1)) **b**\n# heading\n---",
    "&lt;b&amp;",
)


def hostile() -> dict[str, Any]:
    """Every piece of text in a run replaced by something that tries to break out of it."""
    turn = iter(range(10**9))

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            keep = {"name", "op"} if "limit" in value else set()
            return {k: v if k in keep else spoil(v) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v) for v in value]
        return ATTACKS[next(turn) % len(ATTACKS)] if isinstance(value, str) else value

    run: dict[str, Any] = spoil(realistic())
    run["versions"] |= {ATTACKS[0]: ATTACKS[1]}
    run["data"]["counts"] |= {ATTACKS[2]: 3}
    run["budget"]["rows"].append(
        {"name": ATTACKS[1], "op": "<=", "limit": 1.0, "value": 0.5, "ok": True, "text": ATTACKS[0]}
    )
    return run


if __name__ == "__main__":
    from trimtab import report

    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for made in (realistic, missed, large, hostile):
        written = report.write(made(), out / f"{made.__name__}.html")
        print(written, f"{written.stat().st_size / 1000:.0f} KB")
    (out / "pareto.svg").write_text(report.pareto_svg(realistic()), encoding="utf-8")
    report.model_card(realistic(), out / "README.md")
