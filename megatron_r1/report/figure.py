"""What every figure of the report shares: the record, axes, phases, the curves of both arms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_r1.report import words
from megatron_r1.report.load import Reading, Run
from megatron_r1.report.svg import Panel, Points, Scale, axes, line, smooth, text, ticks, width_of
from megatron_r1.report.table import Table

WIDTH = 1040.0
GUTTER = 132.0
"""Left of the names of sources: their domains."""
CONTROL = "var(--control)"
INK = "var(--ink)"


@dataclass(frozen=True)
class Figure:
    anchor: str
    title: str
    lead: str
    """Plain sentences: what it shows and what to look for. Text, not markup."""
    body: str = ""
    """A drawing, or markup; empty where data are missing, or where tables say it all."""
    note: str = ""
    """How it is drawn. Text."""
    command: str = ""
    """Makes what is missing."""
    tables: Sequence[Table] = ()
    """Below the body."""


def token_panel(
    reading: Reading, left: float, right: float, top: float, bottom: float, span: tuple[float, float]
) -> Panel:
    """x: tokens from 0 to the furthest arm's end; y: `span`."""
    most = max(arm.end["tokens"] for _, arm in reading.arms)
    return Panel(Scale(0.0, float(most), left, right), Scale(*span, bottom, top))


def token_axes(
    panel: Panel,
    y_label: str = "",
    x_label: str = "",
    most: int = 6,
    y_marks: Sequence[tuple[float, str]] | None = None,
) -> str:
    """Axes of a panel whose x is tokens; y: round numbers, unless given."""
    xs = [(v, words.count(v)) for v in ticks(panel.x.low, panel.x.high, most)]
    ys = marks(panel.y.low, panel.y.high, 5) if y_marks is None else y_marks
    return axes(panel, xs, ys, x_label, y_label)


def marks(low: float, high: float, most: int, unit: float = 1.0) -> list[tuple[float, str]]:
    """Round numbers of an axis, and how they read in units of `unit`."""
    found = ticks(low, high, most)
    step = found[1] - found[0] if len(found) > 1 else 0.01
    return [(v, words.tick(v / unit, step / unit)) for v in found]


def phase_name(phase: str) -> str:
    """A phase as figures name it, without saying the word twice."""
    return phase if phase.lower().startswith("phase") else f"phase {phase}"


def phase_marks(panel: Panel, run: Run, named: bool = True) -> str:
    """A broken line where a phase begins, and the phases' names above where there is room."""
    parts = []
    for phase, begin, end in run.spans:
        left, right = panel.x(begin), panel.x(end)
        if begin > 0:
            parts.append(line(left, panel.y.end, left, panel.y.start, "phase"))
        if named and right - left > width_of(phase) + 50:
            parts.append(text((left + right) / 2, panel.y.end - 10, phase_name(phase), "muted", "middle"))
    return "".join(parts)


def padded(low: float, high: float) -> tuple[float, float]:
    """A range with a little room above and below."""
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def reach(run: Run) -> int:
    """Neighbours on either side of a smoothed point: a tenth of a short run in all, 2 % of a long one."""
    steps = len(run.metrics)
    return max(2, min(steps // 20, max(8, steps // 100)))


def calm(run: Run, points: Points, neighbours: int) -> list[tuple[float, float]]:
    """Smoothed within each phase of `run`: a new mixture moves the loss at once, which must stay visible."""
    out: list[tuple[float, float]] = []
    for _, begin, end in run.spans:
        part = [p for p in points if begin < p[0] <= end]
        values = smooth([v for _, v in part], neighbours)
        out += [(t, float(v)) for (t, _), v in zip(part, values, strict=True)]
    return out


Curve = tuple[str, list[tuple[float, float]], str, str]
"""Name, points, colour, class."""


def arm_curves(reading: Reading, curves: Sequence[Points], color: str = INK) -> Iterator[Curve]:
    """The curve of each arm that has points; `color` is the run's.

    The control's begins at the run's last point before it, where it forks off.
    """
    for (name, arm), points, stroke in zip(reading.arms, curves, (color, CONTROL), strict=False):
        fork = [p for p in curves[0] if p[0] < arm.metrics[0]["tokens"]][-1:]
        if arm is reading.run and points:
            yield name, list(points), stroke, "curve"
        elif points:
            yield name, [*fork, *points], stroke, "curve dashed"
