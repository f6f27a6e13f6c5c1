"""Networks that segment, detect and restore: exported, and run from the file alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from tests.learn.detector import Cells
from trimtab.core.errors import ArtifactError, DataError
from trimtab.core.spec import InputSpec
from trimtab.data import load_data
from trimtab.deploy import OnnxModel, OnnxVision, Vision, export
from trimtab.deploy.to_onnx import ExportError
from trimtab.deploy.vision import select
from trimtab.learn import evaluate, fit
from trimtab.models.dense.ssd.boxes import detections
from trimtab.nn.resize import rgb_to_ycbcr, upscale, ycbcr_to_rgb

LABELS = ["red", "green", "blue"]
PLAIN = InputSpec((3, 16, 16), (0.0,) * 3, (1.0,) * 3, "segment")


def channels() -> nn.Module:
    """Says of every pixel which colour is brightest."""
    net = nn.Conv2d(3, 3, 1, bias=False)
    nn.init.dirac_(net.weight)
    return net


def flag(height: int = 20, width: int = 40) -> Image.Image:
    """Left half green, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 1] = pixels[:, width // 2 :, 2] = 200
    return Image.fromarray(pixels)


def test_a_segmenter_is_run_from_its_file(tmp_path):
    file = export(channels(), tmp_path / "s.onnx", spec=PLAIN, labels=LABELS, exporter="classic").path
    flag().save(tmp_path / "flag.png")
    from_file, from_pixels = OnnxVision(file).predict([tmp_path / "flag.png", np.asarray(flag(50, 30))])
    assert from_file.mask.shape == (20, 40) and from_pixels.mask.shape == (50, 30)
    assert (from_file.mask[:, :20] == 1).all() and (from_file.mask[:, 20:] == 2).all()
    assert from_file.shares == {"green": 0.5, "blue": 0.5}
    with pytest.raises(ArtifactError, match="for task 'segment'; open it with OnnxVision"):
        OnnxModel(file)
    with pytest.raises(ValueError, match="labels must name the 3 outputs of the model, got 2 names"):
        export(channels(), tmp_path / "t.onnx", spec=PLAIN, labels=["a", "b"], exporter="classic")


def test_segmenters_are_checked_on_real_pictures(tmp_path):
    data = load_data("scenes:classes=2,size=32,n=40", task="segment")
    torch.manual_seed(0)
    done = export(nn.Conv2d(3, 3, 3, padding=1), tmp_path / "s.onnx", data=data, exporter="classic")
    assert done.max_abs_diff < 1e-4 and done.agreement > 0.999 and done.dynamic_batch and done.accuracy is None
    batch = next(iter(data.loader("test", batch_size=5)))
    vision = OnnxVision(done.path)
    assert vision.run(batch["image"].numpy()).shape == (5, 3, 32, 32)
    assert vision.labels == data.class_names and vision.spec == data.spec


def test_a_detector_is_run_from_its_file_as_by_itself(tmp_path):
    data = load_data("scenes:classes=2,size=32,n=40", task="detect")
    net = Cells(2, 32).eval()
    with torch.no_grad():
        net.body[-1].bias[4:] += torch.tensor([1.0, -1.0])
    done = export(net, tmp_path / "d.onnx", data=data, exporter="classic")
    assert done.max_abs_diff < 1e-4 and done.dynamic_batch
    vision = OnnxVision(done.path, least=0.01)
    picture = data.splits["test"].image(0)
    (got,) = vision.predict(picture)
    batch = data.loader("test", batch_size=1).batch(0)
    with torch.no_grad():
        boxes, scores = net.boxes_and_scores(net(batch["image"]))
    want = select(boxes[0].numpy(), scores[0].numpy(), least=0.01)
    assert np.allclose(got.boxes, want[0], atol=1e-3) and np.allclose(got.scores, want[1], atol=1e-5)
    assert got.labels == tuple(data.class_names[k] for k in want[2])
    (wide,) = vision.predict(picture.resize((64, 32), Image.Resampling.NEAREST))  # boxes are in its own pixels
    assert wide.boxes[:, [0, 2]].max() > 33 and wide.boxes[:, [1, 3]].max() <= 32


def trained(task: str) -> tuple[nn.Module, Any]:
    """A small network for a task that has learned something, and its data."""
    options = {"restore": {"scale": 2, "patch": 16}}.get(task, {"image_size": 32})
    data = load_data("scenes:classes=2,size=32,n=160", task=task, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
        nets = {
            "segment": nn.Sequential(*body, nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 1)),
            "detect": Cells(2, 32),
            "restore": nn.Sequential(*body, nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2)),
        }
    how: dict[str, Any] = {"epochs": 8, "lr": 5e-3, "batch_size": 8, "augment": "flip", "seed": 0}
    return fit(nets[task], data, **how, progress=False, val=None).model.eval(), data


