"""Sparse 1x1 convolutions that are really faster: gradual magnitude pruning, then kernels that skip the zeros.

MobileNet-like networks spend nine tenths of their multiply-adds in 1x1 convolutions. Each becomes sparse (70 to 95 %,
the same share in every layer) while it trains: the smallest weights are masked, more and more of them along a cubic
schedule, and may come back as long as the schedule runs. The result holds `SparseConv1x1` layers (`trimtab.nn.sparse`),
which store and multiply with what is left only.

Sparse are 1x1 convolutions with stride 1, no padding and no groups; dense stay all other layers, and 1x1 convolutions
on a single pixel (squeeze-excite), as in the paper. Different from the paper:

- EfficientNet's classifier stays dense too.
- The runtime chooses per layer, by measuring, between a numba kernel with blocks of 1 or 4 channels, PyTorch's CSR
  product and the dense convolution, where XNNPACK asks whether two thirds of the weights are zero. Blocks of 2 have
  no kernel of their own.
- Masks are updated `updates` times during the ramp, whatever the number of steps, because small data have few steps.
- After the ramp the masks stay, so that the last weights are trained for the network that is delivered.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.card import Card, Claim
from trimtab.core.cost import ROOT, measure
from trimtab.core.edit import Edit, Remove, Replace, apply, history
from trimtab.core.errors import SurgeryError
from trimtab.core.example import size_of
from trimtab.learn import Batch, Classify, Context, convert, fit
from trimtab.learn.objective import Losses
from trimtab.nn.sparse import BLOCKS, SparseConv1x1, densify, kernel

CARD = Card(
    slug="fast_sparse_convnets",
    title="Fast Sparse ConvNets",
    arxiv="1911.09723",
    year=2019,
    kind="surgery",
    tasks=("classify", "deploy"),
    claims=(
        Claim(
            "real_speed",
            "70-95% sparse 1x1 convolutions run faster than dense ones with a channel-major (CHW) SpMM; sparse "
            "MobileNet/EfficientNet are 1.3-2.4x faster than dense models of equal accuracy on a Snapdragon 835",
        ),
        Claim(
            "accuracy_at_size",
            "Wide-and-sparse beats narrow-and-dense at equal cost: MobileNetV1 1.4x at 90% reaches 72.0%, MobileNetV2 "
            "1.8x at 80% 74.9%",
        ),
        Claim("blocks", "Output-channel blocks of 2 or 4 in the late layers add speed for little accuracy"),
    ),
)
_SPARSE = "trimtab.nn.sparse.SparseConv1x1"


def fast_sparse_convnets(
    model: nn.Module,
    data: Any,
    *,
    sparsity: float = 0.9,
    block: int = 1,
    late: float = 0.4,
    epochs: int = 10,
    start: float = 0.25,
    end: float = 0.75,
    updates: int = 50,
    smoothing: float = 0.1,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    **training: Any,
) -> nn.Module:
    """A copy of `model` whose 1x1 convolutions are sparse; the model itself stays as it is.

    The copy trains on with the zeros fixed (`tt.fit`). To let weights come back, call this on it again: layers that are
    sparse already start dense, with zeros.

    Args:
        data: a `Data` to train on; with ``epochs=0``, an input size (C, H, W) will do.
        sparsity: share of zeros in every 1x1 convolution, above 0 and below 1.
        block: output channels that share their zeros, in the late layers: 1, 2 or 4.
        late: share of the 1x1 convolutions, counted from the end, that are late.
        epochs: of training; 0 drops the smallest weights at once.
        start, end: where the ramp of the sparsity begins and ends, as shares of the training.
        updates: how often the masks are chosen anew during the ramp.
        smoothing: of the labels.
        out: folder for the checkpoint. resume: go on from the one that is there after an interruption.
        **training: further arguments of `tt.fit`, such as ``lr`` and ``batch_size``.

    Raises:
        KeyboardInterrupt: the training was interrupted; the same call goes on with what `out` has.
        ValueError: an argument does not fit.
        SurgeryError: the model has no 1x1 convolution that can be sparse.

    >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 1))
    >>> fast_sparse_convnets(net, (3, 8, 8), epochs=0)[2]
    SparseConv1x1(16, 32, sparsity=0.900, bias=True)
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise ValueError(f"epochs must be a whole number, 0 or more, got {epochs!r}")
    if wrong := {"keep", "patience"} & set(training):
        raise ValueError(f"{wrong.pop()} must not be given: only the last weights have the sparsity that is asked for")
    objective = MagnitudeSchedule(
        sparsity=sparsity, block=block, late=late, start=start, end=end, updates=updates, smoothing=smoothing
    )
    if epochs and not hasattr(data, "splits"):
        raise ValueError(f"data must be a Data to train on, or epochs 0, got {type(data).__name__} and {epochs}")
    net = densify(model)
    convs = _convs(net, _size(data), block, late)
    if not epochs:
        return _sparse(net, {name: keep_largest(conv.weight.detach(), sparsity, b) for name, conv, b in convs}, convs)
    result = fit(
        net, data, objective, epochs=epochs, seed=seed, out=out, resume=resume, progress=progress, keep="last",
        **training,
    )  # fmt: skip
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    return _sparse(net, objective.kept, convs)


