"""DToP: tokens that an early head is sure about keep its prediction and leave the network.

Tang, Zhang et al., "Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation", arXiv 2308.01045.
`DToP` is any plain ViT of timm with a segmentation head after some of its layers. A head gives every token a class and
a confidence; tokens above the threshold are finished, except the `keep` most confident of every class, which stay so
that the others still see it. Later layers run on the tokens that are left, really fewer, so that easy images take less
time. The final map is the union of what was predicted at different depths.

How to use it (the paper's three ways): train with `confidence=1` (nothing is pruned) and set `model.confidence = 0.95`
afterwards ("direct"); go on training with it ("finetune", the recommended one); or train with it from the start.

What is as in the paper and its code: the class token is dropped before the first layer, the comparison is strict, the
last stage does not prune, finished tokens keep the mask logits of the earlier head and get the class scores of the
latest one, and all heads have the same loss. What is not:

- Images of a batch have different numbers of tokens left; they are padded to the largest, with the padding masked, so
  that a batch gives what its images give one by one. A batch saves what its hardest image saves.
- Where shapes must be static (ONNX, `torch.compile`, `tt.measure`) no token is taken out: finished ones are masked in
  every attention instead, which computes the same at the cost of the unpruned network.
- The logits are the logarithms of the paper's scores, which order classes alike and suit cross-entropy.
- The last stage sees the backbone's own final norm; earlier heads bring theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from trimtab.core.card import Card, Claim
from trimtab.nn.classifier import check_sizes
from trimtab.nn.segmenter import Segmenter, dice_loss, pixel_loss

CARD = Card(
    slug="dtop",
    title="Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation",
    arxiv="2308.01045",
    year=2023,
    kind="method",
    tasks=("segment",),
    claims=(
        Claim(
            "flops",
            "Average compute drops 20-35% at (near) equal mIoU: SegViT-B ADE20K 109.9 -> 86.8 GFLOPs (49.6 -> 49.8 "
            "mIoU); SegViT-L 617.0 -> 412.8 (53.3 -> 52.8)",
        ),
        Claim("dynamic", "Compute adapts to the image: easy images exit more tokens"),
        Claim(
            "topk",
            "Keeping the k most confident tokens of every predicted class preserves context; plain thresholding "
            "without it is worse",
        ),
        Claim(
            "finetune", "A short fine-tune with pruning switched on beats applying pruning directly to a trained model"
        ),
    ),
)


class Stage(NamedTuple):
    """After a stage: mask logits (B, C, h, w) of all tokens, and class logits (B, C, 2) of an ATM head."""

    canvas: Tensor
    presence: Tensor | None


# ---------------------------------------------------------------------------------------------------------------- heads
# A head turns tokens (B, n, D) into mask logits (B, C, n) and class logits; `mask` (B, 1, 1, n) is False where a token
# is none. `scores` are what is compared with the threshold, `macs(n)` what n tokens cost.


class LinearHead(nn.Module):
    """A norm and a linear layer per token; scores are the softmax over classes."""

    def __init__(self, width: int, num_classes: int, heads: int, dropout: float):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return self.fc(self.norm(x)).transpose(1, 2), None

    def scores(self, canvas: Tensor, presence: Tensor | None) -> Tensor:
        return canvas.softmax(1)

    def logits(self, canvas: Tensor, presence: Tensor | None, size: tuple[int, int]) -> Tensor:
        return _resize(canvas, size)

    def loss(self, canvas: Tensor, presence: Tensor | None, label: Tensor) -> dict[str, Tensor]:
        return {"cross_entropy": pixel_loss(_resize(canvas, label.shape[1:]), label)}

    def macs(self, n: Any) -> Any:
        return n * _products(self.fc)


class Attention(nn.Module):
    """Attention from queries to a memory, which also gives the scores before their softmax."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.heads, self.drop = heads, nn.Dropout(dropout)
        self.scale = (width // heads) ** -0.5  # of the width it was made with, also after pruning

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, d) and (B, n, d) -> (B, C, d) and scores (B, heads, C, n)."""
        q, k, v = (
            layer(t).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, t in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        scores = self.scale * (q @ k.transpose(2, 3))
        masked = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        out = self.drop(masked.softmax(3)) @ v
        return self.proj(out.transpose(1, 2).flatten(2)), scores


class Decoder(nn.Module):
    """A layer of a transformer decoder, normed after every part."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.among, self.across = Attention(width, heads, dropout), Attention(width, heads, dropout)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.norm1(x + self.drop(self.among(x, x)[0]))
        out, scores = self.across(x, memory, mask)
        x = self.norm2(x + self.drop(out))
        return self.norm3(x + self.drop(self.fc2(self.drop(self.fc1(x).relu())))), scores


