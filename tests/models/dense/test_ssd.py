"""SSD: every line of the fact sheet's exact checks, and its traps."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, box_iou

import trimtab as tt
from trimtab.compress.prune.magnitude import magnitude
from trimtab.core.cost import measure
from trimtab.core.onnx_file import open_session
from trimtab.core.spec import InputSpec
from trimtab.deploy.vision import select
from trimtab.learn.tasks import TASKS
from trimtab.models.dense.ssd import (
    SSD,
    L2Norm,
    PlainBody,
    TimmBody,
    decode,
    default_boxes,
    detections,
    encode,
    hardest,
    match,
    multibox_loss,
    paper_shapes,
)  # fmt: skip
from trimtab.models.dense.ssd.model import checkpoint_filter_fn

G300 = ((38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1))
G512 = ((64, 64), (32, 32), (16, 16), (8, 8), (4, 4), (2, 2), (1, 1))
# name, classes, boxes, parameters, MACs in G
TABLE = [
    ("ssd300_vgg16", 20, 8732, 26_285_486, 31.374),
    ("ssd300_vgg16_coco", 80, 8732, 34_305_206, 34.360),
    ("ssd300_vgg16", 90, 8732, 35_641_826, None),
    ("ssd512_vgg16", 20, 24564, 27_188_676, 90.208),
    ("ssd512_vgg16_coco", 80, 24564, 36_038_196, 98.629),
]
# side, (first, low, high) in percent, smallest sizes of each map and what follows the last
SIZES = [
    (300, (10, 20, 90), [30, 60, 111, 162, 213, 264, 315]),
    (300, (7, 15, 90), [21, 45, 99, 153, 207, 261, 315]),
    (512, (7, 15, 90), [35.84, 76.8, 153.6, 230.4, 307.2, 384, 460.8, 537.6]),
    (512, (4, 10, 90), [20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8, 542.72]),
]


def on_meta(name: str, **kwargs) -> SSD:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def tiny(num_classes: int = 2, side: int = 32, widths=(8, 16, 16), **kwargs) -> SSD:
    torch.manual_seed(0)
    shapes = paper_shapes(len(widths) - 1, side, scales=(20, 40, 90))
    return SSD(PlainBody(widths), shapes, img_size=side, num_classes=num_classes, **kwargs)


def squares(count: int, side: int = 32, objects: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Noise with bright (class 0) and dark (class 1) rectangles on it; the last image has none."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 3, side, side, generator=g) * 0.1
    boxes, label = torch.zeros(count, objects, 4), torch.full((count, objects), -1)
    for i in range(count - 1):
        for j in range(1 + i % objects):
            w, h = (int(n) for n in torch.randint(side // 5, side // 2, (2,), generator=g))
            x, y = int(torch.randint(side - w, (1,), generator=g)), int(torch.randint(side - h, (1,), generator=g))
            box = torch.tensor([x, y, x + w, y + h]).float()
            if box_iou(box[None], boxes[i]).max() > 0.05:
                continue
            boxes[i, j], label[i, j] = box, j % 2
            image[i, :, y : y + h, x : x + w] += 1.0 - 2.0 * (j % 2)
    return {"image": image, "boxes": boxes, "box_label": label}


# ------------------------------------------------------------------------------------------------- networks and boxes


@pytest.mark.parametrize(("name", "classes", "boxes", "params", "macs"), TABLE)
def test_counts_equal_the_fact_sheet(name, classes, boxes, params, macs):
    net = on_meta(name, num_classes=classes)
    assert net.default_boxes.shape == (boxes, 4)
    assert net.grids == (G300 if "300" in name else G512)
    cost = measure(net, (3, *net.img_size), what=("params", "macs"))
    assert cost.params == params
    if macs is not None:
        assert cost.macs / 1e9 == pytest.approx(macs, abs=0.0005)


def test_boxes_of_each_map():
    per_map = [r * c * len(cell) for (r, c), cell in zip(G300, paper_shapes(6, 300), strict=True)]
    assert per_map == [5776, 2166, 600, 150, 36, 4]
    per_map = [r * c * len(cell) for (r, c), cell in zip(G512, paper_shapes(7, 512), strict=True)]
    assert per_map == [16384, 6144, 1536, 384, 96, 16, 4]


@pytest.mark.parametrize(("side", "scales", "sizes"), SIZES)
def test_sizes_come_from_floored_percents(side, scales, sizes):
    shapes = paper_shapes(len(sizes) - 1, side, scales=scales)
    for small, large, cell in zip(sizes, sizes[1:], shapes, strict=False):
        assert cell[0] == pytest.approx((small, small))
        assert cell[1] == pytest.approx(((small * large) ** 0.5,) * 2)
        ratios = [w / h for w, h in cell[2:]]
        assert ratios == pytest.approx([2, 1 / 2, 3, 1 / 3][: len(cell) - 2])
        assert all(w * h == pytest.approx(small**2) for w, h in cell[2:])


def test_first_and_last_boxes_of_ssd300_and_nothing_is_clipped():
    boxes = default_boxes(G300, paper_shapes(6, 300), (300, 300), (8, 16, 32, 64, 100, 300)) / 300
    centre = [0.013333, 0.013333]
    first = [[0.1, 0.1], [0.141421, 0.141421], [0.141421, 0.070711], [0.070711, 0.141421]]
    assert boxes[:4].tolist() == [pytest.approx(centre + wh, abs=1e-6) for wh in first]
    assert boxes[-1].tolist() == pytest.approx([0.5, 0.5, 0.622254, 1.244508], abs=1e-6)
    net = timm.create_model("ssd300_vgg16", num_classes=1)  # the registered network has these boxes
    torch.testing.assert_close(net.default_boxes / 300, boxes)


def test_boxes_go_by_map_row_column_shape():
    boxes = default_boxes(((2, 3), (1, 1)), [[(4, 4), (8, 2)], [(9, 9)]], (20, 30))
    assert boxes[:4].tolist() == [[5, 5, 4, 4], [5, 5, 8, 2], [15, 5, 4, 4], [15, 5, 8, 2]]
    assert boxes[6].tolist() == [5, 15, 4, 4]  # second row
    assert boxes[12].tolist() == [15, 10, 9, 9]


def test_raw_outputs_are_in_the_order_of_the_boxes():
    """A network whose heads only repeat where a cell is says so at the boxes of that cell."""
    net = tiny(num_classes=1).eval()
    with torch.no_grad():
        for head in net.scores:
            head.weight.zero_()
        for k, head in enumerate(net.scores):
            head.bias.copy_(torch.arange(len(head.bias)) + 100 * k)
        _, logits = net(torch.zeros(1, 3, 32, 32))
    assert logits[0, :7].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1], [2, 3], [4, 5]]
    assert logits[0, 8 * 8 * 4].tolist() == [100, 101]


def test_encode_and_decode_are_inverse():
    g = torch.Generator().manual_seed(0)
    corners = torch.rand(50, 4, generator=g, dtype=torch.float64) * 100
    corners[:, 2:] += corners[:, :2] + 1
    boxes = torch.rand(50, 4, generator=g, dtype=torch.float64) * 100 + 1
    torch.testing.assert_close(decode(encode(corners, boxes), boxes), corners, atol=1e-6, rtol=0)
    torch.testing.assert_close(decode(torch.zeros_like(boxes), boxes), box_convert(boxes, "cxcywh", "xyxy"))
    moved = encode(torch.tensor([[12.0, 10.0, 32.0, 50.0]]), torch.tensor([[20.0, 30.0, 10.0, 40.0]]))
    assert moved[0].tolist() == pytest.approx([2 / 10 / 0.1, 0, np.log(2) / 0.2, 0])


def test_l2_norm_gives_vectors_of_length_20():
    x = torch.randn(2, 512, 3, 3)
    torch.testing.assert_close(L2Norm(512)(x).norm(dim=1), torch.full((2, 3, 3), 20.0))
    assert L2Norm(4)(torch.zeros(1, 4, 1, 1)).abs().sum() == 0


def test_the_layers_of_vgg_that_changed():
    body = on_meta("ssd300_vgg16").body
    assert (body.fc6.dilation, body.fc6.padding, body.fc6.kernel_size) == ((6, 6), (6, 6), (3, 3))
    assert (body.pool5.kernel_size, body.pool5.stride, body.pool5.padding) == (3, 1, 1)
    assert [m.ceil_mode for m in body.features if isinstance(m, nn.MaxPool2d)] == [False, False, True, False]
    assert body.tap == 23 and body.features[21].out_channels == 512 and isinstance(body.features[23], nn.MaxPool2d)


# ------------------------------------------------------------------------------------------------------------ matching


def greedy(objects: Tensor, boxes: Tensor, overlap: float = 0.5) -> list[int]:
    """The official rule, step by step, for one image."""
    if not len(objects):
        return [-1] * len(boxes)
    iou = box_iou(objects, box_convert(boxes, "cxcywh", "xyxy")).double().numpy()
    most, matched = iou.max(0), [-1] * len(boxes)
    left = iou.copy()
    while left.size and left.max() > 1e-6:
        row, column = np.unravel_index(left.argmax(), left.shape)
        matched[column] = int(row)
        left[row], left[:, column] = 0, 0
    return [m if m >= 0 else int(iou[:, j].argmax()) if most[j] >= overlap else -1 for j, m in enumerate(matched)]


def test_matching_is_the_global_greedy_rule():
    g = torch.Generator().manual_seed(0)
    boxes = default_boxes(((4, 4), (2, 2)), [[(10, 10), (16, 8)], [(24, 24)]], (32, 32))
    objects = torch.rand(40, 6, 4, generator=g) * 20
    objects[..., 2:] = objects[..., :2] + 2 + objects[..., 2:] * 0.8
    present = torch.rand(40, 6, generator=g) < 0.8
    found = match(objects, present, boxes)
    crowded = 0
    for i in range(40):
        rows = present[i].nonzero()[:, 0].tolist()
        want = greedy(objects[i, rows], boxes)
        assert found[i].tolist() == [rows[m] if m >= 0 else -1 for m in want]
        best = box_iou(objects[i, rows], box_convert(boxes, "cxcywh", "xyxy")).argmax(1)
        crowded += len(best.unique()) < len(rows)
    assert crowded > 10  # objects that share their best box were among them


def test_of_two_objects_with_one_best_box_the_nearer_gets_it():
    boxes = torch.tensor([[10.0, 10, 10, 10], [16.0, 10, 10, 10]])
    near, far = [5.0, 5, 15, 15], [3.0, 5, 13, 15]
    for order in ([near, far], [far, near]):
        found = match(torch.tensor([order]), torch.ones(1, 2, dtype=torch.bool), boxes)[0]
        assert order[found[0]] == near and order[found[1]] == far  # far has IoU 0.18 with what is left


def test_every_object_that_overlaps_a_box_has_one():
    boxes = default_boxes(((2, 2),), [[(8, 8)]], (32, 32))
    small, outside = [7.0, 7, 8, 8], [40.0, 40, 50, 50]
    found = match(torch.tensor([[small, outside]]), torch.ones(1, 2, dtype=torch.bool), boxes)[0]
    assert found.tolist() == [0, -1, -1, -1]  # IoU 1/64; the other overlaps nothing


def test_no_objects_match_nothing():
    boxes = default_boxes(((2, 2),), [[(8, 8)]], (32, 32))
    padding = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)
    for objects, present in (padding, (torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool))):
        assert (match(objects, present, boxes) == -1).all()


# ---------------------------------------------------------------------------------------------------------------- loss


def test_negatives_are_the_hardest_of_their_image():
    g = torch.Generator().manual_seed(0)
    loss = torch.rand(5, 20, generator=g) * torch.tensor([1.0, 100.0, 1.0, 1.0, 1.0])[:, None]  # not over the batch
    positive = torch.zeros(5, 20, dtype=torch.bool)
    for i, count in enumerate((2, 1, 0, 7, 20)):
        positive[i, :count] = True
    chosen = hardest(loss, positive, 3.0)
    assert chosen.sum(1).tolist() == [6, 3, 0, 13, 0]  # min(3 x positives, those there are)
    assert not (chosen & positive).any()
    rest = loss.masked_fill(positive | chosen, -1).amax(1)
    assert all(loss[i][chosen[i]].min() > rest[i] for i in (0, 1))


def test_the_loss_by_hand():
    g = torch.Generator().manual_seed(1)
    net, batch = tiny(num_classes=3), squares(4)
    boxes = net.default_boxes
    offsets, logits = torch.randn(4, len(boxes), 4, generator=g), torch.randn(4, len(boxes), 4, generator=g)
    box_loss = class_loss = 0.0
    count = 0
    for i in range(4):
        rows = (batch["box_label"][i] >= 0).nonzero()[:, 0]
        matched = greedy(batch["boxes"][i, rows], boxes)
        negative = []
        for j, m in enumerate(matched):
            if m < 0:
                negative.append(F.cross_entropy(logits[i, j], torch.tensor(0)).item())
                continue
            row = rows[m]
            wanted = batch["box_label"][i, row] + 1  # 0 is background
            class_loss += F.cross_entropy(logits[i, j], wanted).item()
            box_loss += F.smooth_l1_loss(
                offsets[i, j], encode(batch["boxes"][i, row], boxes[j]), reduction="sum"
            ).item()
        here = len(matched) - len(negative)
        count += here
        class_loss += sum(sorted(negative)[::-1][: 3 * here])
    found = multibox_loss(offsets, logits, boxes, batch["boxes"], batch["box_label"])
    assert found["class"].item() == pytest.approx(class_loss / count, rel=1e-5)
    assert found["box"].item() == pytest.approx(box_loss / count, rel=1e-5)


def test_a_batch_without_objects_has_loss_zero_and_a_gradient():
    net, batch = tiny(), squares(1)
    for cut in (slice(None), slice(0)):  # padding only, and not even that
        empty = {"boxes": batch["boxes"][:, cut], "box_label": batch["box_label"][:, cut]}
        loss = sum(net.criterion(net(batch["image"]), empty).values())
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is None or not p.grad.any() for p in net.parameters())


def test_images_without_objects_change_nothing_but_are_allowed():
    net, batch = tiny().eval(), squares(4)
    outputs = net(batch["image"])
    with_empty = net.criterion(outputs, batch)
    without = net.criterion(tuple(o[:3] for o in outputs), {k: v[:3] for k, v in batch.items()})
    assert {k: v.item() for k, v in with_empty.items()} == pytest.approx({k: v.item() for k, v in without.items()})


def test_the_loss_in_low_precision_is_finite_and_float32():
    net, batch = tiny(), squares(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = net.criterion(net(batch["image"]), batch)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())


# ---------------------------------------------------------------------------------------------------------- detections


def perfect(net: SSD, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Raw outputs that say exactly what is in the batch."""
    matched = match(batch["boxes"], batch["box_label"] >= 0, net.default_boxes)
    offsets = torch.zeros(*matched.shape, 4)
    logits = torch.zeros(*matched.shape, 1 + net.num_classes)
    logits[..., 0] = 20.0
    for i, j in (matched >= 0).nonzero().tolist():
        row = matched[i, j]
        offsets[i, j] = encode(batch["boxes"][i, row], net.default_boxes[j])
        logits[i, j, 0], logits[i, j, 1 + batch["box_label"][i, row]] = 0.0, 20.0
    return offsets, logits


