"""SLCA: a slow learner with classifier alignment (Zhang et al., arXiv 2303.05118), for streams of new classes.

Fine-tuning a pre-trained network task after task fails for two reasons: the network moves too fast, and heads that were
trained apart cannot be compared. So the network learns at a hundredth of the head's rate, each task trains its own head
on its own classes, and of every class a mean and a covariance of its features are kept. After each task all heads are
aligned together on features drawn from these Gaussians, with normalised logits. What is aligned is measured and
delivered, never trained on: the next task starts from the heads as they were. No image is stored.

Differences from the paper and the open code: biases and norms get no weight decay (the rule of `fit`); the task of a
class is looked up, so tasks may differ in size; the factor on the means of older classes (0.9 to 1) is the open code's.
A covariance may be diagonal. SLCA++ is not here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.card import Card, Claim
from trimtab.learn.adapt.frame import TRAINING, Learner, follow
from trimtab.learn.adapt.heads import GrowingHead, put_head, put_linear
from trimtab.learn.adapt.metrics import StreamResult
from trimtab.learn.adapt.statistics import ClassStatistics
from trimtab.learn.adapt.streams import Stream, Task
from trimtab.learn.fit import FitResult, fit
from trimtab.learn.objective import Batch, Context, Objective
from trimtab.nn.features import FeatureExtractor, classifier_of, feature_width

CARD = Card(
    slug="slca",
    title="SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model",
    arxiv="2303.05118",
    year=2023,
    kind="method",
    tasks=("continual-learning", "classification"),
    claims=(
        Claim(
            "slow_learner",
            "lowering only the backbone learning rate (1/100 of the head's) nearly removes progressive overfitting "
            "when a pre-trained ViT is fine-tuned task after task",
        ),
        Claim(
            "classifier_alignment",
            "re-training only the heads on features sampled from stored class Gaussians repairs the bias between "
            "task-wise heads",
        ),
        Claim(
            "headline",
            "final accuracy over sequential fine-tuning improves by 49.76 / 50.05 / 44.69 / 40.16 points on Split "
            "CIFAR-100 / ImageNet-R / CUB-200 / Cars-196",
        ),
    ),
)

COVARIANCES = ("full", "diag")
JITTER = 1e-4  # on the diagonal of covariances


class CurrentTask(Objective):
    """Cross-entropy over the logits of some classes; the others take no part."""

    def __init__(self, classes: Sequence[int]) -> None:
        self.classes = list(classes)

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Tensor:
        label = batch["label"]
        place = torch.full((max(self.classes) + 1,), -1, device=label.device)
        place[self.classes] = torch.arange(len(self.classes), device=label.device)
        return F.cross_entropy(self.compared(model(batch["image"])[:, self.classes]), place[label])

    def compared(self, logits: Tensor) -> Tensor:
        """What is made of the logits (B, classes) before they are compared."""
        return logits


class Gaussians:
    """Mean and Cholesky factor of the features of every class; features are drawn from them.

    It looks to `fit` like data: ``splits`` and ``loader``, with features in the place of images.

    Args:
        num_classes, dim: K and D. per_class: features of each class in an epoch. batch_size is as large.
    """

    def __init__(self, num_classes: int, dim: int, *, per_class: int = 256) -> None:
        self.num_classes, self.dim, self.per_class = num_classes, dim, per_class
        self.mean: dict[int, Tensor] = {}
        self.factor: dict[int, Tensor] = {}
        self.scale: dict[int, float] = {}

    def add(self, statistics: ClassStatistics, classes: tuple[int, ...]) -> None:
        """Keep the Gaussians of new classes: means in float64, factors in float32."""
        means = statistics.mean()
        for c in classes:
            self.mean[c] = means[c, 0]
            # in the layout that a checkpoint gives back: products of another layout end in other bits
            self.factor[c] = statistics.cholesky(c, ridge=JITTER)[0].float().contiguous()

    @property
    def splits(self) -> dict[str, range]:
        """How many features an epoch has."""
        return {"train": range(self.per_class * len(self.mean))}

    def draw(self, label: int, n: int, generator: torch.Generator) -> Tensor:
        """n features (n, D) of a class."""
        noise = torch.randn(n, self.dim, generator=generator)
        return (self.scale.get(label, 1.0) * self.mean[label]).float() + noise @ self.factor[label].T

    def loader(self, split: str, *, batch_size: int, seed: int = 0, epoch: int = 0, skip: int = 0, device: Any = "cpu",
               **others: Any) -> list[dict[str, Tensor]]:  # fmt: skip
        """The batches of an epoch: new draws of every class, in a new order."""
        g = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        x = torch.cat([self.draw(c, self.per_class, g) for c in self.mean])
        y = torch.tensor(list(self.mean)).repeat_interleave(self.per_class)
        order = torch.randperm(len(y), generator=g)
        parts = [order[i : i + batch_size] for i in range(0, len(y), batch_size)][skip:]
        return [{"image": x[rows].to(device), "label": y[rows].to(device), "index": rows} for rows in parts]


class AllTasks(CurrentTask):
    """Cross-entropy over all classes seen, on normalised logits.

    Args:
        parts: the classes of each task. temperature: T.
    """

    def __init__(self, parts: Sequence[Sequence[int]], temperature: float) -> None:
        super().__init__([c for part in parts for c in part])
        self.sizes, self.temperature = [len(p) for p in parts], temperature

    def compared(self, logits: Tensor) -> Tensor:
        return normalised_logits(logits, self.sizes, self.temperature)


def normalised_logits(logits: Tensor, sizes: list[int], temperature: float) -> Tensor:
    """Logits divided by the temperature and by the mean over tasks of the length of a task's logits, image by image.

    Args:
        logits: (B, classes), task after task. sizes: classes of each task.

    >>> normalised_logits(torch.tensor([[3.0, 4.0, 0.0, 15.0]]), [2, 2], 1.0)  # lengths 5 and 15
    tensor([[0.3000, 0.4000, 0.0000, 1.5000]])
    """
    lengths = torch.stack([part.norm(dim=1) + 1e-7 for part in logits.split(sizes, 1)], 1)  # (B, tasks)
    return logits / lengths.mean(1, keepdim=True) / temperature


def shrink(task: int, current: int) -> float:
    """Factor on the mean of a class of `task` when `current` tasks came before this one (both from 0).

    >>> [round(shrink(t, 9), 2) for t in range(10)]
    [0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0]
    """
    return 0.9 + 0.1 * (task + 1) / (current + 1)


def align_heads(
    head: GrowingHead,
    gaussians: Gaussians,
    *,
    epochs: int = 5,
    lr: float = 0.01,
    temperature: float = 0.1,
    seed: int = 0,
    progress: bool = False,
) -> tuple[GrowingHead, FitResult]:
    """A copy of the heads, trained together on features drawn from the classes' Gaussians.

    Does not ask how the heads were trained. Per epoch, each class gives ``per_class`` features, in batches of as many:
    epochs x classes steps.
    """
    aligned = deepcopy(head)
    aligned.requires_grad_(True)
    done = fit(
        aligned, gaussians, AllTasks(head.classes, temperature), epochs=epochs, batch_size=gaussians.per_class, lr=lr,
        opt="momentum", momentum=0.9, weight_decay=5e-4, sched=_by_epoch(epochs), augment=None, seed=seed,
        progress=progress, **TRAINING,
    )  # fmt: skip
    return aligned, done


class _Slow(Learner):
    def __init__(
        self, model: nn.Module, stream: Stream, *, slow: float, align: int, temperature: float, per_class: int,
        covariance: str, **training: Any,
    ) -> None:  # fmt: skip
        super().__init__(model, stream, **training)
        self.slow, self.align, self.temperature = slow, align, temperature
        self.covariance, self.seed = covariance, training.get("seed", 0)
        self._at = classifier_of(model)
        self._plain = self.model.get_submodule(self._at)
        dim = feature_width(model, stream[0].data)
        self._head = GrowingHead(dim, num_classes=stream.num_classes)
        put_head(self.model, self._at, self._head)
        self._gaussians = Gaussians(stream.num_classes, dim, per_class=per_class)
        self._aligned: GrowingHead | None = None  # of the present task; made when it is asked for

    def learn(self, task: Task) -> None:
        self._head.add(task.classes, seed=self.seed * 1009 + task.id)
        self._head.requires_grad_(False)
        self._head.parts[-1].requires_grad_(True)
        with slowed(self.model, self._head, self.slow):
            self.fit(task.data, CurrentTask(task.classes), f"task-{task.id}")
        self._head.requires_grad_(True)
        self._aligned = None
        if self.align:
            statistics = ClassStatistics(self.stream.num_classes, self._head.dim, kind=self.covariance)
            statistics.update(*FeatureExtractor(self.model, before=self._at).of(task.data, "train"))
            self._gaussians.add(statistics, task.classes)

    def deliver(self) -> nn.Module:
        if self._aligned is None:
            self._aligned = self._align()
        copy = deepcopy(self.model)
        put_head(copy, self._at, deepcopy(self._plain))
        return put_linear(copy, self._at, *self._aligned.as_single())

    def _align(self) -> GrowingHead:
        """The heads as they are measured after the present task; those that are trained on stay as they are."""
        current = len(self._head.classes) - 1
        if current < 1 or not self.align:
            return self._head
        owner = self.stream.task_of
        self._gaussians.scale = {c: shrink(int(owner[c]), current) for c in self._gaussians.mean}
        return align_heads(
            self._head, self._gaussians, epochs=self.align, temperature=self.temperature, seed=self.seed + current
        )[0]

    def state_dict(self) -> dict[str, Any]:
        g = self._gaussians
        return {"classes": [list(c) for c in self._head.classes], "mean": g.mean, "factor": g.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for classes in state["classes"]:
            self._head.add(classes)
        self._gaussians.mean, self._gaussians.factor = state["mean"], state["factor"]


@contextmanager
def slowed(model: nn.Module, head: nn.Module, factor: float) -> Iterator[None]:
    """All parameters but those of the head, norms included, learn at this share of the rate."""
    fast = {id(m) for m in head.modules()}
    slow: list[Any] = [m for m in model.modules() if id(m) not in fast]
    before = [(vars(m).get("lr_scales"), getattr(m, "lr_scales", {})) for m in slow]
    for m, (_, scales) in zip(slow, before):
        m.lr_scales = {leaf: factor * scales.get(leaf, 1.0) for leaf, p in m._parameters.items() if p is not None}
    try:
        yield
    finally:
        for m, (own, _) in zip(slow, before):
            del m.lr_scales  # what its class says, if anything, is seen again
            if own is not None:
                m.lr_scales = own


def slca(
    model: nn.Module,
    stream: Stream,
    *,
    slow: float = 0.01,
    align: int = 5,
    temperature: float = 0.1,
    per_class: int = 256,
    covariance: str = "full",
    drop_at: float = 0.9,
    epochs: int = 20,
    lr: float = 0.01,
    opt: str = "momentum",
    batch_size: int = 128,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    **training: Any,
) -> StreamResult:
    """Learn a class- or task-incremental stream with a slow network and aligned heads.

    Args:
        model: a trained network; it is not changed. Its classifier is replaced.
        slow: learning rate of the network, as a share of the head's.
        align: epochs of alignment; 0 leaves the heads as their tasks trained them.
        temperature: of the normalised logits in alignment (the paper's 0.1; 0.05 for Cars-196).
        per_class: features drawn of each class in an epoch of alignment, and its batch size.
        covariance: "full" (D x D float32 for each class), or "diag".
        drop_at: share of a task's training after which the learning rate is a tenth.
        epochs, lr, opt, batch_size, seed, **training: of each task, for `fit`.
        out: folder for what is needed to go on after an interruption. resume: go on with what is there.

    Raises:
        ValueError: the stream is domain-incremental; a class has a single image, so that it has no covariance.

    >>> import trimtab as tt
    >>> data = tt.load_data("digits", limit=400)
    >>> net = tt.create_model("trim_1k", num_classes=10, in_chans=1, img_size=8, seed=0)
    >>> stream = tt.learn.adapt.class_incremental(data, tasks=5)
    >>> result = slca(net, stream, epochs=1, progress=False)
    >>> len(result.accuracy), result.model(torch.zeros(1, 1, 8, 8)).shape
    (5, torch.Size([1, 10]))
    """
    if stream.kind == "domain":
        raise ValueError("slca needs tasks with classes of their own, got a domain-incremental stream")
    if not 0 < slow <= 1:
        raise ValueError(f"slow must be in (0, 1], got {slow}")
    if covariance not in COVARIANCES:
        raise ValueError(f"covariance must be one of {', '.join(COVARIANCES)}, got {covariance!r}")
    if align < 0 or temperature <= 0 or per_class < 1 or not 0 < drop_at <= 1:
        raise ValueError("align must be at least 0, temperature positive, per_class at least 1, drop_at in (0, 1]")
    counts = stream.data.splits["train"].counts(stream.num_classes)
    if align and min(counts) < 2:
        name = stream.data.class_names[counts.index(min(counts))]
        raise ValueError(
            f"every class must have at least 2 training images for a covariance; {name!r} has {min(counts)}"
        )
    how = {"sched": _Drop(drop_at), "epochs": epochs, "lr": lr, "opt": opt, "batch_size": batch_size, "seed": seed}
    learner = _Slow(
        model, stream, slow=slow, align=align, temperature=temperature, per_class=per_class, covariance=covariance,
        **how | training,
    )  # fmt: skip
    return follow("slca", learner, out=out, resume=resume)


class _Drop:
    """The learning rate's factor: 1, and a tenth from a share of the run on."""

    def __init__(self, at: float) -> None:
        self.at = at

    def __call__(self, progress: float) -> float:
        return 1.0 if progress < self.at else 0.1


def _by_epoch(epochs: int) -> Any:
    """Cosine to zero in steps of an epoch."""
    return lambda progress: 0.5 * (1 + math.cos(math.pi * min(int(progress * epochs + 1e-9), epochs) / epochs))
