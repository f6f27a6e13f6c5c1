"""Batches form by themselves, nobody waits without reason, and no request is lost."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from trimtab.deploy.serve import Batcher, Busy


class Gate:
    """A model that doubles; it is held up until it is let go, and notes the sizes of its batches."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.sizes: list[int] = []

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.entered.set()
        assert self.open.wait(10)
        self.sizes.append(len(x))
        if (x < 0).any():
            raise ArithmeticError("negative")
        return 2 * x


async def ask(batcher: Batcher, value: int) -> int:
    with batcher.place():
        return int((await batcher(np.array([value])))[0])


def test_what_gathers_while_the_model_works_is_one_batch_and_everybody_gets_his_own_answer() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_batch=4, max_wait=0)

    async def main() -> list[int]:
        first = asyncio.create_task(ask(batcher, 0))
        await asyncio.to_thread(gate.entered.wait)
        others = [asyncio.create_task(ask(batcher, i)) for i in range(1, 7)]
        await asyncio.sleep(0)
        gate.open.set()
        return list(await asyncio.gather(first, *others))

    assert asyncio.run(main()) == [0, 2, 4, 6, 8, 10, 12]
    assert gate.sizes == [1, 4, 2]
    batcher.close()


def test_it_waits_for_those_on_the_way_and_not_for_anybody_else() -> None:
    gate = Gate()
    gate.open.set()
    batcher = Batcher(gate, max_wait=5.0)

    async def late() -> int:
        with batcher.place():
            await asyncio.sleep(0.1)  # read and decoded
            return int((await batcher(np.array([21])))[0])

    async def main() -> list[int]:
        return list(await asyncio.gather(ask(batcher, 1), late()))

    start = time.perf_counter()
    assert asyncio.run(main()) == [2, 42] and gate.sizes == [2]
    assert asyncio.run(ask(batcher, 5)) == 10
    assert time.perf_counter() - start < 4  # the five seconds were never waited for
    batcher.close()


def test_a_failing_batch_is_told_to_those_in_it_and_the_next_one_runs() -> None:
    gate = Gate()
    gate.open.set()
    batcher = Batcher(gate)
    with pytest.raises(ArithmeticError, match="negative"):
        asyncio.run(ask(batcher, -1))
    assert asyncio.run(ask(batcher, 3)) == 6
    batcher.close()


def test_who_has_left_is_not_computed_for() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_wait=0)

    async def main() -> int:
        first = asyncio.create_task(ask(batcher, 0))
        await asyncio.to_thread(gate.entered.wait)
        gone, stays = (asyncio.create_task(ask(batcher, i)) for i in (1, 2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        await first
        return await stays

    assert asyncio.run(main()) == 4 and gate.sizes == [1, 1]
    batcher.close()


def test_places_are_limited_and_given_back() -> None:
    batcher = Batcher(lambda x: x, places=2)
    with batcher.place(), batcher.place():
        with pytest.raises(Busy, match="2 requests"), batcher.place():
            pass
        assert batcher.inside == 2
    assert batcher.inside == 0
    batcher.close()


def test_closing_runs_what_is_waiting() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_wait=0)

    async def main() -> list[int]:
        asked = [asyncio.create_task(ask(batcher, i)) for i in range(3)]
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.to_thread(batcher.close)
        return list(await asyncio.gather(*asked))

    assert asyncio.run(main()) == [0, 2, 4]


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"places": 0}, {"max_wait": -1}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.* must"):
        Batcher(lambda x: x, **wrong)
