"""Streams: a data set that comes task by task, over any classification data.

Class-incremental: every task brings new classes, and nobody says at test time which task an image is from.
Task-incremental: the same tasks, but that is said, so only the classes of its task compete for an image.
Domain-incremental: every task has all classes, in another look.

Labels are always those of the whole data set, whatever the order in which classes come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.core import options
from trimtab.core.errors import DataError
from trimtab.data import Data, Split

KINDS = ("class", "task", "domain")
SHIFTS = ("rotate", "permute")


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
        id: its place in the stream, from 0.
        classes: the classes it brings; in a domain-incremental stream all of them.
        data: its own images, with the labels of the whole data set.
    """

    id: int
    classes: tuple[int, ...]
    data: Data


@dataclass(frozen=True)
class Stream:
    """Tasks in their order; made by `class_incremental`, `task_incremental` and `domain_incremental`.

    Attributes:
        kind: "class", "task" or "domain".
        tasks: the tasks.
        data: what joint training learns from: the images of all tasks together.
        said: what the stream was made from, as plain values.
    """

    kind: str
    tasks: tuple[Task, ...]
    data: Data
    said: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __getitem__(self, i: int) -> Task:
        return self.tasks[i]

    @property
    def num_classes(self) -> int:
        return self.data.num_classes

    def seen(self, task: int) -> tuple[int, ...]:
        """The classes of the tasks up to this one, in the order in which they came."""
        return tuple(dict.fromkeys(c for t in self.tasks[: task + 1] for c in t.classes))

    def candidates(self, after: int, task: int) -> tuple[int, ...]:
        """The classes that compete for a test image of `task` once the tasks up to `after` are learned."""
        return self.tasks[task].classes if self.kind == "task" else self.seen(after)

    @property
    def task_of(self) -> Tensor:
        """int64 (num_classes,): the task that brings each class; tasks may differ in size.

        Raises:
            ValueError: in a domain-incremental stream.
        """
        if self.kind == "domain":
            raise ValueError("every task of a domain-incremental stream has all classes, so none belongs to one task")
        table = torch.zeros(self.num_classes, dtype=torch.long)
        for task in self.tasks:
            table[list(task.classes)] = task.id
        return table

    def __repr__(self) -> str:
        return f"Stream({self.kind}-incremental, {len(self)} tasks of {self.data.name})"


def class_incremental(
    data: Data,
    *,
    tasks: int = 5,
    sizes: Sequence[int] | None = None,
    order: Sequence[int] | None = None,
    seed: int = 0,
) -> Stream:
    """Every task brings new classes.

    Args:
        tasks: how many; the first ones are larger by a class where the classes do not divide.
        sizes: classes of each task, instead.
        order: all classes in the order in which they come. None: ``numpy.random.RandomState(seed).permutation``, as
            the benchmarks of the field draw it.
        seed: of that order.

    Raises:
        ValueError: the stream is longer than there are classes, or sizes or order do not fit them.
        DataError: a class has no image to learn from, or none to test with.

    >>> import trimtab as tt
    >>> stream = class_incremental(tt.load_data("digits"), tasks=5, seed=0)
    >>> [task.classes for task in stream]
    [(2, 8), (4, 9), (1, 6), (7, 3), (0, 5)]
    >>> stream.seen(1), stream.task_of.tolist()
    ((2, 8, 4, 9), [4, 2, 0, 3, 1, 4, 2, 3, 0, 1])
    """
    return _by_class("class", data, tasks, sizes, order, seed)


def task_incremental(
    data: Data,
    *,
    tasks: int = 5,
    sizes: Sequence[int] | None = None,
    order: Sequence[int] | None = None,
    seed: int = 0,
) -> Stream:
    """As `class_incremental`, but only the classes of an image's own task compete for it at test time."""
    return _by_class("task", data, tasks, sizes, order, seed)


