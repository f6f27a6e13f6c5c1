"""The script that draws upscalers side by side."""

from __future__ import annotations

import numpy as np
from PIL import Image

import trimtab as tt
from tools.restore_picture import main


def test_a_row_shows_the_detail_of_every_network(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    for name in ("espcn_x3", "cfsr_tiny"):
        tt.save(tt.create_model(name, scale=3, seed=0), tmp_path / name)
    nets = [word for name in ("espcn_x3", "cfsr_tiny") for word in ("--net", str(tmp_path / name))]
    out = tmp_path / "row.png"
    assert main([str(tmp_path / "photo.png"), *nets, "--detail", "6,3,24,18", "--zoom", "1", "--out", str(out)]) == 0
    row = np.asarray(Image.open(out))
    assert row.shape[1] >= 5 * 24  # small, cubic, two networks, original
    np.testing.assert_array_equal(row[-18:, -24:], pixels[3:21, 6:30])
