"""MCUNetV2: the paper's memory to the byte, patches that compute what the network computes, files without PyTorch."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import trimtab as tt
from trimtab.cli import arguments
from trimtab.core.errors import ArtifactError, BudgetError, SurgeryError
from trimtab.deploy import PatchedModel, mcunetv2
from trimtab.deploy.mcunetv2 import choose, plan
from trimtab.deploy.mcunetv2.joint import joint
from trimtab.deploy.mcunetv2.local import Program, cells, is_depthwise, macs
from trimtab.deploy.mcunetv2.redistribute import redistribute
from trimtab.deploy.mcunetv2.schedule import Schedule
from trimtab.models.classify.mcunetv2_nets import MCUNetV2

KIB = 1024
SIZE = (3, 224, 224)
CONVS = 299_494_272  # MACs of MobileNetV2 without its classifier


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(torchvision.models.mobilenet_v2().eval(), SIZE)


def stage(program: Program, split: str, grids: tuple[int, ...]) -> dict[int, plan.Option]:
    return {o.grid: o for o, _ in plan.options(program, CONVS, grids=grids, split=split)}


# ------------------------------------------------------------------------------------------------- the paper's numbers


def test_mobilenetv2_needs_1372_kib_and_171_in_patches(program: Program) -> None:
    assert plan.whole(program).peak == 1_404_928 == 1372 * KIB
    found = stage(program, "features.4", (2, 3, 4))
    assert {g: round(o.peak / KIB, 1) for g, o in found.items()} == {2: 431.5, 3: 246.0, 4: 171.5}
    assert found[4].tail == 171.5 * KIB
    assert (round(found[4].cell / KIB, 2), found[4].buffer / KIB) == (133.98, 24.5)
    assert {g: round(100 * o.overhead, 2) for g, o in found.items()} == {2: 2.94, 3: 6.05, 4: 9.32}
    assert (found[4].receptive_field, found[4].window) == (27, 75)


def test_ending_one_block_later_costs_a_quarter_of_the_network(program: Program) -> None:
    later = stage(program, "features.5", (4,))[4]
    assert later.receptive_field == 43 and round(100 * later.overhead, 1) == 26.4


def test_without_clipping_at_borders_the_stage_costs_what_the_paper_says(program: Program) -> None:
    (cut,) = [c for c in program.cuts if program.name(c) == "features.4"]
    rows = [program.windows(cut, out, 0, clip=False) or {} for out in cells(28, 4)]
    assert {w[program.image][1] - w[program.image][0] for w in rows} == {75}
    once = patched = 0
    for node in program.head(cut):
        length = sum(w[node][1] - w[node][0] for w in rows)
        once += macs(node)
        patched += macs(node) * length**2 // program.side(node, 0) ** 2
    assert once / 1e6 == pytest.approx(91.3, abs=0.05) and patched / 1e6 == pytest.approx(129.6, abs=0.1)
    assert round(100 * (patched / once - 1), 1) == 41.9
    assert round(100 * (patched - once) / CONVS, 2) == 12.77


def test_in_place_depthwise_convolutions_are_what_makes_the_difference(program: Program) -> None:
    (cut,) = [c for c in program.cuts if program.name(c) == "features.4"]
    residual = 24.5  # alive beside the 294 KiB of the later depthwise convolution
    for nodes, source, kib in ((program.nodes, program.image, 1470), (program.tail(cut), cut, 294 + residual)):
        order = [replace(s, over=None) if is_depthwise(s.makes) else s for s in plan.steps(nodes, source)]
        sizes = {b: np.array(b.meta["val"].numel()) for s in order for b in (*s.reads, s.makes) if "val" in b.meta}
        assert plan.peak(order, sizes) == kib * KIB


def test_the_papers_schedule_is_found_without_being_told(program: Program) -> None:
    once, found = plan.whole(program), dict(plan.options(program, CONVS, grids=(2, 3, 4, 5)))
    best = choose([once, *found], memory=None, overhead=0.2)
    assert (best.split, best.grid, best.peak) == ("features.4", 4, 171.5 * KIB)
    schedule = Schedule(program, best, found[best], once, list(found), 8)
    assert repr(schedule).endswith("171.5 KiB instead of 1372.0 KiB, 8.0 times less, +9.3% MACs)")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def test_a_convolution_does_not_add_to_what_it_still_reads() -> None:
    program = Program(nn.Sequential(nn.Conv2d(3, 8, 1), Residual(), nn.AdaptiveAvgPool2d(1)), (3, 16, 16))
    _, conv, add, _ = plan.steps(program.nodes, program.image)
    assert conv.over is None and add.over in add.reads
    assert plan.whole(program).peak == 2 * 8 * 16 * 16


def test_timms_mobilenetv2_has_the_same_numbers() -> None:
    model = tt.create_model("mobilenetv2_100")
    begin = Program(nn.Sequential(model.conv_stem, model.bn1, *model.blocks[:2], model.blocks[2][:2]), SIZE)
    (option,) = stage(begin, "4.0", (4,)).values()
    assert plan.whole(begin).peak == 1372 * KIB
    assert (option.peak, option.window, option.receptive_field) == (171.5 * KIB, 75, 27)


def test_the_released_network_has_the_files_counts_and_memory() -> None:
    model = tt.create_model("mcunetv2_large").eval()
    cost = tt.measure(model, SIZE, what=("params", "macs"))
    norms = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert (cost.macs, (cost.params or 0) - norms) == (216_815_264, 1_799_208)
    begin = Program(nn.Sequential(model.stem, model.blocks[:3]), SIZE)
    assert plan.whole(begin).peak == 1372 * KIB
    found = {o.grid: o for o, _ in plan.options(begin, 216_431_264, grids=(2, 4, 7), split="1.1")}
    assert found[4].receptive_field == 15
    assert (round(found[4].cell / KIB, 1), round(found[4].buffer / KIB, 1)) == (105.1, 30.6)
    assert round((found[4].cell + found[4].buffer) / KIB, 1) == 135.7
    assert found[4].tail == 214.375 * KIB + 250  # squeeze-and-excitation has vectors, which the sheet leaves out
    assert {g: round(100 * o.overhead, 1) for g, o in found.items()} == {2: 1.0, 4: 3.0, 7: 6.3}


def test_redistribution_makes_windows_of_63_pixels(program: Program) -> None:
    begin = torchvision.models.mobilenet_v2().features[:8].eval()  # what is left out stays as it is
    changed = redistribute(begin, SIZE, split="4")
    after = Program(changed, SIZE)
    old, new = stage(program, "features.4", (4,))[4], stage(after, "4", (4,))[4]
    assert (old.window, new.window, new.receptive_field) == (75, 63, 15)
    assert new.overhead < 0.4 * old.overhead and new.tail == old.tail
    last = [next(c for c in p.cuts if p.name(c) == name) for p, name in ((program, "features.6"), (after, "6"))]
    assert after.receptive_field(last[1]) >= program.receptive_field(last[0])
    assert (tt.measure(changed, SIZE).macs or 0) <= (tt.measure(begin, SIZE).macs or 0)
    x = torch.randn(1, 32, 8, 8)
    assert torch.equal(changed[5](x), changed[5].base(x))  # a new block begins as an identity


# --------------------------------------------------------------------------------------------------- the same function


class Everything(nn.Module):
    """Every kind of local operator, at sizes that nothing divides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.even = nn.Conv2d(8, 8, 4, padding="same")
        self.late = nn.Conv2d(8, 8, (3, 5), (1, 2), (1, 0))
        self.layer_norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.stem(x)))
        x = x + self.wide(x)
        x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
        a, b = x.chunk(2, 1)
        x = torch.cat([b, F.avg_pool2d(F.pad(a, (1, 1, 1, 1), value=0.5), 3, 1)], 1)
        x = x.view(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        x = F.relu6(self.even(x)) * 0.5
        x = x + self.mix(self.layer_norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x = self.late(F.pad(x, (0, 1, 1, 0)))
        x = torch.cat([x[:, :, 1:, ::2], torch.sigmoid(x[:, :, :-1, ::2])], 1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def shaken(model: nn.Module) -> nn.Module:
    """Statistics and biases that are not zero: padding the image once would be seen."""
    generator = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.running_mean, m.bias.data):
                t.copy_(0.3 * torch.randn(t.shape, generator=generator))
    return model.eval()


def differences(model: nn.Module, size: tuple[int, int, int], grids: tuple[int, ...]) -> dict[str, float]:
    program = Program(model, size)
    x = torch.randn((2, *size), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(x)
    found = {}
    for option, cut in plan.options(program, 1, grids=grids):
        schedule = Schedule(program, option, cut, plan.whole(program), [], 8)
        found[f"{option.split} {option.grid}"] = float((schedule.run(x) - want).abs().max() / want.abs().max())
    return found


@pytest.mark.parametrize(
    ("model", "size", "places"),
    [
        pytest.param(Everything, (3, 61, 77), 5, id="everything"),
        pytest.param(lambda: tt.create_model("resnet20_cifar", depths=(1, 1, 1)), (3, 30, 33), 4, id="resnet"),
    ],
)
def test_patches_compute_what_the_network_computes(model: Any, size: tuple[int, int, int], places: int) -> None:
    torch.manual_seed(0)
    found = differences(shaken(model()), size, (2, 3))
    assert len({name.split()[0] for name in found}) >= places
    assert max(found.values()) < 1e-5


def test_work_that_looks_at_the_whole_image_ends_the_patches() -> None:
    """A network with squeeze-and-excitation in its first block can only be split before it."""
    net = MCUNetV2(blocks=((16, 3, 2, 16, 4), (32, 3, 2, 16, 0)), num_classes=2).eval()
    program = Program(net, (3, 32, 32))
    assert {program.name(c) for c in program.cuts} <= {"stem.0", "stem", "blocks.0.expand", "blocks.0.depthwise"}


# ----------------------------------------------------------------------------------------------------------- choosing


def small_net(in_chans: int = 3) -> nn.Module:
    blocks = ((24, 3, 2, 8, 0), (24, 3, 1, 8, 0), (24, 3, 2, 16, 4))
    kind = {"stem": 8, "blocks": blocks, "neck": 24}
    return shaken(tt.create_model("mcunetv2_large", num_classes=3, in_chans=in_chans, seed=0, **kind))


@pytest.fixture(scope="module")
def lowest() -> Schedule:
    return mcunetv2(small_net(), (3, 64, 64))


def test_the_least_overhead_inside_the_memory_is_chosen(lowest: Schedule) -> None:
    table = [lowest.whole, *lowest.table]
    assert lowest.peak == min(o.peak for o in table if o.overhead <= 0.2)
    some = choose(table, memory=2 * lowest.peak, overhead=0.2)
    assert some.peak <= 2 * lowest.peak
    assert some.overhead == min(o.overhead for o in table if o.peak <= 2 * lowest.peak) < lowest.overhead
    assert choose(table, memory=10**6, overhead=0.2) == lowest.whole
    with pytest.raises(BudgetError, match=r"memory<=1 KB cannot be met: the lowest peak with an overhead of at most"):
        choose(table, memory=1000, overhead=0.2)
    with pytest.raises(BudgetError, match=r"no schedule does at most 0\.0% of the work twice"):
        choose([o for o in table if o.overhead > 0], memory=None, overhead=0.0)


def test_a_network_that_fits_is_run_as_always_and_bits_count() -> None:
    net = small_net()
    whole = mcunetv2(net, (3, 64, 64), memory=10**6, act_bits=32, grids=(2,))
    assert (whole.split, whole.overhead, whole.peak) == ("", 0.0, plan.whole(whole.program, 8).peak * 4)
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(whole.run(x), net(x), atol=1e-6)


def test_lifetimes_say_what_pytorch_takes(lowest: Schedule) -> None:
    live = lowest.live_bytes()
    for way in live.values():
        assert way["measured"] == way["expected"]
    assert live["patches"]["measured"] < 0.6 * live["whole"]["measured"]


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"grids": (1, 2)}, "grids must be whole numbers from 2 on"),
        ({"overhead": -0.1}, "overhead must be at least 0"),
        ({"act_bits": 64}, "act_bits must be 1 to 32"),
        ({"split": "nowhere"}, "split must be one of stem"),
        ({"memory": "2 parsecs"}, "memory"),
    ],
)
def test_wrong_arguments_are_refused(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        mcunetv2(small_net(), (3, 32, 32), **kwargs)


def test_wrong_input_is_refused(lowest: Schedule) -> None:
    net = small_net()
    with pytest.raises(ValueError, match="data must be a Data, an InputSpec or a size"):
        mcunetv2(net, torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 64, 64\), got \(1, 3, 16, 16\)"):
        lowest.run(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"data must be a Data for save\(\)"):
        lowest.save("unused")
    with pytest.raises(SurgeryError, match="no depthwise convolution of stride 1 before stem"):
        redistribute(net, (3, 32, 32), split="stem")


def test_the_module_can_be_called_however_it_was_imported() -> None:
    module: Any = importlib.import_module("trimtab.deploy.mcunetv2")
    with pytest.raises(ValueError, match="overhead must be at least 0"):
        module(small_net(), (3, 32, 32), overhead=-1)


# -------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def data() -> Any:
    return tt.load_data("shapes:classes=3,size=48,n=60")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, data: Any) -> tuple[Path, nn.Module]:
    net = small_net(in_chans=data.in_chans)
    return mcunetv2(net, data).save(tmp_path_factory.mktemp("patched") / "net"), net


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it fails
import numpy as np
from trimtab.deploy import PatchedModel
model = PatchedModel(sys.argv[1])
np.save(sys.argv[2], model.logits(np.load(sys.argv[2])))
print(model.predict(np.zeros((20, 30, 3), np.uint8))[0].label)
"""


def test_files_run_where_there_is_no_pytorch(saved: tuple[Path, nn.Module], data: Any, tmp_path: Path) -> None:
    folder, net = saved
    x = torch.randn(3, *data.spec.size)
    np.save(tmp_path / "x.npy", x.numpy())
    run = [sys.executable, "-c", WITHOUT_TORCH, str(folder), str(tmp_path / "x.npy")]
    label = subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()
    want = net(x).detach().numpy()
    assert np.abs(np.load(tmp_path / "x.npy") - want).max() < 1e-5 * max(1, np.abs(want).max())
    assert label in data.class_names


def test_a_folder_of_patches_predicts_from_the_command_line(saved: tuple[Path, nn.Module], data: Any) -> None:
    folder, _ = saved
    image = folder.parent / "image.png"
    data.splits["test"].image(0).save(image)
    (answer,) = arguments.predicted(str(folder), [image], 1)
    (want,) = PatchedModel(folder).predict(image)
    assert (answer["label"], answer["confidence"]) == (want.label, want.confidence)


def test_the_files_give_the_same_labels(saved: tuple[Path, nn.Module], data: Any) -> None:
    folder, net = saved
    model = PatchedModel(folder)
    images = next(iter(data.loader("test", batch_size=12, shuffle=False)))["image"]
    assert (model.logits(images.numpy()).argmax(-1) == net(images).argmax(-1).numpy()).all()
    assert model.figures["peak"] < model.figures["whole"]
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 48, 48\)"):
        model.logits(np.zeros((1, 3, 8, 8), np.float32))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["patches"][0].update(window=[0, 0, 99, 8]), "a patch with a window"),
        (lambda d: d["patches"].pop(), "patches do not fill every place of the map once"),
        (lambda d: d["patches"][0].update(part="../other.onnx"), "is damaged"),
        (lambda d: d["sha256"].update({"tail.onnx": "0" * 64}), "not the file that was written"),
        (lambda d: d.update(schema_version=2), "is damaged"),
    ],
)
def test_damaged_folders_are_refused(saved: tuple[Path, nn.Module], tmp_path: Path, change: Any, says: str) -> None:
    folder, _ = saved
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "schedule.json").read_text())
    change(content)
    (tmp_path / "schedule.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=says):
        PatchedModel(tmp_path)
    with pytest.raises(ArtifactError, match="is no network in patches"):
        PatchedModel(tmp_path / "nothing")


# ------------------------------------------------------------------------------------------- with the rest of the house


def test_a_redistributed_network_is_kept_and_runs_alike(tmp_path: Path) -> None:
    net = small_net()
    changed = redistribute(net, (3, 64, 64), split="blocks.1")
    tt.save(changed, tmp_path)
    again = tt.load(tmp_path).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), changed.eval()(x))
    assert again.get_submodule("blocks.1.depthwise.0").kernel_size == (1, 1)
    assert net.get_submodule("blocks.1.depthwise.0").kernel_size == (3, 3)


def test_joint_search_finds_networks_that_fit_only_in_patches() -> None:
    data = tt.load_data("shapes:classes=3,size=32,n=60")

    def build(width: int) -> nn.Module:
        stages = [{"width": width, "expand": 2}, {"width": 16, "expand": 2, "stride": 2}]
        kind = {
            "stem": 8,
            "neck": 16,
            "stem_stride": 1,
            "shortcut": "same",
            "in_chans": data.in_chans,
            "num_classes": 3,
        }
        return tt.create_model("mbconv_net", stages=stages, **kind)

    net = tt.search.elastic(build, data, {"width": (12, 24)})
    memory = mcunetv2(net.draft({"width": 12}), data).peak
    _, schedule, found = joint(net, data, memory=f"{memory}B", method="exhaustive", batches=1, grids=(2, 3, 4))
    assert {t.arch["width"] for t in found.tried} == {12}
    assert schedule.peak <= memory < schedule.whole.peak
    assert found.cost["memory"] == schedule.peak
