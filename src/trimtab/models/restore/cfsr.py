"""CFSR: super-resolution by large depthwise kernels in the place of attention, and edges in the feed-forward part.

Wu et al., "Transforming Image Super-Resolution: A ConvFormer-based Efficient Approach", arXiv 2401.05633. A block has
the two branches of a transformer's: a token mixer, which is a 9x9 depthwise convolution multiplied with values (no
softmax, no windows, so any image size), and a feed-forward part with a 3x3 depthwise convolution to which fixed Sobel
and Laplacian filters are added with learned strengths. All of that is one kernel: `trimtab.compress.merge` makes it so.

What differs from the paper or its code:

- The released code merges when it is built and cannot train; the training graph here is the paper's formulas. The
  kernels are summed before the convolution instead of the results after it: the same function and gradients, at a
  quarter of the cost.
- The fixed filters and the mean of the training images are buffers that are not stored. For other than three channels
  the mean is the average of the three.

`load_released` reads the files that the authors gave out. Their keys are ours, but for these parts of names in
``layers.G.blocks.B`` (`RELEASED`): ``attn.norm`` is ``norm1``, ``attn.a.0`` and ``attn.a.2.lkb_reparam`` are
``mixer.gate.0`` and ``mixer.gate.2``, other ``attn`` are ``mixer``, ``mlp.norm`` is ``norm2``, ``mlp.pos`` is
``mlp.edge``, and ``layer_scale_1`` and ``layer_scale_2`` are ``scale1.gamma`` and ``scale2.gamma``. To check a file of
yours, ``tt.evaluate(load_released(file), tt.load_data("sr_set5", task="restore", scale=4))`` must give 32.33 dB on Set5
(38.09 for x2, 34.51 for x3).
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import LayerNorm2d, LayerScale2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.card import Card, Claim
from trimtab.core.edit import remember_base
from trimtab.nn.classifier import check_sizes
from trimtab.nn.merge import Plain, plain_conv
from trimtab.nn.restorer import Restorer, restorer_cfg, sub_pixel_conv

CARD = Card(
    slug="cfsr",
    title="Transforming Image Super-Resolution: A ConvFormer-based Efficient Approach",
    arxiv="2401.05633",
    year=2024,
    kind="architecture",
    tasks=("super-resolution",),
    claims=(
        Claim("real_psnr", "x4 Set5 32.33 dB / 0.8964 with 307 K parameters and 17.5 GMACs"),
        Claim("params", "291 K / 298 K / 307 K parameters for x2 / x3 / x4"),
        Claim(
            "reparam",
            "The edge-preserving depthwise convolution (learned kernel + Sobel x, Sobel y, Laplacian branches) costs "
            "nothing at inference",
        ),
        Claim(
            "cheaper_than_shufflemixer",
            "+0.39 dB on Urban100 x2 over ShuffleMixer with 26 % fewer parameters and 31 % fewer FLOPs",
        ),
    ),
)

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)
SOBEL_X = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))
SOBEL_Y = ((1.0, 2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -1.0))
LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))
RELEASED = (  # parts of names in released files, and ours; replaced in this order
    (".attn.norm.", ".norm1."), (".attn.a.0.", ".mixer.gate.0."), (".attn.a.2.lkb_reparam.", ".mixer.gate.2."),
    (".attn.", ".mixer."), (".mlp.norm.", ".norm2."), (".mlp.pos.", ".mlp.edge."),
    (".layer_scale_1", ".scale1.gamma"), (".layer_scale_2", ".scale2.gamma"),
)  # fmt: skip


class EdgeConv(nn.Module):
    """A 3x3 depthwise convolution whose kernels are learned ones plus edge filters of learned strength: (B, C, H, W).

    Per channel, W + a S_x + b S_y + l L, and the sum of four biases.

    >>> layer = EdgeConv(8)
    >>> sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in nn.Conv2d(8, 8, 3, groups=8).parameters())
    48
    """

    edges: Tensor

    def __init__(self, channels: int):
        super().__init__()
        learned = nn.Conv2d(channels, channels, 3, groups=channels)
        assert learned.bias is not None
        self.weight, self.bias = learned.weight, learned.bias
        self.strength = nn.Parameter(torch.randn(3, channels) * 1e-3)  # of S_x, S_y and L
        self.shift = nn.Parameter(torch.randn(3, channels) * 1e-3)
        self.register_buffer("edges", torch.tensor([SOBEL_X, SOBEL_Y, LAPLACIAN]), persistent=False)

    def kernel(self) -> tuple[Tensor, Tensor]:
        """Weight (C, 1, 3, 3) and bias (C) of the one convolution that it is."""
        edges = torch.einsum("nc,nhw->chw", self.strength, self.edges)
        return self.weight + edges.unsqueeze(1), self.bias + self.shift.sum(0)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.kernel()
        return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])

    def merged_parts(self) -> Mapping[str, Plain | None]:
        with torch.no_grad():
            weight, bias = self.kernel()
        return {"": plain_conv(weight, bias, stride=1, padding=1, groups=len(weight))}


class Modulation(nn.Module):
    """Values weighted by what is around them, without softmax: proj(DW(GELU(W_a x)) * W_v x) on (B, C, H, W)."""

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        around = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.gate = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.GELU(), around)
        self.v = nn.Conv2d(dim, dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.gate(x) * self.v(x))


class EdgeFeedForward(nn.Module):
    """Wider, then with edges, then back: h = GELU(W_1 x), W_2 (h + GELU(edge(h))) on (B, C, H, W)."""

    def __init__(self, dim: int, hidden: int, *, deploy: bool):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.edge = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden) if deploy else EdgeConv(hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.fc1(x))
        return self.fc2(h + F.gelu(self.edge(h)))


class CFSRBlock(nn.Module):
    """Mixer and feed-forward part, each after a layer norm, scaled, on a residual: keeps (B, C, H, W)."""

    def __init__(self, dim: int, hidden: int, kernel_size: int, *, layer_scale_init: float, deploy: bool):
        super().__init__()
        self.norm1 = LayerNorm2d(dim, eps=1e-6)
        self.mixer = Modulation(dim, kernel_size)
        self.scale1 = LayerScale2d(dim, layer_scale_init)
        self.norm2 = LayerNorm2d(dim, eps=1e-6)
        self.mlp = EdgeFeedForward(dim, hidden, deploy=deploy)
        self.scale2 = LayerScale2d(dim, layer_scale_init)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1(self.mixer(self.norm1(x)))
        return x + self.scale2(self.mlp(self.norm2(x)))


class CFSRGroup(nn.Module):
    """Blocks, then a 1x1 convolution on a residual of its own (not of the blocks): keeps (B, C, H, W)."""

    def __init__(self, blocks: Sequence[nn.Module], dim: int):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.conv = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return self.conv(x) + x


class CFSR(Restorer):
    """Groups of blocks between two 3x3 convolutions, and a sub-pixel convolution: (B, C, H, W) -> (B, C, sH, sW).

    Args:
        dim: channels. depths: blocks of each group. kernel_size: of the mixer, odd. mlp_ratio: hidden channels / dim.
        layer_scale_init: of the factors on the residuals. Short training wants more than the paper's.
        deploy: the merged form, with plain 3x3 convolutions in the feed-forward parts.

    >>> sum(p.numel() for p in CFSR(scale=4, deploy=True).parameters())
    306912
    """

    mean: Tensor

    def __init__(
        self,
        *,
        scale: int = 4,
        in_chans: int = 3,
        dim: int = 48,
        depths: Sequence[int] = (6, 6),
        kernel_size: int = 9,
        mlp_ratio: float = 2.0,
        layer_scale_init: float = 1e-6,
        deploy: bool = False,
    ):
        super().__init__(scale=scale, in_chans=in_chans)
        check_sizes(dim=dim, kernel_size=kernel_size, **{f"depths[{i}]": n for i, n in enumerate(depths)})
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        hidden = int(mlp_ratio * dim)
        check_sizes(**{"mlp_ratio * dim": hidden})
        mean = DIV2K_MEAN if in_chans == 3 else (sum(DIV2K_MEAN) / 3,) * in_chans
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)

        def block() -> CFSRBlock:
            return CFSRBlock(dim, hidden, kernel_size, layer_scale_init=layer_scale_init, deploy=deploy)

        self.conv_first = nn.Conv2d(in_chans, dim, 3, padding=1)
        self.layers = nn.Sequential(*(CFSRGroup([block() for _ in range(depth)], dim) for depth in depths))
        self.norm = LayerNorm2d(dim, eps=1e-6)
        self.conv_after_body = nn.Conv2d(dim, dim, 3, padding=1)
        self.upsample = sub_pixel_conv(dim, in_chans, scale)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.conv_first(x - self.mean)
        return self.conv_after_body(self.norm(self.layers(x))) + x

    def forward_head(self, x: Tensor) -> Tensor:
        return self.upsample(x) + self.mean


def load_released(path: str | Path, *, deploy: bool = True) -> CFSR:
    """The network in a file that the authors gave out (.pth, read without unpickling objects, or .safetensors).

    Args:
        deploy: the merged form, as in the file; False gives the training graph, with edge filters of strength 0.

    Raises:
        ValueError: it is no such file; names what is missing, unexpected or of another shape.
    """
    state = checkpoint_filter_fn(_read(Path(path)))
    tail = state.get("upsample.0.bias")
    scale = math.isqrt(len(tail) // 3) if tail is not None else 0
    if f"cfsr_x{scale}" not in _NETS:
        raise ValueError(f"{path} must hold a CFSR for x2, x3 or x4, got none of the three tails")
    with torch.random.fork_rng(devices=[]):
        net = _create(f"cfsr_x{scale}", False, {"deploy": deploy})
    remember_base(net, f"cfsr_x{scale}", {"deploy": deploy})
    own = {k: torch.zeros_like(v) for k, v in net.state_dict().items() if k.endswith((".edge.strength", ".edge.shift"))}
    try:
        net.load_state_dict({**own, **state}, strict=True)
    except RuntimeError as e:
        raise ValueError(f"{path} does not fit cfsr_x{scale}: {e}") from e
    return net.eval()


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Weights of a released file, named as here; ours are left as they are."""
    ours = {}
    for name, value in state.items():
        for theirs, mine in RELEASED:
            name = name.replace(theirs, mine)
        ours[name] = value
    return ours


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"path must be a file, got {str(path)!r}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as e:
        raise ValueError(f"{path} is not a file of weights: {e}") from e
    if isinstance(state, dict):
        state = next((state[k] for k in ("params", "params_ema", "state_dict") if k in state), state)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} must hold tensors by name")
    return state


