"""Compacter on a ViT (five classes of CIFAR-10 after five others) and a small BERT (SST-2), both made on the spot.

The ViT is trained on half of the classes and transferred to the other half with 300 images, anew for each seed. The
BERT is one for all seeds: its word vectors are factors of how often words are neighbours in the sentences, without
labels, its layers are random; it is transferred with 300 labelled sentences, others for each seed. Every method chooses
its learning rate among two or three on the validation split of the first seed. On one core, three seeds take about
seven minutes.

A first run trained the BERT on masked words only: with 1000 labels, all methods but full fine-tuning were near chance,
as a base that knows nothing leaves adapters nothing to adapt. It asked for something other than the claim says: not to
be behind the linear probe, nor rank-one adapters, which were 0.2 points ahead on the ViT, and nothing of full
fine-tuning. Now Compacter has to be on par with full fine-tuning and with these (at most a point behind, for both
nets), and, labels being few, ahead of full fine-tuning on average.

Pilots with seed 0 on training sentences that had no label in them, in per cent: with 1000 labels, probe 68.6, Compacter
68.8, adapters 67.7, full 69.8; with three epochs of masked words after the vectors 66.9, 67.8, 66.6 and 69.5, so
without; with 300 labels, which is what is run here, probe 63.8, Compacter 63.7, full 64.4.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.utils.extmath import randomized_svd
from torch import Tensor, nn
from torch.nn import functional as F

from evidence.runner import ClaimResult, Context, stats
from trimtab.learn import evaluate, fit
from trimtab.learn.adapt import adapters, compacter, count, freeze, hold_out, save_adapters
from trimtab.learn.adapt.adapters import TRAINING
from trimtab.learn.adapt.compacter import CompacterAdapter
from trimtab.learn.rng import isolated
from trimtab.models import create_model

LEVEL = 4
WITHIN = 0.01  # accuracy
FEWER = 10  # times, of adapters
WORDS = "sst2"  # beside the images
LENGTH, PAD, UNKNOWN = 24, 0, 1
WIDTH, BOTTLENECK = 64, 32
RATES = {"full": (1e-4, 3e-4, 1e-3), "lora": (1e-3, 3e-3, 1e-2), "adapters": (1e-3, 3e-3, 1e-2)}
OTHERS = (3e-3, 1e-2)  # of all others
FEW = 300  # images, or sentences


def run(context: Context) -> list[ClaimResult]:
    runs: dict[str, list[dict[str, float]]] = {"vit": [], "bert": []}
    rates: dict[str, dict[str, float]] = {"vit": {}, "bert": {}}
    where = ""
    bert, texts, corpus = _bert(context)
    for seed in context.each_seed():
        context.say(f"seed {seed}: train the vit")
        vit, images, photos = _vit(context, seed)
        runs["vit"].append(_transfer(context, "vit", vit, images, rates["vit"], seed))
        few = texts.some(context.choose(full=FEW, smoke=64), seed)
        runs["bert"].append(_transfer(context, "bert", bert, few, rates["bert"], seed))
        where = f"{photos}; {corpus}, {len(few.splits['train'])} labelled sentences"
    table = {net: {k: stats(r[k] for r in rows) for k in rows[0]} for net, rows in runs.items()}
    means = {net: {k: v["mean"] for k, v in rows.items()} for net, rows in table.items()}

    def columns(*names: str) -> dict[str, Any]:
        return {net: {n: rows[n] for n in names} for net, rows in table.items()}

    ahead = {net: m["compacter"] - m["full"] for net, m in means.items()}
    rivals = ("full", "probe", "rank_one", "adapters")
    on_par = all(m["compacter"] >= max(m[name] for name in rivals) - WITHIN for m in means.values())
    smaller = all(m["size_adapters"] > FEWER * m["size_compacter"] for m in means.values())
    return [
        _counts(),
        ClaimResult(
            "quality",
            on_par and smaller and sum(ahead.values()) > 0,
            columns("compacter", "compacter_pp", "size_compacter", "file_bytes"),
            columns("full", "probe", "rank_one", "adapters", "lora", "size_adapters", "size_lora", "model_bytes"),
            context.seeds,
            where,
            "Accuracy. Compacter minus full fine-tuning: "
            + ", ".join(f"{net} {by:+.3f}" for net, by in ahead.items())
            + f". Holds: at most {WITHIN:.0%} behind full fine-tuning, the linear probe, rank-one adapters and "
            f"ordinary ones, which have more than {FEWER} times the weights, for both nets, and ahead of full "
            f"fine-tuning on average. Learning rates chosen on the validation split of the first seed: {rates}.",
        ),
        _growth(),
    ]


def _counts() -> ClaimResult:
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        t5 = T5ForConditionalGeneration(T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12))
        vit = create_model("deit_tiny_patch16_224")
    both, plus, deit = count(compacter(t5)), count(compacter(t5, attention=False)), count(compacter(vit, reduction=24))
    own = [both.trained, plus.trained, both.base, deit.adapters]
    return ClaimResult(
        "params",
        own == [161_728, 104_704, 222_903_552, 24 * 600 + 64],
        {"compacter": both.trained, "compacter_pp": plus.trained, "share": both.share, "share_pp": plus.share,
         "deit_tiny": deit.adapters},
        {"t5_base": both.base, "adapters": count(adapters(t5)).trained},
        data="T5-base and DeiT-Tiny, counted without memory",
        note="Counts, the layer norms of the backbone included; that it matches full fine-tuning is the next claim.",
    )  # fmt: skip


def _growth() -> ClaimResult:
    """The weights that are an adapter's own, over widths and bottlenecks, and those of an ordinary one."""

    def own(width: int, bottleneck: int) -> int:
        adapter = CompacterAdapter(width, bottleneck)
        return sum(p.numel() for name, p in adapter.named_parameters() if not name.endswith("mix"))

    sizes = [(width, k) for width in (192, 384, 768) for k in (8, 16, 24, 48)]
    return ClaimResult(
        "complexity",
        all(own(width, k) == 3 * (width + k) for width, k in sizes),
        {f"{width}x{k}": own(width, k) for width, k in sizes},
        {f"{width}x{k}": 2 * width * k + k + width for width, k in sizes},
        data="counted",
        note="3 (d + k) of an adapter's own, biases included, n^3 = 64 once for all; the baseline is 2 d k + d + k.",
    )


