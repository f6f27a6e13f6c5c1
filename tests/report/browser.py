"""A real browser for the report. To look at it: python tests/report/browser.py OUT FILE... takes pictures of pages."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LOOKS = {"light": (1200, "light"), "dark": (1200, "dark"), "phone": (380, "light")}


def executable() -> str | None:
    """The browser to use: $CHROMIUM, or the first of the usual names on the path."""
    return os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


def missing() -> str | None:
    """What to install, or None when a browser can be opened."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is missing: pip install playwright (no `playwright install` needed)"
    if executable() is None:
        return "Chromium is missing: apt-get install chromium, or set CHROMIUM to the path of a Chrome"
    return None


@contextmanager
def opened() -> Iterator[Any]:
    """A headless Chromium with a profile of its own, gone afterwards."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable(), args=list(ARGS))
        yield browser
        browser.close()


def main(out: Path, files: list[Path]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with opened() as browser:
        for name, (width, scheme) in LOOKS.items():
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            for file in files:
                page.goto(file.resolve().as_uri())
                page.screenshot(path=out / f"{file.stem}-{name}.png", full_page=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
