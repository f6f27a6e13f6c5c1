"""How long a call takes: the median of many, warm, with the number of threads fixed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def timed(
    call: Callable[[], object], *, warmup: int = 3, repeats: int | None = None, seconds: float = 0.5
) -> tuple[float, float]:
    """(median, interquartile range) of the seconds that one call takes.

    Args:
        call: what to time; it must return only when its work is done.
        warmup: calls that are not counted.
        repeats: exactly so many counted calls; None = at least 10, until `seconds` have passed, at most 2000.
    """
    if repeats is not None and repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for _ in range(warmup):
        call()
    took: list[float] = []
    start = time.perf_counter()
    while True:
        t = time.perf_counter()
        call()
        took.append(time.perf_counter() - t)
        if repeats is not None:
            if len(took) >= repeats:
                break
        elif len(took) >= 2000 or (len(took) >= 10 and time.perf_counter() - start >= seconds):
            break
    if len(took) == 1:
        return took[0], 0.0
    q1, q2, q3 = statistics.quantiles(took, n=4, method="inclusive")
    return q2, q3 - q1


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Run the body with so many intra-op threads, then put the old number back."""
    import torch

    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
