"""Selective state-space layers: `S6` mixes a sequence (Mamba, Vim), `SS2D` an image (VMamba).

Both project the input to a step dt and to vectors b and c for each position, run `nn.scan.selective_scan` with decays
-exp(A_log) of their own, and add D x. The bias of dt enters inside the softplus and is what makes memories short or
long: it starts at steps between 0.001 and 0.1, log-uniform, and no later initialisation may touch it (`init_linears`
does not). Decays and D have no weight decay.

Sources: Gu, Dao, "Mamba", arXiv 2312.00752, Algorithm 2; Zhu et al., "Vision Mamba", 2401.09417, Algorithm 1; Liu et
al., "VMamba", 2401.10166, Section 4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.nn.classifier import check_sizes
from trimtab.nn.scan import count_of, full, merge, selective_scan, unroll

STATE = 16


def rank_of(dim: int) -> int:
    """Width of the bottleneck in front of dt: a sixteenth of the width, rounded up."""
    return math.ceil(dim / 16)


class S6Branch(nn.Module):
    """One direction of Mamba, between its projections: (B, L, E) -> (B, L, E); position t sees none after t."""

    def __init__(self, width: int, *, rank: int, state: int = STATE, kernel: int = 4):
        super().__init__()
        self.sizes = [rank, state, state]
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel - 1, groups=width)
        self.x_proj = nn.Linear(width, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, width)
        self.A_log = nn.Parameter(torch.arange(1, state + 1.0).log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        start_steps(self.dt_proj.weight, self.dt_proj.bias)

    def no_weight_decay(self) -> set[str]:
        return {"A_log", "D"}

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x.transpose(-1, -2))[..., : x.shape[1]]).transpose(-1, -2)
        dt, b, c = self.x_proj(x).split(self.sizes, -1)
        dt = F.softplus(full(self.dt_proj(dt)))
        a = -full(self.A_log).exp().transpose(-1, -2).unsqueeze(0)  # (1, N, E)
        y = selective_scan(x.unsqueeze(1), dt.unsqueeze(1), a, b.unsqueeze(1), c.unsqueeze(1))
        return y.squeeze(1) + self.D * x


class S6(nn.Module):
    """The Mamba mixer: (B, L, D) -> (B, L, D), causal unless `bidirectional`.

    Args:
        expand: inner width over D.
        state: N. kernel: of the causal convolution.
        bidirectional: a second branch for the sequence backward, with weights of its own; both share the projections
            and the gate, and their mean is taken (Vim).

    >>> layer = S6(192, bidirectional=True)
    >>> sum(p.numel() for p in layer.parameters())
    281856
    """

    def __init__(
        self, dim: int, *, expand: float = 2.0, state: int = STATE, kernel: int = 4, bidirectional: bool = False
    ):
        super().__init__()
        check_sizes(dim=dim, state=state, kernel=kernel, width=int(expand * dim))
        width = int(expand * dim)
        self.in_proj = nn.Linear(dim, 2 * width, bias=False)
        self.branches = nn.ModuleList(
            S6Branch(width, rank=rank_of(dim), state=state, kernel=kernel) for _ in range(1 + bidirectional)
        )
        self.out_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.in_proj(x).chunk(2, -1)
        y = self.branches[0](x)
        if len(self.branches) == 2:  # gating before or after turning the sequence round is the same
            y = (y + self.branches[1](x.flip(1)).flip(1)) / 2
        return self.out_proj(y * F.silu(gate))


class SS2D(nn.Module):
    """Selective scan of an image in several orders: (B, H, W, D) -> (B, H, W, D).

    Args:
        expand: inner width over D.
        state: N; 16 in VMamba's first form, 1 in its last.
        gate: multiply the result by a gate (first form).
        conv_bias: of the depthwise convolution (first form).
        scan: of `nn.scan.SCANS`; each sequence has its own dt, b, c, decays and D; they are summed.

    >>> layer = SS2D(96, expand=1, state=1, gate=False, conv_bias=False)
    >>> tuple(layer.x_proj.shape), tuple(layer.dt_weight.shape), tuple(layer.A_log.shape)
    ((4, 8, 96), (4, 96, 6), (384, 1))
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        state: int = STATE,
        gate: bool = True,
        conv_bias: bool = True,
        scan: str = "cross2d",
    ):
        super().__init__()
        check_sizes(dim=dim, state=state, width=int(expand * dim))
        count, width, rank = count_of(scan), int(expand * dim), rank_of(dim)
        self.scan, self.gate, self.sizes = scan, gate, [rank, state, state]
        self.in_proj = nn.Linear(dim, (1 + gate) * width, bias=False)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=conv_bias)
        self.x_proj = nn.Parameter(torch.empty(count, rank + 2 * state, width).uniform_(-1, 1) / width**0.5)
        self.dt_weight = nn.Parameter(torch.empty(count, width, rank))
        self.dt_bias = nn.Parameter(torch.empty(count, width))
        self.A_log = nn.Parameter(torch.arange(1, state + 1.0).log().repeat(count * width, 1))
        self.D = nn.Parameter(torch.ones(count * width))
        self.norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, dim, bias=False)
        start_steps(self.dt_weight, self.dt_bias)

    def no_weight_decay(self) -> set[str]:
        return {"A_log", "D", "dt_bias"}

    def forward(self, x: Tensor) -> Tensor:
        height, width = map(int, x.shape[1:3])  # which a tracer makes tensors
        grid = (self.scan, height, width)
        x = self.in_proj(x)
        if self.gate:
            x, gate = x.chunk(2, -1)
        x = F.silu(self.conv(x.permute(0, 3, 1, 2)).flatten(2)).transpose(-1, -2)  # (B, HW, E)
        y = merge(self._scan(unroll(x, *grid)), *grid).unflatten(1, (height, width))
        y = self.norm(y)
        return self.out_proj(y * F.silu(gate) if self.gate else y)

    def _scan(self, x: Tensor) -> Tensor:
        """(B, K, M, E) -> (B, K, M, E), each of the K sequences with its own weights."""
        count, _, channels = self.x_proj.shape
        dt, b, c = (x @ self.x_proj.transpose(-1, -2)).split(self.sizes, -1)
        dt = F.softplus(full(dt @ self.dt_weight.transpose(-1, -2) + self.dt_bias.unsqueeze(1)))
        a = -full(self.A_log).exp().view(count, channels, -1).transpose(-1, -2)  # (K, N, E)
        return selective_scan(x, dt, a, b, c) + self.D.view(count, 1, channels) * x


