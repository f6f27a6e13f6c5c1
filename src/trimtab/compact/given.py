"""The main job with a model: compress it, by whatever method pays most inside the budget and the time.

Every method gets the same share of the time: it brings the model inside the budget, what comes out learns for a while
from the original, and the file that it would deliver is exported and measured. The best file's method goes on. The
better ones are put on disk as they come.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.compact import finish, ways
from trimtab.compact.deliver import Delivery, as_stored, deliver, tighter
from trimtab.core import artifact
from trimtab.core.budget import Budget
from trimtab.core.cost import Cost, measure
from trimtab.core.errors import BudgetError, TrimtabError
from trimtab.core.log import logger
from trimtab.core.timing import torch_threads
from trimtab.deploy import ExportError
from trimtab.learn import bn_recalibrate, evaluate
from trimtab.learn.distill.kd import KD
from trimtab.models import create_model, load

if TYPE_CHECKING:
    from trimtab.compact.job import Job

log = logger(__name__)

UNTRAINED_SHARE = 0.45  # of the time, to train a given model that has no weights yet, before it is cut
METHODS_SHARE, METHODS_FROM = 0.3, 60.0  # of the time left, for trying them; in jobs with at least so many seconds left
ATTEMPTS = 3  # at bringing the file of a method inside the budget
STEPS, STEPS_FROM = 3, 90.0  # cuts, with training between; in jobs with at least so many seconds left
NORM_BATCHES = 8  # from which statistics of norms are measured anew
JUDGES = 1000  # validation images that say whether a short training did harm
USUAL = "magnitude"


def compress(job: Job) -> tuple[nn.Module, str]:
    """The given model, compressed and trained, and what it is called."""
    assert job.given is not None
    original, trained = _open(job)
    size = (job.data.in_chans, *job.data.size)
    reference = measure(original, size, per_layer=True)
    job.before = finish.layers(reference)
    _time_export(job, original)
    job.budget = (job.asked or Budget("macs<=50%")).resolve(_reference(job, original, reference))
    log.info("budget: %s", job.budget)
    job.find_speed(original)
    if not trained:
        share = UNTRAINED_SHARE * max(job.available(), 1.0)
        original = job.kept("original", lambda: job.train(original, "original", share))
    accuracy = job.journal.once("original accuracy", lambda: evaluate(original, job.data, "val")["accuracy"])
    log.info("%.0f s  the original has validation accuracy %.4f", job.journal.used, accuracy)
    job.tried(job.given, "given", finish.brief(reference, accuracy), 0.0, fits=False)
    method = _choose(job, original)
    if method == USUAL:
        return _in_steps(job, original), job.given
    model = job.train(
        job.reload(f"by {method}"), "final", job.available(), _objective(job, original), tune=True, report=True
    )
    return model, f"{job.given} by {method}"


def _in_steps(job: Job, original: nn.Module) -> nn.Module:
    """Pruned step by step to the budget, with training after each."""
    model = job.kept("start", lambda: copy.deepcopy(original))
    steps = job.journal.once("steps", lambda: STEPS if job.available() > STEPS_FROM else 1)
    for step in range(1, steps + 1):

        def cut_and_train(model: nn.Module = model, step: int = step) -> nn.Module:
            smaller = job.cut(model, _toward(job, original, step / steps))
            left = job.available()
            share = left if step == steps else 0.5 * left / (steps - 1)
            objective = _objective(job, original)
            return job.train(smaller, f"cut {step}", share, objective, tune=True, report=step == steps)

        model = job.kept(f"cut {step}", cut_and_train)
    return model


# ------------------------------------------------------------------------------------------------------------ choosing


def _choose(job: Job, original: nn.Module) -> str:
    """How to compress the given model: by what gives the best file after a short training, measured, not guessed."""

    def candidates() -> list[str]:
        known = job.methods or list(ways.WAYS)
        useful = [m for m in known if ways.of_use(m, original, job.data, job.budget)] or known
        return useful if job.available() > METHODS_FROM else useful[:1]

    found = job.journal.once("methods", candidates)
    if found == [USUAL]:
        return USUAL
    share = job.journal.once("share of a method", lambda: METHODS_SHARE * job.available() / len(found))
    scores = {m: job.journal.once(f"by {m}", lambda m=m: _by(job, m, original, share)) for m in found}  # type: ignore[misc]
    possible = {m: s for m, s in scores.items() if s is not None}
    best = min(possible, key=lambda m: (possible[m]["excess"], -possible[m]["accuracy"]), default=USUAL)
    if best != USUAL and USUAL in found and possible[best]["excess"] > 0:
        best = USUAL  # none is inside the budget yet; this one can be cut further
    log.info("%.0f s  compressing by %s", job.journal.used, best)
    return best


def _by(job: Job, method: str, original: nn.Module, share: float) -> dict[str, float] | None:
    """What the file of the original compressed by `method` is worth after some training; None if it cannot be."""
    start = job.journal.used
    try:
        small = job.kept(f"by {method}", lambda: _learned(job, method, original, start, share))
    except (TrimtabError, ValueError) as e:
        log.info("%.0f s  not by %s: %s", job.journal.used, method, e)
        return None
    small = as_stored(small)
    made = job.delivered(small, "tried", evaluate=True, only=_kind(job))
    cost = measure(small, (job.data.in_chans, *job.data.size), what=("params", "macs"))
    row = finish.brief(cost, made.accuracy) | {"size": made.cost["size"]}
    job.tried(f"{job.given} by {method}", "method", row, job.journal.used - start, fits=not made.excess)
    log.info("%.0f s  %.4f  by %s, %.1f KB, %s", job.journal.used, made.accuracy, method, made.cost["size"] / 1e3,
             made.verdict.explain())  # fmt: skip
    assert made.accuracy is not None
    if not made.excess and made.accuracy > job.journal.steps.get("on disk", -1.0):
        job.publish(small, made, made.accuracy)
    return {"excess": made.excess, "accuracy": made.accuracy}


def _learned(job: Job, method: str, original: nn.Module, start: float, share: float) -> nn.Module:
    """The original inside the budget by a method, trained for the rest of the method's share of the time.

    Statistics of norms are measured anew, before and after: a short training leaves them far behind. What so little
    training makes worse is returned as it was.
    """
    small = _measured_anew(job, _inside(job, method, original, share))
    untrained = copy.deepcopy(small)
    left = max(share - (job.journal.used - start), 0.1 * share)
    trained = _measured_anew(job, job.train(small, f"by {method}", left, _objective(job, original), tune=True))
    few = job.data.subset({"val": min(JUDGES, len(job.data.splits["val"]))}, seed=job.seed)
    return max(trained, untrained, key=lambda m: evaluate(m, few, "val")["accuracy"])


def _measured_anew(job: Job, model: nn.Module) -> nn.Module:
    """The model with running statistics of its batch norms from a few batches, augmented as in training."""
    with torch_threads(job.settings.threads):
        loader = job.data.loader("train", batch_size=job.settings.batch_size, augment="auto", seed=job.seed)
        return bn_recalibrate(model, loader, limit=NORM_BATCHES)


def _inside(job: Job, method: str, original: nn.Module, share: float) -> nn.Module:
    """The original by a method, with a file that keeps the structural bounds as far as the method can do it."""
    way, goal = ways.WAYS[method], _toward(job, original, bits=ways.WAYS[method].bits)
    training: dict[str, Any] = {"seed": job.seed, "progress": False}
    if way.trains:
        epochs = int(way.trains * share * job.settings.speed / len(job.data.splits["train"]))
        if not epochs:
            raise BudgetError("no time for one epoch")
        training |= {"epochs": epochs, "out": job.training(method)}
        training |= {k: getattr(job.settings, k) for k in ("batch_size", "precision", "channels_last")}
        if way.bits < 8:  # rounding takes time, and float32, as in `Settings.recipe`
            training |= {"precision": "fp32", "time_limit": share}
    for attempt in range(1 if way.trains else ATTEMPTS):
        with torch_threads(job.settings.threads):
            small = ways.bring(method, original, job.data, job.budget, goal, **training)
        stored = as_stored(small)
        made = job.delivered(stored, "tried", evaluate=False, only=_kind(job))
        next_goal = _tighter(made, stored, job, goal, safety=0.02 * (attempt + 1))
        if next_goal is None:
            return small
        goal = next_goal
    if way.bits < 8:
        raise BudgetError(made.verdict.explain())
    return small  # can be cut in the end


def _tighter(made: Delivery, stored: nn.Module, job: Job, goal: Budget, *, safety: float) -> Budget | None:
    """Both bounds of `goal`, as tight as the file that was made asks for; None when it is inside the budget."""
    bounds = tighter(made, stored, job.data, safety=safety)
    if bounds is None:
        return None
    limits = {n: min(v for b in (goal, bounds) if (v := b.limit(n)) is not None) for n in ("params", "macs")
              if n in goal or n in bounds}  # fmt: skip
    return Budget(", ".join(f"{n}<={int(v)}" for n, v in limits.items()))


def _toward(job: Job, original: nn.Module, fraction: float = 1.0, *, bits: float = 8) -> Budget:
    """Bounds on parameters and MACs a `fraction` of the way (geometrically) from the original to the budget.

    Args:
        bits: of a stored weight: how many weights a bound on bytes leaves.
    """
    now = measure(original, (job.data.in_chans, *job.data.size), what=("params", "macs")).asdict()
    goal = {"params": float(now["params"]), "macs": float(now["macs"])}
    for c in job.budget.clauses:
        if c.op == "<=" and c.name in goal:
            goal[c.name] = min(goal[c.name], c.limit)
        elif c.op == "<=" and c.name == "size":
            goal["params"] = min(goal["params"], ways.room(original, job.data, job.budget, bits=bits))
        elif c.op == "<=" and c.name in ("latency", "energy", "memory", "activations"):
            reference = job.journal.steps.get("reference", {}).get(c.name)
            if reference:
                goal["macs"] = min(goal["macs"], now["macs"] * c.limit / reference)
    steps = [f"{k}<={now[k] * (goal[k] / now[k]) ** fraction:.0f}" for k in goal if goal[k] < now[k]]
    return Budget(", ".join(steps) or f"params<={now['params']}")


def _objective(job: Job, original: nn.Module) -> KD | None:
    return KD(original) if job.uses("distillation", True) else None


def _kind(job: Job) -> str:
    """Of the files by which methods are compared: one is enough."""
    return "int8" if "size" in job.budget else "float"


# ------------------------------------------------------------------------------------------------------ what was given


def _open(job: Job) -> tuple[nn.Module, bool]:
    """The model, and whether it has learned already."""
    assert job.given is not None
    if not (Path(job.given) / artifact.MANIFEST).is_file():
        torch.manual_seed(job.seed)
        made = create_model(
            job.given, num_classes=job.data.num_classes, in_chans=job.data.in_chans, img_size=job.data.size
        )
        return made, False
    manifest = artifact.read_manifest(job.given)
    if manifest.base is None:
        raise ValueError(f"{job.given}: a model whose class is not in the registry cannot be made again in a job")
    model, labels = load(job.given), manifest.labels
    if labels is not None and labels == job.data.class_names:
        return model, True
    with torch.no_grad():
        classes = model(torch.zeros(1, job.data.in_chans, *job.data.size)).shape[1]
    if classes == job.data.num_classes and labels is None:
        return model, True
    raise ValueError(
        f"{job.given} was made for {classes} classes{_named(labels)}, the data has "
        f"{job.data.num_classes}{_named(job.data.class_names)}; train it on this data first (trimtab train)"
    )


def _time_export(job: Job, original: nn.Module) -> None:
    """Which exporter takes the model, the fast one if it can, and how long the end of the job will take with it."""

    def trial(exporter: str) -> None:
        folder, anything = job.work / "reference", Budget("size<=1e30B")
        deliver(original, job.data, anything, folder, only="int8", exporter=exporter)

    def timed() -> list[Any]:
        started = job.journal.used
        try:
            trial("classic")
        except ExportError:
            started = job.journal.used
            trial("auto")
            return ["auto", job.journal.used - started]
        return ["classic", job.journal.used - started]

    job.exporter, took = job.journal.once("exporter", timed)
    # The end exports up to twice, looks at validation data and at test data, and writes the report.
    job.reserve = min(4 * took + 0.01 * job.journal.limit + 2, 0.3 * job.journal.limit)


def _reference(job: Job, original: nn.Module, cost: Cost) -> dict[str, Any]:
    """Costs of the given model that percentages refer to; those of its own file where the budget names them."""
    need = [c.name for c in (job.asked or Budget("macs<=50%")).clauses if c.relative or c.name in ("latency", "energy")]
    if not set(need) - {"params", "macs", "activations"}:
        return cost.asdict()

    def exported() -> dict[str, Any]:
        only = Budget(", ".join(f"{n}<=100%" for n in dict.fromkeys(need)))
        return deliver(original, job.data, only.resolve(dict.fromkeys(need, 1e30)), job.work / "reference",
                       evaluate=False, only="float", exporter=job.exporter)[0].cost  # fmt: skip

    return {**cost.asdict(), **job.journal.once("reference", exported)}


def _named(labels: list[str] | None) -> str:
    return f" ({', '.join(labels[:3])}{', ...' if len(labels) > 3 else ''})" if labels else ""
