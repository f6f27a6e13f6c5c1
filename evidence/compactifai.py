"""CompactifAI on a ViT (CIFAR-10) and on a character model (tiny Shakespeare), both trained on the spot.

70 % of the truncatable weights are removed by matrix product operators of two sites, chi from the sensitivity profile,
then healed. Compared at equal parameters with the plain SVD and magnitude pruning, healed alike, and with the same
operators trained from random cores. On one core, three seeds take about seven minutes.

The profile of the language model in the docs is that of seed 0, drawn by
``python -m evidence.compactifai tinyshakespeare.txt docs/images/sensitivity.svg``.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from evidence.runner import ClaimResult, Context, stats
from trimtab.compress import compactifai, magnitude
from trimtab.compress.factorize.compactifai import Profile, sensitivity, trainable
from trimtab.learn import evaluate, fit
from trimtab.models import create_model
from trimtab.nn.structured import StructuredLinear, balanced_sites, core_params, spectra
from trimtab.report import sensitivity_svg

LEVEL = 4
REMOVED = 0.7  # of the weights of attention and MLP
WITHIN = 0.03  # accuracy
HEAL: dict[str, Any] = {
    "lr": 1e-3,
    "opt": "adamw",
    "weight_decay": 0.0,
    "sched": "cosine",
    "batch_size": 64,
    "val": None,
}
TEXT = "tinyshakespeare.txt"  # beside the images


class CharGPT(nn.Module):
    """A small GPT over characters: (B, T) indices -> (B, T, characters) logits."""

    def __init__(self, characters: int, *, width: int = 48, depth: int = 4, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, width)
        self.place = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token(x) + self.place[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Pre-norm causal attention and MLP: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def run(context: Context) -> list[ClaimResult]:
    runs: dict[str, list[dict[str, Any]]] = {"vit": [], "lm": []}
    where = ""
    for seed in context.each_seed():
        vit, images = _vit(context, seed)
        lm, text = _lm(context, seed)
        runs["vit"].append(vit)
        runs["lm"].append(lm)
        where = f"{images}; {text}"
    table = {net: {k: stats(r[k] for r in rows) for k in rows[0]} for net, rows in runs.items()}
    means = {net: {k: v["mean"] for k, v in rows.items()} for net, rows in table.items()}

    def columns(*names: str) -> dict[str, Any]:
        return {net: {n: rows[n] for n in names if n in rows} for net, rows in table.items()}

    lost = {net: m["whole"] - m["healed"] for net, m in means.items()}
    exact = core_params((6,) * 3, (6,) * 3, (5, 5)) == 1260 and core_params((64,) * 2, (64,) * 2, (614,)) == 8192 * 614
    monotone = all(r["sweep_monotone"] for rows in runs.values() for r in rows)
    recovered = {
        net: (m["healed"] - m["truncated"]) / max(m["whole"] - m["truncated"], 1e-9) for net, m in means.items()
    }
    beats = {net: m["healed"] >= m["random_cores"] for net, m in means.items()}
    sign = {net: m["depth_correlation"] for net, m in means.items()}
    order = sorted(("healed", "svd", "pruned"), key=lambda k: -means["vit"][k])
    return [
        ClaimResult(
            "correlation_space",
            exact and monotone and all(v <= WITHIN for v in lost.values()),
            columns("healed", "params", "error", "error_shuffled"),
            columns("whole", "params_whole", "svd", "pruned"),
            context.seeds,
            where,
            f"Accuracy (of the next character for the language model) with {REMOVED:.0%} of the attention and MLP "
            f"weights removed; lost: {_said(lost)}. Best of the three at equal parameters on the ViT: "
            f"{', '.join(_WORDS[k] for k in order)} (the pruned net heals all its weights, the others their cores). "
            "No quantisation here.",
        ),
        ClaimResult(
            "healing",
            all(v > 0.5 for v in recovered.values()) and all(beats.values()),
            columns("healed", "truncated"),
            columns("whole", "random_cores"),
            context.seeds,
            where,
            f"Only cores are trained, for three quarters of an epoch (ViT) and 200 steps (language model). Share of "
            f"the truncation loss recovered: {_said(recovered)}.",
        ),
        ClaimResult(
            "sensitivity",
            all(v < 0 for v in sign.values()),
            columns("depth_correlation", "first_half_drop", "last_half_drop"),
            {},
            context.seeds,
            where,
            "Rank correlation of a block's depth with the rise of the loss when one of its layers is truncated to "
            f"chi = {CHI}: {_said(sign)}; negative means that deeper layers bear more.",
        ),
    ]


_WORDS = {"healed": "matrix product operator", "svd": "plain SVD", "pruned": "magnitude pruning"}
CHI = 4


def _said(values: dict[str, float]) -> str:
    return ", ".join(f"{net} {value:+.3f}" for net, value in values.items())


def _vit(context: Context, seed: int) -> tuple[dict[str, Any], str]:
    images, epochs = context.choose(full=5000, smoke=64), context.choose(full=8, smoke=1)
    data = context.load_data(limit=6000, seed=seed)
    data = data.subset(
        {"train": min(images, len(data.splits["train"])), "test": min(2000, len(data.splits["test"]))}, seed=seed
    )
    few = data.subset({"train": len(data.splits["train"]) * 3 // 4}, seed=seed)  # healing takes less than one epoch
    shape: dict[str, Any] = {
        "num_classes": data.num_classes,
        "in_chans": data.in_chans,
        "img_size": data.size,
        "adapt": False,
    }
    patch, depth = context.choose(full=8, smoke=4), context.choose(full=6, smoke=2)
    shape |= {"patch_size": patch, "embed_dim": 64, "depth": depth, "num_heads": 4, "mlp_ratio": 2.0}
    net = create_model("vit_tiny_patch16_224", seed=seed, **shape)
    plain: dict[str, Any] = {"progress": False, "device": context.device, "seed": seed}
    context.say(f"seed {seed}: train the ViT")
    fit(net, data, epochs=epochs, **plain, **{**HEAL, "lr": 2e-3, "weight_decay": 0.05})

    def score(model: nn.Module) -> float:
        return evaluate(model, data, "test", device=context.device)["accuracy"]

    def heal(model: nn.Module, which: str = "cores") -> float:
        with trainable(model, which):
            fit(model, few, epochs=1, **plain, **{**HEAL, "batch_size": 32})
        return score(model)

    context.say(f"seed {seed}: profile and truncate the ViT")
    samples = context.choose(full=128, smoke=16)
    profile = sensitivity(net, data, chis=(1, 2, 4, 8, 16), samples=samples, seed=seed, progress=False)
    budget = _budget(net, profile)
    given: dict[str, Any] = {"budget": budget, "epochs": 0, "progress": False}
    small = compactifai(net, data, profile=profile, **given)
    context.say(f"seed {seed}: heal the ViT and its rivals")
    found = _common(net, small, profile, score, heal)
    found["svd"] = heal(compactifai(net, data, sites="lowrank", samples=samples, seed=seed, **given))
    found["pruned"] = heal(magnitude(net, data, budget=budget, scope="global"), "all")
    return found, f"{data.name}, {len(data.splits['train'])} training images"


def _lm(context: Context, seed: int, picture: str | None = None) -> tuple[dict[str, Any], str]:
    """What is measured of the language model, and on what; its profile is drawn into the file `picture` if given."""
    file = Path(context.data or "").parent / TEXT
    known = context.data is not None and file.is_file() and not context.smoke
    text = file.read_text(encoding="utf-8") if known else Path(__file__).read_text(encoding="utf-8")
    letters = {c: k for k, c in enumerate(sorted(set(text)))}
    codes = torch.tensor([letters[c] for c in text], device=context.device)
    cut = len(codes) * 9 // 10
    length, size = 64, context.choose(full=16, smoke=2)

    def batch(part: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = torch.randint(len(part) - length - 1, (count,), generator=generator).to(part.device)
        window = part[start[:, None] + torch.arange(length + 1, device=part.device)]  # (count, length + 1)
        return window[:, :-1], window[:, 1:]

    def train(model: nn.Module, steps: int, lr: float, which: str = "all") -> None:
        generator = torch.Generator().manual_seed(seed)
        with trainable(model, which) as params:
            optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
            for _ in range(steps):
                x, y = batch(codes[:cut], size, generator)
                optimizer.zero_grad()
                F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
                optimizer.step()
                schedule.step()

    held = batch(codes[cut:], context.choose(full=128, smoke=2), torch.Generator().manual_seed(0))
    seen = batch(codes[:cut], context.choose(full=24, smoke=2), torch.Generator().manual_seed(1))

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        return (model.eval()(held[0]).argmax(-1) == held[1]).float().mean().item()

    def heal(model: nn.Module) -> float:
        train(model.train(), context.choose(full=200, smoke=2), 2e-3, "cores")
        return score(model)

    context.say(f"seed {seed}: train the language model")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = CharGPT(len(letters)).to(context.device)
    train(net, context.choose(full=500, smoke=2), 5e-3)
    context.say(f"seed {seed}: profile, truncate and heal the language model")
    profile = sensitivity(
        net, chis=(1, 2, 4, 8, 16), progress=False,
        metric=lambda model: float(F.cross_entropy(model(seen[0]).flatten(0, 1), seen[1].flatten())),
    )  # fmt: skip
    if picture is not None:
        sensitivity_svg(profile.asdict(), picture, title="Loss added by truncating one layer")
    small = compactifai(net, seen[0], budget=_budget(net, profile), profile=profile, epochs=0, progress=False)
    return _common(net, small, profile, score, heal), f"{TEXT if known else 'this script'}, by characters"


def _common(
    net: nn.Module, small: nn.Module, profile: Profile, score: Callable[..., float], heal: Callable[..., float]
) -> dict[str, Any]:
    """What is measured of both networks."""
    random = copy.deepcopy(small)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in random.modules():
            if isinstance(layer, StructuredLinear):
                layer.reset_parameters()
    found = {"whole": score(net), "truncated": score(small)}
    found |= {"healed": heal(small), "random_cores": heal(random)}
    found |= {"params_whole": _params(net), "params": _params(small)}
    errors: dict[str, list[float]] = {}
    for row in profile.rows:
        errors.setdefault(row.layer, []).append(row.error)
    found["sweep_monotone"] = all(a >= b - 1e-6 for e in errors.values() for a, b in pairwise(e))
    found["error"], found["error_shuffled"] = _spectrum(net, list(profile.spectra))
    at = [(_block(row.layer), row.drop) for row in profile.rows if row.chi == CHI]
    depths, drops = [d for d, _ in at], [v for _, v in at]
    found["depth_correlation"] = float(spearmanr(depths, drops)[0])
    middle = (max(depths) + 1) / 2
    halves = [[v for d, v in at if (d >= middle) == late] for late in (False, True)]
    found["first_half_drop"], found["last_half_drop"] = (math.fsum(h) / len(h) for h in halves)
    return found


def _spectrum(net: nn.Module, layers: list[str]) -> tuple[float, float]:
    """Mean relative error at 30 % of the weights: of the trained matrices, and of the same with entries shuffled."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for name in layers:
        layer: Any = net.get_submodule(name)
        weight = layer.weight.detach().cpu()
        out_sites, in_sites = balanced_sites(*weight.shape)
        chi = int((1 - REMOVED) * weight.numel()) // core_params(out_sites, in_sites, (1,))
        shuffled = weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight)
        rows.append([float(spectra(w, out_sites, in_sites)[0][chi:].norm() / w.norm()) for w in (weight, shuffled)])
    return math.fsum(r[0] for r in rows) / len(rows), math.fsum(r[1] for r in rows) / len(rows)


def _budget(net: nn.Module, profile: Profile) -> str:
    linear = sum({row.layer: row.dense for row in profile.rows}.values())
    return f"params<={int(_params(net) - REMOVED * linear)}"


def _params(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def _block(layer: str) -> int:
    return int(layer.split(".")[1])


if __name__ == "__main__":
    _lm(Context("compactifai", data=sys.argv[1]), 0, picture=sys.argv[2])
