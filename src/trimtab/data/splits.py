"""Which image goes where: stratified, seeded, and never the same bytes on both sides."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict

import numpy as np

from trimtab.data.decode import Progress, for_each
from trimtab.data.images import Unreadable
from trimtab.data.sources import Items


def quotas(counts: np.ndarray, n: int, *, spare: int = 0) -> np.ndarray:
    """`n` divided over classes in proportion to `counts` by largest remainder; one each where possible.

    spare: so many of each class are never taken.

    >>> quotas(np.array([50, 30, 20, 1]), 10, spare=1).tolist()
    [5, 3, 2, 0]
    """
    room = np.maximum(counts - spare, 0)
    n = min(n, int(room.sum()))
    share = n * counts / max(1, counts.sum())
    take = np.minimum(np.floor(share).astype(np.int64), room)
    if n >= np.count_nonzero(room):
        take = np.minimum(np.maximum(take, 1), room)
    order = np.argsort(-(share - np.floor(share)), kind="stable")
    while take.sum() < n:
        for c in order[take[order] < room[order]][: n - int(take.sum())]:
            take[c] += 1
    while take.sum() > n:
        take[np.argmax(take)] -= 1
    return take


def choose(labels: np.ndarray, n: int, seed: int, *, spare: int = 0, groups: np.ndarray | None = None) -> np.ndarray:
    """Ascending positions of about `n` stratified samples; exactly `n` unless `groups` tie samples together.

    spare: so many of each class are never taken. groups: samples with the same number are chosen together.
    """
    shuffled = np.random.default_rng([seed, 1618]).permutation(len(labels))
    if groups is not None:  # one of each group stands for all of it
        _, first = np.unique(groups, return_index=True)
        n = max(1, round(n * len(first) / len(labels)))
        shuffled = shuffled[np.isin(shuffled, first)]
    by_class = labels[shuffled]
    classes = int(labels.max()) + 1 if len(labels) else 0
    take = quotas(np.bincount(by_class, minlength=classes), n, spare=spare)
    chosen = np.concatenate([shuffled[by_class == c][: take[c]] for c in range(classes)] or [np.empty(0, np.int64)])
    if groups is not None:
        chosen = np.flatnonzero(np.isin(groups, groups[chosen]))
    return np.sort(chosen)


def digests(splits: dict[str, Items]) -> dict[str, list[bytes | None]]:
    """A digest of the bytes of every image that could have a twin; None for those that cannot, or cannot be read."""
    sizes: Counter[int] = Counter()
    for items in splits.values():
        sizes.update(n for i in items.rows.tolist() if (n := items.reader.nbytes(i)) is not None)
    out: dict[str, list[bytes | None]] = {}
    with Progress("comparing images", sum(map(len, splits.values()))) as progress:
        for split, items in splits.items():

            def one(k: int, items: Items = items) -> bytes | None:
                n = items.reader.nbytes(int(items.rows[k]))
                return _digest(items, k) if n is None or sizes[n] > 1 else None

            out[split] = for_each(one, len(items), progress.step)
    return out


def groups_of(found: list[bytes | None]) -> np.ndarray:
    """Numbers that are equal where digests are."""
    first: dict[bytes, int] = {}
    return np.asarray([k if d is None else first.setdefault(d, k) for k, d in enumerate(found)], np.int64)


def twin_warnings(splits: dict[str, Items], found: dict[str, list[bytes | None]]) -> list[str]:
    """Words about images that are in two splits, or have two labels."""
    warnings = []
    train = {d: k for k, d in enumerate(found["train"]) if d is not None}
    for split in ("val", "test"):
        if split in splits:
            both = [k for k, d in enumerate(found[split]) if d in train]
            if both:
                name = splits[split].names[both[0]]
                twin = splits["train"].names[train[found[split][both[0]]]]  # type: ignore[index]
                warnings.append(
                    f"{len(both)} of {len(splits[split])} {split} images are also in train, byte for byte "
                    f"(e.g. {name} = {twin}); {split} accuracy will look too good"
                )
    labels: dict[bytes, set[int]] = defaultdict(set)
    for split, items in splits.items():
        for d, label in zip(found[split], items.labels.tolist(), strict=True):
            if d is not None:
                labels[d].add(label)
    torn = sum(len(v) > 1 for v in labels.values())
    if torn:
        warnings.append(f"{torn} images appear under more than one label, byte for byte")
    return warnings


def _digest(items: Items, k: int) -> bytes | None:
    try:
        data = items.read(k)
    except (Unreadable, OSError):
        return None
    raw = data if isinstance(data, bytes) else data.tobytes() + repr((data.size, data.mode)).encode()
    return hashlib.blake2b(raw, digest_size=16).digest()
