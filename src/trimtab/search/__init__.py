"""Networks that share weights, and how to find the one that fits: supernets without elastic layers.

`elastic` makes a supernet of any network or builder; a system of this family is a preset of its parts, in one of the
rooms below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy

if TYPE_CHECKING:
    from trimtab.search import design
    from trimtab.search.children import Child
    from trimtab.search.costs import CostTable
    from trimtab.search.design.deepmad import deepmad
    from trimtab.search.grow.self_expanding_cnn import self_expanding_cnn
    from trimtab.search.passes import Pass, Passes
    from trimtab.search.samplers import Among, Chain, Sampler, Sandwich, Uniform
    from trimtab.search.space import Gene, Space
    from trimtab.search.supernet import Elastic, Found, elastic
    from trimtab.search.supernets.bignas import bignas
    from trimtab.search.supernets.deps import deps
    from trimtab.search.supernets.sortednet import sortednet
    from trimtab.search.trained import Trained

_WHERE = {
    "bignas": "supernets.bignas",
    "deps": "supernets.deps",
    "sortednet": "supernets.sortednet",
    "deepmad": "design.deepmad",
    "design": None,
    "self_expanding_cnn": "grow.self_expanding_cnn",
    "Trained": "trained",
    "elastic": "supernet",
    "Elastic": "supernet",
    "Found": "supernet",
    "Space": "space",
    "Gene": "space",
    "Child": "children",
    "CostTable": "costs",
    "Pass": "passes",
    "Passes": "passes",
    "Sampler": "samplers",
    "Uniform": "samplers",
    "Sandwich": "samplers",
    "Chain": "samplers",
    "Among": "samplers",
}
__all__ = [
    "bignas",
    "deps",
    "sortednet",
    "deepmad",
    "self_expanding_cnn",
    "design",
    "Trained",
    "elastic",
    "Elastic",
    "Found",
    "Space",
    "Gene",
    "Child",
    "CostTable",
    "Pass",
    "Passes",
    "Sampler",
    "Uniform",
    "Sandwich",
    "Chain",
    "Among",
]

__getattr__, __dir__ = lazy(__name__, _WHERE)
