from __future__ import annotations

import io
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import encoded, noise
from trimtab.core.artifact import InputSpec
from trimtab.core.errors import DataError
from trimtab.data import images
from trimtab.data.images import Unreadable, open_image, preprocess, to_pixels


def pixels(image: Image.Image, size: tuple[int, int], chans: int = 3, form: str = "PNG") -> np.ndarray:
    return to_pixels(open_image(encoded(image, form)), size, chans)


def test_an_image_of_the_target_size_is_not_touched():
    image = noise(8, 11, 0)
    assert np.array_equal(pixels(image, (8, 11)), np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, form: str):
    # what each orientation does to the stored picture, in numpy
    turn = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: np.rot90(a),
    }[orientation]  # fmt: skip
    image = noise(6, 10, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = turn(np.asarray(image))
    opened = open_image(encoded(image, form, exif=exif))
    assert images.upright_size(opened) == upright.shape[:2]
    assert np.array_equal(to_pixels(opened, upright.shape[:2], 3), upright.transpose(2, 0, 1))


def test_transparency_is_laid_over_white():
    image = Image.fromarray(np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 51]]], np.uint8))
    assert pixels(image, (1, 3))[:, 0].T.tolist() == [[255, 255, 255], [10, 20, 30], [204, 204, 204]]


def test_a_transparent_palette_is_laid_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 0])
    image.putdata([0, 1])
    got = to_pixels(open_image(encoded(image, "PNG", transparency=1)), (1, 2), 3)
    assert got[:, 0].T.tolist() == [[200, 0, 0], [255, 255, 255]]


def test_sixteen_bits_are_scaled_by_their_full_range():
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert pixels(Image.fromarray(values), (1, 4), 1)[0, 0].tolist() == [0, 1, 128, 255]
    assert pixels(Image.fromarray(values), (1, 4), 3)[:, 0, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("chans", [1, 3])
def test_every_png_mode_becomes_uint8(mode: str, chans: int):
    got = pixels(Image.new("RGB", (9, 7), "red").convert("L" if mode == "I;16" else "RGB").convert(mode), (5, 6), chans)
    assert got.dtype == np.uint8
    assert got.shape == (chans, 5, 6)


@pytest.mark.parametrize(
    ("mode", "form"), [("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("F", "TIFF"), ("I", "TIFF"), ("LAB", "TIFF")]
)
def test_other_modes_and_formats(mode: str, form: str):
    image = Image.new("RGB", (9, 7), "white").convert(mode) if mode in ("CMYK", "YCbCr") else Image.new(mode, (9, 7))
    assert pixels(image, (4, 4), 3, form).shape == (3, 4, 4)


@pytest.mark.parametrize(("w", "h"), [(60, 20), (20, 60), (40, 40)])
def test_geometry_is_that_of_resizing_the_shorter_side_and_cutting_the_centre(w: int, h: int):
    from torchvision.transforms.v2 import functional as F

    image = noise(h, w, 2)
    theirs = np.asarray(F.center_crop(F.resize(image, [10], antialias=True), [10, 10])).transpose(2, 0, 1).astype(int)
    difference = np.abs(pixels(image, (10, 10)) - theirs)
    assert difference.max() <= 1


@pytest.mark.parametrize(("w", "h"), [(4000, 3000), (1, 1), (1, 900), (8, 8), (3000, 17)])
def test_any_size_comes_in(w: int, h: int):
    got = pixels(Image.new("RGB", (w, h), (10, 120, 250)), (32, 32), 3, "JPEG")
    assert got.shape == (3, 32, 32)
    assert np.abs(got.astype(int) - np.array([10, 120, 250])[:, None, None]).max() <= 4


def test_a_large_jpeg_opened_small_looks_like_the_whole_one():
    smooth = noise(16, 16, 3).resize((1600, 1200), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=95)
    reduced = to_pixels(open_image(data), (64, 64), 3).astype(int)
    full = to_pixels(Image.open(io.BytesIO(data)), (64, 64), 3, draft=False).astype(int)
    assert np.abs(reduced - full).max() <= 6


def test_preprocess_leaves_the_callers_image_alone():
    image = Image.open(io.BytesIO(encoded(noise(400, 400, 4), "JPEG")))
    preprocess(image, InputSpec((3, 8, 8), (0.5,) * 3, (0.2,) * 3))
    assert image.size == (400, 400)


def test_preprocess_takes_paths_bytes_images_and_arrays_alike(tmp_path):
    image = noise(20, 30, 5)
    image.save(tmp_path / "a.png")
    spec = InputSpec((3, 8, 8), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    ways = (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(image), image, np.asarray(image))
    first, *others = (preprocess(way, spec) for way in ways)
    assert first.dtype == np.float32
    assert all(np.array_equal(first, other) for other in others)
    raw = to_pixels(image, (8, 8), 3)
    expected = (raw / 255 - np.array(spec.mean)[:, None, None]) / np.array(spec.std)[:, None, None]
    np.testing.assert_allclose(first, expected, atol=1e-6)


def test_preprocess_names_the_file_it_cannot_read(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"broken\.jpg cannot be read: not an image"):
        preprocess(tmp_path / "broken.jpg", InputSpec((3, 8, 8), (0.5,) * 3, (0.2,) * 3))


def test_a_decompression_bomb_is_refused_from_its_header(monkeypatch):
    data = encoded(Image.new("1", (9000, 9000)))
    assert len(data) < 100_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(Unreadable, match="too many pixels"):
        open_image(data)


def test_postscript_never_starts_ghostscript(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("a program was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(Unreadable, match="not an image"):
        open_image(eps)


@pytest.mark.filterwarnings("ignore")
def test_damage_of_every_kind_is_unreadable_and_nothing_else():
    """Truncated, bit-flipped and random bytes of several formats either decode or raise Unreadable."""
    rng = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for form in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"):
        good = np.frombuffer(encoded(noise(16, 16, 7), form), np.uint8)
        for trial in range(40):
            bad = good.copy()
            if trial % 2:
                bad = bad[: rng.integers(0, len(bad))]
            else:
                bad[rng.integers(0, len(bad), 6)] = rng.integers(0, 256, 6)
            try:
                assert to_pixels(open_image(bad.tobytes()), (8, 8), 3).shape == (3, 8, 8)
                outcomes["read"] += 1
            except Unreadable as e:
                assert str(e)
                outcomes["refused"] += 1
    assert outcomes["refused"] > 100


@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_does_not_lose_the_image():
    data = encoded(noise(16, 16, 8), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert to_pixels(open_image(data), (16, 16), 3).shape == (3, 16, 16)
