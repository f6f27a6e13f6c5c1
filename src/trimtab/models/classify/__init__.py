"""Image classifiers. Importing this package registers ours in timm."""

from trimtab.models.classify import cct, resnet_cifar, simplenet, tiny

__all__ = ["cct", "resnet_cifar", "simplenet", "tiny"]
