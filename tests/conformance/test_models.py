"""The battery over every model we register; the slow checks over one model per family."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from trimtab import testing
from trimtab.models import list_models
from trimtab.models.classify.deepmad_nets import PUBLISHED


def sizes(name: str) -> dict:
    """Large models are tested on smaller images than they are made for: the same layers, a tenth of the work."""
    if name.startswith(("simplenet_small", "simplenet_5m", "simplenet_9m")):
        return {"input_size": (3, 48, 48), "other_size": (3, 64, 64)}
    if name.startswith(("cct_7_7", "cct_14")):
        return {"input_size": (3, 32, 32), "other_size": (3, 48, 48)}
    if name.startswith(("cct_6", "cct_7")):
        return {"input_size": (3, 16, 16), "other_size": (3, 24, 24)}
    if name in ("unireplknet_a", "mcunetv2_large") or name.startswith("skipblocknet"):
        return {"input_size": (3, 64, 64), "other_size": (3, 96, 96)}
    if name == "u_mamba_enc_nano_32":  # built for one size
        return {"other_size": None}
    if name.startswith("reversible_unet_tiny"):
        return {"input_size": (4, 8, 8, 8), "other_size": (4, 16, 8, 24)}
    return {}


# Networks that are others of the list in another size.
SAME = {
    "cct_14_7x2_384",
    *(f"deepmad_{n}" for n in PUBLISHED),
    *(f"unireplknet_{size}" for size in ("f", "p", "n", "t", "s", "b", "l", "xl")),
}
SAME |= {f"vim_{size}" for size in ("tiny", "small", "base", "tiny_plus", "small_plus")}
SAME |= {f"vmamba_{size}" for size in ("tiny_v0", "tiny", "tiny_s2l5", "small", "base")}
SAME |= {"vm_unet", "vm_unet_large", "u_mamba_bot", "u_mamba_enc"}
SAME |= {"reversible_unet_tiny_1", "reversible_unet_tiny_4", "reversible_unet_wide"}
SAME |= {"dtop_segmenter", "dtop_segvit_base", "dtop_segvit_large"}
SAME |= {n for n in list_models(ours=True) if timm.model_entrypoint(n).__module__.startswith("trimtab.models.restore")}
SAME |= set(list_models("ssd*", ours=True))  # boxes, not logits
OURS = [n for n in list_models(ours=True) if n not in SAME]
FAMILIES = [
    "cct_2_3x2_32",
    "simplenet_cifar_310k",
    "resnet20_cifar",
    "trim_mobile_10k",
    "unireplknet_micro_32",
    "skipblocknet_xs",
    "vmamba_nano_32",
]


@pytest.mark.parametrize("name", OURS)
def test_fast_checks(name):
    testing.check_model(name, slow=False, **sizes(name))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("_", "check"), testing.model_checks(slow=True))
def test_slow_checks(name, _, check):
    check(testing.ModelCase(name))


def test_a_model_of_timm_passes_too():
    testing.check_model("mobilenetv3_small_050", slow=False, in_chans=1, img_size=32)


class MyNet(nn.Module):
    """Somebody's own class, not registered anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize(("_", "check"), testing.model_checks(slow=False))
def test_third_parties_can_run_it_on_their_own_class(_, check):
    check(testing.ModelCase(MyNet, input_size=(3, 16, 16)))


class Broken(MyNet):
    """Wrong in the way `how` names."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.spare = how, nn.Linear(2, 2) if how == "unused parameter" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "swallows wrong input":
            x = x.reshape(-1)[: x.shape[0]].reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4)
        if self.how == "random in eval":
            x = x + torch.randn_like(x)
        if self.how == "mixes the batch":
            x = x - x.mean(0)
        y = super().forward(x)
        return y[:, :9] if self.how == "too few classes" else y


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unused parameter", "backward: no gradient reaches spare"),
        ("random in eval", "forward: an image gives other logits"),
        ("mixes the batch", "forward: an image gives other logits alone"),
        ("too few classes", r"forward: logits for .* must be \(3, 10\), got \(3, 9\)"),
        ("swallows wrong input", "wrong_input: .* must be refused"),
    ],
)
def test_the_battery_finds_what_is_wrong(how, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_model(lambda: Broken(how), input_size=(3, 16, 16), slow=False)
