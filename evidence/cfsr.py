"""CFSR: exact sizes, merging, the authors' files where they are at hand, and small networks trained on T91.

`--data` is the folder with sr_t91 and sr_set5, or sr_t91 in it. If the authors' weights (CFSR_x2.pth, CFSR_x3.pth,
CFSR_x4.pth) lie in a folder `cfsr` there, they are measured on Set5. Two small networks (`cfsr_tiny`, x2) are trained
alike on patches of T91: with edge filters in the feed-forward parts, and with plain 3x3 kernels, which cost the same
once merged. Three seeds take about five minutes of one CPU core.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evidence._super_resolution import Cubic, folder, scores, testing, training
from evidence.runner import ClaimResult, Context, stats
from trimtab.compress import merge
from trimtab.core.cost import measure
from trimtab.learn import Restore, fit
from trimtab.models import create_model
from trimtab.models.restore.cfsr import EdgeConv, load_released

LEVEL = 4
PARAMS = {2: (298_236, 291_324), 3: (304_731, 297_819), 4: (313_824, 306_912)}  # in training, merged
MACS = {2: (360, 640, 65.06), 3: (240, 426, 29.53), 4: (180, 320, 17.16)}  # height, width of the small picture, G
RELEASED = {2: (38.07, 0.9607), 3: (34.50, 0.9279), 4: (32.33, 0.8964)}  # Set5
SHUFFLEMIXER = 394_000  # parameters for x2, as published
NETS: dict[str, dict[str, Any]] = {"edges": {"deploy": False}, "plain": {"deploy": True}}
SCALE = 2


def run(context: Context) -> list[ClaimResult]:
    return [_psnr(context), _params(), _merging(), _shufflemixer()]


def _psnr(context: Context) -> ClaimResult:
    """The authors' weights on Set5, if there are any, and what this code trains by itself."""
    released: dict[str, Any] = {}
    root = folder(context)
    for scale in RELEASED:
        file = root / "cfsr" / f"CFSR_x{scale}.pth" if root is not None else None
        if file is not None and file.is_file():
            context.say(f"the authors' x{scale}")
            tests = testing(context, scale=scale, in_chans=3)
            released[f"x{scale}"] = scores(load_released(file), tests, context.device)["Set5"]
    right = all(
        abs(got["psnr"] - RELEASED[int(x[1:])][0]) <= 0.02 and abs(got["ssim"] - RELEASED[int(x[1:])][1]) <= 0.0005
        for x, got in released.items()
    )
    exact = all(_giga(scale) == MACS[scale][2] for scale in MACS)
    tests = testing(context, scale=SCALE, in_chans=3)
    cubic, trained, where = scores(Cubic(SCALE), tests), *_trained(context, tests)
    first = next(iter(tests))
    mean = {name: statistics.fmean(r[first]["psnr"] for r in rows) for name, rows in trained.items()}
    gains = {name: value - cubic[first]["psnr"] for name, value in mean.items()}
    files = (
        "The authors' files are measured on low-resolution pictures made here (anti-aliased cubic, 8 bits)."
        if released
        else "The authors' files were not at hand, so their PSNR was not measured again; the costs are exact."
    )
    return ClaimResult(
        "real_psnr",
        exact and right and min(gains.values()) > 1.5,
        {"authors' weights": released, "G MACs": {f"x{s}": _giga(s) for s in MACS}}
        | {f"cfsr_tiny, {name}": _table(rows, tests) for name, rows in trained.items()},
        {"paper": {f"x{s}": {"psnr": p, "ssim": q} for s, (p, q) in RELEASED.items()}, "cubic": cubic},
        context.seeds,
        where,
        f"{files} Trained here, x2 on {first}: {gains['edges']:+.2f} dB against the cubic with edge filters, "
        f"{gains['plain']:+.2f} dB with plain kernels, at equal cost once merged.",
    )


