from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.elsewhere import python
from trimtab.core.edit import history
from trimtab.models import create_model, list_models, load, save
from trimtab.models.factory import load_weights


def test_ours_are_in_timms_registry_with_a_pretrained_cfg():
    ours = list_models(ours=True)
    assert {"cct_7_3x1_32", "cvt_7_4_32", "simplenet_cifar_5m", "resnet20_cifar", "trim_net"} <= set(ours)
    for name in ours:
        assert timm.is_model(name)
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.first_conv and cfg.classifier and cfg.input_size


def test_list_models_filters():
    assert list_models("cvt_*", ours=True) == ["cvt_2_4_32", "cvt_4_4_32", "cvt_6_4_32", "cvt_7_4_32"]
    assert "resnet50" in list_models("resnet*") and "resnet50" not in list_models("resnet*", ours=True)


def test_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown model 'resnet20_cifr'; did you mean resnet20_cifar"):
        create_model("resnet20_cifr")


def test_history_remembers_name_and_arguments():
    h = history(create_model("trim_net", num_classes=7, in_chans=1, width=8))
    assert (h.base, h.kwargs, h.edits) == ("trim_net", {"num_classes": 7, "in_chans": 1, "width": 8}, [])


def test_none_keeps_the_architectures_own_numbers():
    model = create_model("simplenet_mnist_301k")
    assert (model.num_classes, model.in_chans) == (10, 1)


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    a, b, c = (create_model("trim_3k", seed=s, img_size=8).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": -1}, "num_classes must be"),
        ({"in_chans": 0}, "in_chans must be"),
        ({"img_size": 0}, "img_size must be"),
        ({"img_size": (8, 8, 8)}, "img_size must be"),
        ({"widht": 8}, "does not take this argument"),
        ({"pretrained": True, "weights": "x"}, "not both"),
        ({"weights": "no/such/file"}, "weights must be a safetensors file"),
    ],
)
def test_wrong_arguments_say_what_was_expected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_model("trim_net", **kwargs)


def test_weights_from_an_artifact_and_from_a_file(tmp_path):
    model = create_model("trim_3k", seed=0)
    save(model, tmp_path / "a")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    for path in (tmp_path / "a", tmp_path / "w.safetensors"):
        again = create_model("trim_3k", weights=path)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_weights_for_other_classes_keep_the_body_and_warn(tmp_path):
    model = create_model("trim_3k", seed=0)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match="classifier starts fresh"):
        again = create_model("trim_3k", num_classes=3, weights=tmp_path / "w.safetensors")
    assert torch.equal(again.stem[0].weight, model.stem[0].weight) and again.head.out_features == 3


def test_colour_weights_are_summed_for_grey_images(tmp_path):
    model = create_model("resnet8_mlperf_tiny", seed=0).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    grey = create_model("resnet8_mlperf_tiny", in_chans=1, weights=tmp_path / "w.safetensors").eval()
    x = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(grey(x), model(x.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)


def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path):
    save_file(create_model("trim_10k").state_dict(), tmp_path / "w.safetensors")
    model = create_model("trim_3k", seed=0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit TrimNet: .* has shape"):
        load_weights(model, tmp_path / "w.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_weights(model, tmp_path / "x.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_artifact_loads_in_a_process_that_knows_nothing_else(tmp_path):
    model = create_model("resnet18", num_classes=4, in_chans=1, img_size=16, seed=0).eval()
    save(model, tmp_path / "a")
    x = torch.linspace(0, 1, 256).reshape(1, 1, 16, 16)
    code = (
        "import sys, torch; from trimtab.models import load; m = load(sys.argv[1]);"
        "print(m(torch.linspace(0, 1, 256).reshape(1, 1, 16, 16)).tolist())"
    )
    out = python(code, tmp_path / "a")
    torch.testing.assert_close(torch.tensor(eval(out)), model(x), atol=1e-5, rtol=1e-5)
    assert isinstance(load(tmp_path / "a"), type(model))


def test_the_model_says_what_its_input_is():
    model = create_model("resnet18", img_size=(40, 48), in_chans=1, num_classes=2)
    assert model.pretrained_cfg["input_size"] == (1, 40, 48)
    assert create_model("resnet18", num_classes=2).pretrained_cfg["input_size"] == (3, 224, 224)
