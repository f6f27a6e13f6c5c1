"""Statements about labels, and what follows from them."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.compress.graph import reshape as rs
from trimtab.compress.graph.labels import Factor, Ledger, constant, size_of


def parts(ledger: Ledger, *arrays: np.ndarray) -> list[list[int]]:
    """Component numbers of each array, small numbers in order of appearance; -1 where frozen."""
    solution = ledger.solve()
    seen: dict[int, int] = {}
    rows = []
    for labels in arrays:
        component = solution.component[labels]
        rows.append([-1 if solution.frozen[c] else seen.setdefault(int(c), len(seen)) for c in component])
    return rows


def dim(ledger: Ledger, n: int) -> tuple[Factor, ...]:
    return (Factor(n, ledger.new(n)),)


def test_ties_join_and_freezing_spreads() -> None:
    ledger = Ledger()
    a, b, c = ledger.new(3), ledger.new(3), ledger.new(3)
    ledger.tie(a, b)
    ledger.freeze(c[:1])
    ledger.tie(b[:1], c[:1])
    assert parts(ledger, a, b, c) == [[-1, 0, 1], [-1, 0, 1], [-1, 2, 3]]


def test_a_product_is_cut_along_the_factor_with_most_units() -> None:
    ledger = Ledger()
    flat = dim(ledger, 12)
    outer, inner = rs.split(ledger, flat, [2, 6])
    assert parts(ledger, flat[0].labels, outer[0].labels) == [[0, 1, 2, 3, 4, 5] * 2, [-1, -1]]
    assert inner[0].size == 6


def test_a_product_is_cut_along_its_blocks_first() -> None:
    ledger = Ledger()
    flat = dim(ledger, 12)
    heads, width = rs.split(ledger, flat, [2, 6])
    ledger.block(heads[0].labels)
    assert parts(ledger, flat[0].labels, width[0].labels) == [[0] * 6 + [1] * 6, [-1] * 6]


def test_a_frozen_factor_leaves_the_cut_to_the_other() -> None:
    ledger = Ledger()
    flat = dim(ledger, 12)
    heads, _ = rs.split(ledger, flat, [2, 6])
    ledger.block(heads[0].labels)
    ledger.freeze(heads[0].labels)
    assert parts(ledger, flat[0].labels) == [[0, 1, 2, 3, 4, 5] * 2]


def test_a_factor_that_another_product_freezes_lets_the_next_one_drive() -> None:
    ledger = Ledger()
    flat, other = dim(ledger, 12), dim(ledger, 9)
    outer, inner = rs.split(ledger, flat, [6, 2])
    bridge = ledger.new(6)
    ledger.tie(outer[0].labels, bridge)
    ledger.freeze(bridge)
    rs.split(ledger, other, [3, 3])
    assert parts(ledger, flat[0].labels, inner[0].labels) == [[0, 1] * 6, [0, 1]]


def test_merging_and_splitting_the_same_way_states_nothing() -> None:
    ledger = Ledger()
    value = (constant([4])[0], dim(ledger, 3), dim(ledger, 5))
    merged = rs.reshape(ledger, value, [60])
    back = rs.reshape(ledger, merged, [4, 3, 5])
    assert back[1][0].labels is value[1][0].labels and back[2][0].labels is value[2][0].labels


def test_space_beside_channels_flattens_to_the_channels() -> None:
    ledger = Ledger()
    channels = dim(ledger, 3)
    flat = rs.labels_of(ledger, channels + constant([4])[0])
    assert flat is not None
    assert parts(ledger, flat) == [[0] * 4 + [1] * 4 + [2] * 4]


def test_meeting_a_constant_freezes() -> None:
    ledger = Ledger()
    channels = dim(ledger, 3)
    rs.unify(ledger, channels, constant([3])[0])
    assert parts(ledger, channels[0].labels) == [[-1, -1, -1]]


def test_different_factorisations_of_one_size_agree_index_by_index() -> None:
    ledger = Ledger()
    a = dim(ledger, 6) + dim(ledger, 2)
    b = dim(ledger, 12)
    together = rs.unify(ledger, a, b)
    assert size_of(together) == 12
    assert parts(ledger, b[0].labels)[0] == [i // 2 for i in range(12)]


@pytest.mark.parametrize(
    ("have", "want"), [((2, 12), (2, 3, 4)), ((2, 3, 4), (6, 4)), ((1, 6, 1), (6,)), ((6,), (1, 2, 3, 1))]
)
def test_reshape_keeps_the_sizes(have: tuple[int, ...], want: tuple[int, ...]) -> None:
    ledger = Ledger()
    value = tuple(dim(ledger, n) if n > 1 else () for n in have)
    assert tuple(map(size_of, rs.reshape(ledger, value, want))) == want