def precision_and_recall(found: list[dict[str, Tensor]], batch: dict[str, Tensor], least: float, iou: float):
    """Of the boxes with a score of `least` or more: the share that is right, and the share of objects that is found."""
    right = claimed = objects = hit = 0
    for seen, boxes, label in zip(found, batch["boxes"], batch["box_label"], strict=True):
        sure = seen["scores"] >= least
        same = seen["labels"][sure][:, None] == label[label >= 0]
        good = same & (box_iou(seen["boxes"][sure], boxes[label >= 0]) >= iou)
        right, claimed = right + int(good.any(1).sum()), claimed + int(sure.sum())
        hit, objects = hit + int(good.any(0).sum()), objects + int((label >= 0).sum())
    return right / max(1, claimed), hit / objects


def test_perfect_outputs_give_the_objects_back():
    net, batch = tiny(), squares(8)
    found = net.decode(perfect(net, batch))
    assert precision_and_recall(found, batch, 0.01, 0.999) == (1.0, 1.0)
    assert [len(seen["labels"]) for seen in found] == (batch["box_label"] >= 0).sum(1).tolist()


def test_detections_do_not_depend_on_the_order_of_boxes():
    g = torch.Generator().manual_seed(0)
    boxes = torch.rand(60, 4, generator=g) * 20
    boxes[:, 2:] += boxes[:, :2] + 5
    scores = torch.rand(60, 3, generator=g)
    order = torch.randperm(60, generator=g)
    a, b = detections(boxes, scores), detections(boxes[order], scores[order])
    assert 3 < len(a["labels"]) < 150
    for key in a:
        torch.testing.assert_close(a[key], b[key])


