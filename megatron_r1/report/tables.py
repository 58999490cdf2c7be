"""Tables of a report, as cells: the page's HTML and a picture are both made from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from megatron_r1.report import plots, summary
from megatron_r1.report.load import Reading, Run
from megatron_r1.train.schedule import phase_spans

_SPACE = "\u00a0"
"""Between a number and its unit: no line breaks there."""
_SHADE = 0.55
"""Greatest opacity of a cell's ground, so that ink stays readable on it."""
NO_INTERVAL = "one run, no interval"


@dataclass(frozen=True)
class Cell:
    """A row's first cell names the row."""

    text: str
    small: str = ""
    """Small print behind it."""
    color: str = "var(--ink)"
    shade: float = 0.0
    """-1 to 1: the ground's strength, in the colour of its sign."""
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

    def texts(self) -> list[list[str]]:
        return [[cell.text for cell in row] for row in self.rows]


def chart(table: Table) -> Any:
    """The table as a drawing, columns as wide as their text."""
    rows: list[dict[str, Any]] = []
    left = 0.0
    for column, name in enumerate(table.head):
        cells = [Cell(name, color=plots.MUTED), *(row[column] for row in table.rows)]
        width = 7.0 * max(len(cell.text) + len(cell.small) + 1 for cell in cells) + 22
        for line, cell in enumerate(cells):
            at = {"y": 27 * line, "left": left, "right": left + width, "middle": 27 * line + 13}
            text = f"{cell.text} {cell.small}".strip()
            at |= {"text": text, "color": cell.color, "x": left + width - 11 if column else left + 4}
            rows.append(at | {"align": "right" if column else "left", "ground": cell.ground, "shade": cell.opacity})
        left += width + 2
    height = 27 * (1 + len(table.rows))
    across = alt.Scale(domain=[0, left], nice=False)
    down = alt.Scale(domain=[0, height], reverse=True, nice=False)
    base = plots.table(rows)
    ground = base.mark_rect().encode(
        x=alt.X("left:Q", scale=across, axis=None),
        x2="right:Q",
        y=alt.Y("y:Q", scale=down, axis=None),
        y2=alt.Y2("next:Q"),
        color=alt.Color("ground:N", scale=None),
        opacity=alt.Opacity("shade:Q", scale=None),
    )
    ground = ground.transform_calculate(next="datum.y + 25")
    texts = [
        base.transform_filter(f"datum.align == '{align}'")
        .mark_text(align=align)
        .encode(x=alt.X("x:Q", scale=across, axis=None), y=alt.Y("middle:Q", scale=down), text="text:N")
        .encode(color=alt.Color("color:N", scale=None))
        for align in ("left", "right")
    ]
    return alt.layer(ground, *texts).properties(width=left, height=height)


def held_out(ends: summary.HeldOut) -> Table:
    """Held-out loss per capability and arm, and how far the arms are apart."""
    arms = list(ends.by_arm)
    rows = [[Cell(c), *(Cell(f"{ends.by_arm[arm][c]:.3f}") for arm in arms)] for c in ends.by_arm[arms[0]]]
    if len(arms) == 1:
        return Table(["", *arms], rows)
    for row in rows:
        gap = ends.difference(row[0].text)
        share = f"{signed(100 * gap / ends.by_arm[arms[1]][row[0].text], 1)}{_SPACE}%"
        row.append(Cell(signed(gap), f"{share}, {NO_INTERVAL}"))
    return Table(["", *arms, "difference"], rows)


def heat(reading: Reading, scores: summary.Scores) -> Table:
    """Mean score of each source on each capability ± its standard error, shaded column by column."""
    found, shades = scores.sources, plots.colors(reading.run.domains)
    top_C = np.abs(np.stack([s.mean_C for s in found])).max(axis=0)
    top = max(abs(s.joint) for s in found)
    # One power of ten and one number of decimals for the whole table, so that columns compare at a glance.
    most = max(float(top_C.max()), top)
    power = power_of(most)
    scale, digits = 10.0**power, max(0, 2 - power_of(most / 10.0**power, always=True))
    rows = []
    for s in found:
        row = [Cell(s.source, reading.run.domains[s.source], color=shades[s.source])]
        for value, error, limit in zip(s.mean_C, s.error_C, top_C, strict=True):
            shade = float(value / max(limit, 1e-300))
            row.append(Cell(signed(value / scale, digits), f"± {error / scale:.{digits}f}", shade=shade))
        row.append(Cell(signed(s.joint / scale, digits), shade=s.joint / max(top, 1e-300)))
        rows.append([*row, Cell(percent(s.helping, 0))])
    unit = f" {superscript(power)}" if power else ""
    capabilities = [f"{c}{unit}" for c in scores.capabilities]
    return Table(["source", *capabilities, f"joint{unit}", "examples that help"], rows)


def agreement(scores: summary.Scores) -> Table:
    """Rank correlation of the scores between checkpoints, of examples and of sources."""
    rows = []
    for a, b, ranks in summary.agreement(scores):
        cells = [Cell(signed(r, 2), shade=0.7 * r) if math.isfinite(r) else Cell("–") for r in ranks]
        rows.append([Cell(f"{a:,} → {b:,}"), *cells])
    head = [f"{c}, {of}" for of in ("examples", "sources") for c in scores.capabilities]
    return Table(["steps", *head], rows)