def domain_incremental(
    data: Data | Sequence[Data],
    *,
    tasks: int = 5,
    shift: str | Callable[[Tensor, int], Tensor] = "rotate",
    seed: int = 0,
) -> Stream:
    """Every task has all classes, in another look; the first is the data as they are.

    Args:
        data: one data set, shown in `tasks` looks; or the data sets themselves (sessions, cameras, styles), one a task,
            with the same classes and image size. All are normalised as the first is.
        shift: "rotate" (by equal steps below 180 degrees), "permute" (pixels in a fixed random order), or a function of
            (uint8 images (B, C, H, W), number of the task) that gives uint8 images of the same shape.
        seed: of the permutations.
    """
    if isinstance(data, Data):
        if tasks < 1:
            raise ValueError(f"tasks must be at least 1, got {tasks}")
        looks = [_shifted(data, _look(shift, i, tasks, seed)) for i in range(tasks)]
        said = {"kind": "domain", "tasks": tasks, "shift": shift if isinstance(shift, str) else "custom", "seed": seed}
    else:
        looks = _alike(list(data))
        said = {"kind": "domain", "domains": [d.name for d in looks]}
    every = tuple(range(looks[0].num_classes))
    for look in looks:
        _check(look, [every])
    parts = tuple(Task(i, every, look) for i, look in enumerate(looks))
    splits = {s: _joined([d.splits[s] for d in looks]) for s in looks[0].splits}
    return Stream("domain", parts, looks[0].like(splits=splits), said)


def make_stream(data: Data, kind: str = "class", **how: Any) -> Stream:
    """A stream by the word of its kind.

    Raises:
        ValueError: there is no such kind, or the arguments are not its.
    """
    makers: dict[str, Callable[..., Stream]] = {
        "class": class_incremental,
        "task": task_incremental,
        "domain": domain_incremental,
    }
    if kind not in makers:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    options.check(f"a {kind}-incremental stream", how, options.parameters(makers[kind], keyword_only=True))
    return makers[kind](data, **how)


def select(data: Data, classes: Sequence[int], *, relabel: bool = False) -> Data:
    """Only the images of some classes. `relabel`: labels become positions in `classes`, else they stay.

    >>> import trimtab as tt
    >>> part = select(tt.load_data("digits"), [7, 3], relabel=True)
    >>> part.class_names, sorted(part.splits["test"].labels.unique().tolist())
    (['7', '3'], [0, 1])
    """
    wanted = torch.tensor(list(classes))
    table = torch.full((data.num_classes,), -1)
    table[wanted] = torch.arange(len(wanted)) if relabel else wanted
    splits = {}
    for name, split in data.splits.items():
        kept = split.take(torch.isin(split.labels, wanted).nonzero().flatten())
        if len(kept) or name == "train":
            splits[name] = Split(kept.images, table[kept.labels], kept.names)
    part = data.like(splits=splits)
    if relabel:
        part.class_names = [data.class_names[c] for c in wanted.tolist()]
    return part


