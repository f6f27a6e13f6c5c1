"""`SparseConv1x1`: a 1x1 convolution that stores, and multiplies with, its non-zero weights only.

Stored are one bit per weight (or per block of output channels) and the non-zero weights as a parameter: at 90 %
sparsity 0.13 of the dense bytes. The layer trains like any other, with the zeros fixed; `densify` gives plain
convolutions back, with zeros that may grow again.

At inference on a CPU (float32, no gradients) one of three kernels runs, the one that was fastest when a layer of this
shape first ran in this process: "numba" (`nn.sparse_kernels`, where numba is installed), "csr" (PyTorch's product with
a CSR matrix, where PyTorch has MKL) or "dense" (the ordinary convolution with the zeros filled in). Everywhere else
(training, other devices and types, `torch.compile`, ONNX export) the layer is the ordinary convolution with zeros.
`core.cost.measure` counts the products with non-zero weights, whichever kernel the machine prefers.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from trimtab.core.edit import Edit, Insert, Replace, apply
from trimtab.core.errors import need
from trimtab.core.timing import timed
from trimtab.nn import sparse_kernels

KERNELS = ("numba", "csr", "dense")
BLOCKS = (1, 2, 4)
ACTS: dict[str | None, tuple[float, float]] = {
    None: (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)
}  # fmt: skip
_ACT_LAYERS = {"relu": "torch.nn.ReLU", "relu6": "torch.nn.ReLU6"}
_TRIALS = 7  # timed calls of each kernel when one is chosen
_MOST_IMAGES = 16  # of a batch, in those calls


class SparseConv1x1(nn.Module):
    """A 1x1 convolution with stride 1: (B, C_in, H, W) -> (B, C_out, H, W).

    Weights are kept or dropped in units: with `block` b, output channels b*i to b*i + b - 1 have the same zeros; the
    last C_out mod b channels have their own. A fresh layer has its first units on and all weights zero; it is there to
    be filled, by `fill` or from an artifact.

    Args:
        nonzeros: weights that are stored.
        block: output channels that share their zeros: 1, 2 or 4.
        act: activation behind the bias: None, "relu" or "relu6".

    Attributes:
        values: (nonzeros, 1), the weights of each row of units, by input channel, the b weights of a unit together.
        mask: uint8, one bit per unit in the same order, lowest bit first.

    >>> keep = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) > 0.9
    >>> layer = SparseConv1x1.of(nn.Conv2d(16, 8, 1), keep)
    >>> layer.values.numel(), layer.mask.numel(), layer(torch.ones(1, 16, 4, 4)).shape
    (12, 16, torch.Size([1, 8, 4, 4]))
    """

    mask: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        nonzeros: int,
        block: int = 1,
        bias: bool = True,
        act: str | None = None,
    ):
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("nonzeros", nonzeros)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if block not in BLOCKS:
            raise ValueError(f"block must be one of {', '.join(map(str, BLOCKS))}, got {block!r}")
        if act not in ACTS:
            raise ValueError(f"act must be None, 'relu' or 'relu6', got {act!r}")
        self.in_channels, self.out_channels, self.block, self.act = in_channels, out_channels, block, act
        self.rows = sum(divmod(out_channels, block))  # of units
        # Two dimensions, so that weight decay takes them for the weights that they are.
        self.values = nn.Parameter(torch.zeros(nonzeros, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("mask", _pack_bits(self._first(nonzeros)))
        self._prepared: dict[str, Callable[[Tensor], Tensor]] = {}
        self._state: tuple[int, ...] = ()  # of the weights that the kernels were prepared for

    @classmethod
    def of(cls, conv: nn.Conv2d, keep: Tensor, *, block: int = 1) -> SparseConv1x1:
        """The weights of a 1x1 convolution where `keep` (C_out, C_in) is True; it must be the same within a block."""
        weight = conv.weight.detach()[:, :, 0, 0]
        with torch.device(weight.device):
            layer = cls(
                conv.in_channels, conv.out_channels, nonzeros=int(keep.sum()), block=block, bias=conv.bias is not None
            )
        layer.fill(weight, keep)
        if layer.bias is not None and conv.bias is not None:
            layer.bias.data.copy_(conv.bias.data)
        return layer.train(conv.training)

    @torch.no_grad()
    def fill(self, weight: Tensor, keep: Tensor) -> None:
        """Take over the entries of `weight` (C_out, C_in) where `keep` is True: as many as there are values.

        Raises:
            ValueError: `keep` has another number of entries, or differs within a block.
        """
        if keep.shape != (self.out_channels, self.in_channels) or int(keep.sum()) != self.values.numel():
            raise ValueError(
                f"keep must be ({self.out_channels}, {self.in_channels}) with {self.values.numel()} entries, "
                f"got {tuple(keep.shape)} with {int(keep.sum())}"
            )
        body = self.out_channels // self.block * self.block
        blocks = keep[:body].unflatten(0, (-1, self.block)) if body else keep[:0, None]
        if not torch.equal(blocks.all(1), blocks.any(1)):
            raise ValueError(f"keep must be the same for each block of {self.block} output channels")
        units = torch.cat([blocks.all(1), keep[body:]])
        index, _ = _index(units, self.out_channels, self.block)
        self.mask.copy_(_pack_bits(units.flatten()))
        self.values[index[keep], 0] = weight[keep].to(self.values.dtype)

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The dense weight (C_out, C_in, 1, 1), differentiable; made anew from the values each time."""
        index, on = _index(self.units, self.out_channels, self.block)
        picked = self.values.flatten().index_select(0, index.clamp(min=0).flatten()).view(on.shape)
        return torch.where(on, picked, torch.zeros((), dtype=picked.dtype, device=picked.device))[:, :, None, None]

    @property
    def units(self) -> Tensor:
        """Which units are on: (rows, C_in), a row for each block of output channels and each channel left over."""
        return _unpack_bits(self.mask, self.rows * self.in_channels).view(self.rows, self.in_channels)

    @property
    def keep(self) -> Tensor:
        """Which weights are stored: (C_out, C_in)."""
        return _index(self.units, self.out_channels, self.block)[1]

    @property
    def sparsity(self) -> float:
        """Share of the weights that are not stored."""
        return 1 - self.values.numel() / (self.out_channels * self.in_channels)

    def runtime_bytes(self) -> int:
        """Bytes of the same weights in XNNPACK's packed form: two 32-bit indices per unit, counts, biases, weights."""
        return 2 * 4 * int(self.units.sum()) + 4 * self.rows + 4 * (self.out_channels + self.values.numel())

    def _first(self, nonzeros: int) -> Tensor:
        """The bits of a fresh layer: as many blocks, from the first on, as there are weights for, then single ones."""
        blocks, singles = self.out_channels // self.block * self.in_channels, self.out_channels % self.block
        first = min(nonzeros // self.block, blocks)
        left = nonzeros - first * self.block
        if left > singles * self.in_channels:
            raise ValueError(
                f"nonzeros must be whole blocks of {self.block}, at most {blocks}, and at most "
                f"{singles * self.in_channels} single weights, got {nonzeros}"
            )
        on = torch.zeros(self.rows * self.in_channels, dtype=torch.bool)
        on[:first] = True
        on[blocks : blocks + left] = True
        return on

    def extra_repr(self) -> str:
        more = "".join(f", {n}={v!r}" for n, v in (("block", self.block), ("act", self.act)) if v not in (1, None))
        return (
            f"{self.in_channels}, {self.out_channels}, sparsity={self.sparsity:.3f}{more}, bias={self.bias is not None}"
        )

    # -- running ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if self._dense_only(x):
            return _activate(F.conv2d(x, self.weight, self.bias), self.act)
        if x.shape[1] != self.in_channels:
            raise ValueError(f"input must have {self.in_channels} channels, got shape {tuple(x.shape)}")
        if x.is_meta:
            count = torch.empty(1, dtype=torch.int32, device="meta")
            low, high = ACTS[self.act]
            args = (x, self.values, count, count, self.bias, self.out_channels, self.block, low, high)
            return torch.ops.trimtab.sparse_conv1x1(*args)
        return self._kernel(x)(x)

    def train(self, mode: bool = True) -> SparseConv1x1:
        self._prepared = {}  # whatever was done to the weights behind autograd's back
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": {}}  # a copy makes its own

    def _dense_only(self, x: Tensor) -> bool:
        return (
            (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters())))
            or x.ndim != 4
            or x.dtype != torch.float32
            or self.values.dtype != torch.float32
            or x.device.type not in ("cpu", "meta")
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch.is_autocast_enabled("cpu")
        )

    def _kernel(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        state = (*_version(self.values), *_version(self.mask), *_version(self.bias))
        if state != self._state:
            self._state, self._prepared = state, {}
        name = _forced or self._fastest(x)
        if name not in self._prepared:
            self._prepared[name] = _PREPARE[name](self)
        return self._prepared[name]

    def _fastest(self, x: Tensor) -> str:
        """The fastest kernel for such an input: each is run on its first images, once per kind of layer and size."""
        images = min(len(x), _MOST_IMAGES)
        key = (
            self.out_channels, self.in_channels, self.values.numel(), self.block, self.bias is None, self.act,
            images, *x.shape[2:], torch.get_num_threads(),
        )  # fmt: skip
        if key not in _fastest:
            calls = {name: _PREPARE[name](self) for name in available()}
            times = {n: timed(partial(c, x[:images]), warmup=2, repeats=_TRIALS)[0] for n, c in calls.items()}
            _fastest[key] = min(times, key=lambda name: times[name])
        return _fastest[key]


# ------------------------------------------------------------------------------------------------------------- choosing

_fastest: dict[tuple[Any, ...], str] = {}
_forced: str | None = None


def available() -> tuple[str, ...]:
    """The kernels that can run here: "numba" where it is installed, "csr" where PyTorch has MKL, and "dense"."""
    can = {"numba": importlib.util.find_spec("numba") is not None, "csr": torch.backends.mkl.is_available()}
    return tuple(name for name in KERNELS if can.get(name, True))


@contextmanager
def kernel(name: str | None) -> Iterator[None]:
    """Inside, every `SparseConv1x1` runs this kernel; None lets each layer choose by measurement again.

    Raises:
        MissingExtra: numba is asked for and not installed.
        ValueError: there is no such kernel, or PyTorch was built without what it needs.

    >>> with kernel("dense"):
    ...     y = SparseConv1x1(4, 4, nonzeros=2).requires_grad_(False)(torch.ones(1, 4, 2, 2))
    """
    global _forced
    if name is not None and name not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)} or None, got {name!r}")
    if name == "numba":
        need("numba", sparse_kernels.EXTRA)
    if name is not None and name not in available():
        raise ValueError(f"kernel must be one of {', '.join(available())} here: this PyTorch has no MKL, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def chosen() -> dict[tuple[int, ...], str]:
    """What was fastest so far: (C_out, C_in, nonzeros, block, images, H, W) -> kernel."""
    return {(*k[:4], *k[6:9]): name for k, name in _fastest.items()}


# -------------------------------------------------------------------------------------------------------------- kernels


def _prepare_numba(layer: SparseConv1x1) -> Callable[[Tensor], Tensor]:
    block, values = layer.block, layer.values.detach().flatten()
    units = layer.units
    index, on = _index(units, layer.out_channels, block)
    _check_count(on, values)
    if block == 2:  # no kernel of its own: as single weights
        block, units, values = 1, on, values[index[on]]
    starts, columns = _csr(units)
    bias = torch.zeros(layer.out_channels) if layer.bias is None else layer.bias.detach()
    rest = (values, starts, columns, bias, layer.out_channels, block, *ACTS[layer.act])
    return lambda x: torch.ops.trimtab.sparse_conv1x1(x, *rest)


def _prepare_csr(layer: SparseConv1x1) -> Callable[[Tensor], Tensor]:
    index, on = _index(layer.units, layer.out_channels, layer.block)
    values = layer.values.detach().flatten()
    _check_count(on, values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSR is in beta; our indices are right by construction
        matrix = torch.sparse_csr_tensor(*_csr(on), values[index[on]], size=on.shape)
    bias = None if layer.bias is None else layer.bias.detach()[:, None]

    def run(x: Tensor) -> Tensor:
        images = [matrix @ image for image in x.flatten(2)]  # (C_out, H * W)
        y = images[0][None] if len(images) == 1 else torch.stack(images)
        if bias is not None:
            y += bias
        return _activate(y, layer.act, inplace=True).view(len(x), -1, *x.shape[2:])

    return run


def _prepare_dense(layer: SparseConv1x1) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    return lambda x: _activate(F.conv2d(x, weight, bias), layer.act, inplace=True)


_PREPARE: dict[str, Callable[[SparseConv1x1], Callable[[Tensor], Tensor]]] = {
    "numba": _prepare_numba, "csr": _prepare_csr, "dense": _prepare_dense
}  # fmt: skip

# An operator of our own, so that `measure` and torch's flop counter see the product.
_library = torch.library.Library("trimtab", "FRAGMENT")
_library.define(
    "sparse_conv1x1(Tensor x, Tensor values, Tensor starts, Tensor columns, Tensor? bias, int out_channels, int block,"
    " float low, float high) -> Tensor"
)


def _sparse_conv1x1(
    x: Tensor,
    values: Tensor,
    starts: Tensor,
    columns: Tensor,
    bias: Tensor,
    out_channels: int,
    block: int,
    low: float,
    high: float,
) -> Tensor:
    rows, rows_of_four = sparse_kernels.compiled()
    y = x.new_empty(len(x), out_channels, *x.shape[2:])
    first = starts.numpy()
    args = columns.numpy(), values.numpy(), bias.numpy(), y.flatten(2).numpy()
    pixels, bounds = x.contiguous().flatten(2).numpy(), (np.float32(low), np.float32(high))
    blocks = out_channels // block if block > 1 else 0
    if blocks:
        rows_of_four(pixels, first[: blocks + 1], *args, *bounds)
    if blocks * block < out_channels:
        rows(pixels, first[blocks:], *args, blocks * block, int(first[blocks]) * (block - 1), *bounds)
    return y


def _sparse_conv1x1_meta(x: Tensor, values: Tensor, starts: Any, columns: Any, bias: Any, out: int, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], out, *x.shape[2:])


_library.impl("sparse_conv1x1", _sparse_conv1x1, "CPU")
_library.impl("sparse_conv1x1", _sparse_conv1x1_meta, "Meta")


@register_flop_formula(torch.ops.trimtab.sparse_conv1x1)
def _flops(x: Any, values: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * math.prod(x[2:]) * math.prod(values)


# ---------------------------------------------------------------------------------------------------------- dense again


def densify(model: nn.Module) -> nn.Module:
    """A copy of `model` whose `SparseConv1x1` are plain convolutions with zeros: all weights train, and may come back.

    An activation that was folded into a layer stands behind the convolution again.

    >>> net = nn.Sequential(SparseConv1x1(4, 4, nonzeros=2, act="relu"))
    >>> densify(net)[0]
    Sequential(
      (base): Conv2d(4, 4, kernel_size=(1, 1), stride=(1, 1))
      (act): ReLU()
    )
    """
    edits: list[Edit] = []
    weights: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, SparseConv1x1):
            continue
        kwargs = {"in_channels": layer.in_channels, "out_channels": layer.out_channels, "kernel_size": 1}
        edits.append(Replace(name, "torch.nn.Conv2d", kwargs | {"bias": layer.bias is not None}))
        if layer.act is not None:
            edits.append(Insert(name, "act", _ACT_LAYERS[layer.act]))
            name += ".base"
        weights[f"{name}.weight"] = layer.weight.detach()
        if layer.bias is not None:
            weights[f"{name}.bias"] = layer.bias.detach()
    return apply(copy.deepcopy(model), edits, weights=weights)


# -------------------------------------------------------------------------------------------------------------- helpers


def _index(units: Tensor, out_channels: int, block: int) -> tuple[Tensor, Tensor]:
    """Of each weight (C_out, C_in): its place in the values (meaningless where there is none), and whether it is on.

    Without data-dependent shapes, so that it can be exported and compiled.
    """
    count = units.to(torch.int64)  # an exporter may not add up booleans
    rank = (count.flatten().cumsum(0) - 1).view_as(units)
    body = out_channels // block
    offsets = torch.arange(block, device=units.device)[None, :, None]
    blocks = (rank[:body, None] * block + offsets).flatten(0, 1)
    singles = rank[body:] + count[:body].sum() * (block - 1)
    on = torch.cat([units[:body, None].expand(-1, block, -1).flatten(0, 1), units[body:]])
    return torch.cat([blocks, singles]), on


def _csr(on: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row of a boolean matrix begins, and the columns that are on; int32, which is what MKL and we use."""
    starts = F.pad(on.sum(1).cumsum(0), (1, 0))
    return starts.to(torch.int32), on.nonzero()[:, 1].to(torch.int32).contiguous()


def _check_count(on: Tensor, values: Tensor) -> None:
    if int(on.sum()) != values.numel():
        raise ValueError(
            f"the mask must keep as many weights as there are values ({values.numel()}), got {int(on.sum())}"
        )


def _pack_bits(on: Tensor) -> Tensor:
    """A boolean vector as uint8, eight to a byte, lowest bit first."""
    padded = F.pad(on.to(torch.uint8), (0, -on.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=on.device)).sum(1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits of what `_pack_bits` made, as a boolean vector."""
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.int32, device=packed.device)
    bits = packed[:, None].to(torch.int32).div(powers, rounding_mode="floor") % 2  # shifts cannot be exported
    return bits.flatten()[:count].bool()


def _activate(x: Tensor, act: str | None, *, inplace: bool = False) -> Tensor:
    if act is None:
        return x
    return F.relu(x, inplace=inplace) if act == "relu" else F.relu6(x, inplace=inplace)


def _version(t: Tensor | None) -> tuple[int, int]:
    """Changes whenever the tensor does."""
    return (0, 0) if t is None else (t.data_ptr(), 0 if t.is_inference() else t._version)
