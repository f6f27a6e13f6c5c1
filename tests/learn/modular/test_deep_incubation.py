"""Deep Incubation: exact counts, hybrids that are the meta model, frozen neighbours, modules that fit."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import trimtab as tt
from tests.learn.toy import Toy, same
from trimtab import cli, testing
from trimtab.compact.recipe import run
from trimtab.learn import Context, DeepIncubation, fit
from trimtab.learn.modular import deep_incubation
from trimtab.learn.modular.deep_incubation import Incubate, Skip, cut, hybrid, incubate

QUICK = {"opt": "adamw", "lr": 2e-3, "batch_size": 32, "augment": "none", "progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def digits():
    return tt.load_data("digits", limit=300)


def vit(seed: int = 0, **kwargs) -> nn.Module:
    shape = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.models.VisionTransformer(**{**shape, "embed_dim": 16, "depth": 8, **kwargs})


def residual(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tt.create_model("trim_net", widths=(4, 8), depths=(3, 3), strides=(1, 2), num_classes=10, in_chans=1)


def pictures(n: int = 4, chans: int = 1, size: int = 8) -> torch.Tensor:
    return torch.randn(n, chans, size, size, generator=torch.Generator().manual_seed(0))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# -- the paper's networks ---------------------------------------------------------------------------------------------

PAPER = {  # target, meta model, hybrid: parameters and M MACs
    "vit_base_patch16_224": ({}, (86_567_656, 17_564), (29_864_680, 5_932), (44_040_424, 8_840)),
    "vit_large_patch16_224": ({}, (304_326_632, 61_555), (52_402_152, 10_388), (115_383_272, 23_180)),
    "vit_huge_patch14_224": (
        {"qkv_bias": False}, (631_922_920, 167_295), (81_062_120, 21_082), (218_777_320, 57_635),
    ),
}  # fmt: skip
BLOCK = 7_087_872


@pytest.mark.parametrize("name", PAPER)
def test_target_meta_model_and_hybrid_are_those_of_the_authors(name):
    kwargs, *rows = PAPER[name]
    with torch.device("meta"):
        target, x = timm.create_model(name, num_classes=1000, **kwargs), torch.zeros(1, 3, 224, 224)
    plan = cut(target, x, 4)
    assert [len(row) for row in plan.layers] == [len(target.blocks) // 4] * 4
    for net, (params, macs) in zip((target, hybrid(target, plan), hybrid(target, plan, 0)), rows, strict=True):
        cost = tt.measure(net, (3, 224, 224), what=("params", "macs"))
        assert (cost.params, round(cost.macs / 1e6)) == (params, macs)


def test_stages_of_vit_b_have_the_parameters_of_the_authors():
    with torch.device("meta"):
        target, x = timm.create_model("vit_base_patch16_224", num_classes=1000), torch.zeros(1, 3, 224, 224)
    plan = cut(target, x, (3, 3, 3, 3))
    whole, meta = (dict(net.named_parameters()) for net in (target, hybrid(target, plan)))
    stages = [[sum(p.numel() for p in plan.part(of, k).values()) for k in range(4)] for of in (whole, meta)]
    assert stages == [
        [22_006_272, 21_263_616, 21_263_616, 22_034_152],
        [7_830_528, BLOCK, BLOCK, 7_858_408],
    ]
    assert count(target.blocks[5]) == BLOCK


# -- cutting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 64),
        ("vit_tiny_patch16_224", 224),
        ("convnext_atto", 64),
        ("efficientnet_b0", 64),
        ("swin_tiny_patch4_window7_224", 224),
        ("eva02_tiny_patch14_224", 224),  # its blocks are given positions, too
    ],
)
def test_modules_partition_real_networks(name, size):
    with torch.device("meta"):
        model, x = timm.create_model(name, num_classes=5), torch.zeros(1, 3, size, size)
    plan = cut(model, x, 4)
    state = model.state_dict()
    parts = [plan.part(state, k) for k in range(4)]
    assert sum(len(part) for part in parts) == len(state) and all(parts)
    assert {name for part in parts for name in part} == set(state)
    params = dict(model.named_parameters())
    assert sum(p.numel() for k in range(4) for p in plan.part(params, k).values()) == count(model)
    assert plan.owner[next(iter(params))] == 0  # patches and tokens, or the stem
    assert all(plan.owner[key] == 3 for key in params if key.startswith(("head.", "fc.", "classifier.", "norm.")))
    numbers = [plan.owner[f"{layer}.{key}"] for row in plan.layers for layer in row
               for key in model.get_submodule(layer).state_dict()]  # fmt: skip
    assert numbers == sorted(numbers)
    meta = hybrid(model, plan)
    assert count(meta) < count(model) and meta.eval()(x).shape == (1, 5)


def test_modules_may_be_of_any_depth_and_keep_the_layers_that_change_the_shape():
    net = timm.create_model("resnet18", num_classes=5)
    plan = cut(net, pictures(1, 3, 64), (3, 5))
    assert plan.layers[0] == ("layer1.0", "layer1.1", "layer2.0")
    assert plan.spare == (("layer1.1",), ("layer3.1", "layer4.1"))
    assert plan.owner["conv1.weight"] == 0 and plan.owner["layer2.1.conv1.weight"] == 1


def test_a_tied_tensor_belongs_to_its_first_user():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)))
    net[3][0].weight = net[0][0].weight
    plan = cut(net, torch.zeros(1, 8), 2)
    assert (plan.owner["3.0.weight"], plan.owner["3.0.bias"]) == (0, 1)


@pytest.mark.parametrize(
    ("model", "modules", "says"),
    [
        (vit(), 9, "modules must be at most 8, the layers that repeat in VisionTransformer, got 9"),
        (vit(), (3, 3), r"modules must add up to the 8 layers that repeat in VisionTransformer, got \[3, 3\]"),
        (testing.toy_net(), 2, "ToyNet cannot be cut: it must have layers that repeat"),
    ],
)
def test_networks_that_cannot_be_cut_are_refused(model, modules, says):
    with pytest.raises(ValueError, match=says):
        cut(model, pictures(1), modules)


# -- hybrids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", range(3))
@torch.no_grad()
def test_hybrid_of_a_module_of_one_layer_is_the_meta_model_bit_for_bit(module):
    net, x = vit(), pictures()
    plan = cut(net, x, (3, 1, 4) if module == 1 else (1, 3, 1, 3) if module == 0 else (3, 4, 1))
    meta = hybrid(vit(seed=1), plan).eval()
    same_start = deepcopy(net)
    same_start.load_state_dict(net.state_dict() | meta.state_dict())
    assert torch.equal(hybrid(same_start, plan, module, meta.state_dict()).eval()(x), meta(x))
    assert not torch.equal(hybrid(net, plan, module, meta.state_dict()).eval()(x), meta(x))


def test_hybrid_takes_its_module_from_the_network_and_the_rest_from_the_meta_model():
    net = vit()
    plan, before = cut(net, pictures(), 4), deepcopy(net.state_dict())
    meta = hybrid(vit(seed=1), plan).state_dict()
    state = hybrid(net, plan, 2, meta).state_dict()
    assert same(plan.part(state, 2), plan.part(net.state_dict(), 2))
    for k in (0, 1, 3):
        assert same(plan.part(state, k), plan.part(meta, k))
    assert same(net.state_dict(), before) and not any(isinstance(m, Skip) for m in net.modules())


def one_step(net: nn.Module, plan, module: int) -> nn.Module:
    """A step of training with momentum and weight decay, gradients kept."""
    objective, x = Incubate(plan, module), pictures(8)
    batch = tt.learn.Batch(image=x, label=torch.arange(8))
    objective.setup(net, batch)
    net.train()
    groups = tt.learn.param_groups([net, objective.extra], lr=0.1, weight_decay=0.1)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    objective.losses(net, batch, Context()).backward()
    optimizer.step()
    return net


@pytest.mark.parametrize("module", range(4))
def test_a_step_changes_one_module_only(module):
    net = vit()
    plan = cut(net, pictures(), 4)
    meta = hybrid(vit(seed=1), plan).state_dict()
    before = hybrid(net, plan, module, meta)
    after = one_step(deepcopy(before), plan, module)
    for name, p in after.named_parameters():
        mine = plan.owner[name] == module
        assert p.requires_grad == mine and (p.grad is not None) == mine, name
        assert torch.equal(p, before.get_parameter(name)) != mine, name
    assert all(p.grad.any() for p in after.parameters() if p.grad is not None)


def test_later_stages_are_frozen_but_let_the_gradient_through_and_earlier_ones_keep_nothing():
    net, x = vit(), pictures()
    plan = cut(net, x, 4)
    for module in range(4):
        hyb = hybrid(net, plan, module, hybrid(net, plan).state_dict())
        with tt.learn.taps(hyb, [row[-1] if k == module else row[0] for k, row in enumerate(plan.layers)]) as seen:
            logits = hyb(x)
        outs = list(seen.values())
        assert [out.requires_grad for out in outs] == [k >= module for k in range(4)]
        (flow,) = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.arange(4)), outs[module])
        assert flow.abs().sum() > 0


def kept(net: nn.Module) -> int:
    """Bytes that a training forward keeps for the backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    held: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net.train()(pictures()).sum()
    return sum(held.values())


