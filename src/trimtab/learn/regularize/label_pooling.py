"""`LabelPooling`: train on localized labels of the crops that are seen, as `data.curate.relabel` wrote them.

    label = softmax(RoIAlign(map of the image, box of the crop));  loss = soft-target cross-entropy

With `cutmix`, two crops are mixed as `learn.mix` does it, and their labels with the share that really remained. The
accuracy that is reported while training is that of the original labels.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from trimtab.core.errors import DataError
from trimtab.data.curate.relabel import LabelMaps
from trimtab.learn.losses import soft_ce
from trimtab.learn.mix import Mixup
from trimtab.learn.objective import Batch, Context, Losses, Objective, check_logits, probe
from trimtab.learn.settings import Settings


class LabelPooling(Objective):
    """Cross-entropy with what label maps say inside each crop.

    The augmentation must be one that a box can describe: crops, flips, cutout.

    Args:
        maps: the folder that ``trimtab curate DATA --method relabel`` wrote for these images.
        localized: False pools over the whole image instead of the crop, the paper's global multi-label.
        cutmix: alpha of the Beta distribution of CutMix; 0 switches it off (the paper's 80.2% has 1).

    Raises:
        DataError: at the start of training, if there are no maps of these images.
    """

    def __init__(self, *, maps: str | os.PathLike[str], localized: bool = True, cutmix: float = 0.0) -> None:
        if cutmix < 0:
            raise ValueError(f"cutmix must not be negative, got {cutmix}")
        self.folder, self.localized, self.cutmix = maps, localized, cutmix

    def prepare(self, data: Any, settings: Settings, device: torch.device) -> Any:
        self.maps = LabelMaps(self.folder)
        if self.maps.classes != data.num_classes:
            raise DataError(f"the label maps know {self.maps.classes} classes, the data {data.num_classes}")
        self._rows = self.maps.rows(list(data.splits["train"].names))
        self._mixer = Mixup(data.num_classes, cutmix=self.cutmix)
        return data

    def setup(self, model: nn.Module, batch: Batch) -> None:
        if "crop_box" not in batch:
            raise ValueError("label pooling needs an augmentation of crops, flips and cutout: others cannot be boxed")
        if check_logits(probe(self, model, batch), batch) != self.maps.classes:
            raise ValueError(f"the model must have the {self.maps.classes} classes of the label maps")

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        if batch["label"].ndim != 1:
            raise ValueError("labels are mixed already; give cutmix to the objective instead of fit")
        box = (
            batch["crop_box"]
            if self.localized
            else batch["crop_box"].new_tensor([0.0, 0, 1, 1]).expand(len(batch["label"]), 4)
        )
        label = self.maps.pool(self._rows[batch["index"].cpu().numpy()], box).to(batch["image"].device)
        mixed = batch.replace(label=label)
        if self.cutmix > 0:
            mixed = self._mixer(mixed, model, ctx)
        return soft_ce(model(mixed["image"]), mixed["label"])
