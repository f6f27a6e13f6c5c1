"""Compact transformers: every line of the fact sheet's exact checks, its equations and its traps."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from trimtab.core.cost import measure
from trimtab.models import create_model
from trimtab.models.classify.cct import (
    CompactTransformer,
    SeqPool,
    TextCCT,
    checkpoint_filter_fn,
    resize_positions,
    sine_table,
    text_cct_2,
    text_cct_4,
    text_cct_6,
)

# name, parameters, MACs with the attention products in M, tokens
TABLE = [
    ("vit_lite_2_4_32", 214_666, 15.34, 64),
    ("vit_lite_4_4_32", 413_066, 30.28, 64),
    ("vit_lite_6_4_32", 3_190_538, 218.24, 64),
    ("vit_lite_7_4_32", 3_716_874, 254.48, 64),
    ("cvt_2_4_32", 214_539, 15.09, 64),
    ("cvt_4_4_32", 412_939, 29.77, 64),
    ("cvt_6_4_32", 3_190_283, 214.73, 64),
    ("cvt_7_4_32", 3_716_619, 250.38, 64),
    ("cct_2_3x2_32", 283_723, 35.34, 64),
    ("cct_4_3x2_32", 482_123, 50.02, 64),
    ("cct_6_3x1_32", 3_233_803, 1013.84, 256),
    ("cct_6_3x2_32", 3_326_923, 253.46, 64),
    ("cct_7_3x1_32", 3_760_139, 1181.62, 256),
    ("cct_7_3x2_32", 3_853_259, 289.11, 64),
    ("cct_7_7x2_224", 4_573_735, 1604.55, 196),
    ("cct_14_7x2_224", 22_367_273, 5521.90, 196),
    ("cct_14_7x2_384", 22_513_193, 18580.28, 576),
]


def on_meta(name: str, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize(("name", "params", "macs", "tokens"), TABLE, ids=[t[0] for t in TABLE])
def test_counts_equal_the_fact_sheet(name, params, macs, tokens):
    model = on_meta(name)
    cost = measure(model, model.pretrained_cfg["input_size"], what=("params", "macs"))
    assert cost.params == params
    assert cost.macs / 1e6 == pytest.approx(macs, abs=0.0051)
    assert math.prod(model.grid_size) == tokens


def test_cct_14_at_384_with_102_classes():
    assert sum(p.numel() for p in on_meta("cct_14_7x2_384", num_classes=102).parameters()) == 22_167_463


@pytest.mark.parametrize(
    ("kernel", "layers", "sizes"),
    [
        (3, 1, {28: 196, 32: 256, 64: 1024}),
        (3, 2, {28: 49, 32: 64, 64: 256, 96: 576}),
        (7, 2, {32: 4, 64: 16, 96: 36, 224: 196, 384: 576}),
    ],
)
def test_token_counts(kernel, layers, sizes):
    for size, tokens in sizes.items():
        with torch.device("meta"):
            net = CompactTransformer(
                kernel_size=kernel, n_conv_layers=layers, img_size=size, depth=1, embed_dim=8, num_heads=1
            )
        assert math.prod(net.grid_size) == tokens


def test_macs_of_cct_7_3x1_are_the_derived_sum():
    conv, linear, attention = 7_077_888, 939_592_192, 234_946_560
    assert (
        measure(on_meta("cct_7_3x1_32"), (3, 32, 32), what=("macs",)).macs == conv + linear + attention == 1_181_616_640
    )


@pytest.mark.parametrize(("size", "reported"), [(224, 5.11e9), (384, 15.02e9)])
def test_reported_imagenet_macs_leave_the_attention_products_out(size, reported):
    model = on_meta(f"cct_14_7x2_{size}")
    tokens = math.prod(model.grid_size)
    macs = measure(model, (3, size, size), what=("macs",)).macs
    assert macs - 14 * 2 * tokens**2 * 384 == pytest.approx(reported, rel=1e-3)


def test_seqpool_without_weights_is_the_mean_and_ignores_its_bias():
    pool, x = SeqPool(6), torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    before = pool(x)
    torch.nn.init.constant_(pool.score.bias, 3.0)
    torch.testing.assert_close(pool(x), before)
    torch.nn.init.zeros_(pool.score.weight)
    torch.testing.assert_close(pool(x), x.mean(1))


def test_without_positions_the_encoder_is_permutation_invariant_but_the_model_is_not():
    torch.manual_seed(0)
    net = CompactTransformer(depth=2, embed_dim=32, num_heads=2, positional_embedding="none", n_conv_layers=2).eval()
    order = torch.randperm(64)
    x = torch.randn(2, 3, 32, 32)

    def logits(permute: bool):
        tokens, _ = net._tokens(x)
        tokens = tokens[:, order] if permute else tokens
        for block in net.blocks:
            tokens = block(tokens)
        return net.forward_head(net.norm(tokens))

    torch.testing.assert_close(logits(True), logits(False), atol=1e-5, rtol=1e-5)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(2, 3, 64, 4, 4)[:, :, order]
    shuffled = patches.reshape(2, 3, 8, 8, 4, 4).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 32)
    assert (net(shuffled) - net(x)).abs().max() > 1e-3  # the convolutions see other neighbours


def test_drop_path_grows_linearly_and_is_absent_in_the_first_block():
    blocks = create_model("cct_7_3x1_32").blocks
    assert isinstance(blocks[0].drop_path, torch.nn.Identity)
    assert [b.drop_path.drop_prob for b in blocks[1:]] == pytest.approx([i / 60 for i in range(1, 7)])


def test_second_norm_is_on_the_residual_stream_and_can_be_switched():
    torch.manual_seed(0)
    net = CompactTransformer(depth=1, embed_dim=16, num_heads=2, img_size=8, kernel_size=3).eval()
    block, x = net.blocks[0], torch.randn(2, 7, 16)
    with torch.no_grad():
        block.norm2.weight.uniform_(0.5, 2)
        a = x + block.attn(block.norm1(x))
        stream = block.norm2(a)
        torch.testing.assert_close(block(x), stream + block.mlp(stream))
        block.norm_stream = False
        torch.testing.assert_close(block(x), a + block.mlp(block.norm2(a)))
    branch = CompactTransformer(depth=1, embed_dim=16, num_heads=2, img_size=8, second_norm="branch")
    assert not branch.blocks[0].norm_stream
    assert sum(p.numel() for p in branch.parameters()) == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", ["cct_2_3x2_32", "cvt_2_4_32", "vit_lite_2_4_32"])
def test_sine_positions_are_a_fixed_formula_in_every_variant(name):
    net = create_model(name, positional_embedding="sine")
    tokens = 65 if "vit" in name else 64
    assert "pos_embed" not in dict(net.named_parameters()) and "pos_embed" not in net.state_dict()
    assert net.pos_embed.shape == (1, tokens, 128)
    for n, i in [(0, 0), (0, 1), (5, 2), (63, 77)]:
        angle = n / 10000 ** (2 * (i // 2) / 128)
        assert net.pos_embed[0, n, i].item() == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-5)
    learnable = create_model(name)
    assert sum(p.numel() for p in learnable.parameters()) - sum(p.numel() for p in net.parameters()) == tokens * 128


def test_position_none_runs_and_unknown_positions_raise():
    assert create_model("cct_2_3x2_32", positional_embedding="none")(torch.zeros(1, 3, 20, 20)).shape == (1, 10)
    with pytest.raises(ValueError, match="positional_embedding must be one of"):
        create_model("cct_2_3x2_32", positional_embedding="sin")


def test_initialisation_follows_the_release():
    torch.manual_seed(0)
    net = create_model("cct_7_3x1_32")
    assert net.pos_embed.std().item() == pytest.approx(0.2, rel=0.05)
    assert net.blocks[3].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert net.blocks[0].attn.qkv.bias is None and net.blocks[0].attn.proj.bias.abs().sum() == 0
    assert net.patch_embed.blocks[0][0].bias is None
    assert create_model("cvt_2_4_32").patch_embed.proj.bias is not None
    assert create_model("vit_lite_2_4_32").cls_token.abs().sum() == 0
    assert create_model("cct_7_7x2_224").patch_embed.blocks[0][0].out_channels == 64  # always 64, whatever the width


def test_position_table_resize_to_the_same_size_is_the_identity():
    table = torch.randn(1, 1 + 196, 8)
    assert resize_positions(table, (14, 14), prefix=1) is table


def test_position_table_resizes_bilinearly_from_224_to_384():
    table = torch.randn(1, 196, 8)
    want = F.interpolate(
        table.reshape(1, 14, 14, 8).permute(0, 3, 1, 2), (24, 24), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(resize_positions(table, (24, 24)), want.flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="square"):
        resize_positions(table[:, :195], (24, 24))


def test_weights_load_at_another_image_size_and_give_what_interpolation_on_the_fly_gives(tmp_path):
    small = create_model("cct_2_3x2_32", seed=0).eval()
    save_file(small.state_dict(), tmp_path / "w.safetensors")
    large = create_model("cct_2_3x2_32", img_size=64, weights=tmp_path / "w.safetensors").eval()
    assert large.pos_embed.shape[1] == 256
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(large(x), small(x))


def test_released_layout_loads_and_computes_the_released_equations(tmp_path):
    """A checkpoint in the released layout, and the paper's equations written out, agree with our model."""
    d, layers, heads = 32, 2, 2
    g = torch.Generator().manual_seed(0)

    def r(*shape):
        return torch.randn(*shape, generator=g) * 0.2

    w = {"tokenizer.conv_layers.0.0.weight": r(d, 3, 3, 3), "classifier.positional_emb": r(1, 64, d)}
    w |= {"classifier.attention_pool.weight": r(1, d), "classifier.attention_pool.bias": r(1)}
    w |= {"classifier.norm.weight": r(d) + 1, "classifier.norm.bias": r(d)}
    w |= {"classifier.fc.weight": r(5, d), "classifier.fc.bias": r(5)}
    for i in range(layers):
        b = f"classifier.blocks.{i}."
        w |= {f"{b}{n}.weight": r(d) + 1 for n in ("pre_norm", "norm1")} | {
            f"{b}{n}.bias": r(d) for n in ("pre_norm", "norm1")
        }
        w |= {
            f"{b}self_attn.qkv.weight": r(3 * d, d),
            f"{b}self_attn.proj.weight": r(d, d),
            f"{b}self_attn.proj.bias": r(d),
        }
        w |= {f"{b}linear{j}.weight": r(d, d) for j in (1, 2)} | {f"{b}linear{j}.bias": r(d) for j in (1, 2)}
    net = CompactTransformer(
        embed_dim=d, depth=layers, num_heads=heads, mlp_ratio=1, img_size=16, num_classes=5, n_conv_layers=1
    ).eval()
    net.load_state_dict(checkpoint_filter_fn({f"module.{k}": v for k, v in w.items()}, net))

    x = torch.randn(2, 3, 16, 16, generator=g)
    t = F.max_pool2d(F.conv2d(x, w["tokenizer.conv_layers.0.0.weight"], padding=1).relu(), 3, 2, 1)
    t = t.flatten(2).mT + w["classifier.positional_emb"]
    for i in range(layers):
        b = {k.removeprefix(f"classifier.blocks.{i}."): v for k, v in w.items()}
        y = F.layer_norm(t, (d,), b["pre_norm.weight"], b["pre_norm.bias"])
        q, k, v = (y @ b["self_attn.qkv.weight"].T).chunk(3, dim=-1)
        out = []
        for h in range(heads):
            s = slice(h * d // heads, (h + 1) * d // heads)
            out.append(((q[..., s] @ k[..., s].mT) * (d / heads) ** -0.5).softmax(-1) @ v[..., s])
        t = t + torch.cat(out, -1) @ b["self_attn.proj.weight"].T + b["self_attn.proj.bias"]
        t = F.layer_norm(t, (d,), b["norm1.weight"], b["norm1.bias"])
        hidden = F.gelu(t @ b["linear1.weight"].T + b["linear1.bias"])
        t = t + hidden @ b["linear2.weight"].T + b["linear2.bias"]
    t = F.layer_norm(t, (d,), w["classifier.norm.weight"], w["classifier.norm.bias"])
    a = (t @ w["classifier.attention_pool.weight"].T + w["classifier.attention_pool.bias"]).softmax(1)
    want = (a * t).sum(1) @ w["classifier.fc.weight"].T + w["classifier.fc.bias"]
    torch.testing.assert_close(net(x), want, atol=1e-4, rtol=1e-4)


def test_a_sine_table_is_not_overwritten_by_a_checkpoint(tmp_path):
    state = {**create_model("cct_2_3x2_32").state_dict(), "pos_embed": torch.full((1, 64, 128), 7.0)}
    save_file(state, tmp_path / "w.safetensors")
    net = create_model("cct_2_3x2_32", positional_embedding="sine", weights=tmp_path / "w.safetensors")
    torch.testing.assert_close(net.pos_embed, sine_table(64, 128))


def test_mean_pooling_and_token_pooling():
    net = create_model("cct_2_3x2_32", global_pool="avg").eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(
        net.forward_head(net.forward_features(x), pre_logits=True), net.forward_features(x).mean(1)
    )
    with pytest.raises(ValueError, match="class token"):
        net.reset_classifier(3, "token")


def test_features_only_gives_maps():
    maps = timm.create_model("cct_4_3x2_32", features_only=True)(torch.zeros(1, 3, 32, 32))
    assert [m.shape for m in maps] == [(1, 128, 8, 8)] * 3


@pytest.mark.parametrize(
    ("build", "millions"),
    [(text_cct_2, (0.238, 0.276, 0.353)), (text_cct_4, (0.436, 0.475, 0.551)), (text_cct_6, (3.237, 3.313, 3.467))],
)
def test_text_counts_without_the_word_embedding(build, millions):
    for kernel, want in zip((1, 2, 4), millions, strict=True):
        with torch.device("meta"):
            net = build(kernel_size=kernel, vocab_size=10, positional_embedding="none")
        n = sum(p.numel() for p in net.parameters()) - net.words.weight.numel()
        assert n / 1e6 == pytest.approx(want, abs=0.00051)


@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_text_model_takes_exactly_seq_len_words(kernel):
    net = TextCCT(vocab_size=30, seq_len=64, kernel_size=kernel, depth=1, positional_embedding="learnable").eval()
    words = torch.randint(0, 30, (2, 64), generator=torch.Generator().manual_seed(0))
    assert net(words).shape == (2, 4)
    with pytest.raises(ValueError, match="tokens"):
        net(words[:, :50])


def test_text_padding_does_not_change_what_words_do():
    torch.manual_seed(0)
    net = TextCCT(vocab_size=30, seq_len=16, kernel_size=2, depth=2).eval()
    words = torch.randint(0, 30, (1, 16))
    mask = torch.arange(16)[None] < 9
    other = torch.where(mask, words, (words + 1) % 30)
    torch.testing.assert_close(net(words, mask), net(other, mask))
    assert not torch.allclose(net(words), net(other))
    assert torch.isfinite(net(words, torch.zeros_like(mask))).all()  # nothing but padding: uniform attention


def test_text_mask_marks_tokens_that_saw_a_word():
    net = TextCCT(vocab_size=30, seq_len=8, kernel_size=1, depth=1)  # padding 1: windows see words -1..8
    seen = net.token_mask(torch.tensor([[True, True, False, False, False, False, False, False]]))
    # convolved: padding, word, word, six times padding, padding; pooled in pairs after one more padding
    assert seen.tolist() == [[False, True, False, False, False, False]]


def test_wrong_arguments_say_what_was_expected():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads"):
        CompactTransformer(embed_dim=30, num_heads=4)
    with pytest.raises(ValueError, match="second_norm"):
        CompactTransformer(second_norm="pre")
    with pytest.raises(ValueError, match="multiple of patch_size"):
        CompactTransformer(patch_size=5)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got shape \(1, 1, 32, 32\)"):
        create_model("cct_2_3x2_32")(torch.zeros(1, 1, 32, 32))
