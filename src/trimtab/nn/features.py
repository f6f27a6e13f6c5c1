"""`FeatureExtractor`: pooled features (B, D) of any network, in eval mode, with a cache on disk.

Features are what the classifier is given, so that whatever is made of them (class means, mixtures, another head) fits
in the classifier's place. timm's networks say which layer that is; elsewhere it is the last linear layer, and that the
network returns what this layer gives is checked. Any other layer can be named; its output is then pooled over places.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.errors import ArtifactError
from trimtab.core.files import replacing
from trimtab.nn.modes import eval_mode

_SAMPLE = 256  # images of a split whose pixels are part of the cache's key


class Features(NamedTuple):
    """Features of a split: `values` float32 (N, D) and `labels` int64 (N,), in the split's order, on the CPU."""

    values: Tensor
    labels: Tensor


def classifier_of(model: nn.Module) -> str:
    """The name of the layer that makes logits of pooled features.

    Raises:
        ValueError: it cannot be told: there is more than one, or no linear layer.

    >>> classifier_of(nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    '3'
    """
    names = {id(m): name for name, m in model.named_modules() if name}
    told: Any = getattr(model, "get_classifier", None)
    if callable(told):
        layer = told()
        if id(layer) in names:
            return names[id(layer)]
    linear = [names[id(m)] for m in model.modules() if isinstance(m, nn.Linear) and id(m) in names]
    if callable(told) or not linear:
        raise ValueError(f"{type(model).__name__} has no single classifier to take features from; name a layer with at")
    return linear[-1]


def pooled_features(model: nn.Module, images: Tensor, *, at: str | None = None, before: str | None = None) -> Tensor:
    """Features (B, D) of a batch of images, with gradients and in the mode the model is in.

    Args:
        at: the layer whose output is pooled: maps (B, C, H, W) and tokens (B, N, D) by their mean.
        before: the layer whose input is taken. None: the classifier, unless `at` is given.

    Raises:
        ValueError: there is no such layer, or what it gives cannot be pooled.
    """
    name = at or before or classifier_of(model)
    layers = dict(model.named_modules())
    if name not in layers:
        raise ValueError(f"at and before must be modules of the model, got {name!r}")
    seen: list[Any] = []

    def keep(_layer: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        seen[:] = [given[0], out]

    handle = layers[name].register_forward_hook(keep)
    try:
        logits = model(images)
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"the model never runs its layer {name!r}; name another with at")
    if at is not None:
        return _pool(seen[1], name)
    if before is None and not callable(getattr(model, "get_classifier", None)) and seen[1] is not logits:
        raise ValueError(
            f"the model returns something else than its last linear layer {name!r} gives; name one with at"
        )
    return seen[0].flatten(1)


def feature_width(model: nn.Module, data: Any) -> int:
    """D: how many features an image of some data has."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = next(iter(data.loader("train", batch_size=1, shuffle=False)))
    return FeatureExtractor(model)(batch["image"].to(device)).shape[1]


class FeatureExtractor:
    """A network that is only looked through: images in, features (B, D) out.

    The network itself is not changed: eval mode while it runs, no gradients, the mode it had afterwards.

    Args:
        model: any network; what `load` gives, too.
        at, before: other features than what the classifier is given, see `pooled_features`.
        normalize: divide every feature vector by its length.
        cache: a folder; features of a split are then computed once for the same weights, images and normalisation.
        batch_size: images that are run at once.

    >>> import trimtab as tt
    >>> data = tt.load_data("digits", limit=100)
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    >>> features = FeatureExtractor(net).of(data, "train")
    >>> features.values.shape, features.labels.shape
    (torch.Size([72, 16]), torch.Size([72]))
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        at: str | None = None,
        before: str | None = None,
        normalize: bool = False,
        cache: str | Path | None = None,
        batch_size: int = 256,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if at is None and before is None:
            classifier_of(model)  # refused at the door
        self.model, self.at, self.before = model, at, before
        self.normalize, self.batch_size = normalize, batch_size
        self.cache = Path(cache) if cache is not None else None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D), float32, of images (B, C, H, W) as the model takes them."""
        with eval_mode(self.model):
            return self._normal(pooled_features(self.model, images, at=self.at, before=self.before).float())

    def of(self, data: Any, split: str = "train") -> Features:
        """Features of all images of a split, without augmentation.

        Args:
            data: what `load_data` gives, or anything with ``splits`` and ``loader``.

        Raises:
            ValueError: there is no such split, or it is empty.
        """
        if split not in data.splits or not len(data.splits[split]):
            raise ValueError(f"split must be one of {', '.join(data.splits)} and not empty, got {split!r}")
        if self.cache is None:
            found = self._compute(data, split)
        else:
            file = self.cache / f"features-{self._key(data, split)}.safetensors"
            found = _read(file) if file.is_file() else _written(self._compute(data, split), file)
        return Features(self._normal(found.values), found.labels)

    def _compute(self, data: Any, split: str) -> Features:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        values, labels = [], []
        with eval_mode(self.model), torch.no_grad():
            for batch in data.loader(split, batch_size=self.batch_size, shuffle=False, augment=None, drop_last=False):
                images = batch["image"].to(device)
                values.append(pooled_features(self.model, images, at=self.at, before=self.before).float().cpu())
                labels.append(batch["label"].cpu())
        return Features(torch.cat(values), torch.cat(labels))

    def _normal(self, values: Tensor) -> Tensor:
        return F.normalize(values, dim=1) if self.normalize else values

    def _key(self, data: Any, split: str) -> str:
        """A digest of the weights, of how images are prepared, and of the images (of evenly spaced ones) and labels."""
        part = data.splits[split]
        how = (type(self.model).__qualname__, self.at, self.before, data.mean, data.std)
        key = hashlib.blake2b(repr(how).encode(), digest_size=16)
        for name, value in self.model.state_dict().items():
            key.update(name.encode())
            key.update(_bytes(value))
        rows = torch.linspace(0, len(part) - 1, min(len(part), _SAMPLE)).long().unique()
        for tensor in (part.labels, part.pixels(rows)):
            key.update(repr(tuple(tensor.shape)).encode())
            key.update(_bytes(tensor))
        return key.hexdigest()


def _pool(out: Any, name: str) -> Tensor:
    if not isinstance(out, Tensor) or out.ndim not in (2, 3, 4):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{name!r} must give (B, D), tokens (B, N, D) or maps (B, C, H, W), got {got}")
    return out if out.ndim == 2 else out.mean(1) if out.ndim == 3 else out.mean((2, 3))


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _written(features: Features, file: Path) -> Features:
    from safetensors.torch import save_file

    with replacing(file) as new:
        save_file({"values": features.values.contiguous(), "labels": features.labels.contiguous()}, new)
    return features


def _read(file: Path) -> Features:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        kept = load_file(file)
        return Features(kept["values"], kept["labels"])
    except (SafetensorError, KeyError) as e:
        raise ArtifactError(f"{file} cannot be read ({e}); delete it, and it is made again") from e
