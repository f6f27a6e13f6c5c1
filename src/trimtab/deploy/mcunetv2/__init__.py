"""MCUNetV2's patch-based inference (Lin et al. 2021, arXiv 2110.15352) for any convolutional network.

The first blocks of a network need several times the memory of the rest, because their maps are large. They are run for
one patch of the image after the other, and only the small map after them is kept whole; the rest runs as always. What
comes out is what the network computes at once: every operator gets exactly the window that it reads. Neighbouring
windows overlap, so some work is done twice; `plan` counts memory and work of every split and every grid.

    peak = max(largest patch + map at the split, rest)       overhead = MACs done twice / MACs of the network

`redistribute` changes a network so that its windows become smaller: small kernels in the patches, more blocks after
them. `joint` searches a supernet for network and schedule together.

Differences to the paper. The network is the graph of `torch.export`, so nothing is said about blocks: splits are found
wherever one map is all that is needed. Memory of squeeze-and-excitation is counted (250 bytes in the released network).
The engine that makes C for microcontrollers is not here: the schedule is saved as ONNX parts with a table of windows,
and runs in ONNX Runtime, in float32, where a number takes four bytes instead of one. Detection heads stay part of the
network's rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from trimtab.core.budget import Budget, format_value
from trimtab.core.card import Card, Claim
from trimtab.core.errors import BudgetError
from trimtab.core.lazy import callable_package
from trimtab.core.spec import InputSpec

if TYPE_CHECKING:
    from torch import nn

    from trimtab.deploy.mcunetv2.plan import Option
    from trimtab.deploy.mcunetv2.schedule import Schedule

CARD = Card(
    slug="mcunetv2",
    title="MCUNetV2: Memory-Efficient Patch-based Inference for Tiny Deep Learning",
    arxiv="2110.15352",
    year=2021,
    kind="method",
    tasks=("classify", "detect"),
    claims=(
        Claim(
            "peak_memory",
            "Patch-based inference cuts MobileNetV2's int8 activation peak 8x (1372 kB -> 172 kB with 4x4 patches, "
            "same weights, same output)",
        ),
        Claim(
            "overhead",
            "overlap recompute is about 10% for MobileNetV2 and falls to about 3% after redistributing receptive field "
            "to the later, per-layer stage",
        ),
        Claim(
            "joint_search",
            "searching architecture and inference schedule together fits 71.8% ImageNet top-1 in 512 kB SRAM / 2 MB "
            "flash, >90% VWW in 32 kB, +16.9 mAP on VOC",
        ),
    ),
)
__all__ = ["mcunetv2"]


def mcunetv2(
    model: nn.Module,
    data: Any,
    *,
    memory: str | int | None = None,
    overhead: float = 0.2,
    grids: Iterable[int] = range(2, 9),
    split: str | None = None,
    act_bits: int = 8,
    labels: Sequence[str] | None = None,
) -> Schedule:
    """Find the patches in which a network fits into little memory.

    Args:
        model: any convolutional network; it is not changed.
        data: a `Data` or an `InputSpec`; or the size (C, H, W) of the images, but then nothing can be saved.
        memory: bytes of activations that there are, such as "256KB": the least overhead inside is chosen. None: the
            lowest peak, and of equals the least overhead.
        overhead: MACs that may be done twice, as a share of the network's.
        grids: patches along a side that are tried.
        split: name of the module after which patches end; None tries all places.
        act_bits: bits of one activation.
        labels: names of the classes, to be saved; default: those of the data.

    Raises:
        ValueError: arguments that make no sense.
        BudgetError: no schedule fits into the memory; the lowest peak is named.
        SurgeryError: the network cannot be traced.

    >>> import trimtab as tt
    >>> net = tt.create_model("trim_mobile_10k", num_classes=3, in_chans=3, img_size=32)
    >>> tt.deploy.mcunetv2(net, (3, 32, 32))
    Schedule(3 x 3 patches up to stages.1.0: 12.0 KiB instead of 32.0 KiB, 2.7 times less, +12.8% MACs)
    """
    from trimtab.core.cost import measure
    from trimtab.core.example import size_of
    from trimtab.deploy.mcunetv2.local import Program
    from trimtab.deploy.mcunetv2.plan import options, whole
    from trimtab.deploy.mcunetv2.schedule import Schedule

    grids = sorted({*grids})
    if not grids or grids[0] < 2:
        raise ValueError(f"grids must be whole numbers from 2 on, got {grids}")
    if overhead < 0:
        raise ValueError(f"overhead must be at least 0, got {overhead}")
    if not 1 <= act_bits <= 32:
        raise ValueError(f"act_bits must be 1 to 32, got {act_bits}")
    limit = _bytes(memory) if memory is not None else None
    spec = data if isinstance(data, InputSpec) else getattr(data, "spec", None)
    size = size_of(data.size if isinstance(data, InputSpec) else data)
    if size is None:
        raise ValueError(f"data must be a Data, an InputSpec or a size (C, H, W), got {type(data).__name__}")
    program = Program(model, size)
    if split is not None and split not in (names := [program.name(cut) for cut in program.cuts]):
        raise ValueError(f"split must be one of {', '.join(names) or '(no place)'}, got {split!r}")
    once = whole(program, act_bits)
    macs = measure(model, size, what="macs").macs or 1
    found = dict(options(program, macs, grids=grids, split=split, act_bits=act_bits))
    best = choose([*([once] if split is None else []), *found], memory=limit, overhead=overhead)
    labels = labels if labels is not None else getattr(data, "class_names", None)
    return Schedule(
        program, best, found.get(best), once, list(found), act_bits,
        spec=spec, labels=labels,
    )  # fmt: skip


def choose(found: Iterable[Option], *, memory: int | None, overhead: float) -> Option:
    """The schedule of least overhead inside the memory, or of the lowest peak when there is no limit.

    Raises:
        BudgetError: none fits.
    """
    allowed = [o for o in found if o.overhead <= overhead]
    if not allowed:
        raise BudgetError(f"no schedule does at most {overhead:.1%} of the work twice; allow more overhead")
    if memory is None:
        return min(allowed, key=lambda o: (o.peak, o.overhead, o.grid))
    fits = [o for o in allowed if o.peak <= memory]
    if not fits:
        lowest = format_value("memory", min(o.peak for o in allowed))
        raise BudgetError(
            f"memory<={format_value('memory', memory)} cannot be met: the lowest peak with an overhead of at most "
            f"{overhead:.1%} is {lowest}; allow more overhead, or choose a smaller network or smaller images"
        )
    return min(fits, key=lambda o: (o.overhead, o.grid > 1, o.peak))


def _bytes(memory: str | int) -> int:
    limit = Budget(f"memory<={memory}B" if isinstance(memory, int) else f"memory<={memory}").limit("memory")
    assert limit is not None
    return int(limit)


callable_package(__name__, "mcunetv2")
