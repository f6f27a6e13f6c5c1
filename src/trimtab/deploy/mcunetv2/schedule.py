"""A network with the patches that it is run in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from trimtab.core.files import write_bytes, write_text
from trimtab.core.spec import InputSpec
from trimtab.deploy.mcunetv2 import live, parts
from trimtab.deploy.mcunetv2.local import Program, Window, cells
from trimtab.deploy.mcunetv2.plan import Option
from trimtab.deploy.patched import SCHEDULE, Manifest, Patch, PatchedModel, dump
from trimtab.deploy.to_onnx import ExportError, part

TOLERANCE = 1e-4  # of the largest output: files against PyTorch


@dataclass(frozen=True)
class Piece:
    """A patch: the module that computes it, its window (rows, columns) in the image, its place in the map."""

    module: fx.GraphModule
    window: tuple[Window, Window]
    out: tuple[Window, Window]


class Schedule:
    """A network that is run in patches up to a split, and as always from there on. Made by `mcunetv2`.

    It holds the model's own tensors: train the model, and the schedule runs what it has become.

    Attributes:
        option: what was chosen, with what it costs. split, grid, peak, overhead: of it.
        whole: what the network costs without patches.
        table: every schedule that was looked at.
        act_bits: bits of one activation, in which memory is counted.
    """

    def __init__(
        self,
        program: Program,
        option: Option,
        cut: fx.Node | None,
        whole: Option,
        table: Sequence[Option],
        act_bits: int,
        spec: InputSpec | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.program, self.option, self.whole, self.table = program, option, whole, tuple(table)
        self.split, self.grid, self.peak, self.overhead = option.split, option.grid, option.peak, option.overhead
        self.act_bits, self.spec = act_bits, spec
        self.labels = list(labels) if labels is not None else None
        self._cut = cut

    def __repr__(self) -> str:
        small, large = (f"{o.peak / 1024:.1f} KiB" for o in (self.option, self.whole))
        if self._cut is None:
            return f"Schedule(no patches, {small})"
        times = self.whole.peak / max(1, self.peak)
        return (
            f"Schedule({self.grid} x {self.grid} patches up to {self.split}: {small} instead of {large}, "
            f"{times:.1f} times less, {self.overhead:+.1%} MACs)"
        )

    @cached_property
    def pieces(self) -> list[Piece]:
        """The patches, row by row; those that meet the borders alike share their module."""
        if self._cut is None:
            return []
        program, cut = self.program, self._cut
        head = program.head(cut)
        sides = [cells(program.side(cut, axis), self.grid) for axis in (0, 1)]
        windows = [[program.windows(cut, out, axis) for out in sides[axis]] for axis in (0, 1)]
        made: dict[Any, fx.GraphModule] = {}
        found = []
        for up_down, rows in zip(*(s[0] for s in (sides, windows))):
            for start_end, columns in zip(*(s[1] for s in (sides, windows))):
                assert rows is not None and columns is not None  # else it would not have been an option
                kind = parts.kind(program, head, rows, 0), parts.kind(program, head, columns, 1)
                if kind not in made:
                    made[kind] = parts.head(program, cut, rows, columns)
                box = rows[program.image], columns[program.image]
                found.append(Piece(made[kind], box, (up_down, start_end)))
        return found

    @cached_property
    def tail(self) -> fx.GraphModule:
        """What runs after the patches: the whole network where there are none."""
        return parts.whole(self.program) if self._cut is None else parts.tail(self.program, self._cut)

    @torch.no_grad()
    def run(self, images: Tensor) -> Tensor:
        """What the model makes of images (B, C, H, W) in evaluation mode, one image after the other.

        Raises:
            ValueError: images of another size than the schedule was made for.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != self.program.size:
            raise ValueError(f"images must be (B, {', '.join(map(str, self.program.size))}), got {tuple(images.shape)}")
        return torch.cat([self._one(images[i : i + 1]) for i in range(len(images))])

    def _one(self, image: Tensor) -> Tensor:
        return self.tail(image if self._cut is None else self._stage(image))

    def _stage(self, image: Tensor) -> Tensor:
        """The map (1, C, h, w) at the split."""
        assert self._cut is not None
        out = image.new_empty(self._cut.meta["val"].shape)
        for piece in self.pieces:
            ((top, bottom), (left, right)), ((up, down), (start, end)) = piece.window, piece.out
            out[:, :, up:down, start:end] = piece.module(image[:, :, top:bottom, left:right])
        return out

    def live_bytes(self) -> dict[str, dict[str, int]]:
        """Bytes of float32 activations alive at once in PyTorch, measured and expected, in patches and without.

        The image is not counted. PyTorch overwrites nothing, so both are more than `peak` allows an engine to reach.
        """
        image = torch.zeros((1, *self.program.size), device=self.program.device)
        once = parts.whole(self.program)
        known = [image, *self.program.tensors.values()]
        pieces, tail = self.pieces, self.tail  # made before anything is measured
        plain = {"measured": live.measured(lambda: once(image), known), "expected": live.expected(once, image)}
        if self._cut is None:
            return {"whole": plain, "patches": plain}
        stage = torch.zeros(self._cut.meta["val"].shape, device=self.program.device)
        buffer = stage.numel() * stage.element_size()
        largest = max(
            live.expected(p.module, image[:, :, slice(*p.window[0]), slice(*p.window[1])])
            for p in {id(p.module): p for p in pieces}.values()
        )
        both = buffer + max(largest, live.expected(tail, stage))
        patches = {"measured": live.measured(lambda: self._one(image), known), "expected": both}
        return {"whole": plain, "patches": patches}

    def save(self, path: str | Path) -> Path:
        """Write the parts as ONNX with the schedule beside them: a folder that `PatchedModel` runs without PyTorch.

        Raises:
            ValueError: the model is not on the CPU, or nothing says how images are prepared.
            ExportError: a part cannot be exported, or the files do not compute what the model computes.
        """
        if self.spec is None:
            raise ValueError("data must be a Data for save(): nothing says how images are prepared")
        if self.program.device.type != "cpu":
            raise ValueError(f"the model must be on the CPU to be saved, it is on {self.program.device}")
        path = Path(path)
        files: dict[str, bytes] = {}
        names: dict[int, str] = {}
        image = torch.randn((1, *self.program.size), generator=torch.Generator().manual_seed(0))
        patches = []
        for piece in self.pieces:
            (top, bottom), (left, right) = piece.window
            if id(piece.module) not in names:
                names[id(piece.module)] = name = f"patch_{len(names)}.onnx"
                files[name] = part(piece.module, image[:, :, top:bottom, left:right].contiguous())
            (up, down), (start, end) = piece.out
            box = (top, left, bottom, right)
            patches.append(Patch(part=names[id(piece.module)], window=box, out=(up, start, down, end)))
        stage = None if self._cut is None else tuple(self._cut.meta["val"].shape[1:])
        files["tail.onnx"] = part(self.tail, image if self._cut is None else self._stage(image))
        figures = {**asdict(self.option), "whole": self.whole.peak, "act_bits": self.act_bits}
        manifest = Manifest(
            spec=self.spec.to_json(), labels=self.labels, stage=stage, patches=patches, tail="tail.onnx",
            sha256={name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}, figures=figures,
        )  # fmt: skip
        for name, raw in files.items():
            write_bytes(path / name, raw)
        write_text(path / SCHEDULE, dump(manifest))
        want = self._one(image).numpy()
        diff = float(np.abs(PatchedModel(path).logits(image.numpy()) - want).max())
        if not diff <= TOLERANCE * float(np.abs(want).max()) + 1e-5:
            (path / SCHEDULE).unlink()
            raise ExportError(f"the files in {path} differ from the model by {diff:.3g}; they were not kept")
        return path
