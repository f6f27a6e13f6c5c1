"""DCLS: the exact checks of its fact sheet, its traps, and the layer in other networks."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trimtab as tt
from tests.elsewhere import python
from trimtab import testing
from trimtab.compress import magnitude, merge, methods
from trimtab.core.cost import measure
from trimtab.core.errors import SurgeryError
from trimtab.core.meta import shapes_only
from trimtab.learn import Repulsion, param_groups
from trimtab.models.classify.dcls import VERSIONS, DCLS1d, DCLS2d, DCLS3d, construct, dcls, repulsion

LAYERS = {1: DCLS1d, 2: DCLS2d, 3: DCLS3d}
# name, weights, parameters, GMACs at 224; ConvNeXt's own parameters and GMACs
TABLE = [
    ("tiny", 34, 28_587_688, 4.970337, 28_589_128, 4.455531),
    ("small", 40, 50_217_064, 9.523658, 50_223_688, 8.683712),
    ("base", 40, 88_582_632, 16.474658, 88_591_464, 15.354729),
]


def params(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def layer(
    axes: int = 2, version: str = "v0", *, size: int = 7, count: int = 4, spread: float = 1.2, **more
) -> nn.Module:
    """In float64, positions well inside the window and off the grid, widths off their start."""
    torch.manual_seed(0)
    net = LAYERS[axes](4, 6, count, size, **{"groups": 2, "version": version, **more}).double()
    with torch.no_grad():
        net.positions.normal_(std=spread).clamp_(0.2 - size // 2, size // 2 - 0.2)
        if net.sigma is not None:
            net.sigma.uniform_(0.1, 0.4)
    return net


def images(axes: int = 2, side: int = 9) -> Tensor:
    return torch.randn(2, 4, *(side,) * axes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# -- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("axes", LAYERS)
def test_a_kernel_sums_to_the_sum_of_its_weights(axes, version):
    net = layer(axes, version)
    total = net.kernel().flatten(2).sum(-1)
    torch.testing.assert_close(total, net.weight.sum(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axes", LAYERS)
def test_inside_the_window_the_two_bilinear_versions_are_one(axes):
    net = layer(axes)
    a, b = (construct(net.weight, net.positions, net.size, version=v) for v in ("v0", "v1"))
    assert (a - b).abs().max() < 1e-6 and not torch.equal(a, b)


def test_bilinear_weights_are_the_four_products():
    kernel = construct(torch.tensor([[[2.0]]]), torch.tensor([-0.75, 1.25]).view(2, 1, 1, 1), (5, 5))[0, 0]
    want = torch.zeros(5, 5)
    want[1, 3], want[1, 4] = 2 * 0.75 * 0.75, 2 * 0.75 * 0.25  # row 2 - 0.75, column 2 + 1.25
    want[2, 3], want[2, 4] = 2 * 0.25 * 0.75, 2 * 0.25 * 0.25
    torch.testing.assert_close(kernel, want)


@pytest.mark.parametrize("version", ["max", "gauss"])
def test_other_versions_are_their_formula(version):
    """As the fact sheet writes it, with a tensor of window x weights."""
    net = layer(2, version)
    q = torch.cartesian_prod(*[torch.arange(7.0, dtype=torch.float64)] * 2).T  # (2, 49)
    away = q[:, None, None, None] - (net.positions + 3)[..., None]  # (2, C_out, C_in / g, K, 49)
    if version == "max":
        x = (1 + net.sigma.abs()[..., None] - away.abs()).relu().prod(0)
    else:
        x = torch.exp(-0.5 * ((away / (0.27 + net.sigma.abs()[..., None])) ** 2).sum(0))
    x = x / (x.sum(-1, keepdim=True) + 1e-7)
    want = (net.weight[..., None] * x).sum(-2).unflatten(-1, (7, 7))
    torch.testing.assert_close(net.kernel(), want)


def test_widths_start_where_the_sequel_starts_them():
    assert DCLS2d(2, 2, 3, 5, version="max").sigma.eq(0).all()
    assert (0.27 + DCLS2d(2, 2, 3, 5, version="gauss").sigma).allclose(torch.tensor(0.5))


def test_beyond_the_last_cell_v0_loses_mass_and_v1_keeps_it():
    weight, positions = torch.tensor([[[3.0]]]), torch.tensor([4.3, 0.5]).view(2, 1, 1, 1)
    assert construct(weight, positions, (9, 9)).sum().item() == pytest.approx(3 * 0.7)
    assert construct(weight, positions, (9, 9), version="v1").sum().item() == pytest.approx(3)


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_whole_numbered_positions_give_one_cell_each(version):
    cells = torch.tensor([[-3, 3], [0, 0], [2, -1], [-1, -2]], dtype=torch.float64).T.reshape(2, 1, 1, 4)
    kernel = construct(torch.ones(1, 1, 4, dtype=torch.float64), cells, (7, 7), version=version)
    assert kernel.count_nonzero() == 4
    assert {tuple(rc) for rc in kernel[0, 0].nonzero().tolist()} == {(0, 6), (3, 3), (5, 2), (2, 1)}


@pytest.mark.parametrize("axes", LAYERS)
def test_positions_on_a_regular_grid_are_a_dilated_convolution(axes):
    net = LAYERS[axes](4, 6, 3**axes, 7, groups=2).double()
    grid = torch.cartesian_prod(*[torch.tensor([-3.0, 0.0, 3.0])] * axes).reshape(-1, axes).T
    with torch.no_grad():
        net.positions.copy_(grid.view(axes, 1, 1, -1).expand_as(net.positions))
    conv = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    weight = net.weight.unflatten(-1, (3,) * axes)
    x = images(axes)
    torch.testing.assert_close(net(x), conv(x, weight, net.bias, 1, 3, 3, 2))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("axes", LAYERS)
def test_gradients_are_those_of_the_function(axes, version):
    net = layer(axes, version, size=5 if axes < 3 else 3, count=3)

    def output(weight: Tensor, positions: Tensor, *sigma: Tensor) -> Tensor:
        return construct(weight, positions, net.size, version=version, sigma=sigma[0] if sigma else None)

    given = [p for p in (net.weight, net.positions, net.sigma) if p is not None]
    assert torch.autograd.gradcheck(output, given)
    x = images(axes, 5)
    net(x).square().sum().backward()
    for name, p in net.named_parameters():
        direction = torch.randn_like(p)
        values = []
        for step in (1e-6, -1e-6):
            moved = copy.deepcopy(net)
            moved.get_parameter(name).data += step * direction
            values.append(moved(x).square().sum())
        assert p.grad is not None
        torch.testing.assert_close((p.grad * direction).sum(), (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_on_the_grid_the_gradient_is_the_one_to_the_right(version):
    weight = torch.ones(1, 1, 1, dtype=torch.float64)
    p = torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    worth = torch.tensor([5.0, 2.0, 7.0], dtype=torch.float64)
    (construct(weight, p, (3,), version=version)[0, 0] * worth).sum().backward()
    assert p.grad is not None and p.grad.item() == pytest.approx(7 - 2, rel=1e-5)


def test_widths_of_triangles_can_leave_their_start():
    net = DCLS2d(2, 2, 3, 5, version="max")
    (net.kernel() * torch.randn(2, 2, 5, 5)).sum().backward()
    assert net.sigma.grad.abs().min() > 0


# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("axes", LAYERS)
def test_parameters_are_weights_positions_and_widths(axes, version):
    net = LAYERS[axes](6, 8, 5, 9, groups=2, version=version)
    copies = 1 + 2 * axes if version in ("max", "gauss") else 1 + axes
    assert params(net) == 8 * 3 * 5 * copies + 8


def test_the_counts_of_the_fact_sheet():
    assert params(DCLS2d(4, 4, 5, 9, groups=4)) == 64
    assert params(DCLS2d(4, 4, 5, 9, groups=4, version="gauss")) == 104


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("axes", "stride"), [(1, 1), (2, 1), (2, 2), (3, 1)])
@torch.no_grad()
def test_merged_it_is_an_ordinary_convolution_to_the_last_bit(axes, stride, version):
    net = nn.Sequential(layer(axes, version, stride=stride)).eval()
    conv, x = merge(net)[0], images(axes)
    assert type(conv) is (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1] and conv.kernel_size == (7,) * axes
    assert torch.equal(conv(x), net(x))
    assert params(merge(net)) == 6 * 2 * 7**axes + 6


def test_a_fresh_layer_starts_as_the_paper_says():
    torch.manual_seed(0)
    net = DCLS2d(64, 64, 26, 11, groups=2)
    bound = (32 * 26) ** -0.5  # Kaiming uniform with a = sqrt 5: gain / sqrt(fan in) * sqrt 3 = 1 / sqrt(fan in)
    assert net.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert net.bias.abs().max() <= bound
    assert net.positions.std().item() == pytest.approx(0.5, rel=0.01)
    assert DCLS2d(64, 64, 5, 3, groups=64).positions.abs().max() <= 1  # clamped to the window


def test_positions_that_leave_the_window_come_back_at_the_next_training_pass():
    net = layer()
    net.positions.data[0, 0, 0, 0] = 9.0
    net.positions.data[1, 0, 0, 0] = -9.0
    with torch.no_grad():
        before = net.eval()(images())
    assert net.positions.max() == 9  # looking changes nothing
    net.train()(images())
    assert net.positions[:, 0, 0, 0].tolist() == [3, -3]
    with torch.no_grad():
        assert torch.equal(net.eval()(images()), before)


def test_a_position_on_the_border_still_gets_a_gradient():
    net = layer()
    net.positions.data[:, 0, 0, 0] = torch.tensor([3.0, -3.0])
    net.train()(images()).square().sum().backward()
    assert net.positions.grad[:, 0, 0, 0].abs().min() > 0


def test_layers_that_share_positions_clamp_them_in_the_middle_of_a_pass():
    a, b = DCLS2d(4, 4, 3, 5, groups=4), DCLS2d(4, 4, 3, 5, groups=4)
    b.positions = a.positions
    a.positions.data += 5
    nn.Sequential(a, b).train()(torch.randn(1, 4, 8, 8)).sum().backward()
    assert a.positions.grad is not None and a.positions.max() == 2


def test_under_autocast_the_kernel_keeps_its_precision():
    net = layer().float()
    exact = net.kernel()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.kernel(), exact)
        assert net(images().float()).dtype is torch.bfloat16
    assert (net.bfloat16().kernel().float() - exact).abs().max() < 0.05


def test_no_tensor_of_window_times_weights_is_made():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
            return out

    net = DCLS2d(16, 16, 34, 17)
    with Watch():
        net(torch.zeros(1, 16, 4, 4)).sum().backward()
    assert largest <= 17 * 34 * 16 * 16  # and not 17 times as much


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 4, 3, 8), "dilated_size must be odd, one number or 2, got 8"),
        ((4, 4, 3, (7, 7, 7)), "must be odd, one number or 2"),
        ((4, 4, 10, 3), "kernel_count must be 1 to 9 in this window, got 10"),
        ((4, 4, 0, 3), "kernel_count must be 1 to 9"),
    ],
)
def test_wrong_arguments_say_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        DCLS2d(*arguments)
    with pytest.raises(ValueError, match="version must be one of v0, v1, max, gauss, got 'v2'"):
        DCLS2d(4, 4, 3, 7, version="v2")
    with pytest.raises(ValueError, match="sigma must be given with version='gauss', got None"):
        construct(torch.ones(1, 1, 1), torch.zeros(2, 1, 1, 1), (3, 3), version="gauss")
    with pytest.raises(ValueError, match="groups must divide 4 and 6 channels, got 4"):
        DCLS2d(4, 6, 3, 7, groups=4)


def test_windows_need_not_be_cubes():
    net = DCLS2d(4, 4, 3, (1, 9), groups=4)
    assert net.kernel().shape == (4, 1, 1, 9) and net(torch.zeros(1, 4, 5, 20)).shape == (1, 4, 5, 20)
    net.positions.data.fill_(7.0)
    net.clamp_positions()
    assert net.positions[0].eq(0).all() and net.positions[1].eq(4).all()


# -- how it is trained ------------------------------------------------------------------------------------------------


def test_positions_learn_five_times_as_fast_and_do_not_decay():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), DCLS2d(4, 4, 3, 7, groups=4, version="gauss"))
    groups = param_groups(net, lr=0.1, weight_decay=0.05)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found[id(net[1].positions)] == (0.5, 0.0)
    assert found[id(net[1].sigma)] == (0.1, 0.0)
    assert found[id(net[1].weight)] == found[id(net[0].weight)] == (0.1, 0.05)


def test_the_factor_comes_on_top_of_layer_wise_learning_rates():
    net = dcls(timm.create_model("convnext_atto", num_classes=10))
    lr = {id(p): g["lr"] for g in param_groups(net, lr=1.0, layer_decay=0.5) for p in g["params"]}
    block = net.stages[0].blocks[0]
    assert lr[id(block.conv_dw.positions)] == pytest.approx(5 * lr[id(block.conv_dw.weight)])


def test_hidden_positions_are_found_by_gradient_descent():
    """Three points at real-valued places in a 15 x 15 window."""
    torch.manual_seed(0)
    there = torch.tensor([[3.3, -2.6, 0.4], [-1.7, 2.2, 4.4]]).view(2, 1, 1, 3)
    x = F.avg_pool2d(torch.randn(8, 1, 30, 30), 7, 1)  # smooth, as pictures are
    y = F.conv2d(x, construct(torch.tensor([[[1.0, 0.8, -0.9]]]), there, (15, 15)), padding=7)
    net = DCLS2d(1, 1, 3, 15, version="gauss", bias=False)
    optimizer = torch.optim.AdamW(param_groups(net, lr=0.02))
    for _ in range(400):
        loss = (net(x) - y).square().mean() / y.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = net.positions.detach().view(2, 3)
    error = torch.cdist(there.view(2, 3).T, found.T).min(1).values
    assert error.max() < 0.5 and loss < 0.05


def test_repulsion_is_the_mean_over_pairs():
    net = DCLS2d(2, 3, 4, 9)
    p = net.positions.detach()
    total = 0.0
    for o in range(3):
        for i in range(2):
            for a in range(4):
                for b in range(a):
                    total += max(0.0, 1 - math.dist(p[:, o, i, a].tolist(), p[:, o, i, b].tolist()))
    assert repulsion(net).item() == pytest.approx(2 / (4 * 3 * 3 * 2) * total, rel=1e-5)
    other = DCLS2d(2, 3, 4, 9)
    mean = (repulsion(net) + repulsion(other)) / 2
    assert repulsion(nn.Sequential(net, other)).item() == pytest.approx(mean.item())
    other.positions = net.positions  # counted once
    assert torch.equal(repulsion(nn.Sequential(net, other)), repulsion(net))


def test_repulsion_of_positions_on_one_point_has_a_finite_gradient():
    net = DCLS2d(1, 1, 3, 9)
    net.positions.data.zero_()
    repulsion(net).backward()
    assert net.positions.grad.isfinite().all()
    assert repulsion(DCLS2d(1, 1, 1, 9)).item() == 0
    with pytest.raises(ValueError, match="Linear has no layer with learnable spacings"):
        repulsion(nn.Linear(2, 2))


class WithDCLS(testing.ToyNet):
    def __init__(self) -> None:
        super().__init__()
        self.spaced = DCLS2d(8, 8, 5, 7, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        return self.head(self.conv2(x + self.spaced(x)).relu().flatten(1))


def toy() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WithDCLS()


def test_the_objective_keeps_the_contract():
    testing.check_objective(lambda: Repulsion(after=1), model=toy, slow=False)


def test_the_repulsion_sets_in_when_told_and_drives_positions_apart():
    data = tt.load_data("digits", limit=200)
    options = {"epochs": 4, "batch_size": 32, "lr": 0.02, "val": None, "progress": False, "seed": 0}
    crowd = {}
    for after in (2, 9):
        fitted = tt.fit(toy(), data, Repulsion(after=after), **options)
        crowd[after] = repulsion(fitted.model).item()
        logged = [r.get("repulsion") for r in fitted.history]
        assert [v is not None for v in logged] == [n >= after for n in range(4)]
    assert crowd[2] < crowd[9]
    with pytest.raises(ValueError, match="no layer with learnable spacings"):
        tt.fit(testing.toy_net(), data, Repulsion(), **options)
    with pytest.raises(ValueError, match="after must not be negative, got -1"):
        Repulsion(after=-1)


# -- the surgery ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count", "size", "macs", "theirs", "their_macs"), TABLE)
def test_convnext_dcls_has_the_sizes_of_the_table(name, count, size, macs, theirs, their_macs):
    with shapes_only():
        net = timm.create_model(f"convnext_{name}")
    new = dcls(net)
    assert (params(net), params(new)) == (theirs, size)
    layers = [m for m in new.modules() if isinstance(m, DCLS2d)]
    assert {m.weight.shape[-1] for m in layers} == {count} and {m.size for m in layers} == {(17, 17)}
    assert len({id(m.positions) for m in layers}) == 4  # one for each stage
    for n, want in ((merge(new), macs), (net, their_macs)):
        got = measure(n, (3, 224, 224), what=("macs",)).macs
        assert got is not None and got / 1e9 == pytest.approx(want, abs=5.1e-7)


def test_the_count_of_t_is_the_derived_one_and_a_layer_is_six_times_as_much_work():
    per_stage = (96, 192, 384, 768)
    weights = 15 * sum(n * c for n, c in zip((3, 3, 9, 3), per_stage))
    assert 28_589_128 - weights + 2 * 34 * sum(per_stage) == 28_587_688
    before = measure(nn.Conv2d(96, 96, 7, padding=3, groups=96), (96, 56, 56), what=("macs",)).macs
    net = merge(nn.Sequential(DCLS2d(96, 96, 34, 17, groups=96)))
    after = measure(net, (96, 56, 56), what=("macs",)).macs
    assert after * 49 == before * 289
    assert TABLE[0][3] / TABLE[0][5] == pytest.approx(1.116, abs=5e-4)  # of the whole network


@torch.no_grad()
def test_it_can_start_where_the_kernel_was():
    net = tt.create_model("convnext_atto", num_classes=10, img_size=32, ls_init_value=1.0, seed=0).eval()
    x = torch.randn(2, 3, 32, 32)
    whole = dcls(net, kernel_count=49, dilated_size=9, start="kernel", share=False)
    near = dcls(net, dilated_size=9, start="kernel")
    fresh = dcls(net, dilated_size=9)
    off = [((n(x) - net(x)).norm() / net(x).norm()).item() for n in (whole, near, fresh)]
    assert off[0] < 0.1 and off[0] < off[1] < off[2]
    block = net.stages[1].blocks[0].conv_dw
    new = dcls(net, kernel_count=5, share=False, start="kernel").stages[1].blocks[0].conv_dw
    strongest = block.weight.flatten(2).abs().topk(5).values
    torch.testing.assert_close(new.weight.abs(), strongest)
    assert not new.positions.frac().eq(0).any()  # off the grid


def test_fresh_weights_and_positions_are_those_of_the_paper_unless_spread_further():
    net = timm.create_model("convnext_atto", num_classes=10)
    new, wide = (dcls(net, **more).stages[3].blocks[0].conv_dw for more in ({}, {"spread": 2.0}))
    assert new.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert new.bias.eq(0).all()
    assert new.positions.std().item() == pytest.approx(0.5, rel=0.02)
    assert wide.positions.std().item() == pytest.approx(2, rel=0.02)


def test_positions_stay_shared_in_copies_artifacts_and_pruned_models(tmp_path):
    narrow = {"num_classes": 10, "dims": (8, 8, 12, 16), "depths": (2, 1, 2, 1)}
    net = dcls(tt.create_model("convnext_atto", **narrow, seed=0), dilated_size=9)

    def shared(n: nn.Module) -> list[int]:
        return [len({id(m.positions) for m in stage.modules() if isinstance(m, DCLS2d)}) for stage in n.stages]

    assert shared(net) == shared(copy.deepcopy(net)) == [1, 1, 1, 1]
    tt.save(net, tmp_path / "a")
    again = tt.load(tmp_path / "a")
    assert shared(again) == [1, 1, 1, 1] and params(again) == params(net)
    assert shared(dcls(tt.create_model("convnext_atto", **narrow), share=False)) == [2, 1, 2, 1]
    small = magnitude(net, (3, 32, 32), budget="macs<=60%")
    assert shared(small) == [1, 1, 1, 1]
    tt.save(small, tmp_path / "b")
    code = f"""
