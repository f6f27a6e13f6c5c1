"""The network that was released with MCUNetV2 (Lin et al. 2021, arXiv 2110.15352), `mcunetv2_large`.

Inverted residuals with ReLU6, squeeze-and-excitation from the fifth block on. Where patches would run, kernels are
small and the first block has no depthwise convolution, so that a position of the 28 x 28 map sees 15 pixels. Layout and
counts are those of the authors' int8 file. There every convolution has a bias; here batch norms stand for it, which
have two parameters per channel instead of one (1,810,832 in all, 1,799,208 with the norms folded).

The file is none of the networks of the paper's tables: no accuracy of theirs belongs to it.
"""

from __future__ import annotations

from typing import Any

from timm.layers import create_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from trimtab.models.classify.mbconv import MBConv, SqueezeExcite, conv_bn
from trimtab.nn.classifier import Classifier, check_image_input, check_sizes

# expanded channels, kernel, stride, channels out, channels inside squeeze-and-excitation (0 for none)
LARGE = (
    (96, 3, 2, 24, 0), (96, 3, 2, 40, 0), (240, 5, 1, 40, 10), (240, 5, 1, 40, 10), (120, 3, 1, 40, 10),
    (240, 5, 2, 64, 10), (256, 5, 1, 64, 16), (192, 3, 1, 64, 16), (256, 7, 1, 64, 16),
    (384, 5, 1, 96, 16), (384, 5, 1, 96, 24), (288, 5, 1, 96, 24),
    (384, 7, 2, 144, 24), (576, 3, 1, 144, 36), (576, 3, 1, 144, 36), (576, 5, 1, 240, 0),
)  # fmt: skip


class MCUNetV2(Classifier):
    """Stem, a 1x1 convolution, inverted residuals, a 1x1 convolution: (B, in_chans, H, W) -> (B, num_classes).

    Args:
        stem: channels of the first two convolutions.
        blocks: (expanded, kernel, stride, out, squeezed) of every block; those of equal shape have a shortcut.
        neck: channels of the last convolution.

    >>> import torch
    >>> MCUNetV2(blocks=((24, 3, 2, 8, 0), (24, 3, 1, 8, 4)), num_classes=4)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 4])
    """

    any_size = True  # create_model leaves the strides as they are

    def __init__(
        self,
        *,
        stem: int = 16,
        blocks: tuple[tuple[int, int, int, int, int], ...] = LARGE,
        neck: int = 384,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        check_sizes(stem=stem, neck=neck, num_classes=num_classes, in_chans=in_chans)
        self.stem = nn.Sequential(
            conv_bn(in_chans, stem, 3, stride=2, act="relu6"), conv_bn(stem, stem, act="identity")
        )
        self.feature_info = [{"num_chs": stem, "reduction": 2, "module": "stem.1"}]
        in_chs, reduction, made = stem, 2, []
        for i, (mid, kernel, stride, out, squeezed) in enumerate(blocks):
            block = MBConv(
                in_chs, mid, out, kernel=kernel, stride=stride, expand=True, act="relu6", reduced=squeezed,
                gate="hard_sigmoid", shortcut=stride == 1 and in_chs == out,
            )  # fmt: skip
            if isinstance(block.se, SqueezeExcite):
                block.se.act = create_act_layer("relu6")
            made.append(block)
            in_chs, reduction = out, reduction * stride
            if i + 1 == len(blocks) or blocks[i + 1][2] > 1:
                self.feature_info.append({"num_chs": out, "reduction": reduction, "module": f"blocks.{i}"})
        self.blocks = nn.Sequential(*made)
        self.neck = conv_bn(in_chs, neck, act="relu6")
        self._make_head(neck, num_classes, in_chans, global_pool, drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        check_image_input(x, self.in_chans)
        return self.neck(self.blocks(self.stem(x)))  # (B, neck, H/32, W/32)


default_cfgs = generate_default_cfgs(
    {
        "mcunetv2_large": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "stem.0.0",
            "classifier": "head",
        }
    }
)


@register_model
def mcunetv2_large(pretrained: bool = False, **kwargs: Any) -> MCUNetV2:
    """The released network: 216.8 M MACs at 224 pixels, 1,799,208 weights and biases with the norms folded."""
    feature_cfg = {"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": True}
    return build_model_with_cfg(MCUNetV2, "mcunetv2_large", pretrained, feature_cfg=feature_cfg, **kwargs)
