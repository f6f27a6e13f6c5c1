"""BitNet b1.58 Reloaded: ternary against float at equal size, wide ternary language models, outliers, stored bytes.

A perceptron of 105 k parameters on digits, a convolutional net of 109 k on CIFAR-10 (or ``--data``), and a character
model on Shakespeare's plays, where `tinyshakespeare.txt` lies beside the data, or else on Python's reference manual.
Learning rates are chosen on the validation split of the first seed, for float and ternary alike. On one core of a CPU,
three seeds take about five minutes.
"""

from __future__ import annotations

import copy
import importlib
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from evidence.runner import ClaimResult, Context, stats
from trimtab.compress.quantize.bitnet_reloaded import BitLayer, bitnet_reloaded, packed, scale_of
from trimtab.learn import fit

LEVEL = 4
POINT = 0.01  # of accuracy
MEASURES = ("median", "mean")


def run(context: Context) -> list[ClaimResult]:
    tasks = {"perceptron, digits": partial(_digits, context), "convolutional net": partial(_images, context)}
    found = {name: _trained(context, name, make) for name, make in tasks.items()}
    return [_parity(context, found), _language(context), _median(context, found), _storage()]


# ------------------------------------------------------------------------------------------------------------- vision


def _digits(context: Context, seed: int) -> tuple[Any, nn.Module, dict[str, Any]]:
    data = tt.load_data("digits", seed=seed, limit=context.choose(full=None, smoke=256))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 288), nn.ReLU(), nn.Linear(288, 288), nn.ReLU(), nn.Linear(288, 10)
        )
    return data, net, {"skip": (), "epochs": context.choose(full=25, smoke=1), "lrs": (1e-3, 4e-3)}


def _images(context: Context, seed: int) -> tuple[Any, nn.Module, dict[str, Any]]:
    data = context.load_data(limit=2000, seed=seed)
    shape = {"num_classes": data.num_classes, "in_chans": data.in_chans, "img_size": data.size}
    net = tt.create_model("trim_net", width=18, stem_stride=2, seed=seed, **shape)
    return data, net, {"skip": None, "epochs": context.choose(full=8, smoke=1), "lrs": (2e-3, 6e-3)}


def _trained(context: Context, task: str, make: Any) -> dict[str, Any]:
    """Test accuracy by seed of the float net and of both ternary ones, each with the better learning rate."""
    accuracy: dict[str, list[float]] = {}
    loss: dict[str, list[float]] = {}
    chosen: dict[str, float] = {}
    for seed in context.each_seed(task):
        data, start, given = make(seed)
        given |= {"seed": seed, "device": context.device}
        for kind in ("float", *MEASURES):
            lrs = (chosen[kind],) if kind in chosen else given["lrs"]
            trials = {lr: _train(kind, start, data, lr, given) for lr in lrs}
            # on the validation split of the first seed
            chosen[kind] = max(lrs, key=lambda lr: tt.evaluate(trials[lr], data, "val")["accuracy"])
            model = trials[chosen[kind]]
            accuracy.setdefault(kind, []).append(tt.evaluate(model, data, "test")["accuracy"])
            loss.setdefault(kind, []).append(tt.evaluate(model, data, "train")["loss"])
            context.say(f"{task}, seed {seed}: {kind} {accuracy[kind][-1]:.4f}")
    table = {k: stats(v) | {"train_loss": stats(loss[k])["mean"], "lr": chosen[k]} for k, v in accuracy.items()}
    return {"table": table, "data": f"{data.name}, {len(data.splits['train'])} training images"}


def _train(kind: str, start: nn.Module, data: Any, lr: float, given: dict[str, Any]) -> nn.Module:
    settings = {k: given[k] for k in ("epochs", "seed", "device")} | {"batch_size": 64, "val": None, "progress": False}
    if kind == "float":
        return fit(copy.deepcopy(start), data, lr=lr, opt="adamw", **settings).model
    return bitnet_reloaded(start, data, measure=kind, skip=given["skip"], lr=lr, **settings)


def _parity(context: Context, found: dict[str, Any]) -> ClaimResult:
    worst = min(r["table"]["median"]["mean"] - r["table"]["float"]["mean"] for r in found.values())
    return ClaimResult(
        "vision_parity",
        worst >= -POINT,
        {name: {k: r["table"][k] for k in MEASURES} for name, r in found.items()},
        {name: {"float": r["table"]["float"]} for name, r in found.items()},
        context.seeds,
        "; ".join(r["data"] for r in found.values()),
        f"Largest loss of the median variant against float: {-100 * worst:.2f} points. "
        "Convolutions are ternary too; the first and the last layer of the convolutional net are float.",
    )


def _median(context: Context, found: dict[str, Any]) -> ClaimResult:
    changed = {m: _changed(m) for m in MEASURES}
    apart = max(abs(r["table"]["median"]["mean"] - r["table"]["mean"]["mean"]) for r in found.values())
    return ClaimResult(
        "median",
        apart <= POINT and abs(changed["mean"] - 0.14) < 0.01 and changed["median"] < 0.005,
        {"accuracy apart": round(apart, 5), "codes changed by outliers": round(changed["median"], 5)},
        {"codes changed by outliers": round(changed["mean"], 5)},
        context.seeds,
        "; ".join(r["data"] for r in found.values()),
        "Outliers: a random hundredth of 512x512 Gaussian weights times 50; codes of the others that change.",
    )