# ------------------------------------------------------------------------------------------------------------- networks


_NETS: dict[str, dict[str, Any]] = {
    "cfsr_x2": {"scale": 2},
    "cfsr_x3": {"scale": 3},
    "cfsr_x4": {"scale": 4},
    "cfsr_tiny": {"scale": 2, "dim": 24, "depths": (2, 2), "layer_scale_init": 0.1},
}
default_cfgs = generate_default_cfgs(
    {name: restorer_cfg(3, "conv_first", "upsample.0") for name in _NETS}  # type: ignore[misc]
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> CFSR:
    return build_model_with_cfg(CFSR, name, pretrained, **{**_NETS[name], **kwargs})


@register_model
def cfsr_x2(pretrained: bool = False, **kwargs: Any) -> CFSR:
    """291,324 parameters merged, 65.06 G MACs for 1280 x 720 pixels."""
    return _create("cfsr_x2", pretrained, kwargs)


@register_model
def cfsr_x3(pretrained: bool = False, **kwargs: Any) -> CFSR:
    """297,819 parameters merged, 29.53 G MACs for 1278 x 720 pixels."""
    return _create("cfsr_x3", pretrained, kwargs)


@register_model
def cfsr_x4(pretrained: bool = False, **kwargs: Any) -> CFSR:
    """306,912 parameters merged, 17.16 G MACs for 1280 x 720 pixels."""
    return _create("cfsr_x4", pretrained, kwargs)


@register_model
def cfsr_tiny(pretrained: bool = False, **kwargs: Any) -> CFSR:
    """Two groups of two blocks with 24 channels, for any `scale` (2 by default): trains in minutes."""
    return _create("cfsr_tiny", pretrained, kwargs)
