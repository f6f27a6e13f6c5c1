"""LSSKD and HSAKD: every line of the fact sheet's exact checks, the counts of its table, and its traps."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from tests.learn.toy import Toy, net, same, weights
from trimtab import testing
from trimtab.core.cost import measure
from trimtab.core.meta import shapes_only
from trimtab.learn import HSAKD, LSSKD, Batch, Context, fit
from trimtab.learn.distill.lsskd import Block, Branched, add_branches, branch_points, joint_labels, marginal, rotations

QUICK = {"epochs": 1, "batch_size": 32, "lr": 0.05, "progress": False}
STAGES = ["2", "5"]  # of `net`


def batch(n: int = 5) -> Batch:
    g = torch.Generator().manual_seed(0)
    return Batch(image=torch.randn(n, 1, 8, 8, generator=g), label=torch.arange(n) % 3)


def ready(objective, model: nn.Module | None = None, progress: float = 1.0):
    """A model and an objective in the middle of training."""
    model = net() if model is None else model
    torch.manual_seed(0)
    objective.setup(model, batch())
    objective.extra.train()
    return model, objective, Context(progress=progress)


# -- rotations and joint labels ---------------------------------------------------------------------------------------


def test_rotations_of_an_image_stand_next_to_each_other():
    x = torch.randn(3, 2, 6, 6)
    turned = rotations(x)
    assert turned.shape == (12, 2, 6, 6)
    assert torch.equal(turned[0::4], x)
    for j in range(4):
        assert torch.equal(turned[4 + j], x[1].rot90(j, (1, 2)))
    assert torch.equal(rotations(turned[3::4])[1::4], x)  # 270 + 90 degrees


def test_joint_label_of_class_7_rotation_2_is_30():
    assert joint_labels(torch.tensor([0, 7]))[4 + 2] == 30
    assert joint_labels(torch.tensor([0, 7])).tolist() == [0, 1, 2, 3, 28, 29, 30, 31]


def test_soft_labels_become_soft_joint_labels():
    hard = torch.tensor([2, 0])
    soft = joint_labels(F.one_hot(hard, 3).float())
    assert torch.equal(soft.argmax(1), joint_labels(hard))
    mixed = joint_labels(torch.tensor([[0.25, 0.75]]))
    assert mixed[2].tolist() == [0, 0, 0.25, 0, 0, 0, 0.75, 0]


def test_the_marginal_over_rotations_is_a_distribution_over_classes():
    q = torch.randn(5, 12)
    p = q.softmax(1).unflatten(1, (3, 4)).sum(2)
    torch.testing.assert_close(p.sum(1), torch.ones(5))
    torch.testing.assert_close(marginal(q).softmax(1), p)


# -- branches ---------------------------------------------------------------------------------------------------------


def stage(in_chs: int, out_chs: int, blocks: int, stride: int) -> nn.Sequential:
    """As in HSAKD's ResNets: the basic block is our `Block`."""
    return nn.Sequential(
        *(Block(in_chs if i == 0 else out_chs, out_chs, stride if i == 0 else 1) for i in range(blocks))
    )


class CifarResNet(nn.Module):
    """He et al.'s networks for CIFAR, with convolutions as shortcuts."""

    def __init__(self, blocks: int, widths: tuple[int, int, int], stem: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        pairs = zip((stem, *widths), widths)
        self.stages = nn.Sequential(*(stage(a, b, blocks, 1 + (i > 0)) for i, (a, b) in enumerate(pairs)))
        self.pool, self.fc = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(widths[-1], 100)
        self.feature_info = [{"module": f"stages.{i}", "num_chs": w, "reduction": 2**i} for i, w in enumerate(widths)]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.stages(self.stem(x))))


