"""Entropic Student: the numbers of the paper's networks, both stages, and what stays as it was."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab import cli, testing
from trimtab.core.cost import measure
from trimtab.core.edit import SetAttr, apply
from trimtab.deploy.entropic_student import FeatureRate, cut, entropic_student
from trimtab.deploy.split.bottleneck import GDN, Bottleneck, Decoder, Encoder, Prior
from trimtab.deploy.split.codec import Codec
from trimtab.deploy.split.parts import bottleneck_of
from trimtab.learn import Batch, Classify, Context, evaluate, fit
from trimtab.learn.objective import backward_all


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    return tt.create_model("resnet50", num_classes=1000).eval()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_and_macs_of_the_paper_networks(resnet50: nn.Module) -> None:
    where = cut(resnet50, (3, 32, 32))
    assert (where.at, where.out_chans, where.reduction) == ("layer1", 256, 4)
    assert where.head == ("conv1", "bn1", "act1", "maxpool", "layer1") and where.after == ("layer2", "layer3", "layer4")
    with torch.device("meta"):
        student = apply(deepcopy(resnet50).to("meta"), where.edits(24))
    bottleneck = bottleneck_of(student)[1]
    assert isinstance(bottleneck, Bottleneck) and type(student) is type(resnet50)
    parts = [count(m) for m in (bottleneck.encoder, bottleneck.prior, bottleneck.decoder)]
    assert parts == [138_672, 1_464, 1_164_032]
    assert count(student) - sum(parts) == 25_331_688
    assert count(student) == 26_635_856 and count(resnet50) == 25_557_032
    assert sum(count(resnet50.get_submodule(n)) for n in where.head) == 225_344
    image, latent = (3, 224, 224), (24, 55, 55)
    encoder = measure(bottleneck.encoder, image, per_layer=True)
    convs = sum(layer.macs or 0 for layer in encoder.layers if "conv" in layer.name)
    assert (encoder.macs, convs) == (588_354_048, 465_523_200)
    assert measure(bottleneck.decoder, latent, what="macs").macs == 3_582_525_440
    whole, teacher = measure(student, image, what="macs").macs, measure(resnet50, image, what="macs").macs
    assert teacher == 4_089_184_256 and whole is not None and encoder.macs is not None
    assert whole - encoder.macs - 3_582_525_440 == 3_303_227_392 == teacher - 785_956_864


def test_shapes_of_latent_and_features() -> None:
    x = torch.zeros(1, 3, 224, 224, device="meta")
    z = Encoder().to("meta")(x)
    assert z.shape == (1, 24, 55, 55) and Decoder().to("meta")(z).shape == (1, 256, 56, 56)
    for size in (30, 33, 61):  # not divisible by 4: as ResNets, which round up
        assert Bottleneck()(torch.zeros(1, 3, size, size)).shape[2] == -(-size // 4)


def test_gdn_counts_starts_and_equation() -> None:
    assert [count(GDN(96)), count(GDN(48))] == [9_312, 2_352]
    x = torch.randn(2, 5, 3, 3)
    assert torch.allclose(GDN(5)(x), x / (1 + 0.1 * x.abs()), atol=1e-6)  # beta = 1, gamma = 0.1 I
    layer = GDN(5, inverse=True)
    with torch.no_grad():
        layer.beta.copy_(torch.rand(5))
        layer.gamma.copy_(torch.randn(5, 5))  # negative roots are bounded
    beta, gamma = layer.beta.clamp_min(1e-3) ** 2, layer.gamma.clamp_min(0) ** 2
    want = x * (beta[:, None, None] + torch.einsum("ij,bjhw->bihw", gamma, x.abs()))
    assert torch.allclose(layer(x), want, atol=1e-5)
    assert count(Prior(24)) == 61 * 24 and count(Prior(1)) - Prior(1).quantiles.numel() == 58


@pytest.mark.parametrize(("name", "at"), [
    ("resnet8_mlperf_tiny", "layer2"), ("mobilenetv3_small_050", None), ("regnetx_002", None), ("convnext_atto", None),
])  # fmt: skip
def test_with_the_teachers_features_a_student_is_the_teacher(name: str, at: str | None) -> None:
    teacher = tt.create_model(name, num_classes=7, seed=0).eval()
    x = torch.randn(2, 3, 64, 64)
    where = cut(teacher, (3, 64, 64), at)  # raises when it is not so
    student = apply(deepcopy(teacher), where.edits(4))
    head = nn.Sequential(*(deepcopy(teacher).get_submodule(n) for n in where.head))
    parent, _, leaf = where.head[0].rpartition(".")
    setattr(student.get_submodule(parent), leaf, head)
    assert torch.allclose(student.eval()(x), teacher(x), atol=1e-5)


class Sidestep(nn.Module):
    """Its second stage needs the image again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(7, 4, 3, padding=1), nn.Linear(4, 2)
        self.feature_info = [{"module": "a", "reduction": 1}, {"module": "b", "reduction": 1}]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(torch.cat([self.a(x), x], 1)).mean((2, 3)))


