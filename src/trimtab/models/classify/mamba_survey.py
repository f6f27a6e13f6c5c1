"""State-space vision models: cores, scans and families, as the survey of Mamba in medical imaging orders them.

Bansal et al., "A Comprehensive Survey of Mamba Architectures for Medical Image Analysis", arXiv 2410.02362. A linear
state space h' = A h + B u, y = C h mixes a sequence at linear cost. Its cores differ in what is fixed: `S4D`
(2206.11893) has one diagonal system per channel and is a convolution; `S5` (2208.04933) has one for all, and is a scan;
`S6` (Mamba, `nn.ssm`) lets step, input and output depend on the input. An image becomes a sequence by a scan
(`nn.scan.orders`). Families: pure (`Vim`, `VMamba`, here), U-shaped and hybrid (`models.dense.mamba_unets`).

What differs from the papers or their code:

- `Vim(core=...)` also runs on S4D and S5, in both directions, and `VMamba(scan=...)` on any scan: the survey's axes.
- Released code sums the residual in float32 inside a fused kernel; here it has the type of the model.
- S4D is a Fourier convolution in PyTorch, and a direct one (quadratic cost) in an exported file: ONNX Runtime has no
  differentiable counterpart to keep it exact. S5 computes with pairs of real numbers, for the same reason.
- SSD (Mamba-2) belongs to another system (patchification). The restoration hybrid is only inferred by the survey's
  readers, and left out.

MACs of published tables, and of `tt.measure`, are those of linear layers and convolutions. `scan_steps` gives what they
leave out: the sum of length x channels x states over all scans; the usual convention adds 9 FLOPs for each.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.card import Card, Claim
from trimtab.nn.classifier import Classifier, check_image_input, check_sizes
from trimtab.nn.scan import SCANS, full, linear_scan
from trimtab.nn.ssm import S6, Down, PatchMerging, VSSBlock, init_linears

CARD = Card(
    slug="mamba_survey",
    title="A Comprehensive Survey of Mamba Architectures for Medical Image Analysis: Classification, Segmentation, "
    "Restoration and Beyond",
    arxiv="2410.02362",
    year=2024,
    kind="analysis",
    tasks=("classify", "segment"),
    claims=(
        Claim("linear", "State-space mixers have linear cost in sequence length, attention quadratic"),
        Claim(
            "scans",
            "How a 2-D image is unrolled (one-way, bidirectional, cross, zigzag, local, spiral) changes accuracy of "
            "the same core",
        ),
        Claim(
            "families",
            "Pure Mamba, U-shaped Mamba and hybrids (CNN + Mamba) are the three families; hybrids are strongest on "
            "small medical sets",
        ),
        Claim("exact", "Component implementations are faithful"),
    ),
)
CORES = ("s6", "s4d", "s5")


# ---------------------------------------------------------------------------------------------------------------- cores


class S4D(nn.Module):
    """One diagonal state space per channel, then GELU and a gated linear layer: (B, L, H) -> (B, L, H).

    Args:
        state: N, complex, stored as N / 2 conjugate pairs.

    >>> sum(p.numel() for p in S4D(128).parameters())
    49664
    """

    lr_scales = {"log_dt": 0.25, "log_A_real": 0.25, "A_imag": 0.25}  # 0.001 where the rest has 0.004

    def __init__(self, dim: int, *, state: int = 64, dropout: float = 0.0):
        super().__init__()
        check_sizes(dim=dim, state=state)
        if state % 2:
            raise ValueError(f"state must be even (conjugate pairs), got {state}")
        self.log_dt = nn.Parameter(torch.empty(dim).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_A_real = nn.Parameter(torch.full((dim, state // 2), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(state // 2).repeat(dim, 1))
        self.C = nn.Parameter(torch.randn(dim, state // 2, 2) / 2**0.5)
        self.D = nn.Parameter(torch.randn(dim))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(dim, 2 * dim)

    def no_weight_decay(self) -> set[str]:
        return {"log_A_real", "A_imag"}

    def discrete(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Zero-order hold: dt A and C (exp(dt A) - 1) / A, real and imaginary part of each (H, N / 2)."""
        real, imag, dt = -full(self.log_A_real).exp(), full(self.A_imag), full(self.log_dt).exp().unsqueeze(-1)
        held = _over(*_minus_one(real * dt, imag * dt), real, imag)
        c_real, c_imag = full(self.C).unbind(-1)
        return (real * dt, imag * dt), _times(c_real, c_imag, *held)

    def kernel(self, length: int) -> Tensor:
        """K_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l): (H, L)."""
        (rate, angle), (real, imag) = self.discrete()
        steps = torch.arange(length, device=rate.device, dtype=rate.dtype)
        turn = angle.unsqueeze(-1) * steps
        size = (rate.unsqueeze(-1) * steps).exp()  # (H, N / 2, L)
        return 2 * (size * (real.unsqueeze(-1) * turn.cos() - imag.unsqueeze(-1) * turn.sin())).sum(1)

    def ssm(self, u: Tensor) -> Tensor:
        """The state space alone, as a causal convolution: (B, L, H) -> (B, L, H)."""
        length, x = int(u.shape[1]), u.transpose(-1, -2)  # a number also for a tracer
        kernel = self.kernel(length)
        x = x.to(kernel.dtype)
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            y = F.conv1d(F.pad(x, (length - 1, 0)), kernel.flip(-1).unsqueeze(1), groups=len(kernel))
        else:
            y = torch.fft.irfft(torch.fft.rfft(kernel, 2 * length) * torch.fft.rfft(x, 2 * length), 2 * length)
        return (y[..., :length] + self.D.unsqueeze(-1) * x).transpose(-1, -2)

    def forward(self, u: Tensor) -> Tensor:
        return F.glu(self.out(self.dropout(F.gelu(self.ssm(u).to(u.dtype)))), -1)


