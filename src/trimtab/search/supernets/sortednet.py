"""SortedNet (Valipour et al., "SortedNet, a Place for Every Network and Every Network in its Place", arXiv 2309.00255).

The networks of a family are nested: the first channels, the first blocks of every stage. A step adds up the gradients
of a few batches, each for one network that is drawn at random, all on the labels: no distillation, no search. The order
is the selection rule: for a budget, the largest network inside it is taken.

The family has one width for all layers, and any depth in each stage (`family`), sorted by MACs; on such a grid two
networks need not be nested in each other, only those of which one is smaller in everything. The paper's
hyper-parameters are not published; `accum=4` and equal probabilities are what its text suggests. An epoch is a pass
over the data, so a run makes a fourth of the updates that it would make without accumulation. The optimizer moves
every entry of a tensor of which a step used a part: momentum and weight decay act on the rest too; a block that no
network of a step had is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from trimtab.core.budget import Budget
from trimtab.core.card import Card, Claim
from trimtab.learn.objective import Context
from trimtab.search.candidates import Candidates, Spent, Tried
from trimtab.search.from_builder import Rule
from trimtab.search.methods import Method
from trimtab.search.passes import Pass, Passes
from trimtab.search.samplers import Among
from trimtab.search.space import Arch, Space
from trimtab.search.supernet import Elastic, elastic
from trimtab.search.trained import Trained, train

CARD = Card(
    slug="sortednet",
    title="SortedNet, a Place for Every Network and Every Network in its Place: Towards a Generalized Solution for "
    "Training Many-in-One Neural Networks",
    arxiv="2309.00255",
    year=2023,
    kind="method",
    tasks=("classify",),
    claims=(
        Claim(
            "many",
            "One run trains up to 160 nested sub-models at once, each keeping at least 96% of the main model's "
            "performance (abstract)",
        ),
        Claim(
            "random_accum",
            "Random sampling of sub-models combined with gradient accumulation trains many sub-models at the cost of "
            "an ordinary run and beats dynamic-training baselines",
        ),
        Claim(
            "search_free",
            "Sub-models are ordered (sorted, nested), so choosing one for a budget is a look-up, not a search; "
            "storage = one checkpoint; switching = slicing",
        ),
    ),
)


def sortednet(
    network: nn.Module | Callable[..., nn.Module],
    data: Any,
    *,
    space: Mapping[str, Any] | Space,
    budget: str | Budget | None = None,
    accum: int = 4,
    full: float | None = None,
    smoothing: float = 0.0,
    order: str | None = "norm",
    rules: Mapping[str, Rule] | None = None,
    epochs: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    **training: Any,
) -> Trained:
    """A family of nested networks, trained together; `.best("macs<=30%")` looks up the largest one inside a budget.

    Args:
        network, space, order, rules: as for `elastic`. The network is copied.
        data: a `Data` to train on.
        budget: what networks will be asked for; refused before training if the smallest cannot meet it.
        accum: batches in a step, each with a network of its own; their gradients are averaged (g_A).
        full: probability of the largest network; by default that of the others.
        smoothing: label smoothing.
        out: folder of the checkpoint; what was interrupted goes on there, to the same result.
        **training: as for `fit`.

    Raises:
        ValueError: an argument makes no sense. SurgeryError: see `elastic`.
        BudgetError: no network of the space can meet the budget.
        KeyboardInterrupt: training was interrupted; what `out` has is resumed by the same call.

    >>> import trimtab as tt
    >>> data = tt.load_data("digits", limit=200)
    >>> net = tt.create_model("trim_10k", num_classes=10, in_chans=1, img_size=8)
    >>> nested = sortednet(net, data, space={"width": (0.25, 0.5, 0.75, 1)}, epochs=1, batch_size=32, progress=False)
    >>> small = nested.best("macs<=50%")  # of 4 networks, the third is too large
    >>> small.head.in_features, net.head.in_features
    (10, 19)
    """
    net = elastic(network, data, space, order=order, rules=rules, seed=seed)
    members = family(net)
    objective = Nested(net, members, full=full, smoothing=smoothing, seed=seed)
    return train(
        net, data, objective, method=look_up(members), budget=budget, out=out, epochs=epochs, seed=seed, accum=accum,
        **training,
    )  # fmt: skip


def family(net: Elastic) -> list[dict[str, Any]]:
    """The networks that are trained, from the smallest to the largest in MACs.

    All widths of a network are at the same place among their choices; depths are each on their own.
    """
    return sorted(net.space.grid(free=("depth",)), key=lambda arch: net.cost(arch)["macs"])


class Nested(Passes):
    """One random network of the family for each batch, on the labels; only the largest is regularised.

    Args:
        members: the family. full: probability of the last of them; by default they are all alike.
    """

    def __init__(
        self, net: Elastic, members: Sequence[Arch], *, full: float | None = None, smoothing: float = 0.0, seed: int = 0
    ) -> None:
        if full is not None and not 0 <= full <= 1:
            raise ValueError(f"full must be a probability, in [0, 1], got {full}")
        others = len(members) - 1
        p = None if full is None or not others else [*([(1 - full) / others] * others), full]
        largest = net.space.key(members[-1])

        def arrange(archs: Sequence[Arch], ctx: Context) -> list[Pass]:
            return [Pass(a, regularise=net.space.key(a) == largest) for a in archs]

        super().__init__(net, Among(net.space, members, p=p, seed=seed), arrange=arrange, smoothing=smoothing)
        self.full, self.members = full, len(members)


def look_up(members: Sequence[Arch]) -> Method:
    """A way to choose: the largest of these inside the budget. The others are evaluated for the table, as allowed."""

    def method(candidates: Candidates, rng: np.random.Generator) -> Tried | None:
        inside = sorted(filter(candidates.fits, members), key=lambda a: -candidates.cost(a)["macs"])
        chosen = candidates.evaluate(inside[0]) if inside else None
        with suppress(Spent):
            for arch in inside:
                candidates.evaluate(arch)
        return chosen

    return method