class VSSBlock(nn.Module):
    """`SS2D` on a residual, then two linear layers on another if `mlp_ratio`: keeps (B, H, W, D)."""

    def __init__(
        self, dim: int, *, mlp_ratio: float = 0.0, drop_path: float = 0.0, norm_eps: float = 1e-6, **mixer: Any
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.mixer = SS2D(dim, **mixer)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps) if mlp_ratio else nn.Identity()
        self.mlp = Mlp(dim, int(dim * mlp_ratio)) if mlp_ratio else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x if self.mlp is None else x + self.drop_path(self.mlp(self.norm2(x)))


class Down(nn.Module):
    """A strided convolution and a norm, channels last: (B, H, W, C) -> (B, H / stride, W / stride, C')."""

    def __init__(self, into: int, out: int, kernel: int = 3, stride: int = 2):
        super().__init__()
        self.conv = nn.Conv2d(into, out, kernel, stride, padding=kernel // 2 if kernel % 2 else 0)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Four neighbours become one: (B, H, W, C) -> (B, H / 2, W / 2, 2 C); odd sizes are padded with zeros."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2 or x.shape[2] % 2:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = [x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.reduction(self.norm(torch.cat(parts, -1)))


@torch.no_grad()
def start_steps(weight: Tensor, bias: Tensor) -> None:
    """First weights (..., E, R) of dt, and its bias: the inverse softplus of steps log-uniform in [0.001, 0.1]."""
    bound = weight.shape[-1] ** -0.5
    weight.uniform_(-bound, bound)
    step = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp_min(1e-4)
    bias.copy_(step + torch.log(-torch.expm1(-step)))


def init_linears(model: nn.Module) -> None:
    """Truncated normal weights and zero biases for every linear layer, except those that make steps."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("dt_proj"):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
