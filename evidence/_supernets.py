"""The systems of supernets side by side, for `bignas`, `sortednet` and `deps`: one space, the same data and steps.

A residual net with three stages, 4 to 32 channels and one or two blocks each (512 networks, 0.04 to 0.4 M MACs), on
images of 16 x 16 pixels. Few images without augmentation, so that a training comes to its end in minutes, as a long
one does on many images. BigNAS's schedule is made for long runs, so all have one cycle of the learning rate, except
DepS, whose ramp belongs to its cosine. Each row of the table is one training: what its smallest, median and largest
network is worth on test images, and the network that a search on validation images finds inside 25, 50 and 75 % of
the largest's MACs. The three scripts read the same run when they are started together; three seeds take about eight
minutes of a core.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from evidence.runner import Context, stats
from trimtab.learn import Schedule, evaluate, fit
from trimtab.models import create_model
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
RAMP = 0.125  # share of the run; the paper's is an epoch in 36
ENDS = ("smallest", "median", "largest")
COLUMNS = (*ENDS, *BUDGETS)
CHOSEN = "macs<=35%"  # where every network is looked at
LOOK: dict[str, Any] = {"batches": 4, "images": 500}


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
    loss: dict[str, list[float]] = field(default_factory=dict)  # of the largest network on validation images
    best: dict[str, Any] = field(default_factory=dict)  # what the search in the supernet of BigNAS found
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
        arrange = objective.arrange

        def counted(archs: Sequence[Any], ctx: Any) -> Any:
            passes = arrange(archs, ctx)
            self.spent[name] = self.spent.get(name, 0.0) + sum(self.net.cost(p.arch)["macs"] for p in passes)
            return passes

        objective.arrange = counted
        given = {"epochs": self.epochs, "seed": self.seed, **FIT, **how}
        done = fit(self.net.model, self.data, objective, **given)
        self.loss[name] = [row["val_loss"] for row in done.history]

    def look(self, name: str, *, search: Any = None) -> None:
        """The row of what was just trained; with searches if there is a way to search."""
        net, split = self.net, "test"
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
        self.chosen = {
            name: {"val": f.accuracy, "test": self.net.accuracy(f.arch, self.data, split="test"), "looks": len(f.tried)}
            for name, f in (("exhaustive", every), ("coarse to fine", found))
        }

    def along(self, name: str) -> None:
        """Accuracies along the sorted family of what was just trained."""
        self.grid[name] = [self.net.accuracy(a, self.data, split="test", batches=4) for a in self.chain]

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
            row[column] = evaluate(model, self.data, "test")["accuracy"]
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
    data = context.load_data(limit=5000, image_size=16, in_chans=3, seed=seed)
    most = context.choose(full={"train": 1024, "val": 500, "test": 1500}, smoke={"train": 128, "val": 32, "test": 64})
    data = data.subset({k: min(n, len(data.splits[k])) for k, n in most.items()}, seed=seed)

    def build(**genes: int) -> nn.Module:
        widths, depths = ([genes[f"{word}.{i}"] for i in (1, 2, 3)] for word in ("width", "depth"))
        return create_model(
            "trim_net", widths=widths, depths=depths, stem_stride=2, num_classes=data.num_classes,
            in_chans=data.in_chans, seed=seed,
        )  # fmt: skip

    b = Bench(context, seed, data, elastic(build, data.spec.size, SPACE, seed=seed), context.choose(full=16, smoke=1))
    net, space = b.net, b.net.space
    rule: dict[str, Any] = {"quiet": True, "weight_decay": 1e-5}
    fine = "coarse_to_fine"
    b.train("uniform", net.objective("uniform", seed=seed, smoothing=0.1), **rule)
    b.look("uniform", search=fine)
    b.train("uniform, four in a step", net.objective("uniform", n=4, seed=seed, smoothing=0.1), **rule)
    b.look("uniform, four in a step")
    b.train("sandwich on labels", net.objective(seed=seed, smoothing=0.1, distil=False), **rule)
    b.look("sandwich on labels")
    b.along("sandwich on labels")
    b.train("bignas", net.objective(seed=seed, smoothing=0.1), **rule)
    b.look("bignas", search=fine)
    b.choose()
    members = family(net)
    # The mean of four gradients, where the sandwich has their sum: twice the learning rate (chosen on held-out images).
    b.train("sortednet", Nested(net, members, seed=seed), epochs=4 * b.epochs, accum=4, lr=0.2)
    b.look("sortednet", search=look_up(members))
    b.along("sortednet")
    epochs = max(1, round(4 * b.epochs / len(members)))  # as many passes in all
    b.train("sum over all", net.objective(Chain(space, members), distil=False), epochs=epochs)
    b.along("sum over all")
    lr = Schedule("cosine", least=2.5e-3 / 0.1625)
    for start, name in STARTS.items():
        b.train(name, Shrinking(net, lr, start=start, ramp=RAMP, seed=seed), sched=lr, weight_decay=3e-5, val="val")
        b.look(name, search=fine if name == "deps" else None)
    without = Shrinking(net, lr, start=0.5, ramp=0.0, seed=seed)
    b.train("deps without ramp", without, sched=lr, weight_decay=3e-5, val="val")
    b.look("deps without ramp")
    b.alone()
    return b


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
