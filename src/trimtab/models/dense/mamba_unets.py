"""U-shaped state-space segmenters: `VMUNet` (pure) and `UMamba` (a U-Net of convolutions, with Mamba or without).

Two families of `models.classify.mamba_survey` (arXiv 2410.02362): Ruan et al., "VM-UNet", 2402.02491; Ma et al.,
"U-Mamba", 2401.04722. Both give logits per pixel, (B, num_classes, H, W), also for one class (the sigmoid belongs to
the loss). They are trained by `tt.fit` on data whose labels are maps (B, H, W). Deep supervision, which the published
sizes of U-Mamba include, gives several logits while training and needs a loss of its own (or `deep_supervision=False`).

Traps of the released code that are kept, being what was measured: the Mamba layer of U-Mamba REPLACES the map
(`residual=True` adds it, as the paper's figure suggests); the deepest decoder stage of VM-UNet does not expand; skips
are added before the expansion; the last decoder stage of U-Mamba gets no skip. U-Mamba "enc" reads maps with no more
pixels than channels channel by channel, which fixes the image size when it is built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.nn.classifier import check_sizes
from trimtab.nn.scan import SCANS
from trimtab.nn.segmenter import Segmenter
from trimtab.nn.ssm import S6, Down, PatchMerging, VSSBlock, init_linears

# -------------------------------------------------------------------------------------------------------------- VM-UNet


class Expand(nn.Module):
    """The inverse of `PatchMerging`: (B, H, W, C) -> (B, f H, f W, C'), where f^2 C' is `wider` times C."""

    def __init__(self, dim: int, factor: int, wider: int):
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(dim, wider * dim, bias=False)
        self.norm = nn.LayerNorm(wider * dim // factor**2)

    def forward(self, x: Tensor) -> Tensor:
        f = self.factor
        x = self.expand(x).unflatten(-1, (f, f, -1))  # (B, H, W, f, f, C')
        x = x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
        return self.norm(x)


class VMUNet(Segmenter):
    """`VSSBlock` down and up again, skips added: (B, in_chans, H, W) -> (B, num_classes, H, W).

    Args:
        dim: width of the first stage; each next is twice as wide.
        depths: of the encoder, from the image down. depths_decoder: from the deepest up.
        patch: side of the patches.
        scan: of `nn.scan.SCANS`.

    Raises:
        ValueError: sizes of images that are not multiples of `patch` x 2^(stages - 1).

    >>> VMUNet(dim=16, depths=(1, 1), depths_decoder=(1, 1), state=2)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 1, 32, 32])
    """

    def __init__(
        self,
        *,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        depths_decoder: Sequence[int] = (2, 2, 2, 1),
        patch: int = 4,
        state: int = 16,
        scan: str = "cross2d",
        drop_path_rate: float = 0.0,
        num_classes: int = 1,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        check_sizes(num_classes=num_classes, in_chans=in_chans, dim=dim, patch=patch)
        if len(depths) != len(depths_decoder):
            raise ValueError(f"depths and depths_decoder must be equally many, got {depths} and {depths_decoder}")
        if scan not in SCANS:
            raise ValueError(f"scan must be one of {', '.join(SCANS)}, got {scan!r}")
        if dim % patch:
            raise ValueError(f"dim must be a multiple of patch = {patch}, got {dim}")
        dims = [dim * 2**i for i in range(len(depths))]
        self.multiple = patch * 2 ** (len(depths) - 1)

        def blocks(width: int, rates: Sequence[float]) -> nn.Sequential:
            return nn.Sequential(*(VSSBlock(width, state=state, scan=scan, drop_path=r) for r in rates))

        down, up = _ramp(drop_path_rate, depths), _ramp(drop_path_rate, depths_decoder[::-1])[::-1]
        self.stem = Down(in_chans, dim, patch, patch)
        self.encoder = nn.ModuleList(blocks(width, rates) for width, rates in zip(dims, down))
        self.merge = nn.ModuleList(PatchMerging(width) for width in dims[:-1])
        self.expand = nn.ModuleList(Expand(width, 2, 2) for width in dims[:0:-1])
        self.decoder = nn.ModuleList(blocks(width, rates[::-1]) for width, rates in zip(dims[::-1], up))
        self.final = Expand(dim, patch, patch)
        self.feature_info = [
            {"num_chs": width, "reduction": patch * 2**i, "module": f"encoder.{i}"} for i, width in enumerate(dims)
        ]
        init_linears(self)
        self._make_head(dim // patch, num_classes, in_chans, "", drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        self._check(x)
        x = self.stem(x.permute(0, 2, 3, 1))
        skips = []
        for i, stage in enumerate(self.encoder):
            skips.append(x)
            x = stage(x)
            if i < len(self.merge):
                x = self.merge[i](x)
        x = self.decoder[0](x)
        for stage, expand, skip in zip(self.decoder[1:], self.expand, reversed(skips)):
            x = stage(expand(x + skip))
        return self.final(x + skips[0]).permute(0, 3, 1, 2)


def _ramp(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates that grow linearly from 0 over all blocks, by stage."""
    count, flat = sum(depths), iter(range(sum(depths)))
    return [[last * next(flat) / max(1, count - 1) for _ in range(depth)] for depth in depths]


