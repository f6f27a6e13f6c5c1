"""Sparse layers in a file: the same numbers from fewer bytes, in float and in 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.compress import fast_sparse_convnets
from trimtab.core.onnx_cost import measure_onnx
from trimtab.deploy import OnnxModel
from trimtab.deploy.low_bit import matmul
from trimtab.deploy.sparse import store_sparse
from trimtab.nn.sparse import densify


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_a_sparse_network_is_smaller_in_the_file_and_answers_the_same(tmp_path, int8):
    data = tt.load_data("digits", limit=128)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 90, 1), nn.ReLU(), nn.Conv2d(90, 91, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(91, 10),
    )  # fmt: skip
    sparse = fast_sparse_convnets(net, data, sparsity=0.9, epochs=0)
    files = {}
    for name, model in (("sparse", sparse), ("dense", densify(sparse))):
        files[name] = tt.export(model, tmp_path / f"{name}.onnx", data=data, int8=int8, exporter="classic")
    weights = 90 * 91 * (1 if int8 else 4)
    assert files["sparse"].size < files["dense"].size - 0.5 * weights
    assert files["sparse"].notes[-1] == "2 weights stored without their zeros"
    x = data.splits["val"].pixels(torch.arange(9)).float().numpy() / 255
    answers = [OnnxModel(f.path).logits(x) for f in files.values()]
    np.testing.assert_allclose(*answers, rtol=1e-5, atol=1e-5)
    costs = [measure_onnx(f.path, what=("params", "macs")) for f in files.values()]
    assert costs[0] == costs[1]  # the file is run dense


def test_few_zeros_or_few_weights_are_left_as_they_are():
    rng = np.random.default_rng(0)
    for shape, zeros in (((64, 64), 0.05), ((8, 8), 0.9)):
        weight = np.where(rng.random(shape) < zeros, 0, rng.standard_normal(shape)).astype(np.float32)
        file = matmul(weight)
        assert store_sparse(file) == 0
        assert [n.op_type for n in file.graph.node] == ["MatMul"]
