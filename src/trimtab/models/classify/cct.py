"""Compact transformers: ViT-Lite, CVT and CCT (Hassani et al., "Escaping the Big Data Paradigm with Compact
Transformers", arXiv 2104.05704).

A small ViT with small patches already learns from CIFAR-size data (ViT-Lite); pooling all output tokens by a learned
attention instead of a class token helps (CVT); and tokens from convolution + ReLU + max pooling bring locality back,
take any image size and make position embeddings nearly optional (CCT). Names read `L_KxC`: L layers, K the patch or
kernel size, C convolutions in the tokenizer.

Differences from the released code, on purpose: `positional_embedding="sine"` really is a fixed sine table in every
variant (the released CCT and CVT builders train one instead), an unknown value is an error, and the text model's
position table has exactly one row per token. Other image sizes than the one built for are taken by resizing the table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from timm.layers import DropPath, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor

from trimtab.core.card import Card, Claim
from trimtab.nn.classifier import Classifier, check_image_input, check_sizes

CARD = Card(
    slug="cct",
    title="Escaping the Big Data Paradigm with Compact Transformers",
    arxiv="2104.05704",
    year=2021,
    kind="architecture",
    tasks=("classify", "text-classification"),
    claims=(
        Claim(
            "params",
            "CCT-7/3x1 has 3.76M parameters and reaches 98.00% on CIFAR-10 trained from scratch (96.53% after 300 "
            "epochs); the smallest model has 0.28M",
        ),
        Claim(
            "conv_tokenizer_wins_small_data",
            "Convolutional tokenizer + sequence pooling beats a patch-embedding ViT of the same size on small data: "
            "ViT-Lite-7/4 < CVT-7/4 < CCT-7/3x2 < CCT-7/3x1 on CIFAR-10/100",
        ),
        Claim("positional_robustness", "CCT hardly needs positional embeddings, ViT-Lite does"),
        Claim(
            "imagenet",
            "CCT-14/7x2: 80.67% top-1 at 224 with 22.36M params / 5.11G MACs; 82.71% after 384 fine-tuning with "
            "22.51M / 15.02G",
        ),
    ),
)

POSITIONS = ("learnable", "sine", "none")


class ConvTokenizer(nn.Module):
    """`layers` times (conv without bias, ReLU, max pool 3/2): (B, in_chans, H, W) -> (B, width, h, w)."""

    def __init__(
        self,
        in_chans: int,
        width: int,
        *,
        kernel: int,
        layers: int,
        inner: int,
        stride: int | None,
        padding: int | None,
    ):
        super().__init__()
        stride = max(1, kernel // 2 - 1) if stride is None else stride
        padding = max(1, kernel // 2) if padding is None else padding
        chs = [in_chans] + [inner] * (layers - 1) + [width]
        blocks: list[nn.Module] = []
        for a, b in itertools.pairwise(chs):
            conv = nn.Conv2d(a, b, kernel, stride, padding, bias=False)
            blocks.append(nn.Sequential(conv, nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class PatchTokenizer(nn.Module):
    """Patches that do not overlap, with bias: (B, in_chans, H, W) -> (B, width, H/P, W/P)."""

    def __init__(self, in_chans: int, width: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, width, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Attention(nn.Module):
    """Multi-head softmax attention; qkv without bias, dropout on the attention probabilities."""

    def __init__(self, width: int, num_heads: int, attn_drop: float, proj_drop: float):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, d)
        bias = None
        if mask is not None:  # outside the outer product of the mask: -max, so a row of padding attends uniformly
            inside = (mask[:, None, :, None] & mask[:, None, None, :]).to(q.dtype)
            bias = (1.0 - inside) * -torch.finfo(q.dtype).max
        drop = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, -1)))


class EncoderLayer(nn.Module):
    """Attention and MLP with stochastic depth; the released form normalises the residual stream in between.

    `second_norm="stream"` (released weights fit only this): x = x + attn(ln_a(x)); x = ln_b(x); x = x + mlp(x).
    `second_norm="branch"` (textbook pre-norm, the same parameters): ...; x = x + mlp(ln_b(x)).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        *,
        attn_drop: float,
        proj_drop: float,
        drop_path: float,
        second_norm: str,
    ):
        super().__init__()
        self.norm_stream = second_norm == "stream"
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads, attn_drop, proj_drop)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(proj_drop), nn.Linear(hidden, width), nn.Dropout(proj_drop)
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        if self.norm_stream:
            x = self.norm2(x)
            return x + self.drop_path(self.mlp(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SeqPool(nn.Module):
    """Weighted mean of the tokens, the weights a softmax over a linear score: (B, N, d) -> (B, d)."""

    def __init__(self, width: int):
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.score(x).softmax(dim=1)  # (B, N, 1)
        return (weight.transpose(1, 2) @ x).squeeze(1)


class TokenPool(nn.Module):
    """Class token (`first`) or mean over all tokens: (B, N, d) -> (B, d)."""

    def __init__(self, first: bool):
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.first else x.mean(1)


def sine_table(tokens: int, width: int) -> Tensor:
    """PE[n, i] = sin (even i) or cos (odd i) of n / 10000^(2 floor(i/2) / width): (1, tokens, width)."""
    i = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] / 10000 ** (2 * (i // 2) / width)
    return torch.where(i % 2 == 0, angle.sin(), angle.cos()).float()[None]


def resize_positions(
    table: Tensor, grid: tuple[int, int], prefix: int = 0, old: tuple[int, int] | None = None
) -> Tensor:
    """Resize a position table (1, prefix + h w, d) to another grid, bilinearly; the same size is returned as it is.

    Raises:
        ValueError: when `old` is not given and the table is not that of a square grid.
    """
    tokens = table.shape[1] - prefix
    if old is None:
        if tokens == grid[0] * grid[1]:
            return table
        old = (math.isqrt(tokens), math.isqrt(tokens))
        if old[0] * old[1] != tokens:
            raise ValueError(f"position table must be that of a square grid, got {tokens} tokens")
    if old == grid:
        return table
    head, body = table[:, :prefix], table[:, prefix:]
    body = body.reshape(1, *old, -1).permute(0, 3, 1, 2)
    body = F.interpolate(body, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([head, body.flatten(2).transpose(1, 2)], dim=1)


class CompactTransformer(Classifier):
    """ViT-Lite, CVT and CCT: (B, in_chans, H, W) -> (B, num_classes).

    Args:
        embed_dim, depth, num_heads, mlp_ratio: width d, layers L, heads h and hidden ratio r of the encoder.
        kernel_size, n_conv_layers: of the convolutional tokenizer; stride and padding follow from the kernel size
            (`max(1, k // 2 - 1)` and `max(1, k // 2)`) unless given.
        in_planes: width of the tokenizer's inner convolutions.
        patch_size: non-overlapping patches of this size instead of the convolutional tokenizer.
        global_pool: `seq` (learned attention), `token` (class token), `avg`, or "" for all tokens.
        positional_embedding: `learnable` (init std 0.2), `sine` (fixed), or `none`.
        second_norm: `stream` (released form) or `branch` (textbook), see `EncoderLayer`.
        drop_rate, proj_drop_rate, attn_drop_rate: dropout before the classifier; after positions, projections and
            inside the MLP; on the attention probabilities.
        drop_path_rate: stochastic depth of the last layer; grows linearly from 0.

    >>> CompactTransformer(embed_dim=16, depth=1, num_heads=2, img_size=8, in_chans=1)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        *,
        embed_dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        kernel_size: int = 3,
        n_conv_layers: int = 1,
        stride: int | None = None,
        padding: int | None = None,
        in_planes: int = 64,
        patch_size: int | None = None,
        global_pool: str = "seq",
        positional_embedding: str = "learnable",
        second_norm: str = "stream",
        img_size: int | Sequence[int] = 32,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.1,
        drop_path_rate: float = 0.1,
    ):
        super().__init__()
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        check_sizes(embed_dim=embed_dim, depth=depth, num_heads=num_heads, n_conv_layers=n_conv_layers)
        check_sizes(num_classes=num_classes, in_chans=in_chans, kernel_size=kernel_size, in_planes=in_planes)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads ({num_heads}), got {embed_dim}")
        if positional_embedding not in POSITIONS:
            raise ValueError(f"positional_embedding must be one of {POSITIONS}, got {positional_embedding!r}")
        if second_norm not in ("stream", "branch"):
            raise ValueError(f"second_norm must be 'stream' or 'branch', got {second_norm!r}")
        self.grad_checkpointing = False
        self.embed_dim = embed_dim
        if patch_size is not None:
            check_sizes(patch_size=patch_size)
            if size[0] % patch_size or size[1] % patch_size:
                raise ValueError(f"img_size must be a multiple of patch_size {patch_size}, got {size}")
            self.patch_embed: nn.Module = PatchTokenizer(in_chans, embed_dim, patch_size)
        else:
            self.patch_embed = ConvTokenizer(
                in_chans, embed_dim, kernel=kernel_size, layers=n_conv_layers, inner=in_planes, stride=stride,
                padding=padding,
            )  # fmt: skip
        self.grid_size: tuple[int, int] = _grid(self.patch_embed, in_chans, size)
        self.num_prefix_tokens = int(global_pool == "token")
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if self.num_prefix_tokens else None
        self.positional_embedding = positional_embedding
        tokens = self.num_prefix_tokens + self.grid_size[0] * self.grid_size[1]
        self.pos_embed: Tensor | None = None
        if positional_embedding == "learnable":
            self.pos_embed = nn.Parameter(trunc_normal_(torch.zeros(1, tokens, embed_dim), std=0.2))
        elif positional_embedding == "sine":
            del self.pos_embed  # a table computed from its shape is not weights: it is not saved either
            self.register_buffer("pos_embed", sine_table(tokens, embed_dim), persistent=False)
        self.pos_drop = nn.Dropout(proj_drop_rate)
        self.blocks = _encoder(
            embed_dim, depth, num_heads, mlp_ratio, attn_drop_rate, proj_drop_rate, drop_path_rate, second_norm
        )
        self.norm: nn.Module = nn.LayerNorm(embed_dim)
        reduction = max(1, round(max(size) / max(self.grid_size)))
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self._make_head(embed_dim, num_classes, in_chans, global_pool, drop_rate)
        _init_weights(self)

    def _make_pool(self, global_pool: str) -> nn.Module:
        if global_pool == "token" and self.cls_token is None:
            raise ValueError("global_pool='token' needs a model built with a class token")
        match global_pool:
            case "seq":
                pool = SeqPool(self.embed_dim)
                _init_weights(pool)
                return pool.to(next(self.blocks.parameters()))
            case "token" | "avg":
                return TokenPool(global_pool == "token")
            case "":
                return nn.Identity()
        raise ValueError(f"global_pool must be 'seq', 'token', 'avg' or '', got {global_pool!r}")

    def _init_classifier(self, head: nn.Linear) -> None:
        _init_weights(head)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def _tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C, H, W) -> tokens with positions (B, N, d), and their grid."""
        check_image_input(x, self.in_chans)
        x = self.patch_embed(x)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)  # (B, N, d)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + self._positions(grid)
        return self.pos_drop(x), grid

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        assert self.pos_embed is not None
        if grid == self.grid_size:
            return self.pos_embed
        if self.positional_embedding == "sine":
            return sine_table(self.num_prefix_tokens + grid[0] * grid[1], self.embed_dim).to(self.pos_embed)
        return resize_positions(self.pos_embed, grid, self.num_prefix_tokens, self.grid_size)

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return block(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> normalised tokens (B, prefix + N, d)."""
        x, _ = self._tokens(x)
        for block in self.blocks:
            x = self._run(block, x)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of chosen encoder layers, as maps (B, d, h, w) or tokens (B, N, d) (`output_fmt` NCHW or NLC)."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self._tokens(x)
        found = []
        for i, block in enumerate(self.blocks):
            if stop_early and i > last:
                break
            x = self._run(block, x)
            if i in take:
                y = (self.norm(x) if norm else x)[:, self.num_prefix_tokens :]
                found.append(y.transpose(1, 2).reshape(y.shape[0], -1, *grid) if output_fmt == "NCHW" else y)
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers after the last one in `indices` (used by timm's `features_only`)."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take


class TextCCT(nn.Module):
    """CCT for sentences: word indices (B, T) and a mask (B, T; True = word) -> (B, num_classes).

    Words are embedded (`word_dim` wide, frozen when `word_vectors` are given), convolved over windows of `kernel_size`
    words, pooled in pairs, encoded with attention confined to the mask, and pooled by attention over all positions.

    >>> TextCCT(vocab_size=50, seq_len=10, depth=1)(torch.ones(2, 10, dtype=torch.long)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        *,
        vocab_size: int = 20000,
        seq_len: int = 64,
        word_dim: int = 300,
        word_vectors: Tensor | None = None,
        embed_dim: int = 128,
        depth: int = 2,
        num_heads: int = 2,
        mlp_ratio: float = 1.0,
        kernel_size: int = 4,
        positional_embedding: str = "sine",
        second_norm: str = "stream",
        num_classes: int = 4,
        proj_drop_rate: float = 0.1,
        attn_drop_rate: float = 0.1,
        drop_path_rate: float = 0.1,
    ):
        super().__init__()
        check_sizes(vocab_size=vocab_size, seq_len=seq_len, kernel_size=kernel_size, num_classes=num_classes)
        if positional_embedding not in POSITIONS:
            raise ValueError(f"positional_embedding must be one of {POSITIONS}, got {positional_embedding!r}")
        if word_vectors is not None and tuple(word_vectors.shape) != (vocab_size, word_dim):
            raise ValueError(f"word_vectors must be {(vocab_size, word_dim)}, got {tuple(word_vectors.shape)}")
        self.words = nn.Embedding(vocab_size, word_dim, _freeze=word_vectors is not None, _weight=word_vectors)
        self.stride, self.padding = max(1, kernel_size // 2 - 1), max(1, kernel_size // 2)
        self.conv = nn.Conv2d(1, embed_dim, (kernel_size, word_dim), (self.stride, 1), (self.padding, 0), bias=False)
        self.pool = nn.MaxPool2d((2, 1), (2, 1), (1, 0))
        tokens = self.pool(torch.zeros(1, 1, (seq_len + 2 * self.padding - kernel_size) // self.stride + 1, 1)).shape[2]
        self.num_tokens: int = tokens
        self.pos_embed: Tensor | None = None
        if positional_embedding == "learnable":
            self.pos_embed = nn.Parameter(trunc_normal_(torch.zeros(1, tokens, embed_dim), std=0.2))
        elif positional_embedding == "sine":
            del self.pos_embed
            self.register_buffer("pos_embed", sine_table(tokens, embed_dim), persistent=False)
        self.pos_drop = nn.Dropout(proj_drop_rate)
        self.blocks = _encoder(
            embed_dim, depth, num_heads, mlp_ratio, attn_drop_rate, proj_drop_rate, drop_path_rate, second_norm
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.seq_pool = SeqPool(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        _init_weights(self)

    def forward(self, words: Tensor, mask: Tensor | None = None) -> Tensor:
        if words.ndim != 2 or words.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"words must be indices (B, T), got {words.dtype} of shape {tuple(words.shape)}")
        x = self.words(words)[:, None]  # (B, 1, T, word_dim)
        token_mask = None
        if mask is not None:
            if mask.shape != words.shape:
                raise ValueError(f"mask must have the shape of words {tuple(words.shape)}, got {tuple(mask.shape)}")
            x = x * mask[:, None, :, None]
            token_mask = self.token_mask(mask)
        x = self.pool(F.relu(self.conv(x)))[..., 0].transpose(1, 2)  # (B, N, d)
        if token_mask is not None:
            x = x * token_mask[..., None]
        if self.pos_embed is not None:
            if x.shape[1] != self.pos_embed.shape[1]:
                raise ValueError(
                    f"sentences give {x.shape[1]} tokens, the model was built for {self.pos_embed.shape[1]}"
                )
            x = x + self.pos_embed
        x = self.pos_drop(x)
        for block in self.blocks:
            x = block(x, token_mask)
        return self.head(self.seq_pool(self.norm(x)))

    def token_mask(self, mask: Tensor) -> Tensor:
        """Which tokens saw at least one word: (B, T) bool -> (B, N) bool."""
        seen = mask[:, None, :, None].to(self.conv.weight.dtype)
        ones = seen.new_ones(1, 1, self.conv.kernel_size[0], 1)
        seen = F.conv2d(seen, ones, stride=(self.stride, 1), padding=(self.padding, 0))
        return self.pool(seen)[:, 0, :, 0] > 0


def _encoder(
    width: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    attn_drop: float,
    proj_drop: float,
    drop_path: float,
    second_norm: str,
) -> nn.ModuleList:
    return nn.ModuleList(
        EncoderLayer(
            width,
            num_heads,
            int(width * mlp_ratio),
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            drop_path=drop_path * i / max(1, depth - 1),
            second_norm=second_norm,
        )
        for i in range(depth)
    )


def _init_weights(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)


def _grid(tokenizer: nn.Module, in_chans: int, size: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of the token grid, by running a meta copy of nothing."""
    from trimtab.core.edit import meta_copy

    with torch.no_grad():
        try:
            out = meta_copy(tokenizer)(torch.zeros(1, in_chans, *size, device="meta"))
        except RuntimeError as e:
            raise ValueError(f"img_size {tuple(size)} is too small for this tokenizer: {e}") from e
    return out.shape[2], out.shape[3]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Convert released checkpoints to our names, and position tables to the model's image size and kind."""
    state = state_dict.get("state_dict", state_dict)
    state = {_our_name(k.removeprefix("module.")): v for k, v in state.items()}
    if not isinstance(model, CompactTransformer):
        return state
    if model.positional_embedding != "learnable":
        state.pop("pos_embed", None)  # a sine table comes from its formula, never from a file
    elif "pos_embed" in state:
        state["pos_embed"] = resize_positions(state["pos_embed"], model.grid_size, model.num_prefix_tokens)
    return state


_RENAMES = (
    ("tokenizer.conv_layers.", "patch_embed.blocks."),
    ("classifier.positional_emb", "pos_embed"),
    ("classifier.class_emb", "cls_token"),
    ("classifier.attention_pool.", "global_pool.score."),
    ("classifier.fc.", "head."),
    ("classifier.", ""),
    (".norm1.", ".norm2."),  # before the next line: the released `norm1` is the second norm
    (".pre_norm.", ".norm1."),
    (".self_attn.", ".attn."),
    (".linear1.", ".mlp.0."),
    (".linear2.", ".mlp.3."),
)


def _our_name(key: str) -> str:
    if not key.startswith(("tokenizer.", "classifier.")):
        return key
    for old, new in _RENAMES:
        key = key.replace(old, new)
    return key


def _cfg(size: int = 32, num_classes: int = 10, first_conv: str = "patch_embed.blocks.0.0") -> dict[str, Any]:
    cifar = size == 32
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 1.0 if cifar else 0.9,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465) if cifar else (0.485, 0.456, 0.406),
        "std": (0.2470, 0.2435, 0.2616) if cifar else (0.229, 0.224, 0.225),
        "first_conv": first_conv,
        "classifier": "head",
        "fixed_input_size": True,
    }


_ENCODERS = {
    2: {"depth": 2, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128},
    4: {"depth": 4, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128},
    6: {"depth": 6, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
    7: {"depth": 7, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
    14: {"depth": 14, "num_heads": 6, "mlp_ratio": 3.0, "embed_dim": 384},
}
_PATCH_CFG = _cfg(first_conv="patch_embed.proj")
default_cfgs = generate_default_cfgs(
    {
        **{f"vit_lite_{n}_4_32": _PATCH_CFG for n in (2, 4, 6, 7)},
        **{f"cvt_{n}_4_32": _PATCH_CFG for n in (2, 4, 6, 7)},
        **{f"cct_{n}_32": _cfg() for n in ("2_3x2", "4_3x2", "6_3x1", "6_3x2", "7_3x1", "7_3x2")},
        "cct_7_3x1_32_sine": _cfg(),
        "cct_7_7x2_224": _cfg(224, 102),
        "cct_7_7x2_224_sine": _cfg(224, 102),
        "cct_14_7x2_224": _cfg(224, 1000),
        "cct_14_7x2_384": _cfg(384, 1000),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], layers: int, **defaults: Any) -> CompactTransformer:
    kwargs = {**_ENCODERS[layers], **defaults, **kwargs}
    return build_model_with_cfg(
        CompactTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": min(3, kwargs["depth"]), "feature_cls": "getter"},
        **kwargs,
    )


def _vit_lite(layers: int, pretrained: bool, kwargs: dict[str, Any]) -> CompactTransformer:
    return _create(f"vit_lite_{layers}_4_32", pretrained, kwargs, layers, patch_size=4, global_pool="token")


def _cvt(layers: int, pretrained: bool, kwargs: dict[str, Any]) -> CompactTransformer:
    return _create(f"cvt_{layers}_4_32", pretrained, kwargs, layers, patch_size=4)


@register_model
def vit_lite_2_4_32(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """ViT-Lite-2/4: 214,666 parameters, 15.34 M MACs."""
    return _vit_lite(2, pretrained, kwargs)


@register_model
def vit_lite_4_4_32(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """ViT-Lite-4/4: 413,066 parameters, 30.28 M MACs."""
    return _vit_lite(4, pretrained, kwargs)


@register_model
def vit_lite_6_4_32(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """ViT-Lite-6/4: 3,190,538 parameters, 218.24 M MACs."""
    return _vit_lite(6, pretrained, kwargs)


@register_model
def vit_lite_7_4_32(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """ViT-Lite-7/4: 3,716,874 parameters, 254.48 M MACs."""
    return _vit_lite(7, pretrained, kwargs)


@register_model
def cvt_2_4_32(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """CVT-2/4: 214,539 parameters, 15.09 M MACs."""
    return _cvt(2, pretrained, kwargs)


@register_model
def cvt_4_4_32(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """CVT-4/4: 412,939 parameters, 29.77 M MACs."""
    return _cvt(4, pretrained, kwargs)


@register_model
def cvt_6_4_32(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """CVT-6/4: 3,190,283 parameters, 214.73 M MACs."""
    return _cvt(6, pretrained, kwargs)


@register_model
def cvt_7_4_32(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """CVT-7/4: 3,716,619 parameters, 250.38 M MACs."""
    return _cvt(7, pretrained, kwargs)


@register_model
def cct_2_3x2_32(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """CCT-2/3x2: 283,723 parameters, 35.34 M MACs."""
    return _create("cct_2_3x2_32", pretrained, kwargs, 2, kernel_size=3, n_conv_layers=2)


@register_model
def cct_4_3x2_32(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """CCT-4/3x2: 482,123 parameters, 50.02 M MACs."""
    return _create("cct_4_3x2_32", pretrained, kwargs, 4, kernel_size=3, n_conv_layers=2)


@register_model
def cct_6_3x1_32(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """CCT-6/3x1: 3,233,803 parameters, 1.014 G MACs."""
    return _create("cct_6_3x1_32", pretrained, kwargs, 6, kernel_size=3, n_conv_layers=1)


@register_model
def cct_6_3x2_32(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """CCT-6/3x2: 3,326,923 parameters, 253.46 M MACs."""
    return _create("cct_6_3x2_32", pretrained, kwargs, 6, kernel_size=3, n_conv_layers=2)


@register_model
def cct_7_3x1_32(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """CCT-7/3x1: 3,760,139 parameters, 1.182 G MACs."""
    return _create("cct_7_3x1_32", pretrained, kwargs, 7, kernel_size=3, n_conv_layers=1)


@register_model
def cct_7_3x1_32_sine(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """CCT-7/3x1 with a fixed sine position table."""
    return _create(
        "cct_7_3x1_32_sine", pretrained, kwargs, 7, kernel_size=3, n_conv_layers=1, positional_embedding="sine"
    )


@register_model
def cct_7_3x2_32(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """CCT-7/3x2: 3,853,259 parameters, 289.11 M MACs."""
    return _create("cct_7_3x2_32", pretrained, kwargs, 7, kernel_size=3, n_conv_layers=2)


@register_model
def cct_7_7x2_224(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """CCT-7/7x2 at 224: 4,573,735 parameters with 102 classes, 1.605 G MACs."""
    return _create("cct_7_7x2_224", pretrained, kwargs, 7, kernel_size=7, n_conv_layers=2)


@register_model
def cct_7_7x2_224_sine(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """CCT-7/7x2 at 224 with a fixed sine position table."""
    return _create(
        "cct_7_7x2_224_sine", pretrained, kwargs, 7, kernel_size=7, n_conv_layers=2, positional_embedding="sine"
    )


@register_model
def cct_14_7x2_224(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """CCT-14/7x2 at 224: 22,367,273 parameters, 5.522 G MACs (5.109 G without the attention products)."""
    return _create("cct_14_7x2_224", pretrained, kwargs, 14, kernel_size=7, n_conv_layers=2)


@register_model
def cct_14_7x2_384(pretrained: bool = False, **kwargs: Any) -> CompactTransformer:
    """CCT-14/7x2 at 384: 22,513,193 parameters, 18.580 G MACs (15.01 G without the attention products)."""
    return _create("cct_14_7x2_384", pretrained, kwargs, 14, kernel_size=7, n_conv_layers=2)


def text_cct_2(*, kernel_size: int = 4, **kwargs: Any) -> TextCCT:
    """TextCCT-2: 0.24 to 0.35 M parameters besides the word embedding."""
    return TextCCT(kernel_size=kernel_size, **{**_ENCODERS[2], **kwargs})


def text_cct_4(*, kernel_size: int = 4, **kwargs: Any) -> TextCCT:
    """TextCCT-4: 0.44 to 0.55 M parameters besides the word embedding."""
    return TextCCT(kernel_size=kernel_size, **{**_ENCODERS[4], **kwargs})


def text_cct_6(*, kernel_size: int = 4, **kwargs: Any) -> TextCCT:
    """TextCCT-6: 3.2 to 3.5 M parameters besides the word embedding."""
    return TextCCT(kernel_size=kernel_size, **{**_ENCODERS[6], **kwargs})
