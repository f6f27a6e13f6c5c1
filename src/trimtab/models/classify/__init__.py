"""Image classifiers. Importing this package registers ours in timm."""

from trimtab.models.classify import (  # isort: skip
    cct, deepmad_nets, mamba_survey, mbconv, mcunetv2_nets, resnet_cifar, secnn, simplenet, skipnet_bias_loss, tiny,
    unireplknet,
)  # fmt: skip

__all__ = [
    "cct", "deepmad_nets", "mamba_survey", "mbconv", "mcunetv2_nets", "resnet_cifar", "secnn", "simplenet",
    "skipnet_bias_loss", "tiny", "unireplknet",
]  # fmt: skip
