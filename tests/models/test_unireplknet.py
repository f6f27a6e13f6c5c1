"""UniRepLKNet: the exact checks of its fact sheet, its traps, and its blocks in other networks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab import testing
from trimtab.compress import magnitude, merge, methods
from trimtab.core.cost import measure
from trimtab.core.edit import history
from trimtab.core.errors import SurgeryError
from trimtab.core.meta import shapes_only
from trimtab.models.classify.unireplknet import (
    BRANCHES,
    GRN,
    DilatedReparam,
    UniRepBlock,
    UniRepLKNet,
    branches_of,
    plan,
    unireplknet,
)

# parameters in training and merged; (image size, GMACs in training, merged), as printed
TABLE: dict[str, tuple[int, int, list[tuple[int, str, str]]]] = {
    "a": (4_649_060, 4_437_300, [(224, "0.675", "0.640")]),
    "f": (6_489_328, 6_235_216, [(224, "0.947", "0.905")]),
    "p": (11_080_520, 10_741_704, [(224, "1.629", "1.573")]),
    "n": (18_818_880, 18_318_560, [(224, "2.849", "2.767")]),
    "t": (31_693_420, 31_037_980, [(224, "5.004", "4.899")]),
    "s": (56_456_704, 55_645_984, [(224, "9.219", "9.094"), (384, "27.09", "26.72")]),
    "b": (99_089_416, 98_008_456, [(224, "16.22", "16.06"), (384, "47.67", "47.18")]),
    "l": (220_076_056, 218_454_616, [(192, "26.55", "26.37"), (384, "106.16", "105.42")]),
    "xl": (388_690_984, 386_529_064, [(192, "46.96", "46.71"), (384, "187.76", "186.77")]),
}
PER_CHANNEL = {5: (49, 26), 7: (100, 50), 9: (159, 82), 11: (210, 122), 13: (282, 170), 15: (338, 226), 17: (434, 290)}
MICRO = "unireplknet_micro_32"


def params(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@torch.no_grad()
def shaken(net: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with statistics, scales and shifts that nothing cancels."""
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2, generator=g)
            m.running_var.uniform_(0.5, 2, generator=g)
    for p in net.parameters():
        if p.ndim == 1:
            p.uniform_(0.5, 1.5, generator=g)
    return net.eval()


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def off(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


# -- the networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_sizes_are_the_published_ones(name):
    train, merged, costs = TABLE[name]
    with shapes_only():
        nets = [timm.create_model(f"unireplknet_{name}", deploy=deploy) for deploy in (False, True)]
    assert [params(net) for net in nets] == [train, merged]
    for side, *printed in costs:
        for net, text in zip(nets, printed, strict=True):
            macs = measure(net, (3, side, side), what=("macs",)).macs
            assert macs is not None and macs / 1e9 == pytest.approx(
                float(text), abs=0.51 * 10 ** -len(text.split(".")[1])
            )


def test_large_kernels_stand_where_the_depths_say():
    def sizes(name: str) -> list[list[int]]:
        with shapes_only():
            net = timm.create_model(f"unireplknet_{name}", deploy=True)
        return [[block.mixer.kernel_size[0] for block in stage.blocks] for stage in net.stages]

    assert sizes("a") == [[3, 3], [13, 13], [13] * 6, [13, 13]]
    assert sizes("t") == [[3] * 3, [13] * 3, [13, 3] * 9, [13] * 3]
    assert sizes("s") == [[3] * 3, [13] * 3, [13, 3, 3] * 9, [13] * 3]
    assert sizes("micro_32") == [[3], [7], [9, 3, 9], [5]]


def test_maps_are_a_quarter_to_a_32nd_of_the_image():
    net = timm.create_model("unireplknet_a", features_only=True).eval()
    assert [tuple(m.shape[1:]) for m in net(torch.zeros(1, 3, 64, 64))] == [
        (40, 16, 16), (80, 8, 8), (160, 4, 4), (320, 2, 2)
    ]  # fmt: skip
    maps = timm.create_model(MICRO, features_only=True).eval()(torch.zeros(1, 3, 32, 32))
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2]


