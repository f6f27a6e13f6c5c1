import json
import os
import pickle
import struct

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.elsewhere import python
from trimtab.core.artifact import MANIFEST, WEIGHTS, InputSpec, load, read_manifest, save
from trimtab.core.edit import Insert, Narrow, Replace, SetAttr, apply, history, remember_base
from trimtab.core.errors import ArtifactError

NAME, KWARGS = "test_resnet", {"num_classes": 5}  # timm's own miniature ResNet
X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = timm.create_model(NAME, **KWARGS).eval()
    remember_base(net, NAME, KWARGS)
    return net


def cut(model):
    """Half of the inner channels of one block of the miniature ResNet."""
    name, block = next((n, m) for n, m in model.named_modules() if hasattr(m, "conv2"))
    keep = tuple(range(0, block.conv1.out_channels, 2))
    norm = [Narrow(f"{name}.bn1.{t}", 0, keep) for t in ("weight", "bias", "running_mean", "running_var")]
    edits = [Narrow(f"{name}.conv1.weight", 0, keep), *norm, Narrow(f"{name}.conv2.weight", 1, keep)]
    return apply(model, [*edits, SetAttr(f"{name}.conv1", "out_channels", len(keep))])


def test_round_trip_of_plain_narrowed_and_replaced_models(model, tmp_path):
    for i, step in enumerate([lambda m: m, cut, lambda m: apply(m, [Replace("act1", "torch.nn.GELU", {})])]):
        step(model)
        back = load(save(model, tmp_path / str(i)))
        assert torch.equal(back(X), model(X))
        assert type(back) is type(model)
        assert history(back) == history(model)


def test_a_fresh_process_loads_a_cut_model_and_trains_it(model, tmp_path):
    save(cut(model), tmp_path / "a")
    code = f"""
import torch
from trimtab.core.artifact import load
m = load({str(tmp_path / "a")!r})
x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
y = m(x); print(y.double().sum().item())
m.train(); m(x).square().sum().backward()
assert all(p.grad is not None for p in m.parameters())
"""
    assert float(python(code)) == pytest.approx(model(X).double().sum().item(), rel=1e-5)


def test_everything_said_at_save_is_in_the_manifest(model, tmp_path):
    spec = InputSpec((3, 32, 32), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    save(model, tmp_path, spec=spec, labels=list("abcde"), cost={"params": 7}, metrics={"accuracy": torch.tensor(0.5)})
    m = read_manifest(tmp_path)
    assert (m.input_spec, m.labels, m.cost, m.metrics) == (spec, list("abcde"), {"params": 7}, {"accuracy": 0.5})
    assert sorted(os.listdir(tmp_path)) == sorted([MANIFEST, WEIGHTS])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(model, dtype, tmp_path):
    back = load(save(model.to(dtype), tmp_path))
    assert {p.dtype for p in back.parameters()} == {dtype}
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)


class MyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight
        self.register_buffer("codes", torch.arange(6, dtype=torch.uint8))

    def forward(self, x):
        return self.two(self.one(x))


def test_a_users_own_class_with_tied_weights_and_integer_buffers(tmp_path):
    net = MyNet()
    net.codes[0] = 9
    save(net, tmp_path)
    with pytest.raises(ArtifactError, match="base=MyNet"):
        load(tmp_path)
    back = load(tmp_path, base=MyNet())
    assert back.two.weight is back.one.weight
    assert torch.equal(back.one.weight, net.one.weight)
    assert back.codes.tolist() == net.codes.tolist()