class ATMHead(nn.Module):
    """SegViT's attention-to-mask: a query per class looks at the tokens; how it looks at them is the mask of its class.

    Scores are s_c sigmoid(A_cn), where A are the attention scores of the last of three layers before their softmax
    (the mean over heads), and s_c says whether the class is in the image at all.
    """

    def __init__(self, width: int, num_classes: int, heads: int, dropout: float):
        super().__init__()
        half = width // 2
        if half % heads:
            raise ValueError(f"half of the backbone's width, {half}, must be a multiple of head_heads, got {heads}")
        self.reduce, self.norm = nn.Linear(width, half), nn.LayerNorm(half)
        trunc_normal_(self.reduce.weight, std=0.02)
        self.queries = nn.Parameter(torch.randn(num_classes, half))
        self.layers = nn.ModuleList(Decoder(half, heads, dropout) for _ in range(3))
        self.classify = nn.Linear(half, 2)  # present, absent

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        memory = self.norm(self.reduce(x))  # (B, n, d)
        queries, scores = self.queries.repeat(len(x), 1, 1), memory
        for layer in self.layers:
            queries, scores = layer(queries, memory, mask)
        return scores.mean(1), self.classify(queries)

    def scores(self, canvas: Tensor, presence: Tensor) -> Tensor:
        present = presence.softmax(2)[..., 0]
        return present.unflatten(1, (-1, *(1 for _ in canvas.shape[2:]))) * canvas.sigmoid()

    def logits(self, canvas: Tensor, presence: Tensor, size: tuple[int, int]) -> Tensor:
        return _resize(self.scores(canvas, presence), size).clamp_min(1e-12).log()

    def loss(self, canvas: Tensor, presence: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of classes, and 20 x focal and Dice loss of masks of those there are. Void is background."""
        classes = torch.arange(canvas.shape[1], device=label.device)
        there = torch.stack([torch.isin(classes, seen) for seen in label.flatten(1)])  # (B, C)
        weight = presence.new_tensor([1.0, 0.1])
        losses = {"classes": F.cross_entropy(presence.flatten(0, 1), (~there).long().flatten(), weight)}
        image, kind = there.nonzero(as_tuple=True)
        if len(kind) == 0:
            return losses | {"focal": 0 * canvas.sum(), "dice": 0 * canvas.sum()}
        masks = _resize(canvas[there][None], label.shape[1:])  # (1, all present, H, W)
        target = (label[image] == kind[:, None, None])[None].to(masks.dtype)
        return losses | {
            "focal": 20 * sigmoid_focal_loss(masks, target, alpha=0.25, gamma=2, reduction="mean"),
            "dice": dice_loss(masks.sigmoid(), target).mean(),
        }

    def macs(self, n: Any) -> Any:
        """n D d + 3 (14 C d^2 + 2 C^2 d + 2 n d^2 + 2 C n d) + 2 C d, from the weights, which may have been pruned."""
        layers: Any = self.layers
        c = len(self.queries)
        total = n * _products(self.reduce) + c * _products(self.classify)
        for layer in layers:
            one, two = layer.among, layer.across
            total += c * _products(one.q, one.k, one.v, one.proj, two.q, two.proj, layer.fc1, layer.fc2)
            total += n * _products(two.k, two.v)
            total += c * c * (one.q.out_features + one.v.out_features)
            total += c * n * (two.q.out_features + two.v.out_features)
        return total


HEADS: dict[str, Any] = {"atm": ATMHead, "linear": LinearHead}


# ---------------------------------------------------------------------------------------------------------------- model


class DToP(Segmenter):
    """A plain ViT with exits: (B, in_chans, H, W) -> logits (B, num_classes, H, W); when training, a `Stage` per head.

    Args:
        backbone: name of a plain ViT of timm. backbone_kwargs: more for its builder, such as ``{"depth": 6}``.
        exits: layers after which there is a head, counted from 1; there is always one after the last.
        confidence: tokens whose best score is above are finished; 1 prunes nothing, and exit heads are then skipped at
            inference. May be changed at any time.
        keep: most confident tokens of every class that go on nevertheless.
        head: "atm" (SegViT's) or "linear".
        head_heads: attention heads of an ATM head; half of the backbone's by default.
        head_dropout: in ATM heads.
        img_size: of the images for which position embeddings are kept; others are served by interpolation.
        pretrained_backbone: fetch timm's weights of the backbone (needs the network).

    Attributes:
        last_tokens: int64 (B, stages): tokens with which the images of the last batch entered each stage.

    >>> net = DToP(backbone_kwargs={"depth": 3, "embed_dim": 24}, exits=(1, 2), img_size=32, num_classes=4).eval()
    >>> net(torch.zeros(2, 3, 32, 48)).shape, net.last_tokens.tolist()
    (torch.Size([2, 4, 32, 48]), [[6, 6, 6], [6, 6, 6]])
    """

    any_size = True  # for `models.small_images`: the patch is the caller's choice

    def __init__(
        self,
        *,
        backbone: str = "vit_tiny_patch16_224",
        backbone_kwargs: Mapping[str, Any] | None = None,
        exits: Sequence[int] = (6, 8),
        confidence: float = 0.95,
        keep: int = 5,
        head: str = "atm",
        head_heads: int | None = None,
        head_dropout: float = 0.1,
        img_size: int | Sequence[int] = 224,
        num_classes: int = 150,
        in_chans: int = 3,
        pretrained_backbone: bool = False,
    ):
        super().__init__()
        check_sizes(num_classes=num_classes, in_chans=in_chans)
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
            raise ValueError(f"keep must be a non-negative integer, got {keep!r}")
        self.confidence, self.keep = confidence, keep
        self.backbone = _plain_vit(backbone, img_size, in_chans, pretrained_backbone, backbone_kwargs or {})
        depth, width = len(self.backbone.blocks), self.backbone.embed_dim
        self.ends = (*exits, depth)  # the last layer of every stage
        if any(a >= b for a, b in pairwise((0, *self.ends))):
            raise ValueError(f"exits must rise and lie between layers 1 and {depth - 1}, got {tuple(exits)}")
        self.multiple = self.backbone.patch_embed.patch_size[0]
        blocks: Any = self.backbone.blocks
        heads = max(1, blocks[0].attn.num_heads // 2) if head_heads is None else head_heads
        self._head = (HEADS[head], heads, head_dropout)
        self.feature_info = [
            {"num_chs": width, "reduction": self.multiple, "module": f"backbone.blocks.{end - 1}"} for end in self.ends
        ]
        self.last_tokens: Tensor | None = None
        self._make_head(width, num_classes, in_chans, "")

    @property
    def confidence(self) -> float:
        return self._confidence

    @confidence.setter
    def confidence(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"confidence must be between 0 and 1, got {value!r}")
        self._confidence = float(value)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put fresh heads on; 0 classes leaves the features, interpolated to the pixels."""
        check_sizes(num_classes=num_classes)
        kind, heads, dropout = self._head
        like = next(self.backbone.parameters())
        self.num_classes = num_classes
        stages = len(self.ends) if num_classes else 0
        self.heads = nn.ModuleList(kind(self.head_hidden_size, num_classes, heads, dropout) for _ in range(stages))
        self.heads.to(device=like.device, dtype=like.dtype).train(self.training)

    def get_classifier(self) -> nn.Module:
        """The heads, one per stage."""
        return self.heads

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, D, h, w), without pruning."""
        x, grid = self._embed(x)
        x = self.backbone.norm(self.backbone.blocks(x))
        return x.transpose(1, 2).unflatten(2, grid)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, D, h, w) -> (B, num_classes, H, W), by the last head alone."""
        h, w = x.shape[2:]
        size = (h * self.multiple, w * self.multiple)
        if pre_logits or not self.num_classes:
            return _resize(x, size)
        head: Any = self.heads[-1]
        canvas, presence = head(x.flatten(2).transpose(1, 2))
        return head.logits(canvas.unflatten(2, (h, w)), presence, size)

    def forward(self, x: Tensor) -> Any:
        if not self.num_classes:
            return self.forward_head(self.forward_features(x))
        stages = self._stages(x)
        if self.training:
            return stages
        head: Any = self.heads[-1]
        return head.logits(*stages[-1], (x.shape[2], x.shape[3]))

    def criterion(self, outputs: Sequence[Stage], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss of every head on its whole map, by name and stage; "label" (B, H, W) int64, 255 for void."""
        heads: Any = self.heads
        return {
            f"{name}_{i}": value
            for i, (head, stage) in enumerate(zip(heads, outputs), 1)
            for name, value in head.loss(*stage, batch["label"]).items()
        }

    def macs(self, tokens: Tensor | None = None) -> Tensor:
        """Multiply-accumulates of images by the closed form: tokens int64 (..., stages), as in `last_tokens` -> (...).

        By default those of an image of `img_size` of which no token is finished.
        """
        if tokens is None:
            tokens = torch.full((len(self.ends),), math.prod(self.backbone.patch_embed.grid_size))
        vit: Any = self.backbone
        total = tokens[..., 0] * vit.patch_embed.proj.weight.numel()
        for stage, n in enumerate(tokens.unbind(-1)):
            for block in vit.blocks[self._layers(stage)]:
                linear = _products(*(m for m in block.modules() if isinstance(m, nn.Linear)))
                total = total + n * linear + 2 * n**2 * block.attn.proj.in_features
            if self._runs(stage):
                head: Any = self.heads[stage]
                total = total + (n > 0) * head.macs(n)
        return total

    def _layers(self, stage: int) -> slice:
        return slice(self.ends[stage - 1] if stage else 0, self.ends[stage])

    def _runs(self, stage: int) -> bool:
        """Whether a stage's head is needed."""
        return self.training or self.confidence < 1 or stage == len(self.ends) - 1

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, N, D) with their positions, and the grid (h, w) of them."""
        self._check(x)
        vit: Any = self.backbone
        x = vit.patch_embed(x)  # (B, h, w, D)
        grid, own = (x.shape[1], x.shape[2]), tuple(vit.patch_embed.grid_size)
        position = vit.pos_embed
        if position is not None:
            if grid != own:
                position = resample_abs_pos_embed(position, list(grid), list(own), num_prefix_tokens=0)
            x = x.flatten(1, 2) + position
        return vit.norm_pre(vit.pos_drop(x)), grid

    def _stages(self, image: Tensor) -> list[Stage]:
        """The pruning loop: what is known after every stage whose head runs."""
        x, grid = self._embed(image)
        batch, count, _ = x.shape
        static = x.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing()
        live = torch.ones(batch, count, dtype=torch.bool, device=x.device)  # of the tokens in x, those not finished
        where = torch.arange(count, device=x.device).expand(batch, -1)  # their places in the image
        mask: Tensor | None = None
        canvas = x.new_zeros(batch, self.num_classes, count)
        presence: Tensor | None = None
        stages, entered = [], []
        vit: Any = self.backbone
        heads: Any = self.heads
        for i, head in enumerate(heads):
            last = i == len(self.ends) - 1
            entered.append(live.sum(1))
            if x.shape[1]:
                for block in vit.blocks[self._layers(i)]:
                    x = block(x) if mask is None else block(x, attn_mask=mask)
                if not self._runs(i):
                    continue
                found, classes = head(vit.norm(x) if last else x, mask)
                canvas = _write(canvas, found, where, live)
                presence = classes if presence is None else _where_any(live, classes, presence)
            stages.append(Stage(canvas.unflatten(2, grid), presence))
            if last or self.confidence == 1 or not x.shape[1]:
                continue
            with torch.no_grad():
                here = canvas.gather(2, where[:, None].expand(-1, self.num_classes, -1))
                live = live & ~self._finished(head.scores(here, presence), live)
            if not static:
                x, live, where = _take_live(x, live, where)
            mask = None if not static and bool(live.all()) else _keys(live)
        if not static:
            self.last_tokens = torch.stack(entered, 1)
        return stages

    def _finished(self, scores: Tensor, live: Tensor) -> Tensor:
        """Which tokens leave: scores (B, C, n) and live (B, n) -> (B, n)."""
        best, kind = scores.max(1)
        easy = live & (best > self.confidence)
        if not self.keep:
            return easy
        # Of equal scores (a sure softmax is exactly 1) the first goes on, wherever this runs; no other order changes.
        wide = torch.float32 if best.device.type == "mps" else torch.float64
        places = torch.arange(best.shape[1], device=best.device, dtype=wide)
        classes = torch.arange(self.num_classes, device=best.device)[:, None]
        first = (best.to(wide) - 1e-14 * places)[:, None]
        ranked = torch.where(easy[:, None] & (kind[:, None] == classes), first, -1.0)  # (B, C, n)
        top, index = ranked.topk(min(self.keep, ranked.shape[2]), dim=2)
        stay = torch.zeros_like(ranked).scatter(2, index, (top > -0.5).to(ranked.dtype)).amax(1)
        return easy & (stay == 0)


def _plain_vit(name: str, img_size: Any, in_chans: int, pretrained: bool, more: Mapping[str, Any]) -> Any:
    """A ViT without class token and classifier, whose position embeddings are those of the patches alone."""
    if not timm.is_model(name):
        raise ValueError(f"backbone must be a plain ViT of timm, such as vit_tiny_patch16_224, got {name!r}")
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    try:
        vit: Any = timm.create_model(
            name, pretrained=pretrained, num_classes=0, global_pool="", img_size=size, in_chans=in_chans,
            dynamic_img_size=True, **more,
        )  # fmt: skip
    except TypeError as e:  # arguments that only vision transformers have
        raise ValueError(f"backbone must be a plain ViT of timm, {name!r} is built differently ({e})") from e
    if type(vit) is not VisionTransformer:
        raise ValueError(f"backbone must be a plain ViT of timm, {name!r} is a {type(vit).__name__}")
    if vit.pos_embed is not None and not vit.no_embed_class:
        vit.pos_embed = nn.Parameter(vit.pos_embed.detach()[:, vit.num_prefix_tokens :].clone())
    vit.cls_token = vit.reg_token = None
    vit.num_prefix_tokens, vit.has_class_token = 0, False
    return vit


def _products(*layers: Any) -> int:
    """Multiply-accumulates of linear layers for one token."""
    return sum(layer.weight.numel() for layer in layers)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _write(canvas: Tensor, found: Tensor, where: Tensor, live: Tensor) -> Tensor:
    """The canvas (B, C, N) with mask logits (B, C, n) at the places of live tokens."""
    index = where[:, None].expand_as(found)
    return canvas.scatter(2, index, torch.where(live[:, None], found, canvas.gather(2, index)).to(canvas.dtype))


def _where_any(live: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """The new class logits of images with tokens left, the old ones of others."""
    return None if new is None or old is None else torch.where(live.any(1)[:, None, None], new, old)


def _take_live(x: Tensor, live: Tensor, where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Only live tokens, in their order, padded with finished ones to the count of the image that has most."""
    most = int(live.sum(1).max())
    if most == x.shape[1]:
        return x, live, where
    order = (~live).int().argsort(dim=1, stable=True)[:, :most]
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2])), live.gather(1, order), where.gather(1, order)


