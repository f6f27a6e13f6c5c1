"""Label sets: metric identities, the published ReaL labels, files, and labels from raters."""

from __future__ import annotations

import json
import pkgutil

import numpy as np
import pytest
import torch

import trimtab as tt
from trimtab.core.errors import DataError
from trimtab.data import MultiLabelAccuracy
from trimtab.data.curate.imagenet_multilabel import (
    dawid_skene,
    label_statistics,
    mosaic,
    multi_hot,
    read_label_sets,
    shift,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def measured(scores: torch.Tensor, sets: list[list[int]], label: torch.Tensor | None = None, **options) -> dict:
    metric = MultiLabelAccuracy(scores.shape[1], min_size=1, **options)
    metric.update(scores, multi_hot(sets, scores.shape[1]), label)
    return metric.compute()


def crowded(n: int = 500, classes: int = 20, most: int = 5) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.choice(classes, 1 + i % most, replace=False).tolist() for i in range(n)]


# -- identities -------------------------------------------------------------------------------------------------------


def test_an_oracle_that_ranks_all_valid_labels_first_is_perfect():
    sets = crowded()
    found = measured(multi_hot(sets, 20) + 0.5 * torch.rand(500, 20, generator=seeded()), sets)
    assert found["real"] == found["asma"] == found["micro"] == found["exact"] == 1
    assert all(g["accuracy"] == 1 for g in found["groups"].values())


def test_an_oracle_that_knows_one_valid_label_has_the_mean_of_1_over_g():
    sets = crowded()
    scores = -multi_hot(sets, 20).float()  # what is valid comes last, except one
    for row, labels in zip(scores, sets):
        row[labels[0]] = 1
    found = measured(scores, sets)
    assert found["real"] == 1 and found["asma"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5)
    assert [found["groups"][g]["accuracy"] for g in range(1, 6)] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])


def test_a_random_ranking_finds_g_of_c():
    sets = crowded(20_000, 10)
    found = measured(torch.rand(20_000, 10, generator=seeded()), sets)
    for g in range(1, 6):
        assert found["groups"][g]["accuracy"] == pytest.approx(g / 10, abs=0.02)


def test_with_single_labels_all_measures_are_the_accuracy():
    scores, label = torch.randn(300, 6, generator=seeded()), torch.randint(0, 6, (300,), generator=seeded(1))
    found = measured(scores, [[k] for k in label.tolist()], label)
    want = (scores.argmax(1) == label).double().mean().item()
    assert found["top1"] == found["real"] == found["asma"] == found["micro"] == found["exact"] == pytest.approx(want)


def test_only_the_ranking_counts():
    sets, scores = crowded(), torch.randn(500, 20, generator=seeded())
    assert measured(scores, sets) == measured(scores + 7, sets) == measured(scores.exp() * 3, sets)


def test_images_without_labels_are_left_out_of_all_but_top1():
    scores = torch.tensor([[2.0, 1, 0], [2, 1, 0], [0, 1, 2]])
    found = measured(scores, [[0], [], [1]], torch.tensor([0, 0, 0]))
    assert found["real"] == 0.5 and found["unlabelled"] == 1 and found["n"] == 3
    assert found["top1"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no image has a valid label"):
        measured(scores, [[], [], []])


def test_groups_that_are_small_or_crowded_are_told_but_not_averaged():
    sets = [[0]] * 50 + [[0, 1]] * 50 + [[0, 1, 2]] * 3 + [[0, 1, 2, 3]] * 50
    scores = torch.tensor([9.0, 0, 8, 0, 7]).expand(len(sets), 5)
    metric = MultiLabelAccuracy(5, most=3, min_size=10, protocol="made up")
    metric.update(scores, multi_hot(sets, 5))
    found = metric.compute()
    assert found["asma_groups"] == [1, 2] and set(found["groups"]) == {1, 2, 3, 4} and found["groups"][3]["n"] == 3
    assert found["asma"] == pytest.approx((1 + 0.5) / 2) and found["protocol"] == "made up"


def test_batches_and_processes_add_up():
    sets, scores = crowded(60), torch.randn(60, 20, generator=seeded())
    label = torch.randint(0, 20, (60,), generator=seeded(1))
    whole, parts = (MultiLabelAccuracy(20, min_size=1) for _ in range(2))
    whole.update(scores, multi_hot(sets, 20), label)
    for part in torch.arange(60).split(7):
        parts.update(scores[part], multi_hot(sets, 20)[part], label[part])
    a, b = whole.compute(), parts.compute()
    assert a["groups"].keys() == b["groups"].keys()
    for name in ("top1", "real", "asma", "micro", "exact"):
        assert a[name] == pytest.approx(b[name], abs=1e-12)
    parts.reset()
    assert parts.counts.sum() == 0


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: MultiLabelAccuracy(1), "num_classes must be at least 2, got 1"),
        (lambda: MultiLabelAccuracy(4, most=0), "most and min_size must be at least 1, got 0 and 100"),
        (
            lambda: MultiLabelAccuracy(4).update(torch.zeros(2, 4), torch.zeros(2, 3)),
            r"must be \(B, 4\), got \(2, 4\) and",
        ),
        (
            lambda: MultiLabelAccuracy(4).update(torch.zeros(1, 4), torch.full((1, 4), 2)),
            "must have 1 for valid labels",
        ),
        (lambda: multi_hot([[0], [4]], 4), "labels must be 0 to 3, got 4 for image 1"),
        (lambda: mosaic(torch.zeros(4, 1, 2, 2), torch.arange(4), number=5, n=1), "number must be 1 to 4, got 5"),
        (lambda: dawid_skene(np.array([[0, 1], [-1, -1]])), "each pair must have an answer, pair 1 has none"),
    ],
)
def test_what_is_wrong_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()


