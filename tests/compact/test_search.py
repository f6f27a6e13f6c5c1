import pytest

from trimtab.compact import search


def run(scores, rungs, storage, stop_after=None):
    """Halving over made-up learning curves; `scores[i][r]` is what candidate i reaches in rung r."""
    calls = []

    def train(i, r, seconds):
        if stop_after is not None and len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append((i, r, seconds))
        return scores[i][r]

    return search.halving([f"c{i}" for i in range(len(scores))], rungs, train, storage=storage, seed=0), calls


SCORES = [[0.5, 0.6], [0.7, 0.71], [0.6, 0.9], [0.1, 1.0], [0.2, 0.2]]
RUNGS = [search.Rung(5, 1.0), search.Rung(2, 3.0)]


def test_the_better_part_goes_on_and_the_last_round_decides(tmp_path):
    order, calls = run(SCORES, RUNGS, search.storage(tmp_path / "book"))
    assert order == [2, 1, 0, 4, 3]
    assert [c[:2] for c in calls] == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (1, 1), (2, 1)]
    assert [c[2] for c in calls] == [1.0] * 5 + [3.0] * 2


@pytest.mark.parametrize("stop", range(7))
def test_a_killed_search_goes_on_to_the_same_result(tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        run(SCORES, RUNGS, search.storage(tmp_path / "book"), stop_after=stop)
    order, calls = run(SCORES, RUNGS, search.storage(tmp_path / "book"))
    assert order == [2, 1, 0, 4, 3]
    assert len(calls) == 7 - stop


@pytest.mark.parametrize(
    ("seconds", "available", "least"), [(300, 8, 20), (10, 8, 20), (60, 3, 5), (1000, 12, 9), (5, 1, 1)]
)
def test_a_schedule_spends_what_it_was_given(seconds, available, least):
    rungs = search.schedule(seconds, available, least=least)
    assert sum(r.count * r.seconds for r in rungs) == pytest.approx(seconds)
    assert rungs[0].count <= available
    assert [r.count for r in rungs] == sorted((r.count for r in rungs), reverse=True)
    assert rungs[0].count == 1 or rungs[0].seconds >= least
