"""What a measurement was made on: machine, versions, commit. Every number we keep is kept with these."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("trimtab", "torch", "torchvision", "timm", "numpy", "onnx", "onnxruntime")


def machine() -> dict[str, Any]:
    """CPU, usable cores, memory, operating system and GPU (None without one).

    >>> sorted(machine())
    ['cores', 'cpu', 'gpu', 'memory_gb', 'os']
    """
    return {"cpu": _cpu(), "cores": _cores(), "memory_gb": _memory_gb(), "os": platform.platform(), "gpu": _gpu()}


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the installed packages among `packages`; read from metadata, nothing is imported."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name == "trimtab":  # used from a source tree without an install
                found[name] = sys.modules["trimtab"].__version__
    return found


def commit(where: str | Path = ".") -> str | None:
    """The git commit of `where`, with ``-dirty`` if tracked files differ from it; None outside a repository."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(where), *args], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    if head is None:
        return None
    return head + "-dirty" if git("status", "--porcelain", "--untracked-files=no") else head


def provenance(where: str | Path, *packages: str) -> dict[str, Any]:
    """What is kept with a number: machine, versions (of `packages`, too), the commit of `where`, and the time.

    >>> sorted(provenance("."))
    ['commit', 'date', 'machine', 'versions']
    """
    return {
        "machine": machine(),
        "versions": versions(PACKAGES + packages),
        "commit": commit(where),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith(("model name", "Model")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _gpu() -> str | None:
    torch = sys.modules.get("torch")  # who has not imported torch has not used a GPU
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name())
