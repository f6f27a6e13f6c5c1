"""Tucker and CP decomposition of convolutions: the baselines of factorization.

- `tucker` (Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications",
  arXiv 1511.06530): 1x1 to few channels, the k x k core between few channels, 1x1 back.
- `cp` (Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition", arXiv 1412.6553):
  1x1 to R channels, k x 1 and 1 x k each on its own channel, 1x1 back.

A 1x1 convolution is a matrix, and becomes the two 1x1 convolutions of its SVD. The decompositions are tensorly's. Every
layer keeps the same share of its weights, the largest with which the budget is met; the papers choose ranks by
variational Bayes (Tucker) and by hand (CP). No training is done here; fine-tune the result, as both papers do.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.compress.factorize.to_budget import bounds_of, chosen, first_that_fits, own_layers, rebuilt
from trimtab.core.budget import Budget
from trimtab.core.edit import Edit, Replace
from trimtab.core.errors import SurgeryError, need

HERE = "trimtab.compress.factorize.convs"
_SHARES = tuple(s / 100 for s in range(100, 0, -1))  # of the weights; 1 leaves the model as it is


class TuckerConv2d(nn.Sequential):
    """A convolution as 1x1, k x k, 1x1 with `ranks` (out, in) channels between; a 1x1 one as 1x1, 1x1 with ranks[1].

    >>> TuckerConv2d(16, 32, 3, ranks=(8, 4), padding=1)(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 32, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        *,
        ranks: Sequence[int],
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ) -> None:
        how: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": padding_mode}
        out, inner = ranks
        layers: dict[str, nn.Module] = {}
        if _pair(kernel_size) == (1, 1):
            layers["reduce"] = nn.Conv2d(in_channels, inner, 1, bias=False, **how)
            layers["expand"] = nn.Conv2d(inner, out_channels, 1, bias=bias)
        else:
            layers["reduce"] = nn.Conv2d(in_channels, inner, 1, bias=False)
            layers["core"] = nn.Conv2d(inner, out, kernel_size, bias=False, **how)
            layers["expand"] = nn.Conv2d(out, out_channels, 1, bias=bias)
        super().__init__(OrderedDict(layers))


