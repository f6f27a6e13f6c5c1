"""Recipes: phases of learning and surgery written in YAML, run in order, each resumable.

    data: digits                       # or {spec: street/, task: segment, void: 11}
    model: {name: trim_10k}            # or {load: path/to/artifact}
    out: runs/digits
    phases:
      - train: {epochs: 20, lr: 0.2}
        as: big                        # a name for the model after this phase
      - compress: {method: magnitude, budget: "macs<=50%"}  # or: search: {method: bignas, budget: "macs<=50%"}
                                                            # or: adapt: {method: nmc, tasks: 5}
                                                            # or: curate: {method: concept_pruning, keep: 50%}
      - train: {objective: {kd: {teacher: big}}, epochs: 10}
      - export: {int8: true}  # or {memory: 256KB}, run in patches; or {second: big}, asked when in doubt
    budget: "size<=20KB"               # checked on the exported file
    label_sets: {sets: labels.json}    # optional, all valid labels of test images: the result has accuracies on them

A phase that is done is not done again; a training that was killed goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from trimtab import deploy
from trimtab.compact import searched
from trimtab.compact.deliver import measured
from trimtab.compact.journal import Journal
from trimtab.compress import methods
from trimtab.core import artifact, options
from trimtab.core.budget import Budget
from trimtab.core.errors import TrimtabError
from trimtab.core.files import write_text
from trimtab.core.log import logger
from trimtab.data import Data, load_data
from trimtab.data.curate import methods as curation
from trimtab.learn import Objective, evaluate, evaluate_sets, fit
from trimtab.learn import methods as objectives
from trimtab.learn.adapt import methods as adaptations
from trimtab.learn.tasks import task_of
from trimtab.models import create_model, load
from trimtab.models.factory import shape_for
from trimtab.search import systems

log = logger(__name__)

MAX_BYTES = 1_000_000  # of a recipe file
KINDS = ("train", "compress", "search", "adapt", "curate", "export")


class RecipeError(TrimtabError, ValueError):
    """A recipe that cannot be carried out."""


class Phase(BaseModel):
    """One of train, compress, search, adapt, curate, export; `as` names the model that comes out."""

    model_config = ConfigDict(extra="forbid")
    train: dict[str, Any] | None = None
    compress: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    adapt: dict[str, Any] | None = None
    curate: dict[str, Any] | None = None
    export: dict[str, Any] | None = None
    as_: str | None = Field(default=None, alias="as")

    @property
    def kind(self) -> str:
        return next(k for k in KINDS if getattr(self, k) is not None)


class Recipe(BaseModel):
    """A recipe file."""

    model_config = ConfigDict(extra="forbid")
    data: str | dict[str, Any] = "digits"
    model: dict[str, Any]
    out: str = "trimtab-out"
    seed: int = 0
    phases: list[Phase] = Field(min_length=1)
    budget: str | None = None
    label_sets: dict[str, Any] | None = None


def read(path: str | Path) -> Recipe:
    """Read and check a recipe; nothing is run.

    Raises:
        RecipeError: naming the field that is wrong.
    """
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{path} has {path.stat().st_size} bytes, more than the {MAX_BYTES} allowed")
    try:
        recipe = Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as e:
        raise RecipeError(f"{path} is not YAML: {e}") from e
    except ValidationError as e:
        first = e.errors()[0]
        raise RecipeError(f"{path}: {'.'.join(map(str, first['loc'])) or 'recipe'}: {first['msg']}") from e
    names: set[str] = set()
    for i, phase in enumerate(recipe.phases):
        kinds = [k for k in KINDS if getattr(phase, k) is not None]
        if len(kinds) != 1:
            raise RecipeError(f"{path}: phases.{i}: expected one of {', '.join(KINDS)}, got {kinds or 'none'}")
        if phase.train is not None:
            _objective(phase.train.get("objective", "classify"), names, lambda name: nn.Identity())
        if phase.compress is not None:
            _check(phase.compress, methods.check, "magnitude", f"{path}: phases.{i}")
        if phase.search is not None:
            _check(phase.search, systems.check, "bignas", f"{path}: phases.{i}")
        if phase.adapt is not None:
            _check(phase.adapt, adaptations.check, "nmc", f"{path}: phases.{i}")
        if phase.curate is not None:
            _check(phase.curate, curation.check, "concept_pruning", f"{path}: phases.{i}")
        if phase.export is not None and (second := phase.export.get("second")) not in {None, *names}:
            raise RecipeError(f"{path}: phases.{i}: second must be the name of an earlier phase, got {second!r}")
        names |= {phase.as_} if phase.as_ else set()
    if not {"name", "load"} & set(recipe.model):
        raise RecipeError(f"{path}: model: expected a 'name' or an artifact to 'load', got {recipe.model}")
    if recipe.budget is not None:
        Budget(recipe.budget)
    if recipe.label_sets is not None:
        _check_label_sets(recipe.label_sets, f"{path}: label_sets")
    return recipe


def run(path: str | Path) -> dict[str, Any]:
    """Carry out a recipe.

    Returns:
        {"phases": [...], "accuracy", "cost", "budget", "files"}: what each phase gave, and the final model's figures;
        for other tasks "miou", "map" or "psnr" in the place of "accuracy". With label sets also "label_sets".
    """
    recipe = read(path)
    if recipe.label_sets is not None and not Path(recipe.label_sets["sets"]).is_file():
        raise RecipeError(f"{path}: label_sets: there is no file {recipe.label_sets['sets']}")
    out = Path(recipe.out)
    journal = Journal(out / ".recipe" / "journal.json", recipe.model_dump(by_alias=True), float("inf"))
    source = recipe.data if isinstance(recipe.data, dict) else {"spec": recipe.data}
    data = load_data(**source)
    model = _start(recipe, data)
    named: dict[str, Path] = {}
    rows: list[dict[str, Any]] = []
    files: list[str] = []
    split = "val" if "val" in data.splits else "train"
    score = task_of(data).scores[0]
    for i, phase in enumerate(recipe.phases):
        folder = out / "phases" / f"{i + 1}-{phase.as_ or phase.kind}"
        key = f"phase {i + 1}"
        if phase.curate is not None:
            data = _curate(phase, model, data, folder, recipe.seed)
        elif key in journal.steps and phase.kind != "export":
            model, data = load(folder), _known(phase, data, recipe.seed)
        elif phase.kind == "export":
            files.append(str(_export(phase, model, data, out, named)))
        else:
            if phase.train is not None:
                model = _train(phase, model, data, folder, named, recipe.seed)
            elif phase.compress is not None:
                model = _compress(phase, model, data, folder, recipe.seed)
            elif phase.search is not None:
                model = _search(phase, model, data, folder, recipe.seed)
            else:
                model, data = _adapt(phase, model, data, folder, recipe.seed)
            artifact.save(model, folder, spec=data.spec, labels=data.class_names)
        if phase.as_:
            named[phase.as_] = folder
        row = journal.once(key, lambda m=model, d=data: {score: evaluate(m, d, split)[score]})  # type: ignore[misc]
        rows.append({"phase": phase.kind, "as": phase.as_, f"{split}_{score}": row[score]})
        log.info("phase %d of %d (%s): %s %s %.4f", i + 1, len(recipe.phases), phase.kind, split, score, row[score])
    tested = evaluate(model, data, "test")[score]
    artifact.save(model, out, spec=data.spec, labels=data.class_names, metrics={"test": tested})
    result: dict[str, Any] = {"phases": rows, score: tested, "files": [str(out), *files], "budget": None}
    if recipe.label_sets is not None:
        result["label_sets"] = evaluate_sets(model, data, **recipe.label_sets)
    if single := [file for file in files if file.endswith(".onnx")]:
        budget = Budget(recipe.budget) if recipe.budget else Budget("size<=1GB")
        result["cost"] = measured(Path(single[-1]), budget)
        if recipe.budget:
            verdict = budget.check({**result["cost"], score: tested})
            result["budget"] = {"text": recipe.budget, "met": verdict.ok, "rows": [asdict(r) for r in verdict.rows]}
    elif recipe.budget:
        raise RecipeError("a budget is checked on the exported file; add an export phase of one file")
    write_text(out / "result.json", json.dumps(result, indent=1))
    return result


def _export(phase: Phase, model: nn.Module, data: Data, out: Path, named: dict[str, Path]) -> Path:
    """One file; with `memory` a folder of patches, with `second` one of two networks."""
    given = dict(phase.export or {})
    if "memory" in given:
        return deploy.mcunetv2(model, data, **given).save(out / "patches")
    if "second" in given:
        second = given.pop("second")
        return deploy.dual_cnn({"first": model, second: load(named[second])}, data, **given).save(out / "pair")
    return deploy.export(model, out / "model.onnx", data=data, **given).path


def _start(recipe: Recipe, data: Data) -> nn.Module:
    given = dict(recipe.model)
    if "load" in given:
        return load(given["load"])
    name = given.pop("name")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return create_model(name, **{**shape_for(data), **given})


def _train(phase: Phase, model: nn.Module, data: Data, folder: Path, named: dict[str, Path], seed: int) -> nn.Module:
    given = dict(phase.train or {})
    said = given.pop("objective", None)
    objective = _objective(said, set(named), lambda name: load(named[name])) if said is not None else None
    return fit(model, data, objective, out=folder.with_name(folder.name + ".training"), **{"seed": seed, **given}).model


def _compress(phase: Phase, model: nn.Module, data: Data, folder: Path, seed: int) -> nn.Module:
    given = {"method": "magnitude", **(phase.compress or {})}
    known = methods.parameters(given["method"])
    training: dict[str, Any] = {"out": folder.with_name(folder.name + ".training"), "seed": seed}
    return methods.run(model=model, data=data, **{k: v for k, v in training.items() if k in known}, **given)


def _search(phase: Phase, model: nn.Module, data: Data, folder: Path, seed: int) -> nn.Module:
    """The network that was found; the report with what was tried is in the phase's folder."""
    given = {"method": "bignas", "seed": seed, **(phase.search or {})}
    method = given.pop("method")
    small, found = systems.run(method, model, data, out=folder.with_name(folder.name + ".training"), **given)
    folder.mkdir(parents=True, exist_ok=True)
    tested = evaluate(small, data, "test")["accuracy"]
    searched.write(found, small, data, folder, method=method, tested=tested, command="", seed=seed)
    return small


