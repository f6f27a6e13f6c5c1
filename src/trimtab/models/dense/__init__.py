"""Networks with an answer per pixel. Importing this package registers ours in timm."""

from trimtab.models.dense import dtop, lite_fpn, mamba_unets, reversible_unet, ssd

__all__ = ["dtop", "lite_fpn", "mamba_unets", "reversible_unet", "ssd"]
