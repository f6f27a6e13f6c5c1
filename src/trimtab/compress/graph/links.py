"""Groups that a class can cut only in step: found where a cut was refused."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trimtab.compress.graph.channels import ChannelGraph
from trimtab.compress.graph.patch import Refused


def link_refused(graph: ChannelGraph, refused: Refused) -> bool:
    """Whether the groups that meet in a module can be cut when all keep the same share; then link them.

    Modules of the same class are linked alike, and those of other classes that turn out to need it too (window and
    channel attention on one residual stream), if that works; else this module alone.
    """
    modules = dict(graph.model.named_modules())
    if refused.module == "" or not any(modules[refused.module].children()):
        return False
    classes = {type(modules[refused.module])}
    for _ in range(4):
        other = _link_inside(graph, [n for n, m in modules.items() if type(m) in classes])
        if other is None:
            return True
        cls = type(modules[other.module])
        if other.module == "" or cls in classes or not any(modules[other.module].children()):
            break
        classes.add(cls)
    return _link_inside(graph, [refused.module]) is None


def _link_inside(graph: ChannelGraph, names: Sequence[str]) -> Refused | None:
    """Link the groups that meet in each of these modules if cutting them in step works, or say why it does not."""
    joined: list[set[int]] = []
    for new in (set(graph.meeting(n)) for n in names):
        if len(new) > 1:
            touching = [s for s in joined if s & new]
            joined = [s for s in joined if not s & new] + [new.union(*touching)]
    trial: dict[int, range] = {}
    for s in joined:
        steps = math.gcd(*(graph.groups[i].size for i in s))
        trial |= {i: range(graph.groups[i].size // steps * ((steps + 1) // 2)) for i in s if steps > 1}
    linked = [set(s) for s in graph.linked()]
    if not trial or all(s in linked for s in joined):
        return Refused("there is nothing to link", "", np.empty(0, np.int64))
    try:
        graph.edits(trial)
    except Refused as refused:
        return refused
    for s in joined:
        graph.link(s)
    return None
