"""Start a new system: its module, its test and its evidence script, ready to be filled in.

    python -m tools.new_system wanda --family prune
    python -m tools.new_system ghostnet --family models --arxiv 1911.11907 --year 2020 --title "GhostNet: ..."

Everything in the files comes from the arguments; what only the paper can say is marked TODO, and the test-suite refuses
a system with a TODO left in it. Files that exist are never overwritten.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from trimtab.core.files import write_text

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = Path(__file__).resolve().parent / "templates"


@dataclass(frozen=True)
class Room:
    """Where the systems of a family live, and which skeleton they start from."""

    path: str
    skeleton: str  # architecture | surgery | objective | function
    kind: str
    task: str = "classify"


FAMILIES = {
    "models": Room("models/classify", "architecture", "architecture"),
    "restoration": Room("models/restore", "function", "architecture", "restore"),
    "dense": Room("models/dense", "function", "architecture", "segment"),
    "video": Room("models/video", "function", "architecture", "classify"),
    "generate": Room("models/generate", "function", "architecture", "generate"),
    "multimodal": Room("models/multimodal", "function", "architecture", "answer"),
    "search": Room("search/supernets", "function", "method"),
    "grow": Room("search/grow", "function", "method"),
    "design": Room("search/design", "function", "method"),
    "prune": Room("compress/prune", "surgery", "method"),
    "quantize": Room("compress/quantize", "surgery", "method"),
    "factorize": Room("compress/factorize", "surgery", "method"),
    "analyze": Room("compress/analyze", "function", "analysis"),
    "distill": Room("learn/distill", "objective", "objective"),
    "pretrain": Room("learn/pretrain", "objective", "objective"),
    "train": Room("learn/regularize", "objective", "objective"),
    "modular": Room("learn/modular", "objective", "method"),
    "continual": Room("learn/adapt", "function", "method"),
    "fewshot": Room("learn/adapt", "function", "method"),
    "detect_ood": Room("learn/adapt", "function", "method"),
    "cluster": Room("learn/adapt", "function", "method"),
    "adapt": Room("learn/adapt", "function", "method"),
    "data": Room("data/curate", "function", "method"),
    "edge": Room("deploy", "function", "method"),
}


def files(
    slug: str,
    family: str,
    *,
    title: str | None = None,
    arxiv: str | None = None,
    year: int | None = None,
    claims: Sequence[tuple[str, str]] = (),
) -> dict[str, str]:
    """The files of a new system: path below the repository's root -> content.

    Raises:
        ValueError: for a slug that is no module name, or a family there is not.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", slug):
        raise ValueError(f"slug must be lower case letters, digits and _, starting with a letter, got {slug!r}")
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    if arxiv is not None and not re.fullmatch(r"\d{4}\.\d{4,5}", arxiv):
        raise ValueError(f"arxiv must be like 2104.05704, got {arxiv!r}")
    room = FAMILIES[family]
    claims = list(claims) or [("effect", "TODO: the headline claim, in the words of the paper")]
    optional = [f'    arxiv="{arxiv}",'] if arxiv else []
    optional += [f"    year={year},"] if year else []
    words = {
        "slug": slug,
        "title": _wrapped(title or f"TODO: the title of the paper on {slug}"),
        "headline": _headline(title or f"TODO: the title of the paper on {slug}", arxiv),
        "module": ".".join(("trimtab", *room.path.split("/"), slug)),
        "room": ".".join(("trimtab", *room.path.split("/"))),
        "cls": "".join(part.capitalize() for part in slug.split("_")),
        "kind": room.kind,
        "task": room.task,
        "claims": "\n".join(f"        Claim({_quoted(i)}, {_wrapped(says)})," for i, says in claims),
        "first_claim": claims[0][0],
        "optional": "".join(line + "\n" for line in optional),
    }
    tests = f"tests/{room.path}/test_{slug}.py"
    return {
        f"src/trimtab/{room.path}/{slug}.py": _tidy(_fill(room.skeleton, words)),
        tests: _tidy(_fill(f"test_{room.skeleton}", words)),
        f"evidence/{slug}.py": _tidy(_fill("evidence", words)),
    }


def write(root: Path, content: dict[str, str]) -> list[Path]:
    """Write the files below `root`; packages on the way get their ``__init__.py``.

    Raises:
        FileExistsError: when one of them is there already; then nothing is written.
    """
    there = [name for name in content if (root / name).exists()]
    if there:
        raise FileExistsError(f"already there, and left alone: {', '.join(there)}")
    written = []
    for name, text in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("src/"):
            for folder in path.relative_to(root / "src").parents:
                package = root / "src" / folder / "__init__.py"
                if folder != Path() and not package.exists():
                    package.write_text(f'"""{folder.name.capitalize()}."""\n', encoding="utf-8")
        write_text(path, text)
        written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.new_system", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slug", help="short name: module, evidence script and catalogue entry are called so")
    parser.add_argument("--family", required=True, choices=list(FAMILIES), help="decides where it lives")
    parser.add_argument("--title", help="title of the paper")
    parser.add_argument("--arxiv", help="such as 2104.05704")
    parser.add_argument("--year", type=int)
    parser.add_argument(
        "--claim",
        action="append",
        default=[],
        metavar="ID=WORDS",
        help="a claim, such as 'params=has 3.76M parameters'",
    )
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    claims = [tuple(c.split("=", 1)) for c in args.claim]
    if any(len(c) != 2 or not re.fullmatch(r"[a-z][a-z0-9_]*", c[0]) for c in claims):
        parser.error(f"--claim must be ID=WORDS, got {args.claim}")
    try:
        content = files(args.slug, args.family, title=args.title, arxiv=args.arxiv, year=args.year, claims=claims)  # type: ignore[arg-type]
        for path in write(args.root, content):
            print(path.relative_to(args.root))
    except (ValueError, FileExistsError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, ValueError) else 1
    print("next: CONTRIBUTING.md, 'Add a system', step 2")
    return 0


def _fill(name: str, words: dict[str, str]) -> str:
    return Template((TEMPLATES / f"{name}.tmpl").read_text(encoding="utf-8")).substitute(words)


def _tidy(text: str) -> str:
    """As ruff would have it; unchanged where ruff is not installed (it comes with ``trimtab[test]``)."""
    config = ["--config", str(ROOT / "pyproject.toml")]
    for verb in (["check", "--select", "I", "--fix", "--exit-zero", "--quiet"], ["format"]):
        command = [sys.executable, "-m", "ruff", *verb, *config, "-"]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        text = done.stdout if done.returncode == 0 and done.stdout else text
    return text


def _headline(title: str, arxiv: str | None) -> str:
    """The first line or two of the module's docstring."""
    plain = " ".join(title.split()).replace("\\", "/").replace('"', "'")
    return textwrap.fill(f"{plain} (arXiv {arxiv})." if arxiv else f"{plain}.", 115)


def _wrapped(text: str) -> str:
    """A string literal, over several lines when it is long."""
    lines = textwrap.wrap(" ".join(text.split()), 90, break_on_hyphens=False)
    if len(lines) <= 1:
        return _quoted(text)
    parts = [_quoted(line)[:-1] + ' "' for line in lines[:-1]] + [_quoted(lines[-1])]
    return "(\n" + "\n".join(f"            {part}" for part in parts) + "\n        )"


def _quoted(text: str) -> str:
    """A string literal in double quotes, as the formatter writes it."""
    return '"' + " ".join(text.split()).replace("\\", "\\\\").replace('"', '\\"') + '"'


if __name__ == "__main__":
    sys.exit(main())
