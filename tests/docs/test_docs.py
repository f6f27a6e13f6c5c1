"""What the documentation says is true: examples run, tables are fresh, links and commands lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from evidence import pictures, tables
from trimtab import cli
from trimtab.cli.session import GLOBAL
from trimtab.core.card import PACKAGE

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for _, name, body in BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES[1:] if blocks(p, "python")], ids=name)
def test_examples_run(page, tmp_path, monkeypatch):
    """All Python blocks of a page, from top to bottom, as one program in an empty folder."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "example"}
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{name(page)}, example {number}", "exec"), space)


def test_the_readme_tour_delivers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "README.md", "python")
    assert len(code.strip().splitlines()) <= 12
    space: dict[str, object] = {}
    exec(code, space)
    import trimtab as tt

    before, after = (tt.measure(space[n], space["data"].spec.size).macs for n in ("model", "small"))
    assert after <= before / 2
    assert {"model.onnx", "model.safetensors", "trimtab.json"} <= {p.name for p in (tmp_path / "small").iterdir()}
    assert tt.evaluate(space["small"], space["data"])["accuracy"] > 0.8


@pytest.mark.parametrize("page", [p for p in PAGES if "<!-- table:" in p.read_text(encoding="utf-8")], ids=name)
def test_generated_tables_are_fresh(page):
    text = page.read_text(encoding="utf-8")
    assert tables.fill(text) == text, f"{name(page)} is out of date: run python -m evidence --tables"


@pytest.mark.parametrize("made", pictures.PICTURES)
def test_generated_pictures_are_fresh(made):
    picture, file = pictures.PICTURES[made], ROOT / "docs" / "images" / f"{made}.svg"
    drawn = picture.draw(json.loads(picture.result.read_text())) + "\n" if picture.result.is_file() else None
    there = file.read_text() if file.is_file() else None
    assert drawn == there, f"{name(file)} is out of date: run python -m evidence --tables"


def commands() -> list[str]:
    lines = []
    for page in PAGES:
        for body in blocks(page, "console"):
            joined = body.replace("\\\n", " ")
            lines += [
                part.strip()
                for line in joined.splitlines()
                if line.strip().startswith("$ ")
                for part in line.strip()[2:].split("&&")
            ]
    text = "".join(p.read_text(encoding="utf-8") for p in sorted((PACKAGE / "cli").glob("*.py")))
    lines += [
        line.split("  #")[0].split(" # ")[0].strip() for line in re.findall(r"^      (trimtab .*)$", text, re.MULTILINE)
    ]
    return sorted(set(lines))


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("trimtab ")])
def test_commands_shown_exist_with_their_options(line):
    import typer

    words = shlex.split(line)[1:]
    group = typer.main.get_command(cli.app)
    assert words[0] in group.commands, line
    command = group.commands[words[0]]
    if hasattr(command, "commands"):  # a group, such as analyze
        assert words[1] in command.commands, line
        command = command.commands[words[1]]
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | set(GLOBAL)
    assert {w.split("=")[0] for w in words if w.startswith("--")} <= known


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("python -m ")])
def test_modules_shown_can_be_run(line):
    module = shlex.split(line)[2]
    path = ROOT.joinpath(*module.split("."))
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


def test_every_page_is_in_the_navigation():
    def leaves(value: object) -> set[str]:
        if isinstance(value, str):
            return {value}
        values = value.values() if isinstance(value, dict) else value
        return set().union(*(leaves(v) for v in values))

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert leaves(config["nav"]) == {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}


def test_every_command_is_on_the_page_of_commands():
    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    for command in cli.app.registered_commands:
        assert f"| `{command.name or command.callback.__name__}` |" in page


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=name)
def test_recipes_shown_can_be_read(page, tmp_path):
    from trimtab.compact.recipe import read

    for code in blocks(page, "yaml"):
        (tmp_path / "recipe.yaml").write_text(code)
        assert read(tmp_path / "recipe.yaml").phases


def test_the_reference_names_what_exists():
    pages = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs/reference").glob("*.md"))
    named = re.findall(r"^::: ([\w.]+)", pages, re.MULTILINE)
    assert len(named) > 10
    for target in named:
        parts = target.split(".")
        inside = PACKAGE.parent.joinpath(*parts[:-1])
        known = inside.with_suffix(".py").exists() or inside.joinpath(parts[-1] + ".py").exists()
        assert known or inside.joinpath(parts[-1], "__init__.py").exists(), f"the reference names {target}"


def test_ci_runs_what_the_readme_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "pip install -e '.[test]' && pytest" in readme
    assert "pip install --quiet -e '.[test]'" in script and "pytest" in script
    for tool in (
        "ruff check",
        "ruff format --check",
        "mypy",
        "lint-imports",
        "mkdocs build --strict",
        "evidence --all --smoke",
    ):
        assert tool in script
