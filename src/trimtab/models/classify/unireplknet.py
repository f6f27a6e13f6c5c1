"""UniRepLKNet: few large kernels, learned with small dilated ones beside them that are gone after training.

Zhang, Ding et al., "Scaling Up Your Kernels: Large Kernel Design in ConvNets towards Universal Representations",
arXiv 2410.08049 (UniRepLKNet, 2311.15599). A 13x13 depthwise convolution is trained with parallel branches of small
dilated kernels, each with its batch norm: sparse patterns of long reach are learned, and all branches are one dilated
kernel, written out with zeros and added to the large one. Depth comes from 3x3 blocks; squeeze-excite and global
response normalization do the rest.

`UniRepLKNet` are the networks, `DilatedReparam` the block of branches. `trimtab.compress.merge` merges them, and the
norms, layer scale and biases of whole blocks, in any model. `unireplknet` is the surgery that puts such branches beside
the depthwise convolutions of any other model.

What differs from the paper or its code:

- Features for dense tasks (`features_only`) are the outputs of the stages; their layer norms are the task's.
- Kernel sizes beyond those of the released nets must be given; the released code guesses them from the depths.
- The released helper can merge float32 weights only; here any type can be.
- The surgery starts the large kernel at the original minus the branches, so that a trained model computes what it did.

Published sizes are those of the merged networks. GRN takes norms over the whole map: other sizes, crops and padding
change what it does.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, LayerScale2d, SqueezeExcite, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from trimtab.core.card import Card, Claim
from trimtab.core.edit import Replace, apply
from trimtab.core.errors import SurgeryError
from trimtab.nn.classifier import Classifier, check_image_input, check_sizes
from trimtab.nn.merge import Plain, depthwise, dilate, fold_norm, gain_and_shift, pad_to, plain_conv, plain_linear

CARD = Card(
    slug="unireplknet",
    title="Scaling Up Your Kernels: Large Kernel Design in ConvNets towards Universal Representations",
    arxiv="2410.08049",
    year=2024,
    kind="architecture",
    tasks=("classify",),
    claims=(
        Claim(
            "reparam_equivalence",
            "A large-kernel depthwise conv trained with parallel dilated small-kernel branches merges exactly into one "
            "non-dilated large kernel; block BNs, layer scale and the GRN bias fold too",
        ),
        Claim(
            "accuracy",
            "ImageNet 88.0% (XL, 22k pre-trained, 384), 83.2% T, 77.0% A; ADE20K 55.6 mIoU; COCO 56.4 box AP",
        ),
        Claim(
            "large_erf",
            "A few large kernels give a much larger effective receptive field than stacking small ones",
        ),
        Claim(
            "branches_help",
            "Training with the dilated branches beats the same kernel without branches or with dense small branches, "
            "at identical inference cost",
        ),
    ),
)

# Kernel of the large convolution: (kernel, dilation) of each branch beside it.
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
KINDS = ("dilated", "dense", "none")
LARGE = 7  # from this kernel size on, a block of the network has branches
_LAYOUTS: dict[tuple[int, ...], tuple[int, ...]] = {  # kernels of stage 3, repeated
    (2, 2, 6, 2): (13,),
    (2, 2, 8, 2): (13,),
    (3, 3, 18, 3): (13, 3),
    (3, 3, 27, 3): (13, 3, 3),
}


def branches_of(kernel_size: int, kind: str = "dilated") -> tuple[tuple[int, int], ...]:
    """(kernel, dilation) of the branches beside a large kernel; of "dense" ones the dilation is 1.

    >>> branches_of(7, "dense")
    ((5, 1), (3, 1), (3, 1))
    """
    if kind not in KINDS:
        raise ValueError(f"branches must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "none":
        return ()
    if kernel_size not in BRANCHES:
        raise ValueError(f"kernel_size must be one of {', '.join(map(str, BRANCHES))}, got {kernel_size!r}")
    return tuple((k, r if kind == "dilated" else 1) for k, r in BRANCHES[kernel_size])


class DilatedReparam(nn.Module):
    """A depthwise K x K convolution and small ones beside it, each with its batch norm, added up: keeps (B, C, H, W).

    Args:
        branches: "dilated", "dense", "none", or (kernel, dilation) of each; reaches are odd and at most K.

    >>> layer = DilatedReparam(8, 13)
    >>> sum(p.numel() for p in layer.parameters()), layer(torch.zeros(2, 8, 7, 7)).shape
    (2256, torch.Size([2, 8, 7, 7]))
    """

    def __init__(
        self, channels: int, kernel_size: int, *, stride: Any = 1, branches: str | Sequence[Sequence[int]] = "dilated"
    ):
        super().__init__()
        pairs = branches_of(kernel_size, branches) if isinstance(branches, str) else branches
        for k, r in pairs:
            if k % 2 == 0 or _reach(k, r) > kernel_size:
                raise ValueError(f"a branch must be odd and reach at most {kernel_size}, got kernel {k}, dilation {r}")
        self.conv = _depthwise(channels, kernel_size, stride)
        self.norm = nn.BatchNorm2d(channels)
        self.branches = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=_depthwise(channels, k, stride, r), norm=nn.BatchNorm2d(channels)))
            for k, r in pairs
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        for branch in self.branches:
            y = y + branch(x)
        return y

    def kernel(self) -> tuple[Tensor, Tensor]:
        """Weight (C, 1, K, K) and bias (C) of the one convolution that it is in eval mode, in float64."""
        weight, bias = fold_norm(self.conv.weight, self.conv.bias, self.norm)
        for branch in self.branches:
            conv: Any = branch.get_submodule("conv")
            small, more = fold_norm(conv.weight, None, branch.get_submodule("norm"))
            weight = weight + pad_to(dilate(small, conv.dilation[0]), weight.shape[-1])
            bias = bias + more
        return weight, bias

    def merged_parts(self) -> Mapping[str, Plain | None]:
        return {"": _plain_like(self.conv, *self.kernel())}


class GRN(nn.Module):
    """Global response normalization, channels last: (B, H, W, C); the identity when fresh."""

    def __init__(self, dim: int, *, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # (B, 1, 1, C)
        x = x * (self.weight * norm / (norm.mean(-1, keepdim=True) + 1e-6) + 1)
        return x if self.bias is None else x + self.bias


class UniRepBlock(nn.Module):
    """Depthwise mixing and squeeze-excite, then two linear layers with GRN between, on a residual: keeps (B, C, H, W).

    Args:
        kernel_size: branches from 7 on; 3 and 5 are plain convolutions, 0 mixes nothing.
        layer_scale_init: of the factors on the residual; 0 has none.
        deploy: the merged form.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        *,
        branches: str = "dilated",
        drop_path: float = 0.0,
        layer_scale_init: float = 1e-6,
        deploy: bool = False,
    ):
        super().__init__()
        self.mixer: Any
        if kernel_size == 0:
            self.mixer = nn.Identity()
        elif kernel_size < LARGE or deploy:
            self.mixer = _depthwise(dim, kernel_size, bias=deploy)
        else:
            self.mixer = DilatedReparam(dim, kernel_size, branches=branches)
        self.norm1 = nn.Identity() if deploy or kernel_size == 0 else nn.BatchNorm2d(dim)
        self.se = SqueezeExcite(dim, rd_channels=dim // 4)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GRN(4 * dim, bias=not deploy)
        self.fc2 = nn.Linear(4 * dim, dim, bias=deploy)
        self.norm2 = nn.Identity() if deploy else nn.BatchNorm2d(dim)
        self.scale = nn.Identity() if deploy or not layer_scale_init else LayerScale2d(dim, layer_scale_init)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.norm1(self.mixer(x))).permute(0, 2, 3, 1)  # (B, H, W, C)
        y = self.fc2(self.grn(self.act(self.fc1(y)))).permute(0, 3, 1, 2)
        return x + self.drop_path(self.scale(self.norm2(y)))

    def merged_parts(self) -> Mapping[str, Plain | None]:
        """Squeeze-excite and the scale of GRN depend on the input, and stay."""
        parts: dict[str, Plain | None] = {}
        if isinstance(self.norm1, nn.BatchNorm2d):
            several = isinstance(self.mixer, DilatedReparam)
            conv: Any = self.mixer.conv if several else self.mixer
            kernel, offset = self.mixer.kernel() if several else (conv.weight, conv.bias)  # branches before the norm
            parts["mixer"] = _plain_like(conv, *fold_norm(kernel, offset, self.norm1))
            parts["norm1"] = None
        if isinstance(self.norm2, nn.BatchNorm2d):
            weight, (gain, shift) = self.fc2.weight.detach().double(), gain_and_shift(self.norm2)
            bias = shift if self.grn.bias is None else shift + gain * (weight @ self.grn.bias.detach().double())
            if isinstance(self.scale, LayerScale2d):  # multiplies the bias as well
                gamma = self.scale.gamma.detach().double()
                gain, bias = gain * gamma, bias * gamma
                parts["scale"] = None
            like = self.fc2.weight
            parts["fc2"] = plain_linear((weight * gain[:, None]).to(like), bias.to(like))
            parts["norm2"] = None
            size = {"dim": len(self.grn.weight), "bias": False}
            parts["grn"] = Plain(f"{__name__}.{GRN.__qualname__}", size, {"weight": self.grn.weight.detach()})
        return parts


