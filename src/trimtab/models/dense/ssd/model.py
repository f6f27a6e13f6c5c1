"""The networks: three bodies that give maps of falling resolution, and the detector that reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.layers import Format
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from trimtab.core.artifact import FORBIDDEN_KWARGS
from trimtab.core.edit import meta_copy
from trimtab.models.dense.ssd import boxes
from trimtab.models.dense.ssd.loss import multibox_loss
from trimtab.nn.classifier import check_image_input, check_sizes

Outputs = tuple[Tensor, Tensor]
Extra = tuple[int, int, int, int, int]  # hidden width, width, kernel, stride, padding

_HALVE, _SHRINK = (3, 2, 1), (3, 1, 0)
_EXTRAS_300: tuple[Extra, ...] = (
    (256, 512, *_HALVE), (128, 256, *_HALVE), (128, 256, *_SHRINK), (128, 256, *_SHRINK),
)  # fmt: skip
_EXTRAS_512: tuple[Extra, ...] = ((256, 512, *_HALVE), *((128, 256, *_HALVE),) * 3, (128, 256, 4, 1, 1))
_STEPS_300 = (8, 16, 32, 64, 100, 300)  # not quite 300 / 38, 300 / 19, ...


class SSD(nn.Module):
    """A detector of N default boxes and K = `num_classes` classes: images (B, `in_chans`, H, W) -> offsets (B, N, 4)
    and logits (B, N, 1 + K), background first.

    Args:
        body: images -> maps.
        shapes: for each map (width, height) in pixels of the boxes of a cell, see `paper_shapes`.
        img_size: side or (H, W) of the images, fixed.
        steps: pixels between box centres for each map; None: those that divide the image evenly.
        separable: heads of a depthwise 3 x 3 and a 1 x 1 convolution.

    Attributes:
        default_boxes: (N, 4), centre and size in pixels, ordered by map, row, column, shape.
        grids: rows and columns of each map.

    Raises:
        ValueError: images too small for the body, or not as many shapes as maps.

    >>> net = SSD(PlainBody((8, 16, 16), in_chans=1), boxes.paper_shapes(2, 32), img_size=32, num_classes=3, in_chans=1)
    >>> [tuple(t.shape) for t in net(torch.zeros(2, 1, 32, 32))], net.grids
    ([(2, 320, 4), (2, 320, 4)], ((8, 8), (4, 4)))
    """

    any_size = True  # create_model leaves the strides as they are
    score_threshold, nms_threshold, max_detections = 0.01, 0.45, 200
    default_boxes: Tensor

    def __init__(
        self,
        body: nn.Module,
        shapes: Sequence[Sequence[tuple[float, float]]],
        *,
        img_size: int | Sequence[int],
        num_classes: int = 20,
        in_chans: int = 3,
        steps: Sequence[float] | None = None,
        separable: bool = False,
    ):
        super().__init__()
        check_sizes(in_chans=in_chans, classes=num_classes)
        self.num_classes, self.in_chans, self.img_size = num_classes, in_chans, _pair(img_size)
        self.body = body
        maps = _shapes_of_maps(body, (in_chans, *self.img_size))
        if len(maps) != len(shapes):
            raise ValueError(f"shapes must be given for the {len(maps)} maps of the body, got {len(shapes)}")
        self.grids: tuple[tuple[int, int], ...] = tuple((int(m[2]), int(m[3])) for m in maps)
        head = _separable if separable else partial(nn.Conv2d, kernel_size=3, padding=1)
        self.offsets = nn.ModuleList(head(m[1], 4 * len(cell)) for m, cell in zip(maps, shapes))
        self.scores = nn.ModuleList(head(m[1], (1 + num_classes) * len(cell)) for m, cell in zip(maps, shapes))
        for module in (*self.offsets.modules(), *self.scores.modules()):
            _init_new(module)
        every = boxes.default_boxes(self.grids, shapes, self.img_size, steps)
        self.register_buffer("default_boxes", every, persistent=False)

    def forward(self, x: Tensor) -> Outputs:
        check_image_input(x, self.in_chans)
        if tuple(x.shape[2:]) != self.img_size:
            raise ValueError(f"this model was built for images of {self.img_size}, got {tuple(x.shape[2:])}")
        maps = self.body(x)
        return _by_box(self.offsets, maps, 4), _by_box(self.scores, maps, 1 + self.num_classes)

    def criterion(self, outputs: Outputs, batch: Mapping[str, Tensor], *, negatives: float = 3.0) -> dict[str, Tensor]:
        """The multibox loss for "boxes" (B, M, 4) in pixels and "box_label" (B, M), -1 where there is none."""
        offsets, logits = (t.float() for t in outputs)
        return multibox_loss(
            offsets, logits, self.default_boxes, batch["boxes"], batch["box_label"], negatives=negatives
        )

    def boxes_and_scores(self, outputs: Outputs) -> Outputs:
        """Corners (B, N, 4) in pixels, inside the image, and probabilities (B, N, K) without background.

        This is what an exported network gives; overlapping boxes are still in.
        """
        offsets, logits = (t.float() for t in outputs)
        x, y = boxes.decode(offsets, self.default_boxes).unflatten(-1, (2, 2)).unbind(-1)  # (B, N, 2) each
        height, width = self.img_size
        corners = torch.stack([x.clamp(0, width), y.clamp(0, height)], -1).flatten(-2)
        return corners, logits.softmax(-1)[..., 1:]

    @torch.no_grad()
    def decode(self, outputs: Outputs) -> list[dict[str, Tensor]]:
        """What is seen in each image, as of `detections`."""
        look = partial(
            boxes.detections, least=self.score_threshold, overlap=self.nms_threshold, keep=self.max_detections
        )
        return [look(*image) for image in zip(*self.boxes_and_scores(outputs))]


# --------------------------------------------------------------------------------------------------------------- bodies


class L2Norm(nn.Module):
    """Each pixel's vector of channels at length 1, times a learned scale per channel (ParseNet, arXiv 1506.04579)."""

    def __init__(self, dim: int, scale: float = 20.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1, eps=1e-10) * self.weight[:, None, None]


