"""Networks that give images. Importing this package registers ours in timm."""

from trimtab.models.restore import cfsr, espcn

__all__ = ["cfsr", "espcn"]