class CPConv2d(nn.Sequential):
    """A convolution as 1x1, k x 1 and 1 x k depthwise, 1x1 with `rank` channels between; a 1x1 one as 1x1, 1x1.

    >>> CPConv2d(16, 32, 3, rank=8, padding=1, stride=2)(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 32, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        *,
        rank: int,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ) -> None:
        how: dict[str, Any]
        layers: dict[str, nn.Module] = {}
        if _pair(kernel_size) == (1, 1):
            how = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": padding_mode}
            layers["reduce"] = nn.Conv2d(in_channels, rank, 1, bias=False, **how)
        else:
            (kh, kw), (sh, sw), (dh, dw) = _pair(kernel_size), _pair(stride), _pair(dilation)
            along_h = along_w = padding  # "same" and "valid" are so along each axis
            if not isinstance(padding, str):
                along_h, along_w = (_pair(padding)[0], 0), (0, _pair(padding)[1])
            depthwise: dict[str, Any] = {"groups": rank, "bias": False, "padding_mode": padding_mode}
            layers["reduce"] = nn.Conv2d(in_channels, rank, 1, bias=False)
            layers["vertical"] = nn.Conv2d(rank, rank, (kh, 1), (sh, 1), along_h, (dh, 1), **depthwise)
            layers["horizontal"] = nn.Conv2d(rank, rank, (1, kw), (1, sw), along_w, (1, dw), **depthwise)
        layers["expand"] = nn.Conv2d(rank, out_channels, 1, bias=bias)
        super().__init__(OrderedDict(layers))


def tucker(
    model: nn.Module,
    data: Any,
    *,
    budget: str | Budget = "macs<=50%",
    layers: str | Sequence[str] | None = None,
    min_channels: int = 8,
) -> nn.Module:
    """A copy of `model` whose convolutions are Tucker-2 decompositions, inside the budget; edits are remembered.

    Args:
        data: a `Data`, an input size (C, H, W), an example input, or a tuple or dict of example inputs.
        budget: upper bounds on params, size, macs, bops, activations or memory; a percentage is of the model's own.
        layers: patterns of the convolutions to factorize, such as ``layer3.*``; default: all without groups.
        min_channels: convolutions with fewer channels on either side stay whole, as the first one does.

    Raises:
        BudgetError: the budget cannot be met; says how near it came.
        SurgeryError: there is no convolution to factorize.
        MissingExtra: tensorly is not installed.

    >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))
    >>> [tuple(c.weight.shape) for c in tucker(net, (3, 12, 12), budget="macs<=50%")[2]]
    [(8, 16, 1, 1), (16, 8, 3, 3), (32, 16, 1, 1)]
    """
    return _factorized(model, data, "TuckerConv2d", budget, layers, min_channels, _tucker_weights)


def cp(
    model: nn.Module,
    data: Any,
    *,
    budget: str | Budget = "macs<=50%",
    layers: str | Sequence[str] | None = None,
    min_channels: int = 8,
    max_iter: int = 100,
    seed: int = 0,
) -> nn.Module:
    """A copy of `model` whose convolutions are CP decompositions, inside the budget; edits are remembered.

    Args:
        max_iter: steps of the alternating least squares. seed: of its start where a rank exceeds a dimension.
        data, budget, layers, min_channels: as for `tucker`, which also says what is raised.
    """

    def weights(weight: Tensor, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        return _cp_weights(weight, kwargs["rank"], max_iter, seed)

    return _factorized(model, data, "CPConv2d", budget, layers, min_channels, weights)


# ---------------------------------------------------------------------------------------------------------------- plans


def _factorized(
    model: nn.Module,
    data: Any,
    kind: str,
    budget: str | Budget,
    layers: str | Sequence[str] | None,
    min_channels: int,
    decompose: Callable[[Tensor, dict[str, Any]], dict[str, Tensor]],
) -> nn.Module:
    if min_channels < 1:
        raise ValueError(f"min_channels must be at least 1, got {min_channels}")
    need("tensorly", extra="factorize")
    bounds = bounds_of(budget, model, data)
    convs = _convs(model, layers, min_channels)

    def edits(share: float) -> list[Edit]:
        found = {name: _kwargs(conv, kind, share) for name, conv in convs.items() if share < 1}
        return [Replace(name, f"{HERE}.{kind}", kwargs) for name, kwargs in found.items() if kwargs]

    final = edits(_SHARES[first_that_fits(model, data, bounds, _SHARES, edits)])
    weights: dict[str, Tensor] = {}
    for e in final:
        assert isinstance(e, Replace)
        conv = convs[e.module]
        values = decompose(conv.weight.detach(), e.kwargs)
        if conv.bias is not None:
            values["expand.bias"] = conv.bias.detach()
        weights |= {f"{e.module}.{name}": value for name, value in values.items()}
    return rebuilt(model, final, weights)


def _convs(model: nn.Module, layers: str | Sequence[str] | None, min_channels: int) -> dict[str, nn.Conv2d]:
    """The plain convolutions without groups, in the order of the model."""
    found = {
        name: module
        for name, module in own_layers(model, nn.Conv2d).items()
        if module.groups == 1 and min(module.in_channels, module.out_channels) >= min_channels
    }
    if layers is not None:
        found = {name: found[name] for name in chosen(list(found), layers)}
    if not found:
        raise SurgeryError(f"{type(model).__name__} has no convolution to factorize: none without groups and with "
                           f"{min_channels} channels or more")  # fmt: skip
    return found


def _kwargs(conv: nn.Conv2d, kind: str, share: float) -> dict[str, Any] | None:
    """Arguments of the chain with the largest ranks that keeps a share of the weights; None if even 1 saves nothing."""
    o, i, kernel = conv.out_channels, conv.in_channels, _pair(conv.kernel_size)
    whole, area = conv.weight.numel(), math.prod(kernel)

    def choice(n: int, of: int) -> tuple[int, dict[str, Any]]:
        if kind == "CPConv2d":
            return n * (o + i + (sum(kernel) if area > 1 else 0)), {"rank": n}
        if area == 1:
            return n * (o + i), {"ranks": (n, n)}
        out, inner = max(1, o * n // of), max(1, i * n // of)
        return i * inner + area * inner * out + out * o, {"ranks": (out, inner)}

    most = max(o, i) if kind == "TuckerConv2d" else whole // (o + i)
    fitting = [ranks for n in range(most, 0, -1) for size, ranks in [choice(n, most)] if size <= share * whole]
    least, ranks = choice(1, most)
    if not fitting and least >= whole:
        return None
    given = {
        "in_channels": i, "out_channels": o, "kernel_size": conv.kernel_size, "stride": conv.stride,
        "padding": conv.padding, "dilation": conv.dilation, "bias": conv.bias is not None,
        "padding_mode": conv.padding_mode,
    }  # fmt: skip
    return given | (fitting[0] if fitting else ranks)


# -------------------------------------------------------------------------------------------------------------- weights


def _tucker_weights(weight: Tensor, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Kernel (O, I, kh, kw) ~ core (out, in, kh, kw) times (O, out) and (I, in)."""
    out, inner = kwargs["ranks"]
    if weight.shape[2:] == (1, 1):
        return _matrix_weights(weight, inner)
    with _numpy() as tl:
        (core, (expand, reduce)), _ = tl.decomposition.partial_tucker(_array(weight), rank=[out, inner], modes=[0, 1])
    return _tensors(weight, reduce=reduce.T[..., None, None], core=core, expand=expand[..., None, None])