# -- shifts -----------------------------------------------------------------------------------------------------------


def test_standardisation_gives_the_second_set_the_shares_of_the_first():
    def result(sizes: dict[int, int], top1: dict[int, float]) -> dict:
        groups = {g: {"n": n, "accuracy": 1.0, "top1": top1[g]} for g, n in sizes.items()}
        whole = sum(n * top1[g] for g, n in sizes.items()) / sum(sizes.values())
        return {"groups": groups, "top1": whole, "real": whole, "asma": None}

    chances = {1: 0.8, 2: 0.5}  # the same in both: all that is lost, is lost to shares
    first, second = result({1: 84, 2: 16}, chances), result({1: 52, 2: 48}, chances)
    found = shift(first, second)
    assert found["drop_real"] == pytest.approx(0.32 * 0.3) and found["standardised"] == pytest.approx(first["real"])
    assert found["drop_asma"] is None


# -- the published labels ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> list[list[int]]:
    """The ReaL labels of the validation images of ImageNet, which timm ships."""
    raw = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
    assert raw is not None and len(raw) == 388_478
    return json.loads(raw)


def test_the_histogram_of_real_labels_is_the_published_one(real):
    found = label_statistics(real)
    assert found["histogram"] == {0: 3163, 1: 39_394, 2: 5408, 3: 1319, 4: 411, 5: 161, 6: 88, 7: 41, 8: 13, 9: 2}
    assert (found["images"], found["labelled"], found["labels"]) == (50_000, 46_837, 57_553)
    assert round(found["share_of_several"], 4) == 0.1589 and round(found["mean"], 4) == 1.2288


def test_asma_of_the_published_labels_uses_groups_1_to_5(real):
    metric = MultiLabelAccuracy(1000)
    every = multi_hot(real, 1000)
    for part in torch.arange(0, 50_000).split(10_000):
        metric.update(every[part].float(), every[part])
    found = metric.compute()
    assert found["asma_groups"] == [1, 2, 3, 4, 5] and found["asma"] == 1 and found["unlabelled"] == 3163


# -- files ------------------------------------------------------------------------------------------------------------


def test_label_sets_are_joined_by_name(tmp_path):
    by_name, listed, table = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.csv"
    by_name.write_text(json.dumps({"x.png": [1, 2], "y.png": [], "z.png": [0]}))
    listed.write_text(json.dumps([[1, 2], [], [0]]))
    table.write_text("x.png,1,2\ny.png\nz.png,0\n")
    for file in (by_name, listed, table):
        assert read_label_sets(file, ["cat/z.png", "x.png", "dog/y.png"][: 3 if file != listed else 0] or
                               ["z.png", "x.png", "y.png"]) == [[0], [1, 2], []]  # fmt: skip
    assert read_label_sets(by_name, ["z.png"]) == [[0]]
    for file, names, message in (
        (listed, ["x.png"], "has 3 label sets for 1 images; of a part, give sets by name"),
        (by_name, ["x.png", "w.png"], "has no labels of w.png"),
        (tmp_path / "none.json", ["x"], "is no file of label sets"),
    ):
        with pytest.raises(DataError, match=message):
            read_label_sets(file, names)