# -------------------------------------------------------------------------------------------------------------- U-Mamba


class Residual(nn.Module):
    """Two 3 x 3 convolutions with instance norms on a residual, which is a 1 x 1 convolution where `project`."""

    def __init__(self, into: int, out: int, stride: int = 1, *, project: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, padding=1)
        self.norm1 = nn.InstanceNorm2d(out, affine=True)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.norm2 = nn.InstanceNorm2d(out, affine=True)
        self.shortcut = nn.Conv2d(into, out, 1, stride) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)))
        return F.leaky_relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class MambaLayer(nn.Module):
    """Layer norm and `S6` over the pixels of a map, or over its channels (`by_channel`): keeps (B, C, H, W)."""

    def __init__(self, dim: int, *, by_channel: bool = False, residual: bool = False):
        super().__init__()
        self.by_channel, self.residual = by_channel, residual
        self.norm = nn.LayerNorm(dim)
        self.mixer = S6(dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2) if self.by_channel else x.flatten(2).transpose(-1, -2)
        y = self.mixer(self.norm(tokens))
        y = (y if self.by_channel else y.transpose(-1, -2)).unflatten(2, x.shape[2:])
        return x + y if self.residual else y


class UMamba(Segmenter):
    """A residual U-Net with Mamba layers: (B, in_chans, H, W) -> (B, num_classes, H, W).

    Args:
        dims: of the stages, from full resolution down; each halves the map.
        blocks: residual blocks of a stage; the deeper half has one.
        mamba: "bot" (one layer, on the deepest map), "enc" (after every second stage), "none" (a plain U-Net).
        residual: add the Mamba layer's result to the map instead of replacing it.
        img_size: of the images; fixed for "enc".
        deep_supervision: a classifier after each decoder stage; in training mode all logits are given, in a list from
            full resolution down. False has the last only.

    >>> UMamba(dims=(8, 16), img_size=16)(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 2, 16, 16])
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (32, 64, 128, 256, 512, 512, 512),
        blocks: int = 2,
        mamba: str = "bot",
        residual: bool = False,
        img_size: int | Sequence[int] = 256,
        deep_supervision: bool = False,
        num_classes: int = 2,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        check_sizes(num_classes=num_classes, in_chans=in_chans, blocks=blocks)
        if mamba not in ("bot", "enc", "none"):
            raise ValueError(f"mamba must be bot, enc or none, got {mamba!r}")
        if len(dims) < 2:
            raise ValueError(f"dims must be of two stages or more, got {tuple(dims)}")
        stages, self.multiple = len(dims), 2 ** (len(dims) - 1)
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.fixed_size = size if mamba == "enc" else None
        self.stem = _stage(in_chans, dims[0], blocks)
        self.encoder, self.mamba = nn.ModuleList(), nn.ModuleList()
        for i, dim in enumerate(dims):
            deep = i >= math.ceil(stages / 2)
            self.encoder.append(_stage(dims[max(0, i - 1)], dim, 1 if deep else blocks, stride=2 if i else 1))
            pixels = math.prod(s // 2**i for s in size)
            here = i == stages - 1 if mamba == "bot" else mamba == "enc" and (stages - 1 - i) % 2 == 0
            by_channel = mamba == "enc" and pixels <= dim
            layer = MambaLayer(pixels if by_channel else dim, by_channel=by_channel, residual=residual)
            self.mamba.append(layer if here else nn.Identity())
        self.lift, self.decoder, self.side_heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, (below, dim) in enumerate(pairwise(dims[::-1])):
            last, deep = i == stages - 2, i >= math.ceil((stages - 1) / 2 + 0.5)
            self.lift.append(nn.Conv2d(below, dim, 1))
            self.decoder.append(_stage(dim if last else 2 * dim, dim, 1 if deep else blocks))
            if deep_supervision and not last:
                self.side_heads.append(nn.Conv2d(dim, num_classes, 1))
        self.feature_info = [
            {"num_chs": dim, "reduction": 2**i, "module": f"encoder.{i}"} for i, dim in enumerate(dims)
        ]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._make_head(dims[0], num_classes, in_chans, "", drop_rate)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As of every segmenter; the classifiers of deep supervision follow, and go with 0 classes."""
        super().reset_classifier(num_classes)
        like = next(self.parameters())
        sides: Any = self.side_heads
        if any(head.out_channels != num_classes for head in sides):
            fresh = [nn.Conv2d(head.in_channels, num_classes, 1) for head in sides if num_classes]
            self.side_heads = nn.ModuleList(head.to(device=like.device, dtype=like.dtype) for head in fresh)

    def _decode(self, x: Tensor) -> list[Tensor]:
        """Outputs of the decoder stages, the full resolution last."""
        self._check(x)
        if self.fixed_size is not None and tuple(x.shape[2:]) != self.fixed_size:
            raise ValueError(f"this model was built for images of {self.fixed_size}, got {tuple(x.shape[2:])}")
        x, skips = self.stem(x), []
        for stage, mamba in zip(self.encoder, self.mamba):
            x = mamba(stage(x))
            skips.append(x)
        outputs = []
        for i, (lift, stage) in enumerate(zip(self.lift, self.decoder)):
            x = lift(F.interpolate(x, scale_factor=2, mode="nearest"))
            if i < len(self.decoder) - 1:
                x = torch.cat([x, skips[-i - 2]], 1)
            x = stage(x)
            outputs.append(x)
        return outputs

    def forward_features(self, x: Tensor) -> Tensor:
        return self._decode(x)[-1]

    def forward(self, x: Tensor) -> Any:
        outputs = self._decode(x)
        logits = self.forward_head(outputs[-1])
        if not self.training or not self.side_heads:
            return logits
        return [logits, *(head(y) for head, y in zip(self.side_heads[::-1], outputs[-2::-1]))]