def test_suppression_is_by_class_above_045_and_its_limits():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 7], [0, 0, 10, 4]])  # IoU with the first: 0.7, 0.4
    scores = torch.tensor([[0.9, 0.2], [0.8, 0.3], [0.7, 0.005]])
    found = detections(boxes, scores)
    assert found["labels"].tolist() == [0, 0, 1]  # 0.005 is nothing, and of class 1 the better of two is left
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.7, 0.3]))
    assert len(detections(boxes, scores, keep=1)["labels"]) == 1
    apart = torch.arange(500.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    many = detections(apart, torch.linspace(0.5, 0.9, 500)[:, None].repeat(1, 1), keep=1000)
    assert len(many["labels"]) == 400
    assert len(detections(apart, torch.full((500, 2), 0.5))["labels"]) == 200


def test_boxes_end_at_the_image():
    net = tiny()
    offsets = torch.full((1, len(net.default_boxes), 4), 30.0)
    corners, _ = net.boxes_and_scores((offsets, torch.zeros(1, len(net.default_boxes), 3)))
    assert corners.min() >= 0 and corners.max() <= 32


# -------------------------------------------------------------------------------------------------------- as any model


def test_it_learns_eight_images_by_heart():
    net, batch = tiny(widths=(12, 16, 24)), squares(8)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        sum(net.criterion(net(batch["image"]), batch).values()).backward()
        optimizer.step()
    found = net.eval().decode(net(batch["image"]))
    precision, recall = precision_and_recall(found, batch, 0.5, 0.5)
    assert precision > 0.95 and recall > 0.95
    assert not (found[-1]["scores"] > 0.5).any()  # where there is nothing


def test_nano_is_pruned_to_half_trained_on_saved_and_exported(tmp_path):
    net = tt.create_model("ssd_nano", num_classes=2, img_size=32, widths=(8, 16, 16, 24), scales=(20, 40, 90), seed=0)
    batch, before = squares(8), net.default_boxes.clone()
    small = magnitude(net.eval(), (3, 32, 32), budget="macs<=50%")
    macs = [measure(m, (3, 32, 32), what=("macs",)).macs for m in (net, small)]
    assert macs[1] <= 0.5 * macs[0]
    assert small(batch["image"])[1].shape == net(batch["image"])[1].shape
    torch.testing.assert_close(small.default_boxes, before)

    optimizer, losses = torch.optim.Adam(small.train().parameters(), 5e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = sum(small.criterion(small(batch["image"]), batch).values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]

    tt.save(small.eval(), tmp_path / "small")
    again = tt.load(tmp_path / "small")
    for a, b in zip(again(batch["image"]), small(batch["image"]), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(again.default_boxes, before)

    spec = InputSpec((3, 32, 32), (0.5,) * 3, (0.25,) * 3, task="detect")
    file = tt.export(again, tmp_path / "small.onnx", spec=spec, labels=["bright", "dark"], exporter="classic").path
    (out,) = open_session(file).run(None, {"image": batch["image"].numpy()})
    for row, seen in zip(out, again.decode(again(batch["image"])), strict=True):  # boxes are shares of the image there
        found = select(row[:, :4] * 32, row[:, 4:])
        for got, expected in zip(found, (seen["boxes"], seen["scores"], seen["labels"]), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), expected, atol=1e-3, rtol=1e-3)


def test_it_is_trained_and_measured_like_any_model():
    data = tt.load_data("scenes:classes=2,size=32,n=60", task="detect")
    net = tt.create_model("ssd_nano", num_classes=2, img_size=32, widths=(8, 16, 16), scales=(20, 40, 90), seed=0)
    result = tt.fit(net, data, epochs=2, lr=5e-3, clip_grad=10.0, progress=False)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert set(tt.evaluate(net, data)) == {"map", "ap50", "n"}
    batch = next(iter(data.loader("test", batch_size=8)))
    tally = TASKS["detect"].measure(data, True)
    tally.update(net.decode(perfect(net, batch)), TASKS["detect"].target(batch))
    assert tally.compute() == {"map": pytest.approx(1.0), "ap50": pytest.approx(1.0)}


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "swin_tiny_patch4_window7_224"])
def test_lite_takes_any_backbone(backbone):
    net = on_meta("ssd_lite", backbone=backbone, extras=(64, 32), img_size=128, num_classes=3)
    assert net.grids == ((8, 8), (4, 4), (2, 2), (1, 1))
    assert len(net.default_boxes) == 64 * 4 + 16 * 6 + 4 * 4 + 4
    offsets, logits = net(torch.zeros(2, 3, 128, 128, device="meta"))
    assert offsets.shape == (2, 372, 4) and logits.shape == (2, 372, 4)
    assert all(head[0][0].groups == head[0][0].in_channels for head in net.scores)


