"""DeepMAD: the formulas against the published numbers, the program against the published structures."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import trimtab as tt
from tests.elsewhere import python
from trimtab import testing
from trimtab.core.errors import BudgetError
from trimtab.core.meta import shapes_only
from trimtab.models.classify.deepmad_nets import PUBLISHED, DeepMADNet
from trimtab.search.design.deepmad import LAST, Structure, deepmad, design, figures, usual_strides

# name, parameters with 1000 classes, MACs in G without the classifier, score, rho
TABLE = [
    ("r18", 11_826_088, 1.8109, 32_120.203, 0.2991),
    ("r34", 21_690_160, 3.6343, 43_142.673, 0.3000),
    ("r50", 25_441_144, 4.0415, 48_919.277, 0.2998),
    ("29m_224", 28_669_956, 4.3220, 11_915.370, 0.4965),
    ("29m_288", 28_703_630, 4.3205, 11_705.137, 0.4966),
    ("50m", 49_408_964, 8.4484, 14_833.203, 0.4930),
    ("89m", 88_325_780, 15.0239, 18_020.379, 0.4951),
]
LAYERS = {"r18": [1, 4, 22, 79, 115], "29m_224": [7, 19, 37, 55, 71]}
R18_BUDGET = "macs<=1.82G, params<=11.69M"


def published(name: str) -> tuple[Structure, tuple[int, int, int]]:
    given = dict(PUBLISHED[name])
    size = 288 if name.endswith("288") else 224
    return Structure(given.pop("stem"), tuple(given.pop("stages")), **given), (3, size, size)


def reference_score(net: Structure, f) -> float:
    """What the authors' code says: for it, a map has one pixel from the first squeeze-and-excitation on."""
    if net.kind == "bottleneck":
        return float(f.entropy)
    seen = [net.stages[0][4] == 1, *([True] * (len(f.ends) - 1))]  # the stem's own stage has none
    pixels = [1 if se else e.height * e.width for e, se in zip(f.ends, seen)]
    weights = [1.0] * (len(f.ends) - 1) + [LAST]
    return float(sum(a * np.log(p * e.channels) * e.log_width / 2 for a, p, e in zip(weights, pixels, f.ends)))


@pytest.mark.parametrize(("name", "params", "macs", "score", "rho"), TABLE)
def test_formulas_give_the_published_numbers(name, params, macs, score, rho):
    net, size = published(name)
    f = figures(net, size)
    assert f.params == params
    assert round((f.macs - 1000 * f.ends[-1].channels) / 1e9, 4) == macs
    assert round(reference_score(net, f), 3) == score
    assert round(float(f.rho), 4) == rho


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_networks_cost_what_the_formulas_say(name):
    net, size = published(name)
    with shapes_only():
        model = tt.create_model(f"deepmad_{name}")
    cost, f = tt.measure(model, size, what=("params", "macs")), figures(net, size)
    assert (cost.params, cost.macs) == (f.params, f.macs)


def test_entropies_of_the_stages_of_r18():
    net, size = published("r18")
    assert np.round(figures(net, size).entropies, 3).tolist() == [21.263, 109.487, 726.978, 2782.779, 28479.697]


@pytest.mark.parametrize("name", LAYERS)
def test_layers_at_the_ends_of_stages(name):
    net, size = published(name)
    assert [int(e.layers) for e in figures(net, size).ends] == LAYERS[name]


def test_resnet_50_has_a_small_score_and_a_small_rho():
    net = Structure(64, ((256, 64, 3, 3, 2), (512, 128, 3, 4, 2), (1024, 256, 3, 6, 2), (2048, 512, 3, 3, 2)))
    f = figures(net, (3, 224, 224))
    assert round(float(f.entropy), 3) == 16_854.703 and round(float(f.rho), 4) == 0.0930


def test_widths_times_t_add_layers_times_log_t_and_divide_rho_by_t():
    net, size = published("r18")
    end = figures(net, size).ends[-1]
    scaled = replace(end, log_width=end.log_width + end.layers * np.log(1.7))  # each width times 1.7
    assert scaled.rho == pytest.approx(end.rho / 1.7)
    assert scaled.entropy - end.entropy == pytest.approx(
        np.log(end.height * end.width * end.channels) * end.layers * np.log(1.7) / 2
    )


def test_rho_is_linear_in_depth_entropy_linear_in_depth_and_logarithmic_in_width():
    def end(depth: int, width: int = 64):
        return figures(Structure(width, ((width, width, 3, depth, 1),), stem_stride=1), (width, 8, 8)).ends[-1]

    one, two = end(100), end(200)
    assert two.rho / one.rho == pytest.approx(2, rel=0.01)
    deeper = [end(d).entropy for d in (10, 20, 30)]
    assert deeper[2] - deeper[1] == pytest.approx(deeper[1] - deeper[0])
    per_layer = [end(20, w).log_width / end(20, w).layers for w in (32, 64, 128)]
    assert per_layer[2] - per_layer[1] == pytest.approx(per_layer[1] - per_layer[0]) == pytest.approx(np.log(2))


def test_many_structures_at_once_are_each_of_them_alone():
    nets = [Structure(s, ((w, 16, 3, d, 1), (2 * w, 24, 5, 2, 2)), stem_stride=1)
            for s, w, d in ((8, 24, 1), (16, 48, 3))]  # fmt: skip
    both = Structure(np.array([8, 16]), ((np.array([24, 48]), 16, 3, np.array([1, 3]), 1),
                                         (np.array([48, 96]), 24, 5, 2, 2)), stem_stride=1)  # fmt: skip
    f = figures(both, (3, 33, 32), 10)
    for i, net in enumerate(nets):
        one = figures(net, (3, 33, 32), 10)
        for name in ("params", "macs", "entropy", "rho", "unevenness"):
            assert np.broadcast_to(getattr(f, name), 2)[i] == pytest.approx(float(getattr(one, name)))


