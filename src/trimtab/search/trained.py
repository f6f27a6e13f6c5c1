"""What every system of supernets gives: a supernet that has been trained, and the data to choose its networks by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.core.budget import Budget
from trimtab.learn.fit import fit
from trimtab.learn.objective import Objective
from trimtab.search.methods import Method
from trimtab.search.supernet import Elastic, Found


@dataclass(frozen=True)
class Trained:
    """A trained supernet.

    Attributes:
        net: the supernet; `net.model` is its largest network, `net.space` what there is to choose from.
        data: what it was trained on; networks are chosen on its split "val".
        method: how networks are searched for unless something else is asked.
        out: folder in which accuracies are kept, so that a search that was interrupted goes on; or None.
    """

    net: Elastic
    data: Any
    method: str | Method = "coarse_to_fine"
    out: Path | None = None

    def search(self, budget: str | Budget, **options: Any) -> Found:
        """The most accurate network inside the budget, and all that were looked at; options as for `Elastic.search`.

        Raises:
            BudgetError: no network is inside the budget.
        """
        file = None if self.out is None else self.out / "accuracies.json"
        return self.net.search(self.data, budget, **{"method": self.method, "file": file, **options})

    def best(self, budget: str | Budget, *, batches: int = 16, **options: Any) -> nn.Module:
        """That network: searched for, taken out, calibrated. A plain module; arguments as for `Elastic.best`."""
        return self.net.take(self.search(budget, batches=batches, **options), self.data, batches=batches)


def train(
    net: Elastic,
    data: Any,
    objective: Objective,
    *,
    method: str | Method = "coarse_to_fine",
    budget: str | Budget | None = None,
    out: str | Path | None = None,
    **training: Any,
) -> Trained:
    """Train a supernet. The last weights are kept: accuracy of the largest network alone would be no reason to stop.

    Args:
        budget: what networks will be asked for; refused now if none can be inside.
        out: folder for the checkpoint and the accuracies of searches.
        **training: as for `fit`.

    Raises:
        BudgetError: the smallest network is outside the budget.
        KeyboardInterrupt: training was interrupted; what `out` has is resumed by the same call.
    """
    if budget is not None:
        net.check_budget(budget)
    if fit(net.model, data, objective, out=out, **{"val": None, **training}).stopped == "interrupted":
        raise KeyboardInterrupt
    net.calibrate(net.model, data)
    return Trained(net, data, method, Path(out) if out is not None else None)
