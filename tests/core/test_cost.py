"""Costs: what is counted, that it agrees with PyTorch's own counter, and that measuring leaves no trace."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trimtab.core import energy
from trimtab.core.cost import ROOT, Cost, measure
from trimtab.core.lifetime import Step, peak
from trimtab.core.timing import timed

FAMILIES = [
    "resnet18",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "densenet121",
    "regnety_002",
    "convnext_atto",
    "ghostnet_100",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224",
    "pit_ti_224",
    "levit_128s",
    "mobilevit_xs",
    "mixer_s16_224",
    "xcit_nano_12_p16_224",
    "efficientvit_b0",
]


def counted_by_torch(model: nn.Module, *args: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        model.eval()(*args)
    return counter.get_total_flops() // 2


@pytest.fixture(scope="module", params=FAMILIES)
def architecture(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, int, int]]:
    with torch.device("meta"):
        model = timm.create_model(request.param)
    return model, model.default_cfg["input_size"]


def test_macs_agree_with_the_flop_counter_on_meta(architecture: Any) -> None:
    model, size = architecture
    assert measure(model, size, what="macs").macs == counted_by_torch(model, torch.empty(1, *size, device="meta"))


def test_rows_add_up_to_the_totals(architecture: Any) -> None:
    model, size = architecture
    cost = measure(model, size, per_layer=True)
    for column in ("params", "macs", "activations", "size"):
        assert sum(getattr(row, column) for row in cost.layers) == getattr(cost, column) > 0, column
    assert len({row.name for row in cost.layers}) == len(cost.layers)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_cpu_meta_and_the_flop_counter_on_cpu_agree(name: str) -> None:
    # On the CPU attention is one fused operator, on meta two matrix products: the count must not care.
    model = timm.create_model(name, depth=2) if "vit" in name else timm.create_model(name)
    with torch.device("meta"):
        ghost = timm.create_model(name, depth=2) if "vit" in name else timm.create_model(name)
    cost = measure(model, (3, 224, 224))
    assert cost == measure(ghost, (3, 224, 224))
    assert cost.macs == counted_by_torch(model, torch.zeros(1, 3, 224, 224))


def test_resnet50_at_224() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    cost = measure(model, (3, 224, 224))
    assert cost.params == 25_557_032
    assert cost.macs == 4_089_184_256  # convolutions and the classifier; "4.1 G" counts norms and additions too
    assert cost.activations == 11_114_984  # outputs of convolutions and classifier; 11.11 M in timm's table
    # Peak at the end of the first block: 256x56x56 from the convolution and 256x56x56 from the shortcut, 64x56x56 in.
    assert cost.memory == 4 * (256 + 256 + 64) * 56 * 56


def test_cct_7_3x1_32_counts_its_attention() -> None:
    import trimtab as tt

    model = tt.create_model("cct_7_3x1_32", num_classes=10).to("meta")
    cost = measure(model, (3, 32, 32), per_layer=True)
    # 1,181,616,640 in the fact sheet.
    assert cost.macs == 1_181_616_640
    # Scores and weighted sums: 256 tokens, width 256, 7 layers.
    assert cost.macs - 2 * 7 * 256 * 256 * 256 == sum(
        row.macs for row in measure(_without_attention(model), (3, 32, 32), per_layer=True).layers
    )


def _without_attention(model: nn.Module) -> nn.Module:
    """The same model where attention gives back its values."""
    import copy
    from unittest import mock

    class Patched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(model)

        def forward(self, x: Tensor) -> Tensor:
            with mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **_: v):
                return self.inner(x)

    return Patched()


# ------------------------------------------------------------------------------------------------------ what is counted


class Products(nn.Module):
    """One product of every kind that PyTorch has, all of 2 x 3 x 4 = 24 MACs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.w = nn.Parameter(torch.ones(3, 4))

    def forward(self, x: Tensor) -> Tensor:  # (2, 3)
        w = self.w
        return {
            "matmul": lambda: x @ w,
            "linear": lambda: F.linear(x, w.t()),
            "addmm": lambda: torch.addmm(w.new_ones(4), x, w),
            "bmm": lambda: torch.bmm(x[None], w[None]),
            "baddbmm": lambda: torch.baddbmm(w.new_ones(1, 2, 4), x[None], w[None]),
            "addbmm": lambda: torch.addbmm(w.new_ones(2, 4), x[None], w[None]),
            "einsum": lambda: torch.einsum("bi,ij->bj", x, w),
            "mv": lambda: torch.stack([torch.mv(w.t(), row) for row in x]),
            "conv1d": lambda: F.conv1d(x[..., None], w.t()[..., None]),
            "conv_transpose": lambda: F.conv_transpose1d(x[..., None], w[..., None]),
        }[self.kind]()