def _cp_weights(weight: Tensor, rank: int, max_iter: int, seed: int) -> dict[str, Tensor]:
    """Kernel (O, I, kh, kw) ~ sum of `rank` products of four vectors, whose lengths are shared evenly."""
    if weight.shape[2:] == (1, 1):
        return _matrix_weights(weight, rank)
    with _numpy() as tl, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Trying to compute SVD with n_eigenvecs")  # ranks may exceed sizes
        scale, factors = tl.decomposition.parafac(
            _array(weight), rank=rank, n_iter_max=max_iter, normalize_factors=True, random_state=seed, tol=1e-6
        )
    expand, reduce, vertical, horizontal = (f * scale**0.25 for f in factors)  # (size, rank) each
    return _tensors(
        weight,
        reduce=reduce.T[..., None, None],
        vertical=vertical.T[:, None, :, None],
        horizontal=horizontal.T[:, None, None, :],
        expand=expand[..., None, None],
    )


def _matrix_weights(weight: Tensor, rank: int) -> dict[str, Tensor]:
    u, s, vh = np.linalg.svd(_array(weight)[:, :, 0, 0], full_matrices=False)
    root = np.sqrt(s[:rank])
    return _tensors(
        weight, reduce=(root[:, None] * vh[:rank])[..., None, None], expand=(u[:, :rank] * root)[..., None, None]
    )


@contextmanager
def _numpy() -> Iterator[Any]:
    """tensorly, computing with numpy whatever the user has set."""
    tl: Any = need("tensorly", extra="factorize")
    need("tensorly.decomposition", extra="factorize")
    with tl.backend_context("numpy", local_threadsafe=True):
        yield tl


def _array(weight: Tensor) -> np.ndarray:
    return weight.cpu().double().numpy()


def _tensors(like: Tensor, **arrays: np.ndarray) -> dict[str, Tensor]:
    return {f"{n}.weight": torch.from_numpy(np.ascontiguousarray(a)).to(like) for n, a in arrays.items()}


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))
