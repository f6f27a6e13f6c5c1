from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

from trimtab.data import augment
from trimtab.data.augment import Augment, CropFlip, Cutout, RandomOps, ResizedCrop, parse_augment


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int, h: int = 32, w: int = 32, c: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8, generator=generator(seed))


def smooth(n: int, h: int, w: int) -> torch.Tensor:
    return F.interpolate(noise(n, 8, 8).float(), size=(h, w), mode="bilinear").round().to(torch.uint8)


FILL = torch.tensor([120.0, 110.0, 100.0]).view(3, 1, 1)


@pytest.mark.parametrize(("h", "w"), [(32, 32), (8, 8), (20, 13)])
def test_crop_flip_equals_padding_cutting_and_mirroring_one_by_one(h: int, w: int):
    images, step = noise(64, h, w), CropFlip()
    draws = step.draw(64, (h, w), generator())
    out = step.apply(images, draws, FILL)
    pad = max(1, round(min(h, w) / 8))
    assert draws["shift"].min() == -pad
    assert draws["shift"].max() == pad
    assert 15 < int(draws["flip"].sum()) < 49
    for x, y, (dy, dx), flip in zip(images, out, draws["shift"].tolist(), draws["flip"].tolist()):
        expected = TF.crop(x, dy, dx, h, w)  # zeros outside
        assert torch.equal(y, TF.horizontal_flip(expected) if flip else expected)
    elsewhere = augment._windows(images, pad, draws["shift"] + pad, draws["flip"])  # what other devices compute
    assert torch.equal(out, elsewhere)


def test_flip_alone_only_mirrors():
    images = noise(64)
    out = parse_augment("flip")(images, generator())
    same, mirrored = ((out == v).flatten(1).all(1) for v in (images, images.flip(3)))
    assert (same ^ mirrored).all()
    assert 15 < int(mirrored.sum()) < 49


@pytest.mark.parametrize(("h", "w"), [(80, 64), (24, 32)])
def test_resized_crop_equals_cutting_and_resizing_one_by_one(h: int, w: int):
    images, step = smooth(24, h, w), ResizedCrop(flip=True)
    draws = step.draw(24, (h, w), generator())
    out = step.apply(images, draws, FILL).float()
    for x, y, (top, left, tall, wide), flip in zip(images, out, draws["box"].tolist(), draws["flip"].tolist()):
        expected = TF.resized_crop(x.float(), top, left, tall, wide, [h, w], antialias=False)
        expected = TF.horizontal_flip(expected) if flip else expected
        assert (y - expected).abs().max() <= 1.01
    # the float path is what other devices use
    assert (step.apply(images.float(), draws, FILL) - out).abs().max() <= 1.01


def test_resized_crop_draws_areas_and_aspects_in_range():
    box = ResizedCrop(scale=(0.2, 0.9)).draw(4000, (100, 100), generator())["box"].float()
    area, ratio = box[:, 2] * box[:, 3] / 1e4, box[:, 3] / box[:, 2]
    assert 0.18 < area.min() < 0.25
    assert 0.8 < area.max() < 0.92
    assert 0.7 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.4
    assert (box[:, :2] >= 0).all()
    assert (box[:, :2] + box[:, 2:] <= 100).all()


def test_cutout_paints_one_square_of_the_mean_colour():
    images = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    out = Cutout().apply(images, Cutout().draw(200, (32, 32), generator()), FILL)
    painted = (out == FILL.to(torch.uint8)).all(1)
    assert torch.equal(painted, (out != 0).any(1))
    area = painted.flatten(1).sum(1)
    assert area.max() == 16 * 16
    assert area.min() < 16 * 16  # over the edge
    rows, columns = painted.any(2).sum(1), painted.any(1).sum(1)
    assert torch.equal(rows * columns, area)


CASES = {
    "brightness": lambda x, m: TF.adjust_brightness(x, 1 + 0.9 * m),
    "color": lambda x, m: TF.adjust_saturation(x, 1 + 0.9 * m),
    "contrast": lambda x, m: TF.adjust_contrast(x, 1 + 0.9 * m),
    "sharpness": lambda x, m: TF.adjust_sharpness(x, 1 + 0.9 * m),
    "posterize": lambda x, m: TF.posterize(x, 8 - round(4 * abs(m))),
    "solarize": lambda x, m: TF.solarize(x, 255 * (1 - abs(m))),
    "autocontrast": lambda x, m: TF.autocontrast(x),
    "equalize": lambda x, m: TF.equalize(x),
}


def drawn(name: str, n: int, strength: float, sign: float) -> dict[str, torch.Tensor]:
    op = torch.full((n, 1), RandomOps.NAMES.index(name))
    return {"op": op, "strength": torch.full((n, 1), strength), "sign": torch.full((n, 1), sign)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("strength", "sign"), [(0.5, 1.0), (0.5, -1.0), (0.9, -1.0)])
def test_colour_operations_are_those_of_torchvision(name: str, strength: float, sign: float):
    images = smooth(8, 32, 24) // 2 + 30
    out = RandomOps(ops=1).apply(images, drawn(name, 8, strength, sign), FILL)
    for x, y in zip(images, out):
        assert (y - CASES[name](x, strength * sign).float()).abs().max() <= 2  # theirs drops fractions