def checkpoints(run: Run, complete: list[summary.Saved]) -> Table:
    """The most telling checkpoints: where they lie, what was measured at them, why they stay."""
    capabilities = run.measured("probe_nll")
    nll = {c: dict(zip(*run.points(f"probe_nll/{c}"), strict=True)) for c in capabilities}
    rows = []
    for saved in summary.telling(run.config, complete):
        tokens = saved.step * run.config.tokens_per_step()
        values = [f"{nll[c][tokens]:.3f}" if tokens in nll[c] else "–" for c in capabilities]
        phase = next((s.name for s in phase_spans(run.config) if s.start < saved.step <= s.end), "–")
        rest = ["scored" if saved.scored else "–", saved.pinned or "–"]
        row = [f"{saved.step:,}", count(tokens), phase, size(saved.size), *values, *rest]
        rows.append([Cell(text) for text in row])
    held = [f"held-out {c}" for c in capabilities]
    head = ["step", "tokens", "phase", "size", *held, "influence", "kept for good"]
    return Table(head, rows)


def stages(reading: Reading) -> list[Table]:
    """Time and tokens of every stage, from the ledgers; the cost of choosing data beside the paper's."""
    costs = summary.stage_costs(reading)
    total = sum(c.seconds for c in costs)
    rows = []
    for c in costs:
        share = c.seconds / total if total else 0.0
        row = [c.label, duration(c.seconds), count(c.tokens) if c.tokens else "–"]
        row += [count(c.rate) if c.rate else "–", str(c.devices), hours(c.device_hours)]
        rows.append([*map(Cell, row), Cell(percent(share), bar=share)])
    whole = ["total", duration(total), count(sum(c.tokens for c in costs)), "", ""]
    rows.append([*map(Cell, whole), Cell(hours(sum(c.device_hours for c in costs))), Cell("")])
    head = ["stage", "wall time", "tokens", "tokens per second", "ranks", "rank-hours", "share of the time"]
    made = [Table(head, rows)] if costs else []
    if ours := summary.overhead(costs):
        lines = [[name, hours(ours[name]), f"{spent:,.0f} h"] for name, spent in summary.PAPER.items()]
        shares = [percent(1 - of["training"] / sum(of.values()), 0) for of in (ours, summary.PAPER)]
        lines.append(["choosing, of the whole", *shares])
        head = ["choosing data, device-hours", "this run", "the paper, 950M"]
        made.append(Table(head, [[Cell(text) for text in line] for line in lines]))
    return made


def phases(reading: Reading) -> Table:
    """The configuration of every phase of both arms, and how far it came."""
    columns: dict[str, list[str]] = {}
    for arm, run in (("", reading.run), (" (control)", reading.control)):
        for span in phase_spans(run.config) if run else ():
            assert run is not None
            if arm and span.name in reading.run.config.phases and span.end < run.first["step"]:
                continue
            phase, end = span.config, run.last.get(span.name)
            suffix = arm if span.name in columns else ""
            decay = f"{phase.decay}, to {phase.min_lr_ratio:g} of the peak"
            caps = phase.max_epochs if not isinstance(phase.max_epochs, dict) else "by source"
            columns[f"{span.name}{suffix}"] = [
                f"{span.start + 1:,} to {span.end:,}",
                f"{end['step']:,}" if end else "not begun",
                count((span.end - span.start) * run.config.tokens_per_step()),
                f"{phase.learning_rate:g}",
                f"{phase.warmup_steps:,} steps",
                "constant" if phase.decay == "constant" else decay,
                "uniform" if phase.weights == "uniform" else "by source",
                "none" if caps is None else f"{caps}",
                (", ".join(summary.capped(run, span.name)) or "none") if end else "–",
                ", ".join(phase.keep) or "none",
                "reset" if phase.reset_optimizer else "carried over",
            ]
    names = ["steps", "trained to step", "tokens", "peak learning rate", "warm-up", "decay", "weights"]
    names += ["cap on epochs", "sources that reached it", "keep masks of", "optimizer state"]
    rows = [[Cell(name), *map(Cell, values)] for name, *values in zip(names, *columns.values(), strict=True)]
    return Table(["", *columns], rows)


def count(value: float) -> str:
    """717 k, 2.66 M, 1.2 T: three figures at most."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{_three(value / limit)}{_SPACE}{unit}"
    return _three(value)


def size(value: float) -> str:
    """Bytes in the greatest binary unit that leaves one before the point: 41 MiB, 1.2 GiB."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return f"{_three(value / 1024**power)}{_SPACE}{unit}"
    return f"{value:.0f}{_SPACE}B"


def _three(value: float) -> str:
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}{_SPACE}%"


def duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f}{_SPACE}s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours:,}{_SPACE}h {minutes:02d}{_SPACE}min"
    return f"{minutes}{_SPACE}min {rest:02d}{_SPACE}s" if minutes else f"{rest}{_SPACE}s"


def hours(value: float) -> str:
    """Hours, to three figures."""
    return _three(value) if value >= 0.01 else "< 0.01"


def signed(value: float, digits: int = 3) -> str:
    """With a true minus sign, or a plus unless it rounds to 0."""
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def compact(value: float) -> str:
    """A score of any size, with its sign: +12.3, −0.041, +3.1e−6."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return signed(value, max(0, 2 - power_of(abs(value), always=True)))
    mantissa, power = f"{value:+.1e}".split("e")
    return f"{mantissa}e{int(power)}".replace("-", "−")


def power_of(most: float, always: bool = False) -> int:
    """The power of ten to take out of numbers up to `most`; 0 where they read well as they are."""
    power = math.floor(math.log10(most)) if most > 0 and math.isfinite(most) else 0
    return 0 if -3 < power < 4 and not always else power


def superscript(exponent: int) -> str:
    """×10⁻⁶"""
    return "×10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def many(number: int, noun: str) -> str:
    """1 step; 4,096 steps."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
