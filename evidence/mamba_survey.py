"""State-space models: linear cost, faithful parts, and small trainings of scans and of families.

Scans: one VMamba (16 to 64 channels) reads images of 24 x 24 pixels one way, both ways, and crosswise; the width of its
MLPs makes up for the parameters that fewer directions save. Families: a U-Net, the same with Mamba inside, and VM-UNet,
of about equal size, learn to name every pixel of scenes made of real handwritten digits (scikit-learn's) with noise.
Three seeds take about five minutes of one CPU core.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evidence.runner import ClaimResult, Context, stats
from trimtab.core.cost import measure
from trimtab.data.dataset import Data, Split
from trimtab.learn import evaluate, fit
from trimtab.models import create_model
from trimtab.models.classify.mamba_survey import S4D
from trimtab.nn.scan import count_scans, merge, scan_by, selective_scan, step_by_step, unroll
from trimtab.nn.ssm import S6, SS2D

LEVEL = 4
PAPER: dict[str, tuple[int, int, int, float]] = {  # channels, image size, parameters, GMACs
    "vim_tiny": (3, 224, 7_148_008, 1.2929),
    "vim_small": (3, 224, 25_796_584, 4.8517),
    "vmamba_tiny_v0": (3, 224, 22_893_448, 3.6770),
    "vmamba_tiny": (3, 224, 30_249_064, 4.8126),
    "vmamba_tiny_s2l5": (3, 224, 30_705_832, 4.7162),
    "vmamba_small": (3, 224, 50_147_752, 8.4990),
    "vm_unet": (3, 256, 27_427_561, 5.2884),
    "vm_unet_large": (3, 256, 44_273_833, 9.7368),
    "u_mamba_bot": (1, 256, 47_514_892, 26.2202),
    "u_mamba_enc": (1, 256, 46_387_532, 27.4416),
}
SCANS = ("unidi", "bidi", "cross2d")
UNETS = {
    "plain U-Net": "u_net_nano_32",
    "hybrid (U-Mamba Bot)": "u_mamba_bot_nano_32",
    "pure (VM-UNet)": "vm_unet_nano_32",
}
DIM = 64
SCAN_MACS = 4.5  # 9 FLOPs for each length x channels x states


def run(context: Context) -> list[ClaimResult]:
    return [_linear(context), _scans(context), _families(context), _exact(context)]


class Attention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))


class OnImage(nn.Module):
    """Lets `measure`, which gives images (B, C, H, W), measure a mixer of (B, L, D) or (B, H, W, D)."""

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return self.mixer(x if isinstance(self.mixer, SS2D) else x.flatten(1, 2))


def _linear(context: Context) -> ClaimResult:
    lengths = context.choose(full=(256, 1024, 4096, 16384), smoke=(64, 256))
    macs: dict[str, list[float]] = {}
    took: dict[str, list[float]] = {}
    for name, mixer in {"attention": Attention(DIM), "S6": S6(DIM), "SS2D": SS2D(DIM)}.items():
        net = OnImage(mixer).eval()
        for length in lengths:
            side = math.isqrt(length)
            x = torch.randn(1, DIM, side, side)
            cost = measure(net, (DIM, side, side), what=("macs",))
            with count_scans() as counted, torch.inference_mode():
                net(x)
            times = []
            for _ in range(3):
                start = time.perf_counter()
                with torch.inference_mode():
                    net(x)
                times.append(time.perf_counter() - start)
            assert cost.macs is not None
            macs.setdefault(name, []).append(cost.macs + SCAN_MACS * sum(counted))
            took.setdefault(name, []).append(statistics.median(times))
    grow = {n: {"work": _slope(lengths, macs[n]), "time": _slope(lengths, took[n])} for n in macs}
    crossing = {n: next((length for length, a, b in zip(lengths, macs["attention"], macs[n]) if a > b), None)
                for n in ("S6", "SS2D")}  # fmt: skip
    holds = all(abs(grow[n]["work"] - 1) < 0.01 for n in ("S6", "SS2D")) and grow["attention"]["work"] > 1.8
    return ClaimResult(
        "linear", holds,
        {"slope": {n: grow[n] for n in ("S6", "SS2D")}, "work": {n: macs[n] for n in ("S6", "SS2D")},
         "seconds": {n: took[n] for n in ("S6", "SS2D")}, "first length of less work": crossing},
        {"slope": grow["attention"], "work": macs["attention"], "seconds": took["attention"]},
        data=f"{DIM} channels, {', '.join(map(str, lengths))} tokens",
        note="Slopes of log work and of log time between the two longest. Work: MACs, and 4.5 for each state and step. "
        "The slope of attention's work nears 2 where projections no longer count. Decided by the work.",
    )  # fmt: skip


def _slope(lengths: tuple[int, ...], values: list[float]) -> float:
    return round(math.log(values[-1] / values[-2]) / math.log(lengths[-1] / lengths[-2]), 3)


def vmamba(scan: str, goal: int, **shape: Any) -> nn.Module:
    """The small VMamba whose MLPs give it nearly `goal` parameters."""
    ratios = [r / 8 for r in range(14, 26)]
    classes = {k: v for k, v in shape.items() if k != "seed"}

    def size(ratio: float) -> int:
        with torch.device("meta"):
            net = timm.create_model("vmamba_nano_32", scan=scan, mlp_ratio=ratio, **classes)
        return abs(sum(p.numel() for p in net.parameters()) - goal)

    return create_model("vmamba_nano_32", scan=scan, mlp_ratio=min(ratios, key=size), **shape)


def _scans(context: Context) -> ClaimResult:
    epochs, images = context.choose(full=6, smoke=1), context.choose(full=1500, smoke=64)
    scores: dict[str, list[dict[str, float]]] = {}
    params: dict[str, int] = {}
    data: Any = None
    for seed in context.each_seed("scans"):
        data = context.load_data(default="digits", limit=4000, image_size=24, seed=seed)
        data = data.subset({"train": min(images, len(data.splits["train"]))}, seed=seed)
        for scan in SCANS:
            context.say(f"seed {seed}: {scan}")
            net = vmamba(scan, 95_000, num_classes=data.num_classes, in_chans=data.in_chans, seed=seed)
            params[scan] = sum(p.numel() for p in net.parameters())
            fit(net, data, epochs=epochs, batch_size=64, opt="adamw", lr=3e-3, seed=seed, val=None, progress=False,
                device=context.device)  # fmt: skip
            scores.setdefault(scan, []).append(evaluate(net, data, "test", device=context.device))
    mean = {k: statistics.fmean(s["accuracy"] for s in v) for k, v in scores.items()}
    table = {k: {"accuracy": stats(s["accuracy"] for s in v), "loss": stats(s["loss"] for s in v), "params": params[k]}
             for k, v in scores.items()}  # fmt: skip
    return ClaimResult(
        "scans", mean["cross2d"] >= mean["bidi"] >= mean["unidi"],
        {"cross2d": table["cross2d"]}, {k: table[k] for k in ("bidi", "unidi")}, context.seeds,
        f"{data.name} at 24 x 24, {len(data.splits['train'])} training images, {epochs} epochs",
        "By mean test accuracy. The depthwise convolutions of the mixers and those between the stages look in all "
        "directions too, which leaves less to the scan.",
    )  # fmt: skip


def scenes(count: int, seed: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 of three digits each on noise, and maps (N, 32, 32): 0 or the digit + 1."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(seed)
    pictures, maps = np.empty((count, 3, 32, 32), np.uint8), np.zeros((count, 32, 32), np.int64)
    half = len(digits.images) // 2
    for image, labels in zip(pictures, maps):
        image[:] = rng.integers(0, 90, (3, 32, 32))
        for corner in rng.choice(4, 3, replace=False):
            i = first * half + int(rng.integers(half))
            ink = digits.images[i].repeat(2, 0).repeat(2, 1)[1:15, 1:15]
            top, left = 16 * (corner // 2) + int(rng.integers(3)), 16 * (corner % 2) + int(rng.integers(3))
            on = ink > 6
            image[:, top : top + 14, left : left + 14][:, on] = (ink[on] * 10 + 80).astype(np.uint8)
            labels[top : top + 14, left : left + 14][on] = digits.target[i] + 1
    return torch.from_numpy(pictures), torch.from_numpy(maps)


def _families(context: Context) -> ClaimResult:
    from torchmetrics.classification import MulticlassJaccardIndex

    epochs, images = context.choose(full=8, smoke=1), context.choose(full=500, smoke=32)
    scores: dict[str, list[float]] = {}
    costs: dict[str, Any] = {}
    for seed in context.each_seed("families"):
        splits = {"train": Split(*scenes(images, seed)), "test": Split(*scenes(images // 2, 1000 + seed, first=1))}
        data = Data("scenes of digits", splits, ["nothing", *map(str, range(10))])
        for what, name in UNETS.items():
            context.say(f"seed {seed}: {what}")
            net = create_model(name, num_classes=11, seed=seed)
            fit(net, data, epochs=epochs, batch_size=32, opt="adamw", lr=3e-3, seed=seed, val=None, augment="none",
                progress=False, device=context.device)  # fmt: skip
            iou = MulticlassJaccardIndex(num_classes=11).to(context.device)
            scores.setdefault(what, []).append(
                evaluate(net, data, "test", device=context.device, metrics={"iou": iou})["iou"]
            )
            cost = measure(net.cpu(), (3, 32, 32), what=("params", "macs"))
            costs[what] = {"params": cost.params, "macs": cost.macs}
    plain, hybrid, pure = UNETS
    mean = {k: statistics.fmean(v) for k, v in scores.items()}
    table = {k: {"mean IoU": stats(v), **costs[k]} for k, v in scores.items()}
    return ClaimResult(
        "families", mean[hybrid] >= mean[plain] and mean[hybrid] >= mean[pure],
        {hybrid: table[hybrid]}, {plain: table[plain], pure: table[pure]}, context.seeds,
        f"{images} training scenes of real digits, 32 x 32, 11 classes per pixel, {epochs} epochs",
        "By mean IoU on scenes of other digits. Scenes are put together, because `load_data` reads no maps. The "
        "deepest map, which the hybrid mixes, is 4 x 4 here: a short sequence for what is made for long ones.",
    )  # fmt: skip


@torch.no_grad()
def _exact(context: Context) -> ClaimResult:
    sizes, want = {}, {}
    for name in context.choose(full=list(PAPER), smoke=["vmamba_tiny"]):
        chans, side, params, gmacs = PAPER[name]
        with torch.device("meta"):
            net = timm.create_model(name, in_chans=chans)
        cost = measure(net, (chans, side, side), what=("params", "macs"))
        assert cost.macs is not None
        sizes[name] = {"params": cost.params, "gmacs": round(cost.macs / 1e9, 4)}
        want[name] = {"params": params, "gmacs": gmacs}
    torch.manual_seed(0)
    parts = [torch.randn(1, 2, 1024, 24), torch.rand(1, 2, 1024, 24) * 0.1, -torch.rand(2, 16, 24) * 16,
             torch.randn(1, 2, 1024, 16), torch.randn(1, 2, 1024, 16)]  # fmt: skip
    exact = step_by_step(*(p.double() for p in parts))
    off = {}
    for way in ("kernel", "chunks"):
        with scan_by(way):
            off[f"scan by {way}"] = ((selective_scan(*parts) - exact).abs().max() / exact.abs().max()).item()
    layer, u, h, y = S4D(8, state=16), torch.randn(2, 64, 8), torch.zeros(2, 8, 8, dtype=torch.complex64), []
    rate = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    decay = (layer.log_dt.exp()[:, None] * rate).exp()
    for t in range(64):
        h = decay * h + (decay - 1) / rate * u[:, t, :, None]
        y.append(2 * (torch.view_as_complex(layer.C) * h).sum(-1).real + layer.D * u[:, t])
    off["S4D: convolution and recurrence"] = (layer.ssm(u) - torch.stack(y, 1)).abs().max().item()
    x = torch.randn(1, 30, 4)
    off["cross2d: merged, 4x"] = (merge(unroll(x, "cross2d", 5, 6), "cross2d", 5, 6) - 4 * x).abs().max().item()
    return ClaimResult(
        "exact", sizes == want and max(off.values()) < 5e-6, {"difference": off, "sizes": sizes}, {"sizes": want}
    )