@torch.no_grad()
def test_the_whole_of_a_merges_exactly_and_the_merged_form_loads_it():
    net = shaken(tt.create_model("unireplknet_a", seed=0))
    x = images(2, 3, 64, 64)
    assert off(merge(net)(x), net(x)) < 1e-5
    net, x = net.double(), x.double()
    merged = merge(net)
    assert off(merged(x), net(x)) < 1e-13
    assert params(merged) == TABLE["a"][1]
    deploy = tt.create_model("unireplknet_a", deploy=True).double().eval()
    deploy.load_state_dict(merged.state_dict())
    assert torch.equal(deploy(x), merged(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_merging_keeps_the_type_of_the_weights(dtype):
    net = shaken(tt.create_model(MICRO, seed=0)).to(dtype)
    merged = merge(net)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    want = copy.deepcopy(net).float()(images(4, 3, 32, 32))
    assert off(merged.float()(images(4, 3, 32, 32)), want) < (1e-6 if dtype is torch.float64 else 0.05)


@torch.no_grad()
def test_in_training_mode_batch_statistics_make_the_difference():
    net, x = shaken(tt.create_model(MICRO, seed=0)), images(8, 3, 32, 32)
    merged = merge(net)
    assert off(merged(x), net(x)) < 1e-5
    assert off(merged.train()(x), net.train()(x)) > 0.01


@torch.no_grad()
def test_fresh_blocks_are_nearly_the_identity():
    block, x = UniRepBlock(16, 7).eval(), images(2, 16, 8, 8)
    assert (block(x) - x).abs().max() < 1e-5
    assert torch.equal(GRN(16)(x.permute(0, 2, 3, 1)), x.permute(0, 2, 3, 1))


@torch.no_grad()
def test_grn_is_the_formula():
    grn, x = GRN(6), images(2, 5, 4, 6)
    nn.init.normal_(grn.weight)
    nn.init.normal_(grn.bias)
    g = x.pow(2).sum((1, 2)).sqrt()  # (B, C)
    n = g / (g.mean(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(grn(x), (grn.weight * n[:, None, None] + 1) * x + grn.bias)
    assert off(grn(x)[:, :, :2], grn(x[:, :, :2])) > 0.01  # a crop is another map


@torch.no_grad()
def test_squeeze_excite_and_the_scale_of_grn_stay():
    net = shaken(tt.create_model(MICRO, seed=0))
    merged = merge(net)
    for before, after in zip(net.stages[1].blocks, merged.stages[1].blocks, strict=True):
        assert torch.equal(before.se.fc1.weight, after.se.fc1.weight)
        assert torch.equal(before.grn.weight, after.grn.weight) and after.grn.bias is None
        assert torch.equal(before.fc1.weight, after.fc1.weight)
        assert type(after.mixer) is nn.Conv2d
    assert not any(isinstance(m, nn.BatchNorm2d | DilatedReparam) for m in merged.modules())


@pytest.mark.parametrize(("kernel", "kind"), [(0, nn.Identity), (3, nn.Conv2d), (5, nn.Conv2d), (7, DilatedReparam)])
@torch.no_grad()
def test_branches_begin_at_seven(kernel, kind):
    block = shaken(UniRepBlock(8, kernel))
    assert type(block.mixer) is kind
    x, holder = images(2, 8, 9, 9), nn.Sequential(block)
    merged = merge(holder)
    assert off(merged(x), block(x)) < 1e-5
    assert {n for n, _ in merged[0].named_parameters()} == {
        n for n, _ in UniRepBlock(8, kernel, deploy=True).named_parameters()
    }


def test_wrong_arguments_say_what_was_expected():
    for message, arguments in {
        "kernel_sizes must be given for depths": {"depths": (1, 1, 3, 1)},
        r"must be \(1, 1, 1, 1\) numbers": {"depths": (1, 1, 1, 1), "kernel_sizes": ((3,), (3,), (3, 3), (3,))},
        "must be of 0, 3, 5, .*, got 4": {"depths": (1, 1, 1, 1), "kernel_sizes": ((3,), (4,), (3,), (3,))},
        "stem_stride must be 2 or 4, got 3": {"stem_stride": 3},
        "branches must be one of dilated, dense, none, got 'wide'": {"branches": "wide"},
        "four numbers each": {"dims": (8, 16)},
    }.items():
        with pytest.raises(ValueError, match=message):
            UniRepLKNet(**arguments)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got shape"):
        tt.create_model(MICRO)(torch.zeros(3, 32, 32))


def test_blocks_computed_again_give_the_same_gradients():
    net, x = tt.create_model(MICRO, seed=0), images(4, 3, 32, 32)
    other = copy.deepcopy(net)
    other.set_grad_checkpointing()
    for n in (net, other):
        n(x).square().sum().backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_drop_path_and_head_follow_their_arguments():
    net = tt.create_model(MICRO, drop_path_rate=0.5)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in net.stages for b in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert tt.create_model(MICRO, head_init_scale=0.001).head.weight.abs().max() < 1e-4


def released(name: str, kernels: dict[str, int], deploy: bool) -> str:
    """One of our names as the released checkpoints have it."""
    part = name.split(".")
    if part[0] == "stem":
        return f"downsample_layers.0.{int(part[1]) // 2 * 3 + int(part[2])}.{part[3]}"
    if part[0] == "stages" and part[2] == "down":
        return ".".join(["downsample_layers", part[1], *part[3:]])
    if part[0] != "stages":
        return name
    block, inner = ".".join(["stages", part[1], part[3]]), ".".join(part[4:])
    if inner.startswith("mixer.branches."):
        k, r = BRANCHES[kernels[block]][int(part[6])]
        return f"{block}.dwconv.dil_{'conv' if part[7] == 'conv' else 'bn'}_k{k}_{r}.{part[8]}"
    large = "lk_origin." if deploy and kernels[block] >= 7 else ""
    for ours, theirs in {
        "mixer.conv.": "dwconv.lk_origin.", "mixer.norm.": "dwconv.origin_bn.", "mixer.": f"dwconv.{large}",
        "norm1.": "norm.", "se.fc1.": "se.down.", "se.fc2.": "se.up.", "fc1.": "pwconv1.1.", "fc2.": "pwconv2.0.",
        "norm2.": "pwconv2.2.", "grn.weight": "act.1.gamma", "grn.bias": "act.1.beta", "scale.gamma": "gamma",
    }.items():  # fmt: skip
        if inner.startswith(ours):
            return f"{block}.{theirs}{inner[len(ours) :]}"
    raise AssertionError(name)


@pytest.mark.parametrize("deploy", [False, True])
def test_released_checkpoints_load(deploy, tmp_path):
    from safetensors.torch import save_file

    small: dict[str, Any] = {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "deploy": deploy,
                             "kernel_sizes": ((3,), (13,), (13, 3), (9,))}  # fmt: skip
    net = shaken(tt.create_model("unireplknet_a", **small, seed=0))
    kernels = {"stages.0.0": 3, "stages.1.0": 13, "stages.2.0": 13, "stages.2.1": 3, "stages.3.0": 9}
    state = {released(k, kernels, deploy): v[None, None, None] if ".grn." in k else v
             for k, v in net.state_dict().items()}  # fmt: skip
    assert deploy or "stages.1.0.dwconv.dil_conv_k7_2.weight" in state
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    again = tt.create_model("unireplknet_a", **small, weights=tmp_path / "w.safetensors", seed=1).eval()
    assert torch.equal(again(images(2, 3, 64, 64)), net(images(2, 3, 64, 64)))


# -- the block of branches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", BRANCHES)
def test_parameters_per_channel_are_those_of_the_table(kernel):
    layer = DilatedReparam(3, kernel)
    train, deploy = PER_CHANNEL[kernel]
    assert params(layer) == 3 * train == 3 * (kernel**2 + 2 + sum(k**2 + 2 for k, _ in BRANCHES[kernel]))
    assert params(merge(nn.Sequential(layer))) == 3 * deploy == 3 * (kernel**2 + 1)


@pytest.mark.parametrize("kernel", BRANCHES)
def test_branches_reach_at_most_as_far_as_the_large_kernel(kernel):
    reaches = [r * (k - 1) + 1 for k, r in BRANCHES[kernel]]
    assert all(reach <= kernel and reach % 2 == 1 for reach in reaches)


@pytest.mark.parametrize("kind", ["dilated", "dense", "none"])
@pytest.mark.parametrize(("kernel", "stride"), [(7, 1), (13, 1), (9, 2), (17, [2, 1])])
@torch.no_grad()
def test_branches_merge_into_one_plain_convolution(kernel, stride, kind):
    stride = tuple(stride) if isinstance(stride, list) else stride
    layer = shaken(DilatedReparam(6, kernel, stride=stride, branches=kind)).double()
    x = images(2, 6, 15, 14, dtype=torch.float64)
    conv = merge(nn.Sequential(layer))[0]
    assert type(conv) is nn.Conv2d and conv.kernel_size == (kernel, kernel)
    assert off(conv(x), layer(x)) < 1e-13


def test_dense_branches_have_the_same_kernels_and_parameters():
    assert branches_of(13, "dense") == ((5, 1), (7, 1), (3, 1), (3, 1), (3, 1))
    assert params(DilatedReparam(4, 13, branches="dense")) == params(DilatedReparam(4, 13))


@pytest.mark.parametrize(("kernel", "branches"), [(7, [(4, 1)]), (7, [(3, 4)]), (6, "dilated"), (19, "dilated")])
def test_branches_that_do_not_fit_are_refused(kernel, branches):
    with pytest.raises(ValueError, match=r"must be (odd and reach at most 7|one of 5, 7, .*, got)"):
        DilatedReparam(4, kernel, branches=branches)


# -- the surgeries ----------------------------------------------------------------------------------------------------


class Mobile(nn.Module):
    """Somebody's network: depthwise convolutions with and without bias and stride, in a model of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.one = nn.Conv2d(8, 8, 7, 1, 3, groups=8)
        self.two = nn.Conv2d(8, 8, 9, 2, 4, groups=8, bias=False)
        self.small = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.small(self.two(self.one(self.stem(x)).relu()).relu()).mean((2, 3)))


@pytest.mark.parametrize("branches", ["dilated", "dense"])
@torch.no_grad()
def test_any_model_gets_branches_and_computes_what_it_did(branches):
    torch.manual_seed(0)
    net, x = Mobile().double().eval(), images(2, 3, 24, 24, dtype=torch.float64)
    more = unireplknet(net, branches=branches)
    assert [n for n, m in more.named_modules() if isinstance(m, DilatedReparam)] == ["one", "two"]
    assert off(more(x), net(x)) < 1e-12 and params(more) > params(net)
    back = merge(more)
    assert off(back(x), net(x)) < 1e-12
    assert torch.allclose(back.one.weight, net.one.weight, atol=1e-12)


def test_what_the_branches_learn_is_in_the_merged_model():
    torch.manual_seed(0)
    net, x = Mobile(), images(8, 3, 24, 24)
    more = unireplknet(net).train()
    optimizer = torch.optim.SGD(more.parameters(), lr=0.05)
    for _ in range(3):
        more(x).square().sum().backward()
        optimizer.step()
    more.eval()
    merged = merge(more)
    assert off(merged(x), more(x)) < 1e-5 < 0.01 < off(more(x), net.eval()(x))
    assert {type(m) for m in merged.modules()} == {type(m) for m in net.modules()}


def test_the_surgery_says_no_in_words():
    with pytest.raises(SurgeryError, match="ResNetCifar has no depthwise convolution of 5x or more"):
        unireplknet(tt.create_model("resnet20_cifar"))
    with pytest.raises(SurgeryError, match="of 11x or more"):
        unireplknet(Mobile(), min_kernel=11)
    with pytest.raises(ValueError, match="must be one of dilated, dense, got 'none'"):
        unireplknet(Mobile(), branches="none")


def test_the_result_depends_on_the_seed_and_on_no_random_state():
    torch.manual_seed(0)
    net = Mobile()
    state = torch.get_rng_state()
    a, b, c = (unireplknet(net, seed=seed).one.branches[0].conv.weight for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)
    assert [e.module for e in plan(net)] == ["one", "two"]


def test_it_keeps_the_contract_of_surgeries():
    testing.check_surgery(
        lambda net, size: unireplknet(net), model="convnext_atto", img_size=32, slow=False, skip=("smaller",)
    )  # it grows what is merged back later


def test_merging_keeps_the_contract_of_surgeries():
    testing.check_surgery(lambda net, size: merge(net), model=MICRO, layer_scale_init=1.0)


@torch.no_grad()
def test_a_pruned_network_merges_and_a_merged_one_can_be_pruned(tmp_path):
    net, x = shaken(tt.create_model(MICRO, dims=(8, 16, 24, 32), seed=0)), images(2, 3, 32, 32)
    pruned = magnitude(net, (3, 32, 32), budget="macs<=60%").eval()
    merged = merge(pruned)
    assert off(merged(x), pruned(x)) < 1e-5 and params(merged) < params(pruned)
    tt.save(merged, tmp_path / "a")
    assert torch.equal(tt.load(tmp_path / "a")(x), merged(x))
    assert magnitude(merge(net), (3, 32, 32), budget="macs<=60%").eval()(x).shape == (2, 10)


def test_a_recipe_trains_and_merges(tmp_path):
    from trimtab.compact.recipe import run

    (tmp_path / "r.yaml").write_text(f"""
data: {{spec: digits, limit: 200}}
model: {{name: {MICRO}, dims: [8, 8, 8, 8]}}
out: {tmp_path / "o"}
phases:
  - train: {{epochs: 1, opt: adamw, progress: false}}
  - compress: {{method: merge}}
""")
    result = run(tmp_path / "r.yaml")
    assert [p["phase"] for p in result["phases"]] == ["train", "compress"]
    kept = tt.load(tmp_path / "o")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in kept.modules())
    assert {e.kind for e in history(kept).edits} >= {"replace", "remove"}


@torch.no_grad()
def test_the_surgeries_are_methods_of_compression():
    net = shaken(tt.create_model("convnext_atto", num_classes=10, img_size=32, ls_init_value=1.0, seed=0))
    more = methods.run("unireplknet", net, (3, 32, 32), min_kernel=7).eval()
    x = images(2, 3, 32, 32)
    assert off(more(x), net(x)) < 1e-5
    assert off(methods.run("merge", more, (3, 32, 32))(x), net(x)) < 1e-5


@torch.no_grad()
def test_branches_of_a_dilated_kernel_equal_the_dilated_convolution():
    from trimtab.nn.merge import dilate

    x, kernel = images(1, 4, 12, 12), images(6, 2, 3, 3)  # two input channels per group
    wide = dilate(kernel, 3)
    assert wide.count_nonzero() == kernel.numel() and wide.shape[-2:] == (7, 7)
    torch.testing.assert_close(
        F.conv2d(x, wide, padding=3, groups=2), F.conv2d(x, kernel, padding=3, dilation=3, groups=2)
    )
