"""A detail of a picture beside what upscalers make of it, for the documentation.

    $ python -m tools.restore_picture china.jpg --detail 240,210,84,84 --net net/ --out docs/images/espcn.png

From the left: the picture made small, enlarged by the cubic, by every network (an artifact of task restore), and as it
was; over each the PSNR of the whole picture on luma.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trimtab.core.files import write_bytes
from trimtab.learn.image_quality import psnr
from trimtab.models import load
from trimtab.nn.resize import crop_to_multiple, downscale, to_8_bits, upscale
from trimtab.nn.restorer import restore_rgb
from trimtab.report import side_by_side


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.restore_picture", description="Upscalers side by side.")
    parser.add_argument("picture", help="an image file")
    parser.add_argument("--net", action="append", required=True, help="an artifact; may be repeated, for one scale")
    parser.add_argument("--detail", default="0,0,84,84", help="x,y,width,height")
    parser.add_argument("--zoom", type=int, default=2, help="pixels for a pixel")
    parser.add_argument("--out", required=True, help="the PNG to write")
    args = parser.parse_args(argv)
    nets = [load(folder) for folder in args.net]
    (scale,) = {int(net.scale) for net in nets}  # type: ignore[arg-type]
    pixels = np.array(Image.open(args.picture).convert("RGB"))
    high = crop_to_multiple(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, scale)
    low = downscale(high, scale, round_to_8_bits=True)
    large = {"cubic": to_8_bits(upscale(low, scale))} | {type(net).__name__: restore_rgb(net, low) for net in nets}
    x, y, w, h = (int(n) // scale * scale for n in args.detail.split(","))
    details = {f"1/{scale}": low[..., y // scale : (y + h) // scale, x // scale : (x + w) // scale]}
    for name, image in large.items():
        details[f"{name}, {psnr(image, high, border=scale).item():.2f} dB"] = image[..., y : y + h, x : x + w]
    details["original"] = high[..., y : y + h, x : x + w]
    size = (w * args.zoom, h * args.zoom)
    row = [_picture(detail).resize(size, Image.Resampling.NEAREST) for detail in details.values()]
    file = io.BytesIO()
    side_by_side(row, list(details)).save(file, "PNG", optimize=True)
    write_bytes(Path(args.out), file.getvalue())
    return 0


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image[0].mul(255).round().byte().permute(1, 2, 0).contiguous().numpy())


if __name__ == "__main__":
    raise SystemExit(main())