def hippo(size: int) -> np.ndarray:
    """The normal part S = A + p p^T of HiPPO-LegS, whose symmetric part is -1/2 I: (N, N).

    >>> hippo(2).round(3).tolist()
    [[-0.5, 0.866], [-0.866, -0.5]]
    """
    n = np.arange(size)
    a = -np.tril(np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), -1) - np.diag(n + 1)
    p = np.sqrt(n + 0.5)
    return a + np.outer(p, p)


def hippo_modes(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of `hippo(size)`, all with real part -1/2, by rising imaginary part; and eigenvectors in columns."""
    s = hippo(size)
    imag, vectors = np.linalg.eigh(-1j * (s - s.T) / 2)  # of the skew part, which is exactly what is left
    return np.diag(s).mean() + 1j * imag, vectors


class S5(nn.Module):
    """One diagonal state space for all channels, then a gate: (B, L, H) -> (B, L, H). Causal unless `bidirectional`.

    Args:
        state: P0, of which one of each conjugate pair is kept.
        blocks: HiPPO systems side by side.

    >>> sum(p.numel() for p in S5(128).parameters()), sum(p.numel() for p in S5(128, bidirectional=True).parameters())
    (82560, 115328)
    """

    lr_scales = {"Lambda": 0.25, "B": 0.25, "log_dt": 0.25}

    def __init__(self, dim: int, *, state: int = 256, blocks: int = 1, bidirectional: bool = False):
        super().__init__()
        check_sizes(dim=dim, state=state, blocks=blocks)
        if state % (2 * blocks):
            raise ValueError(f"state must be a multiple of 2 x blocks = {2 * blocks}, got {state}")
        values, vectors = hippo_modes(state // blocks)
        half = state // blocks // 2
        modes = torch.tensor(np.kron(np.eye(blocks), vectors[:, half:]), dtype=torch.complex64)  # (P0, P)
        directions = 1 + bidirectional
        b = torch.randn(state, dim) / dim**0.5
        c = torch.randn(directions, dim, state, dtype=torch.complex64) / state**0.5
        kept = torch.tensor(np.tile(values[half:], blocks), dtype=torch.complex64)
        self.Lambda = nn.Parameter(torch.view_as_real(kept))  # (P, 2)
        self.B = nn.Parameter(torch.view_as_real(modes.mH @ b.to(modes.dtype)))  # (P, H, 2)
        self.C = nn.Parameter(torch.view_as_real(c @ modes))  # (directions, H, P, 2)
        self.log_dt = nn.Parameter(torch.empty(state // 2).uniform_(math.log(1e-3), math.log(1e-1)))
        self.D = nn.Parameter(torch.randn(dim))
        self.gate = nn.Linear(dim, dim)

    def no_weight_decay(self) -> set[str]:
        return {"Lambda", "B"}

    def discrete(self) -> tuple[Tensor, Tensor]:
        """Zero-order hold: A-bar (P, 2) and B-bar (P, H, 2), as pairs of real numbers."""
        dt = full(self.log_dt).exp().unsqueeze(-1)
        real, imag = (full(self.Lambda) * dt).unbind(-1)
        less = _minus_one(real, imag)
        held = _over(*less, *full(self.Lambda).unbind(-1))
        b = _times(*(v.unsqueeze(-1) for v in held), *full(self.B).unbind(-1))
        return torch.stack([less[0] + 1, less[1]], -1), torch.stack(b, -1)

    def ssm(self, u: Tensor) -> Tensor:
        """The state space alone: y = 2 Re(C x) + D u."""
        a, b = self.discrete()
        u = u.to(a.dtype)
        drive = torch.stack([u @ part.transpose(-1, -2) for part in b.unbind(-1)], -1)  # (B, L, P, 2)
        x = [linear_scan(a.expand_as(drive), drive, complex_pairs=True)]
        if len(self.C) == 2:
            x.append(linear_scan(a.expand_as(drive), drive.flip(1), complex_pairs=True).flip(1))
        y = self.D * u
        for states, c in zip(x, full(self.C)):
            y = y + 2 * (states[..., 0] @ c[..., 0].transpose(-1, -2) - states[..., 1] @ c[..., 1].transpose(-1, -2))
        return y

    def forward(self, u: Tensor) -> Tensor:
        y = F.gelu(self.ssm(u).to(u.dtype))
        return y * torch.sigmoid(self.gate(y))


def _minus_one(real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """exp(z) - 1, exact also for small z (and exporters know no `expm1`)."""
    grown = (real / 2).tanh() * (real.exp() + 1)
    return grown * imag.cos() - 2 * (imag / 2).sin().square(), (grown + 1) * imag.sin()


def _times(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    return a * c - b * d, a * d + b * c


def _over(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    size = c.square() + d.square()
    return (a * c + b * d) / size, (b * c - a * d) / size


class Both(nn.Module):
    """A causal layer and another one backward, averaged."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.ahead, self.back = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        return (self.ahead(x) + self.back(x.flip(1)).flip(1)) / 2


# ------------------------------------------------------------------------------------------------------------------ Vim


class VimBlock(nn.Module):
    """A mixer on a residual, nothing else: keeps (B, N, D)."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


class Vim(Classifier):
    """Patches, a class token in their middle, bidirectional mixers, linear: (B, C, H, W) -> (B, num_classes).

    Args:
        img_size: of the position embedding, which is resized for others.
        patch_size, stride: of the patches; the stride is the patch size unless given.
        core: "s6", "s4d" or "s5".

    >>> Vim(img_size=32, patch_size=8, embed_dim=16, depth=2)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 1000])
    """

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        embed_dim: int = 192,
        depth: int = 24,
        core: str = "s6",
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "token",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        check_sizes(num_classes=num_classes, in_chans=in_chans, patch_size=patch_size, embed_dim=embed_dim, depth=depth)
        if core not in CORES:
            raise ValueError(f"core must be one of {', '.join(CORES)}, got {core!r}")
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_size, self.stride = patch_size, stride or patch_size
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, self.stride)
        self.grid = [(s - patch_size) // self.stride + 1 for s in size]
        if min(self.grid) < 1:
            raise ValueError(f"img_size must be at least patch_size = {patch_size}, got {size}")
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid) + 1, embed_dim))
        mixers: dict[str, Callable[[], nn.Module]] = {
            "s6": lambda: S6(embed_dim, bidirectional=True),
            "s4d": lambda: Both(lambda: S4D(embed_dim)),
            "s5": lambda: S5(embed_dim, state=_even(embed_dim), bidirectional=True),
        }
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(*(VimBlock(embed_dim, mixers[core](), rate) for rate in rates))
        self.norm = nn.RMSNorm(embed_dim, eps=1e-5)
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": self.stride, "module": f"blocks.{i}"} for i in range(depth)
        ]
        init_linears(self)
        for block in self.blocks:  # two residual branches per depth of a transformer, one here
            if isinstance(block.mixer, S6):
                block.mixer.out_proj.weight.data.div_(depth**0.5)
        for p in (self.cls_token, self.pos_embed, self.patch_embed.weight):
            trunc_normal_(p, std=0.02)
        self._make_head(embed_dim, num_classes, in_chans, global_pool, drop_rate)

    def _make_pool(self, global_pool: str) -> nn.Module:
        if global_pool not in ("", "token"):
            raise ValueError(f"global_pool must be 'token' or '', got {global_pool!r}")
        self.pool = global_pool
        return nn.Identity()

    def _init_classifier(self, head: nn.Linear) -> None:
        init_linears(head)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: blocks are computed again in the backward pass."""
        self.grad_checkpointing = enable

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, M + 1, D), the class token at M // 2."""
        check_image_input(x, self.in_chans)
        x = self.patch_embed(x)
        patches, grid = x.flatten(2).transpose(-1, -2), [int(s) for s in x.shape[2:]]  # numbers also for a tracer
        middle, old = math.prod(grid) // 2, math.prod(self.grid) // 2
        x = torch.cat([patches[:, :middle], self.cls_token.expand(x.shape[0], -1, -1), patches[:, middle:]], 1)
        where: Tensor = self.pos_embed
        if grid != self.grid:
            first, cls, last = where.split([old, 1, where.shape[1] - old - 1], 1)
            pixels = torch.cat([first, last], 1).transpose(-1, -2).unflatten(2, self.grid)
            resized = F.interpolate(pixels.float(), grid, mode="bicubic").to(where.dtype).flatten(2).transpose(-1, -2)
            where = torch.cat([resized[:, :middle], cls, resized[:, middle:]], 1)
        return x + where

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens (B, M + 1, D) after the last norm."""
        x = self._tokens(x)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing and self.training else self.blocks(x)
        return self.norm(x)

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False, output_fmt: str = "NCHW",
        intermediates_only: bool = False, **_: Any,
    ) -> Any:  # fmt: skip
        """timm's way to features of inner blocks: maps (B, D, h, w) without the class token."""
        take, _last = feature_take_indices(len(self.blocks), indices)
        grid = [(s - self.patch_size) // self.stride + 1 for s in x.shape[2:]]
        x, maps = self._tokens(x), []
        middle = math.prod(grid) // 2
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in take:
                y = self.norm(x) if norm else x
                maps.append(torch.cat([y[:, :middle], y[:, middle + 1 :]], 1).transpose(-1, -2).unflatten(2, grid))
        return maps if intermediates_only else (self.norm(x), maps)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token (B, D) -> (B, num_classes); with `global_pool=""`, of all tokens."""
        if self.pool == "token":
            x = x[:, (x.shape[1] - 1) // 2]
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.get_classifier()(x)


def _even(size: int) -> int:
    return size + size % 2


# --------------------------------------------------------------------------------------------------------------- VMamba


class VMamba(Classifier):
    """Stem, four stages of `VSSBlock`, mean, linear: (B, in_chans, H, W) -> (B, num_classes).

    Args:
        dims, depths: of the stages.
        expand, state: of the mixers.
        first_form: the architecture of the first paper: patches of 4 x 4, gated mixers, no MLPs, patch merging.
        mlp_ratio: of the MLPs.
        scan: how images become sequences, of `nn.scan.SCANS`.
        stem_stride: 4, or 2 for small images.

    >>> VMamba(dims=(8, 16), depths=(1, 1))(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 1000])
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 8, 2),
        expand: float = 1.0,
        state: int = 1,
        first_form: bool = False,
        mlp_ratio: float = 4.0,
        scan: str = "cross2d",
        stem_stride: int = 4,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        check_sizes(num_classes=num_classes, in_chans=in_chans)
        if scan not in SCANS:
            raise ValueError(f"scan must be one of {', '.join(SCANS)}, got {scan!r}")
        if len(dims) != len(depths) or not dims:
            raise ValueError(f"dims and depths must be equally many, got {tuple(dims)} and {tuple(depths)}")
        if stem_stride not in (2, 4):
            raise ValueError(f"stem_stride must be 2 or 4, got {stem_stride!r}")
        if first_form:
            stem: list[nn.Module] = [Down(in_chans, dims[0], stem_stride, stem_stride)]
        elif stem_stride == 4:
            stem = [Down(in_chans, dims[0] // 2), nn.GELU(), Down(dims[0] // 2, dims[0])]
        else:
            stem = [Down(in_chans, dims[0])]
        self.stem = nn.Sequential(*stem)
        mixer: dict[str, Any] = {
            "expand": expand,
            "state": state,
            "gate": first_form,
            "conv_bias": first_form,
            "scan": scan,
        }
        rates = [drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        stages = []
        for i, dim in enumerate(dims):
            down = nn.Identity() if i == 0 else PatchMerging(dims[i - 1]) if first_form else Down(dims[i - 1], dim)
            blocks = [
                VSSBlock(dim, mlp_ratio=0 if first_form else mlp_ratio, drop_path=rates[sum(depths[:i]) + j], **mixer)
                for j in range(depths[i])
            ]
            stages.append(nn.Sequential(OrderedDict(down=down, blocks=nn.Sequential(*blocks))))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1])
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        init_linears(self)
        self._make_head(dims[-1], num_classes, in_chans, global_pool, drop_rate)

    def _init_classifier(self, head: nn.Linear) -> None:
        init_linears(head)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates."""
        fine = [(r"^stages\.(\d+)\.down", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: blocks are computed again in the backward pass."""
        self.grad_checkpointing = enable

    def _stages(self, x: Tensor) -> Iterator[Tensor]:
        """The output of each stage, (B, H, W, C)."""
        check_image_input(x, self.in_chans)
        x = self.stem(x.permute(0, 2, 3, 1))
        for stage in self.stages:
            x = stage.get_submodule("down")(x)
            blocks = stage.get_submodule("blocks")
            x = checkpoint_seq(blocks, x) if self.grad_checkpointing and self.training else blocks(x)
            yield x

    def forward_features(self, x: Tensor) -> Tensor:
        *_, x = self._stages(x)
        return self.norm(x).permute(0, 3, 1, 2)

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False, output_fmt: str = "NCHW",
        intermediates_only: bool = False, **_: Any,
    ) -> Any:  # fmt: skip
        """timm's way to the outputs of stages: maps (B, C, h, w)."""
        take, _last = feature_take_indices(len(self.stages), indices)
        found = list(self._stages(x))
        maps = [y.permute(0, 3, 1, 2) for i, y in enumerate(found) if i in take]
        return maps if intermediates_only else (self.norm(found[-1]).permute(0, 3, 1, 2), maps)


