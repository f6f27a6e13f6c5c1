"""The space, the cost table and the samplers."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from trimtab.core.errors import TrimtabError
from trimtab.search import Among, Chain, CostTable, Gene, Sandwich, Space, Uniform
from trimtab.search.space import SpaceError

GENES = {"depth": (1, 2, 3), "width.1": (8, 16), "width.2": (8, 16), "width.3": (8, 16)}


def idle(arch):
    return [f"width.{i}" for i in (1, 2, 3) if i > arch["depth"]]


def rng(seed=0):
    return np.random.default_rng(seed)


def test_size_is_that_of_the_enumeration():
    assert Space(GENES).size() == len(list(Space(GENES).enumerate())) == 24


def test_networks_that_differ_in_an_idle_gene_are_one():
    space = Space(GENES, idle=idle)
    a = {"depth": 1, "width.1": 16, "width.2": 8, "width.3": 8}
    assert space.key(a) == space.key({**a, "width.3": 16}) != space.key({**a, "width.1": 8})
    assert len(list(space.enumerate())) == 2 + 4 + 8


def test_restricting_divides_the_space():
    space = Space(GENES)
    parts = [space.restrict({"depth": (d,)}) for d in (1, 2, 3)]
    assert sum(p.size() for p in parts) == space.size()
    assert all(p.max() in space for p in parts)


def test_bignas_space_has_the_size_of_its_table():
    widths = [2, 2, 2, 2, 2, 3, 4, 2, 2]
    depths, kernels = [2, 2, 2, 3, 5, 5, 2], [1, 1, 2, 2, 2, 2, 2]
    counts = [*widths, *depths, *kernels, 4]
    assert Space({f"g{i}": tuple(range(n)) for i, n in enumerate(counts)}).size() == 235_929_600


def test_mutation_without_probability_changes_nothing_and_with_it_every_gene_is_uniform():
    space = Space(GENES)
    arch = space.sample(rng())
    assert space.mutate(arch, 0.0, rng()) == arch
    r = rng()
    seen = Counter(space.mutate(arch, 1.0, r)["depth"] for _ in range(3000))
    assert all(abs(n - 1000) < 110 for n in seen.values())


def test_crossover_takes_every_gene_from_a_parent():
    space, r = Space(GENES), rng()
    children = [space.crossover(space.min(), space.max(), r) for _ in range(200)]
    assert {c["depth"] for c in children} == {1, 3}
    assert len({tuple(c.values()) for c in children}) == 16


def test_rules_hold_in_everything_drawn():
    space = Space({"a": (1, 2, 3), "b": (1, 2, 3)}, valid=lambda a: a["a"] <= a["b"])
    r = rng()
    arch = space.sample(r)
    for _ in range(100):
        arch = space.crossover(space.mutate(arch, 0.7, r), space.sample(r), r)
        assert arch in space and all(n in space for n in space.neighbors(arch))
    assert len(list(space.enumerate())) == 6
    with pytest.raises(ValueError, match="not a valid architecture"):
        space.check({"a": 3, "b": 1})


def test_codes_lead_back():
    space = Space(GENES)
    assert all(space.decode(space.encode(a)) == a for a in space.enumerate())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Space({}), "needs genes"),
        (lambda: Space({"a": ()}), "at least one"),
        (lambda: Space({"a": (1, 1)}), "distinct"),
        (lambda: Space({"a": (2, 1)}), "from small to large"),
        (lambda: Space([Gene("a", (1,)), Gene("a", (2,))]), "distinct names"),
        (lambda: Space({"a": (1, 2)}, valid=lambda a: a["a"] == 1), "must be valid"),
        (lambda: Space({"a": (1, 2)}).check({"a": 3}), "a must be one of"),
        (lambda: Space({"a": (1, 2)}).check({"b": 1}), "differs in a, b"),
        (lambda: Space({"a": (1, 2)}).restrict({"b": (1,)}), "no gene b"),
        (lambda: Space({"a": (1, 2)}).scale(2.0), "fraction must be in"),
        (lambda: Uniform(Space({"a": (1, 2)}), 0), "n must be at least 1"),
        (lambda: Sandwich(Space({"a": (1, 2)}), -1), "n must not be negative"),
        (lambda: Chain(Space({"a": (1, 2)}), []), "at least one architecture"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_space_of_rules_that_nothing_meets_gives_up():
    space = Space({f"g{i}": tuple(range(9)) for i in range(9)}, valid=lambda a: len(set(a.values())) == 1)
    with pytest.raises(SpaceError, match="no valid architecture"):
        space.sample(rng())


# -- costs


def mbconv(a):
    """Stem, up to three blocks, and a head: products of up to five genes."""
    total = 27 * a["w0"] * 64
    for i in (1, 2, 3):
        if i <= a["d"]:
            inside = a["w0"] * a["e"]
            total += 64 * (2 * a["w0"] * inside + a["k"] ** 2 * inside)
    return {"macs": total + a["w0"] * a["h"], "params": a["h"] * 10}


TABLE = Space({"w0": (8, 16, 24), "d": (1, 2, 3), "e": (2, 4, 6), "k": (3, 5), "h": (10, 20), "unused": (1, 2)})


def test_table_equals_the_measurement_everywhere():
    table = CostTable(TABLE, mbconv)
    assert all(table(a) == mbconv(a) for a in TABLE.enumerate())


def test_table_measures_less_than_the_space_and_then_nothing():
    genes = {f"{word}{i}": (1, 2, 3) for word, i in itertools.product("kw", range(5))}
    calls = []

    def chain(a):
        calls.append(1)
        return {"macs": sum(a[f"k{i}"] ** 2 * a[f"w{i}"] * (a[f"w{i - 1}"] if i else 3) for i in range(5))}

    table, r = CostTable(Space(genes), chain), rng(1)
    for _ in range(300):
        table(Space(genes).sample(r))
    done = len(calls)
    assert done < 500 < Space(genes).size()
    archs = [Space(genes).sample(r) for _ in range(100)]
    counted = [table(a) for a in archs]
    assert len(calls) <= done + 30
    assert counted == [chain(a) for a in archs]


def test_a_cost_that_is_no_sum_of_meeting_genes_is_refused():
    def odd(a):  # three genes that meet only all together
        return {"macs": 10 - 10 * (a["x"] == 2 and a["y"] == 2 and a["z"] == 2)}

    space = Space({"x": (1, 2, 3), "y": (1, 2, 3), "z": (1, 2, 3)})
    with pytest.raises(TrimtabError, match="its parts add up to"):
        for seed in range(20):
            CostTable(space, odd, seed=seed)


# -- samplers


def test_sandwich_has_both_ends_every_step():
    space, sampler = Space(GENES), Sandwich(Space(GENES), 2)
    for step in range(20):
        archs = sampler.next(step)
        assert len(archs) == 4 and archs[0] == space.max() and archs[-1] == space.min()


def test_samplers_repeat_by_seed_and_resume_from_their_state():
    a, b = Uniform(Space(GENES), 2, seed=3), Uniform(Space(GENES), 2, seed=3)
    assert [a.next(i) for i in range(5)] == [b.next(i) for i in range(5)]
    c = Uniform(Space(GENES), 2, seed=9)
    c.load_state_dict(a.state_dict())
    assert [a.next(i) for i in range(5)] == [c.next(i) for i in range(5)]


def test_samplers_leave_the_global_randomness_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    Sandwich(Space(GENES)).next(0)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_a_chain_keeps_its_order():
    space = Space(GENES)
    assert Chain(space, [space.max(), space.min()]).next(7) == [space.max(), space.min()]


def test_a_grid_moves_genes_of_a_kind_together():
    space = Space({"width.a": (8, 16), "width.b": (8, 12, 16), "depth.a": (1, 2), "depth.b": (1, 2, 3)})
    grid = list(space.grid())
    widths = [(8, 8), (8, 12), (16, 16)]
    assert {(a["width.a"], a["width.b"]) for a in grid} == set(widths) and len(grid) == 9
    assert len(list(space.grid(free=("depth",)))) == 3 * 2 * 3
    assert list(space.grid(2)) == [
        {"width.a": w, "width.b": w, "depth.a": a, "depth.b": b} for w in (8, 16) for a, b in ((1, 1), (2, 3))
    ]
    assert {space.key(a) for a in grid} >= {space.key(space.scale(f)) for f in (0, 1)}


def test_networks_are_drawn_from_a_list_as_often_as_was_said():
    space = Space({"width": (8, 12, 16)})
    sampler = Among(space, [{"width": 8}, {"width": 16}], n=2, p=[0.25, 0.75], seed=0)
    drawn = [a["width"] for t in range(2000) for a in sampler.next(t)]
    assert set(drawn) == {8, 16} and abs(drawn.count(16) / len(drawn) - 0.75) < 0.03
    for p in ([0.5, 0.6], [1.0], [1.5, -0.5]):
        with pytest.raises(ValueError, match="p must be probabilities of 2 networks"):
            Among(space, [{"width": 8}, {"width": 16}], p=p)
    with pytest.raises(ValueError, match="at least one"):
        Among(space, [])
