"""What a run found, as one page to read, a model card and plots.

    >>> from trimtab import report
    >>> report.pareto_svg({})
    ''

Everything here takes the *run*: the plain JSON dictionary that ``trimtab compact`` returns and writes as ``run.json``.
Any key of it may be missing or null; what depends on it is then left out. Nothing here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy

if TYPE_CHECKING:
    from .card import model_card
    from .page import layers_plot, write
    from .pareto import pareto_svg
    from .sensitivity import sensitivity_svg

__all__ = ["layers_plot", "model_card", "pareto_svg", "sensitivity_svg", "write"]

_HOME = {
    "write": "page",
    "layers_plot": "page",
    "model_card": "card",
    "pareto_svg": "pareto",
    "sensitivity_svg": "sensitivity",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
