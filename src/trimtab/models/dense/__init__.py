"""Networks with an answer per pixel. Importing this package registers ours in timm."""

from trimtab.models.dense import mamba_unets

__all__ = ["mamba_unets"]
