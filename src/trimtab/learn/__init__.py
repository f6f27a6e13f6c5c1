"""How weights are learned: the one training loop `fit`, its objectives, and the small parts that methods share.

The methods themselves live in the rooms of their families (``distill``, ``pretrain``, ...) and are imported when they
are first used; so are timm, Accelerate and torchmetrics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy
from trimtab.learn.convert import convert
from trimtab.learn.evaluate import evaluate, evaluate_sets, logits
from trimtab.learn.fit import Diverged, FitResult, fit
from trimtab.learn.frozen import Frozen, snapshot
from trimtab.learn.losses import kl, soft_ce
from trimtab.learn.mix import Mixer, Mixup
from trimtab.learn.norm import bn_frozen, bn_recalibrate
from trimtab.learn.objective import Batch, Classify, Context, Objective, backward_all
from trimtab.learn.optim import make_optimizer, param_groups
from trimtab.learn.schedule import Schedule
from trimtab.learn.settings import Settings
from trimtab.learn.stages import Stages, stages
from trimtab.learn.taps import taps
from trimtab.learn.tasks import Detect, Restore, Segment

if TYPE_CHECKING:
    from trimtab.learn.distill.kd import KD
    from trimtab.learn.distill.lsskd import HSAKD, LSSKD
    from trimtab.learn.distill.tinyvit import FastDistill
    from trimtab.learn.modular.deep_incubation import DeepIncubation
    from trimtab.learn.pretrain.fractal_pretraining import FractalPretraining
    from trimtab.learn.pretrain.simmim import SimMIM
    from trimtab.learn.regularize.bias_loss import BiasLoss
    from trimtab.learn.regularize.label_pooling import LabelPooling
    from trimtab.learn.regularize.repulsion import Repulsion

_METHODS = {
    "BiasLoss": "regularize.bias_loss",
    "DeepIncubation": "modular.deep_incubation",
    "HSAKD": "distill.lsskd",
    "KD": "distill.kd",
    "LSSKD": "distill.lsskd",
    "FastDistill": "distill.tinyvit",
    "FractalPretraining": "pretrain.fractal_pretraining",
    "SimMIM": "pretrain.simmim",
    "LabelPooling": "regularize.label_pooling",
    "Repulsion": "regularize.repulsion",
}
# The word by which recipes, `trimtab train --objective` and `tt.learn` know an objective, and its class.
OBJECTIVES = {
    "classify": "Classify",
    "segment": "Segment",
    "detect": "Detect",
    "restore": "Restore",
    "bias_loss": "BiasLoss",
    "deep_incubation": "DeepIncubation",
    "hsakd": "HSAKD",
    "kd": "KD",
    "lsskd": "LSSKD",
    "fractal_pretraining": "FractalPretraining",
    "simmim": "SimMIM",
    "tinyvit": "FastDistill",
    "relabel": "LabelPooling",
    "repulsion": "Repulsion",
}
__all__ = [
    "fit",
    "FitResult",
    "Diverged",
    "Settings",
    "Objective",
    "Classify",
    "Segment",
    "Detect",
    "Restore",
    "OBJECTIVES",
    "BiasLoss",
    "DeepIncubation",
    "HSAKD",
    "KD",
    "LSSKD",
    "FastDistill",
    "FractalPretraining",
    "SimMIM",
    "LabelPooling",
    "Repulsion",
    "Context",
    "Batch",
    "backward_all",
    "evaluate",
    "evaluate_sets",
    "logits",
    "Schedule",
    "Mixer",
    "Mixup",
    "param_groups",
    "make_optimizer",
    "taps",
    "stages",
    "Stages",
    "Frozen",
    "snapshot",
    "convert",
    "soft_ce",
    "kl",
    "bn_frozen",
    "bn_recalibrate",
]

_HOMES = {"Classify": "objective", "Segment": "tasks", "Detect": "tasks", "Restore": "tasks", **_METHODS}
_WORDS = {word: f"{_HOMES[name]}:{name}" for word, name in OBJECTIVES.items()}
__getattr__, __dir__ = lazy(__name__, {"adapt": None} | _METHODS | _WORDS)