# -- the program


def test_the_solver_beats_the_published_r18_within_seconds():
    net, size = published("r18")
    f = figures(net, size)
    bar = float(f.entropy - 10 * f.unevenness)
    assert round(bar) == 32_033
    start = time.process_time()
    found = figures(design(size, budget=R18_BUDGET, rho=0.3, seed=0), size)
    assert time.process_time() - start < 30
    assert found.entropy - 10 * found.unevenness >= bar
    assert found.rho <= 0.3 and found.macs <= 1.82e9 and found.params <= 11.69e6


def test_more_rho_more_entropy_and_rho_is_used_up():
    got = [figures(design((3, 32, 32), budget="macs<=10M", rho=r, num_classes=10, rounds=200), (3, 32, 32), 10)
           for r in (0.3, 1.0, 3.0)]  # fmt: skip
    entropies = [float(f.entropy) for f in got]
    assert entropies == sorted(entropies)
    assert all(0.9 * r < f.rho <= r for r, f in zip((0.3, 1.0, 3.0), got))


@pytest.mark.parametrize("kind", ["bottleneck", "depthwise"])
def test_a_design_keeps_the_rules(kind):
    net = design((3, 64, 64), budget="macs<=60M, params<=1M", kind=kind, num_classes=10, rounds=150, seed=1)
    widths = [int(net.stem), *(int(s[0]) for s in net.stages)]
    assert widths == sorted(widths) and all(w % 8 == 0 for w in widths)
    assert all(b <= 4 * a + 4 for a, b in itertools.pairwise(widths))
    share = [s[1] / s[0] for s in net.stages]
    assert max(share) <= 1 if kind == "bottleneck" else min(share) > 1
    assert {s[2] for s in net.stages} <= ({3, 5} if kind == "bottleneck" else {3, 5, 7})
    assert net.stages[0][3] <= 3


@pytest.mark.parametrize(("size", "macs"), [((3, 32, 32), 10e6), ((1, 8, 8), 300e3), ((1, 28, 28), 4e6)])
def test_a_model_inside_the_budget(size, macs):
    model = tt.design.deepmad(size, budget=f"macs<={macs:.0f}", num_classes=10, rounds=150)
    cost = tt.measure(model, size)
    assert 0.8 * macs < cost.macs <= macs
    assert model(torch.zeros(2, *size)).shape == (2, 10)


def test_the_same_seed_gives_the_same_model():
    a, b, c = (deepmad((3, 32, 32), budget="macs<=10M", num_classes=10, rounds=40, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert [p.shape for p in a.parameters()] != [p.shape for p in c.parameters()]


def test_usual_strides_leave_a_map_of_4_to_8_pixels():
    for side in (8, 15, 28, 32, 64, 96, 128, 160, 224, 300):
        stem, rest = usual_strides((3, side, side))
        assert 4 <= side / (stem * np.prod(rest)) < 10


def test_it_learns_is_compressed_saved_exported_and_loaded_elsewhere(tmp_path):
    data = tt.load_data("digits", limit=600)
    model = deepmad(data, budget="macs<=300k", rounds=40)
    result = tt.fit(model, data, epochs=4, lr=0.05, batch_size=32, augment="none", progress=False)
    assert result.best["val_accuracy"] > 0.6
    small = tt.compress.magnitude(model, data, budget="macs<=60%")
    assert tt.measure(small, (1, 8, 8)).macs <= 0.6 * tt.measure(model, (1, 8, 8)).macs
    tt.save(small, tmp_path / "small")
    file = tt.export(small, tmp_path / "m.onnx", data=data).path
    code = f"import trimtab as tt; print(tt.measure(tt.load({str(tmp_path / 'small')!r}), (1, 8, 8)).macs)"
    assert int(python(code)) == tt.measure(small, (1, 8, 8)).macs and file.is_file()


def test_depthwise_networks_pass_the_battery_too():
    stages = [(16, 16, 3, 1, 1), (24, 16, 3, 2, 2)]
    testing.check_model(lambda: DeepMADNet(stages=stages, kind="depthwise", neck=32), input_size=(3, 16, 16))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"budget": "macs<=50%"}, "relative"),
        ({"budget": "latency<=2ms"}, "bounded in params and macs alone, got latency"),
        ({"budget": "macs<=10k"}, "no network of this kind is inside macs<=10k"),
        ({"budget": "macs<=10M", "rho": 0.01}, "rho<=0.01"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(kwargs, message):
    with pytest.raises(BudgetError, match=message):
        deepmad((3, 32, 32), num_classes=10, rounds=20, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "dense"}, "kind must be one of bottleneck, depthwise, got 'dense'"),
        ({"rho": 0}, "rho must be positive"),
        ({"max_width": 4}, "max_width must be at least 8"),
        ({"strides": (1, 3)}, "strides must be of 1 and 2"),
        ({"data": (32, 32)}, "data must be a Data or an input size"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        deepmad(**{"data": (3, 32, 32), "budget": "macs<=10M", **kwargs})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stages": []}, "at least one super-block"),
        ({"stages": [(8, 8, 4, 1, 1)]}, "odd kernel"),
        ({"stages": [(8, 8, 3, 0, 1)]}, r"stages\[0\]"),
        ({"kind": "dense"}, "kind must be one of"),
        ({"stem_stride": 3}, "stem_stride must be 1 or 2"),
        ({"neck": -1}, "neck must not be negative"),
    ],
)
def test_structures_that_cannot_be_built(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DeepMADNet(**kwargs)