@pytest.mark.parametrize(
    "kind", ["matmul", "linear", "addmm", "bmm", "baddbmm", "addbmm", "einsum", "mv", "conv1d", "conv_transpose"]
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_kind_of_product_counts(kind: str, device: str) -> None:
    assert measure(Products(kind).to(device), torch.ones(2, 3, device=device), what="macs").macs == 24


def test_attention_of_torch_itself_is_counted_fused_or_not() -> None:
    n, d, heads = 16, 32, 4
    layer = nn.TransformerEncoderLayer(d, heads, dim_feedforward=64, batch_first=True)
    want = n * d * 3 * d + 2 * n * n * d + n * d * d + 2 * n * d * 64
    assert measure(layer, torch.zeros(1, n, d), what="macs").macs == want
    assert measure(layer.to("meta"), torch.zeros(1, n, d, device="meta"), what="macs").macs == want


def test_products_belong_to_the_owner_of_the_weight() -> None:
    # MultiheadAttention never calls out_proj; its product must still be found there.
    layer = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.zeros(1, 16, 32)
    rows = {r.name: r for r in measure(layer, (x, x, x), per_layer=True).layers}
    assert rows["out_proj"].macs == 16 * 32 * 32
    assert rows[ROOT].macs == 16 * 32 * 3 * 32 + 2 * 16 * 16 * 32


def test_shared_weights_are_parameters_once_and_work_twice() -> None:
    layer = nn.Linear(8, 8, bias=False)
    cost = measure(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(1, 8), per_layer=True)
    assert (cost.params, cost.macs, cost.size) == (64, 128, 256)
    assert [r.macs for r in cost.layers] == [128]


def test_batch_and_precision_scale_as_they_must() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    one, four = (measure(model, (3, 16, 16), batch_size=b) for b in (1, 4))
    assert (four.macs, four.activations, four.memory) == (4 * one.macs, 4 * one.activations, 4 * one.memory)
    half = measure(model.bfloat16(), (3, 16, 16), what=("macs", "size", "memory", "bops"))
    assert (half.macs, half.memory) == (one.macs, one.memory // 2)
    assert half.bops == one.macs * 16 * 16
    assert half.size == 2 * (3 * 8 * 9 + 8 + 4 * 8) + 8  # the norm's step counter is an int64


def test_an_own_operator_counts_once_it_is_registered() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    @torch.library.custom_op("trimtab_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.trimtab_test.twice(x)

    assert measure(Own(), (3, 4, 4), what="macs").macs == 0
    register_flop_formula(torch.ops.trimtab_test.twice)(lambda x, out_shape=None, **_: 2 * x[0] * x[1] * x[2] * x[3])
    try:
        assert measure(Own(), (3, 4, 4), what="macs").macs == 48
    finally:
        flop_registry.pop(torch.ops.trimtab_test.twice)


class Packed(nn.Module):
    """A 4-bit layer as a quantizer would make it: codes in a buffer, no float weight."""

    weight_bits = 4
    act_bits = 8

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(outputs, inputs // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(outputs, 1))

    def stored_bytes(self) -> int:
        return self.codes.numel() + 2 * self.scale.numel()

    def stored_params(self) -> int:
        return 2 * self.codes.numel()

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.codes & 15, self.codes >> 4
        return F.linear(x, torch.stack([low, high], -1).flatten(1) * self.scale)


def test_low_bit_layers_speak_for_themselves() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), Packed(16, 32), nn.Linear(32, 4, bias=False))
    what = ("params", "macs", "size", "bops", "energy")
    cost = measure(model, torch.zeros(1, 8), what=what, per_layer=True)
    assert cost.params == 8 * 16 + 16 * 32 + 32 * 4
    assert cost.size == 4 * 8 * 16 + (16 * 32 // 2 + 2 * 32) + 4 * 32 * 4
    assert cost.macs == 8 * 16 + 16 * 32 + 32 * 4
    assert cost.bops == (8 * 16 + 32 * 4) * 32 * 32 + 16 * 32 * 4 * 8
    assert [r.size for r in cost.layers if r.kind == "Packed"] == [16 * 32 // 2 + 2 * 32]
    float_model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(32, 4))
    assert cost.energy < measure(float_model, torch.zeros(1, 8), what=what).energy


def test_sparse_products_count_what_is_stored() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            dense = torch.zeros(8, 16)
            dense[0, :5] = 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # CSR is in beta
                self.register_buffer("w", dense.to_sparse_csr())

        def forward(self, x: Tensor) -> Tensor:
            return self.w @ x

    cost = measure(Sparse(), torch.ones(16, 4), what=("macs", "size"))
    assert cost.macs == 5 * 4
    assert cost.size == 9 * 8 + 5 * 8 + 5 * 4  # row starts, columns, values


# --------------------------------------------------------------------------------------------------------------- memory


def test_memory_of_a_chain_is_its_widest_pair() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.Conv2d(32, 4, 1))
    assert measure(model, (3, 8, 8)).memory == 4 * 64 * (16 + 32)


def test_memory_counts_what_a_shortcut_keeps_alive() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return x + self.c(F.relu(self.b(x)))

    assert measure(Residual(), (4, 8, 8)).memory == 3 * 4 * 4 * 64  # shortcut, input and output of the last convolution


def test_in_place_and_out_of_place_relu_cost_the_same_memory() -> None:
    def net(inplace: bool) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(inplace), nn.Conv2d(16, 16, 3), nn.ReLU(inplace))

    assert measure(net(True), (3, 8, 8)).memory == measure(net(False), (3, 8, 8)).memory


def test_lifetimes_by_hand() -> None:
    sizes = {"x": 1, "a": 10, "b": 20, "c": 5}
    steps = [Step(("x",), ("a",)), Step(("a",), ("b",)), Step(("a", "b"), ("c",))]
    assert peak(steps, sizes, inputs=["x"], outputs=["c"]) == 35
    late = [*steps[:2], Step(("b",), ("c",))]
    assert peak(late, sizes, inputs=["x"], outputs=["c"]) == 30
    assert peak(late, sizes, inputs=["x"], outputs=["c", "x"]) == 31
    inside = [*steps[:2], Step(("b",), ("c",), in_place=True)]
    assert peak(inside, sizes, inputs=["x"], outputs=["c"]) == 30
    assert peak([Step(("x",), ("y",), in_place=True)], {"x": 4, "y": 4}, inputs=["x"], outputs=["y"]) == 8


# ------------------------------------------------------------------------------------------------------ leaves no trace


class Nosy(nn.Module):
    """Everything that a forward pass can disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.count = 0
        self.table = [torch.ones(8)]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        x = self.drop(self.norm(self.conv(x)))
        return x + torch.rand(x.shape, device=x.device) + self.table[0].view(1, -1, 1, 1)


@pytest.mark.parametrize("what", [("params", "macs", "memory", "size", "energy"), ("latency",)])
@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_no_trace(what: tuple[str, ...], training: bool) -> None:
    model = Nosy().train(training)
    model.norm.eval()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    seen: list[int] = []
    handle = model.conv.register_forward_hook(lambda *_: seen.append(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pointers = [p.data_ptr() for p in model.parameters()]
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    hooks = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()}
    rng, threads, count = torch.get_rng_state(), torch.get_num_threads(), model.count
    fast = torch.backends.mha.get_fastpath_enabled()

    measure(model, (3, 8, 8), what=what, per_layer=True)

    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(torch.equal(p.grad, g) and p.requires_grad for p, g in zip(model.parameters(), grads, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()} == hooks
    assert torch.equal(torch.get_rng_state(), rng)
    assert (torch.get_num_threads(), model.count, seen) == (threads, count, [])
    assert torch.backends.mha.get_fastpath_enabled() == fast and torch.is_grad_enabled()
    handle.remove()


def test_a_model_that_looks_at_values_is_counted_with_data() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return x * 2 if x.sum().item() > 1e9 else x.clone()

    assert measure(Branch(), torch.zeros(1, 4), what="macs").macs == 32
    with pytest.raises(ValueError, match="cannot measure Branch on input"):
        measure(Branch().to("meta"), torch.zeros(1, 4), what="macs")


def test_wrapped_models_are_measured_themselves() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    want = measure(model, (3, 8, 8), per_layer=True)
    assert measure(nn.DataParallel(model), (3, 8, 8), per_layer=True) == want
    assert measure(torch.compile(model), (3, 8, 8), per_layer=True) == want


def test_old_weight_norm_and_inference_mode_are_fine() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 8, 3)))
    model(torch.zeros(1, 3, 8, 8))  # leaves a tensor with history in an attribute, which deepcopy refuses
    with torch.inference_mode():
        assert measure(model, (3, 8, 8)).macs == 6 * 6 * 8 * 27
    assert measure(model, (3, 8, 8)).macs == 6 * 6 * 8 * 27


def test_paper_scale_needs_no_memory() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_giant_patch14_224")
    cost = measure(model, (3, 224, 224))
    assert cost.params > 1e9 and cost.macs > 2.5e11


# ------------------------------------------------------------------------------------------- latency, energy, arguments


def test_latency_is_measured_and_said_how() -> None:
    cost = measure(nn.Conv2d(3, 8, 3), (3, 16, 16), what=("latency", "macs"))
    assert cost.latency > 0 and cost.latency_iqr >= 0
    assert cost.runtime.startswith("PyTorch ") and cost.runtime.endswith("1 thread")
    assert cost.params is None
    with pytest.raises(ValueError, match="meta device"):
        measure(nn.Conv2d(3, 8, 3, device="meta"), (3, 16, 16), what="latency")


def test_timed_gives_median_and_spread() -> None:
    calls = []
    median, iqr = timed(lambda: calls.append(1), warmup=2, repeats=5)
    assert len(calls) == 7 and median >= 0 and iqr >= 0
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        timed(lambda: None, repeats=0)


def test_energy_is_the_table() -> None:
    assert energy.mac_pj(32, 32) == pytest.approx(4.6)
    assert energy.mac_pj(8, 8) == pytest.approx(0.3)
    assert energy.mac_pj(4, 32) == energy.mac_pj(32, 32)  # weight-only: the product is made in float
    cost = measure(nn.Linear(100, 10, bias=False), torch.zeros(1, 100), what=("energy", "macs"))
    assert cost.energy == pytest.approx(1e-12 * (1000 * 4.6 + 4000 * 160 + 4 * 110 * 1.25))


def test_rapl_reads_the_counters_of_the_machine(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert not energy.rapl_available() and energy.rapl_joules(lambda: None) is None
    zone = tmp_path / "intel-rapl:0"
    (tmp_path / "intel-rapl:0:0").mkdir()  # cores: part of the package
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text("1000")
    (zone / "energy_uj").write_text("900")

    def burn() -> None:  # 7 microjoules a call, through the wrap of the counter
        (zone / "energy_uj").write_text(str((int((zone / "energy_uj").read_text()) + 7) % 1001))

    assert energy.rapl_available()
    assert energy.rapl_joules(burn, seconds=0) == pytest.approx(7e-6)


@pytest.mark.parametrize(
    ("size", "kwargs", "message"),
    [
        ((3, 8, 8), {"what": ("macs", "speed")}, "what must be some of .*'speed'"),
        ((3, 0, 8), {}, "input_size must be positive"),
        ("3,8,8", {}, "input_size must be"),
        ((), {}, "input_size must be"),
        ((3, 8, 8), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ((4, 8, 8), {}, r"cannot measure Conv2d on input \(1, 4, 8, 8\)"),
        ((3, 8, 8), {"what": "latency", "threads": 0}, "threads must be at least 1"),
    ],
)
def test_wrong_arguments_say_what_was_expected(size: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(nn.Conv2d(3, 8, 3), size, **kwargs)


def test_lazy_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="lazy"):
        measure(nn.LazyConv2d(8, 3), (3, 8, 8))


def test_asdict_is_plain_json() -> None:
    cost = measure(nn.Conv2d(3, 8, 3), (3, 8, 8), per_layer=True)
    back = json.loads(json.dumps(cost.asdict()))
    assert back["macs"] == cost.macs and back["latency"] is None
    assert back["layers"][0]["kind"] == "Conv2d"
    assert Cost() == Cost(layers=())
