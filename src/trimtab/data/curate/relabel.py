"""Re-labelling: from one label per image to localized multi-labels (Yun et al. 2021, arXiv 2101.05022).

A strong classifier, applied at every place of its last feature map, gives a map of class scores once per image. Only
the best few per place are kept. In training, the label of a random crop is what the map says inside the crop: RoIAlign
to one place, then softmax. So labels name several objects, follow the crop, and cost no run of the classifier.

    map = head(features at each place)  (C, h, w);  label = softmax(RoIAlign(map, box))

Boxes are x1, y1, x2, y2 in units of the original's sides, maps are (C, h, w): the reference code hands boxes over with
the axes the other way round. Classes that are not kept count as a score of 0. RoIAlign to one place is linear in the
map, with weights that are a product of one for rows and one for columns; they are computed directly, and only the kept
scores are summed, without ever making the map dense. Maps are found by the name of an image, never by its place in a
listing. They are made from images as `load_data` gives them (the largest centred box), as the paper squashes them: what
counts is that training sees the same.

The annotator may be a transformer, whose places are its patches. One that averages its patch tokens has learned to
judge them; the head of one that reads a class token is asked about tokens that it was not trained on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.core.card import Card, Claim
from trimtab.core.errors import DataError
from trimtab.core.files import write_text
from trimtab.core.records import Records
from trimtab.data.dataset import Data
from trimtab.nn.modes import eval_mode

CARD = Card(
    slug="relabel",
    title="Re-labeling ImageNet: from Single to Multi-Labels, from Global to Localized Labels",
    arxiv="2101.05022",
    year=2021,
    kind="method",
    tasks=("classify", "curate"),
    claims=(
        Claim(
            "acc",
            "ResNet-50: 77.5 -> 78.9 top-1 with localized multi-labels, 80.2 with CutMix; label smoothing 78.0, label "
            "cleaning 78.1",
        ),
        Claim("robust", "ImageNetV2 79.0 -> 80.5, ReaL 83.6 -> 85.0, Shankar multi-label 85.3 -> 86.1"),
        Claim(
            "cheap",
            "pooling stored maps per crop replaces running the labeler in every epoch: 12 GB for the whole training "
            "set",
        ),
    ),
)

_NOTE = "maps.json"


def relabel(
    data: Data, model: nn.Module, out: str | os.PathLike[str], *, top: int | None = None, batch_size: int = 64
) -> LabelMaps:
    """Write the label maps of all training images; an interrupted run goes on where it stopped.

    Args:
        model: the annotator, a classifier of the same classes with timm's `forward_features` and `forward_head`.
        top: scores that are kept at each place; None: 5, or all where there are at most 50 classes. With few classes,
            the fifth best score is often below 0, which those that are not kept count as.

    Raises:
        ValueError: the model has no feature map, or other classes.
        DataError: `out` holds maps of other images, or of another model.
    """
    if top is None:
        top = 5 if data.num_classes > 50 else data.num_classes
    if not 1 <= top <= data.num_classes:
        raise ValueError(f"top must be 1 to the number of classes ({data.num_classes}), got {top}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    train = data.splits["train"]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def maps(k: int) -> Tensor:
        return label_map(model, next(iter(loader(k)))["image"].to(device))

    def loader(k: int) -> Any:
        return data.loader("train", batch_size=batch_size, shuffle=False, augment=None, drop_last=False, skip=k)

    first = maps(0)
    if first.shape[1] != data.num_classes:
        raise ValueError(f"model must have the {data.num_classes} classes of the data, got {first.shape[1]}")
    note = {"classes": data.num_classes, "top": top, "size": list(first.shape[2:]), "model": _digest(model)}
    made = LabelMaps.create(Path(out), list(train.names), note)
    done = made.records.done(0)
    with made.records.append(0) as writer:
        start = done // batch_size * batch_size
        for k, batch in enumerate(loader(done // batch_size)):
            scores = label_map(model, batch["image"].to(device)).topk(top, 1)
            rows = np.empty(len(scores.values), made.records.dtype)
            rows["score"], rows["label"] = scores.values.cpu().numpy(), scores.indices.cpu().numpy()
            writer.write(rows[max(0, done - start - k * batch_size) :])
    return made


@torch.no_grad()
def label_map(model: Any, images: Tensor) -> Tensor:
    """Class scores at every place, (B, C, h, w): the classifier's head applied to each place of its features.

    Where the head is linear after an average over places, the mean of the map is the usual logits.

    Raises:
        ValueError: the model has no such map.
    """
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise ValueError(f"the model must have forward_features and forward_head, got {type(model).__name__}")
    with eval_mode(model):
        found = model.forward_features(images)
        if not isinstance(found, Tensor) or found.ndim not in (3, 4):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"{type(model).__name__} must give feature maps (B, D, h, w) or tokens (B, N, D), got {got}"
            )
        b = len(found)
        if found.ndim == 3:
            h, w = _grid(model, found.shape[1])
            before = found.shape[1] - h * w  # class tokens and the like
            # copies of one token, in all places where the head may look for one
            flat = found[:, before:].reshape(b * h * w, 1, -1).expand(-1, before + 1, -1)
        else:
            last = found.shape[-1] == model.num_features and found.shape[1] != model.num_features
            places = found if last else found.permute(0, 2, 3, 1)  # (B, h, w, D)
            h, w = places.shape[1:3]
            flat = places.reshape(b * h * w, 1, 1, -1)
            flat = flat if last else flat.permute(0, 3, 1, 2)
        scores = model.forward_head(flat)
    return scores.float().view(b, h, w, -1).permute(0, 3, 1, 2)


def _grid(model: Any, tokens: int) -> tuple[int, int]:
    """Rows and columns of the patches among a transformer's tokens; a square where it does not say."""
    before = getattr(model, "num_prefix_tokens", None)
    side = math.isqrt(max(tokens - (before or 0), 0))
    said = (getattr(m, "grid_size", None) for m in (getattr(model, "patch_embed", None), model))
    h, w = next((size for size in said if size is not None), (side, side))
    if tokens < h * w or (before is not None and tokens - before != h * w):
        raise ValueError(f"{type(model).__name__} must give a token for each of {h} x {w} patches, got {tokens} tokens")
    return h, w


