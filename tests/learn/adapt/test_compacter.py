"""Compacter: every line of the fact sheet's exact checks, its traps, and adapters in a file beside a frozen network."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

import trimtab as tt
from tests.elsewhere import python
from trimtab import testing
from trimtab.core import edit
from trimtab.core.edit import Narrow, history
from trimtab.core.errors import ArtifactError, SurgeryError
from trimtab.learn.adapt import adapters, collapse, compacter, count, freeze, load_adapters, save_adapters
from trimtab.learn.adapt.adapters import TRAINING, Adapter, places
from trimtab.learn.adapt.compacter import CompacterAdapter, HypercomplexLinear
from trimtab.learn.optim import param_groups
from trimtab.learn.rng import isolated

SHAPE = {"num_classes": 10, "in_chans": 1, "img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def vit(**how) -> nn.Module:
    return tt.create_model("vit_tiny_patch16_224", seed=0, adapt=False, **SHAPE | how)


def seeded(seed: int = 0):
    return isolated(seed, torch.device("cpu"))


def mixes(model: nn.Module) -> list[nn.Parameter]:
    return [m.mix for m in model.modules() if isinstance(m, HypercomplexLinear)]


@pytest.fixture(scope="module")
def digits():
    return tt.load_data("digits", limit=800)


@pytest.fixture(scope="module")
def t5() -> nn.Module:
    with torch.device("meta"):
        return T5ForConditionalGeneration(
            T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
        )


def bert() -> nn.Module:
    with seeded():
        return BertForSequenceClassification(
            BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        ).eval()


# ------------------------------------------------------------------------------------------------------------ the layer


@pytest.mark.parametrize(
    ("wide", "slim", "n", "rank"), [(768, 24, 4, 1), (24, 768, 4, 1), (24, 24, 3, 2), (12, 36, 1, 3)]
)
def test_the_layer_is_a_sum_of_kronecker_products(wide, slim, n, rank):
    with seeded():
        layer, x = HypercomplexLinear(wide, slim, n=n, rank=rank).double(), torch.randn(3, 7, wide).double()
        nn.init.normal_(layer.bias)
    whole = sum(torch.kron(a, s @ t) for a, s, t in zip(layer.mix, layer.left, layer.right))
    torch.testing.assert_close(layer.dense(), whole)
    y = layer(x)
    assert y.shape == (3, 7, slim)
    torch.testing.assert_close(y, x @ whole + layer.bias)


def test_the_first_product_is_tiny_and_of_rank_16():
    with seeded():
        layers = [HypercomplexLinear(768, 24, n=4) for _ in range(100)]
    assert sum(layer.dense().std().item() for layer in layers) / 100 == pytest.approx(2.2e-3, rel=0.1)
    assert torch.linalg.matrix_rank(layers[0].dense()) == 16
    adapter, x = CompacterAdapter(768, 24), torch.randn(2, 768)
    assert (adapter(x) - x).norm() < 0.02 * x.norm() and not torch.equal(adapter(x), x)


def test_glorot_is_drawn_for_each_factor_apart():
    with seeded():
        layer = HypercomplexLinear(768, 24, n=4)
    for factors, fans in ((layer.left, 192 + 1), (layer.right, 1 + 6)):
        bound = 2**0.5 * (6 / fans) ** 0.5
        assert 0.6 * bound < factors.abs().max().item() <= bound
    assert layer.bias.abs().max() == 0 and layer.mix.std().item() == pytest.approx(0.01, rel=0.3)


@pytest.mark.parametrize(("n", "rank"), [(2, 1), (4, 1), (3, 2)])
def test_the_rank_is_at_most_r_n_squared(n, rank):
    with seeded():
        layer = HypercomplexLinear(72, 60, n=n, rank=rank).double()
    assert torch.linalg.matrix_rank(layer.dense()) == rank * n * n


def test_one_product_is_a_low_rank_adapter():
    layer = HypercomplexLinear(10, 6, n=1)
    torch.testing.assert_close(layer.dense(), layer.mix[0, 0, 0] * layer.left[0] @ layer.right[0])


def test_it_multiplies_quaternions():
    """(p) -> p q for q = 2 + 3i + 5j + 7k, from the table i j = k, j k = i, k i = j."""
    table = (
        {(0, b): (1, b) for b in range(4)} | {(a, 0): (1, a) for a in range(4)} | {(a, a): (-1, 0) for a in (1, 2, 3)}
    )
    for a, b, c in ((1, 2, 3), (2, 3, 1), (3, 1, 2)):
        table |= {(a, b): (1, c), (b, a): (-1, c)}
    layer, q = HypercomplexLinear(4, 4, n=4), torch.tensor([2.0, 3.0, 5.0, 7.0])
    with torch.no_grad():
        layer.mix.zero_()
        for (a, b), (sign, c) in table.items():
            layer.mix[b, a, c] = sign
        layer.left.copy_(q.view(4, 1, 1))
        layer.right.fill_(1.0)
    p = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert layer(p).tolist() == [[1 * 2 - 2 * 3 - 3 * 5 - 4 * 7, 8.0, 9.0, 16.0]]  # by hand: (1+2i+3j+4k)(2+3i+5j+7k)


def test_it_is_a_matrix_product_operator_of_bond_dimension_n():
    """Rearranged to (p q) x (u v), a Kronecker product is an outer product; the sum of n of them has rank n."""
    layer = HypercomplexLinear(24, 16, n=4).double()
    bond = layer.dense().view(4, 6, 4, 4).permute(0, 2, 1, 3).reshape(16, 24)
    assert torch.linalg.matrix_rank(bond) == 4


# ----------------------------------------------------------------------------------------------------------- the counts


def test_counts_of_t5_base(t5):
    whole = sum(p.numel() for p in t5.parameters())
    assert whole == 222_903_552
    both, plus = count(compacter(t5)), count(compacter(t5, attention=False))
    assert both.adapters == 48 * 2376 + 64 and both.trained == 161_728 and both.base == whole
    assert plus.adapters == 24 * 2376 + 64 and plus.trained == 104_704
    assert (round(100 * both.share, 4), round(100 * plus.share, 4)) == (0.0726, 0.047)
    assert count(compacter(t5, norms=False)).trained == 161_728 - 62 * 768
    assert count(adapters(t5)).adapters == 48 * 37_656 == 1_807_488


def test_t5_gets_no_adapter_after_cross_attention_and_trains_no_head(t5):
    at = places(t5)
    assert len(at) == 48 and set(at.values()) == {768} and not [name for name in at if "EncDec" in name]
    trained = [name for name, p in compacter(t5).named_parameters() if p.requires_grad and ".adapter." not in name]
    assert len(trained) == 62 and all("layer_norm" in name for name in trained)


def test_counts_of_deit_tiny():
    net = timm.create_model("deit_tiny_patch16_224")
    small = compacter(net, reduction=24)
    assert count(small).adapters == 24 * 600 + 64
    norms, head = 25 * 2 * 192, 192 * 1000 + 1000
    assert count(small).trained == 24 * 600 + 64 + norms + head
    assert count(compacter(net, reduction=32)).adapters == 24 * 600 + 64  # k = 6 is no multiple of 4, so it is 8


@pytest.mark.parametrize("n", [2, 4])
def test_the_count_grows_linearly_in_width_and_bottleneck(n):
    def own(width: int, k: int) -> int:
        return sum(p.numel() for name, p in CompacterAdapter(width, k, n=n).named_parameters() if "mix" not in name)

    for width in (32, 64, 128):
        for k in (8, 16, 32):
            assert own(width, k) == 2 * (width + k) + k + width


# -------------------------------------------------------------------------------------------------------- in a network


def test_adapters_follow_the_sublayer_before_its_residual():
    net, x = vit(), torch.randn(2, 1, 8, 8)
    small = compacter(net, bottleneck=8)
    assert list(places(net)) == [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.proj", "mlp.fc2")]
    assert [type(m) for m in small.blocks[0].mlp.fc2] == [nn.Linear, CompacterAdapter]
    assert not [m for m in net.modules() if isinstance(m, Adapter)] and all(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        for m in small.modules():
            if isinstance(m, HypercomplexLinear):
                m.right.zero_()
    torch.testing.assert_close(small(x), net(x))


@pytest.mark.parametrize("attention", [True, False])
def test_transformers_get_them_at_the_same_places(attention):
    net, words = bert(), torch.randint(50, (2, 7))
    small = compacter(net, bottleneck=8, attention=attention)
    assert len(places(net, attention=attention)) == (4 if attention else 2)
    assert (small(words).logits - net(words).logits).abs().max() < 0.05
    small(words).logits.sum().backward()
    assert {n for n, p in small.named_parameters() if p.grad is not None} == {
        n for n, p in net.named_parameters() if "LayerNorm" in n or n.startswith("classifier")
    } | {n for n, p in small.named_parameters() if ".adapter." in n}


def test_what_is_trained_can_be_said():
    net = vit()
    names = {n for n, p in compacter(net, norms=False, train=()).named_parameters() if p.requires_grad}
    assert names and all(".adapter." in n for n in names)
    more = compacter(net, norms=False, train=["patch_embed", "head"])
    assert more.patch_embed.proj.weight.requires_grad and more.head.bias.requires_grad
    assert not more.blocks[0].norm1.weight.requires_grad


def test_the_slow_weights_are_one_parameter_always(tmp_path):
    small = compacter(vit(), bottleneck=8)
    assert len(mixes(small)) == 8 and len({id(m) for m in mixes(small)}) == 1
    assert len({id(m) for m in mixes(copy.deepcopy(small))}) == 1
    groups = param_groups(small, lr=0.1)
    assert sum(p is mixes(small)[0] for g in groups for p in g["params"]) == 1
    other = compacter(vit(), bottleneck=8, seed=1)
    other.load_state_dict(small.state_dict())
    assert len({id(m) for m in mixes(other)}) == 1 and torch.equal(mixes(other)[0], mixes(small)[0])
    tt.save(small, tmp_path / "whole")
    assert len({id(m) for m in mixes(tt.load(tmp_path / "whole"))}) == 1
    apart = compacter(vit(), bottleneck=8, shared=False)
    assert len({id(m) for m in mixes(apart)}) == 8 and count(apart).adapters == count(small).adapters + 7 * 64


def test_the_seed_decides_and_the_callers_stream_goes_on():
    before = torch.random.get_rng_state()
    a, b, c = (compacter(vit(), bottleneck=8, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_half_precision_network_keeps_its_precision():
    small = compacter(vit().bfloat16(), bottleneck=8)
    assert mixes(small)[0].dtype == torch.float32
    assert small(torch.randn(2, 1, 8, 8).bfloat16()).dtype == torch.bfloat16


def test_training_leaves_the_frozen_weights_bit_for_bit(digits):
    small = compacter(vit(), bottleneck=8)
    before = copy.deepcopy(small.state_dict())
    tt.fit(small, digits, epochs=2, lr=0.01, batch_size=32, augment="none", progress=False, **TRAINING)
    for name, p in small.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_it_learns_more_than_the_classifier_alone(digits):
    known, new = tt.learn.adapt.hold_out(digits, [5, 6, 7, 8, 9])
    how = {**TRAINING, "lr": 0.01, "batch_size": 32, "augment": "none", "val": None, "progress": False}
    net = vit(num_classes=5)
    tt.fit(net, known, epochs=10, **how | {"lr": 3e-3})
    probe = freeze(copy.deepcopy(net), norms=False)
    tt.fit(probe, new, epochs=25, **how)
    small = compacter(net, new, bottleneck=8, epochs=25, **how)
    loss = [tt.evaluate(m, new)["loss"] for m in (probe, small)]
    assert loss[1] < 0.75 * loss[0], loss


def test_with_data_it_is_trained_as_fit_does(digits):
    net, how = vit(), {"lr": 0.01, "epochs": 1, "batch_size": 64, "progress": False}
    small, again = compacter(net, digits, bottleneck=8, **how), compacter(net, bottleneck=8)
    tt.fit(again, digits, **TRAINING | how)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), small.parameters()))


# ------------------------------------------------------------------------------------------------------------- the file


def moved(model: nn.Module) -> nn.Module:
    """As if trained: everything that may change has changed."""
    with seeded(9), torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def test_a_file_of_adapters_beside_the_network(tmp_path):
    small, x = moved(compacter(vit(), bottleneck=8)), torch.randn(2, 1, 8, 8)
    size = save_adapters(small, tmp_path / "task.safetensors")
    assert size == (tmp_path / "task.safetensors").stat().st_size
    stored = 4 * count(small).trained
    assert stored < size < stored + 8000  # names and edits
    base = vit()
    with torch.no_grad():
        base.head.weight.fill_(7.0)  # it is in the file
    back = load_adapters(base, tmp_path / "task.safetensors")
    assert torch.equal(back(x), small(x)) and not back.training
    assert {n for n, p in back.named_parameters() if p.requires_grad} == {
        n for n, p in small.named_parameters() if p.requires_grad
    }
    assert len({id(m) for m in mixes(back)}) == 1 and history(back).edits == history(small).edits
    assert not [m for m in base.modules() if isinstance(m, Adapter)]
    assert save_adapters(back, tmp_path / "again.safetensors") == size


def test_transformers_too_and_ordinary_adapters(tmp_path):
    words = torch.randint(50, (2, 7))
    for make in (compacter, adapters):
        small = moved(make(bert(), bottleneck=8))
        save_adapters(small, tmp_path / "task.safetensors")
        assert torch.equal(load_adapters(bert(), tmp_path / "task.safetensors")(words).logits, small(words).logits)


def test_buffers_that_moved_are_kept(tmp_path):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp, self.head = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mlp(self.norm(x)))

    with seeded():
        base = Normed()
    small = compacter(base, layers="mlp", bottleneck=4).train()
    small(torch.randn(16, 8) + 3)
    save_adapters(small, tmp_path / "a.safetensors")
    assert torch.equal(load_adapters(base, tmp_path / "a.safetensors").norm.running_mean, small.norm.running_mean)


def test_another_base_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    save_adapters(compacter(vit(), bottleneck=8), file)
    other = vit()
    with torch.no_grad():
        other.blocks[1].mlp.fc1.weight[0, 0] += 1e-6
    with pytest.raises(ArtifactError, match="trained on another base"):
        load_adapters(other, file)
    with pytest.raises(ArtifactError, match=r"no module .blocks\.1"):
        load_adapters(vit(depth=1), file)
    with pytest.raises(ArtifactError, match=r"head.bias is \(10,\), the base has \(3,\)"):
        load_adapters(vit(num_classes=3), file)
    with pytest.raises(ArtifactError, match="it has adapters already"):
        load_adapters(compacter(vit(), bottleneck=8), file)


def test_damaged_and_hostile_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    file, bad = tmp_path / "a.safetensors", tmp_path / "bad.safetensors"
    save_adapters(compacter(vit(), bottleneck=8), file)
    raw = file.read_bytes()
    bad.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="damaged or was changed"):
        load_adapters(vit(), bad)
    bad.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_adapters(vit(), bad)
    save_file({"x": torch.zeros(1)}, bad)
    with pytest.raises(ArtifactError, match="not a file of adapters"):
        load_adapters(vit(), bad)
    with pytest.raises(ArtifactError, match="there is no file"):
        load_adapters(vit(), tmp_path / "none.safetensors")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    for said in (
        {"edit": "remove", "module": "head"},
        {"edit": "insert", "module": "head", "name": "a", "with_": "os.x"},
    ):
        note = {"format": 1, "edits": [said], "base": "", "sha256": empty}
        save_file({}, bad, {"trimtab": json.dumps(note)})
        with pytest.raises(ArtifactError):
            load_adapters(vit(), bad)


def test_a_network_that_was_changed_otherwise_is_saved_whole(tmp_path):
    small = compacter(vit(), bottleneck=8)
    edit.apply(small, [Narrow("head.weight", 0, (0, 1)), Narrow("head.bias", 0, (0, 1))])
    with pytest.raises(SurgeryError, match=r"keep all of it, with tt.save"):
        save_adapters(small, tmp_path / "a.safetensors")
    with pytest.raises(SurgeryError, match="has no adapters to save"):
        save_adapters(vit(), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_whole_model_loads_in_a_fresh_process_and_trains_on(tmp_path, digits):
    small, x = moved(compacter(vit(), bottleneck=8)), torch.randn(2, 1, 8, 8)
    tt.save(small, tmp_path / "whole")
    torch.save({"x": x, "y": small(x).detach()}, tmp_path / "io.pt")
    code = (
        "import torch, trimtab as tt; from pathlib import Path; p = Path(__import__('sys').argv[1])\n"
        "io = torch.load(p / 'io.pt'); assert torch.equal(tt.load(p / 'whole')(io['x']), io['y'])"
    )
    python(code, tmp_path)
    back = freeze(tt.load(tmp_path / "whole"))
    assert count(back) == count(small)
    tt.fit(back, digits, epochs=1, batch_size=64, progress=False, **TRAINING)
    assert torch.equal(back.patch_embed.proj.weight, small.patch_embed.proj.weight)


def test_collapsed_it_is_the_same_function_of_ordinary_layers(tmp_path):
    small, x = moved(compacter(vit(), bottleneck=8)), torch.randn(2, 1, 8, 8)
    plain = collapse(small)
    assert not mixes(plain) and mixes(small)
    torch.testing.assert_close(plain(x), small(x), rtol=1e-4, atol=1e-5)
    tt.save(plain, tmp_path / "plain")
    assert torch.equal(tt.load(tmp_path / "plain")(x), plain(x))


def test_it_keeps_what_surgeries_promise():
    """But two things: it makes nothing smaller, and most weights are frozen."""
    case = {"num_classes": 10, "input_size": (1, 8, 8)}
    testing.check_surgery(lambda net, size: compacter(net, bottleneck=8), model=vit, skip=("smaller", "trains"), **case)


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"n": 3}, "n must divide the width of every adapter, 32 of blocks.0.attn.proj, got 3"),
        ({"n": 0}, "n must divide the width"),
        ({"bottleneck": 6}, "bottleneck must be a positive multiple of n = 4, got 6"),
        ({"reduction": 0}, "reduction must be at least 1, got 0"),
        ({"rank": 0}, "n and rank must be positive"),
        ({"layers": "blocks.*.wish"}, r"layers must name modules of the model, got 'blocks\.\*\.wish'"),
        ({"layers": ()}, "layers must name modules"),
        ({"layers": "norm"}, "norm has no linear layer"),
        ({"train": "wish"}, "train must name modules of the model, got 'wish'"),
    ],
)
def test_wrong_use_is_refused(how, says):
    with pytest.raises((ValueError, SurgeryError), match=says):
        compacter(vit(), **how)


def test_networks_that_cannot_have_them_are_told():
    with pytest.raises(SurgeryError, match="has adapters already"):
        compacter(compacter(vit(), bottleneck=8), layers="blocks.*.mlp.fc1")
    with pytest.raises(SurgeryError, match="has no module known as output of attention"):
        compacter(tt.create_model("resnet8_mlperf_tiny", num_classes=10))
    torchs = nn.TransformerEncoderLayer(32, 2)
    with pytest.raises(SurgeryError, match="is read by torch's attention and never called"):
        compacter(torchs, layers="self_attn.out_proj")
