import time

import pytest

from trimtab.compact.journal import Journal, seconds
from trimtab.core.errors import TrimtabError


@pytest.mark.parametrize(
    ("text", "want"), [("90", 90), ("90s", 90), ("25m", 1500), ("1.5h", 5400), (12, 12), (" 2 min", 120)]
)
def test_time_limits(text, want):
    assert seconds(text) == want


@pytest.mark.parametrize("text", ["", "soon", "-3s", "0", "5 days", "1e9999h"])
def test_wrong_time_limits_say_what_was_expected(text):
    with pytest.raises(ValueError, match="time must be"):
        seconds(text)


def test_a_step_is_done_once_over_all_lives_and_the_clock_goes_on(tmp_path):
    calls = []
    for _ in range(3):
        journal = Journal(tmp_path / "w" / "journal.json", {"data": "x"}, 100)
        assert journal.once("step", lambda: calls.append(1) or {"a": (1, 2)}) == {"a": [1, 2]}
        time.sleep(0.05)
        journal.note()
    assert calls == [1]
    assert journal.resumed
    assert journal.used >= 0.15
    assert journal.left == pytest.approx(100 - journal.used, abs=0.1)


def test_a_step_that_fails_is_not_noted(tmp_path):
    journal = Journal(tmp_path / "journal.json", {}, 1)
    with pytest.raises(ZeroDivisionError):
        journal.once("step", lambda: 1 // 0)
    assert Journal(tmp_path / "journal.json", {}, 1).once("step", lambda: 7) == 7


def test_another_job_in_the_same_place_is_refused_and_named(tmp_path):
    Journal(tmp_path / "w" / "journal.json", {"data": "x", "seed": 0}, 1).note()
    with pytest.raises(TrimtabError, match="another seed"):
        Journal(tmp_path / "w" / "journal.json", {"data": "x", "seed": 1}, 1)
    assert not Journal(tmp_path / "w" / "journal.json", {"data": "x", "seed": 1}, 1, fresh=True).resumed