def plan(model: nn.Module, data: Any, *, sparsity: float = 0.9, block: int = 1, late: float = 0.4) -> list[Edit]:
    """The edits that `fast_sparse_convnets` makes: they do not depend on training, the weights do. Arguments as there.

    >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 1))
    >>> plan(net, (3, 8, 8))[0].kwargs["nonzeros"]
    51
    """
    _check_sparsity(sparsity)
    net = densify(model)
    edits = history(net).edits[len(history(model).edits) :]
    for name, conv, b in _convs(net, _size(data), block, late):
        blocks, singles = _units((conv.out_channels, conv.in_channels), sparsity, b)
        edits.append(_replace(name, conv, blocks * b + singles, b, bias=conv.bias is not None))
    return edits


# --------------------------------------------------------------------------------------------------------------- masks


def schedule(progress: float, *, sparsity: float, start: float = 0.25, end: float = 0.75) -> float:
    """The cubic ramp: s = s_f (1 - (1 - (t - t_0) / (t_1 - t_0))^3); `progress`, `start`, `end` are shares of the run.

    >>> schedule(0.5, sparsity=1.0)  # half way up
    0.875
    """
    ramp = min(max((progress - start) / (end - start), 0.0), 1.0)
    return sparsity * (1 - (1 - ramp) ** 3)


def keep_largest(weight: Tensor, sparsity: float, block: int = 1) -> Tensor:
    """Which weights stay: (C_out, C_in) or (C_out, C_in, 1, 1) -> bool (C_out, C_in).

    A block of `block` output channels at one input channel is scored by its mean |w| and stays or goes as a whole; the
    C_out mod block channels that are left over are chosen one by one. At least one unit stays.

    >>> keep_largest(torch.tensor([[3.0, 0.1], [0.2, 0.1]]), 0.5, block=2)
    tensor([[ True, False],
            [ True, False]])
    """
    size = weight.flatten(1).abs()
    body = len(size) // block * block
    parts = size[:body].unflatten(0, (-1, block)).mean(1) if body else size[:0], size[body:]
    kept = [_top(p, n) for p, n in zip(parts, _units(size.shape, sparsity, block))]
    return torch.cat([kept[0].repeat_interleave(block, 0), kept[1]])


def _top(score: Tensor, count: int) -> Tensor:
    order = score.flatten().argsort(descending=True, stable=True)
    on = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    on[order[:count]] = True
    return on.view_as(score)


def _units(shape: Sequence[int], sparsity: float, block: int) -> tuple[int, int]:
    """How many blocks and how many single weights stay of (C_out, C_in)."""
    out_channels, in_channels = shape
    blocks, singles = out_channels // block * in_channels, out_channels % block * in_channels
    kept = round(blocks * (1 - sparsity)), round(singles * (1 - sparsity))
    return kept if any(kept) else (min(blocks, 1), 0 if blocks else 1)


# ------------------------------------------------------------------------------------------------------------ training