@pytest.mark.parametrize("fatal", [(0,), (1,), (2,), (1, 0), (2, 0), (2, 1), (1, 1)])
def test_crashes_while_saving_again_leave_the_old_artifact(model, tmp_path, monkeypatch, fatal):
    save(model, tmp_path)
    want = model(X)
    replace = os.replace
    for at in fatal:  # the number of renames that get through before the process dies
        calls = iter(range(9))

        def crash(a, b, calls=calls, at=at):
            if next(calls) == at:
                raise KeyboardInterrupt
            replace(a, b)

        other = load(tmp_path)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1)
        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            save(other, tmp_path)
        monkeypatch.setattr(os, "replace", replace)
        assert torch.equal(load(tmp_path)(X), want)
    save(other, tmp_path)
    assert torch.equal(load(tmp_path)(X), other(X))


def rewrite(path, **changes):
    d = json.loads((path / MANIFEST).read_text())
    d.update(changes)
    (path / MANIFEST).write_text(json.dumps(d))


HOSTILE = {
    "truncated weights": lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:-100]),
    "one flipped bit": lambda p: (p / WEIGHTS).write_bytes((b := (p / WEIGHTS).read_bytes())[:-1] + bytes([b[-1] ^ 1])),
    "a pickle renamed": lambda p: (p / WEIGHTS).write_bytes(pickle.dumps({"a": 1})),
    "a 10 GB header": lambda p: (p / WEIGHTS).write_bytes(struct.pack("<Q", 10**10) + b"{}"),
    "no weights": lambda p: (p / WEIGHTS).unlink(),
    "no manifest": lambda p: (p / MANIFEST).unlink(),
    "manifest not JSON": lambda p: (p / MANIFEST).write_text("{"),
    "manifest nested too deep": lambda p: (p / MANIFEST).write_text("[" * 100_000),
    "unknown schema": lambda p: rewrite(p, schema_version=99),
    "unknown field": lambda p: rewrite(p, surprise=1),
    "unknown base": lambda p: rewrite(p, base="../../etc/passwd"),
    "a hub name": lambda p: rewrite(p, base="hf-hub:someone/something"),
    "a checkpoint path": lambda p: rewrite(p, kwargs={"checkpoint_path": "/tmp/evil.pth"}),
    "huge arguments": lambda p: rewrite(p, kwargs={"num_classes": 10**11}),
    "class outside the list": lambda p: rewrite(
        p, edits=[{"edit": "replace", "module": "fc", "with_": "subprocess.Popen", "kwargs": {"args": ["true"]}}]
    ),
    "edit of nothing": lambda p: rewrite(p, edits=[{"edit": "remove", "module": "../../x"}]),
    "edits not a list": lambda p: rewrite(p, edits={"a": 1}),
    "another number of classes": lambda p: rewrite(p, kwargs={"num_classes": 6}),
    "broken spec": lambda p: rewrite(p, spec={"size": [3, 0, 32], "mean": [0], "std": [0]}),
    "alias to nothing": lambda p: rewrite(p, aliases={"fc.weight": "nope"}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_input_is_one_clear_error(model, what, tmp_path):
    save(model, tmp_path)
    HOSTILE[what](tmp_path)
    with pytest.raises(ArtifactError) as e:
        load(tmp_path)
    assert 10 < len(str(e.value)) < 600


def test_a_changed_file_with_a_matching_hash_is_still_checked_for_shape(model, tmp_path):
    import hashlib

    from safetensors.torch import load_file, save_file

    save(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(k for k, v in tensors.items() if v.dim() == 4)
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, tmp_path / WEIGHTS)
    rewrite(tmp_path, sha256=hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest())
    with pytest.raises(ArtifactError, match="has shape"):
        load(tmp_path)


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_never_loaded(tmp_path_factory, junk):
    path = tmp_path_factory.mktemp("junk")
    (path / MANIFEST).write_bytes(junk)
    (path / WEIGHTS).write_bytes(junk)
    with pytest.raises(ArtifactError):
        load(path)


def test_an_insert_round_trips(model, tmp_path):
    args = {"in_channels": model.num_features, "out_channels": model.num_features, "kernel_size": 1}
    apply(model, [Insert("layer4", "adapter", "torch.nn.Conv2d", args)])
    assert torch.equal(load(save(model, tmp_path))(X), model(X))
