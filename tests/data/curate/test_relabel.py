"""Localized labels: pooling is RoIAlign, axes are right, maps belong to names, and training follows the crop."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import roi_align

import trimtab as tt
from trimtab import testing
from trimtab.core.errors import DataError
from trimtab.data import relabel
from trimtab.data.augment import Augment, parse_augment
from trimtab.data.curate.relabel import LabelMaps, along, label_map, pooled
from trimtab.learn import Batch, Context, LabelPooling


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def boxes_of_crops(n: int, seed: int = 0) -> torch.Tensor:
    augment = parse_augment("rrc=0.08+flip")
    return augment.crop_box(n, (64, 64), augment.draw(n, (64, 64), seeded(seed)))


def sparse(dense: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    kept = dense.abs().topk(top, 1).indices
    return dense.gather(1, kept), kept


def by_torchvision(maps: torch.Tensor, boxes: torch.Tensor, *, shifted: bool = False) -> torch.Tensor:
    scale = maps.shape[2]
    rois = [(b[None] * scale - (0.5 if shifted else 0.0)) for b in boxes]
    return roi_align(maps, rois, 1, aligned=not shifted).flatten(1)


# -- pooling ----------------------------------------------------------------------------------------------------------


def test_pooling_is_torchvisions_roialign_of_the_dense_map():
    maps = torch.randn(200, 6, 15, 15, generator=seeded())
    boxes = boxes_of_crops(200)
    want = by_torchvision(maps, boxes)
    assert torch.allclose(pooled(*sparse(maps, 6), boxes, 6), want, atol=2e-5)
    assert torch.equal(by_torchvision(maps, boxes, shifted=True), want)  # the official form: shifted, not aligned


def test_the_whole_image_gives_the_mean_of_the_map():
    maps = torch.randn(3, 4, 15, 15, generator=seeded())
    got = pooled(*sparse(maps, 4), torch.tensor([[0.0, 0, 1, 1]]).expand(3, 4), 4)
    assert torch.allclose(got, maps.mean((2, 3)), atol=1e-6)


def test_it_is_near_the_mean_over_the_area():
    """Sheet: the mean difference is .003-.004, the largest about .03, on N(0, 1) maps over boxes of random crops."""
    maps, boxes = torch.randn(200, 10, 15, 15, generator=seeded(1)), boxes_of_crops(200, 1)
    differences = []
    for m, b, got in zip(maps, boxes, pooled(*sparse(maps, 10), boxes, 10), strict=True):
        edges = torch.arange(16) / 15
        rows, columns = ((edges[1:].clamp(max=b[i + 2]) - edges[:-1].clamp(min=b[i])).clamp(min=0) for i in (1, 0))
        weight = rows[:, None] * columns
        differences.append((got - (m * weight).sum((1, 2)) / weight.sum()).abs())
    assert torch.stack(differences).mean() < 0.004 and torch.stack(differences).max() < 0.05


def test_axes_are_not_swapped():
    maps = torch.zeros(1, 2, 15, 15)
    maps[0, 0, :, :7] = 1  # class 0 in the left columns
    maps[0, 1, :7] = 1  # class 1 in the upper rows
    got = pooled(*sparse(maps, 2), torch.tensor([[0.0, 0.0, 0.45, 1.0]]), 2)
    assert got[0, 0].item() == pytest.approx(1.0, abs=1e-5) and got[0, 1].item() == pytest.approx(0.4667, abs=1e-4)


def test_pooling_commutes_with_a_linear_classifier():
    features, weight, bias = torch.randn(4, 8, 7, 7), torch.randn(5, 8), torch.randn(5)
    maps = torch.einsum("bdhw,cd->bchw", features, weight) + bias[:, None, None]
    boxes = boxes_of_crops(4)
    every = torch.arange(8).view(1, 8, 1, 1).expand(4, 8, 7, 7)
    want = pooled(features, every, boxes, 8) @ weight.T + bias
    assert torch.allclose(pooled(*sparse(maps, 5), boxes, 5), want, atol=1e-4)


def test_weights_of_an_interval_sum_to_one_also_outside_the_image():
    start, stop = torch.tensor([0.0, 0.2, 0.9, 0.37]), torch.tensor([1.0, 0.21, 1.0, 0.92])
    weight = along(start, stop, 15)
    assert torch.allclose(weight.sum(1), torch.ones(4)) and (weight >= 0).all()
    maps = torch.randn(1, 3, 5, 5)
    beyond, clipped = (pooled(*sparse(maps, 3), torch.tensor([b]), 3) for b in ([-0.2, 0, 0.8, 1.0], [0, 0, 0.8, 1.0]))
    assert torch.equal(beyond, clipped)


def test_what_is_not_kept_counts_as_zero():
    """Sheet: with 995 zeros, a top score of 10 gives p = .957, of 8 only .75."""
    for score, p in ((10.0, 0.957), (8.0, 0.75)):
        scores = torch.tensor([score, 0, 0, 0, 0]).view(1, 5, 1, 1)
        got = pooled(scores, torch.arange(5).view(1, 5, 1, 1), torch.tensor([[0.0, 0, 1, 1]]), 1000).softmax(1)
        assert got[0, 0].item() == pytest.approx(p, abs=2e-3) and got.sum().item() == pytest.approx(1, abs=1e-5)


# -- boxes of crops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", ["none", "crop_flip=3", "rrc=0.2", "rrc=0.2+flip", "rrc=0.3+flip+rrc=0.5+flip+crop_flip"]
)
def test_the_box_is_what_is_shown(words):
    """Images whose pixels are their coordinates: corners of a crop say where it comes from."""
    size, n = (40, 60), 16
    y, x = (torch.arange(s, dtype=torch.float32) for s in size)
    images = torch.stack([(x + 20).expand(40, 60), (y + 20)[:, None].expand(40, 60)]).expand(n, 2, 40, 60)
    augment = parse_augment(words)
    draws = augment.draw(n, size, seeded())
    box = augment.crop_box(n, size, draws) * torch.tensor([60, 40, 60, 40])
    shown = augment.apply(images.clone(), draws, torch.zeros(2, 1, 1)) if augment.steps else images
    middle = shown[:, :, 18:22, 28:32].mean((2, 3)) - 20 + 0.5
    centre = torch.stack([box[:, 0] + box[:, 2], box[:, 1] + box[:, 3]], 1) / 2
    inside = (middle > 0).all(1)
    assert inside.sum() > n / 2 and torch.allclose(middle[inside], centre[inside], atol=0.6)
    assert (box[:, 2:] > box[:, :2]).all()
    if "crop" not in words:
        assert box.min() >= -1e-4 and box.max() <= 60 + 1e-4


def test_two_mirrors_undo_each_other_and_crops_of_crops_compose():
    flip = parse_augment("flip")
    always = [{"shift": torch.zeros(1, 2, dtype=torch.long), "flip": torch.ones(1, dtype=torch.bool)}]
    assert flip.crop_box(1, (8, 8), always).tolist() == [[0, 0, 1, 1]]
    crop = parse_augment("rrc+flip")
    quarter = {"box": torch.tensor([[0, 0, 4, 4]]), "flip": torch.tensor([True])}  # upper left, mirrored
    left = {"box": torch.tensor([[0, 0, 8, 4]]), "flip": torch.tensor([False])}  # its left half is the right one
    both = Augment([crop.steps[0], crop.steps[0]])
    assert both.crop_box(1, (8, 8), [quarter, left]).tolist() == [[0.25, 0, 0.5, 0.5]]
    assert both.crop_box(1, (8, 8), [quarter, {**left, "flip": torch.tensor([True])}]).tolist() == [[0.25, 0, 0.5, 0.5]]


def test_the_loader_gives_the_box_or_leaves_it_out():
    data = tt.load_data("digits", limit=60)
    batch = next(iter(data.loader("train", batch_size=16, augment="rrc+cutout")))
    assert batch["crop_box"].shape == (16, 4) and batch["crop_box"].dtype == torch.float32
    halves = [next(iter(data.loader("train", batch_size=16, augment="rrc", rank=r, world=2))) for r in (0, 1)]
    whole = next(iter(data.loader("train", batch_size=16, augment="rrc")))
    assert torch.equal(torch.cat([h["crop_box"] for h in halves]), whole["crop_box"])
    assert next(iter(data.loader("test", batch_size=4)))["crop_box"].tolist() == [[0, 0, 1, 1]] * 4
    assert "crop_box" not in next(iter(data.loader("train", batch_size=16, augment="trivial")))


# -- maps -------------------------------------------------------------------------------------------------------------


def annotator(classes: int = 10, chans: int = 1, size: int = 32) -> nn.Module:
    return tt.create_model("resnet8_mlperf_tiny", num_classes=classes, in_chans=chans, img_size=size, seed=0).eval()


TOKENS = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "adapt": False}


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        ("resnet8_mlperf_tiny", {}, None),
        ("mobilenetv3_small_050", {}, None),  # its head has a layer with an activation after the pooling
        ("swin_tiny_patch4_window7_224", {}, None),
        ("vit_tiny_patch16_224", {**TOKENS, "global_pool": "avg", "fc_norm": False}, (4, 6)),
        ("vit_tiny_patch16_224", {**TOKENS, "global_pool": "avg", "fc_norm": False, "class_token": False}, (4, 6)),
    ],
)
def test_the_mean_of_the_map_is_the_usual_logits_where_the_head_is_linear(name, kwargs, size):
    shape = (32, 48) if size else (32, 32)
    model = tt.create_model(name, num_classes=7, in_chans=3, img_size=shape, seed=0, **kwargs).eval()
    images = torch.randn(2, 3, *shape, generator=seeded())
    maps = label_map(model, images)
    assert maps.shape[:2] == (2, 7) and size in (None, maps.shape[2:])
    if name != "mobilenetv3_small_050":
        with torch.no_grad():
            assert torch.allclose(maps.mean((2, 3)), model(images), atol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_of_a_class_token_s_head_every_patch_is_asked(name):
    model = tt.create_model(name, num_classes=7, in_chans=3, img_size=32, seed=0, **TOKENS).eval()
    images = torch.randn(2, 3, 32, 32, generator=seeded())
    maps = label_map(model, images)
    with torch.no_grad():
        patch = model.forward_features(images)[:, model.num_prefix_tokens + 4 * 2 + 3]
        heads = [h for h in (model.head, getattr(model, "head_dist", None)) if h is not None]
        assert torch.allclose(maps[:, :, 2, 3], sum(h(patch) for h in heads) / len(heads), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kwargs"), [("vit_tiny_patch16_224", TOKENS | {"patch_size": 4}), ("cct_2_3x2_32", {})]
)
def test_a_transformer_s_maps_are_kept_and_learned_from(tmp_path, name, kwargs):
    data = tt.load_data("shapes:classes=3,size=16,n=90")
    annotates = tt.create_model(name, num_classes=3, img_size=16, seed=0, **kwargs)
    made = relabel(data, annotates, tmp_path / "maps")
    assert made.size == (4, 4) and made.top == 3
    student = tt.create_model("resnet8_mlperf_tiny", num_classes=3, img_size=16, seed=0)
    tt.fit(student, data, LabelPooling(maps=tmp_path / "maps"), epochs=1, augment="rrc=0.3", progress=False)


def test_maps_are_stored_compactly_and_found_by_name(tmp_path):
    data = tt.load_data("shapes:classes=4,size=32,n=60")
    model = annotator(4, 3)
    made = relabel(data, model, tmp_path / "maps", top=3, batch_size=16)
    train = data.splits["train"]
    h, w = made.size
    assert len(made) == len(train) and made.records.nbytes == len(train) * 3 * h * w * 4
    assert sum(f.stat().st_size for f in (tmp_path / "maps").glob("*.bin")) == made.records.nbytes
    again = LabelMaps(tmp_path / "maps")
    rows = again.rows([train.names[9], train.names[2]])
    assert rows.tolist() == [9, 2]
    image = data.loader("train", batch_size=1, shuffle=False, skip=9)
    want = label_map(model, next(iter(image))["image"])[0]
    assert (again.dense(9) != 0).sum() <= 3 * h * w
    kept = again.dense(9) != 0
    assert torch.allclose(again.dense(9)[kept], want[kept], atol=2e-3)
    labels = again.pool(rows, torch.tensor([[0.0, 0, 1, 1], [0, 0, 0.5, 0.5]]))
    assert torch.allclose(labels.sum(1), torch.ones(2), atol=1e-5)
    with pytest.raises(DataError, match="has no label map of nobody"):
        again.rows(["nobody"])


def test_the_table_of_the_paper_has_its_size():
    """[2, 5, 15, 15] per image; half precision and 16-bit classes make 5.8 GB of 1.28 million images."""
    dtype = np.dtype([("score", "<f2", (5, 15, 15)), ("label", "<u2", (5, 15, 15))])
    assert math.isclose(1_281_167 * dtype.itemsize / 1e9, 5.77, abs_tol=0.01)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    data = tt.load_data("shapes:classes=3,size=16,n=60")
    model = annotator(3, 3, 16)
    want = relabel(data, model, tmp_path / "whole", top=2, batch_size=8)
    real, calls = label_map, []

    def broken(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr("trimtab.data.curate.relabel.label_map", broken)
    with pytest.raises(KeyboardInterrupt):
        relabel(data, model, tmp_path / "maps", top=2, batch_size=8)
    assert LabelMaps(tmp_path / "maps").records.done(0) == 16
    calls.extend([1] * 10)
    made = relabel(data, model, tmp_path / "maps", top=2, batch_size=6)  # another batch size, from the middle of one
    every = np.arange(len(want))
    assert np.allclose(made.records.read(every)["score"], want.records.read(every)["score"], atol=1e-3)
    with pytest.raises(DataError, match="holds maps of other images or of another model"):
        relabel(data, annotator(3, 3, 16).requires_grad_(False).apply(lambda m: None), tmp_path / "maps", top=1)


class Tokens(nn.Module):
    """Five tokens, of which it says that none is before the others."""

    num_prefix_tokens = 0

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(x), 5, 4)

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d, t: relabel(d, annotator(), t, top=11), ValueError, r"top must be 1 to the number of classes \(10\)"),
        (lambda d, t: relabel(d, annotator(7), t), ValueError, "must have the 10 classes of the data, got 7"),
        (
            lambda d, t: relabel(d, nn.Flatten(), t),
            ValueError,
            "must have forward_features and forward_head, got Flatten",
        ),
        (lambda d, t: LabelMaps(t / "none"), DataError, "has no label maps; make them with"),
        (lambda d, t: relabel(d, Tokens(), t), ValueError, "must give a token for each of 2 x 2 patches, got 5 tokens"),
    ],
)
def test_what_cannot_work_is_refused(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(tt.load_data("digits", limit=60), tmp_path)


# -- training ---------------------------------------------------------------------------------------------------------


def oracle(folder, data: tt.data.Data, size: int = 4) -> None:
    """Maps that say the original label everywhere, with a score of 10."""
    train = data.splits["train"]
    made = LabelMaps.create(
        folder, list(train.names), {"classes": 10, "top": 1, "size": [size, size], "model": "oracle"}
    )
    rows = np.zeros(len(train), made.records.dtype)
    rows["score"], rows["label"] = 10, train.labels.numpy()[:, None, None, None]
    with made.records.append(0) as out:
        out.write(rows)


def test_the_battery_holds_with_maps(tmp_path):
    oracle(tmp_path, testing._digits())
    testing.check_objective(lambda: LabelPooling(maps=tmp_path), slow=False, augment="rrc=0.5")


def test_the_label_is_that_of_the_crop_and_cutmix_mixes_labels(tmp_path):
    made = LabelMaps.create(tmp_path, ["a", "b"], {"classes": 2, "top": 1, "size": [1, 2], "model": "oracle"})
    rows = np.zeros(2, made.records.dtype)
    rows["score"], rows["label"] = 20, np.array([0, 1]).reshape(1, 1, 1, 2)  # class 0 left, class 1 right
    with made.records.append(0) as out:
        out.write(rows)
    box = torch.tensor([[0.0, 0, 0.5, 1], [0.5, 0, 1, 1]])
    assert torch.allclose(made.pool(np.array([0, 1]), box), torch.eye(2), atol=1e-6)

    data = tt.data.Data.from_arrays((np.arange(10 * 64, dtype=np.uint8).reshape(10, 8, 8), np.arange(10) % 2))
    data = data.like(splits={**data.splits, "train": data.splits["train"].take(torch.tensor([0, 1]))})
    data.splits["train"].names = ["b", "a"]
    batch = Batch(image=torch.zeros(2, 1, 8, 8), label=torch.tensor([0, 1]), index=torch.tensor([0, 1]), crop_box=box)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    seen = []
    for options in ({}, {"localized": False}, {"cutmix": 1.0}):
        objective = LabelPooling(maps=tmp_path, **options)
        objective.prepare(data, None, torch.device("cpu"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trimtab.learn.regularize.label_pooling.soft_ce", lambda z, t: seen.append(t) or z.sum())
            objective.losses(model, batch, Context())
    assert torch.allclose(seen[0], torch.eye(2), atol=1e-6)
    assert torch.allclose(seen[1], torch.full((2, 2), 0.5))
    lam = seen[2][0, 0].item()
    assert 0 < lam < 1 and torch.allclose(seen[2], torch.tensor([[lam, 1 - lam], [1 - lam, lam]]), atol=1e-6)
    with pytest.raises(ValueError, match="give cutmix to the objective"):
        objective.losses(model, batch.replace(label=torch.eye(2)), Context())


def test_augmentation_that_no_box_describes_is_refused(tmp_path):
    data = tt.load_data("digits", limit=60)
    oracle(tmp_path, data)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match="needs an augmentation of crops, flips and cutout"):
        tt.fit(net, data, LabelPooling(maps=tmp_path), epochs=1, augment="trivial", progress=False)
    with pytest.raises(DataError, match="has no label map of digits/train/"):
        tt.fit(net, tt.load_data("digits", limit=90), LabelPooling(maps=tmp_path), epochs=1, progress=False)


def test_from_the_command_line_and_a_recipe(tmp_path, monkeypatch, capsys):
    from trimtab import cli
    from trimtab.compact.recipe import run

    monkeypatch.chdir(tmp_path)
    spec = "shapes:classes=3,size=16,n=60"
    tt.save(annotator(3, 3, 16), "big", spec=tt.load_data(spec).spec, labels=tt.load_data(spec).class_names)
    assert (
        cli.main(["curate", spec, "--method", "relabel", "--model", "big", "--set", "top=2", "--out", "maps", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["images"] == len(tt.load_data(spec).splits["train"])
    small = ["--model", "resnet8_mlperf_tiny", "--epochs", "1", "--quiet"]
    assert cli.main(["train", spec, "--objective", "relabel", "--set", "maps=maps", *small]) == 0
    (tmp_path / "recipe.yaml").write_text(f"""
data: {{spec: "{spec}"}}
model: {{name: resnet8_mlperf_tiny}}
phases:
  - train: {{objective: {{relabel: {{maps: maps, cutmix: 1.0}}}}, epochs: 1, augment: "rrc=0.3+flip", progress: false}}
""")
    assert run("recipe.yaml")["phases"][0]["phase"] == "train"