GEOMETRY = {
    "shear_x": {"shear": (0.3, 0)},
    "shear_y": {"shear": (0, 0.3)},
    "translate_x": {"move": (150 / 331, 0)},
    "translate_y": {"move": (0, 150 / 331)},
    "rotate": {"turn": 30},
}


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometric_operations_are_those_of_torchvision(name: str):
    import math

    case, strength = {"shear": (0, 0), "move": (0, 0), "turn": 0, **GEOMETRY[name]}, 2 / 3
    images = smooth(4, 33, 48)
    out = RandomOps(ops=1).apply(images, drawn(name, 4, strength, 1.0), FILL)
    h, w = images.shape[2:]
    shear = [math.degrees(math.atan(s * strength)) for s in case["shear"]]
    move = [case["move"][0] * strength * w, case["move"][1] * strength * h]
    both = []
    for sign in (1, -1):  # a sign is a coin's toss anyway
        theirs = TF.affine(images, angle=sign * case["turn"] * strength, translate=[sign * m for m in move], scale=1.0,
                           shear=[sign * s for s in shear], fill=[120, 110, 100])  # fmt: skip
        both.append(((out - theirs.float()).abs() <= 12).float().mean().item())
    assert max(both) > 0.95


@pytest.mark.parametrize("text", ["randaugment", "trivial", "randaugment=20", "crop_flip+trivial+cutout", "rrc+flip"])
@pytest.mark.parametrize("c", [1, 3])
def test_values_stay_in_range_and_the_input_is_left_alone(text: str, c: int):
    images = noise(96, 20, 28, c)
    before = images.clone()
    out = parse_augment(text)(images, generator())
    assert torch.equal(images, before)
    assert out.shape == images.shape
    assert out.min() >= 0
    assert out.max() <= 255
    assert not torch.equal(out.float(), images.float())


@pytest.mark.parametrize(
    "text", ["crop_flip", "rrc+flip", "randaugment", "trivial", "cutout", "crop_flip+randaugment+cutout"]
)
def test_a_sample_does_not_depend_on_its_neighbours(text: str):
    """A slice augmented with its slice of the numbers is that slice of the batch: what sharding needs."""
    images, steps = noise(32), parse_augment(text)
    draws = steps.draw(32, (32, 32), generator())
    whole = steps.apply(images, draws, FILL).float()
    for part in (slice(0, 16), slice(16, 32), slice(5, 6), slice(4, 4)):
        piece = steps.apply(images[part], [{k: v[part] for k, v in d.items()} for d in draws], FILL).float()
        torch.testing.assert_close(piece, whole[part], atol=1e-3, rtol=0)


def test_tiny_images_survive_everything():
    for h, w in ((1, 1), (2, 3), (8, 8)):
        for text in ("crop_flip", "rrc+flip", "randaugment", "trivial", "cutout"):
            assert parse_augment(text)(noise(16, h, w), generator()).shape == (16, 3, h, w)


def test_words_are_combined_in_order():
    assert [type(s).__name__ for s in parse_augment("crop+flip+randaugment+cutout=4").steps] == [
        "CropFlip", "RandomOps", "Cutout",
    ]  # fmt: skip
    assert parse_augment("none").steps == []
    steps = parse_augment("rrc=0.5+flip").steps
    assert len(steps) == 1
    assert (steps[0].scale, steps[0].flip) == ((0.5, 1.0), True)
    assert parse_augment("crop=2").steps[0].draw(500, (32, 32), generator())["shift"].abs().max() == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mirror", "augment must be made of none, flip, crop"),
        ("crop=x", "'crop' takes a number, got 'x'"),
        ("rrc=2", "scale must be"),
        ("randaugment=99", "magnitude must be 0 to 30"),
        ("cutout=0", "side must be at least 1"),
        ("crop=-1", "pad must be at least 0"),
    ],
)
def test_wrong_words_are_explained(text: str, words: str):
    with pytest.raises(ValueError, match=words):
        parse_augment(text)


def test_the_global_random_state_is_not_touched():
    before = torch.get_rng_state()
    parse_augment("crop_flip+randaugment+trivial+rrc+cutout")(noise(8), generator())
    assert torch.equal(before, torch.get_rng_state())


def test_no_steps_give_the_images_back():
    images = noise(4)
    assert torch.equal(Augment([])(images, generator()), images)


@pytest.mark.parametrize("size", [32, 64])
def test_with_a_seed_of_its_own_a_picture_does_not_depend_on_its_neighbours(size: int):
    steps, images, seeds = parse_augment("rrc+flip+randaugment+cutout"), noise(12, size, size), list(range(50, 62))
    together = steps.apply(images, steps.draw_each(seeds, (size, size)))
    for i in range(12):
        alone = steps.apply(images[i : i + 1], steps.draw_each(seeds[i : i + 1], (size, size)))
        assert torch.equal(alone[0], together[i])
    assert not torch.equal(together, steps.apply(images, steps.draw_each(seeds[::-1], (size, size))))
    assert steps.draw_each([], (size, size))[0]["box"].shape == (0, 4)


def test_functions_of_whole_batches_have_no_seeds_for_pictures():
    with pytest.raises(ValueError, match="functions see whole batches"):
        Augment([augment.Custom(lambda x, g: x)], "custom").draw_each([1], (8, 8))