def test_from_the_command_line_and_a_recipe(tmp_path, monkeypatch, capsys):
    from trimtab import cli
    from trimtab.compact.recipe import RecipeError, run

    monkeypatch.chdir(tmp_path)
    data = tt.load_data("digits", seed=0)
    model = tt.create_model("resnet8_mlperf_tiny", num_classes=10, in_chans=1, img_size=8, seed=0)
    tt.save(model, "big", spec=data.spec, labels=data.class_names)
    test = data.splits["test"]
    sets = {name: [k, (k + 1) % 10] for name, k in zip(test.names, test.labels.tolist())}
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    assert cli.main(["analyze", "labels", "big", "--sets", "sets.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top1"] == pytest.approx(tt.evaluate(model, data)["accuracy"]) and found["asma_groups"] == [2]
    assert found["real"] >= found["top1"] and found["n"] == len(test)
    assert cli.main(["analyze", "labels", "big", "--sets", "sets.json"]) == 0
    assert "ASMA averages groups 2; 0 images unlabelled" in capsys.readouterr().out

    recipe = tmp_path / "recipe.yaml"
    text = """
data: digits
model: {load: big}
phases:
  - export: {}
label_sets: {sets: sets.json, min_size: 20}
"""
    recipe.write_text(text)
    assert run(recipe)["label_sets"]["real"] == pytest.approx(found["real"])
    for wrong, says in (
        (("min_size", "sise"), "has no option 'sise'"),
        (("sets.json", "lost.json"), "no file lost.json"),
    ):
        recipe.write_text(text.replace(*wrong))
        with pytest.raises(RecipeError, match=says):
            run(recipe)


# -- making label sets ------------------------------------------------------------------------------------------------


def test_raters_are_weighed_by_how_good_they_are():
    """Three good raters and four who guess: the estimate beats the majority, and says who is sure."""
    rng = np.random.default_rng(0)
    truth = rng.random(600) < 0.4
    right = np.array([0.9, 0.85, 0.9, 0.5, 0.5, 0.5, 0.55])
    said = np.where(rng.random((600, 7)) < right, truth[:, None], ~truth[:, None])
    votes = said * 2  # no = 0, maybe = 1, yes = 2
    votes[rng.random(votes.shape) < 0.1] = 1
    votes[rng.random(votes.shape) < 0.2] = -1
    votes[:, 0] = np.where((votes == -1).all(1), 1, votes[:, 0])
    p = dawid_skene(votes)
    answered = (votes >= 0).sum(1)
    majority = np.where(votes >= 0, votes, 0).sum(1) / answered > 1
    assert ((p > 0.5) == truth).mean() > 0.9 > (majority == truth).mean() + 0.05
    assert truth[p > 0.8].mean() > 0.9


def test_mosaics_show_the_objects_that_their_labels_name():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 2, 2) * 20
    pictures, sets = mosaic(images, torch.arange(6), number=3, n=40)
    assert pictures.shape == (40, 1, 4, 4)
    for picture, labels in zip(pictures, sets):
        seen = set(picture.unique().tolist()) - {128}
        assert seen == {20 * k for k in labels} and len(labels) == 3 == len(set(labels))


def test_a_strip_of_objects_leaves_no_place_neutral():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 2, 2) * 20
    pictures, sets = mosaic(images, torch.arange(6), number=3, grid=(1, 3), n=40)
    assert pictures.shape == (40, 1, 2, 6)
    for picture, labels in zip(pictures, sets):
        assert sorted(picture[0, 0, ::2].tolist()) == sorted(20 * k for k in labels)
    with pytest.raises(ValueError, match="number must be 1 to 2, got 3"):
        mosaic(images, torch.arange(6), number=3, grid=(2, 1), n=1)


def test_a_better_classifier_is_better_by_asma_and_by_average_precision():
    from torchmetrics.classification import MultilabelAveragePrecision

    sets = crowded(1000)
    found, precision = [], []
    for signal in (0.5, 1.0, 2.0, 4.0):
        scores = signal * multi_hot(sets, 20) + torch.randn(1000, 20, generator=seeded())
        found.append(measured(scores, sets))
        precision.append(float(MultilabelAveragePrecision(20)(scores, multi_hot(sets, 20).long())))
    assert all(np.diff([f["asma"] for f in found]) > 0.02) and all(np.diff(precision) > 0)
