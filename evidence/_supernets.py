"""The systems of supernets side by side, for `bignas`, `sortednet` and `deps`: one space, the same data and steps.

A residual net with three stages, 4 to 32 channels and one or two blocks each (512 networks, 0.04 to 0.4 M MACs), on
images of 16 x 16 pixels. Few images without augmentation, so that a training comes to its end in minutes, as a long one
does on many images. BigNAS's schedule is made for long runs, so all have one cycle of the learning rate, except DepS,
whose ramp belongs to its cosine. Each row of the table is one training: what its smallest, median and largest network
is worth on test images, and in some, the network that a search on validation images finds inside 25, 50 and 75 % of the
largest's MACs. The three scripts read the same run when they are started together; three seeds take some eight minutes
of a core that nobody else uses.

A pilot on held-out images of the training split (one seed) tried more images and fewer epochs: 4096 in batches of 128,
8 epochs. The sandwich on labels came to 42 to 45 %, where 1024 images give 33 to 35 %; but in 8 epochs the largest
network does not become a teacher: the mean of what learned from it was 3 points worse than both the sandwich on labels
and four random networks in a step. What these results say of distillation, they say of many epochs on few images.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from evidence.runner import Context, stats
from trimtab.learn import Schedule, evaluate, fit
from trimtab.models.classify.tiny import TrimNet
from trimtab.search import Chain, Elastic, Passes, elastic
from trimtab.search.supernets.bignas import silence
from trimtab.search.supernets.deps import Shrinking
from trimtab.search.supernets.sortednet import Nested, family, look_up

SPACE = {
    "width.1": (4, 5, 6, 8),
    "width.2": (8, 10, 12, 16),
    "width.3": (16, 20, 24, 32),
    **{f"depth.{i}": (1, 2) for i in (1, 2, 3)},
}
BUDGETS = {"25 %": "macs<=25%", "50 %": "macs<=50%", "75 %": "macs<=75%"}
STARTS = {0.0: "all from the start", 0.25: "from 25 %", 0.5: "deps", 0.75: "from 75 %"}
ABRUPT = "deps without ramp"  # the others begin with it, too, but at full strength
RAMP = 0.125  # share of the run; the paper's is an epoch in 36
ENDS = ("smallest", "median", "largest")
COLUMNS = (*ENDS, *BUDGETS)
CHOSEN = "macs<=35%"  # where every network is looked at
LOOK: dict[str, Any] = {"batches": 4, "images": 500}
IMAGES, EPOCHS = {"train": 1024, "val": 500, "test": 2500}, 16


@dataclass
class Bench:
    """One seed: data, a supernet whose weights are put back before each training, and what was seen."""

    context: Context
    seed: int
    data: Any
    net: Elastic
    epochs: int
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    grid: dict[str, list[float]] = field(default_factory=dict)  # accuracies along the sorted family
    spent: dict[str, float] = field(default_factory=dict)  # MACs of the forward passes
    loss: dict[str, dict[int, float]] = field(default_factory=dict)  # of each step's first pass
    best: dict[str, Any] = field(default_factory=dict)  # what the search in the supernet of BigNAS found
    split: str = "test"  # where networks are looked at
    chosen: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = copy.deepcopy(self.net.model.state_dict())
        places = range(0, len(members := family(self.net)), self.context.choose(full=4, smoke=15))
        self.chain = [members[i] for i in places]

    def train(self, name: str, objective: Passes, *, quiet: bool = False, **how: Any) -> None:
        """From the same weights; residual branches at zero if `quiet`."""
        self.context.say(f"seed {self.seed}: {name}")
        self.net.model.load_state_dict(self.start)
        if quiet:
            silence(self.net.model, self.data)
        self._watch(name, objective)
        fit(self.net.model, self.data, objective, **{"epochs": self.epochs, "seed": self.seed, **FIT, **how})

    def _watch(self, name: str, objective: Passes) -> None:
        """Add up what the passes of a training cost, and note what the first of each step loses."""
        arrange, losses = objective.arrange, objective.losses
        first = self.loss[name] = {}

        def counted(archs: Sequence[Any], ctx: Any) -> Any:
            passes = arrange(archs, ctx)
            self.spent[name] = self.spent.get(name, 0.0) + sum(self.net.cost(p.arch)["macs"] for p in passes)
            return passes

        def noted(model: nn.Module, batch: Any, ctx: Any) -> Iterator[Any]:
            for i, loss in enumerate(losses(model, batch, ctx)):
                if i == 0:
                    first[ctx.step] = float(loss["pass_0"].detach())
                yield loss

        objective.arrange, objective.losses = counted, noted  # type: ignore[method-assign]

    def look(self, name: str, *, search: Any = None) -> None:
        """The row of what was just trained; with searches if there is a way to search."""
        net, split = self.net, self.split
        ends = {"smallest": net.space.min(), "median": net.space.scale(0.5), "largest": net.space.max()}
        row = {k: net.accuracy(a, self.data, split=split) for k, a in ends.items()}
        for column, budget in BUDGETS.items() if search is not None else ():
            found = net.search(self.data, budget, method=search, evaluations=12, seed=self.seed, **LOOK)
            row[column] = net.accuracy(found.arch, self.data, split=split)
            if name == "bignas":
                self.best[column] = found.arch
        self.rows[name] = row

    def choose(self) -> None:
        """From coarse to fine against every network inside a budget, with a twentieth of the evaluations."""
        self.context.say(f"seed {self.seed}: every network")
        how: dict[str, Any] = {"batches": 2, "images": 500, "seed": self.seed}
        most = self.context.choose(full=10**6, smoke=20)
        every = self.net.search(self.data, CHOSEN, method="exhaustive", evaluations=most, **how)
        few = max(2, len(every.tried) // 20)
        found = self.net.search(self.data, CHOSEN, evaluations=few, **how)
        for name, f in (("exhaustive", every), ("coarse to fine", found)):
            test = self.net.accuracy(f.arch, self.data, split=self.split)
            self.chosen[name] = {"val": f.accuracy, "test": test, "looks": len(f.tried)}

    def along(self, name: str) -> None:
        """Accuracies along the sorted family of what was just trained."""
        self.grid[name] = [self.net.accuracy(a, self.data, split=self.split, batches=4) for a in self.chain]

    def alone(self) -> None:
        """Networks trained without others, from the weights that they would have in the supernet; the last of them is
        the largest, and what its slices are worth."""
        self.context.say(f"seed {self.seed}: alone")
        net, row = self.net, {}
        sliced = "largest alone, sliced"
        ends = {"smallest": net.space.min(), "median": net.space.scale(0.5), **self.best, "largest": net.space.max()}
        for column, arch in ends.items():
            net.model.load_state_dict(self.start)
            model: nn.Module = net.extract(arch)
            fit(model, self.data, epochs=self.epochs, seed=self.seed, **FIT)
            row[column] = evaluate(model, self.data, self.split)["accuracy"]
        net.model.load_state_dict(model.state_dict())
        self.rows["alone"] = {column: row[column] for column in COLUMNS}
        self.look(sliced)
        self.along(sliced)

    def per_step(self, name: str) -> float:
        """MMACs of the forward passes of a step for one image, on average."""
        steps = self.epochs * max(1, len(self.data.splits["train"]) // BATCH)
        return self.spent[name] / 1e6 / steps

    def mean(self, name: str) -> float:
        """Accuracy of the smallest, median and largest network, on average."""
        return statistics.fmean(self.rows[name][k] for k in ENDS)


BATCH = 64
FIT: dict[str, Any] = {
    "batch_size": BATCH, "lr": 0.1, "clip_grad": 5.0, "augment": "none", "val": None, "keep": "last", "progress": False,
}  # fmt: skip
_SEEN: dict[Any, list[Bench]] = {}


def side_by_side(context: Context) -> list[Bench]:
    """One bench for each seed; what was run once is not run again."""
    key = (context.data, tuple(context.seeds), context.smoke)
    if key not in _SEEN:
        _SEEN[key] = [_one(context, seed) for seed in context.each_seed("supernets")]
    return _SEEN[key]


def _one(context: Context, seed: int) -> Bench:
    b = _bench(context, seed)
    _bignas(b)
    _sortednet(b)
    _deps(b)
    b.alone()
    return b


def _bench(context: Context, seed: int) -> Bench:
    data = context.load_data(limit=5000, image_size=16, in_chans=3, seed=seed)
    most = context.choose(full=IMAGES, smoke={"train": 128, "val": 32, "test": 64})
    data = data.subset({k: min(n, len(data.splits[k])) for k, n in most.items()}, seed=seed)

    def build(**genes: int) -> nn.Module:
        widths, depths = ([genes[f"{word}.{i}"] for i in (1, 2, 3)] for word in ("width", "depth"))
        return TrimNet(
            widths=widths, depths=depths, stem_stride=2, num_classes=data.num_classes, in_chans=data.in_chans
        )

    net = elastic(build, data.spec.size, SPACE, seed=seed)
    return Bench(context, seed, data, net, context.choose(full=EPOCHS, smoke=1))


def _bignas(b: Bench) -> None:
    objective = b.net.objective
    rule: dict[str, Any] = {"quiet": True, "weight_decay": 1e-5}
    b.train("uniform", objective("uniform", seed=b.seed, smoothing=0.1), **rule)
    b.look("uniform")
    b.train("uniform, four in a step", objective("uniform", n=4, seed=b.seed, smoothing=0.1), **rule)
    b.look("uniform, four in a step")
    b.train("sandwich on labels", objective(seed=b.seed, smoothing=0.1, distil=False), **rule)
    b.look("sandwich on labels")
    b.along("sandwich on labels")
    b.train("bignas", objective(seed=b.seed, smoothing=0.1), **rule)
    b.look("bignas", search="coarse_to_fine")
    b.choose()


def _sortednet(b: Bench) -> None:
    net, members = b.net, family(b.net)
    # The mean of four gradients, where the sandwich has their sum: twice the learning rate (chosen on held-out images).
    b.train("sortednet", Nested(net, members, seed=b.seed), epochs=4 * b.epochs, accum=4, lr=0.2)
    b.look("sortednet", search=look_up(members))
    b.along("sortednet")
    epochs = max(1, round(4 * b.epochs / len(members)))  # as many passes in all
    b.train("sum over all", net.objective(Chain(net.space, members), distil=False), epochs=epochs)
    b.along("sum over all")


def _deps(b: Bench) -> None:
    lr = Schedule("cosine", least=2.5e-3 / 0.1625)
    rule: dict[str, Any] = {"sched": lr, "weight_decay": 3e-5}
    for start, name in STARTS.items():
        b.train(name, Shrinking(b.net, lr, start=start, ramp=RAMP, seed=b.seed), **rule)
        b.look(name)
    b.train(ABRUPT, Shrinking(b.net, lr, start=0.5 - RAMP, ramp=0.0, seed=b.seed), **rule)
    b.look(ABRUPT)


def row(benches: Sequence[Bench], name: str) -> dict[str, Any]:
    """The row of a training over all seeds, as it stands in the table."""
    kept = {k: stats(b.rows[name][k] for b in benches) for k in benches[0].rows[name]}
    return kept | (
        {"MMACs per image and step": round(benches[0].per_step(name), 2)} if name in benches[0].spent else {}
    )


def where(b: Bench) -> str:
    """What the numbers were measured on."""
    n, m = (len(b.data.splits[k]) for k in ("train", "test"))
    return f"{b.data.name} at 16 x 16, {n} training images without augmentation, {m} test images, {b.epochs} epochs"
