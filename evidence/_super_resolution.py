"""What the evidence of super-resolution shares: T91 to train on, Set5 to test on, and the cubic to beat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from evidence.runner import Context
from trimtab.data import load_data
from trimtab.learn import evaluate
from trimtab.nn.resize import upscale

# Set5, both pictures of 8 bits, on luma without a border as wide as the scale: what an evaluation must give.
CUBIC = {2: 33.68, 3: 30.41, 4: 28.43}


class Cubic(nn.Module):
    """The upscaling that tables of the field call bicubic."""

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return upscale(x, self.scale)


def folder(context: Context) -> Path | None:
    """The folder that holds sr_t91 and the others: ``--data`` or the one above it; None without, and in smoke runs."""
    if context.smoke or context.data is None:
        return None
    here = Path(context.data).expanduser().resolve()
    root = next((p for p in (here, here.parent) if (p / "sr_t91").is_dir()), None)
    if root is None:
        raise ValueError(f"--data must be sr_t91 or the folder that holds it, got {context.data!r}")
    return root


def training(context: Context, *, scale: int, in_chans: int, patch: int, seed: int = 0) -> Any:
    """T91 with a tenth of it for validation; without ``--data`` made pictures."""
    root = folder(context)
    spec = f"scenes:size=96,n={context.choose(full=100, smoke=12)}" if root is None else root / "sr_t91"
    return load_data(spec, task="restore", scale=scale, in_chans=in_chans, patch=patch, test=0, val=0.1, seed=seed)


def testing(context: Context, *, scale: int, in_chans: int) -> dict[str, Any]:
    """Set5, by this name; without ``--data`` made pictures."""
    root = folder(context)
    common: dict[str, Any] = {"task": "restore", "scale": scale, "in_chans": in_chans}
    if root is None:
        data = load_data(f"scenes:size=96,n={context.choose(full=40, smoke=10)},seed=1", **common)
        return {"scenes": data}
    return {"Set5": load_data(root / "sr_set5", **common)}


def scores(model: nn.Module, tests: dict[str, Any], device: str = "cpu") -> dict[str, dict[str, float]]:
    """PSNR in dB and SSIM on every test set."""
    out = {}
    for name, data in tests.items():
        got = evaluate(model, data, "test", device=device)
        out[name] = {"psnr": round(got["psnr"], 4), "ssim": round(got["ssim"], 5)}
    return out
