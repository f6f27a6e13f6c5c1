"""After training: streams of tasks, images of no known class, and adapters beside a frozen network.

The methods are imported at once: modules named as their functions would take the functions' place otherwise.
"""

from trimtab.learn.adapt.adab2n import adab2n
from trimtab.learn.adapt.adapters import adapters, count, freeze, load_adapters, save_adapters
from trimtab.learn.adapt.baselines import classifier, finetune, joint
from trimtab.learn.adapt.compacter import collapse, compacter
from trimtab.learn.adapt.hvcm import hvcm, hvcm_scores
from trimtab.learn.adapt.metrics import StreamResult, cluster_metrics
from trimtab.learn.adapt.mlc import Clusters, mlc
from trimtab.learn.adapt.nmc import NearestMeanClassifier, nmc
from trimtab.learn.adapt.ood import compare, hold_out, noise, ood_metrics, post_hoc
from trimtab.learn.adapt.replay import ReplayBuffer, replay
from trimtab.learn.adapt.slca import align_heads, slca
from trimtab.learn.adapt.statistics import ClassStatistics
from trimtab.learn.adapt.streams import (
    Stream,
    Task,
    class_incremental,
    domain_incremental,
    make_stream,
    task_incremental,
)
from trimtab.nn.features import FeatureExtractor

__all__ = [
    "class_incremental",
    "task_incremental",
    "domain_incremental",
    "make_stream",
    "Stream",
    "Task",
    "StreamResult",
    "finetune",
    "joint",
    "classifier",
    "replay",
    "ReplayBuffer",
    "nmc",
    "NearestMeanClassifier",
    "slca",
    "align_heads",
    "adab2n",
    "hvcm",
    "hvcm_scores",
    "mlc",
    "Clusters",
    "cluster_metrics",
    "ood_metrics",
    "compare",
    "post_hoc",
    "hold_out",
    "noise",
    "compacter",
    "adapters",
    "collapse",
    "count",
    "freeze",
    "save_adapters",
    "load_adapters",
    "ClassStatistics",
    "FeatureExtractor",
]
