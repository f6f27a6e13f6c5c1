"""Successive halving over candidates: short real trainings, the better part goes on, longer.

Optuna keeps the book (a journal file, so that a killed search goes on) and proposes learning rates once the defaults
have been tried. Every training of a rung gets the same time, on the clock: a candidate that trains slowly on this
machine has to be better per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

KEEP = 2.5  # one in so many goes on to the next rung


@dataclass(frozen=True)
class Rung:
    """How many candidates are trained for how many seconds each."""

    count: int
    seconds: float


def schedule(seconds: float, available: int, *, least: float) -> list[Rung]:
    """Rungs that use `seconds` in all, start with as many candidates as get `least` seconds each, and end with two.

    >>> schedule(310, 8, least=20)
    [Rung(count=8, seconds=20), Rung(count=3, seconds=50.0)]
    >>> schedule(10, 8, least=20)
    [Rung(count=1, seconds=10)]
    """
    count = min(available, int(seconds // least))
    while count > 1:
        counts = [count]
        while counts[-1] > 3:
            counts.append(max(2, round(counts[-1] / KEEP)))
        first = count * least
        if len(counts) == 1:
            return [Rung(count, seconds / count)]
        rest = (seconds - first) / (len(counts) - 1)
        if rest / counts[1] >= 1.2 * least:
            return [Rung(count, least), *(Rung(n, rest / n) for n in counts[1:])]
        count -= 1
    return [Rung(1, seconds)]


def halving(
    labels: list[str],
    rungs: list[Rung],
    train: Callable[[int, int, float], float],
    *,
    storage: Any,
    seed: int,
    note: Callable[[int, str, float], None] = lambda rung, label, score: None,
) -> list[int]:
    """Run the rungs; `train(index, rung, seconds)` trains candidate `index` on and gives its score (higher is better).

    Returns:
        The indices of the candidates, best first: those of the last rung by their last score, then the earlier ones.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="compact", storage=storage, direction="maximize", load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=seed),
    )  # fmt: skip
    trials = {t.user_attrs["label"]: t for t in study.get_trials(deepcopy=True) if "label" in t.user_attrs}
    scores: dict[int, list[float]] = {}
    alive = list(range(min(rungs[0].count, len(labels))))
    handles: dict[int, optuna.trial.Trial] = {}
    for r, rung in enumerate(rungs):
        alive = alive[: rung.count]
        for i in alive:
            old = trials.get(labels[i])
            if old is not None and r in old.intermediate_values:
                score = old.intermediate_values[r]
            else:
                if i not in handles:
                    handles[i] = _handle(study, labels[i], i, old)
                score = train(i, r, rung.seconds)
                handles[i].report(score, r)
            scores.setdefault(i, []).append(score)
            note(r, labels[i], score)
        alive.sort(key=lambda i: -scores[i][-1])
    for i, handle in handles.items():
        done = len(scores[i]) == len(rungs)
        if study.get_trials(deepcopy=False)[handle.number].state == optuna.trial.TrialState.RUNNING:
            study.tell(handle, scores[i][-1] if done else None,
                       state=optuna.trial.TrialState.COMPLETE if done else optuna.trial.TrialState.PRUNED)  # fmt: skip
    return sorted(scores, key=lambda i: (-len(scores[i]), -scores[i][-1]))


def _handle(study: optuna.Study, label: str, index: int, old: Any) -> optuna.trial.Trial:
    """The running trial of a candidate: the one of an earlier life, or a new one."""
    if old is not None and old.state == optuna.trial.TrialState.RUNNING:
        return optuna.trial.Trial(study, old._trial_id)
    study.enqueue_trial({"candidate": index})
    trial = study.ask({"candidate": optuna.distributions.CategoricalDistribution(list(range(64)))})
    trial.set_user_attr("label", label)
    return trial


def least_seconds(images: int, speed: float, budget: float) -> float:
    """The shortest useful training: an epoch at `speed` images/s, within 2 % and 12 % of `budget` seconds."""
    return min(max(images / max(speed, 1.0), 0.02 * budget, 1.0), max(0.12 * budget, 1.0))


def storage(path: Path) -> Any:
    """Optuna's book in a plain journal file."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def rungs_text(rungs: list[Rung]) -> str:
    """For the log: `8 x 20 s, then 3 x 47 s`."""
    return ", then ".join(f"{r.count} x {math.ceil(r.seconds)} s" for r in rungs)
