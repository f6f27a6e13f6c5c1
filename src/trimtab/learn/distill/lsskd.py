"""LSSKD: a network that teaches itself, stage by stage ("A Layered Self-Supervised Knowledge Distillation Framework for
Efficient Multimodal Learning on the Edge", arXiv 2506.07055), and HSAKD, the method with a teacher that it builds on
(Yang, An, Cai, Xu, "Hierarchical Self-supervised Augmented Knowledge Distillation", IJCAI 2021, arXiv 2107.13715).

Every stage of the network gets a branch, trained to name class and rotation jointly: 4 N classes, a far richer soft
target than the N of the labels. Each branch also imitates what it said itself an epoch ago, on the same images, and the
features of the branches are drawn to those of the deepest. The branches go at the end; the network is as it was.

No weights or code of LSSKD are published. What is certain: branches after every stage, joint labels, one-to-one
transfer across stages and iterations. The form of the terms is that of HSAKD's code, the rising weight that of PS-KD;
``beta`` and the snapshot of the last epoch as the teacher are inferred. `a` rises with the share of the run that is
done, step by step, where PS-KD takes the epoch's number.

HSAKD here: with the weights of its code where the teacher comes with trained branches. A teacher without branches gets
some, which learn along on its frozen features, where the authors train them before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.card import Card, Claim
from trimtab.learn.calls import Call, calls, onward
from trimtab.learn.frozen import Frozen, snapshot
from trimtab.learn.losses import kl, soft_ce
from trimtab.learn.objective import Batch, Context, Losses, Objective, check_logits, probe
from trimtab.learn.taps import taps

CARD = Card(
    slug="lsskd",
    title="A Layered Self-Supervised Knowledge Distillation Framework for Efficient Multimodal Learning on the Edge",
    arxiv="2506.07055",
    year=2025,
    kind="objective",
    tasks=("classify",),
    claims=(
        Claim(
            "self_kd_gain",
            "On CIFAR-100 4.54% better on average than PS-KD (a self-distillation method) and 1.14% better than SSKD "
            "(which needs a teacher)",
        ),
        Claim("free_at_inference", "All auxiliary classifiers are removed at inference: no extra cost"),
        Claim("few_shot", "Gains hold with a fraction of the training data (Tiny-ImageNet, CIFAR-100 few-shot)"),
    ),
)

ROTATIONS = 4
MOST_BRANCHES = 4  # by default: the deepest stages
TEACHERS = ("previous_epoch", "deepest")
EXTRACTORS = ("auto", "stages", "blocks")


def rotations(images: Tensor) -> Tensor:
    """Every image at 0, 90, 180, 270 degrees, one after the other: (B, C, S, S) -> (4 B, C, S, S).

    >>> x = torch.randn(2, 3, 8, 8)
    >>> torch.equal(rotations(x)[0::4], x), torch.equal(rotations(x)[5], x[1].rot90(1, (1, 2)))
    (True, True)
    """
    return torch.stack([images.rot90(k, (2, 3)) for k in range(ROTATIONS)], 1).flatten(0, 1)


def joint_labels(labels: Tensor) -> Tensor:
    """Labels of `rotations`: class y turned k times is 4 y + k. (B,) -> (4 B,), or soft (B, N) -> (4 B, 4 N).

    >>> joint_labels(torch.tensor([7]))
    tensor([28, 29, 30, 31])
    """
    if labels.ndim == 1:
        return (ROTATIONS * labels[:, None] + torch.arange(ROTATIONS, device=labels.device)).flatten()
    turned = torch.eye(ROTATIONS, dtype=labels.dtype, device=labels.device)
    return (labels[:, None, :, None] * turned[None, :, None, :]).flatten(2).flatten(0, 1)


def marginal(joint: Tensor) -> Tensor:
    """Logits of the classes, whatever the rotation: (..., 4 N) -> (..., N).

    >>> q = torch.randn(3, 40)
    >>> bool(torch.allclose(marginal(q).softmax(-1), q.softmax(-1).unflatten(-1, (10, 4)).sum(-1)))
    True
    """
    return joint.unflatten(-1, (-1, ROTATIONS)).logsumexp(-1)


# -- the network with its branches ------------------------------------------------------------------------------------


class Branched(nn.Module):
    """A network and the branches on its stages: images (B, C, H, W) -> logits (B, N), joint logits, features.

    The joint logits are a list of (B, 4 N), one per branch, the first stage first; so are the features, (B, d).
    """

    def __init__(self, model: nn.Module, names: Sequence[str], branches: nn.ModuleList) -> None:
        super().__init__()
        self.model, self.branches = model, branches
        self.names, self.stages = list(names), len(names)
        self.classes: int = branches[0].classifier.out_features // ROTATIONS  # type: ignore[assignment,union-attr,operator]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        with taps(self.model, self.names) as seen:
            logits = self.model(x)
        given = [branch(seen[n]) for branch, n in zip(self.branches, self.names, strict=True)]
        return logits, [q for q, _ in given], [g for _, g in given]


class Branch(nn.Module):
    """Extractor, average over all places, linear classifier: a stage's features -> joint logits (B, K), (B, d)."""

    def __init__(self, extractor: nn.Module, classes: int, like: Tensor, *, channels_last: bool) -> None:
        super().__init__()
        self.extractor, self.channels_last = extractor, channels_last
        with torch.no_grad():
            width = self.pool(extractor.eval()(like)).shape[1]
        extractor.train()
        self.classifier = nn.Linear(width, classes)

    def pool(self, x: Tensor) -> Tensor:
        if x.ndim == 3:  # tokens (B, N, D)
            return x.mean(1)
        return x.mean((1, 2) if self.channels_last else (2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        g = self.pool(self.extractor(x))
        return self.classifier(g), g


class Block(nn.Module):
    """A residual block of two 3x3 convolutions, in the place of a stage: (B, C, H, W) -> (B, D, H/stride, W/stride)."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, *, channels_last: bool = False) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.body = nn.Sequential(
            nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False), nn.BatchNorm2d(out_chs), nn.ReLU(),
            nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False), nn.BatchNorm2d(out_chs),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_chs != out_chs:
            self.shortcut = nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, stride, bias=False), nn.BatchNorm2d(out_chs))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2) if self.channels_last else x
        x = F.relu(self.body(x) + self.shortcut(x))
        return x.permute(0, 2, 3, 1) if self.channels_last else x


def branch_points(model: nn.Module, branches: int | Sequence[str] | None = None) -> list[str]:
    """Names of the modules that end the stages, from timm's ``feature_info``.

    The last module of each resolution counts, and of those the deepest `branches`, by default at most four. Where all
    is of one resolution, as in a ViT, they are spread evenly over the depth.

    Args:
        branches: how many, or the names themselves.

    Raises:
        ValueError: there is no ``feature_info``, or there are not so many stages.

    >>> import timm
    >>> branch_points(timm.create_model("resnet18"))
    ['layer1', 'layer2', 'layer3', 'layer4']
    """
    if branches is not None and not isinstance(branches, int):
        return list(branches)
    known: Any = getattr(model, "feature_info", None)
    if not known:
        inside = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"{type(model).__name__} has no feature_info that says where its stages end; "
            f"name them, branches=[...], from: {inside}"
        )
    info = [(f["module"], f["reduction"]) for f in (known if isinstance(known, list) else known.get_dicts())]
    ends = [name for i, (name, r) in enumerate(info) if i + 1 == len(info) or info[i + 1][1] != r]
    if len(ends) == 1:
        n = branches or min(MOST_BRANCHES, len(info))
        ends = [info[(i + 1) * len(info) // n - 1][0] for i in range(n)] if n <= len(info) else ends
    n = branches or min(MOST_BRANCHES, len(ends))
    if n > len(ends):
        raise ValueError(f"branches must be at most {max(len(ends), 1)} for {type(model).__name__}, got {n}")
    return ends[-n:]


def add_branches(model: nn.Module, names: Sequence[str], classes: int, x: Tensor, extractor: str) -> nn.ModuleList:
    """Fresh branches for the stages that end with the modules `names`, with `classes` joint classes each.

    ``stages``: an extractor repeats what comes after its stage up to the pooling: the remaining stages, and a final
    norm or convolution; the deepest branch repeats the last stage with stride 1. ``blocks``: a `Block` of stride 2 for
    each missing stage. ``auto``: stages, and blocks where the network is no chain of modules there.

    Args:
        x: some images.
    """
    with taps(model, names):  # refuses names that are not there
        pass
    made = calls(model, x)
    ends = [next((c for c in made if c.name == n), None) for n in names]
    for name, end in zip(names, ends, strict=True):
        if end is None or not isinstance(end.out, Tensor) or end.out.ndim not in (3, 4):
            raise ValueError(f"branches need feature maps or tokens, {name!r} of {type(model).__name__} gives none")
    points = [end for end in ends if end is not None]
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    chains = [onward(made, end) for end in points] if extractor != "blocks" else [None]
    if None in chains and extractor == "stages":
        raise ValueError(f"the stages of {type(model).__name__} are no chain of modules; give extractor='blocks'")
    if None in chains:
        bodies = [_blocks(points[i:], channels_last=channels_last) for i in range(len(points))]
    else:
        bodies = list(_stages(made, points, [c for c in chains if c is not None], channels_last=channels_last))
    device = x.device
    return nn.ModuleList(
        Branch(body.to(device), classes, end.out, channels_last=channels_last) for body, end in zip(bodies, points)
    )


def _stages(
    made: list[Call], points: list[Call], chains: list[list[Call]], *, channels_last: bool
) -> Iterator[nn.Sequential]:
    """Fresh copies of what follows each stage; the last stage once more, with stride 1, for the deepest."""
    for chain in chains[:-1]:
        yield _fresh(c.module for c in chain)
    last, tail = points[-1], chains[-1]
    stage = chains[-2][: len(chains[-2]) - len(tail)] if len(chains) > 1 else [last]
    again = [m for c in stage for m in _same_shape(c, made, last.out.shape)]
    width = last.out.shape[1] if last.out.ndim == 4 and not channels_last else last.out.shape[-1]
    more = _fresh(again) if again else nn.Sequential(_block(width, width, 1, last.out, channels_last))
    yield nn.Sequential(*more, *_fresh(c.module for c in tail))


def _same_shape(call: Call, made: list[Call], shape: torch.Size) -> list[nn.Module]:
    """The modules of a stage that take and give that shape; in a row of blocks one stands in for those that do not."""
    if isinstance(call.given, Tensor) and call.given.shape == call.out.shape == shape:
        return [call.module] if any(p.ndim > 1 for p in call.module.parameters()) else []
    inner = [c for c in made if c.parent is call]
    linked = [(call.given, inner[0].given), *((a.out, b.given) for a, b in pairwise(inner))] if inner else []
    if not linked or not all(c.alone for c in inner) or not all(a is b for a, b in linked):
        return []
    kept = [m for c in inner for m in _same_shape(c, made, shape)]
    return kept + kept[-1:] * (len(inner) - len(kept)) if isinstance(call.module, nn.Sequential) else kept


def _fresh(modules: Any) -> nn.Sequential:
    copies = nn.Sequential(*(copy.deepcopy(m) for m in modules))
    copies.requires_grad_(True).zero_grad(set_to_none=True)
    for module in copies.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return copies


def _blocks(points: list[Call], *, channels_last: bool) -> nn.Sequential:
    """A block for each stage that is missing after the first point; one of stride 1 where none is."""
    maps = [p.out for p in points]
    width, side = (-1, 1) if channels_last or maps[0].ndim == 3 else (1, 2)
    steps = list(pairwise(maps)) or [(maps[0], maps[0])]
    return nn.Sequential(
        *(
            _block(a.shape[width], b.shape[width], 2 if b.shape[side] < a.shape[side] else 1, a, channels_last)
            for a, b in steps
        )
    )


def _block(in_chs: int, out_chs: int, stride: int, like: Tensor, channels_last: bool) -> nn.Module:
    if like.ndim == 3:
        return nn.Sequential(nn.LayerNorm(in_chs), nn.Linear(in_chs, out_chs), nn.GELU())
    return Block(in_chs, out_chs, stride, channels_last=channels_last)


# -- the objectives ---------------------------------------------------------------------------------------------------


class LSSKD(Objective):
    """Self-distillation through branches with joint labels; no teacher needed, nothing left at the end.

    ``CE(z, y) + sum_l CE(q_l, (y, rotation)) + a T^2 (KL(z^ || z) + sum_l KL(q^_l || q_l)) + beta sum_l |g_l - g_L|^2``
    with the logits z of the network (trained on unturned images only), joint logits q_l and unit features g_l of the
    branches, all on four rotations of each image; hats are the teacher's.

    Args:
        teacher: "previous_epoch", a copy of network and branches taken at each epoch's end (none in the first);
            "deepest", where the last branch teaches the others; or None.
        branches: how many, or the modules that they hang on; see `branch_points`.
        extractor: what a branch is made of: "stages", "blocks" or "auto"; see `add_branches`.
        T: temperature.
        beta: weight of the features' alignment.

    Attributes:
        network: the `Branched` network of the last training; `HSAKD` takes it as a teacher.

    Raises:
        ValueError: at the start of training, if images are not square or the network's stages are not found.

    >>> import trimtab as tt
    >>> data = tt.load_data("digits", limit=300)
    >>> net = tt.create_model("trim_net", num_classes=10, in_chans=1, img_size=8, width=4, depths=(1, 1))
    >>> tt.fit(net, data, tt.learn.lsskd(branches=2), epochs=1).stopped
    'done'
    """

    def __init__(
        self,
        *,
        teacher: str | None = "previous_epoch",
        branches: int | Sequence[str] | None = None,
        extractor: str = "auto",
        T: float = 3.0,
        beta: float = 0.03,
    ) -> None:
        if teacher is not None and teacher not in TEACHERS:
            raise ValueError(f"teacher must be one of {', '.join(TEACHERS)} or None, got {teacher!r}")
        _check(branches, extractor, T)
        if beta < 0:
            raise ValueError(f"beta must not be negative, got {beta}")
        self.teacher, self.branches, self.extractor, self.T, self.beta = teacher, branches, extractor, T, beta
        self._network: Branched | None = None
        self._past: Frozen | None = None

    @property
    def network(self) -> Branched:
        if self._network is None:
            raise ValueError("there are no branches yet: this objective has not trained anything")
        return self._network

    def setup(self, model: nn.Module, batch: Batch) -> None:
        self._network = _branched(self, model, batch, self.branches, self.extractor)
        self.extra["branches"] = self._network.branches
        if self.teacher == "deepest" and self._network.stages < 2:
            raise ValueError("teacher='deepest' needs two branches at least, got one")

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        x = rotations(batch["image"])
        z, q, g = self.network(x)
        parts = {"task": soft_ce(z[0::ROTATIONS], batch["label"]), "joint": _joint(q, batch["label"])}
        if self.teacher == "deepest":
            parts["kd"] = ctx.progress * _imitate(q[:-1], [q[-1]] * (len(q) - 1), self.T)
        elif self._past is not None:
            past_z, past_q, _ = self._past(x)
            parts["kd"] = ctx.progress * _imitate([*q, z], [*past_q, past_z], self.T)
        if self.beta:
            parts["features"] = self.beta * alignment(g)
        return parts

    def on_epoch_end(self, ctx: Context) -> None:
        if self.teacher == "previous_epoch":
            self._past = snapshot(self.network)

    def finish(self, model: nn.Module) -> nn.Module:
        self._past = None
        return model

    def state_dict(self) -> dict[str, Any]:
        return {"past": None if self._past is None else self._past.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["past"] is not None:
            self._past = snapshot(self.network)
            self._past.module.load_state_dict(state["past"])


class HSAKD(Objective):
    """Distillation from a teacher through branches with joint labels, stage by stage.

    ``CE(z, y) + sum_l T^2 KL(teacher's q_l || q_l) + T^2 KL(teacher's z || z)``, on four rotations of each image.

    Args:
        teacher: a network for the same classes with as many stages; its branches then learn along, on its frozen
            features. Or a `Branched` network, ``objective.network`` of an `LSSKD` that has trained it.
        branches, extractor, T: as for `LSSKD`.

    Raises:
        ValueError: at the start of training, if stages or classes of teacher and student do not match.
    """

    def __init__(
        self,
        teacher: nn.Module | Frozen,
        *,
        branches: int | Sequence[str] | None = None,
        extractor: str = "auto",
        T: float = 3.0,
    ) -> None:
        if not isinstance(teacher, (nn.Module, Frozen)):
            raise ValueError(f"teacher must be an nn.Module or Frozen, got {type(teacher).__name__}")
        _check(branches, extractor, T)
        self.teacher = teacher if isinstance(teacher, Frozen) else Frozen(teacher)
        self.branches, self.extractor, self.T = branches, extractor, T

    def setup(self, model: nn.Module, batch: Batch) -> None:
        ours = self._network = _branched(self, model, batch, self.branches, self.extractor)
        self.extra["branches"] = ours.branches
        theirs: Any = self.teacher.to(batch["image"].device).module
        if not isinstance(theirs, Branched):
            where = ours.stages if isinstance(self.branches, int | None) else self.branches
            theirs = _branched(self, theirs, batch, where, self.extractor)
            self._names, self._pupils = theirs.names, theirs.branches
            self.extra["teacher"] = theirs.branches
        for what in ("stages", "classes"):
            counts = getattr(theirs, what), getattr(ours, what)
            if counts[0] != counts[1]:
                raise ValueError(f"teacher and student must have equally many {what}, got {counts[0]} and {counts[1]}")

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        x = rotations(batch["image"])
        z, q, _ = self._network(x)
        parts = {"task": soft_ce(z[0::ROTATIONS], batch["label"])}
        if isinstance(self.teacher.module, Branched):
            wanted_z, wanted_q, _ = self.teacher(x)
        else:
            with taps(self.teacher.module, self._names) as seen:
                wanted_z = self.teacher(x)
            wanted_q = [branch(seen[n])[0] for branch, n in zip(self._pupils, self._names, strict=True)]
            parts["teacher"] = _joint(wanted_q, batch["label"])
        parts["kd"] = _imitate([*q, z], [*wanted_q, wanted_z], self.T)
        return parts


def alignment(features: Sequence[Tensor]) -> Tensor:
    """Squared distances of the unit features (B, d) of all branches to those of the last, which gets no gradient."""
    unit = [F.normalize(g.float(), dim=1) for g in features]
    return sum(((g - unit[-1].detach()).square().sum(1).mean() for g in unit[:-1]), unit[-1].new_zeros(()))


def _joint(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    turned = joint_labels(labels)
    return torch.stack([soft_ce(q, turned) for q in logits]).sum()


def _imitate(logits: Sequence[Tensor], wanted: Sequence[Tensor], T: float) -> Tensor:
    return T**2 * torch.stack([kl(a, b, T) for a, b in zip(logits, wanted, strict=True)]).sum()


def _check(branches: Any, extractor: str, T: float) -> None:
    if isinstance(branches, str) or (isinstance(branches, int) and branches < 1):
        raise ValueError(f"branches must be a positive number or a list of module names, got {branches!r}")
    if extractor not in EXTRACTORS:
        raise ValueError(f"extractor must be one of {', '.join(EXTRACTORS)}, got {extractor!r}")
    if T <= 0:
        raise ValueError(f"T must be positive, got {T}")


def _branched(
    objective: Objective, model: nn.Module, batch: Batch, branches: int | Sequence[str] | None, extractor: str
) -> Branched:
    image = batch["image"][:2]
    if image.shape[2] != image.shape[3]:
        raise ValueError(f"images must be square to be turned, got {image.shape[2]} x {image.shape[3]}")
    classes = check_logits(probe(objective, model, batch), batch)
    names = branch_points(model, branches)
    return Branched(model, names, add_branches(model, names, ROTATIONS * classes, image, extractor))