def _adapt(phase: Phase, model: nn.Module, data: Data, folder: Path, seed: int) -> tuple[nn.Module, Data]:
    """The adapted model, and the data as it knows them; what was measured on the way is in the phase's folder."""
    out = folder.with_name(folder.name + ".training")
    done = adaptations.run(model=model, data=data, out=out, **_adaptation(phase, seed))
    write_text(folder / "result.json", json.dumps(done.report, indent=1))
    return done.model, done.data


def _known(phase: Phase, data: Data, seed: int) -> Data:
    """The data as they are after a phase that was done before: an adaptation may have left classes out."""
    return data if phase.adapt is None else adaptations.known(data=data, **_adaptation(phase, seed))


def _adaptation(phase: Phase, seed: int) -> dict[str, Any]:
    return {"method": "nmc", "seed": seed, **(phase.adapt or {})}


def _curate(phase: Phase, model: nn.Module, data: Data, folder: Path, seed: int) -> Data:
    """What later phases learn from; the model's features or labels decide."""
    given = {"method": "concept_pruning", **(phase.curate or {})}
    given |= {"seed": seed, **given} if given["method"] == "concept_pruning" else {}
    return curation.run(given.pop("method"), data, model, folder, **given)


def _check(given: dict[str, Any], check: Callable[[str, dict[str, Any]], None], usual: str, where: str) -> None:
    said = dict(given)
    try:
        Budget(said.get("budget") or "macs<=50%")
        check(said.pop("method", usual), said)
    except ValueError as e:
        raise RecipeError(f"{where}: {e}") from e


def _check_label_sets(given: dict[str, Any], where: str) -> None:
    try:
        options.check(where, given, {**options.parameters(evaluate_sets, keyword_only=True), "sets": options.REQUIRED})
    except ValueError as e:
        raise RecipeError(str(e)) from e


def _objective(said: Any, named: set[str], get: Callable[[str], nn.Module]) -> Objective:
    """`kd`, or `{kd: {teacher: big, T: 4}}`; a teacher is the name of an earlier phase's model.

    An objective whose teacher has a default takes words for it, too.
    """
    name, given = (said, {}) if isinstance(said, str) else next(iter(said.items()), ("", {}))
    given = dict(given or {})
    try:
        teacher = given.get("teacher")
        if teacher in named:
            given["teacher"] = get(teacher)
        elif teacher is not None and objectives.parameters(name).get("teacher") is options.REQUIRED:
            earlier = ", ".join(sorted(named)) or "none yet"
            raise ValueError(f"teacher must be the name of an earlier phase ({earlier}), got {teacher!r}")
        return objectives.make(name, **given)
    except ValueError as e:
        raise RecipeError(f"objective {said!r}: {e}") from e
