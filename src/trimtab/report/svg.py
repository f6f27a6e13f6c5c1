"""The few parts a static SVG chart is made of. Text and attributes are escaped by construction (markupsafe)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from .words import clean


def tag(name: str, /, *children: object, **attrs: object) -> Markup:
    """An element. Children that are not Markup are escaped; ``class_`` is class, ``stroke_width`` is stroke-width.

    >>> tag("text", "a<b", class_="tick", x=1.50)
    Markup('<text class="tick" x="1.5">a&lt;b</text>')
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attrs.items()
        if value is not None
    )
    inner = "".join(child if isinstance(child, Markup) else escape(clean(child)) for child in children)
    return Markup(f"<{name}{said}>{inner}</{name}>" if inner else f"<{name}{said}/>")


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else clean(value)


def join(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def short(text: object, limit: int) -> str:
    """At most `limit` characters, the end replaced by an ellipsis."""
    said = clean(text)
    return said if len(said) <= limit else said[: max(1, limit - 1)] + "…"


@dataclass(frozen=True)
class Scale:
    """Values lo..hi onto pixels a..b, linear or logarithmic. Values outside are held at the edge."""

    lo: float
    hi: float
    a: float
    b: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value = min(max(value, self.lo), self.hi)
        if self.log:
            share = math.log(value / self.lo) / math.log(self.hi / self.lo)
        else:
            share = (value - self.lo) / (self.hi - self.lo)
        return round(self.a + share * (self.b - self.a), 1)

    def ticks(self, about: int = 5) -> list[float]:
        return _log_ticks(self.lo, self.hi, about) if self.log else _linear_ticks(self.lo, self.hi, about)


def fit_scale(values: Sequence[float], a: float, b: float, *, pad: float = 0.06, spread: float = 8.0) -> Scale:
    """A scale over positive costs: logarithmic when the largest is more than `spread` times the smallest."""
    lo, hi = min(values), max(values)
    if lo > 0 and hi / lo > spread:
        grow = (hi / lo) ** pad
        return Scale(lo / grow, hi * grow, a, b, log=True)
    room = (hi - lo) * pad or abs(hi) * 0.1 or 1.0
    return Scale(max(0.0, lo - room) if lo >= 0 else lo - room, hi + room, a, b)


def _linear_ticks(lo: float, hi: float, about: int) -> list[float]:
    raw = (hi - lo) / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(lo / step - 1e-9)
    return [0.0 if k == 0 else k * step for k in range(first, math.floor(hi / step + 1e-9) + 1)]


def _log_ticks(lo: float, hi: float, about: int) -> list[float]:
    decades = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    best: list[float] = []
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 6, 8)):
        ticks = [m * 10.0**d for d in decades for m in multiples if lo <= m * 10.0**d <= hi]
        if not best or abs(len(ticks) - about) < abs(len(best) - about):
            best = ticks
    if len(best) > about + 2:
        best = best[:: math.ceil(len(best) / about)]
    return best if len(best) >= 2 else _linear_ticks(lo, hi, about)


@dataclass
class Frame:
    """A plot area with axes: the pieces every chart here shares."""

    width: float
    height: float
    left: float = 50.0
    right: float = 14.0
    top: float = 14.0
    bottom: float = 44.0
    parts: list[Markup] = field(default_factory=list)

    @property
    def x0(self) -> float:
        return self.left

    @property
    def x1(self) -> float:
        return self.width - self.right

    @property
    def y0(self) -> float:
        return self.height - self.bottom

    @property
    def y1(self) -> float:
        return self.top

    def add(self, *parts: Markup) -> None:
        self.parts.extend(parts)

    def x_axis(self, scale: Scale, say: Callable[[float], str], title: str, about: int = 5) -> None:
        ticks = scale.ticks(about)
        self.add(path(f"M{x} {self.y0}v5" for x in map(scale, ticks)))
        self.add(line(self.x0, self.y0, self.x1, self.y0, "axis"))
        for value in ticks:
            self.add(tag("text", say(value), class_="tick", x=scale(value), y=self.y0 + 18, text_anchor="middle"))
        self.add(tag("text", title, class_="name", x=(self.x0 + self.x1) / 2, y=self.y0 + 37, text_anchor="middle"))

    def y_axis(self, scale: Scale, say: Callable[[float], str], about: int = 5) -> None:
        for value in scale.ticks(about):
            y = scale(value)
            self.add(line(self.x0, y, self.x1, y, "grid"))
            self.add(tag("text", say(value), class_="tick", x=self.x0 - 7, y=y + 4, text_anchor="end"))

    def svg(self, label: str) -> Markup:
        box = f"0 0 {self.width:g} {self.height:g}"
        return tag("svg", *self.parts, viewBox=box, class_="chart", role="img", aria_label=label)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", class_=class_, x1=x1, y1=y1, x2=x2, y2=y2)


def path(steps: Iterable[str], class_: str = "axis") -> Markup:
    return tag("path", class_=class_, d="".join(steps))