def _by_class(
    kind: str, data: Data, tasks: int, sizes: Sequence[int] | None, order: Sequence[int] | None, seed: int
) -> Stream:
    k = data.num_classes
    if sizes is None:
        if not isinstance(tasks, int) or not 1 <= tasks <= k:
            raise ValueError(f"tasks must be 1 to the number of classes ({k}), got {tasks}")
        sizes = [k // tasks + (i < k % tasks) for i in range(tasks)]
    if min(sizes, default=0) < 1 or sum(sizes) != k:
        raise ValueError(f"sizes must be positive and sum to the number of classes ({k}), got {list(sizes)}")
    order = np.random.RandomState(seed).permutation(k).tolist() if order is None else list(order)
    if sorted(order) != list(range(k)):
        raise ValueError(f"order must name each of the {k} classes once, got {order}")
    ends = np.cumsum(sizes).tolist()
    groups = [tuple(order[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
    _check(data, groups)
    said = {"kind": kind, "sizes": list(sizes), "order": order}
    return Stream(kind, tuple(Task(i, g, select(data, g)) for i, g in enumerate(groups)), data, said)


def _check(data: Data, groups: Sequence[tuple[int, ...]]) -> None:
    """Every class has an image to learn from, every task one to test with."""
    if data.task != "classify":
        raise DataError(f"a stream needs images with a class each, got data for task {data.task!r}")
    if "test" not in data.splits:
        raise DataError(f"{data.name} has no split 'test', which a stream is measured on")
    train, test = data.splits["train"], data.splits["test"]
    if len(train) < data.num_classes:
        raise DataError(f"{data.name} has fewer training images ({len(train)}) than classes ({data.num_classes})")
    counts, tested = train.counts(data.num_classes), test.counts(data.num_classes)
    for i, group in enumerate(groups):
        empty = [data.class_names[c] for c in group if not counts[c]]
        if empty:
            raise DataError(f"{data.name} has no training images of {', '.join(empty[:5])} (task {i})")
        if not sum(tested[c] for c in group):
            raise DataError(f"{data.name} has no test images of the classes of task {i}")


def _look(shift: str | Callable[[Tensor, int], Tensor], i: int, tasks: int, seed: int) -> Callable[[Tensor], Tensor]:
    if callable(shift):
        return lambda images: shift(images, i)
    if shift not in SHIFTS:
        raise ValueError(f"shift must be one of {', '.join(SHIFTS)} or a function, got {shift!r}")
    if i == 0:
        return lambda images: images
    if shift == "rotate":
        return partial(_rotate, degrees=180 * i / tasks)
    return partial(_permute, seed=seed + i)


def _rotate(images: Tensor, degrees: float) -> Tensor:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import rotate

    return rotate(images, degrees, InterpolationMode.BILINEAR)


def _permute(images: Tensor, seed: int) -> Tensor:
    places = torch.randperm(images.shape[2] * images.shape[3], generator=torch.Generator().manual_seed(seed))
    return images.flatten(2)[:, :, places].view_as(images)


class _Shown:
    """Images of a split as a function shows them; made when asked for."""

    def __init__(self, split: Split, look: Callable[[Tensor], Tensor]) -> None:
        self.split, self.look, self.shape = split, look, split.images.shape

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.look(self.split.pixels(rows))


class _Several:
    """The images of several splits, one after the other."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self.splits = splits
        self.ends = torch.tensor([len(s) for s in splits]).cumsum(0)
        self.shape = (int(self.ends[-1]), *splits[0].images.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        out = torch.empty((len(rows), *self.shape[1:]), dtype=torch.uint8)
        which = torch.searchsorted(self.ends, rows, right=True)
        for i, split in enumerate(self.splits):
            mine = which == i
            if mine.any():
                out[mine] = split.pixels(rows[mine] - (self.ends[i] - len(split)))
        return out


def _shifted(data: Data, look: Callable[[Tensor], Tensor]) -> Data:
    made: Any = {name: Split(_Shown(s, look), s.labels, s.names) for name, s in data.splits.items()}  # type: ignore[arg-type]
    return data.like(splits=made)


def _joined(splits: Sequence[Split]) -> Split:
    images: Any = _Several(splits)
    return Split(images, torch.cat([s.labels for s in splits]), [n for s in splits for n in s.names])


def _alike(domains: list[Data]) -> list[Data]:
    """The data sets, normalised as the first is.

    Raises:
        DataError: they do not have the same classes, size, channels and splits.
    """
    if not domains:
        raise DataError("a domain-incremental stream needs a data set")
    first = domains[0]
    for d in domains[1:]:
        for what in ("class_names", "size", "in_chans"):
            if getattr(d, what) != getattr(first, what):
                raise DataError(f"{d.name} has {what} {getattr(d, what)}, {first.name} has {getattr(first, what)}")
        if set(d.splits) != set(first.splits):
            raise DataError(f"{d.name} has the splits {sorted(d.splits)}, {first.name} has {sorted(first.splits)}")
    return [first, *(d.like(mean=first.mean, std=first.std) for d in domains[1:])]
