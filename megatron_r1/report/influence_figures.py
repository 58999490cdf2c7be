"""The report's figures of influence: score histograms and the source x capability table."""

from __future__ import annotations

from xml.sax.saxutils import escape

import numpy as np

from megatron_r1.report import palette, summary, words
from megatron_r1.report.figures import WIDTH, Figure, table
from megatron_r1.report.load import Reading
from megatron_r1.report.summary import SourceInfluence
from megatron_r1.report.svg import (
    Scale,
    element,
    histogram,
    line,
    picture,
    step_area,
    text,
    ticks,
    width_of,
)

BINS = 48
CLIP = (1.0, 99.0)
"""Percentiles of all sources' scores between which the histograms are drawn."""
ROW = 34.0


def missing(reading: Reading) -> Figure:
    return Figure(
        "influence",
        "Influence",
        "No influence scores yet: which source helps which capability is not known. This measures it:",
        command=f"torchrun --nproc-per-node 2 tools/compute_influence.py {reading.run.root / 'config.yaml'}",
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
    top, bottom = 46.0, 46.0 + ROW * len(found)
    parts = []
    for i, s in enumerate(found):
        color = colors.get(s.source, "var(--ink)")
        parts.append(text(left - 14, top + ROW * (i + 1) - 6, s.source, "name", "end", style=f"fill:{color}"))
    for column, capability in enumerate(capabilities):
        low, high = _clip(np.concatenate([s.score_NC[:, column] for s in found]))
        x = Scale(low, high, left + column * cell, left + (column + 1) * cell - 66)
        edges = np.linspace(low, high, BINS + 1)
        parts.append(text(x.start, 16, capability, "panel"))
        parts.append(text(x.start + width_of(capability) + 22, 16, "harms ← 0 → helps", "muted"))
        marks = ticks(low, high, 4)
        parts += [line(x(v), top, x(v), bottom) for v in marks if v]
        for i, s in enumerate(found):
            base = top + ROW * (i + 1)
            values = s.score_NC[:, column]
            shares = histogram(values, edges)
            heights = shares / max(shares.max(), 1e-12) * (ROW - 6)
            color = colors.get(s.source, "var(--ink)")
            parts.append(step_area(x, edges, heights.tolist(), base, color, "area"))
            parts.append(line(x.start, base, x.end, base))
            at = x(float(np.clip(s.mean_C[column], low, high)))
            parts.append(line(at, base - ROW + 6, at, base, "mark"))
            parts.append(text(x.end + 8, base - 6, f"{100 * (values > 0).mean():.0f} % +", "tick"))
        parts.append(line(x(0), top - 4, x(0), bottom, "zero"))
        step = marks[1] - marks[0] if len(marks) > 1 else 1.0
        parts += [text(x(v), bottom + 17, words.tick(v, step), "tick", "middle") for v in marks]
    body = picture(WIDTH, bottom + 26, parts, "Influence scores per source and capability")
    worst, best = found[-1], found[0]
    lead = (
        f"{best.source} helps most taken together, {worst.source} least: "
        f"{_harm(worst, capabilities)}. A source whose hill stands right of the zero line "
        "lowers that capability's loss when it is trained on; one left of it raises it."
    )
    steps = reading.scores[0].steps
    note = (
        f"{sum(len(s.score_NC) for s in found):,} examples, scored at "
        f"{'step' if len(steps) == 1 else 'steps'} {words.both([f'{s:,}' for s in steps])} and summed over them "
        "(Eq. 4). x: fall of the capability's loss per unit of a gradient step on the example (right: helps). "
        "Drawn from the 1st to the 99th percentile of all sources together; the rest is clipped. Each row is scaled to "
        "its own peak; upright stroke: mean; at the right: share of examples above 0. Sources from most to least helpful."
    )
    return Figure("influence", "Influence per example", lead, body, note)


def heat(reading: Reading) -> Figure | None:
    """Mean score of each source on each capability, coloured."""
    found = summary.influence(reading)
    if not found:
        return None
    capabilities = reading.scores[0].capabilities
    mean_GC = np.stack([s.mean_C for s in found])
    most_C = np.maximum(np.abs(mean_GC).max(axis=0), 1e-30)
    most = max(max(abs(s.total) for s in found), 1e-30)
    colors = palette.source_colors(reading.run.domains)
    rows = []
    for s in found:
        color = colors.get(s.source, "var(--ink)")
        cells = [
            element("th", escape(s.source), scope="row", style=f"color:{color}"),
            element("td", escape(reading.run.domains.get(s.source, "")), class_="domain"),
        ]
        for value, error, top in zip(s.mean_C, s.error_C, most_C, strict=True):
            cells.append(
                _cell(float(value), float(value / top), f"± {words.compact(float(error)).lstrip('+')}")
            )
        cells.append(_cell(s.total, s.total / most))
        cells.append(element("td", f"{100 * s.kept:.0f} %"))
        rows.append(element("tr", "".join(cells)))
    head = ["source", "domain", *capabilities, "together", "examples above 0"]
    helps = {
        c: [s.source for s in sorted(found, key=lambda s: -s.mean_C[i])[:2] if s.mean_C[i] > 0]
        for i, c in enumerate(capabilities)
    }
    said = [f"{c} is helped most by {words.both(names)}" for c, names in helps.items() if names]
    lead = "; ".join(said) + ". " if said else "No source helps any capability. "
    lead = lead[0].upper() + lead[1:]
    harmful = [s.source for s in found if (s.mean_C < 0).all()]
    if harmful:
        lead += f"{words.both(harmful)} {'harms' if len(harmful) == 1 else 'harm'} every capability. "
    lead += (
        "Read a column downwards to see what a capability wants, a row across to see whom a source serves."
    )
    note = (
        "Token-weighted mean score (rho of Eq. 5, per capability) ± its standard error. Blue helps, orange harms; "
        "colour is relative to the greatest value of its column. Together: the capabilities' weighted mean, "
        "from which the mixture is made."
    )
    return Figure(
        "heat", "Influence per source and capability", lead, table(head, rows, "numbers heat"), note
    )


def _clip(scores: np.ndarray) -> tuple[float, float]:
    """The drawn range: percentiles of the finite scores, always with 0 inside."""
    finite = scores[np.isfinite(scores)]
    low, high = np.percentile(finite, CLIP) if len(finite) else (0.0, 0.0)
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    room = 0.02 * (high - low) or 1.0
    return low - room, high + room


def _harm(source: SourceInfluence, capabilities: tuple[str, ...]) -> str:
    """What training on a source's examples does to the capabilities."""
    worse = [c for c, v in zip(capabilities, source.mean_C, strict=True) if v < 0]
    if len(worse) == len(capabilities):
        return "on average its examples raise the loss of every capability"
    if worse:
        return f"on average its examples raise the loss of {words.both(worse)}"
    return "even so, on average its examples lower the loss of every capability"


def _cell(value: float, strength: float, small: str = "") -> str:
    """A number on a ground of the sign's colour; at most half opaque, so that ink stays readable."""
    sign = "positive" if value >= 0 else "negative"
    shade = min(0.55, 0.55 * abs(strength))
    aside = f" <small>{escape(small)}</small>" if small else ""
    return (
        f'<td style="background:rgb(var(--{sign}) / {shade:.2f})">{escape(words.compact(value))}{aside}</td>'
    )
