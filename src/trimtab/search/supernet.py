"""`elastic`: a family of networks that share one set of weights, from any builder or any network.

The network that is trained stays an ordinary module. Its children are ordinary modules too, run on slices of its
parameters (`children.py`); no layer knows of elasticity.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from trimtab.core.budget import Budget
from trimtab.core.cost import WHAT, measure
from trimtab.core.edit import Edit, apply
from trimtab.core.errors import BudgetError, DataError
from trimtab.core.example import example_of
from trimtab.learn.evaluate import Tally, predictions
from trimtab.learn.norm import bn_recalibrate
from trimtab.search.candidates import CLOSED, Candidates, Tried
from trimtab.search.children import Child
from trimtab.search.from_builder import FromBuilder, Rule
from trimtab.search.from_graph import FromGraph, check_words
from trimtab.search.methods import Method, run
from trimtab.search.passes import Pass, Passes
from trimtab.search.resolution import RESOLUTION, resize, resizing
from trimtab.search.samplers import Sampler, Sandwich, Uniform
from trimtab.search.scores import Scores
from trimtab.search.space import Arch, Key, Space

_CACHED = 512  # skeletons of children
_TIMED = ("latency", "energy")  # differ from one measurement to the next


class _Source(Protocol):
    model: nn.Module
    space: Space

    def child(self, arch: Arch) -> Child: ...
    def cost(self, arch: Arch) -> dict[str, int]: ...
    def extract(self, arch: Arch) -> nn.Module: ...


def elastic(
    network: nn.Module | Callable[..., nn.Module],
    data: Any,
    space: Mapping[str, Any] | Space,
    *,
    order: str | None = "norm",
    rules: Mapping[str, Rule] | None = None,
    seed: int = 0,
) -> Elastic:
    """Make a supernet.

    Args:
        network: any network; it is copied, and the channel graph finds what can be narrowed or left out. Or a function
            that builds one from the genes, given by name.
        data: a `Data`, or the size (C, H, W) of the images.
        space: of a network: `{"width": (0.5, 0.75, 1), "depth": "blocks"}`, either or both. "width" may be a mapping
            from patterns of layer names to shares; layers that no pattern fits keep their width. "depth" may be shares
            of the residual blocks. Of a builder: its arguments and their choices, small to large, or a `Space`. Either
            may have "resolution": sides that the images are resized to.
        order: of a network's channels: "norm" puts those with large weights first (for networks that have been
            trained), None leaves them as they are (for a supernet that is made anew from its trained `model`).
        rules: of a builder: what a child takes of tensors whose name matches a pattern, see `from_builder`.
        seed: of the builder's weights, and of the checks.

    Raises:
        ValueError: the space makes no sense.
        SurgeryError: the network cannot be traced or has nothing to leave out; a builder's children are not slices of
            its largest network.

    >>> net = elastic(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)), (3, 8, 8), {"width": (0.5, 1)})
    >>> net.space.min(), net.cost(net.space.min())
    ({'width.0': 0.5}, {'params': 297, 'macs': 6768})
    >>> net.extract(net.space.min())[0]
    Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    if isinstance(network, nn.Module):
        if isinstance(space, Space) or rules is not None:
            raise ValueError("for a network, space must be a mapping of width and depth, without rules")
        check_words(space)
        example = example_of(data, network)
        _check_sides(space.get(RESOLUTION), tuple(example.shape[1:]))
        return Elastic(FromGraph(network, example, space, order=order, seed=seed), tuple(example.shape[1:]))
    if not callable(network):
        raise ValueError(f"network must be a module or a function that builds one, got {type(network).__name__}")
    genes = space if isinstance(space, Space) else Space(space)
    size = tuple(data) if isinstance(data, Sequence) else (data.in_chans, *data.size)
    _check_sides(genes.max().get(RESOLUTION), size)
    return Elastic(FromBuilder(network, genes, size, rules=rules, seed=seed), size)


