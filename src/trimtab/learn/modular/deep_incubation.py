"""Deep Incubation (Ni et al. 2022, arXiv 2212.04129; first called Deep Model Assembling).

A deep network is cut into K consecutive modules. A meta model, the same network with one layer per module, is trained
first. Then each module is trained apart, in the place of its stage of the meta model, with the other stages frozen and
the ordinary loss at the end; at last the modules are put together and tuned end to end. What makes modules fit that
never met is that all of them learned to live between the same frozen neighbours:

    meta:      m_K o ... o m_1                           all weights are trained
    module i:  m_K o ... o m_{i+1} o M_i o m_{i-1} ... o m_1   those of M_i are; gradients pass through what follows
    assembly:  M_K o ... o M_1                           all are

No stage is rebuilt: the meta model and the hybrids are copies of the network in which layers that repeat are skipped
(`cut` finds them by looking at a forward pass, so any network of repeated blocks will do), and modules are sets of
tensor names. What stands before the second module's first layer belongs to the first module: patches, tokens,
positions; the last module has the final norm and the head.

Differences to the authors' code, of which only the first can change a result: BatchNorm layers of frozen stages keep
their statistics and use them (the paper's networks have none), while drop-path and dropout stay on there. Later stages
get no gradients at all instead of gradients that nobody uses. Gradients of the tuning are clipped where `fit` is asked
for it, not only under mixed precision. The weights of the network that is given are where all of its parts start, so a
module and its stage of the meta model have the same first layer at the start.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trimtab.core.card import Card, Claim
from trimtab.learn.calls import Call, calls
from trimtab.learn.fit import fit
from trimtab.learn.objective import Batch, Classify, Context, Losses
from trimtab.learn.settings import Settings

CARD = Card(
    slug="deep_incubation",
    title="Deep Incubation: Training Large Models by Divide-and-Conquering",
    arxiv="2212.04129",
    year=2022,
    kind="method",
    tasks=("classify",),
    claims=(
        Claim(
            "assembled_beats_e2e",
            "ViT-H/14: 84.3% top-1 on ImageNet-1K against 81.6% for end-to-end DeiT training (+2.7), with 43% fewer "
            "GPU hours (2.72K vs 4.79K A100-h)",
        ),
        Claim(
            "compatibility",
            "modules trained separately against one shared meta model are compatible when put together",
        ),
        Claim(
            "shallow_meta_is_enough",
            "a meta model with one layer per module suffices, so its overhead is small",
        ),
        Claim("data_efficiency", "ViT-B on 25% of ImageNet: 72.9% vs 65.7% E2E (+7.2); on 50%: 78.6 vs 74.7"),
    ),
)

log = logging.getLogger(__name__)

_OWN = {
    "epochs",
    "time_limit",
    "warmup",
    "clip_grad",
    "patience",
    "out",
    "tracker",
}  # settings that phases do not share


@dataclass(frozen=True)
class Cut:
    """A network as a row of modules.

    Attributes:
        layers: names of the layers that repeat, module by module.
        spare: those that a module's stage of the meta model goes without.
        owner: which module (from 0) each entry of the state dict belongs to.
    """

    layers: tuple[tuple[str, ...], ...]
    spare: tuple[tuple[str, ...], ...]
    owner: dict[str, int]

    def __len__(self) -> int:
        return len(self.layers)

    def part(self, state: Mapping[str, Tensor], module: int) -> dict[str, Tensor]:
        """What of a state dict belongs to one module."""
        return {name: value for name, value in state.items() if self.owner[name] == module}


def cut(model: nn.Module, x: Tensor, modules: int | Sequence[int] = 4) -> Cut:
    """Cut a network into modules, along the layers that repeat.

    A layer that repeats is made of others, is given just what one of the same class gave, and keeps its shape: a block
    of a transformer or a residual net. The meta model has the first of a module's layers, and those that change shape.

    Args:
        x: images (B, C, H, W); one is enough.
        modules: how many, of equal numbers of layers as far as possible; or the number of layers of each.

    Raises:
        ValueError: the network cannot be cut like that.

    >>> net = nn.Sequential(nn.Flatten(), *(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(5)))
    >>> plan = cut(net, torch.zeros(1, 1, 8, 8), 2)
    >>> plan.layers, plan.spare
    ((('1', '2', '3'), ('4', '5')), (('2', '3'), ('5',)))
    """
    made = calls(model, x)
    found, repeating = _layers(made)
    depths = _depths(modules, len(found), type(model).__name__)
    rows, at = [], 0
    for depth in depths:
        rows.append(found[at : at + depth])
        at += depth
    borders = [row[0].start for row in rows[1:]]
    return Cut(
        layers=tuple(tuple(c.name for c in row) for row in rows),
        spare=tuple(tuple(c.name for c in row[1:] if c in repeating) for row in rows),
        owner=_owners(model, made, borders),
    )


def _layers(made: list[Call]) -> tuple[list[Call], list[Call]]:
    """The layers of a network that has run, and those of them that repeat the one before; outermost ones only."""
    gave: dict[int, list[Call]] = {}
    for c in made:
        gave.setdefault(id(c.out), []).append(c)
    times: dict[str, int] = {}
    for c in made:
        times[c.name] = times.get(c.name, 0) + 1

    def before(c: Call) -> Call | None:
        keeps = isinstance(c.given, Tensor) and isinstance(c.out, Tensor) and c.given.shape == c.out.shape
        made_of_others = any(True for _ in c.module.children()) and any(True for _ in c.module.parameters())
        if not (keeps and made_of_others and times[c.name] == 1):
            return None
        same = (p for p in gave.get(id(c.given), []) if p.parent is c.parent and _kind(p.module) == _kind(c.module))
        return next((p for p in same if p.end < c.start and p.name != c.name), None)

    pairs = [(p, c) for c in made if (p := before(c)) is not None]
    members = {id(m) for pair in pairs for m in pair}

    def outermost(c: Call) -> bool:
        above = c.parent
        while above is not None and id(above) not in members:
            above = above.parent
        return above is None

    pairs = [(p, c) for p, c in pairs if outermost(c)]
    layers = {m.start: m for pair in pairs for m in pair}
    return [layers[start] for start in sorted(layers)], [c for _, c in pairs]


def _kind(module: nn.Module) -> Any:
    """Its class; of a Sequential, those of its parts as well."""
    return (nn.Sequential, *map(_kind, module)) if type(module) is nn.Sequential else type(module)


def _depths(modules: int | Sequence[int], layers: int, who: str) -> list[int]:
    """The number of layers of each module."""
    if not layers:
        raise ValueError(f"{who} cannot be cut: it must have layers that repeat, blocks of one class in a row")
    if isinstance(modules, int):
        if modules > layers:
            raise ValueError(f"modules must be at most {layers}, the layers that repeat in {who}, got {modules}")
        each, more = divmod(layers, modules)
        return [each + (k < more) for k in range(modules)]
    if sum(modules) != layers:
        raise ValueError(f"modules must add up to the {layers} layers that repeat in {who}, got {list(modules)}")
    return list(modules)


def _owners(model: nn.Module, made: list[Call], borders: list[int]) -> dict[str, int]:
    """The module of each tensor: by when the layer that has it runs first."""
    first: dict[str, int] = {}
    for c in made:
        first.setdefault(c.name, c.start)
    owner: dict[str, int] = {}
    of_tensor: dict[int, int] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        layer = name.rpartition(".")[0]
        while layer and layer not in first:  # a layer that is never called is used by the one that has it
            layer = layer.rpartition(".")[0]
        number = bisect_right(borders, first.get(layer, -1))
        owner[name] = of_tensor.setdefault(id(value), number)  # a tied tensor belongs to its first user
    return owner


class Skip(nn.Module):
    """Gives its first argument, whatever else it is given (positions, sizes)."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def hybrid(
    model: nn.Module,
    plan: Cut,
    module: int | None = None,
    meta: Mapping[str, Tensor] | None = None,
    *,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """A copy of the network in which one module is whole and the others are stages of the meta model.

    Args:
        module: the one that is whole, from 0; its weights are the network's own and the only ones that require a
            gradient. None: the meta model itself.
        meta: state dict of the meta model, for all others.
        drop_path_rate: of the last layer; it grows from 0 with the layers that are there. For drop-path that the
            network has, none is added.
    """
    from timm.layers import DropPath

    net = deepcopy(model)
    spared = [name for k, names in enumerate(plan.spare) if k != module for name in names]
    for name in spared:
        net.set_submodule(name, Skip())
    if meta is not None:
        net.load_state_dict(net.state_dict() | {k: v for k, v in meta.items() if plan.owner[k] != module})
    if module is not None:
        for name, p in net.named_parameters():
            if plan.owner[name] != module:
                p.requires_grad_(False)
    left = [name for names in plan.layers for name in names if name not in spared]
    for k, name in enumerate(left):
        for m in net.get_submodule(name).modules():
            if isinstance(m, DropPath):
                m.drop_prob = drop_path_rate * k / max(1, len(left) - 1)
    return net


