"""BigNAS (Yu et al., "BigNAS: Scaling Up Neural Architecture Search with Big Single-Stage Models", arXiv 2003.11142).

One supernet is trained in a single stage so that every network in it can be used as it is, without fine-tuning. Five
rules reconcile small and big networks: in each step the biggest learns the labels and two random ones and the smallest
learn what the biggest says of the same images; residual branches start at zero; the learning rate falls exponentially
to a floor and stays there; only the biggest is regularised; batch norms are measured anew for the network that is
chosen. It is chosen from coarse to fine (`methods.coarse_to_fine`).

What differs: any network can be the biggest one; the paper's own is `mobile` over `SPACE`. A network that is given
starts with the weights it has (the paper draws convolutions as He, fan-out, which `mobile` does). Weight decay "for the
biggest only" is one ordinary decay in a step, because the biggest owns every weight. SGD is the default optimizer, not
RMSProp; `opt="rmsproptf"` is the paper's. Losses of a step are summed, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trimtab.core.budget import Budget
from trimtab.core.card import Card, Claim
from trimtab.core.example import example_of
from trimtab.learn.schedule import Schedule
from trimtab.models.classify.mbconv import MBConvNet
from trimtab.nn.modes import eval_mode
from trimtab.search.from_builder import Rule
from trimtab.search.space import Space
from trimtab.search.supernet import elastic
from trimtab.search.trained import Trained, train

CARD = Card(
    slug="bignas",
    title="BigNAS: Scaling Up Neural Architecture Search with Big Single-Stage Models",
    arxiv="2003.11142",
    year=2020,
    kind="method",
    tasks=("classify",),
    claims=(
        Claim(
            "no_retrain",
            "Children sliced from one weight set are usable directly, 200-1000 MFLOPs at 76.5-80.9% ImageNet top-1, "
            "no finetuning",
        ),
        Claim(
            "sandwich_kd",
            "Sandwich sampling + in-place distillation beat uniform sampling with ground-truth labels, most visibly "
            "for the smallest child",
        ),
        Claim(
            "init_lr_reg",
            "Zero-gamma residual init, exponential LR with a constant floor, and regularising only the biggest child "
            "each help both ends of the size range",
        ),
        Claim(
            "coarse_to_fine",
            "Selection = coarse grid over network-wise knobs, then stage-wise mutation around the winner, no "
            "predictor and no RL",
        ),
    ),
)

# The paper's space: stem, seven stages of MBConv blocks, head. Names are those of the genes; see `mobile`.
_WIDTHS = ((16, 24), (24, 32), (40, 48), (80, 88), (112, 120, 128), (192, 200, 208, 216), (320, 352))
_DEPTHS = ((1, 2), (2, 3), (2, 3), (2, 3, 4), (2, 3, 4, 5, 6), (2, 3, 4, 5, 6), (1, 2))
SPACE: dict[str, tuple[int, ...]] = {
    "width.stem": (32, 40),
    **{f"width.{i}": widths for i, widths in enumerate(_WIDTHS, 1)},
    "width.head": (1280, 1408),
    **{f"depth.{i}": depths for i, depths in enumerate(_DEPTHS, 1)},
    **{f"kernel.{i}": (3,) if i < 3 else (3, 5) for i in range(1, 8)},
    "resolution": (192, 224, 288, 320),
}


def bignas(
    network: nn.Module | Callable[..., nn.Module],
    data: Any,
    *,
    space: Mapping[str, Any] | Space,
    budget: str | Budget | None = None,
    n: int = 2,
    smoothing: float = 0.1,
    temperature: float = 1.0,
    zero_gamma: bool | None = None,
    warmup: float = 5 / 360,
    decay: float = 0.97,
    every: float = 2.4 / 360,
    floor: float = 0.05,
    sched: str | Callable[[float], float] | None = None,
    weight_decay: float = 1e-5,
    clip_grad: float | None = 5.0,
    order: str | None = "norm",
    rules: Mapping[str, Rule] | None = None,
    epochs: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    **training: Any,
) -> Trained:
    """A supernet of any network (or of a builder), trained in one stage; `.best("latency<=2ms")` gives a network of it.

    Args:
        network, space, order, rules: as for `elastic`. The network is copied.
        data: a `Data` to train on.
        budget: what networks will be asked for; refused before training if the smallest cannot meet it.
        n: random networks in each step, besides the biggest and the smallest.
        smoothing: of the labels that the biggest learns.
        temperature: of the softmax that the others learn from it.
        zero_gamma: let residual branches start at zero (`silence`). By default only in a network whose batch norms
            have seen nothing yet, because what was learned would be lost.
        warmup: share of the run. decay: factor on the learning rate for each share `every` of the run after it; the
            paper's run has 360 epochs. floor: share of the peak below which it does not fall.
        sched: another schedule instead, as for `fit`; "onecycle" is better in runs of a few epochs.
        clip_grad: largest norm of a step's gradient, all networks together.
        out: folder of the checkpoint; what was interrupted goes on there, to the same result.
        **training: as for `fit`.

    Raises:
        ValueError: an argument makes no sense. SurgeryError: see `elastic`.
        BudgetError: no network of the space can meet the budget.
        KeyboardInterrupt: training was interrupted; what `out` has is resumed by the same call.

    >>> import trimtab as tt
    >>> data = tt.load_data("digits", limit=200)
    >>> net = tt.create_model("trim_10k", num_classes=10, in_chans=1, img_size=8)
    >>> family = bignas(net, data, space={"width": (0.5, 1)}, epochs=1, batch_size=32, progress=False)
    >>> small = family.best("macs<=60%", evaluations=2)
    >>> tt.measure(small, (1, 8, 8)).macs < 0.6 * tt.measure(net, (1, 8, 8)).macs
    True
    """
    own = schedule(warmup=warmup, decay=decay, every=every, floor=floor)
    net = elastic(network, data, space, order=order, rules=rules, seed=seed)
    if zero_gamma or (zero_gamma is None and _is_new(net.model)):
        silence(net.model, data)
    objective = net.objective("sandwich", n=n, smoothing=smoothing, temperature=temperature, seed=seed)
    return train(
        net, data, objective, budget=budget, out=out, epochs=epochs, seed=seed, sched=sched or own,
        weight_decay=weight_decay, clip_grad=clip_grad, **training,
    )  # fmt: skip


def schedule(
    *, warmup: float = 5 / 360, decay: float = 0.97, every: float = 2.4 / 360, floor: float = 0.05
) -> Schedule:
    """The learning rate (Section 3.1): linear warm-up, exponential decay, and a floor that it keeps to the end.

    >>> lr = schedule(warmup=0.0, every=2.4 / 500)
    >>> round(lr(2.4 / 500), 3), lr(236.06 / 500), lr(1.0)
    (0.97, 0.05, 0.05)
    """
    for name, value in (("decay", decay), ("every", every)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {value}")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be a share of the peak, in [0, 1], got {floor}")
    return Schedule("exponential", end=decay ** ((1 - warmup) / every), warmup=warmup, least=floor)


@torch.no_grad()
def silence(model: nn.Module, data: Any) -> list[str]:
    """Set the last norm of every residual branch to zero, so that each such block is the identity (Section 3.1).

    A block is a module that gives its input back when its last batch norm is zero; nothing needs to say so.

    Args:
        data: a `Data`, or the size (C, H, W) of the images.

    Returns:
        The names of the norms.
    """
    entered: dict[str, Tensor] = {}
    silent = []
    with eval_mode(model), ExitStack() as hooks:
        for name, module in model.named_modules():
            if name and _norms(module):

                def note(module: nn.Module, args: tuple[Any, ...], out: Any, name: str = name) -> None:
                    if len(args) == 1 and isinstance(args[0], Tensor) and args[0].shape == getattr(out, "shape", None):
                        entered[name] = args[0]

                hooks.callback(module.register_forward_hook(note).remove)
        model(torch.rand_like(example_of(data, model)))
        hooks.close()
        for name, x in entered.items():
            block = model.get_submodule(name)
            for inner, norm in reversed(_norms(block).items()):
                kept = norm.weight.clone(), norm.bias.clone()
                nn.init.zeros_(norm.weight), nn.init.zeros_(norm.bias)
                if torch.allclose(block(x.clone()), x, atol=1e-5):  # blocks may work in place
                    silent.append(f"{name}.{inner}")
                    break
                norm.weight.copy_(kept[0]), norm.bias.copy_(kept[1])
    return list(dict.fromkeys(silent))  # of a container it is that of its last block


def _norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """Batch norms inside a module that have weights, by name."""
    return {n: m for n, m in module.named_modules() if n and isinstance(m, _BatchNorm) and m.affine}


def mobile(
    *, num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.2, se_of: str = "input", **genes: int
) -> MBConvNet:
    """The paper's network (Table 1) for genes as in `SPACE`, for images of 192 to 320 pixels.

    MBConv blocks with squeeze-and-excitation and swish; expansion 1 in the first stage, 6 in the others; a shortcut in
    every block (average pooling and a 1x1 convolution where the shape changes); residual branches that start at zero.

    Args:
        se_of: squeeze to a quarter of the block's "input" (as EfficientNet; the paper's sizes) or of its "expanded"
            channels (as community code does).
    """
    strides = (1, 2, 2, 2, 1, 2, 1)
    stages = [
        {
            "width": genes[f"width.{i}"], "depth": genes[f"depth.{i}"], "kernel": genes[f"kernel.{i}"],
            "expand": 1 if i == 1 else 6, "stride": stride, "se": True,
        }
        for i, stride in enumerate(strides, 1)
    ]  # fmt: skip
    return MBConvNet(
        stem=genes["width.stem"], stages=stages, neck=genes["width.head"], se_of=se_of, drop_rate=drop_rate,
        num_classes=num_classes, in_chans=in_chans,
    )  # fmt: skip


def _is_new(model: nn.Module) -> bool:
    """No batch norm has counted a batch."""
    counts = [m.num_batches_tracked for m in model.modules() if isinstance(m, _BatchNorm)]
    return not any(n is not None and int(n) for n in counts)
