"""Tables of a report, as cells, and how numbers are written."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_r1.report import plots, summary
from megatron_r1.report.load import Reading, Run
from megatron_r1.train.schedule import phase_spans

_SPACE = "\u00a0"
"""Between a number and its unit: no line breaks there."""


@dataclass(frozen=True)
class Cell:
    """A row's first cell names the row."""

    text: str
    small: str = ""
    """Small print behind it."""
    color: str = plots.INK
    shade: float = 0.0
    """-1 to 1: strength of the ground, in the colour of its sign."""
    bar: float | None = None
    """Share of a bar that is filled, drawn before the text."""


class Table:
    def __init__(self, head: Sequence[str], rows: Iterable[Sequence[Cell | str]]):
        self.head = head
        self.rows = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]

    def rights(self) -> list[float]:
        """Right edge of each column in a picture, pixels."""
        columns = zip([Cell(name) for name in self.head], *self.rows, strict=True)
        longest = [max(len(f"{cell.text} {cell.small}") for cell in cells) for cells in columns]
        return list(itertools.accumulate(7.2 * letters + 24 for letters in longest))


def held_out(ends: dict[str, dict[str, float]]) -> Table:
    """Held-out loss per capability and arm, and how far the arms are apart."""
    (arm, run), *others = ends.items()
    if not others:
        return Table(["", arm], [[c, f"{value:.3f}"] for c, value in run.items()])
    rows: list[list[Cell | str]] = []
    for c, value in run.items():
        control = others[0][1].get(c, math.nan)
        share = f"{signed(100 * (value - control) / control, 1)}{_SPACE}%, one run, no interval"
        rows.append([c, f"{value:.3f}", f"{control:.3f}", Cell(signed(value - control), share)])
    return Table(["", arm, others[0][0], "difference"], rows)


def heat(reading: Reading, scores: summary.Scores) -> Table:
    """Mean score of each source on each capability ± its standard error, shaded column by column."""
    shades, ranked = plots.colors(reading.run.domains), scores.sources
    rows: list[list[Cell | str]] = []
    values = np.array([[*s.mean_C, s.joint] for s in ranked])
    # One power of ten and one number of decimals for the whole table, so that columns compare at a glance.
    most = float(np.abs(values).max()) or 1.0
    power = math.floor(math.log10(most)) if not 1e-3 <= most < 1e4 else 0
    digits = max(0, 2 - math.floor(math.log10(most)) + power)
    for s, row in zip(ranked, values, strict=True):
        errors = [*(f"± {error / 10.0**power:.{digits}f}" for error in s.error_C), ""]
        shade = row / np.maximum(np.abs(values).max(axis=0), 1e-300)
        cells = [
            Cell(signed(value / 10.0**power, digits), error, shade=float(strength))
            for value, error, strength in zip(row, errors, shade, strict=True)
        ]
        name = Cell(s.source, reading.run.domains[s.source], shades[s.source])
        rows.append([name, *cells, percent(s.helping, 0)])
    unit = " ×10" + f"{power}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")) if power else ""
    columns = [f"{c}{unit}" for c in (*scores.capabilities, "joint")]
    return Table(["source", *columns, "examples that help"], rows)


def agreement(scores: summary.Scores) -> Table:
    """Rank correlation of the scores between checkpoints, of examples and of sources."""
    rows = [
        [f"{a:,} → {b:,}", *(Cell(signed(r, 2), shade=0.7 * r) if r == r else "–" for r in ranks)]
        for a, b, ranks in summary.agreement(scores)
    ]
    columns = [f"{c}, {of}" for of in ("examples", "sources") for c in scores.capabilities]
    return Table(["steps", *columns], rows)


def phases(reading: Reading) -> Table:
    """The configuration of every phase of both arms, and how far it came."""
    columns: dict[str, dict[str, str]] = {}
    for arm, run in reading.arms.items():
        for span in phase_spans(run.config):
            # What a control shares with the run stands there already.
            if run is reading.control and span.end < run.first["step"]:
                continue
            begun, of = span.name in run.last, span.config.objective
            given = dataclasses.asdict(span.config) | {
                "steps": f"{span.start + 1:,} to {span.end:,}",
                "objective": f"{of.name} of {of.cache or of.teacher}" if of else "next token",
                "trained to step": f"{run.last[span.name]['step']:,}" if begun else "not begun",
                "sources that reached max_epochs": ", ".join(summary.capped(run, span.name)) if begun else "",
            }
            short = {k: "by source" if v and isinstance(v, dict) else f"{v or '–'}" for k, v in given.items()}
            columns[f"{span.name} ({arm})" if span.name in columns else span.name] = short
    names = next(iter(columns.values()))
    return Table(["", *columns], [[name, *(of[name] for of in columns.values())] for name in names])