class Incubate(Classify):
    """Cross-entropy for a hybrid: only its whole module learns.

    Args:
        plan: how the network was cut. module: the one that is trained, from 0.
        meta: what tells this meta model from others; a run that goes on must have the same.
        drop_path_rate: as the hybrid was made with.
    """

    def __init__(
        self, plan: Cut, module: int, *, meta: str = "", drop_path_rate: float = 0.0, smoothing: float = 0.0
    ) -> None:
        super().__init__(smoothing=smoothing)
        self._plan, self.module, self.meta, self.drop_path_rate = plan, module, meta, drop_path_rate

    def setup(self, model: nn.Module, batch: Batch) -> None:
        super().setup(model, batch)
        mine = {name.rpartition(".")[0] for name, k in self._plan.owner.items() if k == self.module}
        self._still = [m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and name not in mine]

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        for m in self._still:
            m.eval()
        return super().losses(model, batch, ctx)


def incubate(
    model: nn.Module,
    data: Any,
    *,
    epochs: int,
    meta_epochs: int | None = None,
    modules: int | Sequence[int] = 4,
    only: Iterable[int] | None = None,
    drop_path_rate: float = 0.1,
    smoothing: float = 0.0,
    out: str | Path | None = None,
    **settings: Any,
) -> nn.Module:
    """Train the meta model and then each module apart; give a copy of the network with the modules put together.

    Modules do not wait for each other: with the same `out` on several machines, one trains the meta model
    (``only=[]``), then each some of the modules; the last call, without `only`, finds them all done.

    Args:
        model: where all parts start; it is not changed.
        epochs: of each module. meta_epochs: of the meta model; None: three times as many (the paper's 300 and 100).
        modules: as in `cut`.
        only: modules to train, from 0; the others stay as they are in `model`.
        drop_path_rate: while modules are trained; the meta model has none.
        smoothing: of labels.
        out: checkpoints, in ``meta/``, ``module-1/``, ...; what is done there is not done again.
        **settings: of `fit`.

    Raises:
        ValueError: the network cannot be cut like that, or a setting is out of range.
        KeyboardInterrupt: after Ctrl-C, when the checkpoint is written.

    >>> import trimtab as tt
    >>> data = tt.load_data("digits", limit=128)
    >>> net = tt.create_model("trim_net", widths=(4, 8), depths=(3, 3), strides=(1, 2), num_classes=10, in_chans=1)
    >>> whole = incubate(net, data, modules=2, epochs=1, progress=False)
    >>> whole.state_dict().keys() == net.state_dict().keys()
    True
    """
    _check(meta_epochs=meta_epochs, epochs=epochs, drop_path_rate=drop_path_rate, modules=modules)
    images = next(iter(data.loader("train", batch_size=2)))["image"]
    plan = cut(model, images[:1].to(next(model.parameters()).device), modules)
    if not any(plan.spare):
        raise ValueError(f"modules must be fewer, of more than one layer that keeps its shape, got {len(plan)}")
    wanted = range(len(plan)) if only is None else sorted(set(only))
    if not set(wanted) <= set(range(len(plan))):
        raise ValueError(f"only must name modules from 0 to {len(plan) - 1}, got {list(wanted)}")

    def train(net: nn.Module, objective: Classify, passes: int, name: str) -> dict[str, Tensor]:
        log.info("deep_incubation: %s", name)
        result = fit(net, data, objective, epochs=passes, out=None if out is None else Path(out) / name, **settings)
        if result.stopped == "interrupted":
            raise KeyboardInterrupt(f"{name} is not done")
        return net.state_dict()

    meta = train(hybrid(model, plan), Classify(smoothing=smoothing), meta_epochs or 3 * epochs, "meta")
    whole = deepcopy(model)
    for k in wanted:
        net = hybrid(model, plan, k, meta, drop_path_rate=drop_path_rate)
        objective = Incubate(plan, k, meta=_digest(meta), drop_path_rate=drop_path_rate, smoothing=smoothing)
        state = train(net, objective, epochs, f"module-{k + 1}")
        whole.load_state_dict(whole.state_dict() | plan.part(state, k))
    return whole


