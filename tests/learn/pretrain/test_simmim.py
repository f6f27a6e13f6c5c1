"""SimMIM: exact counts, what is hidden stays hidden, the loss looks at hidden pixels only, and it learns."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.layers import resize_rel_pos_bias_table
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import trimtab as tt
from trimtab import testing
from trimtab.data.dataset import Data, Split
from trimtab.learn import SimMIM, methods
from trimtab.learn.objective import Batch, Context
from trimtab.learn.pretrain.simmim import avg_dist, head, masked_l1


def vit(size: int = 32, patch: int = 4, **options) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VisionTransformer(
            img_size=size, patch_size=patch, embed_dim=16, depth=2, num_heads=2, num_classes=10, **options
        )


def swin() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SwinTransformer(
            img_size=32, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, num_classes=10
        )


def beit() -> nn.Module:
    """As in the paper: relative positions shared by all layers, LayerScale, no absolute positions."""
    options = {"init_values": 0.1, "use_abs_pos_emb": False, "use_shared_rel_pos_bias": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Beit(img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=10, **options)


MODELS = {"vit": vit, "swin": swin, "beit": beit, "two tokens": lambda: vit(class_token=True, reg_tokens=2)}


def ready(model: nn.Module, size: int = 32, chans: int = 3, **options) -> tuple[SimMIM, nn.Module, torch.Tensor]:
    """An objective that is set up, the model in eval mode, and images."""
    images = torch.randn(3, chans, size, size, generator=torch.Generator().manual_seed(0))
    objective = SimMIM(**options)
    objective.setup(model, Batch(image=images))
    return objective, model.eval(), images


def drawn(objective: SimMIM, n: int = 3) -> torch.Tensor:
    return objective.random_mask(n, torch.Generator().manual_seed(1))


# -- counts -----------------------------------------------------------------------------------------------------------


def swin_of_the_paper(size: str, window: int) -> nn.Module:
    return timm.create_model(f"swin_{size}_patch4_window7_224", img_size=192, window_size=window, num_classes=0)


def vit_of_the_paper() -> nn.Module:
    options = {"init_values": 0.1, "use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "use_fc_norm": False}
    return Beit(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, num_classes=0, **options)


@pytest.mark.parametrize(
    ("build", "size", "encoder", "whole", "macs", "hidden"),
    [
        (lambda: swin_of_the_paper("base", 6), 192, 86_725_304, 89_874_104, 11.390e9, 22),
        (lambda: swin_of_the_paper("large", 12), 192, 195_159_540, 199_881_204, 26.125e9, 22),
        (vit_of_the_paper, 224, 85_666_128, 86_256_720, 17.679e9, 30),
    ],
    ids=["swin_b", "swin_l", "vit_b"],
)
def test_parameters_and_macs_are_those_of_the_authors(build, size, encoder, whole, macs, hidden):
    with torch.device("meta"):
        model = build()
        image = torch.zeros(1, 3, size, size)
    objective = SimMIM()
    objective.setup(model, Batch(image=image))

    def count(*modules):
        return sum(p.numel() for m in modules for p in m.parameters())

    assert objective.hidden == hidden
    assert count(model, objective.extra["mask"]) == encoder
    assert count(model, objective.extra) == whole
    mask = torch.zeros(1, *(2 * [size // objective._patch]), dtype=torch.bool, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        objective.reconstruct(model, image, mask)
    assert abs(counter.get_total_flops() / 2 / macs - 1) < 1e-4


@pytest.mark.parametrize(
    ("size", "patch", "unit", "ratio", "squares", "hidden"),
    [(192, 16, 32, 0.6, 36, 22), (224, 16, 32, 0.6, 49, 30), (32, 4, 8, 0.6, 16, 10), (32, 4, 4, 0.25, 64, 16)],
)
def test_the_same_number_of_whole_squares_is_hidden_in_every_image(size, patch, unit, ratio, squares, hidden):
    objective, _, _ = ready(vit(size, patch), size, unit=unit, ratio=ratio)
    mask = drawn(objective, 16)
    assert mask.shape == (16, size // patch, size // patch)
    pixels = objective.on_pixels(mask)
    assert pixels.shape == (16, 1, size, size)
    cells = pixels.view(16, size // unit, unit, size // unit, unit).transpose(2, 3).flatten(3).flatten(1, 2)
    assert (cells.all(2) == cells.any(2)).all()  # a square is hidden whole or not at all
    assert cells.shape[1] == squares and (cells.all(2).sum(1) == hidden).all()
    assert len({tuple(m.flatten().tolist()) for m in mask}) == 16  # another mask for every image


@pytest.mark.parametrize(("size", "patch", "unit"), [(224, 16, 32), (192, 4, 32), (32, 4, 8), (28, 4, 4), (64, 8, 16)])
def test_the_usual_square_is_the_papers_or_a_quarter_of_small_images(size, patch, unit):
    objective, _, _ = ready(vit(size, patch), size)
    assert objective._unit == unit


# -- what is hidden ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("final_norm", [True, False])
def test_hidden_pixels_are_not_seen_and_visible_ones_are(build, final_norm):
    objective, model, images = ready(build(), final_norm=final_norm)
    mask = drawn(objective)
    hidden = objective.on_pixels(mask)
    with torch.no_grad():
        want = objective.encode(model, images, mask)
        assert torch.equal(objective.encode(model, torch.where(hidden, torch.randn_like(images), images), mask), want)
        assert not torch.equal(objective.encode(model, torch.where(hidden, images, images + 1), mask), want)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_with_nothing_hidden_it_is_the_plain_encoder(build):
    objective, model, images = ready(build())
    with torch.no_grad():
        got = objective.encode(model, images, torch.zeros_like(drawn(objective)))
        want = model.forward_features(images)
    if want.ndim == 3:
        assert torch.equal(got.flatten(2).transpose(1, 2), want[:, model.num_prefix_tokens :])
    else:
        assert torch.equal(got.permute(0, 2, 3, 1), want)


def test_without_the_final_norm_it_is_the_input_of_that_norm():
    objective, model, images = ready(vit(), final_norm=False)
    mask = drawn(objective)
    with torch.no_grad():
        before = objective.encode(model, images, mask).flatten(2).transpose(1, 2)
        objective.final_norm = True
        after = objective.encode(model, images, mask).flatten(2).transpose(1, 2)
    assert torch.allclose(model.norm(before), after, atol=1e-5)


def test_the_token_comes_before_positions():
    """All patches hidden differ in nothing but their positions: without those, all outputs are the same."""
    objective, model, images = ready(vit(pos_embed="none"))
    with torch.no_grad():
        out = objective.encode(model, images, torch.ones_like(drawn(objective)))
    assert torch.allclose(out, out[:, :, :1, :1].expand_as(out), atol=1e-5)
    with_positions, model, _ = ready(vit())
    with torch.no_grad():
        out = with_positions.encode(model, images, torch.ones_like(drawn(objective)))
    assert not torch.allclose(out, out[:, :, :1, :1].expand_as(out), atol=1e-3)


# -- loss and head ----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_error_of_hidden_pixels():
    image = torch.randn(2, 3, 8, 8)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[:, :, :4] = True
    assert masked_l1(image, image, mask) == 0
    hidden = int(mask.sum())
    assert math.isclose(masked_l1(image + 1, image, mask).item(), 1 / (1 + 1e-5 / hidden), rel_tol=1e-5)
    predicted = torch.randn(2, 3, 8, 8, requires_grad=True)
    masked_l1(predicted, image, mask).backward()
    assert not predicted.grad[:, :, 4:].any() and predicted.grad[:, :, :4].all()


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_no_gradient_comes_from_visible_pixels(build):
    objective, model, images = ready(build())
    mask = drawn(objective)
    predicted = objective.reconstruct(model, images, mask)
    predicted.retain_grad()
    masked_l1(predicted, images, objective.on_pixels(mask)).backward()
    assert not predicted.grad[~objective.on_pixels(mask).expand_as(predicted)].any()
    assert objective.extra["mask"].get_parameter("token").grad.any()


def test_the_head_is_a_linear_map_of_every_token_to_its_pixels():
    layers = head(6, 3, 4)
    x = torch.randn(2, 6, 5, 5)
    conv = layers[0]
    tokens = x.permute(0, 2, 3, 1) @ conv.weight[:, :, 0, 0].T + conv.bias  # (B, h, w, 3 s s)
    blocks = tokens.unflatten(3, (3, 4, 4))  # (B, h, w, 3, s, s)
    assert torch.allclose(layers(x), blocks.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 20, 20), atol=1e-5)
    assert len([m for m in head(6, 3, 4, layers=4) if isinstance(m, nn.Conv2d)]) == 4


def test_larger_squares_put_hidden_pixels_further_from_visible_ones():
    assert avg_dist(
        torch.ones(1, 3, 3).index_put_((torch.tensor(0), torch.tensor(1), torch.tensor(1)), torch.tensor(0.0))
    ) == (pytest.approx((4 + 4 * 2**0.5) / 8))
    distances = []
    for unit, ratio in ((4, 0.25), (4, 0.6), (8, 0.6), (16, 0.6)):
        objective, _, _ = ready(vit(), unit=unit, ratio=ratio)
        distances.append(avg_dist(objective.on_pixels(drawn(objective, 32))[:, 0]))
    assert distances == sorted(distances)


# -- at the door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tt.create_model("resnet20_cifar"), r"patch tokens \(patch_embed\), got ResNet"),
        (lambda: tt.create_model("mixer_s32_224", img_size=32), "patch tokens"),
        (lambda: tt.create_model("cct_2_3x2_32"), "patches that do not overlap; those of CompactTransformer do"),
        (lambda: timm.create_model("tiny_vit_5m_224", depths=(1, 1, 1, 1)), "patches that do not overlap"),
    ],
    ids=["convolutions", "mixer", "cct", "tiny_vit"],
)
def test_models_without_separate_patches_are_refused(build, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        SimMIM().setup(model, Batch(image=torch.randn(2, 3, 32, 32)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": 0}, "unit must be a positive number of pixels or None, got 0"),
        ({"ratio": 1.0}, "ratio must be between 0 and 1, got 1.0"),
        ({"head_layers": 0}, "head_layers must be at least 1, got 0"),
        ({"unit": 6}, r"unit must be a multiple of the patch that divides 32x32 images \(4, 8, 16, 32\), got 6"),
        ({"unit": 16, "ratio": 0.9}, "ratio 0.9 of 4 squares of 16 pixels hides the whole image"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ready(vit(), **options)


def test_the_vit_of_the_library_can_be_pretrained():
    objective, _, _ = ready(tt.create_model("vit_lite_2_4_32"))
    assert objective.hidden == 10


# -- training ---------------------------------------------------------------------------------------------------------


def digits_vit() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VisionTransformer(
            img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=10
        )


@pytest.mark.parametrize(("name", "check"), testing.objective_checks(slow=False))
def test_battery(name, check):
    """Two processes do not equal one, by design: each draws masks of its own."""
    case = testing.ObjectiveCase(SimMIM, model=digits_vit, opt="adamw", lr=3e-3)
    check(case)


def test_it_predicts_hidden_pixels_better_than_their_mean_does():
    data = tt.load_data("digits")
    model, objective = digits_vit(), methods.make("simmim", unit=2)
    options = {"epochs": 15, "opt": "adamw", "lr": 4e-3, "batch_size": 64, "augment": "none", "progress": False}
    result = tt.fit(model, data, objective, device="cpu", **options)
    assert result.best is None and all(row["val_accuracy"] is None for row in result.history)  # the last weights
    images = next(iter(data.loader("test", batch_size=200)))["image"]
    mask = objective.random_mask(len(images), torch.Generator().manual_seed(0))
    hidden = objective.on_pixels(mask)
    mean = (images * ~hidden).sum((2, 3), keepdim=True) / (~hidden).sum((2, 3), keepdim=True)
    with torch.no_grad():
        predicted = objective.reconstruct(model, images, mask)
    assert masked_l1(predicted, images, hidden) < 0.8 * masked_l1(mean.expand_as(images), images, hidden)


@pytest.mark.parametrize("build", [vit, swin])
def test_hidden_squares_are_filled_in_from_visible_ones(build):
    """Every image is of one colour: no place has a likely one, but the visible squares tell."""
    colours = torch.randint(256, (256, 3, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    train = Split(colours.expand(-1, -1, 32, 32).contiguous(), torch.arange(256) % 2)
    data = Data("plain", {"train": train}, ["even", "odd"])
    objective, options = SimMIM(), {"opt": "adamw", "lr": 5e-3, "batch_size": 32, "augment": "none"}
    history = tt.fit(build(), data, objective, epochs=15, progress=False, device="cpu", **options).history
    images = next(iter(data.loader("train", batch_size=256, augment="none")))["image"]
    by_place = (images - images.median(0).values).abs().mean()
    assert history[0]["loss"] > 0.8 * by_place and history[-1]["loss"] < 0.6 * by_place


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 2}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 2}),
    ],
)
def test_it_can_be_fine_tuned_layer_by_layer_and_kept(name, shape, tmp_path):
    data = tt.load_data("digits", limit=200)
    shape = shape | {"patch_size": 2, "num_classes": 10, "in_chans": 1, "img_size": 8, "adapt": False}
    model = tt.create_model(name, seed=0, **shape)
    untrained = {k: v.clone() for k, v in model.state_dict().items()}
    options = {"epochs": 1, "opt": "adamw", "progress": False}
    tt.fit(model, data, SimMIM(), **options)
    pretrained = {k: v.clone() for k, v in model.state_dict().items()}
    assert pretrained.keys() == untrained.keys()  # neither head nor token is left
    changed = {k for k in untrained if not torch.equal(untrained[k], pretrained[k])}
    assert {"patch_embed.proj.weight"} <= changed and not any(k.startswith("head.") for k in changed)
    tt.fit(model, data, layer_decay=1e-4, **options)
    moved = {k: float((v - pretrained[k]).abs().max()) for k, v in model.state_dict().items() if v.is_floating_point()}
    head_moved = max(v for k, v in moved.items() if k.startswith("head."))
    assert moved["patch_embed.proj.weight"] < 1e-2 * head_moved  # tuning starts from what was pre-trained
    tt.save(model, tmp_path, spec=data.spec)
    images = next(iter(data.loader("test")))["image"]
    with torch.no_grad():
        assert torch.equal(tt.load(tmp_path)(images), model(images))


def test_positions_of_a_larger_window_are_interpolated_geometrically():
    """Old offsets stand at geometric distances: a table of those distances becomes one of plain offsets."""
    for window, larger, q in ((6, 7, 1.0913), (12, 14, 1.0329)):
        sums = torch.cumsum(q ** torch.arange(window - 1, dtype=torch.float64), 0)
        assert abs(float(sums[-1]) - (larger - 1)) < 2e-3
        places = torch.cat([-sums.flip(0), torch.zeros(1, dtype=torch.float64), sums]).float()
        side, wanted = 2 * window - 1, 2 * larger - 1
        table = places.view(1, side).expand(side, side).reshape(-1, 1)
        got = resize_rel_pos_bias_table(table, (larger, larger), (wanted**2, 1)).view(wanted, wanted)
        offsets = torch.arange(wanted).float() - (larger - 1)
        assert torch.allclose(got, offsets.expand(wanted, wanted), atol=0.02)


def test_a_pretrained_swin_takes_a_larger_window(tmp_path):
    def swin_of(window, size, **options):
        options |= {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "patch_size": 2, "window_size": window}
        return tt.create_model("swin_tiny_patch4_window7_224", img_size=size, adapt=False, **options)

    small = swin_of(6, 24)
    for m in small.modules():
        if hasattr(m, "relative_position_bias_table"):
            nn.init.normal_(m.relative_position_bias_table)
    tt.save(small, tmp_path)
    large = swin_of(7, 28, weights=tmp_path)
    tables = [
        m.layers[0].blocks[0].attn.relative_position_bias_table.detach().view(s, s)
        for m, s in ((small, 11), (large, 13))
    ]
    assert torch.allclose(tables[0][5, 5], tables[1][6, 6], atol=1e-4)  # no offset stays no offset


def test_the_context_decides_the_mask():
    objective, model, images = ready(vit())

    def loss(seed):
        ctx = Context(generator=torch.Generator().manual_seed(seed))
        return objective.losses(model, Batch(image=images), ctx)

    assert loss(0) == loss(0) != loss(1)


def test_from_a_recipe(tmp_path):
    from trimtab.compact.recipe import run

    file = tmp_path / "recipe.yaml"
    file.write_text(f"""
data: {{spec: digits, limit: 200}}
model: {{name: vit_tiny_patch16_224, patch_size: 2, embed_dim: 24, depth: 1, num_heads: 2}}
out: {tmp_path / "out"}
phases:
  - train: {{objective: {{simmim: {{unit: 4}}}}, epochs: 1, opt: adamw, augment: "rrc=0.67", progress: false}}
    as: pretrained
  - train: {{epochs: 1, opt: adamw, layer_decay: 0.65, progress: false}}
""")
    assert [p["as"] for p in run(file)["phases"]] == ["pretrained", None]


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    from trimtab import cli

    monkeypatch.chdir(tmp_path)
    common = ["train", "shapes:classes=3,size=16,n=60", "--epochs", "1", "--opt", "adamw", "--quiet"]
    assert cli.main([*common, "--model", "vit_lite_2_4_32", "--objective", "simmim", "--out", "pre"]) == 0
    assert cli.main([*common, "--model", "pre", "--out", "tuned"]) == 0
    assert cli.main([*common, "--model", "resnet8_mlperf_tiny", "--objective", "simmim", "--out", "no"]) != 0
    assert "patch tokens" in capsys.readouterr().err