class MagnitudeSchedule(Classify):
    """Cross-entropy on a network whose 1x1 convolutions lose their smallest weights along the cubic ramp.

    The forward pass sees masked weights; the gradient goes straight through to all of them, so that a masked weight
    goes on changing and comes back when the next mask is chosen. At the end the model is the plain one it was, with
    zeros; `kept` has the masks. Arguments as for `fast_sparse_convnets`.
    """

    def __init__(
        self,
        *,
        sparsity: float = 0.9,
        block: int = 1,
        late: float = 0.4,
        start: float = 0.25,
        end: float = 0.75,
        updates: int = 50,
        smoothing: float = 0.1,
    ) -> None:
        super().__init__(smoothing=smoothing)
        _check_sparsity(sparsity)
        _check_blocks(block, late)
        if not 0 <= start < end <= 1:
            raise ValueError(f"start and end must be shares of the training, 0 <= start < end <= 1, got {start}, {end}")
        if not isinstance(updates, int) or updates < 1:
            raise ValueError(f"updates must be a positive integer, got {updates!r}")
        self.sparsity, self.block, self.late = sparsity, block, late
        self.start, self.end, self.updates = start, end, updates
        self.kept: dict[str, Tensor] = {}
        self._layers: dict[str, _Masked] = {}
        self._restore: Callable[[], nn.Module] | None = None
        self._done = 0  # updates

    def setup(self, model: nn.Module, batch: Batch) -> None:
        super().setup(model, batch)
        convs = _convs(model, tuple(batch["image"].shape[1:]), self.block, self.late)
        self._layers = {name: _Masked(conv, block) for name, conv, block in convs}
        masked: dict[int, nn.Module] = {id(conv): self._layers[name] for name, conv, _ in convs}
        self._restore = convert(model, {nn.Conv2d: lambda conv: masked.get(id(conv), conv)})

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        ramp = (ctx.progress - self.start) / (self.end - self.start)
        due = int(min(max(ramp, 0.0), 1.0) * self.updates)
        if due > self._done:
            self._done = due
            at = self.start + (self.end - self.start) * due / self.updates
            for layer in self._layers.values():
                layer.choose(schedule(at, sparsity=self.sparsity, start=self.start, end=self.end))
        ctx.log("sparsity", self._sparsity())
        return super().losses(model, batch, ctx)

    def finish(self, model: nn.Module) -> nn.Module:
        for name, layer in self._layers.items():
            if int(layer.mask.sum()) != layer.count(self.sparsity):  # the training was cut short
                layer.choose(self.sparsity)
            with torch.no_grad():
                layer.weight.mul_(layer.mask[:, :, None, None])
            self.kept[name] = layer.mask
        self._layers = {}
        return model if self._restore is None else self._restore()

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done = int(state["done"])

    def _sparsity(self) -> Tensor:
        """Share of masked weights now."""
        masks = [layer.mask for layer in self._layers.values()]
        return 1 - torch.stack([m.sum() for m in masks]).sum() / sum(m.numel() for m in masks)


