"""HVCM: hierarchical visual categories modeling (Li et al., arXiv 2408.15580), to know images of no known class.

The embedding is cut into K groups of d numbers, the attributes, and every class is a mixture of K Gaussians over them,
with centres that are learned and weights that follow the data by a moving average. Training pulls each group's softmax
to the centre of its class; afterwards the Gaussians are fitted once to the training images. An image is as strange as
the smallest, over classes, of its weighted Mahalanobis distances. No image of another class is needed. The class of an
image is that of the most similar centre.

Differences from the open code: statistics are of training images as they are, not augmented; covariances get a ridge, a
share of their mean variance; there is no self-distillation beside it (on ImageNet the open code adds DINO, and never
moves the centres: ``train_centres=False``). Attributes are bounded by one, so their softmax is nearly uniform and the
divergences are small: that is the method, there is no temperature.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.card import Card, Claim
from trimtab.core.edit import Edit, Replace, SetAttr, apply
from trimtab.data import Data
from trimtab.learn.adapt.frame import TRAINING
from trimtab.learn.adapt.statistics import ClassStatistics, mahalanobis
from trimtab.learn.fit import fit
from trimtab.learn.objective import Batch, Context, Objective
from trimtab.nn.features import FeatureExtractor, classifier_of, feature_width, pooled_features

log = logging.getLogger(__name__)

CARD = Card(
    slug="hvcm",
    title="Hierarchical Visual Categories Modeling: A Joint Representation Learning and Density Estimation Framework "
    "for Out-of-Distribution Detection",
    arxiv="2408.15580",
    year=2023,
    kind="method",
    tasks=("ood-detection", "classification", "representation-learning"),
    claims=(
        Claim(
            "joint",
            "learning grouped 'attribute' features together with a mixture of Gaussians per class, then scoring by the "
            "minimum weighted Mahalanobis distance, beats post-hoc OOD scores without any outlier data",
        ),
        Claim(
            "classifier",
            "class centres alone classify: cosine to the flattened centre bank keeps in-distribution accuracy "
            "competitive",
        ),
    ),
)


class HVCMHead(nn.Module):
    """Features (B, F) -> logits (B, N): cosines to the class centres. It also gives attributes, components and scores.

    Args:
        in_features: F. num_classes: N. groups, dim: K and d.
        embedding: width of the unit vectors before the attributes.
        hidden: width of two hidden layers before that, with GELU; 0 for none (the paper: none on CIFAR, 2048 on
            ImageNet).
        with_score: give (logits, scores (B,)) instead, for deployment.

    Attributes:
        centres (N, K, d): learned. omega (N, K): weights of the components. mean (N, K, d), whitening (N, K, d, d): of
            the fitted Gaussians.

    >>> head = HVCMHead(512, 10, groups=32, dim=32)
    >>> sum(p.numel() for name, p in head.named_parameters() if name != "centres")
    402688
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        groups: int = 32,
        dim: int = 32,
        embedding: int = 256,
        hidden: int = 0,
        with_score: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.groups, self.dim, self.with_score = num_classes, groups, dim, with_score
        widths = [in_features, *([hidden] * 2 if hidden else []), embedding]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.GELU()]
            nn.init.trunc_normal_(layers[-2].weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(layers[-2].bias)  # type: ignore[arg-type]
        self.body = nn.Sequential(*layers[:-1])
        # Only its directions count, but the longer its rows are, the less a step turns them: they start short.
        self.direction = nn.Parameter(nn.init.trunc_normal_(torch.empty(groups * dim, embedding), std=0.02))
        self.gain = nn.Parameter(torch.ones(groups * dim, 1), requires_grad=False)  # of the weight norm; fixed
        self.component = nn.Linear(embedding, groups, bias=False)
        nn.init.trunc_normal_(self.component.weight, std=0.02)
        self.centres = nn.Parameter(torch.randn(num_classes, groups, dim))
        self.omega: Tensor
        self.mean: Tensor
        self.whitening: Tensor
        self.register_buffer("omega", torch.randn(num_classes, groups).softmax(1))
        self.register_buffer("mean", torch.zeros(num_classes, groups, dim))
        self.register_buffer("whitening", torch.zeros(num_classes, groups, dim, dim))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attributes (B, K, d), each within -1 and 1, and component logits (B, K) of features (B, F)."""
        z = F.normalize(self.body(x.flatten(1)), dim=1)
        q = F.linear(z, self.gain * F.normalize(self.direction, dim=1))
        return q.view(-1, self.groups, self.dim), self.component(z)

    def logits(self, q: Tensor) -> Tensor:
        """Cosines (B, N) of attributes (B, K, d) to the centres."""
        return F.normalize(q.flatten(1), dim=1) @ F.normalize(self.centres.flatten(1), dim=1).T

    def score(self, q: Tensor) -> Tensor:
        """How strange attributes (B, K, d) are (B,): the least, over classes, weighted half squared distance."""
        white = torch.einsum("nkij,bkj->bnki", self.whitening, q)
        white = white - torch.einsum("nkij,nkj->nki", self.whitening, self.mean)
        return (0.5 * white.square().sum(-1) * self.omega).sum(-1).amin(1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        q, _ = self.parts(x)
        return (self.logits(q), self.score(q)) if self.with_score else self.logits(q)


def divergences(q: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Per group, what moves attributes to centres, and what moves centres to attributes: two tensors (B, K).

    Args:
        q, centres: (B, K, d), the attributes of samples and the centres of their classes.
    """
    log_p, log_r = q.log_softmax(-1), centres.log_softmax(-1)
    move = F.kl_div(log_p, log_r.detach(), log_target=True, reduction="none").sum(-1)
    follow = F.kl_div(log_r, log_p.detach(), log_target=True, reduction="none").sum(-1)
    return move, follow


class Mixtures(Objective):
    """The loss of HVCM.

    Args:
        at: name of the head in the model. alpha, beta: weights of moving attributes to centres, and centres to them.
        gamma: of the moving average of component weights.
    """

    def __init__(self, at: str, *, alpha: float = 1.0, beta: float = 0.1, gamma: float = 1e-4) -> None:
        self.at, self.alpha, self.beta, self.gamma = at, alpha, beta, gamma

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        head: Any = model.get_submodule(self.at)
        q, g = head.parts(pooled_features(model, batch["image"], before=self.at))
        label = batch["label"]
        move, follow = divergences(q, head.centres[label])
        move, follow, share = self.alpha * move, self.beta * follow, g.softmax(1)
        with torch.no_grad():
            self._average(head.omega, share, label)
        return {"components": (move.detach() * share).mean(), "centres": (move + follow).clamp(1e-5, 1e5).mean()}

    def _average(self, omega: Tensor, share: Tensor, label: Tensor) -> None:
        """Let the component weights of the classes of a batch follow its samples."""
        sums = torch.zeros_like(omega).index_add_(0, label, share)
        counts = torch.bincount(label, minlength=len(omega)).unsqueeze(1)
        omega.copy_(torch.where(counts > 0, torch.lerp(omega, sums / counts.clamp(min=1), self.gamma), omega))


def hvcm(
    model: nn.Module,
    data: Data,
    *,
    groups: int = 32,
    dim: int = 32,
    embedding: int = 256,
    hidden: int = 0,
    alpha: float = 1.0,
    beta: float = 0.1,
    gamma: float = 1e-4,
    train_centres: bool = True,
    ridge: float = 1e-6,
    epochs: int = 200,
    lr: float = 0.1,
    opt: str = "momentum",
    weight_decay: float = 1e-4,
    sched: Any = "multistep",
    seed: int = 0,
    out: str | Path | None = None,
    **training: Any,
) -> nn.Module:
    """Train a network and its class mixtures together.

    Args:
        model: any network; it is not changed. Its classifier is replaced.
        data: the known classes.
        groups, dim, embedding, hidden: of the head, see `HVCMHead`.
        alpha, beta, gamma: of the loss, see `Mixtures`.
        train_centres: whether centres move; else only features do.
        ridge: added to the covariances, as a share of their mean variance.
        epochs, lr, ..., out, **training: for `fit`; the rate falls to a tenth at one half and at three quarters, and
            the last weights are kept.

    Returns:
        A copy with an `HVCMHead` in its classifier's place: logits (B, N) for images. `hvcm_scores` says how strange
        images are; with ``with_score=True`` on the head, the model itself gives both.

    Raises:
        ValueError: a class has a single training image, so that it has no covariance.

    >>> import trimtab as tt
    >>> data = tt.load_data("digits", limit=200)
    >>> net = tt.create_model("trim_1k", num_classes=10, in_chans=1, img_size=8, seed=0)
    >>> known = hvcm(net, data, groups=2, dim=4, embedding=16, epochs=1, progress=False)
    >>> hvcm_scores(known, data, "test").shape
    torch.Size([40])
    """
    for name, value in (("groups", groups), ("dim", dim), ("embedding", embedding)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    counts = data.splits["train"].counts(data.num_classes)
    if min(counts) < 2:
        name = data.class_names[counts.index(min(counts))]
        raise ValueError(
            f"every class must have at least 2 training images for a covariance; {name!r} has {min(counts)}"
        )
    if min(counts) <= dim:
        log.warning(
            "a class has %d training images for covariances of %d attributes: the ridge decides", min(counts), dim
        )
    at = classifier_of(model)
    width = feature_width(model, data)
    kwargs = {
        "in_features": width, "num_classes": data.num_classes, "groups": groups, "dim": dim, "embedding": embedding,
        "hidden": hidden,
    }  # fmt: skip
    edits: list[Edit] = [Replace(at, f"{__name__}.HVCMHead", kwargs)]
    if getattr(model, "num_classes", data.num_classes) != data.num_classes:
        edits.append(SetAttr("", "num_classes", data.num_classes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = apply(deepcopy(model), edits)
    head: Any = made.get_submodule(at)
    head.centres.requires_grad_(train_centres)
    objective = Mixtures(at, alpha=alpha, beta=beta, gamma=gamma)
    given: dict[str, Any] = {"epochs": epochs, "lr": lr, "opt": opt, "weight_decay": weight_decay, "sched": sched}
    if (
        fit(made, data, objective, **{**TRAINING, **given, "seed": seed, "out": out, **training}).stopped
        == "interrupted"
    ):
        raise KeyboardInterrupt
    head.centres.requires_grad_(True)
    fit_gaussians(made, data, ridge=ridge)
    return made


@torch.no_grad()
def fit_gaussians(model: nn.Module, data: Data, *, ridge: float = 1e-6) -> None:
    """Fit the Gaussians of a model's head to training images, in place: means and covariances of raw attributes."""
    at, head = _head(model)
    extractor = FeatureExtractor(model, before=at)
    statistics = ClassStatistics(head.num_classes, head.groups * head.dim, groups=head.groups)
    features, labels = extractor.of(data, "train")
    statistics.update(_attributes(head, features).flatten(1), labels)
    head.mean.copy_(statistics.mean())
    head.whitening.copy_(statistics.whitening(relative=ridge))


@torch.no_grad()
def hvcm_scores(model: nn.Module, data: Data, split: str = "test") -> Tensor:
    """How strange the images of a split are (N,), in its order; larger is stranger."""
    at, head = _head(model)
    features = FeatureExtractor(model, before=at).of(data, split).values
    q = _attributes(head, features)
    half = 0.5 * mahalanobis(q.flatten(1), head.mean, head.whitening)  # (B, N, K)
    return (half * head.omega).sum(-1).amin(1).cpu()


def _attributes(head: HVCMHead, features: Tensor, chunk: int = 1024) -> Tensor:
    return torch.cat([head.parts(x.to(head.mean.device))[0] for x in features.split(chunk)])


def _head(model: nn.Module) -> tuple[str, HVCMHead]:
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, HVCMHead)]
    if len(found) != 1:
        raise ValueError("the model must have one HVCMHead, as hvcm puts in the place of its classifier")
    return found[0]
