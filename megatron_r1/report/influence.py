"""Figures of influence: score histograms, and the source x capability table."""

from __future__ import annotations

import numpy as np

from megatron_r1.report import palette, summary, words
from megatron_r1.report.figure import INK, WIDTH, Figure, marks
from megatron_r1.report.load import Reading
from megatron_r1.report.summary import SourceInfluence
from megatron_r1.report.svg import Scale, histogram, line, picture, step_area, text, width_of
from megatron_r1.report.table import Cell, Table

BINS = 48
CLIP = (1.0, 99.0)
"""Percentiles of all sources' scores between which the histograms are drawn."""
ROW = 34.0
"""Height of a source's histogram."""


def missing(reading: Reading) -> Figure:
    named = reading.run.config.influence is not None
    more = [] if named else ["influence.directions.code=PREFIX"]
    return Figure(
        "influence",
        "Influence",
        "No complete influence scores, so which source helps which capability is not known. This "
        "measures it:",
        command=summary.launch(reading.run, "compute_influence", *more),
    )


def histograms(reading: Reading) -> Figure:
    """Scores of every source's examples, a column per capability."""
    found = summary.influence(reading)
    if not found:
        return missing(reading)
    capabilities = reading.scores[0].capabilities
    colors = palette.source_colors(reading.run.domains)
    left = max(width_of(s.source) for s in found) + 16
    cell = (WIDTH - left) / len(capabilities)
    top, bottom = 48.0, 48.0 + ROW * len(found)
    parts = []
    for i, s in enumerate(found):
        style = f"fill:{colors.get(s.source, INK)}"
        parts.append(text(left - 14, top + ROW * (i + 1) - 6, s.source, "name", "end", style=style))
    for column, capability in enumerate(capabilities):
        start = left + column * cell
        low, high = _range(np.concatenate([s.score_NC[:, column] for s in found]))
        parts.append(text(start, 16, capability, "panel"))
        parts.append(_column(found, column, Scale(low, high, start, start + cell - 74), colors, top, bottom))
    body = picture(WIDTH, bottom + 42, parts, "Influence scores per source and capability")
    steps = words.both([f"{step:,}" for step in reading.scores[0].steps])
    note = (
        f"{sum(len(s.score_NC) for s in found):,} examples, scored at checkpoints of step {steps} and summed "
        "(Eq. 4). Score: how much a gradient step on the example lowers the capability's loss, per unit of "
        "step size. Drawn from the 1st to the 99th percentile of all sources together; what lies beyond is "
        "clipped. Each row is scaled to its own peak. Upright stroke: mean. At the right: share of examples "
        "that help. From the most to the least helpful source."
    )
    return Figure("influence", "Influence per example", _histogram_lead(found, capabilities), body, note)


def _column(
    found: list[SourceInfluence], column: int, x: Scale, colors: dict[str, str], top: float, bottom: float
) -> str:
    """One capability's histograms, one below the other."""
    edges = np.linspace(x.low, x.high, BINS + 1)
    power = words.power_of(max(abs(x.low), abs(x.high)))
    ground = marks(x.low, x.high, 5, 10.0**power)
    parts = [line(x(v), top, x(v), bottom) for v, _ in ground if v]
    zero = x(0)
    if zero - x.start > 56:
        parts.append(text(zero - 7, top - 10, "harms ←", "muted", "end"))
    parts.append(text(zero + 7, top - 10, "→ helps", "muted"))
    parts.append(text(x.end + 8, top - 10, "help", "muted"))
    for i, s in enumerate(found):
        base = top + ROW * (i + 1)
        values = s.score_NC[:, column]
        shares = histogram(values, edges)
        heights = shares / max(shares.max(), 1e-12) * (ROW - 6)
        parts.append(step_area(x, edges, heights.tolist(), base, colors.get(s.source, INK)))
        parts.append(line(x.start, base, x.end, base))
        at = x(float(np.clip(s.mean_C[column], x.low, x.high)))
        parts.append(line(at, base - ROW + 6, at, base, "mark"))
        parts.append(text(x.end + 8, base - 6, words.percent(100 * float((values > 0).mean())), "tick"))
    parts.append(line(zero, top - 4, zero, bottom, "zero"))
    parts += [text(x(v), bottom + 17, said, "tick", "middle") for v, said in ground]
    name = f"score {words.power(power)}" if power else "score"
    parts.append(text(x.end, bottom + 35, name, "muted", "end"))
    return "".join(parts)