def test_a_module_keeps_less_for_the_backward_pass_than_the_network_and_later_ones_less_than_earlier():
    net = vit(depth=16)
    plan = cut(net, pictures(), 4)
    of_modules = [kept(hybrid(net, plan, k)) for k in range(4)]
    assert of_modules == sorted(of_modules, reverse=True)
    assert of_modules[0] < 0.5 * kept(net)


def rates(net: nn.Module) -> list[float]:
    return [m.drop_prob for m in net.modules() if isinstance(m, DropPath)]


def test_drop_path_grows_over_the_depth_of_the_net_that_is_trained():
    net = vit(drop_path_rate=0.6)
    plan = cut(net, pictures(), 4)
    assert not any(rates(hybrid(net, plan)))
    hyb = hybrid(net, plan, 1, drop_path_rate=0.1)  # layers 0, 2, 3, 4, 6
    assert rates(hyb) == pytest.approx([0.1 * k / 4 for k in (1, 1, 2, 2, 3, 3, 4, 4)])
    assert rates(net) == pytest.approx([0.6 * k / 7 for k in range(1, 8) for _ in range(2)])


def test_batch_norms_of_frozen_stages_keep_their_statistics_and_use_them():
    net = residual()
    plan = cut(net, pictures(), 2)
    before = hybrid(net, plan, 1, hybrid(net, plan).state_dict())
    after = one_step(deepcopy(before), plan, 1)
    moved = {k for k, v in after.state_dict().items() if "running" in k and not torch.equal(v, before.state_dict()[k])}
    assert moved == {k for k in after.state_dict() if "running" in k and plan.owner[k] == 1}
    assert all(m.training for m in after.modules() if isinstance(m, (nn.ReLU, nn.Sequential)))


