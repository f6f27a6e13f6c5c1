"""Network and schedule searched for together: a network counts with the best patches that there are for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from trimtab.core.budget import Budget
from trimtab.core.errors import BudgetError
from trimtab.deploy.mcunetv2 import mcunetv2
from trimtab.deploy.mcunetv2.schedule import Schedule
from trimtab.search.candidates import Candidates
from trimtab.search.methods import Method, run
from trimtab.search.space import Arch
from trimtab.search.supernet import Elastic, Found


def joint(
    net: Elastic,
    data: Any,
    *,
    memory: str,
    budget: str | None = None,
    overhead: float = 0.2,
    grids: Iterable[int] = range(2, 9),
    act_bits: int = 8,
    method: str | Method = "evolution",
    evaluations: int = 100,
    split: str = "val",
    images: int | None = None,
    batches: int = 16,
    seed: int = 0,
) -> tuple[nn.Module, Schedule, Found]:
    """The most accurate network of a trained supernet that some schedule brings into the memory, with that schedule.

    For every network that the search draws, all splits and grids are looked at, and the pair of least overhead is kept;
    networks without a pair are not evaluated.

    Args:
        net: made by `tt.search.elastic`, its weights trained.
        memory: bytes of activations, such as "16KB".
        budget: more bounds, on params and macs.
        overhead, grids, act_bits: see `mcunetv2`.
        method, evaluations, split, images, batches, seed: see `Elastic.search`.

    Returns:
        The network (taken out, calibrated), its schedule, and all that was tried.

    Raises:
        BudgetError: no network of the space fits.
    """
    bounds = Budget(f"memory<={memory}" + (f", {budget}" if budget else ""))
    limit = memory
    grids = sorted({*grids})

    def planned(model: nn.Module) -> Schedule:
        return mcunetv2(model, data, memory=limit, overhead=overhead, grids=grids, act_bits=act_bits)

    def peak(arch: Arch) -> dict[str, float]:
        try:
            return {"memory": planned(net.draft(arch)).peak}
        except BudgetError:
            return {"memory": float("inf")}

    candidates = Candidates(
        net.space,
        cost=net.cost,
        measured=peak,
        score=lambda arch: net.accuracy(arch, data, split=split, images=images, batches=batches),
        budget=bounds,
        limit=evaluations,
    )
    found = Found(run(method, candidates, seed), tuple(candidates.tried.values()), bounds)
    model = net.calibrate(net.extract(found.arch), data, batches=batches)
    return model, planned(model), found
