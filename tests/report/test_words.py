"""Numbers in words, and the verdict."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.report import sample
from trimtab.report.words import (
    clean,
    count,
    duration,
    guessing,
    interval,
    listing,
    number,
    pair,
    percent,
    quantity,
    verdict,
)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("size", 96_000, "96 KB"),
        ("size", 1, "1 byte"),
        ("size", 999, "999 bytes"),
        ("size", 999_960, "1 MB"),
        ("params", 0, "0"),
        ("params", 999_999, "1 M"),
        ("params", 78_543, "78.5 k"),
        ("macs", 12_500_000, "12.5 M"),
        ("macs", 4.1e13, "41 T"),
        ("latency", 0.00512, "5.12 ms"),
        ("latency", 3.4e-7, "0.34 µs"),
        ("energy", 0.0021, "2.1 mJ"),
        ("accuracy", 0.9672, "96.7%"),
        ("size", None, "–"),
        ("size", "96", "–"),
        ("size", math.nan, "–"),
        ("size", True, "–"),
    ],
)
def test_quantity_has_unit_and_three_digits(name: str, value: Any, said: str) -> None:
    assert quantity(name, value) == said


def test_percent_never_rounds_to_all_or_nothing() -> None:
    assert [percent(v) for v in (0.9996, 0.99996, 1.0, 0.0, 0.0004)] == ["99.96%", "99.996%", "100%", "0%", "0.04%"]


def test_value_and_limit_that_differ_are_never_shown_alike() -> None:
    assert pair("size", 96_040, 96_000) == ("96.04 KB", "96 KB")
    assert pair("macs", 12_500_001, 12_500_000) == ("12.500001 M", "12.5 M")
    assert pair("accuracy", 0.89996, 0.9) == ("89.996%", "90.000%")
    assert pair("size", 96_000, 96_000) == ("96 KB", "96 KB")


def test_duration_listing_and_count_read_like_prose() -> None:
    assert [duration(s) for s in (0, 3.21, 45.2, 92, 3600, 7530, None)] == [
        "0 s", "3.2 s", "45 s", "1 min 32 s", "1 h", "2 h 6 min", "–",
    ]  # fmt: skip
    assert listing(["a", "b", "c"]) == "a, b and c"
    assert (count(1, "image"), count(1797, "image")) == ("1 image", "1,797 images")


def test_interval_is_wilsons() -> None:
    from scipy.stats import binomtest

    for right, trials in ((306, 360), (0, 10), (10, 10), (9_999, 10_000)):
        theirs = binomtest(right, trials).proportion_ci(method="wilson")
        assert interval(right / trials, trials) == pytest.approx((theirs.low, theirs.high), abs=1e-5)
    assert interval(1.0, 10)[1] == 1.0


def test_clean_leaves_nothing_invisible_or_unwritable() -> None:
    said = clean("a\x00b\u202ec\ud800d\u2028e\tf\ng")
    assert said == "a\ufffdb\ufffdc\ufffdd\ufffde\tf\ng"
    said.encode("utf-8")


def test_number_takes_only_finite_numbers() -> None:
    assert [number(v) for v in (1, 2.5, True, "3", math.inf, math.nan, None, 10**400)] == [1, 2.5] + [None] * 6


def test_verdict_when_met_names_the_tightest_limit(run: dict[str, Any]) -> None:
    found = verdict(run)
    assert (found.state, found.head) == ("met", "Budget met")
    assert "85.0% test accuracy" in found.rest
    assert found.rest.endswith("the tightest limit is accuracy, with 5 points to spare.")


def test_verdict_when_missed_names_what_failed_and_by_how_much(run: dict[str, Any]) -> None:
    run["budget"] = {
        "met": False,
        "rows": [{"name": "size", "op": "<=", "limit": 50_000, "value": 83_593, "ok": False}],
    }
    run["tried"] = [
        {"name": "big", "size": 90_000, "chosen": True},
        {"name": "nearly", "size": 52_000, "chosen": False},
        {"name": "unknown", "size": None},
    ]
    said = verdict(run).sentence
    assert (
        said
        == "Budget not met: size is 83.6 KB, 67% over (limit 50 KB). Closest of 3 tried: nearly, size 52 KB, 4% over."
    )


def test_verdict_when_the_chosen_is_the_closest() -> None:
    assert verdict(sample.missed()).sentence == (
        "Budget not met: accuracy is 85.0%, 15 points short (limit 99.9%). Of 43 tried, none came closer."
    )


def test_an_unmeasured_limit_is_neither_met_nor_missed(run: dict[str, Any]) -> None:
    run["budget"]["rows"].append({"name": "latency", "op": "<=", "limit": 0.001, "value": None, "ok": False})
    run["budget"]["met"] = False
    assert verdict(run).state == "open"
    assert "latency was not measured" in verdict(run).rest


def test_a_model_that_guesses_is_called_that(run: dict[str, Any]) -> None:
    assert guessing(run) == ""
    run["result"]["accuracy"]["test"] = 0.12
    assert "right 10.3% of the time" in guessing(run)  # 37 of the 360 test images are of the most frequent class
    run["confusion"] = None
    run["data"]["counts"]["test"] = 10_000
    assert guessing(run) == ""  # 12% of ten thousand is more than chance
    assert guessing({}) == ""


def test_verdict_without_a_budget(run: dict[str, Any]) -> None:
    run["budget"] = None
    assert verdict(run).state == "none"
    assert verdict({}).sentence == "No budget was set."


@pytest.mark.parametrize(("limit", "value"), [(0, 0), (0, 5), (1, 0), (1e-300, 1e300), (-1, 5)])
def test_odd_limits_still_give_a_sentence(limit: float, value: float) -> None:
    row = {"name": "macs", "op": "<=", "limit": limit, "value": value}
    assert verdict({"budget": {"rows": [row]}}).sentence.startswith("Budget")
