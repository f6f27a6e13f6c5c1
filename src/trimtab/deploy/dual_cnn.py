"""Two complementary networks instead of a large one (Kinnas et al. 2024, arXiv 2412.01039).

Of a pool of trained networks, the two are chosen that make different mistakes. The first, the cheaper one, answers; if
its confidence is below a threshold, the second is asked. A memory in front answers images that were seen before.
Nothing is trained: pair and threshold are chosen on validation images.

    comp(a, b) = 2 min(|a \\ b|, |b \\ a|) / N        for the sets a, b of images that a network gets right
    mean cost  = c_A + P(confidence_A < threshold) c_B

Differences to the paper and its code. The threshold is not the first of the highest accuracy: the curve is flat, so the
smallest within `tolerance` of it is taken, which asks the second network less. Entropy is normalised everywhere. The
memory is bounded, its keys hold a version, and the perceptual key is checked by a second hash; keys that recognise
rotated images (sums of complex moments, compared as exact floats) are left out, because any re-encoding changes them.
Both networks run in one process; the form with the second on a server is not here.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.core.budget import Budget
from trimtab.core.card import Card, Claim
from trimtab.core.errors import BudgetError, DataError
from trimtab.core.files import write_bytes, write_text
from trimtab.core.lazy import callable_package
from trimtab.deploy.cascade import CASCADE, FILES, SCORES, CascadeModel, Gate, Member, ResultCache, confidence, dump
from trimtab.deploy.runtime import OnnxModel, batches

if TYPE_CHECKING:
    from torch import nn

    from trimtab.core.cost import Cost
    from trimtab.data import Data

CARD = Card(
    slug="dual_cnn",
    title="Reducing Inference Energy Consumption Using Dual Complementary CNNs",
    arxiv="2412.01039",
    year=2024,
    kind="method",
    tasks=("classify",),
    claims=(
        Claim(
            "pair",
            "two small complementary CNNs, the second invoked only when the first is unsure, replace one large CNN at "
            "lower energy and similar or better accuracy",
        ),
        Claim(
            "memory",
            "a memory of perceptual hashes answers repeated inputs without any network; up to 85.8% less energy when "
            "every sample occurs twice (Jetson Nano)",
        ),
        Claim("threshold", "the confidence threshold lambda is chosen to maximise accuracy on validation data"),
    ),
)
THRESHOLDS = 2000
METRICS = ("paper", "script")


def complementarity(a: np.ndarray, b: np.ndarray, metric: str = "paper") -> float:
    """How different the mistakes of two networks are; a, b: which images each gets right, bool (N,).

    "paper" counts balanced disagreement, twice the smaller of both differences; "script" (the authors' code) all of it.

    >>> a, b = np.array([1, 1, 1, 0, 0], bool), np.array([0, 0, 1, 1, 0], bool)
    >>> complementarity(a, b), complementarity(a, b, "script")
    (0.4, 0.6)
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return (2 * min(only_a, only_b) if metric == "paper" else only_a + only_b) / len(a)


@dataclass(frozen=True)
class Curve:
    """What every threshold gives on labelled images: the accuracy, and the share that the second is asked about."""

    thresholds: np.ndarray
    accuracy: np.ndarray
    asked: np.ndarray

    def best(self, tolerance: float = 0.0) -> int:
        """Place of the smallest threshold whose accuracy is at most `tolerance` below the highest."""
        return int(np.flatnonzero(self.accuracy >= self.accuracy.max() - tolerance - 1e-12)[0])


def curve(first: np.ndarray, second: np.ndarray, labels: np.ndarray, gate: Gate, count: int = THRESHOLDS) -> Curve:
    """Accuracy and calls at `count` thresholds from 0 to 1; first, second: logits (N, K), labels (N,)."""
    sure = confidence(first / gate.temperatures[0], gate.score)
    wins = gate.second_wins(first, second)
    right_first = first.argmax(-1) == labels
    right_both = np.where(wins, second.argmax(-1), first.argmax(-1)) == labels
    thresholds = np.linspace(0, 1, count)
    order = np.argsort(sure, kind="stable")
    asked = np.searchsorted(sure[order], thresholds, side="left")  # rows whose confidence is below
    gain = np.concatenate([[0], np.cumsum(right_both[order].astype(int) - right_first[order])])
    return Curve(thresholds, (right_first.sum() + gain[asked]) / len(labels), asked / len(labels))


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """What to divide logits (N, K) by, so that their softmax is as probable as the labels (N,) allow."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    rows = np.arange(len(labels))

    def loss(log_t: float) -> float:
        return -float(log_softmax(logits / np.exp(log_t), -1)[rows, labels].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


@dataclass(frozen=True)
class Candidate:
    """A network of the pool: what it says to the validation images, and what it costs."""

    name: str
    source: nn.Module | Path
    cost: Cost
    logits: np.ndarray


@dataclass(frozen=True)
class Pair:
    """Two networks and the gate between them. Made by `dual_cnn`.

    Attributes:
        first, second: the networks.
        gate: when the second is asked.
        figures: on the validation images: accuracy of the pair, of each network, and of an oracle that asks the second
            just when the first is wrong; `asked`, the share of calls of the second; mean `macs`, and `joules` by the
            table of `core.energy`; what both hold in memory, `params` and `bytes`.
        complementarity: of every pair that was looked at.
    """

    first: Candidate
    second: Candidate
    gate: Gate
    figures: Mapping[str, float]
    complementarity: Mapping[tuple[str, str], float]
    data: Data

    def __repr__(self) -> str:
        f = self.figures
        return (
            f"Pair({self.first.name}, then {self.second.name} for {f['asked']:.1%}: accuracy {f['accuracy']:.4f}, "
            f"alone {f['first']:.4f} and {f['second']:.4f}, {f['macs'] / 1e6:.4g}M MACs)"
        )

    def save(self, path: str | Path) -> Path:
        """Write both networks as ONNX and `cascade.json`: a folder for `CascadeModel`, which needs no PyTorch.

        Raises:
            ExportError: a network cannot be exported.
        """
        from trimtab.deploy.to_onnx import export

        path = Path(path)
        members = []
        for name, one in zip(FILES, (self.first, self.second)):
            if isinstance(one.source, Path):
                raw = one.source.read_bytes()
            else:
                with tempfile.TemporaryDirectory() as folder:
                    made = export(one.source, Path(folder) / name, data=self.data, exporter="classic", limit=64)
                    raw = made.path.read_bytes()
            write_bytes(path / name, raw)
            sha, cost = hashlib.sha256(raw).hexdigest(), one.cost
            members.append(
                Member(
                    name=one.name, sha256=sha, macs=cost.macs or 0, params=cost.params or 0, joules=cost.energy or 0.0
                )
            )
        text = dump(self.data.spec, self.data.class_names, self.gate, members, dict(self.figures))
        write_text(path / CASCADE, text)
        return path


def dual_cnn(
    models: Mapping[str, nn.Module | str | Path],
    data: Data,
    *,
    score: str = "difference",
    post_check: bool = False,
    metric: str = "paper",
    tolerance: float = 0.002,
    calibrate: bool = False,
    budget: str | None = None,
    split: str = "val",
    limit: int | None = None,
) -> Pair:
    """Choose two of a pool of trained networks, and the threshold of the first's confidence.

    Args:
        models: at least two, by name: networks, or .onnx files that trimtab exported.
        data: its validation images decide.
        score: of confidence, see `cascade.confidence`.
        post_check: when both have answered, the surer counts; without it the second.
        metric: of complementarity, "paper" or "script".
        tolerance: accuracy that may be given up for calling the second network less.
        calibrate: divide logits by temperatures fitted on the validation images, so that confidences compare.
        budget: bounds on what both networks hold and cost together, such as "params<=1M, macs<=120M".
        split, limit: the images that decide: so many of this split.

    Raises:
        ValueError: arguments that make no sense.
        BudgetError: no pair is inside the budget.
        DataError: there are no such images.

    >>> import trimtab as tt
    >>> data = tt.load_data("digits")
    >>> shape = {"num_classes": 10, "in_chans": 1, "img_size": 8}
    >>> tt.deploy.dual_cnn({name: tt.create_model("trim_10k", **shape) for name in "ab"}, data)
    Pair(a, then b for ...
    """
    if len(models) < 2:
        raise ValueError(f"models must be at least two, got {len(models)}")
    for name, value, known in (("score", score, SCORES), ("metric", metric, METRICS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")
    if split not in data.splits:
        raise DataError(f"split must be one of {', '.join(data.splits)}, got {split!r}")
    labels = np.concatenate([y for _, y in batches(data, split, batch_size=256, limit=limit)])
    pool = [_look(name, model, data, split, limit) for name, model in models.items()]
    pool.sort(key=lambda c: (c.cost.macs or 0, c.cost.params or 0))  # the first of a pair is the cheaper one
    right = {c.name: c.logits.argmax(-1) == labels for c in pool}
    measured = {
        (a.name, b.name): complementarity(right[a.name], right[b.name], metric) for a, b in combinations(pool, 2)
    }
    allowed = [pair for pair in combinations(pool, 2) if _inside(pair, budget)]
    if not allowed:
        raise BudgetError(f"no pair of the {len(pool)} networks is inside {budget}")
    first, second = max(allowed, key=lambda pair: measured[pair[0].name, pair[1].name])
    t = tuple(temperature(c.logits, labels) if calibrate else 1.0 for c in (first, second))
    gate = Gate(score, 0.0, post_check, (t[0], t[1]))
    seen = curve(first.logits, second.logits, labels, gate)
    place = seen.best(tolerance)
    gate = Gate(score, float(seen.thresholds[place]), post_check, gate.temperatures)
    figures = {
        "accuracy": float(seen.accuracy[place]),
        "asked": float(seen.asked[place]),
        "first": float(right[first.name].mean()),
        "second": float(right[second.name].mean()),
        "oracle": float((right[first.name] | right[second.name]).mean()),
        "complementarity": measured[first.name, second.name],
    }
    for name, cost in (("macs", "macs"), ("joules", "energy")):
        figures[name] = getattr(first.cost, cost) + figures["asked"] * getattr(second.cost, cost)
    for name, cost in (("params", "params"), ("bytes", "size")):
        figures[name] = getattr(first.cost, cost) + getattr(second.cost, cost)
    return Pair(first, second, gate, figures, measured, data)


def break_even(first: float, second: float, large: float) -> float:
    """Share of calls of the second network below which a pair costs less than a large network; costs of one image each.

    >>> round(break_even(40.6, 68.9, 125.5), 3)
    1.232
    """
    return (large - first) / second


def compare(
    cascade: CascadeModel, large: OnnxModel, joules: float, images: np.ndarray, *, warmup: int = 25
) -> dict[str, dict[str, Any]]:
    """Time and energy of a stream of prepared images (N, C, H, W), one at a time: the cascade, and one large network.

    Args:
        joules: energy of one image in the large network (of `Cost.energy`, so that it compares).
        warmup: images at the start whose time does not count; they are seen all the same.

    Returns:
        Of "cascade" and "large": `seconds` (mean, median, 95 % and 99 % of an image), `joules` of the stream (an
        estimate from the table in `core.energy`), and `labels`; of "cascade" the `calls` of both networks and `hits`.
    """
    if len(images) <= warmup:
        raise ValueError(f"images must be more than the {warmup} of the warm-up, got {len(images)}")
    before, start = cascade.joules(), list(cascade.calls)
    hits = cascade.cache.hits if cascade.cache else 0
    found: dict[str, dict[str, Any]] = {}
    for name, run in (("cascade", cascade.logits), ("large", large.logits)):
        took, labels = _stream(run, images, warmup)
        found[name] = {"seconds": took, "labels": labels, "joules": joules * len(images)}
    found["cascade"] |= {
        "joules": cascade.joules() - before,
        "calls": [now - then for now, then in zip(cascade.calls, start)],
        "hits": (cascade.cache.hits if cascade.cache else 0) - hits,
    }
    return found


def _stream(run: Any, images: np.ndarray, warmup: int) -> tuple[dict[str, float], np.ndarray]:
    took, labels = [], []
    for i in range(len(images)):
        start = time.perf_counter()
        out = run(images[i : i + 1])
        took.append(time.perf_counter() - start)
        labels.append(int(out.argmax()))
    counted = np.array(took[warmup:])
    seconds = {"mean": counted.mean(), "median": np.median(counted), "p95": np.quantile(counted, 0.95)}
    return {k: float(v) for k, v in seconds.items()} | {"p99": float(np.quantile(counted, 0.99))}, np.array(labels)


def _look(name: str, model: nn.Module | str | Path, data: Data, split: str, limit: int | None) -> Candidate:
    """What a network says, and what it costs."""
    what = ("params", "macs", "size", "energy")
    if isinstance(model, str | Path):
        from trimtab.core.cost import measure_onnx

        file = OnnxModel(model)
        if file.spec.size != data.spec.size:
            raise ValueError(f"{model} takes images {file.spec.size}, the data have {data.spec.size}")
        parts = [file.logits(x) for x, _ in batches(data, split, batch_size=64, limit=limit, spec=file.spec)]
        return Candidate(name, Path(model), measure_onnx(model, what=what), np.concatenate(parts))
    import torch

    from trimtab.core.cost import measure
    from trimtab.learn.evaluate import device_of, evaluating

    home = device_of(model)
    with evaluating(model, home), torch.no_grad():
        parts = [
            model(torch.from_numpy(x).to(home)).float().cpu().numpy()
            for x, _ in batches(data, split, batch_size=256, limit=limit)
        ]
    return Candidate(name, model, measure(model, data.spec.size, what=what), np.concatenate(parts))


def _inside(pair: Sequence[Candidate], budget: str | None) -> bool:
    if budget is None:
        return True
    both = {name: sum(getattr(c.cost, name) or 0 for c in pair) for name in ("params", "macs", "size", "energy")}
    return Budget(budget).check(both).ok


__all__ = ["CARD", "CascadeModel", "Pair", "ResultCache", "dual_cnn"]
callable_package(__name__, "dual_cnn")
