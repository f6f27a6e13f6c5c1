"""The benchmark runner: turns, medians, ratios, whole processes."""

from __future__ import annotations

import gc
import json
import time

import pytest

from benchmarks.runner import Comparison, Series, compare, compare_processes


@pytest.fixture(autouse=True)
def _only_new_garbage():
    """The runner collects garbage between turns; what other tests have left need not be looked at each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_contenders_take_turns_and_none_always_starts():
    order: list[str] = []
    compare({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=4, warmup=0)
    assert order == ["a", "b", "b", "a"] * 2


def test_warm_up_is_not_counted():
    calls: list[int] = []
    result = compare({"a": lambda: calls.append(1)}, rounds=3, warmup=2, inner=5)
    assert len(calls) == 25
    assert len(result.series["a"].seconds) == 3


def test_ratio_is_the_median_within_rounds():
    a, b = Series("a", [1.0, 20.0, 3.0]), Series("b", [2.0, 40.0, 3.0])
    assert Comparison({"a": a, "b": b}, "b", 3).ratio("a") == 0.5
    assert a.median == 3.0 and a.iqr == 9.5


def test_times_are_right():
    result = compare({"sleep": lambda: time.sleep(0.02)}, rounds=3, warmup=0)
    assert 0.02 <= result.series["sleep"].median < 0.5


def test_whole_processes_report_time_memory_and_what_they_printed():
    big = "x = b'1' * 80_000_000; print('hello'); print('{\"n\": 3}')"
    result = compare_processes({"small": ["python", "-c", "pass"], "big": ["python", "-c", big]}, rounds=2)
    small, large = result.series["small"], result.series["big"]
    assert large.returned == {"n": 3} and small.returned is None
    assert large.peak_bytes[0] > 80e6 > small.peak_bytes[0]
    assert len(small.seconds) == 2 and result.baseline == "big"


def test_a_program_that_fails_is_reported_with_its_words():
    with pytest.raises(RuntimeError, match="bad failed with exit code 3: out of luck"):
        compare_processes({"bad": ["python", "-c", "import sys; print('out of luck', file=sys.stderr); sys.exit(3)"]})


def test_a_program_that_hangs_is_ended(tmp_path):
    late = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    with pytest.raises(RuntimeError, match="longer than"):
        compare_processes({"slow": ["python", "-c", late]}, timeout=0.5)
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_result_is_kept_with_machine_and_versions(tmp_path, capsys):
    result = compare({"a": lambda: {"n": 1}, "b": lambda: object()}, rounds=2, baseline="a", facts={"images": 10})
    kept = json.loads(result.save(tmp_path / "deep/result.json").read_text())
    assert kept["results"]["a"]["returned"] == {"n": 1} and kept["results"]["b"]["returned"] is None
    assert kept["results"]["a"]["ratio"] == 1.0
    assert kept["facts"] == {"images": 10} and "cpu" in kept["machine"] and "torch" in kept["versions"]
    result.show("a title")
    out = capsys.readouterr().out
    assert "a title" in out and "images: 10" in out


@pytest.mark.parametrize("wrong", [{"baseline": "c"}, {"rounds": 0}])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError):
        compare({"a": lambda: 1}, **wrong)