class _Masked(nn.Module):
    """A 1x1 convolution with a mask over its weights, sharing the parameters of `conv`; lives during training only."""

    mask: Tensor

    def __init__(self, conv: nn.Conv2d, block: int) -> None:
        super().__init__()
        self.weight, self.bias, self.block = conv.weight, conv.bias, block
        self.register_buffer("mask", torch.ones(self.weight.shape[:2], dtype=torch.bool, device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        masked = w + (w * self.mask[:, :, None, None] - w).detach()  # straight through: the gradient of all weights
        return F.conv2d(x, masked, self.bias)

    def choose(self, sparsity: float) -> None:
        """In place: a moving average of the model has a mask of its own, which is copied from this one."""
        self.mask.copy_(keep_largest(self.weight.detach(), sparsity, self.block))

    def count(self, sparsity: float) -> int:
        blocks, singles = _units(self.mask.shape, sparsity, self.block)
        return blocks * self.block + singles


# ------------------------------------------------------------------------------------------------------------- surgery


def fold(model: nn.Module, data: Any) -> nn.Module:
    """A copy of a sparse model for running only: batch norms and ReLUs behind sparse layers become part of them.

    Scaling rows keeps zeros zero. What is folded is found by running the model and checked by running it again.

    Args:
        data: a `Data` or an input size (C, H, W).

    Raises:
        SurgeryError: the folded model computes something else.

    >>> net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU6())
    >>> fold(fast_sparse_convnets(net, (4, 8, 8), sparsity=0.5, epochs=0), (4, 8, 8))
    Sequential(
      (0): SparseConv1x1(4, 8, sparsity=0.500, act='relu6', bias=True)
      (1): Identity()
      (2): Identity()
    )
    """
    net = copy.deepcopy(model).eval()
    like = next(net.parameters())
    x = torch.randn(2, *_size(data), generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    hooks = [
        m.register_forward_hook(lambda m, given, y, n=n: calls.setdefault(n, []).append((given[0], y)))
        for n, m in net.named_modules()
        if isinstance(m, SparseConv1x1 | nn.BatchNorm2d | nn.ReLU | nn.ReLU6)
    ]
    with torch.no_grad(), kernel("dense"):
        want = net(x).clone()
    for hook in hooks:
        hook.remove()
    edits, weights = _folding(net, {n: c[0] for n, c in calls.items() if len(c) == 1})
    folded = apply(net, edits, weights=weights)
    with torch.no_grad(), kernel("dense"):
        error = ((folded(x) - want).abs().max() / want.abs().max().clamp_min(1e-6)).item()
    if not error < 1e-3:
        raise SurgeryError(f"folding batch norms changes what the model computes (by {error:.2g} of the largest value)")
    return folded.train(model.training)


def _folding(net: nn.Module, calls: dict[str, tuple[Tensor, Tensor]]) -> tuple[list[Edit], dict[str, Tensor]]:
    """The edits for every sparse layer whose output goes into a batch norm. `calls` has the modules that run once."""
    layers = dict(net.named_modules())
    reads = {id(x): n for n, (x, _) in reversed(calls.items()) if isinstance(layers[n], nn.BatchNorm2d)}
    acts = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
    clamps = {id(x): n for n, (x, _) in reversed(calls.items()) if type(layers[n]) in acts}
    edits: list[Edit] = []
    weights: dict[str, Tensor] = {}
    for name, (_, y) in calls.items():
        layer, norm_name = layers[name], reads.get(id(y))
        if not isinstance(layer, SparseConv1x1) or layer.act is not None or norm_name is None:
            continue
        norm = layers[norm_name]
        inside: Any = getattr(norm, "act", None)  # timm's batch norms bring their activation along
        if inside is not None and type(inside) not in (*acts, nn.Identity):
            continue
        behind = clamps.get(id(calls[norm_name][1])) if inside is None else None
        act = acts.get(type(inside if behind is None else layers[behind]))
        scale, shift = _scale_and_shift(norm)
        bias = 0 if layer.bias is None else layer.bias.detach()
        scaled = copy.deepcopy(layer)
        scaled.fill(layer.weight[:, :, 0, 0] * scale[:, None], layer.keep)
        edits.append(_replace(name, layer, layer.values.numel(), layer.block, bias=True, act=act))
        edits += [Remove(norm_name), *([Remove(behind)] if behind else [])]
        weights |= {f"{name}.values": scaled.values, f"{name}.mask": layer.mask, f"{name}.bias": shift + scale * bias}
    return edits, weights


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as y = scale * x + shift."""
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


def _sparse(net: nn.Module, kept: Mapping[str, Tensor], convs: Sequence[tuple[str, nn.Conv2d, int]]) -> nn.Module:
    """`net` with its convolutions replaced by sparse ones of the weights that `kept` says."""
    edits: list[Edit] = []
    weights: dict[str, Tensor] = {}
    for name, conv, block in convs:
        layer = SparseConv1x1.of(conv, kept[name], block=block)
        edits.append(_replace(name, conv, layer.values.numel(), block, bias=conv.bias is not None))
        weights |= {f"{name}.{k}": v for k, v in layer.state_dict().items()}
    return apply(net, edits, weights=weights)


def _replace(
    name: str, conv: nn.Conv2d | SparseConv1x1, nonzeros: int, block: int, *, bias: bool, act: str | None = None
) -> Replace:
    kwargs: dict[str, Any] = {"in_channels": conv.in_channels, "out_channels": conv.out_channels, "nonzeros": nonzeros}
    kwargs |= {"bias": bias} | ({"block": block} if block > 1 else {}) | ({"act": act} if act else {})
    return Replace(name, _SPARSE, kwargs)


def _convs(model: nn.Module, size: tuple[int, ...], block: int, late: float) -> list[tuple[str, nn.Conv2d, int]]:
    """The 1x1 convolutions that become sparse, in the order of the modules, each with its block.

    Raises:
        SurgeryError: there is none.
    """
    _check_blocks(block, late)
    layers = measure(model, size, per_layer=True, what="macs").layers
    pixels = {row.name: row.activations // m.out_channels for row in layers if (m := _conv_1x1(model, row.name))}
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = [(n, _conv_1x1(model, n)) for n, count in pixels.items() if count > 1]
    convs = [(n, conv) for n, conv in found if conv is not None and uses[id(conv.weight)] == 1]
    if not convs:
        raise SurgeryError(
            f"{type(model).__name__} has no 1x1 convolution to make sparse (stride 1, no padding, no groups, on more "
            "than one pixel)"
        )
    first = len(convs) - math.ceil(late * len(convs))
    return [(n, conv, block if i >= first else 1) for i, (n, conv) in enumerate(convs)]


def _conv_1x1(model: nn.Module, name: str) -> nn.Conv2d | None:
    conv = model.get_submodule(name) if name and name != ROOT else None
    if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward:
        return None
    plain = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding in ((0, 0), "valid", "same")
    return conv if plain and conv.groups == 1 else None


def _size(data: Any) -> tuple[int, ...]:
    size = size_of(data)
    if size is None:
        raise ValueError(f"data must be a Data or an input size (channels, height, width), got {data!r:.80}")
    return size


def _check_sparsity(sparsity: float) -> None:
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity must be above 0 and below 1, got {sparsity!r}")


def _check_blocks(block: int, late: float) -> None:
    if block not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(map(str, BLOCKS))}, got {block!r}")
    if not 0 <= late <= 1:
        raise ValueError(f"late must be a share from 0 to 1, got {late!r}")