def test_the_scale_of_the_l2_norm_is_cut_with_its_channels():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), L2Norm(16), nn.Conv2d(16, 8, 3)).eval()
    small = magnitude(net, (3, 8, 8), budget="macs<=50%")
    assert small[1].weight.shape == small[0].bias.shape == (8,)


@pytest.mark.parametrize("names", [("classifier.0", "classifier.3"), ("pre_logits.fc1", "pre_logits.fc2")])
def test_vgg_weights_are_taken_with_every_fourth_row_and_third_pixel(names):
    net = on_meta("ssd300_vgg16")
    state = {k.removeprefix("body."): torch.zeros(v.shape) for k, v in net.state_dict().items() if "features" in k}
    state["features.28.bias"] += 5.0
    rows, pixels = torch.arange(4096.0), torch.arange(512.0 * 49)
    for name, columns in zip(names, (512 * 49, 4096), strict=True):
        state[f"{name}.weight"] = rows[:, None].expand(4096, columns)
        state[f"{name}.bias"] = rows
    full = checkpoint_filter_fn(state, net)
    assert {k: v.shape for k, v in full.items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert full["body.features.28.bias"].eq(5).all()
    assert full["body.fc6.weight"][:, 0, 0, 0].tolist() == rows[::4].tolist() == full["body.fc7.bias"].tolist()
    state[f"{names[0]}.weight"] = pixels.expand(4096, -1)
    kernel = checkpoint_filter_fn(state, net)["body.fc6.weight"][7, 2]
    assert (kernel - 2 * 49).tolist() == [[0, 3, 6], [21, 24, 27], [42, 45, 48]]
    assert checkpoint_filter_fn(full, net) is full


def test_weights_of_another_number_of_classes_keep_all_but_the_scores(tmp_path):
    a = tt.create_model("ssd_nano", num_classes=3, img_size=64, seed=0)
    tt.save(a, tmp_path)
    with pytest.warns(UserWarning, match="classifier starts fresh"):
        b = tt.create_model("ssd_nano", num_classes=5, img_size=64, seed=1, weights=tmp_path)
    fresh = [k for k, v in b.state_dict().items() if k not in a.state_dict() or not v.equal(a.state_dict()[k])]
    assert {k.split(".")[0] for k in fresh} == {"scores"}


def test_wrong_arguments_say_what_was_expected():
    net = tiny()
    with pytest.raises(ValueError, match=r"built for images of \(32, 32\), got \(48, 48\)"):
        net(torch.zeros(1, 3, 48, 48))
    with pytest.raises(ValueError, match="batch of images"):
        net(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="given for the 2 maps of the body, got 3"):
        SSD(PlainBody((8, 8, 8)), paper_shapes(3, 32), img_size=32)
    with pytest.raises(ValueError, match="scales must grow"):
        paper_shapes(3, 32, scales=(20, 10, 90))
    with pytest.raises(ValueError, match="cannot take images of 64 x 64"):
        on_meta("ssd300_vgg16", img_size=64)
    with pytest.raises(ValueError, match="smaller than the one before"):
        on_meta("ssd_nano", img_size=16, widths=(8, 8, 8, 8, 8))
    with pytest.raises(ValueError, match="classes must be a positive integer"):
        tiny(num_classes=0)


def test_an_artifact_cannot_reach_for_files_or_the_network():
    with pytest.raises(ValueError, match="registered model, got 'hf-hub:somebody/model'"):
        TimmBody("hf-hub:somebody/model", (64, 64))
    with pytest.raises(ValueError, match="must not have checkpoint_path"):
        TimmBody("resnet18", (64, 64), backbone_args={"checkpoint_path": "x"})