class VGGBody(nn.Module):
    """VGG-16 to conv5_3, its linear layers as convolutions, and extra layers: maps of strides 8, 16, 32, ...

    `features` is numbered as in torchvision and timm. The fourth pooling rounds down and the third up, the fifth keeps
    the size, and `fc6` looks as far around as the linear layer did, by dilation.
    """

    def __init__(self, extras: Sequence[Extra], in_chans: int = 3):
        super().__init__()
        layers: list[nn.Module] = []
        into = in_chans
        for stage, (width, depth) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
            if stage:
                layers.append(nn.MaxPool2d(2, ceil_mode=stage == 3))
            for _ in range(depth):
                layers += [nn.Conv2d(into, width, 3, padding=1), nn.ReLU(inplace=True)]
                into = width
            if stage == 3:
                self.tap = len(layers)
        self.features = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        self.norm = L2Norm(512)
        self.pool5 = nn.MaxPool2d(3, stride=1, padding=1)
        self.fc6 = nn.Conv2d(512, 1024, 3, padding=6, dilation=6)
        self.fc7 = nn.Conv2d(1024, 1024, 1)
        widths = [1024, *(width for _, width, *_ in extras)]
        self.extras = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(into, hidden, 1), nn.ReLU(inplace=True),
                nn.Conv2d(hidden, width, kernel, stride, padding), nn.ReLU(inplace=True),
            )
            for into, (hidden, width, kernel, stride, padding) in zip(widths, extras)
        )  # fmt: skip
        for module in (self.fc6, self.fc7, *self.extras.modules()):
            _init_new(module)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, layer in enumerate(self.features, 1):
            x = layer(x)
            if i == self.tap:
                maps.append(self.norm(x))
        x = F.relu(self.fc6(self.pool5(x)))
        maps.append(F.relu(self.fc7(x)))
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        return maps


