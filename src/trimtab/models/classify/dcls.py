"""DCLS: convolutions that learn where their weights are, not only how large they are.

Khalfaoui-Hassani, Pellegrini, Masquelier, "Dilated convolution with learnable spacings", arXiv 2112.03740, and
"Dilated Convolution with Learnable Spacings: beyond bilinear interpolation", arXiv 2306.00817. A few weights in a large
window, each at a real-valued position that is learned: interpolation spreads a weight over the cells next to it, which
makes the kernel differentiable in the positions. After training the kernel is constant, and the layer an ordinary
convolution (`trimtab.compress.merge`).

`DCLS1d`, `DCLS2d`, `DCLS3d` are the layers; `dcls` is the surgery that puts them in the place of the depthwise
convolutions of any model, as ConvNeXt-dcls does, with positions shared among the layers of a stage. The paper's rules
of training come with the layer: positions are clamped to the window before each training pass, whatever loop trains
them, and `tt.fit` gives them five times the learning rate and no weight decay. `trimtab.learn.Repulsion` is the loss
that keeps them apart.

What differs from the paper or its code:

- Positions are (row, column) relative to the window's centre in all versions; the code swaps them in some.
- All versions are products of one factor per axis, so the kernel is a product of matrices, without a tensor of
  window x weights; with "v0" and "v1" the derivative at a whole-numbered position is that to its right, as there.
- The width of "max" starts where |sigma| has no derivative; it is taken to be 1 there, or it would never move.
- Windows are odd.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any, ClassVar

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.card import Card, Claim
from trimtab.core.edit import Replace, Tie, apply
from trimtab.core.errors import SurgeryError
from trimtab.nn.merge import Plain, depthwise, plain_conv

CARD = Card(
    slug="dcls",
    title="Dilated convolution with learnable spacings",
    arxiv="2112.03740",
    year=2021,
    kind="block",
    tasks=("classify",),
    claims=(
        Claim(
            "iso_params",
            "Drop-in replacement of ConvNeXt's 7x7 depthwise convolutions (49 weights) by DCLS with 34-40 weights in a "
            "17x17 window raises ImageNet top-1 at equal parameters: T 82.1->82.5, S 83.1->83.7, B 83.8->84.1",
        ),
        Claim("learns_positions", "Positions are learned by backpropagation through interpolation"),
        Claim(
            "beats_fixed_dilation",
            "Classic dilated convolution at the same receptive field is worse than both the dense baseline and DCLS",
        ),
        Claim(
            "foldable",
            "After training the kernel is constant: DCLS is exactly an ordinary convolution of the dilated size",
        ),
    ),
)

VERSIONS = ("v0", "v1", "max", "gauss")
_WIDTH = {"max": 1.0, "gauss": 0.27}  # least width of the interpolation, in cells; |sigma| comes on top
_SIGMA = {"max": 0.0, "gauss": 0.23}  # where sigma starts


def construct(
    weight: Tensor,
    positions: Tensor | Sequence[Tensor],
    size: Sequence[int],
    *,
    version: str = "v0",
    sigma: Tensor | None = None,
) -> Tensor:
    """The dense kernel (C_out, C_in / groups, *size) of weights at real-valued positions.

    Args:
        weight: (C_out, C_in / groups, K).
        positions: (axes, C_out, C_in / groups, K), in cells from the centre of the window.
        size: of the window, odd, one number per axis.
        version: "v0" spreads a weight over its neighbours (2 per axis), what falls outside is lost; "v1" the same,
            but nothing is lost; "max" (triangles) and "gauss" have learned widths.
        sigma: like positions, for "max" and "gauss": widths are 1 + |sigma| and 0.27 + |sigma| cells.

    >>> construct(torch.ones(1, 1, 1), torch.tensor([0.0, 0.25]).view(2, 1, 1, 1), (3, 3))[0, 0]
    tensor([[0.0000, 0.0000, 0.0000],
            [0.0000, 0.7500, 0.2500],
            [0.0000, 0.0000, 0.0000]])
    """
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
    axes = []
    for i, cells in enumerate(size):
        p = (positions[i] + cells // 2).unsqueeze(-1)  # (C_out, C_in / g, K, 1)
        grid = torch.arange(cells, device=p.device, dtype=p.dtype)
        if version in ("v0", "v1"):
            low = p.detach().floor()
            right = p - low
            axes.append((grid == low) * (1 - right) + (grid == low + 1) * right)
            continue
        if sigma is None:
            raise ValueError(f"sigma must be given with version={version!r}, got None")
        wide = torch.where(sigma[i] < 0, -sigma[i], sigma[i]).unsqueeze(-1) + _WIDTH[version]
        away = (grid - p).abs()
        axes.append(F.relu(wide - away) if version == "max" else torch.exp(-0.5 * (away / wide) ** 2))
    if version != "v0":
        total = torch.stack([a.sum(-1) for a in axes]).prod(0)
        weight = weight / (total + 1e-7)
    left = weight.unsqueeze(-1)  # (C_out, C_in / g, K, 1)
    for a in axes[:-1]:
        left = (left.unsqueeze(-1) * a.unsqueeze(-2)).flatten(-2)
    return (left.transpose(-1, -2) @ axes[-1]).reshape(*weight.shape[:2], *size)


class _DCLS(nn.Module):
    """What the layers have in common; see `DCLS2d`."""

    axes: ClassVar[int]
    lr_scales: ClassVar[dict[str, float]] = {"positions": 5.0}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_count: int,
        dilated_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
        groups: int = 1,
        bias: bool = True,
        version: str = "v0",
    ) -> None:
        super().__init__()
        self.size = _each(dilated_size, self.axes)
        if len(self.size) != self.axes or any(s < 1 or s % 2 == 0 for s in self.size):
            raise ValueError(f"dilated_size must be odd, one number or {self.axes}, got {dilated_size!r}")
        if not 1 <= kernel_count <= math.prod(self.size):
            raise ValueError(f"kernel_count must be 1 to {math.prod(self.size)} in this window, got {kernel_count}")
        if version not in VERSIONS:
            raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups must divide {in_channels} and {out_channels} channels, got {groups}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.stride = _each(stride, self.axes)
        self.padding = tuple(s // 2 for s in self.size) if padding is None else _each(padding, self.axes)
        self.version = version
        shape = (out_channels, in_channels // groups, kernel_count)
        self.weight = nn.Parameter(torch.empty(shape))
        self.positions = nn.Parameter(torch.empty(self.axes, *shape))
        self.sigma = nn.Parameter(torch.empty(self.axes, *shape)) if version in _SIGMA else None
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights as those of other convolutions, positions around the centre."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # fan-in C_in / groups * K
        if self.bias is not None:
            bound = (self.weight.shape[1] * self.weight.shape[2]) ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.normal_(self.positions, std=0.5)
        self.clamp_positions()
        if self.sigma is not None:
            nn.init.constant_(self.sigma, _SIGMA[self.version])

    def no_weight_decay(self) -> set[str]:
        """Names that weight decay would pull to the centre."""
        return {"positions", "sigma"}

    def clamp_positions(self) -> None:
        """Put positions that left the window on its border. `.data`: tied layers may be in the graph already."""
        for p, cells in zip(self.positions.data, self.size):
            p.clamp_(-(cells // 2), cells // 2)

    def kernel(self) -> Tensor:
        """The dense kernel (C_out, C_in / groups, *size), computed in float32 at least."""
        device = self.weight.device.type
        casting = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if casting else nullcontext():  # 16 bits would move positions
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            given = self.positions.to(dtype)  # on the border, `clamp` alone would have no gradient
            inside = [p + (p.clamp(-(c // 2), c // 2) - p).detach() for p, c in zip(given, self.size)]
            sigma = None if self.sigma is None else self.sigma.to(dtype)
            dense = construct(self.weight.to(dtype), inside, self.size, version=self.version, sigma=sigma)
        return dense.to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.clamp_positions()
        conv: Any = (F.conv1d, F.conv2d, F.conv3d)[self.axes - 1]
        return conv(x, self.kernel(), self.bias, self.stride, self.padding, 1, self.groups)

    @torch.no_grad()
    def merged_parts(self) -> dict[str, Plain | None]:
        return {"": plain_conv(self.kernel(), self.bias, stride=self.stride, padding=self.padding, groups=self.groups)}

    def extra_repr(self) -> str:
        k = self.weight.shape[-1]
        return f"{self.in_channels}, {self.out_channels}, {k} in {'x'.join(map(str, self.size))}, groups={self.groups}"


class DCLS1d(_DCLS):
    """Over sequences (B, C, L); see `DCLS2d`."""

    axes = 1


class DCLS2d(_DCLS):
    """A convolution (B, C_in, H, W) -> (B, C_out, H', W') with a few weights in a window, at learned positions.

    Args:
        kernel_count: weights K of each pair of an output channel and an input channel of its group.
        dilated_size: odd side of the window, or one number per axis.
        stride, groups, bias: as those of `nn.Conv2d`.
        padding: default: half the window, which keeps the size of the map.
        version: of the interpolation, see `construct`.

    Parameters: `weight` (C_out, C_in / groups, K), `positions` (axes, C_out, C_in / groups, K), for "max" and "gauss"
    `sigma` like positions, `bias` (C_out).

    >>> layer = DCLS2d(4, 4, 5, 9, groups=4)
    >>> sum(p.numel() for p in layer.parameters()), layer(torch.zeros(2, 4, 8, 8)).shape
    (64, torch.Size([2, 4, 8, 8]))
    """

    axes = 2


class DCLS3d(_DCLS):
    """Over volumes (B, C, D, H, W); see `DCLS2d`."""

    axes = 3


LAYERS: dict[type[nn.Module], type[_DCLS]] = {nn.Conv1d: DCLS1d, nn.Conv2d: DCLS2d, nn.Conv3d: DCLS3d}


def repulsion(model: nn.Module) -> Tensor:
    """How crowded the positions are: the mean of max(0, 1 - distance) over pairs, of all distinct positions.

    Raises:
        ValueError: the model has no such layer.

    >>> layer = DCLS2d(1, 1, 2, 9)
    >>> layer.positions.data = torch.tensor([[0.0, 0.0], [0.0, 0.25]]).view(2, 1, 1, 2)
    >>> repulsion(layer).item()
    0.75
    """
    distinct = {id(m.positions): m.positions for m in model.modules() if isinstance(m, _DCLS)}
    if not distinct:
        raise ValueError(f"{type(model).__name__} has no layer with learnable spacings")
    return torch.stack([_crowding(p) for p in distinct.values()]).mean()


def _crowding(p: Tensor) -> Tensor:
    i, j = torch.triu_indices(p.shape[-1], p.shape[-1], offset=1, device=p.device)
    if not len(i):
        return p.sum() * 0
    return F.relu(1 - torch.linalg.vector_norm(p[..., i] - p[..., j], dim=0)).mean()


# ---------------------------------------------------------------------------------------------------------- the surgery


def dcls(
    model: nn.Module,
    data: Any = None,
    *,
    kernel_count: int | None = None,
    dilated_size: int = 17,
    version: str = "v0",
    layers: str | Sequence[str] = "*",
    share: bool = True,
    start: str = "fresh",
    spread: float = 0.5,
    seed: int = 0,
) -> nn.Module:
    """A copy of `model` with DCLS in the place of its depthwise convolutions; its edits are remembered. Train it.

    Args:
        data: not looked at; all methods take it.
        kernel_count: weights per channel; None: as many as give no more parameters than before, positions included.
        dilated_size: odd side of the window.
        version: of the interpolation, see `construct`.
        layers: patterns of the names of the convolutions to replace.
        share: layers of equal width that follow each other, a stage, share their positions.
        start: "fresh": weights from a normal distribution, positions near the centre, as in the paper; "kernel": at
            the strongest weights of the convolution that was there, for models that are trained already.
        spread: standard deviation of fresh positions, in cells. The paper's 0.5 is for long training; in a short one,
            positions come no further than a few cells, and 2 is better.
        seed: of the new weights.

    Raises:
        ValueError: an argument is wrong.
        SurgeryError: there is no such convolution.

    >>> import timm
    >>> net = timm.create_model("convnext_atto", num_classes=10)
    >>> new = dcls(net)
    >>> sum(p.numel() for p in net.parameters()), sum(p.numel() for p in new.parameters())
    (3377730, 3375730)
    """
    edits = plan(model, data, kernel_count=kernel_count, dilated_size=dilated_size, version=version, layers=layers,
                 share=share)  # fmt: skip
    if start not in ("fresh", "kernel"):
        raise ValueError(f"start must be 'fresh' or 'kernel', got {start!r}")
    if spread <= 0:
        raise ValueError(f"spread must be positive, got {spread}")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        changed = apply(copy.deepcopy(model), edits)
        for names in _stages({e.module: model.get_submodule(e.module) for e in edits if isinstance(e, Replace)}, share):
            old: list[Any] = [model.get_submodule(name) for name in names]
            new: list[Any] = [changed.get_submodule(name) for name in names]
            for conv, layer in zip(old, new):
                layer.to(conv.weight)  # the type of the model's weights
            if start == "fresh":
                _start_fresh(new, spread)
            else:
                _start_at_kernel(old, new)
    return changed


def plan(
    model: nn.Module,
    data: Any = None,
    *,
    kernel_count: int | None = None,
    dilated_size: int = 17,
    version: str = "v0",
    layers: str | Sequence[str] = "*",
    share: bool = True,
) -> list[Replace | Tie]:
    """The edits that `dcls` applies; arguments as there."""
    patterns = [layers] if isinstance(layers, str) else list(layers)
    found = {n: c for n, c in depthwise(model).items() if any(fnmatch.fnmatchcase(n, p) for p in patterns)}
    if not found:
        raise SurgeryError(f"{type(model).__name__} has no depthwise convolutions with names like {patterns}")
    count = _affordable(found, version, share) if kernel_count is None else kernel_count
    edits: list[Replace | Tie] = []
    for name, conv in found.items():
        kwargs = {
            "in_channels": conv.in_channels, "out_channels": conv.out_channels, "kernel_count": count,
            "dilated_size": dilated_size, "stride": list(conv.stride), "groups": conv.groups,
            "bias": conv.bias is not None, "version": version,
        }  # fmt: skip
        layer = LAYERS[type(conv)]
        with torch.device("meta"):
            layer(**kwargs)  # whatever is wrong is said here
        edits.append(Replace(name, f"{__name__}.{layer.__qualname__}", kwargs))
    for first, *others in _stages(found, share):
        edits += [Tie(f"{other}.positions", f"{first}.positions") for other in others]
    return edits


def _stages(convs: Mapping[str, Any], share: bool) -> list[list[str]]:
    """Names of convolutions of one width and kernel that follow each other."""
    if not share:
        return [[name] for name in convs]
    return [list(stage) for _, stage in groupby(convs, lambda n: (convs[n].weight.shape, convs[n].dilation))]


def _affordable(convs: Mapping[str, Any], version: str, share: bool) -> int:
    """The largest number of weights per channel with which there are no more parameters than before."""
    before = sum(c.weight.numel() for c in convs.values())
    per_axis = 2 if version in _SIGMA else 1
    each = 0
    for stage in _stages(convs, share):
        axes, width = convs[stage[0]].weight.ndim - 2, convs[stage[0]].out_channels
        own = len(stage) * (1 + axes * (per_axis - 1))  # weights and widths are each layer's own
        each += width * (own + axes)
    return before // each  # at least 1, as kernels have three weights along an axis or more


def _start_fresh(new: Sequence[Any], spread: float) -> None:
    nn.init.normal_(new[0].positions, std=spread)
    new[0].clamp_positions()
    for layer in new:
        trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            layer.bias.zero_()


def _start_at_kernel(old: Sequence[Any], new: Sequence[Any]) -> None:
    """Positions near the strongest taps, on average over the stage: on the grid itself, gradients are one-sided."""
    taps = torch.stack([c.weight.flatten(2) for c in old])  # (layers, C, 1, k^d); the same k throughout a stage
    count = min(new[0].weight.shape[-1], taps.shape[-1])
    best = taps.abs().mean(0).topk(count, dim=-1).indices  # (C, 1, count)
    for axis, at in enumerate(torch.unravel_index(best, old[0].kernel_size)):
        cell = (at - old[0].kernel_size[axis] // 2) * old[0].dilation[axis]
        new[0].positions[axis, ..., :count] = cell + 0.01 * torch.randn(cell.shape, device=cell.device)
    new[0].clamp_positions()
    for conv, layer, tap in zip(old, new, taps):
        layer.weight.zero_()
        layer.weight[..., :count] = tap.gather(-1, best)
        if layer.bias is not None:
            layer.bias.copy_(conv.bias)


def _each(value: Any, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)
