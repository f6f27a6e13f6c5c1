"""Augmentation of a whole batch at once: uint8 (B, C, H, W) in, uint8 or float32 in 0..255 out.

A step has two halves. `draw` makes the random numbers of every sample, on the CPU, from the generator of that batch;
`apply` only computes, on any device. So a batch is the same whichever device it is made on, a rank can apply its
slice of the numbers that the whole batch was given, and two cores are not starved by per-image Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Draws = dict[str, Tensor]  # each (B, ...)
LUMA = (0.299, 0.587, 0.114)  # how bright red, green and blue are (ITU-R BT.601)


class Step:
    """One augmentation. Subclasses are plain: parameters in `__init__`, numbers in `draw`, pixels in `apply`."""

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator) -> Draws:
        raise NotImplementedError

    def apply(self, images: Tensor, draws: Draws, fill: Tensor) -> Tensor:
        """fill: (C, 1, 1) in 0..255, the mean colour of the data."""
        raise NotImplementedError

    def box(self, n: int, size: tuple[int, int], draws: Draws) -> Tensor | None:
        """What the step shows of its input: (n, 4) as x1, y1, x2, y2 in units of the sides, x1 > x2 where mirrored.

        None: no box can say it.
        """
        return None


class CropFlip(Step):
    """Shift by up to `pad` pixels (black comes in, as in `RandomCrop(padding=...)`) and mirror half of the images.

    pad None: an eighth of the shorter side, the usual 4 at 32 pixels.
    """

    def __init__(self, *, pad: int | None = None, flip: bool = True) -> None:
        if pad is not None and pad < 0:
            raise ValueError(f"pad must be at least 0, got {pad}")
        self.pad, self.flip = pad, flip

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator) -> Draws:
        pad = self._pad(size)
        shift = torch.randint(-pad, pad + 1, (n, 2), generator=generator)
        flip = torch.rand(n, generator=generator) < 0.5 if self.flip else torch.zeros(n, dtype=torch.bool)
        return {"shift": shift, "flip": flip}

    def apply(self, images: Tensor, draws: Draws, fill: Tensor) -> Tensor:
        pad = self._pad((images.shape[2], images.shape[3]))
        corner, flip = draws["shift"] + pad, draws["flip"]
        if images.device.type == "cpu":
            return torch.from_numpy(_slices(images.numpy(), pad, corner.tolist(), flip.tolist()))
        return _windows(images, pad, corner, flip)

    def box(self, n: int, size: tuple[int, int], draws: Draws) -> Tensor | None:
        corner = draws["shift"].flip(1) / torch.tensor([size[1], size[0]])
        return _mirrored(torch.cat([corner, corner + 1], 1), draws["flip"])

    def _pad(self, size: tuple[int, int]) -> int:
        return max(1, round(min(size) / 8)) if self.pad is None else self.pad


class ResizedCrop(Step):
    """Cut a box of random area and aspect, and stretch it to the whole (Szegedy et al. 2015, as in torchvision)."""

    def __init__(
        self,
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = False,
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be (low, high) in 0..1, got {scale}")
        self.scale, self.ratio, self.flip = scale, ratio, flip

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator) -> Draws:
        h, w = size
        u = torch.rand(n, 5, generator=generator)
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, 0]) * (h * w)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = torch.exp(low + (high - low) * u[:, 1])  # width / height
        wide = (area * aspect).sqrt().round().clamp(1, w).long()
        tall = (area / aspect).sqrt().round().clamp(1, h).long()
        left, top = (u[:, 2] * (w - wide + 1)).long(), (u[:, 3] * (h - tall + 1)).long()
        flip = (u[:, 4] < 0.5) & self.flip
        return {"box": torch.stack([top, left, tall, wide], 1), "flip": flip}

    def apply(self, images: Tensor, draws: Draws, fill: Tensor) -> Tensor:
        _, _, h, w = images.shape
        box, flip = draws["box"], draws["flip"]
        on_cpu = images.device.type == "cpu" and images.dtype == torch.uint8
        if on_cpu and h * w >= 64 * 64:  # measured: 3 times as fast at 224 pixels, slower at 32
            return _stretch(images, box.tolist(), flip.tolist())
        top, left, tall, wide = (v[:, None] for v in box.unbind(1))  # (B, 1)
        y, x = _centres(h, images.device), _centres(w, images.device)
        x = torch.where(flip[:, None], -x, x)
        # the box in -1..1 units; sampling stays inside it, so that its border and not its neighbour is repeated
        gy = ((y + 1) / 2 * tall).clamp(min=0.5).minimum(tall - 0.5)
        gx = ((x + 1) / 2 * wide).clamp(min=0.5).minimum(wide - 0.5)
        grid = _grid((gx + left) * 2 / w - 1, (gy + top) * 2 / h - 1)
        return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)

    def box(self, n: int, size: tuple[int, int], draws: Draws) -> Tensor | None:
        top, left, tall, wide = draws["box"].float().unbind(1)
        h, w = size
        return _mirrored(torch.stack([left / w, top / h, (left + wide) / w, (top + tall) / h], 1), draws["flip"])


class Cutout(Step):
    """Paint a square of the mean colour somewhere, also over the edge (DeVries & Taylor 2017).

    side None: half of the shorter side, the paper's 16 at 32 pixels.
    """

    def __init__(self, *, side: int | None = None) -> None:
        if side is not None and side < 1:
            raise ValueError(f"side must be at least 1, got {side}")
        self.side = side

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator) -> Draws:
        side = max(1, min(size) // 2) if self.side is None else self.side
        centre = (torch.rand(n, 2, generator=generator) * torch.tensor(size)).long()
        return {"box": torch.cat([centre - side // 2, centre - side // 2 + side], 1)}  # top, left, bottom, right

    def apply(self, images: Tensor, draws: Draws, fill: Tensor) -> Tensor:
        _, _, h, w = images.shape
        if images.device.type == "cpu":
            return torch.from_numpy(_painted(images.numpy().copy(), draws["box"].clamp(min=0).tolist(), fill.numpy()))
        top, left, bottom, right = draws["box"][:, :, None].unbind(1)
        y, x = torch.arange(h, device=images.device), torch.arange(w, device=images.device)
        inside = ((y >= top) & (y < bottom))[:, None, :, None] & ((x >= left) & (x < right))[:, None, None, :]
        return torch.where(inside, fill.to(images.dtype), images)

    def box(self, n: int, size: tuple[int, int], draws: Draws) -> Tensor | None:
        return _WHOLE.expand(n, 4)


class RandomOps(Step):
    """`ops` operations in a row, each drawn from the list of AutoAugment: RandAugment and TrivialAugment.

    Samples that drew the same operation are computed together, each with its own strength; the five geometric
    operations are one affine map and so one group. Shears are about the centre (torchvision: about the corner); what
    comes in from outside has the mean colour of the data.

    Args:
        ops: operations in a row (2 in RandAugment, 1 in TrivialAugment).
        magnitude: strength in 0..30; None draws it anew for every sample (TrivialAugment).
        wide: the wider ranges of TrivialAugment (Mueller & Hutter 2021).
    """

    NAMES = (
        "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
        "sharpness", "posterize", "solarize", "autocontrast", "equalize",
    )  # fmt: skip

    def __init__(self, *, ops: int = 2, magnitude: float | None = 9, wide: bool = False) -> None:
        if magnitude is not None and not 0 <= magnitude <= 30:
            raise ValueError(f"magnitude must be 0 to 30, got {magnitude}")
        if ops < 1:
            raise ValueError(f"ops must be at least 1, got {ops}")
        self.ops, self.magnitude, self.wide = ops, magnitude, wide

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator) -> Draws:
        op = torch.randint(0, len(self.NAMES), (n, self.ops), generator=generator)
        strength = torch.randint(0, 31, (n, self.ops), generator=generator) / 30
        if self.magnitude is not None:
            strength = torch.full_like(strength, self.magnitude / 30)
        sign = torch.randint(0, 2, (n, self.ops), generator=generator) * 2.0 - 1
        return {"op": op, "strength": strength, "sign": sign}

    def apply(self, images: Tensor, draws: Draws, fill: Tensor) -> Tensor:
        images = images.to(torch.float32, copy=True)
        for k in range(self.ops):
            op, strength, sign = (draws[name][:, k] for name in ("op", "strength", "sign"))
            rows = ((op >= 1) & (op <= 5)).nonzero()[:, 0]
            if len(rows):
                grid = self._grid(op[rows], strength[rows] * sign[rows], images.shape[2:])
                # around the mean colour, where the zeros that come from outside are neutral
                moved = F.grid_sample(images[rows] - fill, grid, mode="nearest", align_corners=False)
                images[rows] = (moved + fill).round()
            for number, name in enumerate(self.NAMES):
                if name in _COLOUR_OPS:
                    rows = (op == number).nonzero()[:, 0]
                    m, s = (v[rows].view(-1, 1, 1, 1) for v in (strength, sign))
                    if len(rows):
                        images[rows] = _COLOUR_OPS[name](images[rows], m, s, self.wide).clamp(0, 255).round()
        return images

    def _grid(self, op: Tensor, amount: Tensor, size: Sequence[int]) -> Tensor:
        """Where in the input each output pixel comes from, (B, H, W, 2) in -1..1; amount (B,) in -1..1."""
        h, w = size
        shear, angle = (0.99, 135.0) if self.wide else (0.3, 30.0)
        move_x, move_y = (min(32, w) / w, min(32, h) / h) if self.wide else (150 / 331, 150 / 331)  # of the side
        zero = torch.zeros_like(amount)
        turn = torch.where(op == 5, amount * math.radians(angle), zero)
        cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
        shear_x, shear_y, shift_x, shift_y = (
            torch.where(op == k, amount * v, zero)[:, None, None]
            for k, v in ((1, shear), (2, shear), (3, 2 * move_x), (4, 2 * move_y))
        )
        x, y = _centres(w, amount.device)[None, None, :], _centres(h, amount.device)[None, :, None]
        # shears and turns are in pixels, so that they look the same when the picture is not square
        from_x = x * cos + y * ((shear_x - sin) * (h / w)) + shift_x
        from_y = y * cos + x * ((shear_y + sin) * (w / h)) + shift_y
        return torch.stack([from_x, from_y], -1)


class Custom(Step):
    """A user's own function of (images (B, C, H, W) in 0..255, generator); it is given whole batches."""

    def __init__(self, function: Callable[[Tensor, torch.Generator], Tensor]) -> None:
        self.function = function

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator) -> Draws:
        return {"seed": torch.randint(2**62, (1,), generator=generator).expand(n)}

    def apply(self, images: Tensor, draws: Draws, fill: Tensor) -> Tensor:
        if not len(images):
            return images
        out = self.function(images, torch.Generator().manual_seed(int(draws["seed"][0])))
        if not isinstance(out, Tensor) or out.ndim != 4 or len(out) != len(images):
            got = getattr(out, "shape", out)
            raise ValueError(f"augment must return {len(images)} images (B, C, H, W), got {got!r}")
        return out