class TimmBody(nn.Module):
    """Maps of any backbone of timm, and extra maps, each half as large, of depthwise convolutions.

    Args:
        backbone: name of a registered model.
        img_size: (H, W) of the images, for backbones made for one size.
        sources: which of its maps, as `out_indices` of timm; -1 is the last.
        extras: widths of the extra maps.
        backbone_args: more for its builder.

    Raises:
        ValueError: an unknown backbone, or arguments that read files.
    """

    def __init__(
        self,
        backbone: str,
        img_size: tuple[int, int],
        *,
        sources: Sequence[int] = (-2, -1),
        extras: Sequence[int] = (),
        in_chans: int = 3,
        pretrained: bool = False,
        backbone_args: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        arguments = dict(backbone_args or {})
        if ":" in backbone or not timm.is_model(backbone):  # "hf-hub:..." would reach for the network
            raise ValueError(f"backbone must be the name of a registered model, got {backbone!r}")
        if bad := FORBIDDEN_KWARGS & set(arguments):
            raise ValueError(f"backbone_args must not have {', '.join(sorted(bad))}")
        if (cfg := timm.get_pretrained_cfg(backbone)) is not None and cfg.fixed_input_size:
            arguments.setdefault("img_size", img_size)
        net: Any = timm.create_model(
            backbone, pretrained=pretrained, features_only=True, out_indices=tuple(sources), in_chans=in_chans,
            **arguments,
        )  # fmt: skip
        self.backbone = net
        self.channels_last = getattr(net, "output_fmt", None) == Format.NHWC
        widths = [net.feature_info.channels()[-1], *extras]
        self.extras = nn.ModuleList(
            nn.Sequential(
                _conv(into, width // 2, kernel_size=1),
                _conv(width // 2, width // 2, stride=2, groups=width // 2),
                _conv(width // 2, width, kernel_size=1),
            )
            for into, width in pairwise(widths)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = list(self.backbone(x))
        if self.channels_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        return maps


class PlainBody(nn.Module):
    """A strided 3 x 3 convolution, then stages of a strided and a plain one: maps of strides 4, 8, 16, ..."""

    def __init__(self, widths: Sequence[int], in_chans: int = 3):
        super().__init__()
        check_sizes(**{f"widths[{i}]": w for i, w in enumerate(widths)})
        self.stem = _conv(in_chans, widths[0], stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(_conv(into, width, stride=2), _conv(width, width)) for into, width in pairwise(widths)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


_conv: Callable[..., nn.Module] = partial(Conv2dNormActivation, kernel_size=3)


def _separable(into: int, out: int) -> nn.Sequential:
    return nn.Sequential(_conv(into, into, groups=into), nn.Conv2d(into, out, 1))


def _init_new(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _by_box(heads: nn.ModuleList, maps: Sequence[Tensor], width: int) -> Tensor:
    """(B, N, width): what the heads say of each cell's boxes, map after map."""
    every = [head(m).permute(0, 2, 3, 1).reshape(m.shape[0], -1, width) for head, m in zip(heads, maps, strict=True)]
    return torch.cat(every, 1)


def _pair(img_size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    check_sizes(height=height, width=width)
    return height, width


@torch.no_grad()
def _shapes_of_maps(body: nn.Module, size: tuple[int, int, int]) -> list[torch.Size]:
    """Shapes of the maps for images of this size, without arithmetic."""
    try:
        maps = [m.shape for m in meta_copy(body).eval()(torch.zeros(1, *size, device="meta"))]
    except RuntimeError as e:
        raise ValueError(f"this network cannot take images of {size[1]} x {size[2]} pixels: {e}") from e
    if any(a[2:] == b[2:] for a, b in pairwise(maps)):
        raise ValueError(f"each map must be smaller than the one before, got {[tuple(m[2:]) for m in maps]}")
    return maps


# ------------------------------------------------------------------------------------------------------- VGG's weights


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of VGG-16 from torchvision or timm as one of the whole detector; any other is given back as it is.

    The linear layers become convolutions by taking every fourth of their outputs and every third of 7 x 7 pixels, as
    in DeepLab. What VGG does not have stays as it is in the model.
    """
    names = [("classifier.0", "classifier.3"), ("pre_logits.fc1", "pre_logits.fc2")]
    found = next(((a, b) for a, b in names if f"{a}.weight" in state and f"{b}.weight" in state), None)
    if found is None:
        return state
    fc6, fc7 = ({leaf: state[f"{name}.{leaf}"] for leaf in ("weight", "bias")} for name in found)
    full = dict(model.state_dict())
    full |= {f"body.{k}": v for k, v in state.items() if k.startswith("features.")}
    full["body.fc6.weight"] = fc6["weight"].reshape(4096, 512, 7, 7)[::4, :, ::3, ::3]
    full["body.fc7.weight"] = fc7["weight"].reshape(4096, 4096, 1, 1)[::4, ::4]
    full["body.fc6.bias"], full["body.fc7.bias"] = fc6["bias"][::4], fc7["bias"][::4]
    return full


# ------------------------------------------------------------------------------------------------------------- networks


def _vgg(
    *,
    extras: Sequence[Extra],
    img_size: int | Sequence[int],
    scales: Sequence[int],
    ratios: Sequence[float] | None = None,
    num_classes: int,
    in_chans: int,
) -> SSD:
    size = _pair(img_size)
    shapes = boxes.paper_shapes(2 + len(extras), min(size), scales=scales, ratios=ratios)
    return SSD(
        VGGBody(extras, in_chans), shapes, img_size=size, num_classes=num_classes, in_chans=in_chans,
        steps=_STEPS_300 if size == (300, 300) else None,
    )  # fmt: skip


def _lite(
    *,
    backbone: str = "mobilenetv3_large_100",
    sources: Sequence[int] = (-2, -1),
    extras: Sequence[int] = (512, 256, 256, 128),
    img_size: int | Sequence[int] = 320,
    scales: Sequence[int] = (10, 20, 90),
    ratios: Sequence[float] | None = None,
    backbone_args: Mapping[str, Any] | None = None,
    pretrained_backbone: bool = False,
    num_classes: int,
    in_chans: int,
) -> SSD:
    size = _pair(img_size)
    body = TimmBody(
        backbone, size, sources=sources, extras=extras, in_chans=in_chans, pretrained=pretrained_backbone,
        backbone_args=backbone_args,
    )  # fmt: skip
    shapes = boxes.paper_shapes(len(sources) + len(extras), min(size), scales=scales, ratios=ratios)
    return SSD(body, shapes, img_size=size, num_classes=num_classes, in_chans=in_chans, separable=True)


def _nano(
    *,
    widths: Sequence[int] = (16, 32, 48, 64, 64),
    img_size: int | Sequence[int] = 128,
    scales: Sequence[int] = (7, 15, 90),
    ratios: Sequence[float] | None = None,
    num_classes: int,
    in_chans: int,
) -> SSD:
    shapes = boxes.paper_shapes(len(widths) - 1, min(_pair(img_size)), scales=scales, ratios=ratios)
    return SSD(PlainBody(widths, in_chans), shapes, img_size=img_size, num_classes=num_classes, in_chans=in_chans)


_300: dict[str, Any] = {"extras": _EXTRAS_300, "img_size": 300}
_512: dict[str, Any] = {"extras": _EXTRAS_512, "img_size": 512}
_NETS: dict[str, tuple[Callable[..., SSD], int, int, int, str, dict[str, Any]]] = {
    # builder, image size, classes, maps, first convolution, arguments
    "ssd300_vgg16": (_vgg, 300, 20, 6, "body.features.0", _300 | {"scales": (10, 20, 90)}),
    "ssd300_vgg16_coco": (_vgg, 300, 80, 6, "body.features.0", _300 | {"scales": (7, 15, 90)}),
    "ssd512_vgg16": (_vgg, 512, 20, 7, "body.features.0", _512 | {"scales": (7, 15, 90)}),
    "ssd512_vgg16_coco": (_vgg, 512, 80, 7, "body.features.0", _512 | {"scales": (4, 10, 90)}),
    "ssd_lite": (_lite, 320, 20, 6, "body.backbone.conv_stem", {}),
    "ssd_nano": (_nano, 128, 20, 4, "body.stem.0", {}),
}


def _cfg(build: Callable[..., SSD], side: int, num_classes: int, maps: int, first_conv: str, _: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (3, side, side),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": first_conv,
        "classifier": tuple(f"scores.{i}.1" if build is _lite else f"scores.{i}" for i in range(maps)),
    }


default_cfgs = generate_default_cfgs({name: _cfg(*net) for name, net in _NETS.items()})  # type: ignore[misc]


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    build, *_, arguments = _NETS[name]
    return build_model_with_cfg(build, name, pretrained, **{**arguments, **kwargs})  # type: ignore[arg-type]


@register_model
def ssd300_vgg16(pretrained: bool = False, **kwargs: Any) -> SSD:
    """26,285,486 parameters, 31.374 G MACs, 8732 boxes; box sizes for VOC."""
    return _create("ssd300_vgg16", pretrained, kwargs)


@register_model
def ssd300_vgg16_coco(pretrained: bool = False, **kwargs: Any) -> SSD:
    """34,305,206 parameters, 34.360 G MACs; box sizes for COCO."""
    return _create("ssd300_vgg16_coco", pretrained, kwargs)


@register_model
def ssd512_vgg16(pretrained: bool = False, **kwargs: Any) -> SSD:
    """27,188,676 parameters, 90.208 G MACs, 24564 boxes; box sizes for VOC."""
    return _create("ssd512_vgg16", pretrained, kwargs)


@register_model
def ssd512_vgg16_coco(pretrained: bool = False, **kwargs: Any) -> SSD:
    """36,038,196 parameters, 98.629 G MACs; box sizes for COCO."""
    return _create("ssd512_vgg16_coco", pretrained, kwargs)


@register_model
def ssd_lite(pretrained: bool = False, **kwargs: Any) -> SSD:
    """On a light backbone of timm's: `backbone`, `sources`, `extras` and `backbone_args` as in `TimmBody`.

    `pretrained` fetches the backbone's weights; those of the heads are fresh.
    """
    return _create("ssd_lite", False, {**kwargs, "pretrained_backbone": pretrained})


@register_model
def ssd_nano(pretrained: bool = False, **kwargs: Any) -> SSD:
    """For images of about 128 pixels, and boxes of 7 % of them and more: four maps of strides 4 to 32."""
    return _create("ssd_nano", pretrained, kwargs)