def checkpoints(run: Run, complete: Sequence[summary.Saved], most: int = 12) -> Table:
    """The newest three, what is kept for good, what was scored: what was measured at them, why they stay."""
    listed = [one for one in complete if one.pinned or one.scored or one in complete[-3:]][-most:]
    nll = {c: dict(zip(*run.points(f"probe_nll/{c}"), strict=True)) for c in run.measured("probe_nll")}
    rows = []
    for one in listed:
        tokens = one.step * run.config.tokens_per_step()
        values = [f"{of[tokens]:.3f}" if tokens in of else "–" for of in nll.values()]
        phase = next((s.name for s in phase_spans(run.config) if s.start < one.step <= s.end), "–")
        rest = ["scored" if one.scored else "–", one.pinned or "–"]
        rows.append([f"{one.step:,}", count(tokens), phase, size(one.size), *values, *rest])
    held = [f"held-out {c}" for c in nll]
    return Table(["step", "tokens", "phase", "size", *held, "influence", "kept for good"], rows)


def stages(costs: Sequence[summary.StageCost]) -> Table:
    """Time and tokens of every stage."""
    totals = ("seconds", "tokens", "device_hours")
    seconds, tokens, spent = (sum(getattr(c, of) for c in costs) for of in totals)
    rows: list[list[Cell | str]] = []
    for c in costs:
        rate = count(c.tokens / c.seconds) if c.tokens and c.seconds else "–"
        row = [c.label, duration(c.seconds), count(c.tokens) if c.tokens else "–", rate, f"{c.devices}"]
        share = c.seconds / max(seconds, 1e-9)
        rows.append([*row, hours(c.device_hours), Cell(percent(share), bar=share)])
    rows.append(["total", duration(seconds), count(tokens), "", "", hours(spent), ""])
    head = ["stage", "wall time", "tokens", "tokens per second", "ranks", "rank-hours", "share of the time"]
    return Table(head, rows)


def overhead(costs: list[summary.StageCost]) -> list[Table]:
    """The cost of choosing data beside the paper's; nothing before anything was trained and scored."""
    if (ours := summary.overhead(costs)) is None:
        return []
    rows = [[name, hours(ours[name]), f"{spent:,.0f} h"] for name, spent in summary.PAPER.items()]
    shares = [percent(1 - of["training"] / sum(of.values()), 0) for of in (ours, summary.PAPER)]
    head = ["choosing data, device-hours", "this run", "the paper, 950M"]
    return [Table(head, [*rows, ["choosing, of the whole", *shares]])]


def count(value: float) -> str:
    """717 k, 2.66 M, 1.2 T: three figures at most."""
    return _scaled(value, 1000, ["", "k", "M", "B", "T"])


def size(value: float) -> str:
    """Bytes: 41 MiB, 1.2 GiB."""
    return _scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"])


def _scaled(value: float, base: int, units: list[str]) -> str:
    while abs(value) >= 0.9995 * base and len(units) > 1:
        value, units = value / base, units[1:]
    return f"{value:.3g}" + (f"{_SPACE}{units[0]}" if units[0] else "")


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}{_SPACE}%"


def duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f}{_SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,}{_SPACE}h {minutes % 60:02d}{_SPACE}min"
    return f"{minutes}{_SPACE}min {rest:02d}{_SPACE}s" if minutes else f"{rest}{_SPACE}s"


def hours(value: float) -> str:
    return f"{value:.3g}" if value >= 0.01 else "< 0.01"


def signed(value: float, digits: int = 3) -> str:
    """With a true minus sign, or a plus unless it rounds to 0."""
    text = f"{value:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def many(number: int, noun: str) -> str:
    """1 step; 4,096 steps."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