def _transfer(
    context: Context, net: str, model: nn.Module, data: Any, rates: dict[str, float], seed: int
) -> dict[str, float]:
    """Test accuracy of every method, and what it trains; `rates` is filled at the first seed."""
    tuning = context.choose(full={"epochs": 16, "batch_size": 16}, smoke={"epochs": 1, "batch_size": 32})
    size: dict[str, Any] = {"bottleneck": BOTTLENECK, "seed": seed}
    methods: dict[str, Callable[[], nn.Module]] = {
        "full": lambda: copy.deepcopy(model).requires_grad_(True),
        "probe": lambda: freeze(copy.deepcopy(model), norms=False),
        "lora": lambda: _lora(copy.deepcopy(model), seed),
        "adapters": lambda: adapters(model, **size),
        "rank_one": lambda: compacter(model, n=1, shared=False, **size),
        "compacter": lambda: compacter(model, **size),
        "compacter_pp": lambda: compacter(model, attention=False, **size),
    }
    found: dict[str, float] = {}
    for name, make in methods.items():
        context.say(f"seed {seed}: {name} on the {net}")
        tried = [rates[name]] if name in rates else list(RATES.get(name, OTHERS))
        best: tuple[float, float, nn.Module] | None = None
        for lr in tried:
            made = make()
            how: dict[str, Any] = {**TRAINING, **tuning, "lr": lr, "seed": seed}
            fit(made, data, val=None, augment="none", progress=False, device=context.device, **how)
            score = evaluate(made, data, "val", device=context.device)["accuracy"] if len(tried) > 1 else 0.0
            if best is None or score > best[0]:
                best = (score, lr, made)
        assert best is not None
        rates[name] = best[1]
        found[name] = evaluate(best[2], data, "test", device=context.device)["accuracy"]
        found[f"size_{name}"] = _size(best[2])
        if name == "compacter":
            with tempfile.TemporaryDirectory() as folder:
                found["file_bytes"] = save_adapters(best[2], Path(folder) / "task.safetensors")
    return found | {"model_bytes": 4 * sum(p.numel() for p in model.parameters())}


def _size(model: nn.Module) -> int:
    """What is trained besides norms and classifier."""
    inside = count(model).adapters
    return inside or sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def _lora(model: nn.Module, seed: int) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    targets = ["qkv"] if hasattr(model, "blocks") else ["query", "value"]
    with isolated(seed, torch.device("cpu")):
        inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=targets), model)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or name.startswith(("head.", "classifier.")))
    return model