class Elastic:
    """A supernet; made by `elastic`.

    Attributes:
        model: the largest network, which holds all weights: a plain module, trained by `tt.fit`.
        space: the networks that share them.
    """

    def __init__(self, source: _Source, size: tuple[int, ...]) -> None:
        self._source, self._size = source, size
        self.model, self.space = source.model, source.space
        self._largest = self.space.key(self.space.max())
        self._children: OrderedDict[Key, Child] = OrderedDict()

    def __call__(self, x: Tensor, arch: Arch, *, model: nn.Module | None = None, regularise: bool = False) -> Tensor:
        """What a child says to images (B, C, H, W); gradients land in the largest network.

        In training mode batch norms use the batch's statistics, and only the largest network, when regularised, keeps
        them. In evaluation they use the first entries of the largest's statistics, which are not a child's own: see
        `calibrate`.

        Args:
            model: another module with the tensors of `self.model` (an averaged copy).
            regularise: in training, let dropout and the like work.
        """
        model = self.model if model is None else model
        x = resize(x, arch.get(RESOLUTION))
        if self.space.key(self.space.check(arch)) == self._largest and (regularise or not model.training):
            return model(x)
        return self.child(arch).run(model, x, regularise=regularise)

    def child(self, arch: Arch) -> Child:
        """The skeleton and the slices of a network; kept for the next time."""
        key = self.space.key(self.space.check(arch))
        if key not in self._children:
            self._children[key] = self._source.child(self.space.check(arch))
            if len(self._children) > _CACHED:
                self._children.popitem(last=False)
        self._children.move_to_end(key)
        return self._children[key]

    def cost(self, arch: Arch) -> dict[str, int]:
        """Parameters and MACs, in closed form; equal to what `tt.measure` counts."""
        return self._source.cost(self.space.check(arch))

    def edits(self, arch: Arch) -> list[Edit]:
        """The edits that turn `self.model` into this network.

        Raises:
            ValueError: the supernet was made from a builder, whose networks are built, not cut.
        """
        if not isinstance(self._source, FromGraph):
            raise ValueError("networks of a builder are built, not cut: use extract")
        arch = self.space.check(arch)
        return [*self._source.edits(arch), *resizing(self._source.extract(arch), self._size, arch.get(RESOLUTION))]

    def extract(self, arch: Arch) -> nn.Module:
        """The network as a plain module of its own, in eval mode, which computes what `self(x, arch)` does."""
        arch = self.space.check(arch)
        model = self._source.extract(arch)
        return apply(model, resizing(model, self._size, arch.get(RESOLUTION)))

    def draft(self, arch: Arch) -> nn.Module:
        """Like `extract`, made faster and without the edits that an artifact needs: for a look at a network."""
        model = self.child(arch).copy(self.model)
        return apply(model, resizing(model, self._size, arch.get(RESOLUTION)))

    # -- training ------------------------------------------------------------------------------------------------------

    def objective(
        self,
        passes: str | Sampler = "sandwich",
        *,
        n: int | None = None,
        arrange: Callable[..., Sequence[Pass]] | None = None,
        distil: bool | None = None,
        temperature: float = 1.0,
        smoothing: float = 0.0,
        seed: int = 0,
    ) -> Passes:
        """How the weights are trained: `tt.fit(net.model, data, net.objective())`.

        Args:
            passes: "sandwich" trains the largest network on the labels, then `n` (2) random ones and the smallest on
                the largest's softmax; "uniform" trains `n` (1) random ones on the labels. Or a `Sampler`.
            arrange, distil, temperature, smoothing: see `Passes`.
            seed: of the sampler.
        """
        if isinstance(passes, Sampler):
            if n is not None:
                raise ValueError("n is for 'sandwich' and 'uniform'; a Sampler knows how many networks it draws")
            sampler = passes
        elif passes == "sandwich":
            sampler = Sandwich(self.space, 2 if n is None else n, seed=seed)
        elif passes == "uniform":
            sampler = Uniform(self.space, 1 if n is None else n, seed=seed)
        else:
            raise ValueError(f"passes must be 'sandwich', 'uniform' or a Sampler, got {passes!r}")
        distil = not isinstance(sampler, Uniform) if distil is None else distil
        return Passes(
            self, sampler, arrange=arrange, distil=distil, temperature=temperature, smoothing=smoothing
        )  # fmt: skip

    # -- search --------------------------------------------------------------------------------------------------------

    def calibrate(self, model: nn.Module, data: Any, *, batches: int = 16, batch_size: int = 128) -> nn.Module:
        """Measure the batch norms' statistics of a child, in place, on the first training images of a fixed order."""
        loader = data.loader("train", batch_size=batch_size, shuffle=True, augment="none", seed=0, drop_last=False)
        return bn_recalibrate(model, loader, limit=batches)

    def accuracy(
        self, arch: Arch, data: Any, *, split: str = "val", images: int | None = None, batches: int = 16
    ) -> float:
        """Accuracy of a child, its statistics calibrated, on (the first `images` of) a split."""
        if split not in data.splits or not len(data.splits[split]):
            raise DataError(f"split must be one of {', '.join(data.splits)} and not empty, got {split!r}")
        model = self.calibrate(self.draft(arch), data, batches=batches)
        tally, seen = Tally(), 0
        for logits, batch in predictions(model, data, split):
            tally.update(logits, batch["label"])
            seen += len(logits)
            if images is not None and seen >= images:
                break
        return tally.compute()["accuracy"]

    def search(
        self,
        data: Any,
        budget: str | Budget,
        *,
        method: str | Method = "coarse_to_fine",
        evaluations: int = 100,
        split: str = "val",
        images: int | None = None,
        batches: int = 16,
        seed: int = 0,
        file: str | Path | None = None,
    ) -> Found:
        """Look for the most accurate network inside a budget, without training any.

        Args:
            budget: bounds on costs; a percentage is of the largest network's. params and macs are known in closed form,
                other costs are measured on each network.
            method: "coarse_to_fine", "evolution" (NSGA-II; `pip install 'trimtab[search]'`), "tpe", or "exhaustive".
                Or a function of (candidates, rng) that evaluates some `Candidates`, and may return what it chose.
            evaluations: how many networks may be looked at.
            split, images, batches: see `accuracy`. The split must not be the one that is reported in the end.
            file: accuracies are kept there, and not measured again by a search that is started again.

        Raises:
            BudgetError: no network is inside the budget; says what the smallest costs.
        """
        if evaluations < 1:
            raise ValueError(f"evaluations must be at least 1, got {evaluations}")
        bounds = self._bounds(Budget(budget))
        scores = Scores(file, self.model, f"{data.name} {split} {images} {batches}")

        def score(arch: Arch) -> float:
            return scores.once(arch, lambda: self.accuracy(arch, data, split=split, images=images, batches=batches))

        candidates = self._candidates(bounds, score, evaluations)
        return Found(run(method, candidates, seed), tuple(candidates.tried.values()), bounds)

    def best(self, data: Any, budget: str | Budget, *, batches: int = 16, **search: Any) -> nn.Module:
        """The best network inside the budget: searched for, taken out, calibrated. A plain module, ready to be saved.

        Args:
            **search: see `search`.

        Raises:
            BudgetError: no network was found inside the budget.
        """
        return self.take(self.search(data, budget, batches=batches, **search), data, batches=batches)

    def take(self, found: Found, data: Any, *, batches: int = 16) -> nn.Module:
        """The network that a search found, taken out and calibrated.

        Raises:
            BudgetError: it is outside the budget after all, in accuracy or when measured.
        """
        verdict = found.budget.only("accuracy").check({"accuracy": found.accuracy})
        if not verdict.ok:
            raise BudgetError(
                f"{verdict.explain()} in the best of {len(found.tried)} networks; train the supernet longer"
            )
        model = self.calibrate(self.extract(found.arch), data, batches=batches)
        steady = Budget(c for c in found.budget.clauses if c.name not in (*_TIMED, "accuracy"))
        verdict = steady.check(self._measure(model, steady))
        if not verdict.ok:
            raise BudgetError(f"the network that was found is outside the budget: {verdict.explain()}")
        return model

    def check_budget(self, budget: str | Budget) -> None:
        """Whether a search can find something, before the supernet is trained.

        Raises:
            BudgetError: the smallest network is outside; says what it costs. Lower bounds are not looked at, nor spaces
                with genes that have no order.
        """
        bounds = Budget(c for c in self._bounds(Budget(budget)).clauses if c.op == "<=")
        smallest = self._candidates(bounds, lambda arch: 0.0, 1)
        if all(g.ordered for g in self.space.genes) and not smallest.fits(self.space.min()):
            raise smallest.unreachable()

    def _candidates(self, bounds: Budget, score: Callable[[Arch], float], limit: int) -> Candidates:
        return Candidates(
            self.space,
            cost=self.cost,
            measured=lambda arch: self._measure(self.draft(arch), bounds),
            score=score,
            budget=Budget(c for c in bounds.clauses if c.name != "accuracy"),
            limit=limit,
        )

    def _bounds(self, budget: Budget) -> Budget:
        """The budget with percentages of the largest network made absolute."""
        reference: dict[str, Any] = dict(self.cost(self.space.max()))
        relative = Budget(c for c in budget.clauses if c.relative and c.name not in CLOSED)
        reference |= self._measure(self.model, relative)
        return budget.resolve(reference)

    def _measure(self, model: nn.Module, budget: Budget) -> dict[str, Any]:
        what = tuple({c.name for c in budget.clauses} & set(WHAT))
        return {k: v for k, v in measure(model, self._size, what=what).asdict().items() if k in what} if what else {}


