"""SimpleNet: plain 13-layer networks by design rules (HasanPour et al., "Lets keep it simple, Using simple
architectures to outperform deeper and more complex architectures", arXiv 1608.06037).

Nothing but 3x3 convolution, batch norm, ReLU and max pooling, laid out by rules: grow width gradually, pool late and
evenly, keep 3x3 in the early and middle layers and 1x1 only near the end, balance the weights. The last pooling is a
global max. The chain has no branches, so it is also the simplest network to prune and to put on a microcontroller.

Differences from the releases: batch norm follows every convolution and pooling follows the ReLU, as in the authors'
PyTorch code; `norm_first=10` gives the Caffe originals' parameters (their last three convolutions have no batch norm).
The 460K layout is the Caffe one; `simplenet_cifar_460k_port` is the PyTorch port's, which swaps kernel sizes and is
another network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from trimtab.core.card import Card, Claim
from trimtab.nn.classifier import Classifier, check_image_input, check_sizes

CARD = Card(
    slug="simplenet",
    title="Lets keep it simple, Using simple architectures to outperform deeper and more complex architectures",
    arxiv="1608.06037",
    year=2016,
    kind="architecture",
    tasks=("classify",),
    claims=(
        Claim(
            "params",
            "A plain 13-layer network (3x3 convolutions, max pooling, no branches) needs 5.48M parameters on CIFAR-10; "
            "slim versions need about 310K and 460K",
        ),
        Claim(
            "beats_deeper",
            "At equal parameters the plain 13-layer net matches or beats deeper nets: 310K gives 91.98% on CIFAR-10 "
            "where ResNet-32 (475K) gives 91.6% and NIN (1M) 91.19%; full size 95.51%",
        ),
        Claim(
            "imagenet_family",
            "ImageNet versions of 1.5M/3.3M/5.7M/9.5M parameters reach 61.67/68.51/72.03/74.23 top-1 (m2 strides) with "
            "plain convolutions only",
        ),
        Claim(
            "principles",
            "Pool late and evenly, keep 3x3 (not 1x1) in early and middle layers, expand width gradually",
        ),
    ),
)

# A layout is a sequence of tokens: a width (3x3 convolution), "width@1" (1x1 convolution), or "P" (max pooling 2/2).
LAYOUTS = {
    "cifar_5m": "64 128 128 128 P 128 128 256 P 256 256 P 512 2048@1 256@1 P 256",
    "cifar_310k": "64 32 32 32 P 32 32 64 P 64 64 P 128 256@1 64@1 P 64",
    "cifar_460k": "32 32 32 64 P 64 64 64 P 64 64 P 96 96 96 P 100@1",
    "cifar_460k_port": "32 32 32 64 P 64 64 64 P 64 64 P 96 96@1 96@1 P 100",
    "mnist_301k": "32 32 32 32 P 50 64 64 P 64 64 P 64 64 64 P 100@1",
    "imagenet_5m": "64 128 128 128 128 128 P 256 256 256 512 P 2048@1 256@1 256",
    "imagenet_9m": "128 192 192 192 192 192 P 320 320 320 640 P 2560@1 320@1 320",
}
# Which convolutions have stride 2, per mode: a higher mode strides later, keeps more information and costs more.
MODES: dict[int, tuple[int, ...]] = {0: (), 1: (0, 1, 2), 2: (0, 1, 3), 3: (0, 1, 4), 4: (0, 2, 4)}


class SimpleNet(Classifier):
    """A chain of convolutions and poolings, global max pooling, linear: (B, in_chans, H, W) -> (B, num_classes).

    Args:
        layout: a name in `LAYOUTS`, or tokens in its notation.
        scale: multiplies every width (rounded).
        mode: stride pattern of the first convolutions (`MODES`); 0 has none.
        norm_first: batch norm after the first so many convolutions; None = after all.
        drop_rates: dropout by layer index, counting convolutions and poolings from 0; the index after the last layer
            is the dropout before the classifier. A number is used after every pooling, as the 95.51 % run did (0.1).
        ceil_mode: round pooled sizes up, as Caffe does (28 -> 14 -> 7 -> 4 -> 2 instead of 28 -> 14 -> 7 -> 3 -> 1).
        bn_momentum: of the running statistics (Caffe's moving average fraction 0.95).

    >>> import torch
    >>> SimpleNet(layout="cifar_310k", scale=0.25)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        *,
        layout: str = "cifar_310k",
        scale: float = 1.0,
        mode: int = 0,
        norm_first: int | None = None,
        drop_rates: float | Mapping[Any, float] = 0.0,
        ceil_mode: bool = False,
        bn_momentum: float = 0.05,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "max",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        check_sizes(num_classes=num_classes, in_chans=in_chans)
        if mode not in MODES:
            raise ValueError(f"mode must be one of {sorted(MODES)}, got {mode!r}")
        if scale <= 0:
            raise ValueError(f"scale must be positive, got {scale}")
        tokens = parse_layout(LAYOUTS.get(layout, layout))
        rates = _dropout_rates(drop_rates, tokens)
        self.feature_info = []
        layers: list[nn.Module] = []
        chs, reduction, convs = in_chans, 1, 0
        for i, token in enumerate(tokens):
            if token is None:
                self._note(chs, reduction, len(layers) - 1)
                layers.append(_pool(rates.get(i, 0.0), ceil_mode))
                reduction *= 2
                continue
            width, kernel = max(1, round(token[0] * scale)), token[1]
            stride = 2 if convs in MODES[mode] else 1
            if stride == 2 and layers:
                self._note(chs, reduction, len(layers) - 1)
            norm = norm_first is None or convs < norm_first
            layers.append(_conv(chs, width, kernel, stride, norm, bn_momentum, rates.get(i, 0.0)))
            chs, reduction, convs = width, reduction * stride, convs + 1
        self._note(chs, reduction, len(layers) - 1)
        self.features = nn.Sequential(*layers)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.xavier_uniform_(m.weight, gain=nn.init.calculate_gain("relu"))
        self._make_head(chs, num_classes, in_chans, global_pool, rates.get(len(tokens), drop_rate))

    def _note(self, chs: int, reduction: int, index: int) -> None:
        self.feature_info.append({"num_chs": chs, "reduction": reduction, "module": f"features.{index}"})

    def forward_features(self, x: Tensor) -> Tensor:
        check_image_input(x, self.in_chans)
        return self.features(x)


def parse_layout(layout: str) -> list[tuple[int, int] | None]:
    """(width, kernel) per convolution and None per pooling.

    >>> parse_layout("64 P 128@1")
    [(64, 3), None, (128, 1)]
    """
    tokens: list[tuple[int, int] | None] = []
    for word in layout.split():
        width, _, kernel = word.partition("@")
        if word == "P":
            tokens.append(None)
        elif width.isdecimal() and kernel in ("", "1", "3") and int(width) > 0:
            tokens.append((int(width), int(kernel or 3)))
        else:
            raise ValueError(f"layout must be a name in {sorted(LAYOUTS)} or tokens like '64 P 128@1', got {word!r}")
    if not any(tokens):
        raise ValueError(f"layout must have at least one convolution, got {layout!r}")
    return tokens


def _conv(
    in_chs: int, out_chs: int, kernel: int, stride: int, norm: bool, momentum: float, drop: float
) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(in_chs, out_chs, kernel, stride, kernel // 2)]  # with bias, though BN follows
    if norm:
        layers.append(nn.BatchNorm2d(out_chs, momentum=momentum))
    layers.append(nn.ReLU(inplace=True))
    if drop:
        layers.append(nn.Dropout2d(drop))
    return nn.Sequential(*layers)


def _pool(drop: float, ceil_mode: bool) -> nn.Sequential:
    pool = nn.MaxPool2d(2, 2, ceil_mode=ceil_mode)
    return nn.Sequential(pool, nn.Dropout2d(drop)) if drop else nn.Sequential(pool)


def _dropout_rates(drop_rates: float | Mapping[Any, float], tokens: Sequence[Any]) -> dict[int, float]:
    if isinstance(drop_rates, Mapping):
        rates = {int(k): float(v) for k, v in drop_rates.items()}  # keys come back from JSON as strings
        bad = [k for k in rates if not 0 <= k <= len(tokens)]
        if bad:
            raise ValueError(f"drop_rates must have keys in 0..{len(tokens)}, got {bad[0]}")
    else:
        rates = {i: float(drop_rates) for i, t in enumerate(tokens) if t is None}
    if not all(0 <= r < 1 for r in rates.values()):
        raise ValueError(f"drop_rates must be in [0, 1), got {drop_rates}")
    return rates


def _cfg(size: int = 32, num_classes: int = 10, in_chans: int = 3) -> dict[str, Any]:
    cifar = size == 32
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (in_chans, size, size),
        "pool_size": (2, 2) if cifar else (7, 7),
        "crop_pct": 1.0 if cifar else 0.875,
        "interpolation": "bicubic",
        "mean": ((0.4914, 0.4822, 0.4465) if cifar else (0.485, 0.456, 0.406))[:in_chans],
        "std": ((0.2470, 0.2435, 0.2616) if cifar else (0.229, 0.224, 0.225))[:in_chans],
        "first_conv": "features.0.0",
        "classifier": "head",
    }


_CIFAR = ("cifar_310k", "cifar_460k", "cifar_460k_port", "cifar_5m")
_IMAGENET: dict[str, dict[str, Any]] = {
    "small_m1_05": {"layout": "imagenet_5m", "scale": 0.5, "mode": 1},
    "small_m2_05": {"layout": "imagenet_5m", "scale": 0.5, "mode": 2},
    "small_m1_075": {"layout": "imagenet_5m", "scale": 0.75, "mode": 1},
    "small_m2_075": {"layout": "imagenet_5m", "scale": 0.75, "mode": 2},
    **{f"5m_m{m}": {"layout": "imagenet_5m", "mode": m} for m in (1, 2, 3, 4)},
    **{f"9m_m{m}": {"layout": "imagenet_9m", "mode": m} for m in (1, 2, 3, 4)},
}
default_cfgs = generate_default_cfgs(
    {
        **{f"simplenet_{n}": _cfg() for n in _CIFAR},
        "simplenet_mnist_301k": _cfg(28, in_chans=1),
        **{f"simplenet_{n}": _cfg(224, 1000) for n in _IMAGENET},
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> SimpleNet:
    return build_model_with_cfg(
        SimpleNet,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": True},
        **{**defaults, **kwargs},
    )


@register_model
def simplenet_cifar_310k(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """Slim net: 312,362 parameters, 55.79 M MACs."""
    return _create("simplenet_cifar_310k", pretrained, kwargs, layout="cifar_310k")


@register_model
def simplenet_cifar_460k(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """Slim net, Caffe layout: 456,446 parameters, 75.24 M MACs."""
    return _create("simplenet_cifar_460k", pretrained, kwargs, layout="cifar_460k")


@register_model
def simplenet_cifar_460k_port(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """What the PyTorch port calls 460K: 385,790 parameters, 73.19 M MACs."""
    return _create("simplenet_cifar_460k_port", pretrained, kwargs, layout="cifar_460k_port")


@register_model
def simplenet_cifar_5m(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """The full net: 5,498,378 parameters, 652.2 M MACs."""
    return _create("simplenet_cifar_5m", pretrained, kwargs, layout="cifar_5m")


@register_model
def simplenet_mnist_301k(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """Layout of the released MNIST weights, 1 channel: 301,452 parameters as released (batch norm on the first ten)."""
    return _create("simplenet_mnist_301k", pretrained, kwargs, layout="mnist_301k", norm_first=10, ceil_mode=True)


@register_model
def simplenet_small_m1_05(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """Half width: 1,506,792 parameters, 340.9 M MACs."""
    return _create("simplenet_small_m1_05", pretrained, kwargs, **_IMAGENET["small_m1_05"])


@register_model
def simplenet_small_m2_05(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """Half width, later strides: 1,506,792 parameters, 427.6 M MACs."""
    return _create("simplenet_small_m2_05", pretrained, kwargs, **_IMAGENET["small_m2_05"])


@register_model
def simplenet_small_m1_075(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """Three quarters of the width: 3,287,272 parameters, 758.9 M MACs."""
    return _create("simplenet_small_m1_075", pretrained, kwargs, **_IMAGENET["small_m1_075"])


@register_model
def simplenet_small_m2_075(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """Three quarters of the width, later strides: 3,287,272 parameters, 953.9 M MACs."""
    return _create("simplenet_small_m2_075", pretrained, kwargs, **_IMAGENET["small_m2_075"])


@register_model
def simplenet_5m_m1(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """5,752,808 parameters, 1.342 G MACs."""
    return _create("simplenet_5m_m1", pretrained, kwargs, **_IMAGENET["5m_m1"])


@register_model
def simplenet_5m_m2(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """5,752,808 parameters, 1.689 G MACs."""
    return _create("simplenet_5m_m2", pretrained, kwargs, **_IMAGENET["5m_m2"])


@register_model
def simplenet_5m_m3(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """5,752,808 parameters, 2.035 G MACs."""
    return _create("simplenet_5m_m3", pretrained, kwargs, **_IMAGENET["5m_m3"])


@register_model
def simplenet_5m_m4(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """5,752,808 parameters, 2.729 G MACs."""
    return _create("simplenet_5m_m4", pretrained, kwargs, **_IMAGENET["5m_m4"])


@register_model
def simplenet_9m_m1(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """9,508,968 parameters, 2.774 G MACs."""
    return _create("simplenet_9m_m1", pretrained, kwargs, **_IMAGENET["9m_m1"])


@register_model
def simplenet_9m_m2(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """9,508,968 parameters, 3.555 G MACs."""
    return _create("simplenet_9m_m2", pretrained, kwargs, **_IMAGENET["9m_m2"])


@register_model
def simplenet_9m_m3(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """9,508,968 parameters; none was released."""
    return _create("simplenet_9m_m3", pretrained, kwargs, **_IMAGENET["9m_m3"])


@register_model
def simplenet_9m_m4(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """9,508,968 parameters; none was released."""
    return _create("simplenet_9m_m4", pretrained, kwargs, **_IMAGENET["9m_m4"])
