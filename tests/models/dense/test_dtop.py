"""DToP: exact counts at the paper's scale, the loop and its rules, ragged batches, real savings, and ways out."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import trimtab as tt
from trimtab.core.artifact import InputSpec
from trimtab.core.edit import SetAttr
from trimtab.models.dense.dtop import ATMHead, DToP

TINY = {"depth": 4, "embed_dim": 32, "num_heads": 2, "patch_size": 4}
SURE = {"linear": 0.6, "atm": 0.3}  # thresholds that some tokens of `tiny` pass


def tiny(*, sure: float = 8.0, seed: int = 0, **arguments) -> DToP:
    """A small network whose linear heads are `sure`: random weights, scaled so that scores spread over 0..1."""
    arguments = {"head": "linear", "num_classes": 4, "exits": (1, 2), **arguments}
    net = tt.create_model("dtop_nano", img_size=32, seed=seed, **{"backbone_kwargs": TINY, **arguments})
    for head in net.heads:
        last = head.layers[-1].across.q if isinstance(head, ATMHead) else head.fc
        last.weight.data *= sure
    return net.eval()


def images(n: int = 3, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def pruned(**arguments) -> tuple[DToP, torch.Tensor]:
    """A network and images of which it prunes some tokens, different numbers of them."""
    net, x = tiny(**{"confidence": 0.6, **arguments}), images()
    with torch.no_grad():
        net(x)
    tokens = net.last_tokens
    assert tokens[:, 0].eq(64).all() and tokens[:, 2].lt(60).all() and len(set(tokens[:, 1].tolist())) > 1
    return net, x


# ---------------------------------------------------------------------------------------------------- the paper's scale

NETS = {  # name, arguments, GMACs of encoder, head, encoder and one head, with three heads, parameters of a head
    "B": ("dtop_segvit_base", {}, 106.904, 2.5428, 109.447, 114.53, 7_454_210),
    "L": ("dtop_segvit_large", {}, 610.271, 5.8135, 616.085, 627.71, 13_215_746),
    "L, Pascal": ("dtop_segvit_large", {"img_size": 480, "num_classes": 59, "head_heads": 16}, 312.312, 2.7109,
                  315.023, 320.44, 13_169_154),
    "L, COCO": ("dtop_segvit_large", {"img_size": 512, "num_classes": 171, "head_heads": 16}, 361.583, 4.6581, 366.241,
                375.56, 13_226_498),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_macs_and_parameters_at_the_paper_s_scale(name):
    model, arguments, encoder, head, one, three, parameters = NETS[name]
    with torch.device("meta"):
        net = timm.create_model(model, **arguments)
    side = arguments.get("img_size") or timm.get_pretrained_cfg(model).input_size[1]
    n = (side // 16) ** 2
    assert [sum(p.numel() for p in h.parameters()) for h in net.heads] == [parameters] * 3
    assert net.heads[0].macs(n) / 1e9 == pytest.approx(head, abs=5e-5)
    net.eval()
    if name == "B":
        assert tt.measure(net, (3, side, side), what="macs").macs == net.macs().item()
    assert net.macs().item() / 1e9 == pytest.approx(three, abs=5e-3)
    net.confidence = 1
    if name == "B":
        assert tt.measure(net, (3, side, side), what="macs").macs == net.macs().item()
    assert net.macs().item() / 1e9 == pytest.approx(one, abs=5e-4)
    assert net.macs().item() / 1e9 - net.heads[0].macs(n) / 1e9 == pytest.approx(encoder, abs=5e-4)


@pytest.mark.parametrize(
    ("model", "shares", "gmacs"),
    [
        ("dtop_segvit_base", (0.7, 0.5), 87.9),
        ("dtop_segvit_base", (0.6, 0.5), 85.9),
        ("dtop_segvit_large", (0.5, 0.4), 379),
        ("dtop_segvit_large", (0.7, 0.5), 443),
    ],
)
def test_macs_of_what_is_left_give_the_published_savings(model, shares, gmacs):
    with torch.device("meta"):
        net = timm.create_model(model).eval()
    n = 1024 if "base" in model else 1600
    tokens = torch.tensor([[n, *(round(n * share) for share in shares)]], device="cpu")
    assert net.macs(tokens).item() / 1e9 == pytest.approx(gmacs, rel=2e-3)


# ------------------------------------------------------------------------------------------------------------- the loop


def test_a_threshold_of_one_is_the_network_without_exits():
    net, x = tiny(confidence=1), images()
    with torch.no_grad():
        got = net(x)
        want = net.forward_head(net.forward_features(x))
    assert torch.equal(got, want) and net.last_tokens.eq(64).all()


@pytest.mark.parametrize("head", ["linear", "atm"])
@pytest.mark.parametrize("keep", [0, 5])
def test_a_ragged_batch_gives_what_its_images_give_one_by_one(head, keep):
    net, x = tiny(confidence=SURE[head], head=head, keep=keep), images()
    with torch.no_grad():
        together, tokens = net(x), net.last_tokens
        assert tokens[:, 2].lt(64).all() and tokens.unique(dim=0).shape[0] > 1
        for i in range(len(x)):
            torch.testing.assert_close(net(x[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)
            assert torch.equal(net.last_tokens[0], tokens[i])


@pytest.mark.parametrize("head", ["linear", "atm"])
def test_masking_finished_tokens_computes_what_taking_them_out_does(head, monkeypatch):
    net, x = tiny(confidence=SURE[head], head=head), images()
    with torch.no_grad():
        want = net(x)
        assert net.last_tokens[:, 2].lt(64).all()
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)


def test_the_macs_that_run_are_those_of_the_closed_form():
    net, x = pruned()
    for i in range(len(x)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x[i : i + 1])
        assert counter.get_total_flops() == 2 * net.macs(net.last_tokens).item()
    assert net.macs(net.last_tokens).item() < net.macs().item()


@torch.no_grad()
def test_pruned_images_take_less_work():
    """Of 256 tokens hardly any are left after the second of twelve layers: less than half of what runs."""
    kwargs = {"depth": 12, "embed_dim": 96, "num_heads": 3, "patch_size": 4}
    net = tt.create_model("dtop_nano", backbone_kwargs=kwargs, exits=(2, 4), head="linear", seed=0).eval()
    x = images(1, 64)
    ran = {}
    for confidence in (1, 0):
        net.confidence = confidence
        with FlopCounterMode(display=False) as counter:
            net(x)
        ran[confidence] = counter.get_total_flops()
    assert net.last_tokens[0, 1] <= 30
    assert ran[0] < 0.5 * ran[1]


@torch.no_grad()
def test_finished_tokens_keep_their_column_to_the_end():
    net, x = tiny(confidence=0.6).train(), images()
    first, second, third = (stage.canvas.flatten(2) for stage in net(x))
    tokens = net.last_tokens
    for i in range(len(x)):
        kept = [torch.eq(a[i], b[i]).all(0).sum() for a, b in ((first, second), (second, third), (first, third))]
        assert kept[0] == 64 - tokens[i, 1] and kept[1] == 64 - tokens[i, 2] and kept[2] == kept[0]


@torch.no_grad()
def test_with_a_threshold_of_zero_only_the_best_of_every_class_go_on():
    for keep in (0, 1, 5):
        net = tiny(confidence=0, keep=keep).train()
        first = net(images())[0].canvas.flatten(2)
        classes = first.argmax(1)
        want = [sum(min(keep, int((row == c).sum())) for c in row.unique()) for row in classes]
        assert net.last_tokens[:, 1].tolist() == want


def test_the_most_confident_of_the_newly_easy_tokens_of_a_class_stay():
    net = tiny(confidence=0.5, keep=1)
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.5, 0.95, 0.2], [0.0, 0.1, 0.6, 0.5, 0.0, 0.7]])[None]
    scores = F.pad(scores, (0, 0, 0, 2))  # four classes
    live = torch.tensor([[True, True, True, True, False, True]])
    # Of class 0, the fifth would be the best but was finished before; exactly 0.5 is not above the threshold.
    assert net._finished(scores, live).tolist() == [[False, True, True, False, False, False]]
    net.keep = 0
    assert net._finished(scores, live).tolist() == [[True, True, True, False, False, True]]


def test_of_equally_sure_tokens_the_first_go_on():
    net = tiny(confidence=0.5, keep=2)
    scores = torch.zeros(1, 4, 50)
    scores[:, 1] = 1.0
    finished = net._finished(scores, torch.ones(1, 50, dtype=torch.bool))
    assert finished.tolist() == [[False] * 2 + [True] * 48]


@torch.no_grad()
def test_all_tokens_may_be_finished():
    net, x = tiny(confidence=0, keep=0), images()
    got = net(x)
    assert net.last_tokens[:, 1:].eq(0).all()
    first = net.train()(x)[0]
    torch.testing.assert_close(got, F.interpolate(first.canvas, (32, 32), mode="bilinear", align_corners=False))


def test_scores_of_an_atm_head_are_presence_times_attention_before_its_softmax():
    net, x = tiny(head="atm", confidence=1), images()
    head = net.heads[0]
    tokens = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mask_logits, presence = head(tokens)
        memory, queries = head.norm(head.reduce(tokens)), head.queries.expand(2, -1, -1)
        for layer in head.layers:
            before = layer.norm1(queries + layer.among(queries, queries)[0])
            queries, _ = layer(queries, memory, None)
        q, k = head.layers[-1].across.q(before), head.layers[-1].across.k(memory)
        want = q @ k.transpose(1, 2) / 16**0.5  # one attention head of width 16
        assert presence.shape == (2, 4, 2) and mask_logits.shape == (2, 4, 64)
        torch.testing.assert_close(mask_logits, want, rtol=1e-4, atol=1e-5)
        score = head.scores(mask_logits, presence)
        torch.testing.assert_close(score, presence.softmax(2)[:, :, :1] * want.sigmoid())
        assert net(x).exp().max() <= 1


# ------------------------------------------------------------------------------------------------------------- training


def test_the_loss_has_a_part_for_every_head_and_counts_void_as_background():
    net = tiny(head="atm", confidence=0.9).train()
    label = torch.full((2, 32, 32), 255)
    label[0, :16] = 1
    stages = net(images(2))
    losses = net.criterion(stages, {"label": label})
    assert set(losses) == {f"{name}_{i}" for name in ("classes", "focal", "dice") for i in (1, 2, 3)}
    presence = stages[0].presence
    target = torch.ones(2, 4, dtype=torch.long)
    target[0, 1] = 0
    want = F.cross_entropy(presence.flatten(0, 1), target.flatten(), torch.tensor([1.0, 0.1]))
    torch.testing.assert_close(losses["classes_1"], want)
    p = F.interpolate(stages[0].canvas, (32, 32), mode="bilinear", align_corners=False)[0, 1].sigmoid()
    t = (label[0] == 1).float()
    focal = -(0.25 * t * (1 - p) ** 2 * p.log() + 0.75 * (1 - t) * p**2 * (1 - p).log()).mean()
    torch.testing.assert_close(losses["focal_1"], 20 * focal)
    torch.testing.assert_close(losses["dice_1"], 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    nothing = net.criterion(stages, {"label": torch.full((2, 32, 32), 255)})
    assert nothing["focal_1"] == nothing["dice_1"] == 0 and all(v.isfinite() for v in nothing.values())


def test_a_finished_token_teaches_the_head_that_finished_it_in_every_later_map():
    net, _ = pruned()
    net.train()
    stages = net(images())
    same = stages[0].canvas == stages[2].canvas  # finished after the first stage
    assert same.any()
    (gradient,) = torch.autograd.grad(stages[2].canvas[same].sum(), net.heads[0].fc.weight, retain_graph=True)
    assert gradient.any()
    (gradient,) = torch.autograd.grad(
        stages[2].canvas[same].sum(), net.heads[2].fc.weight, allow_unused=True, materialize_grads=True
    )
    assert not gradient.any()


@pytest.mark.parametrize("head", ["linear", "atm"])
def test_it_learns_scenes_and_prunes_what_it_is_sure_of(head):
    data = tt.load_data("scenes:classes=3,size=32,n=70", task="segment")
    net = tt.create_model(
        "dtop_nano", backbone_kwargs=TINY, img_size=32, exits=(1, 2), head=head, num_classes=data.num_classes,
        confidence=1, seed=0,
    )  # fmt: skip
    rows = tt.fit(net, data, epochs=6, batch_size=8, lr=3e-3, val=None, progress=False).history
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    whole = tt.evaluate(net, data)
    net.confidence = 0.5
    with torch.no_grad():
        net(next(iter(data.loader("test", batch_size=8)))["image"])
    assert net.last_tokens[:, 1].float().mean() < 60
    part = tt.evaluate(net, data)
    assert part["miou"] > whole["miou"] - 0.1


# ------------------------------------------------------------------------------------------------------------- ways out


def test_saved_and_loaded_it_prunes_as_before_and_trains_on(tmp_path):
    net, x = pruned()
    tt.apply(net, [SetAttr("", "confidence", 0.7)])
    tt.save(net, tmp_path / "net")
    again = tt.load(tmp_path / "net")
    assert again.confidence == 0.7 and again.keep == 5
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
        assert torch.equal(again.last_tokens, net.last_tokens)
    label = torch.zeros(3, 32, 32, dtype=torch.long)
    sum(again.train().criterion(again(x), {"label": label}).values()).backward()
    assert all(p.grad is not None for p in again.heads.parameters())


@pytest.mark.parametrize("head", ["linear", "atm"])
def test_its_channels_can_be_pruned_as_well(head):
    net = tiny(head=head, backbone_kwargs=TINY | {"depth": 2}, exits=(1,))
    small = tt.compress.magnitude(net, (3, 32, 32), budget="macs<=75%")
    macs = tt.measure(small, (3, 32, 32)).macs
    assert macs == small.macs().item() <= 0.75 * tt.measure(net, (3, 32, 32)).macs
    label = torch.zeros(3, 32, 32, dtype=torch.long)
    sum(small.train().criterion(small(images()), {"label": label}).values()).backward()


@pytest.mark.parametrize("head", ["linear", "atm"])
def test_the_exported_file_computes_the_pruned_map(tmp_path, head):
    """With static shapes: the same answers, without the savings."""
    from trimtab.deploy import OnnxModel

    net, x = tiny(confidence=SURE[head], head=head), images()
    spec = InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    tt.export(net, tmp_path / "net.onnx", spec=spec, exporter="classic")
    with torch.no_grad():
        want = net(x)
        assert net.last_tokens[:, 2].lt(64).all()
        net.confidence = 1
        assert (net(x) - want).abs().max() > 0.1
    got = torch.from_numpy(OnnxModel(tmp_path / "net.onnx").logits(x.numpy()))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "deit_tiny_patch16_224", "vit_base_patch16_clip_224"],
)
def test_plain_vits_of_timm_are_backbones_without_their_class_token(name):
    kwargs = {"depth": 2, "embed_dim": 24, "num_heads": 3}
    net = DToP(backbone=name, backbone_kwargs=kwargs, exits=(1,), img_size=56 if "14" in name else 64, num_classes=3)
    side = 4 * net.multiple
    assert net.eval()(torch.zeros(1, 3, side, side)).shape == (1, 3, side, side)
    assert net.backbone.pos_embed.shape[1] == 16
    assert not [n for n, _ in net.named_parameters() if "cls_token" in n or "reg_token" in n]


def test_positions_of_patches_are_those_of_the_backbone():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    torch.manual_seed(0)
    net = DToP(backbone_kwargs={"depth": 1}, exits=(), img_size=32, num_classes=2).eval()
    x = images(1)
    want = vit._pos_embed(vit.patch_embed(x))[:, 1:]
    net.backbone.patch_embed.load_state_dict(vit.patch_embed.state_dict())
    net.backbone.pos_embed.data = vit.pos_embed.data[:, 1:]
    torch.testing.assert_close(net._embed(x)[0], want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet18"}, "backbone must be a plain ViT of timm, 'resnet18' is built differently"),
        ({"backbone": "vit_tinny"}, "backbone must be a plain ViT of timm.*got 'vit_tinny'"),
        ({"exits": (8, 6)}, r"exits must rise and lie between layers 1 and 11, got \(8, 6\)"),
        ({"exits": (12,)}, "exits must rise"),
        ({"head": "fcn"}, "head must be one of atm, linear, got 'fcn'"),
        ({"confidence": 1.5}, "confidence must be between 0 and 1, got 1.5"),
        ({"keep": -1}, "keep must be a non-negative integer, got -1"),
        ({"head_heads": 5}, "half of the backbone's width, 96, must be a multiple of head_heads, got 5"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DToP(img_size=32, **arguments)
