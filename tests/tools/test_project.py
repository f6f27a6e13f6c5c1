"""What the project declares is what it uses."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import trimtab

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTION = {
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "google": "protobuf",
    "torch_pruning": "torch-pruning",
    "prometheus_client": "prometheus-client",
}
OURS = {"trimtab", "tests", "evidence", "benchmarks", "tools", "toy", "sample", "browser", "conftest"}
WITHOUT_IMPORT = {"onnxscript"}  # torch's exporter needs it


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!;~ ]", r)[0].lower() for r in requirements}


def imported(folder: str) -> set[str]:
    """Distributions that the Python files of a folder import."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return {DISTRIBUTION.get(n, n) for n in found - set(sys.stdlib_module_names) - OURS}


CORE = names(PROJECT["dependencies"])
EXTRAS = {name: names(reqs) for name, reqs in PROJECT["optional-dependencies"].items()}
NESTED = {
    name: {inner for r in reqs if r.startswith("trimtab[") for inner in re.findall(r"\w+", r.partition("[")[2])}
    for name, reqs in PROJECT["optional-dependencies"].items()
}


def with_nested(extra: str) -> set[str]:
    """What an extra brings, with the extras that it names."""
    return EXTRAS[extra].union(*(EXTRAS[inner] for inner in NESTED[extra]))


def test_what_the_library_imports_is_declared():
    extras = ("track", "serve", "detect", "llm", "cluster", "edge")
    assert imported("src") <= CORE.union(*(EXTRAS[name] for name in extras))


def test_what_is_declared_is_imported():
    assert imported("src") >= CORE - WITHOUT_IMPORT


@pytest.mark.parametrize("folder", ["tests", "evidence", "benchmarks", "tools"])
def test_the_test_extra_brings_what_tests_import(folder):
    brought = CORE | with_nested("test")
    if folder == "benchmarks":
        brought |= EXTRAS["bench"]
    assert imported(folder) <= brought


def test_every_extra_that_an_error_names_exists():
    for path in (ROOT / "src").rglob("*.py"):
        for extra in re.findall(r"""need\(\s*["'][\w.]+["'],\s*["'](\w+)["']""", path.read_text(encoding="utf-8")):
            assert extra in EXTRAS, f"{path} names the extra {extra!r}"


def test_version_is_said_once():
    assert PROJECT["version"] == trimtab.__version__
    assert f"## {trimtab.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_ci_script_is_sound():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111, "not executable"
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
