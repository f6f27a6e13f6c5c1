"""Dual CNN: the pair and its threshold as measured, the memory's promises, and the cascade in ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import trimtab as tt
from trimtab.cli import arguments
from trimtab.core.errors import ArtifactError, BudgetError, DataError
from trimtab.deploy import CascadeModel, OnnxModel, ResultCache, dual_cnn, export
from trimtab.deploy.cascade import Answer, Gate, confidence, dhash
from trimtab.deploy.dual_cnn import Pair, compare, complementarity, curve, temperature

# --------------------------------------------------------------------------------------------------- pair and threshold


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_complementarity_counts_balanced_disagreement(rows: list[tuple[bool, bool]]) -> None:
    a, b = (np.array(column) for column in zip(*rows))
    n, na, nb = len(a), int(a.sum()), int(b.sum())
    paper, script = complementarity(a, b), complementarity(a, b, "script")
    assert paper == pytest.approx(2 * min((a & ~b).sum(), (b & ~a).sum()) / n)
    assert paper == pytest.approx(((a | b).sum() - (a & b).sum() - abs(na - nb)) / n)
    assert script == pytest.approx((a ^ b).sum() / n)
    assert paper <= script and (paper == script) == (na == nb)


def test_the_two_formulas_can_rank_pairs_differently() -> None:
    good = np.array([1] * 8 + [0] * 2, bool)
    balanced, lopsided = np.array([1] * 6 + [0] * 2 + [1] * 2, bool), np.array([1] * 3 + [0] * 6 + [1], bool)
    assert complementarity(good, balanced) > complementarity(good, lopsided)
    assert complementarity(good, balanced, "script") < complementarity(good, lopsided, "script")


def two_networks(n: int = 500, classes: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of two networks that are right more often than not, independently, and the labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=n)
    first, second = (rng.normal(0, 1.5, (n, classes)) for _ in range(2))
    for logits in (first, second):
        logits[np.arange(n), labels] += 2
    return first, second, labels


@pytest.mark.parametrize("score", ["maxp", "difference", "entropy"])
@pytest.mark.parametrize("post_check", [False, True])
def test_the_curve_is_what_trying_every_threshold_gives(score: str, post_check: bool) -> None:
    first, second, labels = two_networks()
    seen = curve(first, second, labels, Gate(score, 0.0, post_check), count=50)
    for threshold, accuracy, asked in zip(seen.thresholds, seen.accuracy, seen.asked):
        gate = Gate(score, threshold, post_check)
        unsure = gate.unsure(first)
        answers = np.where(unsure & gate.second_wins(first, second), second.argmax(-1), first.argmax(-1))
        assert accuracy == pytest.approx((answers == labels).mean()) and asked == pytest.approx(unsure.mean())
    assert seen.best() == int(np.argmax(seen.accuracy))
    assert seen.best(0.01) <= seen.best()
    assert seen.accuracy[seen.best(0.01)] >= seen.accuracy.max() - 0.01
    assert seen.accuracy.max() > max((x.argmax(-1) == labels).mean() for x in (first, second))


def test_the_gates_limits_are_the_networks_alone() -> None:
    first, second, _ = two_networks()
    assert not Gate(threshold=0.0).unsure(first).any()
    above = float(confidence(first).max()) + 1e-9
    assert Gate(threshold=above).unsure(first).all() and Gate(threshold=above).second_wins(first, second).all()
    surer = Gate(threshold=above, post_check=True).second_wins(first, second)
    assert (surer == (confidence(second) > confidence(first))).all()
    assert not Gate(post_check=True).second_wins(first, first).any()  # the second must be strictly surer


def test_confidence_is_between_0_and_1_even_when_the_softmax_is_saturated() -> None:
    logits = np.array([[1e4, 0, 0, 0], [0, 0, 0, 0], [3, 2, 1, 0]], np.float32)
    for score, (sure, blank) in {"maxp": (1, 0.25), "difference": (1, 0), "entropy": (1, 0)}.items():
        found = confidence(logits, score)
        assert found[:2] == pytest.approx([sure, blank]) and 0 < found[2] < 1
    p = np.exp(logits[2]) / np.exp(logits[2]).sum()
    assert confidence(logits, "entropy")[2] == pytest.approx(1 + (p * np.log(p)).sum() / np.log(4))


def test_temperatures_make_confidences_compare() -> None:
    first, _, labels = two_networks(4000)
    t = temperature(first, labels)
    assert temperature(5 * first, labels) == pytest.approx(5 * t, rel=1e-3)
    assert confidence(5 * first / temperature(5 * first, labels)) == pytest.approx(confidence(first / t), abs=1e-3)
    louder = Gate(post_check=True, temperatures=(t, 2 * t))  # the second, for all its noise, is never surer
    assert not louder.second_wins(first, first).any()


@pytest.mark.parametrize(
    ("depth", "params", "macs"),
    [(3, 269_722, 40_551_040), (5, 464_154, 68_862_592), (7, 658_586, 97_174_144), (9, 853_018, 125_485_696)],
)
def test_the_pool_of_cifar_resnets_costs_what_it_should(depth: int, params: int, macs: int) -> None:
    with torch.device("meta"):
        net = tt.create_model("resnet20_cifar", depths=(depth,) * 3)
    cost = tt.measure(net, (3, 32, 32), what=("params", "macs"))
    assert (cost.params, cost.macs) == (params, macs)


# -------------------------------------------------------------------------------------------------------------- memory


def answer(sure: float = 1.0) -> Answer:
    return Answer(np.array([1.0, 0.0]), sure, 0)


def test_the_memory_is_bounded_and_forgets_what_was_not_used() -> None:
    cache = ResultCache(capacity=2)
    for key in "ab":
        cache.put(key, answer())
    assert cache.get("a") is not None
    cache.put("c", answer())
    assert (cache.get("a") is not None, cache.get("b"), len(cache), cache.evictions) == (True, None, 2, 1)
    cache.clear()
    assert cache.get("a") is None and (cache.hits, cache.misses) == (2, 2)


def test_answers_grow_old_and_unsure_ones_are_not_kept() -> None:
    now = [0.0]
    cache = ResultCache(ttl=10, least=0.5, clock=lambda: now[0])
    cache.put("a", answer())
    cache.put("b", answer(0.4))
    now[0] = 9.9
    assert cache.get("a") is not None and cache.get("b") is None
    now[0] = 10.1
    assert cache.get("a") is None and len(cache) == 0


def test_keys_hold_the_version_and_every_bit() -> None:
    x = np.zeros((1, 8, 8), np.float32)
    y = x.copy()
    y[0, 3, 3] = 1e-6
    keys = [
        ResultCache(version=v).key(image, lambda image=image: image)
        for v, image in (("1", x), ("2", x), ("1", y), ("1", x))
    ]
    assert len(set(keys)) == 3 and keys[0] == keys[3]


def test_a_radius_takes_near_images_for_the_same() -> None:
    cache = ResultCache(perceptual=True, radius=2)
    cache.put(("", 0b1100, 0b1), answer())
    assert cache.get(("", 0b1111, 0b1)) is not None
    assert cache.get(("", 0b0000, 0b1)) is not None
    assert cache.get(("", 0b0011, 0b1)) is None and cache.get(("x", 0b1100, 0b1)) is None


def photo(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC))


def test_the_hash_of_a_mirrored_image_is_the_complement_read_backwards() -> None:
    image = np.random.default_rng(0).permutation(72).astype(np.uint8).reshape(8, 9)  # no ties
    plain, mirrored = (np.array(list(f"{dhash(x):064b}")).reshape(8, 8) == "1" for x in (image, image[:, ::-1]))
    assert np.array_equal(mirrored, ~plain[:, ::-1])


def test_the_hash_bears_noise_and_tells_images_apart() -> None:
    images = [photo(seed) for seed in range(200)]
    assert len({dhash(x) for x in images}) == 200
    noise = np.random.default_rng(0).integers(-1, 2, images[0].shape)
    noisy = np.clip(images[0].astype(int) + noise, 0, 255).astype(np.uint8)
    assert (dhash(noisy) ^ dhash(images[0])).bit_count() <= 2
    assert dhash(np.tile(np.arange(80, dtype=np.uint8)[:, None], (1, 90)), down=True) == 2**64 - 1


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"radius": 3}, "radius needs perceptual=True"),
        ({"radius": 65, "perceptual": True}, "radius must be 0 to 16 bits"),
        ({"ttl": 0}, "ttl must be positive"),
        ({"least": 2}, "least must be 0 to 1"),
    ],
)
def test_a_memory_that_makes_no_sense_is_refused(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ResultCache(**kwargs)


# ------------------------------------------------------------------------------------------------------------- cascade


class Half(nn.Module):
    """Looks at the rows from `start` on alone: two of these make different mistakes."""

    def __init__(self, start: int, hidden: int) -> None:
        super().__init__()
        self.start = start
        self.body = nn.Sequential(nn.Linear(40, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x[:, :, self.start : self.start + 5].flatten(1))


@pytest.fixture(scope="module")
def data() -> Any:
    return tt.load_data("digits")


@pytest.fixture(scope="module")
def pool(data: Any) -> dict[str, nn.Module]:
    nets = {}
    for name, start, hidden in (("top", 0, 24), ("bottom", 3, 32), ("same", 0, 40)):
        torch.manual_seed(0)
        learn = {"epochs": 6, "lr": 0.01, "batch_size": 64, "augment": "none", "progress": False, "val": None}
        nets[name] = tt.fit(Half(start, hidden), data, **learn).model
    return nets


@pytest.fixture(scope="module")
def pair(pool: dict[str, nn.Module], data: Any) -> Pair:
    return dual_cnn(pool, data)


@pytest.fixture(scope="module")
def folder(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair.save(tmp_path_factory.mktemp("cascade") / "pair")


def images_of(data: Any, n: int = 60) -> np.ndarray:
    return next(iter(data.loader("test", batch_size=n, shuffle=False)))["image"].numpy()


def test_networks_that_look_elsewhere_are_chosen_and_beat_both(pair: Pair, pool: Any, data: Any, folder: Path) -> None:
    assert (pair.first.name, pair.second.name) == ("top", "bottom")
    assert pair.complementarity["top", "bottom"] == max(pair.complementarity.values())
    f = pair.figures
    assert f["accuracy"] > max(f["first"], f["second"]) and f["oracle"] >= f["accuracy"]
    costs = [tt.measure(pool[name], (1, 8, 8)) for name in ("top", "bottom")]
    assert f["macs"] == pytest.approx(costs[0].macs + f["asked"] * costs[1].macs)
    assert f["params"] == sum(c.params for c in costs)
    tested = CascadeModel(folder).evaluate(data)["accuracy"]
    assert tested > max(tt.evaluate(pool[name], data)["accuracy"] for name in ("top", "bottom"))


def test_the_files_say_what_the_networks_and_the_gate_say(pair: Pair, pool: Any, data: Any, folder: Path) -> None:
    x = images_of(data)
    with torch.no_grad():
        first, second = (pool[name](torch.from_numpy(x)).numpy() for name in ("top", "bottom"))
    unsure = pair.gate.unsure(first)
    cascade = CascadeModel(folder)
    assert np.allclose(cascade.logits(x), np.where(unsure[:, None], second, first), atol=1e-4)
    assert cascade.calls == [60, unsure.sum()]
    assert cascade.joules() == pytest.approx(60 * pair.first.cost.energy + unsure.sum() * pair.second.cost.energy)
    assert cascade.logits(x[:0]).shape == (0, 10)
    with pytest.raises(ValueError, match=r"images must be \(B, 1, 8, 8\)"):
        cascade.logits(x[:, :, :4])


@pytest.mark.parametrize("perceptual", [False, True])
@pytest.mark.parametrize(("copies", "share"), [(60, 1 / 2), (30, 1 / 3)])
def test_repeats_cost_no_call(folder: Path, data: Any, perceptual: bool, copies: int, share: float) -> None:
    x = images_of(data)
    plain, cascade = CascadeModel(folder), CascadeModel(folder, cache=ResultCache(perceptual=perceptual))
    assert cascade.cache is not None
    want = plain.logits(x)
    first = np.concatenate([cascade.logits(x[i : i + 1]) for i in range(60)])
    assert np.allclose(first, want, atol=1e-5) and cascade.cache.hits == 0  # no false hit on distinct images
    calls = list(cascade.calls)
    assert np.array_equal(cascade.logits(x[:copies]), first[:copies])
    assert cascade.calls == calls
    assert cascade.cache.hits / (60 + copies) == pytest.approx(share)


def test_repeats_within_a_batch_are_found_too(folder: Path, data: Any) -> None:
    x = images_of(data, 5)
    cascade = CascadeModel(folder, cache=ResultCache())
    out = cascade.logits(np.concatenate([x, x]))
    assert cascade.calls[0] == 5 and np.array_equal(out[:5], out[5:])


def test_another_pair_does_not_get_these_answers(pool: Any, data: Any, folder: Path, tmp_path: Path) -> None:
    cache = ResultCache()
    CascadeModel(folder, cache=cache).logits(images_of(data))
    other = dual_cnn({k: pool[k] for k in ("bottom", "same")}, data).save(tmp_path / "other")
    CascadeModel(other, cache=cache).logits(images_of(data))
    assert cache.hits == 0


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it fails
import numpy as np
from trimtab.deploy import CascadeModel, ResultCache
model = CascadeModel(sys.argv[1], cache=ResultCache(perceptual=True))
print(model.predict([np.eye(8, dtype=np.uint8) * 255] * 2)[1].label, model.cache.hits)
"""


