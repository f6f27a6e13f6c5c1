"""Streams over any data: which classes come when, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import trimtab as tt
from trimtab.core.errors import DataError
from trimtab.data import Data
from trimtab.learn.adapt.streams import (
    class_incremental,
    domain_incremental,
    make_stream,
    select,
    task_incremental,
)


def made(counts: list[int], test: int = 2) -> Data:
    """Images of one colour; so many of each class, whose colour is its number."""
    y = np.repeat(np.arange(len(counts)), counts)
    t = np.repeat(np.arange(len(counts)), test)
    image = lambda labels: np.broadcast_to(labels[:, None, None], (len(labels), 8, 8)).astype(np.uint8)
    return Data.from_arrays((image(y), y), val=(image(t), t), test=(image(t), t))


def test_every_class_comes_once_in_the_field_s_order():
    stream = class_incremental(made([4] * 10), tasks=4, seed=1993)
    order = np.random.RandomState(1993).permutation(10).tolist()
    assert [len(t.classes) for t in stream] == [3, 3, 2, 2]
    assert list(stream.seen(3)) == order and list(stream.seen(0)) == order[:3]
    for task in stream:
        for split in ("train", "val", "test"):
            labels = task.data.splits[split].labels
            assert set(labels.tolist()) == set(task.classes)
            pixels = task.data.splits[split].pixels(torch.arange(len(labels)))
            assert torch.equal(pixels[:, 0, 0, 0].long(), labels)  # labels stay those of the whole data
        assert task.data.num_classes == 10 and task.data.mean == stream.data.mean
    assert [int(stream.task_of[c]) for c in order] == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]


def test_sizes_and_order_can_be_given():
    stream = task_incremental(made([3] * 5), sizes=(3, 2), order=(4, 2, 0, 1, 3))
    assert [t.classes for t in stream] == [(4, 2, 0), (1, 3)]
    assert stream.candidates(1, 0) == (4, 2, 0)
    again = class_incremental(made([3] * 5), sizes=(3, 2), order=(4, 2, 0, 1, 3))
    assert again.candidates(1, 0) == (4, 2, 0, 1, 3) and again.candidates(0, 0) == (4, 2, 0)


def test_domains_are_looks_of_the_same_images():
    data = tt.load_data("digits", limit=100)
    stream = domain_incremental(data, tasks=4, shift="rotate")
    rows = torch.arange(5)
    plain, *others = (t.data.splits["train"].pixels(rows) for t in stream)
    assert torch.equal(plain, data.splits["train"].pixels(rows))
    assert torch.equal(others[1], torch.rot90(plain, 1, (2, 3)))  # the third of four: 90 degrees
    assert all(t.classes == tuple(range(10)) for t in stream)
    whole, n = stream.data.splits["train"], len(data.splits["train"])
    assert len(whole) == 4 * n
    assert torch.equal(whole.pixels(torch.tensor([0, 2 * n + 1])), torch.cat([plain[:1], others[1][1:2]]))
    with pytest.raises(ValueError, match="so none belongs to one task"):
        stream.task_of  # noqa: B018


def test_permuted_pixels_are_the_same_pixels_elsewhere():
    data = tt.load_data("digits", limit=100)
    a, b = (domain_incremental(data, tasks=2, shift="permute", seed=s)[1].data.splits["test"] for s in (0, 0))
    rows = torch.arange(3)
    assert torch.equal(a.pixels(rows), b.pixels(rows))
    plain = data.splits["test"].pixels(rows)
    assert not torch.equal(a.pixels(rows), plain)
    assert torch.equal(a.pixels(rows).flatten(1).sort().values, plain.flatten(1).sort().values)


def test_domains_may_be_data_sets_of_their_own():
    first, second = made([3] * 4), made([5] * 4)
    stream = domain_incremental([first, second])
    assert [len(t.data.splits["train"]) for t in stream] == [12, 20] and stream[1].data.mean == first.mean
    with pytest.raises(DataError, match="has class_names"):
        domain_incremental([first, made([3] * 5)])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"tasks": 11}, r"tasks must be 1 to the number of classes \(10\), got 11"),
        ({"tasks": 0}, "tasks must be 1 to the number of classes"),
        ({"sizes": (5, 4)}, r"sizes must be positive and sum to the number of classes \(10\), got \[5, 4\]"),
        ({"sizes": (10, 0)}, "sizes must be positive"),
        ({"order": (0, 1, 2)}, "order must name each of the 10 classes once"),
        ({"kind": "day"}, "kind must be one of class, task, domain, got 'day'"),
        ({"kind": "domain", "sizes": (5, 5)}, "a domain-incremental stream has no option 'sizes'"),
        ({"kind": "domain", "shift": "melt"}, "shift must be one of rotate, permute or a function, got 'melt'"),
    ],
)
def test_wrong_streams_are_refused(how, says):
    with pytest.raises(ValueError, match=says):
        make_stream(made([2] * 10), **how)


def test_data_without_enough_images_are_refused():
    with pytest.raises(DataError, match=r"fewer training images \(3\) than classes \(5\)"):
        class_incremental(made([1, 1, 1, 0, 0]), tasks=2)
    with pytest.raises(DataError, match="no training images of 3"):
        class_incremental(made([4, 4, 4, 0, 4]), tasks=2)
    data = made([4] * 4)
    with pytest.raises(DataError, match="has no split 'test'"):
        class_incremental(data.like(splits={"train": data.splits["train"]}), tasks=2)
    some = select(data, [0, 1]).splits["test"]
    with pytest.raises(DataError, match="no test images of the classes of task"):
        class_incremental(data.like(splits={**data.splits, "test": some}), order=(0, 1, 2, 3), tasks=2)


def test_selected_classes_keep_or_change_their_numbers():
    data = made([2, 3, 4])
    assert select(data, [2, 0]).splits["train"].labels.tolist() == [0] * 2 + [2] * 4
    part = select(data, [2, 0], relabel=True)
    assert part.splits["train"].labels.tolist() == [1] * 2 + [0] * 4 and part.class_names == ["2", "0"]
