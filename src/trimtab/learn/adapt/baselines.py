"""What methods are measured against: fine-tuning (the floor of streams), joint training (the ceiling), a classifier."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.data import Data
from trimtab.learn.adapt.frame import TRAINING, Learner, check_classes, follow
from trimtab.learn.adapt.heads import put_linear
from trimtab.learn.adapt.metrics import StreamResult
from trimtab.learn.adapt.streams import Stream, Task
from trimtab.learn.fit import fit
from trimtab.learn.objective import Classify
from trimtab.nn.features import classifier_of, feature_width


class _FineTune(Learner):
    def learn(self, task: Task) -> None:
        self.fit(task.data, Classify(), f"task-{task.id}")


class _Joint(Learner):
    at_once = True

    def learn(self, task: Task) -> None:
        self.fit(self.stream.data, Classify(), "task-all")


def finetune(
    model: nn.Module, stream: Stream, *, out: str | Path | None = None, resume: bool = True, **training: Any
) -> StreamResult:
    """Train on one task after the other with cross-entropy over all classes, and do nothing against forgetting.

    Args:
        model: is not changed; has a logit for every class of the stream.
        out: folder for what is needed to go on after an interruption. resume: go on with what is there.
        **training: for `fit`, for each task: epochs, lr, ... By default the last weights of a task are kept
            (``val=None, keep="last"``).

    >>> import trimtab as tt
    >>> data = tt.load_data("digits", limit=300)
    >>> net = tt.create_model("trim_1k", num_classes=10, in_chans=1, img_size=8, seed=0)
    >>> result = finetune(net, tt.learn.adapt.class_incremental(data, tasks=5), epochs=2, progress=False)
    >>> len(result.accuracy), result.accuracy[0][1:]
    (5, [None, None, None, None])
    """
    check_classes(model, stream)
    return follow("finetune", _FineTune(model, stream, **training), out=out, resume=resume)


def joint(
    model: nn.Module, stream: Stream, *, out: str | Path | None = None, resume: bool = True, **training: Any
) -> StreamResult:
    """Train on the images of all tasks together, once: what could be reached if nothing came in a stream.

    Arguments as those of `finetune`. The table of accuracies has one row.
    """
    check_classes(model, stream)
    return follow("joint", _Joint(model, stream, **training), out=out, resume=resume)


def classifier(model: nn.Module, data: Data, *, seed: int = 0, **training: Any) -> nn.Module:
    """A copy of a model with a fresh linear classifier, trained with cross-entropy; the last weights are kept."""
    width = feature_width(model, data)
    weight = 0.02 * torch.randn(data.num_classes, width, generator=torch.Generator().manual_seed(seed))
    plain = put_linear(deepcopy(model), classifier_of(model), weight, torch.zeros(data.num_classes))
    if fit(plain, data, **{**TRAINING, "seed": seed, **training}).stopped == "interrupted":
        raise KeyboardInterrupt
    return plain