def test_the_cascade_runs_without_pytorch_and_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    run = [sys.executable, "-c", WITHOUT_TORCH, str(folder)]
    label, hits = subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "x.png")
    assert arguments.predicted(str(folder), [tmp_path / "x.png"], 1)[0]["label"] == label and hits == "1"


def test_a_stream_with_repeats_takes_less_than_a_large_network(folder: Path, pool: Any, data: Any) -> None:
    large = OnnxModel(export(pool["same"], folder.parent / "large.onnx", data=data, exporter="classic", limit=64).path)
    joules = tt.measure(pool["same"], (1, 8, 8), what="energy").energy
    x = images_of(data)
    cascade = CascadeModel(folder, cache=ResultCache())
    found = compare(cascade, large, joules, np.concatenate([x, x]))
    assert found["cascade"]["hits"] == 60 and found["cascade"]["calls"][0] == 60
    assert found["cascade"]["joules"] == cascade.joules() < found["large"]["joules"] == 120 * joules
    assert (found["cascade"]["labels"] == CascadeModel(folder).logits(np.concatenate([x, x])).argmax(-1)).all()
    assert 0 < found["large"]["seconds"]["median"] <= found["large"]["seconds"]["p99"]
    with pytest.raises(ValueError, match="images must be more than the 25 of the warm-up, got 10"):
        compare(cascade, large, joules, x[:10])


