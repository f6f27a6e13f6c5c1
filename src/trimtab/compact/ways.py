"""How each method of `trimtab.compress` brings a given model inside a budget.

Methods that remove weights are asked for bounds on parameters and MACs. Those that store weights in fewer bits answer
to a bound on bytes; what else the budget bounds is met by pruning first, and the fewer bits a weight takes, the fewer
weights have to go. What comes out can be trained on: weights are packed when a file is made (`deliver.as_stored`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trimtab.compact import plan
from trimtab.compress import methods
from trimtab.core.budget import Budget
from trimtab.core.cost import measure
from trimtab.data import Data

LOW_BIT_LAYER = 250  # bytes in a file, from exports, for the nodes that decode the weights of a layer


@dataclass(frozen=True)
class Way:
    """A method and how it is used.

    Attributes:
        bits: of a stored weight, on average; 8 for those that leave it to the 8-bit file.
        trains: share of its time that the method trains by itself.
        options: of the method.
    """

    bits: float = 8.0
    trains: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


WAYS = {
    "magnitude": Way(),
    "otov2": Way(trains=0.7),
    "tucker": Way(),
    "compactifai": Way(options={"epochs": 0}),
    "fliqs": Way(bits=5, trains=0.5, options={"pack": False}),
    "bitnet_reloaded": Way(bits=2, options={"storage": None, "epochs": 0}),
    "fast_sparse_convnets": Way(bits=4, options={"sparsity": 0.8, "epochs": 0}),
}


def of_use(method: str, model: nn.Module, data: Data, budget: Budget) -> bool:
    """Whether the budget asks for what the method does: fewer bits are worth something where bytes are bounded."""
    if WAYS[method].bits == 8:
        return True
    return room(model, data, budget, bits=8) < _count(model, data)["params"]


def room(model: nn.Module, data: Data, budget: Budget, *, bits: float) -> float:
    """How many weights of so many bits a file of the model may have; infinite where its bytes are not bounded."""
    limit = budget.limit("size")
    if limit is None:
        return float("inf")
    heavy = [p for p in model.parameters() if p.dim() > 1]
    channels, count = sum(p.shape[0] for p in heavy), _count(model, data)["params"]
    weights = float(count)
    for _ in range(2):  # what a file needs besides weights goes by channels, and these by the root of the weights
        left = channels * min(weights / count, 1.0) ** 0.5
        rest = plan.estimated_size({"params": 0.0}, layers=len(heavy), channels=round(left), bits=8)
        rest += LOW_BIT_LAYER * len(heavy) if bits < 8 else 0
        weights = max(limit - rest, 0.1 * limit) * 8 / bits
    return weights


def bring(method: str, model: nn.Module, data: Data, budget: Budget, goal: Budget, **training: Any) -> nn.Module:
    """A copy of `model` inside `goal`, by a method.

    Args:
        budget: what the file is to keep. goal: what of it are bounds on parameters and MACs.
        **training: arguments of the method that are used where it has them.

    Raises:
        TrimtabError, ValueError: the method cannot do it.
    """
    way, known = WAYS[method], methods.parameters(method)
    options = {**{k: v for k, v in training.items() if k in known}, **way.options}
    if way.bits == 8:
        return methods.run(method, model, data, budget=goal, **options)
    base = model
    if not goal.check(_count(model, data)).ok:
        base = methods.run("magnitude", model, data, budget=goal)
    if method == "fliqs":
        limit = budget.limit("size")
        assert limit is not None  # `of_use`
        layers = sum(p.dim() > 1 for p in base.parameters())
        options["budget"] = f"size<={int(limit - LOW_BIT_LAYER * layers - plan.FILE)}"
    return methods.run(method, base, data, **options)


def _count(model: nn.Module, data: Data) -> dict[str, Any]:
    return measure(model, (data.in_chans, *data.size), what=("params", "macs")).asdict()
