"""`lite_fpn`: a light segmenter on any backbone of timm.

A feature pyramid (Lin et al. 2017) of few channels: every map of the backbone is brought to `dim` channels and added
to the next finer one, from the coarsest up; depthwise separable convolutions smooth the sums. A 1 x 1 convolution
classifies at the finest map, and logits are enlarged to the image. Not a published system; something to begin with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from timm.layers.format import Format
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.artifact import FORBIDDEN_KWARGS
from trimtab.nn.classifier import check_sizes
from trimtab.nn.segmenter import Segmenter


class LiteFPN(Segmenter):
    """Images (B, in_chans, H, W) of any size -> logits (B, num_classes, H, W).

    Args:
        backbone: name of a registered model that gives maps.
        dim: channels of the pyramid.
        backbone_args: more for its builder.

    Raises:
        ValueError: an unknown backbone, or arguments that read files.
    """

    any_size = True
    multiple = 1

    def __init__(
        self,
        *,
        backbone: str = "mobilenetv3_small_050",
        dim: int = 48,
        backbone_args: Mapping[str, Any] | None = None,
        num_classes: int = 21,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        pretrained_backbone: bool = False,
    ):
        super().__init__()
        check_sizes(num_classes=num_classes, in_chans=in_chans, dim=dim)
        arguments = dict(backbone_args or {})
        if ":" in backbone or not timm.is_model(backbone):  # "hf-hub:..." would reach for the network
            raise ValueError(f"backbone must be the name of a registered model, got {backbone!r}")
        if bad := FORBIDDEN_KWARGS & set(arguments):
            raise ValueError(f"backbone_args must not have {', '.join(sorted(bad))}")
        net: Any = timm.create_model(
            backbone, pretrained=pretrained_backbone, features_only=True, in_chans=in_chans, **arguments
        )
        self.backbone = net
        self.channels_last = getattr(net, "output_fmt", None) == Format.NHWC
        widths = net.feature_info.channels()
        self.laterals = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in widths)
        self.smooth = nn.ModuleList(_separable(dim) for _ in widths[1:])
        self.feature_info = [dict(info, module=f"backbone.{info['module']}") for info in net.feature_info.get_dicts()]
        self._make_head(dim, num_classes, in_chans, "", drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """The finest map of the pyramid, enlarged to the image: (B, dim, H, W)."""
        return F.interpolate(self._pyramid(x), x.shape[2:], mode="bilinear")

    def forward(self, x: Tensor) -> Tensor:
        # classified before it is enlarged, which is the same and cheaper
        return F.interpolate(self.forward_head(self._pyramid(x)), x.shape[2:], mode="bilinear")

    def _pyramid(self, x: Tensor) -> Tensor:
        self._check(x)
        maps = self.backbone(x)
        if self.channels_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        fine = [lateral(m) for lateral, m in zip(self.laterals, maps)]
        y = fine[-1]
        for finer, smooth in zip(fine[-2::-1], self.smooth):
            y = smooth(finer + F.interpolate(y, finer.shape[2:], mode="nearest"))
        return y


def _separable(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False), nn.Conv2d(dim, dim, 1, bias=False),
        nn.BatchNorm2d(dim), nn.ReLU(),
    )  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        "lite_fpn": {
            "url": "", "num_classes": 21, "input_size": (3, 224, 224), "pool_size": None, "crop_pct": 1.0,
            "interpolation": "bilinear", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
            "first_conv": "backbone.conv_stem", "classifier": "head",
        },
    }
)  # fmt: skip


@register_model
def lite_fpn(pretrained: bool = False, **kwargs: Any) -> LiteFPN:
    """On MobileNetV3-small x0.5, or another `backbone`. `pretrained` fetches the backbone's weights."""
    return build_model_with_cfg(LiteFPN, "lite_fpn", False, **{**kwargs, "pretrained_backbone": pretrained})  # type: ignore[arg-type]
