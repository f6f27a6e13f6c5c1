"""`SparseConv1x1`: the function of the dense masked layer, on every kernel, and really fewer bytes."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.core.cost import measure
from trimtab.core.errors import MissingExtra
from trimtab.nn import sparse
from trimtab.nn.sparse import KERNELS, SparseConv1x1, available, densify, kernel


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def block_mask(out_channels: int, in_channels: int, block: int, density: float = 0.2) -> torch.Tensor:
    body = out_channels // block
    rows = torch.rand(body + out_channels % block, in_channels, generator=seeded(1)) < density
    return torch.cat([rows[:body].repeat_interleave(block, 0), rows[body:]])


def pair(
    out_channels: int = 37, in_channels: int = 24, block: int = 1, *, bias: bool = True
) -> tuple[SparseConv1x1, nn.Conv2d]:
    """A sparse layer, and the dense one with the same zeros."""
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias).eval()
    for p in conv.parameters():
        p.data.normal_(generator=seeded())
    keep = block_mask(out_channels, in_channels, block)
    layer = SparseConv1x1.of(conv, keep, block=block).eval()
    conv.weight.data *= keep[:, :, None, None]
    return layer, conv


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("out_channels", [37, 40, 3])
@torch.no_grad()
def test_every_kernel_computes_the_masked_dense_convolution(name, block, out_channels):
    layer, conv = pair(out_channels, block=block)
    x = torch.randn(3, 24, 9, 7, generator=seeded())
    with kernel(name):
        torch.testing.assert_close(layer(x), conv(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("act", "function"), [("relu", F.relu), ("relu6", F.relu6)])
@torch.no_grad()
def test_the_activation_comes_last_and_lets_nan_through(name, act, function):
    layer, conv = pair()
    layer.act = act
    x = 3 * torch.randn(1, 24, 25, 25, generator=seeded())  # more pixels than one tile of the kernel
    x[0, :, 0, 0] = float("nan")
    with kernel(name):
        torch.testing.assert_close(layer(x), function(conv(x)), atol=1e-4, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("nonzeros", [1, 14, 16, 18, 20])
@torch.no_grad()
def test_a_fresh_layer_holds_as_many_zeros_as_it_says(nonzeros):
    layer = SparseConv1x1(4, 5, nonzeros=nonzeros, block=4)
    assert layer.keep.sum() == nonzeros
    for name in KERNELS:
        with kernel(name):
            assert not layer(torch.ones(1, 4, 2, 2)).any()


@torch.no_grad()
def test_an_empty_row_gives_the_bias():
    conv = nn.Conv2d(4, 8, 1)
    keep = torch.zeros(8, 4, dtype=torch.bool)
    keep[:4, 2] = True
    layer = SparseConv1x1.of(conv, keep, block=4).eval()
    for name in KERNELS:
        with kernel(name):
            torch.testing.assert_close(
                layer(torch.ones(1, 4, 2, 2))[0, 4:, 0, 0], conv.bias[4:].detach(), atol=1e-6, rtol=0
            )


@torch.no_grad()
def test_memory_layout_of_the_input_does_not_matter():
    layer, conv = pair()
    x = torch.randn(2, 24, 6, 6, generator=seeded()).to(memory_format=torch.channels_last)
    for name in KERNELS:
        with kernel(name):
            torch.testing.assert_close(layer(x), conv(x), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer(x[:, :, ::2]), conv(x[:, :, ::2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_gradients_are_those_of_the_dense_layer_where_weights_are_kept(block):
    layer, conv = pair(block=block)
    x = torch.randn(2, 24, 5, 5, generator=seeded())
    (layer(x) ** 2).sum().backward()
    (conv(x) ** 2).sum().backward()
    dense = SparseConv1x1.of(conv, layer.keep, block=block)
    dense.fill(conv.weight.grad[:, :, 0, 0], layer.keep)
    torch.testing.assert_close(layer.values.grad, dense.values.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, conv.bias.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["in place", "data", "state dict"])
@torch.no_grad()
def test_kernels_follow_the_weights(change):
    layer, _ = pair()
    x = torch.randn(1, 24, 4, 4, generator=seeded())
    for name in KERNELS:
        with kernel(name):
            before = layer(x)
            if change == "in place":
                layer.values.mul_(2)
                layer.bias.mul_(2)
            elif change == "data":  # which autograd does not see; training ends with eval()
                layer.values.data.mul_(2)
                layer.bias.data.mul_(2)
                layer.eval()
            else:
                layer.load_state_dict({k: v * 2 if k != "mask" else v for k, v in layer.state_dict().items()})
            torch.testing.assert_close(layer(x), 2 * before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_copy_is_independent():
    layer, _ = pair()
    x = torch.ones(1, 24, 2, 2)
    before = layer(x)
    twin = copy.deepcopy(layer)
    twin.values.zero_()
    torch.testing.assert_close(twin(x)[0, :, 0, 0], layer.bias, atol=1e-6, rtol=0)
    torch.testing.assert_close(layer(x), before, atol=1e-6, rtol=0)


def test_bytes_are_four_per_weight_and_one_bit_per_unit():
    layer, conv = pair(64, 64, bias=False)
    n = int(layer.keep.sum())
    assert measure(layer, (64, 8, 8), what="size").size == 4 * n + 64 * 64 // 8
    blocks, _ = pair(64, 64, 4, bias=False)
    assert measure(blocks, (64, 8, 8), what="size").size == 4 * int(blocks.keep.sum()) + 64 * 64 // 4 // 8
    assert measure(conv, (64, 8, 8), what="size").size == 4 * 64 * 64


@pytest.mark.parametrize("block", [1, 4])
def test_cost_counts_products_with_nonzero_weights(block):
    layer, _ = pair(block=block)
    cost = measure(layer, (24, 9, 7), what=("macs", "params"), batch_size=2)
    assert cost.macs == 2 * 9 * 7 * int(layer.keep.sum())
    assert cost.params == int(layer.keep.sum()) + 37


def test_packed_form_of_the_runtime_has_the_bytes_of_the_fact_sheet():
    keep = torch.zeros(37 * 24, dtype=torch.bool)
    keep[torch.randperm(37 * 24, generator=seeded())[:178]] = True
    assert SparseConv1x1.of(nn.Conv2d(24, 37, 1), keep.view(37, 24)).runtime_bytes() == 2432


@pytest.mark.parametrize(("sparsity", "share"), [(0.9, 0.30), (0.7, 0.90)])
def test_three_words_per_weight_in_the_runtime(sparsity, share):
    layer = SparseConv1x1(1000, 1000, nonzeros=round(1e6 * (1 - sparsity)))
    assert layer.runtime_bytes() / 4e6 == pytest.approx(share, abs=0.003)  # counts and biases are the rest


@torch.no_grad()
def test_the_fastest_kernel_is_measured_once_per_kind_of_layer(monkeypatch):
    times = {"numba": 3.0, "csr": 1.0, "dense": 2.0}
    asked: list[str] = []

    def prepare(name):
        return lambda layer: lambda x: asked.append(name)

    def timed(call, **_):
        call()
        return times[asked[-1]], 0.0

    monkeypatch.setattr(sparse, "_fastest", {})
    monkeypatch.setattr(sparse, "_PREPARE", {name: prepare(name) for name in KERNELS})
    monkeypatch.setattr(sparse, "timed", timed)
    layer, _ = pair()
    x = torch.ones(1, 24, 4, 4)
    layer(x)
    assert asked == [*available(), "csr"]
    copy.deepcopy(layer)(x)
    layer(x)
    assert asked[len(available()) :] == ["csr"] * 3
    assert list(sparse.chosen().values()) == ["csr"]


@torch.no_grad()
def test_without_numba_and_mkl_the_rest_still_runs(monkeypatch):
    layer, conv = pair()
    x = torch.ones(1, 24, 4, 4)
    monkeypatch.setattr(sparse, "_fastest", {})
    monkeypatch.setitem(sys.modules, "numba", None)
    assert available() == ("csr", "dense")
    torch.testing.assert_close(layer(x), conv(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(MissingExtra, match=r"trimtab\[edge\]"), kernel("numba"):
        pass
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert available() == ("dense",)
    monkeypatch.setattr(sparse, "_fastest", {})
    torch.testing.assert_close(layer(x), conv(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no MKL"), kernel("csr"):
        pass


def test_half_precision_and_compilation_take_the_dense_way():
    layer, conv = pair()
    x = torch.randn(1, 24, 4, 4, generator=seeded())
    with torch.no_grad():
        low = copy.deepcopy(layer).bfloat16()(x.bfloat16())
        assert low.dtype == torch.bfloat16 and (low.float() - conv(x)).norm() < 0.02 * conv(x).norm()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), conv(x), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("act", [None, "relu6"])
def test_dense_again_computes_the_same_and_all_weights_train(act):
    layer, _ = pair(block=4)
    layer.act = act
    net = nn.Sequential(nn.Conv2d(3, 24, 1), layer).eval()
    dense = densify(net)
    x = torch.randn(2, 3, 16, 16, generator=seeded())  # relu6 leaves no channel out everywhere
    torch.testing.assert_close(dense(x), net(x), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(m, SparseConv1x1) for m in dense.modules())
    dense(x).sum().backward()
    conv = next(m for m in dense[1].modules() if isinstance(m, nn.Conv2d))
    assert (conv.weight.grad != 0).float().mean() > 0.9  # those at zero too


@torch.no_grad()
def test_a_mask_that_does_not_fit_the_values_is_refused():
    for name in ("numba", "csr"):
        layer, _ = pair()
        layer.mask.fill_(255)
        with kernel(name), pytest.raises(ValueError, match="as many weights as there are values"):
            layer(torch.ones(1, 24, 2, 2))


def test_wrong_arguments_say_what_was_expected():
    with pytest.raises(ValueError, match=r"block must be one of 1, 2, 4, got 3"):
        SparseConv1x1(4, 4, nonzeros=1, block=3)
    with pytest.raises(ValueError, match="at most 16, and at most 0 single weights, got 17"):
        SparseConv1x1(4, 4, nonzeros=17)
    with pytest.raises(ValueError, match="whole blocks of 4, at most 4, and at most 0 single weights, got 6"):
        SparseConv1x1(4, 4, nonzeros=6, block=4)
    with pytest.raises(ValueError, match="act must be None, 'relu' or 'relu6', got 'gelu'"):
        SparseConv1x1(4, 4, nonzeros=1, act="gelu")
    with pytest.raises(ValueError, match="the same for each block of 2"):
        SparseConv1x1.of(nn.Conv2d(2, 2, 1), torch.eye(2, dtype=torch.bool), block=2)
    with pytest.raises(ValueError, match="kernel must be one of numba, csr, dense or None, got 'fast'"), kernel("fast"):
        pass
    with torch.no_grad(), pytest.raises(ValueError, match="input must have 4 channels"):
        SparseConv1x1(4, 4, nonzeros=1)(torch.ones(1, 5, 2, 2))
