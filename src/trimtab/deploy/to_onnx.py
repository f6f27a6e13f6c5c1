"""Export: one file that holds the network, how images are prepared, and what the classes are called."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.compress.quantize.packing import PackedWeight
from trimtab.core.artifact import InputSpec
from trimtab.core.cost import measure, quiet, twin
from trimtab.core.edit import history
from trimtab.core.errors import MissingExtra, TrimtabError
from trimtab.core.files import write_bytes
from trimtab.core.onnx_file import open_session
from trimtab.deploy.runtime import LABELS_KEY, SPEC_KEY, batches
from trimtab.deploy.vision import scores
from trimtab.nn.sparse import SparseConv1x1

if TYPE_CHECKING:
    from onnx import ModelProto

    from trimtab.data import Data

CALIBRATION = 512  # train images that set the ranges of int8 activations: so many ...
CALIBRATION_MACS = 5e11  # ... as long as they cost no more than this, but at least 64
PARITY = 64  # images on which the file is compared with PyTorch
AGREEMENT = 256  # images on which int8 is compared with float
VOLUMES = 4  # instead, where they are volumes
TOLERANCE = 1e-3  # of the largest output
_JUDGED = {"classify": "images", "segment": "pixels", "detect": "boxes"}  # what has a best class


class ExportError(TrimtabError, RuntimeError):
    """A model that cannot be exported, or a file that does not compute what the model computes; nothing is written."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        size: its bytes.
        max_abs_diff: largest difference between its outputs and PyTorch's (where activations are rounded, noise).
        agreement: share of images on which its best class is PyTorch's.
        int8: whether it is quantized.
        accuracy: of the file itself on `split`, None without data and for other tasks than classification.
        exporter: which of PyTorch's exporters did it, "dynamo" or "classic".
        dynamic_batch: whether it takes any batch size.
        notes: what a user should know about this file.
        scores: for other tasks, how good the file itself is on `split`, by the names of `tt.evaluate`.
    """

    path: Path
    size: int
    max_abs_diff: float
    agreement: float
    int8: bool
    accuracy: float | None
    exporter: str = "dynamo"
    dynamic_batch: bool = True
    notes: tuple[str, ...] = ()
    scores: dict[str, float] | None = None


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    to: str = "onnx",
    data: Data | None = None,
    spec: InputSpec | None = None,
    labels: Sequence[str] | None = None,
    int8: bool = False,
    two_bit: bool = False,
    check: bool = True,
    simplify: bool = True,
    opset: int | None = None,
    split: str = "val",
    limit: int | None = 2000,
    exporter: str = "auto",
) -> Exported:
    """Write `model` as ONNX, check it against PyTorch, and say what came out. The model is not changed.

    Packed low-bit weights stay packed in the file (`deploy.low_bit`), zeros of sparse layers are left out
    (`deploy.sparse`). `deploy.vision` says what the files of networks give that segment, detect (their method
    ``boxes_and_scores`` is exported along) or restore (pictures of any size).

    Args:
        path: ending in .onnx, the file; otherwise a directory, where it is called model.onnx.
        data: gives the input, the labels, real images for the check, and the accuracy of the file.
        spec: the input, when there is no data (or it is not the data's).
        labels: names of the classes; default: those of the data.
        int8: quantize with ONNX Runtime, calibrated on up to 512 train images; needs `data`.
        two_bit: run ternary matrix products in ONNX Runtime's 2-bit operator, which rounds activations in blocks.
        check: compare the file's outputs with PyTorch's and refuse to write it when they differ.
        simplify: fold constants and batch norms.
        opset: ONNX operator set, default the exporter's.
        split, limit: images on which `Exported.accuracy` or `scores` are measured: so many of this split.
        exporter: "dynamo" (torch.export), "classic" (tracing, some twenty times faster), or "auto": dynamo, then
            classic, then with a fixed batch of 1, until one of them computes what the model computes.

    Raises:
        ValueError: arguments that make no sense.
        ExportError: no exporter can do it, or the file differs from the model; the message names the difference.
    """
    if to != "onnx":
        raise ValueError(f"to must be 'onnx', got {to!r}")
    if exporter not in ("auto", "dynamo", "classic"):
        raise ValueError(f"exporter must be 'auto', 'dynamo' or 'classic', got {exporter!r}")
    if int8 and data is None:
        raise ValueError("int8 must be calibrated on real images; pass data=")
    if int8 and two_bit:
        raise ValueError("int8 and two_bit exclude each other")
    spec = spec or (data.spec if data is not None else spec_of(model))
    if data is not None and data.spec.size != spec.size:
        raise ValueError(f"spec and data must have one size, got {spec.size} and {data.spec.size}")
    if labels is None and data is not None:
        labels = data.class_names
    target = Path(path) if str(path).endswith(".onnx") else Path(path) / "model.onnx"

    plain = twin(model).cpu().float()
    plain = plain.to(memory_format=torch.contiguous_format)
    if spec.task == "detect":
        plain = Candidates(plain, spec)
    samples = _samples(data, spec, split, AGREEMENT if int8 or two_bit else PARITY)
    expected = _run_torch(plain, samples)
    classes = {"segment": expected.shape[1], "detect": expected.shape[-1] - 4}.get(spec.task, expected.shape[-1])
    if spec.task == "restore":
        labels = None
    elif labels is not None and classes != len(labels):
        raise ValueError(f"labels must name the {classes} outputs of the model, got {len(labels)} names")

    axes = (0, 2, 3) if spec.task == "restore" else (0,)
    graph, how, dynamic, notes = _convert(plain, samples, expected, exporter, check, simplify, opset, axes)
    if int8:
        assert data is not None  # checked at the door
        macs = measure(plain, spec.size, what="macs").macs or 1
        graph, more = _int8(graph, data, spec, samples, expected, dynamic, macs)
        notes += more
    elif any(isinstance(m, PackedWeight) for m in plain.modules()):
        notes += _low_bit(graph, two_bit)
    elif two_bit:
        raise ValueError("two_bit needs a model with packed ternary layers")
    if any(isinstance(m, SparseConv1x1) for m in plain.modules()):
        from trimtab.deploy.sparse import store_sparse

        notes += (f"{store_sparse(graph)} weights stored without their zeros",)
    raw = _finish(graph, spec, labels)
    session = open_session(raw)
    outputs = _run_onnx(session, samples, dynamic)
    diff = float(np.abs(outputs - expected).max())
    agreement = _agreement(outputs, expected, spec)
    if check and not (int8 or two_bit or _rounds(plain)) and diff > _tolerance(expected):
        raise ExportError(_differs(diff, expected))
    accuracy = found = None
    if data is not None:
        split = split if split in data.splits else "test"
        if spec.task == "classify":
            accuracy = _accuracy(session, data, split, spec, dynamic, limit)
        else:
            try:
                found = scores(partial(_run_onnx, session, dynamic=dynamic), spec, data, split, limit=limit)
            except MissingExtra as e:
                notes += (f"the file's scores were not measured: {e}",)
    write_bytes(target, raw)
    return Exported(target, len(raw), diff, agreement, int8, accuracy, how, dynamic, notes, found)


class Candidates(nn.Module):
    """A detector whose answer is one tensor (B, N, 4 + K): boxes as shares of the picture, then probabilities."""

    def __init__(self, detector: nn.Module, spec: InputSpec) -> None:
        super().__init__()
        if not callable(getattr(detector, "boxes_and_scores", None)):
            name = type(detector).__name__
            raise ExportError(
                f"a detector needs a method boxes_and_scores(outputs), which gives boxes (B, N, 4) in pixels and "
                f"probabilities (B, N, K), to be exported; {name} has none"
            )
        self.detector = detector
        height, width = spec.size[-2:]
        self.register_buffer("sides", torch.tensor([width, height, width, height], dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        detector: Any = self.detector
        boxes, scores = detector.boxes_and_scores(detector(x))
        return torch.cat([boxes / self.sides, scores], -1)


def spec_of(model: nn.Module) -> InputSpec:
    """The input of a registry model, from what it was made with and timm's configuration.

    Raises:
        ValueError: the model does not say.
    """
    made = history(model).kwargs if "_trimtab" in vars(model) else {}
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = cfg.get("input_size")
    if not size:
        raise ValueError(f"{type(model).__name__} does not say what its input is; pass data= or spec=")
    channels = int(made.get("in_chans", getattr(model, "in_chans", size[0])))
    sides = made.get("img_size") or size[1:]
    sides = (sides,) * len(size[1:]) if isinstance(sides, int) else tuple(sides)
    mean, std = (tuple(cfg.get(k) or (0.5,) * channels) for k in ("mean", "std"))
    if len(mean) != channels:
        mean, std = ((sum(v) / len(v),) * channels for v in (mean, std))
    return InputSpec((channels, *map(int, sides)), mean, std)


# --------------------------------------------------------------------------------------------------------------- pieces


def _samples(data: Data | None, spec: InputSpec, split: str, count: int) -> np.ndarray:
    """Images to compare on: real ones when there are any."""
    if data is not None:
        split = split if split in data.splits else "test"
        split = "train" if spec.task == "restore" and "train" in data.splits else split  # patches of one size
        count = min(count, VOLUMES) if len(spec.size) == 4 else count
        size = min(count, 64)
        parts = [x for x, _ in batches(data, split, batch_size=size, limit=count, spec=spec)]
        if parts:
            images = np.concatenate(parts)
            if len(images) < 3:  # a batch that is neither 1 nor 2 is part of the check
                images = np.resize(images, (3, *images.shape[1:]))
            return np.ascontiguousarray(images)
    size = 3 if math.prod(spec.size) > 3 * 64 * 64 else 16
    return np.random.default_rng(0).standard_normal((size, *spec.size)).astype(np.float32)


def _run_torch(model: nn.Module, images: np.ndarray) -> np.ndarray:
    out = []
    with quiet(model):
        for i in range(0, len(images), 16):
            y = model(torch.from_numpy(images[i : i + 16]))
            if not isinstance(y, Tensor):
                raise ExportError(f"the model must return one tensor to be exported, got {type(y).__name__}")
            out.append(y.numpy())
    y = np.concatenate(out)
    if not np.isfinite(y).all():
        raise ExportError("the model's outputs are not finite; there is nothing worth exporting")
    return y


def _run_onnx(session: Any, images: np.ndarray, dynamic: bool) -> np.ndarray:
    """Outputs for all images; with an open batch in calls of different sizes, 1 included."""
    name = session.get_inputs()[0].name
    cuts = [0, 1, min(3, len(images)), *range(19, len(images), 16), len(images)] if dynamic else range(len(images) + 1)
    cuts = sorted({*cuts})
    return np.concatenate([session.run(None, {name: images[a:b]})[0] for a, b in pairwise(cuts)])


def _agreement(outputs: np.ndarray, expected: np.ndarray, spec: InputSpec) -> float:
    """The share of answers that are the same: best classes, masks, or for pictures values of 8 bits."""
    task = spec.task
    if spec.overlap:
        ours, theirs = outputs > 0, expected > 0
    elif task == "restore":
        ours, theirs = (np.rint(255 * x.clip(0, 1)) for x in (outputs, expected))
    elif task == "detect":
        ours, theirs = (x[..., 4:].argmax(-1) for x in (outputs, expected))
    else:
        ours, theirs = (x.argmax(1 if task == "segment" else -1) for x in (outputs, expected))
    return float((ours == theirs).mean())


def _rounds(model: nn.Module) -> bool:
    """Whether activations are rounded inside: then a difference of 1e-7 may become one of a whole step."""
    return any(getattr(m, "act_bits", 32) <= 8 for m in model.modules())


def _tolerance(expected: np.ndarray) -> float:
    return TOLERANCE * float(np.abs(expected).max()) + 1e-5


def _differs(diff: float, expected: np.ndarray) -> str:
    largest, allowed = float(np.abs(expected).max()), _tolerance(expected)
    return (
        f"the exported file does not compute what the model computes: outputs differ by up to {diff:.3g}"
        f" (largest output {largest:.3g}, allowed {allowed:.3g})"
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporters talk to stdout, to warnings and to loggers; what matters they raise."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _dynamo(model: nn.Module, x: Tensor, opset: int | None, axes: Sequence[int]) -> ModelProto:
    shapes = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),) if axes else None
    program = torch.onnx.export(
        model, (x,), dynamo=True, dynamic_shapes=shapes, input_names=["image"], output_names=["logits"],
        opset_version=opset, verbose=False,
    )  # fmt: skip
    if program is None:
        raise ExportError("the exporter gave nothing")
    return program.model_proto


def _classic(model: nn.Module, x: Tensor, opset: int | None, axes: Sequence[int]) -> ModelProto:
    import onnx
    from torch.onnx.symbolic_helper import parse_args

    torch.onnx.register_custom_op_symbolic("aten::rms_norm", parse_args("v", "is", "v", "f")(_rms_norm), 18)
    names = {0: "batch", 2: "height", 3: "width"}
    free = {name: {a: f"{names[a]}{end}" for a in axes} for name, end in (("image", ""), ("logits", "_out"))}
    free["logits"] |= {0: "batch"} if axes else {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(
            model, (x,), file, dynamo=False, dynamic_axes=free if axes else None, input_names=["image"],
            output_names=["logits"], opset_version=opset,
        )  # fmt: skip
        return onnx.load(file)


def _rms_norm(g: Any, x: Any, shape: Sequence[int], weight: Any, eps: float | None) -> Any:
    """The classic exporter has no RMS norm: x / sqrt(mean(x^2) + eps), times the weight if there is one."""
    axes, least = torch.arange(-len(shape), 0), torch.tensor(torch.finfo(torch.float32).eps if eps is None else eps)
    mean = g.op("ReduceMean", g.op("Mul", x, x), g.op("Constant", value_t=axes), keepdims_i=1)
    y = g.op("Div", x, g.op("Sqrt", g.op("Add", mean, g.op("Constant", value_t=least))))
    return y if weight.node().mustBeNone() else g.op("Mul", y, weight)


def part(piece: nn.Module, x: Tensor) -> bytes:
    """A piece of a network as lean ONNX, for inputs shaped like `x` (one in, one out).

    Raises:
        ExportError: no exporter can do it.
    """
    from trimtab.deploy import graph as passes

    try:
        with _silence(), quiet(piece):
            proto = _classic(piece, x, None, ())
        passes.keep_zero_pads(proto)
        proto = passes.simplify(proto)
    except Exception as e:
        raise ExportError(f"a part of the network cannot be exported: {(str(e).splitlines() or ['?'])[0]}") from e
    passes.lean(proto)
    return proto.SerializeToString()


_Exporter = Callable[[nn.Module, Tensor, int | None, Sequence[int]], Any]
_EXPORTERS: dict[str, _Exporter] = {"dynamo": _dynamo, "classic": _classic}


def _convert(
    model: nn.Module,
    samples: np.ndarray,
    expected: np.ndarray,
    exporter: str,
    check: bool,
    simplify: bool,
    opset: int | None,
    axes: Sequence[int],
) -> tuple[ModelProto, str, bool, tuple[str, ...]]:
    """The first attempt that runs and computes the right thing: (graph, exporter, open batch, notes).

    axes: of the input that are to stay open; the batch (0) alone may become fixed in the end.
    """
    from trimtab.deploy import graph as passes

    rounds = _rounds(model)

    kinds = ("dynamo", "classic") if exporter == "auto" else (exporter,)
    failures: list[str] = []
    worst: str | None = None
    for dynamic in (True, False):
        for kind in kinds:
            try:
                # torch.export takes 0 and 1 for constants, hence two images to trace an open batch
                x = torch.from_numpy(samples[: 2 if dynamic else 1].copy())
                with _silence(), quiet(model):
                    proto = _EXPORTERS[kind](model, x, opset, axes if dynamic else axes[1:])
                passes.keep_zero_pads(proto)
                if rounds and check:  # to the letter; what is fused later moves numbers across a rounding
                    some = samples[: 19 if dynamic else 3]
                    plain = _run_onnx(open_session(proto.SerializeToString(), optimize=False), some, dynamic)
                    if not (diff := float(np.abs(plain - expected[: len(some)]).max())) <= _tolerance(expected):
                        worst = _differs(diff, expected)
                        raise ExportError(worst)
                if simplify:
                    proto = passes.simplify(proto)
                for axis in axes if dynamic else axes[1:]:
                    if proto.graph.input[0].type.tensor_type.shape.dim[axis].HasField("dim_value"):
                        raise ExportError(f"the {'height and width' if axis else 'batch size'} became a constant")
                some = samples[: 19 if dynamic else 3]
                diff = float(
                    np.abs(
                        _run_onnx(open_session(proto.SerializeToString()), some, dynamic) - expected[: len(some)]
                    ).max()
                )
                if check and not rounds and not diff <= _tolerance(expected):
                    worst = _differs(diff, expected)
                    raise ExportError(worst)
            except Exception as e:
                what = (str(e).strip().splitlines() or [type(e).__name__])[0]
                failures.append(f"{kind}, {'open' if dynamic else 'fixed'} batch: {what[:300]}")
                continue
            notes = () if dynamic else ("the batch size is fixed at 1: no exporter could leave it open",)
            return proto, kind, dynamic, notes
    raise ExportError(worst or "the model cannot be exported to ONNX; " + "; ".join(failures))


def _int8(
    graph: ModelProto,
    data: Data,
    spec: InputSpec,
    samples: np.ndarray,
    expected: np.ndarray,
    dynamic: bool,
    macs: int,
) -> tuple[ModelProto, tuple[str, ...]]:
    """The quantized graph that agrees best with the float model: everything in int8, or only the products."""
    from trimtab.deploy import quantize as q

    ready = q.preprocess(graph)
    count = min(CALIBRATION, max(64, int(CALIBRATION_MACS / macs)))
    size = (64 if macs < 1e8 else 16) if dynamic else 1
    seen = [x for x, _ in batches(data, "train", batch_size=size, limit=count, shuffle=True, spec=spec)]
    plans: list[tuple[str, ...] | None] = [q.PRODUCTS] if q.is_transformer(graph) else [None, q.PRODUCTS]
    best: tuple[float, ModelProto] | None = None
    for ops in plans:
        candidate = q.quantize(ready, iter(seen), ops=ops)
        outputs = _run_onnx(open_session(candidate.SerializeToString()), samples, dynamic)
        agreement = _agreement(outputs, expected, spec)
        if best is None or agreement > best[0]:
            best = agreement, candidate
        if agreement >= 0.95:
            break
    assert best is not None
    notes: tuple[str, ...] = ()
    if best[0] < 0.9 and spec.task in _JUDGED:  # of a picture's values many are one beside; its scores tell more
        what = f"{1 - best[0]:.0%} of the {_JUDGED[spec.task]}"
        notes = (f"int8 changes the best class of {what}; the model does not quantize well",)
    return best[1], notes


def _low_bit(graph: ModelProto, two_bit: bool) -> tuple[str, ...]:
    """Packed weights as packed bytes."""
    from trimtab.deploy import low_bit

    products = low_bit.two_bit_products(graph) if two_bit else 0
    if two_bit and not products:
        raise ExportError("there is no matrix product with ternary weights in the graph; leave two_bit out")
    notes = (f"{products} products in 2 bits, activations in 8",) if products else ()
    return (*notes, f"{low_bit.store_packed(graph)} weights stored packed")


def _finish(graph: ModelProto, spec: InputSpec, labels: Sequence[str] | None) -> bytes:
    """Lean bytes with our metadata in them."""
    from onnx import StringStringEntryProto

    from trimtab import __version__
    from trimtab.deploy import graph as passes

    passes.lean(graph)
    graph.producer_name, graph.producer_version = "trimtab", __version__
    texts = {SPEC_KEY: spec.to_json()} | ({LABELS_KEY: list(labels)} if labels is not None else {})
    for key, value in texts.items():
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        graph.metadata_props.append(StringStringEntryProto(key=key, value=text))
    return graph.SerializeToString()


def _accuracy(session: Any, data: Data, split: str, spec: InputSpec, dynamic: bool, limit: int | None) -> float | None:
    right = seen = 0
    for images, labels in batches(data, split, batch_size=64, limit=limit, spec=spec):
        outputs = _run_onnx(session, images, dynamic)
        right, seen = right + int((outputs.argmax(-1) == labels).sum()), seen + len(labels)
    return right / seen if seen else None
