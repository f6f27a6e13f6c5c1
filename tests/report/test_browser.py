"""The report in a real browser: no errors, no requests, and everything that is promised works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.report import browser as chromium
from tests.report import sample
from trimtab import report

pytestmark = pytest.mark.browser

MAKERS = {make.__name__: make for make in (sample.realistic, sample.missed, sample.large, sample.hostile, dict)}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reports")
    for name, make in MAKERS.items():
        report.write(make(), made / f"{name}.html")
    report.layers_plot(sample.realistic()["layers"]["before"], made / "layers.html")
    return made


class Opened:
    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(offline=True, **options)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.file = file.as_uri()

    def check(self) -> None:
        assert self.problems == []
        assert [url[:60] for url in self.requests if url != self.file and not url.startswith("data:")] == []
        self.context.close()


@pytest.mark.parametrize("name", [*MAKERS, "layers"])
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (380, "light")])
def test_opens_without_errors_requests_or_sideways_scrolling(
    browser: Any, folder: Path, name: str, width: int, scheme: str
) -> None:
    opened = Opened(browser, folder / f"{name}.html", viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.hacked") is None
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    opened.check()


def test_every_chart_is_drawn_with_a_size(browser: Any, folder: Path) -> None:
    opened = Opened(browser, folder / "realistic.html", viewport={"width": 1200, "height": 800})
    sizes = opened.page.evaluate(
        "[...document.querySelectorAll('figure[data-chart]')].map((f) => [f.dataset.chart, f.checkVisibility(),"
        " f.querySelector('svg').getBoundingClientRect().width, f.querySelectorAll('svg *').length])"
    )
    assert len(sizes) == 2 + 3 + 2 + 1
    assert sum(visible for _, visible, *_ in sizes) == 6  # of the three costs per layer, one is shown
    assert all(width > 300 and parts > 10 for _, visible, width, parts in sizes if visible)
    opened.check()


def test_hover_tells_about_a_model_and_marks_it_in_both_plots(browser: Any, folder: Path) -> None:
    opened = Opened(browser, folder / "realistic.html", viewport={"width": 1200, "height": 800})
    page = opened.page
    mark = page.locator("figure[data-chart=c0] .point.chosen")
    mark.scroll_into_view_if_needed()
    mark.hover()
    chosen = next(row for row in sample.realistic()["tried"] if row["chosen"])
    assert chosen["name"] in page.locator("#tip").inner_text() and page.locator("#tip").is_visible()
    assert page.locator("circle.hi").count() == 2
    page.mouse.move(2, 2)
    assert not page.locator("#tip").is_visible()
    opened.check()


@pytest.mark.parametrize(("chart", "keys", "said"), [
    ("c0", ["Home"], "validation"),
    ("c2", ["ArrowRight", "ArrowRight"], "stages.0.blocks.0.conv1"),
    ("c5", ["End"], "Epoch 40"),
    ("c7", ["Home"], "Right"),
    ("c7", ["Home", "ArrowRight"], "Mistaken"),
    ("c7", ["Home", "ArrowDown", "ArrowRight"], "Right"),
])  # fmt: skip
def test_charts_can_be_read_by_keys(browser: Any, folder: Path, chart: str, keys: list[str], said: str) -> None:
    opened = Opened(browser, folder / "realistic.html", viewport={"width": 1200, "height": 800})
    page = opened.page
    page.locator(f"figure[data-chart={chart}] svg").focus()
    for key in keys:
        page.keyboard.press(key)
    assert said in page.locator("#voice").inner_text() and said in page.locator("#tip").inner_text()
    page.mouse.wheel(0, 40)
    page.wait_for_timeout(100)
    assert page.locator("#tip").is_visible()  # stays with its point when the page moves
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    opened.check()


def test_tables_sort_both_ways_with_gaps_last(browser: Any, folder: Path) -> None:
    opened = Opened(browser, folder / "realistic.html", viewport={"width": 1200, "height": 800})
    page = opened.page
    page.get_by_text("All 43 as a table").click()
    column = "[...document.querySelectorAll('#tried tbody tr')].map((r) => +r.cells[2].dataset.v)"
    head = page.locator("#tried thead th").nth(2)
    head.get_by_role("button").click()
    values = page.evaluate(column)
    assert values == sorted(values, reverse=True) and head.get_attribute("aria-sort") == "descending"
    head.get_by_role("button").click()
    assert page.evaluate(column) == sorted(values) and head.get_attribute("aria-sort") == "ascending"
    opened.check()


def test_command_is_copied(browser: Any, folder: Path) -> None:
    opened = Opened(browser, folder / "realistic.html", permissions=["clipboard-read", "clipboard-write"])
    opened.page.get_by_role("button", name="Copy").click()
    opened.page.get_by_role("button", name="Copied").wait_for()
    assert opened.page.evaluate("navigator.clipboard.readText()") == sample.realistic()["command"]
    opened.check()


def test_switches_show_other_costs_and_only_mistakes(browser: Any, folder: Path) -> None:
    opened = Opened(browser, folder / "realistic.html")
    page = opened.page
    assert page.locator("figure.by-macs").is_visible() and not page.locator("figure.by-params").is_visible()
    page.get_by_role("radio", name="Parameters").check()
    assert page.locator("figure.by-params").is_visible() and not page.locator("figure.by-macs").is_visible()
    page.get_by_label("Only mistakes").check()
    assert page.locator(".samples li:visible").count() == 8
    opened.check()


def test_complete_without_scripts(browser: Any, folder: Path) -> None:
    opened = Opened(browser, folder / "realistic.html", java_script_enabled=False)
    page = opened.page
    assert page.locator(".point.chosen").count() >= 2
    assert not page.get_by_role("button", name="Copy").is_visible()
    page.get_by_text("All 43 as a table").click()
    assert page.locator("#tried tbody tr").count() == 43
    opened.check()


def test_prints_light_and_whole(browser: Any, folder: Path, tmp_path: Path) -> None:
    opened = Opened(browser, folder / "realistic.html", color_scheme="dark")
    opened.page.emulate_media(media="print", color_scheme="dark")
    assert opened.page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"
    assert not opened.page.locator("nav").is_visible()
    printed = opened.page.pdf(path=tmp_path / "report.pdf")
    assert printed.startswith(b"%PDF") and opened.page.evaluate("document.querySelector('details').open") is False
    opened.check()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pareto_svg_is_drawn_as_an_image(browser: Any, tmp_path: Path, scheme: str) -> None:
    (tmp_path / "pareto.svg").write_text(report.pareto_svg(sample.realistic()), "utf-8")
    (tmp_path / "page.html").write_text("<!doctype html><img src=pareto.svg>", "utf-8")
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert page.evaluate("document.images[0].naturalWidth") == 980
    context.close()


def test_without_a_browser_ci_fails_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "apt-get install chromium" in (chromium.missing() or "")