def _keys(live: Tensor) -> Tensor:
    """What attention may look at (B, 1, 1, n): live tokens; anything where there are none, for nobody will look."""
    return (live | ~live.any(1, keepdim=True))[:, None, None]


# ------------------------------------------------------------------------------------------------------------- networks


def _cfg(side: int, num_classes: int) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (3, side, side),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "backbone.patch_embed.proj",
        "classifier": ("heads.0.fc", "heads.1.fc", "heads.2.fc"),  # where heads are linear
    }


_NANO = {"embed_dim": 96, "depth": 6, "num_heads": 3, "patch_size": 4}
_NETS: dict[str, tuple[int, int, dict[str, Any]]] = {  # image size, classes, arguments
    "dtop_segmenter": (224, 150, {}),
    "dtop_segvit_base": (512, 150, {"backbone": "vit_base_patch16_224"}),
    "dtop_segvit_large": (640, 150, {"backbone": "vit_large_patch16_224", "exits": (8, 16)}),
    "dtop_nano": (64, 6, {"backbone_kwargs": _NANO, "exits": (3, 4)}),
}
default_cfgs = generate_default_cfgs({name: _cfg(side, classes) for name, (side, classes, _) in _NETS.items()})  # type: ignore[arg-type]


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    side, _, arguments = _NETS[name]
    made = {"img_size": side, **arguments, **kwargs}
    return build_model_with_cfg(DToP, name, False, pretrained_backbone=pretrained, **made)


@register_model
def dtop_segmenter(pretrained: bool = False, **kwargs: Any) -> DToP:
    """ViT-Tiny with exits after layers 6 and 8; any plain ViT by `backbone`."""
    return _create("dtop_segmenter", pretrained, kwargs)


@register_model
def dtop_segvit_base(pretrained: bool = False, **kwargs: Any) -> DToP:
    """SegViT-B for ADE20K at 512: 114.53 G MACs with three heads and nothing pruned, 109.45 G with the last alone."""
    return _create("dtop_segvit_base", pretrained, kwargs)


@register_model
def dtop_segvit_large(pretrained: bool = False, **kwargs: Any) -> DToP:
    """SegViT-L for ADE20K at 640: 627.71 G MACs with three heads and nothing pruned, 616.09 G with the last alone."""
    return _create("dtop_segvit_large", pretrained, kwargs)


@register_model
def dtop_nano(pretrained: bool = False, **kwargs: Any) -> DToP:
    """For images of 64 pixels: patches of 4 x 4, six layers of width 96, exits after the third and fourth."""
    return _create("dtop_nano", pretrained, kwargs)
