"""The conformance battery: what every model, objective and surgery in trimtab must do, for yours too.

Each check raises AssertionError with a message that says what is wrong. Run them one by one under pytest, or all
at once:

```python
import pytest
from trimtab import testing

@pytest.mark.parametrize(("name", "check"), testing.model_checks())
def test_my_net(name, check):
    check(testing.ModelCase(lambda: MyNet(num_classes=10), input_size=(3, 32, 32)))

testing.check_model("cct_2_3x2_32")                          # by name, all checks
testing.check_objective(MyObjective)                         # a callable without arguments that makes one
testing.check_surgery(lambda model, size: my_surgery(model, size))
```
"""

from __future__ import annotations

import copy
import json
import math
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trimtab.core import edit
from trimtab.core.artifact import InputSpec, load, save
from trimtab.core.cost import measure

Builder = Callable[[], nn.Module]
Size = tuple[int, ...]  # (C, H, W), or (C, D, H, W)


class ModelCase:
    """A model under test: how to build it, and images it takes.

    Args:
        model: a name that `create_model` knows, or a callable without arguments that makes the model.
        input_size: (C, H, W), or (C, D, H, W) for volumes; for a name, its own by default.
        other_size: a second size it must take; by default the first, 1.5 times as large, None for none.
        num_classes: width of the logits.
        **kwargs: for `create_model`.
    """

    def __init__(
        self,
        model: str | Builder,
        *,
        input_size: Size | None = None,
        other_size: Size | str | None = "auto",
        num_classes: int = 10,
        **kwargs: Any,
    ):
        if isinstance(model, str):
            from trimtab.models import create_model

            self.name: str | None = model
            self._build: Callable[..., nn.Module] = partial(create_model, model, num_classes=num_classes, **kwargs)
            if input_size is None:
                import timm

                cfg = timm.get_pretrained_cfg(model)
                side = kwargs.get("img_size") or (cfg.input_size[1:] if cfg else (224, 224))
                side = (side, side) if isinstance(side, int) else tuple(side)
                input_size = (kwargs.get("in_chans") or (cfg.input_size[0] if cfg else 3), *side)
        else:
            if kwargs:
                raise ValueError(f"arguments {sorted(kwargs)} are for models by name, got a callable")
            if input_size is None:
                raise ValueError("input_size must be given with a callable")
            self.name, self._build = None, model
        self.input_size, self.num_classes = input_size, num_classes
        if other_size == "auto":
            c, *sides = input_size
            other_size = (c, *(side * 3 // 2 for side in sides))  # type: ignore[assignment]
        self.other_size: Size | None = other_size  # type: ignore[assignment]

    def build(self, seed: int = 0) -> nn.Module:
        """A fresh model; the same weights for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._build()

    @cached_property
    def model(self) -> nn.Module:
        """One model that all checks share, in eval mode; checks that change a model build their own."""
        return _settle(self.build(), self.images(8)).eval()

    def images(self, n: int, size: Size | None = None, seed: int = 0) -> Tensor:
        return torch.randn(n, *(size or self.input_size), generator=torch.Generator().manual_seed(seed))

    @cached_property
    def per_pixel(self) -> bool:
        """Whether the model says that it gives logits for every pixel."""
        return getattr(self.model, "per_pixel", False)

    def places(self, size: Size | None = None) -> tuple[int, ...]:
        """What follows (B, channels) in the shape of logits: nothing, or the pixels."""
        return (size or self.input_size)[1:] if self.per_pixel else ()

    @property
    def spec(self) -> InputSpec:
        c = self.input_size[0]
        return InputSpec(self.input_size, (0.5,) * c, (0.25,) * c)


ModelCheck = Callable[[ModelCase], None]


# -- models: fast ---------------------------------------------------------------------------------------------------


@contextmanager
def serving(path: str | Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``trimtab serve`` in a process of its own, on a free port of the loopback device: the process, and its address.

    It is gone when the block ends.

    Raises:
        RuntimeError: it did not start; its last words are in the message.
    """
    command = [sys.executable, "-m", "trimtab", "serve", str(path), "--port", "0", "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        said = ""
        while not said.endswith("}\n"):
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server did not start: {process.stderr.read().strip()[-800:]}")
            said += line
        yield process, json.loads(said)["address"]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def check_builds(case: ModelCase) -> None:
    """Builds; a registered model is in timm's registry and shows timm's face."""
    model = case.build()
    _claim(sum(p.numel() for p in model.parameters()) > 0, "the model has no parameters")
    _claim(model.training, "a fresh model must be in training mode")
    if case.name is None:
        return
    for name in ("default_cfg", "pretrained_cfg", "num_classes", "num_features", "feature_info"):
        _claim(hasattr(model, name), f"the model must have {name!r}, as timm's models have")
    for name in ("forward_features", "forward_head", "get_classifier", "reset_classifier"):
        _claim(callable(getattr(model, name, None)), f"the model must have the method {name}(), as timm's models have")
    _claim(edit.history(model).base == case.name, f"the model must remember its base {case.name!r}")
    json.dumps(edit.history(model).kwargs)


@torch.no_grad()
def check_forward(case: ModelCase) -> None:
    """Takes its own size and another, any batch size, and treats the images of a batch separately."""
    for size in filter(None, (case.input_size, case.other_size)):
        x = case.images(3, size)
        y = case.model(x)
        want = (3, case.num_classes, *case.places(size))
        _claim(y.shape == want, f"logits for {tuple(x.shape)} must be {want}, got {tuple(y.shape)}")
        _claim(bool(torch.isfinite(y).all()), f"logits for {tuple(x.shape)} are not finite")
        _same(case.model(x[:1]), y[:1], "an image gives other logits alone than in a batch (eval mode)", 1e-4)


def check_backward(case: ModelCase) -> None:
    """The loss reaches every parameter with a finite gradient; weight matrices get one that is not zero."""
    model = copy.deepcopy(case.model).train()
    labels = (torch.arange(8) % case.num_classes).view(-1, *(1 for _ in case.places())).expand(-1, *case.places())
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():  # a gain that starts at zero would block the gradient for a good reason
        if not p.any():
            p.data.normal_(std=0.1, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out, own = model(case.images(8)), getattr(model, "criterion", None)
        losses = [nn.functional.cross_entropy(out, labels)] if own is None else own(out, {"label": labels}).values()
        sum(losses, start=torch.zeros(())).backward()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        _claim(p.grad is not None, f"no gradient reaches {name}")
        assert p.grad is not None
        _claim(bool(torch.isfinite(p.grad).all()), f"the gradient of {name} is not finite")
        _claim(p.ndim < 2 or bool(p.grad.any()), f"the gradient of {name} is zero everywhere")


@torch.no_grad()
def check_deterministic(case: ModelCase) -> None:
    """The seed decides the weights; eval mode draws no random numbers and changes nothing."""
    for (name, p), q in zip(case.model.named_parameters(), case.build().parameters(), strict=True):
        _claim(torch.equal(p, q), f"two builds with one seed differ in {name}")
    x = case.images(2)
    state, before = torch.random.get_rng_state(), {k: v.clone() for k, v in case.model.state_dict().items()}
    first = case.model(x)
    _claim(torch.equal(torch.random.get_rng_state(), state), "eval mode draws from the global random generator")
    _claim(torch.equal(case.model(x), first), "eval mode gives other logits the second time")
    for name, v in case.model.state_dict().items():
        _claim(torch.equal(v, before[name]), f"eval mode changed {name}")


@torch.no_grad()
def check_state_dict(case: ModelCase) -> None:
    """A fresh model with the state dict computes the same."""
    other = case.build(seed=2)
    other.load_state_dict(case.model.state_dict(), strict=True)
    x = case.images(2)
    _same(other.eval()(x), case.model(x), "a model loaded from the state dict computes something else", 0.0)
    _same(copy.deepcopy(case.model)(x), case.model(x), "a deep copy computes something else", 0.0)


@torch.no_grad()
def check_artifact(case: ModelCase) -> None:
    """Saved and loaded it computes the same, and can be saved again."""
    x = case.images(2)
    with tempfile.TemporaryDirectory() as folder:
        save(case.model, Path(folder) / "a", spec=case.spec)
        again = load(Path(folder) / "a", base=None if case.name else case.build(seed=3))
        _claim(not again.training, "a loaded model must be in eval mode")
        _same(again(x), case.model(x), "the loaded model computes something else", 0.0)
        save(again, Path(folder) / "b")


def check_cost(case: ModelCase) -> None:
    """`measure` agrees with torch's flop counter and leaves the model as it is."""
    cost = measure(case.model, case.input_size, what=("params", "macs"))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        case.model(case.images(1))
    _claim(
        cost.macs == counter.get_total_flops() / 2,
        f"measure counts {cost.macs} MACs, torch {counter.get_total_flops() / 2:.0f}",
    )
    _claim(
        cost.params == sum(p.numel() for p in case.model.parameters()), "measure counts other parameters than there are"
    )
    _claim(not case.model.training, "measure changed the mode of the model")


@torch.no_grad()
def check_bf16(case: ModelCase) -> None:
    """bfloat16 weights and bfloat16 autocast give nearly the same logits."""
    x = case.images(4)
    want = case.model(x)
    low = copy.deepcopy(case.model).to(torch.bfloat16)(x.to(torch.bfloat16)).float()
    with torch.autocast("cpu", torch.bfloat16):
        auto = case.model(x).float()
    for got, what in ((low, "bfloat16 weights"), (auto, "bfloat16 autocast")):
        _claim(bool(torch.isfinite(got).all()), f"logits with {what} are not finite")
        error = (got - want).norm() / want.norm().clamp_min(1e-12)
        _claim(error < 0.1, f"logits with {what} are off by {error:.1%}")


@torch.no_grad()
def check_classifier(case: ModelCase) -> None:
    """`reset_classifier` changes the classes, 0 gives the features that the classifier would see."""
    if not hasattr(case.model, "reset_classifier"):
        _claim(case.name is None, "the model must have reset_classifier()")
        return
    model: Any = copy.deepcopy(case.model)
    x = case.images(2)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    want = (2, getattr(model, "head_hidden_size", model.num_features), *case.places())
    _claim(features.shape == want, f"features before the classifier must be {want}, got {tuple(features.shape)}")
    _same(
        model.forward_head(model.forward_features(x)), model(x), "forward_head(forward_features(x)) is not forward(x)"
    )
    model.reset_classifier(case.num_classes + 3)
    _claim(model(x).shape == (2, case.num_classes + 3, *case.places()), "reset_classifier(n) must give n logits")
    _claim(model.num_classes == case.num_classes + 3, "reset_classifier must update num_classes")
    _claim(not model.get_classifier().training, "the new classifier must be in the mode of the model")
    model.reset_classifier(0)
    _same(model(x), features, "reset_classifier(0) must give the features before the classifier")


def check_wrong_input(case: ModelCase) -> None:
    """Images with another number of channels, and tensors that are no batch of images, are refused in words."""
    c, *sides = case.input_size
    for what, x in {
        f"{c + 1} channels": torch.zeros(2, c + 1, *sides),
        "a single image without batch": torch.zeros(c, *sides),
        "flat vectors": torch.zeros(2, math.prod(case.input_size)),
    }.items():
        try:
            case.model(x)
        except (ValueError, RuntimeError, AssertionError) as e:
            _claim(bool(str(e)), f"the error for {what} says nothing")
        except Exception as e:
            raise AssertionError(f"{what} must be refused with a ValueError, got {type(e).__name__}: {e}") from e
        else:
            raise AssertionError(f"{what} must be refused, got logits")


@torch.no_grad()
def check_features(case: ModelCase) -> None:
    """`features_only` gives maps as `feature_info` says (classifiers by name)."""
    if case.name is None or case.per_pixel:
        return
    import timm

    if edit.history(case.model).edits:
        return  # adapted to another image size: the strides are no longer those of the architecture
    kwargs = {k: v for k, v in edit.history(case.model).kwargs.items() if k != "num_classes"}
    net: Any = timm.create_model(case.name, features_only=True, **kwargs).eval()
    maps = net(case.images(1))
    for m, info in zip(maps, net.feature_info.get_dicts(), strict=True):
        want = -(-case.input_size[1] // info["reduction"])
        _claim(
            m.shape[1] == info["num_chs"],
            f"{info['module']}: {m.shape[1]} channels, feature_info says {info['num_chs']}",
        )
        _claim(abs(m.shape[2] - want) <= 1, f"{info['module']}: height {m.shape[2]}, feature_info says {want}")


# -- models: slow ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_compile(case: ModelCase, backend: str = "aot_eager") -> None:
    """`torch.compile` takes the model as one graph and computes the same; `backend="inductor"` needs a C++ compiler."""
    torch._dynamo.reset()
    try:
        compiled = torch.compile(case.model, backend=backend, fullgraph=True)
        x = case.images(2)
        _same(compiled(x), case.model(x), f"torch.compile ({backend}) computes something else", 1e-4)
    finally:
        torch._dynamo.reset()


def check_onnx(case: ModelCase) -> None:
    """Exported to ONNX it computes the same, for another batch size than the one exported."""
    from trimtab.deploy import OnnxModel, export

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export(case.model, file, spec=case.spec)
        x = case.images(3)
        with torch.no_grad():
            want = case.model(x)
        got = torch.from_numpy(OnnxModel(file).logits(x.numpy()))
    _same(got, want, "ONNX Runtime computes something else", 1e-3)


_FAST: dict[str, ModelCheck] = {
    "builds": check_builds,
    "forward": check_forward,
    "backward": check_backward,
    "deterministic": check_deterministic,
    "state_dict": check_state_dict,
    "artifact": check_artifact,
    "cost": check_cost,
    "bf16": check_bf16,
    "classifier": check_classifier,
    "wrong_input": check_wrong_input,
    "features": check_features,
}
_SLOW: dict[str, ModelCheck] = {"compile": check_compile, "onnx": check_onnx}


def model_checks(*, slow: bool | None = None) -> Iterator[tuple[str, ModelCheck]]:
    """(name, check) of all checks for models; `slow` True or False gives the slow or the fast ones only.

    >>> [name for name, _ in model_checks(slow=True)]
    ['compile', 'onnx']
    """
    if slow is not True:
        yield from _FAST.items()
    if slow is not False:
        yield from _SLOW.items()


def check_model(model: str | Builder, *, slow: bool | None = None, skip: Sequence[str] = (), **case: Any) -> None:
    """Run the battery on a model; arguments as for `ModelCase` and `model_checks`.

    Raises:
        AssertionError: names the first check that fails, and why.

    >>> check_model("trim_1k", slow=False)
    """
    it = ModelCase(model, **case)
    for name, check in model_checks(slow=slow):
        if name not in skip:
            _run(name, partial(check, it))


# -- objectives -----------------------------------------------------------------------------------------------------


class ToyNet(nn.Module):
    """A small network without batch norm, for objectives: (B, 1, 8, 8) -> (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.conv1(x).relu()).relu().flatten(1))


def toy_net() -> nn.Module:
    """A `ToyNet` whose weights are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ToyNet()


class ObjectiveCase:
    """An objective under test.

    Args:
        objective: a callable without arguments that makes it; importable (no lambda) for the check with two processes.
        model: likewise for a model for images (1, 8, 8) and 10 classes; without batch norm, whose statistics differ
            between one process and two.
        fit: further arguments for `fit`.
    """

    def __init__(self, objective: Callable[[], Any], *, model: Builder = toy_net, **fit: Any):
        self.objective, self.build = objective, model
        self.fit = {
            "batch_size": 32,
            "lr": 0.02,
            "augment": "none",
            "seed": 3,
            "progress": False,
            "device": "cpu",
            **fit,
        }

    def train(self, **kwargs: Any) -> Any:
        from trimtab.learn import fit

        return fit(self.build(), _digits(), self.objective(), **{**self.fit, **kwargs})


ObjectiveCheck = Callable[[ObjectiveCase], None]


def check_loss_falls(case: ObjectiveCase) -> None:
    """Some epochs on 256 digits: the loss falls, by a tenth at least, and stays finite."""
    losses = [row["loss"] for row in case.train(epochs=8, val=None).history]
    _claim(all(x == x and abs(x) != float("inf") for x in losses), f"the loss is not finite: {losses}")
    fell = losses[0] - min(losses[-2:])
    _claim(
        fell > 0.1 * abs(losses[0]),
        f"the loss must fall by a tenth in 8 epochs, got {losses[0]:.4f} to {losses[-1]:.4f}",
    )


class _Killed(BaseException):
    pass


def check_resume(case: ObjectiveCase) -> None:
    """Killed in the third epoch and started again, training ends with the same weights, bit by bit."""
    whole = case.train(epochs=4).model.state_dict()

    def kill(row: dict[str, Any]) -> None:
        if row["epoch"] == 3:
            raise _Killed

    with tempfile.TemporaryDirectory() as out:
        try:
            case.train(epochs=4, out=out, on_epoch=kill)
        except _Killed:
            pass
        else:
            raise AssertionError("on_epoch was not called for the third epoch")
        resumed = case.train(epochs=4, out=out).model.state_dict()
    for name, value in whole.items():
        _claim(torch.equal(resumed[name], value), f"after a kill and a resume, {name} differs")


def check_leaves_nothing(case: ObjectiveCase) -> None:
    """After training the model has the modules, parameters, hooks and modes it had before."""
    from trimtab.learn import fit

    model = case.build()
    before = _anatomy(model)
    after = fit(model, _digits(), case.objective(), **{**case.fit, "epochs": 1})
    for what, value in _anatomy(after.model).items():
        _claim(
            value == before[what], f"training left something on the model: {what} {_difference(before[what], value)}"
        )
    _claim(all(p.grad is None for p in after.model.parameters()), "training left gradients on the model")


def check_two_processes(case: ObjectiveCase) -> None:
    """Two processes with half a batch each end where one process with the whole batch ends (rounding aside)."""
    one = case.train(epochs=2, val=None).model.state_dict()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        context = torch.multiprocessing.get_context("spawn")
        work = [context.Process(target=_process, args=(rank, 2, port, case, folder)) for rank in range(2)]
        for p in work:
            p.start()
        for p in work:
            p.join(240)
        codes = [p.exitcode for p in work]
        for p in work:
            p.kill()
        _claim(codes == [0, 0], f"the two processes ended with {codes}")
        from safetensors.torch import load_file

        two = load_file(Path(folder) / "weights.safetensors")
    for name, value in one.items():
        _same(two[name].to(value.dtype), value, f"two processes train another {name} than one", 1e-3)


_OBJECTIVE_FAST: dict[str, ObjectiveCheck] = {
    "loss_falls": check_loss_falls,
    "resume": check_resume,
    "leaves_nothing": check_leaves_nothing,
}
_OBJECTIVE_SLOW: dict[str, ObjectiveCheck] = {"two_processes": check_two_processes}


def objective_checks(*, slow: bool | None = None) -> Iterator[tuple[str, ObjectiveCheck]]:
    """(name, check) of all checks for objectives."""
    if slow is not True:
        yield from _OBJECTIVE_FAST.items()
    if slow is not False:
        yield from _OBJECTIVE_SLOW.items()


def check_objective(
    objective: Callable[[], Any], *, slow: bool | None = None, skip: Sequence[str] = (), **case: Any
) -> None:
    """Run the battery on an objective; arguments as for `ObjectiveCase`.

    Raises:
        AssertionError: names the first check that fails, and why.
    """
    it = ObjectiveCase(objective, **case)
    for name, check in objective_checks(slow=slow):
        if name not in skip:
            _run(name, partial(check, it))


# -- surgeries ------------------------------------------------------------------------------------------------------


class SurgeryCase:
    """A surgery under test.

    Args:
        operate: (model, input_size) -> the smaller model, with its edits remembered; the given model stays whole.
        model: a name that `create_model` knows.
        **kwargs: as for `ModelCase`.
    """

    def __init__(self, operate: Callable[[nn.Module, Size], nn.Module], *, model: str = "trim_10k", **kwargs: Any):
        self.operate = operate
        self.base = ModelCase(model, **kwargs)

    @cached_property
    def small(self) -> nn.Module:
        """What the surgery makes of the base, in eval mode."""
        return self.operate(copy.deepcopy(self.base.model), self.base.input_size).eval()


SurgeryCheck = Callable[[SurgeryCase], None]


@torch.no_grad()
def check_original_untouched(case: SurgeryCase) -> None:
    """The model that was given computes what it computed."""
    model, x = copy.deepcopy(case.base.model), case.base.images(2)
    before, names = model(x), _anatomy(model)
    small = case.operate(model, case.base.input_size)
    _claim(small is not model, "the surgery must give a new model")
    _claim(_anatomy(model) == names, "the surgery changed the structure of the model it was given")
    _same(model.eval()(x), before, "the surgery changed the model it was given", 0.0)


def check_smaller(case: SurgeryCase) -> None:
    """Fewer multiply-adds, not more parameters, and still logits."""
    big = measure(case.base.model, case.base.input_size, what=("params", "macs"))
    small = measure(case.small, case.base.input_size, what=("params", "macs"))
    assert big.params and small.params and big.macs and small.macs
    _claim(small.params <= big.params, f"parameters grew from {big.params} to {small.params}")
    _claim(small.macs < big.macs, f"multiply-adds must fall, got {big.macs} to {small.macs}")
    with torch.no_grad():
        y = case.small(case.base.images(2))
    _claim(y.shape == (2, case.base.num_classes), f"logits must be (2, {case.base.num_classes}), got {tuple(y.shape)}")


@torch.no_grad()
def check_edits_round_trip(case: SurgeryCase) -> None:
    """The edits survive JSON; on a fresh base with the same weights they give the same function."""
    edits = edit.history(case.small).edits
    _claim(bool(edits), "the surgery must remember its edits on the model")
    again = edit.from_json(json.loads(json.dumps(edit.to_json(edits))))
    fresh = case.base.build(seed=4)
    earlier = edit.history(fresh).edits
    edit.apply(fresh, again[len(earlier) :])
    fresh.load_state_dict(case.small.state_dict(), strict=True)
    x = case.base.images(2)
    _same(fresh.eval()(x), case.small(x), "the edits on a fresh base give another function", 1e-5)


def check_small_trains(case: SurgeryCase) -> None:
    """A training step changes every weight matrix of the small model."""
    model = copy.deepcopy(case.small).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    labels = torch.arange(8) % case.base.num_classes
    nn.functional.cross_entropy(model(case.base.images(8)), labels).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        _claim(bool(torch.isfinite(p).all()), f"{name} is not finite after a training step")
        _claim(p.ndim < 2 or not torch.equal(p, before[name]), f"a training step does not change {name}")


@torch.no_grad()
def check_small_saves(case: SurgeryCase) -> None:
    """Saved and loaded, by name and edits alone, it computes the same."""
    x = case.base.images(2)
    with tempfile.TemporaryDirectory() as folder:
        save(case.small, Path(folder) / "a", spec=case.base.spec)
        _same(load(Path(folder) / "a")(x), case.small(x), "the loaded model computes something else", 0.0)


def check_small_exports(case: SurgeryCase) -> None:
    """Exported to ONNX it computes the same."""
    small = case.small
    it = ModelCase(lambda: copy.deepcopy(small), input_size=case.base.input_size, num_classes=case.base.num_classes)
    it.__dict__["model"] = small
    check_onnx(it)


_SURGERY_FAST: dict[str, SurgeryCheck] = {
    "original_untouched": check_original_untouched,
    "smaller": check_smaller,
    "edits_round_trip": check_edits_round_trip,
    "trains": check_small_trains,
    "saves": check_small_saves,
}
_SURGERY_SLOW: dict[str, SurgeryCheck] = {"exports": check_small_exports}


def surgery_checks(*, slow: bool | None = None) -> Iterator[tuple[str, SurgeryCheck]]:
    """(name, check) of all checks for surgeries."""
    if slow is not True:
        yield from _SURGERY_FAST.items()
    if slow is not False:
        yield from _SURGERY_SLOW.items()


def check_surgery(
    operate: Callable[[nn.Module, Size], nn.Module], *, slow: bool | None = None, skip: Sequence[str] = (), **case: Any
) -> None:
    """Run the battery on a surgery; arguments as for `SurgeryCase`.

    Raises:
        AssertionError: names the first check that fails, and why.
    """
    it = SurgeryCase(operate, **case)
    for name, check in surgery_checks(slow=slow):
        if name not in skip:
            _run(name, partial(check, it))


# -- helpers --------------------------------------------------------------------------------------------------------


def _claim(holds: bool | Tensor, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _same(got: Tensor, want: Tensor, otherwise: str, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance`, relative to the largest value; exactly for 0."""
    _claim(got.shape == want.shape, f"{otherwise}: shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    if tolerance == 0:
        _claim(torch.equal(got, want), f"{otherwise}: largest difference {(got - want).abs().max():.3g}")
        return
    scale = want.abs().max().clamp_min(1e-6)
    error = ((got - want).abs().max() / scale).item()
    _claim(error <= tolerance, f"{otherwise}: largest difference {error:.3g} of the largest value")


def _run(name: str, check: Callable[[], None]) -> None:
    try:
        check()
    except AssertionError as e:
        raise AssertionError(f"{name}: {e}") from e


def _settle(model: nn.Module, x: Tensor) -> nn.Module:
    """Let batch norms see data once, so that eval mode is not degenerate."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model.train()(x)
    return model


def _anatomy(model: nn.Module) -> dict[str, Any]:
    hooks = {
        f"{name}:{kind}": len(getattr(m, kind))
        for name, m in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    }
    return {
        "modules": {name: type(m).__qualname__ for name, m in model.named_modules()},
        "parameters": {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()},
        "buffers": {name: tuple(b.shape) for name, b in model.named_buffers()},
        "hooks": {k: n for k, n in hooks.items() if n},
        "forward": {name: "forward" in m.__dict__ for name, m in model.named_modules()},
    }


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    changed = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    return ", ".join(repr(k) for k in changed[:3])


def _digits() -> Any:
    from trimtab.data import load_data

    return load_data("digits", limit=300)


def _process(rank: int, world: int, port: int, case: ObjectiveCase, folder: str) -> None:
    """One of several training processes, as a launcher would start it."""
    import os

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    state = case.train(epochs=2, val=None, device=None).model.state_dict()
    if rank == 0:
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in state.items()}, Path(folder) / "weights.safetensors")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