def test_what_cannot_be_cut_is_refused(resnet50: nn.Module) -> None:
    with pytest.raises(ValueError, match="Sidestep cannot be cut after a: what follows needs more"):
        cut(Sidestep(), (3, 8, 8))
    with pytest.raises(ValueError, match="at must be one of act1, layer1, layer2, layer3, got 'layer4'"):
        cut(resnet50, (3, 32, 32), "layer4")
    with pytest.raises(ValueError, match="must reduce the image by 1, 2 or 4"):
        cut(resnet50, (3, 32, 32), "layer2")
    with pytest.raises(ValueError, match="needs feature_info"):
        cut(nn.Sequential(nn.Linear(2, 2)), (3, 8, 8))
    with pytest.raises(ValueError, match="channels must be at least 1"):
        entropic_student(resnet50, tt.load_data("digits", limit=50), channels=0)


@pytest.fixture(scope="module")
def data() -> Any:
    return tt.load_data("digits", limit=400)


@pytest.fixture(scope="module")
def teacher(data: Any) -> nn.Module:
    net = tt.create_model("resnet8_mlperf_tiny", num_classes=10, in_chans=1, seed=0)
    fit(net, data, epochs=8, batch_size=32, progress=False)
    return net


@pytest.fixture(scope="module")
def student(teacher: nn.Module, data: Any) -> nn.Module:
    return entropic_student(teacher, data, beta=0.05, tail_epochs=4, tail_lr=0.01, **HOW)


HOW: dict[str, Any] = {"at": "layer1", "channels": 4, "epochs": 10, "batch_size": 16, "lr": 4e-3, "progress": False}


def state_of(*modules: nn.Module) -> list[Tensor]:
    return [t.clone() for m in modules for t in m.state_dict().values()]


def test_distances_and_bits_are_sums_over_the_batch(teacher: nn.Module, data: Any) -> None:
    where = cut(teacher, data.spec.size, "layer1")
    bottleneck = bottleneck_of(apply(deepcopy(teacher), where.edits(4)))[1].train()
    bottleneck.noisy = lambda x: bottleneck.encoder(x)  # without the noise, to compare
    objective = FeatureRate(teacher, where, data.spec.size, beta=2.0)
    image = torch.randn(3, *data.spec.size)
    found = []
    for batch in (image, torch.cat([image, image])):
        main, auxiliary = objective.losses(bottleneck, Batch(image=batch), Context())
        found.append(main)
        assert torch.allclose(auxiliary["auxiliary"], bottleneck.prior.auxiliary_loss())
    for name in ("distance", "rate"):
        assert torch.allclose(2 * found[0][name], found[1][name], rtol=1e-4)
    assert torch.allclose(found[0]["rate"], 2.0 * bottleneck.prior.bits(bottleneck.encoder(image)))
    with torch.no_grad():  # sum_l |F_l - F_l|^2 over the cut and all later stages, by hand
        x, y = teacher.act1(teacher.bn1(teacher.conv1(image))), bottleneck.decoder(bottleneck.encoder(image))
        x, want = teacher.layer1(x), 0.0
        for stage in (nn.Identity(), teacher.layer2, teacher.layer3):
            x, y = stage(x), stage(y)
            want = want + (x - y).square().sum()
    assert torch.allclose(found[0]["distance"], want, rtol=1e-4)


def test_stage_one_trains_the_bottleneck_and_its_quantiles_only(teacher: nn.Module, data: Any) -> None:
    where = cut(teacher, data.spec.size, "layer1")
    bottleneck = bottleneck_of(apply(deepcopy(teacher), where.edits(4)))[1].train()
    objective, before = FeatureRate(teacher, where, data.spec.size), state_of(teacher)
    batch = Batch(image=torch.randn(4, *data.spec.size))
    backward_all(lambda: objective.losses(bottleneck, batch, Context()))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in bottleneck.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(teacher)))