def _histogram_lead(found: list[SourceInfluence], capabilities: tuple[str, ...]) -> str:
    best, worst = found[0], found[-1]
    if len(found) == 1:
        lead = f"{best.source} is the one source that was scored: {_effect(best, capabilities)}. "
    else:
        lead = f"{best.source} helps most taken together, {worst.source} least"
        if worst.total > 0:
            lead += f", {best.total / worst.total:.0f} times less" if best.total > 2 * worst.total else ""
        lead += f": {_effect(worst, capabilities)}. "
    return lead + (
        "A hill right of the zero line means: training on this source lowers that capability's loss; "
        "a hill left of it: raises it. Look for rows that stay at zero or fall left of it."
    )


def _effect(source: SourceInfluence, capabilities: tuple[str, ...]) -> str:
    """What training on a source's examples does to the capabilities."""
    worse = [c for c, v in zip(capabilities, source.mean_C, strict=True) if v < 0]
    if len(worse) == len(capabilities):
        return "on average its examples raise the loss of every capability"
    if worse:
        return f"on average its examples raise the loss of {words.both(worse)}"
    return "on average its examples still lower the loss of every capability"


def heat(reading: Reading) -> Figure | None:
    """Mean score of each source on each capability, coloured."""
    found = summary.influence(reading)
    if not found:
        return None
    capabilities = reading.scores[0].capabilities
    colors = palette.source_colors(reading.run.domains)
    top_C = np.abs(np.stack([s.mean_C for s in found])).max(axis=0)
    top = max(abs(s.total) for s in found)
    # One power of ten and one number of decimals for the whole table, so that columns compare at a glance.
    most = max(float(top_C.max()), top)
    power = words.power_of(most)
    scale, digits = 10.0**power, words.digits_for(most / 10.0**power)
    rows = []
    for s in found:
        cells = [
            Cell(s.source, color=colors.get(s.source, INK)),
            Cell(reading.run.domains.get(s.source, ""), kind="domain"),
        ]
        for value, error, limit in zip(s.mean_C, s.error_C, top_C, strict=True):
            said, aside = words.signed(value / scale, digits), f"± {error / scale:.{digits}f}"
            cells.append(Cell(said, aside, shade=_shade(value, limit)))
        cells.append(Cell(words.signed(s.total / scale, digits), shade=_shade(s.total, top)))
        cells.append(Cell(words.percent(100 * s.kept)))
        rows.append(cells)
    head = ["source", "domain", *capabilities, "together", "examples that help"]
    note = "Token-weighted mean score (rho of Eq. 5) ± its standard error"
    note += f", in units of {words.power(power)}" if power else ""
    note += (
        ". Blue helps, orange harms; colour is relative to the greatest value of its column. Together: the "
        "capabilities' weighted mean, from which the mixture is made. Examples that help: those whose joint "
        "score at the last checkpoint is positive (Eq. 6)."
    )
    lead = _heat_lead(found, capabilities)
    tables = [Table(head, rows, "numbers heat")]
    return Figure("heat", "Influence per source and capability", lead, note=note, tables=tables)


def _heat_lead(found: list[SourceInfluence], capabilities: tuple[str, ...]) -> str:
    said = []
    for i, c in enumerate(capabilities):
        best = [s.source for s in sorted(found, key=lambda s: -s.mean_C[i])[:2] if s.mean_C[i] > 0]
        if best:
            said.append(f"{c} by {words.both(best)}")
    lead = f"Helped most: {'; '.join(said)}. " if said else "No source helps any capability. "
    harmful = [s.source for s in found if (s.mean_C < 0).all()]
    if harmful:
        lead += f"{words.both(harmful)} {'harms' if len(harmful) == 1 else 'harm'} every capability. "
    return (
        lead
        + "Read a column downwards to see what a capability wants, a row across to see whom a source serves."
    )


def _range(scores: np.ndarray) -> tuple[float, float]:
    """The drawn range: percentiles of the finite scores, always with 0 inside."""
    finite = scores[np.isfinite(scores)]
    low, high = np.percentile(finite, CLIP) if len(finite) else (0.0, 0.0)
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    room = 0.02 * (high - low) or 1.0
    return low - room, high + room


def _shade(value: float, most: float) -> float:
    """Opacity of a number's ground: at most about half, so that ink stays readable."""
    return 0.55 * max(-1.0, min(1.0, value / max(most, 1e-300)))
