"""ULSAM: attention so cheap that it can stand in the place of a whole block of a MobileNet.

Saini, Jha, Das, Mittal, Mohan, "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural
Networks", arXiv 2006.15102. The channels are split into groups ("subspaces"), and each group has one spatial attention
map, inferred by a 1x1 depthwise convolution, a 3x3 maximum and a 1x1 convolution to one channel. That costs two
weights per channel, so the module need not be added to a network: it replaces a residual block of equal input and
output width, whose weights and multiply-adds are thereby saved.

`ULSAM` is the module, `ulsam` the surgery, for any network of blocks with one depthwise convolution each: MobileNetV1
and V2 of timm and torchvision, EfficientNets, `trim_mobile_*`.

What differs from the paper or its code:

- The groups are computed by grouped convolutions, all at once: the same function as one small network per group.
- Batch norms have PyTorch's momentum 0.1. The code says 0.9, which is right in TensorFlow's convention only.
- Which of several equal blocks was taken is not said; the costs are the same. Here it is the later one.
- A block is found by its structure and named by its width, so that `blocks="96+160"` means on MobileNetV2 what the
  paper's tables mean. Without `blocks`, the rule of `plan` chooses; on MobileNetV1 and V2 it is the paper's choice.

A batch norm follows the depthwise 1x1 convolution, and cancels its bias and all of its scale but the sign: in
training only the signs of these weights matter. And on a map of 2x2 the 3x3 maximum is the same everywhere, and the
attention uniform. Both are as in the paper and kept; the surgery warns of the second.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.card import Card, Claim
from trimtab.core.edit import Insert, Replace, apply, meta_copy
from trimtab.core.errors import SurgeryError
from trimtab.core.example import example_of
from trimtab.core.log import logger

CARD = Card(
    slug="ulsam",
    title="ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
    arxiv="2006.15102",
    year=2020,
    kind="block",
    tasks=("classify",),
    claims=(
        Claim(
            "cost",
            "The module costs 2m parameters and 2*m*h*w operations (m channels), i.e. 1K / 0.2M at 512x14x14, against "
            "33K for SE/CBAM, 84K for BAM, 524K for non-local",
        ),
        Claim(
            "replace",
            "Replacing whole residual blocks of MobileNetV2 by ULSAM removes 13% of parameters and FLOPs with +0.27% "
            "ImageNet top-1 (g=4), 25% with better fine-grained accuracy",
        ),
        Claim(
            "subspace",
            "Several attention maps (one per group of channels) beat one map for all channels, at no extra cost",
        ),
    ),
)

MODES = ("replace", "add")
log = logger(__name__)


class ULSAM(nn.Module):
    """Subspace attention: (B, C, H, W) -> (B, C, H, W), at any H and W.

    A map sums to 1 over the H W positions, and a channel is multiplied by 1 + map: fresh, the module is nearly the
    identity, the more so the larger the map is.

    Args:
        channels: C, consecutive channels form a group.
        groups: attention maps; divides C.

    >>> ULSAM(64, groups=4)(torch.zeros(2, 64, 7, 7)).shape
    torch.Size([2, 64, 7, 7])
    """

    def __init__(self, channels: int, *, groups: int = 4):
        super().__init__()
        _check_groups(groups, channels)
        self.groups = groups
        self.depthwise = nn.Conv2d(channels, channels, 1, groups=channels)
        self.norm1 = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.pointwise = nn.Conv2d(channels, groups, 1, groups=groups)
        self.norm2 = nn.BatchNorm2d(groups)

    def attention(self, x: Tensor) -> Tensor:
        """The maps: (B, C, H, W) -> (B, groups, H, W), each sums to 1. Ties are normal: ReLU makes many logits 0."""
        z = self.pool(F.relu(self.norm1(self.depthwise(x))))  # (B, C, H, W)
        z = F.relu(self.norm2(self.pointwise(z)))  # (B, groups, H, W)
        return z.flatten(2).softmax(-1).view_as(z)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.attention(x).unsqueeze(2)  # (B, groups, 1, H, W)
        return (x.unflatten(1, (self.groups, -1)) * (1 + maps)).flatten(1, 2)


@dataclass(frozen=True)
class Block:
    """A block with one depthwise convolution: its name, output (C, H, W), and whether its input has the same shape."""

    name: str
    shape: tuple[int, int, int]
    replaceable: bool

    @property
    def width(self) -> int:
        return self.shape[0]


def ulsam(
    model: nn.Module,
    data: Any,
    *,
    blocks: str | int | Sequence[str] | None = None,
    groups: int = 4,
    mode: str = "replace",
    seed: int = 0,
) -> nn.Module:
    """A copy of `model` with ULSAM in the place of some blocks; its edits are remembered. Train it, or fine-tune it.

    Args:
        data: a `Data`, an input size (C, H, W), or an example input (B, C, H, W); only its shape is looked at.
        blocks: which: by width as in the paper ("96+160", "96x2+160x2"; the last ones of each width), or a list of
            names of modules; None for the rule of `plan`.
        groups: attention maps of each module; divides the widths.
        mode: "replace", or "add" for a module after each of the blocks, which saves nothing.
        seed: of the new weights.

    Raises:
        ValueError: an argument is wrong, or `blocks` names a block that cannot be replaced.
        SurgeryError: the model has no such blocks, or does not run on such an input.

    >>> from torchvision.models import mobilenet_v2
    >>> small = ulsam(mobilenet_v2(), (3, 224, 224), blocks="96+160")
    >>> sum(p.numel() for p in small.parameters())
    3067904
    """
    edits = plan(model, data, blocks=blocks, groups=groups, mode=mode)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return apply(copy.deepcopy(model), edits)


def plan(
    model: nn.Module,
    data: Any,
    *,
    blocks: str | int | Sequence[str] | None = None,
    groups: int = 4,
    mode: str = "replace",
) -> list[Insert] | list[Replace]:
    """The edits that `ulsam` applies; arguments as there.

    Without `blocks`: of the last two widths that have several candidates, the last block each ("96+160" of MobileNetV2,
    "512" of V1); with `mode="add"`, after the last of these only.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    found = find(model, data)
    able = [b for b in found if b.replaceable or mode == "add"]
    if not able:
        raise SurgeryError(f"no block of {type(model).__name__} has an input of the same shape as its output")
    if blocks is None:
        chosen = _usual(able)[-1:] if mode == "add" else _usual(able)
    elif isinstance(blocks, str | int):
        chosen = _by_width(str(blocks), able)
    else:
        chosen = _by_name(list(blocks), found, able)
    for block in chosen:
        _check_groups(groups, block.width)
        h, w = block.shape[1:]
        if max(h, w) <= 2:
            log.warning("%s has a map of %dx%d, on which attention is uniform: give larger images", block.name, h, w)
    path = f"{ULSAM.__module__}.{ULSAM.__qualname__}"
    if mode == "add":
        return [Insert(b.name, "attention", path, {"channels": b.width, "groups": groups}) for b in chosen]
    return [Replace(b.name, path, {"channels": b.width, "groups": groups}) for b in chosen]