class Augment:
    """Steps one after another.

    >>> g = torch.Generator().manual_seed(0)
    >>> parse_augment("crop_flip+cutout")(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), g).shape
    torch.Size([4, 3, 32, 32])
    """

    def __init__(self, steps: Sequence[Step], text: str = "") -> None:
        self.steps, self.text = list(steps), text

    @property
    def whole_batch(self) -> bool:
        """Whether a step must see the whole batch even when a rank needs only its slice."""
        return any(isinstance(step, Custom) for step in self.steps)

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator) -> list[Draws]:
        return [step.draw(n, size, generator) for step in self.steps]

    def draw_each(self, seeds: Sequence[int], size: tuple[int, int]) -> list[Draws]:
        """Numbers of samples that each have a seed of their own: the view of an image depends on its seed alone.

        Raises:
            ValueError: a step works on whole batches.
        """
        if self.whole_batch:
            raise ValueError(f"augment must be words here, since functions see whole batches; got {self.text!r}")
        rows = [self.draw(1, size, torch.Generator().manual_seed(seed)) for seed in seeds]
        rows = rows or [self.draw(0, size, torch.Generator())]
        return [{k: torch.cat([row[i][k] for row in rows]) for k in rows[0][i]} for i in range(len(self.steps))]

    def apply(self, images: Tensor, draws: Sequence[Draws], fill: Tensor | None = None) -> Tensor:
        """images: uint8 (B, C, H, W), left as it is; draws: of the same B samples."""
        if fill is None:
            fill = torch.full((images.shape[1], 1, 1), 128.0, device=images.device)
        for step, numbers in zip(self.steps, draws, strict=True):
            images = step.apply(images, {k: v.to(images.device) for k, v in numbers.items()}, fill)
        return images

    def crop_box(self, n: int, size: tuple[int, int], draws: Sequence[Draws]) -> Tensor | None:
        """What part of the original images is shown: (n, 4) as x1, y1, x2, y2 in units of its sides.

        None where a step moves pixels in a way that no box says. Shifts may reach beyond 0..1.
        """
        whole = _WHOLE.expand(n, 4)
        for step, numbers in zip(self.steps, draws, strict=True):
            box = step.box(n, size, numbers)
            if box is None:
                return None
            start, side = whole[:, :2].repeat(1, 2), (whole[:, 2:] - whole[:, :2]).repeat(1, 2)
            whole = start + side * box
        return torch.cat([whole[:, :2].minimum(whole[:, 2:]), whole[:, :2].maximum(whole[:, 2:])], 1)

    def __call__(self, images: Tensor, generator: torch.Generator, fill: Tensor | None = None) -> Tensor:
        return self.apply(images, self.draw(len(images), (images.shape[2], images.shape[3]), generator), fill)

    def __repr__(self) -> str:
        return f"Augment({self.text!r})"