def _trained(context: Context, tests: dict[str, Any]) -> tuple[dict[str, list[Any]], str]:
    epochs = context.choose(full=5, smoke=1)
    found: dict[str, list[Any]] = {name: [] for name in NETS}
    data: Any = None
    for seed in context.each_seed("with edges and without"):
        data = training(context, scale=SCALE, in_chans=3, patch=16, seed=seed)
        for name, arguments in NETS.items():
            context.say(f"seed {seed}: {name}")
            net = create_model("cfsr_tiny", **arguments, seed=seed)
            fit(net, data, Restore(loss="l1"), epochs=epochs, batch_size=8, lr=5e-3, weight_decay=0.0, seed=seed,
                val=None, progress=False, device=context.device)  # fmt: skip
            found[name].append(scores(net if arguments["deploy"] else merge(net.cpu()), tests, context.device))
    return found, f"{data.name}, {len(data.splits['train'].which)} pictures, {epochs} epochs"


def _table(rows: list[Any], tests: dict[str, Any]) -> dict[str, Any]:
    return {t: {m: stats(r[t][m] for r in rows) for m in ("psnr", "ssim")} for t in tests}


def _giga(scale: int) -> float:
    height, width, _ = MACS[scale]
    cost = measure(create_model(f"cfsr_x{scale}", deploy=True), (3, height, width), what="macs")
    return round((cost.macs or 0) / 1e9, 2)


def _params() -> ClaimResult:
    with torch.device("meta"):
        nets = {s: [create_model(f"cfsr_x{s}", deploy=deploy) for deploy in (False, True)] for s in PARAMS}
    got = {s: tuple(sum(p.numel() for p in net.parameters()) for net in pair) for s, pair in nets.items()}
    kept = {len(pair[1].state_dict()) for pair in nets.values()}
    words = ("in training", "merged")
    return ClaimResult(
        "params",
        got == PARAMS and kept == {252},
        {f"x{s}": dict(zip(words, n)) for s, n in got.items()},
        {f"x{s}": dict(zip(words, n)) for s, n in PARAMS.items()},
        note="The merged form has the 252 tensors of the authors' files.",
    )


def _merging() -> ClaimResult:
    """A whole network whose edge filters, shifts and scales are drawn from N(0, 1), and one layer as four branches."""
    generator = torch.Generator().manual_seed(0)
    net = create_model("cfsr_x2", seed=0).eval()
    for name, p in net.named_parameters():
        if name.endswith(("strength", "shift", "gamma")):
            nn.init.normal_(p, generator=generator)
    x = torch.rand(1, 3, 24, 24, generator=generator)
    off = {}
    with torch.no_grad():
        off["network, float32"] = _off(merge(net)(x), net(x))
        net, x = net.double(), x.double()
        off["network, float64"] = _off(merge(net)(x), net(x))
        layer: Any = next(m for m in net.modules() if isinstance(m, EdgeConv))
        h = torch.randn(1, 96, 24, 24, generator=generator, dtype=torch.float64)
        branches = F.conv2d(h, layer.weight, layer.bias, padding=1, groups=96)
        for fixed, strength, shift in zip(layer.edges, layer.strength, layer.shift):
            kernel = strength.view(-1, 1, 1, 1) * fixed
            branches = branches + F.conv2d(h, kernel, shift, padding=1, groups=96)
        off["layer against four branches, float64"] = _off(merge(nn.Sequential(layer))(h), branches)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (layer, merge(nn.Sequential(layer)))]
    return ClaimResult(
        "reparam",
        off["network, float32"] < 1e-5 and max(v for k, v in off.items() if "64" in k) < 1e-12
        and sizes[0] - sizes[1] == 576,
        off | {"parameters less, per block": sizes[0] - sizes[1]},
        {"parameters less, per block": 576},
        note="Largest difference of the outputs, relative to the largest output.",
    )  # fmt: skip


def _off(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def _shufflemixer() -> ClaimResult:
    with torch.device("meta"):
        params = sum(p.numel() for p in create_model("cfsr_x2", deploy=True).parameters())
    ratio = params / SHUFFLEMIXER
    return ClaimResult(
        "cheaper_than_shufflemixer",
        round(ratio, 2) == 0.74,
        {"params": params, "ratio": round(ratio, 3)},
        {"ShuffleMixer, as published": SHUFFLEMIXER},
        note="Parameters only: Urban100 was not measured, and ShuffleMixer's operations are not counted here.",
    )