def _check_sides(sides: Any, size: tuple[int, ...]) -> None:
    """Images are given at the largest resolution, and made smaller."""
    largest = sides[-1] if isinstance(sides, Sequence) and sides else sides
    if sides is not None and (largest, largest) != tuple(size[1:]):
        raise ValueError(f"resolution must end with the side of square images, {size[-1]}, got {sides!r}")


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        chosen: the most accurate network inside the budget.
        tried: all networks that were evaluated; each is inside the budget.
        budget: the bounds, absolute.
    """

    chosen: Tried
    tried: tuple[Tried, ...]
    budget: Budget

    @property
    def arch(self) -> Arch:
        return self.chosen.arch

    @property
    def accuracy(self) -> float:
        return self.chosen.accuracy

    @property
    def cost(self) -> Mapping[str, Any]:
        return self.chosen.cost

    def front(self, cost: str = "macs") -> list[Tried]:
        """The networks that no other beats in both accuracy and `cost`, by rising cost."""
        best: list[Tried] = []
        for t in sorted(self.tried, key=lambda t: (t.cost[cost], -t.accuracy)):
            if not best or t.accuracy > best[-1].accuracy:
                best.append(t)
        return best

    def asdict(self) -> dict[str, Any]:
        """As the report plots it: `trimtab.report.pareto_svg(found.asdict())`."""
        verdict = self.budget.check({**self.cost, "accuracy": self.accuracy})
        return {
            "title": "Networks of the supernet",
            "tried": [
                {
                    "name": f"network {i + 1}",
                    "arch": dict(t.arch),
                    "val_accuracy": t.accuracy,
                    **t.cost,
                    "fits": True,
                    "chosen": t is self.chosen,
                }
                for i, t in enumerate(self.tried)
            ],
            "budget": {"text": str(self.budget), "rows": [asdict(r) for r in verdict.rows]},
        }
