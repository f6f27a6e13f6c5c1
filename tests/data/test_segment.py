"""Pictures with masks: read, checked, moved together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.data.conftest import encoded, noise
from trimtab.core.errors import DataError
from trimtab.data import load_data
from trimtab.data.images import VOID, Unreadable, open_image, to_mask


def stripes(h: int, w: int, *values: int) -> Image.Image:
    """A mask with one column of pixels after the other."""
    row = np.repeat(np.asarray(values, np.uint8), -(-w // len(values)))[:w]
    return Image.fromarray(np.tile(row, (h, 1)))


def write(root: Path, n: int = 20, *, values: tuple[int, ...] = (0, 1, 2), size: tuple[int, int] = (12, 18)) -> Path:
    """root/images and root/masks; the brightness of a pixel is 60 times its class."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        mask = stripes(*size, *(values[i % len(values) :] + values[: i % len(values)]))
        grey = np.asarray(mask).astype(int) % 4 * 60
        Image.fromarray(np.repeat(grey[..., None], 3, 2).astype(np.uint8)).save(root / "images" / f"{i:03}.png")
        mask.save(root / "masks" / f"{i:03}.png")
    return root


def parquet(path: Path, rows: list[tuple[bytes, bytes | None]], names: list[str] | None = None) -> Path:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        name: pa.array([{"bytes": r[k], "path": "a.png"} for r in rows], kind)
        for k, name in enumerate(("image", "annotation"))
    }
    table = pa.table(columns)
    features = {"image": {"_type": "Image"}, "annotation": {"_type": "Image", **({"names": names} if names else {})}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)
    return path


def test_a_folder_gives_pictures_and_their_masks(tmp_path):
    data = load_data(write(tmp_path), task="segment")
    assert (data.task, data.num_classes, data.class_names, data.size) == ("segment", 3, ["0", "1", "2"], (12, 18))
    assert data.spec.task == "segment"
    batch = next(iter(data.loader("train", batch_size=4, raw=True)))
    assert batch["label"].dtype == torch.int64 and batch["label"].shape == (4, 12, 18)
    assert torch.equal(batch["image"][:, 0].long(), 60 * batch["label"])


def test_void_is_left_out_and_labels_close_up(tmp_path):
    root = write(tmp_path, values=(0, 3, 7, 255))
    data = load_data(root, task="segment", void=3, class_names=list("abcdefgh"))
    assert data.class_names == list("abcefgh")
    label = torch.cat([b["label"] for b in data.loader("train")])
    assert label.unique().tolist() == [0, 6, VOID]  # 7 is the seventh of those that are left
    assert (label == VOID).float().mean() > 0.4  # 3 and 255
    assert "classes without training pixels: b, c, e, f, g" in data.warnings


def test_class_names_come_from_the_features_or_from_classes_txt(tmp_path):
    rows = [(encoded(noise(8, 8, i)), encoded(stripes(8, 8, 0, 1))) for i in range(20)]
    assert load_data(parquet(tmp_path / "a.parquet", rows, ["sky", "road"]), task="segment").class_names == [
        "sky",
        "road",
    ]
    root = write(tmp_path / "street")
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    assert load_data(root, task="segment").class_names == ["sky", "road", "car"]


def test_splits_are_those_of_the_folder(tmp_path):
    for split, n in (("train", 9), ("val", 3), ("test", 5)):
        write(tmp_path / split, n)
    data = load_data(tmp_path, task="segment")
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 9, "val": 3, "test": 5}
    with pytest.raises(DataError, match=r"has no folders images/ and masks/"):
        (tmp_path / "val" / "masks").rename(tmp_path / "val" / "other")
        load_data(tmp_path, task="segment")


def test_what_does_not_fit_is_named_and_left_out(tmp_path):
    root = write(tmp_path, 120)
    stripes(12, 17, 0, 1).save(root / "masks" / "003.png")
    (root / "masks" / "004.png").write_bytes(b"not an image")
    Image.new("RGB", (18, 12), (1, 2, 3)).save(root / "masks" / "005.png")
    stripes(12, 18, 9, 0).save(root / "masks" / "006.png")
    (root / "masks" / "007.png").unlink()
    data = load_data(root, task="segment", class_names=["a", "b", "c"], test=0, val=0)
    reasons = {Path(name).stem: reason for name, reason in data.skipped}
    assert reasons == {
        "003": "the mask is 17x12, its picture 18x12 pixels",
        "004": "not an image of a known format",
        "005": "a mask must hold class indices (grey or palette), got colours (RGB)",
        "006": "class 9 in its mask is none of the 3 classes",
        "007": "no mask of its name in masks/",
    }
    assert len(data.splits["train"]) == 115
    batch = next(iter(data.loader("train", batch_size=115, raw=True)))
    assert torch.equal(batch["image"][:, 0].long(), 60 * batch["label"])  # nothing has slipped by a row


