"""Fractals: systems keep the paper's identities, points have the right measure, pictures depend on their number."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from trimtab.core.errors import DataError, MissingExtra
from trimtab.data import fractal_images, fractal_kernels, fractals, load_data


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def chaos_game(system: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """The iteration of the paper: one point after the other."""
    random = rng(seed)
    choice = random.choice(len(system), n, p=fractals.probabilities(system))
    x = fractals.fixed_point(system)
    out = np.empty((2, n))
    for i, k in enumerate(choice):
        x = system[k, :, :2] @ x + system[k, :, 2]
        out[:, i] = x
    return out


# -- systems ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "low", "high"), [(2, 3.5, 4.0), (3, 4.0, 4.5), (4, 4.5, 5.0), (7, 6.0, 6.5)])
def test_singular_values_sum_to_the_sigma_factor_and_the_maps_have_them(n, low, high):
    random = rng(n)
    for _ in range(200):
        s = fractals.singular_values(n, random)
        assert (s[:, 0] >= s[:, 1]).all() and s.min() >= 0 and s.max() <= 1
        assert low - 1e-9 <= (s[:, 0] + 2 * s[:, 1]).sum() <= high + 1e-9
        alpha = random.uniform(0, 3 * n)
        s = fractals.singular_values(n, random, alpha)
        assert abs((s[:, 0] + 2 * s[:, 1]).sum() - alpha) < 1e-9
    system = fractals.sample_system(random, maps=(n, n), alpha=alpha)
    found = np.linalg.svd(system[:, :, :2], compute_uv=False)
    assert abs((found[:, 0] + 2 * found[:, 1]).sum() - alpha) < 1e-9 and found.max() <= 1 + 1e-12
    assert np.abs(system[:, :, 2]).max() <= 1


def test_reflections_occur_as_often_as_rotations():
    dets = [np.linalg.det(a) for seed in range(300) for a in fractals.sample_system(rng(seed))[:, :, :2]]
    assert 0.4 < np.mean(np.array(dets) < 0) < 0.6


def test_it_starts_on_the_attractor_and_stays_in_a_box():
    for seed in range(20):
        system = fractals.sample_system(rng(seed))
        start = fractals.fixed_point(system)
        assert np.allclose(system[0, :, :2] @ start + system[0, :, 2], start, atol=1e-6 * (1 + np.abs(start).max()))
        assert np.isfinite(fractals.points(system, 2000, rng())).all()


def test_maps_are_chosen_by_their_determinants():
    system = fractals.sample_system(rng(3), maps=(3, 3))
    det = np.abs(np.linalg.det(system[:, :, :2]))
    assert np.allclose(fractals.probabilities(system), det / det.sum())
    system[:, 1, :2] = 0
    assert fractals.probabilities(system).tolist() == [1 / 3] * 3
    # what is chosen: maps to three distant points tell themselves apart
    apart = np.zeros((3, 2, 3))
    apart[:, 0, 0] = apart[:, 1, 1] = 0.01 * np.sqrt([1, 2, 5])
    apart[:, 0, 2] = [0, 10, 20]
    x = fractals.points(apart, 20_000, rng())[0]
    shares = [np.mean(np.abs(x - place) < 1) for place in (0, 10, 20)]
    assert np.allclose(shares, [1 / 8, 2 / 8, 5 / 8], atol=0.015)


def test_a_single_map_or_two_alike_give_one_point():
    one = fractals.sample_system(rng())[:1]
    for system in (one, np.concatenate([one, one])):
        xy = fractals.points(system, 1000, rng())
        assert np.ptp(xy, axis=1).max() < 1e-6
        assert (fractals.grey(xy, (16, 16)) > 0).sum() <= 4


def test_jitter_changes_one_map_a_little_and_keeps_it_contracting():
    changed = 0
    for seed in range(60):
        system = fractals.sample_system(rng(seed))
        other = fractals.jitter(system, rng(seed + 1000))
        assert np.linalg.svd(other[:, :, :2], compute_uv=False).max() <= 1 + 1e-9
        differs = [k for k in range(len(system)) if not np.array_equal(system[k], other[k])]
        assert len(differs) <= 1
        for k in differs:
            factor = other[k] / system[k]
            assert np.allclose(factor, factor.flat[0]) and 0.8 <= factor.flat[0] <= 1.1
        changed += len(differs)
    assert changed > 50


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fractals.singular_values(1, rng()), "n must be at least 2, got 1"),
        (lambda: fractals.singular_values(2, rng(), 7.0), "alpha must be 0 to 3 n = 6, got 7.0"),
        (lambda: fractals.sample_system(rng(), maps=(3, 2)), r"maps must be \(fewest, most\)"),
        (lambda: fractals.diamond_square(3, np.zeros(1), np.zeros((1, 8, 8))), r"noise must be \(1, 9, 9\)"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- points and pictures ----------------------------------------------------------------------------------------------


def test_many_chains_have_the_measure_of_the_point_by_point_iteration():
    """Correlation of 32 x 32 counts over a common box, against that of two runs of the reference (Exact checks)."""
    ours, theirs = [], []
    for seed in range(16):
        system = fractals.sample_system(rng(seed))
        a, b = chaos_game(system, 20_000, 1), chaos_game(system, 20_000, 2)
        box = fractals.extent(a)
        first, second, many = (
            fractals.grey(xy, (32, 32), window=box).ravel() for xy in (a, b, fractals.points(system, 100_000, rng()))
        )
        ours.append(np.corrcoef(first, many)[0, 1])
        theirs.append(np.corrcoef(first, second)[0, 1])
    assert np.median(ours) > np.median(theirs) - 0.005 > 0.97
    assert min(ours) > min(theirs) - 0.02


def test_numba_and_numpy_give_the_same_bits():
    fast = fractal_kernels.compiled()
    systems = [fractals.sample_system(rng(s)) for s in range(5)]  # of 2, 3 and 4 maps
    draws = [rng(s).integers(0, 2**32, (60, 7), np.uint32) for s in range(5)]
    found = []
    for engine in (fast, (fractals.iterate, fractals.count)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fractals, "_engine", lambda engine=engine: engine)
            xy = fractals.orbits(systems, draws, 10)
            found.append([xy, *(fractals.grey(xy[:, g], (9, 11)) for g in range(5))])
    assert len({len(s) for s in systems}) > 1
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_without_numba_it_still_works(monkeypatch):
    def missing() -> None:
        raise MissingExtra("numba is not installed")

    want = load_data("fractals:classes=2,n=4,size=16").splits["train"].pixels(torch.arange(4))
    monkeypatch.setattr(fractal_kernels, "compiled", missing)
    fractals._engine.cache_clear()
    try:
        got = load_data("fractals:classes=2,n=4,size=16").splits["train"].pixels(torch.arange(4))
    finally:
        fractals._engine.cache_clear()
    assert torch.equal(got, want)


def test_density_never_collapses_where_uniform_maps_diverge():
    """Sheet: at 32 pixels the median is about 0.36; maps with all entries U(-1, 1) diverge 4-8% of the time."""
    densities = [(fractals.grey(fractals.points(fractals.sample_system(rng(s)), 10_000, rng()), (32, 32)) > 0).mean()
                 for s in range(80)]  # fmt: skip
    assert min(densities) > 0.03 and 0.3 < np.median(densities) < 0.45
    diverged = 0
    with np.errstate(all="ignore"):
        for s in range(150):
            system = rng(s).uniform(-1, 1, (int(rng(s).integers(2, 5)), 2, 3))
            xy = fractals.points(system, 10_000, rng())
            diverged += not (np.abs(xy) < 1e6).all()
    assert 0.03 < diverged / 150 < 0.2


def test_a_stamp_at_every_point_is_what_a_patch_does():
    xy = rng().uniform(0, 1, (2, 300))
    patch = rng(1).random((3, 3)) < 0.5
    plain = np.zeros((12, 10))
    fractals.count(xy[0], xy[1], 0.0, 0.0, 10.0, 12.0, plain)
    stamped = np.zeros((12, 10))
    for x, y in xy.T:
        for i, j in zip(*np.nonzero(patch)):
            row, column = int(y * 12) + i - 1, int(x * 10) + j - 1
            if 0 <= row < 12 and 0 <= column < 10:
                stamped[row, column] += 1
    got = fractals.grey(xy, (12, 10), window=(0.0, 0.0, 1.0, 1.0), patch=patch)
    assert np.allclose(got, stamped / stamped.max())
    assert plain.sum() == 300


def test_clouds_have_the_size_of_their_exponent_and_are_smooth():
    noise = rng().random((3, 257, 257), np.float32)
    out = fractals.diamond_square(8, np.array([0.4, 0.6, 0.8]), noise)
    assert out.shape == (3, 257, 257)
    assert np.array_equal(out[:, [0, 0, -1, -1], [0, -1, 0, -1]], noise[:, [0, 0, -1, -1], [0, -1, 0, -1]])
    rough = [np.abs(np.diff(o, axis=0)).mean() for o in out]
    assert rough[0] > rough[1] > rough[2]  # a faster decay is smoother
    middle = (out[:, 0, 0] + out[:, 0, -1] + out[:, -1, 0] + out[:, -1, -1]) / 4
    assert np.allclose(out[:, 128, 128], middle + (noise[:, 128, 128] - 0.5), atol=1e-6)  # level 1: U(-.5, .5)
    flat = fractals.diamond_square(5, np.array([9e9]), np.full((1, 33, 33), 0.5, np.float32))
    assert np.allclose(flat, 0.5)


def test_colours_are_those_of_the_standard_library():
    import colorsys

    hsv = rng().random((1, 3, 4, 5))
    got = fractals.to_rgb(hsv)[0]
    for i in range(4):
        for j in range(5):
            assert np.allclose(got[:, i, j], colorsys.hsv_to_rgb(*hsv[0, :, i, j]), atol=1e-6)
    assert np.allclose(fractals.to_rgb(hsv + np.array([1, 0, 0]).reshape(3, 1, 1)), got)  # hue is taken modulo 1


def test_blur_keeps_constants_and_leaves_the_others_alone():
    images = rng().random((2, 3, 6, 6)).astype(np.float32)
    out = fractals.blur(images, np.array([0.0, 0.8]))
    assert np.allclose(out[0], images[0]) and out[1].std() < images[1].std()
    assert np.allclose(fractals.blur(np.ones((1, 3, 5, 5), np.float32), np.array([0.7])), 1)
    edge, middle = math.exp(-0.5 / 0.8**2), 1.0
    spot = np.zeros((1, 1, 5, 5))
    spot[0, 0, 2, 2] = 1
    line = np.array([edge, middle, edge]) / (2 * edge + middle)
    assert np.allclose(fractals.blur(spot, np.array([0.8]))[0, 0, 1:4, 1:4], np.outer(line, line))


# -- data -------------------------------------------------------------------------------------------------------------


def test_every_epoch_has_other_images_and_the_same_ones_when_it_comes_again():
    data = load_data("fractals:classes=3,n=30,size=16,points=1000")

    def epoch(e: int, split: str = "train", **options) -> torch.Tensor:
        return torch.cat([b["image"] for b in data.loader(split, batch_size=8, shuffle=False, epoch=e, **options)])

    assert torch.equal(epoch(0), epoch(0)) and not torch.equal(epoch(0), epoch(1))
    assert torch.equal(epoch(1)[16:], epoch(1, skip=2))  # resumed inside an epoch
    assert torch.equal(epoch(0, "test"), epoch(1, "test"))
    assert len({epoch(0)[i].numpy().tobytes() for i in range(len(epoch(0)))}) == len(epoch(0))
    other = load_data("fractals:classes=3,n=30,size=16,points=1000,seed=1")
    assert not torch.equal(other.splits["train"].pixels(torch.arange(3)), data.splits["train"].pixels(torch.arange(3)))


def test_an_image_depends_on_its_number_only():
    images = load_data("fractals:classes=3,n=60,size=16,points=1000").splits["train"].images
    whole = images[torch.arange(40)]
    assert torch.equal(images[torch.tensor([39, 0, 17])], whole[[39, 0, 17]])
    assert images[torch.arange(0)].shape == (0, 3, 16, 16)


def test_classes_are_balanced_and_label_the_system():
    data = load_data("fractals:classes=4,n=20")
    train = data.splits["train"]
    assert train.counts(4) == [5] * 4 and data.num_classes == 4 and data.class_names[3] == "system_3"
    assert len(data.splits["val"]) == len(data.splits["test"]) == 20
    assert train.names[7] == "fractals/train/7"
    assert [train.images.classes(i) for i in range(5)] == [[0], [1], [2], [3], [0]]


def test_statistics_are_those_that_are_declared():
    for size in (24, 48):
        x = load_data(f"fractals:classes=60,n=240,size={size},points=3000").splits["train"].pixels(torch.arange(240))
        x = x.double() / 255
        assert torch.allclose(x.mean((0, 2, 3)), torch.tensor(fractal_images.MEAN).double(), atol=0.03)
        assert torch.allclose(x.std((0, 2, 3)), torch.tensor(fractal_images.STD).double(), atol=0.03)


def test_size_channels_and_limit_are_taken_from_the_call():
    data = load_data("fractals:classes=2,n=50,size=16", image_size=(12, 20), in_chans=1, limit=10, val=0)
    assert data.size == (12, 20) and data.in_chans == 1 and set(data.splits) == {"train", "test"}
    assert data.splits["train"].pixels(torch.arange(2)).shape == (2, 1, 12, 20)
    assert len(data.splits["train"]) == 10
    few = data.subset({"train": 4})
    assert torch.equal(few.splits["train"].at(3).pixels(torch.arange(4)), few.splits["train"].pixels(torch.arange(4)))


def test_pictures_with_several_fractals_say_which():
    split = load_data("fractals:classes=10,n=200,size=24,points=500").splits["train"].together(5)
    sets = split.labels[torch.arange(200)]
    counts = sets.sum(1)
    assert sets.shape == (200, 10) and set(sets.unique().tolist()) == {0.0, 1.0}
    assert counts.min() == 1 and counts.max() == 5
    twice = [i for i in range(200) if len(split.images.classes(i)) > len(set(split.images.classes(i)))]
    assert twice and counts[twice[0]] == len(set(split.images.classes(twice[0])))  # duplicates count once
    numbers = [len(split.images.classes(i)) for i in range(200)]
    assert all(numbers.count(k) > 15 for k in range(1, 6))
    assert not torch.equal(split.at(1).labels[torch.arange(200)], sets)


def test_fractals_among_others_are_whole_and_as_they_are():
    images = load_data("fractals:classes=3,n=60,size=32,points=2000").splits["train"].together(1, (1.0, 1.0)).images
    for row in range(60):
        rng = np.random.default_rng(row)
        placed = images._place(row % 3, rng)
        assert placed.whole and np.array_equal(placed.system, images.systems[row % 3])
        hsv = np.full((3, 96, 96), -1.0, np.float32)
        replace(placed, box=(32, 32, 32, 32)).paint(hsv, fractals.points(placed.system, 2000, rng))
        rows, columns = (np.flatnonzero((hsv[0] >= 0).any(axis)) for axis in (1, 0))
        assert (rows[0], rows[-1], columns[0], columns[-1]) == (32, 63, 32, 63)  # it touches all sides of its box


def test_the_sides_of_fractals_among_others_are_chosen():
    split, rows = load_data("fractals:classes=10,n=60,size=24,points=500").splits["train"], torch.arange(60)
    dots, small, large = (split.together(1, (side, side)).pixels(rows) for side in (0.05, 0.25, 0.9))
    drawn = [(picture != dots).any(1).float().mean() for picture in (small, large)]  # of equal grounds
    assert 0 < 4 * drawn[0] < drawn[1]
    with pytest.raises(ValueError, match=r"sides must be \(smallest, largest\), above 0 and at most 1"):
        split.together(1, (0.5, 1.5))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fractals:classes=1", "fractals: classes must be 2 to"),
        ("fractals:size=4", "fractals: size must be 8 to 4096, got 4"),
        ("fractals:classes=20,n=5", "fractals: n must be 20 to"),
        ("fractals:maps=1", "fractals: maps must be 2 to 64, got 1"),
        ("fractals:channels=2", "fractals: channels must be 1 or 3"),
        ("fractals:colour=red", "fractals takes classes, n, channels, points, maps, seed, size, got 'colour=red'"),
        ("fractal", "did you mean 'fractals'"),
    ],
)
def test_wrong_words_are_refused(spec, message):
    with pytest.raises(DataError, match=message):
        load_data(spec)


def test_fewer_images_than_classes_are_refused():
    with pytest.raises(DataError, match="fractals: 10 images cannot show 20 classes"):
        load_data("fractals:classes=20", limit=10)
