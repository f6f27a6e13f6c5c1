"""Bias loss: samples whose last feature map has more variety count more (Abrahamyan, Ziatchin, Chen, Deligiannis,
"Bias Loss for Mobile Neural Networks", ICCV 2021, arXiv 2107.11170).

In a small network some images leave a last feature map with little in it, and what is predicted from it is a guess,
whose gradient is noise. So the cross-entropy of each sample is weighted by the variance of its last feature map,
normalised over the batch: ``exp(alpha * v) - beta`` with v in [0, 1]. Nothing is added to the network.

What differs from the authors' code:

- ``normalisation="batch"`` is the default: minimum and maximum of the batch. Their code mixes a running minimum with
  the range of the batch, in a number that no checkpoint keeps. ``"running"`` takes both extremes from all batches so
  far, per process, and keeps them; one dead batch still counts for ever.
- A batch whose samples all have the same variance (or are one) gives 0/0 there. Here v is 0: weight 1 - beta.
- The last feature map is found (see `learn.calls.last_map`), the network need not return it.

The architecture of the same paper is `trimtab.models.classify.skipnet_bias_loss`, with the card of both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.learn.calls import last_map
from trimtab.learn.losses import soft_ce
from trimtab.learn.objective import Batch, Context, Losses, Objective, check_logits, probe
from trimtab.learn.taps import taps


def feature_variance(features: Tensor) -> Tensor:
    """Unbiased variance of each sample over all its channels and places, in float32, without gradient: (B,)."""
    return features.detach().flatten(1).float().var(dim=1)


def bias_weights(
    variance: Tensor, *, alpha: float = 0.3, beta: float = 0.3, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    """Weights of samples (B,) from the variances of their last feature maps (B,).

    Args:
        low, high: extremes of the variance to normalise by; those of the batch by default.

    >>> bias_weights(torch.tensor([1.0, 2.0, 3.0]))
    tensor([0.7000, 0.8618, 1.0499])
    """
    low = variance.min() if low is None else low
    span = (variance.max() if high is None else high) - low
    v = torch.where(span > 0, (variance - low) / span.clamp_min(torch.finfo(span.dtype).tiny), 0.0)
    return torch.exp(alpha * v) - beta


class BiasLoss(Objective):
    """Cross-entropy of each sample, times `bias_weights` of its last feature map; then the mean.

    Args:
        alpha, beta: of the weights; both 0 is plain cross-entropy.
        normalisation: "batch", or "running": the extremes of all batches so far.
        layer: the module whose output is the last feature map; None finds it.
        smoothing: label smoothing of the cross-entropy.

    Raises:
        ValueError: at the start of training, if the network has no feature map.

    >>> import trimtab as tt
    >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    >>> tt.fit(net, tt.load_data("digits"), tt.learn.bias_loss(alpha=0.3), epochs=1).stopped
    'done'
    """

    def __init__(
        self,
        *,
        alpha: float = 0.3,
        beta: float = 0.3,
        normalisation: str = "batch",
        layer: str | None = None,
        smoothing: float = 0.0,
    ) -> None:
        if not alpha >= 0:
            raise ValueError(f"alpha must not be negative, got {alpha}")
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be in [0, 1), or samples would be unlearned, got {beta}")
        if normalisation not in ("batch", "running"):
            raise ValueError(f"normalisation must be batch or running, got {normalisation!r}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        self.alpha, self.beta, self.smoothing = alpha, beta, smoothing
        self.normalisation = normalisation
        self.layer = layer
        self._at = (layer or "", False)  # a module, and whether its input is meant
        self._low, self._high = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def setup(self, model: nn.Module, batch: Batch) -> None:
        check_logits(probe(self, model, batch), batch)
        found = (self.layer, False) if self.layer is not None else last_map(model, batch["image"][:2])
        if found is None:
            raise ValueError(f"bias_loss needs a feature map, {type(model).__name__} has none; name one with layer=")
        self._at = found
        with taps(model, [found[0]]):  # refuses a layer that is not there
            pass

    def losses(self, model: nn.Module, batch: Batch, ctx: Context) -> Losses:
        name, inputs = self._at
        with taps(model, [name], inputs=inputs) as seen:
            logits = self.predict(model, batch)
        weights = self.weigh(feature_variance(seen[name]), ctx)
        return (weights * soft_ce(logits, batch["label"], smoothing=self.smoothing, reduction="none")).mean()

    def weigh(self, variance: Tensor, ctx: Context) -> Tensor:
        """Weights (B,) of the samples of a batch, from the variances of their maps."""
        if self.normalisation == "batch":
            return bias_weights(variance, alpha=self.alpha, beta=self.beta)
        self._low = torch.minimum(self._low.to(variance.device), variance.min())
        self._high = torch.maximum(self._high.to(variance.device), variance.max())
        return bias_weights(variance, alpha=self.alpha, beta=self.beta, low=self._low, high=self._high)

    def state_dict(self) -> dict[str, Any]:
        return {"low": self._low, "high": self._high}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._low, self._high = state["low"], state["high"]
