"""Pre-training on fractals, without a single photograph (Anderson & Farrell 2021, arXiv 2110.03091).

Pictures of iterated function systems are made as they are needed (``load_data("fractals:classes=1000")``, see
`trimtab.data.fractals`), and their labels are exact: the systems. Here every picture shows several small fractals, and
the network says which systems are among them. The other task of the paper, one fractal per picture, is plain
classification: ``tt.fit(model, data)``. Afterwards, fine-tune: ``create_model(..., weights="pretrained/")``.

    y = systems that are shown;  w = C / |y|;  loss = mean over classes of BCE(z, y) with positives weighted by w

What differs from the paper. There is no cache of rendered fractals from which pictures are put together: rendering is
cheap enough to make each one anew, at the size at which it is shown, and so every picture is a function of seed, epoch
and number, whichever process makes it and wherever training is resumed. The middle of the 3x3 patch is always on.
Self-supervised pre-training (SimSiam on two views of a fractal) is not in here. There is nothing to validate before
fine-tuning, so the validation split is not looked at, and the last weights are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.card import Card, Claim
from trimtab.core.errors import DataError
from trimtab.data.fractal_images import SIDES, FractalSplit
from trimtab.learn.objective import Batch, Context, Losses, Objective, check_logits, probe
from trimtab.learn.settings import Settings

CARD = Card(
    slug="fractal_pretraining",
    title="Improving Fractal Pre-training",
    arxiv="2110.03091",
    year=2021,
    kind="objective",
    tasks=("pretrain", "classify"),
    claims=(
        Claim(
            "transfer",
            "fine-tuning from fractal pre-training reaches 92.7-98.1% of the accuracy of ImageNet pre-training, with "
            "zero natural images",
        ),
        Claim(
            "multi_instance",
            "multi-instance prediction (several fractals per image, multi-label BCE) is a better pre-training task "
            "than single-fractal classification",
        ),
        Claim(
            "svd_sampling",
            "sampling affine maps through their SVD with a constrained sum of singular values gives good fractals "
            "without any rejection search",
        ),
    ),
)


class FractalPretraining(Objective):
    """Which systems are in a picture of several fractals? For data made by "fractals:...".

    Args:
        objects: a picture shows 1 to so many fractals.
        smallest, largest: sides of a fractal, as shares of the picture's. The paper's are for pictures of 224 pixels;
            in small ones such fractals have too few pixels to be told apart, and larger ones are better.

    Raises:
        DataError: at the start of training, if the data are not fractals.
    """

    def __init__(self, *, objects: int = 5, smallest: float = SIDES[0], largest: float = SIDES[1]) -> None:
        if not isinstance(objects, int) or objects < 1:
            raise ValueError(f"objects must be a whole number of at least 1, got {objects!r}")
        if not 0 < smallest <= largest <= 1:
            raise ValueError(f"smallest and largest must be 0 < smallest <= largest <= 1, got {smallest} and {largest}")
        self.objects, self.sides = objects, (smallest, largest)

    def prepare(self, data: Any, settings: Settings, device: torch.device) -> Any:
        train = data.splits["train"]
        if not isinstance(train, FractalSplit):
            raise DataError(f"fractal_pretraining needs data made by 'fractals:classes=...', got {data.name}")
        return data.like(splits={"train": train.together(self.objects, self.sides)})

    def setup(self, model: nn.Module, batch: Batch) -> None:
        classes = check_logits(probe(self, model, batch), batch)
        if classes != batch["label"].shape[1]:
            raise ValueError(f"the model must have {batch['label'].shape[1]} classes, one per system, got {classes}")

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        return set_bce(model(batch["image"]), batch["label"])


def set_bce(logits: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy of label sets; positives weigh C / |y|, so that both sides of a picture matter alike.

    Args:
        logits, target: (B, C); the target is 1 for the classes in the set, 0 elsewhere.

    >>> y = torch.zeros(1, 1000).index_fill(1, torch.tensor([3, 8]), 1.0)
    >>> z = torch.zeros(1, 1000)
    >>> round((set_bce(z, y) * 1000 / torch.log(torch.tensor(2.0))).item())  # 998 others, and 2 that count 500 each
    1998
    """
    weight = target.shape[1] / target.sum(1, keepdim=True).clamp(min=1)
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), pos_weight=weight.to(logits.dtype))
