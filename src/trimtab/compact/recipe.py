"""Recipes: phases of learning and surgery written in YAML, run in order, each resumable.

    data: digits
    model: {name: trim_10k}            # or {load: path/to/artifact}
    out: runs/digits
    phases:
      - train: {epochs: 20, lr: 0.2}
        as: big                        # a name for the model after this phase
      - compress: {method: magnitude, budget: "macs<=50%"}  # or: search: {method: bignas, budget: "macs<=50%"}
      - train: {objective: {kd: {teacher: big}}, epochs: 10}
      - export: {int8: true}
    budget: "size<=20KB"               # checked on the exported file

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

from trimtab.compact import searched
from trimtab.compact.deliver import measured
from trimtab.compact.journal import Journal
from trimtab.compress import methods
from trimtab.core import artifact
from trimtab.core.budget import Budget
from trimtab.core.errors import TrimtabError
from trimtab.core.files import write_text
from trimtab.core.log import logger
from trimtab.core.options import REQUIRED
from trimtab.data import Data, load_data
from trimtab.deploy import export
from trimtab.learn import Objective, evaluate, fit
from trimtab.learn import methods as objectives
from trimtab.models import create_model, load
from trimtab.search import systems

log = logger(__name__)

MAX_BYTES = 1_000_000  # of a recipe file
KINDS = ("train", "compress", "search", "export")


class RecipeError(TrimtabError, ValueError):
    """A recipe that cannot be carried out."""


class Phase(BaseModel):
    """One of train, compress, search, export; `as` names the model that comes out."""

    model_config = ConfigDict(extra="forbid")
    train: dict[str, Any] | None = None
    compress: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
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
        names |= {phase.as_} if phase.as_ else set()
    if not {"name", "load"} & set(recipe.model):
        raise RecipeError(f"{path}: model: expected a 'name' or an artifact to 'load', got {recipe.model}")
    if recipe.budget is not None:
        Budget(recipe.budget)
    return recipe


def run(path: str | Path) -> dict[str, Any]:
    """Carry out a recipe.

    Returns:
        {"phases": [...], "accuracy", "cost", "budget", "files"}: what each phase gave, and the final model's figures.
    """
    recipe = read(path)
    out = Path(recipe.out)
    journal = Journal(out / ".recipe" / "journal.json", recipe.model_dump(by_alias=True), float("inf"))
    source = recipe.data if isinstance(recipe.data, dict) else {"spec": recipe.data}
    data = load_data(**source)
    model = _start(recipe, data)
    named: dict[str, Path] = {}
    rows: list[dict[str, Any]] = []
    files: list[str] = []
    split = "val" if "val" in data.splits else "train"
    for i, phase in enumerate(recipe.phases):
        folder = out / "phases" / f"{i + 1}-{phase.as_ or phase.kind}"
        key = f"phase {i + 1}"
        if key in journal.steps and phase.kind != "export":
            model = load(folder)
        elif phase.kind == "export":
            target = out / "model.onnx"
            export(model, target, data=data, **(phase.export or {}))
            files.append(str(target))
        else:
            if phase.train is not None:
                model = _train(phase, model, data, folder, named, recipe.seed)
            elif phase.compress is not None:
                model = _compress(phase, model, data, folder, recipe.seed)
            else:
                model = _search(phase, model, data, folder, recipe.seed)
            artifact.save(model, folder, spec=data.spec, labels=data.class_names)
        if phase.as_:
            named[phase.as_] = folder
        row = journal.once(key, lambda m=model: {"accuracy": evaluate(m, data, split)["accuracy"]})  # type: ignore[misc]
        rows.append({"phase": phase.kind, "as": phase.as_, f"{split}_accuracy": row["accuracy"]})
        log.info("phase %d of %d (%s): %s accuracy %.4f", i + 1, len(recipe.phases), phase.kind, split, row["accuracy"])
    tested = evaluate(model, data, "test")["accuracy"]
    artifact.save(model, out, spec=data.spec, labels=data.class_names, metrics={"test": tested})
    result: dict[str, Any] = {"phases": rows, "accuracy": tested, "files": [str(out), *files], "budget": None}
    if files:
        budget = Budget(recipe.budget) if recipe.budget else Budget("size<=1GB")
        result["cost"] = measured(Path(files[-1]), budget)
        if recipe.budget:
            verdict = budget.check({**result["cost"], "accuracy": tested})
            result["budget"] = {"text": recipe.budget, "met": verdict.ok, "rows": [asdict(r) for r in verdict.rows]}
    elif recipe.budget:
        raise RecipeError("a budget is checked on the exported file; add an export phase")
    write_text(out / "result.json", json.dumps(result, indent=1))
    return result


def _start(recipe: Recipe, data: Data) -> nn.Module:
    given = dict(recipe.model)
    if "load" in given:
        return load(given["load"])
    name = given.pop("name")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return create_model(name, num_classes=data.num_classes, in_chans=data.in_chans, img_size=data.size, **given)


def _train(phase: Phase, model: nn.Module, data: Data, folder: Path, named: dict[str, Path], seed: int) -> nn.Module:
    given = dict(phase.train or {})
    objective = _objective(given.pop("objective", "classify"), set(named), lambda name: load(named[name]))
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


def _check(given: dict[str, Any], check: Callable[[str, dict[str, Any]], None], usual: str, where: str) -> None:
    options = dict(given)
    try:
        Budget(options.get("budget") or "macs<=50%")
        check(options.pop("method", usual), options)
    except ValueError as e:
        raise RecipeError(f"{where}: {e}") from e


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
        elif teacher is not None and objectives.parameters(name).get("teacher") is REQUIRED:
            earlier = ", ".join(sorted(named)) or "none yet"
            raise ValueError(f"teacher must be the name of an earlier phase ({earlier}), got {teacher!r}")
        return objectives.make(name, **given)
    except ValueError as e:
        raise RecipeError(f"objective {said!r}: {e}") from e
