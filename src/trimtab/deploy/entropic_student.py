"""Entropic Student (Matsubara, Yang, Levorato, Mandt 2022, arXiv 2108.11898): what a device sends a server is learned.

A small encoder on the device makes a latent of whole numbers, a range coder sends it with the probabilities of a
learned prior, and the server decodes it and goes on. Encoder, prior and decoder take the place of a teacher's first
layers, in two stages:

    1.  sum_l |F_l(teacher) - F_l(student)|^2 + beta * bits     trains encoder, prior and decoder; the rest is the
        teacher's, frozen; F_1 is the decoder's output, the others are those of the later stages (Section 3.3)
    2.  1/2 cross-entropy + 1/2 KL(teacher || student)          trains decoder and rest on the rounded latent

Squares and bits are sums over the batch: beta has the paper's meaning whatever the batch. After stage 1 the encoder and
the prior never change again, so several tasks can share them. What comes out is the teacher's own class with a
`Bottleneck` in the place of its first module and nothing in the places of the others; `deploy.split` runs it on two
machines.

Three things differ. Any network with `feature_info` can be cut, after any of its stages: the strides of the encoder and
the widths of the decoder follow (ResNet-50 gives the paper's numbers). The quantiles are trained with the auxiliary
loss, as there, and then put by bisection where it is zero, because few epochs leave them far away, and with them tables
that waste bits. And the latent is quantised to distances from the medians on the device, once; probabilities are sent
along as integer tables and never computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.card import Card, Claim
from trimtab.core.edit import Edit, Remove, Replace, SetAttr, apply
from trimtab.deploy.split.bottleneck import Bottleneck
from trimtab.deploy.split.parts import Rest, bottleneck_of
from trimtab.learn.distill.kd import KD
from trimtab.learn.fit import fit
from trimtab.learn.frozen import Frozen
from trimtab.learn.objective import Batch, Context, Losses, Objective
from trimtab.learn.rng import isolated
from trimtab.learn.taps import taps
from trimtab.nn.modes import eval_mode

CARD = Card(
    slug="entropic_student",
    title="Supervised Compression for Resource-Constrained Edge Computing Systems",
    arxiv="2108.11898",
    year=2021,
    kind="method",
    tasks=("split-computing", "classification", "detection", "segmentation", "compression", "distillation"),
    claims=(
        Claim(
            "rate_distortion",
            "a teacher-trained stochastic bottleneck with a learned prior gives better accuracy per transmitted byte "
            "than JPEG/WebP/BPG, neural image codecs + the original network, and earlier feature compression",
        ),
        Claim("light_encoder", "the device part is tiny"),
        Claim("wire", "bytes are real: entropy-coded strings decoded on another machine"),
        Claim("multi_task", "one frozen encoder serves several tasks by fine-tuning only decoder + tail"),
    ),
)


@dataclass(frozen=True)
class Cut:
    """Where a network is cut.

    Attributes:
        at: the last module that is replaced. head: the outermost modules that run up to it, in order.
        after: the later stages, whose features a student is to match.
        in_chans, out_chans, reduction: of what is replaced: channels of image and features, their ratio of sizes.
    """

    at: str
    head: tuple[str, ...]
    after: tuple[str, ...]
    in_chans: int
    out_chans: int
    reduction: int

    def edits(self, channels: int) -> list[Edit]:
        """Put a bottleneck in the place of the head."""
        sizes = {"in_chans": self.in_chans, "out_chans": self.out_chans, "reduction": self.reduction}
        path = f"{Bottleneck.__module__}.{Bottleneck.__qualname__}"
        return [Replace(self.head[0], path, {"channels": channels, **sizes}), *map(Remove, self.head[1:])]


def cut(model: nn.Module, size: tuple[int, int, int], at: str | None = None) -> Cut:
    """Where and how `model` can be cut, tried on an image of `size` (C, H, W).

    Args:
        at: a stage of its `feature_info`; by default the first that reduces the image to a quarter of its side, or else
            the last but one.

    Raises:
        ValueError: it has no such stage, or what comes after it needs more than its output.

    >>> import trimtab as tt
    >>> net = tt.create_model("resnet20_cifar", num_classes=10)
    >>> where = cut(net, (3, 32, 32), "layer2")
    >>> where.head, where.after, where.out_chans, where.reduction
    (('conv1', 'bn1', 'act1', 'layer1', 'layer2'), ('layer3',), 32, 2)
    """
    info = getattr(model, "feature_info", None) or []
    stages = [str(f["module"]) for f in getattr(info, "info", info) if f["module"] in dict(model.named_modules())]
    if len(stages) < 2:
        raise ValueError(f"a model to cut needs feature_info with at least two stages, got {type(model).__name__}")
    if at is not None and at not in stages[:-1]:
        raise ValueError(f"at must be one of {', '.join(stages[:-1])}, got {at!r}")
    if at is None:
        quarter = [s for s, f in zip(stages, getattr(info, "info", info)) if f["reduction"] == 4]
        at = next((s for s in quarter if s != stages[-1]), stages[-2])
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    x = x.to(next(model.parameters()).device)
    with eval_mode(model), torch.no_grad(), taps(model, [at]) as seen:
        done = _done_by(model, at, x)
        features, logits = seen[at], model(x)
    head = tuple(n for n in done if not any(n.startswith(f"{outer}.") for outer in done))
    reduction = -(-size[1] // features.shape[2])
    found = Cut(at, head, tuple(stages[stages.index(at) + 1 :]), size[0], features.shape[1], reduction)
    if features.shape[2:] != tuple(-(-n // reduction) for n in size[1:]) or reduction not in (1, 2, 4):
        raise ValueError(f"{at} must reduce the image by 1, 2 or 4, got {tuple(features.shape[2:])} of {size[1:]}")
    with torch.no_grad():
        again = _rest(model, found, size).eval()(features)
    if not torch.allclose(again, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max())):
        raise ValueError(f"{type(model).__name__} cannot be cut after {at}: what follows needs more than its output")
    return found


def _done_by(model: nn.Module, at: str, x: Tensor) -> list[str]:
    """Names of the modules that have run when `at` has, in the order in which they began."""
    begun: dict[str, None] = {}  # a set that keeps its order
    ended: set[str] = set()

    def begin(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if at not in ended:
                begun.setdefault(name)

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if at not in ended:
                ended.add(name)

        return hook

    named = [(n, m) for n, m in model.named_modules() if n]
    handles = [m.register_forward_pre_hook(begin(n)) for n, m in named]
    handles += [m.register_forward_hook(end(n)) for n, m in named]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return [n for n in begun if n in ended]


def _rest(model: nn.Module, where: Cut, size: tuple[int, int, int]) -> Rest:
    """A copy of the network that takes the features at the cut."""
    return Rest(apply(deepcopy(model), list(map(Remove, where.head[1:]))), where.head[0], size)


class FeatureRate(Objective):
    """Stage 1, for the bottleneck alone: distances to the teacher's features, and beta times the bits.

    Args:
        teacher: the network that is cut; it is not changed, only put on the training device.
        where: the cut. size: of an image.
        beta: what a bit costs; from 0.01 to 2.56 in the paper, in steps of 2.
    """

    def __init__(self, teacher: nn.Module, where: Cut, size: tuple[int, int, int], *, beta: float = 0.08) -> None:
        if not beta >= 0:
            raise ValueError(f"beta must not be negative, got {beta}")
        self.where, self.beta = where, beta
        self.teacher = Frozen(teacher)
        self.rest = Frozen(_rest(teacher, where, size), through=True)

    def setup(self, model: nn.Module, batch: Batch) -> None:
        if not isinstance(model, Bottleneck) or model.frozen:
            raise ValueError(f"stage 1 trains a bottleneck that is not frozen, got {type(model).__name__}")
        self.teacher.to(batch["image"].device)
        self.rest.to(batch["image"].device)

    def losses(self, model: Bottleneck, batch: Batch, ctx: Context) -> Losses:  # type: ignore[override]
        return self._each(model, batch["image"], ctx)

    def _each(self, model: Bottleneck, image: Tensor, ctx: Context) -> Iterator[dict[str, Tensor]]:
        with taps(self.teacher.module, [self.where.at, *self.where.after]) as wanted:
            self.teacher(image)
        z = model.noisy(image)
        first = model.decoder(z)
        with taps(self.rest.module, [f"net.{name}" for name in self.where.after]) as seen:
            self.rest(first)
        bits = model.prior.bits(z)
        ctx.log("bits per image", bits / len(image))
        pairs = [(wanted[self.where.at], first), *((wanted[n], seen[f"net.{n}"]) for n in self.where.after)]
        distances = [(a - b).square().sum() for a, b in pairs]
        yield {"distance": torch.stack(distances).sum(), "rate": self.beta * bits}
        yield {"auxiliary": model.prior.auxiliary_loss()}

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.rest(model(batch["image"]))


def entropic_student(
    model: nn.Module,
    data: Any,
    *,
    beta: float = 0.08,
    channels: int = 24,
    at: str | None = None,
    epochs: int = 10,
    tail_epochs: int | None = None,
    batch_size: int = 64,
    lr: float = 1e-3,
    tail_lr: float = 1e-3,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> nn.Module:
    """A student of `model` with a bottleneck to cut it at, trained in both stages; `model` stays as it is.

    Args:
        beta: what a bit costs, against squared distances of features.
        channels: of the latent.
        at: the stage after which to cut, see `cut`.
        epochs: of stage 1; lr: its learning rate, a tenth from the middle on, a hundredth from 0.8 on (Adam).
        tail_epochs: of stage 2, by default as many; 0 leaves it out.
        tail_lr: its learning rate, a tenth from the middle on (SGD).
        batch_size: of stage 1; that of stage 2 is twice as large.
        out: folder of the checkpoints of both stages; resume: continue from them.

    Raises:
        ValueError: the model cannot be cut there, or a setting is out of range.

    >>> import trimtab as tt
    >>> data = tt.load_data("digits", limit=200)
    >>> net = tt.create_model("resnet8_mlperf_tiny", num_classes=10, in_chans=1)
    >>> small = entropic_student(net, data, at="layer2", channels=4, epochs=1, progress=False)
    >>> type(small).__name__, type(small.conv1).__name__
    ('ResNetCifar', 'Bottleneck')
    """
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    size = data.spec.size
    where = cut(model, size, at)
    student = deepcopy(model)
    with isolated(seed, torch.device("cpu")):
        apply(student, where.edits(channels))
    name, bottleneck = bottleneck_of(student)
    folder = None if out is None else Path(out)
    common: dict[str, Any] = {"seed": seed, "resume": resume, "progress": progress, "device": device, "keep": "last"}
    fit(
        bottleneck,
        data,
        FeatureRate(deepcopy(model), where, size, beta=beta),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        opt="adam",
        weight_decay=0.0,
        sched=_tenths(0.5, 0.8),
        val=None,
        out=folder and folder / "stage1",
        **common,
    )
    bottleneck.prior.settle()
    apply(student, [SetAttr(name, "frozen", True)])
    if tail_epochs is None or tail_epochs > 0:
        fit(
            student,
            data,
            KD(deepcopy(model), T=1.0, alpha=0.5),
            epochs=tail_epochs or epochs,
            batch_size=2 * batch_size,
            lr=tail_lr,
            sched=_tenths(0.5),
            val=None,
            out=folder and folder / "stage2",
            **common,
        )
    return student.eval()


def _tenths(*moments: float) -> Callable[[float], float]:
    """A learning rate that falls to a tenth at each of the moments."""

    def factor(progress: float) -> float:
        return 0.1 ** sum(progress >= m for m in moments)

    return factor
