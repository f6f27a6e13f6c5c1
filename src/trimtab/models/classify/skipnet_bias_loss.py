"""SkipNet: a MobileNetV3-like network with two long connections from its first block (Abrahamyan, Ziatchin, Chen,
Deligiannis, "Bias Loss for Mobile Neural Networks", ICCV 2021, arXiv 2107.11170).

In a compact network the last feature map of some images has little variety, and the prediction is a guess. Two "skip
blocks" carry what the first, high-resolution block saw to the middle of the network, so that late maps stay diverse.
The other half of the paper, a loss that trusts varied samples more, is `trimtab.learn.regularize.bias_loss`: it works
with any classifier.

The models are called ``skipblocknet_*``, as in the authors' later code: two unrelated networks are called SkipNet. What
differs from that code: the skip blocks pool to the size that the trunk has, not to 28 and 14, so that any image size
works (at 224 it is the same), and they follow the width of the first block, so that other widths than 1 work. Only
``skipblocknet_m`` is published; the others are inferred from plotted sizes, ``_l`` only roughly. The blocks are timm's:
squeeze-and-excitation comes after the activation.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from timm.layers import ConvNormAct, make_divisible
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from timm.models._features import feature_take_indices
from torch import Tensor

from trimtab.core.card import Card, Claim
from trimtab.nn.classifier import Classifier, check_image_input, check_sizes

CARD = Card(
    slug="skipnet_bias_loss",
    title="Bias Loss for Mobile Neural Networks",
    arxiv="2107.11170",
    year=2021,
    kind="architecture",
    tasks=("classify",),
    claims=(
        Claim(
            "bias_loss",
            "Weighting each sample's cross-entropy by the (normalised) variance of its last feature map improves "
            "compact nets: CIFAR-100 ResNet-18 74.33 -> 75.51, DenseNet-121 75.98 -> 77.83, ShuffleNetV2 0.5x 71.55 "
            "-> 72.00",
        ),
        Claim(
            "skipnet",
            "SkipNet-M gets 76.2% ImageNet top-1 with 5.5M params / 246M FLOPs, 1% over MobileNetV3-Large (75.2%, "
            "5.4M / 219M)",
        ),
        Claim(
            "skip_blocks",
            "Two long connections from an early high-resolution layer bring more diverse features to later layers at "
            "about 12.8K extra parameters",
        ),
    ),
)

# Blocks of the trunk: kernel, expansion, width, squeeze-and-excitation, h-swish, stride.
GROUPS: tuple[tuple[tuple[int, float, int, bool, bool, int], ...], ...] = (
    ((3, 4, 24, False, False, 2), (3, 3, 24, False, False, 1), (5, 3, 40, True, False, 2), (5, 3, 40, True, False, 1),
     (5, 6, 40, True, True, 1)),
    ((3, 6, 80, False, True, 2), (3, 2.5, 80, False, True, 1), (3, 2.3, 80, False, True, 1),
     (3, 2.3, 80, False, True, 1)),
    ((3, 6, 112, True, True, 1), (3, 6, 112, True, True, 1)),
    ((5, 6, 160, True, True, 2), (5, 6, 160, True, True, 1), (5, 6, 160, True, True, 1)),
)  # fmt: skip
# Skip blocks: kernel, hidden width. The first is added to the output of the first group, the second to the second's.
SKIPS = ((5, 96), (3, 40))


class SkipBlock(nn.Module):
    """From the first block's map to the size and width of a later one: (B, C, H, W) -> (B, D, h, w)."""

    def __init__(self, in_chs: int, hidden: int, out_chs: int, kernel: int):
        super().__init__()
        self.block = InvertedResidual(in_chs, out_chs, kernel, exp_ratio=hidden / in_chs, noskip=True)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.block(F.adaptive_avg_pool2d(x, size))


