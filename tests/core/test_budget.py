import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.budget import UNITS, Budget, format_value
from trimtab.core.errors import BudgetError


def test_every_unit_reads_as_its_size():
    text = "params<=100k, macs<=12.5M, size<=96KB, memory<=256KiB, latency<=5ms, energy<=3uJ, accuracy>=0.9"
    limits = {c.name: c.limit for c in Budget(text).clauses}
    want = {
        "params": 1e5,
        "macs": 12.5e6,
        "size": 96e3,
        "memory": 2**18,
        "latency": 5e-3,
        "energy": 3e-6,
        "accuracy": 0.9,
    }
    assert limits == pytest.approx(want)
    assert str(Budget(text)) == text


@pytest.mark.parametrize(
    ("text", "says", "column"),
    [
        ("size<96KB", "expected <= or >= after size", 4),
        ("siz<=96KB", "unknown cost 'siz'", 0),
        ("size<=96Kb", "unknown unit 'Kb' for size", 8),
        ("size<=", "expected a number", 6),
        ("latency<=5", "a unit is needed for latency", 10),
        ("params<=100k,", "empty clause", 13),
        ("params<=1k, macs<=1.2.3M", "'1.2.3' is not a number", 18),
        ("accuracy>=90", "a fraction of 1", 10),
        ("params<=-5", "not negative", 8),
        ("", "empty clause", 0),
    ],
)
def test_a_wrong_budget_is_answered_with_a_caret_at_the_place(text, says, column):
    with pytest.raises(BudgetError) as e:
        Budget(text)
    message, shown, caret = str(e.value).split("\n")
    assert says in message
    assert shown == f"  {text}"
    assert caret.index("^") - 2 == column


def test_check_explains_what_is_over_and_by_how_much():
    verdict = Budget("params<=100k, size<=96KB, accuracy>=0.9").check(
        {"params": 90_000, "size": 108_000, "accuracy": 0.88}
    )
    assert not verdict.ok
    assert verdict.explain() == "size is 108 KB, 12.5 % over 96 KB; accuracy is 0.88, 2.2 % under 0.9"
    assert verdict.excess == pytest.approx(0.125)


def test_a_cost_that_was_not_measured_fails_unless_partial():
    budget = Budget("params<=100k, latency<=5ms")
    assert "latency was not measured" in budget.check({"params": 1}).explain()
    assert budget.check({"params": 1}).excess == math.inf
    assert budget.check({"params": 1, "latency": None}, partial=True).ok
    assert not budget.check({"params": 1, "latency": float("nan")}).ok


def test_percentages_are_of_the_reference():
    budget = Budget("macs<=50%, accuracy>=90%")
    with pytest.raises(BudgetError, match="resolve"):
        budget.check({"macs": 1})
    resolved = budget.resolve({"macs": 8_000_000})
    assert resolved.limit("macs") == 4_000_000
    assert resolved.clauses[1].limit == 0.9
    assert resolved.check({"macs": 4_000_000, "accuracy": 0.95}).ok
    with pytest.raises(BudgetError, match="not measured"):
        budget.resolve({"macs": None})


def test_limit_is_the_tightest_upper_bound():
    assert Budget("size<=96KB, size<=90KB").limit("size") == 90_000
    assert Budget("size>=96KB").limit("size") is None


@given(st.sampled_from(sorted(UNITS)), st.sampled_from(["<=", ">="]), st.floats(1e-3, 1.0), st.data())
def test_what_is_written_reads_back(name, op, number, data):
    unit = data.draw(st.sampled_from(sorted(UNITS[name])))
    if name in ("latency", "energy") and not unit:
        return
    (clause,) = Budget(f"{name}{op}{number!r}{unit}").clauses
    assert clause.limit == pytest.approx(number * UNITS[name][unit])
    assert Budget(str(Budget([clause]))) == Budget([clause])


@given(st.text(max_size=30))
def test_no_text_gives_anything_but_a_budget_or_a_budget_error(text):
    with contextlib.suppress(BudgetError):
        assert Budget(text).clauses


def test_values_are_shown_in_their_usual_unit():
    assert format_value("size", 96_000) == "96 KB"
    assert format_value("params", 77_962) == "77.96k"
    assert format_value("latency", 2e-4) == "200 us"
    assert format_value("accuracy", 0.98765) == "0.9877"
