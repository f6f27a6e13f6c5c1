"""Compressions one after the other: what comes out is still a model like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import trimtab as tt
from tests.elsewhere import python
from trimtab.core.edit import history
from trimtab.deploy import OnnxModel

READ = """
import sys, torch, trimtab as tt
x = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
with torch.no_grad():
    torch.save(tt.load(sys.argv[1])(x), sys.argv[2])
"""


@pytest.fixture(scope="module")
def data():
    return tt.load_data("digits", limit=600)


@pytest.fixture(scope="module")
def chain(data):
    """Trained, pruned, factorized and trained again; what it cost after each step."""
    model = tt.create_model("trim_net", widths=(12, 16), depths=(1, 1), num_classes=10, in_chans=1, img_size=8, seed=0)
    tt.fit(model, data, epochs=10, batch_size=32, lr=0.1, progress=False)
    pruned = tt.compress.magnitude(model, data, budget="macs<=70%")
    factored = tt.compress.tucker(pruned, data, budget="macs<=70%")
    tt.fit(factored, data, epochs=10, batch_size=32, lr=0.05, progress=False)
    return model, pruned, factored


def macs(model) -> int:
    return tt.measure(model, (1, 8, 8), what=("macs",)).macs or 0


def by_another_process(model, folder: Path) -> torch.Tensor:
    tt.save(model, folder / "kept")
    python(READ, folder / "kept", folder / "y.pt")
    return torch.load(folder / "y.pt")


def test_each_step_is_cheaper_and_remembered_and_the_first_model_is_as_it_was(chain, data):
    model, pruned, factored = chain
    assert macs(pruned) <= 0.7 * macs(model) and macs(factored) <= 0.7 * macs(pruned)
    assert not history(model).edits
    assert history(factored).edits[: len(history(pruned).edits)] == history(pruned).edits
    assert tt.evaluate(factored, data, "val")["accuracy"] > 0.7


def test_a_fresh_process_loads_the_chain_and_it_trains_on(chain, data, tmp_path):
    factored = chain[2].eval()
    x = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(by_another_process(factored, tmp_path), factored(x))
    again = tt.load(tmp_path / "kept")
    before = [p.detach().clone() for p in again.parameters()]
    tt.fit(again, data, epochs=1, batch_size=32, progress=False)
    assert all(not torch.equal(a, b) for a, b in zip(before, again.parameters(), strict=True) if a.ndim > 1)


def test_pruned_factorized_and_ternary_in_one_file(chain, data, tmp_path):
    factored = chain[2]
    ternary = tt.compress.bitnet_reloaded(factored, data, epochs=4, batch_size=32, progress=False).eval()
    size = {n: tt.measure(m, (1, 8, 8), what=("size",)).size for n, m in (("float", factored), ("ternary", ternary))}
    assert size["ternary"] < 0.5 * size["float"]
    x = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(by_another_process(ternary, tmp_path), ternary(x))
    stored = (tmp_path / "kept" / "model.safetensors").stat().st_size
    tt.save(factored, tmp_path / "float")
    assert stored < (tmp_path / "float" / "model.safetensors").stat().st_size
    made = tt.export(ternary, tmp_path / "ternary.onnx", data=data)
    assert made.agreement >= 0.9
    here = tt.evaluate(ternary, data, "test")["accuracy"]
    assert OnnxModel(made.path).evaluate(data, "test")["accuracy"] == pytest.approx(here, abs=0.05)


def test_pruned_factorized_and_8_bit_in_onnx(chain, data, tmp_path):
    factored = chain[2].eval()
    whole = tt.export(factored, tmp_path / "float.onnx", data=data)
    small = tt.export(factored, tmp_path / "int8.onnx", data=data, int8=True)
    assert whole.max_abs_diff < 1e-3
    assert small.accuracy == pytest.approx(whole.accuracy, abs=0.05)
    x = np.linspace(-1, 1, 2 * 64, dtype=np.float32).reshape(2, 1, 8, 8)
    assert np.corrcoef(OnnxModel(small.path).logits(x).ravel(), OnnxModel(whole.path).logits(x).ravel())[0, 1] > 0.98


def test_sparse_after_pruning_is_smaller_on_disk(chain, data, tmp_path):
    net = tt.create_model(
        "trim_net", widths=(16, 32), depths=(1, 1), kind="bottleneck", expand=4, group_width=1,
        num_classes=10, in_chans=1, img_size=8, seed=0,
    )  # fmt: skip
    pruned = tt.compress.magnitude(net, data, budget="macs<=80%")
    sparse = tt.compress.fast_sparse_convnets(
        pruned, data, sparsity=0.8, epochs=2, batch_size=32, progress=False
    ).eval()  # fmt: skip
    x = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(by_another_process(sparse, tmp_path), sparse(x), atol=1e-5)
    tt.save(pruned, tmp_path / "dense")
    stored = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("kept", "dense")]
    assert stored[0] < 0.75 * stored[1]
