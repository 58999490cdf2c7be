"""Just enough SVG for the report: scales, ticks, axes, lines, bars, histograms. Pure functions to text.

Every length is a CSS pixel of the figure's own coordinates. Colours are CSS custom properties, so that one
drawing serves light, dark and print (see palette.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

import numpy as np

Points = Sequence[tuple[float, float]]

CHARACTER = 7.2
"""Width of an average character of a label (12 px, half bold, in a wide system font), for margins."""


@dataclass(frozen=True)
class Scale:
    """Linear map of data [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = (value - self.low) / span if span else 0.5
        return self.start + share * (self.end - self.start)


@dataclass(frozen=True)
class Panel:
    """A plot area: x runs right, y runs up (so y.start is the bottom)."""

    x: Scale
    y: Scale

    def at(self, points: Points) -> list[tuple[float, float]]:
        """Data to pixels; what is no number is left out."""
        return [(self.x(a), self.y(b)) for a, b in points if math.isfinite(a) and math.isfinite(b)]


def element(tag: str, content: str = "", /, tip: str = "", **attributes: object) -> str:
    """One element. `content` is markup; `tip` is what a mouse resting on it shows; attribute values are
    escaped, `_` in their names becomes `-`."""
    content = f"<title>{escape(tip)}</title>{content}" if tip else content
    given = {k: short(v) if isinstance(v, float) else str(v) for k, v in attributes.items() if v is not None}
    said = "".join(f" {k.strip('_').replace('_', '-')}={quoteattr(v)}" for k, v in given.items())
    return f"<{tag}{said}>{content}</{tag}>"


def short(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def picture(width: float, height: float, parts: Iterable[str], label: str) -> str:
    """A whole figure; `label` says for a screen reader what it shows."""
    return element(
        "svg",
        "".join(parts),
        viewBox=f"0 0 {short(width)} {short(height)}",
        style=f"min-width:{min(width, 720):.0f}px",
        role="img",
        aria_label=label,
    )


def text(
    x: float, y: float, words: str, cls: str = "label", anchor: str | None = None, style: str | None = None
) -> str:
    """A line of text; y is its baseline."""
    return element("text", escape(words), x=x, y=y, class_=cls, text_anchor=anchor, style=style)


def width_of(words: str) -> float:
    """Roughly the width of a label."""
    return CHARACTER * len(words)


def line(
    x1: float, y1: float, x2: float, y2: float, cls: str = "grid", tip: str = "", style: str | None = None
) -> str:
    return element("line", tip=tip, x1=x1, y1=y1, x2=x2, y2=y2, class_=cls, style=style)


def rect(
    x: float, y: float, width: float, height: float, fill: str, tip: str = "", opacity: float = 1.0
) -> str:
    style = f"fill:{fill}" + (f";opacity:{opacity:.2g}" if opacity < 1 else "")
    return element("rect", tip=tip, x=x, y=y, width=max(0.0, width), height=height, style=style)


def path(points: Points, color: str, cls: str = "curve", tip: str = "") -> str:
    """A line through pixel positions."""
    return element("path", tip=tip, d=_through(points), class_=cls, style=f"stroke:{color}") if points else ""


def polygon(points: Points, color: str, cls: str, tip: str = "") -> str:
    """A filled outline through pixel positions."""
    return element("path", tip=tip, d=f"{_through(points)}Z", class_=cls, style=f"fill:{color}")


def _through(points: Points) -> str:
    return "M" + "L".join(f"{short(x)} {short(y)}" for x, y in points)


def clipped(panel: Panel, name: str, content: str) -> str:
    """`content`, cut off at the panel's edges. `name` must be unique on the page."""
    x, y = panel.x, panel.y
    frame = element("rect", x=x.start, y=y.end, width=x.end - x.start, height=y.start - y.end)
    return element("clipPath", frame, id=name) + element("g", content, clip_path=f"url(#{name})")


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most about `most` round numbers (1, 2, 5 times a power of ten) within [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    rough = (high - low) / max(1, most)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step + 0.0 for n in range(first, last + 1)]


def axes(
    panel: Panel,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    x_label: str = "",
    y_label: str = "",
) -> str:
    """Grid lines across, tick labels below and left, and what the axes mean."""
    x, y = panel.x, panel.y
    parts = [line(x.start, y(v), x.end, y(v)) for v, _ in y_ticks]
    parts += [text(x.start - 8, y(v) + 4, s, "tick", "end") for v, s in y_ticks]
    parts.append(line(x.start, y.start, x.end, y.start, "axis"))
    for value, words in x_ticks:
        parts.append(line(x(value), y.start, x(value), y.start + 4, "axis"))
        parts.append(text(x(value), y.start + 17, words, "tick", "middle"))
    if x_label:
        parts.append(text(x.end, y.start + 33, x_label, "muted", "end"))
    if y_label:
        parts.append(text(x.start - 8, y.end - 12, y_label, "muted"))
    return "".join(parts)


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart to at least `gap`, and within [low, high] if they fit there."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [min(max(positions[i], low), high) for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    if placed and placed[-1] > high:
        placed[-1] = high
        for i in range(len(placed) - 2, -1, -1):
            placed[i] = min(placed[i], placed[i + 1] - gap)
    out = [0.0] * len(positions)
    for i, where in zip(order, placed, strict=True):
        out[i] = where
    return out


def end_labels(panel: Panel, ends: Sequence[tuple[float, float, str, str]], gap: float = 14.0) -> str:
    """Names right of the panel for curves that end at (x, y): (x, y, words, colour), moved apart."""
    at = [(panel.x(x), panel.y(y)) for x, y, _, _ in ends]
    places = spread([y for _, y in at], gap, panel.y.end + 2, panel.y.start - 6)
    right = panel.x.end
    parts = []
    for (x, y), place, (_, _, words, color) in zip(at, places, ends, strict=True):
        y = min(max(y, panel.y.end), panel.y.start)
        parts.append(element("circle", cx=x, cy=y, r=2.5, style=f"fill:{color}"))
        # A curve that ends early is led to its name; the others stand beside theirs.
        parts.append(path([(x + 4, y), (right + 3, y), (right + 9, place)], color, "leader"))
        parts.append(text(right + 12, place + 4, words, "name", style=f"fill:{color}"))
    return "".join(parts)


def histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Share of all `values` in each bin; what lies outside the edges counts in no bin."""
    counts, _ = np.histogram(values, bins=edges)
    return counts / max(1, len(values))


def step_area(x: Scale, edges: np.ndarray, heights: Sequence[float], base: float, color: str) -> str:
    """A histogram's outline, filled, standing on y = base; heights in pixels."""
    points = [(x(float(edges[0])), base)]
    for left, right, height in zip(edges[:-1], edges[1:], heights, strict=True):
        points += [(x(float(left)), base - height), (x(float(right)), base - height)]
    return polygon([*points, (x(float(edges[-1])), base)], color, "area")


def smooth(values: Sequence[float] | np.ndarray, reach: int) -> np.ndarray:
    """Weighted mean of each value and its `reach` neighbours on either side (triangular weights)."""
    given = np.asarray(values, dtype=np.float64)
    if not len(given):
        return given
    good = np.isfinite(given)
    kernel = np.concatenate([np.arange(1, reach + 2), np.arange(reach, 0, -1)]).astype(np.float64)
    total = np.convolve(np.where(good, given, 0.0), kernel)[reach : reach + len(given)]
    weight = np.convolve(good.astype(np.float64), kernel)[reach : reach + len(given)]
    return np.divide(total, weight, out=np.full(len(given), np.nan), where=weight > 0)


def thin(points: Points, most: int = 400) -> list[tuple[float, float]]:
    """At most about `most` points that keep the outline: the lowest and highest of each stretch."""
    finite = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    if len(finite) <= most:
        return finite
    size = 2 * len(finite) / most
    out: list[tuple[float, float]] = []
    for k in range(most // 2):
        part = finite[int(k * size) : int((k + 1) * size)]
        low, high = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
        out += sorted({low, high})
    return [finite[0], *out, finite[-1]]
