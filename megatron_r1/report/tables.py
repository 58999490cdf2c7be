"""Tables of a report, as cells, and how numbers are written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_r1.report import plots, summary
from megatron_r1.report.load import Reading, Run
from megatron_r1.train.schedule import phase_spans

_SPACE = "\u00a0"
"""Between a number and its unit: no line breaks there."""
_SHADE = 0.55
"""Greatest opacity of a cell's ground, so that ink stays readable on it."""


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

    @property
    def ground(self) -> str:
        return "var(--positive)" if self.shade >= 0 else "var(--negative)"

    @property
    def opacity(self) -> float:
        return round(_SHADE * min(1.0, abs(self.shade)), 2)


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def rights(self) -> list[float]:
        """Right edge of each column in a picture, pixels."""
        longest = [
            max(len(name), *(len(f"{cell.text} {cell.small}") for cell in cells))
            for name, *cells in zip(self.head, *self.rows, strict=True)
        ]
        return np.cumsum([7.2 * letters + 24 for letters in longest]).tolist()


def held_out(ends: tuple[float, dict[str, dict[str, float]]]) -> Table:
    """Held-out loss per capability and arm, and how far the arms are apart."""
    (arm, run), *others = ends[1].items()
    rows = [[Cell(c), Cell(f"{value:.3f}")] for c, value in run.items()]
    if not others:
        return Table(["", arm], rows)
    for row, (c, value) in zip(rows, run.items(), strict=True):
        control = others[0][1][c]
        share = f"{signed(100 * (value - control) / control, 1)}{_SPACE}%"
        row += [Cell(f"{control:.3f}"), Cell(signed(value - control), f"{share}, one run, no interval")]
    return Table(["", arm, others[0][0], "difference"], rows)


def heat(reading: Reading, scores: summary.Scores) -> Table:
    """Mean score of each source on each capability ± its standard error, shaded column by column."""
    shades, found = plots.colors(reading.run.domains), scores.sources
    values = np.array([[*s.mean_C, s.joint] for s in found])
    # One power of ten and one number of decimals for the whole table, so that columns compare at a glance.
    power = _power(np.abs(values).max())
    scale = 10.0 ** (power if not -3 < power < 4 else 0)
    digits = max(0, 2 - _power(np.abs(values).max() / scale))
    rows = []
    for s, row, shade in zip(
        found, values, values / np.maximum(np.abs(values).max(axis=0), 1e-300), strict=True
    ):
        errors = [*(f"± {error / scale:.{digits}f}" for error in s.error_C), ""]
        cells = [
            Cell(signed(v / scale, digits), e, shade=d) for v, e, d in zip(row, errors, shade, strict=True)
        ]
        name = Cell(s.source, reading.run.domains[s.source], shades[s.source])
        rows.append([name, *cells, Cell(percent(s.helping, 0))])
    exponent = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    unit = f" ×10{exponent}" if scale != 1 else ""
    return Table(
        ["source", *(f"{c}{unit}" for c in (*scores.capabilities, "joint")), "examples that help"], rows
    )


def agreement(scores: summary.Scores) -> Table:
    """Rank correlation of the scores between checkpoints, of examples and of sources."""
    rows = [
        [Cell(f"{a:,} → {b:,}"), *(Cell(signed(r, 2), shade=0.7 * r) if r == r else Cell("–") for r in ranks)]
        for a, b, ranks in summary.agreement(scores)
    ]
    return Table(
        ["steps", *(f"{c}, {of}" for of in ("examples", "sources") for c in scores.capabilities)], rows
    )