def test_files_with_their_own_preparation_are_a_pool_too(pool: Any, data: Any, tmp_path: Path) -> None:
    """The second file is for images that are scaled otherwise; it sees them so."""
    odd = nn.Sequential(nn.Identity(), pool["bottom"])
    files = {}
    for name, net, std in (("top", pool["top"], 1), ("odd", odd, 2)):
        spec = type(data.spec)(data.spec.size, data.spec.mean, tuple(s * std for s in data.spec.std))
        files[name] = export(net, tmp_path / f"{name}.onnx", spec=spec, exporter="classic").path
    pair = dual_cnn(files, data)
    x = images_of(data)
    with torch.no_grad():
        wanted = pool["top"](torch.from_numpy(x)).numpy(), odd(torch.from_numpy(x / 2)).numpy()
    out = CascadeModel(pair.save(tmp_path / "pair")).logits(x)
    assert np.allclose(out, np.where(pair.gate.unsure(wanted[0])[:, None], wanted[1], wanted[0]), atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"score": "margin"}, ValueError, "score must be one of maxp, difference, entropy"),
        ({"metric": "mine"}, ValueError, "metric must be one of paper, script"),
        ({"tolerance": 1.5}, ValueError, r"tolerance must be in \[0, 1\)"),
        ({"split": "later"}, DataError, "split must be one of"),
        ({"budget": "params<=1k"}, BudgetError, "no pair of the 3 networks is inside params<=1k"),
    ],
)
def test_wrong_arguments_are_refused(pool: Any, data: Any, kwargs: dict[str, Any], error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        dual_cnn(pool, data, **kwargs)


def test_a_budget_leaves_pairs_out_and_one_network_is_no_pool(pool: Any, data: Any) -> None:
    small = dual_cnn(pool, data, budget="params<=3000", calibrate=True, post_check=True)
    assert {small.first.name, small.second.name} == {"top", "bottom"} and small.gate.temperatures != (1.0, 1.0)
    with pytest.raises(ValueError, match="models must be at least two, got 1"):
        dual_cnn({"top": pool["top"]}, data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["members"][1].update(sha256="0" * 64), "not the file that was written"),
        (lambda d: d.update(score="mood"), "is damaged"),
        (lambda d: d.pop("spec"), "is damaged"),
    ],
)
def test_damaged_folders_are_refused(folder: Path, tmp_path: Path, change: Any, says: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "cascade.json").read_text())
    change(content)
    (tmp_path / "cascade.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=says):
        CascadeModel(tmp_path)
    with pytest.raises(ArtifactError, match="is no cascade"):
        CascadeModel(tmp_path / "nothing")
