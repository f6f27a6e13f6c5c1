"""The evidence runner: contract, levels, files, tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evidence import ClaimResult, Context, runner, tables
from trimtab.core.card import Card, Claim, Entry, catalogue

ROOT = Path(__file__).resolve().parents[2]

GOOD = """
from evidence import ClaimResult

LEVEL = 4

def run(context):
    for seed in context.each_seed("effect"):
        pass
    return [
        ClaimResult("exact", holds=True, measured={"params": 10}, baseline={"params": 10}),
        ClaimResult("effect", holds=True, measured={"accuracy": 0.9}, baseline={"accuracy": 0.8}, seeds=context.seeds,
                    data="digits", note="toy" if context.smoke else "full"),
    ]
"""
CARD = Card("good", "A good system", "method", ("classify",), (Claim("exact", "has ten"), Claim("effect", "is better")))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A tree with one system that has a script, and a README with a table."""
    known = {"good": Entry(CARD, "compress/prune", "trimtab.compress.prune.good", tmp_path / "good.py")}
    monkeypatch.setattr("trimtab.core.card.catalogue", lambda: known)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/good.py").write_text(GOOD)
    (tmp_path / "README.md").write_text("top\n\n<!-- table: systems -->\nold\n<!-- end of table -->\n\nbottom\n")
    return tmp_path


def run(place: Path, *args: str) -> int:
    where = ["--scripts", str(place / "scripts"), "--results", str(place / "results"), "--root", str(place)]
    return runner.main([*args, *where])


def test_a_run_writes_the_schema_and_the_tables(place, capsys):
    assert run(place, "good", "--seeds", "3", "--data", "/some/where/photos") == 0
    record = json.loads((place / "results/good.json").read_text())
    keys = {"slug", "level", "claims", "command", "seconds", "machine", "versions", "commit", "date"}
    assert set(record) == keys
    assert record["slug"] == "good" and record["level"] == 4
    assert record["command"] == "python -m evidence good --data photos --seeds 3"
    claim = record["claims"][1]
    assert set(claim) == {"id", "says", "holds", "measured", "baseline", "seeds", "data", "note"}
    assert claim["says"] == "is better" and claim["seeds"] == [0, 1, 2] and claim["note"] == "full"
    readme = (place / "README.md").read_text()
    assert "| `good` | A good system | compress/prune | 4 usable |" in readme
    assert readme.startswith("top\n") and readme.endswith("bottom\n") and "old" not in readme
    assert not list(place.rglob("*.tmp"))
    assert "1 of 1 scripts ran through" in capsys.readouterr().out


def test_smoke_keeps_nothing(place):
    before = (place / "README.md").read_text()
    assert run(place, "--all", "--smoke") == 0
    assert not (place / "results").exists()
    assert (place / "README.md").read_text() == before


def test_smoke_is_small():
    context = Context("x", data="huge", smoke=True, seeds=(0,))
    assert context.choose(full=100, smoke=1) == 1
    assert len(context.load_data("digits").splits["train"]) <= 256


def test_a_script_that_breaks_fails_the_run_and_spares_the_others(place, capsys):
    (place / "scripts/bad.py").write_text("def run(context):\n    raise RuntimeError('out of luck')\n")
    assert run(place, "--all") == 1
    assert (place / "results/good.json").exists() and not (place / "results/bad.json").exists()
    out = capsys.readouterr().out
    assert "out of luck" in out and "broken: bad" in out


def test_old_results_survive_a_script_that_breaks(place):
    assert run(place, "good") == 0
    before = (place / "results/good.json").read_text()
    (place / "scripts/good.py").write_text("def run(context):\n    return []\n")
    assert run(place, "good") == 1
    assert (place / "results/good.json").read_text() == before


@pytest.mark.parametrize("args", [[], ["nobody"], ["good", "--all"], ["good", "--seeds", "0"]], ids=" ".join)
def test_wrong_use_is_exit_code_2(place, capsys, args):
    try:
        code = run(place, *args)
    except SystemExit as e:
        code = e.code
    assert code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("results", "says"),
    [
        ([], "must return a list"),
        ([ClaimResult("unknown", True, {"a": 1})], "must be those of the card"),
        ([ClaimResult("exact", True, {})], "no measured numbers"),
        ([ClaimResult("exact", True, {"a": 1}), ClaimResult("exact", True, {"a": 1})], "each claim once"),
        ([ClaimResult("exact", True, {"a": object()})], "JSON values"),
    ],
)
def test_the_contract_is_checked(place, results, says):
    with pytest.raises(ValueError, match=says):
        runner.check("good", results)


