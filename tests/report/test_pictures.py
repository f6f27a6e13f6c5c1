"""What is drawn on pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from trimtab.report import draw_boxes, draw_mask, side_by_side
from trimtab.report.pictures import colour


def grey(h: int = 20, w: int = 30) -> Image.Image:
    return Image.new("RGB", (w, h), (100, 100, 100))


def test_a_mask_is_laid_over_the_picture():
    mask = np.zeros((20, 30), np.uint8)
    mask[:, 10:] = 4
    mask[0] = 255
    out = np.asarray(draw_mask(grey(), mask, opacity=0.5)).astype(float)
    assert np.abs(out[5, 0] - (np.array(colour(0)) + 100) / 2).max() <= 1
    assert np.abs(out[5, 20] - (np.array(colour(4)) + 100) / 2).max() <= 1
    assert (out[0] == 100).all()  # void
    with pytest.raises(ValueError, match=r"of the picture's size \(20, 30\), got \(30, 20\)"):
        draw_mask(grey(), mask.T)


def test_boxes_are_drawn_on_the_pixels_that_they_enclose():
    boxes = np.array([[4.0, 6.0, 12.0, 15.0]])
    out = np.asarray(draw_boxes(grey(), boxes, [1]))
    drawn = (out != 100).any(-1)
    y, x = np.nonzero(drawn)
    assert (x.min(), y.min(), x.max(), y.max()) == (4, 6, 11, 14)
    assert (out[6, 4] == colour(1)).all() and not drawn[8:13, 6:10].any()
    assert (np.asarray(draw_boxes(grey(), boxes, [1], ["cell 90%"])) != out).any()
    assert np.array_equal(np.asarray(draw_boxes(grey(), np.zeros((0, 4)), [])), np.asarray(grey()))
    with pytest.raises(ValueError, match="must be equally many, got 1, 2"):
        draw_boxes(grey(), boxes, [1, 2])


def test_pictures_stand_in_a_row_at_one_height():
    row = side_by_side([grey(), grey(40, 60)], ["low", "high"])
    assert row.size == (60 + 4 + 60, 40 + 14)
    assert np.asarray(row)[30, 10].tolist() == [100] * 3 and np.asarray(row)[30, 62].tolist() == [255] * 3
    with pytest.raises(ValueError, match="with a title each, got 1"):
        side_by_side([grey()], [])