def parse_augment(text: str) -> Augment:
    """Steps from words joined by "+", applied from left to right; a number may follow "=".

    "none", "flip", "crop" (=pad in pixels), "crop_flip" (=pad), "rrc" (random resized crop, =smallest area),
    "randaugment" (=magnitude of 30), "trivial", "cutout" (=side in pixels).

    Raises:
        ValueError: for a word that is none of these.
    """
    words = [w.strip() for w in text.lower().split("+")]
    if "crop" in words and "flip" in words:  # one pass instead of two
        words[words.index("crop")] = "crop_flip"
        words.remove("flip")
    steps: list[Step] = []
    for name, value in read_words(words, _STEPS):
        if name == "flip" and steps and isinstance(steps[-1], ResizedCrop):
            steps[-1].flip = True
        elif name != "none":
            steps.append(_STEPS[name](value))
    return Augment(steps, "+".join(words))


def read_words(words: Sequence[str], known: Collection[str]) -> list[tuple[str, float | None]]:
    """Names and numbers of words like "crop=4".

    Raises:
        ValueError: a name is not among those known, or a number is none.
    """
    out: list[tuple[str, float | None]] = []
    for word in words:
        name, _, number = word.partition("=")
        try:
            out.append((name, float(number) if number else None))
        except ValueError:
            raise ValueError(f"augment: {name!r} takes a number, got {number!r}") from None
        if name not in known:
            text = "+".join(words)
            raise ValueError(f"augment must be made of {', '.join(known)} joined by '+', or 'auto', got {text!r}")
    return out


_WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


def _mirrored(box: Tensor, flip: Tensor) -> Tensor:
    return torch.where(flip[:, None], box[:, [2, 1, 0, 3]], box)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


_STEPS: dict[str, Callable[[float | None], Any]] = {
    "none": lambda v: None,
    "flip": lambda v: CropFlip(pad=0),
    "crop": lambda v: CropFlip(pad=_whole(v), flip=False),
    "crop_flip": lambda v: CropFlip(pad=_whole(v)),
    "rrc": lambda v: ResizedCrop(scale=(0.08 if v is None else v, 1.0)),
    "randaugment": lambda v: RandomOps(ops=2, magnitude=9 if v is None else v),
    "trivial": lambda v: RandomOps(ops=1, magnitude=None, wide=True),
    "cutout": lambda v: Cutout(side=_whole(v)),
}


def _slices(images: np.ndarray, pad: int, corners: list[list[int]], flip: list[bool]) -> np.ndarray:
    """A window of each padded image, where it began or shifted: on a CPU, copying rows beats any gather (25 x at 224).

    numpy, not torch: these are many small copies, and torch would meet its other threads at a barrier after each.
    """
    b, c, h, w = images.shape
    padded = images
    if pad:
        padded = np.zeros((b, c, h + 2 * pad, w + 2 * pad), images.dtype)
        padded[:, :, pad:-pad, pad:-pad] = images
    out = np.empty_like(images)
    for target, image, (top, left), mirrored in zip(out, padded, corners, flip, strict=True):
        window = image[:, top : top + h, left : left + w]
        target[...] = window[:, :, ::-1] if mirrored else window
    return out


def _painted(images: np.ndarray, boxes: list[list[int]], fill: np.ndarray) -> np.ndarray:
    colour = fill.astype(images.dtype)
    for image, (top, left, bottom, right) in zip(images, boxes, strict=True):
        image[:, top:bottom, left:right] = colour
    return images