def test_numbers_become_plain_json():
    import torch

    value = runner.plain({"a": torch.tensor([1.5, 2.0]), "b": float("nan"), "c": (1, True)})
    assert json.loads(json.dumps(value)) == {"a": [1.5, 2.0], "b": "nan", "c": [1, True]}


def results(exact: bool | None = True, effect: bool | None = True, seeds: int = 3) -> list[ClaimResult]:
    made = [] if exact is None else [ClaimResult("exact", exact, {"n": 1})]
    return made if effect is None else [*made, ClaimResult("effect", effect, {"n": 1}, seeds=range(seeds))]


@pytest.mark.parametrize(
    ("seen", "author", "level"),
    [
        (results(), 3, 3),
        (results(), 4, 4),
        (results(), 2, 2),
        (results(exact=None), 4, 4),
        (results(effect=False), 4, 2),
        (results(seeds=2), 4, 2),
        (results(effect=None), 4, 2),
        (results(exact=False), 4, 1),
        (results(exact=None, effect=False), 4, 2),
        ([*results(), ClaimResult("second", False, {"n": 1}, seeds=range(3))], 4, 4),
        ([ClaimResult("first", False, {"n": 1}, seeds=range(3)), *results()], 4, 2),
    ],
)
def test_the_level_is_what_was_seen(seen, author, level):
    assert runner.reached(seen, author) == level


def test_tables_say_what_did_not_hold(place):
    (place / "scripts/good.py").write_text(GOOD.replace('"effect", holds=True', '"effect", holds=False'))
    assert run(place, "good") == 0
    assert "| is better | **no** | accuracy 0.9 | accuracy 0.8 | 3 | digits. full |" in tables.evidence()
    assert "*is better*: **does not hold**" in tables.family("compress/prune")
    assert "2 exact (1 of 2 claims)" in tables.systems()
    assert "No system of this family" in tables.family("compress/quantize")


def test_a_table_nobody_makes_is_refused():
    with pytest.raises(ValueError, match="tables must be one of"):
        tables.fill("<!-- table: wishes -->\n<!-- end of table -->")
    with pytest.raises(ValueError, match="has no"):
        tables.fill("<!-- table: systems -->\n")


def test_every_script_belongs_to_a_system_and_has_a_contract():
    for slug, path in runner.scripts().items():
        assert slug in catalogue(), f"evidence/{slug}.py belongs to no system"
        assert "def run(context" in path.read_text(encoding="utf-8")


def test_kept_results_keep_the_schema():
    for path in (ROOT / "evidence/results").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        entry = catalogue()[path.stem]
        assert record["slug"] == path.stem
        ids, known = [c["id"] for c in record["claims"]], [c.id for c in entry.card.claims]
        assert ids == [i for i in known if i in ids]
        seen = [ClaimResult(**c) for c in record["claims"]]
        assert record["level"] == runner.reached(seen, author=4)
        assert {"cpu", "cores"} <= set(record["machine"]) and "torch" in record["versions"]


def test_the_table_of_supernets_is_made_from_three_results(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "Not measured" in tables.supernets()
    cell = {"mean": 0.412, "std": 0.012, "values": [0.4, 0.424]}
    row = {"smallest": cell, "largest": cell, "50 %": cell, "MMACs per image and step": 1.5}
    for slug, name in (("bignas", "bignas"), ("deps", "from 25 %")):
        claim = {"measured": {name: row, "looks": 3}, "baseline": {"alone": {"smallest": cell}}}
        (tmp_path / f"{slug}.json").write_text(json.dumps({"claims": [claim]}))
    lines = tables.supernets().splitlines()
    assert lines[2:] == [
        "| `bignas` | 1.5 | 41.2 ± 1.2 |  | 41.2 ± 1.2 |  | 41.2 ± 1.2 |  |",
        "| alone |  | 41.2 ± 1.2 |  |  |  |  |  |",
        "| from 25 % | 1.5 | 41.2 ± 1.2 |  | 41.2 ± 1.2 |  | 41.2 ± 1.2 |  |",
    ]
