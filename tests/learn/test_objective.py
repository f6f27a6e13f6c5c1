"""Losses that are returned, and losses that are yielded: the same mathematics, less memory, and no leaks."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.learn.toy import Toy, distance, net, same, weights
from trimtab.learn import Batch, Classify, Context, Objective, backward_all, fit, soft_ce

DATA = Toy()
THREE_STEPS = {"epochs": 1, "batch_size": 32, "lr": 0.1, "val": None}


class Form(Classify):
    """The same loss in one of four forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def losses(self, model, batch, ctx):
        loss = soft_ce(self.predict(model, batch), batch.label)
        if self.form == "tensor":
            return loss
        if self.form == "dict":
            return {"ce": loss}
        return self._yielded(loss)

    def _yielded(self, loss):
        yield loss if self.form == "generator" else {"ce": loss}


def test_tensor_dict_and_generators_of_one_are_identical():
    seen = []
    for form in ("tensor", "dict", "generator", "generator of dicts"):
        model = net(dropout=0.3)
        fit(model, DATA, Form(form), **THREE_STEPS)
        seen.append(weights(model))
    assert all(same(seen[0], other) for other in seen[1:])


class Summed(Objective):
    """Two losses a, b: yielded one after the other, or added first; over disjoint or shared graphs."""

    def __init__(self, shared: bool, yielding: bool) -> None:
        super().__init__()
        self.shared, self.yielding = shared, yielding

    def losses(self, model, batch, ctx):
        if self.yielding:
            return self._two(model, batch)
        return self._a(model, batch) + self._b(model, batch)

    def _two(self, model, batch):
        yield self._a(model, batch)
        yield self._b(model, batch)

    def _a(self, model, batch):
        return F.cross_entropy(model["left"](batch.image.flatten(1)), batch.label)

    def _b(self, model, batch):
        return F.cross_entropy(model["left" if self.shared else "right"](0.5 * batch.image.flatten(1)), batch.label)


@pytest.mark.parametrize("shared", [False, True])
def test_two_yields_equal_their_sum(shared):
    seen = []
    for yielding in (True, False):
        torch.manual_seed(0)
        model = nn.ModuleDict({"left": nn.Linear(64, 3), "right": nn.Linear(64, 3)})
        fit(model, DATA, Summed(shared, yielding), **THREE_STEPS)
        seen.append(weights(model))
    if shared:
        assert distance(*seen) < 1e-6
    else:
        assert same(*seen)


class SAM(Classify):
    """Sharpness-aware minimisation as a generator: gradient, step uphill, gradient there, back."""

    rho = 0.05

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self._fails = fails

    def losses(self, model, batch, ctx):
        yield soft_ce(self.predict(model, batch), batch.label)
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in trained]).norm()
        kept = [p.detach().clone() for p in trained]
        for p in trained:
            p.data.add_(p.grad, alpha=float(self.rho / norm))
            p.grad = None
        try:
            loss = soft_ce(self.predict(model, batch), batch.label)
            yield loss.sum().reshape(1, 1) if self._fails else loss
        finally:
            for p, value in zip(trained, kept):
                p.data.copy_(value)


def test_sam_as_two_yields_is_sam():
    model, mine = net(norm="group"), net(norm="group")
    fit(model, DATA, SAM(), epochs=1, batch_size=32, lr=0.1, opt="momentum", momentum=0.0, weight_decay=0.0,
        sched="constant", val=None)  # fmt: skip
    for batch in DATA.loader("train", batch_size=32, shuffle=True, drop_last=True):
        params = list(mine.parameters())
        loss = F.cross_entropy(mine(batch["image"]), batch["label"])
        grads = torch.autograd.grad(loss, params)
        norm = torch.stack([g.norm() for g in grads]).norm()
        start = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, g in zip(params, grads):
                p += 0.05 * g / norm
        up = torch.autograd.grad(F.cross_entropy(mine(batch["image"]), batch["label"]), params)
        with torch.no_grad():
            for p, g, s in zip(params, up, start):
                p.copy_(s - 0.1 * g)
    assert distance(weights(model), weights(mine)) < 1e-6


def test_an_abandoned_generator_cleans_up():
    model = net()
    before = weights(model)
    with pytest.raises(ValueError, match="must be a scalar"):
        fit(model, DATA, SAM(fails=True), **THREE_STEPS)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(before[n], p) for n, p in parameters.items())


class Leaky(Classify):
    def __init__(self, manager) -> None:
        super().__init__()
        self._manager = manager

    def losses(self, model, batch, ctx):
        loss = soft_ce(self.predict(model, batch), batch.label)
        with self._manager():
            yield loss


