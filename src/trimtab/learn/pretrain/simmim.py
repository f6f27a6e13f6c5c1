"""SimMIM, masked image modelling for any transformer (Xie et al. 2021, arXiv 2111.09886).

Large random squares of the image are hidden: at the output of the patch embedding their patches are replaced by one
learned token, before positions are added. The ordinary encoder runs on all tokens, a linear layer predicts the raw
pixels, and the loss is their mean absolute error on hidden pixels only. Because no token is dropped, it applies to
hierarchical transformers as well. Head and token are thrown away; fine-tune with ``tt.fit(..., layer_decay=0.8)``.

    e = PatchEmbed(x);  e = e (1 - m) + t m;  x' = PixelShuffle(Conv1x1(Encoder(e)))
    loss = sum |x - x'| M / (sum M + 1e-5) / channels,  M = m on pixels, 1 = hidden

The masks are drawn on the training device, not by the data loader. The paper's augmentation is
``augment="rrc=0.67+flip"``. Its ViT (shared relative positions, LayerScale 0.1) is `timm`'s ``Beit`` with
``use_shared_rel_pos_bias=True``; any other ViT or Swin will do. There is nothing to validate before fine-tuning, so the
validation split is not looked at, and the last weights are kept.
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.core.card import Card, Claim
from trimtab.learn.evaluate import evaluating
from trimtab.learn.objective import Batch, Context, Losses, Objective
from trimtab.learn.settings import Settings
from trimtab.learn.taps import taps

CARD = Card(
    slug="simmim",
    title="SimMIM: A Simple Framework for Masked Image Modeling",
    arxiv="2111.09886",
    year=2021,
    kind="objective",
    tasks=("pretrain", "classify"),
    claims=(
        Claim(
            "finetune_gain",
            "ViT-B 83.8% ImageNet top-1 after 800 epochs of SimMIM, +0.6 over the previous best; Swin-B 84.0, "
            "Swin-L 85.4, SwinV2-H 87.1",
        ),
        Claim("light_head", "a linear (1x1 conv + pixel shuffle) head is no worse than heavier heads"),
        Claim(
            "masking",
            "random masking with large patches (32) works; harder masks beat small-patch low-ratio masks",
        ),
    ),
)

UNIT = 32  # pixels


class SimMIM(Objective):
    """Predict the pixels of hidden squares.

    Args:
        unit: side of a square in pixels, a multiple of the patch that divides the image; None: of those, the nearest to
            the paper's 32 that is at most a quarter of the image.
        ratio: share of the squares that is hidden, rounded up; every image gets the same number.
        head_layers: 1 for the paper's linear head; more put 3x3 convolutions with GELU before it.
        final_norm: predict from what leaves the encoder's last norm. False takes what enters it, which suits linear
            probing; fine-tuning is as good either way.

    Raises:
        ValueError: at the start of training, if the model has no patch tokens, or patches that overlap.
    """

    def __init__(
        self, *, unit: int | None = None, ratio: float = 0.6, head_layers: int = 1, final_norm: bool = True
    ) -> None:
        if unit is not None and (not isinstance(unit, int) or unit < 1):
            raise ValueError(f"unit must be a positive number of pixels or None, got {unit!r}")
        if not 0 < ratio < 1:
            raise ValueError(f"ratio must be between 0 and 1, got {ratio}")
        if head_layers < 1:
            raise ValueError(f"head_layers must be at least 1, got {head_layers}")
        self.unit, self.ratio, self.head_layers, self.final_norm = unit, ratio, head_layers, final_norm

    def prepare(self, data: Any, settings: Settings, device: torch.device) -> Any:
        only = copy(data)
        only.splits = {"train": data.splits["train"]}
        return only

    def setup(self, model: nn.Module, batch: Batch) -> None:
        if not isinstance(getattr(model, "patch_embed", None), nn.Module) or not hasattr(model, "forward_features"):
            raise ValueError(f"SimMIM needs a transformer with patch tokens (patch_embed), got {type(model).__name__}")
        image = batch["image"][:2]
        with evaluating(model, image.device), torch.no_grad():
            with taps(model, ["patch_embed"]) as seen:
                features = self._features(model, image)
            self._look_at(model, seen["patch_embed"], image)
            token = nn.init.trunc_normal_(torch.empty(self._dim), std=0.02)
            self.extra["mask"] = nn.ParameterDict({"token": token})
            self.extra["head"] = head(
                features.shape[1], image.shape[1], image.shape[2] // features.shape[2], layers=self.head_layers
            )
            self.extra.to(image.device)
            self._check_hiding(model, image)

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        image = batch["image"]
        mask = self.random_mask(len(image), ctx.generator)
        return masked_l1(self.reconstruct(model, image, mask), image, self.on_pixels(mask))

    def random_mask(self, n: int, generator: torch.Generator) -> Tensor:
        """bool (n, h, w) on the patches, True = hidden: whole squares, equally many in every image."""
        rows, columns, patches = (*self._squares, self._unit // self._patch)
        noise = torch.rand(n, rows * columns, generator=generator, device=generator.device)
        mask = (noise.argsort(1).argsort(1) < self.hidden).view(n, rows, columns)
        return _enlarge(mask, patches)

    def on_pixels(self, mask: Tensor) -> Tensor:
        """A mask of patches (B, h, w) as one of pixels (B, 1, H, W)."""
        return _enlarge(mask, self._patch)[:, None]

    def encode(self, model: nn.Module, image: Tensor, mask: Tensor) -> Tensor:
        """Features (B, C, H/s, W/s) of images (B, c, H, W) of which the patches in `mask` (B, h, w) are hidden."""
        embed: Any = model.patch_embed
        handle = embed.register_forward_hook(lambda _module, _args, tokens: self._hide(tokens, mask))
        try:
            return self._features(model, image)
        finally:
            handle.remove()

    def reconstruct(self, model: nn.Module, image: Tensor, mask: Tensor) -> Tensor:
        """The image (B, c, H, W) as the head predicts it from what is not hidden; after training, too."""
        return self.extra["head"](self.encode(model, image, mask))

    def _look_at(self, model: nn.Module, tokens: Tensor, image: Tensor) -> None:
        """Learn from the output of the patch embedding how patches lie, and from that how squares do."""
        (height, width), name = image.shape[2:], type(model).__name__
        last = "NHWC" in str(getattr(model.patch_embed, "output_fmt", ""))
        self._channels = 1 if isinstance(tokens, Tensor) and tokens.ndim == 4 and not last else -1
        if not isinstance(tokens, Tensor) or tokens.ndim not in (3, 4):
            raise ValueError(f"the patch_embed of {name} must give tokens (B, N, C) or a map of them")
        self._dim = tokens.shape[self._channels]
        number = tokens[0].numel() // self._dim
        self._patch = math.isqrt(height * width // number)
        if self._patch**2 * number != height * width or height % self._patch or width % self._patch:
            raise ValueError(f"{name} must cut {height}x{width} images into square patches, got {number} of them")
        self._unit = unit = _unit(self.unit, (height, width), self._patch)
        self._squares = height // unit, width // unit
        number = math.prod(self._squares)
        self.hidden = math.ceil(self.ratio * number - 1e-9)
        if self.hidden == number:
            raise ValueError(f"ratio {self.ratio} of {number} squares of {unit} pixels hides the whole image")

    def _hide(self, tokens: Tensor, mask: Tensor) -> Tensor:
        token = self.extra["mask"].get_parameter("token").to(tokens.dtype)
        if self._channels == 1:
            return torch.where(mask[:, None], token[:, None, None], tokens)
        return torch.where((mask if tokens.ndim == 4 else mask.flatten(1))[..., None], token, tokens)

    def _features(self, model: Any, image: Tensor) -> Tensor:
        """What the encoder gives, as a map (B, C, H/s, W/s)."""
        if self.final_norm:
            out = model.forward_features(image)
        else:
            with taps(model, ["norm"], inputs=True) as seen:
                model.forward_features(image)
            out = seen["norm"]
        if out.ndim == 4:
            last = out.shape[-1] == model.num_features and out.shape[1] != model.num_features
            return out.permute(0, 3, 1, 2) if last else out
        out = out[:, getattr(model, "num_prefix_tokens", 0) :]
        stride = math.isqrt(image.shape[2] * image.shape[3] // out.shape[1])
        return out.transpose(1, 2).unflatten(2, (image.shape[2] // stride, image.shape[3] // stride))

    def _check_hiding(self, model: nn.Module, image: Tensor) -> None:
        """Nothing of a hidden square may reach the encoder."""
        if image.is_meta:  # being counted, not computed
            return
        mask = self.random_mask(len(image), torch.Generator(image.device).manual_seed(0))
        a, b = (self.encode(model, x, mask) for x in (image, image.masked_fill(self.on_pixels(mask), 3.0)))
        if not torch.allclose(a, b, atol=1e-4 * float(a.abs().max())):
            raise ValueError(f"SimMIM needs patches that do not overlap; those of {type(model).__name__} do")


def head(channels: int, in_chans: int, stride: int, *, layers: int = 1) -> nn.Sequential:
    """Features (B, channels, h, w) to pixels (B, in_chans, h s, w s): linear, after `layers` - 1 convolutions.

    >>> sum(p.numel() for p in head(1024, 3, 32).parameters())
    3148800
    """
    before = [m for _ in range(layers - 1) for m in (nn.Conv2d(channels, channels, 3, padding=1), nn.GELU())]
    return nn.Sequential(*before, nn.Conv2d(channels, in_chans * stride**2, 1), nn.PixelShuffle(stride))


def masked_l1(predicted: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error over the hidden pixels and their channels; mask (B, 1, H, W), True = hidden.

    >>> image, mask = torch.zeros(2, 3, 4, 4), torch.ones(2, 1, 4, 4, dtype=torch.bool)
    >>> round(masked_l1(image + 1, image, mask).item(), 4)
    1.0
    """
    error = ((predicted - image).abs() * mask).sum()
    return error / (mask.sum() + 1e-5) / image.shape[1]


def avg_dist(mask: Tensor) -> float:
    """Mean distance, in pixels, of hidden pixels to the nearest visible one (Section 4.1.2); mask (B, H, W).

    >>> avg_dist(torch.tensor([[[0, 1, 0]]]))
    1.0
    """
    from scipy.ndimage import distance_transform_edt

    masks = mask.bool().cpu().numpy()
    return float(np.concatenate([distance_transform_edt(m)[m] for m in masks]).mean())


def _enlarge(mask: Tensor, times: int) -> Tensor:
    return mask.repeat_interleave(times, 1).repeat_interleave(times, 2)


def _unit(given: int | None, size: tuple[int, int], patch: int) -> int:
    """The side of a square in pixels."""
    fits = [u for u in range(patch, min(size) + 1, patch) if size[0] % u == 0 and size[1] % u == 0]
    if given is None:
        return min((u for u in fits if 4 * u <= min(size)), key=lambda u: abs(u - UNIT), default=patch)
    if given not in fits:
        raise ValueError(
            f"unit must be a multiple of the patch that divides {size[0]}x{size[1]} images "
            f"({', '.join(map(str, fits))}), got {given}"
        )
    return given
