"""TinyViT's fast pre-training distillation (Wu et al. 2022, arXiv 2207.10666, Section 3.1).

The teacher is run once. Its K largest probabilities for a view of an image are kept on disk together with the 31-bit
seed from which the whole view is made again: 4 + 4K bytes per view. Any number of students then learn from the same
views without the teacher: `save_labels` makes the store, `FastDistill` trains from it, `timm`'s ``tiny_vit_*`` are the
paper's students.

    p~[c] = kept probability for c in the top K, (1 - their sum) / (C - K) for the others
    loss  = - mean_b sum_c p~[b, c] log softmax(student)[b, c]

Ground-truth labels are not used, the temperature is 1. With mixup or CutMix, neighbours (2j, 2j + 1) of the epoch's
order are mixed with each other by a generator whose seed is that of the one XOR that of the other, and the teacher sees
the mixed images; students get pairs that stay together.

Two differences to the authors' code. Records lie in one table whose order follows from the epoch, so no keys are
stored (18 of the 499 GB there). And views are made on the CPU whatever the training device, because other devices
round differently. The progressive contraction that found the architectures is not here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from trimtab.core.card import Card, Claim
from trimtab.core.errors import ArtifactError, DataError
from trimtab.core.files import write_text
from trimtab.core.records import Records
from trimtab.data import Augment, Data, normalise
from trimtab.learn.evaluate import evaluating
from trimtab.learn.frozen import Frozen
from trimtab.learn.losses import soft_ce
from trimtab.learn.mix import Mixup
from trimtab.learn.objective import Batch, Context, Losses, Objective, probe
from trimtab.learn.progress import Bar
from trimtab.learn.settings import Settings

CARD = Card(
    slug="tinyvit",
    title="TinyViT: Fast Pretraining Distillation for Small Vision Transformers",
    arxiv="2207.10666",
    year=2022,
    kind="method",
    tasks=("classify", "distill", "pretrain"),
    claims=(
        Claim(
            "sparse_logits_equivalent",
            "Storing only the top-K teacher probabilities plus one augmentation seed per (image, epoch) replaces the "
            "teacher at training time: no teacher forward, no dense logits",
        ),
        Claim(
            "storage",
            "Stored labels take 16 GB for ImageNet-1k x 300 epochs and 481 GB for ImageNet-22k x 90 epochs",
        ),
        Claim(
            "accuracy",
            "TinyViT-21M: 83.1% ImageNet-1k from scratch, 84.8% with 22k pre-training distillation, 86.5% at 512 px; "
            "TinyViT-5M 79.1 -> 80.7%; 11M 81.5 -> 83.2%",
        ),
        Claim(
            "distill_helps_small",
            "Distillation during pre-training helps small students clearly more than plain pre-training",
        ),
    ),
)

MANIFEST = "labels.json"
MAX_CLASSES = 2**15  # class numbers are stored in 16 bits with a sign
_PROBES = 8  # views that a store remembers, to notice when they can no longer be made


def record(topk: int) -> np.dtype:
    """One record: the view's seed, the classes and the probabilities of the K largest, sorted, little-endian.

    >>> record(10).itemsize, record(100).itemsize
    (44, 404)
    """
    return np.dtype([("seed", "<i4"), ("classes", "<i2", (topk,)), ("values", "<f2", (topk,))])


def dense(classes: Tensor, values: Tensor, num_classes: int) -> Tensor:
    """The probabilities (B, C) that records stand for: what the kept ones (B, K) leave of 1 is shared by the others.

    >>> [round(v, 3) for v in dense(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.3]]), 4)[0].tolist()]
    [0.3, 0.1, 0.5, 0.1]
    """
    values = values.float()
    left = (1 - values.sum(1, keepdim=True)).clamp(min=0)  # in float16 the sum may be above 1
    others = left / max(1, num_classes - values.shape[1])  # there are none when all classes are kept
    return others.expand(-1, num_classes).scatter(1, classes.long(), values)


class Plan(BaseModel):
    """What a store holds and how it was made: the content of ``labels.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    topk: int = Field(ge=1, le=MAX_CLASSES)
    classes: int = Field(ge=1, le=MAX_CLASSES)
    epochs: int = Field(ge=1)
    augment: str
    mixup: float = Field(ge=0)
    cutmix: float = Field(ge=0)
    seed: int = Field(ge=0)
    data: str
    teacher: str
    samples: int = Field(ge=2)
    shards: int = Field(ge=1)
    torch: str
    probes: list[float]

    @property
    def per_epoch(self) -> int:
        """Views of an epoch: of every image, or of an even number when they are mixed in pairs."""
        return self.samples - (self.samples % 2 if self.paired else 0)

    @property
    def paired(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def order(self, epoch: int) -> Tensor:
        """Rows of the training split in the order of the epoch's records; neighbours are pairs."""
        if not self.paired:
            return torch.arange(self.samples)
        generator = torch.Generator().manual_seed(_number(self.seed, epoch % self.epochs, 0))
        return torch.randperm(self.samples, generator=generator)[: self.per_epoch]

    def seeds(self, epoch: int) -> Tensor:
        """int64 (views,): a seed below 2^31 for every record of the epoch."""
        generator = torch.Generator().manual_seed(_number(self.seed, epoch % self.epochs, 1))
        return torch.randint(2**31, (self.per_epoch,), generator=generator)


class LabelStore:
    """Teacher labels of `epochs` views of every training image, in a folder.

    Attributes: `plan`, what it holds; `records`, the table.

    Raises:
        ArtifactError: there is no store in the folder, or it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.plan = Plan.model_validate_json((self.path / MANIFEST).read_bytes())
        except FileNotFoundError:
            raise ArtifactError(f"{self.path} has no {MANIFEST}, so it is no store of labels; give a teacher") from None
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(map(str, first["loc"])) or "content"
            raise ArtifactError(f"{self.path / MANIFEST} cannot be read: {where}: {first['msg']}") from e
        p = self.plan
        total, unit = p.epochs * p.per_epoch, 2 if p.paired else 1
        self.records = Records(self.path, record(p.topk), total, shards=p.shards, unit=unit)

    @classmethod
    def start(cls, path: Path, plan: Plan) -> LabelStore:
        """The store of a plan: a new one, or the one that is there if its plan is the same.

        Raises:
            ValueError: it is another.
        """
        if not (path / MANIFEST).exists():
            write_text(path / MANIFEST, plan.model_dump_json(indent=1))
        store = cls(path)
        store.must_have(**plan.model_dump(exclude={"shards", "torch", "probes"}))
        return store

    def must_have(self, **wanted: Any) -> None:
        """Refuse a store that was made otherwise."""
        made = self.plan.model_dump()
        differ = [f"{k} {made[k]!r}, not {v!r}" for k, v in wanted.items() if made[k] != v]
        if differ:
            error = DataError if "data" in wanted and made["data"] != wanted["data"] else ValueError
            raise error(f"{self.path} was made with {'; '.join(differ)}; give the same, or another store")

    def fill(self, shard: int, teacher: nn.Module, views: Views, *, batch_size: int, device: Any, bar: Bar) -> None:
        """Make what is missing of a shard."""
        start, stop = self.records.bounds(shard)
        with self.records.append(shard) as out, evaluating(teacher, torch.device(device)), torch.no_grad():
            while (row := start + out.done) < stop:
                epoch, at = divmod(row, self.plan.per_epoch)
                end = min(self.plan.per_epoch, at + stop - row)
                order, seeds = (x[at:end].split(batch_size) for x in (self.plan.order(epoch), self.plan.seeds(epoch)))
                for rows, seed in zip(order, seeds, strict=True):
                    given = views.pictures(views.splits["train"].pixels(rows), seed).to(device)
                    out.write(sparse(teacher(given), seed, self.plan.topk))
                    bar.update(lambda: (out.done / (stop - start), f"teacher's labels for {self.path}"))

    def places(self, epoch: int) -> Tensor:
        """Where in the epoch each row of the training split stands; -1 for one that was left without a partner."""
        order = self.plan.order(epoch)
        places = torch.full((self.plan.samples,), -1)
        places[order] = torch.arange(len(order))
        return places

    def read(self, epoch: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Seeds (B,) and probabilities (B, C) of the records at these places of an epoch."""
        found = self.records.read((epoch % self.plan.epochs * self.plan.per_epoch + places).numpy())
        seeds, classes, values = (torch.from_numpy(found[name]) for name in ("seed", "classes", "values"))
        return seeds.long(), dense(classes, values, self.plan.classes)

    def views(self, data: Data, augment: Any = "auto") -> Views:
        """The views that the labels are of.

        Raises:
            DataError: the store was made of other images.
            ValueError: it was made with another augmentation.
            ArtifactError: the same seeds no longer give the same views.
        """
        views = Views(data, self.plan, augment, self)
        self.must_have(data=describe(data), augment=views.steps.text or "none")
        if not np.allclose(views.probes(), self.plan.probes, atol=1e-3):
            raise ArtifactError(
                f"the views of {self.path} can no longer be made from their seeds (its labels were made with torch "
                f"{self.plan.torch}, this is {torch.__version__}); make the labels again"
            )
        return views


def sparse(logits: Tensor, seeds: Tensor, topk: int) -> np.ndarray:
    """Records of the teacher's logits (B, C)."""
    values, classes = logits.float().softmax(1).topk(topk, dim=1)
    out = np.empty(len(logits), record(topk))
    out["seed"], out["classes"], out["values"] = (x.cpu().numpy() for x in (seeds, classes, values))
    return out


class Views(Data):
    """A data set whose training images are views that are made from seeds alone, as a plan says.

    Those of a store (`LabelStore.views`) come in batches with the teacher's probabilities, ``soft`` (B, C). Training
    longer than the store's epochs starts again with its first.
    """

    def __init__(self, data: Data, plan: Plan, augment: Any = "auto", store: LabelStore | None = None) -> None:
        vars(self).update(vars(data))
        self.plan, self.store = plan, store
        self.steps = _steps(data, augment)
        self._fill = torch.tensor([255 * m for m in self.mean]).view(-1, 1, 1)
        self._mixup = Mixup(1, mixup=plan.mixup, cutmix=plan.cutmix) if plan.paired else None

    def pictures(self, images: Tensor, seeds: Tensor) -> Tensor:
        """The views of uint8 images (B, C, H, W), normalised; each depends on its seed (or its pair's) alone."""
        images = self.steps.apply(images, self.steps.draw_each(seeds.tolist(), self.size), self._fill)
        images = normalise(images, self.mean, self.std)
        return images if self._mixup is None else mix_pairs(images, seeds, self._mixup)

    def probes(self) -> list[float]:
        """A number for each of the first views, weighted so that a shift or a mirror image changes it."""
        rows, seeds = self.plan.order(0)[:_PROBES], self.plan.seeds(0)[:_PROBES]
        views = self.pictures(self.splits["train"].pixels(rows), seeds)
        return (views * torch.linspace(0, 1, views[0].numel()).view_as(views[0])).mean((1, 2, 3)).tolist()

    def loader(self, split: str = "train", **options: Any) -> Any:
        """As `Data.loader`; of "train", the views, whatever `augment` says, in whole batches if they are mixed."""
        if split != "train" or self.store is None:
            return super().loader(split, **options)
        return _ViewLoader(self, self.store, **options)


class _ViewLoader:
    """Batches of one epoch: those of the data's own loader, with every image made from its record."""

    def __init__(self, views: Views, store: LabelStore, *, epoch: int = 0, device: Any = "cpu", **options: Any) -> None:
        self.views, self.store, self.epoch, self.device = views, store, epoch, device
        options |= {"epoch": epoch, "augment": None, "raw": True} | ({"drop_last": True} if store.plan.paired else {})
        self.raw = Data.loader(views, "train", **options)
        if store.plan.paired:
            if self.raw.batch_size % (2 * self.raw.world):
                need = 2 * self.raw.world
                raise ValueError(f"batch_size must be a multiple of {need} to keep pairs, got {self.raw.batch_size}")
            pairs = store.plan.order(epoch).view(-1, 2)
            turn = torch.Generator().manual_seed(_number(self.raw.seed, epoch, 2))
            self.raw.order = pairs[torch.randperm(len(pairs), generator=turn)].reshape(-1)

    def __len__(self) -> int:
        return len(self.raw)

    def __iter__(self) -> Iterator[Batch]:
        places = self.store.places(self.epoch)
        for batch in self.raw:
            seeds, soft = self.store.read(self.epoch, places[batch["index"]])
            image = self.views.pictures(batch["image"], seeds)
            yield Batch(batch).replace(image=image, soft=soft).to(self.device)


def mix_pairs(images: Tensor, seeds: Tensor, mixup: Mixup) -> Tensor:
    """Mix the images 2j and 2j + 1 with each other; the XOR of their seeds decides how, so their order does not.

    >>> x, seeds = torch.rand(2, 3, 8, 8), torch.tensor([5, 9])
    >>> mixed = mix_pairs(x, seeds, Mixup(1, mixup=0.8))
    >>> torch.equal(mix_pairs(x.flip(0), seeds.flip(0), Mixup(1, mixup=0.8)), mixed.flip(0))
    True
    """
    nobody, no_label = nn.Identity(), torch.zeros(2, 0)
    pairs = []
    for pair, (a, b) in zip(images.split(2), seeds.view(-1, 2).tolist(), strict=True):
        ctx = Context(rng=np.random.default_rng(a ^ b))
        pairs.append(mixup(Batch(image=pair, label=no_label), nobody, ctx)["image"])
    return torch.cat(pairs)


def save_labels(
    path: str | Path,
    teacher: nn.Module,
    data: Data,
    *,
    epochs: int,
    topk: int | None = None,
    augment: Any = "auto",
    mixup: float = 0.0,
    cutmix: float = 0.0,
    seed: int = 0,
    shards: int | None = None,
    only: int | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> LabelStore:
    """Run the teacher over views of all training images and keep what it says; or go on where that was interrupted.

    With several processes each makes its share. On several machines, give each the same `shards` and one shard in
    `only`, on a folder that all of them see.

    Args:
        path: folder of the store.
        epochs: views per image.
        topk: K; None: the paper's 10 (it takes 100 for ImageNet-22k), or all classes where there are fewer.
        augment: as for `fit`, words only. mixup, cutmix: alpha of the mixing of pairs; 0 for none.
        seed: of the views. shards: files; None: one per process.

    Raises:
        ValueError: a setting is out of range, or the store that is there was made with other settings.

    >>> import tempfile
    >>> from trimtab.data import load_data
    >>> data = load_data("digits", limit=64)
    >>> teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> store = save_labels(tempfile.mkdtemp(), teacher, data, epochs=2, topk=3)
    >>> store.records.nbytes == 2 * len(data.splits["train"]) * (4 + 4 * 3)
    True
    """
    _at_least(1, epochs=epochs, shards=shards)
    _at_least(0, mixup=mixup, cutmix=cutmix, seed=seed)
    words = _steps(data, augment).text or "none"
    with evaluating(teacher, torch.device(device)), torch.no_grad():
        out = teacher(torch.zeros(1, data.in_chans, *data.size, device=device))
    if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[1] > MAX_CLASSES:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"teacher must give logits (B, C) with at most {MAX_CLASSES} classes, got {got}")
    classes = out.shape[1]
    topk = min(10, classes) if topk is None else topk
    if not 1 <= topk <= classes:
        raise ValueError(f"topk must be 1 to {classes}, the number of classes, got {topk}")
    rank, world, wait = _processes()
    shards = world if shards is None else shards
    if only is not None and not 0 <= only < shards:
        raise ValueError(f"only must be one of the {shards} shards, got {only}")
    plan = Plan(
        topk=topk, classes=classes, epochs=epochs, augment=words,
        mixup=mixup, cutmix=cutmix, seed=seed, data=describe(data), teacher=describe_teacher(teacher),
        samples=len(data.splits["train"]), shards=shards, torch=torch.__version__, probes=[],
    )  # fmt: skip
    if plan.paired and batch_size % 2:
        raise ValueError(f"batch_size must be even to keep pairs, got {batch_size}")
    plan = plan.model_copy(update={"probes": Views(data, plan, augment).probes()})
    if rank == 0:
        LabelStore.start(Path(path), plan)
    wait()
    store = LabelStore.start(Path(path), plan)
    views = store.views(data, augment)
    mine = [only] if only is not None else range(rank, store.plan.shards, world)
    with Bar(progress and rank == 0) as bar:
        for shard in mine:
            store.fill(shard, teacher, views, batch_size=batch_size, device=device, bar=bar)
    wait()
    return store


class FastDistill(Objective):
    """Learn from a store of teacher labels; with a teacher, the store is made first where it is missing or unfinished.

    Args:
        store: its folder.
        teacher: a network for the same images, or a `Frozen` one. Without, the store is taken as it is.
        epochs: views per image of a new store; None: as many as training has epochs.
        topk, mixup, cutmix, views_seed: of a new store, as in `save_labels`.

    The augmentation is that of `fit`. Mixing is part of the views, so it is given here and not to `fit`.

    Raises:
        ValueError: at the start of training, if the store was made otherwise than this training asks for.
        ArtifactError: if there is no store and no teacher, or the store is damaged.
    """

    def __init__(
        self,
        store: str | Path,
        teacher: nn.Module | Frozen | None = None,
        *,
        epochs: int | None = None,
        topk: int | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        views_seed: int = 0,
    ) -> None:
        if teacher is not None and not isinstance(teacher, (nn.Module, Frozen)):
            raise ValueError(f"teacher must be an nn.Module or Frozen, got {type(teacher).__name__}")
        _at_least(1, epochs=epochs, topk=topk)
        _at_least(0, mixup=mixup, cutmix=cutmix, views_seed=views_seed)
        self.store = Path(store)
        self.teacher = teacher.module if isinstance(teacher, Frozen) else teacher
        self.epochs, self.topk, self.mixup, self.cutmix, self.views_seed = epochs, topk, mixup, cutmix, views_seed

    def prepare(self, data: Any, settings: Settings, device: torch.device) -> Any:
        if settings.mixup or settings.cutmix or settings.mixer is not None:
            raise ValueError("fit must not mix what the labels were made for; give mixup and cutmix to the objective")
        if self.teacher is not None:
            epochs = self.epochs or settings.all_epochs
            if epochs is None:
                raise ValueError("epochs must be given to the objective when training has only a time limit")
            save_labels(
                self.store, self.teacher, data, epochs=epochs, topk=self.topk, augment=settings.augment,
                mixup=self.mixup, cutmix=self.cutmix, seed=self.views_seed, device=device, progress=settings.progress,
            )  # fmt: skip
        store = LabelStore(self.store)
        store.records.verify()
        return store.views(data, settings.augment)

    def setup(self, model: nn.Module, batch: Batch) -> None:
        logits, soft = probe(self, model, batch), batch["soft"]
        if logits.shape[1:] != soft.shape[1:]:
            raise ValueError(f"the student must give {soft.shape[1]} logits, as the teacher did, got {logits.shape}")

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        return soft_ce(self.predict(model, batch), batch["soft"])


def describe(data: Data) -> str:
    """What the training images are, as words and a checksum of all labels and of 64 images."""
    train = data.splits["train"]
    rows = torch.linspace(0, len(train) - 1, min(64, len(train))).round().long()
    digest = hashlib.sha256(train.labels.numpy().tobytes() + train.pixels(rows).numpy().tobytes())
    digest.update(repr((data.mean, data.std)).encode())
    return f"{len(train)} images {data.in_chans}x{data.size[0]}x{data.size[1]} {digest.hexdigest()[:12]}"


def describe_teacher(teacher: nn.Module) -> str:
    """What the teacher is, as a word and a checksum of its weights."""
    digest = hashlib.sha256()
    for name, value in teacher.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{type(teacher).__name__} {digest.hexdigest()[:12]}"


def _at_least(least: int, **options: float | None) -> None:
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _steps(data: Data, augment: Any) -> Augment:
    """The steps of an augmentation of these data."""
    if not isinstance(data, Data):
        raise ValueError(f"data must be a Data (see load_data), got {type(data).__name__}")
    return Data.loader(data, "train", augment=augment).augment


def _processes() -> tuple[int, int, Callable[[], Any]]:
    """This process's number, how many there are, and how to wait for the others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.distributed.barrier
    return 0, 1, lambda: None


def _number(*parts: int) -> int:
    """A seed for a generator; unrelated for different parts."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1
