"""AdaB2N: the layer against the numbers of the open code, in the place of every batch norm and out of it again."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import trimtab as tt
from tests.learn.adapt.nets import cnn
from trimtab.compress import merge
from trimtab.learn.adapt import adab2n, class_incremental
from trimtab.learn.adapt.adab2n import (
    AdaB2N,
    adaptation_loss,
    convert,
    merged,
    next_momentum,
    norm_flops,
    task_batch,
    task_weights,
)


def momenta(kappa: float, n: int) -> list[float]:
    eta, out = 0.0, []
    for _ in range(n):
        eta = next_momentum(eta, momentum=0.1, kappa=kappa)
        out.append(eta)
    return out


def layer(tasks: int = 3, **how) -> tuple[nn.Sequential, AdaB2N]:
    net = convert(nn.Sequential(nn.Identity(), nn.BatchNorm2d(4)), num_tasks=tasks, **how)
    return net.train(), net[1]


def images(n: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def test_momenta_are_those_of_the_open_code():
    assert momenta(0.4, 5) == pytest.approx([0.39811, 0.29341, 0.23433, 0.19641, 0.17003], abs=1e-5)
    for kappa, limit in ((0.4, 0.041268), (0.7, 0.071098), (0.1, 0.010481)):
        assert momenta(kappa, 2000)[-1] == pytest.approx(limit, abs=1e-6)
        assert limit == pytest.approx(1 - 0.9**kappa, abs=1e-6)
    assert momenta(0, 6) == pytest.approx([1 / t for t in range(1, 7)], abs=1e-12)
    assert momenta(1, 6) == pytest.approx([0.1] * 6, abs=1e-12)


def test_weights_are_those_of_the_open_code():
    w = task_weights(torch.tensor([5.0, 5.0, 0.0]), torch.zeros(3))
    assert w.tolist() == pytest.approx([6 / 13, 6 / 13, 1 / 13])
    net, norm = layer(renormalize=False)
    with task_batch(net, torch.tensor([0] * 5 + [1] * 5), finished=2):
        assert float(norm.sample_weights(10).sum().detach()) == pytest.approx(12 / 13)
        norm.renormalize = True
        assert float(norm.sample_weights(10).sum().detach()) == pytest.approx(1)


def test_equal_tasks_make_it_a_batch_norm():
    net, norm = layer(tasks=2, kappa=1.0)
    plain = nn.BatchNorm2d(4).train()
    x = images()
    with task_batch(net, torch.arange(10) % 2, finished=1):
        torch.testing.assert_close(net(x), plain(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    n = 10 * 3 * 3
    torch.testing.assert_close(norm.running_var - 0.9, (plain.running_var - 0.9) * (n - 1) / n)


def test_without_tasks_or_in_the_first_it_is_a_batch_norm_too():
    x = images()
    want = nn.BatchNorm2d(4).train()(x)
    net, _ = layer()
    torch.testing.assert_close(net(x), want, atol=1e-5, rtol=1e-5)
    with task_batch(net, torch.tensor([0] * 9 + [1]), finished=0):
        torch.testing.assert_close(net(x), want, atol=1e-5, rtol=1e-5)


def test_moments_are_weighted_by_task():
    net, norm = layer(tasks=2, kappa=0.0)
    x = images()
    x[8:] += 5.0
    with task_batch(net, torch.tensor([0] * 8 + [1] * 2), finished=1):
        net(x)
    share = torch.tensor([9 / 12 / 8] * 8 + [3 / 12 / 2] * 2)  # (exp(0) + N) / (2 + 10), over N
    mean = (share[:, None] * x.mean((2, 3))).sum(0)
    var = (share[:, None] * (x - mean[:, None, None]).square().mean((2, 3))).sum(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)  # biased


def test_the_prior_of_seen_tasks_learns_that_of_future_ones_does_not():
    net, norm = layer(tasks=4, renormalize=False)
    with task_batch(net, torch.tensor([0] * 6 + [1] * 4), finished=2):
        net(images()).square().mul(torch.arange(10.0).view(-1, 1, 1, 1)).sum().backward()
    assert norm.prior.grad[:3].all() and norm.prior.grad.isfinite().all()  # 2 is seen, but absent
    assert norm.prior.grad[3] == 0


def test_the_loss_is_the_gap_to_the_running_moments_and_falls_on_the_batch():
    net, norm = layer(kappa=0.0)
    x = images().requires_grad_()
    net(x)
    assert float(adaptation_loss(net).detach()) == 0  # a cumulative average is at the first batch
    net(x + 1)
    norm_mean = norm.running_mean.clone()
    loss = adaptation_loss(net)
    assert norm.gap is None and loss > 0
    loss.backward()
    assert x.grad.any() and torch.equal(norm.running_mean, norm_mean)
    y = (x + 1).detach()
    gap = (y.mean((0, 2, 3)) - norm_mean).square().mean()
    var = (y.var((0, 2, 3), unbiased=False) - norm.running_var).square().mean()
    torch.testing.assert_close(loss.detach(), gap + var)


def test_kappa_trades_balance_for_tracking():
    """A stream whose channel means differ by task: running means against the union of tasks, and against the last."""
    g = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(5, 4, generator=g)

    def batch(task: int) -> tuple[torch.Tensor, torch.Tensor]:
        old = torch.randint(task, (4,), generator=g) if task else torch.zeros(0).long()
        tasks = torch.cat([torch.full((20 - len(old),), task), old])
        return centres[tasks][:, :, None, None] + torch.randn(20, 4, 2, 2, generator=g), tasks

    nets = {k: layer(tasks=5, kappa=k)[0] for k in (0.0, 0.4, 1.0)}
    plain = nn.BatchNorm2d(4).train()
    for step in range(200):
        x, tasks = batch(step // 40)
        plain(x)
        for net in nets.values():
            with task_batch(net, tasks, finished=step // 40), torch.no_grad():
                net(x)
    off = {k: float((net[1].running_mean - centres.mean(0)).norm()) for k, net in nets.items()}
    last = {k: float((net[1].running_mean - centres[4]).norm()) for k, net in nets.items()}
    assert off[0.0] < off[0.4] < off[1.0] < float((plain.running_mean - centres.mean(0)).norm())
    assert last[0.0] > last[0.4] > last[1.0]


def resnet18() -> nn.Module:
    net = timm.create_model("resnet18", num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


def test_counts_of_the_paper_s_network():
    net = resnet18()
    assert sum(p.numel() for p in net.parameters()) == 11_173_962
    assert round(tt.measure(net, (3, 32, 32)).macs / 1e6, 1) == 555.4
    shapes = []
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
    with torch.no_grad():
        net.eval()(torch.zeros(10, 3, 32, 32))
    assert len(shapes) == 20
    assert sum(norm_flops(s, "bn") for s in shapes) == 49_200_000
    assert sum(norm_flops(s) for s in shapes) == 49_315_200


@pytest.mark.parametrize("name", ["trim_1k", "mobilenetv3_small_050"])
def test_every_batch_norm_of_a_model_goes_there_and_back(name, tmp_path):
    model = tt.create_model(name, num_classes=10, in_chans=3, img_size=32, seed=0)
    for m in model.modules():
        if isinstance(m, _BatchNorm):
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 32, 32)
    want = model.eval()(x).detach()
    net = convert(model, num_tasks=5)
    assert not any(isinstance(m, _BatchNorm) for m in net.modules()) and any(
        isinstance(m, AdaB2N) for m in net.modules()
    )
    assert any(isinstance(m, _BatchNorm) for m in model.modules())
    torch.testing.assert_close(net(x), want)
    tt.save(net, tmp_path / name)
    torch.testing.assert_close(tt.load(tmp_path / name)(x), want)
    for plain in (merged(net), merge(net)):
        torch.testing.assert_close(plain(x), want)
        assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
        assert plain.state_dict().keys() == model.state_dict().keys()


def test_a_converted_model_trains_in_the_one_loop():
    data = tt.load_data("digits", limit=300)
    net = convert(cnn(), num_tasks=2)
    result = tt.fit(net, data, epochs=4, lr=0.05, batch_size=32, augment="none", progress=False)
    assert result.best["val_accuracy"] > 0.7
    assert tt.evaluate(merged(net), data) == pytest.approx(tt.evaluate(net, data))


@pytest.mark.parametrize("loss", ["er", "er_ace", "der++"])
def test_a_stream_ends_with_plain_batch_norms(loss):
    data, model = tt.load_data("digits", limit=400), cnn()
    result = adab2n(model, class_incremental(data, tasks=5), loss=loss, buffer=100, augment="none", progress=False)
    assert [type(m) for m in result.model.modules()] == [type(m) for m in model.modules()]
    assert result.last_accuracy > 0.4
    assert tt.evaluate(result.model, data)["accuracy"] == pytest.approx(result.last_accuracy)


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="has no batch norm"):
        convert(nn.Sequential(nn.Linear(2, 2)), num_tasks=2)
    with pytest.raises(ValueError, match="0 must be a batch norm inside a model, with weights"):
        convert(nn.Sequential(nn.BatchNorm2d(3, affine=False)), num_tasks=2)
    with pytest.raises(ValueError, match="the kind SyncBatchNorm cannot be converted"):
        convert(nn.Sequential(nn.SyncBatchNorm(3)), num_tasks=2)
    with pytest.raises(ValueError, match=r"kappa must be in \[0, 1\], got 2"):
        convert(nn.Sequential(nn.BatchNorm2d(3)), num_tasks=2, kappa=2)
    net, _ = layer()
    with (
        pytest.raises(ValueError, match="task_batch was given 3 tasks for a batch of 10"),
        task_batch(net, torch.tensor([0, 1, 1]), finished=1),
    ):
        net(images())
    stream = class_incremental(tt.load_data("digits", limit=100), tasks=5)
    model = tt.create_model("trim_1k", num_classes=10, in_chans=1, img_size=8)
    with pytest.raises(ValueError, match="weight must not be negative, got -1"):
        adab2n(model, stream, weight=-1)