def phases(reading: Reading) -> Table:
    """The configuration of every phase of both arms, and how far it came."""
    columns: dict[str, dict[str, str]] = {}
    for arm, run in reading.arms.items():
        for span in phase_spans(run.config):
            # What a control shares with the run stands there already.
            if run is reading.control and span.end < run.first["step"]:
                continue
            name = f"{span.name} ({arm})" if span.name in columns else span.name
            at = run.last[span.name]["step"] if span.name in run.last else "not begun"
            done = {"steps": f"{span.start + 1:,} to {span.end:,}", "trained to": f"{at}"}
            given = dataclasses.asdict(span.config)
            plain = {k: "by source" if isinstance(v, dict) and v else v or "–" for k, v in given.items()}
            columns[name] = {k: f"{v:g}" if isinstance(v, float) else f"{v}" for k, v in plain.items()} | done
            reached = summary.capped(run, span.name) if span.name in run.last else []
            columns[name]["sources at their cap"] = ", ".join(reached) or "–"
    fields = next(iter(columns.values()))
    return Table(["", *columns], [[Cell(f), *(Cell(of[f]) for of in columns.values())] for f in fields])


def checkpoints(run: Run, saved: summary.Checkpoints) -> Table:
    """The most telling checkpoints: where they lie, what was measured at them, why they stay."""
    nll = {c: dict(zip(*run.points(f"probe_nll/{c}"), strict=True)) for c in run.measured("probe_nll")}
    rows = []
    for one in saved.listed():
        tokens = one.step * run.config.tokens_per_step()
        values = [f"{of[tokens]:.3f}" if tokens in of else "–" for of in nll.values()]
        phase = next((s.name for s in phase_spans(run.config) if s.start < one.step <= s.end), "–")
        rest = [*values, "scored" if one.scored else "–", one.pinned or "–"]
        rows.append([*map(Cell, [f"{one.step:,}", count(tokens), phase, size(one.size), *rest])])
    return Table(
        ["step", "tokens", "phase", "size", *(f"held-out {c}" for c in nll), "influence", "kept for good"],
        rows,
    )


def stages(costs: Sequence[summary.StageCost]) -> Table:
    """Time and tokens of every stage."""
    seconds, tokens, spent = (
        sum(getattr(c, of) for c in costs) for of in ("seconds", "tokens", "device_hours")
    )
    rows = []
    for c in costs:
        rate = count(c.tokens / c.seconds) if c.tokens and c.seconds else "–"
        row = [c.label, duration(c.seconds), count(c.tokens) if c.tokens else "–", rate, f"{c.devices}"]
        share = c.seconds / seconds if seconds else 0.0
        rows.append([*map(Cell, [*row, hours(c.device_hours)]), Cell(percent(share), bar=share)])
    rows.append([*map(Cell, ["total", duration(seconds), count(tokens), "", "", hours(spent), ""])])
    head = ["stage", "wall time", "tokens", "tokens per second", "ranks", "rank-hours", "share of the time"]
    return Table(head, rows)


def overhead(ours: dict[str, float]) -> Table:
    """The cost of choosing data beside the paper's."""
    rows = [[name, hours(ours[name]), f"{spent:,.0f} h"] for name, spent in summary.PAPER.items()]
    shares = [percent(1 - of["training"] / sum(of.values()), 0) for of in (ours, summary.PAPER)]
    rows.append(["choosing, of the whole", *shares])
    return Table(
        ["choosing data, device-hours", "this run", "the paper, 950M"], [[*map(Cell, r)] for r in rows]
    )


def count(value: float) -> str:
    """717 k, 2.66 M, 1.2 T: three figures at most."""
    return _scaled(value, 1000, ["", "k", "M", "B", "T"])


def size(value: float) -> str:
    """Bytes: 41 MiB, 1.2 GiB."""
    return _scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"])


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while abs(value) >= 0.9995 * base and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:.3g}{_SPACE if units[power] else ''}{units[power]}"


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


def compact(value: float) -> str:
    """A score of any size, with its sign, in three figures: +12.3, −0.041, +3.1e−06."""
    return f"{value:+.3g}".replace("-", "−") if value else "0"


def many(number: int, noun: str) -> str:
    """1 step; 4,096 steps."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _power(value: float) -> int:
    return math.floor(math.log10(value)) if value > 0 and math.isfinite(value) else 0
