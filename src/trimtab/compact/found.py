"""The main job without a model: propose, search, train the winner."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.compact import finish, plan, search
from trimtab.core import artifact
from trimtab.core.budget import Budget
from trimtab.core.cost import measure
from trimtab.core.errors import BudgetError, SurgeryError
from trimtab.core.log import logger
from trimtab.core.timing import torch_threads
from trimtab.learn import evaluate
from trimtab.learn.distill.kd import KD
from trimtab.models import load

if TYPE_CHECKING:
    from trimtab.compact.job import Job

log = logger(__name__)

SEARCH_SHARE = 0.15  # of the time limit, for successive halving
TEACHER_SHARE = 0.3  # of the time left after the search, where a teacher is trained
TEACHER_EPOCHS = 150  # a teacher is worth its time where the student alone could have so many epochs
TEACHER_MACS = 4.0  # how much larger than the student a teacher may be
ELASTIC = False  # whether the job searches a supernet by itself: `benchmarks/main_job.py --parts` measures if it pays
ELASTIC_SHARE = 0.15  # of the time limit, for training and searching the supernet
ELASTIC_MACS = 2.0  # how much larger than the winner its largest network may be
SPACE = {"width": (0.5, 0.625, 0.75, 0.875, 1), "depth": "blocks"}
LOOK = {"images": 1000, "batches": 4}  # validation images, and batches to calibrate with, for each network of it


def find(job: Job) -> tuple[nn.Module, str]:
    """The trained winner, and its name."""
    planned = job.journal.once("plan", lambda: _plan(job))
    job.budget = Budget(planned["budget"])
    candidates = [plan.Candidate.from_json(c) for c in planned["candidates"]]
    log.info("budget: %s; %d candidates", job.budget, len(candidates))
    job.find_speed(candidates[0].build(job.data))
    order = _search(job, candidates)
    winner, model = candidates[order[0]], load(_trial(job, order[0]))
    name = winner.label
    log.info("%.0f s  the winner is %s", job.journal.used, name)
    if job.uses("elastic", ELASTIC):
        model, name = _elastic(job, winner, model)
    interim = _interim(job, model)
    teacher = _teacher(job, winner)
    final = job.train(interim, "final", job.available(), KD(teacher) if teacher is not None else None, report=True)
    return _better(job, final), name


def _plan(job: Job) -> dict[str, Any]:
    budget = job.asked or plan.default_budget(job.data)
    if budget.relative:
        budget.resolve({})  # says which clause has nothing to relate to
    most = int(min(12, max(3, job.journal.limit / 12)))
    return {"budget": str(budget), "candidates": [c.to_json() for c in plan.candidates(job.data, budget, most=most)]}


def _search(job: Job, candidates: list[plan.Candidate]) -> list[int]:
    images = len(job.data.splits["train"])
    share = SEARCH_SHARE * job.journal.limit
    least = search.least_seconds(images, job.settings.speed, share)
    rungs = [search.Rung(int(r[0]), r[1]) for r in job.journal.once(
        "rungs", lambda: [[r.count, r.seconds] for r in search.schedule(share, len(candidates), least=least)]
    )]  # fmt: skip
    log.info("search: %s", search.rungs_text(rungs))

    def train(index: int, rung: int, limit: float) -> float:
        name = f"trial {index} {rung}"
        return job.journal.once(name, lambda: _try(job, candidates[index], index, rung, limit))["val_accuracy"]

    return search.halving(
        [c.label for c in candidates], rungs, train, storage=search.storage(job.work / "optuna.log"),
        seed=job.seed, note=lambda r, label, score: log.info(
            "%.0f s  round %d  %.4f  %s", job.journal.used, r + 1, score, label),
    )  # fmt: skip


def _try(job: Job, candidate: plan.Candidate, index: int, rung: int, limit: float) -> dict[str, Any]:
    start = job.journal.used
    path = _trial(job, index)
    model = load(path) if rung else _build(job, candidate)
    if candidate.cut and rung == 0:
        model = job.train(model, f"trial {index} whole", 0.5 * limit)
        model = job.cut(model, plan.prunable(job.budget, candidate.cost))
        limit *= 0.5
    model = job.train(model, f"trial {index} {rung}", limit)
    accuracy = evaluate(model, job.data, "val")["accuracy"]
    artifact.save(model, path, spec=job.data.spec, labels=job.data.class_names)
    row = _row(job, model, candidate, accuracy)
    job.tried(candidate.label, f"round {rung + 1}", row, job.journal.used - start, fits=True)
    return row


def _elastic(job: Job, winner: plan.Candidate, model: nn.Module) -> tuple[nn.Module, str]:
    """The winner, or a network out of a supernet around it: the better one on validation data."""
    larger = _larger(job, winner, ELASTIC_MACS)
    if larger is None:
        return model, winner.label
    start, name = job.journal.used, f"inside {larger.label}"
    try:
        child = job.kept("elastic", lambda: _child(job, larger))
    except (BudgetError, SurgeryError) as e:
        log.info("%.0f s  no network out of a supernet: %s", job.journal.used, e)
        return model, winner.label
    score = job.journal.once("elastic accuracy", lambda: evaluate(child, job.data, "val")["accuracy"])
    job.tried(name, "elastic", _row(job, child, larger, score), job.journal.used - start, fits=True)
    log.info("%.0f s  %.4f  %s", job.journal.used, score, name)
    return (child, name) if score > evaluate(model, job.data, "val")["accuracy"] else (model, winner.label)


def _child(job: Job, larger: plan.Candidate) -> nn.Module:
    """Train a supernet with BigNAS and take the best network inside the budget out of it."""
    from trimtab.search import bignas

    share, network = ELASTIC_SHARE * job.journal.limit, _build(job, larger)
    bounds = plan.prunable(job.budget, larger.cost)
    with torch_threads(job.settings.threads):
        family = bignas(
            network, job.data, space=SPACE, budget=bounds, time_limit=0.75 * share, seed=job.seed,
            out=job.training("elastic"), **job.settings.recipe(network, job.data),
        )  # fmt: skip
        images = LOOK["images"] + LOOK["batches"] * job.settings.batch_size
        looks = int(0.25 * share * 2 * job.settings.speed / images)  # a forward pass takes less than half of a step
        found = family.search(bounds, evaluations=min(max(looks, 3), 60), seed=job.seed, **LOOK)
        return family.net.take(found, job.data)


def _interim(job: Job, model: nn.Module) -> nn.Module:
    """Cut the winner if its real file is too large, and put it on disk as the best so far."""

    def settle() -> nn.Module:
        started = job.journal.used
        settled, delivery = job.settle(model, evaluate=False)
        job.publish(settled, delivery, evaluate(settled, job.data, "val")["accuracy"])
        job.journal.once("kind", lambda: delivery.kind)
        # The end exports up to twice, looks at validation data and at test data, and writes the report.
        job.journal.once("reserve", lambda: 2.5 * (job.journal.used - started) + 0.01 * job.journal.limit + 2)
        return settled

    settled = job.kept("interim", settle)
    job.reserve = job.journal.steps.get("reserve", job.reserve)
    return settled


def _better(job: Job, final: nn.Module) -> nn.Module:
    """The long training, unless what the search left was better (a long training can be too short, too)."""
    interim = job.reload("interim")
    scores = [evaluate(m, job.data, "val")["accuracy"] for m in (final, interim)]
    return final if scores[0] >= scores[1] else interim


def _teacher(job: Job, winner: plan.Candidate) -> nn.Module | None:
    """A larger relative of the winner, trained, where there is so much time that the student cannot use it all."""
    left = job.available()
    epochs = left * job.settings.speed / len(job.data.splits["train"])
    if not job.journal.once("teacher?", lambda: job.uses("distillation", epochs >= TEACHER_EPOCHS)):
        return None
    larger = _larger(job, winner, TEACHER_MACS)
    if larger is None:
        return None
    teacher = job.kept("teacher", lambda: job.train(_build(job, larger), "teacher", TEACHER_SHARE * left))
    accuracy = job.journal.once("teacher accuracy", lambda: evaluate(teacher, job.data, "val")["accuracy"])
    log.info("%.0f s  the teacher %s has validation accuracy %.4f", job.journal.used, larger.label, accuracy)
    return teacher


def _larger(job: Job, winner: plan.Candidate, times: float) -> plan.Candidate | None:
    """The widest relative of the winner with so many times its MACs; None where the width is not free."""
    if not {"width", "widths"} & set(winner.kwargs):
        return None
    kwargs = {k: v for k, v in winner.kwargs.items() if k not in ("width", "widths")}
    return plan.widest(job.data, Budget(f"macs<={int(times * winner.cost['macs'])}"), winner.name, kwargs)


def _row(job: Job, model: nn.Module, like: plan.Candidate, accuracy: float) -> dict[str, Any]:
    """A row of "tried" before there is a file: its bytes are those of the candidate, by weights."""
    cost = measure(model, (job.data.in_chans, *job.data.size), what=("params", "macs"))
    assert cost.params is not None
    return finish.brief(cost, accuracy) | {"size": like.cost["size"] * cost.params / like.cost["params"]}


def _build(job: Job, candidate: plan.Candidate) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        return candidate.build(job.data)


def _trial(job: Job, index: int) -> Path:
    return job.work / "trials" / str(index)