def _stage(into: int, out: int, blocks: int, stride: int = 1) -> nn.Sequential:
    more = (Residual(out, out, project=False) for _ in range(blocks - 1))
    return nn.Sequential(Residual(into, out, stride), *more)


# ------------------------------------------------------------------------------------------------------------- networks


def _cfg(side: int, num_classes: int, first_conv: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (3, side, side),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "first_conv": first_conv,
        "classifier": "head",
    }


_NANO: dict[str, Any] = {"dims": (16, 32, 48, 64), "blocks": 1, "img_size": 32}
_NETS: dict[str, tuple[type[Segmenter], int, int, dict[str, Any]]] = {  # class, image size, classes, arguments
    "vm_unet": (VMUNet, 256, 1, {}),
    "vm_unet_large": (VMUNet, 256, 1, {"depths": (2, 2, 9, 2), "depths_decoder": (2, 9, 2, 2)}),
    "vm_unet_nano_32": (
        VMUNet, 32, 2, {"dim": 24, "depths": (1, 1, 1), "depths_decoder": (1, 1, 1), "patch": 2, "state": 4},
    ),
    "u_mamba_bot": (UMamba, 256, 2, {"deep_supervision": True}),
    "u_mamba_enc": (UMamba, 256, 2, {"deep_supervision": True, "mamba": "enc"}),
    "u_mamba_bot_nano_32": (UMamba, 32, 2, _NANO),
    "u_mamba_enc_nano_32": (UMamba, 32, 2, _NANO | {"mamba": "enc"}),
    "u_net_nano_32": (UMamba, 32, 2, _NANO | {"mamba": "none"}),
}  # fmt: skip
default_cfgs = generate_default_cfgs(
    {
        name: _cfg(side, classes, "stem.conv" if cls is VMUNet else ("stem.0.conv1", "stem.0.shortcut"))  # type: ignore[arg-type]
        for name, (cls, side, classes, _) in _NETS.items()
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    cls, _, _, arguments = _NETS[name]
    return build_model_with_cfg(cls, name, pretrained, **{**arguments, **kwargs})


@register_model
def vm_unet(pretrained: bool = False, **kwargs: Any) -> VMUNet:
    """27,427,561 parameters, 5.288 G MACs at 256."""
    return _create("vm_unet", pretrained, kwargs)


@register_model
def vm_unet_large(pretrained: bool = False, **kwargs: Any) -> VMUNet:
    """44,273,833 parameters, 9.737 G MACs at 256."""
    return _create("vm_unet_large", pretrained, kwargs)


@register_model
def vm_unet_nano_32(pretrained: bool = False, **kwargs: Any) -> VMUNet:
    """For images of 32 pixels: patches of 2 x 2, three stages."""
    return _create("vm_unet_nano_32", pretrained, kwargs)


@register_model
def u_mamba_bot(pretrained: bool = False, **kwargs: Any) -> UMamba:
    """47,514,892 parameters, 26.220 G MACs for one channel at 256."""
    return _create("u_mamba_bot", pretrained, kwargs)


@register_model
def u_mamba_enc(pretrained: bool = False, **kwargs: Any) -> UMamba:
    """46,387,532 parameters, 27.442 G MACs for one channel at 256."""
    return _create("u_mamba_enc", pretrained, kwargs)


@register_model
def u_mamba_bot_nano_32(pretrained: bool = False, **kwargs: Any) -> UMamba:
    """For images of 32 pixels: four stages of 16 to 64 channels."""
    return _create("u_mamba_bot_nano_32", pretrained, kwargs)


@register_model
def u_mamba_enc_nano_32(pretrained: bool = False, **kwargs: Any) -> UMamba:
    """The same with Mamba layers after the second and the fourth stage."""
    return _create("u_mamba_enc_nano_32", pretrained, kwargs)


@register_model
def u_net_nano_32(pretrained: bool = False, **kwargs: Any) -> UMamba:
    """The same without Mamba: a plain residual U-Net."""
    return _create("u_net_nano_32", pretrained, kwargs)