class SkipBlockNet(Classifier):
    """Stem, first block, four groups of inverted residuals, two skip blocks: (B, in_chans, H, W) -> (B, num_classes).

    Args:
        width: multiplies every width of the trunk (rounded to multiples of 8), but not what is hidden in skip blocks.
        head_width: units of the hidden layer before the classifier.
        skips: False leaves the skip blocks out, for comparison.

    >>> import torch
    >>> SkipBlockNet(width=0.25, head_width=64)(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 10])
    """

    head_name = "classifier"

    def __init__(
        self,
        *,
        width: float = 1.0,
        head_width: int = 1280,
        skips: bool = True,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        check_sizes(num_classes=num_classes, in_chans=in_chans, head_width=head_width)
        if width <= 0:
            raise ValueError(f"width must be positive, got {width}")
        first = chs = make_divisible(16 * width)
        self.conv_stem = ConvNormAct(in_chans, chs, 3, 2, act_layer=nn.Hardswish)
        self.base = InvertedResidual(chs, chs, 3, act_layer=nn.Hardswish)
        self.feature_info = [{"num_chs": chs, "reduction": 2, "module": "base"}]
        groups = []
        rates = iter(drop_path_rate * i / 13 for i in range(14))
        for i, group in enumerate(GROUPS):
            blocks = []
            for j, (kernel, expansion, out, se, swish, stride) in enumerate(group):
                out_chs = make_divisible(out * width)
                blocks.append(_block(chs, out_chs, kernel, stride, expansion, se, swish, next(rates)))
                chs = out_chs
                self._note(f"blocks.{i}.{j}", chs, stride)
            groups.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*groups)
        self.skips = nn.ModuleList(
            SkipBlock(first, hidden, make_divisible(GROUPS[i][-1][2] * width), kernel)
            for i, (kernel, hidden) in enumerate(SKIPS if skips else ())
        )
        features = make_divisible(6 * chs)
        self.conv_last = ConvNormAct(chs, features, 1, act_layer=nn.Hardswish)
        self._note("conv_last", features, 1)
        self.conv_head = nn.Linear(features, head_width)
        self.act_head = nn.Hardswish()
        self._make_head(head_width, num_classes, in_chans, global_pool, drop_rate)
        self.num_features = features
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)))
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Linear):
                self._init_classifier(m)

    def _note(self, module: str, chs: int, stride: int) -> None:
        """The last module of each resolution is a feature."""
        last: Any = self.feature_info[-1]["reduction"]
        if stride == 1:
            self.feature_info.pop()
        self.feature_info.append({"num_chs": chs, "reduction": last * stride, "module": module})

    def _init_classifier(self, head: nn.Linear) -> None:
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)

    def _maps(self, x: Tensor) -> list[Tensor]:
        """What the modules give that `feature_info` names; the last is (B, 960, H/32, W/32)."""
        check_image_input(x, self.in_chans)
        base = x = self.base(self.conv_stem(x))  # (B, 16, H/2, W/2)
        ends = {info["module"] for info in self.feature_info}
        maps = [base]
        for i, group in enumerate(self.blocks):
            for j, block in enumerate(group.children()):
                x = block(x)
                if f"blocks.{i}.{j}" in ends:
                    maps.append(x)
            if i < len(self.skips):
                x = x + self.skips[i](base, x.shape[2:])
        return [*maps, self.conv_last(x)]

    def forward_features(self, x: Tensor) -> Tensor:
        return self._maps(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 960, h, w) -> (B, num_classes), or what the classifier sees, (B, head_width), with `pre_logits`."""
        x = self.act_head(self.conv_head(self.global_pool(x)))
        x = F.dropout(x, self.drop_rate, training=self.training)
        return x if pre_logits else self.get_classifier()(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Chosen maps of `feature_info` (B, C, h, w); `norm` and `stop_early` change nothing."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt!r}")
        take, _ = feature_take_indices(len(self.feature_info), indices)
        maps = self._maps(x)
        found = [maps[i] for i in take]
        return found if intermediates_only else (maps[-1], found)


def _block(
    in_chs: int, out_chs: int, kernel: int, stride: int, expansion: float, se: bool, swish: bool, drop_path: float
) -> InvertedResidual:
    squeeze: Any = partial(
        SqueezeExcite, gate_layer=nn.Hardsigmoid, force_act_layer=nn.ReLU, rd_round_fn=make_divisible, rd_ratio=0.25
    )
    return InvertedResidual(
        in_chs,
        out_chs,
        kernel,
        stride,
        exp_ratio=expansion,
        act_layer=nn.Hardswish if swish else nn.ReLU,
        se_layer=squeeze if se else None,
        drop_path_rate=drop_path,
    )


default_cfgs = generate_default_cfgs(
    {
        f"skipblocknet_{size}": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "conv_stem.conv",
            "classifier": "classifier",
        }
        for size in ("xs", "s", "m", "l")
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> SkipBlockNet:
    return build_model_with_cfg(
        SkipBlockNet,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


@register_model
def skipblocknet_xs(pretrained: bool = False, **kwargs: Any) -> SkipBlockNet:
    """Half the width: 2,332,584 parameters, 78.54 M MACs at 224."""
    return _create("skipblocknet_xs", pretrained, kwargs, width=0.5, head_width=1024)


@register_model
def skipblocknet_s(pretrained: bool = False, **kwargs: Any) -> SkipBlockNet:
    """Three quarters of the width: 3,587,416 parameters, 170.24 M MACs at 224."""
    return _create("skipblocknet_s", pretrained, kwargs, width=0.75, head_width=1024)


@register_model
def skipblocknet_m(pretrained: bool = False, **kwargs: Any) -> SkipBlockNet:
    """The published network: 5,532,352 parameters, 236.62 M MACs at 224."""
    return _create("skipblocknet_m", pretrained, kwargs)


@register_model
def skipblocknet_l(pretrained: bool = False, **kwargs: Any) -> SkipBlockNet:
    """1.2 times the width: 7,014,472 parameters, 361.27 M MACs at 224."""
    return _create("skipblocknet_l", pretrained, kwargs, width=1.2, head_width=1232)