class LabelMaps:
    """Label maps on disk: the best `top` scores at each place of each image, 4 bytes each.

    Attributes: classes, top, size (h, w); names: those of the images.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            note = json.loads((self.folder / _NOTE).read_text(encoding="utf-8"))
            names = (self.folder / "names.txt").read_text(encoding="utf-8")
            self.classes, self.top, self.size = int(note["classes"]), int(note["top"]), tuple(map(int, note["size"]))
        except FileNotFoundError:
            raise DataError(
                f"{folder} has no label maps; make them with: trimtab curate DATA --method relabel"
            ) from None
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(f"{self.folder / _NOTE} cannot be read: {e}") from e
        self.note, self.names = note, [json.loads(line) for line in names.splitlines()]
        shape = (self.top, *self.size)
        kind = np.dtype([("score", "<f2", shape), ("label", "<u2" if self.classes <= 2**16 else "<u4", shape)])
        self.records = Records(self.folder, kind, len(self.names))

    @classmethod
    def create(cls, folder: Path, names: list[str], note: dict[str, Any]) -> LabelMaps:
        """New maps, or those that were begun with the same names and note."""
        if not (folder / _NOTE).is_file():
            write_text(folder / "names.txt", "".join(json.dumps(n) + "\n" for n in names))
            write_text(folder / _NOTE, json.dumps(note) + "\n")
        made = cls(folder)
        if made.note != note or made.names != names:
            raise DataError(
                f"{folder} holds maps of other images or of another model; give another folder, or delete it"
            )
        return made

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, names: list[str]) -> np.ndarray:
        """Where the maps of images of these names are, int64 (N,).

        Raises:
            DataError: an image has none.
        """
        places = {name: i for i, name in enumerate(self.names)}
        missing = [n for n in names if n not in places]
        if missing:
            raise DataError(
                f"{self.folder} has no label map of {missing[0]} ({len(missing)} of {len(names)} are missing)"
            )
        return np.array([places[n] for n in names], np.int64)

    def pool(self, rows: np.ndarray, boxes: Tensor) -> Tensor:
        """The labels of crops: probabilities (B, C) of the maps in these rows (B,) inside boxes (B, 4)."""
        kept = self.records.read(rows)
        scores = torch.from_numpy(kept["score"].astype(np.float32))
        labels = torch.from_numpy(kept["label"].astype(np.int64))
        return pooled(scores, labels, boxes.cpu(), self.classes).softmax(1)

    def dense(self, row: int) -> Tensor:
        """One map (C, h, w), to look at; 0 where nothing was kept."""
        (kept,) = self.records.read(np.array([row]))
        out = torch.zeros(self.classes, *self.size)
        return out.scatter_(
            0, torch.from_numpy(kept["label"].astype(np.int64)), torch.from_numpy(kept["score"]).float()
        )

    def summary(self) -> dict[str, Any]:
        """Plain values, for reports."""
        return {
            "images": len(self), "classes": self.classes, "top": self.top, "size": list(self.size),
            "bytes": self.records.nbytes,
        }  # fmt: skip


def pooled(scores: Tensor, labels: Tensor, boxes: Tensor, classes: int) -> Tensor:
    """RoIAlign of sparse maps to one place, (B, classes): what the dense maps would give, before softmax.

    Args:
        scores, labels: (B, top, h, w). boxes: (B, 4), clipped to the image.

    >>> score, label = torch.tensor([2.0, 4.0]).view(1, 1, 1, 2), torch.tensor([0, 2]).view(1, 1, 1, 2)
    >>> pooled(score, label, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 3).tolist()
    [[1.0, 0.0, 2.0]]
    """
    h, w = scores.shape[2:]
    boxes = boxes.clamp(0, 1)
    weight = along(boxes[:, 1], boxes[:, 3], h)[:, :, None] * along(boxes[:, 0], boxes[:, 2], w)[:, None]  # (B, h, w)
    out = torch.zeros(len(scores), classes)
    return out.scatter_add_(1, labels.flatten(1), (scores * weight[:, None]).flatten(1))


def along(start: Tensor, stop: Tensor, n: int) -> Tensor:
    """Weights (B, n) of `n` cells in the mean over an interval of 0..1: aligned RoIAlign, automatic sampling."""
    low, length = start * n - 0.5, (stop - start) * n
    number = length.ceil().clamp(min=1)  # samples: one per cell that the interval is long
    k = torch.arange(int(number.max()) if len(number) else 1)
    at = low[:, None] + (k + 0.5) * (length / number)[:, None]  # (B, samples)
    at = at.clamp(0, n - 1)  # no sample is further out than RoIAlign repeats the border
    near = (1 - (at[:, :, None] - torch.arange(n)).abs()).clamp(min=0)  # bilinear: (B, samples, n)
    used = (k < number[:, None]) / number[:, None]
    return (near * used[:, :, None]).sum(1)


def _digest(model: nn.Module) -> str:
    h = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        h.update(name.encode())
        h.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
