"""What the evidence of adaptation shares: a network trained on other classes, and its features as a data set.

With ``--data .../tiny_imagenet40``, and published CIFAR-10 weights in a folder `weights` beside the data's parent
folder, the network has not seen the classes of the stream. Features are looked at as images of 1 x 1 pixels, so that
the methods themselves run on them: a stream over them takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from evidence.runner import Context
from trimtab.data import Data, Split
from trimtab.models import create_model
from trimtab.nn.features import FeatureExtractor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the published weights were trained with


def images(context: Context, *, train: int, test: int, seed: int = 0) -> Data:
    """At most so many colour images of 32 x 32 pixels, normalised as the network expects."""
    data = context.load_data(image_size=32, in_chans=3, val=0, limit=max(train, test), seed=seed)
    most = {"train": min(train, len(data.splits["train"])), "test": min(test, len(data.splits["test"]))}
    return data.subset(most, seed=seed).like(mean=MEAN, std=STD)


def network(context: Context, data: Data) -> tuple[nn.Module, str]:
    """A ResNet-20, and in words where its weights are from; its classifier is fresh."""
    file = weights_of(context, 20)
    model = create_model("resnet20_cifar", num_classes=10, in_chans=3, weights=file, seed=0)
    words = "random weights" if file is None else "published CIFAR-10 weights"
    classifier: Any = model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier.reset_classifier(data.num_classes)
    return model, words


def weights_of(context: Context, depth: int) -> Path | None:
    """The file of published CIFAR-10 weights of a ResNet, if there is one."""
    if context.data is None or context.smoke:
        return None
    file = Path(context.data).resolve().parents[1] / "weights" / f"cifar10_resnet{depth}.safetensors"
    return file if file.is_file() else None


def as_images(model: nn.Module, data: Data) -> Data:
    """The features of a data set in its place, as images of 1 x 1 pixels with a channel for each feature."""
    extractor = FeatureExtractor(model)
    splits = {}
    for name in data.splits:
        values, labels = extractor.of(data, name)
        splits[name] = Split(values[:, :, None, None], labels)
    d = values.shape[1]
    return Data(f"features of {data.name}", splits, data.class_names, mean=(0.0,) * d, std=(1 / 255,) * d)


def probe(data: Data, seed: int) -> nn.Module:
    """A linear classifier over features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(data.in_chans, data.num_classes))