def find(model: nn.Module, data: Any) -> list[Block]:
    """The blocks with one depthwise convolution each, with at least one 1x1 convolution, from input to output.

    Args:
        data: as for `ulsam`.

    Raises:
        SurgeryError: there are none, or the model does not run on such an input.
    """
    names = list(_blocks(model, ""))
    if not names:
        raise SurgeryError(f"{type(model).__name__} has no blocks with a depthwise and a 1x1 convolution")
    example = example_of(data, model)
    if not isinstance(example, Tensor):
        raise ValueError(f"data must be a Data, a size (C, H, W) or a batch of images, got {type(data).__name__}")
    probe = meta_copy(model).eval()
    found: list[Block] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor) and out.ndim == 4:
                c, h, w = out.shape[1:]
                found.append(Block(name, (c, h, w), args[0].shape == out.shape))

        return hook

    for name in names:
        probe.get_submodule(name).register_forward_hook(watch(name))
    try:
        with torch.no_grad():
            probe(example.to("meta"))
    except Exception as e:  # whatever a third-party forward raises
        raise SurgeryError(f"{type(model).__name__} does not run on such an input: {e}") from e
    uses = Counter(b.name for b in found)
    return [b for b in found if uses[b.name] == 1]  # a block that is used twice stays


def _blocks(module: nn.Module, name: str) -> Iterator[str]:
    """Names of the outermost modules with exactly one depthwise convolution, and a 1x1 convolution."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    depthwise = sum(c.groups == c.in_channels > 1 and max(c.kernel_size) > 1 for c in convs)
    pointwise = any(c.groups == 1 and max(c.kernel_size) == 1 for c in convs)
    wrapper = isinstance(module, nn.Sequential) and len(module) == 1  # a stage of one block
    if depthwise == 1 and pointwise and name and not wrapper:
        yield name
    elif depthwise:
        for leaf, child in module.named_children():
            yield from _blocks(child, f"{name}.{leaf}" if name else leaf)


def _usual(able: Sequence[Block]) -> list[Block]:
    """The last block of each of the last two widths that have several; else the last block of all."""
    count = Counter(b.width for b in able)
    last = {b.width: b for b in able if count[b.width] > 1}  # in the order in which widths appear
    return list(last.values())[-2:] or [able[-1]]


def _by_width(text: str, able: Sequence[Block]) -> list[Block]:
    chosen: list[Block] = []
    for part in text.split("+"):
        m = re.fullmatch(r"\s*(\d+)(?:x(\d+))?\s*", part)
        if m is None or m[2] == "0":
            raise ValueError(f"blocks must be widths such as 96+160 or 96x2, or a list of names, got {text!r}")
        width, count = int(m[1]), int(m[2] or 1)
        same = [b for b in able if b.width == width and b not in chosen]
        if len(same) < count:
            have = ", ".join(f"{w}x{n}" for w, n in Counter(b.width for b in able).items())
            raise ValueError(f"blocks: there are {have}, got {text!r}")
        chosen += same[-count:]
    return [b for b in able if b in chosen]


def _by_name(names: Sequence[str], found: Sequence[Block], able: Sequence[Block]) -> list[Block]:
    if not names:
        raise ValueError("blocks must name at least one block, got none")
    for name in names:
        if name not in [b.name for b in found]:
            raise ValueError(f"blocks must be some of {', '.join(b.name for b in able)}, got {name!r}")
        if name not in [b.name for b in able]:
            raise ValueError(f"{name!r} changes the shape and cannot be replaced")
    return [b for b in able if b.name in names]


def _check_groups(groups: int, channels: int) -> None:
    if not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"groups must be a positive divisor of {channels} channels, got {groups!r}")
