"""The main job: what its two forms share.

Without a model it finds one (`found`); with a model it compresses that (`given`). Every step is noted in a journal when
it is done, and every training resumes inside itself, so a killed job goes on when the same command is run again. The
budget is checked on the exported file: what does not fit is pruned until it does.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.compact import finish, found, given, ways
from trimtab.compact.deliver import Delivery, as_stored, deliver, tighter
from trimtab.compact.journal import Journal, seconds
from trimtab.compact.speed import Settings, fastest_settings
from trimtab.core import artifact
from trimtab.core.budget import Budget
from trimtab.core.errors import BudgetError, DataError, SurgeryError
from trimtab.core.log import logger
from trimtab.core.timing import torch_threads
from trimtab.data import Data, load_data
from trimtab.learn import Objective, fit
from trimtab.models import load

log = logger(__name__)

PARTS = ("distillation", "elastic")
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
    methods: Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
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
        methods: by what `model` may be compressed; default: all of `compact.ways.WAYS`.
        parts: which of "distillation" and "elastic" (a supernet around the winner of the search) the job is to use;
            default: those that `benchmarks/main_job.py` showed to pay.

    Returns:
        The run, as written to `run.json`: `run["budget"]["met"]` says whether the delivered file keeps every bound.

    Raises:
        DataError, BudgetError, ValueError: for data, a budget or a choice that cannot be used, before any work.
        TrimtabError: when `out` holds another job.
    """
    with torch.random.fork_rng(devices=[]):
        return Job(data, model, budget, seconds(time), Path(out), seed, fresh, methods, parts).run()