def test_training_follows_the_teacher_and_a_dearer_bit_is_used_less(
    teacher: nn.Module, student: nn.Module, data: Any
) -> None:
    want, got = (evaluate(net, data)["accuracy"] for net in (teacher, student))
    assert got > want - 0.15
    dear = entropic_student(teacher, data, beta=5.0, tail_epochs=0, **HOW)
    images = torch.cat([b["image"] for b in data.loader("test", batch_size=64)])
    sizes = []
    for net in (student, dear):
        bottleneck = bottleneck_of(net)[1]
        codec, symbols = Codec.of(bottleneck.prior), bottleneck.symbols(images).detach().numpy()
        sizes.append(sum(len(codec.encode(s)) for s in symbols) / len(symbols))
        estimate = float(bottleneck.eval().prior.bits(torch.from_numpy(symbols) + bottleneck.prior.medians).detach())
        assert sum(codec.bits(s) for s in symbols) < 1.02 * estimate  # the tables have learned what the prior has
    assert sizes[1] < 0.7 * sizes[0]
    assert bottleneck_of(student)[1].prior.auxiliary_loss() < 0.1


def test_stage_two_and_a_second_task_leave_what_is_sent_as_it_is(student: nn.Module, data: Any) -> None:
    bottleneck = bottleneck_of(student)[1]
    assert bottleneck.frozen
    other = deepcopy(student)
    other.reset_classifier(2)
    images = torch.randn(3, *data.spec.size)
    payload = [Codec.of(bottleneck.prior).encode(s) for s in bottleneck.symbols(images).detach().numpy()]

    class Odd(Classify):
        def setup(self, model: nn.Module, batch: Batch) -> None:
            super().setup(model, batch.replace(label=batch.label % 2))

        def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Any:
            return super().losses(model, batch.replace(label=batch.label % 2), ctx)

    before = bottleneck_of(other)[1]
    kept, decoder = state_of(before.encoder, before.prior), state_of(before.decoder)
    backward_all(lambda: Odd().losses(other.train(), Batch(image=images, label=torch.tensor([0, 1, 2])), Context()))
    sent = [p for m in (before.encoder, before.prior) for p in m.parameters()]
    assert all(p.grad is None for p in sent) and all(p.grad is not None for p in before.decoder.parameters())
    fit(other, data, Odd(), epochs=2, weight_decay=0.1, progress=False, val=None)
    assert all(torch.equal(a, b) for a, b in zip(kept, state_of(before.encoder, before.prior)))
    assert not all(torch.equal(a, b) for a, b in zip(decoder, state_of(before.decoder)))
    after = bottleneck_of(other)[1]
    assert [Codec.of(after.prior).encode(s) for s in after.symbols(images).detach().numpy()] == payload


def test_the_same_seed_gives_the_same_student_and_checkpoints_are_taken_up(
    teacher: nn.Module, data: Any, tmp_path: Any
) -> None:
    few, before = data.subset({"train": 64}, seed=0), state_of(teacher)
    how: dict[str, Any] = {"at": "layer1", "channels": 2, "epochs": 2, "batch_size": 32, "progress": False}
    a = entropic_student(teacher, few, **how, out=tmp_path)
    torch.rand(1)
    b = entropic_student(teacher, few, **how)
    again = entropic_student(teacher, few, **how, out=tmp_path)  # both stages are done: nothing is trained
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(state_of(a), state_of(b), state_of(again)))
    assert all(torch.equal(x, y) for x, y in zip(before, state_of(teacher)))


def test_the_surgery_passes_the_battery() -> None:
    def operate(model: nn.Module, size: tuple[int, int, int]) -> nn.Module:
        where = cut(model, size, "layer2")
        return apply(deepcopy(model), [*where.edits(4), SetAttr(where.head[0], "frozen", True)])

    # Of the whole, only the device's part is smaller, and that part is not to be trained.
    case = {"model": "resnet8_mlperf_tiny", "input_size": (3, 32, 32)}
    testing.check_surgery(operate, slow=False, skip=("smaller", "trains"), **case)


def test_saves_loads_trains_and_exports(student: nn.Module, data: Any, tmp_path: Any) -> None:
    tt.save(student, tmp_path / "kept", spec=data.spec, labels=data.class_names)
    loaded = tt.load(tmp_path / "kept")
    x = torch.randn(4, *data.spec.size)
    assert bottleneck_of(loaded)[1].frozen and torch.equal(loaded(x), student(x))
    assert tt.export(loaded, tmp_path / "whole.onnx", data=data, exporter="classic").agreement > 0.95


def test_is_a_method_of_the_command_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--set", "at=layer1", "--set", "channels=2", "--set", "beta=0.5", "--epochs", "1", "--out", "student"]
    assert cli.main(["compress", "resnet8_mlperf_tiny", "--method", "entropic_student", *options]) == 0
    name, bottleneck = bottleneck_of(tt.load(tmp_path / "student"))
    assert (name, bottleneck.prior.channels, bottleneck.frozen) == ("conv1", 2, True)
