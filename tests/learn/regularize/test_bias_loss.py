"""Bias loss: the weights of the fact sheet, where the last feature map is found, and what fails in the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from tests.learn.toy import Toy, net, same, weights
from trimtab import testing
from trimtab.learn import Batch, BiasLoss, Classify, Context, backward_all, fit
from trimtab.learn.calls import last_map
from trimtab.learn.regularize.bias_loss import bias_weights, feature_variance
from trimtab.learn.taps import taps


def batch_of(model: nn.Module, n: int = 6, size: tuple[int, int, int] = (1, 8, 8)) -> Batch:
    g = torch.Generator().manual_seed(1)
    return Batch(image=torch.randn(n, *size, generator=g), label=torch.arange(n) % 3)


def test_weights_go_from_0_7_to_1_04986():
    least, middle, most = bias_weights(torch.tensor([2.0, 5.0, 8.0])).tolist()
    assert least == pytest.approx(0.7)
    assert middle == pytest.approx(math.exp(0.15) - 0.3)
    assert most == pytest.approx(1.04986, abs=5e-6)


@pytest.mark.parametrize(("scale", "shift"), [(3.0, 0.0), (-0.5, 2.0), (1.0, -7.0)])
def test_weights_do_not_change_when_maps_are_scaled_and_shifted(scale, shift):
    maps = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = (bias_weights(feature_variance(t)) for t in (maps, scale * maps + shift))
    torch.testing.assert_close(ours, theirs)


def test_variance_is_over_channels_and_places_together_unbiased_and_in_float32():
    maps = torch.randn(2, 3, 4, 5)
    want = torch.stack([((t - t.mean()) ** 2).sum() / (t.numel() - 1) for t in maps])
    torch.testing.assert_close(feature_variance(maps), want)
    wide = 1000 + torch.randn(1, 64, 8, 8)
    assert feature_variance(wide.bfloat16()).dtype == torch.float32
    assert not feature_variance(maps.requires_grad_()).requires_grad


def test_no_gradient_flows_through_the_weights():
    """The gradient of the loss is that of the cross-entropy with the same weights as constants."""
    model = net(norm="none")
    batch, objective = batch_of(model), BiasLoss()
    objective.setup(model, batch)
    with taps(model, ["6"]) as seen:
        logits = model(batch.image)
    constant = bias_weights(feature_variance(seen["6"]))
    (constant * F.cross_entropy(logits, batch.label, reduction="none")).mean().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    backward_all(lambda: objective.losses(model, batch, Context()))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name])


@pytest.mark.parametrize("images", [torch.randn(1, 1, 8, 8), torch.ones(4, 1, 8, 8)], ids=["one", "all alike"])
@pytest.mark.parametrize("normalisation", ["batch", "running"])
def test_where_variances_do_not_differ_the_weight_is_1_minus_beta(images, normalisation):
    """0/0 in the reference."""
    model, batch = net().eval(), Batch(image=images, label=torch.zeros(len(images), dtype=torch.long))
    objective = BiasLoss(normalisation=normalisation)
    objective.setup(model, batch)
    loss = objective.losses(model, batch, Context())
    torch.testing.assert_close(loss, 0.7 * F.cross_entropy(model(images), batch.label))


def test_with_alpha_and_beta_0_it_is_cross_entropy():
    seen = []
    for objective in (BiasLoss(alpha=0, beta=0), Classify()):
        model = net()
        fit(model, Toy(), objective, epochs=1, batch_size=32, lr=0.1, val=None, progress=False)
        seen.append(weights(model))
    assert same(*seen)


def test_running_extremes_are_those_of_all_batches_and_part_of_the_checkpoint():
    objective, ctx = BiasLoss(normalisation="running"), Context()
    torch.testing.assert_close(objective.weigh(torch.tensor([1.0, 3.0]), ctx), torch.tensor([0.7, math.exp(0.3) - 0.3]))
    later = objective.weigh(torch.tensor([2.0, 2.0]), ctx)
    torch.testing.assert_close(later, torch.full((2,), math.exp(0.15) - 0.3))
    again = BiasLoss(normalisation="running")
    again.load_state_dict(objective.state_dict())
    torch.testing.assert_close(again.weigh(torch.tensor([2.0, 2.0]), ctx), later)


NETWORKS = {
    "resnet18": (64, "layer4", 512),
    "mobilenetv3_small_050": (64, "blocks", 288),
    "densenet121": (64, "features", 1024),
    "convnext_atto": (64, "norm_pre", 320),
    "vit_tiny_patch16_224": (224, "norm", 192),
    "cct_2_3x2_32": (32, "norm", 128),
    "skipblocknet_xs": (64, "conv_last", 480),
    "simplenet_cifar_310k": (32, "features", 64),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_last_feature_map_is_found_without_configuration(name):
    side, module, width = NETWORKS[name]
    model = tt.create_model(name, num_classes=10, seed=0)
    x = torch.randn(2, 3, side, side)
    assert last_map(model, x) == (module, False)
    assert model.training
    with taps(model.eval(), [module]) as seen, torch.no_grad():
        model(x)
    assert width in (seen[module].shape[1], seen[module].shape[-1])


class Functional(nn.Module):
    """Pools by a function, so that no module marks the end of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), ("2", True)),
        (Functional(), ("norm", False)),
        (testing.toy_net(), ("conv2", False)),
    ],
    ids=["pooling", "function", "flatten"],
)
def test_in_networks_of_ones_own_too(model, found):
    assert last_map(model, torch.randn(2, 1, 8, 8)) == found


def test_what_cannot_work_is_refused_at_the_door():
    data = Toy()
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match="bias_loss needs a feature map, Sequential has none; name one with layer="):
        fit(flat, data, BiasLoss(), epochs=1)
    with pytest.raises(ValueError, match="names must be submodules of the model, got 'stage9'"):
        fit(net(), data, BiasLoss(layer="stage9"), epochs=1)
    for wrong, message in (
        ({"alpha": -1}, "alpha must not be negative, got -1"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\)"),
        ({"normalisation": "global"}, "normalisation must be batch or running, got 'global'"),
    ):
        with pytest.raises(ValueError, match=message):
            BiasLoss(**wrong)


def test_a_layer_can_be_named():
    torch.manual_seed(0)
    result = fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)), Toy(),
                 BiasLoss(layer="2"), epochs=6, batch_size=32, lr=0.1, progress=False)  # fmt: skip
    assert result.best["val_accuracy"] > 0.9


@pytest.mark.parametrize("normalisation", ["batch", "running"])
def test_conformance(normalisation):
    testing.check_objective(lambda: BiasLoss(normalisation=normalisation), slow=False)
