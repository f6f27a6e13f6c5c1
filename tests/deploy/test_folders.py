"""Patches and pairs from a recipe and from the command line, and what is answered from their folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trimtab as tt
from trimtab import cli
from trimtab.compact.recipe import RecipeError, read, run
from trimtab.deploy import CascadeModel, PatchedModel

RECIPE = """
data: "shapes:classes=3,size=32,n=60"
model: {name: trim_mobile_10k}
out: %s
phases:
  - train: {epochs: 1, progress: false}
    as: early
  - train: {epochs: 1, progress: false}
  - export: {memory: 14KB}
  - export: {second: early, tolerance: 0.01}
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "recipe.yaml").write_text(RECIPE % (folder / "out"))
    result = run(folder / "recipe.yaml")
    assert result["files"][1:] == [str(folder / "out" / name) for name in ("patches", "pair")]
    tt.load_data("shapes:classes=3,size=32,n=60").splits["test"].image(0).save(folder / "out" / "image.png")
    return folder / "out"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """What a command says in JSON."""

    def call(*words: str) -> Any:
        code = cli.main([*words, "--json"])
        told = capsys.readouterr()
        assert code == 0, told.err
        return json.loads(told.out)

    return call


def test_a_recipe_writes_patches_and_pairs(out: Path, said: Any) -> None:
    patched, pair = PatchedModel(out / "patches"), CascadeModel(out / "pair")
    assert patched.figures["peak"] <= 14_000 < patched.figures["whole"]
    assert {m.name for m in pair.members} == {"first", "early"}
    for model in (patched, pair):
        (answer,) = said("predict", str(model.path), str(out / "image.png"))
        assert answer["label"] == model.predict(out / "image.png")[0].label


def test_the_command_line_writes_them_too(out: Path, said: Any, tmp_path: Path) -> None:
    value = said("export", str(out), str(tmp_path / "patches"), "--memory", "14KB")
    assert "patches up to" in value["schedule"]
    assert (tmp_path / "patches" / "schedule.json").is_file()
    other, data = str(out / "phases" / "1-early"), "shapes:classes=3,size=32,n=60"
    said("export", str(out), str(tmp_path / "pair"), "--second", other, "--data", data)
    assert (tmp_path / "pair" / "cascade.json").is_file()
    for words in (["--second", other], ["--memory", "10B"], ["--memory", "20KB", "--int8", "--data", data]):
        assert cli.main(["export", str(out), str(tmp_path / "no"), *words]) == 2
    assert cli.main(["measure", str(out / "patches")]) == 2


def test_the_second_must_be_an_earlier_phase(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("second: early", "second: late") % tmp_path)
    with pytest.raises(RecipeError, match="second must be the name of an earlier phase, got 'late'"):
        read(tmp_path / "recipe.yaml")