@pytest.mark.parametrize(
    "manager, word",
    [
        (torch.no_grad, "gradients"),
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "autocast"),
        (torch.inference_mode, "inference"),
    ],
)
def test_yielding_inside_a_context_manager_raises_and_does_not_leak(manager, word):
    with pytest.raises(RuntimeError, match=rf"yielded inside a context manager .*{word}"):
        fit(net(), DATA, Leaky(manager), **THREE_STEPS)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled()


def test_autocast_is_entered_around_the_computing_only():
    modes = []

    class Spy(Classify):
        def losses(self, model, batch, ctx):
            modes.append(torch.is_autocast_enabled("cpu"))
            loss = soft_ce(self.predict(model, batch), batch.label)
            loss.register_hook(lambda g: modes.append(torch.is_autocast_enabled("cpu")))
            yield loss
            modes.append(torch.is_autocast_enabled("cpu"))

    fit(net(), DATA, Spy(), epochs=1, batch_size=96, precision="bf16", val=None)
    assert modes == [True, False, True]


class Held:
    """Bytes that autograd holds for backward passes, now and at most, counted per storage."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def pack(self, tensor):
        key = tensor.untyped_storage().data_ptr()
        if self._alive.get(key, 0) == 0:
            self.now += tensor.untyped_storage().nbytes()
        self._alive[key] = self._alive.get(key, 0) + 1
        self.peak = max(self.peak, self.now)
        return _Token(self, tensor, key)

    def release(self, key: int, size: int) -> None:
        self._alive[key] -= 1
        if self._alive[key] == 0:
            self.now -= size


class _Token:
    def __init__(self, held: Held, tensor, key: int) -> None:
        self.held, self.tensor, self.key = held, tensor, key

    def __del__(self) -> None:
        self.held.release(self.key, self.tensor.untyped_storage().nbytes())


class Local(Objective):
    """Each stage learns from its own head; no gradient passes from stage to stage."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def setup(self, model, batch):
        if "heads" not in self.extra:
            torch.manual_seed(1)
            self.extra["heads"] = nn.ModuleList(nn.Linear(32, 3) for _ in range(4))

    def losses(self, model, batch, ctx):
        if self.how == "yield":
            return self._local(model, batch)
        if self.how == "sum":
            return sum(self._local(model, batch))
        return F.cross_entropy(self.extra["heads"][-1](model(batch.image).mean((2, 3))), batch.label)

    def _local(self, model, batch):
        x = batch.image
        for stage, head in zip(model, self.extra["heads"]):
            x = stage(x.detach())
            yield F.cross_entropy(head(x.mean((2, 3))), batch.label)


def test_yielded_local_losses_hold_little_and_give_the_same_gradients():
    peaks, gradients = {}, {}
    batch = Batch(
        image=torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), label=torch.arange(8) % 3
    )
    for how in ("end to end", "sum", "yield"):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(3 if i == 0 else 32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
                    nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
                )
                for i in range(4)
            )
        )  # fmt: skip
        objective, held = Local(how), Held()
        objective.setup(model, batch)
        gc.collect()
        with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda token: token.tensor):
            backward_all(lambda m=model, o=objective: o.losses(m, batch, Context()))
        peaks[how] = held.peak
        gradients[how] = [p.grad.clone() for p in model.parameters()]
    assert peaks["yield"] < 0.4 * peaks["end to end"]
    assert peaks["yield"] < 0.4 * peaks["sum"]
    assert all(torch.equal(a, b) for a, b in zip(gradients["yield"], gradients["sum"]))


@pytest.mark.parametrize(
    "give, words",
    [
        (lambda loss: loss.detach(), "must depend on parameters"),
        (lambda loss: loss.reshape(1), "must be a scalar tensor, got a tensor \\(1,\\)"),
        (lambda loss: {}, "empty dict"),
        (lambda loss: iter(()), "must return a tensor"),
        (lambda loss: (x for x in ()), "yielded nothing"),
        (lambda loss: {"a": loss, "loss": loss}, "a logged name must not be"),
        (lambda loss: 3.0, "must return a tensor"),
    ],
)
def test_bad_losses_are_named(give, words):
    class Bad(Classify):
        def losses(self, model, batch, ctx):
            return give(super().losses(model, batch, ctx))

    with pytest.raises((ValueError, TypeError), match=words):
        fit(net(), DATA, Bad(), **THREE_STEPS)


def test_batch_reads_like_an_object():
    batch = Batch(image=torch.zeros(2, 1, 2, 2), label=torch.tensor([0, 1]))
    assert batch.image is batch["image"]
    assert batch.replace(weight=torch.ones(2)).weight.sum() == 2 and "weight" not in batch
    with pytest.raises(AttributeError, match="no 'box'; it has image, label"):
        _ = batch.box
