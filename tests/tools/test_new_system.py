"""A new system's skeleton is valid from the first minute: card, imports, lint, its own test, its evidence script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import new_system
from trimtab.core import card

ROOT = Path(__file__).resolve().parents[2]
CLAIM = (
    "has 3.76M parameters, and this claim goes on for so long, as claims do, that it cannot stand on one line at all"
)
# What the tree of a skeleton is run with: its rooms are laid over those of the library.
CONFTEST = """
import importlib
import sys
from pathlib import Path

import trimtab

here = Path(__file__).parent
sys.path.insert(0, str(here))
for folder in sorted(p for p in (here / "src/trimtab").rglob("*") if p.is_dir() and p.name != "__pycache__"):
    name = ".".join(folder.relative_to(here / "src").parts)
    try:
        importlib.import_module(name).__path__.append(str(folder))
    except ModuleNotFoundError:
        importlib.import_module(name.rpartition(".")[0]).__path__.append(str(folder.parent))
"""


def make(root: Path, family: str, slug: str = "brand_new") -> list[Path]:
    args = [slug, "--family", family, "--title", 'A "new" system', "--arxiv", "2101.00001", "--year", "2021"]
    assert new_system.main([*args, "--claim", f"params={CLAIM}", "--claim", "effect=better", "--root", str(root)]) == 0
    return sorted(p for p in root.rglob("*.py") if p.stem.removeprefix("test_") == slug)


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *args], cwd=cwd, capture_output=True, text=True)


def test_skeletons_have_a_card_import_and_pass_their_tests(tmp_path):
    """One family for each kind of skeleton."""
    for family in ("models", "prune", "distill", "fewshot"):
        _, module, _ = make(tmp_path, family, slug=f"brand_new_{family}")
        (found,) = card._cards(module)
        assert found.slug == f"brand_new_{family}"
        assert (found.title, found.arxiv, found.year) == ('A "new" system', "2101.00001", 2021)
        assert [(c.id, c.says) for c in found.claims] == [("params", CLAIM), ("effect", "better")]
    (tmp_path / "conftest.py").write_text(CONFTEST)
    done = run("pytest", "-q", "-p", "no:cacheprovider", "--doctest-modules", "tests", "src", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.strip().splitlines()[-1].startswith("15 passed"), done.stdout


@pytest.mark.parametrize("family", list(new_system.FAMILIES))
def test_skeleton_of_every_family_is_lint_clean(tmp_path, family):
    make(tmp_path, family)
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    assert run("ruff", "check", *config, ".", cwd=tmp_path).returncode == 0
    done = run("ruff", "format", "--check", *config, ".", cwd=tmp_path)
    assert done.returncode == 0, done.stdout


def test_every_directory_in_the_design_has_a_family():
    rooms = {room.path for room in new_system.FAMILIES.values()}
    pages = {p.stem for p in (ROOT / "docs/families").glob("*.md")}
    assert {room.replace("/", "_") for room in rooms} == pages


def test_evidence_skeleton_runs_smoke(tmp_path, capsys):
    from evidence import runner

    evidence, *_ = make(tmp_path, "prune")
    args = ["--scripts", str(evidence.parent), "--results", str(tmp_path / "results"), "--root", str(tmp_path)]
    text = evidence.read_text().replace('"params",', '"params",\n            says="a claim",')
    evidence.write_text(text)
    assert runner.main(["brand_new", "--smoke", *args]) == 0, capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_existing_files_are_left_alone(tmp_path, capsys):
    _, module, _ = make(tmp_path, "prune")
    module.write_text("mine")
    args = ["brand_new", "--family", "prune", "--root", str(tmp_path)]
    assert new_system.main(args) == 1
    assert "left alone" in capsys.readouterr().err
    assert module.read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["Bad-Name", "--family", "prune"], "slug must be"),
        (["good", "--family", "prune", "--arxiv", "x"], "arxiv must be"),
        (["good", "--family", "none"], "invalid choice"),
        (["good", "--family", "prune", "--claim", "words"], "ID=WORDS"),
    ],
)
def test_wrong_arguments_are_exit_code_2(tmp_path, capsys, args, says):
    try:
        code = new_system.main([*args, "--root", str(tmp_path)])
    except SystemExit as e:
        code = e.code
    assert code == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