import torch, trimtab as tt
net = tt.load({str(tmp_path / "b")!r}).train()
net(torch.randn(2, 3, 32, 32)).square().sum().backward()
print(sum(p.numel() for p in net.parameters()), all(p.grad is not None for p in net.parameters()))
"""
    assert python(code).split() == [str(params(small)), "True"]


class Sequences(nn.Module):
    """A network for sequences and volumes, of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 4, 9, padding=4, groups=4)
        self.volume = nn.Conv3d(4, 4, 3, padding=1, groups=4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.line(x)  # (B, 4, 64)
        return self.head(self.volume(x.unflatten(2, (4, 4, 4))).mean((2, 3, 4)))


@torch.no_grad()
def test_convolutions_of_one_and_three_axes_are_replaced_too():
    torch.manual_seed(0)
    net, x = Sequences().eval(), torch.randn(2, 4, 64)
    new = dcls(net, dilated_size=5, kernel_count=3).eval()
    assert (type(new.line), type(new.volume)) == (DCLS1d, DCLS3d)
    merged = merge(new)
    assert torch.equal(merged(x), new(x)) and (type(merged.line), type(merged.volume)) == (nn.Conv1d, nn.Conv3d)
    only = dcls(net, dilated_size=5, layers="vol*")
    assert type(only.line) is nn.Conv1d and only.volume.weight.shape[-1] == 27 // 4


def test_wrong_requests_are_refused_in_words():
    net = tt.create_model("trim_mobile_10k")
    with pytest.raises(SurgeryError, match=r"no depthwise convolutions with names like \['head.\*'\]"):
        dcls(net, layers="head.*")
    with pytest.raises(ValueError, match="dilated_size must be odd"):
        dcls(net, dilated_size=8)
    with pytest.raises(ValueError, match="start must be 'fresh' or 'kernel', got 'old'"):
        dcls(net, start="old")
    with pytest.raises(ValueError, match="spread must be positive, got 0"):
        dcls(net, spread=0)


def test_it_keeps_the_contract_of_surgeries():
    testing.check_surgery(
        lambda net, size: dcls(net, dilated_size=7), model="trim_mobile_10k", skip=("smaller",)
    )  # as many parameters, not fewer multiply-adds


def test_freezing_keeps_the_contract_of_surgeries():
    testing.check_surgery(
        lambda net, size: merge(dcls(net, dilated_size=5, kernel_count=5)), model="trim_mobile_10k", slow=False,
        skip=("smaller",),
    )  # fmt: skip


def test_it_is_a_method_of_compression_and_trains_on(tmp_path):
    data = tt.load_data("digits", limit=300)
    net = tt.create_model("trim_mobile_10k", num_classes=10, in_chans=1, strides=(1, 2, 1), seed=0)
    spaced = methods.run("dcls", net, data, dilated_size=5, seed=1)
    (first, *_) = [m for m in spaced.modules() if isinstance(m, DCLS2d)]
    before = first.positions.detach().clone()
    trained = tt.fit(spaced, data, epochs=8, batch_size=8, seed=0, progress=False).model
    assert (first.positions - before).abs().max() > 0.01
    assert tt.evaluate(trained, data)["accuracy"] > 0.3  # chance is 0.1
    frozen = methods.run("merge", trained, data)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(frozen(x), trained(x))
    tt.save(frozen, tmp_path / "a")
    assert torch.equal(tt.load(tmp_path / "a")(x), frozen(x))
