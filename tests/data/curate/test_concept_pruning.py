"""Density-based pruning: quotas are the optimum, complexity is what it says, and big data give the same as small."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.core.errors import DataError
from trimtab.data import concept_pruning
from trimtab.data.curate.concept_pruning import allocate, amount_of, complexity, distinct, project, select, softmax
from trimtab.data.curate.vectors import Vectors, spherical_kmeans


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def concepts(each: int = 100, k: int = 6, dim: int = 8, seed: int = 0) -> np.ndarray:
    """k directions with more and more spread around them, (k each, dim)."""
    random = rng(seed)
    centres = np.eye(dim)[:k] * 4
    spread = np.linspace(0.2, 1.2, k)
    return np.concatenate([c + s * random.normal(size=(each, dim)) for c, s in zip(centres, spread)]).astype(np.float32)


def instance(k: int = 100, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    random = rng(seed)
    sizes = random.integers(1, 400, k)
    shares = softmax(random.random(k) * 0.2 / 0.1)
    return shares, sizes, np.minimum(1, sizes), int(0.3 * sizes.sum())


# -- allocation -------------------------------------------------------------------------------------------------------


def test_the_projection_is_the_optimum_of_the_quadratic_program():
    from scipy.optimize import minimize

    shares, sizes, lower, n = instance(k=60)
    x = project(n * shares, lower, sizes, n)
    solved = minimize(
        lambda v: ((v - n * shares) ** 2).sum() / 1e4, np.clip(n * shares, lower, sizes), method="SLSQP",
        jac=lambda v: 2 * (v - n * shares) / 1e4, bounds=list(zip(lower, sizes)),
        constraints={"type": "eq", "fun": lambda v: v.sum() - n, "jac": np.ones_like},
        options={"ftol": 1e-15, "maxiter": 500},
    )  # fmt: skip
    assert solved.success and np.abs(solved.x - x).max() < 1e-6
    assert ((x - n * shares) ** 2).sum() <= ((solved.x - n * shares) ** 2).sum() + 1e-6


@pytest.mark.parametrize("seed", range(10))
def test_quotas_meet_bounds_sum_and_kkt_conditions(seed):
    shares, sizes, lower, n = instance(seed=seed)
    target = n * shares
    x = project(target, lower, sizes, n)
    assert abs(x.sum() - n) < 1e-8 and (x >= lower).all() and (x <= sizes).all()
    free = (x > lower + 1e-9) & (x < sizes - 1e-9)
    mu = (x - target)[free]
    assert np.ptp(mu) < 1e-9  # all that are not at a bound moved by the same
    movable, moved = lower < sizes, x - target
    assert (moved[movable & (x <= lower + 1e-9)] >= mu[0] - 1e-9).all()
    assert (moved[movable & (x >= sizes - 1e-9)] <= mu[0] + 1e-9).all()
    quotas = allocate(shares, sizes, n, lower)
    assert quotas.sum() == n and (quotas >= lower).all() and (quotas <= sizes).all() and np.abs(quotas - x).max() < 1
    order = np.argsort(shares[free])
    assert (np.diff(x[free][order]) >= 0).all()  # monotone in complexity


def test_limits_of_the_allocation():
    sizes = np.array([5, 50, 100])
    low = np.ones(3, int)
    assert allocate(softmax(np.array([1.0, 2, 3])), sizes, 155, low).tolist() == sizes.tolist()  # all of it
    assert allocate(softmax(np.array([1.0, 2, 3]) / 1e9), np.full(3, 50), 30, low).tolist() == [
        10,
        10,
        10,
    ]  # tau -> inf
    assert allocate(np.full(3, 1 / 3), sizes, 60, low).tolist() == [5, 28, 27]  # same complexity, the first of the rest
    assert allocate(np.array([0.98, 0.01, 0.01]), np.array([1, 1, 4]), 4, low).tolist() == [1, 1, 2]  # singletons stay
    with pytest.raises(ValueError, match=r"the sum must be 3 \(all lower bounds\) to 155 \(all samples\), got 156"):
        allocate(np.full(3, 1 / 3), sizes, 156, low)


# -- complexity -------------------------------------------------------------------------------------------------------


def test_the_toy_file_of_the_authors():
    """Cluster 0 has distances 1.35, 1.25, 0.26; cluster 1 has 0.88."""
    found = complexity(np.array([1.35, 1.25, 0.26, 0.88]), np.array([0, 0, 0, 1]), np.eye(2, dtype=np.float32))
    assert np.allclose(found.intra, [0.9533, 0.88], atol=1e-4) and np.allclose(found.inter, [1, 1])


def test_distances_are_cosines_and_do_not_depend_on_rotation_or_copies():
    x = concepts()
    vectors = Vectors(x)
    centroids = spherical_kmeans(vectors, 6)
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    labels, distance = vectors.nearest(centroids)
    found = complexity(distance, labels, centroids, neighbours=3)
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    for j in range(6):
        assert np.isclose(found.intra[j], (1 - z[labels == j] @ centroids[j]).mean(), atol=1e-6)
        others = np.sort(1 - np.delete(centroids, j, 0) @ centroids[j])[:3]
        assert np.isclose(found.inter[j], others.mean(), atol=1e-6)
    assert found.intra.min() >= 0 and found.inter.max() <= 2
    turn = np.linalg.qr(rng(1).normal(size=(8, 8)))[0].astype(np.float32)
    turned_labels, turned = Vectors(x @ turn).nearest(centroids @ turn)
    assert np.array_equal(turned_labels, labels)
    assert np.allclose(complexity(turned, turned_labels, centroids @ turn, 3).product, found.product, atol=1e-6)
    twice = np.concatenate([np.arange(600), np.flatnonzero(labels == 2)])  # every point of cluster 2 twice
    again = complexity(distance[twice], labels[twice], centroids, 3)
    assert np.allclose(again.intra, found.intra) and np.allclose(again.product, found.product)


def test_an_empty_cluster_counts_as_the_mean_of_the_others():
    found = complexity(np.array([0.2, 0.4]), np.array([0, 2]), np.eye(3, dtype=np.float32))
    assert np.isnan(found.intra[1]) and found.product[1] == pytest.approx(0.3)


def test_complex_concepts_keep_more():
    found = concept_pruning(concepts(), keep=150, clusters=6, tau=0.05)
    order = np.argsort(found.complexity.product)
    assert (np.diff(found.quotas[order]) >= 0).all() and found.quotas[order[-1]] > 1.5 * found.quotas[order[0]]
    assert len(found.rows) == 150 == found.quotas.sum() and (np.diff(found.rows) > 0).all()
    per = concept_pruning(concepts(), keep=150, clusters=6, tau=1e6).quotas
    assert np.ptp(per) <= 1
    assert concept_pruning(concepts(), keep=1.0, clusters=6).rows.tolist() == list(range(600))
    level = concept_pruning(concepts(), keep=150, clusters=6, tau=0.005, balance=0.5).quotas
    assert level.min() >= 12 > concept_pruning(concepts(), keep=150, clusters=6, tau=0.005).quotas.min()


# -- selection --------------------------------------------------------------------------------------------------------


def test_selection_is_exact_and_breaks_ties_by_position():
    distance = np.array([0.1, 0.3, 0.3, 0.2, 0.5, 0.5], np.float32)
    labels = np.array([0, 0, 0, 0, 1, 1])
    quotas = np.array([2, 1])
    assert select(distance, labels, quotas, "hard").tolist() == [1, 2, 4]
    assert select(distance, labels, quotas, "easy").tolist() == [0, 3, 4]
    some = {tuple(select(distance, labels, quotas, "random", seed=s).tolist()) for s in range(20)}
    assert len(some) > 4 and all(len(s) == 3 for s in some)


def test_near_copies_go_first():
    x = concepts()
    copies = x[:50] + 1e-4 * rng(2).normal(size=(50, 8)).astype(np.float32)
    both = Vectors(np.concatenate([x, copies]))
    left = distinct(both, 6, 1e-5)
    assert len(left) == 600
    pairs = np.isin(np.arange(50), left).astype(int) + np.isin(np.arange(600, 650), left)
    assert (pairs == 1).all()  # one of each pair
    found = concept_pruning(both, keep="50%", clusters=6, dedup=1e-5)
    assert found.copies == 50 and found.total == 650 and len(found.rows) == 325


def test_a_cluster_larger_than_a_block_is_compared_whole(monkeypatch):
    x = np.repeat(concepts(each=10), 3, axis=0)
    want = distinct(Vectors(x), 2, 1e-5)
    monkeypatch.setattr("trimtab.data.curate.concept_pruning._BLOCK", 7)
    assert np.array_equal(distinct(Vectors(x), 2, 1e-5), want) and len(want) == 60


# -- clusters, and data that do not fit in memory ---------------------------------------------------------------------


def test_clusters_are_found_and_lost_ones_start_again():
    x = concepts()
    labels = Vectors(x).nearest(spherical_kmeans(Vectors(x), 6, seed=3))[0]
    purity = sum(np.bincount(labels[i * 100 : (i + 1) * 100]).max() for i in range(6)) / 600
    assert purity > 0.8
    twins = np.repeat(np.eye(4, dtype=np.float32), 5, axis=0)
    centroids = spherical_kmeans(Vectors(twins), 4, seed=0)  # starts with twins among the centroids
    assert sorted(np.bincount(Vectors(twins).nearest(centroids)[0], minlength=4).tolist()) == [5, 5, 5, 5]


def test_chunks_files_and_half_precision_give_the_same(tmp_path, monkeypatch):
    x = concepts().astype(np.float16)
    want = concept_pruning(x.astype(np.float32), keep="30%", clusters=6)
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr("trimtab.data.curate.vectors.CHUNK", 8 * 64)  # 64 vectors
    for given in (x, tmp_path / "x.npy", torch.from_numpy(x)):
        found = concept_pruning(given, keep="30%", clusters=6)
        assert np.array_equal(found.rows, want.rows)
    assert isinstance(Vectors(tmp_path / "x.npy").array, np.memmap)


def test_on_ray_it_is_the_same(tmp_path):
    import ray

    x = concepts(each=50)
    want = concept_pruning(x, keep="30%", clusters=6)
    ray.init(num_cpus=1, include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        order = rng(5).permutation(300)
        data = ray.data.from_items([{"id": int(i), "vector": x[i]} for i in order], override_num_blocks=3)
        found = concept_pruning(data, keep="30%", clusters=6)
        assert np.array_equal(found.rows, want.rows) and np.array_equal(found.quotas, want.quotas)
        with pytest.raises(ValueError, match="dedup needs vectors in memory"):
            concept_pruning(data, clusters=6, dedup=0.1)
        with pytest.raises(ValueError, match="columns 'id' and 'vector', got x"):
            concept_pruning(ray.data.from_items([{"x": 1}]))
    finally:
        ray.shutdown()


# -- at the door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 601}, r"clusters must be 2 to the number of samples \(600\), got 601"),
        ({"clusters": 1}, "clusters must be 2 to"),
        ({"tau": 0}, "tau must be positive, got 0"),
        ({"mode": "best"}, "mode must be one of hard, easy, random, got 'best'"),
        ({"balance": 2}, "balance must be 0 to 1, got 2"),
        ({"dedup": 1.0}, "dedup must be between 0 and 1, got 1.0"),
        ({"neighbours": 0}, "neighbours must be at least 1, got 0"),
        ({"keep": "120%"}, "keep must be a share such as 50% or 0.5, or a number up to 600, got '120%'"),
        ({"keep": "half"}, "keep must be a share"),
        ({"keep": 5, "clusters": 20}, "at least one sample of each of the 20 clusters, got 5; use fewer clusters"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        concept_pruning(concepts(), **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 2), np.float32), "vector 0 has no direction"),
        (np.array([[1.0, 0], [0, 1], [np.nan, 1]]), "vector 2 has no direction"),
        (np.zeros(4, np.float32), r"vectors must be floats \(N, D\), got float32 \(4,\)"),
        (np.zeros((4, 2), int), r"vectors must be floats \(N, D\), got int64"),
        ("nothing.npy", "vectors must be in an .npy file, got nothing.npy"),
    ],
)
def test_wrong_vectors_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        concept_pruning(given, clusters=2)


def test_amounts():
    assert [amount_of(k, 200) for k in ("50%", 0.5, "0.5", 20, "20", 1.0, "100%", 1)] == [
        100,
        100,
        100,
        20,
        20,
        200,
        200,
        1,
    ]


# -- images -----------------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def test_images_are_chosen_by_the_features_of_any_network():
    data = tt.load_data("digits", limit=300)
    found = concept_pruning(data, net(), keep="40%", clusters=12)
    kept = found.of(data)
    assert len(kept.splits["train"]) == len(found.rows) == round(0.4 * len(data.splits["train"]))
    assert [kept.splits["train"].names[0]] == [data.splits["train"].names[found.rows[0]]]
    assert len(kept.splits["test"]) == len(data.splits["test"])
    with pytest.raises(ValueError, match="model must be given"):
        concept_pruning(data)


def test_a_class_with_a_single_image_is_refused_and_lost_classes_are_told():
    images = rng().integers(0, 256, (41, 8, 8), dtype=np.uint8)
    labels = np.repeat([0, 1, 2], [20, 20, 1])
    data = tt.data.Data.from_arrays((images, labels), test=(images[:9], labels[:9]), val=(images[:9], labels[:9]))
    with pytest.raises(DataError, match="class '2' has a single training image"):
        concept_pruning(data, net(), clusters=2)
    found = concept_pruning(rng().normal(size=(41, 4)), keep=10, clusters=2)
    lost = [str(c) for c in range(3) if c not in labels[found.rows]]
    assert found.of(data).warnings[-1] == f"pruning left no training images of {', '.join(lost)}"


def test_the_command_line_writes_a_data_set_that_is_read_back(tmp_path, monkeypatch, capsys):
    from trimtab import cli

    monkeypatch.chdir(tmp_path)
    tt.save(tt.create_model("resnet8_mlperf_tiny", num_classes=7, in_chans=3, img_size=16), "big", spec=tt.load_data(
        "shapes:classes=3,size=16,n=90").spec)  # fmt: skip
    spec = "shapes:classes=4,size=16,n=200"
    assert (
        cli.main(["curate", spec, "--model", "big", "--keep", "50%", "--set", "clusters=8", "--out", "half", "--json"])
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    before, after = tt.load_data(spec), tt.load_data("half")
    assert {k: len(v) for k, v in after.splits.items()} == {"train": said["kept"], "val": 16, "test": 40}
    assert said["kept"] == round(len(before.splits["train"]) / 2) and after.class_names == before.class_names
    every = torch.arange(40)
    assert torch.equal(after.splits["test"].pixels(every), before.splits["test"].pixels(every))
    assert json.loads((tmp_path / "half/curation.json").read_text())["clusters"] == 8
    assert cli.main(["curate", spec, "--model", "big", "--out", "half"]) == 1
    assert "holds a data set already" in capsys.readouterr().err
    assert cli.main(["train", "half", "--model", "resnet8_mlperf_tiny", "--epochs", "1", "--quiet"]) == 0


def test_files_are_copied_byte_by_byte(tmp_path):
    from PIL import Image

    from trimtab.data.sources import find_source
    from trimtab.data.write import write_parquet

    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng(i + len(name) * 7).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
                tmp_path / "pets" / name / f"{i}.jpg")  # fmt: skip
    data = tt.load_data(tmp_path / "pets", image_size=8)
    write_parquet(data, tmp_path / "out", source=find_source(tmp_path / "pets"))
    again = find_source(tmp_path / "out")
    files = {p.read_bytes() for p in (tmp_path / "pets").rglob("*.jpg")}
    assert {again.splits[s].read(i) for s in again.splits for i in range(len(again.splits[s]))} == files
    assert tt.load_data(tmp_path / "out").size == (20, 30)  # the originals, not the thumbnails


def test_the_command_line_takes_features_too(tmp_path, monkeypatch, capsys):
    from trimtab import cli

    monkeypatch.chdir(tmp_path)
    np.save("x.npy", concepts())
    assert cli.main(["curate", "x.npy", "--keep", "10%", "--set", "clusters=6", "--out", "kept"]) == 0
    assert "kept 60 of 600 (6 clusters)" in capsys.readouterr().out
    assert np.array_equal(np.load("kept/rows.npy"), concept_pruning(concepts(), keep="10%", clusters=6).rows)
    for args, says in (
        (["x.npy", "--method", "relabel"], "relabel needs images"),
        (["digits"], "--model is needed"),
        (["digits", "--method", "prune"], "method must be one of concept_pruning, relabel"),
        (["x.npy", "--set", "tua=1"], "concept_pruning has no option 'tua'"),
    ):
        assert cli.main(["curate", *args]) == 2
        assert says in capsys.readouterr().err


def test_a_recipe_prunes_relabels_and_goes_on(tmp_path, monkeypatch):
    from trimtab.compact.recipe import RecipeError, read, run

    monkeypatch.chdir(tmp_path)
    text = """
data: {spec: "shapes:classes=3,size=16,n=120"}
model: {name: resnet8_mlperf_tiny}
out: out
phases:
  - train: {epochs: 1, progress: false}
  - curate: {method: concept_pruning, keep: 50%, clusters: 4}
  - curate: {method: relabel}
    as: maps
  - train: {objective: {relabel: {maps: out/phases/3-maps}}, epochs: 1, progress: false}
"""
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    assert [p["phase"] for p in run(file)["phases"]] == ["train", "curate", "curate", "train"]
    rows = np.load("out/phases/2-curate/rows.npy")
    names = (tmp_path / "out/phases/3-maps/names.txt").read_text().splitlines()
    before = tt.load_data("shapes:classes=3,size=16,n=120").splits["train"]
    assert names == [json.dumps(before.names[i]) for i in rows] and len(rows) == round(len(before) / 2)
    monkeypatch.setattr("trimtab.data.curate.methods.concept_pruning", None)  # what is done is not done again
    assert len(run(file)["phases"]) == 4
    file.write_text(text.replace("clusters: 4", "clutters: 4"))
    with pytest.raises(RecipeError, match="concept_pruning has no option 'clutters'"):
        read(file)
