"""What a run found, as one page to read, a model card and plots.

    >>> from trimtab import report
    >>> report.pareto_svg({})
    ''

Everything here takes the *run*: the plain JSON dictionary that ``trimtab compact`` returns and writes as ``run.json``.
Any key of it may be missing or null; what depends on it is then left out. `pictures` draws what a network saw instead.
Nothing here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy

if TYPE_CHECKING:
    from .card import model_card
    from .page import layers_plot, write
    from .pareto import pareto_svg
    from .pictures import draw_boxes, draw_mask, draw_volume, side_by_side
    from .rates import rates_svg
    from .sensitivity import sensitivity_svg
    from .streams import stream_svg

__all__ = ["layers_plot", "model_card", "pareto_svg", "rates_svg", "sensitivity_svg", "stream_svg", "write"]
__all__ += ["draw_boxes", "draw_mask", "draw_volume", "side_by_side"]

_HOME = {
    "write": "page",
    "layers_plot": "page",
    "model_card": "card",
    "pareto_svg": "pareto",
    "rates_svg": "rates",
    "sensitivity_svg": "sensitivity",
    "draw_boxes": "pictures",
    "draw_mask": "pictures",
    "draw_volume": "pictures",
    "side_by_side": "pictures",
    "stream_svg": "streams",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