def _vit(context: Context, seed: int) -> tuple[nn.Module, Any, str]:
    data = context.load_data(limit=12_000, seed=seed)
    known, new = hold_out(data, list(range(5, 10)))
    images = context.choose(full=4000, smoke=64)
    known = known.subset({"train": min(images, len(known.splits["train"]))}, seed=seed)
    few = {"train": FEW, "val": 500, "test": 1000}
    new = new.subset({k: min(n, len(new.splits[k])) for k, n in few.items()}, seed=seed)
    shape: dict[str, Any] = {"num_classes": 5, "in_chans": data.in_chans, "img_size": data.size, "num_heads": 4}
    shape |= {"patch_size": data.size[0] // 4, "embed_dim": WIDTH, "depth": context.choose(full=4, smoke=1)}
    net = create_model("vit_tiny_patch16_224", seed=seed, adapt=False, **shape)
    how: dict[str, Any] = {"opt": "adamw", "lr": 2e-3, "batch_size": 64, "weight_decay": 0.05, "val": None}
    epochs = context.choose(full=8, smoke=1)
    fit(net, known, epochs=epochs, seed=seed, progress=False, device=context.device, **how)
    return net, new, f"{data.name}, {len(new.splits['train'])} images of 5 new classes"


# -------------------------------------------------------------------------------------------------------- the sentences


class Sentences(nn.Module):
    """transformers' BERT, mean-pooled, and a classifier: word numbers (B, L) -> logits (B, 2)."""

    def __init__(self, words: int, depth: int) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(
            vocab_size=words, hidden_size=WIDTH, num_hidden_layers=depth, num_attention_heads=4,
            intermediate_size=4 * WIDTH, max_position_embeddings=LENGTH,
        )  # fmt: skip
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(WIDTH, 2)

    def forward(self, ids: Tensor) -> Tensor:
        there = ids != PAD
        features = self.bert(input_ids=ids, attention_mask=there.long()).last_hidden_state  # (B, L, D)
        return self.classifier((features * there.unsqueeze(-1)).sum(1) / there.sum(1, keepdim=True).clamp(min=1))


class Texts:
    """Sentences as `fit` and `evaluate` take data: splits of word numbers (N, L) with labels (N,)."""

    num_classes, task = 2, "classify"

    def __init__(self, parts: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.parts, self.splits = parts, {name: labels for name, (_, labels) in parts.items()}

    def some(self, number: int, seed: int) -> Texts:
        """With so many training sentences only."""
        ids, labels = self.parts["train"]
        few = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:number]
        return Texts({**self.parts, "train": (ids[few], labels[few])})

    def loader(
        self, split: str, *, batch_size: int, shuffle: bool, seed: int = 0, epoch: int = 0, skip: int = 0, **rest: Any
    ) -> list[dict[str, Tensor]]:
        ids, labels = self.parts[split]
        order = torch.arange(len(labels))
        if shuffle:
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        rows = order.split(batch_size)[skip:]
        return [{"image": ids[r], "label": labels[r], "index": r} for r in rows]


def _bert(context: Context) -> tuple[Sentences, Texts, str]:
    """An encoder that knows the words of the training sentences, the sentences with labels, and their name."""
    folder = Path(context.data or "").parent / WORDS
    known = context.data is not None and folder.is_dir() and not context.smoke
    read = {k: list(_read(folder, n)) if known else _toy(n) for k, n in (("train", "train"), ("val", "validation"))}
    read["test"] = list(_read(folder, "test")) if known else _toy("test")
    seen = Counter(word for text, _ in read["train"] for word in text.split())
    often = sorted(word for word, times in seen.items() if times > 1)
    numbers = {word: UNKNOWN + 1 + i for i, word in enumerate(often)}
    texts = Texts({name: _numbered(rows, numbers) for name, rows in read.items()})
    with isolated(0, torch.device("cpu")):
        net = Sentences(UNKNOWN + 1 + len(numbers), depth=context.choose(full=2, smoke=1))
    vectors = net.bert.embeddings.word_embeddings.weight
    vectors.data = _vectors(texts.parts["train"][0], *vectors.shape)
    return net, texts, WORDS if known else "toy sentences"


def _vectors(ids: Tensor, words: int, width: int, reach: int = 5) -> Tensor:
    """Word vectors of length 1, (words, width), from sentences (N, L): truncated SVD of how much more often than by
    chance two words stand at most `reach` apart (positive mutual information; nearer counts more)."""
    pairs = [(ids[:, :-gap], ids[:, gap:], 1 / gap) for gap in range(1, reach + 1)]
    counts = sparse.csr_array((words, words))
    for left, right, weight in pairs:
        there = (left > UNKNOWN) & (right > UNKNOWN)
        at = (left[there].numpy(), right[there].numpy())
        counts += sparse.coo_array((np.full(len(at[0]), weight), at), (words, words))
    both = (counts + counts.T).tocoo()
    often = both.sum(1)
    chance = often**0.75 / (often**0.75).sum()
    both.data = np.log(both.data / (often[both.row] * chance[both.col])).clip(0)
    u, s, _ = randomized_svd(both.tocsr(), min(width, words), random_state=0)
    vectors = F.normalize(torch.from_numpy(u * s**0.5).float())
    return F.pad(vectors, (0, width - vectors.shape[1]))


def _read(folder: Path, split: str) -> Iterator[tuple[str, int]]:
    import pyarrow.parquet as pq

    for file in sorted(folder.glob(f"{split}-*.parquet")):
        for row in pq.read_table(file, columns=["sentence", "label"]).to_pylist():
            yield row["sentence"], row["label"]


def _toy(split: str) -> list[tuple[str, int]]:
    """Sentences of made-up words, some of which say the label."""
    generator = torch.Generator().manual_seed(len(split))
    labels = torch.randint(2, (64,), generator=generator).tolist()
    return [
        (" ".join(f"w{w + 8 * y}" for w in torch.randint(16, (8,), generator=generator).tolist()), y) for y in labels
    ]


def _numbered(rows: list[tuple[str, int]], numbers: dict[str, int]) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(rows), LENGTH), PAD)
    for i, (text, _) in enumerate(rows):
        words = [numbers.get(word, UNKNOWN) for word in text.split()[:LENGTH]]
        ids[i, : len(words)] = torch.tensor(words)
    return ids, torch.tensor([label for _, label in rows])