@pytest.mark.parametrize(("task", "score", "least", "lost"), [
    ("segment", "miou", 0.2, 0.02), ("detect", "ap50", 0.02, 0.05), ("restore", "psnr", 19, 1.0),
])  # fmt: skip
def test_files_are_judged_themselves_in_float_and_in_8_bits(tmp_path, task, score, least, lost):
    net, data = trained(task)
    if task == "detect":  # of a cell's classes this net tells the best one, its file all
        net.decode = lambda out: [detections(*image) for image in zip(*net.boxes_and_scores(out))]
    want = evaluate(net, data, "val")
    full = export(net, tmp_path / "f.onnx", data=data, exporter="classic")
    assert full.scores == pytest.approx(want, abs=1e-3) and full.accuracy is None and full.scores[score] > least
    small = export(net, tmp_path / "q.onnx", data=data, exporter="classic", int8=True)
    stored = [t.data_type for t in onnx.load(small.path).graph.initializer]
    assert small.int8 and stored.count(onnx.TensorProto.INT8) >= 2
    assert small.agreement > (0.2 if task == "restore" else 0.9)  # of the 256 values of a pixel, many are one beside
    assert small.scores[score] > full.scores[score] - lost and small.scores != full.scores
    assert OnnxVision(small.path).evaluate(data, "val") == small.scores  # what was written is what was judged
    assert OnnxVision(small.path).predict(data.splits["test"].image(0))


def test_what_a_file_cannot_be_judged_on_is_refused(tmp_path):
    vision = OnnxVision(export(channels(), tmp_path / "s.onnx", spec=PLAIN, labels=LABELS, exporter="classic").path)
    data = load_data("scenes:classes=2,size=16,n=40", task="segment")
    assert vision.evaluate(data, limit=3)["n"] == len(data.splits["test"])  # the whole of one batch
    with pytest.raises(DataError, match="split must be one of train, val, test, got 'tset'"):
        vision.evaluate(data, "tset")
    with pytest.raises(ValueError, match="the model is for task 'segment', the data for 'detect'"):
        vision.evaluate(load_data("scenes:classes=2,size=16,n=40", task="detect"))


def test_suppression_is_that_of_torchvision():
    from torchvision.ops import batched_nms

    g = torch.Generator().manual_seed(0)
    corner, side = 40 * torch.rand(60, 2, generator=g), 5 + 20 * torch.rand(60, 2, generator=g)
    boxes, scores = torch.cat([corner, corner + side], 1), torch.rand(60, 3, generator=g)
    rows, label = (scores > 0.3).nonzero(as_tuple=True)
    kept = batched_nms(boxes[rows], scores[rows, label], label, 0.45)
    got = select(boxes.numpy(), scores.numpy(), least=0.3)
    assert np.array_equal(got[0], boxes[rows[kept]].numpy()) and got[2].tolist() == label[kept].tolist()
    assert len(got[0]) < len(rows)
    nothing = select(boxes.numpy(), np.zeros((60, 3), np.float32))
    assert [len(part) for part in nothing] == [0, 0, 0] and nothing[0].shape == (0, 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_restorer_takes_pictures_of_any_size(tmp_path, channels):
    """Here every pixel is repeated; for one channel that is the luma, and colour is enlarged by the cubic."""
    data = load_data("scenes:size=40,n=12", task="restore", scale=2, in_chans=channels, patch=12)
    net = nn.Sequential(nn.Conv2d(channels, 4 * channels, 1, bias=False), nn.PixelShuffle(2))
    net[0].weight.data[:] = torch.eye(channels).repeat_interleave(4, 0)[..., None, None]
    file = export(net, tmp_path / "r.onnx", data=data, exporter="classic").path
    picture = Image.fromarray(np.random.default_rng(0).integers(60, 200, (21, 34, 3), dtype=np.uint8))
    image = OnnxVision(file).predict(picture)[0].image
    assert image.size == (68, 42)
    x = torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None] / 255
    want = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    if channels == 1:
        colour = upscale(rgb_to_ycbcr(x)[:, 1:], 2)
        want = ycbcr_to_rgb(torch.cat([rgb_to_ycbcr(want)[:, :1], colour], 1)).clamp(0, 1)
    assert np.abs(np.asarray(image) - 255 * want[0].permute(1, 2, 0).numpy()).max() < 0.51


def test_both_exporters_leave_height_and_width_open(tmp_path):
    spec = InputSpec((3, 12, 12), (0.0,) * 3, (1.0,) * 3, "restore")
    net = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))
    for exporter in ("classic", "dynamo"):
        done = export(net, tmp_path / f"{exporter}.onnx", spec=spec, exporter=exporter)
        run = OnnxVision(done.path).run
        x = torch.rand(2, 3, 9, 17)
        assert np.allclose(run(x.numpy()), net(x).detach().numpy(), atol=1e-5)


def test_wrong_things_are_refused(tmp_path):
    file = export(channels(), tmp_path / "s.onnx", spec=PLAIN, exporter="classic").path
    with pytest.raises(DataError, match="cannot be read"):
        OnnxVision(file).predict(tmp_path / "none.png")
    with pytest.raises(ValueError, match="least must be 0 to 1, got 2"):
        OnnxVision(file, least=2)
    with pytest.raises(ValueError, match=r"spec\.task must be segment, detect or restore, got 'classify'"):
        Vision(lambda x: x, InputSpec((3, 8, 8), (0.0,) * 3, (1.0,) * 3), None)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    plain = InputSpec((3, 16, 16), (0.0,) * 3, (1.0,) * 3)
    classifier = export(flat, tmp_path / "c.onnx", spec=plain, exporter="classic").path
    with pytest.raises(ArtifactError, match="is a classifier; open it with OnnxModel"):
        OnnxVision(classifier)
    with pytest.raises(ExportError, match=r"needs a method boxes_and_scores\(outputs\).*Conv2d has none"):
        export(nn.Conv2d(3, 3, 1), tmp_path / "d.onnx", spec=InputSpec((3, 8, 8), (0.0,) * 3, (1.0,) * 3, "detect"))
