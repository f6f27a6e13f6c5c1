"""Compacter: adapters of hypercomplex low-rank layers (Karimi Mahabadi et al., NeurIPS 2021, arXiv 2106.04647).

A frozen network is adapted by small bottlenecks after its sub-layers. Each of their matrices is a sum of n Kronecker
products, H = sum_i A_i (x) s_i t_i: the "slow" A_i (n x n) are one parameter for all adapters of the network, the
"fast" s_i t_i of rank r are each layer's own. An adapter of width D and bottleneck k then has r (D + k) weights in each
direction instead of D k. Compacter follows attention and feed-forward, Compacter++ (``attention=False``) feed-forward
only; the norms of the backbone are trained along.

Differences from the paper and the open code: on a classifier the head is trained too (the paper's T5 has none to
train); rank above one is a sum of products (the code's broadcast is right for rank one only); the bottleneck is rounded
up to a multiple of n. The product is never built: A is folded into the smaller factor, and the layer is two products of
inner width n^2 r. An adapter cannot be folded into the frozen layer before it, because of its GELU; `collapse` turns
its two matrices into ordinary linear layers, for runtimes or surgeries that want those. That has more weights, and
fewer multiply-adds only where the bottleneck is smaller than about n r.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core import edit
from trimtab.core.card import Card, Claim
from trimtab.core.edit import Replace
from trimtab.learn.adapt.adapters import Adapter, freeze, insert, narrow, places, tuned

CARD = Card(
    slug="compacter",
    title="Compacter: Efficient Low-Rank Hypercomplex Adapter Layers",
    arxiv="2106.04647",
    year=2021,
    kind="method",
    tasks=("classification", "language_modeling", "transfer"),
    claims=(
        Claim(
            "params",
            "Training 0.047% of T5-base's parameters (Compacter++) or 0.073% (Compacter) matches full fine-tuning",
        ),
        Claim("quality", "On par with fine-tuning on GLUE, better on SuperGLUE and in low-resource settings"),
        Claim("complexity", "O(k + d) trained parameters per adapter instead of O(k d)"),
    ),
)


class HypercomplexLinear(nn.Module):
    """y = x H + b with H = sum_i mix_i (x) (left_i right_i), (..., D) -> (..., K). H is D x K: rows are inputs.

    Args:
        in_features, out_features: D and K, multiples of n.
        n: number of Kronecker products, and size of `mix` (n, n, n).
        rank: r of each product's second factor: `left` (n, D / n, r) times `right` (n, r, K / n).

    >>> layer = HypercomplexLinear(768, 24, n=4)
    >>> sum(p.numel() for p in layer.parameters()), int(torch.linalg.matrix_rank(layer.dense()))
    (880, 16)
    """

    def __init__(self, in_features: int, out_features: int, *, n: int = 4, rank: int = 1) -> None:
        super().__init__()
        if n < 1 or rank < 1 or in_features % n or out_features % n:
            raise ValueError(
                f"n and rank must be positive, and n divide both widths, got n = {n}, rank = {rank} "
                f"for {in_features} and {out_features}"
            )
        self.in_features, self.out_features, self.n, self.rank = in_features, out_features, n, rank
        self.mix = nn.Parameter(torch.empty(n, n, n))
        self.left = nn.Parameter(torch.empty(n, in_features // n, rank))
        self.right = nn.Parameter(torch.empty(n, rank, out_features // n))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A from N(0, 0.01^2), each s_i, t_i Glorot-uniform with gain sqrt 2: H is tiny, the adapter near identity."""
        nn.init.normal_(self.mix, std=0.01)
        for factors in (self.left, self.right):
            for factor in factors:
                nn.init.xavier_uniform_(factor, gain=2**0.5)
        nn.init.zeros_(self.bias)

    def dense(self) -> Tensor:
        """H, (D, K)."""
        whole = torch.einsum("ipq,iur,irv->puqv", self.mix, self.left, self.right)
        return whole.reshape(self.in_features, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        n, inner = self.n, self.n * self.rank
        if self.in_features > self.out_features:
            left = self.left.permute(1, 0, 2).reshape(-1, inner)  # (D / n, n r)
            right = torch.einsum("ipq,irv->pirqv", self.mix, self.right).reshape(n * inner, -1)  # (n n r, K)
            return (x.unflatten(-1, (n, -1)) @ left).flatten(-2) @ right + self.bias
        left = torch.einsum("ipq,iur->puqir", self.mix, self.left).reshape(-1, n * inner)  # (D, n n r)
        right = self.right.reshape(inner, -1)  # (n r, K / n)
        return ((x @ left).unflatten(-1, (n, inner)) @ right).flatten(-2) + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, n={self.n}, rank={self.rank}"


class CompacterAdapter(Adapter):
    """An adapter of two `HypercomplexLinear` layers: (..., D) -> (..., D) through k."""

    def __init__(self, width: int, bottleneck: int, n: int = 4, rank: int = 1) -> None:
        down = HypercomplexLinear(width, bottleneck, n=n, rank=rank)
        super().__init__(down, HypercomplexLinear(bottleneck, width, n=n, rank=rank))


def compacter(
    model: nn.Module,
    data: Any = None,
    *,
    bottleneck: int | None = None,
    reduction: int = 32,
    n: int = 4,
    rank: int = 1,
    attention: bool = True,
    layers: str | Sequence[str] | None = None,
    shared: bool = True,
    norms: bool = True,
    train: str | Sequence[str] | None = None,
    seed: int = 0,
    epochs: int = 20,
    lr: float = 3e-3,
    **fit: Any,
) -> nn.Module:
    """A copy of `model`, frozen, with Compacter adapters; its edits are remembered. With data, they are trained.

    `tt.fit` trains them otherwise, `save_adapters` keeps them.

    Args:
        model: of timm or transformers (pre-norm and post-norm, encoder and decoder), or any other with `layers`.
        data: to train on, for `epochs` with `lr`; None to insert only.
        bottleneck: k; default: the width over `reduction`, rounded up to a multiple of n.
        n, rank: as in `HypercomplexLinear`.
        attention: adapters after self-attention and feed-forward; False for Compacter++, after feed-forward only.
        layers: patterns of the modules that are followed by an adapter, such as ``blocks.*.mlp.fc2``.
        shared: one A for all layers. norms, train: what else is trained, see `freeze`.
        seed: of the adapters' first weights, and of training.
        **fit: anything else that `tt.fit` takes; by default AdamW without decay, a linear schedule with warm-up.

    Raises:
        ValueError: n does not divide a width, or the bottleneck.
        SurgeryError: there is nowhere to insert, or there are adapters already.

    >>> import timm
    >>> from trimtab.learn.adapt import count
    >>> vit = timm.create_model("deit_tiny_patch16_224")
    >>> count(compacter(vit, reduction=24)).adapters  # two in each of 12 blocks, 600 parameters each, and 64 shared
    14464
    """
    at = places(model, attention=attention, layers=layers)
    for name, width in at.items():
        if n < 1 or width % n:
            raise ValueError(f"n must divide the width of every adapter, {width} of {name}, got {n}")
    sizes = {
        name: {"width": width, "bottleneck": narrow(width, bottleneck, reduction, n), "n": n, "rank": rank}
        for name, width in at.items()
    }
    tied = ("down.mix", "up.mix") if shared else ()
    small = freeze(insert(model, CompacterAdapter, sizes, tied=tied, seed=seed), norms=norms, train=train)
    return tuned(small, data, seed=seed, epochs=epochs, lr=lr, **fit)


def collapse(model: nn.Module) -> nn.Module:
    """A copy whose hypercomplex layers are ordinary linear ones with the same outputs, as edits."""
    edits: list[Replace] = []
    weights: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, HypercomplexLinear):
            sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
            edits.append(Replace(name, "torch.nn.Linear", sizes))
            weights |= {f"{name}.weight": layer.dense().detach().T, f"{name}.bias": layer.bias.detach()}
    return edit.apply(copy.deepcopy(model), edits, weights=weights)
