"""The house keeps its floors: imports run downward, systems stand alone, names lead where they say."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.core.card import catalogue

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src"
PACKAGES = [m.name for m in pkgutil.walk_packages([str(SRC / "trimtab")], "trimtab.") if m.ispkg]


def lint(src: Path) -> subprocess.CompletedProcess[str]:
    script = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    args = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    return subprocess.run(
        [sys.executable, "-c", script, *args],
        capture_output=True,
        text=True,
        cwd=src,
        env={**os.environ, "PYTHONPATH": str(src), "COLUMNS": "200"},
    )


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the sources, to break."""
    shutil.copytree(SRC, tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "src"


def test_imports_run_downward(copy):
    done = lint(copy)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("low", "line"),
    [
        ("core/errors.py", "from trimtab.learn import Objective"),
        ("nn/__init__.py", "import trimtab.models.factory"),
        ("learn/losses.py", "from trimtab import deploy"),
        ("learn/losses.py", "def late():\n    from trimtab.compress import ChannelGraph"),
    ],
)
def test_an_upward_import_is_caught(copy, low, line):
    with open(copy / "trimtab" / low, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    done = lint(copy)
    assert done.returncode != 0
    assert "imports run downward only BROKEN" in done.stdout
    assert "trimtab." + low.removesuffix(".py").removesuffix("/__init__").replace("/", ".") in done.stdout


def imported(path: Path) -> set[str]:
    """Modules that a file imports, also ``from package import module``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return names


def test_systems_never_import_each_other():
    systems = {entry.module: entry.path for entry in catalogue().values()}
    for module, path in systems.items():
        files = path.parent.rglob("*.py") if path.name == "__init__.py" else [path]
        for file in files:
            others = {n for n in imported(file) if n in systems and n != module}
            assert not others, f"{module} imports {others}"


def test_no_skeleton_is_left_in_a_system():
    for slug, entry in catalogue().items():
        tests = list((ROOT / "tests").rglob(f"test_{slug}.py"))
        evidence = ROOT / "evidence" / f"{slug}.py"
        for file in [entry.path, *tests, *([evidence] if evidence.exists() else [])]:
            assert "TODO" not in file.read_text(encoding="utf-8"), f"{file} still has a TODO"


@pytest.mark.parametrize("package", ["trimtab", *PACKAGES])
def test_public_names_are_not_shadowed_by_modules(package):
    """A module named like a function of its package replaces it there as soon as somebody imports the module."""
    home = importlib.import_module(package)
    for info in pkgutil.iter_modules(home.__path__):
        if info.name != "__main__":
            importlib.import_module(f"{package}.{info.name}")
    tree = ast.parse(Path(home.__file__).read_text(encoding="utf-8"))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    meant = {a.name for node in froms for a in node.names if (node.module or "").split(".")[-1] == a.name}
    for name in meant & set(getattr(home, "__all__", ())):
        assert callable(getattr(home, name)), f"{package}.{name} is a module, not what it is said to be"


def test_lower_floors_do_not_use_the_public_face():
    """`from trimtab import fit` would hide an upward import from the linter."""
    for path in (SRC / "trimtab").rglob("*.py"):
        floor = path.relative_to(SRC / "trimtab").parts[0]
        if floor in ("cli", "testing.py", "compact", "__init__.py", "__main__.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert "trimtab" not in [a.name for a in node.names], f"{path}:{node.lineno}"
            elif isinstance(node, ast.ImportFrom) and node.module == "trimtab":
                rooms = {p.name for p in (SRC / "trimtab").iterdir() if p.is_dir()} | {"__version__"}
                assert {a.name for a in node.names} <= rooms, f"{path}:{node.lineno}"


def test_importing_trimtab_is_light():
    code = "import sys, trimtab; sys.exit(any(m in sys.modules for m in ('torch', 'timm', 'numpy', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