class Job:
    """One run of the main job; `compact` is its only user.

    Attributes:
        given: the name or folder of the model to compress, if any. asked: the budget as it was given, if any.
        budget: absolute bounds, once the plan or the given model has said what they are.
        methods, parts: as in `compact`.
        before: per-layer costs of a given model.
        reserve: seconds for the last export, the test and the report; an estimate until an export was timed.
        exporter: as in `export`.
    """

    budget: Budget

    def __init__(
        self,
        data: str | Data,
        model: str | Path | None,
        budget: str | Budget | None,
        limit: float,
        out: Path,
        seed: int,
        fresh: bool,
        methods: Sequence[str] | None = None,
        parts: Sequence[str] | None = None,
    ):
        self.out, self.work, self.seed = out, out / ".work", seed
        self.asked = Budget(budget) if budget is not None else None
        self.methods = _some_of(methods, tuple(ways.WAYS), "methods")
        self.parts = _some_of(parts, PARTS, "parts")
        if methods is not None and (model is None or not methods):
            raise ValueError("methods are for a model that is given, and at least one of them")
        if out.exists() and not out.is_dir():
            raise ValueError(f"out must be a folder, got the file {out}")
        self.command = {
            "data": str(data) if isinstance(data, str) else data.name, "model": str(model) if model else None,
            "budget": str(self.asked) if self.asked else None, "time": limit, "seed": seed,
            "methods": self.methods, "parts": self.parts,
        }  # fmt: skip
        self.journal = Journal(self.work / "journal.json", self.command, limit, fresh=fresh)
        if fresh and self.work.exists():
            shutil.rmtree(self.work)
        self.given = str(model) if model else None
        self.spec = None
        if self.given and (Path(self.given) / artifact.MANIFEST).is_file():
            self.spec = artifact.read_manifest(self.given).input_spec
        self.data = self._load(data)
        self.before: list[dict[str, Any]] = []
        self.settings = Settings()
        self.reserve = 0.1 * limit
        # The classic exporter is some ten times faster, and knows everything that a search without `model` proposes.
        self.exporter = "classic" if limit < SHORT and not self.given else "auto"

    def run(self) -> dict[str, Any]:
        if self.journal.steps.get("done"):
            log.info("this job is done; its results are in %s (start over with --fresh)", self.out)
            return finish.read(self.out)
        if self.journal.resumed:
            log.info("going on after %.0f s of earlier work", self.journal.used)
        log.info("data: %s", finish.one_line(self.data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model, name = given.compress(self) if self.given else found.find(self)
            run = finish.write(self, *self._last(model), name)
        self.journal.once("done", lambda: True)
        for folder in ("train", "trials", "kept", "export", "renewed"):
            shutil.rmtree(self.work / folder, ignore_errors=True)
        return run

    # ---------------------------------------------------------------------------------------------- what both forms use

    def uses(self, part: str, pays: bool) -> bool:
        """Whether a part of the job is used: where it pays, unless the caller has chosen the parts."""
        return pays if self.parts is None else part in self.parts

    def available(self) -> float:
        """Seconds left for learning: the time limit less what the end will take."""
        return max(self.journal.left - self.reserve, 0.0)

    def find_speed(self, model: nn.Module) -> None:
        """Measure how models like this one train fastest."""
        chosen = self.journal.once("speed", lambda: fastest_settings(model, self.data).to_json())
        self.settings = Settings(**chosen)
        log.info("%.0f s  training runs at about %.0f images/s in %s", self.journal.used, self.settings.speed,
                 self.settings.words)  # fmt: skip

    def train(
        self,
        model: nn.Module,
        key: str,
        limit: float,
        objective: Objective | None = None,
        *,
        tune: bool = False,
        report: bool = False,
    ) -> nn.Module:
        """Train for `limit` seconds; a killed training goes on.

        Args:
            key: names the training in the job's folder.
            tune: the model has learned already: begin with a low learning rate.
            report: this is the long training: put the best so far on disk, and the history into the report.
        """
        saved, wait = self.journal.used, SAVE_EVERY

        def on_epoch(row: dict[str, Any]) -> None:
            nonlocal saved, wait
            self.journal.note()
            accuracy = row.get("val_accuracy") or 0.0
            better = accuracy > self.journal.steps.get("on disk", 0.0)
            if report and better and self.journal.used - saved > wait:
                started = self.journal.used
                self._renew(model, accuracy)
                saved = self.journal.used
                wait = max(SAVE_EVERY, (saved - started) / SAVE_SHARE)

        with torch_threads(self.settings.threads):
            result = fit(
                model, self.data, objective, epochs=None, time_limit=max(limit, 0.5), seed=self.seed,
                out=self.training(key), on_epoch=on_epoch, **self.settings.recipe(model, self.data, tune=tune),
            )  # fmt: skip
        if result.stopped == "interrupted":
            self.journal.note()
            raise KeyboardInterrupt
        if report:
            self.journal.once(f"history {key}", lambda: result.history)
        return result.model

    def cut(self, model: nn.Module, bounds: Budget) -> nn.Module:
        from trimtab.compress import magnitude

        log.info("%.0f s  cutting to %s", self.journal.used, bounds)
        return magnitude(model, self.data, budget=bounds)

    def settle(self, model: nn.Module, *, evaluate: bool) -> tuple[nn.Module, Delivery]:
        """Prune until the exported file keeps every structural bound: the guarantee. Gives what came closest."""
        closest: tuple[nn.Module, Delivery] | None = None
        for attempt in range(6):
            model = as_stored(model)
            best = self.delivered(model, "export", evaluate=evaluate)
            if closest is None or best.excess < closest[1].excess:
                closest = (model, best)
            bounds = tighter(best, model, self.data, safety=0.02 * (attempt + 1))
            if bounds is None or best.kind == "low-bit":
                return closest
            try:
                model = self.cut(model, bounds)
            except (SurgeryError, BudgetError) as e:
                log.warning("cannot be cut further: %s", e)
                return closest
            if evaluate and self.available() > 2:
                model = self.train(model, f"settle {attempt}", 0.5 * self.available(), tune=True)
        assert closest is not None
        return closest

    def delivered(self, model: nn.Module, folder: str, *, evaluate: bool, only: str | None = None) -> Delivery:
        """The better file of a model, as stored: exported and measured."""
        return deliver(
            model, self.data, self.budget, self.work / folder, evaluate=evaluate, only=only, exporter=self.exporter
        )[0]

    # ------------------------------------------------------------------------------------------------- what is on disk

    def kept(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """A model made once; later lives load it."""
        if self.journal.steps.get(f"kept {name}"):
            return self.reload(name)
        model = make()
        artifact.save(model, self._kept_at(name), spec=self.data.spec, labels=self.data.class_names)
        self.journal.once(f"kept {name}", lambda: True)
        return model

    def reload(self, name: str) -> nn.Module:
        """A kept model, as it was kept."""
        return load(self._kept_at(name))

    def training(self, key: str) -> Path:
        """The folder of a training's checkpoint."""
        return self.work / "train" / key.replace(" ", "-")

    def tried(self, name: str, stage: str, row: dict[str, Any], took: float, *, fits: bool) -> None:
        """Note what was tried, once over all lives."""
        rows = self.journal.steps.setdefault("tried", [])
        rows[:] = [r for r in rows if (r["name"], r["stage"]) != (name, stage)]
        rows.append({"name": name, "stage": stage, **row, "seconds": took, "fits": fits, "chosen": False})
        self.journal.note()

    def keep_artifact(self, model: nn.Module, **more: Any) -> None:
        artifact.save(model, self.out, spec=self.data.spec, labels=self.data.class_names, **more)

    def publish(self, model: nn.Module, delivery: Delivery, accuracy: float | None = None) -> None:
        """Make this the best model on disk: the artifact and the ONNX file."""
        self.keep_artifact(model)
        new = self.out / ".model.onnx.new"
        shutil.copyfile(delivery.path, new)
        new.replace(self.out / "model.onnx")
        if not delivery.excess and accuracy is not None:
            self.journal.steps["on disk"] = accuracy
            self.journal.note()

    # ------------------------------------------------------------------------------------------------------ small parts

    def _load(self, data: str | Data) -> Data:
        """Raises DataError, before anything is read or made, for data of another task than classification."""
        tasks = (data.task if isinstance(data, Data) else "classify", self.spec.task if self.spec else "classify")
        if tasks != ("classify", "classify"):
            raise DataError(
                f"compact is for classification, got data for task {tasks[0]!r} and a model for task {tasks[1]!r}; "
                "use train, then compress"
            )
        if isinstance(data, Data):
            loaded = data
        elif self.spec is not None:
            loaded = load_data(
                data, image_size=self.spec.size[1:], in_chans=self.spec.size[0], seed=self.seed, task="classify"
            )
        else:
            loaded = load_data(data, seed=self.seed, task="classify")
        if self.spec is None:
            return loaded
        return Data(loaded.name, loaded.splits, loaded.class_names, mean=self.spec.mean, std=self.spec.std,
                    warnings=loaded.warnings, skipped=loaded.skipped)  # fmt: skip

    def _last(self, model: nn.Module) -> tuple[nn.Module, Delivery]:
        """What is delivered: the model, settled; if its file misses the budget, whatever came closer before."""
        model, delivery = self.settle(model, evaluate=True)
        if delivery.excess and "on disk" in self.journal.steps:
            spare = load(self.out)
            again = self.delivered(spare, "spare", evaluate=True)
            if again.excess < delivery.excess:
                log.warning("%s; an earlier model is delivered", delivery.verdict.explain())
                return spare, again
        return model, delivery

    def _renew(self, model: nn.Module, accuracy: float) -> None:
        """Put a model that is still being trained on disk as the best so far, if its file keeps the budget."""
        now = as_stored(copy.deepcopy(model).eval())
        made = self.delivered(now, "renewed", evaluate=False, only=self.journal.steps.get("kind"))
        if not made.excess:
            self.publish(now, made, accuracy)
            log.info("%.0f s  on disk: validation accuracy %.4f, %.1f KB", self.journal.used, accuracy,
                     made.cost["size"] / 1e3)  # fmt: skip

    def _kept_at(self, name: str) -> Path:
        return self.work / "kept" / name.replace(" ", "-")


def _some_of(chosen: Sequence[str] | None, known: Sequence[str], what: str) -> list[str] | None:
    """The choice as a list. Raises ValueError for names that are not known."""
    if chosen is None:
        return None
    if isinstance(chosen, str) or not set(chosen) <= set(known):
        raise ValueError(f"{what} must be some of {', '.join(known)}, got {chosen!r}")
    return list(chosen)