# ------------------------------------------------------------------------------------------------------------- networks


def _cfg(size: int = 224, num_classes: int = 1000, first_conv: str = "patch_embed") -> dict[str, Any]:
    small = size == 32
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 1.0 if small else 0.9,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465) if small else (0.485, 0.456, 0.406),
        "std": (0.2470, 0.2435, 0.2616) if small else (0.229, 0.224, 0.225),
        "first_conv": first_conv,
        "classifier": "head",
    }


_VIM: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192},
    "small": {"embed_dim": 384},
    "base": {"embed_dim": 768},
    "tiny_plus": {"embed_dim": 192, "stride": 8},
    "small_plus": {"embed_dim": 384, "stride": 8},
    "nano_32": {"embed_dim": 48, "depth": 6, "img_size": 32, "patch_size": 4},
}
_VMAMBA: dict[str, dict[str, Any]] = {
    "tiny_v0": {"depths": (2, 2, 9, 2), "expand": 2.0, "state": 16, "first_form": True},
    "tiny": {"depths": (2, 2, 8, 2)},
    "tiny_s2l5": {"depths": (2, 2, 5, 2), "expand": 2.0},
    "small": {"depths": (2, 2, 15, 2), "expand": 2.0},
    "base": {"depths": (2, 2, 15, 2), "expand": 2.0, "dims": (128, 256, 512, 1024)},
    "nano_32": {"depths": (1, 1, 2), "dims": (16, 32, 64), "stem_stride": 2, "mlp_ratio": 2.0},
}
_CFGS: dict[str, Any] = {f"vim_{n}": _cfg() for n in _VIM}
_CFGS |= {f"vmamba_{n}": _cfg(first_conv="stem.0.conv") for n in _VMAMBA}
_CFGS |= {"vim_nano_32": _cfg(32, 10), "vmamba_nano_32": _cfg(32, 10, "stem.0.conv")}
default_cfgs = generate_default_cfgs(_CFGS)


