"""The main job, step by step: inspect the data, propose, search, train, cut, export, report.

Every step is noted in a journal when it is done, and every training resumes inside itself, so a killed job goes on when
the same command is run again. The budget is checked on the exported file: what does not fit is pruned until it does.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.compact import finish, plan, search
from trimtab.compact.deliver import Delivery, deliver
from trimtab.compact.journal import Journal, seconds
from trimtab.compact.speed import Settings, fastest_settings
from trimtab.compress import methods
from trimtab.core import artifact
from trimtab.core.budget import Budget
from trimtab.core.cost import measure
from trimtab.core.errors import BudgetError, SurgeryError, TrimtabError
from trimtab.core.log import logger
from trimtab.core.timing import torch_threads
from trimtab.data import Data, load_data
from trimtab.learn import evaluate, fit
from trimtab.learn.distill.kd import KD
from trimtab.models import create_model, load

log = logger(__name__)

SEARCH_SHARE = 0.15  # of the time limit, for successive halving
TEACHER_SHARE = 0.3  # of the time left after the search, where a teacher is trained
TEACHER_EPOCHS = 150  # a teacher is worth its time where the student alone could have so many epochs
TEACHER_MACS = 4.0  # how much larger than the student a teacher may be
UNTRAINED_SHARE = 0.45  # of the time, to train a given model that has no weights yet, before it is cut
# What a given model is compressed by, each tried where time allows; and the share of that time that a method trains by
# itself, as OTOv2 has to.
METHODS = {"magnitude": 0.0, "otov2": 0.7, "tucker": 0.0, "compactifai": 0.0}
METHODS_SHARE, METHODS_FROM = 0.2, 60.0  # of the time left, for trying them; in jobs with at least so many seconds left
SHORT = 120.0  # seconds: in shorter jobs, what the exporter takes counts
SAVE_EVERY = 60.0  # seconds, at least, until the best model so far is put on disk again during the long training
SAVE_SHARE = 0.03  # of the long training, at most, for that


def compact(
    data: str | Data = "digits",
    *,
    model: str | Path | None = None,
    budget: str | Budget | None = None,
    time: str | float = "60s",
    out: str | Path = "trimtab-out",
    seed: int = 0,
    fresh: bool = False,
) -> dict[str, Any]:
    """Find, train and export the best compact model for some data inside a budget.

    Killed at any moment, the same call goes on where it was. The test split is used once, at the end.

    Args:
        data: what `load_data` takes: "digits", a folder of class folders, a zip, parquet, a hub name.
        model: compress this model (a registry name, or an artifact with weights) instead of searching for one.
        budget: bounds such as "size<=96KB, macs<=12.5M"; percentages are of `model`. Default: `plan.default_budget`,
            or macs<=50% where a model is given.
        time: the time limit, such as "60s", "25m", "2h"; kept within a few percent.
        out: the folder for the artifact (`tt.load(out)`), `model.onnx`, `report.html`, `README.md` and `run.json`.
        fresh: start over instead of going on with what `out` holds.

    Returns:
        The run, as written to `run.json`: `run["budget"]["met"]` says whether the delivered file keeps every bound.

    Raises:
        DataError, BudgetError: for data or a budget that cannot be used, before any work.
        TrimtabError: when `out` holds another job.
    """
    with torch.random.fork_rng(devices=[]):
        return Job(data, model, budget, seconds(time), Path(out), seed, fresh).run()


class Job:
    """One run of the main job; `compact` is its only user."""

    def __init__(
        self,
        data: str | Data,
        model: str | Path | None,
        budget: str | Budget | None,
        limit: float,
        out: Path,
        seed: int,
        fresh: bool,
    ):
        self.out, self.work, self.seed = out, out / ".work", seed
        self.asked = Budget(budget) if budget is not None else None
        if out.exists() and not out.is_dir():
            raise ValueError(f"out must be a folder, got the file {out}")
        what = {"data": str(data) if isinstance(data, str) else data.name, "model": str(model) if model else None,
                "budget": str(self.asked) if self.asked else None, "time": limit, "seed": seed}  # fmt: skip
        self.journal = Journal(self.work / "journal.json", what, limit, fresh=fresh)
        if fresh and self.work.exists():
            shutil.rmtree(self.work)
        self.given = str(model) if model else None
        self.spec = None
        if self.given and (Path(self.given) / artifact.MANIFEST).is_file():
            self.spec = artifact.read_manifest(self.given).input_spec
        self.data = self._load(data)
        self.before: list[dict[str, Any]] = []
        self.settings = Settings()
        self.reserve = 0.1 * limit  # for export and report, until one was timed
        self.command = what
        # The classic exporter is some ten times faster, and knows everything that a search without `model` proposes.
        self.exporter = "classic" if limit < SHORT and not self.given else "auto"

    # ------------------------------------------------------------------------------------------------------- the steps

    def run(self) -> dict[str, Any]:
        done = self.journal.steps.get("done")
        if done:
            log.info("this job is done; its results are in %s (start over with --fresh)", self.out)
            return finish.read(self.out)
        if self.journal.resumed:
            log.info("going on after %.0f s of earlier work", self.journal.used)
        log.info("data: %s", finish.one_line(self.data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model, name = self._given_model() if self.given else self._found_model()
            best = self._settle(model, evaluate_=True)
            run = finish.write(self, best[0], best[1], name)
        self.journal.once("done", lambda: True)
        for folder in ("train", "trials", "kept", "export", "renewed"):
            shutil.rmtree(self.work / folder, ignore_errors=True)
        return run

    def _found_model(self) -> tuple[nn.Module, str]:
        """Search, then train the winner."""
        planned = self.journal.once("plan", self._plan)
        self.budget = Budget(planned["budget"])
        candidates = [plan.Candidate.from_json(c) for c in planned["candidates"]]
        log.info("budget: %s; %d candidates", self.budget, len(candidates))
        self._speed(candidates[0].build(self.data))
        order = self._search(candidates)
        winner = candidates[order[0]]
        model = load(self._trial(order[0]))
        log.info("%.0f s  the winner is %s", self.journal.used, winner.label)
        interim = self._interim(model)
        teacher = self._teacher(winner)
        objective = KD(teacher) if teacher is not None else None
        model = self._better(self._train(interim, "final", self._available(), objective, report=True))
        return model, winner.label

    def _given_model(self) -> tuple[nn.Module, str]:
        """Train the given model if it has no weights, then cut it in steps, the original teaching."""
        original, trained = self._open_given()
        size = (self.data.in_chans, *self.data.size)
        reference = measure(original, size, per_layer=True)
        self.before = finish.layers(reference)
        self.budget = (self.asked or Budget("macs<=50%")).resolve(self._reference(original, reference))
        log.info("budget: %s", self.budget)
        self._speed(original)
        if not trained:
            share = UNTRAINED_SHARE * max(self._available(), 1.0)
            original = self._kept("original", lambda: self._train(original, "original", share))
        accuracy = self.journal.once("original accuracy", lambda: evaluate(original, self.data, "val")["accuracy"])
        log.info("%.0f s  the original has validation accuracy %.4f", self.journal.used, accuracy)
        self._tried(self.given or "", "given", finish.brief(reference, accuracy), 0.0, fits=False)
        method = self._method(original)
        if method != "magnitude":
            model = self._copy_from(self._kept_at(f"by {method}"))
            model = self._train(model, "final", self._available(), KD(original), report=True)
            return model, f"{self.given} by {method}"
        model = self._kept("start", lambda: copy.deepcopy(original))
        steps = 3 if self._available() > 90 else 1
        for step in range(1, steps + 1):

            def cut_and_train(model: nn.Module = model, step: int = step) -> nn.Module:
                smaller = self._cut(model, self._toward(original, step / steps))
                left = self._available()
                share = left if step == steps else 0.5 * left / (steps - 1)
                return self._train(smaller, f"cut {step}", share, KD(original), report=step == steps)

            model = self._kept(f"cut {step}", cut_and_train)
        return model, self.given or ""

    def _method(self, original: nn.Module) -> str:
        """How to compress the given model: what learns best in a short training after it, measured, not guessed."""
        found = self.journal.once("methods", lambda: list(METHODS) if self._available() > METHODS_FROM else [])
        if not found:
            return "magnitude"
        share = self.journal.once("share of a method", lambda: METHODS_SHARE * self._available() / len(found))
        goal = self._toward(original, 1.0)
        scores = {m: self.journal.once(f"by {m}", lambda m=m: self._by(m, original, goal, share)) for m in found}  # type: ignore[misc]
        best = max(found, key=lambda m: scores[m])
        log.info("%.0f s  compressing by %s", self.journal.used, best)
        return best

    def _by(self, method: str, original: nn.Module, goal: Budget, share: float) -> float:
        """Validation accuracy of the original compressed by `method` and trained for a while; -1 if it cannot be."""
        start = self.journal.used
        epochs = int(METHODS[method] * share * self.settings.speed / len(self.data.splits["train"]))
        if METHODS[method] and not epochs:
            log.info("%.0f s  not by %s: no time for one epoch", start, method)
            return -1.0
        options = {"epochs": epochs, "seed": self.seed, "progress": False}
        if epochs:
            options |= {k: getattr(self.settings, k) for k in ("batch_size", "precision", "channels_last")}
        options = {k: v for k, v in options.items() if k in methods.parameters(method)}
        try:
            with torch_threads(self.settings.threads):
                small = methods.run(method, original, self.data, budget=goal, **options)
        except (TrimtabError, ValueError) as e:
            log.info("%.0f s  not by %s: %s", self.journal.used, method, e)
            return -1.0
        left = max(share - (self.journal.used - start), 0.0) if epochs else share
        small = self._kept(f"by {method}", lambda: self._train(small, f"by {method}", left, KD(original)))
        accuracy = evaluate(small, self.data, "val")["accuracy"]
        cost = measure(small, (self.data.in_chans, *self.data.size), what=("params", "macs", "size"))
        self._tried(f"{self.given} by {method}", "method", finish.brief(cost, accuracy), self.journal.used - start,
                    fits=goal.check(cost.asdict(), partial=True).ok)  # fmt: skip
        log.info("%.0f s  %.4f  by %s", self.journal.used, accuracy, method)
        return accuracy

    # ------------------------------------------------------------------------------------------------------ their parts

    def _load(self, data: str | Data) -> Data:
        if isinstance(data, Data):
            loaded = data
        elif self.spec is not None:
            loaded = load_data(data, image_size=(self.spec.size[1], self.spec.size[2]), in_chans=self.spec.size[0], seed=self.seed)
        else:
            loaded = load_data(data, seed=self.seed)
        if self.spec is None:
            return loaded
        return Data(loaded.name, loaded.splits, loaded.class_names, mean=self.spec.mean, std=self.spec.std,
                    warnings=loaded.warnings, skipped=loaded.skipped)  # fmt: skip

    def _plan(self) -> dict[str, Any]:
        budget = self.asked or plan.default_budget(self.data)
        if budget.relative:
            budget.resolve({})  # says which clause has nothing to relate to
        most = int(min(12, max(3, self.journal.limit / 12)))
        found = plan.candidates(self.data, budget, most=most)
        return {"budget": str(budget), "candidates": [c.to_json() for c in found]}

    def _speed(self, model: nn.Module) -> None:
        chosen = self.journal.once("speed", lambda: fastest_settings(model, self.data).to_json())
        self.settings = Settings(**chosen)
        log.info("%.0f s  training runs at about %.0f images/s in %s", self.journal.used, self.settings.speed,
                 self.settings.words)  # fmt: skip

    def _search(self, candidates: list[plan.Candidate]) -> list[int]:
        images = len(self.data.splits["train"])
        share = SEARCH_SHARE * self.journal.limit
        least = search.least_seconds(images, self.settings.speed, share)
        rungs = [search.Rung(int(r[0]), r[1]) for r in self.journal.once(
            "rungs", lambda: [[r.count, r.seconds] for r in search.schedule(share, len(candidates), least=least)]
        )]  # fmt: skip
        log.info("search: %s", search.rungs_text(rungs))

        def train(index: int, rung: int, limit: float) -> float:
            name = f"trial {index} {rung}"
            return self.journal.once(name, lambda: self._try(candidates[index], index, rung, limit))["val_accuracy"]

        return search.halving(
            [c.label for c in candidates], rungs, train, storage=search.storage(self.work / "optuna.log"),
            seed=self.seed, note=lambda r, label, score: log.info(
                "%.0f s  round %d  %.4f  %s", self.journal.used, r + 1, score, label),
        )  # fmt: skip

    def _try(self, candidate: plan.Candidate, index: int, rung: int, limit: float) -> dict[str, Any]:
        start = self.journal.used
        path = self._trial(index)
        model = load(path) if rung else self._build(candidate)
        if candidate.cut and rung == 0:
            model = self._train(model, f"trial {index} whole", 0.5 * limit)
            model = self._cut(model, plan.prunable(self.budget, candidate.cost))
            limit *= 0.5
        model = self._train(model, f"trial {index} {rung}", limit)
        accuracy = evaluate(model, self.data, "val")["accuracy"]
        artifact.save(model, path, spec=self.data.spec, labels=self.data.class_names)
        cost = measure(model, (self.data.in_chans, *self.data.size), what=("params", "macs"))
        assert cost.params is not None
        row = finish.brief(cost, accuracy) | {"size": candidate.cost["size"] * cost.params / candidate.cost["params"]}
        self._tried(candidate.label, f"round {rung + 1}", row, self.journal.used - start, fits=True)
        return row

    def _interim(self, model: nn.Module) -> nn.Module:
        """Cut the winner if its real file is too large, and put it on disk as the best so far."""

        def settle() -> nn.Module:
            started = self.journal.used
            settled, delivery = self._settle(model, evaluate_=False)
            self.publish(settled, delivery)
            self.journal.once("kind", lambda: "int8" if delivery.int8 else "float")
            # The end exports up to twice, looks at validation data and at test data, and writes the report.
            self.journal.once("reserve", lambda: 2.5 * (self.journal.used - started) + 0.01 * self.journal.limit + 2)
            return settled

        settled = self._kept("interim", settle)
        self.reserve = self.journal.steps.get("reserve", self.reserve)
        return settled

    def _better(self, final: nn.Module) -> nn.Module:
        """The long training, unless what the search left was better (a long training can be too short, too)."""
        interim = self._copy_from(self._kept_at("interim"))
        scores = [evaluate(m, self.data, "val")["accuracy"] for m in (final, interim)]
        return final if scores[0] >= scores[1] else interim

    def _teacher(self, winner: plan.Candidate) -> nn.Module | None:
        """A larger relative of the winner, trained, where there is so much time that the student cannot use it all."""
        left = self._available()
        epochs = left * self.settings.speed / len(self.data.splits["train"])
        if self.journal.once("teacher?", lambda: epochs >= TEACHER_EPOCHS and "width" in winner.kwargs) is not True:
            return None
        bound = Budget(f"macs<={int(TEACHER_MACS * winner.cost['macs'])}")
        kwargs = {k: v for k, v in winner.kwargs.items() if k not in ("width", "widths")}
        larger = plan.widest(self.data, bound, winner.name, kwargs)
        if larger is None:
            return None
        share = TEACHER_SHARE * left
        teacher = self._kept("teacher", lambda: self._train(self._build(larger), "teacher", share))
        accuracy = self.journal.once("teacher accuracy", lambda: evaluate(teacher, self.data, "val")["accuracy"])
        log.info("%.0f s  the teacher %s has validation accuracy %.4f", self.journal.used, larger.label, accuracy)
        return teacher

    def _settle(self, model: nn.Module, *, evaluate_: bool) -> tuple[nn.Module, Delivery]:
        """Prune until the exported file keeps every structural bound: the guarantee."""
        closest: tuple[nn.Module, Delivery] | None = None
        for attempt in range(6):
            made = deliver(
                model, self.data, self.budget, self.work / "export", evaluate=evaluate_, exporter=self.exporter
            )
            best = made[0]
            if closest is None or best.verdict.excess < closest[1].verdict.excess:
                closest = (model, best)
            bounds = _tighter(best, model, self.data, safety=0.02 * (attempt + 1))
            if bounds is None:
                return closest
            try:
                model = self._cut(model, bounds)
            except (SurgeryError, BudgetError) as e:
                log.warning("cannot be cut further: %s", e)
                return closest
            if evaluate_ and self._available() > 2:
                model = self._train(model, f"settle {attempt}", 0.5 * self._available())
        assert closest is not None
        return closest

    def _cut(self, model: nn.Module, bounds: Budget) -> nn.Module:
        from trimtab.compress import magnitude

        log.info("%.0f s  cutting to %s", self.journal.used, bounds)
        return magnitude(model, self.data, budget=bounds)

    def _toward(self, original: nn.Module, fraction: float) -> Budget:
        """Bounds on parameters and MACs a `fraction` of the way (geometrically) from the original to the budget."""
        now = measure(original, (self.data.in_chans, *self.data.size), what=("params", "macs")).asdict()
        goal = {"params": float(now["params"]), "macs": float(now["macs"])}
        for c in self.budget.clauses:
            if c.op == "<=" and c.name in goal:
                goal[c.name] = min(goal[c.name], c.limit)
            elif c.op == "<=" and c.name == "size":  # 8-bit weights, and a little for the rest of the file
                goal["params"] = min(goal["params"], 0.92 * c.limit)
            elif c.op == "<=" and c.name in ("latency", "energy", "memory", "activations"):
                reference = self.journal.steps.get("reference", {}).get(c.name)
                if reference:
                    goal["macs"] = min(goal["macs"], now["macs"] * c.limit / reference)
        steps = [f"{k}<={now[k] * (goal[k] / now[k]) ** fraction:.0f}" for k in goal if goal[k] < now[k]]
        return Budget(", ".join(steps) or f"params<={now['params']}")

    def _reference(self, original: nn.Module, cost: Any) -> dict[str, Any]:
        """Costs of the given model that percentages refer to; those of its own file where the budget names them."""
        need = [
            c.name for c in (self.asked or Budget("macs<=50%")).clauses if c.relative or c.name in ("latency", "energy")
        ]
        if not set(need) - {"params", "macs", "activations"}:
            return cost.asdict()

        def exported() -> dict[str, Any]:
            only = Budget(", ".join(f"{n}<=100%" for n in dict.fromkeys(need)))
            return deliver(original, self.data, only.resolve(dict.fromkeys(need, 1e30)), self.work / "reference",
                           evaluate=False, only="float")[0].cost  # fmt: skip

        return {**cost.asdict(), **self.journal.once("reference", exported)}

    def _open_given(self) -> tuple[nn.Module, bool]:
        assert self.given is not None
        if self.spec is None and not (Path(self.given) / artifact.MANIFEST).is_file():
            torch.manual_seed(self.seed)
            made = create_model(
                self.given, num_classes=self.data.num_classes, in_chans=self.data.in_chans, img_size=self.data.size
            )
            return made, False
        model = load(self.given)
        labels = artifact.read_manifest(self.given).labels
        if labels is not None and labels == self.data.class_names:
            return model, True
        with torch.no_grad():
            classes = model(torch.zeros(1, self.data.in_chans, *self.data.size)).shape[1]
        if classes == self.data.num_classes and labels is None:
            return model, True
        raise ValueError(
            f"{self.given} was made for {classes} classes{_named(labels)}, the data has "
            f"{self.data.num_classes}{_named(self.data.class_names)}; train it on this data first (trimtab train)"
        )

    def _build(self, candidate: plan.Candidate) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return candidate.build(self.data)

    def _train(
        self, model: nn.Module, key: str, limit: float, objective: Any = None, *, report: bool = False
    ) -> nn.Module:
        """Train for `limit` seconds; a killed training goes on. With `report` its history goes into the report."""
        best, saved, wait = 0.0, self.journal.used, SAVE_EVERY

        def on_epoch(row: dict[str, Any]) -> None:
            nonlocal best, saved, wait
            self.journal.note()
            accuracy = row.get("val_accuracy") or 0.0
            if report and accuracy > best and self.journal.used - saved > wait:
                best, started = accuracy, self.journal.used
                self._renew(model, accuracy)
                saved = self.journal.used
                wait = max(SAVE_EVERY, (saved - started) / SAVE_SHARE)

        with torch_threads(self.settings.threads):
            result = fit(
                model, self.data, objective, epochs=None, time_limit=max(limit, 0.5), seed=self.seed,
                out=self.work / "train" / key.replace(" ", "-"), on_epoch=on_epoch,
                **self.settings.recipe(model, self.data),
            )  # fmt: skip
        if result.stopped == "interrupted":
            self.journal.note()
            raise KeyboardInterrupt
        if report:
            self.journal.once(f"history {key}", lambda: result.history)
        return result.model

    def _renew(self, model: nn.Module, accuracy: float) -> None:
        """Put a model that is still being trained on disk as the best so far, if its file keeps the budget."""
        now, only = copy.deepcopy(model).eval(), self.journal.steps.get("kind")
        made = deliver(
            now, self.data, self.budget, self.work / "renewed", evaluate=False, only=only, exporter=self.exporter
        )
        if made[0].verdict.ok:
            self.publish(now, made[0])
            log.info("%.0f s  on disk: validation accuracy %.4f, %.1f KB", self.journal.used, accuracy,
                     made[0].cost["size"] / 1e3)  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ small parts

    def _available(self) -> float:
        """Seconds left for learning: the time limit less what the end will take."""
        return max(self.journal.left - self.reserve, 0.0)

    def _trial(self, index: int) -> Path:
        return self.work / "trials" / str(index)

    def _kept_at(self, name: str) -> Path:
        return self.work / "kept" / name.replace(" ", "-")

    def _kept(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """A model made once; later lives load it."""
        path = self._kept_at(name)
        if self.journal.steps.get(f"kept {name}"):
            return self._copy_from(path)
        model = make()
        artifact.save(model, path, spec=self.data.spec, labels=self.data.class_names)
        self.journal.once(f"kept {name}", lambda: True)
        return model

    def _copy_from(self, path: Path) -> nn.Module:
        if artifact.read_manifest(path).base is not None:
            return load(path)
        raise ValueError(f"{path}: a model that is not in the registry cannot be resumed; run with fresh=True")

    def _tried(self, name: str, stage: str, row: dict[str, Any], took: float, *, fits: bool) -> None:
        rows = self.journal.steps.setdefault("tried", [])
        rows.append({"name": name, "stage": stage, **row, "seconds": took, "fits": fits, "chosen": False})
        self.journal.note()

    def keep_artifact(self, model: nn.Module, **more: Any) -> None:
        artifact.save(model, self.out, spec=self.data.spec, labels=self.data.class_names, **more)

    def publish(self, model: nn.Module, delivery: Delivery) -> None:
        """Make this the best model on disk: the artifact and the ONNX file."""
        self.keep_artifact(model)
        new = self.out / ".model.onnx.new"
        shutil.copyfile(delivery.path, new)
        new.replace(self.out / "model.onnx")


def _tighter(best: Delivery, model: nn.Module, data: Data, *, safety: float) -> Budget | None:
    """Bounds on parameters and MACs that should bring a file inside its budget; None when cutting cannot help."""
    rows = [r for r in best.verdict.rows if not r.ok and r.op == "<=" and r.value is not None]
    if not rows:
        return None
    now = measure(model, (data.in_chans, *data.size), what=("params", "macs"))
    assert now.params is not None and now.macs is not None
    params, macs = float(now.params), float(now.macs)
    for r in rows:
        assert r.value is not None
        ratio = r.limit / r.value * (1 - safety)
        if r.name == "size":
            per_weight = 1 if best.int8 else 4
            params = min(params, max(now.params - (r.value - r.limit * (1 - safety)) / per_weight, 0.05 * now.params))
        elif r.name == "params":
            params = min(params, now.params * ratio)
        else:
            macs = min(macs, now.macs * ratio)
    clauses = [f"{n}<={int(v)}" for n, v, was in (("params", params, now.params), ("macs", macs, now.macs)) if v < was]
    return Budget(", ".join(clauses)) if clauses else None


def _named(labels: list[str] | None) -> str:
    return f" ({', '.join(labels[:3])}{', ...' if len(labels) > 3 else ''})" if labels else ""