def _changed(measure: str) -> float:
    generator = torch.Generator().manual_seed(0)
    w, hit = torch.randn(512, 512, generator=generator), torch.rand(512, 512, generator=generator) < 0.01
    big = torch.where(hit, 50 * w, w)
    before, after = ((v * scale_of(v, measure)).round().clamp(-1, 1) for v in (w, big))
    return (before != after)[~hit].double().mean().item()


# ----------------------------------------------------------------------------------------------------------- language


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Language(nn.Module):
    """A causal transformer over characters: (B, N) -> (B, N, symbols)."""

    def __init__(self, symbols: int, width: int, length: int):
        super().__init__()
        self.embed, self.place = nn.Embedding(symbols, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(_Block(width, 4) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.place[: x.shape[1]])))


def _text(context: Context) -> tuple[str, str]:
    file = Path(context.data).resolve().parent / "tinyshakespeare.txt" if context.data else None
    if file is not None and file.is_file():
        return "tinyshakespeare", file.read_text(encoding="utf-8")
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "Python's reference manual", "\n".join(topics[k] for k in sorted(topics))[:1_000_000]


def _language(context: Context) -> ClaimResult:
    name, text = _text(context)
    symbols = sorted(set(text))
    codes = torch.tensor([symbols.index(c) for c in text[: context.choose(full=1_000_000, smoke=20_000)]])
    train, test = codes[: int(0.9 * len(codes))], codes[int(0.9 * len(codes)) :]
    steps, width = context.choose(full=500, smoke=2), 32
    kinds = {
        "float, width 32": (width, False),
        "ternary, width 32": (width, True),
        "ternary, width 64": (2 * width, True),
    }
    perplexity: dict[str, list[float]] = {}
    for seed in context.each_seed("characters"):
        for kind, (size, ternary) in kinds.items():
            perplexity.setdefault(kind, []).append(_perplexity(train, test, len(symbols), size, ternary, seed, steps))
            context.say(f"characters, seed {seed}: {kind} {perplexity[kind][-1]:.3f}")
    table = {k: stats(v) for k, v in perplexity.items()}
    base, same, wide = (table[k]["mean"] for k in kinds)
    return ClaimResult(
        "language_width",
        wide <= 1.02 * base and same > 1.02 * base,
        {k: table[k] for k in list(kinds)[1:]},
        {"float, width 32": table["float, width 32"]},
        context.seeds,
        f"{name}, {len(train)} characters, {steps} steps of 24 x 64",
        "Perplexity per character. Attention and perceptron layers are ternary, embedding and head float; no norm "
        "inside the ternary layers that follow a norm. Margin 2 %.",
    )


def _perplexity(
    train: Tensor, test: Tensor, symbols: int, width: int, ternary: bool, seed: int, steps: int, length: int = 64
) -> float:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: nn.Module = _Language(symbols, width, length)
    if ternary:
        net = bitnet_reloaded(net, None, kinds=("linear",), skip=("head",), norm=False, storage=None, epochs=0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)

    def loss_at(starts: Tensor, text: Tensor) -> Tensor:
        rows = text[starts[:, None] + torch.arange(length + 1)]
        return F.cross_entropy(net(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    for _ in range(steps):
        loss = loss_at(torch.randint(len(train) - length - 1, (24,), generator=generator), train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        starts = torch.arange(0, min(len(test) - length - 1, 500 * length), length)
        return math.exp(sum(loss_at(s, test).item() * len(s) for s in starts.split(100)) / len(starts))


# ------------------------------------------------------------------------------------------------------------ storage


def _storage() -> ClaimResult:
    """Bytes of one 512x512 layer on disk, and the integer product against the layer in training."""
    torch.manual_seed(0)
    net = nn.Sequential(BitLayer((512, 512), bias=False))
    x = torch.randn(64, 512)
    codes, s_w = net[0].codes()  # type: ignore[operator]
    normed = F.layer_norm(x, (512,))
    s_x = 128 / normed.abs().amax(-1, keepdim=True)
    sums = torch._int_mm((normed * s_x).round().clamp(-128, 127).to(torch.int8), codes.T.contiguous())
    with torch.no_grad():
        fake = net(x)
        differ = {"integer": (sums / (s_w * s_x) - fake).abs().max().item()}
        sizes = {}
        for storage in ("2-bit", "base-3"):
            small = packed(net, storage=storage)
            differ[storage] = (small(x) - fake).abs().max().item()
            sizes[storage] = tt.measure(small, (512,), what="size").size
            with tempfile.TemporaryDirectory() as folder:
                file = tt.save(small, folder) / "model.safetensors"
                header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
                assert file.stat().st_size - header == sizes[storage]
    want = {"2-bit": 65_536 + 4, "base-3": 52_429 + 4}  # the codes and their scale
    return ClaimResult(
        "storage",
        sizes == want and not any(differ.values()),
        {"bytes": sizes, "largest difference from the trained layer": differ},
        {"bytes": {"float32": 512 * 512 * 4, **want}},
        data="one layer, 512 x 512",
        note="Bytes of the tensors in the file, its header apart; integer accumulation by torch._int_mm.",
    )
