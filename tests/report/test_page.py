"""The report as a file: complete, safe, small."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.report import sample
from trimtab import report
from trimtab.report.sections import picture

VOID = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """Elements, attributes and texts of a page; complains about elements that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"repeated attribute in <{tag}>"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else, {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.elements if "id" in attrs]

    def sections(self) -> list[str]:
        return [attrs["id"] or "" for tag, attrs in self.elements if tag == "section"]


def render(run: Any, folder: Path) -> tuple[Page, str]:
    html = report.write(run, folder / "report.html").read_text("utf-8")
    return Page(html), html


def paths(run: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every place in a run that is reached by keys (through the first element of lists)."""
    found = [at] if at else []
    if isinstance(run, dict):
        for key in run:
            found += paths(run[key], (*at, key))
    elif isinstance(run, list) and run and isinstance(run[0], dict):
        found += paths(run[0], (*at, "0"))
    return found


def changed(run: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy with the place at `path` set to `value`, in all elements of lists; removed when value is `...`."""
    run = copy.copy(run)
    if isinstance(run, list):
        return [changed(item, path[1:], value) for item in run] if path[1:] else value
    if len(path) == 1:
        if value is ...:
            del run[path[0]]
        else:
            run[path[0]] = value
        return run
    run[path[0]] = changed(run[path[0]], path[1:], value)
    return run


SMALL = sample.realistic()
SMALL["tried"], SMALL["samples"] = SMALL["tried"][:4], SMALL["samples"][:2]
SMALL["result"]["history"] = SMALL["result"]["history"][:4]
SMALL["layers"] = {side: SMALL["layers"][side][:3] for side in SMALL["layers"]}


def test_all_sections_are_there_in_order(run: dict[str, Any], tmp_path: Path) -> None:
    page, _ = render(run, tmp_path)
    assert page.sections() == ["budget", "tried", "model", "training", "classes", "samples", "data", "made"]
    assert len(set(page.ids())) == len(page.ids())
    targets = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    assert [target[1:] for target in targets if target] == page.sections()
    headings = [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1" and headings.count("h1") == 1


@pytest.mark.parametrize("value", [..., None, [], {}, "odd", -1, float("nan")], ids=str)
@pytest.mark.parametrize("path", paths(SMALL), ids=".".join)
def test_any_key_may_be_missing_null_or_odd(path: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    page, html = render(changed(SMALL, path, value), tmp_path)
    assert page.sections()
    assert not re.search(r">(?:None|nan|inf|\[\]|\{\})<", html)
    report.model_card(changed(SMALL, path, value), tmp_path)


def test_an_empty_run_is_a_page_that_says_so(tmp_path: Path) -> None:
    page, _ = render({}, tmp_path)
    assert "This run holds nothing to show yet." in page.text


@pytest.mark.parametrize("run", [None, [], "run.json", 3])
def test_something_else_than_a_run_is_refused(run: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run must be a mapping, got"):
        report.write(run, tmp_path / "report.html")
    with pytest.raises(ValueError, match="run must be a mapping, got"):
        report.model_card(run, tmp_path / "README.md")
    assert list(tmp_path.iterdir()) == []


def test_nothing_foreign_becomes_markup(tmp_path: Path) -> None:
    page, html = render(sample.hostile(), tmp_path)
    plain, _ = render(sample.realistic(), tmp_path)
    kinds = {tag for tag, _ in page.elements}
    assert kinds <= {tag for tag, _ in plain.elements}
    assert len(page.scripts) == 2 and page.scripts[1] == plain.scripts[1]
    assert "window.hacked" not in page.scripts[1]
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert any("<script>window.hacked=1</script>" in text for text in page.text)
    assert "\u202e" not in html and "\x00" not in html
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", html)[0]


def test_data_for_the_script_is_json_that_cannot_end_its_element(tmp_path: Path) -> None:
    page, html = render(sample.hostile(), tmp_path)
    data = json.loads(page.scripts[0])
    assert set(data) == {"tips", "charts"}
    assert not set("<>&") & set(page.scripts[0])
    assert any("</script>" in title for title, _ in data["tips"]["tried"])
    assert html.count("</script>") == 2


def test_the_page_forbids_itself_everything_but_its_own_script(run: dict[str, Any], tmp_path: Path) -> None:
    page, _ = render(run, tmp_path)
    policy = next(attrs["content"] or "" for tag, attrs in page.elements if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "script-src 'sha256-" in policy and "unsafe-eval" not in policy
    assert "script-src 'unsafe-inline'" not in policy


def test_no_reference_leaves_the_file(run: dict[str, Any], tmp_path: Path) -> None:
    page, html = render(run, tmp_path)
    for _, attrs in page.elements:
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            if name in attrs:
                assert (attrs[name] or "").startswith(("data:image/", "#"))
    assert "@import" not in html and "url(" not in html


def test_budget_rows_say_met_missed_and_unmeasured(tmp_path: Path) -> None:
    rows = [
        {"name": "size", "op": "<=", "limit": 96_000, "value": 83_000, "ok": True},
        {"name": "macs", "op": "<=", "limit": 1e6, "value": 6e6, "ok": False},
        {"name": "accuracy", "op": ">=", "limit": 0.9, "value": 0.887, "ok": False},
        {"name": "latency", "op": "<=", "limit": 0.005, "value": None, "ok": False},
    ]
    _, html = render({"budget": {"text": "...", "met": False, "rows": rows}}, tmp_path)
    body = re.findall(r"<tr><th scope=\"row\">.*?</tr>", html, re.S)
    assert [re.search(r'badge (\w+)">([^<]*)', row).groups() for row in body] == [  # type: ignore[union-attr]
        ("yes", "✓ met"),
        ("no", "✗ not met"),
        ("no", "✗ not met"),
        ("open", "not measured"),
    ]
    assert "14% to spare" in body[0] and "6 times the limit" in body[1] and "1.3 points short" in body[2]
    assert "meter" not in body[3]
    assert all(0 <= float(w) <= 100 for w in re.findall(r"(?:width|left):([-\d.e]+)%", html))


@pytest.mark.parametrize(
    "source",
    [
        "https://example.com/x.png",
        "data:image/svg+xml;base64,PHN2Zz4=",
        "data:text/html;base64,PHN2Zz4=",
        'data:image/png;base64,AAAA" onerror="x',
        "data:image/png;base64,AAAA\n",
        "javascript:alert(1)",
        "data:image/png;base64," + "A" * 50_000,  # large and not a picture
        7,
        None,
    ],
)
def test_only_pictures_given_as_data_are_shown(source: Any) -> None:
    assert picture(source) == ""


def test_large_pictures_are_redrawn_small(tmp_path: Path) -> None:
    source = sample.large(candidates=2, depth=8)["samples"][0]["image"]
    assert len(source) > 200_000
    assert picture(source).startswith("data:image/jpeg;base64,") and len(picture(source)) < 24_000
    small = SMALL["samples"][0]["image"]
    assert picture(small) == small


def test_right_and_wrong_samples_are_marked_in_words(run: dict[str, Any], tmp_path: Path) -> None:
    _, html = render(run, tmp_path)
    wrong = sum(row["label"] != row["predicted"] for row in run["samples"])
    assert html.count('<li class="wrong">') == wrong == 8
    assert html.count("✗ ") >= wrong and f"16 right and {wrong} wrong" in html


def test_warnings_about_the_data_are_announced_at_the_top(run: dict[str, Any], tmp_path: Path) -> None:
    _, html = render(run, tmp_path)
    assert "Data (2 warnings)" in html.split("<main>")[0]


def test_usual_and_largest_run_stay_small(tmp_path: Path) -> None:
    assert report.write(sample.realistic(), tmp_path / "usual.html").stat().st_size < 150_000
    assert report.write(sample.large(), tmp_path / "large.html").stat().st_size < 3_000_000


def test_same_run_same_file(run: dict[str, Any], tmp_path: Path) -> None:
    again = json.loads(json.dumps(run))
    first, second = (report.write(r, tmp_path / f"{k}.html").read_bytes() for k, r in enumerate((run, again)))
    assert first == second


def test_written_as_a_whole_into_new_folders(
    run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = report.write(run, tmp_path / "new" / "folder" / "report.html")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert report.write(run, tmp_path).name == "report.html"
    before = path.read_bytes()

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        report.write({}, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_layers_plot_as_page_and_as_picture(run: dict[str, Any], tmp_path: Path) -> None:
    rows = run["layers"]["before"]
    page = Page(report.layers_plot(rows, tmp_path / "layers.html").read_text("utf-8"))
    assert page.sections() == ["model"] and "stages.1.blocks.0.conv1" in page.text
    svg = report.layers_plot(rows, tmp_path / "layers.svg").read_text("utf-8")
    assert svg.startswith("<svg") and "MACs per layer" in svg


def test_layers_plot_takes_what_measure_gives(tmp_path: Path) -> None:
    from trimtab.core.cost import Cost, LayerCost

    layers = (LayerCost("conv", "Conv2d", 10, 2000, 50, 40), LayerCost("head", "Linear", 4, 30, 2, 16))
    for rows in (layers, list(layers), Cost(layers=layers), Cost(layers=layers).asdict()["layers"]):
        text = report.layers_plot(rows, tmp_path / "layers.html").read_text("utf-8")
        assert "in all 2.03 k" in text


def test_layers_plot_refuses_at_the_door(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must end in .html or .svg, got 'layers.png'"):
        report.layers_plot([{"name": "a", "macs": 1}], tmp_path / "layers.png")
    with pytest.raises(ValueError, match="at least one layer, got none"):
        report.layers_plot([], tmp_path / "layers.html")
    with pytest.raises(ValueError, match="above zero"):
        report.layers_plot([{"name": "a", "macs": 0}], tmp_path / "layers.svg")


def test_importing_the_report_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, trimtab.report as r; r.write, r.model_card; print('torch' in sys.modules, 'PIL' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
