"""Pictures with boxes: read, checked, moved together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data.conftest import encoded, noise
from trimtab.core.errors import DataError
from trimtab.data import load_data
from trimtab.data.synthetic import scenes

BOX, OTHER = [2.0, 3.0, 10.0, 9.0], [8.0, 1.0, 12.0, 8.0]


def parquet(
    path: Path, objects: list[dict], *, names: list[str] | None = None, size: tuple[int, int] = (12, 16)
) -> Path:
    cells = [{"bytes": encoded(noise(*size, i)), "path": "a.png"} for i in range(len(objects))]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    inner = pa.struct([("bbox", pa.list_(pa.list_(pa.float32()))), ("category", pa.list_(pa.int64()))])
    table = pa.table({"image": pa.array(cells, kind), "objects": pa.array(objects, inner)})
    if names:
        category = {"feature": {"names": names, "_type": "ClassLabel"}, "_type": "List"}
        corners = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"}
        bbox = {"feature": corners, "_type": "List"}
        features = {"image": {"_type": "Image"}, "objects": {"bbox": bbox, "category": category}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


def coco(root: Path, n: int = 20) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        noise(12, 16, i).save(root / f"{i:03}.png")
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i:03}.png", "width": 16, "height": 12} for i in range(n)],
        "annotations": [
            {"image_id": 10 + i, "bbox": [2, 3, 8, 6], "category_id": 7 if i % 2 else 3, "iscrowd": int(i == 0)}
            for i in range(n)
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    (root / "annotations.json").write_text(json.dumps(content))
    return root


def test_parquet_gives_boxes_in_pixels_of_the_picture_that_is_fed(tmp_path):
    rows = [{"bbox": [BOX, OTHER][: 1 + i % 2], "category": [0, 1][: 1 + i % 2]} for i in range(20)]
    data = load_data(parquet(tmp_path / "a.parquet", rows, names=["rbc", "wbc"]), task="detect", image_size=(24, 24))
    assert (data.class_names, data.most, data.spec.task) == (["rbc", "wbc"], 2, "detect")
    batch = next(iter(data.loader("train", batch_size=8, shuffle=False, augment="none")))
    assert batch["boxes"].shape == (8, 2, 4) and batch["boxes"].dtype == torch.float32
    for boxes, labels in zip(batch["boxes"], batch["box_label"], strict=True):
        assert labels[0] == 0 and boxes[0].tolist() == [3.0, 6.0, 15.0, 18.0]  # x 24/16, y 24/12
        if labels[1] == -1:
            assert boxes[1].tolist() == [0.0] * 4
        else:
            assert labels[1] == 1 and boxes[1].tolist() == [12.0, 2.0, 18.0, 16.0]
    assert set(batch["box_label"][:, 1].tolist()) == {-1, 1}


def test_width_and_height_are_recognised_and_can_be_said(tmp_path):
    rows = [{"bbox": [[9.0, 7.0, 4.0, 3.0]], "category": [0]} for _ in range(20)]
    rows[0]["category"] = [1]
    guessed = load_data(parquet(tmp_path / "a.parquet", rows), task="detect", test=0, val=0)
    assert guessed.splits["train"].targets.boxes[0].tolist() == [[9.0, 7.0, 13.0, 10.0]]
    assert any("read as x, y, width, height" in w for w in guessed.warnings)
    rows = [{"bbox": [[1.0, 2.0, 5.0, 6.0]], "category": [i % 2]} for i in range(20)]
    said = load_data(parquet(tmp_path / "b.parquet", rows), task="detect", box_format="xywh", test=0, val=0)
    assert said.splits["train"].targets.boxes[0].tolist() == [[1.0, 2.0, 6.0, 8.0]]
    with pytest.raises(ValueError, match="box_format must be one of auto, xyxy, xywh, got 'cxcywh'"):
        load_data(tmp_path / "b.parquet", task="detect", box_format="cxcywh")


def test_coco_json_is_read_with_its_categories(tmp_path):
    data = load_data(coco(tmp_path / "pets"), task="detect", test=0, val=0)
    assert data.class_names == ["cat", "dog"]
    targets = data.splits["train"].targets
    assert targets.boxes[1].tolist() == [[2.0, 3.0, 10.0, 9.0]]
    assert [v.tolist() for v in targets.labels[:3]] == [[], [1], [0]]  # the first is a crowd
    assert "1 of 20 training pictures have no objects" in data.warnings
    (tmp_path / "pets" / "005.png").unlink()
    assert ("train/005.png", "no such file in pets/") in load_data(tmp_path / "pets", task="detect").skipped


def test_boxes_that_make_no_sense_are_named_and_left_out(tmp_path):
    rows = [{"bbox": [BOX], "category": [i % 2]} for i in range(120)]
    rows[1] = {"bbox": [[20.0, 3.0, 30.0, 9.0]], "category": [0]}
    rows[2] = {"bbox": [[5.0, 5.0, 5.0, 9.0]], "category": [0]}
    rows[3] = {"bbox": [BOX], "category": [2]}
    rows[4] = {"bbox": [[-2.0, 3.0, 10.0, 19.0]], "category": [0]}
    data = load_data(parquet(tmp_path / "a.parquet", rows, names=["a", "b"]), task="detect", test=0, val=0)
    assert dict(data.skipped) == {
        "a.parquet row 1": "box (20, 3, 30, 9) lies outside the picture of 16x12 pixels",
        "a.parquet row 2": "box (5, 5, 5, 9) has no area",
        "a.parquet row 3": "class 2 of a box is none of the 2 classes",
    }
    cut = data.splits["train"].targets.boxes[data.splits["train"].names.index("a.parquet row 4")]
    assert cut.tolist() == [[0.0, 3.0, 10.0, 12.0]]


def test_what_cannot_be_learned_from_is_an_error(tmp_path):
    with pytest.raises(DataError, match="there are no objects in the 14 training pictures"):
        load_data(parquet(tmp_path / "a.parquet", [{"bbox": [], "category": []}] * 20, names=["a", "b"]), task="detect")
    with pytest.raises(DataError, match="1 boxes but 2 categories"):
        load_data(parquet(tmp_path / "b.parquet", [{"bbox": [BOX], "category": [0, 1]}] * 9), task="detect")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no annotations.json; data for task 'detect' must be 'scenes:"):
        load_data(tmp_path / "empty", task="detect")
    (tmp_path / "empty" / "annotations.json").write_text('{"images": []}')
    with pytest.raises(DataError, match="not in COCO's format"):
        load_data(tmp_path / "empty", task="detect")


@pytest.fixture(scope="module")
def data():
    return load_data("scenes:classes=3,size=32,n=80,noise=0", task="detect")


def test_scenes_have_tight_boxes_of_what_is_seen():
    made = scenes(30, classes=4, size=40)
    again = scenes(30, classes=4, size=40)
    assert all(np.array_equal(a, b) for a, b in zip(made.boxes, again.boxes)) and np.array_equal(
        made.images, again.images
    )
    for mask, boxes, labels in zip(made.masks, made.boxes, made.labels, strict=True):
        inside = np.zeros_like(mask, bool)
        for (x1, y1, x2, y2), label in zip(boxes.astype(int), labels, strict=True):
            window = mask[y1:y2, x1:x2] == label + 1
            assert window[0].any() and window[-1].any() and window[:, 0].any() and window[:, -1].any()
            inside[y1:y2, x1:x2] = True
        assert (mask[~inside] == 0).all() and len(boxes) >= 1


def test_flipping_mirrors_boxes(data):
    plain, flipped = (data.loader("val", batch_size=8, augment=a).batch(0) for a in ("none", "flip"))
    turned = 0
    for i in range(len(plain["image"])):
        if torch.equal(flipped["image"][i], plain["image"][i]):
            assert torch.equal(flipped["boxes"][i], plain["boxes"][i])
            continue
        turned += 1
        assert torch.equal(flipped["image"][i], plain["image"][i].flip(2))
        real = plain["box_label"][i] >= 0
        x1, y1, x2, y2 = plain["boxes"][i][real].unbind(1)
        assert torch.equal(flipped["boxes"][i][real], torch.stack([32 - x2, y1, 32 - x1, y2], 1))
    assert turned > 0


@pytest.mark.parametrize("augment", ["crop", "zoom=3", "auto"])
def test_boxes_stay_on_their_objects(data, augment):
    """The picture in a box has still the colour of the object, and no box leaves the picture."""
    for batch in data.loader("train", batch_size=16, augment=augment):
        real = batch["box_label"] >= 0
        assert real.any(1).all()
        boxes = batch["boxes"][real]
        assert (boxes >= 0).all() and (boxes <= 32).all() and (boxes[:, 2:] - boxes[:, :2] >= 1).all()
        assert (batch["boxes"][~real] == 0).all()
    if augment == "zoom=3":
        area = [
            (b["boxes"][..., 2:] - b["boxes"][..., :2]).prod(-1)[b["box_label"] >= 0].mean()
            for b in (data.loader("train", batch_size=50, augment=a).batch(0) for a in ("none", augment))
        ]
        assert area[1] < 0.9 * area[0]


def test_batches_depend_on_seed_epoch_and_row_only(data):
    options = {"batch_size": 10, "augment": "auto", "seed": 3, "epoch": 2}
    whole = list(data.loader("train", **options))
    rest = list(data.loader("train", skip=3, **options))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(whole[3:], rest, strict=True) for k in a)
    parts = [data.loader("train", rank=r, world=2, **options).batch(1) for r in (0, 1)]
    assert all(torch.equal(whole[1][k], torch.cat([p[k] for p in parts])) for k in whole[1])
    assert not torch.equal(whole[0]["image"], data.loader("train", **{**options, "epoch": 3}).batch(0)["image"])