class PreActivation(nn.Module):
    """A block of a wide residual network: norm and ReLU first, the shortcut fed by what they give."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.act1 = nn.Sequential(nn.BatchNorm2d(in_chs), nn.ReLU())
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False)
        self.act2 = nn.Sequential(nn.BatchNorm2d(out_chs), nn.ReLU())
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride, bias=False) if in_chs != out_chs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(x)
        short = x if self.shortcut is None else self.shortcut(y)
        return short + self.conv2(self.act2(self.conv1(y)))


class WideResNet(CifarResNet):
    def __init__(self, depth: int, k: int) -> None:
        n, widths = (depth - 4) // 6, (16 * k, 32 * k, 64 * k)
        super().__init__(0, widths, 16)
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(*(PreActivation(a if j == 0 else b, b, 1 + (i > 0 and j == 0)) for j in range(n)))
                for i, (a, b) in enumerate(zip((16, *widths), widths))
            )
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.norm = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.norm(self.stages(self.stem(x)))))


SMALL, WIDE = (16, 32, 64), (64, 128, 256)
# network, parameters, parameters of branches, MACs in M, MACs with branches in M
TABLE = {
    "ResNet-20": (lambda: CifarResNet(3, SMALL, 16), 278_324, 762_992, 40.82, 94.37),
    "ResNet-56": (lambda: CifarResNet(9, SMALL, 16), 861_620, 2_206_064, 125.75, 292.55),
    "ResNet-8x4": (lambda: CifarResNet(1, WIDE, 32), 1_233_540, 3_557_296, 177.07, 429.04),
    "ResNet-32x4": (lambda: CifarResNet(5, WIDE, 32), 7_433_860, 18_907_056, 1083.0, 2543.0),
    "WRN-16-2": (lambda: WideResNet(16, 2), 703_284, 1_928_304, 101.1, 239.7),
    "WRN-40-1": (lambda: WideResNet(40, 1), 569_780, 1_484_432, 83.3, 193.5),
    "WRN-40-2": (lambda: WideResNet(40, 2), 2_255_156, 5_769_328, 327.6, 768.2),
}


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", TABLE)
def test_branches_cost_what_those_of_the_official_code_cost(name):
    build, backbone, branches, macs, macs_with = TABLE[name]
    with shapes_only():
        model = build()
        names = branch_points(model)
        whole = Branched(model, names, add_branches(model, names, 400, torch.zeros(2, 3, 32, 32), "stages"))
    assert params(model) == backbone
    assert params(whole.branches) == branches
    for module, want in ((model, macs), (whole, macs_with)):
        digits = len(str(want).partition(".")[2])
        assert round(measure(module, (3, 32, 32), what=("macs",)).macs / 1e6, digits) == pytest.approx(want)


def test_branches_of_resnet18_on_imagenet():
    with shapes_only():
        model = timm.create_model("resnet18")
        branches = add_branches(model, branch_points(model), 4000, torch.zeros(2, 3, 224, 224), "stages")
    assert params(model) == 11_689_512
    assert (params(branches), len(branches)) == (47_555_456, 4)


POINTS = {
    "resnet8_mlperf_tiny": ["layer1", "layer2", "layer3"],
    "mobilenetv3_small_050": ["blocks.0", "blocks.1", "blocks.3", "blocks.5"],
    "densenet121": ["features.denseblock1", "features.denseblock2", "features.denseblock3", "features.norm5"],
    "convnext_atto": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "vit_tiny_patch16_224": ["blocks.2", "blocks.5", "blocks.8", "blocks.11"],
    "swin_tiny_patch4_window7_224": ["layers.0", "layers.1", "layers.2", "layers.3"],
    "skipblocknet_xs": ["blocks.0.1", "blocks.0.4", "blocks.2.1", "conv_last"],  # no chain: blocks
    "xcit_nano_12_p16_224": ["blocks.2", "blocks.5", "blocks.8", "blocks.11"],  # tokens, no chain
}


@pytest.mark.parametrize("name", POINTS)
def test_branches_fit_any_architecture_without_configuration(name):
    side = 224 if "224" in name else 64
    with shapes_only():
        model, x = timm.create_model(name, num_classes=10), torch.zeros(2, 3, side, side)
        names = branch_points(model)
        assert names == POINTS[name]
        whole = Branched(model, names, add_branches(model, names, 40, x, "auto"))
        z, q, g = whole(x)
    assert z.shape == (2, 10) and [tuple(t.shape) for t in q] == [(2, 40)] * len(names)
    assert len({t.shape for t in g}) == 1
    torch.stack(q).sum().backward()
    assert all(p.grad is not None for p in whole.branches.parameters())


def test_branches_are_fresh_and_not_shared():
    model = net().requires_grad_(False)
    branches = add_branches(model, STAGES, 12, torch.randn(2, 1, 8, 8), "stages")
    mine = {id(p) for p in model.parameters()}
    assert all(id(p) not in mine and p.requires_grad for p in branches.parameters())
    assert not torch.equal(branches[0].extractor[0].weight, model[3].weight)


def test_a_number_of_branches_takes_the_deepest_stages():
    assert branch_points(timm.create_model("resnet18"), 2) == ["layer3", "layer4"]
    assert branch_points(timm.create_model("vit_tiny_patch16_224"), 3) == ["blocks.3", "blocks.7", "blocks.11"]


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_shapes_are_those_of_the_official_code():
    _, objective, _ = ready(LSSKD(branches=STAGES))
    z, q, g = objective.network(rotations(batch().image))
    assert z.shape == (20, 3)
    assert [t.shape for t in q] == [(20, 12)] * 2
    assert g[0].shape == g[1].shape


def test_the_classifier_learns_from_upright_images_only():
    model, objective, ctx = ready(LSSKD(branches=STAGES), net(norm="none"))
    b = batch()
    torch.testing.assert_close(objective.losses(model, b, ctx)["task"], F.cross_entropy(model(b.image), b.label))


def test_in_the_first_epoch_there_is_no_distillation():
    """a_1 = 0 or no teacher: task + joint + beta features."""
    model, objective, ctx = ready(LSSKD(branches=STAGES, beta=0.5))
    model.eval(), objective.extra.eval()
    b = batch()
    parts = objective.losses(model, b, ctx)
    assert set(parts) == {"task", "joint", "features"}
    z, q, g = objective.network(rotations(b.image))
    joint = sum(F.cross_entropy(t, joint_labels(b.label)) for t in q)
    apart = (F.normalize(g[0], dim=1) - F.normalize(g[1], dim=1)).square().sum(1).mean()
    torch.testing.assert_close(sum(parts.values()), F.cross_entropy(z[::4], b.label) + joint + 0.5 * apart)
    objective.on_epoch_end(ctx)
    assert objective.losses(model, b, Context(progress=0.0))["kd"] == 0


def test_right_after_the_copy_there_is_nothing_to_imitate():
    model, objective, ctx = ready(LSSKD(branches=STAGES))
    objective.on_epoch_end(ctx)
    model.eval(), objective.extra.eval()
    assert objective.losses(model, batch(), ctx)["kd"].abs().item() < 1e-6


def test_distillation_is_one_to_one_softened_and_rises_with_progress():
    model, objective, ctx = ready(LSSKD(branches=STAGES, T=2.0))
    objective.on_epoch_end(ctx)
    with torch.no_grad():
        for p in [*model.parameters(), *objective.extra.parameters()]:
            p.add_(0.1 * torch.randn_like(p))
    model.eval(), objective.extra.eval()
    x = rotations(batch().image)
    z, q, _ = objective.network(x)
    past_z, past_q, _ = objective._past(x)
    want = sum(
        4 * F.kl_div((a / 2).log_softmax(1), (b / 2).softmax(1), reduction="batchmean")
        for a, b in zip([*q, z], [*past_q, past_z])
    )
    assert want > 0.01
    for progress in (0.25, 1.0):
        parts = objective.losses(model, batch(), Context(progress=progress))
        torch.testing.assert_close(parts["kd"], progress * want)


def test_the_teacher_gets_no_gradient_and_its_statistics_stand_still():
    model, objective, ctx = ready(LSSKD(branches=STAGES))
    objective.on_epoch_end(ctx)
    past = objective._past.module
    before = weights(past)
    sum(objective.losses(model, batch(), ctx).values()).backward()
    assert all(p.grad is None for p in past.parameters())
    assert same(weights(past), before)
    learned = {id(p) for p in [*model.parameters(), *objective.extra.parameters()]}
    assert not learned & {id(p) for p in past.parameters()}


def test_statistics_see_all_rotations_in_one_pass():
    model, objective, ctx = ready(LSSKD(branches=STAGES))
    objective.losses(model.train(), batch(), ctx)
    assert model[1].num_batches_tracked == 1


def test_the_deepest_branch_teaches_and_is_not_taught():
    model, objective, ctx = ready(LSSKD(teacher="deepest", branches=STAGES))
    objective.losses(model, batch(), ctx)["kd"].backward()
    first, last = objective.network.branches
    assert all(p.grad is None or not p.grad.any() for p in last.parameters())
    assert first.classifier.weight.grad.any() and model[0].weight.grad.any()


def test_after_training_the_network_is_as_it_was_and_computes_what_it_did():
    model, objective = net(), LSSKD(branches=STAGES)
    keys, count = set(model.state_dict()), params(model)
    result = fit(model, Toy(), objective, val=None, **(QUICK | {"epochs": 2}))
    assert result.model is model and set(model.state_dict()) == keys and params(model) == count
    x = torch.randn(3, 1, 8, 8)
    z, _, _ = objective.network.eval()(x)
    assert torch.equal(model(x), z)
    assert {"task", "joint", "kd", "features"} <= set(result.history[1])
    assert "kd" not in result.history[0] or result.history[0]["kd"] is None


def test_mixed_labels_are_learned_too():
    assert fit(net(), Toy(), LSSKD(branches=STAGES), mixup=0.2, **QUICK).stopped == "done"


# -- with a teacher ---------------------------------------------------------------------------------------------------


def test_hsakd_with_a_trained_teacher_is_its_equation():
    sad = LSSKD(teacher=None, branches=STAGES, beta=0.0)
    fit(net(seed=1), Toy(), sad, **QUICK)
    model, objective, ctx = ready(HSAKD(sad.network, branches=STAGES))
    model.eval(), objective.extra.eval()
    b = batch()
    parts = objective.losses(model, b, ctx)
    assert set(parts) == {"task", "kd"} and set(objective.extra) == {"branches"}
    x = rotations(b.image)
    z, q, _ = objective._network(x)
    with torch.no_grad():
        their_z, their_q, _ = sad.network.eval()(x)
    kd = sum(
        9 * F.kl_div((s / 3).log_softmax(1), (t / 3).softmax(1), reduction="batchmean")
        for s, t in zip([*q, z], [*their_q, their_z])
    )
    torch.testing.assert_close(sum(parts.values()), F.cross_entropy(z[::4], b.label) + kd)


def test_branches_of_a_plain_teacher_learn_along_and_the_teacher_does_not():
    teacher = net(seed=1)
    before = copy.deepcopy(teacher.state_dict())
    objective = HSAKD(teacher, branches=STAGES)
    model, objective, ctx = ready(objective)
    parts = objective.losses(model, batch(), ctx)
    parts["teacher"].backward(retain_graph=True)
    assert objective.extra["teacher"][0].classifier.weight.grad.any()
    assert all(p.grad is None for p in [*teacher.parameters(), *model.parameters()])
    objective.extra.zero_grad()
    parts["kd"].backward()
    assert all(p.grad is None or not p.grad.any() for p in objective.extra["teacher"].parameters())
    fit(net(), Toy(), objective, **QUICK)
    assert same(teacher.state_dict(), before)


def test_teacher_and_student_must_match():
    four = net(seed=1)
    four[9] = nn.Linear(64, 4)
    with pytest.raises(ValueError, match="teacher and student must have equally many classes, got 4 and 3"):
        fit(net(), Toy(), HSAKD(four, branches=STAGES), **QUICK)
    sad = LSSKD(teacher=None, branches=["5"])
    fit(net(seed=1), Toy(), sad, **QUICK)
    with pytest.raises(ValueError, match="equally many stages, got 1 and 2"):
        fit(net(), Toy(), HSAKD(sad.network, branches=STAGES), **QUICK)


# -- the door, and the battery ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"teacher": "wise"}, "teacher must be one of previous_epoch, deepest or None, got 'wise'"),
        ({"branches": 0}, "branches must be a positive number or a list of module names, got 0"),
        ({"branches": "layer1"}, "branches must be a positive number or a list"),
        ({"extractor": "big"}, "extractor must be one of auto, stages, blocks, got 'big'"),
        ({"T": 0}, "T must be positive, got 0"),
        ({"beta": -1}, "beta must not be negative, got -1"),
    ],
)
def test_wrong_options_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        LSSKD(**arguments)


@pytest.mark.parametrize(
    ("objective", "model", "says"),
    [
        (LSSKD(), net(), r"Sequential has no feature_info .* branches=\[...\], from: 0, 1, 2"),
        (LSSKD(branches=["stem"]), net(), "names must be submodules of the model, got 'stem'"),
        (LSSKD(branches=["9"]), net(), "branches need feature maps or tokens, '9' of Sequential gives none"),
        (LSSKD(branches=9), tt.create_model("trim_1k", num_classes=3, in_chans=1), "branches must be at most"),
        (LSSKD(teacher="deepest", branches=["5"]), net(), "'deepest' needs two branches at least"),
        (LSSKD(branches=["conv1", "conv2"], extractor="stages"), testing.toy_net(), "are no chain of modules"),
    ],
)
def test_a_network_without_stages_is_refused_with_what_to_do(objective, model, says):
    with pytest.raises(ValueError, match=says):
        fit(model, Toy(), objective, **QUICK)


def test_images_must_be_square():
    wide = Batch(image=torch.randn(2, 1, 8, 6), label=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="images must be square to be turned, got 8 x 6"):
        LSSKD(branches=STAGES).setup(net(), wide)


def plain_net() -> nn.Module:
    """Without batch norm, also in the branches."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10)
    )


def lsskd() -> LSSKD:
    return LSSKD(branches=["1", "3"])


def hsakd() -> HSAKD:
    return HSAKD(plain_net(), branches=["1", "3"])


@pytest.mark.parametrize("objective", [lsskd, hsakd])
def test_conformance(objective):
    testing.check_objective(objective, model=plain_net, slow=False, lr=0.1)
