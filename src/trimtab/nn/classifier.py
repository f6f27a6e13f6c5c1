"""The face that every image classifier shows, written once: timm's protocol, and errors at the door.

A subclass builds its body in `__init__`, calls `_make_head` last, and writes `forward_features`. It gets `forward`,
`forward_head`, `get_classifier`, `reset_classifier` and the input check.
"""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from torch import Tensor


def check_image_input(x: Tensor, in_chans: int, dims: int = 2) -> None:
    """Raise ValueError unless `x` is a batch of images (B, `in_chans`, H, W), or with 3 `dims` of volumes.

    >>> import torch
    >>> check_image_input(torch.zeros(2, 1, 8, 8), in_chans=3)
    Traceback (most recent call last):
        ...
    ValueError: input must be a batch of images (B, 3, H, W), got shape (2, 1, 8, 8)
    """
    if x.ndim != dims + 2 or x.shape[1] != in_chans:
        want = f"images (B, {in_chans}, H, W)" if dims == 2 else f"volumes (B, {in_chans}, D, H, W)"
        raise ValueError(f"input must be a batch of {want}, got shape {tuple(x.shape)}")


def check_sizes(**values: int) -> None:
    """Raise ValueError unless every value is a positive int (`num_classes` may be 0: no classifier).

    >>> check_sizes(width=0)
    Traceback (most recent call last):
        ...
    ValueError: width must be a positive integer, got 0
    """
    for name, value in values.items():
        least = 0 if name == "num_classes" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a {'positive' if least else 'non-negative'} integer, got {value!r}")


class Classifier(nn.Module):
    """Base of our image classifiers: (B, C, H, W) -> (B, `num_classes`).

    Attributes set by `_make_head`: `num_classes`, `in_chans`, `num_features` (width of the features),
    `head_hidden_size` (width before the classifier; the same unless a subclass says otherwise), `drop_rate`.
    `head_name` says which attribute holds the last linear layer, `head_bias` whether it has a bias.
    """

    head_name = "head"
    head_bias = True
    num_classes: int
    in_chans: int
    num_features: int
    head_hidden_size: int
    global_pool: nn.Module
    feature_info: list[dict[str, object]]

    def _make_head(
        self, num_features: int, num_classes: int, in_chans: int, global_pool: str, drop_rate: float = 0.0
    ) -> None:
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = num_features
        self.drop_rate = drop_rate
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        """The last layer: a Linear, or Identity when `num_classes` is 0."""
        return getattr(self, self.head_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier on; 0 classes leaves the pooled features, `global_pool=""` the feature map."""
        check_sizes(num_classes=num_classes)
        param = next(self.parameters(), None)
        if global_pool is not None:
            self.global_pool = self._make_pool(global_pool)
        self.num_classes = num_classes
        head: nn.Module = nn.Identity()
        if num_classes > 0:
            head = nn.Linear(self.head_hidden_size, num_classes, bias=self.head_bias)
            self._init_classifier(head)
            if param is not None:
                head = head.to(device=param.device, dtype=param.dtype)
        setattr(self, self.head_name, head.train(self.training))

    def _make_pool(self, global_pool: str) -> nn.Module:
        return SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))

    def _init_classifier(self, head: nn.Linear) -> None:
        """How a fresh classifier starts; torch's own init unless the paper says otherwise."""

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, num_classes), or (B, num_features) with `pre_logits`."""
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, self.drop_rate, training=self.training)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise ValueError(f"{type(self).__name__} is too small to need gradient checkpointing")

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone, beyond norms and biases."""
        return set()