# -- training ---------------------------------------------------------------------------------------------------------


def test_modules_are_independent_and_assembly_takes_them_as_they_are(digits, tmp_path):
    """In another order and in several runs the same; only the module's own part of its checkpoint is used."""
    net = vit()
    plan, before = cut(net, pictures(), 2), deepcopy(net.state_dict())
    settings = {"modules": 2, "epochs": 1, "meta_epochs": 1, **QUICK}
    whole = incubate(net, digits, **settings).state_dict()
    assert same(net.state_dict(), before) and whole.keys() == before.keys()
    meta = incubate(net, digits, only=[], out=tmp_path, **settings)
    assert same(meta.state_dict(), before) and [f.name for f in tmp_path.iterdir()] == ["meta"]
    for k in (1, 0):
        part = incubate(net, digits, only=[k], out=tmp_path, **settings).state_dict()
        assert same(plan.part(part, k), plan.part(whole, k))
        assert same(plan.part(part, 1 - k), plan.part(before, 1 - k))
    assert same(incubate(net, digits, out=tmp_path, **settings).state_dict(), whole)


class Killed(BaseException):
    pass


def test_killed_while_a_module_is_trained_it_goes_on_and_repeats_nothing(digits, tmp_path, monkeypatch):
    settings = {"epochs": 2, **QUICK}
    whole = fit(vit(), digits, DeepIncubation(modules=2, meta_epochs=2), **settings).model.state_dict()
    trained: list[str] = []

    def killing(net, data, objective, *, out, **options):
        def kill(row):
            trained.append(out.name)
            if out.name == "module-2" and row["epoch"] == 1 and trained.count("module-2") == 1:
                raise Killed

        return fit(net, data, objective, out=out, checkpoint_every=0, on_epoch=kill, **options)

    monkeypatch.setattr(deep_incubation, "fit", killing)
    monkeypatch.setattr(deep_incubation, "_OWN", {*deep_incubation._OWN, "checkpoint_every"})
    for attempt in range(2):
        try:
            done = fit(vit(), digits, DeepIncubation(modules=2, meta_epochs=2), out=tmp_path, **settings)
        except Killed:
            assert attempt == 0
    assert same(done.model.state_dict(), whole)
    assert trained == ["meta"] * 2 + ["module-1"] * 2 + ["module-2"] * 3  # its first epoch was repeated, no other


def test_modules_of_another_meta_model_are_not_taken_up(digits, tmp_path):
    settings = {"modules": 2, "epochs": 1, "meta_epochs": 1, "out": tmp_path, **QUICK}
    incubate(vit(), digits, **settings)
    (tmp_path / "meta/checkpoint.safetensors").unlink()
    with pytest.raises(ValueError, match=r"module-1.* belongs to another run"):
        incubate(vit(seed=1), digits, **settings)