class UniRepLKNet(Classifier):
    """Stem, four stages, mean, layer norm, linear: (B, in_chans, H, W) -> (B, num_classes).

    Args:
        dims, depths: of the four stages.
        kernel_sizes: of the blocks of each stage, such as ((3,), (7,), (9, 3, 9), (5,)); None: those of the released
            networks, known for their depths only.
        stem_stride: 4 (two convolutions), or 2 (one) for small images.
        branches: beside kernels of 7 and more: "dilated", "dense" (for comparison) or "none".
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        head_init_scale: factor on the classifier's first weights.
        deploy: the merged form, to load merged weights into.

    >>> net = UniRepLKNet(dims=(8, 16, 16, 16), depths=(1, 1, 1, 1), kernel_sizes=((3,), (7,), (9,), (5,)))
    >>> net(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 1000])
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (40, 80, 160, 320),
        depths: Sequence[int] = (2, 2, 6, 2),
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        stem_stride: int = 4,
        branches: str = "dilated",
        layer_scale_init: float = 1e-6,
        drop_path_rate: float = 0.0,
        head_init_scale: float = 1.0,
        deploy: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        check_sizes(num_classes=num_classes, in_chans=in_chans)
        kernels = _kernels(dims, depths, kernel_sizes)
        if stem_stride not in (2, 4):
            raise ValueError(f"stem_stride must be 2 or 4, got {stem_stride!r}")
        branches_of(13, branches)
        self.head_init_scale = head_init_scale
        self.grad_checkpointing = False
        stem: list[nn.Module] = [_halve(in_chans, dims[0])]
        if stem_stride == 4:
            stem = [_halve(in_chans, dims[0] // 2), nn.GELU(), _halve(dims[0] // 2, dims[0])]
        self.stem = nn.Sequential(*stem)
        rates = [drop_path_rate * n / max(1, sum(depths) - 1) for n in range(sum(depths))]
        stages = []
        for i, dim in enumerate(dims):
            blocks = [
                UniRepBlock(
                    dim, k, branches=branches, drop_path=rates[sum(depths[:i]) + j], layer_scale_init=layer_scale_init,
                    deploy=deploy,
                )
                for j, k in enumerate(kernels[i])
            ]  # fmt: skip
            down = _halve(dims[i - 1], dim) if i else nn.Identity()
            stages.append(nn.Sequential(OrderedDict(down=down, blocks=nn.Sequential(*blocks))))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.feature_info = [
            {"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.apply(_init_weights)
        self._make_head(dims[-1], num_classes, in_chans, global_pool, drop_rate)

    def _init_classifier(self, head: nn.Linear) -> None:
        _init_weights(head)
        with torch.no_grad():
            head.weight.mul_(self.head_init_scale)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates."""
        fine = [(r"^stages\.(\d+)\.down", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: blocks are computed again in the backward pass."""
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        check_image_input(x, self.in_chans)
        x = self.stem(x)
        for stage in self.stages:
            x = stage.get_submodule("down")(x)
            blocks = stage.get_submodule("blocks")
            again = self.grad_checkpointing and self.training
            x = checkpoint_seq(blocks, x) if again else blocks(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, num_classes), or (B, C) with `pre_logits`; the map itself with `global_pool=""`."""
        x = self.global_pool(x)
        x = self.norm(x) if x.ndim == 2 else x
        x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.get_classifier()(x)


# ---------------------------------------------------------------------------------------------------------- the surgery


def unireplknet(
    model: nn.Module, data: Any = None, *, min_kernel: int = 5, branches: str = "dilated", seed: int = 0
) -> nn.Module:
    """A copy of `model` whose depthwise convolutions have branches beside them; its edits are remembered.

    It computes what the model computes (in eval mode), has more to train, and is merged back afterwards by
    `trimtab.compress.merge`.

    Args:
        data: not looked at; all methods take it.
        min_kernel: convolutions from this size on, of the sizes in `BRANCHES`.
        branches: "dilated" or "dense".
        seed: of the branches.

    Raises:
        SurgeryError: there is no such convolution.

    >>> import timm
    >>> net = timm.create_model("convnext_atto", num_classes=10)
    >>> sum(isinstance(m, DilatedReparam) for m in unireplknet(net).modules())
    12
    """
    edits = plan(model, data, min_kernel=min_kernel, branches=branches)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        changed = apply(copy.deepcopy(model), edits)
        for e in edits:
            _start_as(changed.get_submodule(e.module), model.get_submodule(e.module))
    return changed


def plan(model: nn.Module, data: Any = None, *, min_kernel: int = 5, branches: str = "dilated") -> list[Replace]:
    """The edits that `unireplknet` applies; arguments as there."""
    if branches not in KINDS[:2]:
        raise ValueError(f"branches must be one of {', '.join(KINDS[:2])}, got {branches!r}")
    found = {
        name: conv
        for name, conv in depthwise(model).items()
        if type(conv) is nn.Conv2d and max(conv.dilation) == 1
        and conv.kernel_size[0] in BRANCHES and conv.kernel_size[0] >= min_kernel
    }  # fmt: skip
    if not found:
        raise SurgeryError(f"{type(model).__name__} has no depthwise convolution of {max(min_kernel, 5)}x or more")
    path = f"{__name__}.{DilatedReparam.__qualname__}"
    return [
        Replace(name, path, {"channels": c.in_channels, "kernel_size": c.kernel_size[0], "stride": list(c.stride),
                             "branches": branches})
        for name, c in found.items()
    ]  # fmt: skip


def _start_as(layer: Any, conv: Any) -> None:
    """Let the sum of large kernel and branches be the kernel of `conv`, and the bias of the first norm its bias."""
    layer.to(conv.weight)
    layer.conv.weight.zero_()
    gain, _ = gain_and_shift(layer.norm)
    rest = conv.weight.double() - layer.kernel()[0]
    layer.conv.weight.copy_(rest / gain.view(-1, 1, 1, 1))
    if conv.bias is not None:
        layer.norm.bias.copy_(conv.bias)


# -------------------------------------------------------------------------------------------------------------- helpers


# Names in the released checkpoints, in the order in which they are replaced.
_RELEASED = (
    (r"^downsample_layers\.0\.([01])\.", r"stem.0.\1."),
    (r"^downsample_layers\.0\.3\.", "stem.2.0."),
    (r"^downsample_layers\.0\.4\.", "stem.2.1."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.down."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"(blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"\.dwconv\.origin_bn\.", ".mixer.norm."),
    (r"\.dwconv\.lk_origin\.", ".mixer.conv."),
    (r"\.dwconv\.", ".mixer."),
    (r"\.se\.down\.", ".se.fc1."),
    (r"\.se\.up\.", ".se.fc2."),
    (r"\.pwconv1\.1\.", ".fc1."),
    (r"\.act\.1\.gamma$", ".grn.weight"),
    (r"\.act\.1\.beta$", ".grn.bias"),
    (r"\.pwconv2\.0\.", ".fc2."),
    (r"\.pwconv2\.2\.", ".norm2."),
    (r"\.gamma$", ".scale.gamma"),
)


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The released checkpoints, merged or not, with our names; a state dict of ours passes as it is."""
    if "downsample_layers.0.0.weight" not in state:
        return state
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        for old, new in _RELEASED:
            name = re.sub(old, new, name)
        ours[name] = value.flatten() if ".grn." in name else value
    for name in [n for n in ours if ".mixer.dil_" in n]:
        block, leaf = name.split(".mixer.dil_")
        kind, k, r, rest = re.split(r"_k(\d+)_(\d+)\.", leaf)
        index = BRANCHES[ours[f"{block}.mixer.conv.weight"].shape[-1]].index((int(k), int(r)))
        ours[f"{block}.mixer.branches.{index}.{kind.replace('bn', 'norm')}.{rest}"] = ours.pop(name)
    for name in [n for n in ours if n.endswith(".mixer.conv.bias")]:  # merged: the convolution is all there is
        block = name.removesuffix(".conv.bias")
        ours |= {f"{block}.{leaf}": ours.pop(f"{block}.conv.{leaf}") for leaf in ("weight", "bias")}
    return ours


def _reach(kernel: int, dilation: int) -> int:
    return dilation * (kernel - 1) + 1


def _depthwise(channels: int, kernel: int, stride: Any = 1, dilation: int = 1, *, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(
        channels, channels, kernel, stride, _reach(kernel, dilation) // 2, dilation, groups=channels, bias=bias
    )


def _plain_like(conv: Any, weight: Tensor, bias: Tensor) -> Plain:
    like = conv.weight
    return plain_conv(
        weight.to(like), bias.to(like), stride=conv.stride, padding=conv.padding, groups=len(weight)
    )  # fmt: skip


def _halve(in_chs: int, out_chs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_chs, out_chs, 3, 2, 1), LayerNorm2d(out_chs, eps=1e-6))


def _kernels(dims: Sequence[int], depths: Sequence[int], given: Any) -> tuple[tuple[int, ...], ...]:
    if len(dims) != 4 or len(depths) != 4:
        raise ValueError(f"dims and depths must be four numbers each, got {tuple(dims)} and {tuple(depths)}")
    for dim, depth in zip(dims, depths):
        check_sizes(dims=dim, depths=depth)
        if dim < 4:
            raise ValueError(f"dims must be 4 or more, got {dim}")
    if given is None:
        if tuple(depths) not in _LAYOUTS:
            raise ValueError(f"kernel_sizes must be given for depths other than {list(_LAYOUTS)}, got {tuple(depths)}")
        third = (_LAYOUTS[tuple(depths)] * depths[2])[: depths[2]]
        return (3,) * depths[0], (13,) * depths[1], third, (13,) * depths[3]
    kernels = tuple(tuple(stage) for stage in given)
    if [len(stage) for stage in kernels] != list(depths):
        raise ValueError(f"kernel_sizes must be {tuple(depths)} numbers in the stages, got {kernels}")
    for k in (k for stage in kernels for k in stage):
        if k not in (0, 3, *BRANCHES):
            raise ValueError(f"kernel_sizes must be of 0, 3, {', '.join(map(str, BRANCHES))}, got {k!r}")
    return kernels


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------------------- networks


def _cfg(size: int = 224, num_classes: int = 1000) -> dict[str, Any]:
    small = size == 32
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (3, size, size),
        "pool_size": (2, 2) if small else (7, 7),
        "crop_pct": 1.0 if small else 0.875,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465) if small else (0.485, 0.456, 0.406),
        "std": (0.2470, 0.2435, 0.2616) if small else (0.229, 0.224, 0.225),
        "first_conv": "stem.0.0",
        "classifier": "head",
    }


_NETS: dict[str, dict[str, Any]] = {
    "a": {"dims": (40, 80, 160, 320), "depths": (2, 2, 6, 2)},
    "f": {"dims": (48, 96, 192, 384), "depths": (2, 2, 6, 2)},
    "p": {"dims": (64, 128, 256, 512), "depths": (2, 2, 6, 2)},
    "n": {"dims": (80, 160, 320, 640), "depths": (2, 2, 8, 2)},
    "t": {"dims": (80, 160, 320, 640), "depths": (3, 3, 18, 3)},
    "s": {"dims": (96, 192, 384, 768), "depths": (3, 3, 27, 3)},
    "b": {"dims": (128, 256, 512, 1024), "depths": (3, 3, 27, 3)},
    "l": {"dims": (192, 384, 768, 1536), "depths": (3, 3, 27, 3)},
    "xl": {"dims": (256, 512, 1024, 2048), "depths": (3, 3, 27, 3)},
    "micro_32": {
        "dims": (24, 48, 96, 192), "depths": (1, 1, 3, 1), "kernel_sizes": ((3,), (7,), (9, 3, 9), (5,)),
        "stem_stride": 2, "layer_scale_init": 0.1,
    },
}  # fmt: skip
default_cfgs = generate_default_cfgs({f"unireplknet_{n}": _cfg(32, 10) if n == "micro_32" else _cfg() for n in _NETS})


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> UniRepLKNet:
    return build_model_with_cfg(
        UniRepLKNet,
        f"unireplknet_{variant}",
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**_NETS[variant], **kwargs},
    )


@register_model
def unireplknet_a(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """4,437,300 parameters merged, 0.640 G MACs at 224."""
    return _create("a", pretrained, kwargs)


@register_model
def unireplknet_f(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """6,235,216 parameters merged, 0.905 G MACs at 224."""
    return _create("f", pretrained, kwargs)


@register_model
def unireplknet_p(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """10,741,704 parameters merged, 1.573 G MACs at 224."""
    return _create("p", pretrained, kwargs)


@register_model
def unireplknet_n(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """18,318,560 parameters merged, 2.767 G MACs at 224."""
    return _create("n", pretrained, kwargs)


@register_model
def unireplknet_t(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """31,037,980 parameters merged, 4.899 G MACs at 224."""
    return _create("t", pretrained, kwargs)


@register_model
def unireplknet_s(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """55,645,984 parameters merged, 9.094 G MACs at 224."""
    return _create("s", pretrained, kwargs)


@register_model
def unireplknet_b(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """98,008,456 parameters merged, 16.06 G MACs at 224."""
    return _create("b", pretrained, kwargs)


@register_model
def unireplknet_l(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """218,454,616 parameters merged; pre-trained at 192, used at 384."""
    return _create("l", pretrained, kwargs)


@register_model
def unireplknet_xl(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """386,529,064 parameters merged; pre-trained at 192, used at 384."""
    return _create("xl", pretrained, kwargs)


@register_model
def unireplknet_micro_32(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """For images of 32 pixels: maps of 16, 8, 4 and 2, kernels of 3, 7, 9 and 5."""
    return _create("micro_32", pretrained, kwargs)
