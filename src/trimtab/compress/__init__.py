"""Making a model smaller: the channel graph, pruning, quantization, factorization; and `analyze`, which looks only.

>>> from trimtab.compress import ChannelGraph, magnitude
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy

if TYPE_CHECKING:
    from trimtab.compress.factorize.compactifai import compactifai
    from trimtab.compress.factorize.convs import cp, tucker
    from trimtab.compress.graph import ChannelGraph, Group
    from trimtab.compress.merging import merge
    from trimtab.compress.prune.fast_sparse_convnets import fast_sparse_convnets
    from trimtab.compress.prune.magnitude import magnitude
    from trimtab.compress.prune.otov2 import otov2
    from trimtab.compress.prune.precropping import precropping
    from trimtab.compress.quantize.bitnet_reloaded import bitnet_reloaded
    from trimtab.compress.quantize.fliqs import fliqs
    from trimtab.models.classify.dcls import dcls
    from trimtab.models.classify.ulsam import ulsam
    from trimtab.models.classify.unireplknet import unireplknet
    from trimtab.models.restore.espcn import deconvolution

_WHERE = {
    "ChannelGraph": "graph",
    "Group": "graph",
    "fast_sparse_convnets": "prune.fast_sparse_convnets",
    "magnitude": "prune.magnitude",
    "otov2": "prune.otov2",
    "bitnet_reloaded": "quantize.bitnet_reloaded",
    "fliqs": "quantize.fliqs",
    "compactifai": "factorize.compactifai",
    "tucker": "factorize.convs",
    "cp": "factorize.convs",
    "precropping": "prune.precropping",
    "entropic_student": "trimtab.deploy.entropic_student",
    "ulsam": "trimtab.models.classify.ulsam",
    "dcls": "trimtab.models.classify.dcls",
    "unireplknet": "trimtab.models.classify.unireplknet",
    "deconvolution": "trimtab.models.restore.espcn",
    "merge": "merging",
    "analyze": None,
}
__all__ = [
    "ChannelGraph",
    "Group",
    "magnitude",
    "fast_sparse_convnets",
    "otov2",
    "precropping",
    "bitnet_reloaded",
    "fliqs",
    "compactifai",
    "tucker",
    "cp",
    "ulsam",
    "dcls",
    "unireplknet",
    "entropic_student",
    "deconvolution",
    "merge",
]

__getattr__, __dir__ = lazy(__name__, _WHERE)