def test_too_much_that_does_not_fit_is_an_error(tmp_path):
    root = write(tmp_path, 20)
    for i in range(4):
        stripes(5, 5, 0, 1).save(root / "masks" / f"{i:03}.png")
    with pytest.raises(DataError, match=r"4 of 20 images cannot be used .* the mask is 5x5, its picture 18x12"):
        load_data(root, task="segment")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"task": "segment", "void": 300}, ValueError, "void must be class indices from 0 to 255"),
        ({"task": "segment", "scale": 2}, ValueError, "task 'segment' takes void, class_names, got 'scale'"),
        ({"void": 3}, ValueError, "task 'classify' takes no more options, got 'void'"),
        ({"task": "colour"}, ValueError, "task must be one of classify, segment, detect, restore, got 'colour'"),
        ({"task": "segment", "void": [0, 1]}, DataError, "a single class besides void"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        load_data(write(tmp_path), **options)


def test_palette_masks_keep_their_indices():
    mask = Image.fromarray(np.arange(4, dtype=np.uint8)[None].repeat(4, 0), "L").convert("P")
    mask.putpalette([9, 9, 9] * 256)
    assert to_mask(open_image(encoded(mask)), (4, 4), (4, 4))[0, 0].tolist() == [0, 1, 2, 3]
    with pytest.raises(Unreadable, match="0 to 255, got 0 to 300"):
        to_mask(Image.fromarray(np.array([[0, 300]], np.int32)), (1, 2), (1, 2))


@pytest.fixture(scope="module")
def scenes():
    return load_data("scenes:classes=3,size=32,n=60,noise=0", task="segment")


@pytest.mark.parametrize("augment", ["flip", "crop", "crop=0.5+flip"])
def test_masks_move_with_their_pictures(scenes, augment):
    """Where a picture's pixel came from outside, the mask is void; inside, the ground stays ground."""
    for batch in scenes.loader("train", batch_size=16, augment=augment):
        plain = scenes.labels("train", batch["index"])
        assert (batch["label"] != plain).any()
        fill = torch.tensor([round(255 * m) / 255 for m in scenes.mean])
        empty = (batch["label"] == VOID)[:, None] & torch.ones(1, 3, 1, 1, dtype=torch.bool)
        pixels = batch["image"] * torch.tensor(scenes.std).view(3, 1, 1) + torch.tensor(scenes.mean).view(3, 1, 1)
        assert torch.allclose(pixels[empty], fill.view(1, 3, 1, 1).expand_as(pixels)[empty], atol=1e-4)
    flipped = scenes.loader("train", batch_size=43, augment="flip", shuffle=False).batch(0)
    plain = scenes.loader("train", batch_size=43, augment="none", shuffle=False).batch(0)
    turned = [i for i in range(43) if torch.equal(flipped["image"][i], plain["image"][i].flip(2))]
    assert 10 < len(turned) < 33
    assert all(torch.equal(flipped["label"][i], plain["label"][i].flip(1)) for i in turned)


def test_batches_depend_on_seed_epoch_and_row_only(scenes):
    options = {"batch_size": 10, "augment": "color+crop+flip", "seed": 3, "epoch": 2}
    torch.manual_seed(1)
    whole = list(scenes.loader("train", **options))
    before = torch.get_rng_state()
    rest = list(scenes.loader("train", skip=2, **options))
    assert torch.equal(before, torch.get_rng_state())  # the caller's randomness is not touched
    assert all(torch.equal(a[k], b[k]) for a, b in zip(whole[2:], rest, strict=True) for k in a)
    parts = [scenes.loader("train", rank=r, world=2, **options).batch(1) for r in (0, 1)]
    assert all(torch.equal(whole[1][k], torch.cat([p[k] for p in parts])) for k in whole[1])


@pytest.mark.parametrize("cache", ["disk", "lazy"])
def test_every_cache_gives_the_same(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    root = write(tmp_path / "data")
    first, second, again = (load_data(root, task="segment", cache=c) for c in ("memory", cache, cache))
    for other in (second, again):
        pairs = zip(first.loader("train", augment="crop"), other.loader("train", augment="crop"), strict=True)
        assert all(torch.equal(a[k], b[k]) for a, b in pairs for k in a)


def test_subsets_and_summaries_are_those_of_all_data(scenes):
    small = scenes.subset({"train": 7})
    assert type(small) is type(scenes) and len(small.splits["train"]) == 7 == len(small.splits["train"].targets)
    assert small.mean == scenes.mean and small.summary()["task"] == "segment"
    assert next(iter(small.loader("train")))["label"].shape == (7, 32, 32)


def test_custom_transforms_see_picture_and_mask(scenes):
    def upside_down(sample):
        return {k: v.flip(-2) for k, v in sample.items()}

    plain, turned = (scenes.loader("val", augment=a).batch(0) for a in (None, upside_down))
    assert torch.equal(plain["label"].flip(1), turned["label"])
    with pytest.raises(ValueError, match=r"must give pictures and masks of size \(32, 32\), got \(16, 32\)"):
        scenes.loader("val", augment=lambda s: {k: v[..., :16, :] for k, v in s.items()}).batch(0)
    with pytest.raises(ValueError, match="augment must be made of none, flip, crop, color"):
        scenes.loader("val", augment="zoom")
