"""Networks by formula: designed from a budget, without data and without training."""

from trimtab.search.design.deepmad import deepmad

__all__ = ["deepmad"]