def test_an_interrupted_module_interrupts_the_run(digits, monkeypatch):
    def interrupted(net, *_, **__):
        return tt.learn.FitResult(net, [], None, 1, 0.1, "interrupted")

    monkeypatch.setattr(deep_incubation, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt, match="meta is not done"):
        fit(vit(), digits, DeepIncubation(), epochs=1, **QUICK)


def test_modules_fit_that_shared_a_meta_model_and_others_do_not():
    data = Toy(train=384, val=300)
    settings = {**QUICK, "opt": "sgd", "lr": 0.05, "modules": 2, "epochs": 3, "meta_epochs": 6}
    shared = incubate(residual(), data, **settings)
    other = incubate(residual(seed=1), data, only=[1], **settings)
    plan = cut(shared, pictures(), 2)
    strangers = deepcopy(shared)
    strangers.load_state_dict(shared.state_dict() | plan.part(other.state_dict(), 1))
    accuracy = [tt.evaluate(net, data, "test")["accuracy"] for net in (shared, strangers)]
    assert accuracy[0] > 0.9 and accuracy[1] < 0.5, accuracy


def test_what_comes_out_is_the_plain_network_which_saves_and_loads(digits, tmp_path):
    net = residual()
    before = net.state_dict().keys()
    done = fit(net, digits, DeepIncubation(modules=2, meta_epochs=1), epochs=1, warmup=0.0, clip_grad=1.0, **QUICK)
    assert done.model is net and net.state_dict().keys() == before and not any(m.training for m in net.modules())
    assert all(p.requires_grad for p in net.parameters()) and not any(isinstance(m, Skip) for m in net.modules())
    tt.save(net, tmp_path / "a", spec=digits.spec)
    assert torch.equal(tt.load(tmp_path / "a")(pictures()), net(pictures()))


# -- the door, and the battery ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"modules": 1}, "modules must be a number from 2, or the number of layers of each, got 1"),
        ({"modules": [3]}, r"modules must be a number from 2, .*, got \[3\]"),
        ({"modules": [3, 0]}, r"modules must be a number from 2, .*, got \[3, 0\]"),
        ({"modules": "all"}, "modules must be a number from 2, .*, got 'all'"),
        ({"meta_epochs": 0}, "meta_epochs must be positive, got 0"),
        ({"module_epochs": -1}, "module_epochs must be positive, got -1"),
        ({"drop_path_rate": 1}, r"drop_path_rate must be in \[0, 1\), got 1"),
        ({"smoothing": 2}, "smoothing must be in"),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        DeepIncubation(**options)


def test_wrong_runs_are_refused(digits):
    with pytest.raises(ValueError, match="it must have no time limit, got 9 s"):
        fit(vit(), digits, DeepIncubation(), time_limit=9, **QUICK)
    with pytest.raises(ValueError, match="modules must be fewer, of more than one layer that keeps its shape, got 8"):
        fit(vit(), digits, DeepIncubation(modules=8), epochs=1, **QUICK)
    with pytest.raises(ValueError, match=r"only must name modules from 0 to 3, got \[0, 4\]"):
        incubate(vit(), digits, only=[4, 0], epochs=1, **QUICK)


class Block(nn.Module):
    """A residual block without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x).relu()


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), *(Block() for _ in range(4)), nn.Flatten(), nn.Linear(128, 10))


def objective() -> DeepIncubation:
    return DeepIncubation(modules=2, meta_epochs=1, module_epochs=1)


def test_conformance():
    testing.check_objective(objective, model=blocks, slow=False, lr=0.01)


def test_command_line_and_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tt.save(residual(), tmp_path / "net", spec=tt.load_data("digits").spec)
    args = ["--epochs", "1", "--objective", "deep_incubation", "--set", "modules=[3,3]", "--set", "meta_epochs=1"]
    assert cli.main(["train", "digits", "--model", "net", "--out", "out", "--json", *args]) == 0
    assert json.loads(capsys.readouterr().out)["stopped"] == "done"
    found = {f.parent.name for f in (tmp_path / "out").rglob("checkpoint.safetensors")}
    assert found == {"training", "meta", "module-1", "module-2"}
    (tmp_path / "r.yaml").write_text(
        "data: {spec: digits, limit: 256}\nmodel: {load: net}\nout: o\nphases:\n"
        "  - train: {objective: {deep_incubation: {modules: 2, meta_epochs: 1}}, epochs: 1, warmup: 0, clip_grad: 1, "
        "progress: false}\n"
    )
    assert [p["phase"] for p in run("r.yaml")["phases"]] == ["train"]
    assert tt.load("o").state_dict().keys() == residual().state_dict().keys()