def _vim(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> Vim:
    arguments = {**_VIM[variant], **kwargs}
    features = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(Vim, f"vim_{variant}", pretrained, feature_cfg=features, **arguments)


def _vmamba(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> VMamba:
    arguments = {**_VMAMBA[variant], **kwargs}
    count = len(arguments.get("dims", range(4)))
    features = {"out_indices": tuple(range(count)), "feature_cls": "getter"}
    return build_model_with_cfg(VMamba, f"vmamba_{variant}", pretrained, feature_cfg=features, **arguments)


@register_model
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> Vim:
    """7,148,008 parameters, 1.293 G MACs at 224."""
    return _vim("tiny", pretrained, kwargs)


@register_model
def vim_small(pretrained: bool = False, **kwargs: Any) -> Vim:
    """25,796,584 parameters, 4.852 G MACs at 224."""
    return _vim("small", pretrained, kwargs)


@register_model
def vim_base(pretrained: bool = False, **kwargs: Any) -> Vim:
    """97,598,440 parameters, 18.767 G MACs at 224."""
    return _vim("base", pretrained, kwargs)


@register_model
def vim_tiny_plus(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Patches that overlap by half: 7,250,344 parameters, 4.790 G MACs at 224."""
    return _vim("tiny_plus", pretrained, kwargs)


@register_model
def vim_small_plus(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Patches that overlap by half: 26,001,256 parameters, 17.977 G MACs at 224."""
    return _vim("small_plus", pretrained, kwargs)


@register_model
def vim_nano_32(pretrained: bool = False, **kwargs: Any) -> Vim:
    """For images of 32 pixels: 64 patches of 4 x 4."""
    return _vim("nano_32", pretrained, kwargs)


@register_model
def vmamba_tiny_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The first form: 22,893,448 parameters, 3.677 G MACs at 224."""
    return _vmamba("tiny_v0", pretrained, kwargs)


@register_model
def vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """30,249,064 parameters, 4.813 G MACs at 224 (s1l8)."""
    return _vmamba("tiny", pretrained, kwargs)


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """30,705,832 parameters, 4.716 G MACs at 224."""
    return _vmamba("tiny_s2l5", pretrained, kwargs)


@register_model
def vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """50,147,752 parameters, 8.499 G MACs at 224."""
    return _vmamba("small", pretrained, kwargs)


@register_model
def vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """88,557,800 parameters, 15.070 G MACs at 224."""
    return _vmamba("base", pretrained, kwargs)


@register_model
def vmamba_nano_32(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """For images of 32 pixels: maps of 16, 8 and 4."""
    return _vmamba("nano_32", pretrained, kwargs)