def _windows(images: Tensor, pad: int, corner: Tensor, flip: Tensor) -> Tensor:
    """The same in one gather, for devices where a loop would start a kernel per image."""
    b, c, h, w = images.shape
    padded = F.pad(images, (pad,) * 4) if pad else images
    x = torch.arange(w, device=images.device)
    column = torch.where(flip[:, None], w - 1 - x, x) + corner[:, 1:]  # (B, W)
    row = torch.arange(h, device=images.device) + corner[:, :1]  # (B, H)
    pick = (row[:, :, None] * padded.shape[3] + column[:, None, :]).view(b, 1, h * w).expand(b, c, h * w)
    return padded.reshape(b, c, -1).gather(2, pick).view(b, c, h, w)


def _stretch(images: Tensor, boxes: list[list[int]], flip: list[bool]) -> Tensor:
    """Each box (top, left, height, width) as large as the image. torch's uint8 channels-last kernel is the fast one."""
    out = torch.empty_like(images)
    size = (images.shape[2], images.shape[3])
    for k, (top, left, tall, wide) in enumerate(boxes):
        box = images[k : k + 1, :, top : top + tall, left : left + wide].contiguous(memory_format=torch.channels_last)
        box = F.interpolate(box, size=size, mode="bilinear", align_corners=False)
        out[k] = box[0].flip(2) if flip[k] else box[0]
    return out


def _centres(n: int, device: torch.device) -> Tensor:
    """Pixel centres in -1..1, as `F.grid_sample` counts them with align_corners=False."""
    return (2 * torch.arange(n, device=device, dtype=torch.float32) + 1) / n - 1


def _grid(x: Tensor, y: Tensor) -> Tensor:
    """(B, H, W, 2) from columns (B, W) and rows (B, H)."""
    b, w, h = len(x), x.shape[1], y.shape[1]
    return torch.stack([x[:, None, :].expand(b, h, w), y[:, :, None].expand(b, h, w)], -1)


# The operations on colour: images float (B, C, H, W) in 0..255, strength in 0..1 and sign +-1, both (B, 1, 1, 1).


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x
    r, g, b = x[:, :3].split(1, 1)
    return LUMA[0] * r + LUMA[1] * g + LUMA[2] * b


def _factor(strength: Tensor, sign: Tensor, wide: bool) -> Tensor:
    return 1 + strength * sign * (0.99 if wide else 0.9)


def _brightness(x: Tensor, m: Tensor, s: Tensor, wide: bool) -> Tensor:
    return x * _factor(m, s, wide)


def _color(x: Tensor, m: Tensor, s: Tensor, wide: bool) -> Tensor:
    return torch.lerp(_grey(x).expand_as(x), x, _factor(m, s, wide).expand_as(x))


def _contrast(x: Tensor, m: Tensor, s: Tensor, wide: bool) -> Tensor:
    return torch.lerp(_grey(x).mean((1, 2, 3), keepdim=True).expand_as(x), x, _factor(m, s, wide).expand_as(x))


def _sharpness(x: Tensor, m: Tensor, s: Tensor, wide: bool) -> Tensor:
    """Blend with the 3x3 smoothing (1 1 1, 1 5 1, 1 1 1) / 13; the border stays as it is."""
    if min(x.shape[2:]) < 3:
        return x
    c = x.shape[1]
    kernel = torch.ones(3, 3, device=x.device)
    kernel[1, 1] = 5
    blurred = x.clone()
    blurred[:, :, 1:-1, 1:-1] = F.conv2d(x, (kernel / 13).expand(c, 1, 3, 3), groups=c)
    return torch.lerp(blurred, x, _factor(m, s, wide).expand_as(x))


def _posterize(x: Tensor, m: Tensor, s: Tensor, wide: bool) -> Tensor:
    step = 2.0 ** torch.round(m * (6 if wide else 4))  # bits dropped
    return torch.floor(x / step) * step


def _solarize(x: Tensor, m: Tensor, s: Tensor, wide: bool) -> Tensor:
    return torch.where(x >= 255 * (1 - m), 255 - x, x)


def _autocontrast(x: Tensor, m: Tensor, s: Tensor, wide: bool) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) * (255 / (high - low).clamp(min=1e-6)), x)


def _equalize(x: Tensor, m: Tensor, s: Tensor, wide: bool) -> Tensor:
    from torchvision.transforms.v2.functional import equalize

    return equalize(x.clamp(0, 255).round().to(torch.uint8)).float()


_COLOUR_OPS = {
    "brightness": _brightness, "color": _color, "contrast": _contrast, "sharpness": _sharpness,
    "posterize": _posterize, "solarize": _solarize, "autocontrast": _autocontrast, "equalize": _equalize,
}  # fmt: skip