class DeepIncubation(Classify):
    """Train the network's modules apart, put them together, and tune the whole: training itself is the tuning.

    The meta model and the modules are trained before the first step, with the same settings but for ``warmup`` and
    ``clip_grad``, which are the tuning's (the paper's are 0 and 1). With `out`, each of them has a folder there.

    Args:
        modules: how many, or the number of layers of each, as in `cut`.
        meta_epochs: of the meta model; None: three times those of a module.
        module_epochs: of each module; None: as many as training has epochs.
        drop_path_rate: while modules are trained. While the whole is tuned it is what the network was made with.
        smoothing: label smoothing.

    Raises:
        ValueError: at the start of training, if the network cannot be cut like that, or training has a time limit.
    """

    def __init__(
        self,
        *,
        modules: int | Sequence[int] = 4,
        meta_epochs: int | None = None,
        module_epochs: int | None = None,
        drop_path_rate: float = 0.1,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(smoothing=smoothing)
        _check(meta_epochs=meta_epochs, module_epochs=module_epochs, drop_path_rate=drop_path_rate, modules=modules)
        self.modules, self.meta_epochs, self.module_epochs = modules, meta_epochs, module_epochs
        self.drop_path_rate = drop_path_rate

    def prepare(self, data: Any, settings: Settings, device: torch.device) -> Any:
        if settings.time_limit is not None:
            raise ValueError(f"deep_incubation counts epochs; it must have no time limit, got {settings.time_limit} s")
        self._data, self._settings = data, settings
        return data

    def setup(self, model: nn.Module, batch: Batch) -> None:
        super().setup(model, batch)
        s = self._settings
        whole = incubate(
            model,
            self._data,
            epochs=self.module_epochs or s.all_epochs or 1,
            meta_epochs=self.meta_epochs,
            modules=self.modules,
            drop_path_rate=self.drop_path_rate,
            smoothing=self.smoothing,
            out=s.out,
            **{f.name: getattr(s, f.name) for f in fields(s) if f.name not in _OWN},
        )
        model.load_state_dict(whole.state_dict())


def _check(*, modules: int | Sequence[int], drop_path_rate: float, **epochs: int | None) -> None:
    for name, value in epochs.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
    if isinstance(modules, int):
        good = modules >= 2
    else:
        good = len(modules) >= 2 and all(isinstance(depth, int) and depth >= 1 for depth in modules)
    if not good:
        raise ValueError(f"modules must be a number from 2, or the number of layers of each, got {modules!r}")


def _digest(state: Mapping[str, Tensor]) -> str:
    """What tells one meta model from another."""
    digest = hashlib.sha256()
    for value in state.values():
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
