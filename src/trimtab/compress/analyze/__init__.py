"""Analysis: what is in a trained network, where it is redundant, what may go.

>>> from trimtab.compress.analyze import filters
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy

if TYPE_CHECKING:
    from trimtab.compress.analyze.cnn_filter_db import FilterReport, Filters, collect, filters, read_h5

__all__ = ["FilterReport", "Filters", "collect", "filters", "read_h5"]

__getattr__, __dir__ = lazy(__name__, dict.fromkeys(__all__, "cnn_filter_db"))
