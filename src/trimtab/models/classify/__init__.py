"""Image classifiers. Importing this package registers ours in timm."""

from trimtab.models.classify import cct, mbconv, resnet_cifar, simplenet, skipnet_bias_loss, tiny, unireplknet

__all__ = ["cct", "mbconv", "resnet_cifar", "simplenet", "skipnet_bias_loss", "tiny", "unireplknet"]
